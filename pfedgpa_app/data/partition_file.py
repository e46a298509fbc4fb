"""Read a partition from the user's file: JSON or CSV that maps samples to clients."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pfedgpa_app.core.sections import PARTITION_FILE
from pfedgpa_app.core.settings import ConfigError, listed, shown

Entry = tuple[str, str, str]  # place in the file, for messages; sample; client
_HOW = "give the client's number, from 0, or a name to every client"


def by_file(
    path: Path, train: np.ndarray, test: np.ndarray, num_clients: int
) -> list[list[np.ndarray]]:
    """Return the indices of each client's samples, by split, as the file deals them.

    Samples that it does not name are nobody's. Their names are compared in composed Unicode: macOS
    lists "ä" as two characters, other systems and editors write one.

    Args:
        path: a JSON object {sample: client}, or CSV with the columns sample and client.
        train: the names of the training samples; ``test``: of the test samples.

    Raises:
        ConfigError: the file cannot be read, names an unknown sample or gives one to two clients,
            names other clients than 0 to ``num_clients - 1`` or more or fewer by name, or leaves a
            client without a training or a test sample.
    """
    where = f"partition = {PARTITION_FILE}{path}"
    place = _places(where, [*train, *test])
    entries = [*_entries(where, path)]
    names = _names(entries)
    owners = _owners(where, entries, names, place)
    owner = np.full(len(place), -1)
    for sample, client in owners.items():
        owner[place[sample]] = client
    _require_clients(where, owners, names, num_clients)
    parts = np.split(owner, [len(train)])
    splits = [[np.flatnonzero(part == client) for client in range(num_clients)] for part in parts]
    _require_both_kinds(where, splits, (train, test), names)
    return splits


def names_in(path: Path) -> list[str]:
    """Return the clients' names in a partition file, in the clients' order; [] for numbers alone.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _names(_entries(f"partition = {PARTITION_FILE}{path}", path))


def _names(entries: Iterable[Entry]) -> list[str]:
    """Return the clients' names, sorted; [] if they are given by their numbers.

    Raises:
        ConfigError: some have names and some have numbers, or one has neither.
    """
    names, numbered = dict[str, str](), False
    for at, sample, client in entries:
        if re.fullmatch(r"[0-9]{1,9}", client):
            numbered = True
            continue
        wrong = f"{at}: gives {shown(sample)} to {shown(client)}: {_HOW}"
        if not client or is_number(client):
            raise ConfigError(wrong)
        names.setdefault(client, wrong)
    if names and numbered:
        raise ConfigError(next(iter(names.values())))
    return sorted(names)


