"""Other ways to a network within a budget, on the same trace, cost, removal and training loop.

In :func:`tcp_core.fit`: ``fit(model, train, val, prune=pruner("taylor", {"macs": 0.5}, train=train), epochs=15)``. In a
loop of your own a comparator takes the place of the model, as :class:`tcp_core.Tailor` does:

    >>> channels = tcp_core.trace(model, images[:2])  # doctest: +SKIP
    >>> network = pruner("taylor", {"macs": 0.5}, train=loader)(model, channels, steps)  # doctest: +SKIP
    >>> optimizer = torch.optim.SGD(network.model.parameters(), lr=0.1)  # doctest: +SKIP
    >>> for x, y in loader:  # doctest: +SKIP
    ...     loss = loss_fn(network(x), y)
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     network.step(optimizer)
    >>> small = network.finish()  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import Channels
from ..controller import MIN_PHASE_STEPS, Controller, normalised_square
from ..cost import Budget, Measured
from ..datasets.images import Images
from ..gates import Gated, gated_parameters
from ..preparing import width_options
from ..removal import check_same_model, remove
from ..report import Report
from ..selection import least
from ..training.batches import by_epoch
from .criteria import (
    as_wide_as,
    global_l1,
    random,
    shrink_scales,
    slimming,
    start_anew,
    taylor,
    torch_pruning,
    uniform_l1,
)

METHODS = (
    *("uniform_l1", "global_l1", "slimming", "taylor", "random"),
    *("fixed_strength", "small", "torch_pruning"),
)

REACH = 16.0
"""How far a gradient of root mean square size moves a gate of "fixed_strength" in all steps before it prunes."""

Score = Callable[[nn.Module, Controller], Tensor]


def pruner(
    method: str,
    budget: Budget | Mapping,
    *,
    train: Images | Iterable = (),
    at: float = 0.0,
    batches: int = 100,
    batch_size: int = 128,
    augment: str = "crop_flip",
    precision: str = "fp32",
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    strength: float | None = None,
    min_width: int | float = 1,
    multiple: int | str = 1,
    latency: Any = None,
    widths: Mapping[str, int] | None = None,
) -> Callable[[nn.Module, Channels, int], OneShot]:
    """Return what ``fit(prune=...)`` takes: a function of (model, channels, steps) that gives the network to train.

    Args:
        method: one of ``METHODS``, described at the function or class of that name; "small" has fresh weights and
            the widths of "uniform_l1", or those given.
        budget: the bounds to meet, as in :class:`tcp_core.Tailor`.
        train: images or batches on which "taylor" measures; no other method needs them.
        at: the share of the run after which the network is made smaller; 0: before the first step.
        batches: how many batches "taylor" averages over.
        batch_size, augment, precision: of these batches, as in :func:`tcp_core.fit`.
        loss: of which "taylor" takes gradients, the same as in :func:`tcp_core.fit`; cross-entropy if None.
        seed: of "random", of "small" and of the order of these batches.
        strength: of the sparsity training of "slimming" (1e-4 by default) and "fixed_strength" (0.1).
        min_width: the fewest units that stay in each family; "torch_pruning" keeps one.
        multiple, latency: of the widths, and where latency is measured, as in :class:`tcp_core.Tailor`, but that
            widths are any by default; not for "fixed_strength" and "torch_pruning".
        widths: of "small": output channels of each layer by name, such as another run ended with.

    Raises:
        ValueError: for an unknown method, or a share at which it cannot prune.
        ImportError: for "torch_pruning", if that library is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; it must be one of {', '.join(METHODS)}.")
    if not 0 <= at < 1:
        raise ValueError(f"at={at!r}; it must be a share of the run in [0, 1), 0 to prune before the first step.")
    if method == "fixed_strength" and at == 0:
        raise ValueError("fixed_strength needs steps in which gates can close; give at > 0, for example at=0.3.")
    if method == "small" and at > 0:
        raise ValueError(f"small starts with fresh weights, nothing is to be trained before; give at=0, not {at}.")
    if widths is not None and method != "small":
        raise ValueError(f"widths are given to {method}, which finds its own; only small takes them.")
    if loss is not None and method != "taylor":
        raise ValueError(f"loss= is given to {method}, which measures none; only taylor takes it.")
    if method in ("fixed_strength", "torch_pruning") and not (latency is None and multiple == 1):
        raise ValueError(f"{method} knows neither multiples nor latency; leave multiple and latency out.")
    if method == "torch_pruning" and importlib.util.find_spec("torch_pruning") is None:
        raise ImportError("torch_pruning is a library that is not installed here: pip install torch-pruning")

    def measured_on(device: torch.device) -> Iterable:
        epochs = map(by_epoch(train, batch_size, augment, seed, device), range(batches))
        return itertools.islice(itertools.chain.from_iterable(epochs), batches)

    scores = {
        "uniform_l1": uniform_l1,
        "global_l1": global_l1,
        "slimming": slimming,
        "taylor": partial(taylor, batches=measured_on, precision=precision, loss=loss),
        "random": partial(random, seed=seed),
        "small": uniform_l1 if widths is None else partial(as_wide_as, widths=widths),
        "torch_pruning": torch_pruning,
    }

    def prune(model: nn.Module, channels: Channels, steps: int) -> OneShot:
        options = {"steps": steps, "at": at, "min_width": min_width}
        if method == "fixed_strength":
            return FixedStrength(model, channels, budget, strength=0.1 if strength is None else strength, **options)
        options |= width_options(model, channels, Budget.of(budget), multiple, latency)
        if method == "slimming":
            options["shrink"] = partial(shrink_scales, strength=1e-4 if strength is None else strength)
        return OneShot(model, channels, budget, scores[method], fresh=seed if method == "small" else None, **options)

    if method == "taylor":
        prune.loss = loss  # fit compares it with its own
    return prune


