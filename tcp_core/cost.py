"""Budgets, and the one formula of cost.

A layer's multiply-accumulates are ``area * kernel * inputs * outputs`` and a weight's entries are ``inputs * outputs *
kernel``: both are products of two channel counts. With ``z`` in [0, 1] per unit, each count is ``fixed + sum of z``
over the units it is made of, so every cost is one **bilinear** form of ``z``. The same few lines give exact integers
(binary ``z``), gradients, and what a single unit costs while the others stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from scipy.sparse import csr_array
from torch import Tensor

COSTS = ("macs", "params")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


class BudgetError(ValueError):
    """A budget that is malformed, or that no network with these channels can meet."""


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the cost of the tailored network; at least one must be given.

    Each bound is a fraction of the dense network's cost (a float in (0, 1], or a string such as ``"40%"``) or an
    absolute number (an int, or a string such as ``"60M"``). ``macs`` counts multiply-accumulates of convolutions and
    linear layers for one sample, which is what pruning papers print as FLOPs; ``flops`` is 2 x macs, which is what
    ``torch.utils.flop_counter`` counts; ``params`` counts the entries of all parameters.

    Example:
        >>> Budget(macs=0.5, params="60%").resolve({"macs": 1000, "params": 100})
        {'macs': 500, 'params': 60}
    """

    macs: float | int | str | None = None
    params: float | int | str | None = None
    flops: float | int | str | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, field.name) is None for field in fields(self)):
            raise BudgetError(
                "the budget is empty: give at least one of macs, params, flops, for example Budget(macs=0.5)."
            )
        for field in fields(self):
            if getattr(self, field.name) is not None:
                _parse(field.name, getattr(self, field.name))

    @classmethod
    def of(cls, value: Budget | Mapping) -> Budget:
        """Return ``value`` as a Budget; a plain dict is accepted wherever a Budget is."""
        if isinstance(value, Budget):
            return value
        allowed = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise BudgetError(
                f"a budget is a Budget or a dict with keys among {allowed}, for example {{'macs': 0.5}}; got {value!r}."
            )
        if unknown := [key for key in value if key not in allowed]:
            raise BudgetError(f"unknown budget key {unknown[0]!r}; allowed keys are {allowed}.")
        return cls(**value)

    def resolve(self, dense: Mapping[str, int]) -> dict[str, int]:
        """Return the bounds as absolute integers, ``{"macs": int, "params": int}`` with only the budgeted keys.

        ``dense`` is the cost of the dense network. Fractions are rounded down, so that a network within the returned
        bound is within the fraction. ``flops`` becomes a bound on macs (the stricter one if both are given).
        """
        bounds: dict[str, int] = {}
        for key, cost, unit in (("macs", "macs", 1), ("flops", "macs", 2), ("params", "params", 1)):
            if (value := getattr(self, key)) is None:
                continue
            value = _parse(key, value)
            bound = math.floor(value * dense[cost] + 1e-6) if isinstance(value, float) else value // unit
            bounds[cost] = min(bound, bounds.get(cost, bound))
        return bounds

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the bounds as they were given, without the absent ones."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def _parse(key: str, value: float | int | str) -> float | int:
    """Return a fraction in (0, 1] as float, or an absolute bound >= 1 as int."""
    how = (
        f"give a fraction of the dense network as a float in (0, 1] or as '40%', or an absolute number as an int or "
        f"as '60M'; got {key}={value!r}."
    )
    number = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([%kKmMgGbBtT]?)\s*", value)
        if match is None:
            raise BudgetError(f"budget {key} is not a number: {how}")
        digits, suffix = match.groups()
        if suffix == "%":
            number = float(digits) / 100
        elif suffix or ("." not in digits and float(digits).is_integer()):
            number = round(float(digits) * _SUFFIX[suffix.lower()])
        else:
            number = float(digits)
    if isinstance(number, bool) or not isinstance(number, Real) or number != number:
        raise BudgetError(f"budget {key} is not a number: {how}")
    number = int(number) if isinstance(number, Integral) else float(number)  # numpy's, too
    if number <= 0:
        raise BudgetError(f"budget {key} must be positive: {how}")
    if isinstance(number, float) and number > 1:
        raise BudgetError(f"budget {key} is a fraction above 1: {how}")
    return number


