"""Turn clients' counts into the figures of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pfedgpa_app.core.sections import Config
from pfedgpa_app.methods import fine_tuning
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.training.evaluation import FinalScore, FineTuning


@dataclass(frozen=True)
class Outcome:
    """One method's result: accuracies in percent, one a client in the order of ``clients``."""

    clients: list[int]
    before: np.ndarray
    after: np.ndarray  # after the method's own fine-tuning
    as_in_training: np.ndarray
    tuned: np.ndarray | None  # after what pooled validation chose; None without a grid
    kept: np.ndarray  # before or after, whichever is better on the client's own validation images
    validation: dict[str, float]  # pooled: {"before_ft", "after_ft", "after_ft_tuned"}
    fine_tuning: FineTuning
    tuned_by: FineTuning | None
    agreement: float | None = None  # % of test images predicted as by the references


def outcome(
    scores: dict[int, FinalScore],
    method: type[Personaliser[Any]],
    config: Config,
    fine_tunings: Sequence[FineTuning],
) -> Outcome:
    """Return a method's result: validation images choose fine-tunings, test images are reported.

    Args:
        scores: each client's final score, by client.
        fine_tunings: the fine-tunings that ``scores`` are of, after the score before fine-tuning.
    """
    clients = sorted(scores)
    images = np.array([scores[c].test_images for c in clients])[:, None]
    test = 100 * np.array([scores[c].test for c in clients]) / images
    validation = np.array([scores[c].validation for c in clients])
    tried = [FineTuning(0, 0.0), *fine_tunings]
    default = tried.index(fine_tuning.default(config), 1)
    training = tried.index(fine_tuning.as_in_training(config), 1)
    own = method.own_fine_tuning(config)
    tuned = None
    if config.fine_tune_grid_epochs:
        grid = [0, *sorted(tried.index(each, 1) for each in fine_tuning.tuning_grid(config))]
        pooled = validation.sum(0)
        # the gentlest of the best, so that a tie does not fine-tune more than necessary
        tuned = min(grid, key=lambda i: (-pooled[i], tried[i].epochs * tried[i].learning_rate))
    by_kind = {"default": default, "training": training, "tuned": tuned}
    by_kind["own"] = tried.index(own, 1) if own else None
    chosen = by_kind[method.fine_tuning]
    chosen = default if chosen is None else chosen
    better = validation[:, chosen] > validation[:, 0]
    held = sum(scores[c].validation_images for c in clients)
    agreement = [
        100 * s.agreement / s.test_images for s in scores.values() if s.agreement is not None
    ]
    scored = {"before_ft": 0, "after_ft": chosen}
    if tuned is not None:
        scored["after_ft_tuned"] = tuned
    return Outcome(
        clients,
        test[:, 0],
        test[:, chosen],
        test[:, training],
        None if tuned is None else test[:, tuned],
        np.where(better, test[:, chosen], test[:, 0]),
        {k: 100 * int(validation[:, i].sum()) / held for k, i in scored.items() if held},
        tried[chosen],
        None if tuned is None else tried[tuned],
        float(np.mean(agreement)) if agreement else None,
    )


def _described(fine_tuning: FineTuning | None) -> dict[str, Any] | None:
    return None if fine_tuning is None else asdict(fine_tuning)


def summary_entry(
    name: str, method: type[Personaliser[Any]], result: Outcome, config: Config, **more: Any
) -> dict[str, Any]:
    """Return one method's entry of ``summary.json``; accuracies in percent, means over clients."""

    def average(values: np.ndarray | None) -> float | None:
        return None if values is None else round(float(values.mean()), 4)

    return {
        "method": name,
        "title": method.title,
        "analysis_only": method.analysis_only,
        "num_clients": config.num_clients,
        "clients_evaluated": len(result.clients),
        "malicious_clients": len(config.malicious_clients),
        "join_clients": config.join_clients,
        "rounds": config.num_server_rounds,
        "seed": config.seed,
        "accuracy_before_ft": average(result.before),
        "accuracy_after_ft": average(result.after),
        "accuracy_as_its_paper": average(
            result.before if method.fine_tuning == "default" else result.after
        ),
        "accuracy_kept": average(result.kept),
        "accuracy_after_ft_as_in_training": average(result.as_in_training),
        "accuracy_after_ft_tuned": average(result.tuned),
        "accuracy_worst_client": round(float(result.after.min()), 4),
        "accuracy_worst_client_before_ft": round(float(result.before.min()), 4),
        "accuracy_worst_client_kept": round(float(result.kept.min()), 4),
        "clients_under_60_before_ft": int((result.before < 60).sum()),  # the paper's failures
        "spread_before_ft": round(float(result.before.std()), 4),
        "spread_after_ft": round(float(result.after.std()), 4),
        "spread_kept": round(float(result.kept.std()), 4),
        "validation": {key: round(value, 4) for key, value in result.validation.items()},
        "agreement_with_last_upload": None
        if result.agreement is None
        else round(result.agreement, 4),
        "fine_tuning": _described(result.fine_tuning),
        "fine_tuning_tuned": _described(result.tuned_by),
        **more,
    }


