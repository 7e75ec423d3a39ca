"""State of a parameter's shape, cut along with it: gradients, moments, averages; all of it or nothing."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Kept = tuple[Tensor | None, ...]
"""Per dimension, the indices (int64) that stay; None keeps all."""


def take(tensor: Tensor, kept: Kept) -> Tensor:
    """Return ``tensor`` with dimension ``d`` indexed by ``kept[d]`` (None keeps it whole), in the same memory layout.

    The layout is the order of strides, such as ``channels_last``.
    """
    order = sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride(dim), -tensor.shape[dim]))
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    strides, step = [1] * tensor.ndim, 1
    for dim in reversed(order):
        strides[dim], step = step, step * tensor.shape[dim]
    return (
        tensor if tensor.stride() == tuple(strides) else tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
    )


class Cuts:
    """Tensors that are to become smaller and values that are to change with them: all of them at once, or none.

    A tensor stays the same object, so whatever holds it goes on with it. Everything is computed as it is added;
    :meth:`apply` only puts it in place.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.entries: list[tuple[Any, Any, Any]] = []

    def add(self, tensor: Tensor, kept: Kept) -> None:
        """Cut ``tensor``, and its gradient, to what is kept."""
        if any(index is not None for index in kept):
            self.replace(tensor, take(tensor.detach(), kept))
            if tensor.is_leaf and tensor.grad is not None:
                self.replace(tensor.grad, take(tensor.grad.detach(), kept))

    def replace(self, tensor: Tensor, smaller: Tensor) -> None:
        """Have ``tensor`` hold what ``smaller`` holds."""
        self.tensors.setdefault(id(tensor), (tensor, smaller))

    def set(self, holder: Any, key: Any, value: Any) -> None:
        """Set an entry of a dict or list, or the attribute of another object."""
        self.entries.append((holder, key, value))

    def shape(self, tensor: Tensor) -> torch.Size:
        """Return the shape that ``tensor`` will have."""
        return self.tensors.get(id(tensor), (None, tensor))[1].shape

    def apply(self) -> None:
        """Put all in place; if that fails at any point, everything is as it was."""
        undo: list[tuple] = []
        try:
            for tensor, smaller in self.tensors.values():
                undo.append((_assign, tensor, tensor.data))
                _assign(tensor, smaller)
            for holder, key, value in self.entries:
                before = _get(holder, key)
                _put(holder, key, value)
                undo.append((_put, holder, key, before))
        except BaseException:
            for function, *arguments in reversed(undo):
                function(*arguments)
            raise


def _assign(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data of another size.

    The object, its hooks, its attributes and all weak references to it stay. torch.utils.swap_tensors refuses tensors
    that are weakly referenced (by compiled code) or held by C++ (by DistributedDataParallel).
    """
    if tensor.requires_grad:
        # A graph that is still alive keeps the parameter's accumulator, which knows the old size; that of another dtype
        # is dropped by torch itself, and the next forward pass makes a new one.
        tensor.data = data.new_empty(0, dtype=torch.float16 if data.dtype == torch.float32 else torch.float32)
    tensor.data = data


_ABSENT = object()


def _get(holder: Any, key: Any) -> Any:
    return holder[key] if isinstance(holder, (dict, list)) else getattr(holder, key, _ABSENT)


def _put(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, (dict, list)):
        holder[key] = value
    elif value is _ABSENT:
        delattr(holder, key)
    else:
        setattr(holder, key, value)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers


def cut_value(key: str, value: Tensor, shape: Sequence[int], kept: Kept) -> Tensor | None:
    """Return an optimiser's ``value`` for a parameter of ``shape``, cut to what is kept; None if it is not understood.

    Understood are: the parameter's shape (momentum, moments); numbers; the same with some dimensions of size 1
    (torch's Adafactor); the parameter flattened; and the factors ``exp_avg_sq_row`` and ``exp_avg_sq_col``, without its
    last and last but one dimension, of other Adafactors.
    """
    shape, found = tuple(shape), tuple(value.shape)
    kept = kept or (None,) * len(shape)  # nothing of the parameter goes
    if value.numel() == 1 and found != shape:
        return value
    if len(found) == len(shape) and all(size in (1, full) for size, full in zip(found, shape, strict=True)):
        return take(value, tuple(None if size != full else k for size, full, k in zip(found, shape, kept, strict=True)))
    if key.endswith("_row") and found == shape[:-1]:
        return take(value, kept[:-1])
    if key.endswith("_col") and found == (*shape[:-2], *shape[-1:]):
        return take(value, (*kept[:-2], *kept[-1:]))
    if found == (torch.Size(shape).numel(),):
        return take(value.view(shape), kept).reshape(-1)
    return None


def cut_optimizer(cuts: Cuts, optimizer: torch.optim.Optimizer, kept: Mapping[int, Kept], names: Mapping[int, str]):
    """Add an optimiser's state to ``cuts``; ``kept`` and ``names`` are by id of the parameter.

    State that is not understood is reset for its parameter, with a warning that names it.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        return _cut_lbfgs(cuts, optimizer, kept)
    by_size = {id(p) for group in optimizer.param_groups if _kind_by_size(group) for p in group["params"]}
    others = _of_other_things(optimizer)
    for parameter in held(optimizer):
        state = optimizer.state.get(parameter)
        if not state or all(index is None for index in kept.get(id(parameter), ())):
            continue
        own, strange = Cuts(), [f"{key.lstrip('.')} (a {kind})" for key, kind in _opaque(state)]
        for key, value in state_tensors(state):
            understood = (key, tuple(value.shape)) not in others and type(value) in (Tensor, nn.Parameter)
            if id(parameter) in by_size and 1 < value.numel() and value.shape != parameter.shape:
                understood = False
            smaller = cut_value(key, value, parameter.shape, kept[id(parameter)]) if understood else None
            if smaller is None and tuple(value.shape) == _left(parameter, kept[id(parameter)]):
                continue  # it was loaded before the network became smaller, from a run in which it was
            if smaller is None:
                strange.append(f"{key.lstrip('.')} of shape {tuple(value.shape)}")
            elif smaller is not value:
                own.replace(value, smaller)
        if strange:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(strange)} for {names[id(parameter)]!r} of shape "
                f"{tuple(parameter.shape)}, which cannot be cut to the smaller network: its state starts anew for this "
                f"parameter.",
                RuntimeWarning,
                stacklevel=4,
            )
            cuts.set(optimizer.state, parameter, {})
        else:
            cuts.tensors.update(own.tensors)


