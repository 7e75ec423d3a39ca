"""Branches that the example does not take: named, safe after removal, and free where they are traced or unused."""

import warnings

import pytest
import torch
from torch import nn

from tcp_core import RemovalError, Tailor, remove, trace
from tcp_core.verification import compare

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv of 8 - conv of 12 - head; `branch(net, first, second)` is taken with aux=True alone."""

    def __init__(self, branch, **layers):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.branch = branch
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x, aux=False):
        first = self.a(x).relu()
        second = self.b(first).relu()
        out = self.head(second).mean((2, 3))
        return (out, self.branch(self, first, second)) if aux else out


BRANCHES = {
    "convolution": (lambda net, a, b: net.aux(a), {"aux": nn.Conv2d(8, 5, 1)}, {"a"}),
    "grouped": (lambda net, a, b: net.aux(b), {"aux": nn.Conv2d(12, 12, 3, groups=12)}, {"b"}),
    "norm": (lambda net, a, b: net.aux(b), {"aux": nn.BatchNorm2d(12)}, {"b"}),
    "flattened": (lambda net, a, b: net.aux(a.flatten(1)), {"aux": nn.Linear(8 * 64, 3)}, {"a"}),
    "pooled": (lambda net, a, b: net.aux(b.mean((2, 3))), {"aux": nn.Linear(12, 3)}, {"b"}),
    "adapter": (lambda net, a, b: a + net.aux(b), {"aux": nn.Conv2d(12, 8, 1)}, {"a", "b"}),
    "scale": (lambda net, a, b: a * net.aux, {"aux": nn.Parameter(torch.ones(8, 1, 1))}, {"a"}),
    "chain": (
        lambda net, a, b: net.aux(a),
        {"aux": nn.Sequential(nn.Conv2d(8, 7, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1))},
        {"a"},
    ),
    "joined": (lambda net, a, b: net.aux(torch.cat([a, a], 1)), {"aux": nn.Conv2d(16, 2, 1)}, None),
}


def all_but_one(channels):
    open_units = ~channels.prunable
    for family in channels.families:
        open_units[family.units[0]] = True
    return open_units


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_that_was_not_traced_works_after_removal(kind):
    branch, layers, held = BRANCHES[kind]
    net = Net(branch, **layers)
    net(X, aux=True)
    if held is None:  # nothing in the network has that size: refused rather than guessed
        with pytest.raises(ValueError, match=r"'aux.weight' is reached by no traced.* takes 16 .*unused=\['aux'\]"):
            trace(net, X)
        return
    channels = trace(net, X)
    assert channels.unreached == tuple(name for name, _ in net.named_parameters() if name.startswith("aux"))
    for name in ("a", "b"):
        assert channels.prunable[channels.slots[f"{name}.weight"][0]].any() == (name not in held)
    small = remove(net, channels, all_but_one(channels))
    small(X, aux=True)
    assert "aux" in repr(channels.explain())
    assert "parameters never reached" in repr(channels)


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_that_is_traced_too_is_prunable_and_verified(kind):
    branch, layers, _ = BRANCHES[kind]
    net = Net(branch, **layers)
    channels = trace(net, X, also=[{"x": X, "aux": True}])
    assert channels.unreached == ()
    assert channels.cost()["macs"] == trace(net, X, unused="aux" if kind != "scale" else ()).cost()["macs"]
    open_units = all_but_one(channels)
    small = remove(net, channels, open_units)
    torch.testing.assert_close(small(X, aux=True)[0], small(X))
    if kind not in ("grouped", "norm", "adapter", "scale"):  # in those the branch itself leaves the model
        assert channels.prunable.sum() >= 20
    if kind == "convolution":  # a fault in the branch alone is seen
        with torch.no_grad():
            small.aux.weight.mul_(2)
        with pytest.raises(RemovalError, match=r"output\[1\]"):
            compare(net, small, channels, open_units)


def test_a_layer_that_nothing_uses_is_named_once_and_holds_nothing():
    net = Net(None, fc=nn.Linear(12, 10))
    assert trace(net, X).prunable.sum() == 8
    channels = trace(net, X, unused="fc")
    assert channels.prunable.sum() == 20
    assert channels.unreached == ()
    with pytest.warns(UserWarning, match=r"2 parameter\(s\) .* fc\.weight, fc\.bias\. 12 units stay.*also=.*unused="):
        Tailor(net, X, budget={"macs": 0.9}, steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tailor(net, X, budget={"macs": 0.9}, steps=100, unused=["fc"])
        Tailor(net, X, budget={"macs": 0.9}, steps=100, channels=channels, unused="fc")
        Tailor(Net(None, fc=nn.Linear(4, 10)), X, budget={"macs": 0.9}, steps=100)  # holds nothing
    with pytest.raises(ValueError, match=r"unused='nothing' matches no module"):
        trace(net, X, unused="nothing")


def test_what_only_training_reaches_is_reached():
    class Auxiliary(Net):
        def forward(self, x):
            return super().forward(x, aux=self.training)

    channels = trace(Auxiliary(lambda net, a, b: net.aux(a), aux=nn.Conv2d(8, 5, 1)).eval(), X)
    assert channels.unreached == ()
    assert channels.prunable.sum() == 20


def test_options_that_belong_to_a_trace_are_refused_beside_one():
    net = Net(lambda net, a, b: net.aux(a), aux=nn.Conv2d(8, 5, 1))
    channels = trace(net, X)
    with pytest.raises(ValueError, match=r"unused=\['aux'\] came with channels="):
        Tailor(net, X, budget={"macs": 0.9}, steps=100, channels=channels, unused="aux")
    with pytest.raises(ValueError, match=r"1 inputs in also= came with channels=, a trace of 0"):
        Tailor(net, X, budget={"macs": 0.9}, steps=100, channels=channels, also=[{"x": X, "aux": True}])
