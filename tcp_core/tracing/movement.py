"""Rules for data movement: the very same operator is applied to the codes.

What is left to do by hand is to notice geometry that depends on how many channels there are: splitting a dimension
that holds channels ties the parts, picking positions from it freezes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call, handing_on
from .codes import along, first, labels_in, marked, narrow, varies, view_groups
from .identities import Identities, ModuleRule


@handing_on
def same(ids: Identities, call: Call) -> None:
    """Pass codes on; a parameter stays recognisable."""
    source = call.args[0]
    if source not in ids.names:
        ids.set(call.out, ids.of(source))
    elif call.out is not source and source.ndim == 2:
        ids.transposed[call.out] = (ids.names[source], False)


def like(ids: Identities, call: Call) -> None:
    """Give a new tensor of the same size the same labels: it follows in size, but not in value."""
    codes = ids.of(call.args[0])
    for position, result in enumerate(call.outputs):
        passes = call.name == "native_dropout" and position == 0
        ids.set(result, codes if codes is None or passes else marked(codes))


def new(ids: Identities, call: Call) -> None:
    """Give a new tensor of sizes that are written in the call no channels, whatever tensor it was asked of."""


def copy(ids: Identities, call: Call) -> None:
    """Copy in place."""
    target, source = call.args[:2]
    codes = ids.of(source)
    if codes is not None:
        codes = codes.expand(target.shape)
    elif ids.of(target) is not None:
        codes = marked(ids.of(target))
    ids.change(target, codes, call.name)


@handing_on
def move(ids: Identities, call: Call) -> None:
    """Move codes as the data moves."""
    tensor = call.args[0]
    if call.name in ("t", "transpose", "permute") and tensor.ndim == 2:
        name, before = ids.transposed.get(tensor, (ids.names.get(tensor), False))
        if name is not None:
            swapped = call.out.shape != tensor.shape or call.out.stride() != tensor.stride()
            ids.transposed[call.out] = (name, swapped != before)
            return
    codes = ids.of(tensor)
    if codes is None:
        if any(ids.of(other) is not None for other in call.tensors[1:]):
            ids.unknown(call)  # channels used as indices
        return
    if "pixel" in call.name and any(varies(codes, d) for d in range(codes.ndim) if d != codes.ndim - 3):
        return ids.unknown(call)
    moved = pytree.tree_leaves(call.func(codes, *call.args[1:], **call.kwargs))
    for result, each in zip(call.outputs, moved, strict=True):
        _set_moved(ids, tensor, result, each)


def pick(ids: Identities, call: Call) -> None:
    """Pick positions: right as it stands only along dimensions that hold no channels."""
    codes = ids.of(call.args[0])
    if codes is not None:
        if call.name == "index":
            picked = [dim for dim, index in enumerate(call.args[1]) if index is not None]
        elif call.name == "roll":
            picked = call.argument(2, "dims") or range(codes.ndim)
        else:
            picked = [call.argument(2 if call.name == "split_with_sizes" else 1, "dim", 0)]
        whole = call.name == "slice" and call.out.shape == codes.shape
        if not whole and any(varies(codes, dim % codes.ndim) for dim in picked):
            return ids.unknown(call)
    move(ids, call)


@handing_on
def view(ids: Identities, call: Call) -> None:
    """Reshape; splitting channels into (outer, inner) ties the outer parts, so that the view works after removal."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    if not isinstance(call.args[1], (list, tuple)):
        return ids.unknown(call)  # a view as another dtype
    result = codes.reshape(call.out.shape)
    for ins, outs in view_groups(codes.shape, call.out.shape):
        if len(outs) > 1 and any(varies(codes, dim) for dim in ins):
            if len(ins) > 1:
                return ids.unknown(call)
            result = _tied_parts(ids, result, outs[:-1], call.name)
    _set_moved(ids, call.args[0], call.out, result)


def _set_moved(ids: Identities, source: Tensor, result: Tensor, codes: Tensor) -> None:
    ids.set(result, codes)
    if (name := ids.parameter(source)) is not None:
        ids.moved[result] = name


def shuffle(ids: Identities, call: Call) -> None:
    """Shuffle channels: a view into (groups, channels of a group), transposed."""
    codes, groups = ids.of(call.args[0]), call.args[1]
    if codes is not None:
        parts = codes.reshape(codes.shape[0], groups, -1, *codes.shape[2:])
        ids.set(call.out, _tied_parts(ids, parts, [1], call.name).transpose(1, 2).reshape(codes.shape))


