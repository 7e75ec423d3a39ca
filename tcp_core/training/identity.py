"""What tells one run from another, in plain values: a checkpoint is gone on from by the run that wrote it alone."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..datasets.images import Images
from ..datasets.streams import Stream

DEPTH = 6
"""How deep functions, their arguments and what they hold are looked into."""

HASHED = 2**20
"""Elements of the largest tensor that is told apart by its values; larger ones (images) are by their shape."""


def described(value: Any, depth: int = DEPTH) -> Any:
    """Return ``value`` in numbers, text, tuples and dicts that are the same in every process and whenever it is built.

    A function is its name and what it holds (arguments of ``partial``, defaults, variables of the function that made
    it), a module its class and weights, a dataclass its fields. Of any other object, whose attributes may change as it
    is used, only the class is known, and its length.
    """
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    for kinds, kind in (((int, np.integer), int), ((float, np.floating), float), (str, str), (bytes, bytes)):
        if isinstance(value, kinds):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _array(torch.as_tensor(value))
    if depth == 0:
        return _name(type(value))
    inner = partial(described, depth=depth - 1)
    if isinstance(value, Mapping):
        return {str(key): inner(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(inner, value))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(inner, value), key=repr))
    if isinstance(value, partial):
        return {"function": inner(value.func), "args": inner(value.args), "keywords": inner(value.keywords)}
    if isinstance(value, MethodType):
        return {"method": value.__func__.__qualname__, "of": inner(value.__self__)}
    if isinstance(value, (FunctionType, BuiltinFunctionType, torch.jit.ScriptFunction)):
        return _function(value, inner)
    if isinstance(value, nn.Module):
        return _module(value)
    if dataclasses.is_dataclass(value):
        own = {field.name: inner(getattr(value, field.name, None)) for field in dataclasses.fields(value) if field.repr}
        return {"class": _name(type(value)), **own}
    known = {"class": _name(type(value))}
    if depth == DEPTH and callable(value):  # the option itself, an object that is called as a function
        known |= {key: each for key, each in getattr(value, "__dict__", {}).items() if _is_number_or_text(each)}
    try:
        return known | {"len": len(value)}
    except TypeError:
        return known


def defaults(*classes: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the default values of the options of ``classes``, by name: what counts where none are given."""
    return {
        name: parameter.default
        for each in reversed(classes)
        for name, parameter in inspect.signature(each).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in without
    }


def of_data(train: Images | Iterable) -> dict[str, Any]:
    """Return what tells the images of one run from those of another: how many there are in all (None: that is not
    known), and of our own classes what they were made with.
    """
    lengths = (getattr(train, "labels", None), getattr(train, "dataset", None))
    images = next((len(each) for each in lengths if hasattr(each, "__len__")), None)
    chosen: dict[str, Any] = {}
    if isinstance(train, Images | Stream):
        # rounded: a mean over the images may differ in its last digits, by the number of threads
        chosen |= {name: [round(float(each), 6) for each in getattr(train, name)] for name in ("mean", "std")}
    if isinstance(train, Stream):
        chosen |= {"seed": train.seed, "train": train.train}
    return {"images": images, "train": chosen}


def differences(then: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    """Return what differs between two recipes, each as "phase: (0.02, 0.15) then, (0.1, 0.3) now"."""
    found = []
    for key in (*now, *(key for key in then if key not in now)):
        one, other, name = then.get(key, _ABSENT), now.get(key, _ABSENT), f"{above}{key}"
        one, other = _by_number(one), _by_number(other)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{name}.")
        elif not (one == other or (one != one and other != other)):  # nan is nan
            found.append(f"{name}: {_short(one)} then, {_short(other)} now")
    return found


_ABSENT = type("Absent", (), {"__repr__": lambda self: "absent"})()


def _by_number(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
        return {str(i): each for i, each in enumerate(value)}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    own = module in ("__main__", "__mp_main__", "builtins", "")  # a spawned process calls the script otherwise
    return getattr(value, "__qualname__", repr(type(value))) if own else f"{module}.{value.__qualname__}"


def _function(value: Callable, inner: Callable[[Any], Any]) -> Any:
    name, held = _name(value), {}
    if isinstance(value, FunctionType):
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                held[variable] = inner(cell.cell_contents)
            except ValueError:  # not filled yet
                held[variable] = None
        held |= {f"argument {i}": inner(each) for i, each in enumerate(value.__defaults__ or ())}
        held |= {key: inner(each) for key, each in (value.__kwdefaults__ or {}).items()}
        if value.__name__ == "<lambda>":  # all are called so: told apart by the names and numbers in them
            consts = tuple(each for each in value.__code__.co_consts if _is_number_or_text(each))
            held["names and numbers"] = (*value.__code__.co_names, *consts)
    return {"function": name, **held} if held else name


def _is_number_or_text(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or value is None


def _module(module: nn.Module) -> dict[str, Any]:
    """Return the class of a module and of all that is in it, their numbers and texts, and a hash of its weights."""
    own = {
        name: [type(each).__name__, {k: v for k, v in vars(each).items() if k[0] != "_" and _is_number_or_text(v)}]
        for name, each in module.named_modules()
    }
    for _, numbers in own.values():
        numbers.pop("training")
    found = hashlib.sha256(repr(own).encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return {"class": _name(type(module)), "sha256": found.hexdigest()}


def _array(tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.numel() <= 16:
        return {"dtype": str(tensor.dtype), "values": described(tensor.tolist())}
    found = {"dtype": str(tensor.dtype), "shape": tuple(tensor.shape)}
    return found if tensor.numel() > HASHED else found | {"sha256": hashlib.sha256(_bytes(tensor)).hexdigest()}


def _bytes(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous().flatten()
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
