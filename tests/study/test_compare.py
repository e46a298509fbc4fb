"""`pfedgpa compare` and `pfedgpa tune`: what they plan, choose and write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import keep
from pfedgpa_app import cli
from pfedgpa_app.config.names import method_named
from pfedgpa_app.config.resolve import differences, resolve
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.fedprox import FedProxSettings
from pfedgpa_app.results.log import EVENTS, SUMMARY, is_done
from pfedgpa_app.study import compare, tune
from pfedgpa_app.study.compare import (
    EXPERIMENTS,
    MAIN,
    PAPER,
    finished,
    overview,
    plan,
    table,
)
from pfedgpa_app.study.plan import PlannedRun, TakenError, expand, read
from tests.support.federations import SMALL, known_for_a_while


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A small one on digits, with a line that a reader wrote."""
    path = tmp_path / "small.yaml"
    small = {key: value for key, value in SMALL.items() if not key.startswith("pfedgpa.")}
    path.write_text("# mine\n" + yaml.safe_dump(small | {"num-server-rounds": 2}))
    return path


@pytest.fixture
def own(experiment: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of a comparison in which a method of the user's own has run."""
    (tmp_path / "own_mean.py").write_text(
        "from pfedgpa_app.methods.fedavg import FedAvg\n\nclass Mean(FedAvg):\n    pass\n"
    )
    out = tmp_path / "out"
    with known_for_a_while("mean"):
        name = method_named("own_mean:Mean", str(tmp_path))
        [ran] = plan([str(experiment)], [name], [0], {"code-dir": str(tmp_path)}, out)
        finish(ran, 50.0, **FIGURES)
        yield out


class TestPlan:
    def test_federations_run_once_and_the_first_seed_of_everything_first(
        self, experiment: Path, tmp_path: Path
    ) -> None:
        runs = plan([str(experiment)], None, None, {}, tmp_path / "out")
        seeds = [run.config.seed for run in runs]
        assert seeds == sorted(seeds)
        by_seed = {
            s: [m for r in runs if r.config.seed == s for m in r.config.method] for s in (0, 1)
        }
        assert sorted(by_seed[0]) == sorted(set(METHODS) - {"krum", "trimmed-mean"})
        assert sorted(by_seed[1]) == sorted(MAIN)
        [shared] = [r for r in runs if r.config.seed == 1 and "fedavg" in r.config.method]
        assert {"fedavg", "fedavg-ft", "client-mean", "pfedgpa-once"} <= set(shared.config.method)

    def test_of_some_methods_every_seed_asked_for(self, experiment: Path, tmp_path: Path) -> None:
        runs = plan([str(experiment)], ["ditto"], [4, 4, 5], {}, tmp_path)
        assert [(r.config.method, r.config.seed) for r in runs] == [
            (("ditto",), 4),
            (("ditto",), 5),
        ]

    def test_runs_by_other_settings_are_no_seeds(self, experiment: Path, tmp_path: Path) -> None:
        [ran] = plan([str(experiment)], ["fedavg"], [0], {}, tmp_path)
        ran.folder.mkdir()
        (ran.folder / "config.json").write_text(json.dumps(ran.resolved.as_dict()))
        (ran.folder / SUMMARY).write_text("[]")
        (ran.folder / EVENTS).write_text(json.dumps({"kind": "done", "text": ""}) + "\n")
        other: dict[str, Any] = {"num-server-rounds": 3}
        with pytest.raises(TakenError, match=r"fedavg with other settings .*= 2 there, 3 here"):
            plan([str(experiment)], ["fedavg", "client-mean"], [1], other, tmp_path)
        for more in (["fedavg", "client-mean"], ["ditto"], ["fedavg", "pfedgpa-once"]):
            settings: dict[str, Any] = {"ditto.lam": 0.3} if "ditto" in more else {}
            if "pfedgpa-once" in more:
                settings |= {"pfedgpa.rank": 2}
            assert plan([str(experiment)], more, [1], settings, tmp_path)

    def test_a_method_of_the_users_own_by_other_settings(
        self, own: Path, experiment: Path, tmp_path: Path
    ) -> None:
        code, other = {"code-dir": str(tmp_path)}, {"num-server-rounds": 3}
        with pytest.raises(TakenError, match=r"mean with other settings .*= 2 there, 3 here"):
            plan([str(experiment)], ["fedavg", "mean"], [1], code | other, own)
        assert plan([str(experiment)], ["fedavg", "mean"], [1], code, own)

    def test_methods_of_the_users_own_have_rows(self, own: Path) -> None:
        METHODS.pop("mean")  # as in another process
        found = finished(own)
        assert [row["title"] for row in found["small"]["mean"]] == ["Mean"]
        assert "| Mean | 50.0 / 50.0 |" in overview(found)

    def test_code_that_is_gone_keeps_no_other_method_back(
        self, own: Path, experiment: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        METHODS.pop("mean")  # as in another process
        (tmp_path / "own_mean.py").rename(tmp_path / "another.py")
        sys.modules.pop("own_mean")
        [ran] = plan([str(experiment)], ["fedprox"], [0], {}, own)
        finish(ran, 60.0, **FIGURES)
        found = finished(own)
        assert "| FedProx | 50.0 / 50.0 |\n| Mean | 50.0 / 50.0 |" in overview(found)
        assert "| Mean | 1 | " in table(found)
        assert caplog.text.count("module own_mean cannot be imported") == 1
        name = method_named("another:Mean", str(tmp_path))
        code = {"code-dir": str(tmp_path)}
        with pytest.raises(TakenError, match=r"mean with .*'own_mean:Mean'\] there, \['another:"):
            plan([str(experiment)], ["fedavg", name], [1], code, own)

    def test_what_methods_were_not_run_alike_by_is_said(self, tmp_path: Path) -> None:
        """As when a comparison goes on with other settings for its other methods."""
        for method, rate in (("fedavg", 0.02), ("fedprox", 0.02), ("fedper", 0.05)):
            [run] = expand({"learning-rate": rate}, {"method": [method]}, tmp_path)
            finish(run, 50.0, **FIGURES)
            if method == "fedper":  # of a version that had no such setting
                kept = json.loads((run.folder / "config.json").read_text())
                del kept["test-share"]
                (run.folder / "config.json").write_text(json.dumps(kept))
        written = table(finished(tmp_path))
        [said] = [line for line in written.splitlines() if line.startswith("Not run alike")]
        assert said == "Not run alike: learning-rate = 0.02 (FedAvg, FedProx), 0.05 (FedPer)."

    def test_the_papers_methods_are_ours(self) -> None:
        for figures in PAPER.values():
            assert set(figures) <= set(METHODS)
            assert len(figures) == 9

    def test_table(self, tmp_path: Path) -> None:
        ran = (("0", 0, 70.0), ("1", 1, 72.0), ("2", 2, 90.0), ("an older one", 1, 10.0))
        for name, seed, value in ran:
            folder = tmp_path / name
            folder.mkdir()
            settings = {"conf": {"value": "mine"}, "method": {"value": ["fedper"]}}
            (folder / "config.json").write_text(json.dumps(settings))
            row: dict[str, Any] = dict.fromkeys(
                ("accuracy_as_its_paper", "accuracy_before_ft"), value
            )
            row |= {"accuracy_after_ft_tuned": None, "accuracy_kept": value}
            row |= {"accuracy_worst_client_before_ft": value / 2}
            more: dict[str, Any] = {
                "method": "fedper",
                "title": "FedPer",
                "dataset": "imagefolder:cifar10",
            }
            more |= {"num_clients": 20, "rounds": 3, "seed": seed}
            (folder / "summary.json").write_text(json.dumps([row | more]))
            kind = "done" if seed < 2 else "failed"
            (folder / EVENTS).write_text(
                json.dumps({"kind": kind, "text": "", "time": 0 if " " in name else 1}) + "\n"
            )
        *_, line = table(finished(tmp_path)).strip().splitlines()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        # √(((70 − 71)² + (72 − 71)²)/1) = 1.41; the paper's figure for 20 clients
        figures = ["71.00 ± 1.41", "71.00 ± 1.41", "–", "71.00 ± 1.41", "35.50 ± 0.71", "63.68"]
        assert cells == ["FedPer", "2", *figures]
        assert overview(finished(tmp_path)).splitlines() == [
            "| method | imagefolder:cifar10, 20 clients |",
            "| --- | --- |",
            "| FedPer | 71.0 ± 1.4 / – |",
        ]
        [methods] = finished(tmp_path).values()
        first = overview({"mine": methods, "yours": methods}).splitlines()[0]
        assert "20 clients (mine) | imagefolder:cifar10, 20 clients (yours)" in first


# whose rows were computed by other words than the experiment's, as docs/results.md says
OTHERWISE = {
    (conf, method): {"precision": "bfloat16"}
    for conf in ("compare-cifar10-100", "compare-fashion-mnist-100")
    for method in ("local", "fedavg-ft", "fedper", "fedrep", "lg-fedavg")
} | {
    (conf, "pfedhn"): {"pfedhn.server-learning-rate": 0.005}
    for conf in ("compare-cifar10-100", "compare-fashion-mnist-100")
}


@pytest.mark.parametrize("conf", EXPERIMENTS)
class TestKept:
    """The results in the repository, of which the tables in README and docs are made."""

    def test_they_are_of_the_settings_that_the_experiment_has(
        self, conf: str, tmp_path: Path
    ) -> None:
        dataset = "imagefolder:cifar10" if "cifar10" in conf else "fashion-mnist"
        rows = keep.read(keep.file_of(conf))
        for row in rows:
            words = {"conf": conf, "dataset": dataset, "method": row["method"], "seed": row["seed"]}
            words |= OTHERWISE.get((conf, row["method"]), {})
            there = row["settings"] | {"method": [row["method"]], "seed": row["seed"]}
            assert not differences({k: {"value": v} for k, v in there.items()}, resolve(words))
            assert {len(of) for of in row["clients"].values()} == {row["num_clients"]}
        kept = {(row["method"], row["seed"]) for row in rows}
        assert len(kept) == len(rows)
        assert {(name, 0) for name in ("fedavg-ft-tuned", "client-mean", "fedbabu")} <= kept
        if not conf.endswith("-100"):
            runs = plan([conf], None, None, {"dataset": dataset}, tmp_path)
            assert kept == {(m, run.config.seed) for run in runs for m in run.config.method}

    def test_clients_figures_are_those_of_their_row(self, conf: str) -> None:
        for row in keep.read(keep.file_of(conf)):
            for name in ("before_ft", "after_ft", "kept"):
                mean = sum(row["clients"][name]) / row["num_clients"]
                assert mean == pytest.approx(row[f"accuracy_{name}"], abs=1e-4)

    def test_what_is_read_is_written_alike(self, conf: str, tmp_path: Path) -> None:
        file = keep.file_of(conf)
        keep.write(tmp_path / file.name, keep.read(file)[::-1])
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_docs_quote_the_results_that_are_kept() -> None:
    for (file, mark), text in keep.quotes().items():
        quoted = keep.around(file, mark)[1]
        assert quoted == f"\n{text.strip()}\n\n", f"python benchmarks/keep.py: {file}"


def test_a_run_is_kept_in_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep, "RESULTS", tmp_path)
    accuracy = {"before_ft": 50.0, "after_ft": 60.0, "kept": 60.0}
    for value, kind in ((0.1, "done"), (0.2, "done"), (0.3, "failed")):
        folder = tmp_path / str(value) / "a run"
        folder.mkdir(parents=True)
        words = {"conf": "compare-cifar10", "method": "fedprox", "fedprox.mu": value}
        (folder / "config.json").write_text(json.dumps(resolve(words).as_dict()))
        (folder / "summary.json").write_text(json.dumps([{"method": "fedprox", "seed": 0}]))
        (folder / "clients.jsonl").write_text(
            "".join(
                json.dumps({"method": "fedprox", "client": c} | accuracy) + "\n" for c in (0, 1)
            )
        )
        (folder / EVENTS).write_text(json.dumps({"kind": kind, "text": ""}) + "\n")
        keep.add(folder.parent)
    [row] = keep.kept()["compare-cifar10"]["fedprox"]
    assert row["settings"]["fedprox.mu"] == 0.2
    assert row["settings"]["learning-rate"] == resolve(words).config.learning_rate
    assert not any(name.startswith("ditto") or name == "run-name" for name in row["settings"])
    assert row["clients"] == {"client": [0, 1], **{name: [a, a] for name, a in accuracy.items()}}


def test_compare_runs_resumes_and_writes(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["compare", "--conf", str(experiment), "--methods", "fedavg,fedavg-ft"]
    words += ["--out", str(out), "save-weights=false"]
    assert cli.main([*words, "--seeds", "0"]) == 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert len(first) == 1  # both methods' rounds are the same
    assert cli.main([*words, "--seeds", "0,1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first
    text = (out / "compare.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| Fed") and "/" not in line]
    assert [row.split("|")[2].strip() for row in rows] == ["2", "2"]
    assert not list(out.glob("*/weights"))
    assert cli.main(["compare", "--methods", "fedsvg"]) == 2


CLIP = """
from dataclasses import dataclass
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedClipSettings(MethodSettings):
    norm: float = setting(1.0, "the largest norm of an update", above=0, grid=(0.3, 3.0))


class FedClip(FedAvg):
    settings = FedClipSettings
    tuned = ("norm",)
"""


@pytest.fixture
def clip(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An experiment with a setting of a method of the user's own, which it does not name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "clip", raising=False)
    (tmp_path / "clip.py").write_text(CLIP)
    experiment.write_text(f"{experiment.read_text()}fedclip.norm: 0.5\n")
    with known_for_a_while("fedclip"):
        yield experiment


class TestSettingsOfTheUsersOwnMethods:
    def test_go_to_its_runs_of_a_comparison_and_not_to_others(self, clip: Path) -> None:
        words = ["compare", "--conf", clip.name, "--methods", "fedavg,clip:FedClip,fedper"]
        assert cli.main([*words, "--seeds", "0", "--out", "out", "save-weights=false"]) == 0
        assert {*finished(Path("out"))["small"]} == {"fedavg", "fedclip", "fedper"}
        for folder in Path("out").glob("small*/"):
            kept = json.loads((folder / "config.json").read_text())
            assert kept["fedclip.norm"] == {"value": 0.5, "from": "small.yaml"}

    def test_may_be_varied_in_a_sweep(self, clip: Path, tmp_path: Path) -> None:
        file = tmp_path / "plan.yaml"
        file.write_text("over: {method: [fedavg, 'clip:FedClip'], seed: [0]}")
        settings, over = read(file)
        conf = {"conf": clip.name, "fedclip.norm": 0.3}
        averaged, clipped = expand(settings | conf, over, tmp_path / "out")
        assert "fedclip.norm" not in averaged.settings
        assert clipped.settings["fedclip.norm"] == 0.3
        words = ["sweep", "--conf", clip.name, "method=clip:FedClip", "--over", "seed=0"]
        assert cli.main([*words, "--over", "fedclip.norm=0.3,-1", "--out", "out"]) == 2

    def test_are_known_to_tune(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["tune", "--conf", clip.name, "--methods", "clip:FedClip"]) == 2
        assert "must list clip:FedClip under method" in capsys.readouterr().err


# what a comparison shows
FIGURES: dict[str, Any] = dict.fromkeys(compare.COLUMNS.values(), 50.0)
FIGURES |= {"seed": 0, "num_clients": 4, "dataset": "digits"}


def finish(run: PlannedRun, validation: float, **more: Any) -> None:
    """What a run leaves that came to this accuracy on validation images."""
    run.folder.mkdir(parents=True)
    (method,) = run.config.method
    row = {"method": method, "title": METHODS[method].title, "rounds": 2}
    row |= {"validation": {"before_ft": validation}, **more}
    (run.folder / "summary.json").write_text(json.dumps([row]))
    (run.folder / EVENTS).write_text('{"kind": "done", "text": ""}\n')
    (run.folder / "config.json").write_text(json.dumps(run.resolved.as_dict()))


@pytest.mark.parametrize(
    ("dataset", "figure"),
    [
        ("cifar10", "68.51"),
        ("imagefolder:cifar10", "68.51"),
        ("npz:/data/cifar10.npz", "68.51"),
        ("emnist-byclass", "72.89"),
        ("cifar100", "–"),
        ("imagefolder:cifar100", "–"),
        ("npz:/data/notcifar10.npz", "–"),
        ("emnist-letters", "–"),
    ],
)
def test_the_papers_figures_stand_beside_its_data_sets_alone(dataset: str, figure: str) -> None:
    row = {"dataset": dataset, "method": "fedavg", "num_clients": 20}
    assert compare.published(row) == figure
    assert compare.published(row | {"num_clients": 21}) == "–"
    assert compare.published(row | {"method": "krum"}) == "–"


class TestTune:
    def test_every_main_setting_has_values_to_try_that_it_may_take(self) -> None:
        for method in tune.tunable():
            assert tune.main_settings(method)
            for name, values in tune.main_settings(method).items():
                assert len(values) > 1
                for value in values:
                    resolve({"method": method, name: value, "validation-share": 0.2})

    @pytest.mark.parametrize(
        ("validation", "best", "runs"),
        [
            ({0.001: 50.0, 0.01: 70.0, 0.1: 60.0}, 0.01, 3),
            ({0.001: 70.0, 0.01: 70.0, 0.1: 60.0}, 0.01, 3),  # better before fine-tuning
            # beyond the smallest, 0.001: first 0.0001, then 0.00001, which is no better
            ({1e-3: 50.0, 1e-4: 60.0, 1e-5: 55.0}, 1e-4, 3),
        ],
    )
    def test_the_best_by_validation_is_kept(
        self,
        experiment: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        validation: dict[float, float],
        best: float,
        runs: int,
    ) -> None:
        """Runs are replaced by their results: a test accuracy that misleads, and failures."""

        def run_sweep(runs: list[PlannedRun], *_: Any) -> bool:
            for run in runs:
                mu = run.varied["fedprox.mu"]
                if mu in validation:
                    run.folder.mkdir(parents=True)
                    row = {"method": "fedprox", "title": "FedProx", "rounds": 2}
                    row |= {"accuracy_before_ft": -validation[mu]}
                    row |= {"validation": {"before_ft": mu, "after_ft_tuned": validation[mu]}}
                    (run.folder / "summary.json").write_text(json.dumps([row]))
                    (run.folder / EVENTS).write_text('{"kind": "done", "text": ""}\n')
                    settings = run.resolved.as_dict()
                    settings["conf"]["value"] = str(experiment)  # as the launcher writes it
                    (run.folder / "config.json").write_text(json.dumps(settings))
            return False

        monkeypatch.setattr(tune, "run_sweep", run_sweep)
        monkeypatch.chdir(experiment.parent)
        words = ["tune", "--conf", experiment.name, "--methods", "fedprox"]
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
        text = experiment.read_text()
        assert text.startswith("# mine\n")
        config = resolve({"conf": str(experiment)}).config
        assert config.of(FedProxSettings).mu == best
        search = experiment.with_suffix(".search.md").read_text()
        figures = [line for line in search.splitlines() if line.startswith("| FedProx |")]
        assert sum(not line.endswith("| – | – | – |") for line in figures) == runs
        assert len(figures) > runs  # one failed

    @pytest.mark.parametrize(
        "calls",
        [
            [["fedavgm", "pfedme", "per-fedavg", "cfl", "pfedhn"]] * 2,
            [["cfl"], ["cfl"], ["cfl", "pfedhn"], ["cfl", "pfedhn"]],
            [["fedavg"], ["fedavg", "cfl"], ["fedavg", "cfl"], ["cfl"]],
            [["cfl"], ["fedavg", "cfl"], ["fedavg", "cfl"]],  # by another rate than before
        ],
    )
    def test_given_again_it_finds_its_runs_done_and_chooses_the_same(
        self,
        experiment: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        calls: list[list[str]],
    ) -> None:
        """Runs are replaced by results, of which the grids' largest values have the best."""
        ran: list[str] = []

        def run_sweep(runs: list[PlannedRun], *_: Any) -> bool:
            for run in runs:
                if not is_done(run.folder):
                    ran.append(run.name)
                    finish(run, sum(v for v in run.varied.values() if isinstance(v, float)))
            return True

        monkeypatch.setattr(tune, "run_sweep", run_sweep)
        experiment.write_text(f"{experiment.read_text()}cfl.eps1: 0.3  # a guess\n")
        before, kept = list[str](), list[str]()
        for methods in calls:
            known = len(ran)
            words = ["tune", "--conf", str(experiment), "--methods", ",".join(methods)]
            assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
            chosen = [line for line in experiment.read_text().splitlines() if line[0] != "#"]
            if set(methods) <= set(before):
                assert len(ran) == known
                assert chosen == kept
            before, kept = [*before, *methods], chosen
        assert len(set(ran)) == len(ran)

    def test_of_equals_the_default_is_chosen(
        self, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run_sweep(runs: list[PlannedRun], *_: Any) -> bool:
            for run in runs:
                finish(run, 50.0)
            return True

        monkeypatch.setattr(tune, "run_sweep", run_sweep)
        words = ["tune", "--conf", str(experiment), "--methods", "fedprox"]
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
        mu = resolve({"conf": str(experiment)}).config.of(FedProxSettings).mu
        assert mu == FedProxSettings().mu
        assert mu != tune.main_settings("fedprox")["fedprox.mu"][0]

    def test_a_folder_of_other_runs_is_refused(
        self,
        experiment: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Also if it holds some of the runs only: they are not passed over."""

        def run_sweep(runs: list[PlannedRun], *_: Any) -> bool:
            finish(runs[0], 50.0)
            raise KeyboardInterrupt

        monkeypatch.setattr(tune, "run_sweep", run_sweep)
        words = ["tune", "--conf", str(experiment), "--methods", "fedprox"]
        words += ["--out", str(tmp_path / "out")]
        assert cli.main(words) == 130
        monkeypatch.setattr(tune, "run_sweep", lambda *_: pytest.fail("it ran"))
        assert cli.main([*words, "num-server-rounds=3"]) == 2
        assert "num-server-rounds = 2 there, 3 here" in capsys.readouterr().err

    def test_a_report_has_the_runs_that_its_search_tried_and_no_others(
        self, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a grid whose best is better than all that Optuna tries."""
        pytest.importorskip("optuna", reason="needs pip install 'pfedgpa-app[tune]'")
        best = 90.0

        def run_sweep(runs: list[PlannedRun], *_: Any) -> bool:
            for i, run in enumerate(runs):
                if i != 1 and not run.folder.exists():  # the second one fails
                    finish(run, best - run.config.learning_rate)
            return True

        monkeypatch.setattr(tune, "run_sweep", run_sweep)
        words = ["tune", "--conf", str(experiment), "--methods", "fedavg", "--out", str(tmp_path)]
        assert cli.main(words) == 0
        best = 80.0
        words += ["--jobs", "2", "--trials"]
        assert cli.main([*words, "2"]) == 0
        assert cli.main([*words, "4"]) == 0  # which goes on
        report = experiment.with_suffix(".search.md").read_text().split("Made by ")[-1]
        rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| FedAvg")]
        assert len(rows) == 4
        assert sum("–" in row[3] for row in rows) >= 2
        figures = {row[1]: float(row[3]) for row in rows if "–" not in row[3]}
        rate = resolve({"conf": str(experiment)}).config.learning_rate
        assert max(figures, key=figures.__getitem__) == f"learning-rate = {rate}"
        assert figures[f"learning-rate = {rate}"] > 80  # what the grid had chosen is tried first

    def test_a_search_goes_on_beyond_its_ends(self) -> None:
        assert tune.next_beyond([(0.02, 70.0), (0.05, 60.0), (0.1, 65.0)]) == 0.008
        assert tune.next_beyond([(0.02, 60.0), (0.05, 60.0), (0.1, 65.0)]) == 0.2
        assert tune.next_beyond([(0.02, 60.0), (0.05, 66.0), (0.1, 65.0)]) is None
        assert tune.next_beyond([(0.4, 60.0), (0.8, 60.0)]) is None  # it makes no difference
        assert tune.next_beyond([(0.0, 60.0), (0.5, 50.0)]) is None  # nothing is below 0
        assert tune.next_beyond([(1, 60.0), (2, 50.0)]) is None  # layers

    def test_chosen_values_of_other_methods_stay(self, experiment: Path) -> None:
        tune._keep(experiment, {"ditto.lam": 0.1}, "one command")
        tune._keep(experiment, {"fedprox.mu": 0.01}, "another")
        tune._keep(experiment, {"ditto.lam": 1.0}, "a third")
        text = experiment.read_text()
        assert [line for line in text.splitlines() if line.startswith(tune.MARK)] == [
            tune.MARK + command for command in ("one command", "another", "a third")
        ]
        assert yaml.safe_load(text)["ditto.lam"] == 1.0
        assert yaml.safe_load(text)["fedprox.mu"] == 0.01
        assert yaml.safe_load(text)["num-clients"] == 4

    def test_a_value_of_the_users_own_is_replaced(self, experiment: Path) -> None:
        experiment.write_text("num-clients: 4\nlearning-rate: 0.5  # a guess\n")
        tune._keep(experiment, {"learning-rate": 0.1}, "a command")
        config = resolve({"conf": str(experiment)}).config  # no setting is there twice
        assert (config.learning_rate, config.num_clients) == (0.1, 4)

    def test_a_section_with_what_is_to_be_chosen_is_refused(
        self, experiment: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        experiment.write_text("fedprox: {mu: 0.5}\n")
        assert cli.main(["tune", "--conf", str(experiment), "--methods", "fedprox"]) == 2
        assert "sets fedprox.mu, which tune is to choose" in capsys.readouterr().err

    def test_reports_of_other_commands_stay(self) -> None:
        first, second = "Made by `a`.\n\n| 1 |\n", "Made by `b`.\n\n| 2 |\n"
        both = tune.merged(first, second)
        assert both == first + "\n" + second
        assert tune.merged(both, "Made by `a`.\n\n| 3 |\n") == (
            second + "\n" + "Made by `a`.\n\n| 3 |\n"
        )
        assert tune.merged("", first) == first

    @pytest.mark.parametrize(
        ("file", "given", "share"),
        [("", {}, 0.2), ("validation-share: 0.5", {}, 0.5), ("", {"validation-share": 0.4}, 0.4)],
    )
    def test_clients_train_on_what_the_experiment_leaves_them(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        file: str,
        given: dict[str, float],
        share: float,
    ) -> None:
        """Its share of validation images, which choose; the seed is tune's own."""
        found: list[Any] = []

        def instead(runs: list[PlannedRun], *_: Any) -> bool:
            found.extend(runs)
            raise KeyboardInterrupt

        monkeypatch.setattr(tune, "run_sweep", instead)
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"method: [fedprox]\nseed: 7\nconf: cifar10-20\n{file}\n")
        with pytest.raises(KeyboardInterrupt):
            tune.tune(str(mine), ["fedprox"], given, tmp_path / "out", tmp_path, 1, "tune")
        assert {run.config.validation_share for run in found} == {share}
        assert {run.config.seed for run in found} == {100}

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({"validation-share": 0.0}, "must be > 0"),
            ({"train-per-client": 2}, "sets no image aside"),
        ],
    )
    def test_what_has_no_images_to_choose_by_is_refused_before_it_runs(
        self, given: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tune, "run_sweep", lambda *_: pytest.fail("it ran"))
        mine = tmp_path / "mine.yaml"
        mine.write_text("method: [fedprox]\nconf: cifar10-20\n")
        with pytest.raises(
            ConfigError, match=f"tune chooses by clients' validation images: .*{why}"
        ):
            tune.tune(str(mine), ["fedprox"], given, tmp_path / "out", tmp_path, 1, "tune")

    def test_a_value_that_is_refused_with_others_is_left_out_of_the_grid(
        self, tmp_path: Path
    ) -> None:
        """PFedMe's learning rate is at most 1/λ."""
        tried: list[float] = []

        def run_all(runs: list[PlannedRun]) -> None:
            tried.extend(run.varied["pfedme.learning-rate"] for run in runs)
            for run in runs:
                finish(run, run.varied["pfedme.learning-rate"])

        grids = {"pfedme": {"pfedme.learning-rate": (0.01, 0.02, 0.06)}}
        base = {"pfedme.lam": 20.0, "validation-share": 0.2, "seed": 100}
        found, _ = tune.search(base, grids, tmp_path, run_all)
        assert found == {"pfedme.learning-rate": max(tried)} == {"pfedme.learning-rate": 0.04}
        with pytest.raises(ConfigError, match="their product must be at most 1"):
            tune.search(base | {"pfedme.lam": 500.0}, grids, tmp_path / "none", run_all)

    @pytest.mark.parametrize(
        ("named", "given", "tuned"),
        [
            ("[fedprox]", [], ["fedprox"]),
            ("[client-mean, ditto]", [], ["fedavg", "ditto"]),  # whose rounds are FedAvg's
            ("[fedprox]", ["--methods", "ditto,fedavg"], ["ditto", "fedavg"]),
            ("[fedprox]", ["--methods", "all"], tune.tunable()),
        ],
    )
    def test_the_experiments_methods_are_tuned(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        named: str,
        given: list[str],
        tuned: list[str],
    ) -> None:
        asked: list[str] = []

        def instead(_: str, methods: list[str], *__: Any, **___: Any) -> dict[str, Any]:
            asked.extend(methods)
            return {}

        monkeypatch.setattr(tune, "tune", instead)
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"method: {named}\n")
        assert cli.main(["tune", "--conf", str(mine), *given, "--out", str(tmp_path / "out")]) == 0
        assert asked == tuned

    def test_an_experiment_of_methods_without_settings(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(tune, "tunable", list)
        mine = tmp_path / "mine.yaml"
        mine.write_text("method: [trimmed-mean]\n")
        assert cli.main(["tune", "--conf", str(mine)]) == 2
        assert "none of its methods (trimmed-mean)" in capsys.readouterr().err

    def test_nothing_to_choose(self, experiment: Path) -> None:
        assert cli.main(["tune", "--conf", str(experiment), "--methods", "client-mean"]) == 2
