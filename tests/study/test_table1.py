"""The paper's table: what runs, with whose settings, beside which figures."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from pfedgpa_app import cli
from pfedgpa_app.cli.reproduce import _cells
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.study import table1
from pfedgpa_app.study.compare import PAPER
from pfedgpa_app.study.plan import PlannedRun
from pfedgpa_app.study.table1 import METHODS_OF_TABLE, PaperCell, Table1, column
from tests.study.test_reproduce import Machine as AnyMachine

CELL = column("cifar10", 100)
PLACES = {"cifar10": "mnist", "emnist": "mnist", "fashion-mnist": "mnist"}


class Machine(AnyMachine):
    """PFedGPA at 70 and all others ``behind`` it; FedAvg is best by 0.05, FedPer by 0.1."""

    def __init__(self, behind: float) -> None:
        super().__init__(0.0)
        self.behind = behind

    def accuracy(self, method: str, run: PlannedRun) -> float:
        if run.config.seed != 100:
            return 70.0 if method == "pfedgpa" else 70.0 - self.behind
        rate = float(run.settings.get("fedper.learning-rate", run.config.learning_rate))
        best = {"fedavg": 0.05, "fedper": 0.1}.get(method, 0.02)
        return 50 - abs(rate - best)


def test_every_column_is_its_experiments_federation() -> None:
    cells = table1.Table1.cells()
    assert {(cell.data, cell.clients) for cell in cells} == {
        (data, clients) for data in PAPER for clients in (10, 20, 100)
    }
    for cell in cells:
        config = resolve(cell.settings).config
        assert config.num_clients == cell.clients
        assert config.fraction_train == (0.3 if cell.clients == 100 else 1.0)
        assert config.num_server_rounds == (300 if cell.data == "cifar10" else 200)
        # of CIFAR-10 no more without sharing any
        assert config.train_per_client == (380 if cell.clients == 100 else 600)
    assert set(PAPER["emnist"]) < set(METHODS_OF_TABLE)


@pytest.mark.parametrize(
    ("cell", "behind", "seeds"),
    [
        (CELL, 5.0, {0}),
        (CELL, 0.5, {0, 1, 2}),
        (CELL, -0.5, {0, 1, 2}),
        (column("cifar10", 20), 5.0, {0, 1, 2}),
    ],
)
def test_each_method_runs_by_what_was_searched_for_it(
    cell: PaperCell, behind: float, seeds: set[int], tmp_path: Path
) -> None:
    machine = Machine(behind)
    text = Table1(tmp_path, {}, PLACES, machine).fill([cell])
    searched = [run for run in machine.done if run.config.seed == 100]
    assert {run.config.num_clients for run in searched} == {20}
    assert {run.config.num_server_rounds for run in searched} == {60}
    final = [run for run in machine.done if run.config.seed != 100]
    assert {run.config.seed for run in final} == seeds
    of = {method: run.config for run in final for method in run.config.method}
    assert sorted(of) == sorted(METHODS_OF_TABLE)
    assert of["fedavg"].learning_rate == 0.05
    assert {run.settings.get("fedper.learning-rate") for run in final} == {0.1, None}
    rows = [json.loads(line) for line in (tmp_path / "table1.jsonl").read_text().splitlines()]
    assert len(rows) == len(seeds) * len(METHODS_OF_TABLE)
    paper = PAPER["cifar10"]["pfedgpa"][(10, 20, 100).index(cell.clients)]
    spread = " ± 0.00" if len(seeds) > 1 else ""
    assert f"| 70.00{spread} ({paper:.2f}) |" in text
    assert f"| {70 - behind:.2f}{spread} (–) |" in text  # a rival that the paper has not
    machine.done.clear()
    assert Table1(tmp_path, {}, PLACES, machine).fill([cell]) == text
    assert not machine.done


def test_fedavgs_own_rounds_tell_what_tuned_fine_tuning_brings() -> None:
    rows = [
        {"data": "emnist", "clients": clients, "partition": "dominant", "images": images}
        | {"method": method, "title": method, "seed": 0}
        | {"accuracy_as_its_paper": 75.0, "accuracy_after_ft_tuned": 86.0 + clients / 100}
        for clients, images, method in (
            (10, 600, "fedavg"),
            (10, 600, "fedavg-ft-tuned"),
            (100, 380, "fedavg"),
            (100, 380, "pfedgpa"),
        )
    ]
    lines = table1.table(rows).splitlines()
    assert "| FedAvg-FT (tuned) | 75.00 (–) | 87.00 (–) |" in [
        line.replace("fedavg-ft-tuned", "FedAvg-FT (tuned)") for line in lines
    ]
    rows = [row for row in rows if row["method"] != "fedavg"]
    assert "| fedavg-ft-tuned | 75.00 (–) | – (–) |" in table1.table(rows).splitlines()


def test_without_a_search_the_experiments_settings_are_taken(tmp_path: Path) -> None:
    machine = Machine(5.0)
    methods = ("fedavg", "pfedgpa")
    Table1(tmp_path, {"num-server-rounds": 20}, PLACES, machine, methods, quick=True).fill([CELL])
    assert {run.config.seed for run in machine.done} == {0}
    assert {run.config.learning_rate for run in machine.done} == {0.02}
    assert {run.config.num_server_rounds for run in machine.done} == {20}


@pytest.mark.parametrize(
    ("only", "meant"),
    [
        ("cifar10-10", ["cifar10-10"]),  # and not cifar10-100
        ("cifar10-1", ["cifar10-10", "cifar10-100"]),
        ("emnist-20,cifar10-20", ["cifar10-20", "emnist-20"]),
    ],
)
def test_a_whole_name_is_one_place(only: str, meant: list[str]) -> None:
    cells = _cells(Namespace(only=only, quick=False), Table1)
    assert sorted(cell.name for cell in cells if "fashion" not in cell.name) == meant


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "cfl"], "--methods: cfl: not in the table, which has local, fedavg, "),
        (["--only", "cifar10-30"], "no place of the table"),
        (["num-clients=20"], "cannot be set; the table sets it"),
    ],
)
def test_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "table1", *words]) == 2
    assert said in capsys.readouterr().err
