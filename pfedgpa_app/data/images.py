"""Examples, images as a rule, as clients hold them and as networks take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

# The channel means and deviations of FedPAC's code (MNIST's for one channel, CIFAR-10's for three).
NORMALISATION = {
    1: ((0.1307,), (0.3081,)),
    3: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


@dataclass(frozen=True)
class Images:
    """Pixels [N, C, H, W] uint8 (channels last in memory) and labels [N] int64.

    Pixels stay bytes, a quarter of the size of floats, until a network asks for them. Examples that
    are no images, float32 or int64 [N, …], are passed to networks as they are.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice | Tensor) -> Self:
        return replace(self, pixels=self.pixels[part], labels=self.labels[part])

    def to(self, device: torch.device) -> Self:
        """The same images on ``device``."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def floats(self) -> Tensor:
        """Return all examples as networks take them, images as [N, C, H, W] float32."""
        return normalised(self.pixels)


def images_of(pixels: np.ndarray, labels: np.ndarray, held: np.ndarray) -> Images:
    """Take the examples ``held`` (indices) of pixels [N, C, H, W] uint8 and labels [N]."""
    taken = torch.from_numpy(np.ascontiguousarray(pixels[held]))
    if taken.ndim == 4:
        taken = taken.contiguous(memory_format=torch.channels_last)
    return Images(taken, torch.from_numpy(labels[held]))


@lru_cache
def _mean_and_std(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    figures = normalisation(channels)
    mean, std = (torch.tensor(v).view(-1, 1, 1).to(device) for v in figures)
    return mean, std


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return means and deviations of the channels of images whose pixels are 0 to 1."""
    return NORMALISATION.get(channels, ((0.5,) * channels, (0.25,) * channels))


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels [..., C, H, W] uint8 as float32 with about zero mean and unit variance.

    Examples of another type are no pixels, and stay as they are.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = _mean_and_std(pixels.shape[-3], pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)
