"""How good a network is on held-out images, and the precision in which networks are run."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets.images import Images
from ..gates import UNGATED, idle_gates
from ..given import check_module
from ..hardware import device_name, has_bf16_kernels
from ..state import keeping_modes
from .batches import by_epoch, channels_last
from .objective import Objective, check_functions, in_full_precision
from .processes import rank_and_world, summed
from .randomness import reached

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images | Iterable,
    *,
    batch_size: int = 512,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[[Any, Any], Tensor | float] | None = None,
) -> dict[str, float]:
    """Return ``{"loss", "accuracy"}`` of ``model``, in eval mode as ``loss`` and ``metric`` are, means over ``images``.

    By default mean cross-entropy and the fraction right, images and pixels with the label -100 left out. With
    ``loss`` and ``metric``, functions of (outputs, targets) as in :func:`tcp_core.fit`, the means of what these give;
    the accuracy is NaN where outputs are not logits. Of several processes each measures what it is given by itself.

    Raises:
        ValueError: for another precision, no images, or a label that the network has no output for.
    """
    check_module(model, "evaluate")
    check_functions(loss=loss, metric=metric)
    device = device_of(model, device)
    check_precision(precision, device)
    gates = idle_gates(model)
    if gates is not None and bool((gates.gate < 1).any()):
        warnings.warn(
            f"this {type(model).__name__} {UNGATED}: evaluate(tailor, ...) until tailor.shrunk is true.",
            RuntimeWarning,
            stacklevel=3,  # a decorator is between
        )
    return means(sums(model, images, batch_size, precision, device, Objective(loss, metric)))


@torch.no_grad()
def validated(
    model: nn.Module, val: Images | Iterable, precision: str, device: torch.device, objective: Objective
) -> dict[str, float]:
    """Evaluate, each process on its own part of the images, and return the means over those of all processes.

    Batches that are made already are summed as well: the mean is right if they are divided, and the same if every
    process has all of them.
    """
    rank, world = rank_and_world()
    own = sums(model, val.part(rank, world) if hasattr(val, "part") else val, 512, precision, device, objective)
    if world == 1:
        return means(own)
    return means(summed(torch.tensor(own, dtype=torch.float64, device=device)).tolist())


def sums(
    model: nn.Module,
    images: Images | Iterable,
    batch_size: int,
    precision: str,
    device: torch.device,
    objective: Objective,
    most: int | None = None,
) -> list:
    """Return the sum over images of the loss, over how many it is, the same of the score, and the number of images, of
    the first ``most`` batches or all.
    """
    loss = weights = score = scored = 0.0
    seen = 0
    judges = reached(nn.Module, loss=objective.loss, metric=objective.metric).values()  # also those inside of functions
    with keeping_modes(model, *judges):
        for module in (model, *judges):
            module.eval()
        batches = itertools.islice(by_epoch(images, batch_size, "none", None, device)(0), most)
        for number, (x, y) in enumerate(batches, 1):
            with autocast(device, PRECISIONS[precision]):
                outputs = model(channels_last(x))
            outputs = in_full_precision(outputs)
            mean = float(objective.held_out(outputs, y, f"held-out batch {number}"))
            if weight := float(objective.weight(y, len(x))):  # the mean over no label is not a number
                loss, weights = loss + mean * weight, weights + weight
            own, count = objective.score(outputs, y)
            score, scored = score + float(own), scored + float(count)
            seen += len(x)
    return [loss, weights, score, scored, seen]


def means(sums: list) -> dict[str, float]:
    """Return mean loss and accuracy from what :func:`sums` gives; ValueError if there was no image, NaN if no label."""
    loss, weights, score, scored, seen = sums
    if not seen:
        raise ValueError("there are no images to evaluate on; give at least one batch.")
    return {"loss": loss / weights if weights else math.nan, "accuracy": score / scored if scored else math.nan}


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Return the context of a forward pass: autocast to ``dtype``, or nothing if it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError unless ``precision`` is one of `PRECISIONS`; warn where the device is slow at it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    if said := slow_here(precision, device):
        warnings.warn(said, stacklevel=3)


def slow_here(precision: str, device: torch.device) -> str | None:
    """Return what there is to say against this precision on this device; None: nothing."""
    if precision != "bf16" or has_bf16_kernels(device):
        return None
    return (
        f"precision='bf16' on this CPU ({device_name(device)}): torch has no bf16 kernels for it and goes through a "
        "reference loop, about ten times slower than precision='fp32'. Use fp32 here."
    )


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return ``device``, or where the model is if it is None."""
    if device is not None:
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
