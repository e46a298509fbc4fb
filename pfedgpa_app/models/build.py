"""Build the run's network, by ``model``: the paper family's, torchvision's or the user's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pfedgpa_app.core import own_code
from pfedgpa_app.core.own_code import imported, in_users_folder, is_reference
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.randomness import seeded
from pfedgpa_app.core.schema import WHOLE_NUMBERS, Schema
from pfedgpa_app.core.sections import TORCHVISION, TrainingSettings
from pfedgpa_app.core.settings import ConfigError, listed, near
from pfedgpa_app.core.weights import NOT_FINITE, Weights, all_finite, can_be_sent, module_of
from pfedgpa_app.models.faults import fault_of, token_range
from pfedgpa_app.models.layout import choose_layout
from pfedgpa_app.models.networks import (
    MADE_FOR_ANY,
    NETWORKS,
    SHAPES,
    head_of,
    order_weights,
    used_after,
    weight_names,
)


def network_of(settings: TrainingSettings, schema: Schema) -> nn.Module:
    """Return a new network for the data, initialised from the run's seed, alike on every machine.

    Raises:
        ConfigError: ``model`` names no network that fits or can be used; it says why and what to
            do.
    """
    return copy.deepcopy(_template_of(settings, schema))


def tensors_of(settings: TrainingSettings, schema: Schema) -> Mapping[str, Tensor]:
    """Return the tensors of such a network by name, which must not be changed.

    Raises:
        ConfigError: as ``network_of``.
    """
    return _template_of(settings, schema).state_dict()


def try_tokens(settings: TrainingSettings, schema: Schema, tokens: Tensor) -> None:
    """Refuse a network that fails on ``tokens``, examples of the data that hold the extreme ones.

    Raises:
        ConfigError: it says which the extreme ones are.
    """
    network, model = network_of(settings, schema).eval(), settings.model
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(tokens)
    except Exception as error:  # whatever foreign code raises
        raise ConfigError(
            f"model = {model!r}: fails on the data's tokens, which run from "
            f"{token_range([tokens])}: {fault_of(error, network, model)}; an embedding needs a row "
            "for every token, and counts them from 0"
        ) from error


def forget_edited() -> None:
    """Have users' networks made anew where their code was edited since it was imported."""
    if own_code.forget_edited():
        _template.cache_clear()


def classifier_bias(settings: TrainingSettings, schema: Schema) -> str:
    """Return the name of the bias [classes] of the network's last layer.

    Raises:
        ConfigError: the layer has none that is trained, or there is no network.
    """
    network = _template_of(settings, schema)
    *_, last = weight_names(network)
    bias = f"{module_of(last)}.bias".removeprefix(".")
    trained = dict(network.named_parameters()).get(bias)
    is_one = trained is not None and trained.shape == (len(schema.classes),)
    if after := used_after(network, module_of(last)):
        raise ConfigError(
            f"logit-adjustment = true: changes the last layer's bias, but the network uses {after} "
            f"after {module_of(last)}: train that, or name it by head="
        )
    if bias not in weight_names(network) or not is_one:
        raise ConfigError(
            f"logit-adjustment = true: changes the last layer's bias, but the network's last layer "
            f"({type(head_of(network)).__name__}) has none that is trained, of a number for each "
            "class: give it one, or name another layer by head="
        )
    return bias


def _template_of(settings: TrainingSettings, schema: Schema) -> nn.Module:
    return _template(
        settings.model,
        settings.model_weights,
        settings.head,
        settings.code_dir,
        settings.seed,
        schema,
    )


@lru_cache(maxsize=4)
def _template(
    model: str, weights: str, head: str, code_dir: str, seed: int, schema: Schema
) -> nn.Module:
    """Make and check the network that is copied for each caller, once per process."""
    made = _made_by(seed, model, code_dir, schema)
    if is_reference(model):
        _check_alike(made, _made_by(seed, model, code_dir, schema), model)
    used, outputs = _used_in_order(made, model, schema)
    order_weights(made, used, head, outputs)
    _check_types(made, model)
    if weights:
        _load_from(made, weights)
    choose_layout(made, schema.shape)
    return made


