"""What one client holds, ready for training."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pfedgpa_app.core.paths import remembered, user_path
from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import NODES, PARTITION_FILE, DataSettings
from pfedgpa_app.core.settings import ConfigError, DataError, near
from pfedgpa_app.data import HUGGING_FACE, IMAGEFOLDER, is_own_code
from pfedgpa_app.data.dataset import Dataset
from pfedgpa_app.data.datasets import load
from pfedgpa_app.data.images import Images, images_of
from pfedgpa_app.data.partition import (
    ClientSplit,
    by_users,
    dominant_groups,
    partition,
    users_in_turn,
    with_validation,
)
from pfedgpa_app.data.partition_file import by_file, names_in
from pfedgpa_app.data.pictures import decoder

logger = logging.getLogger("pfedgpa")


@dataclass(frozen=True)
class ClientData:
    """One client's own images."""

    train: Images
    validation: Images
    test: Images


def schema_of(data: Dataset) -> Schema:
    """Return a data set's schema."""
    return Schema(data.name, data.classes, data.shape, data.tokens, data.pixels, data.columns)


def load_dataset(config: DataSettings) -> Dataset:
    """Load the run's data set, which all clients share.

    Raises:
        DataError: it is absent or unusable, lacks training examples of a class that is tested, or
            every node has its own.
    """
    if config.dataset == NODES:
        raise DataError(
            "dataset = nodes: every SuperNode brings its own data; start such a run with "
            "`pfedgpa app` and `flwr run` on a deployment (docs/deploy.md)"
        )
    data = _load(config, config.dataset)
    each = data.train_labels, data.test_labels
    learned, tested = (np.bincount(labels, minlength=len(data.classes)) for labels in each)
    if missing := np.flatnonzero((tested > 0) & (learned == 0)).tolist():  # a node's own data may
        raise DataError(
            f"dataset {data.name}: class {data.classes[missing[0]]!r} has test examples but "
            "no training examples: add some, or leave it out"
        )
    return data


def _load(config: DataSettings, name: str) -> Dataset:
    return load(
        name,
        config.data_dir,
        config.download,
        config.image_size,
        config.test_share,
        config.code_dir,
    )


def forget() -> None:
    """Have everything read anew: files may have changed since this process read them."""
    every = load, fingerprint, own_fingerprint, load_partition, users_of_clients
    for known in (*every, load_own_client, load_client):
        known.cache_clear()


Fingerprint = dict[str, int | str | list[float]]
_SEED = "fix the seed of what your code draws, as in default_rng(0)"


@remembered(2)
def fingerprint(config: DataSettings) -> Fingerprint:
    """Return a fingerprint by which another process recognises the run's data set."""
    return _fingerprint_of(load_dataset(config), config.dataset)


@remembered(2)
def own_fingerprint(config: DataSettings, source: str) -> Fingerprint:
    """Return a fingerprint by which a node recognises its own data; it stays on the node."""
    return _fingerprint_of(load_own(config, source), source)


def _fingerprint_of(data: Dataset, name: str) -> Fingerprint:
    """Return checksums of all labels and all examples, and 50 numbers a split.

    Of what code of the user's own makes, which may be rounded otherwise elsewhere, there is no
    checksum of the examples. For images it counts only where the same ``reader`` decodes them.
    """
    is_decoded = data.pixels and name.startswith((IMAGEFOLDER, HUGGING_FACE))
    labels = zlib.crc32(np.concatenate([data.train_labels, data.test_labels]).tobytes())
    examples, numbers = 0, list[float]()
    for images in (data.train_images, data.test_images):
        if images.size:
            places = np.linspace(0, images.size - 1, 50).astype(int)
            numbers += images.reshape(-1)[places].astype(float).tolist()
        if not is_own_code(name):
            examples = zlib.crc32(np.ascontiguousarray(images).data, examples)
    reader = decoder() if is_decoded else ""
    return {"labels": labels, "examples": examples, "numbers": numbers, "reader": reader}


def check_same(config: DataSettings, told: Mapping[str, Any]) -> None:
    """Refuse a data set other than the run's, whose ``fingerprint`` is ``told``.

    With another, clients would be tested on what others, or they themselves, have trained on.

    Raises:
        DataError: it is another.
    """
    if not alike(fingerprint(config), told):
        raise DataError(
            f"dataset {config.dataset}: differs from what the run's server has read: keep its "
            "files as they were, the same everywhere, and " + _SEED
        )