def _tied_parts(ids: Identities, parts: Tensor, outer: list[int], operator: str) -> Tensor:
    """Tie the slices along ``outer`` dimensions, and return codes that no longer vary along them."""
    for dim in outer:
        one = first(parts, [dim]).expand_as(parts)
        ids.tie_positions(labels_in(parts), labels_in(one), within=operator)
        parts = one
    return parts


def split(ids: Identities, call: Call) -> None:
    """Split; equal parts stay equal only if the same positions go from each."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    dim = call.argument(2, "dim", 0) % codes.ndim
    parts = codes.split(call.outputs[0].shape[dim], dim)
    if varies(codes, dim):
        if len({part.shape[dim] for part in parts}) > 1:
            return ids.unknown(call)
        for part in parts[1:]:
            ids.tie_positions(labels_in(part), labels_in(parts[0]), within=call.name)
        parts = [parts[0] | part & 1 for part in parts]
    for result, part in zip(call.outputs, parts, strict=True):
        ids.set(result, part)


def cat(ids: Identities, call: Call) -> None:
    """Concatenate or stack; joined along another dimension than the channels', the channels of all parts must agree."""
    stacked = call.name == "stack"
    tensors = [tensor for tensor in call.args[0] if tensor.ndim == call.out.ndim or stacked]  # cat skips empty ones
    if all(ids.of(tensor) is None for tensor in tensors):
        return
    dim = call.argument(1, "dim", 0) % call.out.ndim
    parts = []
    for tensor in tensors:
        codes = ids.of(tensor)
        codes = torch.ones((), dtype=torch.int64).expand(tensor.shape) if codes is None else codes
        parts.append(codes.unsqueeze(dim) if stacked else codes)
    others = [d for d in range(call.out.ndim) if d != dim]
    if not any(varies(part, d) for part in parts for d in others):
        ids.set(call.out, torch.cat([first(part, others) for part in parts], dim).expand(call.out.shape))
    elif any(varies(part, dim) for part in parts):
        ids.unknown(call)
    else:
        for part in parts[1:]:
            ids.tie_positions(labels_in(first(parts[0], [dim])), labels_in(first(part, [dim])))
        ids.set(call.out, torch.cat(parts, dim))


def pad(ids: Identities, call: Call) -> None:
    """Pad with a constant; along the channels, the padding is new channels that are zero."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    unsafe = int(call.argument(2, "value", 0) != 0)
    for position in range(0, len(call.args[1]), 2):
        dim = codes.ndim - 1 - position // 2
        before, after = call.args[1][position : position + 2]
        if not before and not after:
            continue
        if not varies(codes, dim):
            sizes = list(codes.shape)
            sizes[dim] += before + after
            codes = first(marked(codes, unsafe), [dim]).expand(sizes)
        elif min(before, after) < 0 or any(varies(codes, d) for d in range(codes.ndim) if d != dim):
            return ids.unknown(call)
        else:
            front, back = _padding(ids, position, before, after, unsafe)
            codes = torch.cat([along(front, codes, dim, unsafe), codes, along(back, codes, dim, unsafe)], dim)
    ids.set(call.out, codes)


def _padding(ids: Identities, position: int, before: int, after: int, unsafe: int) -> tuple[Tensor, Tensor]:
    """Return labels for channels of padding: a module's amounts can follow, amounts written in a call cannot."""
    follows = isinstance(ids.module, nn.modules.padding._ConstantPadNd) and ids.module in ids.modules and not unsafe
    if not follows:
        front, back = ids.fresh(before), ids.fresh(after)
        ids.freeze(torch.cat([front, back]), "pad")
        return front, back
    if ids.here not in ids.pads:
        front, back = ids.fresh(before), ids.fresh(after)
        ids.pads[ids.here] = (position, front, back)
        ids.producers += [front, back]
    return ids.pads[ids.here][1:]


