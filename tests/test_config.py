"""Settings: where they come from, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app import cli
from pfedgpa_app.config import APP_DIR, keys, resolve
from pfedgpa_app.diffusion.fit import FitSettings
from pfedgpa_app.methods import METHODS, federation_of, method_class
from pfedgpa_app.methods.pfedgpa import PFedGPASettings
from pfedgpa_app.settings import ConfigError


class TestLayers:
    def test_run_config_over_conf_over_default(self, tmp_path: Path) -> None:
        conf = tmp_path / "mine.yaml"
        conf.write_text("num-clients: 7\nlocal-epochs: 3\npfedgpa: {rank: 5}\n")
        resolved = resolve({"conf": str(conf), "local-epochs": 4, "momentum": ""})
        assert resolved.config.num_clients == 7
        assert resolved.config.local_epochs == 4
        assert resolved.config.momentum == 0.5
        assert resolved.config.pfedgpa.rank == 5
        assert resolved.sources["num-clients"] == "mine.yaml"
        assert resolved.sources["local-epochs"] == "run-config"
        assert resolved.sources["momentum"] == "default"
        assert resolved.as_dict()["pfedgpa.rank"] == {"value": 5, "from": "mine.yaml"}
        assert resolved.as_dict()["pfedgpa.strength"]["value"] == "auto"

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

    def test_the_core_has_the_settings_defaults(self) -> None:
        # diffusion/ knows nothing of config.py, so its own defaults must not drift apart
        for field in dataclasses.fields(FitSettings):
            assert getattr(PFedGPASettings(), field.name) == field.default

    def test_methods_exist(self) -> None:
        for name in METHODS:
            method = method_class(name)
            assert method.title
            assert federation_of(name, resolve({}).config) in METHODS


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"method": "fedsvg"}, ["method", "fedsvg", "fedavg"]),
            ({"method": "fedavg,fedavg"}, ["method", "twice"]),
            ({"dataset": "imagenet"}, ["dataset", "imagenet", "fashion-mnist"]),
            ({"learning-rat": 0.1}, ["learning-rat", "did you mean learning-rate"]),
            ({"learning-rate": 0}, ["learning-rate", "0", "> 0"]),
            ({"learning-rate": float("nan")}, ["learning-rate", "number"]),
            ({"num-server-rounds": 2.5}, ["num-server-rounds", "2.5", "whole number"]),
            ({"num-server-rounds": True}, ["num-server-rounds", "whole number"]),
            ({"fraction-train": 1.5}, ["fraction-train", "1.5", "<= 1"]),
            ({"partition": "random"}, ["partition", "dirichlet"]),
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

    def test_bad_yaml(self, tmp_path: Path) -> None:
        conf = tmp_path / "bad.yaml"
        conf.write_text("a: [1,")
        with pytest.raises(ConfigError, match="not valid YAML"):
            resolve({"conf": str(conf)})
        conf.write_text("- 1")
        with pytest.raises(ConfigError, match="must map settings"):
            resolve({"conf": str(conf)})

    def test_absent_data_and_unfit_images(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["run", "dataset=cifar10", f"data-dir={tmp_path}"]) == 2
        assert "download=true" in capsys.readouterr().err
        assert cli.main(["run", "model=cifar"]) == 2
        assert "fit images of 1×8×8" in capsys.readouterr().err
        assert cli.main(["run", "train-per-client=100000"]) == 2
        assert "class '0': one client is to hold" in capsys.readouterr().err
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
        assert cli.parse_overrides(
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

    def test_prints_every_setting(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["settings"]) == 0
        printed = capsys.readouterr().out
        assert all(f"{key} = " in printed for key in keys())

    def test_draws_a_partition(self, tmp_path: Path) -> None:
        picture = tmp_path / "p.png"
        assert cli.main(["partition", "partition=dirichlet", "--out", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
