"""The memory layout of images and convolutions: channels first or last.

With channels last, convolutions and poolings of our sizes take two thirds of the time on a CPU.
But ``view`` cannot reshape what they then return, and many networks use it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_LAST = "_pfedgpa_channels_last"  # the attribute that marks a network as taking channels last


def choose_layout(network: nn.Module, shape: tuple[int, ...]) -> None:
    """Try whether ``network`` takes images [C, H, W] with channels last, and prepare it for them.

    Images come with channels last; a network that does not take them so rearranges its inputs.
    """
    if len(shape) != 3:
        return
    if _takes_channels_last(network, shape):
        setattr(network, _LAST, True)
    else:
        network.register_forward_pre_hook(_with_channels_first)


def laid_out(network: nn.Module) -> nn.Module:
    """Move the network's weights to the layout that ``choose_layout`` found, and return it."""
    last = getattr(network, _LAST, False)
    return network.to(memory_format=torch.channels_last) if last else network


def _takes_channels_last(network: nn.Module, shape: tuple[int, ...]) -> bool:
    if any(tensor.ndim > 4 for tensor in network.state_dict().values()):
        return False  # torch cannot rearrange these
    probe = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = torch.zeros(2, *shape[1:], shape[0]).permute(0, 3, 1, 2)
    trained = [p for p in probe.parameters() if p.requires_grad]
    try:
        with torch.random.fork_rng(devices=[]):
            probe.eval()(images)
            torch.autograd.grad(probe.train()(images).sum(), trained)
    except Exception:  # whatever foreign code raises
        return False
    return True


def _with_channels_first(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # a copy, since for one channel `contiguous` accepts either layout, and convolutions do not
    usual = torch.contiguous_format
    return tuple(x.clone(memory_format=usual) if isinstance(x, Tensor) else x for x in inputs)
