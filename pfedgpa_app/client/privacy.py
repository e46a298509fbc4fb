"""Local differential privacy: what a client uploads tells little of what it trained on.

By Flower's mod: the update is clipped to the norm C, and noise is added to every weight, of
deviation 2C √(2 ln(1.25/δ))/ε (the Gaussian mechanism; two updates differ by at most 2C). That
is (ε, δ)-differential privacy of an upload, for ε ≤ 1; R uploads add up. The noise is nobody's to
repeat: such a run is not reproducible, on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod

from pfedgpa_app.config.resolve import resolve_cached

Handler = Callable[[Message, Context], Message]


def with_local_dp(handler: Handler, message: Message, context: Context) -> Message:
    """What ``handler`` replies, made private where the run is to be."""
    config = resolve_cached(context.run_config).config
    if not config.local_dp_epsilon:
        return handler(message, context)

    reply = handler(message, context)
    sent, made = (m.content.array_records["arrays"] for m in (message, reply))
    if list(sent) != list(made):
        raise ValueError("local-dp-epsilon: this method uploads other tensors than it is sent")
    if not made:  # nothing is uploaded
        return reply
    weights = copy.copy(message)  # alone: the mod takes no message with two records of them
    weights.content = RecordDict({"arrays": sent})
    # from the system: forked processes would all draw the same from NumPy's own stream
    np.random.seed()  # noqa: NPY002
    clip = config.local_dp_clip
    mod = LocalDpMod(clip, 2 * clip, config.local_dp_epsilon, config.local_dp_delta)
    private = mod(weights, context, lambda _, __: reply)
    return _with_variances(private, sent)


def _with_variances(private: Message, sent: ArrayRecord) -> Message:
    """A normalisation layer's variance is as it was ``sent`` where noise made it none.

    This goes by nothing that is private.
    """
    noisy = private.content.array_records["arrays"]
    names = [name for name in noisy if name.rpartition(".")[2] == "running_var"]
    for name in names:
        now = noisy[name].numpy()
        noisy[name] = Array(np.where(now > 0, now, sent[name].numpy()))
    return private
