"""Draws who holds which classes."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import add_conf, add_settings, overrides
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "partition --conf fashion-mnist-20 partition=dirichlet --out who-holds-what.png"


def add_options(parser: ArgumentParser) -> None:
    add_settings(parser)
    add_conf(parser)
    parser.add_argument("--out", type=Path, default=Path("partition.png"), help="the picture")


def handle(options: Namespace) -> int:
    import numpy as np

    from pfedgpa_app.data.client import described, load_dataset, load_partition
    from pfedgpa_app.results.plots import partition

    config, out = resolve(overrides(options)).config, options.out
    _check_picture(out)
    try:
        data, splits = load_dataset(config), load_partition(config)
    except ValueError as error:  # a partition that the data do not allow
        raise ConfigError(str(error)) from error
    held = [np.concatenate([split.train, split.validation]) for split in splits]
    counts = np.array(
        [np.bincount(data.train_labels[h], minlength=len(data.classes)) for h in held]
    )
    partition(out, counts, data.classes)
    print(described(config))
    print(f"wrote {out.absolute()}")
    return 0


def _check_picture(out: Path) -> None:
    """Refuse what no picture can be written to."""
    from matplotlib.backend_bases import FigureCanvasBase

    known_formats = FigureCanvasBase.get_supported_filetypes()
    if out.suffix.lower().removeprefix(".") not in known_formats:
        raise ConfigError(
            f"--out {out}: its ending must be one of .{', .'.join(sorted(known_formats))}"
        )
    if os.path.isdir(out):
        raise ConfigError(f"--out {out}: is a folder; name a file")
    if not os.path.isdir(out.parent):
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if not os.access(out if os.path.exists(out) else out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: may not be written")
