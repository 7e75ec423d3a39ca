"""What hides from a look at outputs in eval mode: branches of training, small branches, views, and parts without
gradients.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tcp_core as tcp
from tcp_core import tracing
from tcp_core.gates import close
from tcp_core.removal import remove

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (32,), generator=torch.Generator().manual_seed(1))


def train(tailor, steps, shrink=True):
    """A loop of one's own; returns what finish() does, or the Tailor that was not to shrink."""
    optimizer = torch.optim.SGD([p for p in tailor.model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        outputs = tailor(X)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        optimizer.zero_grad()
        sum(F.cross_entropy(each, Y) for each in outputs).backward()
        optimizer.step()
        tailor.step(shrink=shrink)
    return tailor.finish() if shrink else tailor


def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


class Auxiliary(nn.Module):
    """A second head, on the way, that only training has."""

    def __init__(self, taken):
        super().__init__()
        self.first, self.second = block(3, 24), block(24, 16)
        self.head, self.auxiliary = nn.Linear(16, 4), nn.Linear(24, 4)
        self.taken = taken

    def forward(self, x):
        x = self.first(x)
        y = self.head(self.second(x).mean((2, 3)))
        return (y, self.auxiliary(self.taken(x))) if self.training else y


TAKEN = {
    "as it is": (lambda x: x.mean((2, 3)), 40),
    "a size that is written out": (lambda x: x.mean((2, 3)).view(-1, 24), 16),
    "a size that is computed": (lambda x: x.mean((2, 3)) * x.shape[1] ** -0.5, 16),
    "computed, and small beside the bias": (lambda x: x.mean((2, 3)) / x[0].numel(), 16),
    "dropped by chance": (lambda x: F.dropout(x.mean((2, 3)), 0.5), 40),
    "noise": (lambda x: x.mean((2, 3)) * torch.rand(len(x), 1), 40),
}


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*of the macs cannot be pruned")
@pytest.mark.parametrize("how", TAKEN)
def test_branches_that_only_training_has_are_tried_out(how):
    taken, prunable = TAKEN[how]
    model = Auxiliary(taken)
    channels = tcp.trace(model, X[:2])
    assert int(channels.prunable.sum()) == prunable
    train(tcp.Tailor(model, X[:2], budget={"macs": 0.6}, steps=40, multiple=1), 40)


class Counting(Auxiliary):
    """In training its outputs are never the same, so that nothing can be said of them."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        out = super().forward(x)
        return (out[0], out[1] * self.calls) if self.training else out


def test_training_that_does_not_repeat_itself_is_not_compared():
    assert tcp.trace(Counting(lambda x: x.mean((2, 3))), X[:2]).prunable.all()


class Scaled(nn.Module):
    """A branch with a size that its code takes from a width, scaled before it is added."""

    def __init__(self, scale, size=1.0):
        super().__init__()
        self.stem, self.branch, self.out = block(3, 16), block(16, 32), nn.Conv2d(32, 16, 1)
        self.scale, self.size = nn.Parameter(torch.full((16, 1, 1), scale)), size
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.branch(x)
        y = self.out(y * y.shape[1] ** -0.5)
        return self.head((x + self.scale * y * self.size).mean((2, 3)))


@pytest.mark.parametrize(("scale", "size"), [(1.0, 1.0), (1e-2, 1.0), (1e-6, 1.0), (1.0, 1e-3)])
def test_a_branch_that_is_small_beside_the_rest_is_tried_out_too(scale, size):
    """The first is a layer scale, which gets other values for the trial; the second shows in double precision only."""
    model = Scaled(scale, size)
    before = model.scale.detach().clone()
    assert int(tcp.trace(model, X[:2]).prunable.sum()) == 16
    assert torch.equal(model.scale, before)


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_of_a_large_network_the_layer_scales_are_found_in_single_precision(cost, monkeypatch):
    monkeypatch.setitem(tracing.CHEAP, cost, 0)
    assert int(tcp.trace(Scaled(1e-6, 100.0), X[:2]).prunable.sum()) == 16
    assert tcp.trace(Scaled(1.0, 1e-3), X[:2]).prunable.all()  # what is then too small to see


class SinglePrecision(nn.Module):
    """A forward that names its dtype cannot be run in double precision."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = block(3, 16), block(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.second(F.conv2d(x.float(), torch.ones(16, 16, 1, 1)).float()).mean((2, 3)))


def test_a_forward_that_names_its_dtype_is_tried_out_in_it():
    assert int(tcp.trace(SinglePrecision(), X[:2]).prunable.sum()) == 16  # not those that the fixed filters take


class Viewed(nn.Module):
    """A layer's raw output goes into a batch norm and, as a view of itself, elsewhere."""

    def __init__(self, view):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24)
        self.head, self.auxiliary = nn.Linear(24, 4), nn.Linear(24, 4)
        self.view = view

    def forward(self, x):
        raw = self.conv(x)
        y = self.head(self.norm(raw).relu().mean((2, 3)))
        return (y, self.auxiliary(self.view(raw).mean((2, 3)))) if self.training else y


VIEWS = {
    "itself": lambda x: x,
    "detached": lambda x: x.detach(),
    "all channels": lambda x: x[:, :],
    "a crop that cuts nothing": lambda x: x[:, :, :6, :6],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_raw_output_is_gated_as_the_output_is(view):
    model = Viewed(VIEWS[view])
    channels = tcp.trace(model, X[:2])
    assert channels.prunable.all()
    open_units = torch.ones(24, dtype=torch.bool)
    open_units[::3] = False
    small = remove(model, channels, open_units)
    gated = close(model, channels, open_units)
    for network in (gated, small):
        network.train()
    for a, b in zip(gated(X), small(X), strict=True):
        torch.testing.assert_close(a, b)


class Selu(nn.Module):
    """Dropout of self-normalising networks puts a number below zero where it drops."""

    def __init__(self, drop):
        super().__init__()
        self.a, self.b, self.out, self.drop = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 3), drop

    def forward(self, x):
        x = self.drop(F.selu(self.a(x)))
        return self.out(F.selu(self.b(x)))


DROPS = {
    "dropout": (nn.Dropout(0.3), 32),
    "alpha": (nn.AlphaDropout(0.3), 16),
    "alpha, whole channels": (nn.FeatureAlphaDropout(0.3), 16),
    "the function": (lambda x: F.alpha_dropout(x, 0.3, training=True), 16),
    "the function, in eval mode": (lambda x: F.alpha_dropout(x, 0.3, training=False), 32),
}


@pytest.mark.parametrize("how", DROPS)
def test_alpha_dropout_keeps_what_enters_it(how):
    """Its output is not zero where a channel is closed."""
    drop, prunable = DROPS[how]
    assert int(tcp.trace(Selu(drop), torch.randn(4, 3)).prunable.sum()) == prunable


class Behind(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.encoder, self.between, self.head = block(3, 16), block(16, 24), nn.Linear(24, 4)
        self.frozen = frozen

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.encoder(x)
        return self.head(self.between(x).mean((2, 3)))


@pytest.mark.parametrize("frozen", [True, False])
def test_channels_that_no_gradient_reaches_are_told_of(frozen):
    model = Behind(frozen).train()
    model.encoder.requires_grad_(False)
    tailor = tcp.Tailor(model, X[:2], budget={"macs": 0.4}, steps=60, multiple=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(tailor, 60)
    said = [str(each.message) for each in said if "no gradient with respect to" in str(each.message)]
    assert len(said) == frozen
    assert all("'encoder.0'" in each and "ignore=" in each for each in said)


class TwoPrecisions(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, dtype=first))
        self.conv, self.head = block(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3))) + self.first.real.float()


