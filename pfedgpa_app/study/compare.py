"""Every method on the same partitions and seeds, in one table with the paper's figures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedgpa_app.config.names import defaults, keys, require_method
from pfedgpa_app.config.parse import argument
from pfedgpa_app.config.resolve import values_of
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.methods import METHODS, federations
from pfedgpa_app.methods.own import reference_of
from pfedgpa_app.results.log import finished_in, rows_of
from pfedgpa_app.results.tables import markdown, over_seeds
from pfedgpa_app.runs.folder import kept_methods, kept_settings
from pfedgpa_app.study.plan import PlannedRun, Settings, expand, require_alike, settings_of

EXPERIMENTS = (
    *("compare-cifar10", "compare-fashion-mnist"),
    *("compare-cifar10-100", "compare-fashion-mnist-100"),
)
# the methods of the paper's Table 1, and those they are measured against; run with three seeds
MAIN = (
    *("local", "fedavg", "fedavg-ft", "fedavg-ft-tuned", "fedper", "fedrep", "lg-fedavg"),
    *("fedbabu", "pfedhn", "last-upload", "client-mean", "group-mean"),
    *("pfedgpa", "pfedgpa-once", "pfedgpa-inverted", "pfedgpa-sampled"),
)
SEEDS = (0, 1, 2)
# {experiment: {method: [its row of each seed]}}
Finished = dict[str, dict[str, list[dict[str, Any]]]]

# Lai et al., AAAI 2025, Table 1: {data set: {method: accuracy in % with 10, 20, 100 clients}}
PAPER: dict[str, dict[str, tuple[float, float, float]]] = {
    "emnist": {
        "local": (70.85, 70.45, 73.73),
        "fedavg": (71.10, 72.89, 74.60),
        "fedavg-ft": (81.91, 85.09, 86.52),
        "fedper": (74.56, 76.61, 77.08),
        "fedrep": (74.22, 74.37, 76.54),
        "lg-fedavg": (71.23, 70.90, 76.25),
        "fedbabu": (80.28, 83.92, 84.39),
        "pfedhn": (77.33, 81.79, 77.23),
        "pfedgpa": (82.53, 84.70, 88.22),
    },
    "fashion-mnist": {
        "local": (85.11, 84.89, 85.48),
        "fedavg": (81.90, 82.96, 83.93),
        "fedavg-ft": (88.45, 89.39, 89.28),
        "fedper": (87.13, 87.20, 88.65),
        "fedrep": (88.69, 88.27, 88.42),
        "lg-fedavg": (85.28, 85.25, 85.96),
        "fedbabu": (87.44, 88.86, 89.43),
        "pfedhn": (87.69, 86.84, 86.25),
        "pfedgpa": (88.90, 89.18, 90.08),
    },
    "cifar10": {
        "local": (63.83, 64.38, 65.41),
        "fedavg": (64.13, 68.51, 69.87),
        "fedavg-ft": (71.76, 76.46, 76.55),
        "fedper": (63.20, 63.68, 69.43),
        "fedrep": (64.71, 65.85, 67.63),
        "lg-fedavg": (64.20, 64.94, 65.41),
        "fedbabu": (69.42, 74.25, 75.32),
        "pfedhn": (71.43, 75.41, 77.12),
        "pfedgpa": (72.95, 78.54, 78.33),
    },
}
COLUMNS = {
    "as its paper evaluates": "accuracy_as_its_paper",
    "as sent": "accuracy_before_ft",
    "tuned FT": "accuracy_after_ft_tuned",
    "kept by validation": "accuracy_kept",
    "worst client as sent": "accuracy_worst_client_before_ft",
}


def plan(
    experiments: Sequence[str],
    methods: Sequence[str] | None,
    seeds: Sequence[int] | None,
    settings: Settings,
    out: Path,
) -> list[PlannedRun]:
    """Return the comparison's runs, one for each federation, the first seed's before all others.

    Args:
        methods: which to compare; None for all.
        seeds: which seeds; None for three of the main methods and one of the others.

    Raises:
        ConfigError: a method that does not exist, or whose runs in ``out`` have other settings.
    """
    every = [name for name in METHODS if not METHODS[name].is_defence]
    asked = every if methods is None else methods
    for name in asked:
        require_method(name, "--methods")
    chosen = [name for name in METHODS if name in asked]  # the order of methods in a run's name
    runs = []
    for seed in dict.fromkeys(SEEDS if seeds is None else seeds):
        all_here = seeds is not None or seed == SEEDS[0]
        wanted = [name for name in chosen if all_here or name in MAIN]
        for experiment in experiments:
            for group in federations(wanted).values():
                named = [reference_of(name) for name in group]
                over: dict[str, list[Any]] = {"conf": [experiment], "method": [named]}
                over["seed"] = [seed]
                runs += expand(settings_of(settings, group, chosen), over, out)
    require_alike(runs, out)
    return runs


def published(row: Mapping[str, Any]) -> str:
    """Return the paper's figure for a row's method, data set and number of clients; "–" if none.

    The row may name the data set, or a file or folder that is named after it.
    """
    dataset = Path(row["dataset"].partition(":")[2] or row["dataset"]).stem
    figures = PAPER.get("emnist" if dataset == "emnist-byclass" else dataset, {})
    sizes = dict(zip((10, 20, 100), figures.get(row["method"], ()), strict=False))
    return f"{sizes[row['num_clients']]:.2f}" if row["num_clients"] in sizes else "–"


def finished(out: Path) -> Finished:
    """Return all finished runs in ``out``; if a method was run twice with a seed, the newest.

    Each has its ``run_settings``, those that every method has.
    """
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    own = {"method", "seed", "conf"}  # of each run
    shared = [
        n for n, key in keys().items() if "." not in n and not key.is_for_launch and n not in own
    ]
    for folder in finished_in(out):
        _import_methods(folder)
        kept = defaults() | values_of(kept_settings(folder))
        settings = {name: kept[name] for name in shared}
        methods = found.setdefault(Path(kept["conf"]).stem, {})
        for row in rows_of(folder):
            methods.setdefault(row["method"], {})[row["seed"]] = row | {"run_settings": settings}
    return {
        experiment: {name: [rows[seed] for seed in sorted(rows)] for name, rows in methods.items()}
        for experiment, methods in sorted(found.items())
    }


def _import_methods(folder: Path) -> None:
    """Import the methods of the run in ``folder``; code that is gone is only warned of."""
    try:
        kept_methods(folder)
    except ConfigError as error:
        warn_once(f"{folder}: {error}; its figures are those that it kept")


def _in_order(names: Collection[str]) -> list[str]:
    """Return methods' ``names`` in the order of ``METHODS``, then those whose code is gone."""
    return [n for n in METHODS if n in names] + sorted(n for n in names if n not in METHODS)


