"""Tracing leaves a model as it was found, whatever its forward pass changes, and takes whatever it keeps."""

import copy
import functools
import warnings
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from tcp_core import remove, trace
from tcp_core.state import left_as_found

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Memory:
    def __init__(self):
        self.calls, self.last = 0, None

    def keep(self, module, args, out):
        self.calls += 1
        self.last = out


class Restless(nn.Module):
    """All that a forward pass may change in its model."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.b, self.head = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.register_buffer("mean", torch.zeros(8))  # assigned anew
        self.register_buffer("count", torch.zeros(()), persistent=False)  # changed in place
        self.scale = torch.ones(())  # a plain tensor, changed in place
        self.total = torch.zeros(8)  # and assigned anew
        self.calls = 0
        self.kept, self.log, self.recent, self.shapes = {"first": None}, [], deque(maxlen=2), set()
        self.memory = Memory()
        self.a.register_forward_hook(self.memory.keep)
        self.b.register_forward_hook(functools.partial(lambda log, *_: log.append(1), self.log))
        seen = OrderedDict()
        self.b.register_forward_hook(lambda module, args, out: seen.update(out=out))
        self.seen = lambda: seen
        self.nested = {"deep": [{"er": [0]}]}

    def forward(self, x):
        y = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean((0, 2, 3)).detach()
        self.total = self.total + y.sum((0, 2, 3)).detach()
        self.count += 1
        self.scale.mul_(1.01)
        self.calls += 1
        self.features = y
        self.kept["first"], self.kept["new"] = y, y
        self.log.append(y)
        self.recent.append(y)
        self.shapes.add(y.shape)
        self.nested["deep"][0]["er"][0] += 1
        with torch.no_grad():
            self.b.weight.data = torch.renorm(self.b.weight.data, 2, 0, 0.1)  # as EEGNet and ArcFace do
            self.head.weight.clamp_(-0.01, 0.01)
        self.head.extra = None
        return self.head(self.b(y).relu())


def everything(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | {"s": model.scale, "t": model.total}
    plain = (model.calls, model.kept, model.log, model.recent, model.shapes, model.nested, dict(model.seen()))
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "identities": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "versions": {name: tensor._version for name, tensor in tensors.items() if name not in ("scale", "count")},
        "plain": copy.deepcopy(plain),
        "memory": dict(vars(model.memory)),
        "attributes": {name: list(vars(module)) for name, module in model.named_modules()},
        "modes": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("training", [True, False])
def test_everything_that_a_forward_pass_changes_is_put_back(training):
    model = Restless().train(training)
    model.b.eval()
    before = everything(model)
    channels = trace(model, X)
    after = everything(model)
    torch.testing.assert_close(after.pop("values"), before.pop("values"), rtol=0, atol=0)
    for what in before.keys() - {"versions"}:
        assert after[what] == before[what], what
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[channels.prunable.nonzero().flatten()[:2]] = False
    small = remove(model, channels, open_units)
    assert everything(model)["plain"] == before["plain"]
    assert small.calls == 0
    assert not hasattr(small, "features")


def test_what_did_not_change_is_not_written_to():
    """A graph that waits for its backward pass would not have it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    loss = model(X).sum()
    trace(model, X)
    loss.backward()
    assert model[0].weight.grad is not None


def test_it_is_put_back_after_an_error_too():
    model = Restless()
    before = everything(model)
    with pytest.raises(ValueError, match="raised"):
        trace(model, X[:, :2])

    def run():
        with left_as_found(model):
            model(X)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert everything(model)["plain"] == before["plain"]
    assert everything(model)["identities"] == before["identities"]


def test_containers_with_methods_of_their_own_are_put_back():
    class Stubborn(OrderedDict):
        def update(self, *_):
            raise TypeError

        clear = pop = update

    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.outputs = Stubborn([("b", 1), ("a", 2)])
    model.register_forward_hook(lambda module, *_: module.outputs.__setitem__("new", 3))
    with left_as_found(model):
        model(X)
        model.outputs.move_to_end("b")
    assert list(model.outputs.items()) == [("b", 1), ("a", 2)]


# -------------------------------------------------------------------------------------------------
# Tensors with a graph


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())


def features(net):
    class Keeping(Net):
        def forward(self, x):
            self.features = self.a(x).relu()
            return self.head(self.b(self.features).relu())

    net.__class__ = Keeping


def cache(net):
    net.a.register_forward_hook(lambda module, args, out: setattr(module, "cache", {"out": [out]}))


def log(net):
    net.log = []
    net.a.register_forward_hook(lambda module, args, out: net.log.append(out))


def old_weight_norm(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(net.b)


def old_spectral_norm(net):
    torch.nn.utils.spectral_norm(net.b)


def weight_norm(net):
    torch.nn.utils.parametrizations.weight_norm(net.b)


@pytest.mark.parametrize("keep", [features, cache, log, old_weight_norm, old_spectral_norm, weight_norm])
def test_a_module_that_keeps_a_tensor_with_a_graph_is_traced_and_made_smaller(keep):
    net = Net()
    keep(net)
    channels = trace(net, X)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        net(X).sum().backward()
        optimizer.step()
    loss = net(X).sum()
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[channels.prunable.nonzero().flatten()[:2]] = False
    small = remove(net, channels, open_units, copy.deepcopy(optimizer))
    small(X).sum().backward()
    loss.backward()  # the kept graph is alive


def test_what_the_first_call_keeps_for_good_is_found_out_at_the_trace():
    class Once(Net):
        mask = None

        def forward(self, x):
            x = self.a(x).relu()
            if self.mask is None:
                self.mask = torch.ones_like(x[:1, :, :1, :1])
            return self.head(self.b(x * self.mask).relu())

    channels = trace(Once(), X)
    assert channels.prunable.sum() == 12
    assert channels.unknown == (("tensor attribute 'mask'", ""),)
