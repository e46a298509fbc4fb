"""Rehearses a whole deployment on this machine: TLS, keys, SuperNodes with their own data."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from pfedgpa_app.cli.options import add_app, add_settings, check_number, overrides

EXAMPLE = "rehearse --nodes 3 num-server-rounds=5"


def add_options(parser: ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--nodes", type=int, default=3, help="number of SuperNodes; default: 3")
    add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.deployment.rehearsal import rehearse

    settings = overrides(options)
    check_number("--nodes", options.nodes, 1000)
    rehearse(options.nodes, settings, options.app.absolute())
    return 0
