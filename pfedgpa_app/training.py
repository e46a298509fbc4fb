"""Local SGD and evaluation: the only training loop of the clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

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


def batches(
    size: int, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What each step of a client learns from: the only place where training draws.

    Each epoch is one shuffled pass over ``size`` images, a short last batch included.

    Args:
        generator: on the CPU.

    Yields:
        the batch's indices [B], and under augmentation each image's crop [3, B].
    """
    for _ in range(recipe.epochs):
        order = torch.randperm(size, generator=generator)
        for batch in order.split(recipe.batch_size):
            yield batch, draw_crops(len(batch), generator) if recipe.augment else None


def draw_crops(n: int, generator: torch.Generator) -> Tensor:
    """Each image's offset from the top and the left (0..8) and whether it is flipped, [3, n]."""
    offsets = torch.randint(0, 9, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    return torch.cat([offsets, flip[None].long()])


def crop_and_flip(images: Tensor, crops: Tensor) -> Tensor:
    """Images [n, C, H, W] padded by 4, cropped and mirrored as ``crops`` [3, n] says."""
    _, _, height, width = images.shape
    top, left, flip = crops[:, :, None].to(images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    columns = torch.where(flip > 0, columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def sgd_step(
    parameters: list[Tensor],
    gradients: Sequence[Tensor],
    velocity: list[Tensor | None],
    recipe: Recipe,
) -> None:
    """One step of plain SGD in place; ``velocity`` starts as None and is filled here.

    torch's own update without its Optimizer class, whose first use imports the compiler:
    over a second in every process that trains.
    """
    sgd(
        parameters,
        list(gradients),
        velocity,
        foreach=parameters[0].is_cuda,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def train(
    model: nn.Module,
    data: Images,
    recipe: Recipe,
    generator: torch.Generator,
) -> float:
    """Train ``model`` in place on ``batches``.

    Returns:
        the mean loss over all images of all epochs (0 without a step).
    """
    model.train()
    device = next(model.parameters()).device
    parameters: list[Tensor] = list(model.parameters())
    velocity: list[Tensor | None] = [None for _ in parameters]
    data = data.to(device)
    images, labels = data.floats(), data.labels
    total = torch.zeros((), device=device)
    for batch, crops in batches(len(data), recipe, generator):
        x = images[batch]
        if crops is not None:
            x = crop_and_flip(x, crops)
        loss = F.cross_entropy(model(x), labels[batch])
        sgd_step(parameters, torch.autograd.grad(loss, parameters), velocity, recipe)
        total += loss.detach() * len(batch)
    return float(total) / max(1, recipe.epochs * len(data))


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> Score:
    """Count the correct predictions of ``model`` on ``data``."""
    model.eval()
    device = next(model.parameters()).device
    correct, loss = 0, 0.0
    for start in range(0, len(data), EVALUATION_BATCH):
        batch = data[start : start + EVALUATION_BATCH].to(device)
        logits = model(batch.floats())
        correct += int((logits.argmax(1) == batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    return Score(correct, loss, len(data))
