"""Screenshots of a run's report for the documentation, in docs/pictures.

    python benchmarks/screenshots.py results/RUN

Needs Chromium. One as wide as a desk's screen, by day; one as a phone's, by night.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
SHOTS = {
    "report-desk.png": ["--window-size=1100,1500"],
    "report-phone.png": ["--window-size=500,1500", "--blink-settings=preferredColorScheme=0"],
}


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    page = (parser.parse_args().run / "report.html").resolve(strict=True)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("needs chromium")
    for name, options in SHOTS.items():
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [*options, f"--screenshot={PICTURES / name}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
