"""Choose methods' main settings by Optuna instead of by a grid.

Akiba et al. 2019, KDD, "Optuna: A next-generation hyperparameter optimization framework". Its tree
of Parzen estimators proposes values, pooled validation images decide, and a run whose training
loss is among the worst is ended early: none of this sees test images. All trials are kept beside
the runs, so that a search that was stopped can go on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pfedgpa_app.config.names import is_read, keys
from pfedgpa_app.config.resolve import Resolved, values_of
from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods.own import reference_of
from pfedgpa_app.study.plan import PlannedRun, Settings, expand, settings_of
from pfedgpa_app.study.sweep import Judge

RunAll = Callable[[list[PlannedRun], Judge], object]
Grid = Mapping[str, Sequence[Any]]
_FIRST = 4  # the first trials, which are not ended early
_KEPT = 75.0  # percentage of runs, those with the smallest losses, that go on
_STEPS = 10  # how many times a run's loss is looked at
_WARM = 3  # the look, counted from 0, from which on a run may be ended
_AS_THEY_ARE = "as they are"  # a trial's attribute: values that are neither drawn nor rounded
_WIDE = 8  # from this ratio of largest to smallest value on, a grid is searched in logarithms


def imported() -> Any:
    """Import Optuna and silence it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--trials: needs Optuna: pip install 'pfedgpa-app[tune]'") from error
    optuna.logging.set_verbosity(logging.ERROR)
    return optuna


class Search:
    """The trials of one method."""

    def __init__(
        self, base: Settings, method: str, grid: Grid, out: Path, number: int, shared: Settings
    ) -> None:
        """Begin a search, or go on with the one in ``out`` that has the same settings.

        Args:
            base: the settings of all runs.
            grid: {setting: values whose range is searched}.
            number: how many trials there are in all.
            shared: settings that were chosen before; runs' folders are named by them, too.
        """
        self.base, self.method, self.grid, self.out = base, method, grid, out
        self.number, self.shared, self.optuna = number, shared, imported()
        plain = self._run({}).resolved
        journal = self.optuna.storages.journal.JournalFileBackend(str(out / f"{method}.trials"))
        self.study = self.optuna.create_study(
            study_name=f"{method} {_digest_of(plain, grid)}",
            storage=self.optuna.storages.JournalStorage(journal),
            direction="maximize",
            pruner=self.optuna.pruners.PercentilePruner(
                _KEPT, n_startup_trials=_FIRST, n_warmup_steps=_WARM
            ),
            load_if_exists=True,
        )
        # the seed differs when a search goes on, so that it does not repeat its first proposals
        draws = numpy_generator(base["seed"], "trials", len(self.study.get_trials()))
        self.study.sampler = self.optuna.samplers.TPESampler(seed=int(draws.integers(2**31)))
        # tried first, as they are, these win among equals
        every = values_of(plain.as_dict())
        self._usual = {name: every[name] for name in grid}
        number_of = self._usual | {
            name: every["learning-rate"]  # which "auto" stands for
            for name, value in self._usual.items()
            if name.endswith(".learning-rate") and value == "auto"
        }
        self.ranges = {name: self._range_of(name, number_of[name]) for name in grid}
        self._first = {n: v for n, v in number_of.items() if _contains(self.ranges[n], v)}
        self.going: dict[str, tuple[int, PlannedRun]] = {}
        self._trials: dict[str, Any] = {}  # {run that may be ended early: its trial}
        self._ended: set[str] = set()
        self._told: set[tuple[str, int]] = set()

    def _states(self, *names: str) -> tuple[Any, ...]:
        return tuple(self.optuna.trial.TrialState[name] for name in names)

    def ask(self, most: int) -> list[PlannedRun]:
        """Return the next runs, interrupted ones first; none once there were enough trials."""
        self.going, self._trials = {}, {}
        for frozen in self.study.get_trials(states=self._states("RUNNING")):
            run = self._possible(frozen)
            if run is None:
                self.study.tell(frozen.number, state=self._states("FAIL")[0])
            else:
                self.going[run.name] = frozen.number, run
        while len(self.going) < most and (asked := len(self.study.get_trials())) < self.number:
            if not asked:
                self.study.enqueue_trial(self._first, user_attrs={_AS_THEY_ARE: self._usual})
            trial = self.study.ask(self.ranges)
            run = self._possible(trial)
            if run is None or run.name in self.going:  # or the same values, rounded
                self.study.tell(trial, state=self._states("FAIL")[0])
                continue
            self.going[run.name], self._trials[run.name] = (trial.number, run), trial
        return [run for _, run in self.going.values()]

    def runs(self) -> list[PlannedRun]:
        """Return the runs of all trials so far, also of an earlier search that this one goes on."""
        every = [trial for trial in self.study.get_trials() if trial.params]
        return [run for run in map(self._possible, every) if run is not None]

    def _run(self, values: Settings) -> PlannedRun:
        each = {"method": reference_of(self.method)} | self.shared | values
        return expand(self.base, {name: [value] for name, value in each.items()}, self.out)[0]

    def _possible(self, trial: Any) -> PlannedRun | None:
        """Return the run with a trial's values; None if a method refuses them together."""
        with suppress(ConfigError):
            return self._run(self._given(trial))
        return None

    def _given(self, trial: Any) -> Settings:
        """Return a trial's values as its run has them."""
        values: Settings = {name: given(trial.params[name]) for name in self.grid}
        usual: Settings = trial.user_attrs.get(_AS_THEY_ARE, {})
        return values | usual

    def _range_of(self, name: str, usual: Any) -> Any:
        """Return the range that a setting's grid and its ``usual`` value span.

        A logarithmic one is a step wider than the grid at each end. A grid of other things than
        numbers is a choice.
        """
        values, rules, of = list(self.grid[name]), keys()[name].rules, self.optuna.distributions
        if not all(map(_is_number, values)):
            return of.CategoricalDistribution(values)
        values.sort()
        low, high = values[0], values[-1]
        wide = isinstance(low, float) and low > 0 and high / low >= _WIDE
        if wide:
            low, high = low**2 / values[1], high**2 / values[-2]
            low = max(low, rules["low"] or low)
            high = min(high, rules["high"] or high)
        if _is_number(usual):
            low, high = min(low, usual), max(high, usual)
        if isinstance(values[0], int):
            return of.IntDistribution(low, high)
        return of.FloatDistribution(low, high, log=wide and low > 0)

    def judge(self, run: PlannedRun, event: Mapping[str, Any]) -> str | None:
        """Say why to end a run after this ``event``; None: it may go on."""
        trial = self._trials.get(run.name)
        if trial is None or event.get("loss") is None:
            return None
        step = int(event["progress"] * _STEPS)
        if (run.name, step) not in self._told:  # Optuna warns if a step is reported twice
            self._told.add((run.name, step))
            trial.report(-event["loss"], step)
        if not trial.should_prune():
            return None
        self._ended.add(run.name)
        return "ended: its training loss is among the worst"

    def tell(self, score: Callable[[PlannedRun], tuple[float, ...]]) -> None:
        """Record how the runs that ``ask`` returned have ended."""
        pruned, failed = self._states("PRUNED", "FAIL")
        for name, (number, run) in self.going.items():
            if found := score(run):
                # if the best accuracies are equal, the next best decide; Optuna takes one number
                self.study.tell(number, ranked(found))
            else:
                self.study.tell(number, state=pruned if name in self._ended else failed)

    def best(self) -> dict[str, Any]:
        """Return the values of the best trial, the first of equals.

        Raises:
            ConfigError: no trial completed.
        """
        done = self.study.get_trials(states=self._states("COMPLETE"))
        if not done:
            raise ConfigError(f"tune: no run of {self.method} finished; see {self.out}")
        best = max(done, key=lambda trial: trial.value)
        return self._given(best)


