"""The ``pfedgpa`` command, which starts what takes long before it imports what does, too."""

from __future__ import annotations

import os
import sys

from pfedgpa_app.engine import spawning


def main() -> int:
    """Run the command; returns the exit status."""
    try:
        os.getcwd()
    except FileNotFoundError:
        print("pfedgpa: the current folder is gone: change to another", file=sys.stderr)
        return 2
    if sys.argv[1:2] == ["run"] and "ray" not in " ".join(sys.argv):
        spawning.prepare()

    from pfedgpa_app import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