def overview(found: Finished) -> str:
    """Return a table in Markdown with a column for each experiment.

    It shows the accuracy as sent, and after tuned fine-tuning. Methods that only fine-tune
    another's weights are left out: they are that method's second figure.
    """
    firsts = [next(iter(methods.values()))[0] for methods in found.values()]
    heads = [f"{row['dataset']}, {row['num_clients']} clients" for row in firsts]
    if len(set(heads)) < len(heads):
        heads = [f"{head} ({name})" for head, name in zip(heads, found, strict=True)]
    rows = []
    for name in _in_order({name for methods in found.values() for name in methods}):
        columns = [methods.get(name, []) for methods in found.values()]
        if not any(columns) or (name in METHODS and METHODS[name].weights_from):
            continue
        cells = [next(rows[0]["title"] for rows in columns if rows)]
        for seeds in columns:
            sent, tuned = (
                over_seeds([row[key] for row in seeds], digits=1)
                for key in ("accuracy_before_ft", "accuracy_after_ft_tuned")
            )
            cells.append(f"{sent} / {tuned}" if seeds else "–")
        rows.append(cells)
    return markdown(["method", *heads], rows)


def table(found: Finished) -> str:
    """Return one table for each experiment, in Markdown: means ± standard deviations over seeds."""
    parts = []
    for experiment, methods in found.items():
        some = next(iter(methods.values()))[0]
        parts.append(
            f"### {some['dataset']}, {some['num_clients']} clients, {some['rounds']} rounds "
            f"({experiment})\n"
        )
        lines = []
        for name in _in_order(methods):
            rows = methods[name]
            cells = [over_seeds([row[key] for row in rows]) for key in COLUMNS.values()]
            lines.append([rows[0]["title"], str(len(rows)), *cells, published(rows[0])])
        parts.append(markdown(["method", "seeds", *COLUMNS, "the paper's figure"], lines) + "\n")
        parts += [f"Not run alike: {told}.\n" for told in _unlike(methods)]
    return "\n".join(parts)


def _unlike(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Say which settings of every method some runs in a table have otherwise than others."""
    rows = [row for seeds in methods.values() for row in seeds]
    for name in sorted({name for row in rows for name in row.get("run_settings", {})}):
        by: dict[str, list[str]] = {}  # {value: the methods that were run with it}
        for row in rows:
            by.setdefault(argument(row["run_settings"][name]), []).append(row["title"])
        if len(by) > 1:
            whose = (f"{v} ({', '.join(dict.fromkeys(titles))})" for v, titles in by.items())
            yield f"{name} = {', '.join(whose)}"


def report_of(found: Finished) -> str:
    """Return the overview and the tables of the runs in ``found``; "" if there are none."""
    if not found:
        return ""
    rows = [row for methods in found.values() for seeds in methods.values() for row in seeds]
    tuned = any(row[COLUMNS["tuned FT"]] is not None for row in rows)
    how = "" if tuned else " (which needs fine-tune-grid-epochs=5)"
    return f"As sent / after tuned fine-tuning{how}:\n\n{overview(found)}\n\n{table(found)}"
