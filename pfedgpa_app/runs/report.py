"""``report.html``: the results of one run, or of several of one kind, on one page."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

import numpy as np

from pfedgpa_app.config.parse import argument
from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.settings import ConfigError, listed
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.data.client import alike
from pfedgpa_app.results import figures
from pfedgpa_app.results.log import EVENTS, clock
from pfedgpa_app.results.page import page
from pfedgpa_app.results.tables import LEGEND, percent, without_generation, without_result
from pfedgpa_app.runs.about import MODEL
from pfedgpa_app.runs.folder import CONFIG, HOLDINGS, unfinished
from pfedgpa_app.runs.reading import Row, Run, chosen, command_of, files_named, runs_in
from pfedgpa_app.runs.table import Entry, as_csv, as_latex, curves_of, table_of

REPORT, COMPARISON, LATENTS = "report.html", "comparison.html", "latents.json"
WORST = 5  # how many of the worst clients are named
MOST_NAMED = 200  # clients in the table of their users
_OF_THE_DATA = ("dataset", "data-dir", "image-size", "test-share")  # settings
_SAID_OF_A_RUN = ("data", "privacy", "attack")  # kinds of events


def write(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs in ``paths``, and its table beside it.

    Args:
        out: the page; by default ``report.html`` in the first of the folders, or
            ``comparison.html`` there if that is a run's, which has a page of its own.

    Raises:
        ConfigError: there are no runs, or the report cannot be written.
    """
    runs = runs_in(paths)
    so_far = [*filter(None, (unfinished(run.folder) for run in runs)), *_unlike(runs)]
    for text in so_far:
        warn_once(text)
    first = paths[0]
    page = COMPARISON if len(runs) > 1 and (first / CONFIG).is_file() else REPORT
    return _written(runs, out or first / page, so_far)


def _unlike(runs: Sequence[Run]) -> Iterator[str]:
    """Say which runs go by other code of the user's own, or by other data of the same name."""
    by_code: dict[str, dict[str, list[str]]] = {}
    by_data: dict[str, list[tuple[dict[str, Any], list[str]]]] = {}
    for run in runs:
        for files in ((run.read(MODEL) or {}).get("code") or {}).values():
            for file, digest in files.items():
                by_code.setdefault(file, {}).setdefault(digest, []).append(run.folder.name)
        if data := (run.read(HOLDINGS) or {}).get("data"):
            own = [run.settings.get(name, {}).get("value") for name in _OF_THE_DATA]
            seen = by_data.setdefault(json.dumps(own), [])
            names = next((names for kept, names in seen if alike(kept, data)), None)
            if names is None:
                seen.append((data, names := []))
            names.append(run.folder.name)
    for file, versions in by_code.items():
        if len(versions) > 1:
            what = f"{file} was another in {_against(versions.values())}"
            yield f"{what}: their figures are not of one method"
    for which, found in by_data.items():
        if len(found) > 1:
            where = _against(each for _, each in found)
            what = f"dataset {json.loads(which)[0]} was another in {where}"
            yield f"{what}: their figures are not of one data set"


def _against(parts: Iterable[Sequence[str]]) -> str:
    return " than in ".join(listed(list(dict.fromkeys(names)), 3) for names in parts)


def write_own(folder: Path) -> Path:
    """Write the report of a run that is about to end to its folder.

    Raises:
        ConfigError: it cannot be written.
    """
    return _written([Run(folder)], folder / REPORT)


def _written(runs: Sequence[Run], out: Path, so_far: Sequence[str] = ()) -> Path:
    """Write the page and its tables; ``so_far`` says which runs are not done, or are unlike."""
    header, entries = table_of(runs)
    texts = (as_csv(entries), as_latex(entries), rendered(runs, header, entries, so_far))
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
    """Return the paths of a page's table, as CSV and for LaTeX.

    They are named after the page, or ``table`` for ``report.html``.
    """
    stem = "table" if page.name == REPORT else page.stem
    return page.with_name(f"{stem}.csv"), page.with_name(f"{stem}.tex")


def rendered(
    runs: Sequence[Run], header: list[str], entries: list[Entry], so_far: Sequence[str] = ()
) -> str:
    """Return the page as HTML."""
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
    figure = [drawn] if curves else []  # there are no curves with evaluate-every = 0
    return page(
        title=title,
        about=[*so_far, *_about(runs)],
        table={
            "header": header,
            "rows": [entry.cells(entries) for entry in entries],
            "legend": [*LEGEND, _over(runs), *_notes(runs)],
        },
        figures=[*figure, *(_figures_of(one) if one else ())],
        parts=list(_parts_of(one) if one else _parts_of_several(runs)),
    )


def _over(runs: Sequence[Run]) -> str:
    seeds = sorted({run.settings["seed"]["value"] for run in runs})
    if len(runs) == 1:
        return f"Seed {seeds[0]}. Server: seconds of aggregation and generation in all rounds."
    return (
        f"Means over seeds ({', '.join(map(str, seeds))}), ± one standard deviation over them. "
        "Green is best, grey second; click a heading to sort."
    )


def _notes(runs: Sequence[Run]) -> list[str]:
    """Say which clients the figures leave out, and which methods had no reason to generate."""
    tell = without_result, without_generation
    said = Counter(text for run in runs for of in tell for text in of(run.rows))
    many = f" of {len(runs)} runs)"
    return [text if len(runs) == 1 else f"{text} (In {n}{many}" for text, n in said.items()]