def _check_types(network: nn.Module, model: str) -> None:
    """Refuse a network that shares weights of a type which Flower's messages cannot hold.

    Raises:
        ConfigError: it names one.
    """
    tensors = network.state_dict()
    for name in weight_names(network):
        if not can_be_sent(tensors[name]):
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise ConfigError(
                f"model = {model!r}: its {name} is of {kind}, which messages cannot hold: make it "
                "float32; precision=bfloat16 trains such weights faster"
            )


def _made_by(seed: int, model: str, code_dir: str, schema: Schema) -> nn.Module:
    with seeded(seed):
        made = _made(model, code_dir, schema)
        if any(is_lazy(tensor) for tensor in (*made.parameters(), *made.buffers())):
            with torch.no_grad():  # lazy layers learn their sizes from the first example
                _logits(made.eval(), _examples(schema), model, len(schema.classes))
            made.train()
        return made


def _check_alike(made: nn.Module, again: nn.Module, model: str) -> None:
    """Refuse a network that turns out different each time it is made: other processes would differ.

    Raises:
        ConfigError: it names the tensors that differ.
    """
    before, after = made.state_dict(), again.state_dict()
    odd = [name for name in before if name not in after or not _alike(before[name], after[name])]
    if odd or len(after) > len(before):
        raise ConfigError(
            f"model = {model!r}: makes a different network each time ({', '.join(odd[:3])}): fix "
            "the seed of what it draws with a generator of its own, as in default_rng(0)"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, equal_nan=True)


def _made(model: str, code_dir: str, schema: Schema) -> nn.Module:
    classes, shape = len(schema.classes), schema.shape
    if model.startswith(TORCHVISION):
        return _torchvisions(model, classes)
    if is_reference(model):
        return _own(model, code_dir, classes, shape)
    if model == "auto":
        if schema.tokens or len(shape) not in (1, 3):
            what = "whole numbers" if schema.tokens else f"examples of shape {list(shape)}"
            raise ConfigError(
                f"model = auto: no built-in network takes {what}: {_otherwise(schema)}give your "
                "own, model=MODULE:CALLABLE (docs/own.md)"
            )
        model = SHAPES.get(shape) or ("mlp" if len(shape) == 1 else "conv")
    if model in MADE_FOR_ANY:
        fits = len(shape) == (1 if model == "mlp" else 3)
        if not fits or schema.tokens:
            what = f"does not take examples of shape {list(shape)}"
            raise ConfigError(f"model = {model}: {what}: {_otherwise(schema)}set model=auto")
        return MADE_FOR_ANY[model](classes, shape)
    fitting = next(s for s, name in SHAPES.items() if name == model)
    if shape != fitting:
        wanted, found = ("×".join(map(str, s)) for s in (fitting, shape))
        raise ConfigError(
            f"model = {model}: takes images of {wanted}, but these are {found}: model=auto takes "
            "any size"
        )
    return NETWORKS[model](classes)


def _otherwise(schema: Schema) -> str:
    """Say how examples may be given so that a built-in network takes them."""
    if schema.tokens:
        return "convert measurements and counts to floats, or "
    if len(schema.shape) == 2:
        return "if they are grey images, give x[:, None], of one channel; otherwise "
    return ""


def _torchvisions(model: str, classes: int) -> nn.Module:
    from torchvision import models

    name = model.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"model = {model!r}: torchvision has no classifier {name!r}{near(name, known)}"
        )
    made: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return made


