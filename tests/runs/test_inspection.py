"""`pfedgpa inspect`: what a run's folder holds and how far it is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app import cli
from pfedgpa_app.cli.options import overrides
from pfedgpa_app.config.names import keys
from pfedgpa_app.config.resolve import differences, resolve
from pfedgpa_app.core.settings import LAUNCH, ConfigError
from pfedgpa_app.methods import halves
from pfedgpa_app.runs.checkpoint import Checkpoint
from pfedgpa_app.runs.folder import kept_settings, locked, run_folder
from pfedgpa_app.runs.inspection import lines_about
from tests.support.federations import federate, summary


class Stopped(BaseException):
    """Somebody ends the run."""


def to_go_on(folder: Path) -> str:
    """The words that are to be given to pfedgpa."""
    return "\n".join(lines_about(folder)).partition("to continue: pfedgpa ")[2].splitlines()[0]


def test_a_run_that_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = federate(tmp_path, method="fedavg,pfedgpa-once", num_server_rounds=3, seed=7)
    assert cli.main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "fedavg, pfedgpa-once on digits" in text
    assert "4 clients, dominant; 3 rounds, all clients in each; seed 7" in text
    assert "; done" in text
    assert f"{summary(folder)['pfedgpa-once']['accuracy_kept']:.1f}" in text
    assert "12 uploads of 4 clients, rounds 1 to 3" in text
    monkeypatch.chdir(folder)
    assert lines_about(Path())[0].startswith("run run: ")
    alone = lines_about(folder / "distribution.safetensors")
    assert alone[0].startswith("distribution of pfedgpa-once: of 12 uploads")
    spaced = folder.rename(folder.with_name("my run")) / "distribution.safetensors"
    assert shlex.split(lines_about(spaced)[1].partition("from it: ")[2]) == [f"start-from={spaced}"]


def test_what_each_of_two_federations_learned(tmp_path: Path) -> None:
    how = {"method": "pfedgpa,pfedgpa-once", "num_server_rounds": 3, "report": True}
    folder, _ = federate(tmp_path, **how)
    text = "\n".join(lines_about(folder))
    for method, file in (
        ("pfedgpa", "distribution.pfedgpa.safetensors"),
        ("pfedgpa-once", "distribution.safetensors"),
    ):
        assert lines_about(folder / file)[0].startswith(f"distribution of {method}: of ")
        assert f"start-from={folder / file}" in text
    assert {path.name for path in folder.glob("latents*")} == {
        f"latents{of}.{kind}" for of in ("", ".pfedgpa") for kind in ("json", "png")
    }
    page = (folder / "report.html").read_text()
    assert [page.count(f"Learned by {by}. ") for by in ("pFedGPA", "pFedGPA, once")] == [1, 1]
    ids = re.findall(r' id="(.*?)"', page)
    assert len(set(ids)) == len(ids)


def test_the_last_that_learned_has_the_plain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the methods after it could learn something, too, or not."""
    learned = halves.learned
    for name in ("pfedgpa", "pfedgpa-once"):

        def only(method: str, made: Any, name: str = name) -> Any:
            return learned(method, made) if method == name else None

        monkeypatch.setattr(halves, "learned", only)
        how = {"method": "pfedgpa,pfedgpa-once", "num_server_rounds": 3, "report": True}
        folder, _ = federate(tmp_path / name, **how)
        [found] = folder.glob("distribution*")
        assert lines_about(found)[0].startswith(f"distribution of {name}: of ")
        assert found.name == "distribution.safetensors"
        assert {path.name for path in folder.glob("latents*")} == {"latents.json", "latents.png"}


def test_a_run_that_was_stopped_tells_where_and_how_to_go_on(tmp_path: Path) -> None:
    def stop(message: object, reply: object) -> object:
        config = message.content.config_records["config"]  # type: ignore[attr-defined]
        if config["round"] == 3:
            raise Stopped
        return reply

    how = {"method": "fedavg", "num_server_rounds": 4, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        federate(tmp_path, tamper=stop, **how)
    text = "\n".join(lines_about(tmp_path / "run"))
    assert "; stopped, " in text
    assert "% done; last message: " in text
    assert "checkpoint: after fedavg round 2" in text
    again = resolve(overrides(cli.parse(shlex.split(to_go_on(tmp_path / "run")))))
    assert again.config.resume
    assert run_folder(again) == tmp_path / "run"
    assert not differences(kept_settings(tmp_path / "run"), again)
    with locked(tmp_path / "run", ""):
        assert "; running, " in "\n".join(lines_about(tmp_path / "run"))
    (tmp_path / "run" / "checkpoint" / "checkpoint.json").write_text("{")
    assert "checkpoint: cannot be used: " in "\n".join(lines_about(tmp_path / "run"))


def test_the_command_to_go_on_has_all_that_was_given(tmp_path: Path) -> None:
    """Also what has a part in the launch alone: what is kept, what is spent, what serves."""
    launch: dict[str, Any] = {
        **{"conf": "own", "code-dir": str(tmp_path), "data-dir": str(tmp_path), "download": True},
        **{"timeout": 60.0, "max-epsilon": 9.0, "checkpoint-every": 2, "track": "tensorboard"},
        **{"save-weights": False, "save-uploads": True, "report": False},
        **{"engine": "batched", "workers": 2},
        **{"out-dir": str(tmp_path), "run-name": "run", "resume": True},
    }
    assert launch.keys() == {n for n, key in keys().items() if key.rules["part"] == LAUNCH}
    begun = resolve({"method": "fedavg", "local-dp-epsilon": 1.0} | launch)
    folder = tmp_path / "run"
    Checkpoint(folder / "checkpoint").save({"federation": "fedavg", "round": 1, "state": {}})
    (folder / "config.json").write_text(json.dumps(begun.as_dict()))
    again = resolve(overrides(cli.parse(shlex.split(to_go_on(folder)))))
    assert again.config == begun.config


@pytest.mark.parametrize("content", [None, "a text", ""])
def test_what_is_none_of_ours(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"neither a file nor|is not a run's distribution"):
        lines_about(path)
    with pytest.raises(ConfigError, match="a folder without a run"):
        lines_about(tmp_path)


def test_settings_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json names no method"):
        lines_about(tmp_path)
