"""What a trace knows about a network's channels: one immutable value.

A **unit** is a set of channels that can only be removed together. Units are numbered from 0; everywhere a tensor of
unit indices describes a dimension, -1 stands for a channel that always stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cost import Budget, Cost, CostModel, check_bytes_at
from .explanation import Cause, Explanation, Row, advice, in_words, without_parameters
from .memory import Activations, weights_at


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer: its module's name, its weight's name, the unit of each output channel."""

    name: str
    weight: str
    out_units: Tensor

    def width(self, open_units: Tensor) -> int:
        """Return how many output channels are left when only ``open_units`` (bool ``[units]``) stay."""
        return int(stays(self.out_units, open_units).sum())


@dataclass(frozen=True)
class Family:
    """Units with the same member layers: closing any one of them saves the same, and a layer's width counts them.

    ``channels`` are the numbers of channels that a unit is in the weights of these layers: several where they leave in
    groups.
    """

    units: Tensor
    layers: tuple[str, ...]
    channels: tuple[int, ...] = (1,)

    def block(self, multiple: int) -> int:
        """Return how many units together make every width a multiple of so many channels."""
        return math.lcm(*(multiple // math.gcd(multiple, channels) for channels in self.channels))


@dataclass(frozen=True)
class GateSite:
    """One place where gates act: the weight (and bias) that is multiplied by the gates of ``units`` along ``dim``.

    ``weight`` and ``bias`` are qualified names. ``constant`` is set for a norm without affine parameters,
    whose weight is None: the gate takes the weight's place.
    """

    weight: str
    bias: str | None
    units: Tensor
    dim: int = 0
    constant: bool = False


@dataclass(frozen=True)
class Padding:
    """A zero-padding module that adds channels: the units it adds before and after along one dimension.

    ``position`` is where the two numbers stand in the module's ``padding`` attribute.
    """

    module: str
    position: int
    before: Tensor
    after: Tensor


class Weightless(NamedTuple):
    """A layer that ran with a weight that is no parameter: what it is, its outputs, how many layers ran before."""

    name: str
    what: str
    outputs: int
    position: int


@dataclass(frozen=True)
class Channels:
    """Which channels of a network live and die together; made by :func:`tcp_core.trace`.

    Attributes:
        units: number of units. Channels of the model's inputs and outputs are fixed and belong to no unit.
        families: the units grouped by member layers.
        frozen: bool ``[units]``, units that may never be removed.
        prunable: bool ``[units]``, units that may be removed: not frozen, not ignored, not all that a layer has.
        unknown: ``(operator, module)`` pairs that froze units because the operator's effect on channels is not known.
        causes: why units stay: kind, what, where and the units; :meth:`explain` puts it in words.
        slots: per parameter and buffer with units, one entry a dimension: unit indices (int64 ``[size]``) or None.
        layers: convolutions and linear layers in the order in which they ran.
        sites: where gates act.
        paddings: zero-padding modules that add channels.
        shapes: shape of every parameter and buffer, to recognise the model later.
        groups: the groups of layers and norms that have several, for the same end.
        cost_model: the bilinear cost of gates.
        state: bytes of parameters and buffers, by item size.
        activations: which activations are alive when.
        example: one sample of the inputs the model was traced on, for verification.
        also: the same of further calls that were traced.
        unreached: parameters that no traced call reached.
        unused: the patterns of modules said to be used by no call.
        ignored: the patterns of modules whose output channels must all stay.
        weightless: layers that ran with weights that are no parameters, which can be neither gated nor cut.
    """

    units: int
    families: tuple[Family, ...]
    frozen: Tensor
    prunable: Tensor
    unknown: tuple[tuple[str, str], ...]
    causes: tuple[Cause, ...]
    slots: Mapping[str, tuple[Tensor | None, ...]]
    layers: tuple[Layer, ...]
    sites: tuple[GateSite, ...]
    paddings: tuple[Padding, ...]
    shapes: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, int]
    cost_model: CostModel
    state: CostModel
    activations: Activations
    example: tuple[tuple[Any, ...], dict[str, Any]]
    also: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = ()
    ignored: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    weightless: tuple[Weightless, ...] = ()

    def cost(self, open_units: Tensor | None = None) -> dict[str, int]:
        """Return ``{"macs": int, "params": int}`` of the network that keeps only ``open_units`` (default: all)."""
        return self.cost_model.exact(None if open_units is None else self.check(open_units))

    def bytes(
        self, open_units: Tensor | None = None, *, precision: str | None = None, batch: int = 1
    ) -> dict[str, int]:
        """Return ``{"memory": int, "weights": int}`` in bytes of the network that keeps ``open_units`` (default: all).

        Most that activations take at one time, for ``batch`` samples in eval mode, and parameters and buffers; see
        :class:`~tcp_core.Budget` for ``precision``. Raises BudgetError for another precision, or a batch below 1.
        """
        check_bytes_at(precision, batch)
        open_units = None if open_units is None else self.check(open_units)
        costs = self.activations.at(precision, batch), weights_at(self.state, precision)
        return {name: value for cost in costs for name, value in cost.exact(open_units).items()}

    def costs(self, budget: Budget) -> list[Cost]:
        """Return what a budget needs to know, but for latency, which is measured: macs and params, and bytes if it has
        a bound on them.
        """
        found: list[Cost] = [self.cost_model]
        found += [self.activations.at(budget.precision, budget.batch)] if budget.memory is not None else []
        found += [weights_at(self.state, budget.precision)] if budget.weights is not None else []
        return found

    def check(self, open_units: Tensor) -> Tensor:
        """Return ``open_units`` as bool ``[units]`` on the CPU; ValueError if no such network can be made."""
        open_units = torch.as_tensor(open_units).detach().cpu()
        if open_units.dtype != torch.bool or open_units.shape != (self.units,):
            raise ValueError(
                f"open_units must be a bool tensor of shape ({self.units},), one entry a unit; got {open_units.dtype} "
                f"of shape {tuple(open_units.shape)}."
            )
        if bad := (~open_units & self.frozen).nonzero().flatten().tolist():
            raise ValueError(
                f"units {bad[:10]} are frozen and cannot be removed; close only units with channels.prunable set."
            )
        if (self.cost_model.counts(open_units) == 0).any():
            empty = [layer.name for layer in self.layers if not layer.width(open_units)]
            raise ValueError(f"no channel would be left in {empty or 'a layer'}; keep one unit of each family open.")
        return open_units

    def kept(self, name: str, open_units: Tensor) -> tuple[Tensor | None, ...]:
        """Return, per dimension of parameter or buffer ``name``, the indices (int64) that stay; None keeps all."""
        kept = []
        for units in self.slots.get(name, ()):
            left = None if units is None else stays(units, open_units)
            kept.append(None if left is None or left.all() else left.nonzero().flatten())
        return tuple(kept)

    def widths(self, open_units: Tensor | None = None) -> dict[str, int]:
        """Return the number of output channels of each convolution and linear layer, by module name."""
        if open_units is None:
            open_units = torch.ones(self.units, dtype=torch.bool)
        return {layer.name: layer.width(open_units) for layer in self.layers}

    def explain(self) -> Explanation:
        """Return what can be pruned, what cannot and why, layer by layer, the floor of each cost, and what would lower
        it; prints as text, and as a table in a notebook.
        """
        dense, floor = self.cost(), self.floor()
        held = {cause: self.held(cause.units, floor) for cause in self.causes}
        held = {cause: share for cause, share in held.items() if any(share.values())}
        ordered = sorted(held, key=lambda cause: -held[cause]["macs"])
        weightless = without_parameters((layer.what, layer.name) for layer in self.weightless)
        bundled = [cause for cause in self.causes if cause.kind == "together"]  # by themselves they are a smallest set
        return Explanation(
            rows=self._rows(),
            dense=dense,
            floor=floor,
            held={in_words([cause]): held[cause] for cause in ordered},
            advice=advice([*ordered, *bundled]) + weightless,
            units=self.units,
            prunable=int(self.prunable.sum()),
        )

    def _rows(self) -> tuple[Row, ...]:
        """Return the rows of :meth:`explain`."""
        writers: dict[int, list[str]] = {}
        for layer in self.layers:
            for unit in layer.out_units.unique().tolist():
                writers.setdefault(unit, []).append(layer.name)
        rows = []
        for layer in self.layers:
            units = layer.out_units
            inside = units[units >= 0]
            stay = inside[~self.prunable[inside]]
            why = [Cause("output", "", "", inside)] if len(inside) < len(units) else []
            why += [cause for cause in self.causes if torch.isin(cause.units, stay).any()]
            tied = dict.fromkeys(name for unit in inside.unique().tolist() for name in writers[unit])
            others = tuple(name for name in tied if name != layer.name)
            rows.append(Row(layer.name, len(units), len(inside) - len(stay), others, in_words(why)))
        for layer in reversed(self.weightless):
            rows.insert(layer.position, Row(layer.name, layer.outputs, 0, (), layer.what))
        return tuple(rows)

    def floor(self, free: Tensor | None = None) -> dict[str, int]:
        """Return the cost of a smallest network: one unit in each family beside those that cannot go, of which
        ``free`` (int64) are excepted.
        """
        required = ~self.prunable
        if free is not None:
            required[free] = False
        for family in self.families:
            if not required[family.units].any():
                required[family.units[0]] = True
        return self.cost_model.exact(required)

    def held(self, units: Tensor, floor: Mapping[str, int] | None = None) -> dict[str, float]:
        """Return the share of each dense cost by which the floor would be lower if ``units`` (int64) could go."""
        dense, floor = self.cost(), self.floor() if floor is None else floor
        return {name: (floor[name] - value) / max(dense[name], 1) for name, value in self.floor(units).items()}

    def __repr__(self) -> str:
        cost = self.cost()
        return (
            f"Channels({self.units:,} units in {len(self.families)} families, {int(self.prunable.sum()):,} prunable; "
            f"{cost['macs']:,} macs, {cost['params']:,} params; unknown operators: {len(self.unknown)}"
            + (f"; parameters never reached: {len(self.unreached)})" if self.unreached else ")")
        )


def stays(units: Tensor, open_units: Tensor) -> Tensor:
    """Return which of a dimension's channels stay, bool ``[len(units)]``."""
    if not len(open_units):
        return torch.ones_like(units, dtype=torch.bool)
    return (units < 0) | open_units[units.clamp(min=0)]