class OneShot(nn.Module):
    """A network that is trained dense until it loses, at one step, all units that do not fit; call it as the model.

    Options are those of :func:`pruner`, and ``score``, a function of (model, limits) that gives the units' scores,
    float64 ``[units]``, the higher stays, or the units that stay, bool ``[units]``; ``shrink``, called as
    ``shrink(model, channels, optimizer)`` after each step until then; ``fresh``, the seed of new weights for the
    smaller network. ``limits`` is a :class:`Controller`, which knows channels, bounds and prices.

    Attributes:
        model: the network as it is now, whose parameters the optimiser holds.
        largest_gate_removed: 1 if anything was cut, as it was fully open; None before, and with fresh weights.
        cost_before_fill: what sparsity training had left open by itself; None where there is none.
        trajectory, strength: as in :class:`tcp_core.Tailor`; empty and 0 here.

    Raises:
        BudgetError: if the budget is malformed or below the lowest feasible cost.
    """

    strength = 0.0

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget | Mapping,
        score: Score,
        *,
        steps: int,
        at: float,
        min_width: int | float = 1,
        multiple: int | Sequence[int] = 1,
        latency: Measured | None = None,
        shrink: Callable[[nn.Module, Channels, torch.optim.Optimizer], None] | None = None,
        fresh: int | None = None,
    ) -> None:
        check_same_model(model, channels)
        super().__init__()
        self.model, self.channels, self.budget, self.score = model, channels, Budget.of(budget), score
        # A controller that never takes a step: it resolves and checks the budget as it does for Tailor.
        options = {"min_width": min_width, "multiple": multiple, "latency": latency}
        self.limits = Controller(channels, budget, steps=100 * MIN_PHASE_STEPS, **options)
        self.steps, self.prune_step, self.step_count = steps, round(at * steps), 0
        self.shrink, self.fresh = shrink, fresh
        self.kept: Tensor | None = None
        self.largest_gate_removed: float | None = None
        self.cost_before_fill: dict[str, int] | None = None
        self.trajectory: list[dict[str, float]] = []
        if self.prune_step == 0:
            self._prune(None)

    @property
    def frozen(self) -> bool:
        """Whether the network has been made smaller."""
        return self.kept is not None

    @property
    def open_units(self) -> Tensor:
        """The units that are left, bool ``[units]`` on the CPU."""
        return torch.ones(self.channels.units, dtype=torch.bool) if self.kept is None else self.kept

    def forward(self, *args, **kwargs):
        """Run the network as it is now."""
        return self.model(*args, **kwargs)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make the network smaller when it is time, the optimiser's state carried along; call it after each
        ``optimizer.step()``. RuntimeError without ``optimizer`` before that.
        """
        self.step_count += 1
        if self.frozen:
            return
        if optimizer is None:
            raise RuntimeError("step() needs the optimizer until the network is made smaller: call step(optimizer).")
        self._sparsify(optimizer)
        if self.step_count >= self.prune_step:
            self._prune(optimizer)

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Return the smaller network, a plain module; RuntimeError before there is one."""
        if not self.frozen:
            raise RuntimeError(
                f"finish() after {self.step_count} of {self.steps} steps, but the network is made smaller after step "
                f"{self.prune_step}: train on, or construct it with the number of steps you really take."
            )
        return self.model

    def progress(self) -> dict:
        """Return all that changes during a run but the model's tensors, as :meth:`tcp_core.Tailor.progress` does."""
        names = ("step_count", "kept", "largest_gate_removed", "cost_before_fill", "trajectory")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def resume(self, progress: Mapping) -> None:
        """Go on where :meth:`progress` was taken, as :meth:`tcp_core.Tailor.resume` does."""
        if progress["kept"] is not None and not self.frozen:
            self.model = remove(self.model, self.channels, progress["kept"], verify=False)
        for name, value in copy.deepcopy(dict(progress)).items():
            setattr(self, name, value)

    def report(self) -> Report:
        """Return what :meth:`tcp_core.Tailor.report` returns, and ``cost_before_fill``."""
        current = self.limits.cost_model.exact(self.open_units)
        return Report(
            requested=self.budget.as_dict(),
            bounds=dict(self.limits.bounds),
            dense=dict(self.limits.dense),
            current=current,
            floor=dict(self.limits.floor),
            utilisation={name: current[name] / bound for name, bound in self.limits.bounds.items()},
            strength=self.strength,
            step=self.step_count,
            steps=self.steps,
            frozen=self.frozen,
            refused_steps=0,
            largest_gate_removed=self.largest_gate_removed,
            widths=self.channels.widths(self.open_units),
            dense_widths=self.channels.widths(),
            unknown=self.channels.unknown,
            cost_before_fill=self.cost_before_fill,
        )

    def _sparsify(self, optimizer: torch.optim.Optimizer) -> None:
        if self.shrink is not None:
            self.shrink(self.model, self.channels, optimizer)

    def _choose(self) -> Tensor:
        score = self.score(self.model, self.limits).cpu()
        if score.dtype == torch.bool:
            return score
        if score.isnan().any():
            raise FloatingPointError(
                "a unit's score is not a number: weights or gradients of the model are not finite."
            )
        return self.limits.choose(score)

    def _prune(self, optimizer: torch.optim.Optimizer | None) -> None:
        kept = self._choose()
        self.model = remove(self.model, self.channels, kept, optimizer)
        self.kept = kept
        if self.fresh is None:
            self.largest_gate_removed = float((~kept).any())
        else:
            start_anew(self.model, self.fresh)