def _digest_of(found: Resolved, grid: Grid) -> str:
    """Return a digest that tells trials over ``grid`` from those with other settings."""
    read = {
        name: value
        for name, value in values_of(found.as_dict()).items()
        if name not in grid and is_read(keys()[name], found.config)
    }
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:12]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _contains(values: Any, value: Any) -> bool:
    return value in values.choices if hasattr(values, "choices") else _is_number(value)


def ranked(score: tuple[float, ...]) -> float:
    """Return one number that orders percentages as their tuple does.

    It tells apart percentages that differ by 0.0001 or more.
    """
    return sum(part / 1e6**i for i, part in enumerate(score))


def given(value: Any) -> Any:
    """Round a proposed value as a run has it: floats to two significant digits."""
    return float(f"{value:.2g}") if isinstance(value, float) else value


def search(
    base: Settings,
    grids: Mapping[str, Grid],
    out: Path,
    run_all: RunAll,
    score: Callable[[PlannedRun], tuple[float, ...]],
    trials: int,
    at_once: int,
    shared: Settings | None = None,
) -> tuple[dict[str, Any], list[PlannedRun]]:
    """Return {setting: its best value} of every method, and the runs of all ``trials`` trials.

    Args:
        base, grids, out, shared: as in ``tune.search``.
        run_all: carries runs out, ending early those for which the judge gives a reason.
        score: returns a run's accuracies, the best first; () if it failed.
        at_once: how many trials of a method are proposed together.

    Raises:
        ConfigError: no run of some method succeeded, or Optuna is not installed.
    """
    imported()
    out.mkdir(parents=True, exist_ok=True)
    searches = [
        Search(settings_of(base, [method], list(grids)), method, grid, out, trials, shared or {})
        for method, grid in grids.items()
    ]

    def judge(run: PlannedRun, event: Mapping[str, Any]) -> str | None:
        (its,) = [each for each in searches if run.name in each.going]
        return its.judge(run, event)

    while runs := [run for each in searches for run in each.ask(at_once)]:
        run_all(runs, judge)
        for each in searches:
            each.tell(score)
    best = {key: value for each in searches for key, value in each.best().items()}
    return best, [run for each in searches for run in each.runs()]
