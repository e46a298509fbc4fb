"""The ``pfedgpa`` command."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

from pfedgpa_app import __version__
from pfedgpa_app.config.parse import flat
from pfedgpa_app.config.resolve import keys, keys_of, known, require_dataset, resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.settings import ConfigError, DataError, shown
from pfedgpa_app.engine import LaunchError, StoppedError
from pfedgpa_app.engine.spawning import Server

YAML = (".yaml", ".yml")


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` settings; a value is TOML, and what is not valid TOML is text.

    What a setting that wants text is given is text in any case.

    A text may hold several settings, as Flower's --run-config does: ``'seed=1 method="local"'``.

    Raises:
        ConfigError: no ``KEY=VALUE``, or a key that does not exist.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        for part in _split(text):
            key, found, value = part.partition("=")
            if not found or not key.strip():
                raise ConfigError(f"{shown(part)}: settings are given as KEY=VALUE")
            settings[key.strip()] = _value(key.strip(), value)
    return flat(settings, "command line")


def _value(key: str, text: str) -> Any:
    """What a setting's text means: a name like 7 or 2026-11-26 is text where text is wanted."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):  # no TOML, or a number of thousands of digits
        return text
    wants_text = key in keys() and keys()[key].type in (str, tuple[str, ...])
    return text if wants_text and not isinstance(value, (str, list)) else value


def _split(text: str) -> list[str]:
    """At spaces before a KEY=, so that values may hold spaces."""
    parts: list[str] = []
    for word in text.split(" "):
        if parts and word.partition("=")[0] not in keys():
            parts[-1] += " " + word
        else:
            parts.append(word)
    return [part.strip() for part in parts if part.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pfedgpa", description="Personalised federated learning by generated weights."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    settings_help = "settings, as in seed=1 method=local,pfedgpa; see: pfedgpa settings"

    run = commands.add_parser("run", help="run an experiment")
    run.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=settings_help)
    run.add_argument("-c", "--run-config", action="append", default=[], help="the same")
    run.add_argument("--conf", help="experiment in conf/, or a YAML file")
    run.add_argument("--engine", help="auto, ray, process or batched; the same as engine=")
    run.add_argument("--app", type=Path, default=APP_DIR, help="folder of the Flower app")

    sweep = commands.add_parser(
        "sweep",
        help="run every combination of settings, as many at once as the machine carries",
        description="Runs every combination. Finished runs are skipped, so a sweep that was "
        "stopped goes on where it was.",
    )
    sweep.add_argument(
        "settings",
        nargs="*",
        metavar="FILE or KEY=VALUE",
        help="a YAML file with settings: (for all runs) and over: (lists to combine); "
        + settings_help,
    )
    sweep.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="vary a setting; several --over are combined",
    )
    sweep.add_argument("--conf", help="experiment in conf/, or a YAML file")
    sweep.add_argument("--engine", help="auto, ray, process or batched; the same as engine=")
    sweep.add_argument("--out", type=Path, help="where the runs' folders and the tables go")

    compare = commands.add_parser(
        "compare",
        help="every method on the same partitions and seeds, in one table with the paper's figures",
        description="Runs what is not done yet, then writes compare.md. Stop it and start it again "
        "whenever you like.",
    )
    compare.add_argument("--conf", help="experiments, separated by commas; default: all compare-*")
    compare.add_argument("--methods", help="separated by commas; default: all")
    compare.add_argument(
        "--seeds", help="separated by commas; default: 0,1,2 for the main methods, else 0"
    )
    compare.add_argument("--out", type=Path, default=Path("results/compare"), help="where to")

    tune = commands.add_parser(
        "tune",
        help="choose methods' main settings on validation images, and keep them in the experiment",
        description="Runs a small grid for each method, then writes the chosen values into the "
        "experiment's YAML file and the search's results beside it.",
    )
    tune.add_argument("--conf", required=True, help="experiment in conf/, or a YAML file")
    tune.add_argument("--methods", help="separated by commas; default: all that can be tuned")
    tune.add_argument("--out", type=Path, help="where the runs go; default: results/tune-CONF")
    for many in (compare, tune):
        many.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=settings_help)
    for many in (sweep, compare, tune):
        many.add_argument("--jobs", type=int, help="runs at a time; default: as the cores allow")
        many.add_argument("--app", type=Path, default=APP_DIR, help="folder of the Flower app")

    make_keys = commands.add_parser(
        "keys", help="make a deployment's keys and certificates", description=_KEYS
    )
    make_keys.add_argument("folder", type=Path, help="where to, for instance keys")
    make_keys.add_argument(
        "--host",
        action="append",
        required=True,
        help="name or address by which nodes reach the SuperLink; may be given again",
    )
    make_keys.add_argument("--nodes", type=int, required=True, help="how many SuperNodes there are")
    make_keys.add_argument("--days", type=int, default=365, help="how long certificates are good")

    doctor = commands.add_parser(
        "doctor", help="check a node's versions, data, keys and connection before a run"
    )
    doctor.add_argument("--dataset", default="", help="the node's data: imagefolder:PATH, …")
    doctor.add_argument("--data-dir", default="", help="where other data sets lie")
    doctor.add_argument("--image-size", type=int, default=0, help="the run's image-size")
    doctor.add_argument("--superlink", default="", help="HOST:PORT")
    doctor.add_argument("--root-certificates", default="", help="the authority's certificate")
    doctor.add_argument("--auth-supernode-private-key", default="", help="the node's key")
    doctor.add_argument("--state-dir", default="", help="the node's state-dir")

    rehearse = commands.add_parser(
        "rehearse",
        help="a whole deployment on this machine: TLS, keys, SuperNodes with data of their own",
    )
    rehearse.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=settings_help)
    rehearse.add_argument("--nodes", type=int, default=3, help="how many SuperNodes; default: 3")
    rehearse.add_argument("--app", type=Path, default=APP_DIR, help="folder of the Flower app")

    listed = commands.add_parser(
        "settings",
        help="print settings, their defaults and meaning; with --conf, what a run would have",
    )
    listed.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a method, a section of the run's (data, training, …) or a setting; all if none",
    )
    listed.add_argument("--conf", help="experiment in conf/, or a YAML file")

    draw = commands.add_parser("partition", help="draw who holds which classes")
    draw.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=settings_help)
    draw.add_argument("--conf", help="experiment in conf/, or a YAML file")
    draw.add_argument("--out", type=Path, default=Path("partition.png"), help="the picture")
    return parser


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # settings may stand before and after options, which argparse's subcommands cannot mix
    options, rest = parser.parse_known_args(arguments)
    plain = not hasattr(options, "settings")  # a command without settings
    if plain or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.settings += rest
    return options