def _of_other_things(optimizer: torch.optim.Optimizer) -> set[tuple[str, tuple[int, ...]]]:
    """Return which of an optimiser's tensors, by path and shape, have the shape of a parameter only by chance.

    Preconditioners (Shampoo, Kron) keep a square matrix for each dimension, and that of a square weight has its shape.
    So a square is not of entries if there is another in its path for a parameter of another shape, or if the path is a
    list, which a square weight alone would fill. What has one length at parameters of other lengths too, such as the
    levels of an 8-bit optimiser, is a table.
    """
    found, squares = set(), set()
    for parameter in held(optimizer):
        for key, value in state_tensors(optimizer.state.get(parameter) or {}):
            place = key, tuple(value.shape)
            if _square(value) and (value.shape != parameter.shape or key.rpartition(".")[2].isdigit()):
                squares.add(key)
            if is_table(key) or (value.ndim == 1 and cut_value(key, value, parameter.shape, ()) is None):
                found.add(place)
    for parameter in held(optimizer):
        for key, value in state_tensors(optimizer.state.get(parameter) or {}):
            if key in squares and _square(value) and value.shape == parameter.shape:
                found.add((key, tuple(value.shape)))
    return found


def is_table(path: str) -> bool:
    """Say whether what lies at ``path`` is a table of levels, as bitsandbytes calls it, whatever its length."""
    return "qmap" in path


def _kind_by_size(group: Mapping) -> bool:
    """Say whether an optimiser decides by a parameter's size what it keeps for it, as timm's Adafactors do: what was
    kept for the larger one may not be what it wants for the smaller one.
    """
    return any(str(name).endswith("size_to_factor") for name in group)


def _square(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]


def _left(tensor: Tensor, kept: Kept) -> tuple[int, ...]:
    """Return the shape that is left of a tensor."""
    return tuple(size if index is None else len(index) for size, index in zip(tensor.shape, kept, strict=True))


def _cut_lbfgs(cuts: Cuts, optimizer: torch.optim.LBFGS, kept: Mapping[int, Kept]) -> None:
    """Its state is of all parameters at once, flattened one behind the other; curvature is computed anew from it."""
    parts, start = [], 0
    for parameter in held(optimizer):
        places = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        parts.append(take(places, kept.get(id(parameter), ())).reshape(-1))
        start += parameter.numel()
    stay = torch.cat(parts)
    cuts.set(optimizer, "_numel_cache", None)
    for state in optimizer.state.values():
        for _, value in state_tensors(state):
            if value.shape == (start,):
                cuts.replace(value, take(value, (stay,)))
        pairs = [(cuts.tensors[id(y)][1], cuts.tensors[id(s)][1]) for y, s in zip(*_history(state), strict=True)]
        curved = [position for position, (y, s) in enumerate(pairs) if y.dot(s) > 1e-10]
        for key in ("old_dirs", "old_stps"):
            if key in state:
                cuts.set(state, key, [state[key][position] for position in curved])
        if "ro" in state:
            cuts.set(state, "ro", [1.0 / pairs[position][0].dot(pairs[position][1]) for position in curved])
        if curved:
            y, s = pairs[curved[-1]]
            cuts.set(state, "H_diag", y.dot(s) / y.dot(y))


def _history(state: Mapping) -> tuple[list[Tensor], list[Tensor]]:
    return state.get("old_dirs") or [], state.get("old_stps") or []


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that an optimiser steps on."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def state_tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and sequences, each with a path such as ``.exp_avg`` or ``.pairs.0``."""
    yield from ((path, leaf) for path, leaf in _leaves(value, key) if isinstance(leaf, Tensor))


def _opaque(state: Mapping) -> Iterator[tuple[str, str]]:
    """Yield the path and class of each object in an optimiser's state that keeps tensors of its own."""
    for path, leaf in _leaves(state):
        inside = getattr(leaf, "__dict__", None)
        if not isinstance(leaf, Tensor) and any(tensor.numel() > 1 for _, tensor in state_tensors(inside)):
            yield path, type(leaf).__name__


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Mapping, list, tuple, deque)):
        inside: Iterable = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, each in inside:
            yield from _leaves(each, f"{key}.{name}")
    else:
        yield key, value
