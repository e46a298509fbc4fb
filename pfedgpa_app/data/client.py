"""What one client holds, ready for training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.sections import NODES, DataSettings
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data.datasets import Dataset, load
from pfedgpa_app.data.images import Images, images_of
from pfedgpa_app.data.partition import ClientSplit, dominant_groups, partition


@dataclass(frozen=True)
class ClientData:
    """One client's own images."""

    train: Images
    validation: Images
    test: Images


@dataclass(frozen=True)
class Schema:
    """What a network must know of images: their classes, and their (C, H, W)."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]


def schema_of(data: Dataset) -> Schema:
    """Of a data set."""
    return Schema(data.name, data.classes, data.shape)


def load_dataset(config: DataSettings) -> Dataset:
    """The run's data set, which all clients share.

    Raises:
        DataError: it is absent or unusable, or every node has its own.
    """
    if config.dataset == NODES:
        raise DataError(
            "dataset = nodes: every SuperNode brings its own data; start such a run with flwr run "
            "on a deployment (docs/deploy.md)"
        )
    return load(config.dataset, config.data_dir, config.download, config.image_size)


def load_schema(config: DataSettings) -> Schema:
    """Of the run's data set.

    Raises:
        DataError: as ``load_dataset``.
    """
    return schema_of(load_dataset(config))


@lru_cache(maxsize=2)
def load_partition(config: DataSettings) -> list[ClientSplit]:
    """The run's partition, the same on every machine that has the data.

    Raises:
        DataError: the data set is absent or unusable, or has not so many groups as have shares.
    """
    data = load_dataset(config)
    groups = len(dominant_groups(len(data.classes)))
    if config.partition == "dominant" and len(config.group_shares) not in (0, groups):
        raise DataError(
            f"group-shares: names {len(config.group_shares)} groups, but {data.name} has {groups}"
        )
    return partition(
        data.train_labels,
        data.test_labels,
        data.classes,
        config.num_clients,
        kind=config.partition,
        train_per_client=config.train_per_client,
        test_per_client=config.test_per_client,
        validation_share=config.validation_share,
        uniform_share=config.uniform_share,
        group_shares=config.group_shares,
        alpha=config.dirichlet_alpha,
        shards=config.shards_per_client,
        seed=config.seed,
    )


def load_own(config: DataSettings, source: str) -> Dataset:
    """The data set of this node's own that its configuration names.

    Raises:
        DataError: it is absent or unusable, or none is named.
    """
    if not source:
        raise DataError(
            "dataset = nodes, but this node names none: start its SuperNode with --node-config "
            "'dataset=\"imagefolder:/absolute/path\" …'"
        )
    return load(source, config.data_dir, config.download, config.image_size)


@lru_cache(maxsize=2)
def load_own_client(config: DataSettings, source: str, client: int) -> ClientData:
    """All images of this node's own data set; of the training images it keeps some to validate."""
    data = load_own(config, source)
    order = numpy_generator(config.seed, "own validation", client).permutation(
        len(data.train_labels)
    )
    kept = round(len(order) * config.validation_share)
    if kept == len(order):
        raise DataError(f"dataset {source}: validation-share leaves no image to train on")
    every = np.arange(len(data.test_labels))
    split = ClientSplit(np.sort(order[kept:]), np.sort(order[:kept]), every, group=0)
    return _held(data, split)


@lru_cache(maxsize=256)
def load_client(config: DataSettings, client: int) -> ClientData:
    """Client ``client``'s images, kept for the next round (4 MB a CIFAR-10 client)."""
    data, split = load_dataset(config), load_partition(config)[client]
    return _held(data, split)


def _held(data: Dataset, split: ClientSplit) -> ClientData:
    """The images of ``split``."""
    return ClientData(
        train=images_of(data.train_images, data.train_labels, split.train),
        validation=images_of(data.train_images, data.train_labels, split.validation),
        test=images_of(data.test_images, data.test_labels, split.test),
    )
