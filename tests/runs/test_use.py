"""A run that is done, to be used: with code that was edited, as a file, as a frame."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedgpa_app import cli, load_client
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.own_code import digest, imported, sources
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.models import build
from pfedgpa_app.runs.about import read_about
from pfedgpa_app.runs.api import Result, run
from pfedgpa_app.runs.experiment import _evaluation_work
from pfedgpa_app.runs.folder import keep_holdings, kept_config
from pfedgpa_app.runs.prediction import evaluate
from pfedgpa_app.study.plan import expand
from tests.runs.test_resume import KilledError, killer
from tests.support.federations import PLAIN, federate, records
from tests.support.processes import in_a_new_process

NET = """
from torch import nn
from blocks import WIDTH

def build(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, classes))
"""
TABLE = """
import numpy as np

def load():
    x = np.random.default_rng(0).normal(size=(600, 64)).astype("float32")
    return {"x": x, "y": (x[:, 0] > 0).astype(int)}
"""
EDITED = "was trained with another version of it"
Anew = Callable[[], None]


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Anew:
    """What makes this process forget the own code in the current folder, as a new one would."""
    for name, text in {"own_net": NET, "blocks": "WIDTH = 8\n", "own_table": TABLE}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit may keep the second and size

    def forget() -> None:
        for name in ("own_net", "blocks", "own_table"):
            sys.modules.pop(name, None)
        build._template.cache_clear()

    forget()
    return forget


def replace(file: str, old: str, new: str) -> None:
    path = Path(file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [each for each in caplog.records if each.name == "pfedgpa"]
    return [each.getMessage() for each in ours if each.levelno >= logging.WARNING]


class TestEditedCode:
    def test_a_networks_file_and_those_beside_it_that_it_imports(self, anew: Anew) -> None:
        assert sources("never_imported:build") == {}
        imported("own_net:build", "", "model")
        files = {Path(name).absolute() for name in ("own_net.py", "blocks.py")}
        assert sources("own_net:build") == {file: digest(file) for file in files}

    def test_every_command_says_that_the_network_was_edited(
        self, anew: Anew, tmp_path: Path
    ) -> None:
        folder, _ = federate(tmp_path, method="fedavg", model="own_net:build", num_server_rounds=1)
        kept = json.loads((folder / "model.json").read_text())["code"]
        assert kept["own_net:build"]["own_net.py"] == digest(tmp_path / "own_net.py")
        words = ["evaluate", str(folder), "--client", "0"]
        assert EDITED not in in_a_new_process(words, tmp_path)[1]
        replace("own_net.py", "Tanh", "Sigmoid")
        for more in (words, ["export", *words[1:], "--to", "torch"]):
            status, said = in_a_new_process(more, tmp_path)
            assert status == 0
            assert f"{tmp_path / 'own_net.py'}: {folder} {EDITED}" in said
            assert "restore that version" in said

    def test_it_is_found_where_the_project_was_moved_to(
        self, anew: Anew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With its runs and its table."""
        how: dict[str, Any] = {"model": "own_net:build", "dataset": "own_table:load"}
        project = tmp_path / "project"
        project.mkdir()
        for file in ("own_net.py", "blocks.py", "own_table.py"):
            (tmp_path / file).rename(project / file)
        monkeypatch.chdir(project)
        federate(project, method="fedavg", num_server_rounds=1, partition="iid", **how)
        project.rename(tmp_path / "renamed")
        monkeypatch.chdir(tmp_path / "renamed")
        status, said = in_a_new_process(["evaluate", "run", "--client", "0"], Path.cwd())
        assert status == 0, said
        assert EDITED not in said

    def test_or_beside_the_user_if_it_came_with_the_app(self, anew: Anew, tmp_path: Path) -> None:
        """A SuperLink's folder, which a deployed run notes, need not have the network's file."""
        folder, _ = federate(tmp_path, method="fedavg", model="own_net:build", num_server_rounds=1)
        (tmp_path / "server").mkdir()
        replace(str(folder / "model.json"), f'"{tmp_path}"', f'"{tmp_path / "server"}"')
        assert read_about(folder).code_dir == ""
        (tmp_path / "own_net.py").rename(tmp_path / "server" / "own_net.py")
        assert read_about(folder).code_dir == str(tmp_path / "server")

    def test_so_does_a_sweep_of_what_is_done(self, anew: Anew, tmp_path: Path) -> None:
        settings = PLAIN | {"method": "fedavg", "model": "own_net:build", "num-server-rounds": 1}
        [planned] = expand(settings | {"report": False}, {"seed": [0]}, tmp_path / "out")
        federate(tmp_path, **{k.replace("-", "_"): v for k, v in planned.settings.items()})
        words = ["sweep", "--over", "seed=0", "--out", "out", "report=false"]
        words += [f"{key}={value}" for key, value in settings.items()]
        assert EDITED not in in_a_new_process(words, tmp_path)[1]
        replace("blocks.py", "8", "4 + 4")
        status, said = in_a_new_process(words, tmp_path)
        assert status == 0
        assert f"{tmp_path / 'blocks.py'}: {planned.folder} {EDITED}" in said

    def test_so_does_python(
        self, anew: Anew, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder, _ = federate(tmp_path, method="fedavg", model="own_net:build", num_server_rounds=1)
        load_client(folder, 0)
        assert not warnings(caplog)
        replace("blocks.py", "8", "4 + 4")
        load_client(folder, 0)
        load_client(folder, 1)
        [said] = warnings(caplog)
        assert said.startswith(f"{tmp_path / 'blocks.py'}: {folder} {EDITED}")
        replace("blocks.py", "4 + 4", "8")
        caplog.clear()
        load_client(folder, 0)
        assert not warnings(caplog)

    @pytest.mark.slow
    def test_python_has_it_as_it_is_now(
        self, anew: Anew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where a notebook's user edits the network, or goes on in another folder."""
        small: dict[str, Any] = {"train_per_client": 20, "num_server_rounds": 1, "report": False}
        widths = []
        for edit, folder in ((8, "."), (12, "."), (16, "elsewhere")):
            (tmp_path / folder).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / folder)
            Path("own_net.py").write_text(NET)
            Path("blocks.py").write_text(f"WIDTH = {edit}\n")
            model = run("fedavg", model="own_net:build", **small).model(0)
            widths.append(next(model.network.parameters()).shape[0])
        assert widths == [8, 12, 16]

    def test_a_run_of_an_earlier_version_kept_no_digests(
        self, anew: Anew, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder, _ = federate(tmp_path, method="fedavg", model="own_net:build", num_server_rounds=1)
        about = json.loads((folder / "model.json").read_text())
        del about["code"]
        (folder / "model.json").write_text(json.dumps(about))
        replace("own_net.py", "Tanh", "Sigmoid")
        anew()
        load_client(folder, 0)
        assert not warnings(caplog)

    def test_data_that_a_client_is_tested_on(
        self, anew: Anew, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        how = {"dataset": "own_table:load", "partition": "iid"}
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=1, **how)
        replace("own_table.py", "import numpy", "import  numpy")
        anew()
        imported("own_table:load", "", "dataset")
        assert cli.main(["evaluate", str(folder), "--client", "0"]) == 0
        assert str(tmp_path / "own_table.py") in caplog.text

    def test_examples_that_were_dealt_otherwise(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As by an earlier version: a client would be tested on what it has trained on."""
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=1)
        held = json.loads((folder / "holdings.json").read_text())
        held["train"][0][0], held["train"][0][1] = held["train"][0][1] + 1, held["train"][0][0] - 1
        (folder / "holdings.json").write_text(json.dumps(held))
        assert cli.main(["evaluate", str(folder), "--client", "0"]) == 2
        said = f"{folder}: its clients held other examples than they would now"
        assert said in capsys.readouterr().err
        assert cli.main(["evaluate", str(folder), "--client", "0", "digits"]) == 0
        with pytest.raises(DataError, match="held other examples than they would now"):
            keep_holdings(folder, replaced(kept_config(folder), resume=True))

    def test_a_run_that_goes_on(self, anew: Anew, tmp_path: Path) -> None:
        how = {"method": "fedavg", "model": "own_net:build", "resume": True}
        for edit in (False, True):
            if edit:
                replace("own_net.py", "Tanh", "Sigmoid")
                anew()
            with pytest.raises(KilledError):
                federate(tmp_path, killer(9), **how)
        events = records(tmp_path / "run", "events.jsonl")
        [warning] = [e["text"] for e in events if EDITED in e["text"]]
        assert str(tmp_path / "own_net.py") in warning


class TestExport:
    def test_a_file_is_named_for_its_run_and_never_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder, _ = federate(tmp_path, method="fedavg,client-mean", num_server_rounds=1)
        words = ["export", str(folder), "--client", "1", "--to", "torch"]
        assert cli.main(words) == 0
        assert cli.main([*words, "--method", "fedavg"]) == 0
        written = [f"run-{method}-client-1.pt2" for method in ("client-mean", "fedavg")]
        assert sorted(path.name for path in tmp_path.glob("*.pt2")) == written
        network = torch.export.load(written[0]).module()
        assert network(torch.rand(3, 1, 8, 8)).shape == (3, 10)
        capsys.readouterr()
        Path("mine.pt2").write_text("mine")
        for out, more in ((written[0], []), ("mine.pt2", ["--out", "mine.pt2"])):
            before = Path(out).read_bytes()
            assert cli.main([*words, *more]) == 2
            said = capsys.readouterr().err
            assert said == (
                f"pfedgpa: {out}: already exists: give --out another name, or remove it\n"
            )
            assert Path(out).read_bytes() == before


def test_a_frame_needs_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result(tmp_path, [{"method": "fedavg"}], [], [])
    assert list(result.frame().columns) == ["method"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="frame: needs pandas: pip install pandas"):
        result.frame()


def test_a_run_of_nodes_data_is_evaluated_on_a_named_data_set(tmp_path: Path) -> None:
    folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=1)
    kept = json.loads((folder / "config.json").read_text())
    kept["dataset"]["value"] = "nodes"
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match="are on their nodes: name a data set"):
        evaluate(folder, 0)


def test_fine_tunings_that_share_their_epochs_count_once() -> None:
    """Three rates, up to five epochs each, of which an epoch is half a round's."""
    config = resolve({"conf": "map-cifar10", "method": "fedavg"}).config
    assert _evaluation_work(config) == pytest.approx(1 + 15 / config.local_epochs / 2)
