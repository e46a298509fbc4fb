"""The Flower strategy that all methods share: one model a client, checked uploads, evaluation."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from pfedgpa_app.attacks import malicious
from pfedgpa_app.config import Config
from pfedgpa_app.diffusion.buffer import Layout, finite
from pfedgpa_app.methods import method_class
from pfedgpa_app.methods.base import Method, Upload, Way
from pfedgpa_app.models import Weights
from pfedgpa_app.randomness import numpy_generator
from pfedgpa_app.results.log import RunLog
from pfedgpa_app.roster import Roster, Settings, match

logger = logging.getLogger("pfedgpa")
_WHAT: dict[int, str] = {  # what Flower's codes mean for whom reads the log
    ErrorCode.MESSAGE_UNAVAILABLE: "did not answer in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "did not answer in time",
    ErrorCode.MOD_FAILED_PRECONDITION: "uploads what its privacy mod does not take",
    ErrorCode.NODE_UNAVAILABLE: "is not connected any more",
    ErrorCode.CLIENT_APP_CRASHED: "lost its process",
}
MOST_EXAMPLES = 2**53  # that a client may claim: further than float64 counts
_HEADER = 4096  # bytes; NumPy's format needs some 128
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NoUploadsError(RuntimeError):
    """A round ended without one usable upload: the run cannot go on."""


def failure(reply: Message) -> str:
    """Why an error reply says that the client failed, in one short text."""
    reason = _ANSI.sub("", reply.error.reason or "no reason given").strip()
    code = reply.error.code
    return f"{_WHAT.get(code, 'failed')} (code {code}): {reason[-300:]}"


def checked(arrays: ArrayRecord, expected: Weights) -> tuple[Weights | None, str]:
    """A client's arrays in the order of ``expected``, or None and what is wrong with them.

    Args:
        expected: tensors of the names, shapes and dtypes that they must have, finite where
            these are.
    """
    missing, extra = sorted(expected.keys() - arrays), sorted(arrays.keys() - expected)
    if missing or extra:
        return None, f"sent tensors with missing names {missing[:9]} and extra names {extra[:9]}"
    for name, like in expected.items():  # before anything is unpacked
        size = len(arrays[name].data)
        if size > 8 * like.nbytes + _HEADER:  # a wrong dtype or shape is named as such below
            return None, f"sent {name} in {size} bytes, where {like.nbytes} are enough"
    try:
        weights: Weights = dict(arrays.to_torch_state_dict())
    except Exception as error:  # whatever malformed bytes make NumPy raise
        return None, f"sent arrays that cannot be read: {error}"
    for name, like in expected.items():
        tensor = weights[name]
        if tensor.shape != like.shape:
            return None, f"sent {name} of shape {list(tensor.shape)}, not {list(like.shape)}"
        if tensor.dtype != like.dtype:
            return None, f"sent {name} as {tensor.dtype}, not {like.dtype}"
        if not bool((finite(tensor) | ~finite(like)).all()):
            return None, f"sent {name} with numbers that are not finite"
    return {name: weights[name] for name in expected}, ""


def check_upload(
    reply: Message, expected: Weights, server_round: int, classes: int = 0
) -> tuple[Upload | None, str]:
    """The reply's upload, or None and what is wrong with it.

    Args:
        expected: tensors of the names, shapes and dtypes that an upload must have.
        server_round: the round that it must be of.
        classes: how many class counts a client that shares them must send.
    """
    if reply.has_error():
        return None, failure(reply)
    records, metrics = reply.content.array_records, reply.content.metric_records.get("metrics")
    if list(records) != ["arrays"]:
        return None, f"sent array records {sorted(records)} instead of ['arrays']"
    examples = metrics.get("num-examples") if metrics is not None else None
    if not isinstance(examples, int) or not 1 <= examples <= MOST_EXAMPLES:
        return None, f"sent num-examples {examples!r} instead of a whole number from 1 to 2^53"
    of_round = metrics.get("round") if metrics is not None else None
    if of_round != server_round:
        return None, f"sent an upload of round {of_round}"
    weights, wrong = checked(records["arrays"], expected)
    if weights is None:
        return None, wrong
    labels: Any = metrics.get("label-counts", []) if metrics is not None else []
    if not isinstance(labels, list) or any(not isinstance(n, int) or n < 0 for n in labels):
        return None, f"sent label-counts {labels!r} instead of whole numbers"
    if labels and (len(labels) != classes or not sum(labels)):
        return None, f"sent label-counts {labels!r} instead of the images of {classes} classes"
    return Upload(weights, examples, labels), ""


def check_counts(counts: Mapping[str, Any]) -> str:
    """What is wrong with a client's evaluation, of a round or the final one; "" for nothing."""
    final = "test" in counts
    kinds = ("test", "validation") if final else ("images",)
    for kind in kinds:
        images: Any = counts.get(f"{kind}-images" if final else kind)
        correct: Any = counts.get(kind) if final else [counts.get("correct")]
        good = isinstance(images, int) and isinstance(correct, list)
        if not good or any(not isinstance(n, int) or not 0 <= n <= images for n in correct):
            return f"sent an evaluation that cannot be: {dict(counts)!r}"[:300]
    tested = counts["test-images" if final else "images"]
    loss = counts.get("loss", 0.0)
    if tested < 1 or not isinstance(loss, (int, float)):
        return f"sent an evaluation that cannot be: {dict(counts)!r}"[:300]
    return ""


