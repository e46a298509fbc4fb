"""The Flower strategy of all methods: one model per client, checked uploads, evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.messages import record_of
from pfedgpa_app.methods.base import Rounds
from pfedgpa_app.methods.halves import ServerHalf
from pfedgpa_app.results.log import RunLog, mean
from pfedgpa_app.server.evaluation import Evaluator
from pfedgpa_app.server.roster import Roster
from pfedgpa_app.server.screening import (
    NoUploadsError,
    first_error,
    in_words,
    own_fault,
    remedy,
    screened,
)
from pfedgpa_app.server.sending import array_bytes

logger = logging.getLogger("pfedgpa")

_TOLD = {  # what clients say of the weights that they keep
    "diverged": "trained its own weights to infinity, and goes on from those of before, if any",
    "lost": "no longer has what it kept between rounds, and begins anew: give its node a state-dir "
    "that lasts",
}


class Personalised(Strategy):
    """Runs one federation, in which every client may be sent weights of its own.

    Replies that cannot be used are named in the log and left out; a round with fewer than
    ``min_uploads`` usable uploads ends the run.
    """

    def __init__(
        self,
        method: Rounds[Any],
        name: str,
        roster: Roster,
        config: Config,
        log: RunLog,
        initial: Weights,
        classes: int,
        keep: Callable[[int], None],
        record_asked: Callable[[int, Iterable[int]], None],
    ) -> None:
        """Prepare the rounds of ``method``, called ``name``.

        Args:
            initial: the network's weights.
            classes: how many classes the clients' data have.
            keep: is called with each round's number at its end.
            record_asked: is called with each round's number and the clients about to be asked for
                an upload.
        """
        self.method, self.name, self.roster = method, name, roster
        self.half = ServerHalf(name, method, initial)
        self.config, self.log, self._keep = config, log, keep
        self.record_asked, self.initial = record_asked, initial
        self.evaluator = Evaluator(name, roster, config, log)
        self.honest = [
            c for c in range(config.initial_clients) if c not in config.malicious_clients
        ]
        self.done = 0  # rounds done before, which a resumed run does not repeat
        self._classes = classes if config.share_label_counts else 0
        self.server_seconds = 0.0
        self.bytes_up = self.bytes_down = self._round_down = 0
        self._sent: dict[int, Message] = {}
        self._away: list[int] = []  # to be asked, but not connected
        self._late: set[int] = set()  # clients whose uploads count as too late
        self._participants: dict[int, dict[str, float]] = {}

    def costs(self) -> dict[str, float]:
        """Return what the rounds have cost so far."""
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "server_seconds": self.server_seconds,
        }

    def restore(self, costs: dict[str, float], done: int = 0) -> None:
        """Go on after ``done`` rounds, which cost ``costs``."""
        self.bytes_up, self.bytes_down = int(costs["bytes_up"]), int(costs["bytes_down"])
        self.server_seconds, self.done = costs["server_seconds"], done

    def summary(self) -> None:
        logger.info("federation %s: %d clients", self.name, self.config.num_clients)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        server_round += self.done
        rate = self.half.rate(server_round)
        settings = {"method": self.name, "round": server_round, "rate": rate}
        chosen, self._late = asked_in(self.config, server_round)
        self.roster.await_nodes(chosen, self.config.min_uploads)
        self._away = [client for client in chosen if not self.roster.is_here(client)]
        self._sent = {
            client: self.roster.message(
                client, MessageType.TRAIN, self.half.download(server_round, client), settings
            )
            for client in chosen
            if client not in self._away
        }
        for client, message in self._sent.items():
            if (rival := self.half.rival(server_round, client)) is not None:
                message.content["reference"] = record_of(rival)
        self._round_down = sum(array_bytes(message) for message in self._sent.values())
        self.record_asked(server_round, self._sent)
        return list(self._sent.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        server_round += self.done
        answers = self.roster.replies(self._sent, replies)
        sent = [client for client in self._sent if client not in self._late]
        uploads, rejected = self.screened(server_round, sent, answers, self._away)
        self.note_kept(server_round, answers)
        round_up = sum(array_bytes(answers[client]) for client in uploads)
        self.bytes_up += round_up
        self.bytes_down += self._round_down
        if len(uploads) < self.config.min_uploads:
            error = first_error(answers)
            if fault := own_fault(rejected.values()):
                raise fault from error
            count = f"only {len(uploads)}" if uploads else "none"
            asked = len(self._sent) + len(self._away)
            raise NoUploadsError(
                f"round {server_round} of {self.name}: {count} of {asked} clients sent a "
                f"usable upload, min-uploads is {self.config.min_uploads}; the first: "
                + in_words(rejected)
                + remedy(
                    rejected.values(),
                    self.method.suspects(self.name, self.config),
                    self.config.local_dp_epsilon > 0,
                )
            ) from error
        self._participants = {
            client: {"train_loss": upload.loss}
            | ({"malicious": True} if client in self.config.malicious_clients else {})
            for client, upload in uploads.items()
        }
        started = time.perf_counter()
        self.half.aggregate(server_round, uploads)
        self.server_seconds += time.perf_counter() - started
        metrics: dict[str, Any] = {
            "train-loss": self._loss(),
            "uploads": len(uploads),
            "rejected": len(rejected),
            "bytes-up": round_up,
            "bytes-down": self._round_down,
        }
        return None, MetricRecord(metrics)

    def note_kept(self, server_round: int, answers: dict[int, Message]) -> None:
        """Note which clients keep something for later, used upload or not, and who has lost it."""
        for client, answer in answers.items():
            records = {} if answer.has_error() else answer.content.metric_records
            told: Any = records.get("metrics", {})
            if told.get("keeps"):
                self.roster.keeping.add((self.name, client))
            for text in (text for key, text in _TOLD.items() if told.get(key)):
                where = f"{self.name} round {server_round}: client {client}"
                self.log.event("warning", f"{where} {text}")

    def _loss(self) -> float:
        """Return the mean training loss of the round's honest clients that took a step."""
        honest = [p["train_loss"] for p in self._participants.values() if "malicious" not in p]
        return mean([loss for loss in honest if not math.isnan(loss)])

    def screened(
        self,
        server_round: int,
        sent: Iterable[int],
        answers: dict[int, Message],
        away: Iterable[int] = (),
    ) -> tuple[dict[int, Upload], dict[int, str]]:
        """Return the usable uploads, and why the others are not; these are logged, too."""
        expected = self.half.expected_upload(server_round)
        uploads, wrong = screened(
            sent, answers, expected, server_round, self._classes, self.config, self.method.beside
        )
        rejected = dict.fromkeys(away, "is not connected") | wrong
        for client, reason in sorted(rejected.items()):
            self.log.rejected(self.name, f"round {server_round}", client, reason)
        return uploads, rejected

    def _evaluated(self, server_round: int) -> bool:
        rounds, every = self.config.num_server_rounds, self.config.evaluate_every
        if not every:
            return False
        return server_round > rounds - 5 or server_round % every == 0 or server_round == 1

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        server_round += self.done
        clients = self.honest if self._evaluated(server_round) else []
        if clients:
            self.roster.poll()
        self._sent = {
            client: self.evaluator.message(
                client, self.half.evaluation_download(server_round, client), server_round
            )
            for client in clients
            if self.roster.is_here(client)
        }
        return list(self._sent.values())

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        server_round += self.done
        answers = self.roster.replies(self._sent, replies)
        scores = self.evaluator.scores(server_round, self._sent, answers)
        self.log.round(self.name, server_round, self._participants, scores, self._loss())
        self._keep(server_round)
        if not scores:
            return None
        return MetricRecord({"accuracy": mean([s["accuracy"] for s in scores.values()])})


def asked_in(config: Config, server_round: int) -> tuple[list[int], set[int]]:
    """Draw whom a round asks for an upload, in rising order, and who of them will be too late.

    The draw is the same in all federations of a run. Only in a simulation are some of the round's
    clients not asked, as they drop out, and are some late; ``min_uploads`` are always left.
    """
    rng = numpy_generator(config.seed, "sample", server_round)
    chosen = sorted(rng.choice(config.initial_clients, config.round_clients, replace=False))
    order = numpy_generator(config.seed, "missing", server_round).permutation(chosen).tolist()
    dropped, late = config.dropped_clients, config.late_clients
    return sorted(order[dropped:]), set(order[dropped : dropped + late])
