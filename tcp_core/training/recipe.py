"""How weights are moved: the optimiser and its parameter groups, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Optimise = Callable[[list[dict]], Optimizer]
Schedule = Callable[[Optimizer, int], LRScheduler]

LR, MOMENTUM, WEIGHT_DECAY, WARMUP = 0.1, 0.9, 5e-4, 0.05
"""What the default recipe takes where nothing is given."""


def optimise(
    optimizer: Optimise | None, lr: float | None, momentum: float | None, weight_decay: float | None
) -> Callable[[nn.Module], Optimizer]:
    """Return what makes the optimiser of a network: SGD with Nesterov momentum, or what ``optimizer`` says.

    Raises TypeError if a value is given that the user's own optimiser brings itself.
    """
    if optimizer is None:
        lr, momentum = float(LR if lr is None else lr), float(MOMENTUM if momentum is None else momentum)  # NumPy's too
        sgd = partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=momentum > 0)
        return partial(_made, sgd, WEIGHT_DECAY if weight_decay is None else weight_decay)
    for name, value in (("lr", lr), ("momentum", momentum)):
        if value is not None:
            raise TypeError(f"{name}={value!r} and optimizer= given: set it in the optimizer, which has its own.")
    if not callable(optimizer):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}; it must be a function of parameter groups, such as "
            f"lambda groups: torch.optim.AdamW(groups, lr=1e-3), for the network becomes smaller in mid-run."
        )
    return partial(_made, optimizer, weight_decay)


def _made(optimizer: Optimise, weight_decay: float | None, model: nn.Module) -> Optimizer:
    made = optimizer(parameter_groups(model, weight_decay))
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer= gave {type(made).__name__}; it must give a torch.optim.Optimizer.")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("optimizer= gave LBFGS, whose steps need a closure, which fit has not; give another.")
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    left = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if left:
        raise ValueError(
            f"the optimizer holds {len(left)} trainable parameters less than the network has, {left[0]!r} among them: "
            f"give it all groups, or set requires_grad_(False) on what is not to be trained."
        )
    return made


def parameter_groups(model: nn.Module, weight_decay: float | None) -> list[dict]:
    """Return two groups: weights, which decay, and batch norms and biases, which do not.

    With ``weight_decay`` None the first group says nothing of it, and has the optimiser's own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decaying = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": [p for p in parameters if p.ndim > 1], **decaying},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def scheduled(
    schedule: Schedule | None, warmup: float | None, restart: float
) -> Callable[[Optimizer, int], LRScheduler]:
    """Return what makes the schedule of (optimiser, steps): warm-up and cosine, or what ``schedule`` says."""
    if schedule is None:
        return partial(_warmup_cosine, warmup=WARMUP if warmup is None else warmup, restart=restart)
    if warmup is not None or restart:
        name, value = ("restart", restart) if warmup is None else ("warmup", warmup)
        raise TypeError(f"{name}={value!r} and schedule= given: a schedule of your own has its own.")
    if not callable(schedule):
        raise TypeError(
            f"schedule={type(schedule).__name__}; it must be a function of (optimizer, steps), such as "
            f"lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)."
        )
    return partial(_scheduled, schedule)


def _scheduled(schedule: Schedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    made = schedule(optimizer, steps)
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        raise TypeError(
            f"schedule= gave {type(made).__name__}; it must give a torch.optim.lr_scheduler.LRScheduler that moves at "
            f"every step by itself."
        )
    return made


def _warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: float, restart: float) -> LRScheduler:
    again = round(restart * steps)

    def factor(step: int) -> float:
        first, length = (0, again) if step < again else (again, steps - again)
        return warmup_cosine(step - first, length, warmup)

    return LambdaLR(optimizer, factor)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate's factor at ``step``: linear over the share ``warmup`` of ``steps``, then a cosine."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, steps - rising))))


def described(optimizer: Optimizer) -> dict[str, Any]:
    """Return, in plain values, what tells an optimiser from another one: its class and numbers, group by group."""
    groups = [
        {name: _plain(group[name]) for name in sorted(group) if name != "params"} for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, Iterable) and not isinstance(value, torch.Tensor):
        return [_plain(entry) for entry in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return type(value).__name__
