"""Local SGD: the only training loop of the clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim.sgd import sgd

from pfedgpa_app.core.sections import TrainingSettings
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.images import Images

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
GradientHook = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How a client trains: by plain SGD, whose momentum starts afresh at each call."""

    epochs: int
    learning_rate: float
    batch_size: int = 50
    momentum: float = 0.5
    weight_decay: float = 0.0
    augment: bool = False
    trainable: tuple[str, ...] | None = None  # the weights that are trained; None for all
    bfloat16: bool = False  # forward and backward; weights and updates stay float32
    clip: float | None = None  # largest norm of a client's gradient

    def computing(self, device: torch.device) -> torch.autocast:
        """The context in which a step's loss is computed."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16)


def recipe(
    config: TrainingSettings,
    epochs: int,
    learning_rate: float,
    trainable: Sequence[str] | None = None,
) -> Recipe:
    """Return how the run's clients train for ``epochs`` at this learning rate."""
    return Recipe(
        epochs,
        learning_rate,
        config.batch_size,
        config.momentum,
        config.weight_decay,
        config.augment,
        None if trainable is None else tuple(trainable),
        config.precision == "bfloat16",
    )


def bfloat16_is_emulated(device: torch.device) -> bool:
    """Whether ``device`` is a CPU without instructions for bfloat16."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def slow_precision(config: TrainingSettings) -> str:
    """Return a warning if this machine must emulate the run's ``precision``; else ""."""
    if config.precision != "bfloat16" or not bfloat16_is_emulated(device_for(config.device)):
        return ""
    return (
        "precision = bfloat16: this CPU has no instructions for it, so training may take ten times "
        "as long as with precision=float32"
    )


def device_for(setting: str) -> torch.device:
    """The device that the ``device`` setting means here."""
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)


def batches(
    size: int, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield what each step of a client learns from; nowhere else does training draw.

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
    """Draw each image's offset from the top and the left (0..8), and whether to flip it, [3, n]."""
    offsets = torch.randint(0, 9, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    return torch.cat([offsets, flip[None].long()])


def crop_and_flip(images: Tensor, crops: Tensor) -> Tensor:
    """Pad images [n, C, H, W] by 4, then crop and mirror them as ``crops`` [3, n] says."""
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
    """Take one step of plain SGD in place; ``velocity`` starts as None and is filled here.

    This is torch's own update without its Optimizer class, whose first use imports the compiler:
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


def by_batch(model: nn.Module) -> list[str]:
    """List the layers that need a batch's variance in the mode that ``model`` is in.

    With any of them, no step can be made on one example.
    """
    return [
        f"layer {name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


def least_batch(model: nn.Module) -> int:
    """Return how many examples a step needs at least."""
    return 2 if by_batch(model) else 1


def no_step_on_one(network: nn.Module) -> str:
    """Say why ``network``, trained as a whole, takes no step on one example; "" if it does."""
    to_train(network)
    if layers := by_batch(network):
        return f"{layers[0]} cannot take a step on one example, which has no variance"
    return ""


def training_batches(
    model: nn.Module, data: Images, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each step's images [B, C, H, W] and labels [B] on the model's device, from ``batches``.

    A last batch of one image is left out where BatchNorm would need its variance.
    """
    data = data.to(next(model.parameters()).device)
    images, labels = data.floats(), data.labels
    least = least_batch(model)
    for batch, crops in batches(len(data), recipe, generator):
        if len(batch) < least:
            continue
        x = images[batch]
        yield (x if crops is None else crop_and_flip(x, crops)), labels[batch]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of images x [B, C, H, W] with labels y [B]."""
    return F.cross_entropy(model(x).float(), y)


def clipped(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    """Scale every client's gradient, tensors [C, …], down to the norm ``most`` if it has more."""
    squares = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients]).sum(0)
    scale = (most / squares.sqrt().clamp_min(1e-12)).clamp_max(1)
    return [g * scale.view(-1, *[1] * (g.ndim - 1)) for g in gradients]


def trained_of(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return {name: parameter} of what is trained if only ``names`` are; None: all."""
    trained: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if names is None:
        return trained
    return {name: trained[name] for name in names if name in trained}


def phases(model: nn.Module, recipes: Iterable[Recipe], rate: float) -> Iterator[Recipe]:
    """Yield the recipes that train anything, at ``rate`` times their learning rates."""
    for recipe in recipes:
        if trained_of(model, recipe.trainable):
            yield replace(recipe, learning_rate=recipe.learning_rate * rate)


def to_train(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Set ``model`` to training mode and return {name: parameter} of what is trained.

    A normalisation layer with parameters, none of them trained, stays in evaluation mode: its
    statistics must not move either. Those of a layer without parameters move only if ``names`` have
    them.

    Args:
        names: the weights that are trained; None: all.
    """
    trained = trained_of(model, names)
    moving = {id(parameter) for parameter in trained.values()}
    model.train()
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        if own := list(module.parameters(recurse=False)):
            moves = bool(moving & {id(p) for p in own})
        else:
            moves = names is None or f"{name}.running_mean" in names
        if not moves:
            module.eval()
    return trained


def train(
    model: nn.Module,
    data: Images,
    recipe: Recipe,
    generator: torch.Generator,
    loss_of: Loss = cross_entropy,
    gradient_hook: GradientHook | None = None,
) -> float:
    """Train ``model`` in place on ``batches``.

    What is not trained gets no gradient, no momentum and no decay: it does not move at all.

    Args:
        loss_of: returns the loss of a batch, given the model, its images and labels.
        gradient_hook: returns each step's gradients anew, given the trained weights and their
            gradients by name.

    Returns:
        the mean loss over all images trained on, in all epochs; NaN without a step.
    """
    trained = to_train(model, recipe.trainable)
    parameters: list[Tensor] = list(trained.values())
    device = next(model.parameters()).device
    velocity: list[Tensor | None] = [None for _ in parameters]
    total, images = torch.zeros((), device=device), 0
    for x, y in training_batches(model, data, recipe, generator):
        with recipe.computing(device):
            loss = loss_of(model, x, y)
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, parameters)
        if gradient_hook is not None:
            gradients = gradient_hook(trained, dict(zip(trained, gradients, strict=True)))
        if recipe.clip is not None:
            gradients = clipped([g[None] for g in gradients], recipe.clip)
            gradients = [g[0] for g in gradients]
        sgd_step(parameters, gradients, velocity, recipe)
        total += loss.detach() * len(y)
        images += len(y)
    return float(total) / images if images else math.nan


def pull_to(anchor: Weights, strength: float) -> GradientHook:
    """Return a gradient hook that adds strength·(θ − anchor).

    This is the gradient of (strength/2)·‖θ − anchor‖².
    """

    def pull(trained: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [
            gradient + strength * (trained[name].detach() - anchor[name].to(gradient))
            for name, gradient in gradients.items()
        ]

    return pull
