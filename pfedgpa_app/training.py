"""Local SGD and evaluation: the only training loop of the clients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedgpa_app.data.images import Images

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """How a client trains: plain SGD, its momentum starting afresh at each call."""

    epochs: int
    learning_rate: float
    batch_size: int = 50
    momentum: float = 0.5
    weight_decay: float = 0.0
    augment: bool = False


@dataclass(frozen=True)
class Score:
    """Sums over the evaluated images."""

    correct: int
    loss: float
    images: int

    @property
    def accuracy(self) -> float:
        """In percent; NaN without images."""
        return 100 * self.correct / self.images if self.images else float("nan")


def device_for(setting: str) -> torch.device:
    """The device that the ``device`` setting means here."""
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop after padding by 4 and random horizontal flip, each image its own draw."""
    n, _, height, width = images.shape
    top, left = torch.randint(0, 9, (2, n), generator=generator).to(images.device)
    flip = torch.rand(n, generator=generator).to(images.device) < 0.5
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    data: Images,
    recipe: Recipe,
    generator: torch.Generator,
) -> float:
    """Train ``model`` in place; each epoch is one shuffled pass, a short last batch included.

    Args:
        generator: on the CPU; draws the batches and the augmentation.

    Returns:
        the mean loss over all images of all epochs (0 without a step).
    """
    model.train()
    device = next(model.parameters()).device
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    images, labels = data.images.to(device), data.labels.to(device)
    total = torch.zeros((), device=device)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(data), generator=generator)
        for batch in order.split(recipe.batch_size):
            x = images[batch]
            if recipe.augment:
                x = crop_and_flip(x, generator)
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x), labels[batch])
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(batch)
    return float(total) / max(1, recipe.epochs * len(data))


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> Score:
    """Count the correct predictions of ``model`` on ``data``."""
    model.eval()
    device = next(model.parameters()).device
    correct, loss = 0, 0.0
    for start in range(0, len(data), EVALUATION_BATCH):
        x = data.images[start : start + EVALUATION_BATCH].to(device)
        y = data.labels[start : start + EVALUATION_BATCH].to(device)
        logits = model(x)
        correct += int((logits.argmax(1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
    return Score(correct, loss, len(data))
