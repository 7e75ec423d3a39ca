"""The random numbers of a run: where each source of them stands, so that a resumed run draws the same ones.

Python's, NumPy's and torch's own, those of the device, and every generator that can be reached from what the run is
given: a DataLoader's ``generator=``, its sampler's, one that a dataset or a module keeps.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

REACHED, FEW = 10_000, 100
"""How many objects are looked through for generators, and how long a list of them may be: a dataset's list of files is
not walked.
"""


def random_state(device: torch.device, **given: Any) -> dict[str, Any]:
    """Return where random numbers stand, as tensors and plain values, in this process.

    ``given`` are the objects (loaders, networks) whose own generators count too; they go by the names of attributes
    that lead to them, as in "train.sampler.generator".
    """
    own = _of_numpy(np.random.get_state())  # noqa: NPY002, what users' augmentation may draw from
    state = {"python": random.getstate(), "numpy": own, "torch": torch.get_rng_state()}
    if (module := _of_device(device)) is not None:
        state["device"] = module.get_rng_state(*_index(device))
    return state | {"generators": {name: _state(each) for name, each in generators(**given).items()}}


def set_random_state(state: Mapping[str, Any], device: torch.device, **given: Any) -> None:
    """Go on with random numbers where :func:`random_state` was called, also on another kind of device.

    A generator that is there now and was not then, or the other way round, is named in a warning.
    """
    found = generators(**given)
    for name in sorted(found.keys() ^ state["generators"].keys()):
        warnings.warn(
            f"the random generator {name} is only in {'this run' if name in found else 'the checkpoint'}, so it cannot "
            f"go on where it stood: the run goes on, but with other random numbers than if it had not been stopped. "
            f"Build loaders and network as they were built then.",
            stacklevel=2,
        )
    _put(state, device, found)


@contextlib.contextmanager
def random_numbers_kept(device: torch.device, **given: Any):
    """Have random numbers stand at the end where they stand now; generators that are made meanwhile are left alone."""
    state, found = random_state(device, **given), generators(**given)
    try:
        yield
    finally:
        _put(state, device, found)


def _put(state: Mapping[str, Any], device: torch.device, found: Mapping[str, Any]) -> None:
    """Set random numbers, and those generators of ``found`` that are in ``state``."""
    random.setstate(_tuples(state["python"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    module = _of_device(device)
    if module is not None and "device" in state:
        module.set_rng_state(state["device"], *_index(device))
    for name in found.keys() & state["generators"].keys():
        _set(found[name], state["generators"][name])


def warn_of_workers(**given: Any) -> None:
    """Warn of loaders whose random numbers a stopped run cannot draw again: those of workers that outlive an epoch."""
    for name, loader in given.items():
        if getattr(loader, "num_workers", 0) and getattr(loader, "persistent_workers", False):
            warnings.warn(
                f"{name} has persistent_workers=True: the random numbers of its workers go on from epoch to epoch, in "
                f"processes that are gone. If its data set draws any, the run goes on with other ones than if it had "
                f"not been stopped. Leave the option out to have runs that go on exactly.",
                stacklevel=2,
            )


def generators(**given: Any) -> dict[str, Any]:
    """Return every random generator (torch's, NumPy's or Python's) that can be reached from ``given``, by name."""
    return reached((torch.Generator, np.random.Generator, np.random.RandomState, random.Random), **given)


def reached(kinds: type | tuple[type, ...], **given: Any) -> dict[str, Any]:
    """Return every object of these kinds that can be reached from ``given``, by name.

    Attributes, and members of short lists, tuples and dicts, are followed, but not into what is found; each object is
    named once, by the first way that leads to it.
    """
    found, seen = {}, set()
    todo = deque(given.items())
    while todo and len(seen) < REACHED:
        name, value = todo.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, kinds):
            found[name] = value
        else:
            todo += [(f"{name}.{key}", each) for key, each in _within(value) if not isinstance(each, _LEAVES)]
    return found


_LEAVES = (int, float, complex, str, bytes, type(None), torch.Tensor, np.ndarray, np.generic, type)


_OF_MODULES = frozenset(vars(nn.Module()))  # parameters, hooks and such


def _within(value: Any) -> Iterable[tuple[str, Any]]:
    """Return the parts of one object, with the names that lead to them."""
    if isinstance(value, ModuleType):  # not into libraries: everything can be reached from there
        return ()
    if isinstance(value, Mapping):
        return ((str(key), each) for key, each in value.items()) if len(value) <= FEW else ()
    if isinstance(value, (list, tuple, set, frozenset)):
        return ((str(i), each) for i, each in enumerate(value)) if len(value) <= FEW else ()
    if isinstance(value, nn.Module):
        return (
            (f"{prefix}.{key}" if prefix else key, each)
            for prefix, module in value.named_modules()
            for key, each in vars(module).items()
            if key not in _OF_MODULES
        )
    if isinstance(value, partial):
        return (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    if isinstance(value, MethodType):
        return (("__self__", value.__self__),)
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return ((name, cell.cell_contents) for name, cell in cells if cell != _EMPTY)
    own = getattr(value, "__dict__", None)
    return tuple(own.items()) if isinstance(own, dict) else ()


_EMPTY = CellType()


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _of_numpy(generator.get_state())
    return generator.bit_generator.state


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_tuples(state))
    elif isinstance(generator, np.random.RandomState):
        name, keys, *rest = state
        generator.set_state((name, np.asarray(keys).astype(np.uint32), *rest))
    else:
        generator.bit_generator.state = _arrays(state)


def _of_numpy(state: tuple) -> tuple:
    name, keys, *rest = state
    return name, torch.from_numpy(keys.astype(np.int64)), *rest


def _arrays(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, torch.Tensor) else state


def _tuples(state: Any) -> Any:
    return tuple(map(_tuples, state)) if isinstance(state, (list, tuple)) else state


def _of_device(device: torch.device) -> Any:
    """Return torch's module for random numbers of ``device``; None for the CPU, whose numbers are torch's own."""
    return None if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple:
    return () if device.type == "mps" else (device,)
