"""Logit adjustment: the shared classifier need not learn each client's class frequencies.

A client's logits are the network's plus log π_y, where π are the frequencies of the classes in its
training data (Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314, eq. 10; in
federated learning Zhang et al., arXiv 2209.00189). Its loss is the cross-entropy of these logits.
So the client simply adds log π to the last layer's bias that it is sent, and takes it off the bias
that it uploads. The frequencies stay with the client.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pfedgpa_app.core.weights import Weights

LEFT = "adjustment"  # the kind of file in which a simulated client saves it


def log_frequencies(labels: Tensor, classes: int) -> Tensor:
    """Return the logarithms of the classes' frequencies [classes], less their mean.

    Half an example is added to each class, so that none is impossible.
    """
    counts = torch.bincount(labels, minlength=classes).float()
    logarithms = (counts + 0.5).log()
    return logarithms - logarithms.mean()


def adjusted(weights: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Weights:
    """Return ``weights``, each plus what ``by`` has of the same name."""
    return {name: t + by[name].to(t) if name in by else t for name, t in weights.items()}
