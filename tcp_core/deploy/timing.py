"""How long calls take beside each other, on a machine that does other things as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import pandas as pd


def interleaved(
    calls: Mapping[Hashable, Callable[[], Any]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """Return milliseconds, one row a round and one column a call.

    In each round every call runs once, and the order changes from round to round: what else the machine does hits all
    alike, so that the ratio of two columns in one row is worth more than either number. ``clock`` gives seconds; of
    one thread, ``time.process_time`` leaves out what passed while others had the processor.
    """
    if rounds < 1 or not calls:
        raise ValueError(f"rounds={rounds!r} of {len(calls)} calls; time at least one call in one round.")
    names = list(calls)
    for name in names * warmup:
        calls[name]()
    times: dict[Hashable, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = clock()
            calls[name]()
            times[name].append((clock() - started) * 1e3)
    return pd.DataFrame(list(zip(*times.values(), strict=True)), columns=pd.Index(names, tupleize_cols=False))


def summary(times: pd.DataFrame) -> pd.DataFrame:
    """Return one row a call: the median and the quartiles of its milliseconds, and how many times faster it is than the
    first column, as the median and the quartiles of the rounds' ratios.
    """
    ratios = times.rdiv(times.iloc[:, 0], axis=0)
    parts = {"ms": times, "speedup": ratios}
    return pd.DataFrame(
        {
            f"{name}{ending}": frame.quantile(share)
            for name, frame in parts.items()
            for ending, share in (("", 0.5), ("_q1", 0.25), ("_q3", 0.75))
        }
    ).rename_axis("name")