def _own(model: str, code_dir: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    build = imported(model, code_dir, "model")
    if not callable(build):
        raise ConfigError(f"model = {model!r}: is a {type(build).__name__}, not a callable")
    try:
        inspect.signature(build).bind(classes, shape)
    except TypeError as error:
        raise ConfigError(
            f"model = {model!r}: cannot be called with (classes, shape), as in "
            f"({classes}, {shape}): {error}"
        ) from error
    except ValueError:  # built-ins have no signature
        pass
    try:
        with in_users_folder():
            made = build(classes, shape)
    except Exception as error:  # whatever foreign code raises
        raise ConfigError(
            f"model = {model!r}: called with ({classes}, {shape}) it raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"model = {model!r}: returns a {type(made).__name__}, not a torch.nn.Module"
        )
    return made


def _load_from(network: nn.Module, path: str) -> None:
    """Load a file's weights; a last layer that is not wholly there keeps its initial weights.

    Raises:
        ConfigError: the file cannot be read, is of another network, or has numbers that are not
            finite.
    """
    found, own, head = _given(path), network.state_dict(), _last_layer(network)
    fitting = {n: t for n, t in found.items() if n in own and _fits(t, own[n])}
    if missing := [n for n in own if n not in fitting and n not in head]:
        why = "has no" if missing[0] not in found else "has another shape or type of"
        raise ConfigError(
            f"model-weights = {path!r}: is of another network: {why} {missing[0]}"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    if odd := [n for n, t in fitting.items() if not all_finite(t) and all_finite(own[n])]:
        raise ConfigError(f"model-weights = {path!r}: {odd[0]} has {NOT_FINITE}")
    if not head <= fitting.keys():
        fitting = {name: tensor for name, tensor in fitting.items() if name not in head}
    network.load_state_dict(fitting, strict=False)


def remarks_on_weights(settings: TrainingSettings, schema: Schema) -> Iterator[str]:
    """Say what of ``model-weights`` is left out, and whether the last layer is new."""
    if not settings.model_weights:
        return
    network = network_of(settings, schema)
    found, own, head = _given(settings.model_weights), network.state_dict(), _last_layer(network)
    of = f"model-weights = {settings.model_weights!r}"
    if extra := [name for name in found if name not in own]:
        yield f"{of}: the network has no {listed(extra, 3)}: is the file of another one?"
    if not all(name in found and _fits(found[name], own[name]) for name in head):
        yield f"{of}: has no {listed(sorted(head), 3)} of this shape: the last layer begins anew"


def _last_layer(network: nn.Module) -> set[str]:
    last = module_of(weight_names(network)[-1])
    return {name for name in network.state_dict() if module_of(name) == last}


def _fits(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _given(path: str) -> Weights:
    """Read what ``model-weights`` names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return _read(user_path(path))
    except Exception as error:  # torch and safetensors raise all kinds on damaged files
        why = str(error)
        if type(error).__name__ == "UnpicklingError":  # its text says how to load it with code
            why = "write it by torch.save(model.state_dict(), …)"
        raise ConfigError(
            f"model-weights = {path!r}: cannot be read as safetensors or as a torch file of "
            f"tensors alone: {why}"
        ) from error


def _read(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return load_file(path)
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError("it holds no dict of tensors")
    return dict(found)


def _used_in_order(network: nn.Module, model: str, schema: Schema) -> tuple[list[str], list[str]]:
    """Return the names of the modules in the order in which an example passes them.

    Beside them, the names of those whose output is the network's.

    Raises:
        ConfigError: the network does not take such examples, returns no logits of all classes, or
            cannot be trained.
    """
    probe, used, made = copy.deepcopy(network), list[str](), dict[str, Any]()
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: used.append(name))
        module.register_forward_hook(lambda *given, name=name: made.update({name: given[-1]}))
    with torch.random.fork_rng(devices=[]):
        examples, classes = _examples(schema), len(schema.classes)
        _check_alone(probe.eval(), examples, model, classes)
        used.clear()
        logits = _logits(probe.train(), examples, model, classes)
    trained = {n: p for n, p in probe.named_parameters() if p.requires_grad}
    last_uses = _last_uses(logits, trained)
    if not trained:
        raise ConfigError(f"model = {model!r}: has no parameter that is trained")
    odd = [n for n, p in trained.items() if not p.is_floating_point()]
    if odd:
        raise ConfigError(f"model = {model!r}: {odd[0]} is trained but not floating-point")
    try:
        gradients = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
    except RuntimeError as error:
        raise ConfigError(f"model = {model!r}: has no gradient: {error}") from error
    idle = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    if idle:
        raise ConfigError(
            f"model = {model!r}: {', '.join(idle[:3])} takes no part in its output: leave it out, "
            "or freeze it with requires_grad_(False)"
        )
    return _ordered(used, last_uses), [name for name, output in made.items() if output is logits]


def _last_uses(logits: Tensor, trained: dict[str, nn.Parameter]) -> dict[str, int]:
    """Return, by module, when its own weights are used last to make ``logits``.

    A module that is not called may lend its weights, as by ``F.linear(x, self.head.weight)``.
    """
    owner = {id(parameter): module_of(name) for name, parameter in trained.items()}
    found: dict[str, int] = {}
    nodes, seen = [logits.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for before, _ in node.next_functions:
            module = owner.get(id(getattr(before, "variable", None)))
            if module is not None:  # numbers rise in the order in which nodes are made
                found[module] = max(found.get(module, 0), node._sequence_nr())
        nodes += [before for before, _ in node.next_functions]
    return found


def _ordered(called: list[str], last_uses: dict[str, int]) -> list[str]:
    """Order modules by when their weights are used last.

    Those without weights of their own come after the one that was called before them.
    """
    following: dict[str, list[str]] = {}
    before = ""
    for name in reversed(dict.fromkeys(reversed(called))):  # where it was called last
        if name in last_uses:
            before = name
        else:
            following.setdefault(before, []).append(name)
    first = following.pop("", []) if "" not in last_uses else []
    ordered = sorted(last_uses, key=lambda name: last_uses[name])
    return first + [each for name in ordered for each in (name, *following.get(name, []))]


def _examples(schema: Schema) -> Tensor:
    """Make two examples that a network must take."""
    if schema.tokens:
        return torch.zeros(2, *schema.shape, dtype=torch.long)
    return torch.randn(2, *schema.shape)


def _check_alone(network: nn.Module, examples: Tensor, model: str, classes: int) -> None:
    """Refuse a network in which an example's logits depend on the others of its batch.

    A network that normalises by the batch on purpose is not refused.
    """
    both, again = (_logits(network, examples, model, classes) for _ in range(2))
    norms = (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if not all(norm.track_running_stats for norm in norms):
        return
    alone = _logits(network, examples[1:], model, classes)
    if torch.equal(both, again) and not torch.allclose(both[1:], alone, rtol=1e-2, atol=1e-3):
        raise ConfigError(
            f"model = {model!r}: in eval() mode its output for an example depends on the "
            "others beside it: it mixes a batch's examples. torch's recurrent layers and "
            "attention need batch_first=True, and examples as [batch, steps, features]"
        )


def _logits(network: nn.Module, examples: Tensor, model: str, classes: int) -> Tensor:
    number = f"{len(examples)} example{'s' if len(examples) > 1 else ''}"
    try:
        logits = network(examples)
    except Exception as error:  # whatever foreign code raises
        whole = "" if examples.is_floating_point() else f"; {WHOLE_NUMBERS}"
        raise ConfigError(
            f"model = {model!r}: does not take {number} of shape {list(examples.shape[1:])} "
            f"({examples.dtype}): {type(error).__name__}: {error}{whole}"
        ) from error
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model = {model!r}: returns {kind} in {'train' if network.training else 'eval'}() "
            "mode, but must return one floating-point tensor of logits"
        )
    if logits.shape != (len(examples), classes):
        raise ConfigError(
            f"model = {model!r}: for {number} its output is of shape {list(logits.shape)}, but "
            f"{classes} classes need [{len(examples)}, {classes}]"
        )
    if bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise ConfigError(
            f"model = {model!r}: returns probabilities, but must return logits: leave out its last "
            "softmax, the loss has one"
        )
    return logits