def norm(weights: Weights) -> float:
    """Of all finite numbers of all tensors as one vector."""
    wide = (t.to(torch.promote_types(t.dtype, torch.float64)) for t in weights.values())
    return math.sqrt(sum(float(t.abs().nan_to_num(posinf=0).square().sum()) for t in wide))


def too_large(uploads: dict[int, Upload], expected: Weights, limit: float) -> dict[int, str]:
    """Clients whose upload is more than ``limit`` times as large as the median, and why so.

    Where there are too few to have a median that one cannot move, ``expected`` is the measure.
    """
    norms = {client: norm(upload.weights) for client, upload in uploads.items()}
    usual = statistics.median(norms.values()) if len(norms) > 2 else norm(expected)
    if not limit or not usual:
        return {}
    return {
        client: f"sent weights {size / usual:.3g} times as large as usual"
        for client, size in norms.items()
        if size > limit * usual
    }


def too_far(uploads: dict[int, Upload], limit: float) -> dict[int, str]:
    """Clients whose upload is ``limit`` times as far from the median as the median client's.

    The median of each weight over the uploads, which a minority cannot move far.
    """
    if not limit or len(uploads) < 3:
        return {}
    layout = Layout.of(next(iter(uploads.values())).weights)
    vectors = torch.stack([layout.flatten(upload.weights) for upload in uploads.values()])
    distances = (vectors - vectors.median(0).values).norm(dim=1)
    usual = float(distances.median())
    return {
        client: f"sent weights {distance / usual:.3g} times as far from the median as is usual"
        for client, distance in zip(uploads, distances.tolist(), strict=True)
        if distance > limit * usual > 0
    }


def array_bytes(message: Message) -> int:
    """Bytes of the arrays that a message carries, as they travel."""
    records = message.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


def ways(config: Config) -> list[Way]:
    """What every client tries after the last round, each with its own epochs counted from 0.

    The run's gentle setting, a round's own training, what the run's methods' papers do, and
    the grid that validation chooses from.
    """
    wanted = [
        Way(config.fine_tune_epochs, config.fine_tune_learning_rate),
        Way(config.local_epochs, config.learning_rate),
    ]
    own = (method_class(name).own_fine_tuning(config) for name in config.method)
    wanted += [way for way in own if way]
    for rate in config.fine_tune_grid_learning_rates:
        wanted += [Way(e + 1, rate) for e in range(config.fine_tune_grid_epochs)]
    return list(dict.fromkeys(wanted))


@dataclass(frozen=True)
class FinalScore:
    """One client's counts after the last round; index 0 is before fine-tuning, then ``ways``.

    Counts are of correct predictions.
    """

    test: list[int]
    test_images: int
    validation: list[int]
    validation_images: int
    alike: int | None = None  # test images on which its reference predicts the same


