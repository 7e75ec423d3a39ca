"""What the comparators rank units by, and what some of them do to the weights before and after.

A criterion is a function of (model, limits) that gives the units' scores, float64 ``[units]``, the higher stays, or the
units that stay, bool ``[units]``. ``limits`` is a :class:`tcp_core.Controller`: it knows channels, bounds and prices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..channels import Channels
from ..controller import Controller, normalised_square
from ..cost import BudgetError
from ..gates import Gated
from ..state import left_as_found
from ..training.batches import channels_last
from ..training.evaluation import PRECISIONS, autocast
from ..training.objective import Objective, in_full_precision
from ..training.processes import summed
from ..verification import to_model


def uniform_l1(model: nn.Module, limits: Controller) -> Tensor:
    """Return scores by which every family keeps the same share, its units with the largest L1 norm (Li et al., 2017).

    Widths do not depend on the weights: of two families at the same share the first comes first.
    """
    norm = _l1(model, limits.channels)[0]
    score = torch.zeros_like(norm)
    for position, family in enumerate(limits.channels.families):
        order = family.units[norm[family.units].argsort(descending=True, stable=True)]
        score[order] = 1 - torch.arange(len(order)).double() / len(order) - 1e-9 * position
    return score


def as_wide_as(model: nn.Module, limits: Controller, *, widths: Mapping[str, int]) -> Tensor:
    """Return which units stay so that layers are as wide as ``widths`` says by name, bool ``[units]``: of units that
    the same layers count, the first.

    Raises:
        ValueError: if other layers are named, no choice of units gives these widths or more than one kind does, or the
            network is over a bound.
    """
    channels = limits.channels
    dense = channels.widths()
    if differ := sorted(dense.keys() ^ widths.keys()):
        raise ValueError(f"widths of other layers than the network's are given: {', '.join(differ)} in one only.")
    counts = torch.zeros(len(channels.layers), channels.units, dtype=torch.float64)
    for row, layer in zip(counts, channels.layers, strict=True):
        counted = layer.out_units[layer.out_units >= 0]
        row.index_add_(0, counted, torch.ones_like(counted, dtype=row.dtype))
    always = torch.tensor([dense[layer.name] for layer in channels.layers]) - counts.sum(1)
    wanted = torch.tensor([widths[layer.name] for layer in channels.layers]) - always
    kinds, kind_of = counts.unique(dim=1, return_inverse=True)
    if torch.linalg.matrix_rank(kinds) < kinds.any(0).sum():
        raise ValueError("several choices of units give these widths, and they differ in what layers read.")
    numbers = torch.linalg.lstsq(kinds, wanted[:, None], driver="gelsd").solution.flatten().round().long()
    open_units = torch.ones(channels.units, dtype=torch.bool)
    for kind, number in enumerate(numbers.tolist()):
        units = (kind_of == kind).nonzero().flatten()
        if kinds[:, kind].any():
            open_units[units[max(number, 0) :]] = False
    found = channels.widths(open_units)
    if wrong := [f"{name} {found[name]} for {width}" for name, width in widths.items() if found[name] != width]:
        raise ValueError(f"no units give these widths; the nearest found have {', '.join(wrong)}.")
    cost = channels.cost(open_units)
    if over := [f"{name} {cost[name]:,} > {bound:,.0f}" for name, bound in limits.bounds.items() if cost[name] > bound]:
        raise ValueError(f"a network with these widths is over the budget: {', '.join(over)}.")
    return open_units


def global_l1(model: nn.Module, limits: Controller) -> Tensor:
    """Return the mean absolute weight of each unit's filters, to be ranked over the whole network."""
    total, entries = _l1(model, limits.channels)
    return total / entries.clamp(min=1)


def slimming(model: nn.Module, limits: Controller) -> Tensor:
    """Return the mean absolute scale of each unit's batch norms (Liu et al., 2017); infinite where there is none.

    It goes with :func:`shrink_scales`; pruned at the start of a run (``at=0``) it is the plain ranking by scale.
    """
    total, count = torch.zeros(2, limits.channels.units, dtype=torch.float64)
    for scale, units in _scales(model, limits.channels):
        inside = units >= 0
        total.index_add_(0, units[inside], scale.detach().abs().double().cpu()[inside])
        count += units[inside].bincount(minlength=len(count))
    return (total / count).where(count > 0, torch.inf)


