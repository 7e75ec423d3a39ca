"""Which units win a place in the budget.

Exact arithmetic on hard costs: a greedy fill by score, for small networks exchanges of single units or blocks, and
where a cost is only predicted, a closed loop that measures it. How units are scored is the controller's matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .channels import Channels, Family
from .cost import Cost, is_whole


def least(min_width: int | float, family: Family) -> int:
    """Return the fewest units that stay in a family: so many, or that share of its units, rounded up."""
    return int(min_width) if is_whole(min_width) else math.ceil(min_width * len(family.units) - 1e-9)


def required_units(channels: Channels, min_width: int | float, multiple: int = 1) -> Tensor:
    """Return a smallest set of units that must stay, bool ``[units]``: the unprunable, and ``min_width`` a family.

    With ``multiple``, in each family a multiple of so many channels, or all of them.
    """
    share = isinstance(min_width, float) and 0 < min_width < 1
    if not share and (not is_whole(min_width) or min_width < 1):
        raise ValueError(
            f"min_width must be an int of at least 1, so that no layer empties, or a share of each family's units as a "
            f"float in (0, 1); got {min_width!r}."
        )
    required = ~channels.prunable
    for family in channels.families:
        there = int(required[family.units].sum())
        block = family.block(multiple)
        missing = -(-max(least(min_width, family), there) // block) * block - there
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
    of so many channels, by their mean score: its width is a multiple, or what it was. ``cost`` is what ``bounds`` are
    on, macs and params by default; they must not be below the cost of :func:`required_units`.
    """
    order, first, blocks = _ranked(channels, score, min_width, multiple)
    return _top_up(channels.cost_model if cost is None else cost, first, order[~first[order]], bounds, blocks)


class _Blocks(NamedTuple):
    """The block of each unit, int64 ``[units]``, named by its best unit, and the block that must win before it: another
    one for what is left at the end of a family when it is cut into blocks, which may only make the family whole.
    """

    block: Tensor
    before: Tensor


def _ranked(
    channels: Channels, score: Tensor, min_width: int | float, multiple: int
) -> tuple[Tensor, Tensor, _Blocks | None]:
    """Return all units from the best down, block by block, and what :func:`_blocks` says of them."""
    score = score.double().where(channels.prunable, torch.inf)
    order = score.argsort(descending=True, stable=True)
    first, blocks = _blocks(channels, order, min_width, multiple)
    if blocks is not None:
        block, before = blocks
        worth = torch.zeros_like(score).index_add_(0, block, score) / torch.bincount(block, minlength=len(score))
        worth = worth.minimum(worth[before])  # a mean of equal scores may be rounded up
        order = block.argsort(stable=True)
        order = order[worth[block[order]].argsort(descending=True, stable=True)]
    return order, first, blocks