def reduce(ids: Identities, call: Call) -> None:
    """Reduce over dimensions without channels, or sum over channels: one that is zero when closed adds nothing, and of
    others all summands stay or go together.
    """
    codes = ids.of(call.args[0])
    if codes is None:
        return
    dims = call.argument(2 if call.name == "linalg_vector_norm" else 1, "dim")
    dims = range(codes.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = [dim % codes.ndim for dim in dims]
    result, *extra = call.outputs
    if any(varies(codes, dim) for dim in dims):
        norm = call.name == "linalg_vector_norm" and call.argument(1, "ord", 2) > 0
        if call.name != "sum" and not norm:
            return ids.unknown(call)
        small = narrow(codes)
        held = all(dim in dims for dim in range(codes.ndim) if varies(codes, dim))
        if held and not ((small & 1 == 1) & (small >> 1 > 0)).any():
            return None  # a number that all channels share, which is no channel, as are the inputs of the model
        if norm:
            return ids.unknown(call)
        label = (small >> 1).amax(dims, keepdim=True)
        ids.tie_positions(small >> 1, label, within="sum over channels")
        codes = ((label << 1) | (small & 1).amax(dims, keepdim=True)).expand_as(codes)
    reduced = first(codes, dims)
    ids.set(result, reduced if result.ndim == codes.ndim else reduced.squeeze(dims))
    for each in extra:
        ids.set(each, marked(ids.codes[result]))


def along_one(ids: Identities, call: Call) -> None:
    """Softmax or cumulative sum over a dimension without channels, such as branches or positions."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    if varies(codes, call.args[1] % codes.ndim):
        return ids.unknown(call)
    ids.set(call.out, marked(codes, int(call.name != "cumsum")))


def glu(ids: Identities, call: Call) -> None:
    """The first half, times the sigmoid of the second; halves stay equal only if the same positions go from each."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    first_half, second_half = codes.chunk(2, call.argument(1, "dim", -1))
    ids.tie_positions(labels_in(first_half), labels_in(second_half), within=call.name)
    ids.set(call.out, first_half)


def in_space(ids: Identities, call: Call) -> None:
    """Pool, resize or pad over the last dimensions; a channel of zeros stays zero."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    space = range(codes.ndim - spatial_dims(call.name), codes.ndim)
    if any(varies(codes, dim) for dim in space):
        return ids.unknown(call)
    for position, result in enumerate(call.outputs):
        ids.set(result, marked(first(codes, space), int(position > 0)).expand(result.shape))


def circular_pad(ids: Identities, args: tuple, kwargs: dict) -> ModuleRule | None:
    """Pad with what is on the other side: all tensors that this is made of have the channels of the input."""
    given = dict(zip(("input", "pad", "mode"), args, strict=False)) | kwargs
    x, amounts = given["input"], given["pad"]
    codes = ids.of(x)
    space = range(x.ndim - len(amounts) // 2, x.ndim)
    if given.get("mode") != "circular" or codes is None or any(varies(codes, dim) for dim in space):
        return None
    ids.consume(x)

    def rule(ids: Identities, args: tuple, outputs: list[Tensor]) -> None:
        for result in outputs:
            ids.set(result, first(codes, space).expand(result.shape))

    return rule


def sample(ids: Identities, call: Call) -> None:
    """Sample each channel at the same places."""
    x, grid = call.args[:2]
    ids.keep(grid, call.name)
    codes = ids.of(x)
    if codes is None:
        return
    if any(varies(codes, dim) for dim in range(codes.ndim) if dim != 1):
        return ids.unknown(call)
    ids.set(call.out, first(codes, range(2, codes.ndim)).expand(call.out.shape))


def unpool(ids: Identities, call: Call) -> None:
    """Put each channel's values where its own indices say; zeros stay zeros."""
    codes, places = (ids.of(tensor) for tensor in call.args[:2])
    if codes is None and places is None:
        return
    space = range(call.out.ndim - (3 if "3d" in call.name else 2), call.out.ndim)
    if codes is None or places is None or any(varies(each, dim) for each in (codes, places) for dim in space):
        return ids.unknown(call)
    ids.tie_positions(first(codes, space) >> 1, first(places, space) >> 1)
    ids.set(call.out, first(codes, space).expand(call.out.shape))


def order(ids: Identities, call: Call) -> None:
    """Sort, or take the largest, along a dimension without channels; zeros stay zeros."""
    codes = ids.of(call.args[0])
    if codes is None:
        return
    dim = call.argument(2 if call.name == "topk" else 1, "dim", -1) % codes.ndim
    if varies(codes, dim) or call.func._overloadname not in ("default", "stable"):
        return ids.unknown(call)
    for position, result in enumerate(call.outputs):
        ids.set(result, marked(first(codes, [dim]), int(position > 0)).expand(result.shape))


def spatial_dims(name: str) -> int:
    """Return over how many last dimensions an operator works within channels, or 0 if it is no such operator."""
    prefixes = ("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_", "upsample", "_upsample")
    if name.startswith((*prefixes, "reflection_pad", "replication_pad")):
        return next((n for n in (1, 2, 3) if f"{n}d" in name), 0)
    return 0
