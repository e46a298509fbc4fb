"""How good clients' weights are: the evaluations that clients are asked for, and their answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from flwr.app import Message, MessageType

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.messages import record_of
from pfedgpa_app.results.log import RunLog
from pfedgpa_app.server.roster import Roster
from pfedgpa_app.server.screening import (
    NoUploadsError,
    check_counts,
    failure,
    first_error,
    own_fault,
)
from pfedgpa_app.server.sending import array_bytes
from pfedgpa_app.training.evaluation import FinalScore, FineTuning


class Evaluator:
    """Asks the clients of one federation, called ``name``, how good weights are."""

    def __init__(self, name: str, roster: Roster, config: Config, log: RunLog) -> None:
        self.name, self.roster, self.config, self.log = name, roster, config, log

    def message(
        self, client: int, weights: Weights, server_round: int, leave: bool = False
    ) -> Message:
        """Make the question to ``client``.

        Args:
            leave: whether it saves the weights that are its own beside a simulation's results.
        """
        settings = {"method": self.name, "round": server_round, "leave": leave}
        return self.roster.message(client, MessageType.EVALUATE, weights, settings)

    def scores(
        self, server_round: int, sent: Collection[int], answers: dict[int, Message]
    ) -> dict[int, dict[str, float]]:
        """Return accuracy in % and mean test loss of every client that could be evaluated."""
        return {
            client: {
                "accuracy": 100 * counts["correct"] / counts["images"],
                "test_loss": counts["loss"] / counts["images"],
            }
            for client, counts in self._counted(self.name, server_round, sent, answers)
        }

    def accuracies(
        self, weights: dict[int, Weights], server_round: int, leave: bool = False
    ) -> dict[int, float]:
        """Return the accuracy in % of every answering client with its ``weights``.

        ``leave`` is as in ``message``.
        """
        messages = {c: self.message(c, mine, server_round, leave) for c, mine in weights.items()}
        scores = self.scores(server_round, messages, self.roster.exchange(messages))
        return {client: score["accuracy"] for client, score in scores.items()}

    def final(
        self,
        method: str,
        weights: dict[int, Weights],
        references: dict[int, Weights],
        fine_tunings: Iterable[FineTuning],
    ) -> tuple[dict[int, FinalScore], int]:
        """Evaluate every client with its own ``weights``, before and after each fine-tuning.

        Args:
            references: for some clients, weights to compare the client's predictions with.

        Returns:
            each answering client's counts, and the bytes that sending the weights took. References
            do not count, since only this evaluation needs them.

        Raises:
            NoUploadsError: no client answers.
        """
        rounds, asked = self.config.num_server_rounds, [asdict(each) for each in fine_tunings]
        settings = {
            "method": self.name,
            "round": rounds,
            "fine-tunings": json.dumps(asked),
            "leave": True,
        }
        messages = {
            client: self.roster.message(client, "evaluate.final", mine, settings)
            for client, mine in weights.items()
        }
        sent = sum(array_bytes(message) for message in messages.values())
        for client, reference in references.items():
            messages[client].content["reference"] = record_of(reference)
        answers = self.roster.exchange(messages)
        scores = {
            client: FinalScore(
                test=list(counts["test"]),
                test_images=int(counts["test-images"]),
                validation=list(counts["validation"]),
                validation_images=int(counts["validation-images"]),
                agreement=counts.get("agreement"),
                own_part=bool(counts.get("own-part", 0)),
            )
            for client, counts in self._counted(method, rounds, messages, answers, len(asked))
        }
        if not scores:
            why = f"{method}: no client could evaluate its weights"
            raise NoUploadsError(why) from first_error(answers)
        return scores, sent

    def _counted(
        self,
        name: str,
        server_round: int,
        sent: Collection[int],
        answers: dict[int, Message],
        fine_tunings: int | None = None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (client, its counts) of every usable evaluation; unusable ones are logged.

        Raises:
            MethodError, NetworkError: every client fails, and that is the reason.
        """
        wrong: list[str] = []
        when = f"round {server_round}" if fine_tunings is None else "last evaluation"
        for client in sent:
            counts: Any = {}
            if client not in answers:
                here = self.roster.is_here(client)
                reason = "did not answer" if here else "is not connected"
            elif answers[client].has_error():
                reason = failure(answers[client])
            else:
                counts = answers[client].content.metric_records.get("metrics", {})
                reason = check_counts(counts, fine_tunings)
            if reason:
                self.log.rejected(name, when, client, reason)
                wrong.append(reason)
            else:
                yield client, counts
        if len(wrong) == len(sent) and (fault := own_fault(wrong)):
            raise fault from first_error(answers)
