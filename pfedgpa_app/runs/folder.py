"""A run's folder: which run it belongs to, and which process is writing to it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pfedgpa_app.config.names import is_idle, keys, method_named
from pfedgpa_app.config.resolve import Resolved, differences, files_of, resolve, values_of
from pfedgpa_app.core.files import write_json
from pfedgpa_app.core.own_code import digest, still_there
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, DataError, closest, listed, shown
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.data.client import (
    alike,
    class_counts,
    fingerprint,
    load_schema,
    users_of_clients,
)
from pfedgpa_app.diffusion import saved
from pfedgpa_app.results import uploads
from pfedgpa_app.results.log import CLIENTS, EVENTS, METRICS, SUMMARY, Records, last_event
from pfedgpa_app.runs.about import MODEL, WEIGHTS, runs_below
from pfedgpa_app.runs.checkpoint import CHECKPOINT, has_checkpoint
from pfedgpa_app.server.privacy import FILE as ASKED

CONFIG, LOG, LOCK = "config.json", "flower.log", ".lock"
HOLDINGS = "holdings.json"  # who every client is, and how many examples of each class it holds
USERS = "users"  # the entry with the names of each client's users
_BEFORE = {LOG, LOCK}  # files that can be there before the settings
_EARLY = {CONFIG, EVENTS, HOLDINGS, MODEL, WEIGHTS, ASKED}  # those before a round's records
_RESULTS = {METRICS, CLIENTS, SUMMARY, CHECKPOINT, uploads.FILE, saved.FILE}
NODE_LOG = "node-{}.log"  # what a rehearsal's node said


@contextlib.contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when this process is gone.

    Args:
        taken: the error's text if the lock is not free.

    Raises:
        ConfigError: another process holds the lock.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1)  # another process may hold it briefly, in is_running
    except Timeout as error:
        raise ConfigError(taken) from error
    try:
        yield
    finally:
        lock.release()


def keep_holdings(folder: Path, config: Config) -> None:
    """Write how many examples of each class every client holds, and which users it is, if any.

    Raises:
        DataError: as ``check_unchanged`` and ``check_uploads``.
    """
    check_unchanged(folder, config)
    check_uploads(config)
    held = {
        "classes": load_schema(config).classes,
        "train": class_counts(config),
        "data": fingerprint(config),
        "files": _digests(config),
    }
    if users := users_of_clients(config):
        held[USERS] = users
    write_json(folder / HOLDINGS, held)


def check_unchanged(folder: Path, config: Config) -> None:
    """Refuse to resume the run in ``folder`` if its data, or files that settings name, changed.

    Raises:
        DataError: they have.
    """
    if config.resume:  # otherwise an earlier run here trained nobody, maybe with other settings
        check_data(folder, config)
        check_files(folder, config)


def check_uploads(config: Config) -> None:
    """Refuse saved uploads of clients whose data were others than they are now.

    With other data, clients could be tested on examples that were trained on.

    Raises:
        DataError: they were.
    """
    if config.uploads:
        path = user_path(config.uploads)
        held = uploads.holdings_in(path) or holdings(path.parent)  # earlier versions: only beside
        _check_held(held, f"the run of {path}", config)


def check_data(folder: Path, config: Config) -> None:
    """Refuse data other than those of the run in ``folder``, as far as it kept a record of them.

    Raises:
        DataError: the data have changed, or are dealt to clients otherwise.
    """
    _check_held(holdings(folder), str(folder), config)


def _check_held(held: Mapping[str, Any], source: str, config: Config) -> None:
    """Refuse data other than ``held``, the record of the run that ``source`` names."""
    # runs of earlier versions did not keep everything
    if "data" in held and not alike(fingerprint(config), held["data"]):
        raise DataError(
            f"dataset {config.dataset}: the data have changed since {source} began: restore them, "
            "or run anew"
        )
    if "train" in held and held["train"] != class_counts(config):
        raise DataError(
            f"{source}: its clients held other examples than they would now: an earlier version "
            "dealt them differently, or its partition's file has changed since; run it anew, or "
            "name labelled data (pfedgpa evaluate RUN DATASET)"
        )


def check_files(folder: Path, config: Config) -> None:
    """Refuse other contents of the files that settings name than the run in ``folder`` found.

    Raises:
        DataError: a file has changed.
    """
    kept, now = holdings(folder).get("files", {}), _digests(config)
    for name, path in files_of(config).items():
        if name in kept and kept[name] != now.get(name):
            raise DataError(
                f"{name} = {path!r}: the file has changed since {folder} began: restore it, or run "
                "anew"
            )


def _digests(config: Config) -> dict[str, str]:
    files = {name: saved.file_at(path) for name, path in files_of(config).items()}
    return {name: digest(file) for name, file in files.items() if file.is_file()}


def holdings(folder: Path) -> dict[str, Any]:
    """Return what ``keep_holdings`` wrote for the run in ``folder``; {} if it wrote nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / HOLDINGS
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError("it holds no record of the run's data")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}: put it back, or run anew") from error
    return held


