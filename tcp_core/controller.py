"""The controller: which units lose, how hard they are pushed, and when the set is final.

After every backward pass it reads the gates' gradients and moves the gates; the surviving weights are never touched.

1. Importance: mean over steps of the squared gradient of the loss with respect to each gate, the first-order Taylor
   estimate of what closing it costs (Molchanov et al., 2019), normalised per step so that loss scaling does not matter.
   In a network that was trained already, mostly over the steps before the first gate may close; in a fresh one over
   all steps so far; in between, both count.
2. Losing set: units ranked by importance per marginal cost in the dense network fill the budget from the best down; the
   rest loses.
3. Strength: losing gates go down by ``strength`` a step, winning ones go up. The strength follows the log-ratio
   between the cost of the units still open and a schedule that leads from the dense cost to the budget.
4. Freeze: a look-ahead before the phase ends the set is final; once every losing gate has reached 0 by itself, frozen.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import complaints
from .channels import Channels
from .cost import Budget, BudgetError, Costs, Measured, is_number, is_whole
from .maturity import maturity, phase_of, worth
from .selection import fill, liked, required_units, settle, tighten

KEEP_STEPS = 100
"""So many steps of the dense network say what its units are worth; what fewer have found counts less."""

KEEP = 0.8
"""Share of the score that is at most the dense network's word. It does not know that the last units of a layer are
worth more than its first ones to go; what is measured while the network gets smaller does."""

LEAST_SEEN = 10
"""After so many steps a family without any gradient is no longer one that starts at zero, as many blocks do."""

USED_UP = 0.99
"""A smaller multiple is tried where one is to be chosen and less of the budget than this could be used."""

LEAST_WEIGHT = 0.01
"""A cost with room left weighs this much at least in the price of a unit, so that it can count again in a few rankings
when its budget becomes the tighter one."""

MIN_PHASE_STEPS = 12
"""A shorter pruning phase has no room for gates that close by themselves."""

GAIN = 4.0
"""How strongly the strength answers: a cost 5 % above its schedule raises it by a fifth."""

MAX_CHANGE = 1.2
"""Largest factor by which the strength changes from one re-ranking to the next."""


class Controller:
    """Adaptive sparsity regularisation of the gates of one network.

    Args:
        channels: the network's trace.
        budget: the bounds to meet.
        steps: optimiser steps of the whole run.
        phase: the shares of the run between which the network is made smaller; importance is measured from the first
            step, and the set is frozen at the end of the phase. "auto": see :func:`tcp_core.maturity.phase_of`.
        maturity: how far the network is trained at the start, from 0, fresh, to 1; :class:`Tailor` tells it from the
            weights. The more, the earlier is the phase and the longer is kept what the dense network says of its units.
        lookahead: the share of the phase by which a unit is told ahead of its time; as long as a gate takes to close.
        ramp: the share of the phase, less the look-ahead, in which the schedule goes from the dense cost to the budget.
        min_width: the fewest units that stay in each family, or a share of them as a float in (0, 1).
        multiple: make every family's width a multiple of this, or leave it whole; kernels like 8. The budget is then
            used but for what one such block costs. Of several, largest first, the first with blocks small enough to
            be exchanged is taken, and at the end a smaller one where it left more than one hundredth of the budget.
        latency: a cost that is predicted and can be measured, for a bound on latency. The set is final when the network
            that it leaves has been measured within the bound.

    Attributes:
        strength: how far losing gates move down at each step (lambda).
        gate: float ``[units]``, where the gates stand.
        losing: bool ``[units]``.
        frozen: whether the set is final.
        multiple: of every family's width.
        measured: what was measured of the final set: latency, spread, networks (how many were measured); None before.
        trajectory: one dict per re-ranking.
        zeros: whether weights that are trained are all zero at the start of a network whose maturity was told from its
            weights. If it turns out that branches begin with them, ``late`` is set and the network counts as fresh.
    """

    def __init__(
        self,
        channels: Channels,
        budget: Budget | Mapping,
        *,
        steps: int,
        phase: tuple[float, float] | str = "auto",
        maturity: float = 0.0,
        lookahead: float = 0.2,
        ramp: float = 0.4,
        min_width: int | float = 1,
        multiple: int | Sequence[int] = 1,
        latency: Measured | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        candidates = list(multiple) if isinstance(multiple, Sequence) else [multiple]
        if not candidates or not all(is_whole(each) and each >= 1 for each in candidates):
            raise ValueError(f"multiple={multiple!r}; it must be an int of at least 1, 1 for widths of any size.")
        candidates = [int(each) for each in candidates]  # NumPy's own would be in the state, which could not be loaded
        if is_whole(min_width) or isinstance(min_width, float):
            min_width = int(min_width) if is_whole(min_width) else float(min_width)
        self.channels, self.budget, self.min_width, self.latency = channels, Budget.of(budget), min_width, latency
        if self.budget.latency is not None and latency is None:
            raise BudgetError(
                "a latency budget needs a place where it is measured: give latency=tcp.Latency(...), for example "
                "tcp.Latency('onnxruntime', batch=1, threads=1)."
            )
        self.cost_model = Costs.of([*channels.costs(self.budget), *([] if latency is None else [latency])])
        self.multiples, self.multiple = tuple(candidates), candidates[0]
        self._resolve()
        if len(candidates) > 1:
            candidates = liked(channels, candidates, self.marginal, self.bounds, min_width, self.cost_model)
        for self.multiple in candidates:  # a smaller one where the smallest network of a larger is above a bound
            if latency is not None:
                latency.calibrate(required_units(channels, min_width, self.multiple))
            self._resolve()
            if all(bound >= self.floor[name] for name, bound in self.bounds.items()):
                break
        if not is_number(maturity) or not 0 <= maturity <= 1:
            raise ValueError(f"maturity={maturity!r}; it must be a number from 0 (a fresh network) to 1 (trained).")
        self.placed = isinstance(phase, str) and phase == "auto"
        if not is_whole(steps):
            raise ValueError(f"steps={steps!r}; it must be an int, the number of optimiser steps of the whole run.")
        steps = int(steps)
        if self.placed:
            phase = phase_of(maturity, steps)
        self._check(channels, phase, lookahead, ramp)
        self.steps, self.shares = steps, (float(lookahead), float(ramp))
        self._place(phase, maturity)
        self.strength = self.base_strength
        self.step_count = 0
        self.weights = dict.fromkeys(self.bounds, 1.0)
        self.importance = torch.zeros(channels.units, device=device)
        self.dense_importance = self.importance
        self.gate = torch.ones(channels.units, device=device)
        self.losing = torch.zeros(channels.units, dtype=torch.bool, device=device)
        self.final = self.frozen = False
        self.refused = torch.zeros((), dtype=torch.int64, device=device)
        self.returned = 0
        self.changed = 0
        self.trajectory: list[dict[str, float]] = []
        self.reported, self.unranked = 0, False
        self.zeros, self.late = False, False
        self.silent = torch.zeros(channels.units, dtype=torch.bool, device=device)
        self.measured: dict[str, float] | None = None

    def _resolve(self) -> None:
        """Derive bounds, prices and the floor, which follow from what the dense network costs."""
        self.dense = self.cost_model.exact()
        self.bounds = self.budget.resolve(self.dense)
        self.marginal = self.cost_model.price(self.bounds)
        # the smallest network there is; of latency, the one that was measured
        multiple = self.multiples[-1] if self.latency is None else self.multiple
        self.floor = self.cost_model.exact(required_units(self.channels, self.min_width, multiple))

    def look_at(self, model: nn.Module) -> None:
        """Begin with a network that is trained as far as its weights tell, as :func:`tcp_core.maturity.maturity` says.

        Raises:
            ValueError: if steps are too few for where the phase lies then.
        """
        self.begin_with(maturity(model, worth(self.channels, self.price())))

    def begin_with(self, maturity: float) -> None:
        """Begin with a network that is trained so far, where that is known only after construction.

        Raises:
            ValueError: if steps are too few for where the phase lies then.
        """
        self._place(phase_of(maturity, self.steps) if self.placed else self.phase, maturity)
        self.strength = self.base_strength

    def _place(self, phase: tuple[float, float], maturity: float) -> None:
        """Set all that follows from where the phase lies and how far the network was trained at the start."""
        needed = math.ceil(MIN_PHASE_STEPS / (phase[1] - phase[0]))
        if self.steps < needed:
            raise ValueError(
                f"steps={self.steps} is too short: the pruning phase is {phase[1] - phase[0]:.0%} of the run and needs "
                f"{MIN_PHASE_STEPS} steps. Give the number of optimiser steps of the whole run (epochs x batches), at "
                f"least {needed}, or widen phase."
            )
        self.phase, self.maturity = (float(phase[0]), float(phase[1])), float(maturity)
        self.start, self.end = (round(share * self.steps) for share in phase)
        length, (lookahead, ramp) = self.end - self.start, self.shares
        self.lookahead = min(max(1, round(lookahead * length)), length - 1)
        self.ramp = ramp * (length - self.lookahead)
        self.interval = max(1, length // 100)
        self.base_strength = 1.001 / self.lookahead  # closes a gate within the look-ahead, rounding included
        self.trust = KEEP * self.maturity * min(1.0, self.start / KEEP_STEPS)

    def _check(self, channels: Channels, phase, lookahead: float, ramp: float) -> None:
        if not channels.prunable.any():
            raise ValueError(complaints.nothing_prunable(channels))
        pair = isinstance(phase, (tuple, list)) and len(phase) == 2
        numbers = pair and all(map(is_number, (*phase, lookahead, ramp)))
        if not numbers or not 0 <= phase[0] < phase[1] <= 1 or not 0 < lookahead < 1 or not 0 < ramp <= 1:
            raise ValueError(
                f'phase must be "auto" or two rising shares of the run in [0, 1], lookahead in (0, 1) and ramp in '
                f"(0, 1]; got {phase!r}, {lookahead!r}, {ramp!r}."
            )
        for name, bound in self.bounds.items():
            if bound < self.floor[name]:
                raise BudgetError(complaints.below_floor(self, name))

    def update(self, gradient: Tensor) -> None:
        """Take one step, after a backward pass: ``gradient`` is the loss's gradient with respect to the gates,
        ``[units]``.

        A gradient that is not finite is refused: it moves nothing, is counted in ``refused`` and warned about. If a
        measurement of latency fails, all is as before, and the step can be taken again.
        """
        if self.frozen:
            return
        with self._all_or_nothing():
            self._update(gradient)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before, rows = {name: getattr(self, name) for name in _STATE}, len(self.trajectory)
        try:
            yield
        except BaseException:
            vars(self).update(before)
            del self.trajectory[rows:]
            raise

    def _update(self, gradient: Tensor) -> None:
        self.to(gradient.device)  # where the model was moved to
        finite = gradient.isfinite().all()
        square = normalised_square(gradient)
        self.refused = self.refused + ~finite
        before = self.importance
        seen = (self.step_count + 1 - self.refused).clamp(min=1)
        self.importance = torch.where(finite, self.importance + (square - self.importance) / seen, self.importance)
        if self.step_count <= self.start:  # no gate has moved yet
            self.dense_importance = self.importance
            if self.zeros and self.maturity > 0:
                self._watch(before)
        last = self.step_count == self.end - self.lookahead  # which may lie between two rankings
        if self.step_count >= self.start and (last or (self.step_count - self.start) % self.interval == 0):
            self._rank()
        if self.step_count >= self.start:
            strength = self._in_time() if self.final else self.strength
            move = torch.where(self.losing, -strength, strength)
            self.gate = torch.where(finite, (self.gate + move).clamp(0, 1), self.gate)
        self.step_count += 1
        if self.final and bool((self.gate == (~self.losing).float()).all()):
            self.frozen = True
            self._record()

    def _watch(self, before: Tensor) -> None:
        """See to branches that begin at zero in a trained network (LoRA, adapters, zero convolutions).

        The first gradient there is does not reach what lies behind their zeros, and a later one does. So what the first
        steps say of their units is nothing: the network counts as fresh. ``before``: importance before this step.
        """
        self.silent = torch.where(before.any(), self.silent, self.importance == 0)
        if self.step_count == self.start:  # the last step at which no gate has moved
            silent, alive = self.silent.cpu(), (self.importance > 0).cpu()
            families = [family.units for family in self.channels.families]
            self.late = any(bool(silent[units].all() and alive[units].any()) for units in families)
            self.zeros = False
            if self.late:
                self.begin_with(0.0)

    def to(self, device: torch.device) -> None:
        """Move what is known of the units to a device."""
        for name in ("importance", "dense_importance", "gate", "losing", "refused", "silent"):
            setattr(self, name, getattr(self, name).to(device))

    def schedule(self, step: int) -> dict[str, float]:
        """Return each budgeted cost's target at ``step``: dense until the first gates may be closed, then geometric.

        It is at the budget before the phase ends, so that units are still exchanged in a network of the final cost.
        """
        share = min(max((step - self.start - self.lookahead) / self.ramp, 0.0), 1.0)
        ends = {name: min(bound, self.dense[name]) for name, bound in self.bounds.items()}
        if share == 1:  # the integers themselves, which a power would miss by rounding
            return ends
        return {name: self.dense[name] * (end / self.dense[name]) ** share for name, end in ends.items()}

    def _rank(self) -> None:
        """Choose the losing set for the schedule a look-ahead from now; adapt the strength to the schedule of now."""
        self._warn_refused()
        still_open = (self.gate > 0).cpu()
        hard = self.cost_model.exact(still_open)
        if not self.final:
            ahead = self.step_count + self.lookahead
            targets = self.schedule(ahead)
            score = self.score()
            winning = self.choose(score, targets, last=ahead >= self.end)
            self._weigh(self.cost_model.exact(winning), targets)
            losing = (~winning).to(self.losing.device)
            self.returned += int((self.losing & ~losing & (self.gate == 0)).sum())
            self.changed = int((self.losing != losing).sum())
            self.losing = losing
            self._warn_unranked()
            if ahead >= self.end:
                # From here on every losing gate has just the time it needs to close by itself.
                self.final = True
        self._adapt(hard)
        self._record(hard)

    def choose(self, score: Tensor, targets: Mapping[str, float] | None = None, last: bool = True) -> Tensor:
        """Return the units that win within ``targets`` (the bounds by default) by ``score``, bool ``[units]``.

        The ``last`` set uses the budget as far as exchanges help, and its latency is measured. If it leaves more than
        one hundredth, for blocks are coarse, smaller multiples are tried where there is a choice, and the one that uses
        the budget best becomes ``multiple``.
        """
        targets = self.bounds if targets is None else targets
        if last and self.latency is not None:
            return self._settle(score, targets)

        def used(winning: Tensor) -> float:
            found = self.cost_model.exact(winning)
            return max(found[name] / target for name, target in targets.items())

        best = self._filled(score, targets, self.multiple, last)
        for multiple in self.multiples if last else ():
            if multiple < self.multiple and used(best) < USED_UP:
                other = self._filled(score, targets, multiple, last)
                if used(other) > used(best):
                    best, self.multiple = other, multiple
        return best

    def _filled(self, score: Tensor, targets: Mapping[str, float], multiple: int, last: bool) -> Tensor:
        """Return the units that win in blocks of ``multiple``, by prediction where a cost is measured."""
        limits = self.min_width, multiple, self.cost_model
        winning = fill(self.channels, score, targets, *limits)
        return tighten(self.channels, winning, score, targets, *limits) if last else winning

    def _settle(self, score: Tensor, targets: Mapping[str, float]) -> Tensor:
        """Return the units that win, with their latency measured, and bring its model into line with that."""

        def measure(winning: Tensor) -> float:
            timings[winning.numpy().tobytes()] = timing = self.latency.measure(winning)
            return timing.ms

        timings: dict[bytes, Any] = {}
        winning, ms, networks = settle(
            lambda aim: self._filled(score, {**targets, "latency": aim}, self.multiple, last=True),
            measure,
            targets["latency"],
            self.floor["latency"],
        )
        self.latency.agree(winning, ms)
        spread = timings[winning.numpy().tobytes()].spread
        self.measured = {"latency": ms, "spread": spread, "networks": networks}
        if ms > targets["latency"]:
            warnings.warn(complaints.above_latency(targets["latency"], ms, spread), RuntimeWarning, stacklevel=6)
        return winning

    def _adapt(self, hard: Mapping[str, int]) -> None:
        """Set the strength by how far the cost is from its schedule, as a log-ratio, with a bounded change.

        Proportional, not accumulated: a gate answers only when it arrives at 0, and an accumulated error would swing.
        Once the set is final the strength does not fall below what closes every gate in time.
        """
        error = max(math.log(hard[name] / target) for name, target in self.schedule(self.step_count).items())
        wanted = self.base_strength * math.exp(GAIN * error)
        low, high = self.base_strength * (1.0 if self.final else 0.5), self.base_strength * 4
        slowest, fastest = self.strength / MAX_CHANGE, self.strength * MAX_CHANGE
        self.strength = min(max(min(max(wanted, slowest), fastest), low), high)

    def _in_time(self) -> float | Tensor:
        """Return the strength, or what it takes to close the last gate within the run: where the phase ends with the
        run, steps that were refused are not there in the end.
        """
        left = max(self.steps - self.step_count, 1)
        if left > 2 * self.lookahead:
            return self.strength
        furthest = torch.where(self.losing, self.gate, 1 - self.gate).max()
        return (furthest * 1.001 / left).clamp(min=self.strength)

    def score(self) -> Tensor:
        """Return importance per marginal cost, float64 ``[units]``; costs add up as weighted shares of budgets.

        The price is that of the dense network throughout. At the cost of the moment it would fall as a unit's layers
        narrow, and what is narrow would be narrowed on and on.
        """
        importance = self.importance
        if self.step_count > self.start:
            importance = importance + self.trust * (self.dense_importance - importance)
        return importance.cpu().double() / self.price().clamp(min=1e-12)

    def price(self) -> Tensor:
        """Return what each unit costs in the dense network, as a weighted share of budgets, float64 ``[units]``."""
        return sum(self.weights[name] * self.marginal[name] / bound for name, bound in self.bounds.items())

    def _weigh(self, cost: Mapping[str, int], targets: Mapping[str, float]) -> None:
        """Make a cost with room left cheaper, so that several budgets are used up together where that is possible."""
        used = {name: cost[name] / target for name, target in targets.items()}
        weights = {name: self.weights[name] * share / max(used.values()) for name, share in used.items()}
        top = max(weights.values())
        self.weights = {name: max(weight / top, LEAST_WEIGHT) for name, weight in weights.items()}

    def _record(self, hard: dict[str, int] | None = None) -> None:
        hard = self.cost_model.exact((self.gate > 0).cpu()) if hard is None else hard
        targets = self.schedule(self.step_count)
        self.trajectory.append(
            {
                "step": self.step_count,
                **hard,
                **{f"{name}_schedule": targets.get(name, math.nan) for name in hard},
                "strength": self.strength,
                "losing": int(self.losing.sum()),
                "closed": int((self.gate == 0).sum()),
                "returned": self.returned,
                "changed": self.changed,
            }
        )
        self.changed = 0

    def _warn_unranked(self) -> None:
        """Say once which families lose units although the loss had no gradient with respect to any of theirs."""
        if self.unranked or self.step_count < LEAST_SEEN or not self.losing.any():
            return
        importance, losing = self.importance.cpu(), self.losing.cpu()
        silent = [family for family in self.channels.families if not importance[family.units].any()]
        losers = [family for family in silent if losing[family.units].any()]
        if losers and len(silent) < len(self.channels.families):
            self.unranked = True
            warnings.warn(complaints.without_gradient(silent), RuntimeWarning, stacklevel=6)

    def _warn_refused(self) -> None:
        if (refused := int(self.refused)) > self.reported:
            closed = int((self.gate == 0).sum())
            warnings.warn(complaints.not_finite(refused - self.reported, closed), RuntimeWarning, stacklevel=5)
            self.reported = refused

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that changes during a run, as tensors and plain values."""
        calibration = {} if self.latency is None else {"calibration": self.latency.calibration}
        return copy.deepcopy({name: getattr(self, name) for name in _STATE} | calibration)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._place(state["phase"], state["maturity"])  # as it was decided then: weights have changed since
        known = (name for name in _STATE if name in state or name not in _SAID_LATER)
        for name, value in copy.deepcopy({name: state[name] for name in known}).items():
            setattr(self, name, value)
        if self.latency is not None:  # the bounds are those of the dense network as it was measured then
            self.latency.calibrate(required_units(self.channels, self.min_width, self.multiple), state["calibration"])
        self._resolve()
        if self.measured is not None:
            self.latency.agree((~self.losing).cpu(), self.measured["latency"])


def normalised_square(gradient: Tensor) -> Tensor:
    """Return the squares of ``gradient`` with sum 1, float32: each step counts the same, whatever the loss's scale."""
    tiny = torch.finfo(torch.float32).tiny
    square = (gradient / gradient.abs().max().clamp(min=tiny)).float().square()  # scaled first: squares overflow
    return square / square.sum().clamp(min=tiny)


_STATE = (
    *("step_count", "weights", "importance", "gate", "losing", "strength", "final", "frozen", "refused", "reported"),
    *("returned", "changed", "trajectory", "multiple", "measured"),
    *("dense_importance", "phase", "maturity", "placed", "zeros", "late", "silent"),
)

_SAID_LATER = ("zeros", "late", "silent")
"""Of these, what earlier versions did not have in their states."""
