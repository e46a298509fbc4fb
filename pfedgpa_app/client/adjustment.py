"""Logit adjustment: the shared classifier need not learn what each client's frequencies explain.

A client's logits are the network's plus log π_y, π the frequencies of the classes in its training
data (Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314, eq. 10; in
federated learning Zhang et al., arXiv 2209.00189). Under them its loss is cross-entropy as ever,
so that they are simply added to the last layer's bias that it is sent, and taken off what it
uploads. Its frequencies stay with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pfedgpa_app.core.weights import Weights

LEFT = "adjustment"  # the kind of file in which a client of a simulation leaves it


def log_frequencies(labels: Tensor, classes: int) -> Tensor:
    """The logarithms of the classes' frequencies [classes], their mean taken off.

    Half an example of each class is counted beside those there are: none is impossible.
    """
    counts = torch.bincount(labels, minlength=classes).float()
    logarithms = (counts + 0.5).log()
    return logarithms - logarithms.mean()


def adjusted(weights: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Weights:
    """``weights`` with what ``by`` has of a name added to those of that name."""
    return {name: t + by[name].to(t) if name in by else t for name, t in weights.items()}
