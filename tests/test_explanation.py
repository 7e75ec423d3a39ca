"""Why units stay: said by name in `unknown`, `explain()`, the errors and one warning; and what `ignore` keeps."""

import math
import re
import warnings

import pytest
import torch
import torchvision
from random_nets import RandomNet
from torch import nn

import tcp_core as tcp
from tcp_core import BudgetError, Controller, Tailor, nets, trace
from tcp_core.selection import fill, required_units, tighten

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEPS = 100


class Net(nn.Module):
    """conv of 8 - norm - relu - conv of 12 - relu - conv of 4; `between` acts on the first relu's output."""

    def __init__(self, between=lambda net, x: x):
        super().__init__()
        self.between = between
        self.a, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.b, self.act_b, self.pool = nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.head = nn.Conv2d(12, 4, 1)
        self.scale = torch.rand(8, 1, 1)  # neither parameter nor buffer

    def forward(self, x):
        x = self.between(self, self.act(self.norm(self.a(x))))
        return self.head(self.pool(self.act_b(self.b(x)))).mean((2, 3))


def by_attribute(net, x):
    return x * net.scale


def by_size(net, x):
    return x.reshape(-1, 8, 8, 8)


def unknown(net, x):
    return torch.ops.tcp_tests.mystery(x)


def lifted(net, x):
    return x.sigmoid()


def added_image(net, x):
    return x + torch.cat([IMAGE[: len(x)]] * 3, 1)[:, :8]


IMAGE = torch.randn(2, 3, 8, 8)

REASONS = {
    by_attribute: ("tensor attribute 'scale'", "make it a buffer"),
    by_size: ("size computed in Python", "x.flatten(1) instead of"),
    unknown: ("unknown operator mystery in the model", "its effect on channels is not known"),
    lifted: ("not zero when closed, at convolution in b", "a closed channel would not be zero"),
    added_image: ("tied to what stays", "a convolution in between"),
}


@pytest.mark.parametrize("between", REASONS)
def test_what_is_frozen_is_explained_by_layer(between):
    words, advice = REASONS[between]
    channels = trace(Net(between), X)
    text = channels.explain()
    row = next(row for row in text.rows if row.layer == "a")
    assert (row.channels, row.prunable) == (8, 0)
    assert words in row.why
    assert bool(channels.unknown) == (between not in (lifted, added_image))
    assert any(advice in sentence for sentence in text.advice)
    assert [(row.prunable, row.why) for row in text.rows[1:]] == [(12, ""), (0, "output of the model")]
    assert words in repr(text)
    assert re.sub("<[^>]*>", "|", text._repr_html_()).count("|a|") == 1


def test_the_floor_is_a_network_that_can_be_made_and_what_holds_it_is_its_share():
    channels = trace(Net(by_attribute), X)
    text = channels.explain()
    open_units = ~channels.prunable
    open_units[channels.slots["b.weight"][0][0]] = True
    assert text.floor == channels.cost(open_units)
    assert text.floor["macs"] == 64 * 9 * (3 * 8 + 8 * 1) + 16 * 4
    # with one channel of the first layer instead of eight
    saved = (64 * 9 * 7 * (3 + 1)) / channels.cost()["macs"]
    assert list(text.held.values())[0]["macs"] == pytest.approx(saved)


def test_every_layer_has_a_row_and_every_prunable_channel_is_in_one():
    for model in (nets.small_resnet(widths=(8, 12, 16)), RandomNet([("conv", {}), ("mystery", {})], head="dict")):
        x = torch.randn(2, 1 if hasattr(model, "conv1") else 3, 8, 8)
        channels = trace(model.float(), x)
        text = channels.explain()
        assert [row.layer for row in text.rows] == [layer.name for layer in channels.layers]
        assert all(row.prunable == row.channels or row.why for row in text.rows)
        assert text.prunable == channels.prunable.sum()
    tied = {row.layer: row.tied for row in trace(nets.small_resnet(), torch.randn(2, 1, 8, 8)).explain().rows}
    assert "layer1.0.conv2" in tied["conv1"]
    assert tied["layer1.0.conv1"] == ()