def main(arguments: list[str] | None = None, server: Server | None = None) -> int:
    """Run the command.

    Args:
        server: for a run, one that has been started already.

    Returns:
        the exit status: 0 done, 1 the run failed, 2 refused.
    """
    options = _options(arguments)
    # a background job has SIGINT ignored, and SIGTERM must stop what was started, too
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may have no letter for ±
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _carry_out(options, server)
        sys.stdout.flush()
        return status
    except (ConfigError, DataError) as error:
        print(f"pfedgpa: {error}", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"pfedgpa: {error}", file=sys.stderr)
        return 1
    except StoppedError as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        if options.command != "rehearse":  # whose nodes are gone
            words = sys.argv[1:] if arguments is None else arguments
            print(f"to go on: {_again(options.command, words, stop.folder)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        print(f"pfedgpa: there is not enough memory for these settings: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"pfedgpa: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _again(command: str, words: list[str], folder: Path) -> str:
    """By what a command goes on that was given as ``words`` and stopped."""
    if command == "run":
        words = [word for word in words if not word.startswith(("run-name=", "resume="))]
        words += [f"run-name={folder.name}", "resume=true"]
    return shlex.join(["pfedgpa", *words])


def _carry_out(options: argparse.Namespace, server: Server | None) -> int:
    if options.command == "settings":
        return _print_settings(options.names, options.conf)
    if options.command == "keys":
        return _keys(options)
    if options.command == "doctor":
        return _doctor(options)
    files = [word for word in options.settings if "=" not in word and word.endswith(YAML)]
    words = [word for word in options.settings if word not in files]
    if options.command != "sweep":
        files, words = [], options.settings
    overrides = parse_overrides(words + getattr(options, "run_config", []))
    if options.command == "compare":
        return _compare(overrides, options)
    if options.command == "tune":
        return _tune(overrides, options)
    if options.command == "rehearse":
        return _rehearse(overrides, options)
    if options.conf:
        overrides["conf"] = options.conf
    if getattr(options, "engine", None):
        overrides["engine"] = options.engine
    if options.command == "partition":
        return _draw_partition(overrides, options.out)
    if options.command == "sweep":
        return _sweep(overrides, [Path(file) for file in files], options)
    _end_with_parent()
    return _run(overrides, options.app.absolute(), server)


def _print_settings(names: list[str], conf: str | None) -> int:
    chosen = [key for name in names for key in keys_of(name)] if names else list(keys().values())
    here = resolve({"conf": conf}).as_dict() if conf else {}
    for key in {key.name: key for key in chosen}.values():
        value = here[key.name]["value"] if conf else key.default
        value = "auto" if value is None else value
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        source = f"  [{here[key.name]['from']}]" if conf else ""
        choices = f" ({', '.join(key.rules['choices'])})" if key.rules["choices"] else ""
        print(f"{key.name} = {value!r}{source}\n    {key.rules['help']}{choices}")
    return 0


def _draw_partition(overrides: dict[str, Any], out: Path) -> int:
    import numpy as np

    from pfedgpa_app.data.client import load_dataset, load_partition
    from pfedgpa_app.results.plots import partition

    config = resolve(overrides).config
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


def _check_folder(folder: Path) -> None:
    """Refuse what cannot be made a folder to write to."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: nothing can be written there: {there} is no folder of yours")


def _run(overrides: dict[str, Any], app: Path, server: Server | None) -> int:
    with contextlib.ExitStack() as stack:
        flower = None
        if overrides.get("engine") == "ray":  # it comes up while we import and check
            from pfedgpa_app.engine.ray import Simulation

            flower = stack.enter_context(Simulation())
        from pfedgpa_app.run.launcher import launch

        launch(overrides, app, flower=flower, server=server)
    return 0


_KEYS = """Makes an authority (ca.key stays here, ca.crt goes to every node), the SuperLink's
certificate (server.crt, server.key) and a key for each SuperNode (node-0 goes to its node,
node-0.pub to the SuperLink)."""


def _keys(options: argparse.Namespace) -> int:
    from pfedgpa_app.deployment import keys as made

    _check_number("--nodes", options.nodes, 100_000)
    _check_number("--days", options.days, 100 * 366)
    _check_folder(options.folder)
    for path in made.make(options.folder, options.host, options.nodes, options.days):
        print(path)
    return 0


def _check_number(option: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ConfigError(f"{option} {value}: must be >= 1 and <= {most}")


def _doctor(options: argparse.Namespace) -> int:
    from pfedgpa_app.deployment.doctor import Node, examine

    if options.dataset:
        require_dataset(options.dataset, "--dataset")
    if options.image_size:
        _check_number("--image-size", options.image_size, 10_000)
    node = Node(
        dataset=options.dataset,
        data_dir=options.data_dir,
        image_size=options.image_size,
        superlink=options.superlink,
        certificates=options.root_certificates,
        key=options.auth_supernode_private_key,
        state_dir=options.state_dir,
    )
    healthy = True
    for name, good, text in examine(node):
        print(f"{'ok  ' if good else 'FAIL'}  {name:<12} {text}", flush=True)
        healthy &= good
    return 0 if healthy else 1


def _rehearse(overrides: dict[str, Any], options: argparse.Namespace) -> int:
    from pfedgpa_app.deployment.rehearsal import rehearse

    _check_number("--nodes", options.nodes, 1000)
    rehearse(options.nodes, overrides, options.app.absolute())
    return 0


def _sweep(overrides: dict[str, Any], files: list[Path], options: argparse.Namespace) -> int:
    from pfedgpa_app.study.sweep import read, sweep

    settings: dict[str, Any] = {}
    over: dict[str, list[Any]] = {}
    for file in files:
        shared, varied = read(file)
        settings, over = settings | shared, over | varied
    over |= _varied(options.over)
    if not over:
        raise ConfigError("nothing to sweep over: give a file with over:, or --over KEY=V1,V2")
    name = files[0].stem if files else "sweep"
    out = options.out or Path("results") / name
    _check_runs(settings | overrides | over, options, out)
    done = sweep(settings | overrides, over, out, options.app.absolute(), options.jobs)
    return 0 if done else 1


def _varied(texts: list[str]) -> dict[str, list[Any]]:
    """What ``--over`` says: {setting: its values}."""
    over: dict[str, list[Any]] = {}
    for text in texts:
        key, found, values = text.partition("=")
        if not found:
            raise ConfigError(f"--over {text!r}: wants KEY=V1,V2")
        known(key, "--over")
        if key in over:
            raise ConfigError(f"--over {key}: is given twice")
        over[key] = [_value(key, value) for value in _items(f"--over {key}", values)]
    return over


def _items(option: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        raise ConfigError(f"{option} {text!r}: wants at least one value, separated by commas")
    return items


def _check_runs(settings: dict[str, Any], options: argparse.Namespace, out: Path) -> None:
    """Refuse what many runs cannot have."""
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: must be >= 1")
    for key in ("out-dir", "run-name"):
        if key in settings:
            raise ConfigError(f"{key}: many runs' folders are named for them; use --out")
    _check_folder(out)


def _refuse_as_settings(settings: dict[str, Any], options: dict[str, str]) -> None:
    """Refuse as settings what a command's options say, {setting: option}."""
    for key, option in options.items():
        if key in settings:
            raise ConfigError(f"{key}: use {option}")


def _compare(overrides: dict[str, Any], options: argparse.Namespace) -> int:
    from pfedgpa_app.core.files import write_text
    from pfedgpa_app.study.compare import EXPERIMENTS, plan, report
    from pfedgpa_app.study.sweep import run_sweep

    _check_runs(overrides, options, options.out)
    varied = {"conf": "--conf", "method": "--methods", "seed": "--seeds"}
    _refuse_as_settings(overrides, varied)
    experiments = EXPERIMENTS if options.conf is None else _items("--conf", options.conf)
    methods = None if options.methods is None else _items("--methods", options.methods)
    seeds = None if options.seeds is None else _seeds(options.seeds)
    runs = plan(experiments, methods, seeds, overrides, options.out)
    try:
        done = run_sweep(runs, options.out, options.app.absolute(), options.jobs)
    finally:
        if text := report(options.out):
            write_text(options.out / "compare.md", text)
    print(text)
    return 0 if done else 1


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in _items("--seeds", text)]
    except ValueError as error:
        raise ConfigError(f"--seeds {shown(text)}: wants whole numbers") from error


def _tune(overrides: dict[str, Any], options: argparse.Namespace) -> int:
    from pfedgpa_app.study.tune import tunable, tune

    out = options.out or Path("results") / f"tune-{Path(options.conf).stem}"
    _check_runs(overrides, options, out)
    _refuse_as_settings(overrides, {"conf": "--conf", "method": "--methods"})
    config = resolve({"conf": options.conf}).config
    methods = tunable(config)
    if options.methods is not None:
        methods = _items("--methods", options.methods)
    # what can be repeated elsewhere: no paths of this machine
    words = [f"--conf {Path(options.conf).stem}", f"--methods {','.join(methods)}"]
    words += [f"{key}={value}" for key, value in overrides.items() if key != "data-dir"]
    command = " ".join(["pfedgpa tune", *words])
    app = options.app.absolute()
    chosen = tune(options.conf, methods, overrides, out, app, options.jobs, command)
    for key, value in chosen.items():
        print(f"{key} = {value}")
    return 0


def _end_with_parent() -> None:
    """A run that a sweep started stops when the sweep is gone, however it went."""
    import threading
    import time

    from pfedgpa_app.engine import PARENT

    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    raise SystemExit(main())
