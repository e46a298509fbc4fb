"""Choose every method's main settings on validation images, and keep them in its experiment.

A method's class names its main settings (``tuned``), and their declarations the values to try
(``grid``). They are searched one after the other, which takes a few runs each, where all
combinations would be many. If the best value is at an end of its grid, the search goes on beyond
that end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from joblib import cpu_count

from pfedgpa_app.config.checks import RUN_CONFIG
from pfedgpa_app.config.names import defaults, keys, require_method, sections
from pfedgpa_app.config.parse import flat
from pfedgpa_app.config.resolve import conf_path, inherited, resolve, values_of
from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.paths import PACKAGE
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import METHODS, federation_of
from pfedgpa_app.methods.own import reference_of
from pfedgpa_app.results.log import is_done, rows_of
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.study import trials
from pfedgpa_app.study.plan import PlannedRun, Settings, expand, settings_of
from pfedgpa_app.study.sweep import Judge, lenient, run_sweep

MARK = "# Chosen on validation images by: "
_BEYOND = 2  # how many values are tried beyond an end of a grid
DEFAULTS: Settings = {"seed": 100, "validation-share": 0.2, "save-weights": False}


def main_settings(method: str) -> dict[str, tuple[Any, ...]]:
    """Return {setting: values to try} of a method; FedAvg's learning rate is the run's."""
    own = f"{method}." if method in sections() else ""
    names = [own + name for name in METHODS[method].tuned]
    return {name: keys()[name].rules["grid"] for name in names if name in keys()}


def tunable() -> list[str]:
    """Return the methods that have rounds of their own and settings to choose."""
    return [m for m in METHODS if federation_of(m) == m and main_settings(m)]


def score(run: PlannedRun) -> tuple[float, ...]:
    """Return a run's accuracies on validation images, the largest first; () if it failed.

    They are in percent, before and after each fine-tuning. Compared as tuples, the next largest
    decide between runs whose largest are equal.
    """
    if not is_done(run.folder):
        return ()  # it failed: for example, its weights diverged
    return tuple(sorted(rows_of(run.folder)[0]["validation"].values(), reverse=True))


def tune(
    conf: str,
    methods: Sequence[str],
    settings: Settings,
    out: Path,
    app: Path,
    jobs: int | None,
    command: str,
    on: str = "here",
    number: int | None = None,
) -> dict[str, Any]:
    """Search, write the choice into the experiment, and a report of the search beside it.

    Args:
        number: how many trials by Optuna every method has; None: a grid for each.

    Raises:
        ConfigError: a method without main settings, or settings that cannot run.
    """
    path = conf_path(conf)
    _check(path, conf, methods)
    found: dict[str, Any] = {}
    tried: list[PlannedRun] = []
    # methods without a section come first: they choose the run's settings, the others' defaults
    first = [method for method in methods if method not in sections()]
    base = DEFAULTS | settings | {"conf": conf}
    there = resolve({"conf": conf})
    told = {n: settings[n] for n in ("validation-share", "train-per-client") if n in settings}
    if why := resolve({"conf": conf} | DEFAULTS | told).config.why_no_validation:
        raise ConfigError(f"tune chooses by clients' validation images: {why}")
    if "validation-share" not in settings and there.sources["validation-share"] != "default":
        base["validation-share"] = there.config.validation_share or base["validation-share"]

    def run_all(runs: list[PlannedRun], judge: Judge = lenient) -> bool:
        return run_sweep(runs, out, app, jobs, on, judge)

    for group in filter(None, (first, [method for method in methods if method not in first])):
        grids = {method: main_settings(method) for method in group}
        shared = {} if group == first else _of_the_run(path, settings)
        if number:
            at_once = jobs or int(cpu_count())
            chosen, its = trials.search(base, grids, out, run_all, score, number, at_once, shared)
        else:
            starts = _starts(conf, grids, settings)
            chosen, its = search(starts | base, grids, out, run_all, shared)
        _keep(path, chosen, command)
        found |= chosen
        tried += its
    _add_report(report_of(conf), tried, command)
    return found


def report_of(conf: str) -> Path:
    """Return the path of the report on the search whose choice is in the experiment ``conf``."""
    return conf_path(conf).with_suffix(".search.md")


def _check(path: Path, conf: str, methods: Sequence[str]) -> None:
    """Refuse an experiment that cannot be written into, and methods that cannot be tuned."""
    if path.is_relative_to(PACKAGE):
        raise ConfigError(
            f"tune keeps what it chooses in the experiment, but {conf} is part of the installed "
            f"package: copy {path} to a folder of yours and give the copy's path as --conf"
        )
    for method in methods:
        require_method(method, "--methods")
        if not main_settings(method):
            raise ConfigError(f"--methods: {method} has no settings to choose")
    there = resolve({"conf": conf}).config.method
    if new := [m for m in methods if reference_of(m) != m and m not in there]:
        raise ConfigError(
            f"{path}: must list {reference_of(new[0])} under method: whoever runs it must know "
            "whose settings tune writes into it"
        )
    _refuse_in_sections(path, methods)


def _starts(conf: str, grids: Mapping[str, Iterable[str]], settings: Settings) -> Settings:
    """Return the values that the settings of ``grids`` have until their own search.

    They are defaults or inherited, not those in the experiment itself, which the search replaces:
    otherwise the same search would not begin the same way again.
    """
    before = defaults() | inherited(conf, settings)
    return {name: before[name] for grid in grids.values() for name in grid}


def _of_the_run(path: Path, settings: Settings) -> Settings:
    """Return the run's settings, which all methods use, that tune chose, not the user's own."""
    _, _, below = path.read_text(encoding="utf-8").partition(MARK)
    chosen = yaml.safe_load(f"#{below}") or {}
    return {name: v for name, v in chosen.items() if "." not in name and name not in settings}


def search(
    base: Settings,
    grids: Mapping[str, Mapping[str, Sequence[Any]]],
    out: Path,
    run_all: Callable[[list[PlannedRun]], object],
    shared: Settings | None = None,
) -> tuple[dict[str, Any], list[PlannedRun]]:
    """Search one setting after the other; return {setting: its best value}, and the runs tried.

    Args:
        base: the settings of all runs, whose folders are in ``out``.
        grids: {method: {setting: values to try}}.
        run_all: carries runs out.
        shared: settings that were chosen before; runs' folders are named by them, too.

    Raises:
        ConfigError: no run of some method succeeded.
    """
    chosen: dict[str, dict[str, Any]] = {method: {} for method in grids}
    tried: list[PlannedRun] = []

    def runs_of(method: str, key: str, values: Sequence[Any]) -> list[PlannedRun]:
        own = settings_of(base, [method], list(grids))
        fixed = {"method": reference_of(method)} | (shared or {}) | chosen[method]
        return _possible(own, fixed, key, values, out)

    for step in range(max(map(len, grids.values()))):
        going: dict[str, tuple[str, list[PlannedRun]]] = {}
        for method, grid in grids.items():
            if step < len(grid):
                key, values = list(grid.items())[step]
                going[method] = key, runs_of(method, key, values)
        run_all([run for _, runs in going.values() for run in runs])
        for _ in range(_BEYOND):
            more: list[PlannedRun] = []
            for method, (key, runs) in going.items():
                beyond = next_beyond([(run.varied[key], score(run)) for run in runs])
                if beyond is not None:
                    with suppress(ConfigError):  # the value may lie outside the setting's range
                        found = runs_of(method, key, [beyond])
                        runs += found
                        more += found
            if more:
                run_all(more)
        for method, (key, runs) in going.items():
            chosen[method][key] = _best(runs, key, base.get(key))
            tried += runs
    return {key: value for own in chosen.values() for key, value in own.items()}, tried


def _best(runs: Sequence[PlannedRun], key: str, usual: Any) -> Any:
    """Return the best run's value of ``key``; of equals the ``usual`` one, else the first."""
    best = max(runs, key=lambda run: (score(run), run.varied[key] == usual))
    if not score(best):
        (method,) = best.config.method
        raise ConfigError(f"tune: no run of {method} finished; see {best.folder.parent}")
    return best.varied[key]