# -------------------------------------------------------------------------------------------------
# Errors and the warning


def refused(between=lambda net, x: x, **options):
    with pytest.raises(BudgetError, match="below the floor") as error:
        Tailor(Net(between), X, budget={"macs": 1}, steps=STEPS, **options)
    return str(error.value)


def test_the_floor_error_names_what_holds_it_and_blames_ignore_only_where_it_was_given():
    nothing = refused()
    assert "ignore" not in nothing
    assert "for no smaller network can be made" in nothing
    attribute = refused(by_attribute)
    assert re.search(r"could not follow hold \d+\.\d% of the dense macs \(tensor attribute 'scale'", attribute)
    assert "ignore" not in attribute
    assert re.search(r"patterns hold \d+\.\d% of the dense macs \(ignore='b'\)", refused(ignore="b"))
    assert re.search(r"min_width=3 and multiple=1 hold \d+\.\d%", refused(min_width=3))
    assert re.search(r"min_width=1 and multiple=4 hold \d+\.\d%", refused(multiple=4))
    assert "operators that are not understood hold" in refused(unknown)
    assert "channels.explain()" in attribute


def test_the_share_is_what_freeing_it_saves():
    message = refused(by_attribute)
    floor, free = trace(Net(by_attribute), X).explain().floor, trace(Net(), X).explain().floor
    share = (floor["macs"] - free["macs"]) / trace(Net(), X).cost()["macs"]
    assert f"hold {share:.1%}" in message


def test_nothing_to_prune_says_what_holds_it():
    with pytest.raises(ValueError, match=r"no unit .* held by: .*tensor attribute 'scale'.*; ignore='b'"):
        Tailor(Net(by_attribute), X, budget={"macs": 0.5}, steps=STEPS, ignore="b")


def test_a_warning_where_unknown_operators_hold_a_tenth_of_the_macs():
    with pytest.warns(UserWarning, match=r"% of the macs cannot be pruned, .* mystery in .*explain\(\)") as caught:
        Tailor(Net(unknown), X, budget={"macs": 0.9}, steps=STEPS)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tailor(Net(lifted), X, budget={"macs": 0.9}, steps=STEPS)  # understood, so there is nothing to do about it
        Tailor(Net(), X, budget={"macs": 0.9}, steps=STEPS)


# -------------------------------------------------------------------------------------------------
# ignore


@pytest.mark.parametrize("name", ["a", "norm", "act"])
def test_any_module_of_a_stream_keeps_its_channels(name):
    channels = trace(Net(), X, ignore=name)
    assert not channels.prunable[channels.slots["a.weight"][0]].any()
    assert channels.prunable.sum() == 12
    assert f"ignore='{name}'" in channels.explain().rows[0].why


@pytest.mark.parametrize("name", ["b", "act_b", "pool"])
def test_modules_without_weights_keep_what_leaves_them(name):
    assert trace(Net(), X, ignore=[name]).prunable.sum() == 8


def test_a_container_keeps_what_is_in_it_and_what_leaves_it():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)), nn.ReLU(), nn.Conv2d(6, 4, 1))
    assert trace(net, X).prunable.sum() == 14
    assert not trace(net, X, ignore="0").prunable.any()
    assert trace(net, X, ignore="1").prunable.sum() == 8


def test_a_tied_layer_is_known_by_all_of_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.first = nn.Conv2d(8, 8, 3, padding=1)
            self.second = self.first  # the very module
            self.third = nn.Conv2d(8, 8, 3, padding=1)
            self.third.weight = self.first.weight  # the weight alone
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(self.third(self.second(self.first(self.stem(x)).relu()).relu()).relu())

    assert trace(Tied(), X).prunable.sum() == 8
    for name in ("first", "second", "third"):
        assert not trace(Tied(), X, ignore=name).prunable.any(), name


