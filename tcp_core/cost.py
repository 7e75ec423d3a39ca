"""Budgets, and the one formula of cost.

A layer's multiply-accumulates are ``area * kernel * inputs * outputs`` and a weight's entries are ``inputs * outputs *
kernel``: both are products of two channel counts. With ``z`` in [0, 1] per unit, each count is ``fixed + sum of z``
over the units it is made of, so every cost is one **bilinear** form of ``z``. The same few lines give exact integers
(binary ``z``), gradients, and what a single unit costs while the others stay as they are.

Ranking and filling need less of a cost than that, see :class:`Cost`: so peak memory, which is no bilinear form, and
latency, which is a table of measurements, stand beside it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from scipy.sparse import csr_array
from torch import Tensor

COSTS = ("macs", "params")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MILLISECONDS = {"ms": 1.0, "us": 1e-3, "\u00b5s": 1e-3, "\u03bcs": 1e-3, "s": 1e3}

PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of a number, for budgets in bytes."""


def is_whole(value: Any) -> bool:
    """Say whether something is a whole number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Say whether something is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


class BudgetError(ValueError):
    """A budget that is malformed, or that no network with these channels can meet."""


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the cost of the tailored network; at least one must be given.

    Each bound is a fraction of the dense network's cost (a float in (0, 1], or a string such as ``"40%"``) or absolute.

    Attributes:
        macs: multiply-accumulates of convolutions, linear and recurrent layers and products in attention for one
            sample, which is what pruning papers print as FLOPs; absolute as an int or ``"60M"``.
        flops: 2 x macs, which is what ``torch.utils.flop_counter`` counts.
        params: entries of all parameters.
        memory: most bytes of activations that are alive at one time, in eval mode and without gradients, the inputs
            included: ``"2 MB"``, ``"512 KiB"`` or an int.
        weights: bytes of all parameters and buffers, which is what a file of the weights holds.
        latency: time of one forward pass, measured where ``latency=tcp.Latency(...)`` says: ``"4 ms"`` or ``"350 us"``.
            A bare number above 1 is refused, for it has no unit.
        precision: what ``memory`` and ``weights`` count floating-point numbers at: ``"fp32"``, ``"fp16"``, ``"bf16"``
            or ``"int8"``; None for what the model has them in.
        batch: samples for which ``memory`` is counted.

    Example:
        >>> Budget(macs=0.5, params="60%").resolve({"macs": 1000, "params": 100})
        {'macs': 500, 'params': 60}
    """

    macs: float | int | str | None = None
    params: float | int | str | None = None
    flops: float | int | str | None = None
    memory: float | int | str | None = None
    weights: float | int | str | None = None
    latency: float | str | None = None
    precision: str | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if not self._bounds():
            raise BudgetError(
                "the budget is empty: give at least one of macs, params, flops, memory, weights, latency, for example "
                "Budget(macs=0.5)."
            )
        for key, value in self._bounds().items():
            _parse(key, value)
        check_bytes_at(self.precision, self.batch, "budget ")
        given = ", ".join(self._bounds())
        if self.precision is not None and self.memory is None and self.weights is None:
            raise BudgetError(
                f"budget precision={self.precision!r} says what memory and weights count numbers at, and there is no "
                f"bound on either (only {given}): give one, or leave it out."
            )
        if self.batch != 1 and self.memory is None:
            place = "; latency is measured at that of tcp.Latency(batch=)" if self.latency is not None else ""
            raise BudgetError(
                f"budget batch={self.batch!r} says for how many samples memory is counted, and there is no bound on "
                f"memory (only {given}){place}: give one, or leave it out."
            )

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
            close = difflib.get_close_matches(str(unknown[0]).lower(), allowed, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise BudgetError(f"unknown budget key {unknown[0]!r}; allowed keys are {allowed}.{meant}")
        return cls(**value)

    def resolve(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Return the bounds as absolute numbers, with only the budgeted keys among macs, params, memory, weights
        (ints; the latter two in bytes) and latency (a float, in milliseconds).

        ``dense`` is the cost of the dense network. Fractions are rounded down, so that a network within the returned
        bound is within the fraction. ``flops`` becomes a bound on macs (the stricter one if both are given).

        Raises:
            BudgetError: if ``dense`` lacks a cost of which a fraction was given.
        """
        bounds: dict[str, float] = {}
        for key, value in self._bounds().items():
            cost = "macs" if key == "flops" else key
            bound = _parse(key, value)
            if isinstance(bound, Fraction):
                if cost not in dense:
                    raise BudgetError(
                        f"a budget of {value!r} of the dense network's {cost} needs that {cost}; dense has "
                        f"{', '.join(dense)}. Give what a run's report has: result.report['dense']."
                    )
                bound = bound.of(dense[cost])
            elif key == "flops":
                bound //= 2
            bounds[cost] = min(bound, bounds.get(cost, bound))
        return bounds

    def as_dict(self) -> dict[str, float | int | str]:
        """Return what was given, without what is absent or as it is by default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def bytes_at(self) -> dict[str, str | int | None]:
        """Return the precision and the batch at which bytes are counted, where a bound depends on them."""
        found: dict[str, str | int | None] = {}
        if self.memory is not None or self.weights is not None:
            found["precision"] = self.precision
        return found if self.memory is None else found | {"batch": self.batch}

    def _bounds(self) -> dict[str, float | int | str]:
        names = [field.name for field in fields(self) if field.name not in ("precision", "batch")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def check_bytes_at(precision: str | None, batch: int, of: str = "") -> None:
    """Raise BudgetError unless bytes can be counted at this precision, and for so many samples."""
    if precision is not None and precision not in tuple(PRECISIONS):
        raise BudgetError(f"{of}precision={precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    if not is_whole(batch) or batch < 1:
        raise BudgetError(f"{of}batch={batch!r}; it must be an int of at least 1.")


def amount(name: str, value: float) -> str:
    """Return a cost as text, with its unit where it has one."""
    if name == "latency":
        return f"{value:.4g} ms"
    return f"{value:,} B" if name in ("memory", "weights") else f"{value:,}"


class Fraction(float):
    """A bound that is a share, in (0, 1], of the dense network's cost."""

    def of(self, dense: float) -> float:
        """Return the bound: rounded down where the cost is an integer."""
        return math.floor(self * dense + 1e-6) if isinstance(dense, int) else self * dense


_ABSOLUTE = {"latency": "a time as '4 ms', '350 us' or '0.004 s'"}
_ABSOLUTE |= dict.fromkeys(("memory", "weights"), "bytes as an int or as '500 kB', '2 MB', '512 KiB'")


def _parse(key: str, value: float | int | str) -> float | int:
    """Return a :class:`Fraction`, or an absolute bound: an int of at least 1, for latency milliseconds as a float."""
    absolute = _ABSOLUTE.get(key, "an absolute number as an int or as '60M'")
    how = f"give a fraction of the dense network as a float in (0, 1] or as '40%', or {absolute}; got {key}={value!r}."
    number = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([^\W\d_]*|%)\s*", value)
        if match is None:
            raise BudgetError(f"budget {key} is not a number: {how}")
        digits, suffix = match.groups()
        # "1.0" is all of the dense network, "1.5e3" is 1500
        whole = float(digits).is_integer() and ("." not in digits or "e" in digits.lower())
        if suffix == "%":
            number = float(digits) / 100
        elif not suffix:
            number = int(float(digits)) if whole else float(digits)
        elif (unit := _units(key).get(suffix)) is None:
            raise BudgetError(f"budget {key} is not a number: {how}")
        elif key == "latency" and float(digits) > 0:
            return float(digits) * unit
        else:
            number = round(float(digits) * unit)
    if not is_number(number) or number != number:
        raise BudgetError(f"budget {key} is not a number: {how}")
    if number <= 0:
        raise BudgetError(f"budget {key} must be positive: {how}")
    if isinstance(number, Integral) and key != "latency":
        return int(number)  # numpy's, too
    if key == "latency" and (number > 1 or isinstance(number, Integral)):
        raise BudgetError(f"budget {key} has no unit: {how}")
    if number > 1:
        raise BudgetError(f"budget {key} is a fraction above 1: {how}")
    return Fraction(number)


def _units(key: str) -> dict[str, float]:
    if key == "latency":
        return _MILLISECONDS
    if key in ("memory", "weights"):
        return _BYTES
    return _SUFFIX | {suffix.upper(): factor for suffix, factor in _SUFFIX.items()}


class Cost(Protocol):
    """All that ranking and filling need of a cost, or of several at once."""

    def exact(self, open_units: Tensor | None = None) -> dict[str, float]:
        """Return each cost of the network that keeps ``open_units`` (bool ``[units]``; all by default).

        It must not fall when a unit is added.
        """

    def marginal(self, z: Tensor) -> dict[str, Tensor]:
        """Return, per cost, about what each unit costs while the others stay at ``z`` (binary), float64 ``[units]``.

        0 for a unit that costs nothing more. What is meant by "about" is the cost's to say; nothing is ever taken for
        within a bound on its account.
        """

    def price(self, bounds: Mapping[str, float]) -> dict[str, Tensor]:
        """Return, per cost, what a unit of the dense network is charged when units are ranked for ``bounds``."""


class Measured(Cost, Protocol):
    """A cost that is predicted, in milliseconds, and can be measured: latency.

    Attributes:
        calibration: what was measured before training, as plain numbers; a run that goes on takes it along.
    """

    calibration: dict[str, float]

    def calibrate(self, smallest: Tensor, known: Mapping[str, float] | None = None) -> None:
        """Measure the dense network and that which keeps only ``smallest``, or take it as ``known``."""

    def measure(self, open_units: Tensor) -> Any:
        """Return ``ms`` and ``spread`` (a fraction of it), measured, of the network that keeps ``open_units``."""

    def agree(self, open_units: Tensor, ms: float) -> None:
        """Predict ``ms`` for ``open_units`` from now on, and other networks accordingly."""


@dataclass(frozen=True)
class Costs:
    """Several costs, looked at as one; each has names of its own."""

    parts: tuple[Cost, ...]

    @classmethod
    def of(cls, parts: Iterable[Cost]) -> Cost:
        """Return the cost of all parts together."""
        parts = tuple(parts)
        return parts[0] if len(parts) == 1 else cls(parts)

    def exact(self, open_units: Tensor | None = None) -> dict[str, float]:
        """Return each cost, see :class:`Cost`."""
        return {name: value for part in self.parts for name, value in part.exact(open_units).items()}

    def marginal(self, z: Tensor) -> dict[str, Tensor]:
        """Return what each unit costs, see :class:`Cost`."""
        return {name: value for part in self.parts for name, value in part.marginal(z).items()}

    def price(self, bounds: Mapping[str, float]) -> dict[str, Tensor]:
        """Return what each unit is charged, see :class:`Cost`."""
        return {name: value for part in self.parts for name, value in part.price(bounds).items()}


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

    def price(self, bounds: Mapping[str, float]) -> dict[str, Tensor]:
        """Return what each unit costs in the dense network, whatever the bounds."""
        return self.marginal(torch.ones(self.units))

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

    def __init__(self, units: int, names: Iterable[str] = COSTS) -> None:
        self.units = units
        self._ids: dict[bytes, int] = {}
        self._fixed: list[float] = []
        self._entries: list[tuple[Tensor, Tensor]] = []
        self._terms: dict[str, list[tuple[float, int, int]]] = {name: [] for name in names}

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