class Personalised(Strategy):
    """Runs one federation: every client may be sent weights of its own.

    Replies that cannot be used are named in the log and left out; a round without any
    usable reply ends the run.
    """

    def __init__(
        self,
        method: Method[Any],
        name: str,
        roster: Roster,
        config: Config,
        log: RunLog,
        classes: int = 0,
        keep: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``classes`` of the clients' data; ``keep`` is called after each round."""
        self.method, self.name, self.roster = method, name, roster
        self.config, self.log, self._keep = config, log, keep
        self.honest = [c for c in range(config.founders) if c not in malicious(config)]
        self.done = 0  # rounds before those of ``start``
        self._classes = classes if config.share_label_counts else 0
        self.server_seconds = 0.0
        self.bytes_up = self.bytes_down = self._round_down = 0
        self._sent: dict[int, Message] = {}
        self._away: list[int] = []  # sampled, but not connected
        self._participants: dict[int, dict[str, float]] = {}

    def costs(self) -> dict[str, float]:
        """What the rounds cost so far."""
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "server_seconds": self.server_seconds,
        }

    def go_on(self, costs: dict[str, float], done: int = 0) -> None:
        """``done`` rounds are over, which cost ``costs``."""
        self.bytes_up, self.bytes_down = int(costs["bytes_up"]), int(costs["bytes_down"])
        self.server_seconds, self.done = costs["server_seconds"], done

    def summary(self) -> None:
        logger.info("federation %s: %d clients", self.name, self.config.num_clients)

    def sample(self, server_round: int) -> list[int]:
        """The round's clients, in rising order."""
        rng = numpy_generator(self.config.seed, "sample", server_round)
        drawn = rng.choice(self.config.founders, self.config.round_clients, replace=False)
        return sorted(int(c) for c in drawn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        server_round += self.done
        settings: Settings = {"method": self.name, "round": server_round}
        sampled = self.sample(server_round)
        self.roster.await_nodes(sampled, self.config.min_uploads)
        self._away = [client for client in sampled if not self.roster.is_here(client)]
        self._sent = {
            client: self.roster.message(
                client, MessageType.TRAIN, self.method.download(client), settings
            )
            for client in sampled
            if client not in self._away
        }
        self._round_down = sum(array_bytes(message) for message in self._sent.values())
        return list(self._sent.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        server_round += self.done
        uploads, rejected, round_up = self._accepted(server_round, match(self._sent, replies))
        self.bytes_up += round_up
        self.bytes_down += self._round_down
        if len(uploads) < self.config.min_uploads:
            count = f"only {len(uploads)}" if uploads else "none"
            asked = len(self._sent) + len(self._away)
            raise NoUploadsError(
                f"round {server_round} of {self.name}: {count} of {asked} clients sent a "
                f"usable upload, min-uploads is {self.config.min_uploads}; the first: "
                + "; ".join(f"client {c} {reason}" for c, reason in list(rejected.items())[:3])
            )
        started = time.perf_counter()
        self.method.aggregate(server_round, uploads)
        self.server_seconds += time.perf_counter() - started
        loss = sum(p["train_loss"] for p in self._participants.values()) / len(uploads)
        metrics: dict[str, Any] = {
            "train-loss": loss,
            "uploads": len(uploads),
            "rejected": len(rejected),
            "bytes-up": round_up,
            "bytes-down": self._round_down,
        }
        return None, MetricRecord(metrics)

    def join(self, method: Method[Any]) -> list[dict[int, float]]:
        """Admit the clients that were not there; ``method`` makes their weights.

        Returns:
            every client's accuracy in % as welcomed and after each iteration.
        """
        rounds = self.config.num_server_rounds
        clients = range(self.config.founders, self.config.num_clients)
        given = method.welcome(clients)
        curve = [self._accuracy(given, rounds)]
        for iteration in range(1, self.config.join_iterations + 1):
            server_round = rounds + iteration
            settings: Settings = {"method": self.name, "round": server_round}
            self._away = []
            self._sent = {
                client: self.roster.message(client, MessageType.TRAIN, mine, settings)
                for client, mine in given.items()
            }
            uploads, _, _ = self._accepted(server_round, self.roster.exchange(self._sent))
            given = given | (method.admit(uploads) if uploads else {})
            curve.append(self._accuracy(given, server_round))
        return curve

    def _accuracy(self, weights: dict[int, Weights], server_round: int) -> dict[int, float]:
        """Every answering client's accuracy in % with its ``weights``."""
        settings: Settings = {"method": self.name, "round": server_round}
        messages = {
            client: self.roster.message(client, MessageType.EVALUATE, mine, settings)
            for client, mine in weights.items()
        }
        scores = self._scores(server_round, messages, self.roster.exchange(messages))
        return {client: score["accuracy"] for client, score in scores.items()}

    def _counted(
        self, name: str, server_round: int, sent: Iterable[int], answers: dict[int, Message]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(client, what it counted), of those whose evaluation can be used; others are named."""
        for client in sent:
            counts: Any = {}
            if client not in answers:
                here = self.roster.is_here(client)
                reason = "did not answer" if here else "is not connected"
            elif answers[client].has_error():
                reason = failure(answers[client])
            else:
                counts = answers[client].content.metric_records.get("metrics", {})
                reason = check_counts(counts)
            if reason:
                self.log.rejected(name, server_round, client, reason)
            else:
                yield client, counts

    def _scores(
        self, server_round: int, sent: Iterable[int], answers: dict[int, Message]
    ) -> dict[int, dict[str, float]]:
        """Accuracy in % and mean test loss of every client that could be evaluated."""
        return {
            client: {
                "accuracy": 100 * counts["correct"] / counts["images"],
                "test_loss": counts["loss"] / counts["images"],
            }
            for client, counts in self._counted(self.name, server_round, sent, answers)
        }

    def _accepted(
        self, server_round: int, answers: dict[int, Message]
    ) -> tuple[dict[int, Upload], dict[int, str], int]:
        """The usable uploads, why the others are not, and the bytes of the usable ones."""
        uploads: dict[int, Upload] = {}
        rejected: dict[int, str] = {}
        self._participants = {}
        expected, round_up = self.method.expected_upload(), 0
        rejected |= dict.fromkeys(self._away, "is not connected")
        for client in self._sent:
            if client not in answers:
                rejected[client] = f"did not answer within {self.config.timeout:g} s"
                continue
            upload, reason = check_upload(answers[client], expected, server_round, self._classes)
            if upload is None:
                rejected[client] = reason
                continue
            uploads[client] = upload
        rejected |= too_large(uploads, expected, self.config.max_upload_norm)
        uploads = {c: upload for c, upload in uploads.items() if c not in rejected}
        rejected |= too_far(uploads, self.config.max_distance)
        uploads = {c: upload for c, upload in uploads.items() if c not in rejected}
        for client in uploads:
            round_up += array_bytes(answers[client])
            sent: Any = answers[client].content.metric_records["metrics"]
            self._participants[client] = {"train_loss": float(sent.get("loss", math.nan))}
        for client, reason in sorted(rejected.items()):
            self.log.rejected(self.name, server_round, client, reason)
        return uploads, rejected, round_up

    def _evaluated(self, server_round: int) -> bool:
        rounds, every = self.config.num_server_rounds, self.config.evaluate_every
        if not every:
            return False
        return server_round > rounds - 5 or server_round % every == 0 or server_round == 1

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        server_round += self.done
        settings: Settings = {"method": self.name, "round": server_round}
        clients = self.honest if self._evaluated(server_round) else []
        if clients:
            self.roster.look()
        self._sent = {
            client: self.roster.message(
                client, MessageType.EVALUATE, self.method.evaluation_download(client), settings
            )
            for client in clients
            if self.roster.is_here(client)
        }
        return list(self._sent.values())

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        server_round += self.done
        scores = self._scores(server_round, self._sent, match(self._sent, replies))
        self.log.round(self.name, server_round, self._participants, scores)
        self._keep(server_round)
        if not scores:
            return None
        return MetricRecord({"accuracy": sum(s["accuracy"] for s in scores.values()) / len(scores)})

    def finish(
        self, weights: dict[int, Weights], references: dict[int, Weights], method: str
    ) -> tuple[dict[int, FinalScore], int]:
        """Evaluate every client with its own ``weights``, before and after each fine-tuning.

        Args:
            references: weights to compare a client's predictions with, where there are some.

        Returns:
            each answering client's counts, and the bytes that the hand-over took, references
            not among them: nobody needs them but this evaluation.

        Raises:
            NoUploadsError: no client answers.
        """
        settings: Settings = {
            "method": self.name,
            "round": self.config.num_server_rounds,
            "ways": json.dumps([asdict(way) for way in ways(self.config)]),
        }
        messages = {
            client: self.roster.message(client, "evaluate.final", mine, settings)
            for client, mine in weights.items()
        }
        scores, sent = {}, sum(array_bytes(message) for message in messages.values())
        for client, reference in references.items():
            messages[client].content["reference"] = ArrayRecord(reference)
        answers = self.roster.exchange(messages)
        rounds = self.config.num_server_rounds
        for client, counts in self._counted(method, rounds, messages, answers):
            scores[client] = FinalScore(
                test=list(counts["test"]),
                test_images=int(counts["test-images"]),
                validation=list(counts["validation"]),
                validation_images=int(counts["validation-images"]),
                alike=counts.get("alike"),
            )
        if not scores:
            raise NoUploadsError(f"{method}: no client could evaluate its weights")
        return scores, sent