def test_a_weight_that_another_module_uses_is_kept_too():
    class Borrowed(Net):
        def forward(self, x):
            x = nn.functional.conv2d(x, self.a.weight, self.a.bias, padding=1).relu()
            return self.head(self.b(x).relu())

    net = Borrowed()
    assert trace(net, X, ignore="a").prunable.sum() == 12


def test_a_pattern_that_cannot_be_obeyed_is_refused():
    net = Net()
    net.unused = nn.ReLU()
    with pytest.raises(ValueError, match=r"ignore='unused' matches only modules that the example does not call"):
        trace(net, X, ignore=["a", "unused"])


def test_ignore_beside_a_trace_is_refused_unless_it_is_the_traces_own():
    net = Net()
    channels = trace(net, X, ignore=["a"])
    for ignore in ("b", ["a", "b"]):
        with pytest.raises(ValueError, match=r"ignore=.* came with channels=, a trace made with ignore=\['a'\]"):
            Tailor(net, X, budget={"macs": 0.9}, steps=STEPS, channels=channels, ignore=ignore)
    for ignore in ((), "a", ["a"]):
        Tailor(net, X, budget={"macs": 0.9}, steps=STEPS, channels=channels, ignore=ignore)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["convnext_tiny", "googlenet"])
def test_large_networks_are_explained(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    text = tcp.trace(model, torch.randn(1, 3, 64, 64)).explain()
    assert len(repr(text).splitlines()) >= len(text.rows) + 2
    assert all(row.prunable == row.channels or row.why for row in text.rows)


# -------------------------------------------------------------------------------------------------
# Costs without a budget


@pytest.mark.parametrize(("share", "multiple"), [(0.25, 1), (0.5, 1), (0.01, 1), (0.3, 4)])
def test_min_width_can_be_a_share_of_each_family(share, multiple):
    channels = trace(nets.small_resnet(widths=(8, 12, 16)), torch.randn(2, 1, 8, 8))
    required = required_units(channels, share, multiple)
    floor = channels.cost_model.exact(required)
    score = torch.rand(channels.units, dtype=torch.float64) ** 8
    bounds = {"macs": floor["macs"] * 1.2}
    winning = fill(channels, score, bounds, share, multiple)
    if multiple == 1:
        winning = tighten(channels, winning, score, bounds, share)
    for family in channels.families:
        for units in (required, winning):
            assert units[family.units].sum() >= math.ceil(share * len(family.units))
    with pytest.raises(BudgetError, match=rf"with {share} of the units.* in each family the smallest"):
        Controller(channels, {"macs": floor["macs"] - 1}, steps=STEPS, min_width=share, multiple=multiple)
    controller = Controller(channels, {"macs": floor["macs"]}, steps=STEPS, min_width=share, multiple=multiple)
    assert controller.floor == floor


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"min_width must be an int of at least 1, .* or a share .* in \(0, 1\)"):
        Tailor(Net(), X, budget={"macs": 0.5}, steps=STEPS, min_width=share)


def test_the_report_names_what_a_budget_left_narrow_and_the_cost_that_it_forgot():
    tailor = Tailor(Net(), X, budget={"macs": 0.5}, steps=STEPS)
    text = repr(tailor.report())
    assert "fewer than 8 channels: 0" in text
    assert "no bound" not in text
    report = tailor.report()
    report["widths"] = {**report["widths"], "b": 1, "a": 3}
    report["current"] = {"macs": report["dense"]["macs"] // 2, "params": report["dense"]["params"] // 10}
    text = repr(report)
    assert "fewer than 8 channels: 2 (b: 1 of 12, a: 3 of 8)" in text
    assert re.search(r"params has no bound of its own and fell to \d+\.\d%: give it one, or min_width", text)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 8, 8), (8,)])
def test_what_all_channels_share_and_adds_to_them_keeps_them_though_it_is_zero_now(shape):
    shift = nn.Parameter(torch.zeros(shape))  # training moves it, and no channel can have a gate of it
    net = Net(lambda net, x: x + net.shift)
    net.shift = shift
    channels = trace(net, X)
    assert not channels.prunable[channels.families[0].units].any()
    assert "not zero when closed" in str(channels.explain())
