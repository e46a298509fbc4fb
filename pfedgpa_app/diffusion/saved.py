"""Save a learned distribution as one safetensors file of numbers and JSON, without any code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfedgpa_app.core.files import read_metadata, read_tensors, write_tensors
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.weights import Layout, finite
from pfedgpa_app.diffusion.autoencoder import Autoencoder, LayeredAutoencoder, LinearAutoencoder
from pfedgpa_app.diffusion.convolutional import (
    ConvolutionalAutoencoder,
    ConvolutionalNetwork,
    ConvolutionalSettings,
)
from pfedgpa_app.diffusion.denoiser import NetworkDenoiser
from pfedgpa_app.diffusion.distribution import Distribution
from pfedgpa_app.diffusion.network import closed_form, new_network
from pfedgpa_app.diffusion.schedule import Schedule
from pfedgpa_app.diffusion.settings import DiffusionSettings

FILE = "distribution.safetensors"
FORMAT = "pfedgpa-distribution-1"
Tensors = dict[str, Tensor]


def file_at(path: str | Path) -> Path:
    """Return the file at ``path``, which may also be the folder of the run that saved it."""
    file = user_path(path).absolute()
    return file / FILE if file.is_dir() else file


def save(
    fitted: Distribution,
    path: Path,
    statistics: Tensors | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a distribution for ``load``: P·(k + 1) numbers and a little more, but no upload.

    Args:
        statistics: the mean's running statistics, which are not generated.
        origin: what else ``origin_of`` shall tell of the federation, for JSON.
    """
    layout = fitted.layout
    tensors = {
        "anchor": fitted.anchor,
        "latents": fitted.latents,
        "clients": fitted.clients,
        "rounds": fitted.rounds,
    }
    tensors |= {f"statistics/{name}": tensor for name, tensor in (statistics or {}).items()}
    tensors |= _autoencoder_tensors(fitted.autoencoder)
    if isinstance(fitted.denoiser, NetworkDenoiser):
        state = fitted.denoiser.network.state_dict()
        tensors |= {f"denoiser/{name}": tensor for name, tensor in state.items()}
    description = {
        "settings": asdict(fitted.settings),
        "seed": fitted.seed,
        "strength": fitted.strength,
        "origin": dict(origin or {}),
        "tensors": [
            [name, list(shape), str(dtype).removeprefix("torch.")]
            for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True)
        ],
    }
    metadata = {"format": FORMAT, "distribution": json.dumps(description)}
    write_tensors(path, tensors, metadata)


def load(path: Path) -> Distribution:
    """The distribution that ``save`` wrote.

    Raises:
        ValueError: there is no such file, or it is of another kind or damaged.
    """
    tensors, metadata = read_tensors(path, FORMAT)
    for name, tensor in tensors.items():
        if not finite(tensor).all():
            raise ValueError(f"its tensor {name} is not finite")
    try:
        return _from(tensors, json.loads(metadata["distribution"]))
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"is damaged: {' '.join(str(error).split())}") from error


def statistics(path: Path) -> Tensors:
    """The running statistics that were saved beside the distribution in ``path``.

    Raises:
        ValueError: as in ``load``.
    """
    return _below("statistics", read_tensors(path, FORMAT, "statistics/")[0])


def origin_of(path: Path) -> dict[str, Any]:
    """What was told of the federation of the distribution in ``path``; {} by earlier versions.

    Raises:
        ValueError: as in ``load``.
    """
    description = json.loads(read_metadata(path, FORMAT)["distribution"])
    return dict(description.get("origin", {}))


def _from(tensors: Tensors, description: dict[str, Any]) -> Distribution:
    listed = description["tensors"]
    layout = Layout(
        tuple(name for name, _, _ in listed),
        tuple(torch.Size(shape) for _, shape, _ in listed),
        tuple(torch.empty(0, dtype=getattr(torch, dtype)).dtype for _, _, dtype in listed),
    )
    layout.unflatten(tensors["anchor"])  # fails unless there is one number for each weight
    given = description["settings"]
    known = {field.name for field in fields(DiffusionSettings)}
    if gone := sorted(name for name, value in given.items() if name not in known and value):
        raise ValueError(f"it was learned with {', '.join(gone)}, which is no longer a setting")
    settings = DiffusionSettings(**{name: given[name] for name in given if name in known})
    autoencoder = _autoencoder(settings, layout, tensors)
    latents, schedule = tensors["latents"], Schedule(settings.diffusion_steps, settings.schedule)
    denoiser = closed_form(settings, latents, schedule)
    if denoiser is None:
        state = _below("denoiser", tensors)
        describe = state.get("time.describe.0.weight")
        descriptor = 0 if describe is None else describe.shape[1]
        network = new_network(settings, latents.shape[1], autoencoder.tokens, descriptor)
        network.load_state_dict(state)
        denoiser = NetworkDenoiser(network, schedule)
    return Distribution(
        settings,
        int(description["seed"]),
        layout,
        tensors["anchor"],
        tensors["clients"],
        tensors["rounds"],
        autoencoder,
        latents,
        int(description["strength"]),
        denoiser,
    )


def _below(prefix: str, tensors: Tensors) -> Tensors:
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _linear(coder: LinearAutoencoder, prefix: str) -> Tensors:
    parts = {"components": coder.components, "scale": coder.scale}
    return {f"{prefix}/{name}": tensor for name, tensor in parts.items()}


def _autoencoder_tensors(coder: Autoencoder) -> Tensors:
    if isinstance(coder, LayeredAutoencoder):
        return {
            name: tensor
            for i, layer in enumerate(coder.layers)
            for name, tensor in _linear(layer, f"layer-{i}").items()
        }
    if isinstance(coder, ConvolutionalAutoencoder):
        state = {f"conv/network/{n}": t for n, t in coder.network.state_dict().items()}
        return state | {
            "conv/scale": coder.scale,
            "conv/mean": coder.mean,
            "conv/deviation": coder.deviation,
        }
    assert isinstance(coder, LinearAutoencoder)
    return _linear(coder, "linear")


def _autoencoder(settings: DiffusionSettings, layout: Layout, tensors: Tensors) -> Autoencoder:
    def linear(prefix: str) -> LinearAutoencoder:
        parts = _below(prefix, tensors)
        return LinearAutoencoder(parts["components"], parts["scale"])

    if "linear/components" in tensors:  # at rank 0, of other kinds, too
        return linear("linear")
    if settings.autoencoder == "layers":
        columns = layout.layers()
        layers = tuple(linear(f"layer-{i}") for i in range(len(columns)))
        return LayeredAutoencoder(layers, tuple(columns), max(len(layer.scale) for layer in layers))
    if settings.autoencoder == "conv":
        parts = _below("conv", tensors)
        state = _below("network", parts)
        network = ConvolutionalNetwork(*state["inward"].shape)  # as many features as weights
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
        coder = ConvolutionalAutoencoder(
            network, parts["scale"], ConvolutionalSettings(settings.chunk_latents)
        )
        coder.mean, coder.deviation = parts["mean"], parts["deviation"]
        return coder
    return linear("linear")
