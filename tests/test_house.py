"""The house is built as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pfedgpa_app.core.paths import APP_DIR, PACKAGE
from scripts.list_settings import listed

LINT = Path(sys.executable).with_name("lint-imports")


def floors() -> list[set[str]]:
    """As the contract has them, from the top."""
    contracts = tomllib.loads((APP_DIR / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    return [set(layer.split(" : ")) for layer in layers]


def test_the_picture_has_the_contracts_floors() -> None:
    text = (APP_DIR / "docs" / "architecture.md").read_text()
    [drawn] = re.findall(r"nor a neighbour on it:\n\n```\n(.*?)```", text, re.DOTALL)
    assert [set(line.split(" · ")) for line in drawn.splitlines()] == floors()


def test_every_room_is_on_a_floor_and_in_the_picture() -> None:
    names = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    rooms = {name.removesuffix(".py") for name in names} - {"app", "py.typed"}
    assert rooms == set().union(*floors())
    assert len(rooms) <= 17
    text = (APP_DIR / "docs" / "architecture.md").read_text()
    for room in rooms:
        assert re.search(rf"^  {room}(/|\.py) ", text, re.MULTILINE), room


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/files.py", "from pfedgpa_app.methods import METHODS"),
        ("methods/fedavg.py", "from flwr.app import Message"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    if not LINT.is_file():
        pytest.skip("needs import-linter, which `make lowest` leaves out")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    shutil.copy(APP_DIR / "pyproject.toml", tmp_path)

    def lint() -> int:
        return subprocess.run([LINT], cwd=tmp_path, capture_output=True).returncode

    assert lint() == 0
    with (tmp_path / PACKAGE.name / file).open("a") as out:
        out.write(f"\n{line}\n")
    assert lint() == 1


def test_pyproject_lists_every_setting() -> None:
    """``python scripts/list_settings.py`` writes the list."""
    text = (APP_DIR / "pyproject.toml").read_text(encoding="utf-8")
    assert listed(text) == text


def test_nothing_is_imported_that_windows_lacks() -> None:
    lacks = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios"}
    for file in PACKAGE.rglob("*.py"):
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in statement.names}
                names |= {getattr(statement, "module", None) or ""}
                assert not names & lacks, f"{file}: {ast.unparse(statement)}"


def test_every_benchmark_says_what_it_is_when_asked() -> None:
    """Instead of beginning to measure."""
    for file in (APP_DIR / "benchmarks").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "__main__" in text:
            assert "ArgumentParser(" in text, file.name


def test_nothing_is_too_long_to_read() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                most = 200 if isinstance(node, ast.ClassDef) else 50
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= most, f"{path.relative_to(PACKAGE)}: {node.name} has {lines} lines"