def taylor(
    model: nn.Module,
    limits: Controller,
    *,
    batches: Callable[[torch.device], Iterable],
    precision: str = "fp32",
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Tensor:
    """Return importance per marginal cost of the dense network: the controller's score, measured once.

    Importance is the mean over ``batches(device)`` of the squared gradient of the ``loss`` (cross-entropy if None) with
    respect to each gate (Molchanov et al., 2019), in train mode; the model, the loss and random numbers stay as they
    were.
    """
    gated = Gated(model, limits.channels)
    device = gated.gate.device
    importance = torch.zeros_like(gated.gate, dtype=torch.float64)
    objective = Objective(loss)
    with left_as_found(model, beside=[loss]):
        model.train()
        for x, y in batches(device):
            with autocast(device, PRECISIONS[precision]):
                outputs = gated(channels_last(x))
            value = objective.trained_on(in_full_precision(outputs), y, None, "the batches of taylor")
            (gradient,) = torch.autograd.grad(value, gated.gate)
            importance += normalised_square(gradient)
    importance = summed(importance)  # of several processes, each has seen its own part of the batches
    if not importance.any():
        raise ValueError("taylor found no gradient of the gates to rank by; give training images as train=...")
    limits.importance = importance
    return limits.score()


def random(model: nn.Module, limits: Controller, *, seed: int) -> Tensor:
    """Return random scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(limits.channels.units, dtype=torch.float64, generator=generator)


def torch_pruning(model: nn.Module, limits: Controller) -> Tensor:
    """Return the units that Torch-Pruning's GroupNormPruner leaves (Fang et al., 2023), bool ``[units]``.

    Global ranking by group L2 norm. The pruning ratio, which is all it takes, is found by bisection so that the cost is
    within all bounds; it does not fill a budget, so some is left over.

    Torch-Pruning 1.6.1 takes a zero-padded shortcut for one that moves no channels, and the network it makes does not
    run: layers of such streams, and those with channels that must stay, are named to it as ignored. It cuts inside the
    groups of grouped convolutions, which is refused with a ValueError.
    """
    import torch_pruning as tp

    channels = limits.channels
    model = copy.deepcopy(model).cpu().requires_grad_(True)
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    layers = {layer.name: layer for layer in channels.layers}
    ignored = [modules[name] for name in _ignored(channels)]
    example = to_model(channels.example, model)[0]

    def left(ratio: float) -> Tensor:
        found = tp.pruner.GroupNormPruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            **{name: {} for name in ("in_channel_groups", "out_channel_groups", "num_heads")},  # else shared by all
        )
        open_units = torch.ones(channels.units, dtype=torch.bool)
        for group in found.step(interactive=True):
            layer = layers[names[group[0].dep.target.module]]
            units = layer.out_units[group[0].idxs]
            if torch.isin(layer.out_units, units).sum() != len(units):
                raise ValueError(f"Torch-Pruning cuts inside the groups of {layer.name}, which cannot be compared.")
            open_units[units] = False
        return open_units

    best, used, low, high = None, 0.0, 0.0, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own: torch.jit and mutable defaults
        for _ in range(12):
            middle = (low + high) / 2
            open_units = left(middle)
            cost = channels.cost_model.exact(open_units)
            share = max(cost[name] / bound for name, bound in limits.bounds.items())
            low, high = (low, middle) if share <= 1 else (middle, high)
            if used < share <= 1:
                best, used = open_units, share
    if best is None:
        raise BudgetError(f"Torch-Pruning finds no network within {limits.bounds} at any ratio; give a larger budget.")
    return best


def _ignored(channels: Channels) -> set[str]:
    """Return the layers of which a channel must stay or passes a zero padding of channels."""
    kept, names = ~channels.prunable, None
    for padding in channels.paddings:
        units = torch.cat([padding.before, padding.after])
        kept[units[units >= 0]] = True
    # Paddings join streams: what shares a unit with an ignored layer is of the same stream.
    while names != (names := {x.name for x in channels.layers if (x.out_units < 0).any() or kept[x.out_units].any()}):
        for layer in channels.layers:
            if layer.name in names:
                kept[layer.out_units[layer.out_units >= 0]] = True
    return names


def _l1(model: nn.Module, channels: Channels) -> tuple[Tensor, Tensor]:
    """Return the sum of absolute weights of all filters that make a unit, and their number; float64 ``[units]``."""
    total, entries = torch.zeros(2, channels.units, dtype=torch.float64)
    for layer in channels.layers:
        weight, units = model.get_parameter(layer.weight).detach().abs().double().cpu(), layer.out_units
        dims = [d for d, at in enumerate(channels.slots.get(layer.weight, ())) if at is not None and at.equal(units)]
        if dims:
            filters, inside = weight.movedim(dims[0], 0).flatten(1), units >= 0
            total.index_add_(0, units[inside], filters.sum(1)[inside])
            entries += filters.shape[1] * units[inside].bincount(minlength=len(entries))
    return total, entries


def _scales(model: nn.Module, channels: Channels) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the batch norm scales that carry units, and the unit of each entry."""
    found = []
    for name, module in model.named_modules():
        units = channels.slots.get(f"{name}.weight", (None,))[0]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None and units is not None:
            found.append((module.weight, units))
    return found


@torch.no_grad()
def shrink_scales(model: nn.Module, channels: Channels, optimizer: torch.optim.Optimizer, *, strength: float) -> None:
    """Take the L1 penalty's step on all batch norm scales (Liu et al., 2017, who add it to their gradients).

    It follows the optimiser's step, as a soft threshold of ``lr * strength / (1 - momentum)``: as far as a constant
    gradient of that size moves a scale in the long run.
    """
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for scale, _ in _scales(model, channels):
        if (group := of.get(id(scale))) is not None:
            scale.copy_(F.softshrink(scale, group["lr"] * strength / (1 - group.get("momentum", 0.0))))


@torch.no_grad()
def start_anew(model: nn.Module, seed: int) -> None:
    """Draw all weights of ``model`` again, from ``seed``; running statistics are reset.

    Every module draws its own; convolutions and linear layers then get N(0, 2 / fan_in), as in :mod:`tcp_core.nets`,
    and zero biases. ValueError names a module that has parameters but no ``reset_parameters``.
    """
    with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"{name!r} ({type(module).__name__}) needs a reset_parameters() to start anew.")
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
