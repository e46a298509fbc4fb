"""Print the lowest versions that pyproject.toml allows, as pip's constraints."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
for requirement in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
    print(re.sub(r"(\[.*])?>=([^,]+).*", r"==\2", requirement))
