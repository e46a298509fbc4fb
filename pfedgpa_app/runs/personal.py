"""Load a run's personal networks with their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pfedgpa_app.client.adjustment import LEFT, adjusted
from pfedgpa_app.config.resolve import values_of
from pfedgpa_app.core.files import write_json
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.schema import Schema, column_places
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import ConfigError, DataError, near
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.core.weights import Weights, all_finite
from pfedgpa_app.data.images import normalisation
from pfedgpa_app.methods import federation_of
from pfedgpa_app.models.build import forget_edited
from pfedgpa_app.models.faults import fault_of, token_range
from pfedgpa_app.models.networks import load
from pfedgpa_app.runs.about import REST, WEIGHTS, About, read_about, warn_of_changes
from pfedgpa_app.runs.folder import (
    client_called,
    is_running,
    kept_methods,
    kept_settings,
    unfinished,
)
from pfedgpa_app.training.evaluation import FinalScore

ON_NODES = "on-nodes.json"  # {method: clients that keep a part of their network on their nodes}
AT_ONCE = 500  # examples in a batch
_ROUNDING = 1e-3  # how far floats may lie outside 0 to 1


class ClientModel(nn.Module):
    """A client's network, which normalises images itself.

    It takes images [N, C, H, W] as uint8, or as floats from 0 to 1; other data as the network does.
    It returns logits [N, classes].

    Attributes:
        classes: the classes' names, in the order of the logits.
        shape: the shape of one example.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, about: About) -> None:
        super().__init__()
        self.network, self.about = network, about
        self.classes, self.shape = about.schema.classes, about.schema.shape
        mean, std = normalisation(self.shape[0]) if about.schema.pixels else ((0.0,), (1.0,))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.about.schema.pixels:
            if x.dtype == torch.uint8:
                x = x.float() / 255
            x = (x - self.mean) / self.std
        logits: Tensor = self.network(x)
        return logits

    @torch.no_grad()
    def probabilities(self, examples: Any) -> np.ndarray:
        """Return the probability of every class, [N, classes], for examples ``[N, *shape]``.

        Args:
            examples: an array or tensor, or a pandas frame, whose columns are found by name.

        Raises:
            DataError: examples of another shape or kind, with numbers that are not finite, or that
                the network cannot take; a frame that lacks a column.
        """
        if hasattr(examples, "iloc"):
            examples = _rows_of(examples, self.about.schema.columns)
        every = torch.as_tensor(np.ascontiguousarray(examples))
        if tuple(every.shape[1:]) != self.shape:
            raise DataError(
                f"examples are of shape {list(every.shape)}, but the network takes "
                f"[N, {', '.join(map(str, self.shape))}]"
            )
        if every.is_floating_point():
            every = every.float()
            if not all_finite(every):
                raise DataError("examples have a number that is not finite")
        every = _of_kind(self.about.schema, every)
        try:
            parts = [self(part).softmax(1) for part in every.split(AT_ONCE)]
        except Exception as error:  # the user's own network may raise anything
            what = fault_of(error, self.network, self.about.model)
            what = what or f"{type(error).__name__}: {error}"
            if self.about.schema.tokens:
                what += f"; their tokens run from {token_range([every])}"
            raise DataError(f"the network cannot take these examples: {what}") from error
        return np.asarray(torch.cat(parts))


