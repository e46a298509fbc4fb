"""What every subcommand has: completion in the shell, a traceback for who wants one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pfedgpa_app import cli
from pfedgpa_app.cli.options import methods_named
from pfedgpa_app.methods import METHODS
from tests.support.federations import known_for_a_while


def test_a_method_of_one_s_own_is_looked_for_in_code_dir(tmp_path: Path) -> None:
    (tmp_path / "in_code_dir.py").write_text(
        "from pfedgpa_app.methods.fedavg import FedAvg\n\nclass Mine(FedAvg):\n    title = 'Mine'\n"
    )
    with known_for_a_while("mine"):
        [fedavg, mine] = methods_named("fedavg,in_code_dir:Mine", {"code-dir": str(tmp_path)})
        assert fedavg == "fedavg"
        assert METHODS[mine].title == "Mine"


def test_settings_of_a_method_of_one_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "with_settings.py").write_text(
        "from pfedgpa_app.methods.fedprox import FedProx, FedProxSettings\n\n"
        "class Theirs(FedProx):\n    class settings(FedProxSettings): pass\n"
    )
    conf = tmp_path / "own.yaml"
    conf.write_text(f"method: with_settings:Theirs\ncode-dir: {tmp_path}\ntheirs.mu: 0.5\n")
    for names in (["theirs"], []):
        with known_for_a_while("theirs"):
            assert cli.main(["settings", *names, "--conf", str(conf)]) == 0
        assert "theirs.mu = 0.5  [own.yaml]" in capsys.readouterr().out


def test_a_second_signal_does_not_disturb_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends two: one to its command, one to the group."""
    before, ended = signal.getsignal(signal.SIGTERM), []

    def handle(_: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            ended.append("what was started")
        return 0

    monkeypatch.setattr(cli.COMMANDS["settings"], "handle", handle)
    assert cli.main(["settings"]) == 130
    assert ended
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pfedgpa com", {"compare"}),
        ("pfedgpa run num-cl", {"num-clients="}),
        ("pfedgpa run seed=1 precision=b", {"precision=bfloat16"}),
        ("pfedgpa export RUN --to o", {"onnx"}),
    ],
)
def test_a_shell_completes(typed: str, offered: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " ",
    }
    subprocess.run([sys.executable, "-m", "pfedgpa_app"], env=os.environ | asked, check=False)
    assert {word.strip() for word in answer.read_text().splitlines()} == offered


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_with_debug_its_traceback(
    debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "num-clients=-3", *(["--debug"] if debug else [])]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("pfedgpa: num-clients = -3")
    assert ("Traceback" in said) == debug
    assert debug or said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("run --method fedavg", "settings are given without --: method=VALUE"),
        ("run --num_clients=20", "settings are given without --: num-clients=VALUE"),
        ("run --lr 0.1", "settings are given without --: learning-rate=VALUE"),
        ("run --out kept", "settings are given without --: out-dir=VALUE"),
        ("sweep own.yaml --jbos 2", "did you mean --jobs?"),
        ("doctor --xyz", "all options: pfedgpa doctor --help"),
    ],
)
def test_an_unknown_option_is_told_what_may_be_meant(
    words: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(words.split())
    assert capsys.readouterr().err.rstrip().endswith(meant)


def test_help_and_completion_wait_for_no_import_of_torch() -> None:
    """Which takes seconds, at each TAB."""
    code = """if True:
        import sys
        from pfedgpa_app.cli import COMMANDS, parse
        for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
            try:
                parse(words)
            except SystemExit as end:
                assert end.code == 0
        print(sorted(sys.modules), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "usage: pfedgpa run" in done.stdout
    assert not {"'torch'", "'flwr'", "'numpy'"} & set(done.stderr.strip("[]\n").split(", "))
