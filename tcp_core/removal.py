"""Removing closed units for real: every parameter and buffer is indexed by the units that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .carrying import Cuts, Kept, cut_optimizer, take
from .channels import Channels, stays
from .gates import plain_class
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
            indexed along, so that training goes on without a jump. What it keeps for a parameter and cannot be cut
            starts anew, with a warning.
        verify: compare the outputs of the gated and the smaller network on the traced example before anything else
            changes.

    Raises:
        ValueError: if a frozen unit would go, a layer would be empty, or ``model`` is not the one that was traced.
        RemovalError: if the outputs differ.
    """
    open_units = channels.check(open_units)
    check_same_model(model, channels)
    small, replaced = resized(model, lambda name, tensor: take(tensor, channels.kept(name, open_units)), gradients=True)
    for (name, attribute), value in written(model, channels, open_units).items():
        setattr(small.get_submodule(name), attribute, value)
    if verify:
        compare(model, small, channels, open_units)
    if optimizer is not None:
        kept = {id(p): channels.kept(name, open_units) for name, p in model.named_parameters()}
        _carry_over(optimizer, model, replaced, kept)
    return small


def resized(
    model: nn.Module, index: Callable[[str, Tensor], Tensor], *, gradients: bool = False
) -> tuple[nn.Module, dict[int, Tensor]]:
    """Return a copy of ``model`` whose parameters and buffers are ``index(qualified name, tensor)``, and the new
    ones by old id.

    The sizes that torch's own modules keep beside their tensors are set. Shared tensors stay shared; ``gradients`` go
    along, by the same ``index``, or there are none.
    """
    new: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = index(name, tensor.detach())
        value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            if gradients and tensor.grad is not None:
                value.grad = index(name, tensor.grad).clone()
        new[id(tensor)] = value
    # deepcopy takes what it finds in the memo as already copied; tensors with a graph it would refuse
    kept = {id(tensor): tensor.detach().clone() for tensor in non_leaf_tensors(model)}
    small = copy.deepcopy(model, new | kept)
    for old, module in zip(model.modules(), small.modules(), strict=True):
        changed = sizes(old, lambda tensor: new[id(tensor)].shape)
        changed |= remembered(old, {name: tuple(tensor.shape) for name, tensor in own_tensors(module).items()})
        for name, value in changed.items():
            setattr(module, name, value)
    return small, new


