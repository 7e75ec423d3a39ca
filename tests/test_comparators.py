"""Every comparator meets the budget, uses it, and ranks units as its source says."""

import copy
import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import searched, some_of
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from random_nets import CLASSES, INPUT_SHAPE, RandomNet, networks
from torch import nn
from zoo import counted

from tcp_core import BudgetError, Report, close, fit, nets, trace
from tcp_core.controller import Controller
from tcp_core.datasets import sources
from tcp_core.gates import Gated
from tcp_core.study import comparators
from tcp_core.study.comparators import METHODS, pruner
from tcp_core.study.criteria import shrink_scales, start_anew, uniform_l1
from tcp_core.training import frames

HAS_PEER = importlib.util.find_spec("torch_pruning") is not None
PEER = pytest.param("torch_pruning", marks=pytest.mark.skipif(not HAS_PEER, reason="torch_pruning not installed"))
ALL = [PEER if method == "torch_pruning" else method for method in METHODS]
BUDGETS = [{"macs": 0.6}, {"macs": 0.25}, {"params": 0.4}, {"macs": 0.5, "params": 0.4}]
RECIPES = {
    "depthwise": [("conv", {"width": 12}), ("inverted", {"expand": 3}), ("depthwise", {}), ("conv", {"width": 16})],
    "dense": [("conv", {"width": 8}), ("dense", {"growth": 6, "layers": 3}), ("conv", {"width": 12, "norm": "none"})],
}
STEPS = 6


def built(name):
    """(network, x, y): a fresh network and one batch for it."""
    torch.manual_seed(0)
    if name in RECIPES:
        x, y = torch.randn(8, *INPUT_SHAPE[1:], dtype=torch.float64), torch.randint(CLASSES, (8,))
        return RandomNet(RECIPES[name]), x, y
    network = nets.small_resnet() if name == "small_resnet" else nets.build(name, num_classes=10)
    channels = 1 if name == "small_resnet" else 3
    return network, torch.randn(8, channels, 8, 8), torch.randint(10, (8,))


def share(method, late=0.5):
    """When `method` prunes: late if it has to train before."""
    return late if method in ("fixed_strength", "slimming") else 0.0


