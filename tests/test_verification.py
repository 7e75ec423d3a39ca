"""Verification: whatever a network returns is compared, and what cannot be compared is a failure, not a success."""

import copy
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcp_core import RemovalError, remove, trace
from tcp_core.outputs import tensors_in
from tcp_core.verification import compare, full_precision

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Data:
    logits: Any
    rest: Any = field(default=None, kw_only=True)


class Named(NamedTuple):
    logits: Any
    rest: Any


class Slots:
    __slots__ = ("_Slots__hidden", "logits")

    def __init__(self, logits):
        self.logits = logits


class Hidden:
    __slots__ = "__hidden"

    def __init__(self, logits):
        self.__hidden = logits


class Plain:
    def __init__(self, logits):
        self.logits = logits
        self.me = self  # a cycle


class ModelOutput(OrderedDict):
    """As transformers has it: a dict whose entries are attributes too, and that refuses to be updated."""

    def __post_init__(self):
        self.__dict__.update(self)

    def update(self, *_):
        raise TypeError

    pop = clear = __delitem__ = update


CONTAINERS = {
    "tensor": lambda y: y,
    "dataclass": Data,
    "named tuple": lambda y: Named(1, y),
    "slots": Slots,
    "private slots": Hidden,
    "plain object": Plain,
    "model output": lambda y: ModelOutput(logits=y),
    "odd keys": lambda y: {(1, None): y, None: "text"},
    "set": lambda y: {y},
    "nested": lambda y: [{"a": Data(Slots((Plain({3: y}),)))}],
    "beside integers": lambda y: {"classes": y.argmax(1), "scores": Data(y)},
    "float": lambda y: {"loss": float(y.detach().sum())},
    "complex": lambda y: torch.complex(y, y),
}


class Net(nn.Module):
    """Two hidden convolutions; `make` turns the scores into the output, `hidden` acts between the convolutions."""

    def __init__(self, make=lambda y: y, hidden=lambda x: x):
        super().__init__()
        self.make, self.hidden = make, hidden
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.make(self.head(self.b(self.hidden(self.a(x)))).mean((2, 3)))


def some_closed(channels, count=5):
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[channels.prunable.nonzero().flatten()[:count]] = False
    return open_units


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_tensors_of_any_output_are_found_and_compared(kind):
    net = Net(CONTAINERS[kind])
    assert len(tensors_in(net(X))) >= 1
    channels = trace(net, X)
    assert channels.units == channels.prunable.sum() == 20 or kind in (
        "float",
        "complex",
    )  # the scores leave the model: no units
    open_units = some_closed(channels)
    small = remove(net, channels, open_units)
    with torch.no_grad():
        small.head.weight.mul_(1.02)
    with pytest.raises(RemovalError, match=r"differ by 0\.0.* of the largest output"):
        compare(net, small, channels, open_units)


@pytest.mark.parametrize(
    ("make", "holds"),
    [
        (lambda y: y.argmax(1), r"tensors of torch\.int64 only"),
        (lambda y: {"mask": y > 0}, r"tensors of torch\.bool only"),
        (lambda y: iter([y]), r"no tensor \(it is list_iterator\)"),
        (lambda y: None, r"no tensor \(it is NoneType\)"),
        (lambda y: [y[:, :0]], r"tensors of torch\.float32 only"),
    ],
)
def test_an_output_without_values_is_refused_before_anything_is_trained(make, holds):
    with pytest.raises(ValueError, match=rf"nothing can be compared: .* holds {holds}\. Let forward return the values"):
        trace(Net(make), X)


def test_a_network_that_stopped_returning_values_fails():
    net = Net()
    channels = trace(net, X)
    net.make = lambda y: y.argmax(1)
    with pytest.raises(RemovalError, match=r"nothing can be compared"):
        remove(net, channels, some_closed(channels))


def test_a_diverged_network_fails():
    net = Net()
    channels = trace(net, X)
    nn.init.constant_(net.head.weight, torch.nan)
    with pytest.raises(RemovalError, match=r"not finite .* weights have diverged"):
        remove(net, channels, some_closed(channels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: {"a": y, "b": y * 2}, r"only one of them returns output\['b'\]"),
        (lambda y: {"a": y[:, :2]}, r"output\['a'\] is torch\.float32 of shape \(1, 4\) in one"),
        (lambda y: {"a": y.double()}, r"torch\.float32 of shape"),
        (lambda y: {"a": y + torch.nan}, r"differ by nan"),
    ],
)
def test_outputs_of_another_structure_fail(make, message):
    net = Net(lambda y: {"a": y})
    channels = trace(net, X)
    open_units = some_closed(channels)
    small = remove(net, channels, open_units)
    small.make = make
    with pytest.raises(RemovalError, match=message):
        compare(net, small, channels, open_units)


# -------------------------------------------------------------------------------------------------
# Chance