@pytest.mark.parametrize("first", [torch.float64, torch.complex64, torch.float32])
def test_an_example_that_has_the_precision_of_a_parameter_keeps_it(first):
    assert tcp.trace(TwoPrecisions(first), X[:2]).prunable.all()


def test_an_average_in_a_dict_follows_under_every_name_of_a_tied_weight():
    model = nn.Sequential(block(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    model.extend([nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)])
    model[3].weight = model[1].weight
    tailor = tcp.Tailor(model, X[:2], budget={"macs": 0.5}, steps=40, multiple=1)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tailor.carry(average)
    train(tailor, 40)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in average.items()} == shapes
    assert shapes["3.weight"] != (8, 8, 3, 3)


class Rooted(nn.Module):
    """A spread without a small number under the root: its gradient is not finite where a channel is closed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).var((2, 3)).sqrt())


def test_a_root_of_a_closed_channel_is_named_where_its_gradients_are_refused():
    model = Rooted()
    tailor = tcp.Tailor(model, X[:2], budget={"macs": 0.5}, steps=40, multiple=1)
    with pytest.warns(RuntimeWarning, match=r"if gates are closed already .* a root of a channel"):
        train(tailor, 40, shrink=False)
    with pytest.raises(RuntimeError, match=r"\d+ of them had gradients that are not finite .* Train on"):
        tailor.finish()
