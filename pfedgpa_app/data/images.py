"""Images as networks take them."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Normalised images [N, C, H, W] float32 (channels last in memory) and labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def normalised(pixels: np.ndarray, labels: np.ndarray) -> Images:
    """From pixels [N, C, H, W] uint8 and labels [N] int64."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in NORMALISATION[images.shape[1]])
    images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
    return Images(images, torch.from_numpy(labels))
