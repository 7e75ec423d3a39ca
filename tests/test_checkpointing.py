"""Activation checkpointing: what backward computes anew is gated as it was, so all gradients are those without it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models import DenseNet

from tcp_core import Tailor, close, trace
from tcp_core.gates import Gated


class Net(nn.Module):
    """Parameters that are read by their module, by its parent, and by two modules."""

    def __init__(self, how="plain", reentrant=False):
        super().__init__()
        self.how, self.reentrant = how, reentrant
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.read, self.scale = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.rand(8, 1, 1))
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.twin.weight = self.read.weight
        self.head = nn.Linear(8, 4)

    def inner(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return x + self.body(x)

    def outer(self, x):
        x = F.conv2d(x, self.read.weight, self.read.bias, padding=1)
        return self.twin(torch.relu(x)) * self.scale

    def run(self, function, x):
        return function(x) if self.how == "plain" else checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x):
        if self.how == "nested":
            x = self.run(lambda y: self.run(self.outer, self.run(self.inner, y)), x)
        elif "sequential" in self.how:
            x = self.inner(x)
            if self.how == "sequential":
                x = self.outer(x + checkpoint_sequential(self.body, 2, x, use_reentrant=self.reentrant))
            else:
                x = self.outer(x + self.body(x))
        else:
            x = self.run(self.outer, self.run(self.inner, x))
        return self.head(torch.relu(x).mean((2, 3)))


def gradients(gated, x, y):
    gated.zero_grad()
    F.cross_entropy(gated(x), y).backward()
    return [gated.gate.grad, *(parameter.grad for parameter in gated.model.parameters())]


def gated_like(model, channels):
    gated = Gated(model, channels)
    gated.gate.data.copy_(torch.linspace(0, 1, channels.units))
    return gated


def batch(size=8):
    torch.manual_seed(1)
    return torch.randn(4, 3, size, size, requires_grad=True), torch.randint(4, (4,))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["one", "nested", "sequential"])
def test_gradients_are_those_without_checkpointing(how, reentrant):
    torch.manual_seed(0)
    model = Net("plain sequential" if how == "sequential" else "plain")
    channels, (x, y) = trace(model, batch()[0].detach()), batch()
    assert channels.prunable.sum() >= 8
    expected = gradients(gated_like(model, channels), x, y)
    assert all(gradient.any() for gradient in expected[:3])
    other = copy.deepcopy(model)
    other.how, other.reentrant = how, reentrant
    gated = gated_like(other, channels)
    for _ in range(2):
        torch.testing.assert_close(gradients(gated, x, y), expected, rtol=1e-5, atol=1e-7)


def test_a_densenet_that_saves_memory():
    options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 4}
    torch.manual_seed(0)
    model = DenseNet(**options)
    x, y = batch(32)
    channels = trace(model, x.detach())
    expected = gradients(gated_like(model, channels), x, y)
    other = DenseNet(**options, memory_efficient=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(gradients(gated_like(other, channels), x, y), expected, rtol=1e-5, atol=1e-7)


def test_between_forward_and_step_attributes_are_the_parameters():
    torch.manual_seed(0)
    model = Net("one")
    gated = gated_like(model, trace(model, batch()[0].detach()))
    seen = []
    model.stem.register_full_backward_hook(lambda module, *_: seen.append(module.weight))
    F.cross_entropy(gated(batch()[0]), batch()[1]).backward()
    assert model.read.weight is model.twin.weight is dict(model.named_parameters())["read.weight"]
    assert model.norm.weight.grad is not None
    assert seen[0] is model.stem.weight  # in hooks of the backward pass too


def test_two_gated_networks_share_a_model():
    torch.manual_seed(0)
    model = Net("one")
    channels, (x, y) = trace(model, batch()[0].detach()), batch()
    gated = gated_like(model, channels)
    expected = gradients(gated, x, y)
    with torch.no_grad():
        other = close(model, channels, torch.ones(channels.units, dtype=torch.bool))
        plain = other.eval()(x)
        model.eval()
        torch.testing.assert_close(plain, model(x))
    del other
    torch.testing.assert_close(gradients(gated.train(), x, y), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.medium
def test_a_whole_run_is_that_without_checkpointing():
    found = []
    for how in ("plain", "one"):
        torch.manual_seed(0)
        model, (x, y) = Net(how), batch()
        tailor = Tailor(model, x.detach(), budget={"macs": 0.5}, steps=96, phase=(0.02, 0.15))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(20):
            loss = F.cross_entropy(tailor(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tailor.step()
            losses.append(loss.item())
        assert tailor.shrunk
        found.append((losses, tailor.report()["widths"]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
