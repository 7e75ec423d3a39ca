"""Taking time on a machine that does other things as well."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

ROUNDS = 7
"""How often networks take turns."""

AGREE = 0.05
"""Spread up to which a few rounds are enough, where calls are so long that more would take minutes."""

PATIENCE = 4
"""At most so many times the rounds are taken of whole networks that disagree by more than that."""


LONGEST = 30
"""At most so many times the seconds asked for are taken of networks that disagree, once there are three rounds: one
that takes ten seconds a call would keep a training run waiting for hours."""


class LatencyError(RuntimeError):
    """Latency cannot be measured here, or not well enough; the message says what to do."""


class Timing(NamedTuple):
    """Milliseconds of a network.

    spread: how far apart repeated measurements were, as a fraction: of the ratio to each network that took turns with
    it, the largest; of the milliseconds where it was alone. Where more than ``ROUNDS`` were taken, less by the root of
    how many times more, as the median is then known the better. least: of the milliseconds. drift: how far apart these
    were by themselves, which a machine that slows down and speeds up makes larger than the spread.
    """

    ms: float
    spread: float
    least: float
    drift: float = 0.0


def timed(
    runs: Sequence[Callable[[], None]], *, seconds: float = 1.0, rounds: int = ROUNDS, patience: int = 1
) -> list[Timing]:
    """Return the time of one call of each of ``runs``, which take turns so that other load hits them alike.

    Medians of minima: each round keeps the fastest of a few calls, for whatever else runs can only add; the median over
    rounds is reported, and as spread the distance of the quartiles. ``seconds`` is about what all of it
    takes, if the calls do not take longer: then three rounds of one call each will do where they agree. Where they do
    not, up to ``patience`` times the rounds are taken, for at most ``LONGEST`` times the seconds.
    """
    for _ in range(2):  # the first call chooses kernels, the second allocates by what the first one used
        for run in runs:
            run()
    share = seconds / rounds / len(runs)
    minima: list[list[float]] = []
    started = time.perf_counter()
    while len(minima) < patience * rounds:
        minima.append([_fastest(run, share) for run in runs])
        took = time.perf_counter() - started
        if len(minima) < (3 if took > 3 * seconds else rounds):
            continue
        if took > LONGEST * seconds or all(timing.spread <= AGREE for timing in side_by_side(minima)):
            break
    return side_by_side(minima)


def side_by_side(rounds: Sequence[Sequence[float]]) -> list[Timing]:
    """Return the timing of each network from milliseconds, [rounds, networks].

    The median is of what a network took beside the others in the same round, for a machine whose speed changes: so the
    medians of two networks are to each other as the median of their ratios.
    """
    samples = list(zip(*rounds, strict=True))
    pace = [statistics.geometric_mean(each) for each in rounds]
    found = []
    for own in samples:
        ratios = [_apart([a / b for a, b in zip(own, other, strict=True)]) for other in samples if other is not own]
        drift = _apart(own)
        ms = statistics.median(pace) * statistics.median(a / b for a, b in zip(own, pace, strict=True))
        found.append(Timing(ms, max(ratios, default=drift), min(own), drift))
    return found


def _apart(samples: Sequence[float]) -> float:
    """Return the distance of the quartiles over the median, less by the root of how many more than ``ROUNDS``."""
    if len(samples) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle / math.sqrt(max(1.0, len(samples) / ROUNDS))


def _fastest(run: Callable[[], None], seconds: float) -> float:
    """Return the milliseconds of the fastest of as many calls as there is time for, one at least."""
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= end:
            return 1000 * best
