"""The map of where generation helps: what is searched, which seeds run, what is told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import keep
from pfedgpa_app import cli
from pfedgpa_app.methods import METHODS
from pfedgpa_app.results import log
from pfedgpa_app.study import reproduce
from pfedgpa_app.study.plan import PlannedRun, TakenError
from pfedgpa_app.study.reproduce import COLUMNS, DATA, MERIT, Atlas, Cell

CELL = Cell("fashion-mnist", 100, "dominant", 30)


class Machine:
    """Stands for the runs: what each method comes to, which may go by its settings."""

    def __init__(self, ahead: float) -> None:
        self.ahead, self.done = ahead, list[PlannedRun]()

    def accuracy(self, method: str, run: PlannedRun) -> float:
        config = run.config
        rate = {0.02: 1.0, 0.05: 3.0, 0.1: 2.0}[config.learning_rate]
        momentum = run.settings.get(f"{method}.momentum", 0.0)
        own = {"fedavgm": {0.5: 1.0, 0.7: 2.0, 0.9: 0.0}, "pfedgpa": {0.0: 0.5, 0.5: 0.0, 0.7: 0.1}}
        more = own.get(method, {}).get(momentum, 0.0)
        known = {"group-mean": 30.0, "pfedgpa": 1.5 + self.ahead}.get(method, 0.0)
        return 50 + rate + more + known

    def __call__(self, runs: list[PlannedRun]) -> bool:
        failed = [run for run in runs if not self._do(run)]
        return not failed

    def fails(self, run: PlannedRun) -> bool:
        """Whether its weights go to infinity."""
        return run.config.learning_rate > 0.1

    def _do(self, run: PlannedRun) -> bool:
        if not log.is_done(run.folder) and not self.fails(run):
            self.done.append(run)
            run.folder.mkdir(parents=True)
            described = json.dumps(run.resolved.as_dict())
            (run.folder / "config.json").write_text(described)
            (run.folder / log.SUMMARY).write_text(
                json.dumps([*map(self.row(run), run.config.method)])
            )
            log.say(run.folder, "done", "", 1.0)
        return log.is_done(run.folder)

    def row(self, run: PlannedRun) -> Any:
        def of(method: str) -> dict[str, Any]:
            accuracy = self.accuracy(method, run)
            row: dict[str, Any] = dict.fromkeys(COLUMNS.values(), accuracy)
            row |= {"method": method, "title": METHODS[method].title, "seed": run.config.seed}
            row |= {"rounds": 100, "fine_tuning_tuned": None, "server_seconds": 1.0}
            row |= {"accuracy_as_its_paper": accuracy}
            return row | {"validation": {"before_ft": accuracy}}

        return of


@pytest.mark.parametrize(("ahead", "seeds"), [(2.0, [0]), (0.4, [0, 1, 2]), (-3.0, [0])])
def test_what_is_chosen_on_validation_images_is_run(
    ahead: float, seeds: list[int], tmp_path: Path
) -> None:
    machine = Machine(ahead)
    Atlas(tmp_path, {}, {"fashion-mnist": "mnist"}, machine).fill([CELL])
    searched = [run for run in machine.done if run.config.seed == 100]
    assert {(run.config.method, run.config.num_clients) for run in searched} == {
        (("fedavg",), 20),  # the learning rate that all use
        (("fedavgm",), 100),  # its momentum, with as many clients as there are
    }
    assert {run.config.train_per_client for run in searched} == {60}
    final = [run for run in machine.done if run.config.seed != 100]
    assert {run.config.learning_rate for run in searched} == {0.02, 0.05, 0.1}
    assert {run.config.learning_rate for run in final} == {0.05}
    of = {method: run for run in final for method in run.config.method}
    assert sorted(of) == sorted(reproduce.METHODS_OF_MAP)
    assert of["fedavgm"].settings["fedavgm.momentum"] == 0.7
    assert not any(name.startswith("pfedgpa.") for name in of["pfedgpa"].settings)  # its defaults
    assert {run.config.dataset for run in machine.done} == {"mnist"}
    # a gain below a point is measured by more seeds
    assert sorted({run.config.seed for run in final}) == seeds
    rows = [json.loads(line) for line in (tmp_path / "map.jsonl").read_text().splitlines()]
    assert reproduce.gain(rows) == pytest.approx(ahead)  # the group mean is no contender
    assert len(rows) == len(seeds) * len(reproduce.METHODS_OF_MAP)
    table = (tmp_path / "map.md").read_text()
    assert f"{55 + ahead:.1f} ({ahead:+.1f} over FedAvgM)" in table.splitlines()[2]
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    drawn = reproduce.methods_figure(rows, images=30)
    titles = {row["title"] for row in rows} - {"FedAvg-FT (tuned)", "group mean (analysis only)"}
    assert all(f">{title}<" in drawn for title in titles)
    assert "group mean" not in drawn


def test_a_rate_too_high_is_not_chosen_and_ends_no_search(tmp_path: Path) -> None:
    class Fast(Machine):
        def accuracy(self, method: str, run: PlannedRun) -> float:
            return 100 * run.config.learning_rate  # the largest is best, and 0.2 is tried

    machine = Fast(2.0)
    Atlas(tmp_path, {}, {}, machine, ("fedala",)).fill([CELL])
    [final] = [run for run in machine.done if run.config.seed != 100]
    assert final.config.learning_rate == 0.1


def test_a_setting_that_is_given_is_not_searched_and_goes_to_who_reads_it(tmp_path: Path) -> None:
    machine = Machine(2.0)
    given = {"learning-rate": 0.1, "pfedgpa.momentum": 0.7, "pfedgpa.width": 64}
    Atlas(tmp_path, given, {}, machine).fill([CELL])
    searched = [run for run in machine.done if run.config.seed == 100]
    assert {run.config.method for run in searched} == {("fedavgm",)}
    final = [run for run in machine.done if run.config.seed == 0]
    assert {run.config.learning_rate for run in final} == {0.1}
    assert {
        (method, run.settings.get("pfedgpa.momentum"), run.settings.get("pfedgpa.width"))
        for run in final
        for method in run.config.method
        if method in ("fedala", "pfedgpa")
    } == {("fedala", None, None), ("pfedgpa", 0.7, 64)}


def test_a_part_that_is_run_anew_leaves_the_rest_in_the_tables(tmp_path: Path) -> None:
    """As with --only, --methods and --seeds."""
    machine, given = Machine(2.0), {"learning-rate": 0.05}
    other = replace(CELL, images=60)
    Atlas(tmp_path, given, {}, machine).fill([CELL])
    before = (tmp_path / "map.jsonl").read_text().splitlines()
    (tmp_path / CELL.name / "seed-0 of November").mkdir()  # the user's own
    Atlas(tmp_path, given, {}, machine, ("fedavg",)).fill([other])
    Atlas(tmp_path, given, {}, machine, ("pfedgpa",)).fill([CELL], [1])
    rows = (tmp_path / "map.jsonl").read_text().splitlines()
    assert {row for row in rows if '"seed": 0' in row and '"images": 30' in row} == {*before}
    more = [json.loads(row) for row in rows if row not in before]
    assert {(row["images"], row["method"], row["seed"]) for row in more} == {
        (60, "fedavg", 0),
        (30, "pfedgpa", 1),
    }
    assert "(+2.0 over FedAvgM)" in (tmp_path / "map.md").read_text()


def test_a_method_that_fails_is_told_and_keeps_no_other_back(tmp_path: Path) -> None:
    class Broken(Machine):
        broken = True

        def fails(self, run: PlannedRun) -> bool:
            return self.broken and "fedala" in run.config.method

        def _do(self, run: PlannedRun) -> bool:
            if self.fails(run):
                run.folder.mkdir(parents=True, exist_ok=True)
                (run.folder / "config.json").write_text(json.dumps(run.resolved.as_dict()))
                log.say(run.folder, "failed", "its training has diverged", 0.5)
                return False
            if not log.is_done(run.folder):
                shutil.rmtree(run.folder, ignore_errors=True)
            return super()._do(run)

    machine = Broken(2.0)
    atlas = Atlas(tmp_path, {}, {}, machine)
    other = Cell("emnist", 20, "dominant", 60)
    atlas.fill([CELL, other])
    assert atlas.failures([CELL, other]) == [
        f"{cell.name}, seed 0: fedala: its training has diverged" for cell in (CELL, other)
    ]
    told = {row["method"] for row in atlas.rows([CELL])}
    assert told == {*reproduce.METHODS_OF_MAP} - {"fedala"}
    machine.broken = False  # as with more memory
    atlas.fill([CELL, other])
    assert not atlas.failures([CELL, other])
    assert {row["method"] for row in atlas.rows([other])} == {*reproduce.METHODS_OF_MAP}


def test_a_second_start_runs_nothing_again_and_half_a_seed_is_not_told(tmp_path: Path) -> None:
    machine = Machine(2.0)
    atlas = Atlas(tmp_path, {}, {}, machine)
    text = atlas.fill([CELL])
    machine.done.clear()
    assert atlas.fill([CELL]) == text
    assert not machine.done
    assert atlas.seconds([CELL]) == 0
    fedala = next(tmp_path.glob("*/seed-0/*method=fedala*"))
    log.say(fedala, "round", "killed", 0.5)
    assert not atlas.rows([CELL])
    assert atlas.seconds([CELL]) > 0  # by runs whose settings a search has chosen


def test_some_of_the_methods_are_run_and_told_alone(tmp_path: Path) -> None:
    machine = Machine(2.0)
    text = Atlas(tmp_path, {}, {}, machine, ("pfedgpa",)).fill([CELL])
    searched = {run.config.method for run in machine.done if run.config.seed == 100}
    assert searched == {("fedavg",)}  # by whose learning rate all go
    [final] = [run for run in machine.done if run.config.seed != 100]
    assert final.config.method == ("pfedgpa",)
    assert "57.0" in text
    assert "over" not in text  # no contender
    machine.done.clear()
    Atlas(tmp_path, {}, {}, machine).fill([CELL])  # the others join it
    assert ("pfedgpa",) not in {run.config.method for run in machine.done}
    assert "(+2.0 over FedAvgM)" in (tmp_path / "map.md").read_text()


def test_a_method_that_ran_in_two_groups_is_told_once(tmp_path: Path) -> None:
    Atlas(tmp_path, {}, {}, Machine(2.0), ("fedavg",)).fill([CELL])
    machine = Machine(2.0)
    machine.accuracy = lambda method, run: 77.0  # type: ignore[method-assign]
    rows = Atlas(tmp_path, {}, {}, machine, ("fedavg", "client-mean"))
    rows.fill([CELL])
    found = [json.loads(line) for line in (tmp_path / "map.jsonl").read_text().splitlines()]
    told = [(row["method"], row["seed"], row["accuracy_before_ft"]) for row in found]
    assert sorted(told) == [("client-mean", 0, 77.0), ("fedavg", 0, 77.0)]  # the newest
    again = Atlas(tmp_path, {"num-server-rounds": 9}, {}, machine, ("fedavg", "fedbabu"))
    with pytest.raises(TakenError, match="num-server-rounds = 100 there, 9 here"):
        again.fill([CELL])


def test_a_place_without_such_methods_is_left_out(tmp_path: Path) -> None:
    cells = [CELL, Cell("fashion-mnist", 20, "dirichlet", 60)]
    Atlas(tmp_path, {}, {}, Machine(2.0), ("group-mean",)).fill(cells)
    rows = [json.loads(line) for line in (tmp_path / "map.jsonl").read_text().splitlines()]
    assert [row["partition"] for row in rows] == ["dominant"]


def test_hidden_groups_are_where_the_partition_has_some() -> None:
    assert reproduce.KNOWS_GROUPS not in Cell("emnist", 100, "dirichlet", 30).methods


def test_the_command_ends_with_what_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Atlas, "fill", lambda *_: "the tables")
    monkeypatch.setattr(Atlas, "failures", lambda *_: ["cifar10, seed 0: fedrep: diverged"])
    assert cli.main(["reproduce", "map", "--quick", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "the tables" in said.out
    assert "is in no table:\ncifar10, seed 0: fedrep: diverged" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["conf=demo"], "cannot be set; the map sets it"),
        (["seed=3"], "use --seeds"),
        (["--seeds", "0,x"], "must be whole numbers separated by commas"),
        (["dataset=mnist"], "use --data"),
        (["--data", "mnist=here"], "NAME one of cifar10"),
        (["--only", "cifar100"], "no place of the map matches; there are "),
        (["--quick", "--only", "cifar10"], "no place of the map with --quick matches; there are "),
        (["--methods", "fedavg,fedx"], "--methods: fedx: not in the map, which has fedavg, "),
    ],
)
def test_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "map", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("study", "setting"),
    [("join", "join-iterations=2"), ("warm-start", "evaluate-every=0"), ("map", "partition=iid")],
)
def test_what_a_table_is_laid_out_by_is_its_own(
    study: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", study, setting]) == 2
    assert f"{setting.partition('=')[0]}: cannot be set; the " in capsys.readouterr().err


def test_the_map_s_figure_has_all_that_is_kept() -> None:
    rows = keep.rows_of_study(Atlas)
    drawn = (keep.PICTURES / "map.svg").read_text()
    assert all(f"{DATA[row['data']]}, {row['clients']} clients" in drawn for row in rows)
    assert all(row[MERIT] is not None for row in rows)
