"""A method's two halves as server and client call them, with every call and answer checked."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import listed
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights, odd_places
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.methods.averaging import Averaging
from pfedgpa_app.methods.base import ClientTask, Personaliser, Rounds, Trained
from pfedgpa_app.methods.contract import (
    GUIDE,
    Hook,
    MethodError,
    check_constant,
    check_shapes,
    check_tensors,
    kind_of,
    refuse_not_finite,
)
from pfedgpa_app.training.sgd import Recipe


def shared_names(
    name: str, kind: type[Rounds[Any]], config: Config, names: list[str]
) -> list[str] | None:
    """Which ``names`` of the network's weights clients share; None for a method without ``shared``.

    Raises:
        MethodError: its ``shared`` failed, or returned anything but some of ``names``.
    """
    if not issubclass(kind, Averaging):
        return None
    hook = Hook(name, kind, "shared")
    with hook.errors_named():
        found: Any = kind.shared(config, list(names))
    wanted = "expected a list of names of the network's weights, some of those that it is given"
    if isinstance(found, str) or not isinstance(found, Collection):
        raise hook.wrong(f"returned {kind_of(found)}", wanted)
    for each in found:
        if each not in names:
            raise hook.wrong(f"returned {each!r}, which is no weight's name", wanted)
    return list(found)


def begun(name: str, kind: type[Rounds[Any]], config: Config, initial: Weights) -> Any:
    """The state that the rounds of the method called ``name`` begin with.

    The method gets copies of ``initial``, because the run's other federations begin from it, too.

    Raises:
        MethodError: the method's ``shared`` or ``begin`` fails.
    """
    shared_names(name, kind, config, list(initial))
    with Hook(name, kind, "begin").errors_named():
        return kind.begin(config, {name: tensor.clone() for name, tensor in initial.items()})


class ServerHalf:
    """The server half of the method called ``name``.

    Its functions raise a MethodError if the method's code fails, or returns what it must not.
    """

    def __init__(self, name: str, method: Rounds[Any], initial: Weights) -> None:
        """``initial``: the network's weights; what clients are sent must have their shapes."""
        self.name, self.method, self._initial = name, method, initial
        shared: Weights = getattr(method.state, "global_weights", None) or {}
        self._begun = {name: torch.empty_like(t, device="meta") for name, t in shared.items()}
        self._odd = odd_places(shared | self.expected_upload(0))

    def _hook(self, hook: str, server_round: int) -> Hook:
        return Hook(self.name, type(self.method), hook, server_round)

    def _weights(self, hook: Hook, *given: Any) -> Weights:
        """Call ``hook`` and return its weights, checked."""
        with hook.errors_named():
            weights: Weights = getattr(self.method, hook.name)(*given)
        check_tensors(hook, weights)
        check_shapes(hook, weights, self._initial)
        return weights

    def rate(self, server_round: int) -> float:
        """The factor on clients' learning rates in a round."""
        hook = self._hook("rate", server_round)
        with hook.errors_named():
            rate = self.method.rate(server_round)
        if not isinstance(rate, (int, float)):
            raise hook.wrong(f"returned {kind_of(rate)}", "expected a number")
        return rate

    def download(self, server_round: int, client: int) -> Weights:
        """What ``client`` is sent to train from."""
        return self._weights(self._hook("download", server_round), client)

    def evaluation_download(self, server_round: int, client: int) -> Weights:
        """What ``client`` is sent to be evaluated with."""
        return self._weights(self._hook("evaluation_download", server_round), client)

    def evaluation_of(self, server_round: int, client: int, given: Weights) -> Weights:
        """What a joining client, which trains from ``given``, is sent to be evaluated with."""
        return self._weights(self._hook("evaluation_of", server_round), client, given)

    def rival(self, server_round: int, client: int) -> Weights | None:
        """Other weights that ``client`` tries on its validation images."""
        hook = self._hook("rival", server_round)
        with hook.errors_named():
            rival = self.method.rival(client)
        if rival is not None:
            check_tensors(hook, rival)
            check_shapes(hook, rival, self._initial)
        return rival

    def expected_upload(self, server_round: int) -> Weights:
        """Tensors of the names, shapes and dtypes that a client must upload."""
        hook = self._hook("expected_upload", server_round)
        with hook.errors_named():
            expected = self.method.expected_upload()
        check_tensors(hook, expected)
        return expected

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's uploads.

        Raises:
            MethodError: the method's code fails, or the shared weights are no longer finite where
                they were, or have changed in name, shape or dtype.
        """
        hook = self._hook("aggregate", server_round)
        with hook.errors_named():
            self.method.aggregate(server_round, uploads)
        now: Weights = {}
        if self._begun:
            now = getattr(self.method.state, "global_weights", None)  # type: ignore[assignment]
            check_constant(hook, now, self._begun)
        refuse_not_finite(hook, self.expected_upload(server_round) | now, self._odd)


def personalised(
    name: str, method: Personaliser[Any], initial: Weights, clients: Sequence[int]
) -> dict[int, Weights]:
    """The weights that ``method``, called ``name``, makes for each of ``clients``.

    Raises:
        MethodError: it fails, or weights are missing, have other shapes or are not finite.
    """
    hook = Hook(name, type(method), "personalise")
    with hook.errors_named():
        made: Any = method.personalise()
    return _of_each(hook, made, initial, clients)


def first_downloads(
    name: str, method: Personaliser[Any], initial: Weights, clients: Sequence[int]
) -> dict[int, Weights]:
    """What ``method``, called ``name``, first sends to each of ``clients``, which join.

    Raises:
        MethodError: as ``personalised``.
    """
    hook = Hook(name, type(method), "first_download", method.config.num_server_rounds)
    with hook.errors_named():
        made: Any = method.first_download(clients)
    return _of_each(hook, made, initial, clients)


def joined(
    name: str,
    method: Personaliser[Any],
    initial: Weights,
    server_round: int,
    uploads: dict[int, Upload],
) -> dict[int, Weights]:
    """What ``method``, called ``name``, sends to joining clients after these uploads.

    Raises:
        MethodError: as ``personalised``.
    """
    hook = Hook(name, type(method), "join", server_round)
    with hook.errors_named():
        made: Any = method.join(uploads)
    return _of_each(hook, made, initial, list(uploads))


def _of_each(hook: Hook, made: Any, initial: Weights, clients: Sequence[int]) -> dict[int, Weights]:
    """Return the weights that ``hook`` has ``made`` for each of ``clients``, checked."""
    wanted = "expected a dict of every client's weights by its number"
    if not isinstance(made, Mapping):
        raise hook.wrong(f"returned {kind_of(made)}", wanted)
    if missing := [str(client) for client in clients if client not in made]:
        raise hook.wrong(f"returned nothing for client {listed(missing)}", wanted)
    odd = odd_places(initial)
    looked_at = dict[int, Tensor]()  # by identity: what many clients are sent is checked once
    for client in clients:
        check_tensors(hook, made[client], f"client {client}'s weights")
        check_shapes(hook, made[client], initial)
        new = {n: t for n, t in made[client].items() if n in initial and id(t) not in looked_at}
        looked_at |= {id(t): t for t in new.values()}
        refuse_not_finite(hook, new, odd)
    return {client: made[client] for client in clients}


def learned(name: str, method: Personaliser[Any]) -> WeightDistribution | None:
    """The distribution that ``method``, called ``name``, has learned, if any.

    Raises:
        MethodError: it fails, or returns something else.
    """
    hook = Hook(name, type(method), "learned")
    with hook.errors_named():
        found: Any = method.learned()
    if found is not None and not isinstance(found, WeightDistribution):
        raise hook.wrong(f"returned {kind_of(found)}", "expected a WeightDistribution or None")
    return found


def references(name: str, method: Personaliser[Any], clients: Iterable[int]) -> dict[int, Weights]:
    """The weights of ``clients``, if any, that their personalised ones must not merely copy.

    Raises:
        MethodError: ``method``, called ``name``, fails, or returns something else than weights.
    """
    hook, found = Hook(name, type(method), "reference"), dict[int, Weights]()
    for client in clients:
        with hook.errors_named():
            weights = method.reference(client)
        if weights is not None:
            check_tensors(hook, weights)
            found[client] = weights
    return found


def reported(name: str, method: Personaliser[Any]) -> dict[str, Any]:
    """Further entries of the run's summary from ``method``, called ``name``.

    Raises:
        MethodError: it fails, or returns what JSON cannot hold.
    """
    hook = Hook(name, type(method), "report")
    wanted = "expected a dict that JSON can hold: of numbers, texts, lists and dicts"
    with hook.errors_named():
        more: Any = method.report()
    if not isinstance(more, Mapping):
        raise hook.wrong(f"returned {kind_of(more)}", wanted)
    for key, value in more.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise hook.wrong(f"returned {kind_of(value)} as {key!r}", wanted) from error
    return dict(more)


class ClientHalf:
    """The client half of the method called ``name``, in one round; it raises MethodErrors, too."""

    def __init__(self, name: str, kind: type[Rounds[Any]], server_round: int) -> None:
        self.name, self.kind, self.round = name, kind, server_round
        self.title, self.adjustable, self.beside = kind.title, kind.adjustable, kind.beside

    def _hook(self, hook: str) -> Hook:
        return Hook(self.name, self.kind, hook, self.round)

    def is_plain_sgd(self) -> bool:
        """Whether a round is SGD by recipes, nothing else."""
        return self.kind.is_plain_sgd()

    def asks_validation(self, config: Config) -> bool:
        """Whether clients report the losses of what they are sent on their validation images."""
        with self._hook("asks_validation").errors_named():
            return self.kind.asks_validation(config, self.round)

    def start(self, weights: Weights, state: Weights) -> Weights:
        """The weights that a client trains from."""
        hook = self._hook("start")
        with hook.errors_named():
            start = self.kind.start(weights, state)
        check_tensors(hook, start)
        return start

    def recipes(self, config: Config, names: Sequence[str]) -> list[Recipe]:
        """The recipes by which a client trains in the round."""
        with self._hook("recipes").errors_named():
            return self.kind.recipes(config, names, self.round)

    def train(self, task: ClientTask) -> Trained:
        """Train in the round; pass the result to ``checked``."""
        with self._hook("train").errors_named():
            return self.kind.train(task)

    def upload(self, trained: Weights, weights: Weights, state: Weights, loss: float) -> Trained:
        """The result of a round by recipes, to be passed to ``checked``."""
        hook = self._hook("upload")
        with hook.errors_named():
            both = self.kind.upload(trained, weights, state)
            return Trained(*both, loss)

    def checked(self, trained: Any, network: Mapping[str, Tensor]) -> Trained:
        """Return the result of a round if it is valid.

        Args:
            network: tensors of the network's names and shapes.

        Raises:
            MethodError: ``trained`` is no valid ``Trained``, or its state holds what a client
                cannot be evaluated with.
        """
        hook = self._hook("upload" if self.is_plain_sgd() else "train")
        must = "it must `return Trained(upload, state, loss)`, from pfedgpa_app.methods.base"
        if not isinstance(trained, Trained):
            raise hook.wrong(f"returned {kind_of(trained)}", must)
        check_tensors(hook, trained.upload, "upload")
        check_tensors(hook, trained.state, "state")
        if not isinstance(trained.loss, (int, float)):
            loss = f"returned {kind_of(trained.loss)} as loss"
            raise hook.wrong(loss, f"expected a number, such as float(loss); {must}")
        if self.kind.evaluated is Rounds.evaluated:
            odd = [name for name in trained.state if name not in network]
            if odd:
                raise self._no_weights(hook, f"keeps {listed(odd, 3)} in its client's state", odd)
            check_shapes(hook, trained.state, network)
        return trained

    def evaluated(self, weights: Weights, state: Weights, network: Mapping[str, Tensor]) -> Weights:
        """The weights that a client is evaluated with, from its download and its own state.

        Raises:
            MethodError: the method fails, or returns other tensors than the network's weights.
        """
        hook = self._hook("evaluated")
        with hook.errors_named():
            found = self.kind.evaluated(weights, state)
        check_tensors(hook, found)
        if odd := [name for name in found if name not in network]:
            raise self._no_weights(hook, f"returned {listed(odd, 3)}", odd)
        check_shapes(hook, found, network)
        return found

    def _no_weights(self, hook: Hook, did: str, names: list[str]) -> MethodError:
        each = "which is not a weight" if len(names) == 1 else "which are not weights"
        return hook.wrong(
            f"{did}, {each} of the network",
            "let `evaluated` return only the network's weights; by default it returns "
            f"{{**download, **state}} ({GUIDE})",
        )
