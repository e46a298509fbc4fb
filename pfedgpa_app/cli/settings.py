"""Prints settings, their defaults and meaning; with --conf, the values that a run would have."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from pfedgpa_app.cli.options import add_conf

EXAMPLE = "settings pfedgpa --conf fashion-mnist-20"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a method (your own: MODULE:CLASS), a section of settings (data, training, …) or a "
        "setting; default: all",
    )
    add_conf(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.config.names import keys, keys_of, method_named
    from pfedgpa_app.config.parse import argument
    from pfedgpa_app.config.resolve import resolve

    names, conf = [method_named(name) for name in options.names], options.conf
    here = resolve({"conf": conf}).as_dict() if conf else {}  # knows methods of the user's own
    chosen = [key for name in names for key in keys_of(name)] if names else list(keys().values())
    for key in {key.name: key for key in chosen}.values():
        value = argument(here[key.name]["value"] if conf else key.default) or "''"
        source = f"  [{here[key.name]['from']}]" if conf else ""
        choices = f" ({', '.join(key.rules['choices'])})" if key.rules["choices"] else ""
        print(f"{key.name} = {value}{source}\n    {key.rules['help']}{choices}")
    return 0
