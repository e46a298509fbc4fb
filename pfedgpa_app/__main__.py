"""The ``pfedgpa`` command, which starts what takes long before it imports what does, too."""

from __future__ import annotations

import contextlib
import sys

from pfedgpa_app.engine.spawning import Server


def main() -> int:
    """Run the command; returns the exit status."""
    runs = sys.argv[1:2] == ["run"] and "ray" not in " ".join(sys.argv)
    with Server() if runs else contextlib.nullcontext() as server:
        from pfedgpa_app import cli

        return cli.main(server=server)


if __name__ == "__main__":
    raise SystemExit(main())
