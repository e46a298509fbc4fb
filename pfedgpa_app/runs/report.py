"""``report.html``: what a run, or several of one kind, came to, in one page."""

from __future__ import annotations

import csv
import io
import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Any

import numpy as np

from pfedgpa_app.config.checks import RUN_CONFIG
from pfedgpa_app.config.names import defaults, keys, without_idle
from pfedgpa_app.config.parse import argument
from pfedgpa_app.config.resolve import values_of
from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import LAUNCH, ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.results import figures
from pfedgpa_app.results.log import (
    EVENTS,
    SUMMARY,
    Records,
    accuracies_of,
    clock,
    last_event,
    rows_of,
)
from pfedgpa_app.results.page import page
from pfedgpa_app.results.tables import LEGEND, over_seeds, recipes_in_words, without_generation
from pfedgpa_app.runs.folder import CONFIG, HOLDINGS, kept_methods, kept_settings, unfinished

REPORT, LATENTS = "report.html", "latents.json"
Row = dict[str, Any]
# {heading: key of an entry of summary.json}
COLUMNS = {
    "kept": "accuracy_kept",
    "as sent": "accuracy_before_ft",
    "after FT": "accuracy_after_ft",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client": "accuracy_worst_client_kept",
}
WORST = 5  # clients that are named
_SAID_OF_A_RUN = ("data", "privacy", "attack")  # events
# where a run went on and by what, which the launcher fills in: another may have its own
OF_ITS_PLACE = ("code-dir", "engine", "workers")
_NAMED_OTHERWISE = ("conf", "out-dir", "run-name", "resume")


