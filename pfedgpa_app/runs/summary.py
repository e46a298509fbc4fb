"""A run's results: a row for each method, its clients' figures, the plots and the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pfedgpa_app.core.files import write_json, write_tensors, write_text
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import users_of_clients
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.halves import reported
from pfedgpa_app.results import plots
from pfedgpa_app.results.log import (
    CLIENTS,
    JOINING,
    SUMMARY,
    TABLE,
    RunLog,
    append,
    mean,
    participants,
)
from pfedgpa_app.results.tables import Outcome, outcome, percent, summary_entry, text_table
from pfedgpa_app.server.strategy import Personalised, asked_in
from pfedgpa_app.training.evaluation import FinalScore, FineTuning


def save_weights(
    path: Path, weights: dict[int, Weights], common: Weights, about: Mapping[str, str]
) -> None:
    """Write clients' weights as ``client-3/NAME``, and those that all share as ``global/NAME``.

    Args:
        weights: by client.
        common: the shared weights; a client's tensor counts as shared only if it is the same
            object.
        about: goes into the file's metadata, beside the clients' numbers.
    """
    tensors: Weights = {}
    for client, mine in weights.items():
        for name, tensor in mine.items():
            prefix = "global" if tensor is common.get(name) else f"client-{client}"
            tensors[f"{prefix}/{name}"] = tensor
    if tensors:
        path.parent.mkdir(exist_ok=True)
        numbers = json.dumps(sorted(c for c, mine in weights.items() if mine))
        write_tensors(path, tensors, {"format": "pt", "clients": numbers, **about})


def peak_memory() -> int:
    """Return the most memory that this process ever held, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Summary:
    """The figures of the methods that are done, written to disk after each method.

    Attributes:
        rows: {method: its entry of ``summary.json``}.
        outcomes: {method: its clients' accuracies}.
    """

    def __init__(self, folder: Path, config: Config, log: RunLog) -> None:
        self.folder, self.config, self.log = folder, config, log
        self.rows: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, Outcome] = {}

    def add(
        self,
        name: str,
        method: Personaliser[Any],
        strategy: Personalised,
        scores: dict[int, FinalScore],
        tried: list[FineTuning],
        **more: Any,
    ) -> None:
        """Add a method.

        Args:
            strategy: its federation's, whose rounds are over.
            scores: each client's final score, by client.
            tried: the fine-tunings that ``scores`` are of.
            more: further entries of its row.
        """
        result = outcome(scores, type(method), self.config, tried)
        self.outcomes[name] = result
        self.rows[name] = summary_entry(
            name,
            type(method),
            result,
            self.config,
            **self._of_rounds(name, result, strategy),
            peak_memory_mib=round(peak_memory() / 2**20, 1),  # so far: earlier methods count
            **more,
            **reported(name, method),
        )
        self.log.event(
            "method",
            f"{method.title}: {result.before.mean():.1f} % as sent, "
            f"{result.after.mean():.1f} % after fine-tuning",
        )
        users = users_of_clients(self.config)
        records = [
            {
                "method": name,
                "client": client,
                **({"users": users[client]} if users else {}),
                "before_ft": result.before[row],
                "after_ft": result.after[row],
                "kept": result.kept[row],
            }
            for row, client in enumerate(result.clients)
        ]
        append(self.folder / CLIENTS, *records)
        self.write()

    def _of_rounds(self, name: str, result: Outcome, strategy: Personalised) -> dict[str, Any]:
        """Return the row's entries about the rounds.

        Those of the curve are None for all methods but the one that the federation is named for.
        """
        last = self.config.num_server_rounds
        in_it = participants(self.folder, strategy.name, last, self.config.num_clients)
        if not in_it:  # its uploads come from another run
            asked, late = asked_in(self.config, last)
            in_it = set(asked) - late
        took_part = [a for c, a in zip(result.clients, result.before, strict=True) if c in in_it]
        curve = self.log.curves.get(strategy.name, []) if name == strategy.name else []
        accuracies = dict(curve)
        peak = max(accuracies.values(), default=0.0)
        soon = [r for r, a in accuracies.items() if a >= 0.95 * peak]
        last_five = [accuracy for _, accuracy in curve][-5:]
        return {
            "accuracy_before_ft_participants": round(mean(took_part), 4) if took_part else None,
            "accuracy_mean_of_last_five_rounds": round(mean(last_five), 4) if last_five else None,
            "rounds_to_95_percent_of_peak": min(soon) if soon else None,
        }

    def add_joined(
        self, name: str, method: Personaliser[Any], curve: list[dict[int, float]]
    ) -> None:
        """Add to a method's row how accurate clients that joined were.

        Args:
            curve: {client: accuracy} for each iteration.
        """
        means = [mean(list(scores.values())) if scores else None for scores in curve]
        accuracies = [None if each is None else round(each, 4) for each in means]
        self.rows[name]["accuracy_of_joining_clients"] = accuracies
        records = [
            {"method": name, "iteration": iteration, "client": client, "accuracy": accuracy}
            for iteration, scores in enumerate(curve)
            for client, accuracy in scores.items()
        ]
        append(self.folder / JOINING, *records)
        shown = " → ".join(map(percent, means))
        self.log.event("joined", f"{method.title}: clients that join: {shown} %")
        self.write()

    def write(self) -> None:
        """Write the rows of the methods that are done."""
        rows = [self.rows[name] for name in self.config.method if name in self.rows]
        write_json(self.folder / SUMMARY, rows, indent=2)

    def finish(self) -> None:
        """Draw the plots and write the table of all methods."""
        if self.config.report:
            outcomes = {name: self.outcomes[name] for name in self.config.method}
            plots.accuracy_over_rounds(self.folder / "accuracy.png", self.log, outcomes)
            plots.before_and_after(self.folder / "clients.png", outcomes)
        table = text_table([self.rows[name] for name in self.config.method])
        write_text(self.folder / TABLE, table + "\n")
        self.log.event("table", table)
