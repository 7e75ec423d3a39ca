"""Macs of operators that no channel count is known of: a fixed cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from .calls import Call

NO_PRODUCTS = ("embedding", "norm", "index", "gather", "scatter", "where", "copy", "grid_sampler", "im2col", "col2im")
"""Parts of names of operators that take matrices and multiply by none."""


def constant_macs(call: Call) -> int | None:
    """Return the macs of an operator for one sample, or None if they are not known."""
    packet = call.func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*call.args, **call.kwargs, out_val=call.out) // 2
    if call.name.strip("_").startswith("scaled_dot_product"):  # a fused one that the registry lacks, as that of CPUs
        query, key, value = call.args[:3]
        return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if call.name == "linear":
        return call.out.numel() * call.args[0].shape[-1]
    if any(part in call.name for part in NO_PRODUCTS):
        return 0
    return None


def recurrent_macs(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Return the macs of a recurrent layer: each step multiplies by every matrix of each direction, by those of inputs,
    of the state and of projections. Torch's own counter has them where it runs as many operators, not where as one.
    """
    return math.prod(x.shape[:-1]) * sum(weight.numel() for weight in weights if weight.ndim == 2)
