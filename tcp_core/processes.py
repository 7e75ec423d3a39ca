"""One run over many processes, where torch.distributed has been initialised (torchrun, accelerate launch).

Every process trains the same network on its own part of each batch. DistributedDataParallel averages the gradients, the
gates' among them, so the controller decides the same everywhere and needs no communication of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def agree(said: Mapping[str, Any]) -> None:
    """Raise ValueError in every process unless all say the same; the message names what differs and where."""
    for other, theirs in enumerate(gathered(dict(said))):
        for name in said:
            if theirs.get(name) != said[name]:
                here, there = ("" if name == "shapes" else f" ({value[name]})" for value in (said, theirs))
                raise ValueError(
                    f"process {rank_and_world()[0]}{here} and process {other}{there} disagree on {name}: all processes "
                    f"must be given the same network, budget and recipe."
                )


def gathered(value: Any) -> list:
    """Return every process's ``value``, in the order of processes."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def summed(values: Tensor) -> Tensor:
    """Return the sum of every process's ``values``."""
    if rank_and_world()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def together(network: nn.Module, device: torch.device) -> nn.Module:
    """Return what is called in training: the network, wrapped where there are several processes."""
    if rank_and_world()[1] == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
