"""Local differential privacy: an upload reveals little of what the client trained on.

Flower's mod clips the update to the norm C and adds noise of deviation 2C √(2 ln(1.25/δ))/ε to
every weight (the Gaussian mechanism; two updates differ by at most 2C). That is (ε, δ)-differential
privacy of an upload, for ε ≤ 1; R uploads add up. Nobody can repeat the noise: such a run is not
reproducible, on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod

from pfedgpa_app.client.attacks import attacks_updates
from pfedgpa_app.config.resolve import resolve_cached
from pfedgpa_app.core.weights import NOT_FINITE

Handler = Callable[[Message, Context], Message]


def with_local_dp(handler: Handler, message: Message, context: Context) -> Message:
    """Return what ``handler`` replies, made private if ``local-dp-epsilon`` is set.

    A malicious client sends its attack as it is, neither clipped nor with noise.
    """
    config = resolve_cached(context.run_config).config
    reply = handler(message, context)
    client: Any = message.content.config_records["config"]["client"]
    if not config.local_dp_epsilon or attacks_updates(config, client):
        return reply

    sent, made = (m.content.array_records["arrays"] for m in (message, reply))
    if list(sent) != list(made):
        raise ValueError("local-dp-epsilon: this method uploads other tensors than it is sent")
    if not made:  # nothing is uploaded
        return reply
    trained = [name for name, array in sent.items() if _finite(array)]  # all but masks
    if odd := [name for name in trained if not _finite(made[name])]:
        raise ValueError(f"trained {odd[0]} to {NOT_FINITE}")  # its norm cannot be clipped
    weights = copy.copy(message)  # for the mod, which refuses two records of arrays
    weights.content = RecordDict({"arrays": ArrayRecord({name: sent[name] for name in trained})})
    reply.content["arrays"] = ArrayRecord({name: made[name] for name in trained})
    # seed from the system, since forked processes would all draw the same numbers
    np.random.seed()  # noqa: NPY002
    clip = config.local_dp_clip
    mod = LocalDpMod(clip, 2 * clip, config.local_dp_epsilon, config.local_dp_delta)
    private = mod(weights, context, lambda _, __: reply)
    noisy = private.content.array_records["arrays"]
    private.content["arrays"] = ArrayRecord({n: noisy.get(n, array) for n, array in sent.items()})
    return _with_variances(private, sent)


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array.numpy()).all())


def _with_variances(private: Message, sent: ArrayRecord) -> Message:
    """Set a normalisation layer's variance back to what was ``sent`` where noise made it 0 or less.

    This uses nothing that is private.
    """
    noisy = private.content.array_records["arrays"]
    names = [name for name in noisy if name.rpartition(".")[2] == "running_var"]
    for name in names:
        now = noisy[name].numpy()
        noisy[name] = Array(np.where(now > 0, now, sent[name].numpy()))
    return private