def check_own(config: DataSettings, source: str, told: Mapping[str, Any]) -> None:
    """Refuse a node's own data set if its ``own_fingerprint`` is no longer as ``told``.

    Raises:
        DataError: it is another.
    """
    if not alike(own_fingerprint(config, source), told):
        raise DataError(
            "this node's data differ from what it has read before in this run: keep its files as "
            "they were, and " + _SEED
        )


def alike(here: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same data."""
    if here["labels"] != told["labels"]:
        return False
    # runs of earlier versions kept neither of them, and few numbers
    if told.get("examples") and told["reader"] == here.get("reader"):
        return bool(here["examples"] == told["examples"])
    ours, theirs = (np.asarray(each["numbers"], dtype=float) for each in (here, told))
    if not theirs.size:
        return True
    near_enough = 0.02 * np.abs(theirs).max()
    return ours.shape == theirs.shape and bool((np.abs(ours - theirs) <= near_enough).all())


def load_schema(config: DataSettings) -> Schema:
    """Return the schema of the run's data set.

    Raises:
        DataError: as ``load_dataset``.
    """
    return schema_of(load_dataset(config))


@remembered(2)
def load_partition(config: DataSettings) -> list[ClientSplit]:
    """Make the run's partition, the same on every machine that has the data.

    Raises:
        DataError: the data set is absent or unusable, or has another number of groups than
            ``group-shares``.
        ValueError: the partition cannot be made of these data.
    """
    data = load_dataset(config)
    if config.partition == "natural":
        return _split(config, by_users(data.train_users, data.test_users, config.num_clients))
    if config.partition.startswith(PARTITION_FILE):
        train = _names(data.train_samples, data.train_labels, "train")
        test = _names(data.test_samples, data.test_labels, "test")
        return _split(config, by_file(_file_of(config), train, test, config.num_clients))
    groups = len(dominant_groups(len(data.classes)))
    if config.partition == "dominant" and len(config.group_shares) not in (0, groups):
        raise DataError(
            f"group-shares: names {len(config.group_shares)} groups, but {data.name} has {groups}"
        )
    return partition(data.train_labels, data.test_labels, data.classes, config)


@remembered(2)
def users_of_clients(config: DataSettings) -> list[list[str]]:
    """Return the names of each client's users; [] where clients are not users.

    A partition's file may name clients, each of which is then a user.

    Raises:
        ConfigError: the partition's file cannot be read.
        DataError: as ``load_dataset``.
    """
    if config.dataset == NODES:
        return []
    if config.partition.startswith(PARTITION_FILE):
        return [[name] for name in names_in(_file_of(config))]
    if config.partition != "natural":
        return []
    return users_in_turn(load_dataset(config).train_users, config.num_clients)


def _file_of(config: DataSettings) -> Path:
    """Return the path of the partition's file."""
    return user_path(config.partition.removeprefix(PARTITION_FILE))


def class_counts(config: DataSettings) -> list[list[int]]:
    """Count each client's training examples of each class, validation included."""
    data = load_dataset(config)
    held = [data.train_labels[split.held] for split in load_partition(config)]
    return [np.bincount(labels, minlength=len(data.classes)).tolist() for labels in held]


def _names(samples: np.ndarray, labels: np.ndarray, split: str) -> np.ndarray:
    """Return the samples' names; where they have none, their places, as in train/0."""
    return samples if len(samples) else np.char.add(f"{split}/", np.arange(len(labels)).astype(str))


def _split(config: DataSettings, parts: list[list[np.ndarray]]) -> list[ClientSplit]:
    """Make clients' splits from their training and test indices; there are no hidden groups."""
    train, test = parts
    groups = [0] * config.num_clients
    return with_validation(train, test, groups, config)


def data_in_words(config: DataSettings) -> str:
    """Say what the run's data are, how many examples clients hold, and how many nobody holds."""
    data, splits = load_dataset(config), load_partition(config)
    strange = sum(
        (~np.isin(data.test_labels[split.test], data.train_labels[split.train])).sum()
        for split in splits
    )
    share = 100 * strange / sum(len(split.test) for split in splits)
    unseen = [f"{share:.2g} % are of classes that their client does not train on"]
    trained, kept, tested = (
        _sizes([getattr(split, part) for split in splits])
        for part in ("train", "validation", "test")
    )
    more, comma = ("", "") if kept == "0" else (f", with {kept} more for validation", ",")
    held = _notes([split.held for split in splits], len(data.train_labels))
    notes = _notes(
        [split.test for split in splits], len(data.test_labels), unseen if strange else []
    )
    users = sum(map(len, users_of_clients(config)))
    pooled = (
        f"; these clients are {users} users, dealt out in turn: for each user to be a client, set "
        f"num-clients={users}"
    )
    return (
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test "
        f"{schema_of(data).examples(most=10)}; {len(splits)} clients train on {trained} each{more}"
        f"{held}{comma} and are tested on {tested} each{notes}"
        + (pooled if users > len(splits) else "")
    )


def _sizes(rows: Sequence[np.ndarray]) -> str:
    """Say how many examples each client has, given by their ``rows``."""
    sizes = [len(mine) for mine in rows]
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _notes(rows: Sequence[np.ndarray], number: int, more_notes: Sequence[str] = ()) -> str:
    """Say in brackets how many of a split's ``number`` examples nobody holds, or several do."""
    held = np.concatenate(rows)
    different, notes = len(np.unique(held)), []
    if different < number:
        notes.append(f"nobody holds {number - different:,}")
    if different < len(held):
        notes.append(f"{len(held) - different:,} are held more than once")
    notes += more_notes
    return f" ({', '.join(notes)})" if notes else ""


def load_own(config: DataSettings, source: str) -> Dataset:
    """Load this node's own data set, which its configuration names.

    What is wrong with it is logged here and not in the error, which the server is told: it may
    name files, classes and users.

    Raises:
        DataError: it is absent or unusable, or none is named.
    """
    if not source:
        raise DataError(
            "dataset = nodes, but this node names none: start its SuperNode with --node-config "
            "'dataset=\"imagefolder:/absolute/path\" …'"
        )
    try:
        return with_classes(_load(config, source), config.classes)
    except (ConfigError, DataError) as error:
        logger.error("%s", error)
    raise DataError(
        "this node's data cannot be used: its own log says why, and so does pfedgpa doctor there"
    )


def with_classes(data: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Return ``data`` with labels that are indices of ``classes``, unless these are empty.

    Raises:
        DataError: it has a class that is not among them.
    """
    if not classes or data.classes == classes:
        return data
    if other := [name for name in data.classes if name not in classes]:
        raise DataError(
            f"dataset {data.name}: has the class {other[0]!r}{near(other[0], classes)} The run's "
            f"classes are {', '.join(classes)}"
        )
    places = np.array([classes.index(name) for name in data.classes])
    train, test = (places[labels] for labels in (data.train_labels, data.test_labels))
    return replace(data, classes=classes, train_labels=train, test_labels=test)


@remembered(2)
def load_own_client(config: DataSettings, source: str, client: int) -> ClientData:
    """Load all images of this node's own data set, some training images kept for validation.

    Raises:
        DataError: as ``load_own``, or no image is left to train on.
    """
    data = load_own(config, source)
    order = numpy_generator(config.seed, "own validation", client).permutation(
        len(data.train_labels)
    )
    kept = round(len(order) * config.validation_share)
    if kept == len(order):
        raise DataError("validation-share leaves no image of this node's to train on")
    every = np.arange(len(data.test_labels))
    split = ClientSplit(np.sort(order[kept:]), np.sort(order[:kept]), every, group=0)
    return _held(data, split)


@remembered(256)
def load_client(config: DataSettings, client: int) -> ClientData:
    """Load a client's images, which are kept for the next round (4 MB for a CIFAR-10 client)."""
    data, split = load_dataset(config), load_partition(config)[client]
    return _held(data, split)


def _held(data: Dataset, split: ClientSplit) -> ClientData:
    """Take the images of ``split`` from ``data``."""
    return ClientData(
        train=images_of(data.train_images, data.train_labels, split.train),
        validation=images_of(data.train_images, data.train_labels, split.validation),
        test=images_of(data.test_images, data.test_labels, split.test),
    )