class FixedStrength(OneShot):
    """What adaptation buys: gates under an L1 penalty of constant strength that knows no cost, cut to the budget.

    After each optimiser step every gate takes a proximal gradient step, ``gate - rate * (gradient / scale + penalty)``
    kept within [0, 1]. ``scale`` is the running root mean square of all gates' gradients, the penalty (``strength`` of
    :func:`pruner`) is in units of it, and ``rate`` is ``REACH`` over the steps before pruning. The best ``min_width``
    units of each family are not pushed. When it is time, ``cost_before_fill`` says what the open units cost, and the
    budget is filled by gate, then by importance. Gates that stay are multiplied into the weights (but for batch norms
    without affine parameters), and units that had closed open again if there is room. Options as in :class:`OneShot`.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget | Mapping,
        *,
        steps: int,
        at: float,
        strength: float,
        min_width: int | float = 1,
    ) -> None:
        if round(at * steps) < 1:
            raise ValueError(f"fixed_strength has no step before it prunes; got at={at} of {steps} steps, raise at.")
        super().__init__(model, channels, budget, self._by_gate, steps=steps, at=at, min_width=min_width)
        self.gated, self.penalty, self.returned = Gated(model, channels), strength, 0
        gate = self.gated.gate.detach()
        start = {"gate": gate.clone(), "importance": gate * 0, "mean_square": gate.new_zeros(()), "pushed": gate > 0}
        for name, value in start.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def strength(self) -> float:
        """How far a gate that nothing holds moves down at each step."""
        return 0.0 if self.frozen else self.penalty * REACH / self.prune_step

    @property
    def open_units(self) -> Tensor:
        """The units whose gates are not closed, bool ``[units]`` on the CPU."""
        return (self.gate > 0).cpu() if self.kept is None else self.kept

    def forward(self, *args, **kwargs):
        """Run the gated network, later the smaller one."""
        return (self.model if self.frozen else self.gated)(*args, **kwargs)

    def progress(self) -> dict:
        """Return all that changes during a run but the model's tensors."""
        names = ("gate", "importance", "mean_square", "pushed", "returned")
        return super().progress() | {name: copy.deepcopy(getattr(self, name)) for name in names}

    def resume(self, progress: Mapping) -> None:
        """Go on where :meth:`progress` was taken."""
        super().resume(progress)
        if self.frozen:
            self.gated = None
        else:
            self.gated.gate.data.copy_(self.gate)

    def _sparsify(self, optimizer: torch.optim.Optimizer) -> None:
        if (gradient := self.gated.gate.grad) is None:
            raise RuntimeError("step() found no gradient of the gates: call it after a backward pass through it.")
        if (self.step_count - 1) % max(1, self.prune_step // 100) == 0:
            self._record()
        gradient = gradient.nan_to_num(0, 0, 0)
        self.importance = 0.99 * self.importance + 0.01 * normalised_square(gradient)
        self.mean_square = 0.99 * self.mean_square + 0.01 * gradient.square().mean()
        scale = (self.mean_square / (1 - 0.99**self.step_count)).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
        moved = self.gate - REACH / self.prune_step * (gradient / scale + self.penalty)
        moved = torch.where(self.pushed, moved.clamp(0, 1), self.gate)
        self.returned = self.returned + ((self.gate == 0) & (moved > 0)).sum()
        self.gate = moved
        self.gated.gate.grad = None
        self.gated.gate.data.copy_(self.gate)  # whatever an optimiser that holds the gates did to them is undone

    def _record(self) -> None:
        place = self._by_gate()
        pushed = self.channels.prunable.clone()
        for family in self.channels.families:
            fewest = least(self.limits.min_width, family)
            pushed[family.units[place[family.units].argsort(descending=True)[:fewest]]] = False
        self.pushed = pushed.to(self.gate.device)
        row = {"step": self.step_count - 1, **self.channels.cost(self.open_units)}
        row |= {"macs_schedule": math.nan, "params_schedule": math.nan, "strength": self.strength}
        closed = int((self.gate == 0).sum())
        self.trajectory.append({**row, "losing": int(pushed.sum()), "closed": closed, "returned": int(self.returned)})

    def _by_gate(self, *_) -> Tensor:
        """Return each unit's place, float64 ``[units]``, in the order of gates, then of importance."""
        order = self.importance.cpu().argsort(stable=True)
        order = order[self.gate.cpu()[order].argsort(stable=True)]
        return torch.empty(len(order), dtype=torch.float64).index_copy(0, order, torch.arange(len(order)).double())

    def _choose(self) -> Tensor:
        kept = super()._choose()
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            left = self.gate.where(self.gate > 0, 1.0)
            for name, value in gated_parameters(self.model, self.gated.sites, left).items():
                if name in parameters:
                    parameters[name].copy_(value)
        return kept

    def _prune(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.cost_before_fill = self.channels.cost(self.open_units)
        super()._prune(optimizer)
        self.largest_gate_removed = float(self.gate.cpu()[~self.kept].amax()) if (~self.kept).any() else 0.0
        self.gated = None