def is_number(text: str) -> bool:
    """Whether ``text`` is a number of any kind, or stands for one that is missing, as nan."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _called(client: int, names: Sequence[str]) -> str:
    """Return what the file calls a client: its number or, if clients have ``names``, its name."""
    return shown(names[client]) if names else str(client)


def _places(where: str, names: Sequence[str]) -> dict[str, int]:
    """Return each sample's place in the data set, by its name in composed Unicode.

    Raises:
        ConfigError: two samples' names differ only in their form of Unicode.
    """
    places: dict[str, int] = {}
    for i, name in enumerate(names):
        if places.setdefault(_composed(name), i) != i:
            raise ConfigError(
                f"{where}: the data set has two samples that read {str(name)!r}, in composed and "
                "in decomposed Unicode: rename one"
            )
    return places


def _composed(name: str) -> str:
    """Return ``name`` with one character for a letter and its accents."""
    return unicodedata.normalize("NFC", str(name))


def _require_clients(
    where: str, owners: Mapping[str, int], names: Sequence[str], num_clients: int
) -> None:
    """Check that the file names all clients from 0 to ``num_clients - 1`` and no others.

    Raises:
        ConfigError: it says how many the file names, or which number is missing.
    """
    sample, last = max(owners.items(), key=lambda entry: entry[1])
    named = {*owners.values()}
    missing = next(client for client in range(last + 2) if client not in named)
    if missing < last:
        raise ConfigError(
            f"{where}: gives {shown(sample)} to client {last}, but nothing to client {missing}: "
            "number clients from 0 without a gap"
        )
    if missing != num_clients:
        clients = f"clients 0 to {last}" if last else "client 0 alone"
        if names:
            clients = f"as clients {listed(names)}"
        raise ConfigError(
            f"{where}: the file names {clients}, but num-clients is {num_clients}: set "
            f"num-clients={missing}"
        )


def _require_both_kinds(
    where: str,
    splits: Sequence[Sequence[np.ndarray]],
    samples: Sequence[np.ndarray],
    names: Sequence[str],
) -> None:
    """Check that every client has a sample to train on and one to be tested on.

    Args:
        splits: the indices of each client's samples, in the training and in the test split.
        samples: the names of all samples in the training and in the test split.
        names: the clients', if they have any.

    Raises:
        ConfigError: it says which kind a client lacks, and which samples of that kind are free.
    """
    for client, (train, test) in enumerate(zip(*splits, strict=True)):
        if len(train) and len(test):
            continue
        lacks, verb = ("test", "be tested") if len(train) else ("training", "train")
        kind = ("training", "test").index(lacks)
        left = np.delete(samples[kind], np.concatenate(splits[kind]))[:3]
        which = (
            f"such as {', '.join(map(repr, left.tolist()))}" if len(left) else "which others hold"
        )
        why, instead = "", ""
        if not str(samples[0][0]).startswith("train/"):  # as where the source has both splits
            why = " (test-share decided which are which, the same in every run)"
            instead = ", or make a test split yourself (docs/own.md)"
        raise ConfigError(
            f"{where}: client {_called(client, names)} would have no image to {verb} on: the file "
            f"gives it {len(train)} training and {len(test)} test samples{why}: give it a {lacks} "
            f"sample, {which}{instead}"
        )


def _owners(
    where: str, entries: Iterable[Entry], names: Sequence[str], known: Collection[str]
) -> dict[str, int]:
    """Return {sample: client's number}, with the samples' names in composed Unicode.

    Args:
        names: the clients', in their order, if they have any.

    Raises:
        ConfigError: the file names no sample, one that is not ``known`` or one for two clients.
    """
    owners: dict[str, int] = {}
    numbers = {name: number for number, name in enumerate(names)}
    for at, sample, client in entries:
        name = _composed(sample)
        if name not in known:
            raise ConfigError(
                f"{at}: names the sample {shown(sample)}, which the data set lacks; it has "
                f"{', '.join([*known][:3])}, …"
            )
        number = numbers[client] if names else int(client)
        owner = owners.setdefault(name, number)
        if owner != number:
            ours, theirs = _called(number, names), _called(owner, names)
            raise ConfigError(
                f"{at}: gives {shown(sample)} to client {ours}, and earlier to client {theirs}: a "
                "sample belongs to one client, delete one of the two"
            )
    if not owners:
        raise ConfigError(f"{where}: names no sample")
    return owners


def _entries(where: str, path: Path) -> Iterator[Entry]:
    """Return all that a partition file says, in its order, with duplicates.

    Raises:
        ConfigError: it cannot be read, is not in UTF-8, or is neither the JSON nor the CSV wanted.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{where}, line {line}: is not in UTF-8: save it as UTF-8 (in Excel, as CSV UTF-8)"
        ) from error
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    for at, sample, client in (_json_entries if is_json else _csv_entries)(where, text):
        yield at, sample, _composed(client.strip())


def _json_entries(where: str, text: str) -> Iterator[Entry]:
    """Yield the entries of a JSON object {sample: client}.

    Raises:
        ConfigError: the text is no such object, or names a client by neither number nor text.
    """
    try:
        found = json.loads(text, object_pairs_hook=tuple)  # a dict would hide duplicate keys
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(found, tuple):
        raise ConfigError(f'{where}: must be a JSON object, as in {{"cat/1.jpg": 0}}')
    for sample, client in found:
        if isinstance(client, bool) or not isinstance(client, (int, str)):
            raise ConfigError(f"{where}: gives {shown(sample)} to {shown(client)}: {_HOW}")
        yield where, sample, str(client)


def delimiter_of(line: str) -> str:
    """Return what separates a CSV file's cells: the most frequent of comma, semicolon and tab.

    Excel writes semicolons in countries with decimal commas.
    """
    return max(",;\t", key=line.count)


def _csv_entries(where: str, text: str) -> Iterator[Entry]:
    """Yield the entries of CSV with the columns sample and client.

    Raises:
        ConfigError: it has no such columns, or a quotation mark at a wrong place.
    """
    first = next(iter(text.splitlines()), "")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(first), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if [header.count(name) for name in ("sample", "client")] != [1, 1]:
            raise ConfigError(
                f"{where}, line 1: has the columns {shown(first)}, but must have sample and "
                "client, separated by comma, semicolon or tab; or use a JSON object"
            )
        for row in filter(any, rows):
            cells = dict(zip(header, row, strict=False))
            at = f"{where}, line {rows.line_num}"
            yield at, cells.get("sample", ""), cells.get("client", "").strip()
    except csv.Error as error:
        raise ConfigError(f"{where}, line {rows.line_num}: is not valid CSV: {error}") from error
