"""Routing by values: rows that masks and searches pick, as in a mixture of experts, and layers that compute on them.

How many rows there are depends on weights and inputs, and with them macs. And an example of one or two samples may
leave an expert without a row, where no codes can be kept: then one is picked all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from .calls import Call

BY_MASK = ("index", "index_put", "unsafe_index", "index_put_impl")
PUT_BACK = ("index_put", "index_put_impl", "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce")
"""Operators that write rows to where they were: the result is as large as the first argument."""

REDUCTIONS = ("sum", "mean", "amax", "amin", "max", "min", "logsumexp", "var", "std", "any", "all", "prod")


def with_a_row(name: str, args: tuple) -> tuple:
    """Return the arguments of an indexing operator, with masks that pick nothing picking their first entry."""
    if name.strip("_") not in BY_MASK:
        return args
    return pytree.tree_map(lambda leaf: _one_at_least(leaf) if _is_mask(leaf) else leaf, args)


def found_one(name: str, args: tuple, out: Any) -> Any:
    """Return the places that a search gives, the first of all if it finds none."""
    return out.new_zeros((1, out.shape[1])) if name == "nonzero" and not len(out) and args[0].numel() else out


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) and leaf.numel() > 0


def _one_at_least(mask: Tensor) -> Tensor:
    if mask.any():
        return mask
    first = torch.zeros_like(mask)
    first.view(-1)[0] = 1
    return first


def picks(call: Call, fed: WeakTensorKeyDictionary, picked: WeakTensorKeyDictionary) -> bool:
    """Say whether an operator's result has as many rows as values decide.

    fed: what depends on the inputs; picked: results of which this is known.
    """
    name = call.name.strip("_")
    if name in ("nonzero", "masked_select", "unique2", "unique_dim"):
        return call.args[0] in fed
    if name in PUT_BACK:
        return call.args[0] in picked
    if name in REDUCTIONS and call.argument(1, "dim") in (None, 0, [0], []):
        return False
    if name in BY_MASK and any(_is_mask(leaf) and leaf in fed for leaf in call.tensors[1:]):
        return True
    return any(tensor in picked for tensor in call.tensors)
