"""Macs of operators that no channel count is known of: a fixed cost."""

from __future__ import annotations

import math

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from .calls import Call

RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_lstm_mps", "lstm", "gru", "rnn_tanh", "rnn_relu")
"""Operators that are whole recurrent layers, for which torch's own counter has no rule."""

NO_PRODUCTS = ("embedding", "norm", "index", "gather", "scatter", "where", "copy", "grid_sampler", "im2col", "col2im")
"""Parts of names of operators that take matrices and multiply by none."""


def constant_macs(call: Call) -> int | None:
    """Return the macs of an operator for one sample, or None if they are not known."""
    packet = call.func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*call.args, **call.kwargs, out_val=call.out) // 2
    if call.name in RECURRENT:
        return _recurrent(call)
    if call.name == "linear":
        return call.out.numel() * call.args[0].shape[-1]
    if any(part in call.name for part in NO_PRODUCTS):
        return 0
    return None


def _recurrent(call: Call) -> int:
    """Return the macs of a recurrent layer: each step multiplies by every matrix of each direction, by those of inputs,
    of the state and of projections, whether torch runs it as one operator or unrolls it.
    """
    x, *_ = call.args
    given = {each.name: call.argument(at, each.name) for at, each in enumerate(call.func._schema.arguments)}
    named = [value for name, value in given.items() if name == "params" or name.startswith("weight")]
    matrices = [leaf for leaf in pytree.tree_leaves(named) if isinstance(leaf, Tensor) and leaf.ndim == 2]
    return math.prod(x.shape[:-1]) * sum(matrix.numel() for matrix in matrices)
