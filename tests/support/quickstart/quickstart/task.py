"""The quickstart's network and its data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A network with parts that make averaging weights awkward: counters, ties, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Linear(128, 128)
        self.again = nn.Linear(128, 128)
        self.again.weight = self.inner.weight
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.out = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)
        x = F.relu(self.again(F.relu(self.inner(x))))
        return self.out(x) * self.temperature


def load_data(partition: int, partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return train and test loaders; half of a partition's images are of just two classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    own = (labels % 5) == (partition // 2) % 5
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(partition))
    mine = torch.cat([order[own[order]][:90], order[~own[order]][:90]])
    mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(partition))]
    sets = [TensorDataset(images[part], labels[part]) for part in (mine[:120], mine[120:])]
    return DataLoader(sets[0], batch_size, shuffle=True), DataLoader(sets[1], batch_size)


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """Train by plain SGD; return the mean loss."""
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimiser.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimiser.step()
            total += loss.item()
    return total / len(loader) / epochs


def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Return loss and accuracy."""
    net.eval()
    correct, loss, seen = 0, 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs = net(images)
            loss += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += int((outputs.argmax(1) == labels).sum())
            seen += len(labels)
    return loss / seen, correct / seen
