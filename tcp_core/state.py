"""Leaving a model as it was found, whatever its forward pass changes."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def keeping_modes(*models: nn.Module):
    """Restore, at the end, each module's own train or eval mode: a batch norm may be in eval mode on purpose."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def left_as_found(*models: nn.Module, beside: Iterable[Any] = ()):
    """Restore, at the end, all that running ``models`` can change in them, and the random state; and what ``beside``
    them runs, such as functions, with the modules and objects that these hold.

    Restored are the values of parameters and buffers, and every attribute of every module: which tensor, buffer,
    number or object it holds (what a forward pass added is gone), modes, hooks, and the contents of lists, dicts, sets
    and plain objects among the attributes and of those that hooks write into. Random numbers: torch's, Python's and
    NumPy's. Not restored: what a forward pass changes outside its model, such as a global variable or a file.
    """
    holders, tensors = _snapshot((*models, *beside))
    try:
        with random_state_kept(*models):
            yield
    finally:
        for holder, items in holders:
            _restore(holder, items)
        for tensor, memory, value in tensors:
            if tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            if not torch.equal(memory, value):  # only then: a tensor that is written to may be no part of a graph
                memory.copy_(value)


@contextlib.contextmanager
def random_state_kept(*models: nn.Module):
    """Restore, at the end, the random numbers of torch (on the CPU and the models' devices), Python and NumPy."""
    devices = {parameter.device for model in models for parameter in model.parameters() if parameter.is_cuda}
    # the global state of NumPy, for that is what a forward pass would use
    numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])  # noqa: NPY002


def non_leaf_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors with a graph that ``model`` keeps (a feature map of the last pass, say), which ``deepcopy``
    refuses.
    """
    return [item for item, _ in _reachable((model,)) if isinstance(item, Tensor) and not item.is_leaf]


def tensor_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are plain attributes of modules, neither parameters nor buffers, by qualified name."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _snapshot(roots: Iterable[Any]) -> tuple[list, list]:
    holders, tensors = [], []
    for item, containers in _reachable(roots):
        holders += [(each, _items(each)) for each in containers if not isinstance(each, tuple)]
        if isinstance(item, Tensor) and item.layout is torch.strided and not nn.parameter.is_lazy(item):
            tensors.append((item, item.data, item.detach().clone()))
    return holders, tensors


def _reachable(roots: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield every tensor and whatever may hold one, from modules through containers, plain objects and hooks, each
    with the containers that it consists of.
    """
    seen: dict[int, Any] = {}  # holds the objects, whose ids could be given to others otherwise
    queue: deque[Any] = deque(roots)
    while queue:
        item = queue.popleft()
        if id(item) in seen or not _is_open(item):
            continue
        seen[id(item)] = item
        containers, members = _inside(item)
        yield item, containers
        queue += members


_PLAIN = (str, bytes, bool, int, float, complex, type(None), type, types.ModuleType, torch.optim.Optimizer)
_CONTAINERS = (dict, list, tuple, set, deque)
_CALLABLE = (types.FunctionType, types.MethodType, functools.partial)


def _is_open(item: Any) -> bool:
    if isinstance(item, (Tensor, nn.Module, *_CONTAINERS, *_CALLABLE)):
        return True
    # torch's other objects (handles of hooks, generators) hold nothing that a forward pass changes
    return (
        not isinstance(item, _PLAIN)
        and isinstance(getattr(item, "__dict__", None), dict)
        and not type(item).__module__.startswith("torch.")
    )


def _inside(item: Any) -> tuple[list[Any], list[Any]]:
    """Return the containers that an object consists of, and what is in them."""
    if isinstance(item, Tensor):
        return [], []
    if isinstance(item, types.FunctionType):  # a hook may write into what it has closed over
        cells = [cell for cell in item.__closure__ or () if cell != types.CellType()]  # an empty one has no contents
        return [], [cell.cell_contents for cell in cells]
    if isinstance(item, types.MethodType):
        return [], [item.__self__]
    if isinstance(item, functools.partial):
        return [], [item.func, *item.args, *item.keywords.values()]
    containers = [item] if isinstance(item, _CONTAINERS) else []
    if isinstance(getattr(item, "__dict__", None), dict):
        containers.append(item.__dict__)
    return containers, [x for each in containers for x in (each.values() if isinstance(each, dict) else each)]


def _kind(container: Any) -> type:
    """Return the builtin class of a container, whose methods are used: a subclass may refuse or change them."""
    kind = type(container)
    return kind if kind in _KINDS else next(kind for kind in _KINDS if isinstance(container, kind))


_KINDS = (OrderedDict, dict, list, set, deque)


def _items(container: Any) -> list[Any]:
    if not container:
        return []
    kind = _kind(container)
    return list(kind.items(container) if kind in (dict, OrderedDict) else kind.__iter__(container))


def _restore(container: Any, items: list[Any]) -> None:
    if not container and not items:
        return
    kind, now = _kind(container), _items(container)
    if kind in (dict, OrderedDict):
        same = all(k is key and v is value for (k, v), (key, value) in zip(now, items, strict=False))
    else:
        same = all(map(operator.is_, now, items))
    if len(now) != len(items) or not same:
        kind.clear(container)
        (kind.extend if kind in (list, deque) else kind.update)(container, items)