_SEEN = "clients_evaluated"
LEGEND = (
    "kept: what a client would use: the weights as sent or after FT, whichever its own validation "
    "data favour; as sent if it has none.",
    "FT: each client fine-tunes what it was sent on its training data, by the recipe beside it; "
    "tuned FT: by a recipe chosen on pooled validation data.",
)


def recipe_in_words(fine_tuning: Mapping[str, Any]) -> str:
    """Describe a fine-tuning, as in "1 epoch at 0.005"."""
    epochs, kind = fine_tuning["epochs"], "step" if fine_tuning["full_batch"] else "epoch"
    part = "" if fine_tuning["part"] == "all" else f" of the {fine_tuning['part']}"
    return f"{epochs} {kind}{'s' * (epochs != 1)} at {fine_tuning['learning_rate']:g}{part}"


def recipes_in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    """Describe the fine-tunings of a method's rows, one a seed: tuning may choose several."""
    return " or ".join(dict.fromkeys(recipe_in_words(row["fine_tuning"]) for row in rows))


def text_table(rows: list[dict[str, Any]]) -> str:
    """Return the final table and its legend, in Markdown that also reads well in a terminal."""
    header = ["method", "kept", "as sent", "after FT", "FT", "worst client, kept"]
    tuned = any(row["accuracy_after_ft_tuned"] is not None for row in rows)
    if tuned:
        header.insert(5, "tuned FT")
    lines = [header]
    for row in rows:
        cells = [
            row["title"],
            f"{row['accuracy_kept']:.1f} ± {row['spread_kept']:.1f}",
            f"{row['accuracy_before_ft']:.1f} ± {row['spread_before_ft']:.1f}",
            f"{row['accuracy_after_ft']:.1f} ± {row['spread_after_ft']:.1f}",
            recipe_in_words(row["fine_tuning"]),
            f"{row['accuracy_worst_client_kept']:.1f}",
        ]
        if tuned:
            cells.insert(5, percent(row["accuracy_after_ft_tuned"]))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    table = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    notes = *without_result(rows), *without_generation(rows)
    return "\n".join(
        [*table, "", *LEGEND, "±: one standard deviation over clients, weighted equally.", *notes]
    )


def percent(value: float | None) -> str:
    """Format an accuracy in %, as tables have it; "–" if there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def without_generation(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say which methods had no reason to generate weights, and what their clients were sent."""
    for row in rows:
        chosen = row.get("chosen_by_validation")
        if chosen == "mean":
            yield (
                f"{row['title']}: clients' validation data favoured one network for all, so "
                "all were sent that one; none was generated."
            )
        elif chosen == "own":
            yield (
                f"{row['title']}: clients' validation data favoured their own uploads; the "
                "generated weights stay close to these."
            )
        elif row.get("rank") == 0:
            yield (
                f"{row['title']}: uploads did not tell clients apart (rank 0), so all were sent "
                "the same weights."
            )


def without_result(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say which clients the figures leave out: by design, and because they did not answer."""
    by_design = dict.fromkeys((*_evaluated(row), row["num_clients"]) for row in rows)
    for meant, who, clients in by_design:
        if meant < clients:
            yield f"Figures cover {meant} of {clients} clients: the {who}."
    for row in rows:
        meant, who = _evaluated(row)
        there = row.get(_SEEN, meant)  # earlier versions evaluated all
        if there < meant:
            yield (
                f"{row['title']}: figures cover {there} of {meant} {who}; the others could not be "
                "evaluated (events.jsonl says why)."
            )


def without_some(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return, for a name, of how many clients a method's figures are where some are missing."""
    there = [(row[_SEEN], _evaluated(row)[0]) for row in rows if _SEEN in row]
    fewest, meant = min(there, key=lambda each: each[0] - each[1], default=(0, 0))
    return f" [{fewest} of {meant} clients]" if fewest < meant else ""


def _evaluated(row: Mapping[str, Any]) -> tuple[int, str]:
    """Return how many clients a row's figures are meant to cover, and what to call them."""
    malicious, joining = row.get("malicious_clients", 0), row.get("join_clients", 0)
    who = "honest clients" if malicious else "clients"
    who += " that were there from the start" if joining else ""
    return row["num_clients"] - malicious - joining, who


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of these cells in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def over_seeds(values: Sequence[float | None], digits: int = 2) -> str:
    """Return mean ± standard deviation of the known values; one value alone; "–" for none."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return "–"
    spread = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{spread}"


def seeds_table(seeds: Sequence[Sequence[Mapping[str, Any]]], columns: Mapping[str, str]) -> str:
    """Return a table of mean ± standard deviation over seeds, in Markdown.

    Args:
        seeds: each seed's entries of ``summary.json``, the same methods in the same order.
        columns: {heading: key of an entry}; a column without any value is left out.
    """
    shown = {
        h: k for h, k in columns.items() if any(r.get(k) is not None for s in seeds for r in s)
    }
    rows = []
    for alike in zip(*seeds, strict=True):
        cells = [over_seeds([row.get(key) for row in alike]) for key in shown.values()]
        rows.append([alike[0]["title"] + without_some(alike), *cells])
    return markdown(["method", *shown], rows)
