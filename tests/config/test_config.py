"""Settings: where they come from, and what is refused before anything starts."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import server_app
from pfedgpa_app import cli
from pfedgpa_app.cli import options
from pfedgpa_app.config.checks import without_effect
from pfedgpa_app.config.names import keys
from pfedgpa_app.config.resolve import differences, resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.randomness import numpy_generator, torch_generator
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import METHODS, federation_of
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.models.networks import build


class TestLayers:
    def test_run_config_over_conf_over_default(self, tmp_path: Path) -> None:
        conf = tmp_path / "mine.yaml"
        conf.write_text("num-clients: 7\nlocal-epochs: 3\npfedgpa: {rank: 5}\n")
        resolved = resolve({"conf": str(conf), "local-epochs": 4, "momentum": ""})
        assert resolved.config.num_clients == 7
        assert resolved.config.local_epochs == 4
        assert resolved.config.momentum == 0.5
        assert resolved.config.of(PFedGPASettings).rank == 5
        assert resolved.sources["num-clients"] == "mine.yaml"
        assert resolved.sources["local-epochs"] == "run-config"
        assert resolved.sources["momentum"] == "default"
        assert resolved.as_dict()["pfedgpa.rank"] == {"value": 5, "from": "mine.yaml"}
        assert resolved.as_dict()["pfedgpa.strength"]["value"] == "auto"

    @pytest.mark.parametrize("dataset", ["digits", "imagefolder:photos", "npz:mine.npz"])
    def test_a_file_means_what_the_command_line_does(self, tmp_path: Path, dataset: str) -> None:
        given = {"dataset": dataset, "num-clients": 4}
        conf = tmp_path / "mine.yaml"
        conf.write_text("".join(f"{name}: {value}\n" for name, value in given.items()))
        by_file = resolve({"conf": str(conf)}).config
        assert replace(by_file, conf="") == replace(resolve(given).config, conf="")
        conf.write_text("num-clients: 4\n")
        by_both = resolve({"conf": str(conf), "dataset": dataset}).config
        assert by_both == by_file

    def test_a_conf_file_builds_on_another(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text("num-clients: 7\nlocal-epochs: 3\n")
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"conf: {tmp_path / 'base.yaml'}\nlocal-epochs: 4\n")
        resolved = resolve({"conf": str(mine)})
        assert (resolved.config.num_clients, resolved.config.local_epochs) == (7, 4)
        assert resolved.sources["num-clients"] == "base.yaml"
        assert resolved.config.conf == str(mine)
        mine.write_text(f"conf: {mine}\n")
        with pytest.raises(ConfigError, match="builds on itself"):
            resolve({"conf": str(mine)})

    def test_what_a_run_of_an_earlier_version_lacks_had_its_default(self) -> None:
        resolved = resolve({"augment": True, "method": "fedavg"})
        there = json.loads(json.dumps(resolved.as_dict()))  # as a run keeps it
        del there["augment"], there["test-share"]
        assert differences(there, resolved) == ["augment = False there, True here"]

    def test_pyproject_lists_every_setting(self) -> None:
        # Flower lets --run-config override listed keys only
        app = tomllib.loads((APP_DIR / "pyproject.toml").read_text())["tool"]["flwr"]["app"]

        def names(table: dict[str, Any], prefix: str = "") -> set[str]:
            found = set()
            for name, value in table.items():
                nested = isinstance(value, dict)
                found |= names(value, f"{prefix}{name}.") if nested else {prefix + name}
            return found

        assert names(app["config"]) == set(keys())
        assert resolve(app["config"]).config == resolve({}).config

    @pytest.mark.parametrize("conf", sorted(p.stem for p in (APP_DIR / "conf").glob("*.yaml")))
    def test_every_experiment_is_valid(self, conf: str) -> None:
        assert resolve({"conf": conf}).config.conf == conf

    def test_methods_exist(self) -> None:
        for name in METHODS:
            method = METHODS[name]
            assert method.title
            assert federation_of(name) in METHODS


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"method": "fedsvg"}, ["method", "fedsvg", "did you mean fedavg?"]),
            (
                {"method": "pfedgpa", "pfedgpa.denoiser": "transformer", "pfedgpa.width": 30},
                ["pfedgpa.width = 30", "a multiple of 4"],
            ),
            ({"method": "fedavg,fedavg"}, ["method", "twice"]),
            ({"dataset": "imagenet"}, ["dataset", "imagenet", "fashion-mnist"]),
            ({"classes": "cat,dog"}, ["classes", "dataset = nodes", "digits"]),
            (
                {"classes": "cat,cat", "dataset": "nodes"},
                ["classes", "two or more different"],
            ),
            ({"partition": "iid", "dataset": "nodes"}, ["partition", "every node has its own"]),
            ({"dataset": "fashon-mnist"}, ["dataset", "did you mean fashion-mnist?"]),
            ({"engine": "proces"}, ["engine", "did you mean process?"]),
            ({"conf": "Demo"}, ["conf", "did you mean demo?"]),
            ({"learning-rat": 0.1}, ["learning-rat", "did you mean learning-rate?"]),
            ({"lr": 0.1}, ["lr", "did you mean learning-rate?"]),
            ({"alpha": 0.1}, ["alpha", "did you mean dirichlet-alpha?"]),
            ({"rounds": 3}, ["rounds", "did you mean num-server-rounds?"]),
            ({"method": "FedAvg-FT (tuned)"}, ["method", "did you mean fedavg-ft-tuned?"]),
            ({"zzz": 1}, ["zzz", "no such setting. All settings: pfedgpa settings"]),
            (
                {"seed": "0,1"},
                ["whole number; for several values, use pfedgpa sweep --over seed=0,1"],
            ),
            ({"learning-rate": [0.1, 0.2]}, ["sweep --over learning-rate=0.1,0.2"]),
            ({"seed": 2**63}, ["seed", "<= 9223372036854775807"]),
            ({"seed": 10**400}, ["seed", "…", "<= 9223372036854775807"]),
            ({"learning-rate": 10**400}, ["learning-rate", "must be a number"]),
            ({"num-clients": 10**12}, ["num-clients", "<= 1000000"]),
            ({"dirichlet-alpha": 1e300}, ["dirichlet-alpha", "<= 1000000"]),
            ({"learning-rate": 0}, ["learning-rate", "0", "> 0"]),
            ({"learning-rate": float("nan")}, ["learning-rate", "number"]),
            ({"num-server-rounds": 2.5}, ["num-server-rounds", "2.5", "whole number"]),
            ({"num-server-rounds": True}, ["num-server-rounds", "whole number"]),
            ({"fraction-train": 1.5}, ["fraction-train", "1.5", "<= 1"]),
            ({"partition": "random"}, ["partition", "dirichlet"]),
            ({"dirichlet-alpha": 0.1}, ["dirichlet-alpha", "partition=dirichlet"]),
            ({"partition": "iid", "group-shares": "2,1"}, ["group-shares", "partition=dominant"]),
            ({"augment": "yes"}, ["augment", "true or false"]),
            ({"pfedgpa.rank": "many"}, ["pfedgpa.rank", "auto"]),
            ({"pfedgpa.strength": 2000}, ["pfedgpa.strength", "diffusion-steps"]),
            ({"pfedgpa.generate-from": 1000}, ["pfedgpa.generate-from", "num-server-rounds"]),
            ({"conf": "nowhere"}, ["conf", "nowhere", "demo"]),
            ({"fine-tune-grid-epochs": 2, "validation-share": 0}, ["validation-share"]),
            ({"fine-tune-grid-learning-rates": "0.1,x"}, ["fine-tune-grid-learning-rates", "x"]),
            ({"uploads": "x", "method": "local"}, ["uploads", "local"]),
            ({"attack": "scale", "malicious-share": 1}, ["malicious-share = 1", "honest"]),
            ({"attack": "noise", "malicious-share": 0.96}, ["malicious-share = 0.96", "of 10"]),
            ({"attack": "scale", "num-clients": 1}, ["attack = scale", "only 1"]),
            ({"attack": "scale", "num-clients": 2, "join-clients": 3}, ["join-clients = 3"]),
            (
                {"attack": "sign-flip", "num-clients": 4},
                ["attack = sign-flip", "0.1 of 4 clients makes none", "malicious-share=0.25 makes"],
            ),
            (
                {"attack": "scale", "num-clients": 10, "join-clients": 7},
                ["attack = scale", "of 3 clients", "malicious-share=0.33"],
            ),
            (
                {"attack": "label-flip", "malicious-share": 0},
                ["attack = label-flip", "malicious-share = 0 of 10 clients"],
            ),
            (
                {"malicious-share": 0.5},
                ["malicious-share = 0.5 (run-config)", "set attack", "scale"],
            ),
            ({"attack-strength": 9}, ["attack-strength = 9 (run-config)", "set attack", "scale"]),
            (
                {"method": "krum", "num-clients": 4, "krum.malicious": 2},
                ["krum.malicious = 2", "has 4 uploads", "most 1"],
            ),
            (
                {"method": "krum", "fraction-train": 0.2, "krum.malicious": 0},
                ["krum.malicious = 0", "has 2 uploads", "raise num-clients or fraction-train"],
            ),
            (
                {"method": "krum", "join-clients": 2, "krum.select": 9},
                ["krum.select = 9", "has 8 uploads", "at most 8"],
            ),
            (
                {"dropout-share": 0.1, "num-clients": 4},
                ["dropout-share = 0.1", "none of a round's 4 clients", "dropout-share=0.25"],
            ),
            (
                {"straggler-share": 0.1, "fraction-train": 0.3},
                ["straggler-share = 0.1", "round's 3 clients", "straggler-share=0.33"],
            ),
            ({"min-uploads": 11}, ["min-uploads = 11", "10 of 10 clients"]),
            ({"min-uploads": 4, "fraction-train": 0.3}, ["min-uploads = 4", "3 of 10 clients"]),
            ({"min-uploads": 9, "join-clients": 2}, ["min-uploads = 9", "8 of 8 clients"]),
        ],
    )
    def test_names_key_value_and_what_is_allowed(
        self,
        settings: dict[str, Any],
        words: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(ConfigError) as refusal:
            resolve(settings)
        for word in words:
            assert word in str(refusal.value)
        # the command says the same, exits with 2 and leaves nothing behind
        monkeypatch.chdir(tmp_path)
        assert (
            cli.main(["run", *(f"{key}={cli_text(value)}" for key, value in settings.items())]) == 2
        )
        assert words[0] in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_attackers_without_an_attack_in_a_file(self, tmp_path: Path) -> None:
        """An attack may come later; one that is said to be none is meant so."""
        mine, calm = tmp_path / "mine.yaml", tmp_path / "calm.yaml"
        mine.write_text("malicious-share: 0.3\n")
        calm.write_text(f"conf: {mine}\nattack: none\n")
        with pytest.raises(ConfigError, match=r"malicious-share = 0.3 \(mine.yaml\): without"):
            resolve({"conf": str(mine)})
        with pytest.raises(ConfigError, match=r"malicious-share = 0.2 \(run-config\): without"):
            resolve({"conf": str(calm), "malicious-share": 0.2})
        assert len(resolve({"conf": str(mine), "attack": "scale"}).config.malicious_clients) == 3
        for settings in ({"conf": str(mine), "attack": "none"}, {"conf": str(calm)}):
            assert not resolve(settings).config.malicious_clients
        assert not resolve({"malicious-share": 0}).config.malicious_clients

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"a: [1,", "line 1: not valid YAML"),
            (b"- 1", "must map settings"),
            (b"text", "must map settings"),
            ("method: é".encode("latin-1"), "is not UTF-8 text"),
            ("method: fedavg".encode("utf-16"), "is not UTF-8 text"),
            (b"a: &a [*a]", "line 1: not valid YAML: found unconstructable recursive node"),
            (b"&a\nmethod: *a", "recursive"),
            (b"a: " + b"[" * 5000, "nested too deeply"),
            (b"seed: " + b"9" * 400, "must be >= 0 and <= 9223372036854775807"),
            (b"seed: " + b"9" * 5000, "a value cannot be read"),
            (b"seed: 2026-11-26", "must be a whole number"),
            (b"run-name: 2026-13-45", "a value cannot be read"),
            (b"run-name: 2026-11-26", "must be text; put it in quotes"),
            (b'out-dir: "a\\0b"', "NUL"),
            (b"seed:", "seed = None"),
            (b"1: 2", "no such setting"),
            (b"[1, 2]: 3", "a key must be text"),
            (b"seed: !!python/object:os.system 1", "not valid YAML"),
            (
                b"seed: 1\nmethod: local\nseed: 2",
                "line 3: not valid YAML: seed is given here and",
            ),
            (b"pfedgpa: {rank: 1, rank: 2}", "rank is given here and in line 1"),
            (b"pfedgpa.rank: 1\npfedgpa: {rank: 2}", "pfedgpa.rank .* is given twice"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_bad_yaml(self, content: bytes, words: str, tmp_path: Path) -> None:
        conf = tmp_path / "bad.yaml"
        conf.write_bytes(content)
        with pytest.raises(ConfigError, match=words) as refusal:
            resolve({"conf": str(conf)})
        assert "bad.yaml" in str(refusal.value)

    @pytest.mark.parametrize("conf", [".", "folder.yaml", "~nobody/x.yaml", "\0", "x" * 300])
    def test_no_yaml_at_all(
        self, conf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.yaml").mkdir()
        with pytest.raises(ConfigError, match=r"(no file|not a file).*Experiments: .*demo"):
            resolve({"conf": conf})

    def test_a_file_that_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is said by the path that was given, and why it is none."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.yaml").mkdir()
        (tmp_path / "mine.txt").write_text("seed: 1")
        absolute = str(tmp_path / "nofile.yaml")
        for conf, said in (
            ("y/nofile.yaml", f"no file there, nor below {APP_DIR}"),
            (absolute, "no file there"),
            ("folder.yaml", "is a folder, not a file"),
            ("mine.txt", "is a file, but its name does not end in .yaml or .yml"),
            ("nowhere", f"no file of that name in {APP_DIR / 'conf'}"),
        ):
            with pytest.raises(ConfigError) as refusal:
                resolve({"conf": conf})
            assert re.match(re.escape(f"conf = {conf!r}: {said}") + "[.;] ", str(refusal.value))

    def test_a_run_can_have_the_largest_seed(self) -> None:
        seed = resolve({"seed": 2**63 - 1}).config.seed
        build("digits", 10, seed)
        torch_generator(seed, "sample").initial_seed()
        assert numpy_generator(seed, "sample").random() < 1

    def test_absent_data_and_unfit_images(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["run", "dataset=cifar10", f"data-dir={tmp_path}"]) == 2
        assert "download=true" in capsys.readouterr().err
        assert cli.main(["run", "model=cifar"]) == 2
        assert "takes images of 3×32×32, but these are 1×8×8" in capsys.readouterr().err
        assert cli.main(["run", "train-per-client=100000"]) == 2
        assert "class '0': one client should hold" in capsys.readouterr().err
        assert cli.main(["run", "uploads=nowhere", "method=fedavg"]) == 2
        assert "no such file" in capsys.readouterr().err
        assert cli.main(["run", "start-from=nowhere"]) == 2
        assert "start-from = 'nowhere': cannot be read" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_named_run_is_never_overwritten(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "config.json").write_text("{}")
        assert cli.main(["run", "run-name=mine", f"out-dir={tmp_path}"]) == 2
        assert "holds another run's results" in capsys.readouterr().err


def cli_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class TestCommandLine:
    def test_settings_as_flower_takes_them(self) -> None:
        assert options.parse_overrides(
            [
                'seed=1 out-dir="/my results" learning-rate=0.5',
                "method=local,fedavg",
                "augment=true",
            ]
        ) == {
            "seed": 1,
            "out-dir": "/my results",
            "learning-rate": 0.5,
            "method": "local,fedavg",
            "augment": True,
        }

    def test_a_table_of_a_methods_own_settings(self) -> None:
        assert options.parse_overrides(["pfedgpa={rank=3, draws=2}"]) == {
            "pfedgpa.rank": 3,
            "pfedgpa.draws": 2,
        }

    def test_prints_every_setting(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["settings"]) == 0
        printed = capsys.readouterr().out
        assert all(f"{key} = " in printed for key in keys())

    def test_prints_what_a_method_goes_by(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Also where that is another's, or nothing."""
        assert cli.main(["settings", "client-mean"]) == 0
        printed = capsys.readouterr().out
        assert printed.count(" = ") == 2
        assert "pfedgpa.buffer-rounds = 20" in printed
        assert cli.main(["settings", "fedavg"]) == 2
        assert "fedavg: has no settings of its own" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "command",
        [
            ["run", "="],
            ["run", "method"],
            ["run", "method=,"],
            ["run", "head=", "method=fedavg"],
            ["run", 'run-name=""'],
            ["run", "group-shares="],
            ["run", "seed=" + "9" * 5000],
            ["run", "seed=" + "[" * 3000],
            ["run", "start-from=~nobody/x"],
            ["run", "start-from=file"],
            ["run", "uploads=file", "method=fedavg"],
            ["run", "data-dir=~nobody", "dataset=cifar10"],
            ["sweep"],
            ["sweep", "nowhere.yaml"],
            ["sweep", "folder.yaml"],
            ["sweep", "--over", ""],
            ["sweep", "--over", "seed"],
            ["sweep", "--over", "seed=,"],
            ["sweep", "--over", "seed=" + "9" * 5000],
            ["sweep", "--over", "seed=1", "--over", "seed=2"],
            ["sweep", "--over", "seed=1", "--out", "file"],
            ["sweep", "--over", "seed=1", "--out", "file/below"],
            ["sweep", "--over", "run-name=a,b"],
            ["compare", "--methods", ""],
            ["compare", "--methods", "fedsvg"],
            ["compare", "--seeds", ","],
            ["compare", "--seeds", "9" * 5000],
            ["compare", "--seeds", "-1"],
            ["compare", "--conf", ""],
            ["compare", "--conf", "demo,"],
            ["compare", "--out", "file"],
            ["compare", "seed=1"],
            ["tune", "--conf", "folder.yaml"],
            ["tune", "--conf", "demo", "--methods", "pfedgpa,"],
            ["tune", "--conf", "demo", "--methods", "fedavg", "--out", "file"],
            ["tune", "--conf", "demo", "method=fedavg"],
            ["keys", "file", "--host", "localhost", "--nodes", "1"],
            ["keys", "k", "--host", "a b", "--nodes", "1"],
            ["keys", "k", "--host", "", "--nodes", "1"],
            ["keys", "k", "--host", "localhost", "--nodes", "9" * 400],
            ["keys", "k", "--host", "localhost", "--nodes", "1", "--days", "99999999"],
            ["rehearse", "--nodes", "0"],
            ["doctor", "--dataset", "x"],
            ["evaluate", "results/x", "--client", "0", "data-dir=/x"],
            ["doctor", "--dataset", "digits", "--image-size", "-1"],
            ["run", "pfedgpa={rank=3}", "pfedgpa.rank=4"],
            ["run", f"group-shares={','.join(['1e308'] * 5)}"],
            ["run", "fine-tune-grid-epochs=100000000000"],
        ],
        ids=lambda words: " ".join(words)[:50],
    )
    def test_a_users_mistake_gets_a_sentence(
        self,
        command: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.yaml").mkdir()
        (tmp_path / "file").write_text("no folder")
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("pfedgpa: ")
        assert {path.name for path in tmp_path.iterdir()} == {"folder.yaml", "file"}

    def test_a_terminal_without_our_letters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", ascii_only)
        monkeypatch.setattr("pfedgpa_app.cli.run.handle", lambda *_: print("80.0 ± 1.0") or 0)
        assert cli.main(["run"]) == 0
        ascii_only.seek(0)
        assert ascii_only.read() == "80.0 ? 1.0\n"

    def test_a_reader_that_has_seen_enough(self) -> None:
        command = f"{sys.executable} -m pfedgpa_app settings | head -1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert done.stderr == ""

    @pytest.mark.parametrize("out", ["nowhere/p.png", "file/p.png", "folder.png", "p.xyz", "p"])
    def test_no_picture_is_drawn_for_nothing(
        self,
        out: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("pfedgpa_app.data.client.load_dataset", None)  # no work before it
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "file").write_text("no folder")
        assert cli.main(["partition", "--out", out]) == 2
        assert capsys.readouterr().err.startswith(f"pfedgpa: --out {out}: ")

    def test_draws_a_partition(self, tmp_path: Path) -> None:
        picture = tmp_path / "p.png"
        assert cli.main(["partition", "partition=dirichlet", "--out", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")


class TestPlainFlower:
    """What ``flwr run`` prints of a user's mistake."""

    def lines(self, error: Exception) -> list[str]:
        """What Flower's logger prints where the ServerApp raises ``error``."""
        said = io.StringIO()
        flower, handler = logging.getLogger("flwr"), logging.StreamHandler(said)
        flower.addHandler(handler)
        plain: list[Any] = [f for f in flower.filters if type(f).__name__ == "Plain"]
        try:
            flower.error("%s raised an exception", "Simulation", exc_info=error)
            flower.error("Exit Code: 700\nAn unhandled exception occurred")
        finally:
            flower.removeHandler(handler)
            for one in plain:
                one.told = False
        return said.getvalue().splitlines()

    def test_a_wrong_value_is_told_by_its_sentence_alone(self) -> None:
        context = SimpleNamespace(run_config={"seed": -1})
        with pytest.raises(ConfigError) as refusal:
            server_app.main(cast(Any, None), cast(Any, context))  # so the run counts as failed
        assert self.lines(refusal.value) == ["seed = -1 (run-config): must be >= 0"]

    def test_any_other_error_keeps_its_traceback_and_code(self) -> None:
        lines = self.lines(RuntimeError("no idea"))
        assert "RuntimeError: no idea" in lines
        assert "Exit Code: 700" in lines


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"partition": "natural", "train-per-client": 10, "test-per-client": 5}, 2),
        ({"partition": "file:x.csv", "train-per-client": 10}, 1),
        ({"local-dp-clip": 0.1, "local-dp-delta": 0.1}, 2),
        ({"local-dp-clip": 0.1, "local-dp-epsilon": 1.0}, 0),
        ({"join-rate": 0.5, "join-iterations": 3}, 2),
        ({"join-rate": 0.5, "join-clients": 1}, 0),
        ({"join-rate": 0.5, "join-clients": 1, "method": "pfedgpa"}, 0),
        ({"join-rate": 0.5, "join-clients": 1, "method": "fedprox,scaffold"}, 1),
        ({"pfedgpa.keep": 0.5}, 1),
        ({"pfedgpa.keep": 0.5, "pfedgpa.inversion": "invert"}, 0),
        ({"pfedgpa.width": 32, "pfedgpa.fit-steps": 20}, 0),
        ({"pfedgpa.width": 32, "pfedgpa.denoiser": "gaussian"}, 1),
        ({"pfedgpa.ema": 0.5, "pfedgpa.denoiser": "gaussian", "pfedgpa.round-denoiser": "mlp"}, 0),
        ({"pfedgpa.chunk-latents": 8}, 1),
        ({"pfedgpa.chunk-latents": 8, "pfedgpa.autoencoder": "conv"}, 0),
        ({"pfedgpa.draws": 4, "pfedgpa.strength": 9, "method": "pfedgpa-sampled"}, 2),
        ({"pfedgpa.draws": 4, "method": "pfedgpa-inverted,pfedgpa-once"}, 0),
        ({"pfedgpa.draws": 4, "method": "pfedgpa-inverted", "join-clients": 1}, 0),
        ({"train-per-client": 10}, 0),
        ({"test-share": 0.5}, 1),
        ({"save-uploads": True, "method": "pfedgpa,fedper"}, 1),
        ({"save-uploads": True, "method": "pfedgpa,client-mean"}, 0),
        ({"fine-tune-grid-learning-rates": "0.1"}, 1),
        ({"fine-tune-grid-learning-rates": "0.1", "fine-tune-grid-epochs": 1}, 0),
        ({"pfedgpa.join-mode": "guided"}, 1),
        ({"pfedgpa.join-mode": "guided", "join-clients": 1}, 0),
        ({"max-distance": 2.5, "num-clients": 2}, 1),
        ({"max-distance": 2.5, "num-clients": 4, "straggler-share": 0.5}, 1),
        ({"max-distance": 2.5, "num-clients": 3}, 0),
        ({"dropout-share": 0.5, "straggler-share": 0.5, "min-uploads": 10}, 2),
        ({"dropout-share": 0.8, "straggler-share": 0.5, "min-uploads": 2}, 1),
        ({"dropout-share": 0.1, "straggler-share": 0.1}, 0),
        ({"share-label-counts": True}, 1),
        ({"share-label-counts": True, "pfedgpa.descriptor": "labels"}, 0),
        ({"share-label-counts": False}, 0),
        ({"learning-rate": 0.5, "method": "pfedme,fedavg"}, 1),
        ({"learning-rate": 0.5, "method": "pfedme", "pfedme.learning-rate": 0.02}, 0),
        ({"learning-rate": 0.5, "method": "pfedhn,fedavg"}, 0),
        ({"local-epochs": 3, "method": "fedrep,fedavg"}, 1),
        ({"local-epochs": 3, "method": "fedper,ditto"}, 0),
        ({"momentum": 0.1, "method": "fedavg,pfedme"}, 1),
        ({"momentum": 0.1, "method": "per-fedavg,fedrep"}, 0),
        ({"start-from": "there", "method": "local,fedavg"}, 1),
        ({"start-from": "there", "method": "pfedhn"}, 1),
        ({"start-from": "there", "method": "fedproto,pfedgpa"}, 1),
        ({"start-from": "there", "method": "fedfomo", "validation-share": 0.2}, 1),
        ({"start-from": "there", "method": "fedavg,fedper"}, 0),
        ({"workers": 2, "timeout": 9.0, "engine": "batched"}, 2),
        ({"workers": 2, "timeout": 9.0, "engine": "process"}, 0),
        ({"dataset": "nodes", "train-per-client": 40, "test-per-client": 30}, 2),
        ({"dataset": "nodes", "train-per-client": "auto", "test-per-client": "auto"}, 0),
    ],
)
def test_settings_without_effect_are_told(settings: dict[str, Any], idle: int) -> None:
    resolved = resolve(settings)
    said = list(without_effect(resolved.config, resolved.sources, own_test=True))
    names = [name for name in settings if any(text.startswith(f"{name} has no ") for text in said)]
    assert len(said) == len(names) == idle


def test_nothing_is_tuned_by_no_image() -> None:
    few = {"train-per-client": 4, "fine-tune-grid-epochs": 3, "validation-share": 0.1}
    with pytest.raises(ConfigError, match=r"validation-share = 0\.1 of .* sets no image aside"):
        resolve(few)
    assert resolve(few | {"train-per-client": 5, "validation-share": 0.2})