def remembered(module: nn.Module, after: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, as ``{"dense_shapes": ...}``, the shapes of a module's own tensors before any was cut, if one is cut now.

    ``after`` are the shapes they are to have. Whoever saves, stacks or wraps the module can then tell what it came
    from.
    """
    before = {name: tuple(tensor.shape) for name, tensor in own_tensors(module).items()}
    return {"dense_shapes": before | getattr(module, "dense_shapes", {})} if before != dict(after) else {}


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer in the dense network, by qualified name."""
    return {
        f"{prefix}.{name}" if prefix else name: tuple(getattr(module, "dense_shapes", {}).get(name, tensor.shape))
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(module).items()
    }


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module itself, by the names they go by in it."""
    own = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in own if tensor is not None}


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter that is the module's own: an attribute may be computed, by a parametrization, or absent."""
    return dict(module._parameters.items()).get(name)  # a scripted module's parameters have items, but no get


def sizes(module: nn.Module, shape: Callable[[Tensor], torch.Size]) -> dict[str, int]:
    """Return the sizes that one of torch's own modules keeps beside its tensors, as these are to be.

    ``shape(tensor)`` is the shape that a parameter or buffer of ``module`` is to have.
    """
    weight = own_parameter(module, "weight")
    if isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module.running_mean
        return {} if sized is None else {"num_features": shape(sized)[0]}
    if weight is None:
        return {}
    # Whole groups leave together, so channels per group stay: groups shrink in step with the grouped dimension. The
    # last one is an ordinary layer, of which another run leaves less than a group had.
    if isinstance(module, nn.GroupNorm):
        channels = shape(weight)[0]
        return {"num_groups": module.num_groups * channels // weight.shape[0], "num_channels": channels}
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = max(1, module.groups * shape(weight)[0] // weight.shape[0])
        sides = shape(weight)[0], shape(weight)[1] * groups
        inside, outside = sides if module.transposed else sides[::-1]
        return {"groups": groups, "in_channels": inside, "out_channels": outside}
    if isinstance(module, nn.Linear):
        return {"out_features": shape(weight)[0], "in_features": shape(weight)[1]}
    return {"num_parameters": shape(weight)[0]} if isinstance(module, nn.PReLU) else {}


def written(model: nn.Module, channels: Channels, open_units: Tensor) -> dict[tuple[str, str], Any]:
    """Return the sizes that no tensor shows, by module and attribute, with only ``open_units`` left: the ``padding`` of
    modules that pad channels, and the ``num_features`` of norms without parameters and statistics.
    """
    found: dict[str, list[int]] = {}
    for padding in channels.paddings:
        amounts = found.setdefault(padding.module, list(model.get_submodule(padding.module).padding))
        for side, units in enumerate((padding.before, padding.after)):
            amounts[padding.position + side] = int(stays(units, open_units).sum())
    features = {
        (name, "num_features"): int(stays(site.units, open_units).sum())
        for site in channels.sites
        if site.constant and not own_tensors(model.get_submodule(name := site.weight.rpartition(".")[0]))
    }
    return features | {(name, "padding"): tuple(amounts) for name, amounts in found.items()}


def check_same_model(model: nn.Module, channels: Channels) -> None:
    """Raise ValueError unless ``model`` has the parameters and buffers (names and shapes) that were traced."""
    if names := misfits(model, channels):
        name, shapes = names[0], tensor_shapes(model)
        raise ValueError(
            f"this is not the model that was traced: {name!r} has shape {shapes.get(name, 'absent')} here and "
            f"{channels.shapes.get(name, 'absent')} in the trace; trace this model and use that."
        )
    here = groups_of(model)
    for name in here.keys() | channels.groups.keys():
        if here.get(name, 1) != channels.groups.get(name, 1):
            raise ValueError(
                f"this is not the model that was traced: {name!r} has {here.get(name, 1)} groups here and "
                f"{channels.groups.get(name, 1)} in the trace; trace this model and use that."
            )


def misfits(model: nn.Module, channels: Channels) -> list[str]:
    """Return the names of parameters and buffers that ``model`` and the traced one do not both have in one shape.

    A buffer without units may have another shape: a forward pass can make it anew, for images of another size. One that
    is None here may be filled by the first pass.
    """
    here, traced = tensor_shapes(model), channels.shapes
    remade = {name for name, _ in model.named_buffers(remove_duplicate=False)} & traced.keys() - channels.slots.keys()
    remade |= unfilled(model) & traced.keys()
    return sorted(name for name in (here.keys() | traced.keys()) - remade if here.get(name) != traced.get(name))


def unfilled(model: nn.Module) -> set[str]:
    """Return the names of buffers that are None and that a forward pass may fill; torch's own modules fill none."""
    return {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules(remove_duplicate=False)
        if not getattr(plain_class(module), "__module__", "").startswith("torch.")
        for key, buffer in module._buffers.items()
        if buffer is None
    }


def groups_of(model: nn.Module) -> dict[str, int]:
    """Return, by name, the groups of convolutions and group norms that have several; no shape tells those of norms."""
    kinds = {nn.modules.conv._ConvNd: "groups", nn.GroupNorm: "num_groups"}
    return {
        name: groups
        for name, module in model.named_modules(remove_duplicate=False)
        for kind, attribute in kinds.items()
        if isinstance(module, kind) and (groups := getattr(module, attribute)) > 1
    }


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer by qualified name."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _carry_over(optimizer: torch.optim.Optimizer, model: nn.Module, replaced: dict[int, Tensor], kept: dict[int, Kept]):
    """Point ``optimizer`` at the smaller network's parameters, its state cut as for one that becomes smaller itself."""
    cuts = Cuts()
    cut_optimizer(cuts, optimizer, kept, {id(parameter): name for name, parameter in model.named_parameters()})
    cuts.apply()
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            if (new := replaced.get(id(old))) is not None:
                group["params"][position] = new
                if old in optimizer.state:
                    optimizer.state[new] = optimizer.state.pop(old)