def _about(runs: Sequence[Run]) -> list[str]:
    """Describe the data, and say when the run was."""
    lines = []
    for run in runs:
        events = list(run.lines(EVENTS))
        said = {event["kind"]: event["text"] for event in events}  # the last of each kind
        lines += [said[kind] for kind in _SAID_OF_A_RUN if kind in said]
        if len(runs) == 1 and events:
            day = time.strftime("%Y-%m-%d %H:%M", time.localtime(events[0]["time"]))
            rounds = run.settings["num-server-rounds"]["value"]
            took = f"run {run.folder.name}, started {day}, took {clock(_took(events))}"
            lines.append(f"{rounds} rounds, {run.in_each_round()}; {took}.")
    return list(dict.fromkeys(lines))[:6]


def _took(events: Sequence[Row]) -> float:
    """Return for how many seconds a run went on, without the time until it was resumed."""
    starts = [place for place, event in enumerate(events) if event["kind"] == "start"] or [0]
    ends = [*starts[1:], len(events)]
    each = zip(starts, ends, strict=True)
    return sum(float(events[end - 1]["time"] - events[start]["time"]) for start, end in each)


_PIES = (
    " Its slices are the client's classes, which the server never sees: where pies of similar "
    "colours lie together, the server has found which clients are alike."
)


def latent_map_of(run: Run, file: str = LATENTS) -> str:
    """Draw clients' weights as the server sees them; "" if no distribution was learned."""
    latents, holdings = run.read(file), run.read(HOLDINGS)
    if not latents:
        return ""
    counts = np.array(holdings["train"]) if holdings else None
    return figures.latent_map(
        latents, None if counts is None else counts / counts.sum(1, keepdims=True)
    )


def _figures_of(run: Run) -> Iterator[dict[str, str]]:
    """Yield the figures of a single run."""
    each = {
        name: {c: (r["before_ft"], r["after_ft"]) for c, r in clients.items()}
        for name, clients in run.clients.items()
    }
    yield {
        "title": "Each client, before and after fine-tuning",
        "svg": figures.before_and_after(each) if each else "",
        "caption": "A dot is what the client is sent, a bar what it has after fine-tuning: a bar "
        "to the right of its dot is a gain.",
    }
    titles = {row["method"]: row["title"] for row in run.rows}
    for path in files_named(LATENTS, run.folder):
        learner = (run.read(path.name) or {}).get("method", "")  # earlier versions kept none
        by = f"Learned by {titles.get(learner, learner)}. " if learner else ""
        yield {
            "title": "Clients' weights, as the server sees them",
            "svg": latent_map_of(run, path.name),
            "caption": f"{by}The two latent dimensions in which clients' uploads differ most. "
            "Small dots are uploads; a large one is the weights generated for a client; a grey "
            "line leads from its newest upload."
            + (_PIES if run.read(HOLDINGS) else " What clients hold is known only on their nodes."),
        }
    if holdings := run.read(HOLDINGS):
        yield {
            "title": "Who holds what",
            "svg": figures.holdings(np.array(holdings["train"]), holdings["classes"]),
            "caption": "Training examples of each client by class; servers and methods do not "
            "see this.",
        }


def _parts_of(run: Run) -> Iterator[Row]:
    """Yield the tables and lists of a single run."""
    count = min(WORST, max(map(len, run.clients.values()), default=0))
    yield {
        "title": "Worst-off clients",
        "header": ["method", *(f"{i}." for i in range(1, count + 1)), "spread over clients"],
        "rows": [_worst(run, name, count) for name in run.clients],
        "note": "Accuracy of what a client would keep, in percent; its number in brackets"
        + (", and its users." if run.users else "."),
    }
    if run.users:
        more = len(run.users) - MOST_NAMED
        yield {
            "title": "Clients by their users",
            "said": True,
            "header": ["client", "users"],
            "rows": [[str(i), listed(mine)] for i, mine in enumerate(run.users[:MOST_NAMED])],
            "note": f"{more} more clients are in {HOLDINGS}." if more > 0 else "",
        }
    if joined := [r for r in run.rows if r.get("accuracy_of_joining_clients")]:
        iterations = max(len(row["accuracy_of_joining_clients"]) for row in joined)
        yield {
            "title": "Clients that joined",
            "header": ["method", "welcomed", *map(str, range(1, iterations))],
            "rows": [[r["title"], *map(percent, r["accuracy_of_joining_clients"])] for r in joined],
            "note": "Mean accuracy in percent of those that joined after the last round: with what "
            "they were sent first, and after each of their uploads.",
        }
    yield from _warnings([run])
    yield {
        "title": "Settings that differ from the defaults",
        "said": True,
        "header": ["setting", "value", "from"],
        "rows": [[name, argument(e["value"]), e["from"]] for name, e in chosen(run)],
    }
    yield {"title": "The command", "command": command_of(run)}


def _warnings(runs: Sequence[Run]) -> Iterator[Row]:
    shown = dict[str, None]()  # each text once
    for run in runs:
        whose = f"{run.folder.name}: " if len(runs) > 1 else ""
        for event in run.lines(EVENTS):
            if event["kind"] in ("warning", "stalled", "resumed"):
                shown[whose + event["text"]] = None
    if shown:
        more = [f"… and {len(shown) - 20} more, in {EVENTS}"] if len(shown) > 20 else []
        yield {"title": "Rejected uploads and warnings", "lines": [*list(shown)[:20], *more]}


def _worst(run: Run, name: str, count: int) -> list[str]:
    clients = run.clients[name]
    order = sorted(clients, key=lambda c: (clients[c]["kept"], c))[:count]
    cells = [f"{clients[c]['kept']:.1f} ({run.named(c)})" for c in order]
    spread = pstdev(row["kept"] for row in clients.values())
    return [name, *cells, *[""] * (count - len(cells)), f"{spread:.1f}"]


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
    yield from _warnings(runs)
