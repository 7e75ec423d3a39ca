"""Codes: for every element of an activation, which channel it belongs to.

A tensor of codes has its activation's shape, expanded (stride 0) along every dimension in which it does not vary, so
it costs next to nothing. ``code >> 1`` is a channel **label** (0: no channel); ``code & 1`` says that the element
may be non-zero although its channel is closed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def varies(codes: Tensor, dim: int) -> bool:
    """Say whether compact codes vary along ``dim``: whether it holds channels."""
    return codes.shape[dim] > 1 and codes.stride(dim) != 0


def compact(codes: Tensor) -> Tensor:
    """Return equal codes with stride 0 along every dimension in which they do not vary."""
    small = codes
    for dim in range(codes.ndim):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if small.stride(dim) == 0 or bool((small == first).all()):
                small = first
    return small.expand(codes.shape)


def narrow(codes: Tensor) -> Tensor:
    """Return one slice of compact codes along every dimension in which they do not vary."""
    return first(codes, [dim for dim in range(codes.ndim) if not varies(codes, dim)])


def first(codes: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the codes' first slice along ``dims``, which are kept with size 1."""
    return codes[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(codes.ndim))]


def labels_in(codes: Tensor) -> Tensor:
    """Return the labels of compact codes, narrowed."""
    return narrow(codes) >> 1


def marked(codes: Tensor, unsafe: int = 1) -> Tensor:
    """Return the codes, marked as possibly non-zero."""
    return (narrow(codes) | unsafe).expand(codes.shape) if unsafe else codes


def along(labels: Tensor, like: Tensor, dim: int, unsafe: int = 0) -> Tensor:
    """Return codes of the shape of ``like``, with ``labels`` (int64 ``[like.shape[dim]]``) along ``dim``."""
    shape = [1] * like.ndim
    shape[dim] = -1
    sizes = list(like.shape)
    sizes[dim] = len(labels)
    return ((labels << 1) | unsafe).view(shape).expand(sizes)


def view_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of a view come from which: the finest groups of equal size, those of size 1 left out.

    >>> view_groups((2, 6, 4, 4), (2, 2, 3, 16))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    ins = [dim for dim, size in enumerate(before) if size != 1]
    outs = [dim for dim, size in enumerate(after) if size != 1]
    groups = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        a, b = [ins[i]], [outs[j]]
        size_a, size_b = before[ins[i]], after[outs[j]]
        i, j = i + 1, j + 1
        while size_a != size_b:
            if size_a < size_b:
                a.append(ins[i])
                size_a *= before[ins[i]]
                i += 1
            else:
                b.append(outs[j])
                size_b *= after[outs[j]]
                j += 1
        groups.append((a, b))
    return groups
