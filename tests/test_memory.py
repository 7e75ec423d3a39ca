"""Bytes of activations and weights, against what is alive and stored while the really removed network runs."""

import copy

import pytest
import torch
import torchvision
from cases import searched, slow
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from random_nets import INPUT_SHAPE, networks
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import build, image_size, random_open

import tcp_core as tcp
from tcp_core.selection import fill
from tcp_core.training.checkpoints import CheckpointError


class Alive(TorchDispatchMode):
    """Sums, after each operator, the storages that are alive and no weights."""

    def __init__(self, model, x, size=None):
        super().__init__()
        self.weights = [StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())]
        self.size = size or (lambda tensor: tensor.untyped_storage().nbytes())
        self.alive, self.peak = {}, 0
        self.see(x)

    def see(self, tensor):
        key = StorageWeakRef(tensor.untyped_storage())
        if key not in self.weights:
            self.alive.setdefault(key, self.size(tensor))
        self.alive = {key: size for key, size in self.alive.items() if not key.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out


def measured(model, x, size=None):
    model = model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # as in a trace: training does not take it
    try:
        with torch.no_grad(), Alive(model, x, size) as mode:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    stored = sum(t.numel() * t.element_size() for t in {**dict(model.named_parameters()), **buffers(model)}.values())
    return {"memory": mode.peak, "weights": stored}


def buffers(model):
    return dict(model.named_buffers())


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"),
        *slow("mobilenet_v2", "regnet_y_400mf", "densenet121", "googlenet", "efficientnet_b0", "swin_t"),
    ],
)
def test_bytes_are_those_of_the_removed_network(name):
    model, size = build(name), image_size(name)
    x = torch.randn(1, 3, size, size)
    channels = tcp.trace(model, x)
    assert channels.bytes() == measured(model, x)
    for seed, share in enumerate((0.2, 0.5, 0.9)):
        open_units = random_open(channels, share, seed)
        small = tcp.remove(model, channels, open_units, verify=False)
        assert channels.bytes(open_units) == measured(small, x)


@searched(
    8,
    25,
    settings(deadline=None, database=None, suppress_health_check=list(HealthCheck)),
    network=networks(odd=False),
    seed=st.integers(0, 9),
)
def test_bytes_of_random_networks(network, seed):
    x = torch.randn(INPUT_SHAPE, dtype=torch.float64)
    channels = tcp.trace(network, x)
    open_units = random_open(channels, seed / 10, seed)
    small = tcp.remove(network, channels, open_units, verify=False)
    assert channels.bytes(open_units) == measured(small, x[:1].clone())


@pytest.fixture(scope="module")
def resnet():
    model = torchvision.models.resnet18(num_classes=10)
    return model, tcp.trace(model, torch.randn(1, 3, 64, 64))


@pytest.mark.medium
def test_what_a_unit_moves_the_peak_by_is_the_difference(resnet):
    _, channels = resnet
    cost = channels.activations
    for seed in range(3):
        open_units = random_open(channels, 0.5, seed)
        found = cost.marginal(open_units)["memory"]
        for unit in torch.randperm(channels.units, generator=torch.Generator().manual_seed(seed))[:20].tolist():
            other = open_units.clone()
            other[unit] = ~other[unit]
            change = cost.exact(other)["memory"] - cost.exact(open_units)["memory"]
            assert float(found[unit]) == (-change if open_units[unit] else change)


def test_batch_and_precision(resnet):
    model, channels = resnet
    assert channels.bytes(batch=4)["memory"] == measured(model, torch.randn(4, 3, 64, 64))["memory"]

    def as_int8(tensor):
        nbytes = tensor.untyped_storage().nbytes()
        return nbytes // tensor.element_size() if tensor.is_floating_point() else nbytes

    small = channels.bytes(precision="int8")
    assert small["memory"] == measured(model, torch.randn(1, 3, 64, 64), as_int8)["memory"]
    assert small["weights"] == sum(as_int8(tensor) for tensor in model.state_dict().values())
    half = copy.deepcopy(model).half()
    assert channels.bytes(precision="fp16")["weights"] == sum(
        t.untyped_storage().nbytes() for t in half.state_dict().values()
    )


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_a_memory_budget_is_filled(resnet, share):
    _, channels = resnet
    bounds = {"memory": share * channels.bytes()["memory"]}
    price = channels.activations.price(bounds)["memory"]
    score = torch.rand(channels.units, generator=torch.Generator().manual_seed(0)) / price.clamp(min=1e-12)
    winning = fill(channels, score, bounds, cost=channels.activations)
    found = channels.bytes(winning)["memory"]
    assert 0.97 * bounds["memory"] <= found <= bounds["memory"]
    more = channels.activations.marginal(winning)["memory"][~winning]
    assert (found + more > bounds["memory"]).all()  # nothing that is left out would fit


class Digits(nn.Sequential):
    def __init__(self):
        width = 32
        super().__init__(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)),
        )


