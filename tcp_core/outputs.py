"""Finding the tensors in whatever a network returns."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_CLOSED = (str, bytes, bool, int, type(None), nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
"""What holds no output: nothing is looked for inside."""


def tensors_in(output: Any) -> dict[str, Tensor]:
    """Return every tensor in ``output`` by its place, such as ``"['out'].logits[0]"``; ``""`` is the output itself.

    Looks into mappings with any keys, sequences, sets, named tuples, dataclasses and any other object's attributes,
    ``__slots__`` included, however deep they are nested. Floats and complex numbers come as tensors, so that they are
    compared too. What an iterator or a function would give is not looked for.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Any] = {}  # holds the objects, whose ids could be given to others otherwise
    queue = deque([("", output)])
    while queue:
        place, item = queue.popleft()
        if isinstance(item, (float, complex)):
            found[place] = torch.tensor(item, dtype=torch.complex128 if isinstance(item, complex) else torch.float64)
        elif not isinstance(item, _CLOSED) and id(item) not in seen:
            seen[id(item)] = item
            if isinstance(item, Tensor):
                found[place] = item
            else:
                queue += [(place + key, value) for key, value in _parts(item)]
    return found


def _parts(item: Any) -> list[tuple[str, Any]]:
    parts = []
    if isinstance(item, Mapping):
        parts = [(f"[{key!r}]", value) for key, value in item.items()]
    elif isinstance(item, (list, tuple, set, frozenset, deque)):
        parts = [(f"[{index}]", value) for index, value in enumerate(item)]
    attributes = {name: getattr(item, name) for name in _slots(type(item)) if hasattr(item, name)}
    attributes |= getattr(item, "__dict__", {})
    return parts + [(f".{name}", value) for name, value in attributes.items()]


def _slots(kind: type) -> list[str]:
    names = []
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{cls.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]
