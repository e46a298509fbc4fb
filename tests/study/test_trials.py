"""Settings chosen by Optuna."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app import cli
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods.fedprox import FedProxSettings
from pfedgpa_app.study import trials, tune
from pfedgpa_app.study.plan import PlannedRun
from pfedgpa_app.study.sweep import Judge
from tests.support.federations import PLAIN

pytest.importorskip("optuna")


def test_one_number_orders_scores_as_their_tuples_do() -> None:
    scores = [(80.1, 20.0, 20.0), (80.05, 80.05, 80.0), (80.05, 80.05, 0.0), (80.05, 0.0, 80.0)]
    assert sorted(scores, key=trials.ranked, reverse=True) == scores


BASE = {"seed": 100, "validation-share": 0.2, "num-server-rounds": 2}
RATES = {"fedavg": {"learning-rate": (0.005, 0.01, 0.02, 0.05)}}


def accuracy(run: PlannedRun) -> tuple[float, ...]:
    """Best at a learning rate of 0.1."""
    rate = run.varied["learning-rate"]
    return () if rate > 0.12 else (50 - 10 * abs(math.log10(rate / 0.1)),)


class Runner:
    """Says which runs it was given, and can be interrupted."""

    def __init__(self, stop_at: int = 1000) -> None:
        self.given: list[float] = []
        self.stop_at = stop_at

    def __call__(self, runs: list[PlannedRun], _: Judge) -> None:
        rates = [run.varied["learning-rate"] for run in runs]
        self.given += rates
        if len(self.given) >= self.stop_at:
            raise KeyboardInterrupt


def search(out: Path, run_all: Any, number: int, grids: Any = None) -> dict[str, Any]:
    found, _ = trials.search(BASE, grids or RATES, out, run_all, accuracy, number, 2)
    return found


def test_it_comes_near_the_best_and_beyond_the_grid(tmp_path: Path) -> None:
    runner = Runner()
    found = search(tmp_path, runner, 30)
    assert len(runner.given) <= 30
    assert 0.07 < found["learning-rate"] < 0.12
    assert found["learning-rate"] in runner.given
    assert all(rate == float(f"{rate:.2g}") for rate in runner.given)


def test_a_search_that_was_stopped_goes_on(tmp_path: Path) -> None:
    whole, first, rest = Runner(), Runner(stop_at=6), Runner()
    search(tmp_path / "whole", whole, 10)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts", first, 10)
    found = search(tmp_path / "parts", rest, 10)
    assert rest.given[:2] == first.given[-2:]  # those that were broken off come again
    assert first.given == whole.given[:6]
    assert len(first.given) - 2 + len(rest.given) == len(whole.given)
    again = Runner()
    assert search(tmp_path / "parts", again, 10) == found
    assert not again.given


def test_a_search_that_goes_on_proposes_something_new(tmp_path: Path) -> None:
    runner = Runner()
    for trials_in_all in (2, 4):
        search(tmp_path, runner, trials_in_all)
    assert len(set(runner.given)) == 4


def test_a_setting_of_one_method_stands_beside_others(tmp_path: Path) -> None:
    names: list[str] = []

    def run_all(runs: list[PlannedRun], _: Judge) -> None:
        names.extend(run.config.method[0] for run in runs)

    grids: dict[str, Any] = {
        "fedprox": {"fedprox.mu": (0.01, 0.1)},
        "fedavgm": {"fedavgm.momentum": (0.0, 0.5)},
    }
    base = BASE | {"fedavgm.learning-rate": 0.05}
    trials.search(base, grids, tmp_path, run_all, lambda _: (1.0,), 1, 1)
    assert sorted(names) == ["fedavgm", "fedprox"]


def test_trials_of_other_settings_do_not_count(tmp_path: Path) -> None:
    """A method is tuned again at another learning rate, which was chosen in between."""
    grids: dict[str, Any] = {"fedavgm": {"fedavgm.momentum": (0.0, 0.5, 0.7)}}
    names: list[str] = []

    def run_all(runs: list[PlannedRun], _: Judge) -> None:
        names.extend(run.name for run in runs)

    for rate, new in ((0.01, 3), (0.02, 3), (0.01, 0)):
        before, shared = len(names), {"learning-rate": rate}
        trials.search(BASE, grids, tmp_path, run_all, lambda _: (1.0,), 3, 3, shared)
        assert len(names) - before == new
        assert all(f"learning-rate={rate}" in name for name in names[before:])
    trials.search(BASE | {"seed": 101}, grids, tmp_path, run_all, lambda _: (1.0,), 3, 3)
    assert len(names) == 9


def test_settings_of_every_kind_have_a_range(tmp_path: Path) -> None:
    grids: dict[str, Any] = {
        "fedala": {"fedala.layers": (1, 2)},
        "pfedgpa": {"pfedgpa.momentum": ("auto", 0.0, 0.5)},
        "fedavgm": {"fedavgm.momentum": (0.0, 0.5, 0.7)},
    }
    given: dict[str, list[Any]] = {}

    def run_all(runs: list[PlannedRun], _: Judge) -> None:
        for run in runs:
            for key in ("fedala.layers", "pfedgpa.momentum", "fedavgm.momentum"):
                given.setdefault(key, []).extend([run.varied[key]] if key in run.varied else [])

    trials.search(BASE, grids, tmp_path, run_all, lambda _: (1.0,), 6, 3)
    assert {type(value) for value in given["fedala.layers"]} == {int}
    assert set(given["fedala.layers"]) <= {1, 2}
    # what they are anyway comes first, here beyond the grid
    assert (given["fedavgm.momentum"][0], given["pfedgpa.momentum"][0]) == (0.9, "auto")
    assert all(0 <= value <= 0.9 for value in given["fedavgm.momentum"])
    assert set(given["pfedgpa.momentum"]) <= {"auto", 0.0, 0.5}


def test_where_the_best_are_equal_the_next_best_decide(tmp_path: Path) -> None:
    grids: dict[str, Any] = {"fedavgm": {"fedavgm.momentum": (0.0, 0.5, 0.7)}}
    tried: list[float] = []

    def run_all(runs: list[PlannedRun], _: Judge) -> None:
        tried.extend(run.varied["fedavgm.momentum"] for run in runs)

    def level(run: PlannedRun) -> tuple[float, ...]:
        return (68.75, 60.0 - abs(run.varied["fedavgm.momentum"] - tried[1]))

    found, _ = trials.search(BASE, grids, tmp_path, run_all, level, 5, 2)
    assert found == {"fedavgm.momentum": tried[1]}


def test_of_equals_what_they_are_anyway_is_chosen(tmp_path: Path) -> None:
    grids: dict[str, Any] = {"fedavgm": {"fedavgm.momentum": (0.0, 0.5, 0.7)}}
    found, _ = trials.search(BASE, grids, tmp_path, lambda *_: None, lambda _: (50.0,), 4, 2)
    assert found == {"fedavgm.momentum": 0.9}


def test_the_first_has_the_settings_as_they_are(tmp_path: Path) -> None:
    """Neither drawn where they are "auto", nor rounded; and so has the best, if it is the first."""
    name = "fedprox.learning-rate"
    grids: dict[str, Any] = {"fedprox": {name: (0.02, 0.05, 0.1), "fedprox.mu": (0.01, 0.1)}}
    base, tried = BASE | {"fedprox.mu": 0.01234, "learning-rate": 0.03}, list[PlannedRun]()

    def run_all(runs: list[PlannedRun], _: Judge) -> None:
        tried.extend(runs)

    for number in (1, 3):  # and it stays so when the search goes on
        found, runs = trials.search(base, grids, tmp_path, run_all, lambda _: (50.0,), number, 1)
        assert found == {name: "auto", "fedprox.mu": 0.01234}
        assert [run.name for run in runs] == [run.name for run in tried]
    assert tried[0].config.of(FedProxSettings).learning_rate is None
    assert len({run.varied[name] for run in tried}) == 3


@pytest.mark.filterwarnings("error:The reported value is ignored")
def test_a_run_whose_training_loss_is_among_the_worst_is_ended(tmp_path: Path) -> None:
    ended: list[str] = []

    began: list[str] = []

    def run_all(runs: list[PlannedRun], judge: Judge) -> None:
        for run in runs:
            began.append(run.name)
            loss = 100.0 if len(began) in (3, 8) else 1.0  # no trial before the third is done
            for progress in (0.05, 0.35, 0.38, 0.65):
                event = {"kind": "round", "text": "", "progress": progress}
                assert judge(run, event | {"loss": None}) is None  # no client took a step
                if judge(run, event | {"loss": loss}):
                    ended.append(run.name)
                    break
                assert judge(run, event) is None  # other engines' events say nothing of it

    done: list[str] = []

    def score(run: PlannedRun) -> tuple[float, ...]:
        done.append(run.name)
        return () if run.name in ended else (float(len(done)),)

    grids = {"fedprox": {"fedprox.mu": (0.001, 0.01, 0.1, 1.0)}}
    found, _ = trials.search(BASE, grids, tmp_path, run_all, score, 10, 5)
    assert ended == [began[7]]
    assert f"fedprox.mu={found['fedprox.mu']}" not in " ".join(ended)
    kept = trials.Search(BASE, "fedprox", grids["fedprox"], tmp_path, 10, {})
    states = [trial.state.name for trial in kept.study.get_trials()]
    assert states.count("PRUNED") == 1
    assert states.count("COMPLETE") == 9


def test_where_every_run_fails_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of fedavg finished"):
        trials.search(BASE, RATES, tmp_path, lambda *_: None, lambda _: (), 3, 2)


def test_the_command_that_tune_keeps_can_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ünï cöde").mkdir()
    (tmp_path / "ünï cöde" / "e.yaml").write_text("method: fedavg")
    kept: list[tuple[Any, ...]] = []

    def keep(*given: Any, **more: Any) -> dict[str, Any]:
        kept.append(given)
        return {}

    monkeypatch.setattr(tune, "tune", keep)
    words = ["dataset=imagefolder:my data", "augment=true", "group-shares=[2,\n1]", "momentum=0.5"]
    assert cli.main(["tune", "--conf", "ünï cöde/e.yaml", "--trials", "2", *words]) == 0
    assert len(kept[0][-1].splitlines()) == 1
    program, *again = shlex.split(kept[0][-1])
    assert program == "pfedgpa"
    assert "ünï cöde/e.yaml" in again
    assert cli.main(again) == 0
    first, second = ((resolve(given[2]).config, given[-1]) for given in kept)
    assert first == second


@pytest.mark.slow
def test_tune_keeps_what_trials_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{k}: {v}" for k, v in (PLAIN | {"num-server-rounds": 2}).items()]
    (tmp_path / "mine.yaml").write_text("\n".join(["method: fedavg", "device: cpu", *lines]))
    assert cli.main(["tune", "--conf", "mine.yaml", "--trials", "2", "--jobs", "2"]) == 0
    found = resolve({"conf": "mine.yaml"}).config.learning_rate
    search = (tmp_path / "mine.search.md").read_text()
    assert search.startswith("Made by `pfedgpa tune --conf mine.yaml --methods fedavg --trials 2`")
    assert search.count("| FedAvg |") == 2
    columns = {line.count("|") for line in search.splitlines() if line.startswith("|")}
    assert columns == {7}  # what was not run is a dash
    assert f"| learning-rate = {found} |" in search


def test_values_that_a_method_refuses_together_cost_nothing(tmp_path: Path) -> None:
    """PFedMe's learning rate is at most 1/λ."""
    base = BASE | {"method": ["pfedme"], "pfedme.lam": 15.0}
    grids = {"pfedme": {"pfedme.learning-rate": (0.005, 0.01, 0.02, 0.06)}}
    given: list[float] = []

    def run_all(runs: list[PlannedRun], _: Judge) -> None:
        given.extend(run.varied["pfedme.learning-rate"] for run in runs)

    def near(run: PlannedRun) -> tuple[float, ...]:
        return (50 - 10 * abs(math.log10(run.varied["pfedme.learning-rate"] / 0.05)),)

    found, _ = trials.search(base, grids, tmp_path, run_all, near, 30, 3)
    assert 0.03 < found["pfedme.learning-rate"] <= 1 / 15
    assert len(given) < 30  # some were proposed beyond, as the grid's next step is
    assert max(given) <= 1 / 15
