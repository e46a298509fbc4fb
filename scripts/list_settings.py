"""Write the list of every setting into pyproject.toml, between its two markers.

    python scripts/list_settings.py

Flower lets --run-config override the keys listed there and no others.
"""

from __future__ import annotations

from pathlib import Path

from pfedgpa_app.config.names import keys
from pfedgpa_app.config.parse import Key, argument

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
BEGIN, END = "# begin: written by scripts/list_settings.py\n", "# end\n"


def line(key: Key) -> str:
    """Return the line of a setting: not set, with its default and meaning as a comment."""
    return f'{key.name} = ""  # {argument(key.default) or "empty"}: {key.rules["help"]}\n'


def listed(text: str) -> str:
    """Return pyproject.toml's ``text`` with the list renewed."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + "".join(map(line, keys().values())) + end + after


if __name__ == "__main__":
    PYPROJECT.write_text(listed(PYPROJECT.read_text(encoding="utf-8")), encoding="utf-8")
