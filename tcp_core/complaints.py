"""What the controller says where it cannot begin, or where its user should know something."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from .channels import Channels, Family
from .cost import Budget, amount
from .explanation import in_words, without_parameters
from .selection import required_units

KINDS = {
    ("unknown",): "operators that are not understood",
    ("weight",): "weights that are no parameters",
    ("attribute", "computed", "changing", "fixed"): "sizes that could not follow",
    ("unreached",): "layers that no traced call reaches",
    ("ignored",): "patterns",
}
"""Causes that a user can change, by their kind."""


def nothing_prunable(channels: Channels) -> str:
    """Say that every unit is held, and by what."""
    held = f", held by: {in_words(channels.causes)}" if channels.causes else ""
    held += "".join(f"; {sentence}" for sentence in without_parameters((x.what, x.name) for x in channels.weightless))
    return (
        f"no unit of this network can be removed ({channels.units} units{held}). Check that the network has "
        f"hidden convolutions or linear layers; channels.explain() goes through them layer by layer."
    )


def below_floor(controller: Any, cost: str) -> str:
    """Say that no network of these families is within a budget, where the smallest lies, and what keeps it there."""
    name, factor = _as_asked(controller, cost)
    bound, dense, floor = (factor * each[cost] for each in (controller.bounds, controller.dense, controller.floor))
    return (
        f"the {name} budget of {amount(cost, bound)} ({bound / dense:.2%} of the dense {amount(cost, dense)}) is below "
        f"the floor: with {_fewest(controller)} in each family the smallest network has {amount(cost, floor)} "
        f"({floor / dense:.2%}). Give {name} >= {amount(cost, floor).replace(',', '')}, {_holders(controller, cost)}"
    )


def _as_asked(controller: Any, cost: str) -> tuple[str, int]:
    """Return what the user calls a cost, and how many of that one of ours is: a bound on macs may be one on flops."""
    flops = controller.budget.flops
    if cost != "macs" or flops is None:
        return cost, 1
    its_own = Budget(flops=flops).resolve(controller.dense)["macs"] == controller.bounds["macs"]
    return ("flops", 2) if its_own else (cost, 1)


def _fewest(controller: Any) -> str:
    """Return how many units stay in each family at least, in words."""
    units = "unit(s)" if isinstance(controller.min_width, int) else "of the units"
    # how many units that is depends on the family: of some, each unit is several channels
    multiple = controller.multiple
    rounded = f", rounded up to widths that are multiples of {multiple}," if multiple > 1 else ""
    return f"{controller.min_width:.3g} {units}{rounded}"


def _holders(controller: Any, cost: str) -> str:
    """Return what keeps the floor of a cost where it is and could be changed, to end a sentence with."""
    channels, floor, dense = controller.channels, controller.floor[cost], controller.dense[cost]
    min_width, multiple = controller.min_width, controller.multiple
    reasons = []
    for kinds, words in KINDS.items():
        causes = [cause for cause in channels.causes if cause.kind in kinds]
        if not causes:
            continue
        free = channels.prunable.index_fill(0, torch.cat([cause.units for cause in causes]), True)
        freed = dataclasses.replace(channels, prunable=free)
        lower = controller.cost_model.exact(required_units(freed, min_width, multiple))[cost]
        if lower < floor:
            reasons.append(f"{words} hold {(floor - lower) / dense:.1%} of the dense {cost} ({in_words(causes)})")
    lower = controller.cost_model.exact(required_units(channels, 1, 1))[cost]
    if lower < floor:
        share = (floor - lower) / dense
        reasons.append(f"min_width={min_width} and multiple={multiple} hold {share:.1%} of the dense {cost}")
    if not reasons:
        return "for no smaller network can be made of this one."
    return f"or change what keeps it there: {'; '.join(reasons)}. See channels.explain()."


def above_latency(bound: float, ms: float, spread: float) -> str:
    """Say that what is delivered was measured above its latency, both in milliseconds."""
    return (
        f"no network was measured within the latency of {bound:.4g} ms; the nearest takes {ms:.4g} ms (spread "
        f"{spread:.1%}). The machine may be slower than when the run began."
    )


def without_gradient(families: Iterable[Family]) -> str:
    """Say that units of these families lose although nothing is known of what they are worth."""
    layers = [family.layers[0] for family in families]
    return (
        f"the loss has no gradient with respect to the channels of {', '.join(map(repr, layers[:3]))}"
        f"{f' and {len(layers) - 3} more layers' if len(layers) > 3 else ''}: they go in the order of their "
        f"numbers, whatever they are worth. So it is behind torch.no_grad() and detach(), and where the "
        f"loss leaves an output out. Let the gradient through, for channels of frozen weights are ranked too, "
        f"or name these layers in ignore=."
    )


def not_finite(steps: int, closed: int) -> str:
    """Say that so many steps were refused since the last word of it, with so many gates closed."""
    return (
        f"{steps} step(s) had gradients that are not finite and were refused: importance and gates did not change. "
        f"With loss scaling a few are normal; otherwise lower the learning rate, or, if gates are closed already "
        f"({closed} are), see whether the network takes a root of a channel or divides by one: a closed one is zero."
    )