@pytest.mark.medium
@pytest.mark.parametrize(
    "budget",
    [
        {"memory": 0.5},
        {"memory": "9 kB"},
        {"weights": "20 kB", "macs": 0.6},
        {"memory": 0.6, "weights": "50%", "macs": 0.5, "params": 0.5},
        {"weights": "6 kB", "memory": "3 kB", "precision": "int8"},
        {"memory": "25 kB", "batch": 2},
    ],
)
def test_a_run_ends_within_bytes(budget):
    torch.manual_seed(0)
    model, x, y = Digits(), torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,))
    dense = copy.deepcopy(model)
    tailor = tcp.Tailor(model, x[:1], budget=budget, steps=60, phase=(0.0, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(tailor(x), y).backward()
        optimizer.step()
        tailor.step()
    small = tailor.finish()
    report = tailor.report()
    assert set(report["bounds"]) == set(budget) - {"precision", "batch"}
    open_units = tailor.open_units
    extra = tailor.controller.cost_model.marginal(open_units)
    more = [report["current"][name] + extra[name][~open_units] > bound for name, bound in report["bounds"].items()]
    assert max(report["utilisation"].values()) <= 1
    assert torch.stack(more).any(0).all()  # nothing that is left out would fit
    if "precision" not in budget:
        batch = budget.get("batch", 1)
        found = measured(small, x[:batch].clone())
        for name in found.keys() & report["bounds"].keys():
            assert report["current"][name] == found[name] <= report["bounds"][name]
            assert report["dense"][name] == measured(dense, x[:batch].clone())[name]
    assert "memory" not in budget or "B" in repr(report)


def test_impossible_bytes_are_refused_with_what_is_possible():
    with pytest.raises(tcp.BudgetError, match=r"memory budget of 100 B .* below the floor.* Give memory >= \d+ B,"):
        tcp.Tailor(Digits(), torch.randn(1, 1, 8, 8), budget={"memory": "100 B"}, steps=100)
    with pytest.raises(tcp.BudgetError, match=r"weights budget of 50 B .* Give weights >= \d+ B,"):
        tcp.Tailor(Digits(), torch.randn(1, 1, 8, 8), budget={"weights": 50}, steps=100)


@pytest.mark.medium
@pytest.mark.parametrize("ignore", ["layer1", ["layer1.*", "layer2.*"], ["*"]])
def test_what_is_to_be_kept_costs_no_memory(ignore):
    model, x = torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    channels = tcp.trace(model, x, ignore=ignore)
    assert channels.bytes() == tcp.trace(model, x).bytes() == measured(model, x[:1].clone())


def test_statistics_of_group_norms_leave_with_their_groups():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(16, 32), nn.ReLU(), nn.Conv2d(32, 4, 1))
    channels = tcp.trace(model, torch.randn(2, 3, 2, 2))  # small, so that sixteen means and deviations count
    for seed in range(5):
        open_units = random_open(channels, 0.5, seed)
        small = tcp.remove(model, channels, open_units)
        assert channels.bytes(open_units) == measured(small, torch.randn(1, 3, 2, 2))


@pytest.mark.filterwarnings("ignore:the network is within the budget")
@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"memory": "9 kB", "precision": "fp16"}, {"memory": "9 kB"}),
        ({"memory": "25 kB"}, {"memory": "25 kB", "batch": 2}),
        ({"weights": "10 kB", "precision": "int8"}, {"weights": "10 kB", "precision": "fp16"}),
    ],
)
def test_bytes_that_are_counted_otherwise_are_another_run(then, now, tmp_path):
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,))

    def tailor(budget):
        return tcp.Tailor(Digits(), x[:1], budget=budget, steps=60, phase=(0.0, 1.0))

    def fit(budget, **options):
        checkpoints = {"checkpoints": tmp_path, "checkpoint_every": 5}
        tcp.fit(Digits(), [(x, y)] * 60, budget=budget, epochs=1, **checkpoints, **options)

    def stop(step, steps):
        if step == 6:
            raise InterruptedError

    state = tailor(then).state_dict()
    tailor(then).load_state_dict(state)
    with pytest.raises(ValueError, match=r"this state is of another run: bytes_at is not the same \(.* there, .* here"):
        tailor(now).load_state_dict(state)
    with pytest.raises(InterruptedError):
        fit(then, on_step=stop)
    with pytest.raises(CheckpointError, match=r"checkpoints of another run: bytes_at\.\w+: \S+ then, \S+ now\."):
        fit(now)


def test_states_that_do_not_say_how_bytes_are_counted_are_taken():
    tailor = tcp.Tailor(Digits(), torch.randn(1, 1, 8, 8), budget={"memory": 0.5}, steps=60)
    state = tailor.state_dict()
    state["_extra_state"] = tailor.progress()
    del state["_extra_state"]["run"]["bytes_at"]
    tailor.load_state_dict(state)