@dataclass(frozen=True)
class CostModel:
    """Costs as bilinear forms of the gates: ``sum_t scale_t * count_left(t) * count_right(t)``.

    ``count_f = fixed[f] + sum over entries (f, unit, times) of times * z[unit]`` are the channel counts; several
    layers share one. ``terms[cost] = (scale, left, right)`` with one entry per term. All float64: sums of integers
    stay exact up to 2**53. Build it with :class:`CostBuilder`.
    """

    units: int
    fixed: Tensor
    rows: Tensor
    columns: Tensor
    times: Tensor
    terms: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    def counts(self, z: Tensor) -> Tensor:
        """Return the channel counts, float64 ``[counts]``, for gates ``z`` (float ``[units]``)."""
        z = z.to(self.fixed.dtype)
        return self.fixed.index_add(0, self.rows, self.times * z[self.columns])

    def __call__(self, z: Tensor) -> dict[str, Tensor]:
        """Return each cost as a float64 scalar, differentiable in ``z`` (float ``[units]`` in [0, 1])."""
        n = self.counts(z)
        return {name: (scale * n[left] * n[right]).sum() for name, (scale, left, right) in self.terms.items()}

    def exact(self, open_units: Tensor | None = None) -> dict[str, int]:
        """Return each cost as an int for the network that keeps ``open_units`` (bool ``[units]``; all by default)."""
        if open_units is None:
            open_units = torch.ones(self.units, dtype=torch.bool)
        return {name: int(value) for name, value in self(open_units).items()}

    def marginal(self, z: Tensor) -> dict[str, Tensor]:
        """Return, per cost, what each unit costs while the others stay at ``z``: cost(unit open) - cost(unit closed).

        float64 ``[units]``. From the gradient of the bilinear form: ``gradient - (2 z - 1) * cross``, where
        ``cross`` collects the terms in which a unit stands on both sides (its gradient counts those twice).
        """
        n = self.counts(z)
        z = z.to(n.dtype)
        result = {}
        for name, (scale, left, right) in self.terms.items():
            by_count = torch.zeros_like(n).index_add(0, left, scale * n[right])
            by_count.index_add_(0, right, scale * n[left])
            gradient = z.new_zeros(self.units).index_add(0, self.columns, self.times * by_count[self.rows])
            result[name] = gradient - (2 * z - 1) * self._cross[name]
        return result

    def __post_init__(self) -> None:
        entries = (self.times.numpy(), (self.rows.numpy(), self.columns.numpy()))
        matrix = csr_array(entries, shape=(len(self.fixed), self.units))
        cross = {
            name: torch.from_numpy(matrix[left.numpy()].multiply(matrix[right.numpy()]).T @ scale.numpy())
            for name, (scale, left, right) in self.terms.items()
        }
        object.__setattr__(self, "_cross", cross)


class CostBuilder:
    """Collects terms for a :class:`CostModel` over ``units`` units; equal channel counts are stored once."""

    def __init__(self, units: int) -> None:
        self.units = units
        self._ids: dict[bytes, int] = {}
        self._fixed: list[float] = []
        self._entries: list[tuple[Tensor, Tensor]] = []
        self._terms: dict[str, list[tuple[float, int, int]]] = {name: [] for name in COSTS}

    def add(self, cost: str, scale: float, left: Tensor | None = None, right: Tensor | None = None) -> None:
        """Add ``scale * count(left) * count(right)``; a side lists units (int64, -1: fixed), None counts 1."""
        self._terms[cost].append((float(scale), self._count(left), self._count(right)))

    def _count(self, units: Tensor | None) -> int:
        if units is None:
            units = torch.tensor([-1])
        key = units.sort().values.numpy().tobytes()
        if key not in self._ids:
            self._ids[key] = len(self._fixed)
            columns, times = units[units >= 0].unique(return_counts=True)
            self._fixed.append(float((units < 0).sum()))
            self._entries.append((columns, times))
        return self._ids[key]

    def build(self) -> CostModel:
        """Return the cost model of all terms added so far."""
        empty = torch.zeros(0, dtype=torch.int64)
        lengths = torch.tensor([len(columns) for columns, _ in self._entries], dtype=torch.int64)
        terms = {}
        for name, rows in self._terms.items():
            table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
            terms[name] = (table[:, 0], table[:, 1].long(), table[:, 2].long())
        return CostModel(
            units=self.units,
            fixed=torch.tensor(self._fixed, dtype=torch.float64),
            rows=torch.arange(len(lengths)).repeat_interleave(lengths),
            columns=torch.cat([columns for columns, _ in self._entries] or [empty]),
            times=torch.cat([times for _, times in self._entries] or [empty]).double(),
            terms=terms,
        )
