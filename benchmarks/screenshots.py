"""Screenshots of a report for the documentation, docs/pictures/NAME-{desk,tablet,phone}.png.

    python benchmarks/screenshots.py results/RUN/report.html report

Needs Chromium. The desk's is in light colours, the tablet's and the phone's in dark ones.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
NIGHT = "--blink-settings=preferredColorScheme=0"
SHOTS = {
    "desk": ["--window-size=1100,1500"],
    "tablet": ["--window-size=800,1200", NIGHT],
    "phone": ["--window-size=500,1500", NIGHT],
}


def main() -> None:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("name", help="how the pictures' names begin")
    options = parser.parse_args()
    page = options.page.resolve(strict=True).as_uri()
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("needs chromium")
    for width, how in SHOTS.items():
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [*how, f"--screenshot={PICTURES / f'{options.name}-{width}.png'}", page]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