def pruned(method, name, budget, *, steps=STEPS, **options):
    """A comparator that has been through a user's loop of `steps` steps, and its batch."""
    network, x, y = built(name)
    options = {"at": share(method), "train": [(x, y)], "batches": 2, **options}
    comparator = pruner(method, budget, **options)(network, trace(network, x), STEPS)
    optimizer = torch.optim.SGD(comparator.model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        loss = F.cross_entropy(comparator(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        comparator.step(optimizer)
        assert [id(p) for p in comparator.model.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
        assert loss.isfinite()
    return comparator, x


def assert_filled(channels, open_units, bounds):
    """Some bound is used to 99 %, or no closed unit would fit."""
    cost = channels.cost(open_units)
    assert all(cost[name] <= bound for name, bound in bounds.items())
    if max(cost[name] / bound for name, bound in bounds.items()) < 0.99:
        for unit in (~open_units).nonzero():
            more = channels.cost(open_units.index_fill(0, unit[0], True))
            assert any(more[name] > bound for name, bound in bounds.items())


# ---------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize(
    ("method", "name", "budget"), some_of(METHODS, ["small_resnet", *RECIPES], BUDGETS, step=5, medium=5)
)
def test_the_budget_is_met_and_used(method, name, budget):
    if method == "torch_pruning" and not HAS_PEER:
        pytest.skip("torch_pruning not installed")
    if method == "torch_pruning" and name == "small_resnet" and budget == {"macs": 0.25}:
        pytest.skip("its streams stay whole there, and those alone cost more")
    comparator, x = pruned(method, name, budget)
    small, report, channels = comparator.finish(), comparator.report(), comparator.channels
    assert counted(small, x) == report["current"] == channels.cost(comparator.open_units)
    assert all(report["current"][cost] <= bound for cost, bound in report["bounds"].items())
    if method != "torch_pruning":
        assert_filled(channels, comparator.open_units, report["bounds"])
    assert small(x).isfinite().all()
    assert isinstance(report, Report)
    assert (report["requested"], report["frozen"], report["strength"]) == (budget, True, 0)
    assert report["widths"] == {
        key: len(m.weight) for key, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }


@searched(
    8,
    25,
    settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]),
    network=networks(odd=False),
    method=st.sampled_from(["uniform_l1", "global_l1", "slimming", "random"]),
    draw=st.data(),
)
def test_random_networks(network, method, draw):
    x = torch.randn(INPUT_SHAPE, dtype=torch.float64)
    channels = trace(network, x)
    assume(channels.prunable.any())
    floor = Controller(channels, {"macs": 1.0}, steps=1000).floor
    kind = draw.draw(st.sampled_from(["macs", "params"]))
    bound = draw.draw(st.integers(floor[kind], channels.cost()[kind]))
    comparator = pruner(method, {kind: bound})(network, channels, STEPS)
    assert_filled(channels, comparator.open_units, {kind: bound})
    assert counted(comparator.finish(), x) == channels.cost(comparator.open_units)


@pytest.mark.medium
@pytest.mark.parametrize("method", ALL)
def test_one_seed_one_result(method):
    first, second = (pruned(method, "depthwise", {"macs": 0.5}, seed=3)[0] for _ in range(2))
    assert torch.equal(first.open_units, second.open_units)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", ["random", "small"])
def test_another_seed_another_network(method):
    first, second = (pruned(method, "depthwise", {"macs": 0.5}, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(first.open_units, second.open_units) == (method == "small")
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("at", [pytest.param(0.0, marks=pytest.mark.medium), 0.5])
@pytest.mark.parametrize("method", ALL)
def test_fit_trains_it(method, at):
    if (method, at) in (("fixed_strength", 0.0), ("small", 0.5)):
        pytest.skip("refused")
    images = sources.digits().train.split(320)[1]
    torch.manual_seed(0)
    network = nets.small_resnet(widths=(8, 12, 16))
    prune = pruner(method, {"macs": 0.6}, at=at, train=images, batches=2, batch_size=32)
    result = fit(network, images, prune=prune, epochs=1, batch_size=32)
    assert counted(result.model, torch.zeros(1, 1, 8, 8)) == result.report["current"]
    assert result.frozen_at_step == (5 if at else 1)
    assert result.report["step"] == 10
    assert result.history["train_loss"].notna().all()
    assert result.widths["tailored"].sum() < result.widths["dense"].sum()
    if method == "fixed_strength":
        assert set(frames.TRAJECTORY) <= set(result.trajectory)
        assert result.trajectory["step"].is_monotonic_increasing
    else:
        assert result.trajectory.empty


@pytest.mark.parametrize("method", ["global_l1", "fixed_strength"])
def test_min_width(method):
    comparator, _ = pruned(method, "small_resnet", {"macs": 0.3}, min_width=4)
    for family in comparator.channels.families:
        assert comparator.open_units[family.units].sum() >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Each of them


@pytest.mark.medium
@pytest.mark.parametrize("macs", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_uniform_keeps_equal_shares_of_the_largest_filters(name, macs):
    network, x, _ = built(name)
    channels = trace(network, x)
    comparator = pruner("uniform_l1", {"macs": macs})(network, channels, STEPS)
    kept = [(int(comparator.open_units[family.units].sum()), len(family.units)) for family in channels.families]
    # One share, but for rounding and what the last units and exchanges fill.
    assert max((own - 2) / size for own, size in kept) <= min((own + 2) / size for own, size in kept)
    if name == "resnet20":
        layer = next(layer for layer in channels.layers if layer.name == "layer1.0.conv1")
        stays, norm = comparator.open_units[layer.out_units], network.layer1[0].conv1.weight.abs().sum((1, 2, 3))
        assert norm[stays].min() > norm[~stays].max()


def test_filters_are_measured_where_a_unit_is_an_output():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    channels = trace(network, torch.randn(2, 1, 4, 4))
    first, second, _ = channels.layers
    size = torch.tensor([3.0, 1.0, 4.0, 2.0, 0.5, 0.1])
    with torch.no_grad():
        network[0].weight.copy_(size[:4].view(4, 1, 1, 1))
        network[2].weight.copy_(-size.view(1, 6, 1, 1).expand(4, 6, 1, 1))
    limits = Controller(channels, {"macs": 1.0}, steps=1000)
    assert uniform_l1(network, limits)[first.out_units].tolist() == pytest.approx([0.75, 0.25, 1, 0.5], abs=1e-6)
    assert uniform_l1(network, limits)[second.out_units].argsort(descending=True).tolist() == [2, 0, 3, 1, 4, 5]
    # Over the whole network, mean absolute weights: 4 | 4, 3 | 3, 2 | 2, 1 | 1, then 0.5 and 0.1.
    macs = 16 * (2 + 2 * 2 + 2 * 2)
    comparator = pruner("global_l1", {"macs": macs})(network, channels, STEPS)
    assert comparator.open_units[first.out_units].tolist() == [True, False, True, False]
    assert comparator.open_units[second.out_units].tolist() == [True, False, True, False, False, False]


@pytest.mark.medium
def test_taylor_is_the_squared_gradient_of_a_gate_per_cost():
    network, x, y = built("depthwise")
    channels = trace(network, x)
    batches = [(x, y), (x.flip(3) * 2, y.roll(1))]
    budget = {"macs": 0.5, "params": 0.7}
    limits = Controller(channels, budget, steps=1000)

    def loss(z, x, y):
        gated = Gated(network, channels)
        gated.gate.data = z.double()
        return F.cross_entropy(gated(x), y)

    importance = torch.zeros(channels.units, dtype=torch.float64)
    ones, small = torch.ones(channels.units, dtype=torch.float64), 1e-6
    for batch in batches:
        with torch.no_grad():  # central differences, unit by unit
            moved = torch.eye(channels.units, dtype=torch.float64) * small
            slope = torch.stack([loss(ones + step, *batch) - loss(ones - step, *batch) for step in moved])
        square = (slope / (2 * small)) ** 2
        importance += square / square.sum()
    dense = channels.cost()
    price = torch.zeros(channels.units, dtype=torch.float64)
    for unit in range(channels.units):
        left = torch.ones(channels.units, dtype=torch.bool)
        left[unit] = False
        rest = channels.cost_model.exact(left)
        price[unit] = sum((dense[cost] - rest[cost]) / bound for cost, bound in limits.bounds.items())
    comparator = pruner("taylor", budget, train=batches, batches=2)(network, channels, STEPS)
    found = comparator.score(network, limits)
    torch.testing.assert_close(found, importance / price, rtol=1e-4, atol=1e-9)


@pytest.mark.medium
def test_taylor_leaves_no_trace():
    network, x, y = built("small_resnet")
    channels = trace(network, x)
    network.bn1.eval()
    network.conv1.weight.grad = torch.ones_like(network.conv1.weight)
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    state = torch.get_rng_state()
    score = pruner("taylor", {"macs": 0.5}, train=[(x, y)], at=0.5)(network, channels, STEPS).score
    score(network, Controller(channels, {"macs": 0.5}, steps=1000))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert modes == [module.training for module in network.modules()]
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["conv1.weight"]


class Counting(nn.Module):
    """A network and a loss that put new tensors in the place of their buffers, as schedules do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args):
        self.calls = self.calls + 1
        return self.inner(*args)


def test_taylor_measures_by_the_loss_of_training():
    network, x, _ = built("small_resnet")
    network, y = Counting(network), torch.randn(8, 10)
    channels, loss = trace(network, x), Counting(nn.MSELoss())
    limits = Controller(channels, {"macs": 0.5}, steps=1000)
    found = pruner("taylor", {"macs": 0.5}, train=[(x, y)], loss=loss, at=0.5)(network, channels, STEPS).score
    score = found(network, limits)
    assert network.calls == loss.calls == 0
    gated = Gated(network, channels)
    gated.train()
    F.mse_loss(gated(x), y).backward()
    expected = gated.gate.grad.double().square()
    found = limits.importance / limits.importance.sum()
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-4, atol=1e-6)
    assert score.isfinite().all()


def test_fit_and_taylor_with_two_losses_are_refused():
    network, x, y = built("small_resnet")
    for mine, its in ((nn.CrossEntropyLoss(), None), (None, nn.CrossEntropyLoss())):
        prune = pruner("taylor", {"macs": 0.5}, train=[(x, y)], loss=its)
        with pytest.raises(ValueError, match=r"fit trains by .* and prune ranks units by .*: give both the same loss="):
            fit(network, [(x, y)], epochs=1, loss=mine, prune=prune)
    loss = nn.CrossEntropyLoss()
    fit(network, [(x, y)], epochs=1, loss=loss, prune=pruner("taylor", {"macs": 0.5}, train=[(x, y)], loss=loss))
    with pytest.raises(ValueError, match="loss= is given to random, which measures none"):
        pruner("random", {"macs": 0.5}, loss=loss)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_slimming_shrinks_scales_and_ranks_by_them(momentum):
    network, x, _ = built("depthwise")
    channels = trace(network, x)
    scales = {m: m.weight.detach().clone() for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    others = [p.clone() for p in network.parameters() if not any(p is m.weight for m in scales)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=momentum)
    shrink_scales(network, channels, optimizer, strength=0.2)
    for norm, before in scales.items():
        expected = before.sign() * (before.abs() - 0.02 / (1 - momentum)).clamp(min=0)
        torch.testing.assert_close(norm.weight.detach(), expected)
    assert all(map(torch.equal, others, [p for p in network.parameters() if not any(p is m.weight for m in scales)]))

    with torch.no_grad():
        for norm in scales:
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.1)
    comparator = pruner("slimming", {"macs": 0.6})(network, channels, STEPS)
    family = channels.families[0]
    of = [
        network.get_parameter(s.weight)[s.units.tolist().index(unit)]
        for unit in family.units
        for s in channels.sites
        if unit in s.units
    ]
    mean = torch.stack(of).view(len(family.units), -1).mean(1)
    torch.testing.assert_close(comparator.score(network, comparator.limits)[family.units], mean.detach())


def test_slimming_keeps_what_it_cannot_rank():
    network, x, _ = built("dense")
    channels = trace(network, x)
    comparator = pruner("slimming", {"macs": 0.8})(network, channels, STEPS)
    last = channels.layers[-2]  # the convolution without a norm
    assert comparator.open_units[last.out_units].all()


def test_small_is_the_uniform_network_with_weights_of_its_own():
    network, x, _ = built("small_resnet")
    channels = trace(network, x)
    with torch.no_grad():
        other = copy.deepcopy(network)
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    first, second = (pruner("small", {"macs": 0.4}, seed=1)(model, channels, STEPS) for model in (network, other))
    uniform = pruner("uniform_l1", {"macs": 0.4})(network, channels, STEPS)
    assert first.report()["widths"] == second.report()["widths"] == uniform.report()["widths"]
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))  # nothing of either model
    assert not torch.equal(first.model.conv1.weight, uniform.model.conv1.weight)
    assert first.model.bn1.running_var.eq(1).all()
    assert first.report()["largest_gate_removed"] is None
    fan_in = first.model.layer3[0].conv2.weight[0].numel()
    assert first.model.layer3[0].conv2.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", ["small_resnet", "resnet20", "dense", "depthwise"])
def test_small_takes_the_widths_of_another_network(name):
    network, x, _ = built(name)
    channels = trace(network, x)
    other = pruner("random", {"macs": 0.5}, seed=3)(copy.deepcopy(network), channels, STEPS)
    widths = other.report()["widths"]
    small = pruner("small", {"macs": 0.5}, widths=widths, seed=1)(network, channels, STEPS)
    assert small.report()["widths"] == widths
    assert small.report()["current"] == other.report()["current"]
    small(x)


def test_widths_that_no_network_has():
    network, x, _ = built("small_resnet")
    channels = trace(network, x)
    widths = channels.widths()
    first, second = "layer1.0.conv2", "conv1"  # both in the same stream
    for wrong, said in (
        ({**widths, first: widths[first] - 1}, rf"nearest found have .*({first}|{second}) "),
        ({**widths, first: 10**6}, "no units give these widths"),
        ({"other": 3, **widths}, "widths of other layers than the network's are given: other in one only"),
        (widths, r"over the budget: macs [\d,]+ > [\d,]+"),
    ):
        with pytest.raises(ValueError, match=said):
            pruner("small", {"macs": 0.5}, widths=wrong)(network, channels, STEPS)
    with pytest.raises(ValueError, match="widths are given to taylor, which finds its own; only small takes them"):
        pruner("taylor", {"macs": 0.5}, widths=widths)


def test_small_needs_modules_that_can_start_anew():
    network = nn.Sequential(nn.Conv2d(1, 4, 1))
    network.own = nn.Module()
    network.own.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"'own' \(Module\) needs a reset_parameters"):
        start_anew(network, 0)


@pytest.mark.medium
@pytest.mark.skipif(not HAS_PEER, reason="torch_pruning is not installed")
@pytest.mark.parametrize("name", ["small_resnet", *RECIPES])
def test_torch_pruning_is_what_its_own_pruner_makes(name, monkeypatch):
    """The same pruner, let loose on the model itself."""
    import torch_pruning as tp

    network, x, _ = built(name)
    channels = trace(network, x)
    ratios, plain = [], tp.pruner.GroupNormPruner

    def spy(*arguments, **options):
        ratios.append((arguments, options))
        return plain(*arguments, **options)

    monkeypatch.setattr(tp.pruner, "GroupNormPruner", spy)
    report = pruner("torch_pruning", {"macs": 0.6})(network, channels, STEPS).report()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (model, example), options in ratios:
            theirs = copy.deepcopy(model)
            modules = dict(zip(model.modules(), theirs.modules(), strict=True))
            options = options | {"ignored_layers": [modules[module] for module in options["ignored_layers"]]}
            plain(theirs, example, **options).step()
            found.append((counted(theirs, x), theirs))
    cost, theirs = max(
        (pair for pair in found if pair[0]["macs"] <= report["bounds"]["macs"]), key=lambda p: p[0]["macs"]
    )
    assert cost == report["current"]
    assert report["widths"] == {
        key: len(m.weight) for key, m in theirs.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }


def test_fixed_strength_says_where_it_came_by_itself(monkeypatch):
    monkeypatch.setattr(comparators, "REACH", 0.01)  # the loss's gradient hardly moves a gate
    weak, strong = (pruned("fixed_strength", "small_resnet", {"macs": 0.5}, strength=s)[0] for s in (0.0, 1e6))
    assert weak.cost_before_fill == weak.limits.dense
    assert weak.report()["cost_before_fill"] == weak.cost_before_fill
    assert weak.largest_gate_removed > 0  # cut, as nothing had closed
    assert strong.cost_before_fill == strong.limits.floor  # all but the best of each family
    assert strong.largest_gate_removed == 0
    assert [row["closed"] for row in strong.trajectory] == sorted(row["closed"] for row in strong.trajectory)


def test_gates_that_stay_are_multiplied_into_the_weights():
    network, x, y = built("depthwise")
    channels = trace(network, x)
    comparator = pruner("fixed_strength", {"macs": 0.5}, at=0.2, strength=0.0)(network, channels, 5)
    dense, gate = copy.deepcopy(network), torch.rand(channels.units) * 0.8 + 0.2
    comparator.gate = comparator.gated.gate.data = gate
    comparator.pushed = torch.zeros(channels.units, dtype=torch.bool)
    comparator._record = lambda: None
    F.cross_entropy(comparator(x), y).backward()
    comparator.step(torch.optim.SGD(network.parameters(), lr=0.0))
    assert comparator.frozen
    expected = close(dense, channels, comparator.open_units)
    expected.gate.data *= gate
    for twin, own in zip(dense.buffers(), network.buffers(), strict=True):
        twin.copy_(own)  # the forward pass has moved the running statistics
    torch.testing.assert_close(comparator.eval()(x), expected.eval()(x), rtol=1e-6, atol=1e-6)
    assert comparator.largest_gate_removed == gate[~comparator.open_units].max()


def test_momentum_comes_along():
    comparator, _ = pruned("uniform_l1", "small_resnet", {"macs": 0.5}, at=0.5, steps=2)
    network, x, y = comparator.model, *built("small_resnet")[1:]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    F.cross_entropy(comparator(x), y).backward()
    optimizer.step()
    before = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in network.named_parameters()}
    comparator.step(optimizer)
    for name, parameter in comparator.model.named_parameters():
        kept = before[name]
        for dim, index in enumerate(comparator.channels.kept(name, comparator.open_units)):
            kept = kept if index is None else kept.index_select(dim, index)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], kept)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magnitude", {}, "method='magnitude'; it must be one of uniform_l1, .*torch_pruning"),
        ("random", {"at": 1.0}, r"at=1.0; it must be a share of the run in \[0, 1\)"),
        ("fixed_strength", {}, "fixed_strength needs steps in which gates can close; give at > 0"),
        ("small", {"at": 0.2}, "small starts with fresh weights.*give at=0, not 0.2"),
    ],
)
def test_bad_options_are_refused_at_once(method, options, message):
    with pytest.raises(ValueError, match=message):
        pruner(method, {"macs": 0.5}, **options)


def test_a_library_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torch-pruning"):
        pruner("torch_pruning", {"macs": 0.5})


@pytest.mark.parametrize("method", ["random", "fixed_strength"])
def test_bad_budgets_are_refused_as_by_tailor(method):
    network, x, _ = built("small_resnet")
    channels = trace(network, x)
    with pytest.raises(BudgetError, match="below the floor: with 1 unit"):
        pruner(method, {"macs": 1000}, at=0.5)(network, channels, STEPS)
    with pytest.raises(BudgetError, match="unknown budget key"):
        pruner(method, {"mac": 0.5}, at=0.5)(network, channels, STEPS)
    with pytest.raises(ValueError, match="not the model that was traced"):
        pruner(method, {"macs": 0.5}, at=0.5)(nets.small_resnet(widths=(8, 8, 8)), channels, STEPS)


def test_misuse_in_a_loop_is_named():
    network, x, y = built("small_resnet")
    channels = trace(network, x)
    comparator = pruner("random", {"macs": 0.5}, at=0.5)(network, channels, STEPS)
    assert comparator.report()["current"] == comparator.report()["dense"]
    with pytest.raises(RuntimeError, match="made smaller after step 3"):
        comparator.finish()
    with pytest.raises(RuntimeError, match=r"step\(optimizer\)"):
        comparator.step()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="no gradient of the gates"):
        pruner("fixed_strength", {"macs": 0.5}, at=0.5)(network, channels, STEPS).step(optimizer)
    with pytest.raises(ValueError, match="no step before it prunes"):
        pruner("fixed_strength", {"macs": 0.5}, at=0.01)(network, channels, STEPS)
    with pytest.raises(ValueError, match="give training images as train"):
        pruner("taylor", {"macs": 0.5})(network, channels, STEPS)
    with torch.no_grad():
        network.conv1.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not a number"):
        pruner("global_l1", {"macs": 0.5})(network, channels, STEPS)