def numpy_state():
    return str(np.random.get_state())  # noqa: NPY002


def python_noise(x):
    return x * (1 + random.random()) * (1 + np.random.rand())  # noqa: NPY002


RANDOM = {
    "dropout": F.dropout,
    "dropout2d": lambda x: F.dropout2d(x, 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.1, training=True).relu() * x,
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli_ of a mask": lambda x: x * torch.empty_like(x, dtype=torch.bool).bernoulli_(0.5),
    "noise": lambda x: x + x * torch.randn_like(x),
    "uniform": lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "drop path": lambda x: x * (torch.rand(len(x), 1, 1, 1) < 0.7) / 0.7,
    "a number": lambda x: x * torch.rand(1),
    "shuffled batch": lambda x: x + x[torch.randperm(len(x))],
    "generator": lambda x: x * torch.rand(1, generator=GENERATOR),
    "python and numpy": python_noise,
}
GENERATOR = torch.Generator().manual_seed(3)


@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_in_eval_mode_freeze_nothing(kind):
    net = Net(hidden=RANDOM[kind])
    states = torch.get_rng_state(), random.getstate(), numpy_state(), GENERATOR.get_state()
    channels = trace(net, X)
    assert channels.prunable.sum() == 20, channels.unknown
    remove(net, channels, some_closed(channels))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(GENERATOR.get_state(), states[3])
    assert (random.getstate(), numpy_state()) == states[1:3]


def test_noise_of_a_size_that_python_computed_freezes_what_it_meets_alone():
    channels = trace(Net(hidden=lambda x: x + x * torch.randn(x.shape)), X)
    assert channels.prunable.sum() == 12


def test_a_network_that_is_never_the_same_is_said_to_be():
    counter = iter(range(1000))
    channels = trace(Net(hidden=lambda x: x * (1 + next(counter))), X)
    assert not channels.prunable.any()
    assert channels.unknown == (("outputs that change from run to run", ""),)


def test_a_network_that_stopped_being_repeatable_is_no_defect_of_the_trace():
    net = Net()
    channels = trace(net, X)
    counter = iter(range(1000))
    net.hidden = lambda x: x * (1 + next(counter))
    with pytest.raises(RemovalError, match=r"other outputs each time it runs .* pass verify=False"):
        remove(net, channels, some_closed(channels))


# -------------------------------------------------------------------------------------------------
# Precision


NEWER = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="switches of torch 2.9")


def switches():
    backends = torch.backends
    places = [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    places += [backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul]
    return places


def read():
    found = [place.fp32_precision for place in switches()]
    return [*found, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic]


@pytest.fixture
def defaults():
    """Switches as torch starts with them, also for the tests after."""
    yield
    for place in switches():
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@NEWER
@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_the_switches_of_precision_are_obeyed_and_left(defaults, place, value):
    switches()[place].fp32_precision = value
    before = read()
    channels = trace(Net(), X)
    remove(Net(), channels, some_closed(channels))
    assert read() == before
    with full_precision():
        assert read()[:9] == ["ieee"] * 9
        assert read()[9:] == before[9:]  # cuDNN is not switched off
    assert read() == before


@NEWER
def test_a_switch_that_follows_the_outer_one_goes_on_to(defaults):
    for place in switches():
        place.fp32_precision = "none"
    trace(Net(), X)
    torch.backends.fp32_precision = "ieee"
    assert {place.fp32_precision for place in switches()} == {"ieee"}
    torch.backends.fp32_precision = "none"


@NEWER
@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
@pytest.mark.parametrize("conv", [True, False])
def test_the_older_switches_are_left_too(defaults, precision, conv):
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = conv
    trace(Net(), X)
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")
    assert torch.backends.cudnn.allow_tf32 == conv


def test_under_autocast_everything_is_as_without():
    net = Net()
    expected = trace(net, X)
    with torch.autocast("cpu", torch.bfloat16):
        channels = trace(net, X)
        small = remove(net, channels, some_closed(channels))
        with torch.no_grad():
            small.head.weight.mul_(1.02)  # within what bfloat16 tells apart
        with pytest.raises(RemovalError, match="differ by 0.0"):
            compare(net, small, channels, some_closed(channels))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(channels.prunable, expected.prunable)
    assert channels.cost() == expected.cost()


def test_verification_leaves_both_networks_as_they_were():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(12))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            y = self.b(self.a(x))
            self.mean = 0.9 * self.mean + y.mean((0, 2, 3))
            return self.head(y - self.mean[:, None, None])

    net = Counting()
    channels = trace(net, X)
    mean = net.mean
    before = copy.deepcopy(net.state_dict())
    small = remove(net, channels, some_closed(channels))
    for each in (net, small):
        assert each.calls == 0
        assert not each.mean.any()
    assert net.mean is mean
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
