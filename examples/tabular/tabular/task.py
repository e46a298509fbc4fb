"""Hospitals that tell malignant from benign tumours by 30 measurements of cells.

Scikit-learn's breast cancer data, dealt to the hospitals in turn. There are three kinds of
hospital, and each reports ten of the measurements on a scale that runs the other way. Nobody tells
the server who is of which kind.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

KINDS = 3


class Net(nn.Sequential):
    """30 measurements to two classes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))


def load_data(hospital: int, hospitals: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train inputs [N, 30] and labels [N], test inputs and labels; half of the records test."""
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    x, y = x[hospital::hospitals].clone(), torch.tensor(data.target)[hospital::hospitals]
    kind = hospital % KINDS
    x[:, 10 * kind : 10 * (kind + 1)] *= -1
    half = len(x) // 2
    return x[:half], y[:half], x[half:], y[half:]


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> float:
    """Plain SGD in batches of eight; the last epoch's mean loss."""
    optimiser = torch.optim.SGD(net.parameters(), lr=rate)
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(x)).split(8):
            loss = cross_entropy(net(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy."""
    return (net(x).argmax(1) == y).float().mean().item()
