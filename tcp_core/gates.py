"""Gates: one number in [0, 1] per unit, multiplied into parameters rather than activations, so that they cost nothing.

A gate scales the affine parameters of every batch norm that carries its unit, and weight and bias of every
convolution or linear layer whose raw output goes anywhere but into a batch norm. A closed gate makes its channels
exactly zero wherever they are used, so removing them changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .channels import Channels, GateSite


def gated_parameters(model: nn.Module, sites: Sequence[GateSite], index: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Return the parameters on which gates act, multiplied by their gates; differentiable in both.

    ``index`` is all sites' units in one tensor, on the device of ``z``, float ``[units]``; the result maps qualified
    names to tensors, for ``torch.func.functional_call``.
    """
    open_end = torch.cat([z, z.new_ones(1)])  # index -1, a channel that always stays, reads this one
    gathered = open_end[index].split([len(site.units) for site in sites])
    parameters = {}
    for site, gate in zip(sites, gathered, strict=True):
        if site.constant:
            norm = model.get_submodule(site.weight.rpartition(".")[0])
            like = norm.running_mean if norm.running_mean is not None else next(model.parameters())
            parameters[site.weight] = gate.to(like.dtype)
            parameters[site.bias] = torch.zeros_like(parameters[site.weight])
            continue
        # A weight with two sites (used plainly and transposed) is gated along both dimensions.
        weight = parameters.get(site.weight, model.get_parameter(site.weight))
        shape = [1] * weight.ndim
        shape[site.dim] = -1
        parameters[site.weight] = weight * gate.to(weight.dtype).view(shape)
        if site.bias is not None and site.bias not in parameters:
            bias = model.get_parameter(site.bias)
            parameters[site.bias] = bias * gate.to(bias.dtype)
    return parameters


class Gated(nn.Module):
    """A model with gates; called like the model. ``gate`` is float ``[units]``, a parameter that starts open."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Parameter(torch.ones(channels.units, device=_device(model)))
        # where no unit can ever be closed (a stream behind layer norm), a gate would only copy the weight at every step
        self.sites = tuple(site for site in channels.sites if not channels.frozen[site.units[site.units >= 0]].all())
        units = torch.cat([site.units for site in self.sites]) if self.sites else torch.zeros(0, dtype=torch.int64)
        self.register_buffer("index", units.to(self.gate.device), persistent=False)
        self.places = _places(model)

    def forward(self, *args, **kwargs):
        """Run the model with gated parameters."""
        if not self.sites:
            return self.model(*args, **kwargs)
        gated = gated_parameters(self.model, self.sites, self.index, self.gate)
        gated = {place: tensor for name, tensor in gated.items() for place in self.places.get(name, (name,))}
        return functional_call(self.model, gated, args, kwargs, tie_weights=False)


def close(model: nn.Module, channels: Channels, open_units: Tensor) -> Gated:
    """Return the model with all gates but those of ``open_units`` (bool ``[units]``) at zero; tensors are shared."""
    gated = Gated(model, channels)
    gated.gate.data.copy_(channels.check(open_units))
    gated.training = model.training
    return gated


def _places(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every place of each parameter, by the name it goes by.

    torch's own tie_weights counts a module that is reachable under two names twice, and then does not restore it.
    """
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            places.setdefault(id(parameter), []).append(key)
    return {name: tuple(places[id(parameter)]) for name, parameter in model.named_parameters()}


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