def _rows_of(frame: Any, columns: Sequence[str]) -> np.ndarray:
    """Return a pandas frame's rows as numbers, its ``columns`` alone if both have names.

    Raises:
        DataError: one of ``columns`` is missing or there twice, or one holds something else.
    """
    there = list(frame.columns)
    if columns and all(isinstance(name, str) for name in there):
        frame = frame.iloc[:, column_places("the frame", there, columns)]
    try:
        return np.asarray(frame.to_numpy(dtype=float, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise DataError(f"the frame holds something else than numbers: {error}") from error


def _of_kind(schema: Schema, every: Tensor) -> Tensor:
    """Convert examples to the type that the network takes.

    Raises:
        DataError: they are of another kind.
    """
    if schema.tokens:
        if bool((every != every.long()).any()):
            raise DataError("the network takes whole numbers, but some examples have others")
        return every.long()
    if not schema.pixels:
        return every.float()
    if every.dtype != torch.uint8 and len(every):
        low, high = map(float, every.float().aminmax())
        if not every.is_floating_point() or low < -_ROUNDING or high > 1 + _ROUNDING:
            raise DataError(
                "images must be uint8 from 0 to 255, or floats from 0 to 1; these are "
                f"{str(every.dtype).removeprefix('torch.')} from {low:g} to {high:g}"
            )
    return every


def note_parts_on_nodes(folder: Path, method: str, scores: Mapping[int, FinalScore]) -> None:
    """Write which of the clients of ``method`` keep a part of their network on their nodes.

    Without these parts, the weights in a deployment's folder are nobody's.
    """
    if keep := [client for client, score in scores.items() if score.own_part]:
        (folder / WEIGHTS).mkdir(exist_ok=True)
        write_json(folder / WEIGHTS / ON_NODES, _on_nodes(folder) | {method: sorted(keep)})


def _on_nodes(folder: Path) -> dict[str, list[int]]:
    """Return what ``note_parts_on_nodes`` wrote; {} in a simulation.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / WEIGHTS / ON_NODES
    try:
        found: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def the_method(folder: Path, method: str) -> str:
    """Return ``method``, or by default the run's last method all of whose weights are there.

    Raises:
        ConfigError: the run has no weights, or none or only a part of those of ``method``.
    """
    kept, elsewhere = kept_methods(folder), _on_nodes(folder)
    alone = {path.name.partition(".client-")[0] for path in (folder / WEIGHTS).glob("*.client-*")}
    there = [
        name
        for name in kept
        if name not in elsewhere
        and (weights_file(folder, name).is_file() or federation_of(name) in alone)
    ]
    last = kept[-1]
    if method in elsewhere or (not there and last in elsewhere):
        whole = f"; all weights of {', '.join(there)} are here (--method)" if there else ""
        raise ConfigError(f"{folder}: {_kept_on_nodes(method or last)}{whole}")
    if not there:
        why = "its run had save-weights=false, or failed"
        if is_running(folder):
            why = "its run is still going, and none of its methods is done"
        raise ConfigError(f"{folder}: has no weights: {why}")
    if method and method not in there:
        raise ConfigError(
            f"{folder}: has no weights of {method!r}{near(method, there)} It has those of "
            f"{', '.join(there)}"
        )
    if not method and there[-1] != last:
        why = f"the weights of {last} are no longer there"
        if last in elsewhere:
            why = _kept_on_nodes(last)
        warn_once(f"{unfinished(folder) or f'{folder}: {why}'}; using those of {there[-1]}")
    return method or there[-1]


def _kept_on_nodes(method: str) -> str:
    return (
        f"clients of {method} keep a part of their networks on their nodes, without which the "
        "weights in this folder are not what they use"
    )


def weights_file(folder: Path, method: str) -> Path:
    """Return the file with the weights that the server made by ``method`` in a run's folder."""
    return folder / WEIGHTS / f"{method}.safetensors"


def own_weights(tensors: Weights, client: int) -> Weights:
    """Return one client's weights from the tensors that a method's file in ``weights/`` holds."""
    return {
        name.partition("/")[2]: tensor
        for prefix in ("global", f"client-{client}")
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def _own_of(tensors: Weights) -> set[int]:
    """Return the clients that have tensors of their own among ``tensors``."""
    named = {name.partition("/")[0] for name in tensors} - {"global"}
    return {int(name.removeprefix("client-")) for name in named}


def _made_for(file: Path) -> set[int] | None:
    """Return the clients that the weights in ``file`` are for; None if it does not say."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        numbers = (opened.metadata() or {}).get("clients")  # earlier versions did not keep them
    return set(json.loads(numbers)) if numbers else None


def _check_made(
    folder: Path, client: int, method: str, founders: int, own: set[int], made_for: set[int] | None
) -> None:
    """Refuse a client for which ``method`` made nothing; warn if it got no weights of its own.

    Args:
        founders: how many clients there were in the rounds.
        own: the clients that have weights of their own.
        made_for: the clients that have any weights; None in a run of an earlier version.

    Raises:
        ConfigError: ``client`` has no weights.
    """
    some = {each for each in own if each < founders}
    if made_for is None:
        made_for = some or set(range(founders))
    if client in made_for:
        if some and client < founders and client not in some:
            warn_once(
                f"{folder}: client {client} took no part: {method} sent it the weights that all "
                "start from, and none of its own"
            )
    elif client >= founders:
        raise ConfigError(
            f"{folder}: client {client} joined after the last round, and the version that ran "
            f"it did not keep what {method} sent it then: run it anew"
        )
    else:
        raise ConfigError(
            f"{folder}: client {client} took no part, so {method} made nothing for it: choose a "
            "method that sends all the same weights (--method fedavg, if the run had it), or let "
            "it join (docs/join.md)"
        )


def client_weights(folder: Path, client: int | str, method: str = "") -> Weights:
    """Return the weights that ``client`` was evaluated with, before any fine-tuning.

    Args:
        client: its number, or the name of a user of its.
        method: by default the last of the run's methods that has weights.

    Raises:
        ConfigError: the run has no such client or method, or its weights cannot be read.
    """
    method = the_method(folder, method)
    settings = values_of(kept_settings(folder))
    client = client_called(folder, client)
    founders = settings["num-clients"] - settings.get("join-clients", 0)
    sent = weights_file(folder, method)
    federation = federation_of(method)
    own, by = (  # the client wrote these itself
        folder / WEIGHTS / f"{federation}.{kind}-{client}.safetensors" for kind in ("client", LEFT)
    )
    try:
        made, kept, adjustment = (
            load_file(file) if file.is_file() else {} for file in (sent, own, by)
        )
        made_for = _made_for(sent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: the weights of {method} cannot be read: {error}") from error
    if not kept:
        _check_made(folder, client, method, founders, _own_of(made), made_for)
    # runs of earlier versions do not say what is on their nodes
    if settings.get("logit-adjustment") and settings["dataset"] == NODES:
        raise ConfigError(
            f"{folder}: clients added their own class frequencies (logit-adjustment = true), which "
            "are on their nodes: these weights alone are not what they use"
        )
    return adjusted(own_weights(made, client) | kept, adjustment)


def load_client(run: str | Path, client: int | str, method: str = "") -> ClientModel:
    """Return the network that ``client`` of a run was given, ready to predict.

    Args:
        run: the run's folder.
        client: its number or, where clients are users (``partition=natural``), a user's name.
        method: whose weights; by default the last of the run's methods that has weights.

    Raises:
        ConfigError: there is no such run, client or method, or its network cannot be made again.
    """
    folder = user_path(run)
    about = read_about(folder)
    forget_edited()
    network, weights = about.network(), client_weights(folder, client, method)
    warn_of_changes(folder, about, about.model)
    rest = folder / WEIGHTS / REST
    try:
        load(network, (load_file(rest) if rest.is_file() else {}) | weights)
    except RuntimeError as error:
        raise ConfigError(
            f"{folder}: its weights do not fit the network {about.model!r} any more: {error}"
        ) from error
    return ClientModel(network.eval(), about).eval()
