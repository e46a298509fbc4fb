"""Makes a deployment's keys and certificates.

An authority (ca.key stays here, ca.crt goes to every node), the SuperLink's certificate
(server.crt, server.key) and a key for each SuperNode (node-0 goes to its node, node-0.pub to the
SuperLink).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import check_folder, check_number

EXAMPLE = "keys keys --host superlink.example.org --nodes 3"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder to write them to, for instance keys")
    parser.add_argument(
        "--host",
        action="append",
        required=True,
        help="name or address by which nodes reach the SuperLink; may be repeated",
    )
    parser.add_argument("--nodes", type=int, required=True, help="number of SuperNodes")
    parser.add_argument(
        "--days", type=int, default=365, help="days for which certificates are valid"
    )


def handle(options: Namespace) -> int:
    from pfedgpa_app.deployment.keys import make

    check_number("--nodes", options.nodes, 100_000)
    check_number("--days", options.days, 100 * 366)
    check_folder(options.folder)
    for path in make(options.folder, options.host, options.nodes, options.days):
        print(path)
    return 0