@dataclass(frozen=True)
class Run:
    """A run, by what its folder holds."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """{setting: {"value": …, "from": …}}."""
        return kept_settings(self.folder)

    @cached_property
    def rows(self) -> list[Row]:
        """An entry a method."""
        kept_methods(self.folder)  # makes own ones known
        return rows_of(self.folder)

    def lines(self, file: str) -> Iterator[Row]:
        """The records of one of its files."""
        return Records(self.folder / file).new()

    def read(self, file: str) -> Any:
        """What it keeps in a JSON file; None without.

        Raises:
            ConfigError: it is damaged.
        """
        path = self.folder / file
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise ConfigError(
                f"{path} cannot be read: {error}: put it back, or remove it"
            ) from error

    @cached_property
    def ended(self) -> float:
        """When its last event was."""
        return float(last_event(self.folder).get("time", 0.0))

    def choice(self, method: str, varied: Sequence[str]) -> dict[str, Any]:
        """Of the settings that are ``varied`` what ``method`` goes by, as the run has it."""
        here = self.goes_by([method])
        return values_of({name: here[name] for name in varied if name in here})

    def goes_by(self, methods: Sequence[str]) -> dict[str, Any]:
        """Of its settings those that some of ``methods`` go by."""
        return without_idle(self.settings, methods, self.settings["partition"]["value"])

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """{federation: {round: mean accuracy of its clients}}."""
        found = accuracies_of(self.folder)
        return {name: {r: mean(a) for r, a in rounds.items()} for name, rounds in found.items()}

    @cached_property
    def clients(self) -> dict[str, dict[int, Row]]:
        """{method's title: {client: its accuracies}}."""
        titles = {row["method"]: row["title"] for row in self.rows}
        found: dict[str, dict[int, Row]] = {}
        for record in self.lines("clients.jsonl"):
            if record["method"] in titles:
                found.setdefault(titles[record["method"]], {})[record["client"]] = record
        return found


def runs_in(paths: Sequence[Path]) -> list[Run]:
    """The runs with results in these folders and those below, a sweep's or comparison's.

    A folder that has runs, of which none has any, is left out with a warning.

    Raises:
        ConfigError: one of them holds none, or none is done in any.
    """
    found: dict[Path, None] = {}
    undone: list[Path] = []
    for path in paths:
        folders = sorted(f.parent for f in path.rglob(SUMMARY) if (f.parent / CONFIG).is_file())
        if not folders and not next(path.rglob(CONFIG), None):
            raise ConfigError(f"{path}: holds no run that is done")
        if not folders:
            undone.append(path)
        found |= dict.fromkeys(folders)
    for path in undone:
        text = f"{path}: holds no run that is done"
        if not found:
            raise ConfigError(text)
        warn_once(f"{text}: it is left out")
    return [Run(folder) for folder in found]


def write(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs in ``paths``, and its table beside it.

    Args:
        out: the page; by default ``report.html`` in the first of the folders.

    Raises:
        ConfigError: there are no runs, or it cannot be written.
    """
    runs = runs_in(paths)
    so_far = list(filter(None, (unfinished(run.folder) for run in runs)))
    for text in so_far:
        warn_once(text)
    return _written(runs, out or paths[0] / REPORT, so_far)


def write_own(folder: Path) -> Path:
    """Write the report of a run that is about to end, in its folder.

    Raises:
        ConfigError: it cannot be written.
    """
    return _written([Run(folder)], folder / REPORT)


def _written(runs: Sequence[Run], out: Path, so_far: Sequence[str] = ()) -> Path:
    """``so_far``: what to say of runs that are not done."""
    header, entries = table_of(runs)
    texts = (_csv(entries), _latex(entries), rendered(runs, header, entries, so_far))
    try:
        for path, text in zip((*tables_beside(out), out), texts, strict=True):
            write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"{out}: the report and its tables cannot be written there: {error.strerror}: "
            f"{error.filename}"
        ) from error
    return out


def tables_beside(page: Path) -> tuple[Path, Path]:
    """The files of a page's table, as CSV and for LaTeX: named as the page, if it has a name."""
    stem = "table" if page.name == REPORT else page.stem
    return page.with_name(f"{stem}.csv"), page.with_name(f"{stem}.tex")


def rendered(
    runs: Sequence[Run], header: list[str], entries: list[Entry], so_far: Sequence[str] = ()
) -> str:
    """The page."""
    one = runs[0] if len(runs) == 1 else None
    named = list(dict.fromkeys(row["title"] for run in runs for row in run.rows))
    title = ", ".join(named) if len(named) <= 3 else f"{len(named)} methods"
    title += (
        f" on {', '.join(dict.fromkeys(argument(r.settings['dataset']['value']) for r in runs))}"
    )
    curves, ends = curves_of(runs)
    bands = "; bands are one standard deviation over seeds." if not one else "."
    drawn = {
        "title": "Accuracy over rounds",
        "svg": figures.curves(curves, ends),
        "caption": "Mean over clients of what they are sent, before any fine-tuning" + bands,
    }
    figure = [drawn] if curves else []  # none was evaluated before its end: evaluate-every = 0
    return page(
        title=title,
        about=[*so_far, *_about(runs)],
        table={
            "header": header,
            "rows": [entry.cells(entries) for entry in entries],
            "legend": [*LEGEND, _over(runs), *_without_generation(runs)],
        },
        figures=[*figure, *(_figures_of(one) if one else ())],
        parts=list(_parts_of(one) if one else _parts_of_several(runs)),
    )


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method under some settings, over seeds."""

    name: str
    recipes: str
    values: dict[str, list[float]]
    costs: tuple[str, str]
    analysis_only: bool = False
    only: str = ""  # of which seeds, where others are of more

    def text(self, column: str) -> str:
        """Mean ± standard deviation over seeds."""
        known = [value for value in self.values[column] if value == value]
        return over_seeds(known, 1 if len(known) < 2 else 2)

    def cells(self, every: Sequence[Entry]) -> list[dict[str, str]]:
        """As the page has it: the best and the second best of each column are marked."""
        cells = [{"text": self.name + self.only, "kind": ""}]
        for column, values in self.values.items():
            means = sorted(
                {round(mean(e.values[column]), 6) for e in every if _counts(e, column)},
                reverse=True,
            )
            marks = ("best", "second") if len(means) > 2 else ("best",)
            kinds = dict(zip(means, marks, strict=False))
            mine = kinds.get(round(mean(values), 6), "") if _counts(self, column) else ""
            cells.append({"text": self.text(column), "kind": mine})
        return [*cells, *({"text": text, "kind": "text"} for text in (self.recipes, *self.costs))]


def _counts(entry: Entry, column: str) -> bool:
    """Whether it can be the best: group means know what no server does."""
    return bool(entry.values[column]) and not entry.analysis_only


def table_of(runs: Sequence[Run]) -> tuple[list[str], list[Entry]]:
    """The headings, and an entry for each method under each choice of what the runs vary."""
    shown = [
        c for c, k in COLUMNS.items() if any(r.get(k) is not None for x in runs for r in x.rows)
    ]
    varied = _varied(runs)
    alike: dict[tuple[str, str], dict[int, tuple[float, Row]]] = {}
    for run in runs:
        for row in run.rows:
            choice = ", ".join(f"{k}={v}" for k, v in run.choice(row["method"], varied).items())
            seeds = alike.setdefault((row["title"], choice), {})
            if row["seed"] not in seeds or seeds[row["seed"]][0] < run.ended:
                seeds[row["seed"]] = run.ended, row  # of two runs of a seed the newest
    every, entries = sorted({seed for seeds in alike.values() for seed in seeds}), []
    for (title, choice), seeds in alike.items():
        rows = [row for _, row in seeds.values()]
        values = {c: [r[COLUMNS[c]] for r in rows if r.get(COLUMNS[c]) is not None] for c in shown}
        seconds = mean(row.get("server_seconds", 0.0) for row in rows)
        up = mean(row.get("bytes_up", 0) / max(1, row["rounds"]) for row in rows)
        costs = (f"{seconds:.1f} s", f"{up / 1e6:.2f} MB")
        name = f"{title} ({choice})" if choice else title
        only = (
            "" if sorted(seeds) == every else f" [seed {', '.join(map(str, sorted(seeds)))} only]"
        )
        recipes = recipes_in_words(rows)
        entries.append(Entry(name, recipes, values, costs, rows[0]["analysis_only"], only))
    return ["method", *shown, "FT", "server", "upload a round"], entries


def _varied(runs: Sequence[Run]) -> list[str]:
    """The settings, the seed aside, that differ between runs whose methods go by them."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, entry in run.goes_by([row["method"] for row in run.rows]).items():
            if name in keys() and keys()[name].rules["part"] != LAUNCH:
                found.setdefault(name, set()).add(json.dumps(entry["value"]))
    return [n for n, kinds in found.items() if len(kinds) > 1 and n not in ("seed", "method")]


def _over(runs: Sequence[Run]) -> str:
    seeds = sorted({run.settings["seed"]["value"] for run in runs})
    if len(runs) == 1:
        return f"Seed {seeds[0]}. Server: seconds of aggregation and generation in all rounds."
    return (
        f"Means over seeds ({', '.join(map(str, seeds))}), ± one standard deviation over them. "
        "Green is best, grey second; a click on a heading sorts."
    )


def _without_generation(runs: Sequence[Run]) -> list[str]:
    said = Counter(text for run in runs for text in without_generation(run.rows))
    many = f" of {len(runs)} runs)"
    return [text if len(runs) == 1 else f"{text} (In {n}{many}" for text, n in said.items()]


def _about(runs: Sequence[Run]) -> list[str]:
    """What the data are, and when it was."""
    lines = []
    for run in runs:
        events = list(run.lines(EVENTS))
        lines += [event["text"] for event in events if event["kind"] in _SAID_OF_A_RUN]
        if len(runs) == 1 and events:
            start, end = events[0]["time"], events[-1]["time"]
            day = time.strftime("%Y-%m-%d %H:%M", time.localtime(start))
            rounds = run.settings["num-server-rounds"]["value"]
            share = run.settings["fraction-train"]["value"]
            part = f"{100 * share:g} % of the" if share < 1 else "all"
            took = f"run {run.folder.name}, started {day}, took {clock(end - start)}"
            lines.append(f"{rounds} rounds, {part} clients in each; {took}.")
    return list(dict.fromkeys(lines))[:6]


def curves_of(runs: Sequence[Run]) -> tuple[dict[str, figures.Curve], dict[str, float]]:
    """{federation: its mean curve over seeds}, and where methods without rounds came to."""
    varied, gathered = _varied(runs), dict[str, dict[int, dict[int, float]]]()
    ends: dict[str, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: run.ended):  # of two runs of a seed the newest
        titles = {row["method"]: row["title"] for row in run.rows}
        seed = run.settings["seed"]["value"]
        for federation, rounds in run.curves.items():
            choice = ", ".join(map(str, run.choice(federation, varied).values()))
            name = titles.get(federation, federation) + (f" ({choice})" if choice else "")
            for r, accuracy in rounds.items():
                gathered.setdefault(name, {}).setdefault(r, {})[seed] = accuracy
        for row in run.rows:
            if row["method"] not in run.curves and not run.choice(row["method"], varied):
                ends.setdefault(row["title"], {})[seed] = row["accuracy_before_ft"]
    found: dict[str, figures.Curve] = {}
    for name, points in gathered.items():
        by_round = [(r, list(seeds.values())) for r, seeds in sorted(points.items())]
        found[name] = [(r, mean(a), stdev(a) if len(a) > 1 else 0.0) for r, a in by_round]
    return found, {name: mean(seeds.values()) for name, seeds in ends.items()}


_PIES = (
    " Its slices are the classes that it holds, which the server never sees: where pies of like "
    "colours lie together, the server has found who is like whom."
)


def latent_map_of(run: Run) -> str:
    """Its clients' weights as the server sees them; "" where no distribution was learned."""
    latents, holdings = run.read(LATENTS), run.read(HOLDINGS)
    if not latents:
        return ""
    counts = np.array(holdings["train"]) if holdings else None
    return figures.latent_map(
        latents, None if counts is None else counts / counts.sum(1, keepdims=True)
    )


def _figures_of(run: Run) -> Iterator[dict[str, str]]:
    """A single run's."""
    each = {
        name: {c: (r["before_ft"], r["after_ft"]) for c, r in clients.items()}
        for name, clients in run.clients.items()
    }
    yield {
        "title": "Each client, before and after fine-tuning",
        "svg": figures.before_and_after(each) if each else "",
        "caption": "A dot is what the client is sent, a bar what it has after fine-tuning it: a "
        "bar to the right of its dot gained.",
    }
    if drawn := latent_map_of(run):
        yield {
            "title": "Clients' weights, as the server sees them",
            "svg": drawn,
            "caption": "The two latent dimensions in which clients' uploads differ most. Small "
            "dots are uploads; a large one is the weights generated for a client; a grey line "
            "leads from its newest upload."
            + (_PIES if run.read(HOLDINGS) else " What clients hold is on their nodes."),
        }
    if holdings := run.read(HOLDINGS):
        yield {
            "title": "Who holds what",
            "svg": figures.holdings(np.array(holdings["train"]), holdings["classes"]),
            "caption": "Training examples of each client by class; servers and methods do not "
            "see this.",
        }


def _parts_of(run: Run) -> Iterator[Row]:
    """A single run's tables and lists."""
    count = min(WORST, max(map(len, run.clients.values()), default=0))
    yield {
        "title": "Clients worst off",
        "header": ["method", *(f"{i}." for i in range(1, count + 1)), "spread over clients"],
        "rows": [_worst(name, clients, count) for name, clients in run.clients.items()],
        "note": "Accuracy of what the client would keep, in percent; in brackets which client.",
    }
    events = list(run.lines(EVENTS))
    told = [e["text"] for e in events if e["kind"] in ("warning", "rejected", "stalled", "resumed")]
    if told:
        shown = list(dict.fromkeys(told))
        more = [f"… and {len(shown) - 20} more, in events.jsonl"] if len(shown) > 20 else []
        yield {"title": "Rejected uploads, warnings", "lines": [*shown[:20], *more]}
    yield {
        "title": "Settings that are not the defaults",
        "said": True,
        "header": ["setting", "value", "from"],
        "rows": [[name, argument(e["value"]), e["from"]] for name, e in _chosen(run)],
    }
    yield {"title": "The command", "command": command_of(run)}


def _worst(name: str, clients: Mapping[int, Row], count: int) -> list[str]:
    order = sorted(clients, key=lambda c: (clients[c]["kept"], c))[:count]
    cells = [f"{clients[c]['kept']:.1f} ({c})" for c in order]
    spread = pstdev(row["kept"] for row in clients.values())
    return [name, *cells, *[""] * (count - len(cells)), f"{spread:.1f}"]


def _chosen(run: Run) -> Iterator[tuple[str, Any]]:
    """The settings whose value is not the default, but for those of the launch."""
    before = defaults()
    for name, entry in run.settings.items():
        key = keys().get(name)
        launch = key is not None and key.rules["part"] == LAUNCH
        if entry["value"] != before.get(name) and not launch:
            yield name, entry


def command_of(run: Run) -> str:
    """The command that makes such a run again, under a name of its own.

    It has all that was given for the run, but its place.
    """
    apart = {*OF_ITS_PLACE, *_NAMED_OTHERWISE}
    given = {
        name: entry["value"]
        for name, entry in run.settings.items()
        if entry["from"] == RUN_CONFIG and name in keys() and name not in apart
    }
    conf = str(run.settings["conf"]["value"])
    words = [f"{name}={argument(value)}" for name, value in given.items()]
    if run.settings["dataset"]["value"] == NODES:
        made = shlex.join(["pfedgpa", "app", "FOLDER", f"conf={conf}", *words])
        return f"{made} && flwr run FOLDER SUPERLINK --stream"
    return shlex.join(["pfedgpa", "run", "--conf", conf, *words])


def _parts_of_several(runs: Sequence[Run]) -> Iterator[Row]:
    yield {
        "title": "The runs",
        "said": True,
        "header": ["folder", "seed", "methods"],
        "rows": [
            [
                run.folder.name,
                argument(run.settings["seed"]["value"]),
                argument([r["title"] for r in run.rows]),
            ]
            for run in runs
        ],
    }


def _csv(entries: Sequence[Entry]) -> str:
    """Means and standard deviations over seeds as numbers."""
    file = io.StringIO()
    columns = list(entries[0].values)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", *(f"{c}{of}" for c in columns for of in ("", " sd")), "seeds"])
    for entry in entries:
        cells: list[Any] = [entry.name]
        for values in entry.values.values():
            cells += [round(mean(values), 4) if values else ""]
            cells += [round(stdev(values), 4) if len(values) > 1 else ""]
        writer.writerow([*cells, max(len(v) for v in entry.values.values())])
    return file.getvalue()


def _latex(entries: Sequence[Entry]) -> str:
    """A tabular, the best of each column bold."""
    columns = list(entries[0].values)
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["method", *columns]) + r" \\", r"\midrule"]
    for entry in entries:
        cells = [_escaped(entry.name + entry.only)]
        marks = [cell["kind"] for cell in entry.cells(entries)[1 : 1 + len(columns)]]
        for column, mark in zip(columns, marks, strict=True):
            text = entry.text(column).replace("±", r"$\pm$").replace("–", "--")
            cells.append(rf"\textbf{{{text}}}" if mark == "best" else text)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    for letter in "&%$#_{}":
        text = text.replace(letter, f"\\{letter}")
    return text
