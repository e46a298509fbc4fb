"""docs/add-a-method.md: its example, as a reader would add it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pfedgpa_app.core.paths import APP_DIR
from tests.support.federations import SMALL


def test_the_example_is_one_file_and_its_name(tmp_path: Path) -> None:
    text = (APP_DIR / "docs" / "add-a-method.md").read_text()
    file, lines = re.findall(r"```py(?:thon)?\n(.*?)```", text, re.DOTALL)
    assert len(file.splitlines()) < 60
    imported, line = lines.splitlines(keepends=True)
    app = tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        shutil.copy(APP_DIR / name, app)
    for name in ("pfedgpa_app", "conf"):
        shutil.copytree(APP_DIR / name, app / name)
    (app / "pfedgpa_app" / "methods" / "fedsmooth.py").write_text(file)
    registry = app / "pfedgpa_app" / "methods" / "__init__.py"
    before = registry.read_text()
    first = "from pfedgpa_app.methods.fedavgm"
    after = before.replace('    "local": ', line + '    "local": ').replace(first, imported + first)
    registry.write_text(after)
    assert len(after) == len(before) + len(lines)

    settings = {k: v for k, v in SMALL.items() if not k.startswith("pfedgpa.")}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "method": "fedavg,fedsmooth"}
    settings |= {"fedsmooth.step": 0.3, "learning-rate": 0.05}

    words = ["run", *(f"{key}={value}" for key, value in settings.items())]
    commands = [words, ["settings"], [*words, "method=local"]]
    code = f"from pfedgpa_app import cli; print([cli.main(words) for words in {commands}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=app,
        env=os.environ | {"PYTHONPATH": str(app)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("[0, 0, 2]\n"), done.stderr
    rows = {r["method"]: r for r in json.loads((tmp_path / "run" / "summary.json").read_text())}
    assert rows["fedsmooth"]["accuracy_before_ft"] > 30
    assert rows["fedsmooth"]["bytes_up"] < rows["fedavg"]["bytes_up"]  # biases stay at home
    assert "fedsmooth.step = 0.5" in done.stdout
    assert "fedsmooth.step" in done.stderr
