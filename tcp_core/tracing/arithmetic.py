"""The rule for element-wise operators: labels are tied; whether zero stays zero is found by evaluating at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .calls import Call, handing_on
from .codes import labels_in, varies
from .identities import Identities

NOT_TAGGED = {"hardswish", "mish", "threshold", "_prelu_kernel"}
"""Element-wise operators that torch 2.14 does not tag as such."""


def is_pointwise(func: Any, name: str) -> bool:
    """Say whether an operator is element-wise, by torch's own tag, or that of the operator it is the in-place form of.

    Torch 2.6 does not tag hardtanh_, leaky_relu_ and others, which it does without the underscore.
    """
    if torch.Tag.pointwise in func.tags or name in NOT_TAGGED:
        return True
    space, _, written = func.name().partition("::")
    written, _, overload = written.partition(".")
    if not written.endswith("_"):
        return False
    twin = getattr(getattr(getattr(torch.ops, space), written[:-1], None), overload or "default", None)
    return twin is not None and torch.Tag.pointwise in twin.tags


@handing_on
def pointwise(ids: Identities, call: Call) -> None:
    """Tie the operands element by element; a constant that cannot shrink freezes the channels it meets."""
    tensors, out = call.tensors, call.out
    codes = [ids.of(tensor) for tensor in tensors]
    if all(code is None for code in codes):
        return
    if not isinstance(out, Tensor):
        return ids.unknown(call)
    shapes = [(1,) * (out.ndim - tensor.ndim) + tuple(tensor.shape) for tensor in tensors]
    codes = [None if c is None else c.reshape(shape) for c, shape in zip(codes, shapes, strict=True)]
    set_apart(ids, call, codes, shapes)
    varying = dims_that_vary(codes, out.ndim)
    sizes = [size if dim in varying else 1 for dim, size in enumerate(out.shape)]
    at = tuple(slice(None) if dim in varying else slice(0, 1) for dim in range(out.ndim))
    pattern = torch.zeros((), dtype=torch.int64)  # one bit an operand: may be non-zero though its channel is closed
    views: list[Tensor] = []
    attribute = ""
    for bit, (code, shape) in enumerate(zip(codes, shapes, strict=True)):
        if code is not None:
            small = code[at].expand(sizes)
            pattern = pattern | (small & 1) << bit
            views.append(small >> 1)
            continue
        pattern = pattern | 1 << bit
        if any(shape[dim] > 1 and tensors[bit].stride(dim - out.ndim) for dim in varying):  # one that is expanded can
            views.append(torch.zeros(sizes, dtype=torch.int64))
            attribute = attribute or ids.attributes.get(tensors[bit], "")
    label = torch.zeros((), dtype=torch.int64)
    for each in views:
        label = torch.maximum(label, each)
    for each in views:
        ids.tie_positions(each, label, attribute)
    parameters = {
        1 << bit: name
        for bit, tensor in enumerate(tensors)
        if codes[bit] is not None and (name := ids.parameter(tensor)) is not None
    }
    unsafe, gated = torch.zeros_like(pattern), 0
    values = pattern.unique().tolist()
    for value in values:
        if keeps_zero(call, value):
            continue
        if parameters and keeps_zero(call, value & ~sum(parameters)):
            ids.added.update(parameters.values())  # such as a bias: with a gate of its own, it is zero where it must be
            gated = sum(parameters)
        else:
            unsafe = torch.where(pattern == value, 1, unsafe)
    _spare(ids, call, [value & ~gated for value in pattern[unsafe == 0].unique().tolist()])
    result = (label << 1 | unsafe).expand(out.shape)
    if out is tensors[0] and call.name.endswith("_"):
        ids.change(out, result, call.name)
    else:
        ids.set(out, result)


def _spare(ids: Identities, call: Call, values: list[int]) -> None:
    """Spare operands that need gates for nothing: zero times anything is zero, and of what is zero nowhere no gate is
    needed at all. ``values`` are the patterns with which the result is zero.
    """
    for bit, tensor in enumerate(call.tensors):
        more = [value | 1 << bit for value in values]
        if ids.needs.get(tensor) and all(keeps_zero(call, value) for value in more):
            values = more
            ids.spare(tensor)


def set_apart(ids: Identities, call: Call, codes: list[Tensor | None], shapes: list[tuple[int, ...]]) -> None:
    """Freeze operands with one value for all channels of another, and take their codes away: if such a value is a
    channel itself, it must stay.

    What parameters and buffers hold comes first. A map of weights for pixels, ``[1, 1, H, W]``, has entries that could
    be channels, but those it meets are: they stay free.
    """
    tensors = call.tensors
    for held in (True, False):
        varying = dims_that_vary(codes, call.out.ndim)
        for position, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if codes[position] is None or (tensor in ids.names) != held:
                continue
            if any(shape[dim] == 1 < call.out.shape[dim] for dim in varying):
                ids.freeze(labels_in(codes[position]), call.name)
                codes[position] = None


def dims_that_vary(codes: list[Tensor | None], ndim: int) -> list[int]:
    """Return the dimensions along which some of the codes hold channels."""
    return [dim for dim in range(ndim) if any(c is not None and varies(c, dim) for c in codes)]


def keeps_zero(call: Call, pattern: int) -> bool:
    """Say whether the result is zero where the operands without a bit in ``pattern`` are, whatever the others hold."""
    generator = torch.Generator().manual_seed(0)
    bits = iter(range(len(call.tensors)))

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        values = torch.randn(16, generator=generator, dtype=torch.float64) * 3
        values = values if pattern >> next(bits) & 1 else torch.zeros_like(values)
        return (values > 0 if leaf.dtype == torch.bool else values).to(leaf.dtype)

    try:
        args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
        return not call.func(*args, **kwargs).any()
    except Exception:  # an operator that dislikes the stand-ins counts as not keeping zero
        return False
