"""The paper's smaller studies again: what runs, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import keep
from pfedgpa_app import cli
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.results import log
from pfedgpa_app.study.join import Join, JoinCell
from pfedgpa_app.study.plan import PlannedRun
from pfedgpa_app.study.reproduce import DATA, Atlas
from pfedgpa_app.study.table2 import AblationCell, Table2
from pfedgpa_app.study.warm_start import StartCell, WarmStart
from tests.study.test_reproduce import Machine as AnyMachine

PLACES = dict.fromkeys(DATA, "mnist")


class Machine(AnyMachine):
    """Every method is one point better with each seed, and newcomers are after each upload."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def __call__(self, runs: list[PlannedRun]) -> bool:
        new = [run for run in runs if not log.is_done(run.folder)]
        done = super().__call__(runs)
        for run in new:
            for method in run.config.method:
                accuracy = self.accuracy(method, run)
                for client in range(2):
                    told = {"before_ft": accuracy + client, "after_ft": accuracy + 2}
                    log.append(run.folder / "clients.jsonl", {"method": method, **told})
                    for number in range(1, run.config.num_server_rounds + 1):
                        record = {"federation": method, "round": number, "client": client}
                        log.append(run.folder / log.METRICS, record | {"accuracy": float(number)})
        return done

    def accuracy(self, method: str, run: PlannedRun) -> float:
        guided = run.settings.get("pfedgpa.join-mode") == "guided"
        return 70.0 + run.config.seed + 5 * guided

    def row(self, run: PlannedRun) -> Any:
        def of(method: str) -> dict[str, Any]:
            row: dict[str, Any] = super(Machine, self).row(run)(method)
            accuracy = row["accuracy_before_ft"]
            row |= {"accuracy_after_ft_as_in_training": accuracy, "clients_under_60_before_ft": 0}
            row |= {"rounds_to_95_percent_of_peak": 19}
            return row | {"accuracy_of_joining_clients": [accuracy + i for i in range(6)]}

        return of


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_with_and_without_inversion_beside_the_papers_figures(tmp_path: Path) -> None:
    machine = Machine()
    text = Table2(tmp_path, {}, PLACES, machine).fill([AblationCell("cifar10")])
    assert "| 71.00 ± 1.00 (68.90) | 71.00 ± 1.00 (74.77) |" in text
    assert "| 71.00 ± 1.00 (76.28) | 71.00 ± 1.00 (75.72) |" in text
    rows = rows_in(tmp_path / "table2.jsonl")
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert rows[0]["before_ft"] == [70, 71]
    assert "without inversion, as sent" in (tmp_path / "figure4.svg").read_text()
    machine.done.clear()
    assert Table2(tmp_path, {}, PLACES, machine).fill([AblationCell("cifar10")]) == text
    assert not machine.done


def test_clients_join_denoised_and_guided(tmp_path: Path) -> None:
    machine = Machine()
    cells = Join.cells(quick=True)
    text = Join(tmp_path, {}, PLACES, machine).fill(cells, [0])
    asked = {(*run.config.method, run.config.join_clients) for run in machine.done}
    assert asked == {(m, 5) for m in ("local", "fedavg", "pfedhn", "pfedgpa")}
    guided = [run for run in machine.done if run.settings.get("pfedgpa.join-mode") == "guided"]
    assert [run.config.method for run in guided] == [("pfedgpa",)]
    assert "| pFedGPA, guided | 1 | 75.0 | 76.0 | 77.0 | 78.0 | 79.0 | 80.0 | 75.0 | 75.0 |" in text
    assert "| local-only | 1 | 70.0 | 71.0 |" in text


def test_a_warm_federation_starts_from_another_ones_distribution(tmp_path: Path) -> None:
    machine = Machine()
    text = WarmStart(tmp_path, {}, PLACES, machine).fill(WarmStart.cells(quick=True), [0])
    [source] = [run for run in machine.done if run.config.seed == 100]
    assert (source.config.num_server_rounds, source.config.save_weights) == (100, True)
    warm = [run for run in machine.done if run.config.start_from]
    assert {run.config.start_from for run in warm} == {
        str(source.folder / "distribution.safetensors")
    }
    assert {run.config.method for run in warm} == {("fedavg",), ("pfedgpa",)}
    assert {run.settings.get("pfedgpa.generate-from") for run in warm} == {2, None}
    assert "| pFedGPA | warm | 1 | 1.0 | 2.0 | 3.0 | 5.0 | 10.0 | 20.0 | 19.0 |" in text
    assert "| local-only | cold |" in text
    assert "| local-only | warm |" not in text


@pytest.mark.parametrize("study", [Join, Table2, WarmStart])
def test_what_is_kept_in_the_repository_makes_the_same_tables(
    study: type[Atlas], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    cells = study.cells()[:2]
    for cell in cells[::-1]:
        atlas = study(tmp_path / cell.name, {}, PLACES, Machine(), study.known)
        atlas.fill([cell], [0])
        keep.add_rows(study, atlas.out)
        keep.add_rows(study, atlas.out)  # as often as one likes
    rows = keep.rows_of_study(study)
    assert len(rows) == sum(len(cell.methods) for cell in cells)
    whole = study(tmp_path / "whole", {}, PLACES, Machine(), study.known)
    assert whole.tables(rows) == whole.fill(cells, [0])


def test_nothing_is_run_for_a_federation_without_methods(tmp_path: Path) -> None:
    machine = Machine()
    WarmStart(tmp_path, {}, PLACES, machine, ("local",)).fill(WarmStart.cells(quick=True), [0])
    assert {run.config.method for run in machine.done} == {("local",)}  # no source


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", [AblationCell, JoinCell, StartCell])
def test_who_is_measured_is_what_the_paper_says(kind: Any, data: str) -> None:
    config = resolve(kind(data).settings).config
    assert data in config.dataset
    assert (config.num_clients, config.partition, config.train_per_client) == (20, "dominant", 600)


def test_it_says_how_long_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> bool:
        return False

    monkeypatch.setattr("pfedgpa_app.study.sweep.run_sweep", stop)
    words = ["reproduce", "figure4", "--quick", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 1
    said = capsys.readouterr()
    # two federations of 20 rounds: 20 × 600 images, 2 epochs, 0.31 ms an image
    assert "about 5 minutes of one core for seed 0" in said.out
    assert "1 places with 5 methods each, 0 of them done" in said.out


def test_what_it_says_is_of_what_is_to_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pfedgpa_app.study.sweep.run_sweep", lambda *_, **__: False)
    words = ["reproduce", "join", "--quick", "--methods", "fedavg", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--data", "cifar10=digits"]) == 1
    said = capsys.readouterr().out
    assert "1 places with 1 methods each, 0 of them done" in said  # none is guided
    assert "--data cifar10 has no effect: nothing here uses it" in caplog.text
