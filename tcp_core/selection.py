"""Which units win a place in the budget.

Exact arithmetic on hard costs: a greedy fill by score, and for small networks exchanges of single units. How units
are scored is the controller's matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .channels import Channels, Family
from .cost import Cost


def least(min_width: int | float, family: Family) -> int:
    """Return the fewest units that stay in a family: so many, or that share of its units, rounded up."""
    return min_width if isinstance(min_width, int) else math.ceil(min_width * len(family.units))


def required_units(channels: Channels, min_width: int | float, multiple: int = 1) -> Tensor:
    """Return a smallest set of units that must stay, bool ``[units]``: the unprunable, and ``min_width`` a family.

    With ``multiple``, in each family a multiple of so many units, or all of them.
    """
    share = isinstance(min_width, float) and 0 < min_width < 1
    if not share and (not isinstance(min_width, int) or min_width < 1):
        raise ValueError(
            f"min_width must be an int of at least 1, so that no layer empties, or a share of each family's units as a "
            f"float in (0, 1); got {min_width!r}."
        )
    required = ~channels.prunable
    for family in channels.families:
        there = int(required[family.units].sum())
        missing = -(-max(least(min_width, family), there) // multiple) * multiple - there
        if missing > 0:
            required[family.units[~required[family.units]][:missing]] = True
    return required


def fill(
    channels: Channels,
    score: Tensor,
    bounds: Mapping[str, float],
    min_width: int | float = 1,
    multiple: int = 1,
    cost: Cost | None = None,
) -> Tensor:
    """Return the units that win, bool ``[units]``: within every bound, and nothing that is left out would still fit.

    The ``min_width`` best units of each family come first, then all others from the best ``score`` (float
    ``[units]``) down; one that does not fit is skipped. With ``multiple`` the units of a family win and lose in blocks
    of so many, by their mean score: its width is a multiple, or what it was. ``cost`` is what ``bounds`` are on, macs
    and params by default; they must not be below the cost of :func:`required_units`.
    """
    score = score.double().where(channels.prunable, torch.inf)
    order = score.argsort(descending=True, stable=True)
    first, block = _blocks(channels, order, min_width, multiple)
    if block is not None:
        worth = torch.zeros_like(score).index_add_(0, block, score) / torch.bincount(block, minlength=len(score))
        order = block.argsort(stable=True)
        order = order[worth[block[order]].argsort(descending=True, stable=True)]
    return _top_up(channels.cost_model if cost is None else cost, first, order[~first[order]], bounds, block)


def _blocks(channels: Channels, order: Tensor, min_width: int | float, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Return which units must win, bool ``[units]``, and the block of each, int64 ``[units]``, named by its best unit;
    None for the latter where each unit is its own. ``order`` is that of all units, best first.
    """
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    first, block = ~channels.prunable, torch.arange(len(order))
    for family in channels.families:
        best = family.units[place[family.units].argsort()]
        first[best[: -(-least(min_width, family) // multiple) * multiple]] = True
        block[best] = best[torch.arange(len(best)) // multiple * multiple]
    if multiple == 1:
        return first, None
    return torch.zeros_like(first).index_fill_(0, block[first], True)[block], block


def _fits(cost: Cost, winning: Tensor, bounds: Mapping[str, float]) -> bool:
    found = cost.exact(winning)
    return all(found[name] <= bound for name, bound in bounds.items())


def _top_up(
    cost: Cost, winning: Tensor, rest: Tensor, bounds: Mapping[str, float], block: Tensor | None = None
) -> Tensor:
    """Return ``winning`` with the first block of ``rest`` (unit indices, best first) that still fits added, and so on;
    without ``block`` each unit is one.
    """
    while len(rest):
        of = rest if block is None else block[rest]
        ends = torch.cat([of.diff().nonzero().flatten() + 1, torch.tensor([len(of)])])

        def head(blocks: int, winning: Tensor = winning, rest: Tensor = rest, ends: Tensor = ends) -> Tensor:
            return winning.index_fill(0, rest[: ends[blocks - 1]], True) if blocks else winning

        # the longest head that fits: cost grows with it. The block after it does not fit and never will.
        low, high = 0, len(ends)
        while low < high:
            middle = min(2 * low + 1, (low + high + 1) // 2)  # doubled, then bisected: late ones are short
            low, high = (middle, high) if _fits(cost, head(middle), bounds) else (low, middle - 1)
        winning, rest = head(low), rest[ends[low] :] if low < len(ends) else rest[:0]
        found, extra = cost.exact(winning), cost.marginal(winning)
        room = torch.ones(len(rest), dtype=torch.bool)
        for name, bound in bounds.items():
            least = extra[name][rest]
            if block is not None:  # at least: units of a block that meet in a layer cost more together
                least = torch.zeros_like(extra[name]).index_add_(0, block[rest], least)[block[rest]]
            room &= found[name] + least <= bound
        rest = rest[room]  # what does not fit now never will
    return winning


def tighten(
    channels: Channels,
    winning: Tensor,
    score: Tensor,
    bounds: Mapping[str, float],
    min_width: int | float = 1,
    cost: Cost | None = None,
) -> Tensor:
    """Return ``winning`` with single units exchanged until a bound is used to 99.9 %, as far as that is possible.

    Matters where one unit costs more than what is left. Each exchange takes the worst open unit of one family for the
    best closed unit of another, and is the one that fills the bounds best.
    """
    model = channels.cost_model if cost is None else cost

    def used(open_units: Tensor) -> float:
        found = model.exact(open_units)
        return max(found[name] / bound for name, bound in bounds.items())

    for _ in range(50):
        if used(winning) >= 0.999:
            break
        leaving, entering = [], []
        for family in channels.families:
            inside, outside = family.units[winning[family.units]], family.units[~winning[family.units]]
            removable = inside[channels.prunable[inside]]
            if len(inside) > least(min_width, family) and len(removable):
                leaving.append(removable[score[removable].argmin()])
            if len(outside):
                entering.append(outside[score[outside].argmax()])
        if not leaving or not entering:
            break
        out, into = torch.stack(leaving), torch.stack(entering)
        found, extra = model.exact(winning), model.marginal(winning)
        filled = torch.stack(
            [(found[name] - extra[name][out][:, None] + extra[name][into]) / bound for name, bound in bounds.items()]
        ).amax(0)
        # The two marginal costs add up but for units that meet in one layer: the most promising ones are recounted.
        best = winning
        for index in filled.where(filled <= 1.01, -1.0).flatten().argsort(descending=True, stable=True)[:30].tolist():
            candidate = winning.clone()
            candidate[out[index // len(into)]], candidate[into[index % len(into)]] = False, True
            if used(best) < used(candidate) <= 1:
                best = candidate
        if best is winning:
            break
        rest = (~best).nonzero().flatten()  # a unit costs less once a neighbour in its layer has left
        winning = _top_up(model, best, rest[score[rest].argsort(descending=True, stable=True)], bounds)
    return winning
