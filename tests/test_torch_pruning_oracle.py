"""Torch-Pruning finds the same coupled channels, by another mechanism (a walk along autograd's graph).

For a sample of output channels of every convolution and linear layer, Torch-Pruning's group says which indices of
which layers must go with that channel. Ours are the slots that hold the same unit. What differs by design:

* Torch-Pruning would prune the classifier's classes; a model's outputs are no units of ours.
* Its graph ends at a grouped convolution, whose input and output channels its pruner then chooses group by group. We
  tie whole groups, input and output together. So its groups for both sides of such a layer are united here.
"""

import pytest
import torch
from cases import slow
from torch import nn
from zoo import build

from tcp_core import trace

tp = pytest.importorskip("torch_pruning")

# sums, depthwise convolutions, concatenations, groups; its walk takes seconds in the last two
NETWORKS = ["resnet18", "mobilenet_v2", "squeezenet1_1", *slow("densenet121", "regnet_y_400mf")]
CHANNELS_PER_LAYER = 3
LAYERS = nn.Conv2d | nn.Linear | nn.BatchNorm2d
GROUPED = (tp.prune_conv_in_channels, tp.prune_conv_out_channels)


def theirs(graph, module, prune, channels):
    """Return {(layer, "in" or "out", index)} of what Torch-Pruning removes with these output channels."""
    found, queue, done = set(), [(module, prune, channels)], set()
    while queue:
        for dependency, indices in graph.get_pruning_group(*queue.pop()):
            target = dependency.target.module
            if not isinstance(target, LAYERS):
                continue  # concatenations, splits and element-wise operators have no parameters
            name = dependency.target.name.split(" ")[0]
            both = isinstance(target, nn.BatchNorm2d) or getattr(target, "groups", 1) > 1
            side = "in" if dependency.handler.__name__ == "prune_in_channels" and not both else "out"
            found |= {(name, side, int(index)) for index in indices}
            if isinstance(target, nn.Conv2d) and 1 < target.groups < target.out_channels and name not in done:
                assert target.in_channels == target.out_channels  # so that indices mean the same on both sides
                done.add(name)
                queue += [(target, handler, indices) for handler in GROUPED]
    return found


def ours(model, channels, units):
    """Return {(layer, "in" or "out", index)} of the slots that hold any of these units."""
    found = set()
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        for dim, slots in enumerate(channels.slots.get(f"{name}.weight", ())):
            if slots is not None:
                indices = torch.isin(slots, units).nonzero().flatten().tolist()
                found |= {(name, "in" if dim else "out", index) for index in indices}
    return found


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")  # its own: torch.jit and mutable defaults
@pytest.mark.parametrize("name", NETWORKS)
def test_same_coupled_channels(name):
    model = build(name)
    x = torch.randn(2, 3, 64, 64)
    channels = trace(model, x)
    modules = dict(model.named_modules())
    graph = tp.DependencyGraph().build_dependency(model, x)
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for layer in channels.layers:
        module = modules[layer.name]
        if (layer.out_units < 0).all():
            assert layer.name == channels.layers[-1].name  # the classifier
            continue
        assert (layer.out_units >= 0).all()
        assert not channels.frozen[layer.out_units].any()
        if isinstance(module, nn.Linear):
            prune = tp.prune_linear_out_channels
        elif module.groups == module.out_channels:
            prune = tp.prune_depthwise_conv_out_channels
        else:
            prune = tp.prune_conv_out_channels
        for index in torch.randperm(len(layer.out_units), generator=generator)[:CHANNELS_PER_LAYER].tolist():
            unit = layer.out_units[index]
            group = (layer.out_units == unit).nonzero().flatten().tolist()  # more than one if grouped
            expected = theirs(graph, module, prune, group)
            assert ours(model, channels, unit) == expected, f"{layer.name}, channel {index}"
            compared += 1
    assert compared >= CHANNELS_PER_LAYER * (len(channels.layers) - 1)
