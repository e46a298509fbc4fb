"""The batched engine: the clients of a round as one model with a leading client axis.

On a GPU a small network's step is mostly waiting for its kernels to start; C clients in one
step wait only once. The images stay on the device, and each kind of step is captured once as a
CUDA graph and replayed. On a CPU this engine only serves for tests: it is two to four times
slower than training one client after another.

Random draws, recipe and update are those of ``training``, so that results agree with training
one client after another, up to the order of float32 sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from pfedgpa_app.client.cohort import compare_fine_tunings
from pfedgpa_app.client.request import ClientRequest, build_model, held_by
from pfedgpa_app.core.replay import Replayed
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import ClientData, load_schema
from pfedgpa_app.data.images import Images, normalised
from pfedgpa_app.engine.grid import LocalGrid, raised
from pfedgpa_app.models.networks import weight_names, weights_of
from pfedgpa_app.training.evaluation import Score
from pfedgpa_app.training.sgd import Recipe, batches, clipped, crop_and_flip, phases, sgd_step

IMAGES_AT_ONCE = 1500  # of all clients in a step; about 2 GB for CIFAR's CNN, and fills a GPU


class Columns(torch.autograd.Function):
    """The k×k neighbourhoods of images [N, I, H, W] as columns [N, I·k·k, L], for L positions.

    On a GPU torch's unfold starts a kernel for every image of a batch; this makes one copy. The
    gradient is torch's fold, which has no such loop.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.geometry = x.shape[2:], kernel, padding
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        windows = padded.unfold(2, kernel[0], 1).unfold(3, kernel[1], 1)  # N I h w kh kw
        n, inputs, h, w = windows.shape[:4]
        return windows.permute(0, 1, 4, 5, 2, 3).reshape(n, inputs * kernel[0] * kernel[1], h * w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        size, kernel, padding = ctx.geometry
        return F.fold(gradients[0], size, kernel, padding=padding), None, None


def _convolution(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve client c's images x[c] with its own kernels: [C, B, I, H, W] and [C, O, I, k, k].

    It uses matrix products, because cuDNN's grouped convolutions train slowly.
    """
    clients, batch, _, height, width = x.shape
    kernel, padding = layer.kernel_size, layer.padding
    assert isinstance(padding, tuple)
    columns: Tensor = Columns.apply(x.flatten(0, 1), kernel, padding)
    out: Tensor = weight.flatten(2)[:, None] @ columns.unflatten(0, (clients, batch))
    if bias is not None:
        out = out + bias[:, None, :, None]
    height, width = height + 2 * padding[0] + 1, width + 2 * padding[1] + 1
    return out.view(clients, batch, -1, height - kernel[0], width - kernel[1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply each client's own linear layer to its inputs: [C, B, …, I] and [C, O, I].

    Dimensions between B and I count as more rows of the client's batch.
    """
    out = x.flatten(1, -2) @ weight.mT
    if bias is not None:
        out = out + bias[:, None]
    return out.view(*x.shape[:-1], -1)


def _supported(layer: nn.Module) -> bool:
    """Whether ``layer`` has a batched form; a subclass has none, since it may do something else."""
    if type(layer) is nn.Conv2d:
        plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1
        return plain and isinstance(layer.padding, tuple) and layer.padding_mode == "zeros"
    if type(layer) is nn.Flatten:
        return layer.start_dim == 1 and layer.end_dim == -1
    return type(layer) in (nn.Linear, nn.MaxPool2d, nn.LeakyReLU, nn.ReLU)


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a chain's layers in order, with their names' prefixes; repeated layers come again."""
    for name, layer in model._modules.items():
        assert layer is not None
        if type(layer) is nn.Sequential:
            yield from _layers(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}.", layer


def can_batch(model: nn.Module) -> bool:
    """Whether ``model`` is a chain of layers that have a batched form here, without hooks.

    Clients must also share all its weights: none may be frozen, and none may have two names.
    """
    if type(model) is not nn.Sequential:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    layers, shared = list(_layers(model)), set(weight_names(model))
    used = {prefix + name for prefix, layer in layers for name, _ in layer.named_parameters()}
    return used <= shared and all(_supported(layer) for _, layer in layers)


def forward(model: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """Each client's logits [C, B, K] for its images x [C, B, I, H, W] under weights[name][c]."""
    for name, layer in _layers(model):
        if isinstance(layer, nn.Conv2d):
            x = _convolution(layer, x, weights[f"{name}weight"], weights.get(f"{name}bias"))
        elif isinstance(layer, nn.Linear):
            x = _linear(x, weights[f"{name}weight"], weights.get(f"{name}bias"))
        else:  # has no weights: clients are just more images
            x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each image's cross-entropy [C, B]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


@dataclass(frozen=True)
class DeviceData:
    """Every client's images on the device, one tensor [clients, n, C, H, W] for each part."""

    parts: dict[str, Images]

    @classmethod
    def of(cls, config: Config, device: torch.device) -> DeviceData | None:
        """Load the images of all clients; None if clients hold unequal numbers of them."""
        return cls.stacked([held_by(config, i) for i in range(config.num_clients)], device)

    @classmethod
    def stacked(cls, clients: Sequence[ClientData], device: torch.device) -> DeviceData | None:
        """Stack what ``clients`` hold, in their order; None if they hold unequal numbers."""
        parts = {}
        for part in (field.name for field in fields(ClientData)):
            held: list[Images] = [getattr(client, part) for client in clients]
            if len({len(images) for images in held}) > 1:
                return None
            stacked = (torch.stack([getattr(i, f) for i in held]) for f in ("pixels", "labels"))
            parts[part] = Images(*(tensor.to(device) for tensor in stacked))
        return cls(parts)


class Step:
    """One SGD step of a cohort on ``batch`` images a client, over buffers that stay in place."""

    def __init__(self, cohort: BatchedCohort, recipe: Recipe, batch: int) -> None:
        self.cohort, self.recipe = cohort, recipe
        self.names = tuple(cohort.weights) if recipe.trainable is None else recipe.trainable
        size, device = cohort.size, cohort.device
        self.index = torch.zeros(size, batch, dtype=torch.long, device=device)
        self.crops = torch.zeros(3, size * batch, dtype=torch.long, device=device)
        self._replayed = Replayed(self._step, cohort.device, cohort.pool)

    def _step(self) -> None:
        cohort, images = self.cohort, self.cohort.data.parts["train"]
        x = normalised(images.pixels[cohort.rows, self.index])
        if self.recipe.augment:
            x = crop_and_flip(x.flatten(0, 1), self.crops).unflatten(0, x.shape[:2])
        parameters = [cohort.weights[name].requires_grad_() for name in self.names]
        with self.recipe.computing(cohort.device):
            logits = forward(cohort.model, cohort.weights, x).float()
        losses = _losses(logits, images.labels[cohort.rows, self.index])
        # clients share no weight, so the sum's gradient is each client's own
        gradients: Sequence[Tensor] = torch.autograd.grad(losses.mean(1).sum(), parameters)
        if self.recipe.clip is not None:
            gradients = clipped(gradients, self.recipe.clip)
        velocity: list[Tensor | None] = [cohort.velocity[name] for name in self.names]
        sgd_step(parameters, gradients, velocity, self.recipe)
        cohort.total += losses.detach().sum(1)

    def __call__(self, index: Tensor, crops: Tensor | None) -> None:
        """Train every client on its own images ``index`` [C, B], cropped by ``crops`` [3, C·B]."""
        self.index.copy_(index)
        if crops is not None:
            self.crops.copy_(crops)
        self._replayed()


class BatchedCohort:
    """A cohort (``client.Cohort``) of ``size`` clients that train as one model.

    Attributes:
        weights: {name: [size, …]}, changed in place.
        velocity: SGD's momentum buffer of each of the weights.
        rows: the clients' places in ``data``, [size, 1].
        total: each client's losses, summed over the images of one training, [size].
    """

    def __init__(self, model: nn.Module, data: DeviceData, size: int) -> None:
        self.model, self.data, self.size = model, data, size
        self.device = next(model.parameters()).device
        self.initial = weights_of(model)
        self.weights: Weights = {
            name: torch.empty(size, *tensor.shape, device=self.device)
            for name, tensor in self.initial.items()
        }
        self.velocity = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        self.rows = torch.zeros(size, 1, dtype=torch.long, device=self.device)
        self.total = torch.zeros(size, device=self.device)
        # memory for all its graphs: they never run at once, and keep nothing in it between runs
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._steps: dict[tuple[Recipe, int], Step] = {}

    def seat(self, clients: Sequence[int]) -> None:
        """Choose the clients on whose images the cohort is trained and evaluated from now on."""
        self.rows.copy_(torch.tensor(clients)[:, None])

    def load(self, weights: Sequence[Weights]) -> None:
        for name, mine in self.weights.items():
            stacked = torch.stack([w.get(name, self.initial[name]) for w in weights])
            mine.detach().copy_(stacked)

    def train(self, recipe: Recipe, generators: Sequence[torch.Generator]) -> list[float]:
        size = self.data.parts["train"].labels.shape[1]
        recipe_of_a_step = replace(recipe, epochs=1)
        self.total.zero_()
        for tensor in self.velocity.values():
            tensor.zero_()
        for drawn in zip(*(batches(size, recipe, g) for g in generators), strict=True):
            index = torch.stack([batch for batch, _ in drawn])
            crops = [crop for _, crop in drawn if crop is not None]
            key = recipe_of_a_step, index.shape[1]
            if key not in self._steps:
                self._steps[key] = Step(self, *key)
            self._steps[key](index, torch.cat(crops, 1) if crops else None)
        return (self.total / max(1, recipe.epochs * size)).tolist()

    @torch.no_grad()
    def evaluate(self, part: str) -> list[Score]:
        n = self.data.parts[part].labels.shape[1]
        correct = torch.zeros(self.size, dtype=torch.long, device=self.device)
        loss = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for logits, labels in self._logits(part):
            correct += (logits.argmax(-1) == labels).sum(1)
            loss += _losses(logits, labels).double().sum(1)
        return [Score(c, s, n) for c, s in zip(correct.tolist(), loss.tolist(), strict=True)]

    @torch.no_grad()
    def predict(self, part: str) -> list[Tensor]:
        return list(torch.cat([logits.argmax(-1) for logits, _ in self._logits(part)], dim=1))

    def _logits(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [size, B, classes] and labels [size, B] of a part's images, in batches."""
        images, rows = self.data.parts[part], self.rows[:, 0]
        at_once = max(1, IMAGES_AT_ONCE // self.size)
        for start in range(0, images.labels.shape[1], at_once):
            pixels = images.pixels[rows, start : start + at_once]
            labels = images.labels[rows, start : start + at_once]
            yield forward(self.model, self.weights, normalised(pixels)), labels

    def trained(self) -> list[Weights]:
        """Return every client's weights, on the CPU."""
        cpu = {name: tensor.detach().cpu() for name, tensor in self.weights.items()}
        return [{name: t[i].clone() for name, t in cpu.items()} for i in range(self.size)]


@contextlib.contextmanager
def _failing_alone(message: Message, replies: list[Message]) -> Iterator[None]:
    """Answer ``message`` with the error that the block raises, if any; other clients go on."""
    try:
        yield
    except Exception as error:
        replies.append(raised(message, error))


def _each(
    requests: Sequence[ClientRequest],
    weights_of_one: Callable[[ClientRequest], Weights],
    replies: list[Message],
) -> tuple[list[ClientRequest], list[Weights]]:
    """Return the requests for which ``weights_of_one`` makes weights, and these weights.

    Those for which it fails are answered so, in ``replies``.
    """
    ready, weights = [], []
    for request in requests:
        with _failing_alone(request.message, replies):
            weights.append(weights_of_one(request))
            ready.append(request)
    return ready, weights


class BatchedGrid(LocalGrid):
    """Serves a round's messages together; what cannot be batched goes through the ClientApp."""

    def __init__(self, app: ClientApp, run_config: dict[str, Any], config: Config) -> None:
        super().__init__(run_config, config.num_clients)
        self.app, self.config = app, config
        self.model = build_model(config, load_schema(config))
        self.data = DeviceData.of(config, next(self.model.parameters()).device)
        self._cohorts: dict[int, BatchedCohort] = {}
        obstacles = []
        if config.local_dp_epsilon:
            obstacles.append("each has noise of its own")
        if not can_batch(self.model):
            obstacles.append("the network has layers without a batched form")
        if self.data is None:
            obstacles.append("they hold unequal numbers of images")
        for why in obstacles:
            self._say(f"clients train one at a time: {why}")
        self.batches = not obstacles

    def _say(self, text: str) -> None:
        self.remark(f"batched engine: {text}")

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        replies = []
        at_once = max(1, IMAGES_AT_ONCE // self.config.batch_size)
        for kind in dict.fromkeys(message.metadata.message_type for message in messages):
            alike = [m for m in messages if m.metadata.message_type == kind]
            size = -(-len(alike) // -(-len(alike) // at_once))  # equal parts share a cohort
            for start in range(0, len(alike), size):
                replies += self._answer(kind, alike[start : start + size])
                self.answered(len(replies) / len(messages))
        return replies

    def _answer(self, kind: str, messages: list[Message]) -> list[Message]:
        if kind == "query" or not self.batches or self.data is None:
            return [self._alone(message) for message in messages]
        replies: list[Message] = []
        requests = []
        for message in messages:
            with _failing_alone(message, replies):
                requests.append(ClientRequest(message, self.contexts[message.metadata.dst_node_id]))
        try:
            if kind == "train" and requests and not requests[0].method.is_plain_sgd():
                title = requests[0].method.title
                self._say(f"{title}: clients train one at a time: not by plain SGD")
                return [self._alone(message) for message in messages]
            if kind == "train":
                self._train(requests, replies)
            elif kind == "evaluate":
                self._evaluate(requests, replies)
            elif requests:
                replies += self._compare(requests)
        except Exception as error:  # of all of them together
            answered = {reply.metadata.reply_to_message_id for reply in replies}
            left = [m for m in messages if m.metadata.message_id not in answered]
            replies += [raised(message, error) for message in left]
        return replies

    def _seated(self, requests: Sequence[ClientRequest]) -> BatchedCohort:
        """Return a cohort of the clients that are asked."""
        assert self.data is not None
        size = len(requests)
        if size not in self._cohorts:
            self._cohorts[size] = BatchedCohort(self.model, self.data, size)
        self._cohorts[size].seat([request.client for request in requests])
        return self._cohorts[size]

    def _train(self, requests: Sequence[ClientRequest], replies: list[Message]) -> None:
        """Do what ``Rounds.train`` does, for all requests at once."""
        ready, starts = _each(requests, lambda r: r.method.start(r.weights, r.state), replies)
        if not ready:
            return
        cohort, first = self._seated(ready), ready[0]
        cohort.load(starts)
        generators, losses = [r.generator("train") for r in ready], [math.nan] * len(ready)
        recipes = first.method.recipes(first.config, list(cohort.initial))
        for recipe in phases(cohort.model, recipes, first.rate):
            losses = cohort.train(recipe, generators)
        for request, weights, loss in zip(ready, cohort.trained(), losses, strict=True):
            with _failing_alone(request.message, replies):
                trained = request.method.upload(weights, request.weights, request.state, loss)
                replies.append(request.trained(trained))

    def _evaluate(self, requests: Sequence[ClientRequest], replies: list[Message]) -> None:
        ready, evaluated = _each(requests, lambda r: r.evaluated(), replies)
        if not ready:
            return
        cohort = self._seated(ready)
        cohort.load(evaluated)
        scores = cohort.evaluate("test")
        replies += [request.scored(score) for request, score in zip(ready, scores, strict=True)]

    def _compare(self, requests: Sequence[ClientRequest]) -> list[Message]:
        try:
            return compare_fine_tunings(self._seated(requests), requests)
        except Exception as error:
            self._say(f"clients are compared one at a time: {type(error).__name__}: {error}")
            return [self._alone(request.message) for request in requests]

    def _alone(self, message: Message) -> Message:
        threads = torch.get_num_threads()
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return raised(message, error)
        finally:
            torch.set_num_threads(threads)  # the app sets one; this process is the server's, too
