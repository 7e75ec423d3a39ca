"""What is checked and chosen before a network starts to be tailored."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .channels import Channels
from .cost import Budget, amount, is_whole
from .explanation import NOT_UNDERSTOOD, in_words

NOTABLE = 0.1
"""The share of the macs that operators which are not understood may hold before a warning says so."""

LIKED = (8, 4, 1)
"""Multiples that most kernels like, largest first, where no place is given; 1 for networks too small for them."""


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that could not recover, or whose gates would be lost to rounding."""
    parameters = dict(model.named_parameters())
    if half := [name for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)]:
        raise ValueError(
            f"parameter {half[0]!r} is {parameters[half[0]].dtype}: gates move by small steps that half precision "
            f"rounds away. Keep the model in float32 and run it under torch.autocast."
        )
    if made := [name for name, p in parameters.items() if p.is_inference()]:
        raise ValueError(
            f"parameter {made[0]!r} was made under torch.inference_mode() and cannot be trained: build the model "
            f"outside of it."
        )
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "all parameters of the model are frozen (requires_grad is False), so nothing could recover from "
            "pruning; set requires_grad_(True) on what is to be trained. Single frozen parameters are fine: they "
            "are cut, not trained."
        )


OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay"}
"""What options are called elsewhere."""


def check_options(given: Iterable[str], known: Collection[str], of: str) -> None:
    """Refuse names that are no option; say the nearest that is one, or all."""
    for name in given:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        if OTHER_NAMES.get(name) in known:
            close = [OTHER_NAMES[name]]
        said = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}."
        raise TypeError(f"{of} has no option {name!r}; {said}")


def check_trace(
    channels: Channels, example: Any, ignore: Iterable[str] | str, also: tuple, unused: Iterable[str] | str
) -> None:
    """Refuse what a trace that is there already was not made with; an ``example`` of None is the traced one."""
    given, traced = (
        [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)]
        for each in (example, channels.example)
    )
    if example is not None and given != traced:
        raise ValueError(
            f"example_input has samples of {given} and came with channels=, a trace of {traced}, so costs would be "
            f"those of another input; give what was traced (or None), or trace this one."
        )
    for option, given, traced in (("ignore", ignore, channels.ignored), ("unused", unused, channels.unused)):
        given = (given,) if isinstance(given, str) else tuple(given)
        if given and {*given} != {*traced}:
            raise ValueError(
                f"{option}={list(given)} came with channels=, a trace made with {option}={list(traced)}; give {option} "
                f"to trace() instead."
            )
    if also and len(also) != len(channels.also):
        raise ValueError(
            f"{len(also)} inputs in also= came with channels=, a trace of {len(channels.also)} further calls; give "
            f"also to trace() instead."
        )


def warn_of_unknown(channels: Channels) -> None:
    """Warn of parameters that no traced call reaches, and of much that operators hold which are not understood."""
    unreached = [cause.units for cause in channels.causes if cause.kind == "unreached"]
    if unreached and any(channels.held(torch.cat(unreached)).values()):
        names = ", ".join(channels.unreached[:4]) + (", ..." if len(channels.unreached) > 4 else "")
        warnings.warn(
            f"{len(channels.unreached)} parameter(s) are reached by no traced call, in train or eval mode: {names}. "
            f"{len(torch.cat(unreached).unique()):,} units stay, for they have a size that such a branch could take. "
            f"Trace the call that reaches them (also=[its inputs]), or name modules that nothing uses (unused=[...]).",
            stacklevel=3,
        )
    causes = [cause for cause in channels.causes if cause.kind in NOT_UNDERSTOOD]
    if causes and (share := channels.held(torch.cat([cause.units for cause in causes]))["macs"]) > NOTABLE:
        warnings.warn(
            f"{share:.0%} of the macs cannot be pruned, on account of: {in_words(causes)}. That is never wrong, but it "
            f"narrows the choice; channels.explain() says what would free them.",
            stacklevel=3,
        )


def warn_of_room(bounds: Mapping[str, float], dense: Mapping[str, float]) -> None:
    """Warn where the network is within all its bounds already, as where a unit is wrong, or a rung no step down."""
    room = [bound - dense[name] for name, bound in bounds.items()]
    if min(room) >= 0 and max(room) > 0:
        given = [f"{amount(name, bound)} {name} of {amount(name, dense[name])}" for name, bound in bounds.items()]
        warnings.warn(
            f"the network is within the budget already ({', '.join(given)}), so nothing will be removed: are the units "
            f"right? On a ladder: the rung before left no more than this one allows.",
            RuntimeWarning,
            stacklevel=3,
        )


def width_options(model: nn.Module, channels: Channels, budget: Budget, multiple: Any, latency: Any) -> dict[str, Any]:
    """Return the options of :class:`Controller` that say what widths may be and how latency is known."""
    auto = multiple == "auto"
    if not auto and (isinstance(multiple, str) or not (is_whole(multiple) or isinstance(multiple, Sequence))):
        raise ValueError(f"multiple={multiple!r}; it must be an int of at least 1, or 'auto'.")
    if latency is not None and (isinstance(latency, type) or not hasattr(latency, "cost")):
        place = repr(latency) if isinstance(latency, str) else "..."
        raise TypeError(f"latency={latency!r}; it must be the place of measurement, latency=tcp.Latency({place}).")
    if budget.latency is None:
        if latency is not None and not auto:
            raise ValueError(
                "latency= says where latency is measured, but the budget has no bound on it: give one, for example "
                "budget={'latency': '4 ms'}, or leave multiple at 'auto' for widths that the place likes."
            )
        cost = None
    else:
        cost = None if latency is None else latency.cost(model, channels)
    likes = LIKED if latency is None else latency.likes(cost, (model, channels))
    return {"multiple": likes if auto else multiple, "latency": cost}
