"""What one client holds, ready for training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.config import Config
from pfedgpa_app.data.datasets import Dataset, load
from pfedgpa_app.data.partition import ClientSplit, partition

# The channel means and deviations of FedPAC's code (MNIST's for one channel, CIFAR-10's for three).
NORMALISATION = {
    1: ((0.1307,), (0.3081,)),
    3: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


@dataclass(frozen=True)
class Images:
    """Normalised images [N, C, H, W] float32 (channels last in memory) and labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


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


def _normalised(pixels: np.ndarray, labels: np.ndarray) -> Images:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in NORMALISATION[images.shape[1]])
    images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
    return Images(images, torch.from_numpy(labels))


@lru_cache(maxsize=128)
def load_client(config: Config, client: int) -> ClientData:
    """Client ``client``'s images, kept for the next round (20 MB a CIFAR-10 client)."""
    data, split = load_dataset(config), load_partition(config)[client]
    return ClientData(
        train=_normalised(data.train_images[split.train], data.train_labels[split.train]),
        validation=_normalised(
            data.train_images[split.validation], data.train_labels[split.validation]
        ),
        test=_normalised(data.test_images[split.test], data.test_labels[split.test]),
    )
