"""Two pictures of the documentation, in docs/pictures: a run's rounds, and its latents.

    python benchmarks/pictures.py results/RUN

The run has 20 clients with 60 images each (docs/how.md names the command); it must have its
report's files, which every run leaves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pfedgpa_app.core.files import write_text
from pfedgpa_app.results import figures
from pfedgpa_app.runs.reading import runs_in
from pfedgpa_app.runs.report import latent_map_of
from pfedgpa_app.runs.table import curves_of
from pfedgpa_app.study.pictures import on_white

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    (run,) = runs_in([parser.parse_args().run])
    write_text(PICTURES / "accuracy.svg", on_white(figures.curves(*curves_of([run]))))
    write_text(PICTURES / "latents.svg", on_white(latent_map_of(run)))


if __name__ == "__main__":
    main()
