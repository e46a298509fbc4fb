"""README, docs and examples: the site builds, what a reader types exists, the notebook runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

from pfedgpa_app import cli
from pfedgpa_app.cli.options import parse_overrides
from pfedgpa_app.config.names import keys
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.data.client import class_counts
from pfedgpa_app.methods import METHODS
from pfedgpa_app.study.plan import read

PAGES = [APP_DIR / "README.md", APP_DIR / "CONTRIBUTING.md", *sorted(APP_DIR.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """A page's blocks of code in one of the languages, "" for none named."""
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """What a page has its reader type that begins with pfedgpa, as words, and in running text."""
    lines = "\n".join(blocks(page, "", "sh", "bash")).replace("\\\n", " ").splitlines()
    typed = [line for line in lines if line.startswith("pfedgpa ")]
    typed += re.findall(r"`(pfedgpa [^`]*)`", BLOCK.sub("", page.read_text()))
    return [shlex.split(line, comments=True)[1:] for line in typed]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path)],
        cwd=APP_DIR,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    settings = (tmp_path / "generated" / "settings.html").read_text()
    assert all(f"{name}<" in settings for name in keys())
    methods = (tmp_path / "generated" / "methods.html").read_text().replace("’", "'")
    assert all(kind.title in methods for kind in METHODS.values())
    api = (tmp_path / "api.html").read_text()
    for name in ("run", "Result", "load_client", "PFedGPA"):
        assert f'id="pfedgpa_app.{name}"' in api


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
class TestPage:
    """Each page, by what a reader does with it."""

    def test_commands_are_understood(self, page: Path) -> None:
        """What is typed is a command, with options and settings that there are."""
        for words in commands(page):
            if len(words) < 2 or "…" in "".join(words):  # it is named, not typed
                assert not words or words[0] in cli.COMMANDS or words[0].startswith("-")
                continue
            options = cli.parse(words)
            settings = getattr(options, "settings", None) or []
            parse_overrides([word for word in settings if "=" in word])

    def test_links_lead_somewhere(self, page: Path) -> None:
        for target in re.findall(r"\]\(([^)#]*)[^)]*\)", page.read_text()):
            if target and not target.startswith(("http", "generated/")):
                assert (page.parent / target).exists(), target

    def test_python_is_python(self, page: Path) -> None:
        for text in blocks(page, "python"):
            compile(textwrap.dedent(text), str(page), "exec")


def test_every_method_is_in_the_table() -> None:
    text = (APP_DIR / "docs" / "methods.md").read_text()
    assert sorted(re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE)) == sorted(METHODS)
    assert all(f"| `{name}` | {kind.title} " in text for name, kind in METHODS.items())


def test_the_tables_of_the_example_are_what_its_sweep_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = APP_DIR / "examples" / "tables"
    settings, over = read(folder / "tables.yaml")
    monkeypatch.chdir(folder)
    for dataset in over["dataset"]:
        config = resolve(settings | {"dataset": dataset}).config
        held = [sum(counts) for counts in class_counts(config)]
        assert len(held) == 12
        assert min(held) >= 20


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    text = (APP_DIR / "examples" / "own_images.md").read_text()
    short = text.replace("num_server_rounds=20", "num_server_rounds=2")
    assert short != text
    notebook = jupytext.reads(short, fmt="md")
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    kinds = {kind for out in shown for kind in out.get("data", {})}
    assert {"text/markdown", "image/png", "text/html"} <= kinds
    assert re.search(r"digit 0: digit \d \(\d+%\)", shown[-1]["text"])
