"""Scores of networks, and fine-tunings to compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedgpa_app.data.images import Images


@dataclass(frozen=True)
class FinalScore:
    """One client's counts of correct predictions after the last round.

    Index 0 is before fine-tuning, each further index after one fine-tuning.
    """

    test: list[int]
    test_images: int
    validation: list[int]
    validation_images: int
    agreement: int | None = None  # test images on which the reference weights predict the same
    own_part: bool = False  # whether some of the weights were the client's alone


@dataclass(frozen=True)
class FineTuning:
    """How a client fine-tunes after the last round."""

    epochs: int
    learning_rate: float
    part: str = "all"  # what is trained: "all", or "head", the last layer
    full_batch: bool = False  # an epoch is one step against the gradient on all training images


EVALUATION_BATCH = 500  # 1,000 make activations so large that a CPU takes a fifth longer
TEMPERATURES = (0.7, 1.0, 1.5, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Score:
    """Sums over a client's evaluated images."""

    correct: int
    loss: float
    images: int


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> Score:
    """Count the correct predictions of ``model`` on ``data``, and sum its losses."""
    correct, loss = 0, 0.0
    for logits, labels in _logits(model, data):
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return Score(correct, loss, len(data))


@torch.no_grad()
def tempered_losses(model: nn.Module, data: Images) -> list[float]:
    """Return mean cross-entropies of ``model`` on ``data``, one for each of ``TEMPERATURES``.

    Logits are divided by the temperature. The smallest loss serves to compare networks of different
    confidence: what clients have learned by heart makes a network too sure of itself (Guo et al.
    2017, "On Calibration of Modern Neural Networks").
    """
    sums = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for logits, labels in _logits(model, data):
        for i, temperature in enumerate(TEMPERATURES):
            sums[i] += float(F.cross_entropy(logits / temperature, labels, reduction="sum"))
    return (sums / len(data)).tolist()


@torch.no_grad()
def predict(model: nn.Module, data: Images) -> Tensor:
    """Return the class that ``model`` predicts for each image [N], on its device."""
    return torch.cat([logits.argmax(1) for logits, _ in _logits(model, data)])


def evaluation_batches(model: nn.Module, data: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Set ``model`` to evaluation, and yield its inputs and their labels batch by batch."""
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(data), EVALUATION_BATCH):
        batch = data[start : start + EVALUATION_BATCH].to(device)
        inputs = batch.floats()
        if inputs is batch.pixels:  # the network may change its inputs in place
            inputs = inputs.clone()
        yield inputs, batch.labels


def _logits(model: nn.Module, data: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of ``model`` and the labels batch by batch."""
    for inputs, labels in evaluation_batches(model, data):
        yield model(inputs), labels