def _possible(
    settings: Settings, fixed: Settings, key: str, values: Iterable[Any], out: Path
) -> list[PlannedRun]:
    """Return a run for each of the ``values`` that is in range and goes with the other settings.

    Raises:
        ConfigError: no run is left.
    """
    found: list[PlannedRun] = []
    refused: ConfigError | None = None
    for value in values:
        try:
            found += expand(settings, {n: [v] for n, v in (fixed | {key: value}).items()}, out)
        except ConfigError as error:
            refused = error
    if refused and not found:
        raise refused
    return found


def next_beyond(tried: Sequence[tuple[Any, Any]]) -> float | None:
    """Return the value to try next, if the best of (value, score) is the smallest or the largest.

    It continues the grid by its own ratio. None if the best lies inside, if there are fewer than
    two values, if all scores are equal, or if a value is no positive float.
    """
    if len(tried) < 2 or any(not isinstance(value, float) or value <= 0 for value, _ in tried):
        return None
    values = sorted(value for value, _ in tried)
    if len({score for _, score in tried}) == 1:  # the setting makes no difference
        return None
    best = max(tried, key=lambda pair: pair[1])[0]
    if best == values[0]:
        return float(f"{values[0] ** 2 / values[1]:.1g}")
    if best == values[-1]:
        return float(f"{values[-1] ** 2 / values[-2]:.1g}")
    return None


