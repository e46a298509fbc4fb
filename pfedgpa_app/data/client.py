"""What one client holds, ready for training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pfedgpa_app.config import Config
from pfedgpa_app.data.datasets import Dataset, load
from pfedgpa_app.data.images import Images, images_of
from pfedgpa_app.data.partition import ClientSplit, partition


@dataclass(frozen=True)
class ClientData:
    """One client's own images."""

    train: Images
    validation: Images
    test: Images


def load_dataset(config: Config) -> Dataset:
    """The run's data set.

    Raises:
        DataError: it is absent or unusable.
    """
    return load(config.dataset, config.data_dir, config.download, config.image_size)


@lru_cache(maxsize=2)
def load_partition(config: Config) -> list[ClientSplit]:
    """The run's partition, the same on every machine that has the data."""
    data = load_dataset(config)
    return partition(
        data.train_labels,
        data.test_labels,
        len(data.classes),
        config.num_clients,
        kind=config.partition,
        train_per_client=config.train_per_client,
        test_per_client=config.test_per_client,
        validation_share=config.validation_share,
        uniform_share=config.uniform_share,
        alpha=config.dirichlet_alpha,
        shards=config.shards_per_client,
        seed=config.seed,
    )


@lru_cache(maxsize=256)
def load_client(config: Config, client: int) -> ClientData:
    """Client ``client``'s images, kept for the next round (4 MB a CIFAR-10 client)."""
    data, split = load_dataset(config), load_partition(config)[client]
    return ClientData(
        train=images_of(data.train_images, data.train_labels, split.train),
        validation=images_of(data.train_images, data.train_labels, split.validation),
        test=images_of(data.test_images, data.test_labels, split.test),
    )
