"""What is given as a network: the module inside its wrappers, and words for what is none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import nn


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's and the parallel wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def check_module(model: Any, verb: str) -> None:
    """Refuse what is no network, by what was to be done with it, and say where one may be found in it."""
    if isinstance(model, nn.Module):
        return
    how = f"{verb} a network, a torch.nn.Module"
    if isinstance(getattr(model, "model", None), nn.Module):
        how = f"{verb} its .model"
    elif isinstance(model, Mapping):
        how = f"build the network, give it these weights (load_state_dict) and {verb} that"
    elif callable(model):
        how = f"call it, and {verb} the network that it returns"
    elif isinstance(model, str | os.PathLike):
        how = "the network comes first, then the path"
    kind = f"a {type(model).__name__}"
    if isinstance(model, type | FunctionType):
        kind = f"the {'class' if isinstance(model, type) else 'function'} {model.__name__}"
    raise TypeError(f"this is {kind}, no network; {how}.")
