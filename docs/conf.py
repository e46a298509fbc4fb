"""The documentation's site: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import inspect
from pathlib import Path

from pfedgpa_app import __version__
from pfedgpa_app.config.names import keys, keys_of
from pfedgpa_app.config.parse import Key, argument
from pfedgpa_app.core.sections import SECTIONS
from pfedgpa_app.methods import METHODS

project, author, copyright = "pFedGPA", "the pFedGPA developers", "the pFedGPA developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "pFedGPA"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True

GENERATED = Path(__file__).parent / "generated"


def of_settings(names: list[Key]) -> str:
    """A table of settings."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for key in names:
        shown = argument(key.default)
        choices = "; one of " + ", ".join(key.rules["choices"]) if key.rules["choices"] else ""
        meaning = f"{key.rules['help']}{choices}".replace("|", "\\|")
        lines.append(f"| `{key.name}` | {f'`{shown}`' if shown else 'empty'} | {meaning} |")
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Every setting, in its section or by its method."""
    parts = [
        "# Settings\n\nOf every run; `pfedgpa settings NAME` prints the same. They are given on "
        "the command line as `KEY=VALUE`, or in a YAML file by `--conf`.\n"
    ]
    for name in SECTIONS:
        parts.append(f"## {name}\n\n{of_settings(keys_of(name))}")
    own: dict[str, list[Key]] = {}
    for key in keys().values():
        section, dot, _ = key.name.rpartition(".")
        if dot:
            own.setdefault(section, []).append(key)
    for section, held in own.items():
        parts.append(f"## {section}\n\n{of_settings(held)}")
    return "\n".join(parts)


def methods_page() -> str:
    """Every method, by its module's docstring, and its own settings."""
    parts = ["# Methods in full\n\nEach is chosen by its name: `method=fedavg,pfedgpa`.\n"]
    for name, kind in METHODS.items():
        about = inspect.getdoc(kind) or ""
        module = inspect.getdoc(inspect.getmodule(kind)) or ""
        own = [key for key in keys().values() if key.name.startswith(f"{name}.")]
        text = module if module.count("\n") and about not in module else ""
        parts.append(f"## `{name}`: {kind.title}\n\n{about}\n\n{text}\n")
        if own:
            parts.append(of_settings(own))
    return "\n".join(parts)


GENERATED.mkdir(exist_ok=True)
(GENERATED / "settings.md").write_text(settings_page(), encoding="utf-8")
(GENERATED / "methods.md").write_text(methods_page(), encoding="utf-8")
example = (Path(__file__).parents[1] / "examples" / "own_images.md").read_text(encoding="utf-8")
(GENERATED / "own_images.md").write_text(example.split("---\n", 2)[2], encoding="utf-8")