def client_called(folder: Path, client: int | str) -> int:
    """Return the number of the client that has this number or, if none has, a user of this name.

    A text that is one client's number and the name of another's user is taken with a warning.

    Raises:
        ConfigError: there is no such client, or the folder is not a run's.
    """
    count, called = values_of(kept_settings(folder))["num-clients"], str(client)
    users: list[list[str]] = holdings(folder).get(USERS, [])  # earlier versions did not keep them
    numbers = {name: number for number, names in enumerate(users) for name in names}
    if called in map(str, range(count)):
        other = numbers.get(called, int(called))
        if isinstance(client, str) and other != int(called):
            warn_once(
                f"{folder}: client {called} is user {listed(users[int(called)], 3)}; for user "
                f"{called}, give its client's number, {other}"
            )
        return int(called)
    if called in numbers:
        return numbers[called]
    if re.fullmatch(r"\+?[0-9]{1,9}", called) and int(called) < count:
        return int(called)
    there = f"there are 0 to {count - 1}"
    if numbers:
        there += f", by their users' names {listed(sorted(numbers))}"
    meant = closest(called, numbers)
    raise ConfigError(
        f"{folder}: has no client {called if called.isdecimal() else shown(client)}; {there}"
        + (f"; did you mean {meant}?" if meant else "")
    )


def is_running(folder: Path) -> bool:
    """Whether a process is writing to ``folder``, which is a run's."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True


def unfinished(folder: Path) -> str:
    """Say, in a sentence, what became of the run in ``folder`` if it is not done; "" if it is."""
    end = last_event(folder)
    if end.get("kind") == "done":
        return ""
    how = "was interrupted"
    if is_running(folder):
        how = "is still running"
    elif end.get("kind") == "failed":
        how = f"failed ({end['text']})"
    return f"{folder} {how}: its results cover only the methods that are done"


def running(folder: Path) -> str:
    """Say which run is going on in ``folder``, as its log tells, and what to do."""
    starts = [event for event in Records(folder / EVENTS).new() if event.get("kind") == "start"]
    start, said = (starts or [{}])[-1], last_event(folder).get("text", "nothing yet")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.get("time")))
    who = f"process {start['process']}, since {since}" if "process" in start else "it just began"
    return (
        f"{folder}: a run is going on there ({who}; its last message: {said!r}): "
        "wait until it ends, stop it, or choose another run-name"
    )


def kept_settings(folder: Path) -> dict[str, Any]:
    """Return {setting: {"value": …, "from": …}} of the run in ``folder``.

    Raises:
        ConfigError: its ``config.json`` cannot be read, or is not a run's.
    """
    path = folder / CONFIG
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if several := runs_below(folder):
            raise ConfigError(f"{folder}: {several}") from error
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(kept, dict) or not all(isinstance(e, dict) for e in kept.values()):
        raise ConfigError(f"{path} does not hold a run's settings: choose another folder")
    if "value" not in kept.get("method", {}):
        raise ConfigError(f"{path} names no method: it is not a run's, or is damaged")
    if code := kept.get("code-dir"):
        model = str(kept.get("model", {}).get("value", ""))
        code["value"] = still_there(str(code.get("value", "")), model)
    return kept


def kept_methods(folder: Path) -> list[str]:
    """Return the names of the methods of the run in ``folder``.

    Methods of the user's own are imported, so that they are known from now on.

    Raises:
        ConfigError: as ``kept_settings``.
    """
    kept = kept_settings(folder)
    code_dir = str(kept.get("code-dir", {}).get("value", ""))
    return [method_named(str(name), code_dir) for name in kept["method"]["value"]]


def kept_config(folder: Path) -> Config:
    """Resolve the configuration of the run in ``folder`` again.

    Raises:
        ConfigError: as ``kept_settings``, or the settings are of another version.
    """
    kept = values_of(kept_settings(folder))
    run = Config(method=tuple(kept_methods(folder)), partition=kept["partition"])
    read = {
        name: value
        for name, value in kept.items()
        if name in keys() and value != [] and not is_idle(keys()[name], run)
    }
    return resolve(read | {"conf": ""}).config


def is_foreign(folder: Path) -> bool:
    """Whether ``folder`` holds files, but is no run's folder."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return CONFIG not in names and not names <= _BEFORE


