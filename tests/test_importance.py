"""What a gate's gradient says: the loss's first-order change when what the unit's readers read becomes zero."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tcp_core import trace
from tcp_core.gates import Gated, close
from tcp_core.removal import remove


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def pooled(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def depthwise(bias):
    options = {"groups": 16, "bias": bias}
    return pooled(conv(3, 16), nn.ReLU(), conv(16, 16, **options), nn.ReLU(), conv(16, 16, **options), nn.ReLU())


def groups_of_four():
    return pooled(conv(3, 16), nn.ReLU(), conv(16, 16, groups=4), nn.ReLU())


def depthwise_transposed():
    return pooled(conv(3, 16), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3, groups=16), nn.ReLU())


class BesideDepthwise(nn.Module):
    """What a layer makes is read through a depthwise one, and by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.deep, self.one, self.two = conv(3, 16), conv(16, 16, groups=16), conv(16, 4), conv(16, 4)

    def forward(self, x):
        x = F.relu(self.first(x))
        return (self.one(x) + self.two(F.relu(self.deep(x)))).mean((2, 3))


class Gating(nn.Module):
    """One branch times an activation of another."""

    def __init__(self, activation=F.relu, turned=False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4)
        self.activation, self.turned = activation, turned

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 2)
        a, b = self.activation(self.gate(x)), self.up(x)
        return self.down(b * a if self.turned else a * b)


class Squeezing(nn.Module):
    """Squeeze and excitation, with the excitation in place or not."""

    def __init__(self, written=False):
        super().__init__()
        self.first, self.norm, self.last = conv(3, 16), nn.BatchNorm2d(16), conv(16, 4)
        self.squeeze, self.excite, self.written = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), written

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        s = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        if self.written:
            x *= s.sigmoid_()
        else:
            x = x * s.sigmoid()
        return self.last(x).mean((2, 3))


class AddedInPlace(nn.Module):
    """A view is taken of a layer's output before something is added to that, which the view then shows as well."""

    def __init__(self):
        super().__init__()
        self.one, self.last = conv(3, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.one(x)
        seen = y.flatten(2)
        y += self.one(x.flip(3))
        return self.last(seen.relu().mean(2))


NETWORKS = {
    "depthwise": lambda: depthwise(bias=True),
    "depthwise without bias": lambda: depthwise(bias=False),
    "groups of four": groups_of_four,
    "depthwise transposed": depthwise_transposed,
    "beside depthwise": BesideDepthwise,
    "relu gate": Gating,
    "relu gate, turned": lambda: Gating(turned=True),
    "silu gate": lambda: Gating(F.silu),
    "sigmoid gate": lambda: Gating(torch.sigmoid),
    "squeeze and excitation": Squeezing,
    "added in place": AddedInPlace,
    "regnet with squeeze and excitation": lambda: torchvision.models.regnet_y_400mf(num_classes=4),
}


def of_the_readers(model: nn.Module, channels) -> Tensor:
    """Return, by unit, the loss's derivative by a factor on the weights that read it, from their own gradients."""
    found, parameters = torch.zeros(channels.units, dtype=torch.float64), dict(model.named_parameters())
    for layer in channels.layers:
        weight, slots = parameters[layer.weight], channels.slots.get(layer.weight, ())
        if len(slots) > 1 and (units := slots[1]) is not None:
            change = (weight * weight.grad).detach().double().movedim(1, 0).flatten(1).sum(1)
            found.index_add_(0, units[units >= 0], change[units >= 0])
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_units_importance_is_what_its_readers_say(kind, training):
    torch.manual_seed(0)
    model, x = NETWORKS[kind]().double(), torch.randn(6, 3, 32, 32, dtype=torch.float64)
    channels = trace(model, x[:2])
    gated = Gated(model, channels)
    gated.train(training)
    if "regnet" in kind:
        gated.train()  # in eval mode norms that follow one another in a group count several times
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12  # what comes in is then of no scale at all
    gated(x).square().sum().backward()
    free = channels.prunable
    wanted = of_the_readers(model, channels)[free]
    assert free.any()
    assert wanted.abs().max() > 1e-6
    torch.testing.assert_close(gated.gate.grad[free].double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", [*NETWORKS, "written"])
def test_gates_that_are_spared_are_not_missed(kind):
    torch.manual_seed(0)
    model = (Squeezing(written=True) if kind == "written" else NETWORKS[kind]()).double()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    channels = trace(model, x[:2])
    open_units = ~channels.prunable | (torch.rand(channels.units) < 0.5)
    for family in channels.families:
        open_units[family.units[0]] = True
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            wanted = close(model, channels, open_units)(x)
            small = remove(model, channels, open_units)
            torch.testing.assert_close(small.train(training)(x), wanted, rtol=1e-6, atol=1e-6)
