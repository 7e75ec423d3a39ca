"""What a run changes and no ``state_dict()`` of the network has: buffers that are not persistent, and those of a loss
or a metric. Without them a run that goes on would not end as one that was not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .randomness import reached


def hidden(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of ``model`` that its state does not have, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: module._buffers[name]
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    }


def buffers_in(network: nn.Module, **given: Any) -> dict[str, dict[str, Tensor]]:
    """Return the buffers of all modules that can be reached from ``given`` and are no part of ``network``."""
    return {name: _buffers(module) for name, module in _modules(network, given).items()}


def put_into(network: nn.Module, state: Mapping[str, Mapping[str, Tensor]], **given: Any) -> None:
    """Give the modules that can be reached from ``given`` the buffers that :func:`buffers_in` found."""
    for name, module in _modules(network, given).items():
        put(module, state.get(name, {}))


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give buffers of ``model`` these values, also where a forward pass has given them another size."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    for name, value in values.items():
        prefix, _, key = name.rpartition(".")
        held = model.get_submodule(prefix)._buffers
        there = held.get(key)
        if there is None or (there.shape, there.dtype) != (value.shape, value.dtype):
            held[key] = value.to(device if there is None else there.device)
        elif not torch.equal(there, value.to(there.device)):  # only then: one that was expanded cannot be written to
            there.copy_(value)


def _modules(network: nn.Module, given: Mapping[str, Any]) -> dict[str, nn.Module]:
    own = set(network.modules())
    return {name: module for name, module in reached(nn.Module, **given).items() if module not in own}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().cpu() for name, buffer in module.named_buffers(remove_duplicate=False)}
