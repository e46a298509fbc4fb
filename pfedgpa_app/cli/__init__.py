"""The ``pfedgpa`` command: a module for each subcommand, with its parser, help and an example."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pfedgpa_app import __version__
from pfedgpa_app.cli import (
    app,
    compare,
    doctor,
    evaluate,
    export,
    export_metrics,
    inspect,
    keys,
    partition,
    predict,
    rehearse,
    report,
    reproduce,
    run,
    settings,
    sweep,
    tune,
)
from pfedgpa_app.core.settings import ConfigError, DataError, closest
from pfedgpa_app.engine import LaunchError, StoppedError


class Command(Protocol):
    """What a subcommand's module provides; its docstring is the subcommand's help."""

    EXAMPLE: str  # the command line after ``pfedgpa``

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's options and arguments to its parser."""

    def handle(self, options: argparse.Namespace) -> int:
        """Run the subcommand; return the exit status."""


COMMANDS: dict[str, Command] = {
    "run": run,
    "report": report,
    "inspect": inspect,
    "predict": predict,
    "evaluate": evaluate,
    "export": export,
    "export-metrics": export_metrics,
    "sweep": sweep,
    "compare": compare,
    "tune": tune,
    "reproduce": reproduce,
    "keys": keys,
    "doctor": doctor,
    "rehearse": rehearse,
    "app": app,
    "settings": settings,
    "partition": partition,
}


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Have the first signal in the block stop it.

    The next two do not disturb it while it ends what it has started: `timeout` sends two.
    """
    calls = itertools.count()

    def stop(*_: object) -> None:
        if next(calls) not in (1, 2):
            raise KeyboardInterrupt

    # a background job ignores SIGINT, and SIGTERM must stop the started processes, too
    signs = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signs.append(signal.SIGHUP)  # the terminal is closed, and nohup did not start us
    before = {sign: signal.signal(sign, stop) for sign in signs}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler or signal.SIG_DFL)


@_stoppable()
def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        the exit status: 0 done, 1 the run failed, 2 refused, 130 stopped by the user.
    """
    options = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack ±
        sys.stdout.reconfigure(errors="replace")
    try:
        status = COMMANDS[options.command].handle(options)
        if sys.stdout:  # it may have been closed from the start
            sys.stdout.flush()
        return status
    except (ConfigError, DataError) as error:
        return _failed(str(error), 2, options.debug)
    except LaunchError as error:
        return _failed(str(error), 1, options.debug)
    except StoppedError as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        if options.command != "rehearse":  # its nodes are gone
            words = sys.argv[1:] if arguments is None else arguments
            print(_again(options.command, words, stop.folder), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        why = f"there is not enough memory for these settings: {error}"
        return _failed(why, 1, options.debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", 1, options.debug)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options on the command line, and ``command``; end the process if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="pfedgpa", description="Personalised federated learning by generated weights."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        text = command.__doc__ or ""
        own = commands.add_parser(
            name,
            help=text.partition("\n\n")[0],
            description=text,
            epilog=f"example: pfedgpa {command.EXAMPLE}",
        )
        command.add_options(own)
        own.add_argument("--debug", action="store_true", help="also show an error's traceback")
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    # words may come before and after options, which argparse's subcommands cannot mix
    options, rest = parser.parse_known_args(arguments)
    into = getattr(options, "words", "")  # the option that takes any number of words
    if rest and (not into or any(word.startswith("-") for word in rest)):
        own = commands.choices[options.command]
        own.error(_unknown(rest, own))
    if rest:
        setattr(options, into, [*getattr(options, into), *rest])
    return options


def _unknown(words: list[str], own: argparse.ArgumentParser) -> str:
    """Say why a command refuses ``words`` that it does not know, and what may be meant."""
    word = next((word for word in words if word.startswith("-")), words[0])
    if not word.startswith("-"):
        return f"{word}: unexpected argument"
    name = word.lstrip("-").partition("=")[0]
    if meant := closest(name, re.findall(r"--([a-z-]+)", own.format_help())):
        return f"{word}: no such option; did you mean --{meant}?"
    if own.get_default("words") == "settings":
        from pfedgpa_app.config.names import in_full, keys

        if meant := closest(in_full(name), keys()):
            return f"{word}: no such option; settings are given without --: {meant}=VALUE"
    return f"{word}: no such option; all options: {own.prog} --help"


def _failed(why: str, status: int, debug: bool) -> int:
    """Print why the command failed, and return ``status``; call it while the error is handled."""
    if debug:
        traceback.print_exc()
    print(f"pfedgpa: {why}", file=sys.stderr)
    return status


def _again(command: str, words: list[str], folder: Path) -> str:
    """Say which command continues a stopped one, which was given as ``words``."""
    what = "to continue"
    if command == "run":
        from pfedgpa_app.cli.options import split
        from pfedgpa_app.runs.checkpoint import has_checkpoint

        words = [word.removeprefix("--run-config=") for word in words]
        words = [word for word in words if word not in ("-c", "--run-config")]  # for settings alone
        words = [part for word in words for part in (split(word) if "=" in word else [word])]
        words = [word for word in words if not word.startswith(("run-name=", "resume="))]
        words += [f"run-name={folder.name}", "resume=true"]
        if not has_checkpoint(folder):
            what = "to start again (it kept no checkpoint)"
    return f"{what}: {shlex.join(['pfedgpa', *words])}"