def _blocks(channels: Channels, order: Tensor, min_width: int | float, multiple: int) -> tuple[Tensor, _Blocks | None]:
    """Return which units must win, bool ``[units]``, and the blocks; None for the latter where each unit is its own.
    ``order`` is that of all units, best first.
    """
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    first, block = ~channels.prunable, torch.arange(len(order))
    before = block.clone()
    for family in channels.families:
        best = family.units[place[family.units].argsort()]
        size = family.block(multiple)
        first[best[: -(-least(min_width, family) // size) * size]] = True
        block[best] = before[best] = best[torch.arange(len(best)) // size * size]
        rest = len(best) % size
        if rest and rest < len(best):
            before[best[-rest:]] = best[-rest - size]
    if multiple == 1:
        return first, None
    return torch.zeros_like(first).index_fill_(0, block[first], True)[block], _Blocks(block, before)


def _fits(cost: Cost, winning: Tensor, bounds: Mapping[str, float]) -> bool:
    found = cost.exact(winning)
    return all(found[name] <= bound for name, bound in bounds.items())


def _top_up(
    cost: Cost, winning: Tensor, rest: Tensor, bounds: Mapping[str, float], blocks: _Blocks | None = None
) -> Tensor:
    """Return ``winning`` with the first block of ``rest`` (unit indices, best first) that still fits added, and so on;
    without ``blocks`` each unit is one.
    """
    block, before = (None, None) if blocks is None else blocks
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
        if before is not None:  # nor will what could only come after it
            rest = rest[winning.index_fill(0, rest, True)[before[rest]]]
    return winning


FULL = 0.999
"""A bound is used up from this share of it on."""

NEARLY_FULL = 0.995
"""Below this share a block is let in at the expense of as many others as it takes."""

ENTERING = 12
"""So many blocks, the best, are tried for that."""

MOVES = 32
"""So many blocks are weighed at once for leaving or entering, those that cost least; each pair of them is counted."""


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

    Matters where one unit (with ``multiple``, one block) costs more than what is left. In each exchange two or three
    families change at once: the worst open units of one leave, or the best closed ones enter.
    """
    model = channels.cost_model if cost is None else cost
    limits = min_width, multiple

    def used(open_units: Tensor) -> Tensor:
        found = model.exact(open_units)
        return torch.tensor([found[name] / bound for name, bound in bounds.items()], dtype=torch.float64)

    order, _, blocks = _ranked(channels, score, *limits)

    def filled(open_units: Tensor) -> Tensor:  # a unit costs less once a neighbour in its layer has left
        return _top_up(model, open_units, order[~open_units[order]], bounds, blocks)

    def exchanged(open_units: Tensor) -> Tensor:
        while used(open_units).max() < FULL:
            moves = _moves(channels, open_units, score, *limits)
            better = _exchange(open_units, moves, score, used)
            if better is None:
                break
            open_units = filled(better)
        return open_units

    winning = exchanged(winning)
    if used(winning).max() < NEARLY_FULL:
        entering = [each for each in _moves(channels, winning, score, *limits) if not winning[each[1][0]]]
        entering = sorted(entering, key=lambda each: float(score[each[1]].double().mean()), reverse=True)[:ENTERING]
        entered = [_entered(channels, winning, *each, score, limits, used) for each in entering]
        others = [exchanged(filled(each)) for each in entered if each is not None]
        winning = max([winning, *others], key=lambda each: float(used(each).max()))
    return winning


def _entered(
    channels: Channels,
    winning: Tensor,
    family: int,
    units: Tensor,
    score: Tensor,
    limits: tuple[int | float, int],
    used: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Return ``winning`` with ``units`` of a family entered, and of others the worst left until it fits; None if it
    never does.
    """
    winning = winning.index_fill(0, units, True)
    while used(winning).max() > 1:
        moves = _moves(channels, winning, score, *limits)
        leaving = [other for number, other in moves if number != family and winning[other[0]]]
        if not leaving:
            return None
        winning = winning.index_fill(0, min(leaving, key=lambda other: float(score[other].double().mean())), False)
    return winning


def _exchange(
    winning: Tensor, moves: list[tuple[int, Tensor]], score: Tensor, used: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Return ``winning`` after two or three of ``moves``: of those that use a bound up, the ones that lose the least
    importance, else the ones that use it best. None if no bound can be used better.

    ``used`` is the share of each bound, float64 ``[bounds]``. Costs are bilinear: three moves cost what they cost one
    by one, and what they cost more in pairs. That is exact for macs and params; others are recounted.
    """

    def after(which: Iterable[int]) -> Tensor:
        units = torch.cat([moves[index][1] for index in which])
        return winning.index_put((units,), ~winning[units])

    now = used(winning)
    alone = [used(after([index])) - now for index in range(len(moves))]
    cheapest = sorted(range(len(moves)), key=lambda index: float(alone[index].abs().max()))[:MOVES]
    moves, alone = [moves[index] for index in cheapest], [alone[index] for index in cheapest]
    if len(moves) < 2:
        return None
    alone = torch.stack(alone)
    family = torch.tensor([index for index, _ in moves])
    gain = (torch.stack([score[units].double().mean() for _, units in moves]) * alone.sum(1)).nan_to_num()
    together = torch.zeros(len(moves), len(moves), len(now), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(moves)), 2):
        if family[i] != family[j]:
            together[i, j] = used(after([i, j])) - now - alone[i] - alone[j]
    best, reached = None, now.max()
    for size in (2, 3):
        which = torch.combinations(torch.arange(len(moves)), size)
        pairs = [(which[:, i], which[:, j]) for i, j in itertools.combinations(range(size), 2)]
        share = (now + alone[which].sum(1) + sum(together[pair] for pair in pairs)).amax(1)
        allowed = (share > now.max()) & (share <= 1 + 1e-9)  # what is exactly full, in floating point
        for i, j in pairs:
            allowed &= family[i] != family[j]
        which, share = which[allowed], share[allowed]
        full = share >= FULL
        order = torch.where(full, gain[which].sum(1), share).argsort(descending=True, stable=True)
        order = order[full[order].int().argsort(descending=True, stable=True)]
        for index in order[:30].tolist():
            candidate = after(which[index].tolist())
            found = used(candidate).max()
            if reached < found <= 1:
                best, reached = candidate, found
                break
        if reached >= FULL:
            break
    return best


def _moves(
    channels: Channels, winning: Tensor, score: Tensor, min_width: int | float, multiple: int
) -> list[tuple[int, Tensor]]:
    """Return, with the number of their family, the worst units that could leave it, and the best that could enter, so
    that its width is a multiple before and after.
    """
    moves = []
    for number, family in enumerate(channels.families):
        inside, outside = family.units[winning[family.units]], family.units[~winning[family.units]]
        removable = inside[channels.prunable[inside] & (score[inside] < torch.inf)]  # infinite: whatever it costs
        block = family.block(multiple)
        size = len(inside) % block or block  # a family that is whole need not be a multiple
        fewest = -(-least(min_width, family) // block) * block
        if len(inside) - size >= fewest and len(removable) >= size:
            moves.append((number, removable[score[removable].argsort(descending=True, stable=True)[-size:]]))
        if len(outside):
            moves.append((number, outside[score[outside].argsort(descending=True, stable=True)[:block]]))
    return moves


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


LARGEST_BLOCK = 0.05
"""Share of the budget that the cheapest block may cost, where the multiple is chosen."""

NO_CHOICE = 2 / 3
"""Share of the way up to a bound that the smallest network of a multiple may take."""


def liked(
    channels: Channels,
    candidates: Sequence[int],
    price: Mapping[str, Tensor],
    bounds: Mapping[str, float],
    min_width: int | float,
    cost: Cost,
) -> list[int]:
    """Return which of the multiples ``candidates`` (falling) suit the budget, the last one always.

    Their blocks are small enough: of some family one costs at most ``LARGEST_BLOCK``. And they leave a choice: their
    smallest network is at most ``NO_CHOICE`` of the way from the smallest of any widths up to each bound, for near a
    bound all networks would be that one. Of latency, which is not measured yet, its own table knows what fits.
    """
    share = sum(price[name] / bound for name, bound in bounds.items())
    known = {name: bound for name, bound in bounds.items() if name != "latency"}
    smallest = cost.exact(required_units(channels, min_width))

    def suits(multiple: int) -> bool:
        blocks = [
            family.block(multiple) * float(share[family.units].mean())
            for family in channels.families
            if len(family.units) > family.block(multiple) and channels.prunable[family.units].any()
        ]
        least = cost.exact(required_units(channels, min_width, multiple))
        return (
            bool(blocks)
            and min(blocks) <= LARGEST_BLOCK
            and all(
                least[name] - smallest[name] <= NO_CHOICE * (bound - smallest[name]) for name, bound in known.items()
            )
        )

    return [*filter(suits, candidates[:-1]), candidates[-1]]