def _without(text: str, names: Collection[str]) -> str:
    """Return the YAML ``text`` without the lines that set ``names``."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if line.partition(":")[0].rstrip() not in names)


def _refuse_in_sections(path: Path, methods: Sequence[str]) -> None:
    """Refuse an experiment that has a setting to be written inside a section."""
    chosen = {name for method in methods for name in main_settings(method)}
    text = path.read_text(encoding="utf-8").partition(MARK)[0]
    above = flat(yaml.safe_load(_without(text, chosen)) or {}, str(path))
    if twice := sorted(chosen & above.keys()):
        raise ConfigError(f"{path}: sets {', '.join(twice)}, which tune is to choose; take it out")


def _keep(path: Path, chosen: Mapping[str, Any], command: str) -> None:
    """Write ``chosen`` below the marks, one for each command, keeping what earlier ones chose."""
    text, mark, below = path.read_text(encoding="utf-8").partition(MARK)
    text, earlier = _without(text, chosen), mark + below
    if text and not text.endswith("\n"):
        text += "\n"
    marks = [line for line in earlier.splitlines() if line.startswith(MARK)]
    marks = list(dict.fromkeys([*marks, MARK + command]))
    block = yaml.safe_dump((yaml.safe_load(earlier) or {}) | dict(chosen), sort_keys=False)
    write_text(path, text + "\n".join(marks) + f"\n{block}")


def merged(earlier: str, report: str) -> str:
    """Join the reports of several commands; a command's new report replaces its old one."""
    reports = [part for part in re.split(r"(?m)^(?=Made by )", earlier) if part.strip()]
    kept = [part for part in reports if part.splitlines()[0] != report.splitlines()[0]]
    return "\n".join(part.rstrip("\n") + "\n" for part in [*kept, report])


def _add_report(path: Path, tried: Sequence[PlannedRun], command: str) -> None:
    """Write what was tried to the report at ``path``, in the place of the same command's before."""
    rows = []
    for run in {run.name: run for run in sorted(tried, key=lambda run: run.name)}.values():
        title, validation = METHODS[run.config.method[0]].title, {}
        if is_done(run.folder):
            validation = rows_of(run.folder)[0]["validation"]
        names = list(main_settings(run.config.method[0]))
        names += [n for n in main_settings("fedavg") if run.resolved.sources[n] == RUN_CONFIG]
        values = values_of(run.resolved.as_dict())
        settings = ", ".join(f"{name} = {values[name]}" for name in dict.fromkeys(names))
        kinds = ("before_ft", "after_ft", "after_ft_tuned")
        cells = [f"{validation[kind]:.2f}" if kind in validation else "–" for kind in kinds]
        rows.append([title, settings, str(run.config.num_server_rounds), *cells])
    header = ["method", "settings", "rounds", "as sent", "its own FT", "tuned FT"]
    report = (
        f"Made by `{command}`.\n\n"
        "Accuracy on the clients' pooled validation images in %; the largest of a method's three "
        "figures decides, among equals the next largest. A run without figures failed, or was "
        f"ended early.\n\n{markdown(header, rows)}\n"
    )
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, merged(earlier, report))
