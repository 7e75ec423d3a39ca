"""Several processes that train one network: their gates move alike, or the run is refused before any has moved."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LONG = ("shapes", "network", "prunable")
"""What is too long to be printed where it differs."""


def group_of(given: Any, wrappers: Sequence[Any]) -> Any:
    """Return the processes whose gates' gradients are averaged, None if there is one process: ``given``, or those of
    the DistributedDataParallel that wraps the Tailor.

    Raises:
        RuntimeError: if several processes train, and it is not known which of them together.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = wrappers[0].process_group if given is None and wrappers else given
    if group is None and dist.get_world_size() > 1:
        raise RuntimeError(
            f"{dist.get_world_size()} processes are running, and the Tailor is not wrapped: each would close other "
            f"gates. Train with DistributedDataParallel(tailor); if you average gradients yourself, give Tailor "
            f"process_group=torch.distributed.group.WORLD, and for a run of each process's own, a group of that "
            f"process alone."
        )
    return None if group is None or dist.get_world_size(group) == 1 else group


def agree(said: Mapping[str, Any], group: Any = None, same: Callable[[Any, Any], bool] = operator.eq) -> None:
    """Raise ValueError in every process unless all say the same, as ``same`` compares it; the message names what
    differs and where.
    """
    for other, theirs in enumerate(gathered(dict(said), group)):
        for name, own in said.items():
            if not same(own, theirs.get(name)):
                here, there = ("" if name in LONG else f" ({value})" for value in (own, theirs.get(name)))
                raise ValueError(
                    f"process {dist.get_rank(group)}{here} and process {other}{there} disagree on {name}: all "
                    f"processes must be given the same network, weights, budget, options and recipe."
                )


def gathered(value: Any, group: Any = None) -> list:
    """Return every process's ``value``, in the order of processes."""
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def average(gradient: Tensor, group: Any) -> None:
    """Average the gates' gradient, in place, as DistributedDataParallel does those of parameters."""
    dist.all_reduce(gradient, group=group)
    gradient /= dist.get_world_size(group)


def check_same_set(losing: Tensor, group: Any) -> None:
    """Raise RuntimeError in every process unless all are about to remove the same units, bool ``[units]``."""
    votes = losing.to(torch.int32)
    dist.all_reduce(votes, group=group)
    if not bool(((votes == 0) | (votes == dist.get_world_size(group))).all()):
        raise RuntimeError("processes have closed different gates; were they given the same model and budget?")
