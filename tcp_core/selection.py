"""Which units win a place in the budget.

Exact arithmetic on hard costs: a greedy fill by score, for small networks exchanges of single units or blocks, and
where a cost is only predicted, a closed loop that measures it. How units are scored is the controller's matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

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
    multiple: int = 1,
    cost: Cost | None = None,
) -> Tensor:
    """Return ``winning`` with single units, or blocks, exchanged until a bound is used to 99.9 %, as far as possible.

    Matters where one unit (with ``multiple``, one block) costs more than what is left. Each exchange takes the worst
    open units of one family for the best closed ones of another, and is the one that fills the bounds best.
    """
    model = channels.cost_model if cost is None else cost

    def used(open_units: Tensor) -> float:
        found = model.exact(open_units)
        return max(found[name] / bound for name, bound in bounds.items())

    for _ in range(50):
        if used(winning) >= 0.999:
            break
        leaving, entering = _exchangeable(channels, winning, score, min_width, multiple)
        if not leaving or not entering:
            break
        found = model.exact(winning)
        out, into = (
            [model.exact(winning.index_fill(0, units, opened)) for units in sides]
            for sides, opened in ((leaving, False), (entering, True))
        )
        filled = torch.stack(
            [
                torch.tensor([each[name] - found[name] for each in out])[:, None] / bound
                + torch.tensor([each[name] for each in into]) / bound
                for name, bound in bounds.items()
            ]
        ).amax(0)
        # The differences add up but for units that meet in one layer: the most promising pairs are recounted.
        best = winning
        for index in filled.where(filled <= 1.01, -1.0).flatten().argsort(descending=True, stable=True)[:30].tolist():
            candidate = winning.clone()
            candidate[leaving[index // len(entering)]] = False
            candidate[entering[index % len(entering)]] = True
            if used(best) < used(candidate) <= 1:
                best = candidate
        if best is winning and multiple > 1:  # blocks are coarse: let two enter for one, or leave for one
            pairs = [*_pairs(leaving, entering, out, into, bounds, found)]
            candidates = (winning.index_fill(0, units, False).index_fill(0, more, True) for units, more in pairs)
            best = max((each for each in candidates if used(each) <= 1), key=used, default=winning)
            best = best if used(best) > used(winning) else winning
        if best is winning:
            break
        # a unit costs less once a neighbour in its layer has left
        order = score.double().where(channels.prunable, torch.inf).argsort(descending=True, stable=True)
        _, block = _blocks(channels, order, min_width, multiple)
        rest = order[~best[order]]
        if block is not None:
            rest = rest[block[rest].argsort(stable=True)]
            rest = rest[score.double()[block[rest]].argsort(descending=True, stable=True)]
        winning = _top_up(model, best, rest, bounds, block)
    return winning


def _pairs(leaving, entering, out, into, bounds, found) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the 60 most promising exchanges of one block for two or two for one, as (leaving, entering) units."""

    def shares(costs: Sequence[Mapping[str, float]]) -> list[float]:  # of the bound that is nearest to its limit
        name = max(bounds, key=lambda name: found[name] / bounds[name])
        return [(cost[name] - found[name]) / bounds[name] for cost in costs]

    room = 1 - max(found[name] / bound for name, bound in bounds.items())
    less, more = list(enumerate(shares(out))), list(enumerate(shares(into)))
    found_pairs = [(a + b + c, (i,), (j, k)) for i, a in less for (j, b), (k, c) in itertools.combinations(more, 2)]
    found_pairs += [(a + b + c, (i, k), (j,)) for j, a in more for (i, b), (k, c) in itertools.combinations(less, 2)]
    found_pairs = sorted((each for each in found_pairs if 0 < each[0] <= room + 0.01), reverse=True)
    for _, gone, come in found_pairs[:60]:
        yield torch.cat([leaving[i] for i in gone]), torch.cat([entering[j] for j in come])


def _exchangeable(
    channels: Channels, winning: Tensor, score: Tensor, min_width: int, multiple: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return per family the worst units that could leave, and the best that could enter, so that its width is a
    multiple before and after.
    """
    leaving, entering = [], []
    for family in channels.families:
        inside, outside = family.units[winning[family.units]], family.units[~winning[family.units]]
        removable = inside[channels.prunable[inside]]
        size = len(inside) % multiple or multiple  # a family that is whole need not be a multiple
        fewest = -(-least(min_width, family) // multiple) * multiple
        if len(inside) - size >= fewest and len(removable) >= size:
            leaving.append(removable[score[removable].argsort(descending=True, stable=True)[-size:]])
        if len(outside):
            entering.append(outside[score[outside].argsort(descending=True, stable=True)[:multiple]])
    return leaving, entering


ENOUGH = 0.98
"""A measured cost is near enough to its bound from this share of it on."""

ROUNDS = 10
"""Networks that are measured at most before the set is final."""


def settle(
    choose: Callable[[float], Tensor], measure: Callable[[Tensor], float], bound: float, floor: float
) -> tuple[Tensor, float, int]:
    """Return the set of units whose *measured* cost is the highest within ``bound``, what was measured, and how many
    sets were.

    ``choose(aim)`` fills a predicted cost of ``aim``. The aim is corrected by the ratio of bound and measurement,
    within the aims that were found too low and too high, until 98 % of the bound are used. If nothing is within the
    bound, ``choose(floor)`` is returned as it was measured.
    """
    low, high, aim = 0.0, math.inf, max(bound, floor)
    seen: dict[bytes, float] = {}
    best: tuple[Tensor, float] | None = None
    middle = (1 + ENOUGH) / 2 * bound
    for _ in range(3 * ROUNDS):
        winning = choose(aim)
        key = winning.numpy().tobytes()
        new = key not in seen
        if new:
            seen[key] = measure(winning)
        found = seen[key]
        if found <= bound:
            low = max(low, aim)
            best = (winning, found) if best is None or found > best[1] else best
        else:
            high = min(high, aim)
        if ENOUGH * bound <= found <= bound or len(seen) >= ROUNDS or high <= 1.001 * max(low, floor):
            break
        wanted = aim * middle / found
        if not new or not low < wanted < high:  # the same set again, or measurements that contradict: halve the way
            wanted = math.sqrt(low * high) if low and high < math.inf else aim * (1.05 if found <= bound else 0.95)
        if winning.all() and found <= bound:
            break  # nothing is left to add
        aim = max(wanted, floor)
    if best is None:
        winning = choose(floor)
        key = winning.numpy().tobytes()
        best = winning, seen[key] if key in seen else measure(winning)
    return *best, len(seen)


LARGEST_BLOCK = 0.02
"""Share of the budget that the cheapest block may cost, where the multiple is chosen."""


def liked(channels: Channels, share: Tensor, candidates: Sequence[int]) -> int:
    """Return the largest of ``candidates`` (falling) with blocks small enough to come near the budget, or the last.

    ``share`` is what each unit costs of the budget, float ``[units]``.
    """
    for multiple in candidates:
        blocks = [
            multiple * float(share[family.units].mean())
            for family in channels.families
            if len(family.units) > multiple and channels.prunable[family.units].any()
        ]
        if blocks and min(blocks) <= LARGEST_BLOCK:
            return multiple
    return candidates[-1]
