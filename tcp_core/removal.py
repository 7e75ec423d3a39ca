"""Removing closed units for real: every parameter and buffer is indexed by the units that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .channels import Channels, stays
from .state import non_leaf_tensors
from .verification import compare


def remove(
    model: nn.Module,
    channels: Channels,
    open_units: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
) -> nn.Module:
    """Return a plain, physically smaller copy of ``model`` that keeps only ``open_units``; ``model`` is untouched.

    Args:
        model: the model that was traced.
        channels: its trace.
        open_units: bool ``[units]``; the units that stay.
        optimizer: if given, its parameters are replaced by the smaller network's and its state (momentum, moments) is
            indexed along, so that training goes on without a jump.
        verify: compare the outputs of the gated and the smaller network on the traced example before anything else
            changes.

    Raises:
        ValueError: if a frozen unit would go, a layer would be empty, or ``model`` is not the one that was traced.
        RemovalError: if the outputs differ.
    """
    open_units = channels.check(open_units)
    check_same_model(model, channels)
    small, replaced = resized(model, lambda name, tensor: take(tensor, channels.kept(name, open_units)))
    modules = dict(small.named_modules())
    for padding in channels.paddings:
        amounts = list(modules[padding.module].padding)
        for side, units in enumerate((padding.before, padding.after)):
            amounts[padding.position + side] = int(stays(units, open_units).sum())
        modules[padding.module].padding = tuple(amounts)
    if verify:
        compare(model, small, channels, open_units)
    if optimizer is not None:
        kept = {id(p): channels.kept(name, open_units) for name, p in model.named_parameters()}
        carry_over(optimizer, replaced, kept)
    return small


def take(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Return ``tensor`` with dimension ``d`` indexed by ``kept[d]`` (None keeps it whole)."""
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def resized(model: nn.Module, index: Callable[[str, Tensor], Tensor]) -> tuple[nn.Module, dict[int, Tensor]]:
    """Return a copy of ``model`` whose parameters and buffers are ``index(qualified name, tensor)``, and the new
    ones by old id.

    The sizes that torch's own modules keep beside their tensors are set. Shared tensors stay shared; gradients go
    along.
    """
    new: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = index(name, tensor.detach())
        value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:
                value.grad = index(name, tensor.grad).clone()
        new[id(tensor)] = value
    # deepcopy takes what it finds in the memo as already copied; tensors with a graph it would refuse
    kept = {id(tensor): tensor.detach().clone() for tensor in non_leaf_tensors(model)}
    small = copy.deepcopy(model, new | kept)
    for old, module in zip(model.modules(), small.modules(), strict=True):
        _fit_attributes(module, old._parameters.get("weight"))
        remember_dense(module, _own_shapes(old))
    return small, new


def remember_dense(module: nn.Module, before: Mapping[str, tuple[int, ...]]) -> None:
    """Keep, as ``module.dense_shapes``, the shapes that a module's own tensors had before any was cut.

    ``before`` are those before the last cut. Whoever saves, stacks or wraps the module can then tell what it came from.
    """
    if before != _own_shapes(module):
        module.dense_shapes = dict(before) | getattr(module, "dense_shapes", {})


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer in the dense network, by qualified name."""
    return {
        f"{prefix}.{name}" if prefix else name: tuple(getattr(module, "dense_shapes", {}).get(name, shape))
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, shape in _own_shapes(module).items()
    }


def _own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = (*module._parameters.items(), *module._buffers.items())
    return {name: tuple(tensor.shape) for name, tensor in own if tensor is not None}


def _fit_attributes(module: nn.Module, old_weight: Tensor | None) -> None:
    # Not module.weight: a parametrization computes it, and may change its state by that.
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module.running_mean
        module.num_features = module.num_features if sized is None else len(sized)
    elif weight is None:
        return
    elif isinstance(module, nn.modules.conv._ConvNd):
        # Whole groups leave together, so channels per group stay: groups shrink in step with the grouped dimension.
        if module.groups > 1:
            module.groups = module.groups * weight.shape[0] // old_weight.shape[0]
        sides = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def check_same_model(model: nn.Module, channels: Channels) -> None:
    """Raise ValueError unless ``model`` has the parameters and buffers (names and shapes) that were traced."""
    shapes = tensor_shapes(model)
    if shapes != dict(channels.shapes):
        names = sorted(
            name for name in shapes.keys() | channels.shapes.keys() if shapes.get(name) != channels.shapes.get(name)
        )
        name = names[0]
        raise ValueError(
            f"this is not the model that was traced: {name!r} has shape {shapes.get(name, 'absent')} here and "
            f"{channels.shapes.get(name, 'absent')} in the trace; trace this model and use that."
        )


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer by qualified name."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def carry_over(
    optimizer: torch.optim.Optimizer, replaced: dict[int, Tensor], kept: dict[int, tuple[Tensor | None, ...]]
) -> None:
    """Point ``optimizer`` at the smaller network's parameters, its state indexed along.

    State of another shape than its parameter (factored moments) cannot be indexed: it starts anew for that parameter.
    """
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            if (new := replaced.get(id(old))) is None:
                continue
            group["params"][position] = new
            state = optimizer.state.pop(old, {})
            tensors = [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
            if state and all(value.shape == old.shape for value in tensors):
                optimizer.state[new] = {
                    key: take(value, kept[id(old)]) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