def _is_early(path: Path) -> bool:
    """Whether a run writes the file or folder at ``path`` before its first round has ended."""
    if path.name == CHECKPOINT:  # what clients keep
        return not has_checkpoint(path.parent)
    return path.name in _EARLY or bool(re.fullmatch(NODE_LOG.format(r"\d+"), path.name))


def _free(folder: Path, name: str) -> None:
    """Remove what a run that failed before its first round's end has written to ``folder``.

    What is left would make it a foreign folder to the next process that asks for it.

    Raises:
        ConfigError: the run there has results, or the folder also holds something else.
    """
    names = {path.name for path in folder.iterdir() if not _is_early(path)} - _BEFORE
    failed = last_event(folder).get("kind") == "failed"
    if failed and names and not names & _RESULTS:
        raise ConfigError(
            f"run-name = {name!r}: the run in {folder} failed before its first round ended, but "
            f"{listed(sorted(names))} is there, too: remove that, or choose another name"
        )
    if not failed or names:
        raise ConfigError(
            f"run-name = {name!r}: {folder} holds another run's results; choose another name, or "
            "resume it with resume=true"
        )
    for path in filter(_is_early, folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run_folder(resolved: Resolved) -> Path:
    """Make the folder for the run's results and return its absolute path.

    It holds no results of another run, unless that run is to be resumed.

    Raises:
        ConfigError: a run to resume without a name, a name or a folder that cannot be used,
            another run's results, a run that is going on, or one to resume with other settings.
    """
    config = resolved.config
    if config.resume and not config.run_name:
        raise ConfigError("resume = true: give the run-name of the run to resume")
    out = user_path(config.out_dir).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = _named(out, config.run_name) if config.run_name else _new(out, config)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        _refuse(folder, resolved)
    except OSError as error:
        named = f", run-name = {config.run_name!r}" if config.run_name else ""
        raise ConfigError(
            f"out-dir = {config.out_dir!r}{named}: results cannot be written there: "
            f"{error.strerror}: {error.filename}"
        ) from error
    return folder


def _named(out: Path, name: str) -> Path:
    """Make the run's folder by the name that the user gave it."""
    if not name.strip() or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise ConfigError(
            f"run-name = {name!r}: must be the plain name of a folder in out-dir; set out-dir "
            "for another place"
        )
    (out / name).mkdir(exist_ok=True)
    return out / name


def _new(out: Path, config: Config) -> Path:
    """Make a new folder, named after the data set and the time; no two runs get the same one."""
    dataset = Path(config.dataset.replace(":", "-")).name
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    first = f"{dataset}-{config.num_clients}c-s{config.seed}-{stamp}"
    for name in itertools.chain([first], (f"{first}.{number}" for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):  # another run took this name in the same second
            (out / name).mkdir()
            break
    return out / name


def _refuse(folder: Path, resolved: Resolved) -> None:
    """Refuse a folder in which the run can neither begin nor go on; make it free for one."""
    name = resolved.config.run_name
    if is_running(folder):
        raise ConfigError(running(folder))
    written = all((folder / file).exists() for file in (EVENTS, METRICS))
    if resolved.config.resume and written and not (folder / CONFIG).exists():
        raise ConfigError(
            f"resume: {folder} has no {CONFIG}, which says how it was run so far: put it back, or "
            "run anew under another run-name"
        )
    if is_foreign(folder):
        raise ConfigError(
            f"run-name = {name!r}: {folder} is not empty and is not a run's folder: choose "
            "another name"
        )
    if not (folder / CONFIG).exists():
        return
    if not resolved.config.resume:
        _free(folder, name)
    elif other := differences(kept_settings(folder), resolved):
        raise ConfigError(f"resume: {folder} has other settings: {'; '.join(other)}")
