"""Tailoring inside training loops: the budget is met and used, and removing units mid-run changes nothing."""

import copy
import dataclasses
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import some_of
from random_nets import CLASSES, INPUT_SHAPE, RandomNet
from torch import nn
from zoo import counted

from tcp_core import RemovalError, Report, Tailor, close, evaluate, nets, trace
from tcp_core.datasets import sources
from tcp_core.maturity import PHASE_TRAINED
from tcp_core.removal import take

STEPS = 96  # about the fewest with the phase of a trained network; the set is frozen at about step 14
RECIPES = {
    "chain": [("conv", {"width": 12}), ("conv", {"width": 16, "stride": 2}), ("conv", {"width": 12, "norm": "none"})],
    "depthwise": [("conv", {"width": 12}), ("inverted", {"expand": 3}), ("depthwise", {}), ("conv", {"width": 16})],
    "dense": [("conv", {"width": 8}), ("dense", {"growth": 6, "layers": 3}), ("conv", {"width": 12})],
    "tied": [("conv", {"width": 12}), ("twice", {"kind": "weight"}), ("conv", {"width": 16})],
    "attention": [("conv", {"width": 12}), ("squeezeexcite", {"width": 6}), ("conv", {"width": 16})],
}


@functools.cache
def digits():
    return next(iter(sources.digits().train.batches(32, shuffle=True)))


def built(name, seed=0):
    """(network, x, y): a fresh network and one batch for it."""
    torch.manual_seed(seed)
    if name == "small_resnet":
        return nets.small_resnet(widths=(8, 12, 16)), *digits()
    if name == "resnet20":
        return nets.resnet(20), torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    x = torch.randn(16, *INPUT_SHAPE[1:], dtype=torch.float64)
    return RandomNet(RECIPES[name], seed=seed), x, torch.randint(CLASSES, (16,))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def tailored(name, budget, **options):
    network, x, y = built(name)
    return Tailor(network, x, budget=budget, steps=STEPS, **{"phase": PHASE_TRAINED} | options), x, y


def train(tailor, optimizer, x, y, *, steps, shrink=True):
    """A user's loop, `steps` long; gives the losses."""
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(tailor(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tailor.step(optimizer, shrink=shrink)
        losses.append(loss.item())
    return losses


def train_until_frozen(tailor, optimizer, x, y, **options):
    steps = 0
    while not tailor.frozen:
        train(tailor, optimizer, x, y, steps=1, **options)
        steps += 1
        assert steps <= STEPS
    return steps


# -------------------------------------------------------------------------------------------------
# The budget


KINDS = ["macs", "params", "macs+params"]


@pytest.mark.parametrize(
    ("name", "share", "kinds"),
    some_of(["small_resnet", *RECIPES, "resnet20"], [0.8, 0.6, 0.4, 0.2], KINDS, step=5, medium=5),
)
def test_the_budget_is_met_and_used(name, share, kinds):
    kinds = kinds.split("+")
    tailor, x, y = tailored(name, dict.fromkeys(kinds, share))
    optimizer = sgd(tailor.model.parameters())
    train_until_frozen(tailor, optimizer, x, y)
    train(tailor, optimizer, x, y, steps=2)
    small, report, channels = tailor.finish(), tailor.report(), tailor.channels

    assert counted(small, x) == report["current"]
    assert report["current"] == channels.cost(tailor.open_units)
    assert report["largest_gate_removed"] == 0
    assert ((tailor.controller.gate == 0) | (tailor.controller.gate == 1)).all()
    bounds = {kind: math.floor(share * report["dense"][kind]) for kind in kinds}
    used = {kind: report["current"][kind] / bounds[kind] for kind in kinds}
    assert report["utilisation"] == used
    assert max(used.values()) <= 1
    if max(used.values()) < 0.99:
        # Then every closed unit costs more than what is left: more than one hundredth of some budget.
        for unit in (~tailor.open_units).nonzero():
            more = tailor.open_units
            more[unit] = True
            cost = channels.cost(more)
            assert any(cost[kind] > bounds[kind] for kind in kinds)


@pytest.mark.medium
def test_several_ways_to_write_a_budget_end_in_the_same_network():
    found = []
    for budget in ({"macs": 0.5}, {"macs": "50%"}, {"flops": 0.5}, {"macs": trace_cost("chain")["macs"] // 2}):
        tailor, x, y = tailored("chain", budget)
        train_until_frozen(tailor, sgd(tailor.model.parameters()), x, y)
        found.append(tailor.open_units)
    assert all(torch.equal(found[0], other) for other in found[1:])


def trace_cost(name):
    network, x, _ = built(name)
    return trace(network, x).cost()


@pytest.mark.parametrize("name", ["small_resnet", "chain", "depthwise"])
def test_min_width_and_ignore_are_respected(name):
    tailor, x, y = tailored(
        name, {"macs": 0.5}, min_width=4, ignore="layer1.0.conv1" if name == "small_resnet" else "body.0.conv"
    )
    ignored = ~tailor.channels.prunable
    assert 0 < ignored.sum() < tailor.channels.units
    train_until_frozen(tailor, sgd(tailor.model.parameters()), x, y)
    assert tailor.open_units[ignored].all()
    for family in tailor.channels.families:
        assert tailor.open_units[family.units].sum() >= min(4, len(family.units))


@pytest.mark.medium
def test_finish_gives_a_plain_network_of_the_same_kind():
    tailor, x, y = tailored("small_resnet", {"macs": 0.5})
    network = tailor.model
    train_until_frozen(tailor, sgd(network.parameters()), x, y, shrink=False)
    assert tailor.model is network  # dense until finish
    with torch.no_grad():
        expected = close(network, tailor.channels, tailor.open_units).eval()(x)
    small = tailor.finish()
    assert small is tailor.finish() is network
    dense = built("small_resnet")[0]
    assert [*map(type, small.modules())] == [*map(type, dense.modules())]
    assert list(small.state_dict()) == list(dense.state_dict())
    assert all(p.requires_grad for p in small.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), expected)
    widths = {name: len(m.weight) for name, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert tailor.report()["widths"] == widths


def test_finish_compares_the_networks():
    tailor, x, y = tailored("chain", {"macs": 0.5})
    train_until_frozen(tailor, sgd(tailor.model.parameters()), x, y, shrink=False)
    out, inputs, *rest = tailor.channels.slots["body.1.conv.weight"]
    slots = {**tailor.channels.slots, "body.1.conv.weight": (out, inputs.flip(0), *rest)}  # others than were closed
    tailor.channels = dataclasses.replace(tailor.channels, slots=slots)
    with pytest.raises(RemovalError, match=r"differ by .* of the largest output"):
        tailor.finish()


@pytest.mark.medium
def test_the_report_says_where_the_run_stands():
    tailor, x, y = tailored("small_resnet", {"macs": 0.5, "params": "60%"})
    optimizer = sgd(tailor.model.parameters())
    before = tailor.report()
    assert isinstance(before, Report)
    assert isinstance(before, dict)
    assert before["requested"] == {"macs": 0.5, "params": "60%"}
    assert before["current"] == before["dense"] == counted(tailor.model, x)
    assert before["bounds"] == {"macs": before["dense"]["macs"] // 2, "params": int(0.6 * before["dense"]["params"])}
    assert not before["frozen"]
    assert before["strength"] > 0
    assert before["largest_gate_removed"] is None
    steps = train_until_frozen(tailor, optimizer, x, y)
    after = tailor.report()
    assert (after["step"], after["steps"], after["frozen"], after["strength"]) == (steps, STEPS, True, 0)
    assert after["refused_steps"] == 0
    for text in ("macs", "params", f"{after['current']['macs']:,}", f"frozen at step {steps} of {STEPS}"):
        assert text in repr(after)


# -------------------------------------------------------------------------------------------------
# Removing units in the middle of a run

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=1e-3),
}


@pytest.mark.medium
@pytest.mark.parametrize(("name", "kind"), some_of(["chain", "depthwise", "dense", "tied"], OPTIMIZERS, step=4))
def test_shrinking_mid_run_is_no_jump(name, kind):
    """Run A goes on in the smaller network, run B in the gated dense one: the same losses, weights and moments."""
    runs = []
    for shrink in (True, False):
        tailor, x, y = tailored(name, {"macs": 0.4})
        optimizer = OPTIMIZERS[kind](tailor.model.parameters())
        losses = train(tailor, optimizer, x, y, steps=30, shrink=shrink)
        assert tailor.frozen
        assert tailor.shrunk == shrink
        runs.append((losses, tailor, optimizer))
    (losses_a, a, optimizer_a), (losses_b, b, optimizer_b) = runs
    torch.testing.assert_close(torch.tensor(losses_a), torch.tensor(losses_b), rtol=1e-9, atol=0)
    assert torch.equal(a.open_units, b.open_units)
    assert losses_a[-1] < losses_a[15]

    dense = dict(b.model.named_parameters())
    assert [id(p) for p in a.model.parameters()] == [
        id(p) for group in optimizer_a.param_groups for p in group["params"]
    ]
    for key, parameter in a.model.named_parameters():
        kept = a.channels.kept(key, a.open_units)
        torch.testing.assert_close(parameter, take(dense[key], kept), rtol=1e-7, atol=1e-9)
        state_a, state_b = optimizer_a.state[parameter], optimizer_b.state[dense[key]]
        assert state_a.keys() == state_b.keys() != set()
        for moment, value in state_a.items():
            expected = state_b[moment]
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.shape == parameter.shape
                expected = take(expected, kept)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    small = b.finish(optimizer_b)
    for key, value in a.model.state_dict().items():
        torch.testing.assert_close(value, small.state_dict()[key], rtol=1e-7, atol=1e-9)
    assert [id(p) for p in small.parameters()] == [id(p) for group in optimizer_b.param_groups for p in group["params"]]


def test_schedulers_and_parameter_groups_survive_shrinking():
    tailor, x, y = tailored("chain", {"macs": 0.5})
    weights = [p for p in tailor.model.parameters() if p.ndim > 1]
    others = [p for p in tailor.model.parameters() if p.ndim <= 1]
    size = weights[0].numel()
    optimizer = torch.optim.SGD([{"params": weights, "lr": 0.02}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(20):
        train(tailor, optimizer, x, y, steps=1)
        schedule.step()
    assert tailor.shrunk
    first, second = optimizer.param_groups
    assert first["lr"] == pytest.approx(0.02 * 0.9**20)
    assert {id(p) for p in first["params"]} == {id(p) for p in tailor.model.parameters() if p.ndim > 1}
    assert {id(p) for p in second["params"]} == {id(p) for p in tailor.model.parameters() if p.ndim <= 1}
    assert first["params"][0] is weights[0]
    assert weights[0].numel() < size


def test_gates_can_be_moved_before_the_optimizer_steps():
    tailor, x, y = tailored("chain", {"macs": 0.5})
    optimizer = sgd(tailor.parameters())
    for _ in range(20):
        before = [p.detach().clone() for p in tailor.model.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(tailor(x), y).backward()
        tailor.step(optimizer)  # at the freeze the gradients have to come along
        optimizer.step()
        after = list(tailor.model.parameters())
        assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert counted(tailor.finish(), x) == tailor.report()["current"]


# -------------------------------------------------------------------------------------------------
# Loops of other shapes


def history(tailor):
    """What a run did, for comparison: every re-ranking, gates and weights."""
    return (
        str(tailor.controller.trajectory),
        tailor.controller.gate.tolist(),
        {name: value.tolist() for name, value in tailor.finish().state_dict().items()},
    )


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("shrink", [True, False])
def test_an_optimizer_that_holds_the_gates_cannot_move_them(kind, shrink):
    runs = []
    for everything in (True, False):
        tailor, x, y = tailored("chain", {"macs": 0.5})
        optimizer = OPTIMIZERS[kind](tailor.parameters() if everything else tailor.model.parameters())
        for _ in range(25):
            train(tailor, optimizer, x, y, steps=1, shrink=shrink)
            assert torch.equal(tailor.gate, tailor.controller.gate)
        runs.append(history(tailor))
    assert runs[0] == runs[1]


@pytest.mark.medium
def test_validation_in_between_changes_nothing():
    runs = []
    for validate in (True, False):
        tailor, x, y = tailored("small_resnet", {"macs": 0.5})
        optimizer = sgd(tailor.model.parameters())
        for _ in range(20):
            train(tailor, optimizer, x, y, steps=1)
            if validate:
                tailor.eval()
                assert not tailor.model.training
                with torch.no_grad():
                    tailor(x)
                tailor.train()
                evaluate(tailor, [(x, y)])
                assert all(module.training for module in tailor.modules())
        runs.append(history(tailor))
    assert runs[0] == runs[1]


def test_evaluation_mode_survives_shrinking():
    tailor, x, y = tailored("chain", {"macs": 0.5})
    norms = [name for name, module in tailor.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    tailor.model.get_submodule(norms[0]).eval()  # a frozen batch norm
    train_until_frozen(tailor, sgd(tailor.model.parameters()), x, y)
    modes = {name: module.training for name, module in tailor.finish().named_modules()}
    assert [name for name in modes if not modes[name]] == norms[:1]


@pytest.mark.medium
def test_accumulated_gradients_are_one_step():
    tailor, x, y = tailored("small_resnet", {"macs": 0.5})
    optimizer = sgd(tailor.model.parameters())
    updates = []
    update = tailor.controller.update
    tailor.controller.update = lambda gradient: (updates.append(gradient.clone()), update(gradient))
    for step in range(20):
        optimizer.zero_grad()
        parts = []
        for half, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            loss = F.cross_entropy(tailor(half), labels)
            if not tailor.frozen:
                parts.append(torch.autograd.grad(loss, tailor.gate, retain_graph=True)[0])
            loss.backward()
        optimizer.step()
        frozen = tailor.frozen
        tailor.step(optimizer)
        if not frozen:
            assert tailor.controller.step_count == step + 1
            torch.testing.assert_close(updates[-1], parts[0] + parts[1])
    assert tailor.shrunk


@pytest.mark.medium
@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
def test_loss_scaling_gives_the_same_run(scale):
    runs = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=scale), torch.amp.GradScaler("cpu", enabled=False)):
        tailor, x, y = tailored("small_resnet", {"macs": 0.5})
        optimizer = sgd(tailor.model.parameters())
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(tailor(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            tailor.step(optimizer)
        runs.append(history(tailor))
    assert runs[0] == runs[1]


def test_steps_whose_scaled_loss_overflows_are_skipped():
    tailor, x, y = tailored("small_resnet", {"macs": 0.5})
    optimizer = sgd(tailor.model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=torch.finfo(torch.float32).max, backoff_factor=2.0**-118)

    def train_scaled():
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(10 * F.cross_entropy(tailor(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            tailor.step(optimizer)

    with pytest.warns(RuntimeWarning, match="1 step.* not finite and were refused"):
        train_scaled()
    assert tailor.report()["refused_steps"] == 1
    assert tailor.shrunk
    assert all(value.isfinite().all() for value in tailor.finish().state_dict().values())


def test_hooks_of_the_model_still_fire():
    tailor, x, y = tailored("small_resnet", {"macs": 0.5})
    network = tailor.model
    fired = []
    network.register_forward_hook(lambda *_: fired.append("model"))
    network.layer2[0].conv1.register_forward_pre_hook(lambda *_: fired.append("before"))
    network.layer2[0].conv1.register_forward_hook(lambda *_: fired.append("after"))
    network.layer3.register_full_backward_hook(lambda *_: fired.append("backward"))
    tailor.register_forward_hook(lambda *_: fired.append("tailor"))
    optimizer = sgd(network.parameters())
    for _ in range(20):
        fired.clear()
        train(tailor, optimizer, x, y, steps=1, shrink=False)
        assert fired == ["before", "after", "model", "tailor", "backward"]
    fired.clear()
    small = tailor.finish()
    fired.clear()  # verification runs the networks too
    F.cross_entropy(small(x), y).backward()
    assert fired == ["before", "after", "model", "backward"]


def test_a_model_of_many_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 8, 3), nn.Conv2d(3, 8, 3)
            self.mix, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, gray, *, colour):
            hidden = self.mix(F.relu(self.left(gray) + self.right(colour)))
            return {"classes": self.head(hidden.mean((2, 3))), "map": hidden.mean((1, 2, 3))}

    inputs = {"gray": torch.randn(4, 1, 8, 8), "colour": torch.randn(4, 3, 8, 8)}
    tailor = Tailor(Two(), inputs, budget={"params": 0.5}, steps=STEPS)
    optimizer = sgd(tailor.model.parameters())
    while not tailor.frozen:
        out = tailor(inputs["gray"], colour=inputs["colour"])
        optimizer.zero_grad()
        (out["classes"].square().mean() + out["map"].square().mean()).backward()
        optimizer.step()
        tailor.step(optimizer)
    small = tailor.finish()
    assert sum(p.numel() for p in small.parameters()) == tailor.report()["current"]["params"]
    assert small(**inputs)["classes"].shape == (4, 4)


@pytest.mark.medium
def test_two_runs_of_the_same_seed_are_the_same():
    runs = []
    for _ in range(2):
        tailor, x, y = tailored("small_resnet", {"macs": 0.5})
        train(tailor, sgd(tailor.model.parameters()), x, y, steps=20)
        runs.append(history(tailor))
    assert runs[0] == runs[1]


def test_tailoring_is_silent_and_leaves_global_state_alone():
    tailor, x, y = tailored("small_resnet", {"macs": 0.5})
    optimizer = sgd(tailor.model.parameters())
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_until_frozen(tailor, optimizer, x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


@pytest.mark.medium
def test_a_network_can_be_tailored_again():
    tailor, x, y = tailored("small_resnet", {"macs": 0.6})
    train_until_frozen(tailor, sgd(tailor.model.parameters()), x, y)
    first = tailor.finish()
    before = copy.deepcopy(first.state_dict())
    again = Tailor(first, x, budget={"macs": 0.5}, steps=STEPS)
    assert again.report()["dense"] == tailor.report()["current"]
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    train_until_frozen(again, sgd(first.parameters()), x, y)
    assert counted(again.finish(), x)["macs"] <= again.report()["bounds"]["macs"]


class Detector(nn.Module):
    """What detectors are like: lists of images and targets in, losses out in training, and features by name within."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleDict({"near": nn.Conv2d(12, 4, 1), "far": nn.Conv2d(16, 4, 1)})

    def forward(self, images, targets=None):
        features = self.backbone(torch.stack(images))
        boxes = torch.cat([self.heads[name](maps).flatten(2) for name, maps in features.items()], 2).mean(2)
        if not self.training:
            return [{"boxes": each} for each in boxes]
        return {"regression": F.mse_loss(boxes, torch.stack([target["boxes"] for target in targets]))}


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        stages = {"stem": 3, "near": 24, "far": 24}
        self.body = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(width, 24, 3, padding=1), nn.BatchNorm2d(24))
                for name, width in stages.items()
            }
        )
        self.near, self.far = nn.Conv2d(24, 12, 1), nn.Conv2d(24, 16, 1)

    def forward(self, x):
        near = self.body["near"](F.relu(self.body["stem"](x))).relu()
        return {"near": self.near(near), "far": self.far(self.body["far"](F.max_pool2d(near, 2)).relu())}


@pytest.mark.medium
def test_a_part_of_a_larger_model_is_tailored_in_its_place():
    torch.manual_seed(0)
    detector = Detector()
    images = list(torch.randn(4, 3, 8, 8))
    targets = [{"boxes": torch.randn(4)} for _ in images]
    backbone = detector.backbone
    optimizer = sgd(detector.parameters())
    detector.backbone = tailor = Tailor(backbone, torch.stack(images), budget={"macs": 0.5}, steps=STEPS)
    losses = []
    for _ in range(STEPS):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tailor.step()
        losses.append(loss.item())
    detector.backbone = tailor.finish()
    assert detector.backbone is backbone
    assert losses[-1] < losses[0]
    small = counted(detector.backbone, torch.stack(images))
    assert small["macs"] <= 0.5 * tailor.report()["dense"]["macs"]
    assert {name: maps.shape[1] for name, maps in backbone(torch.stack(images)).items()} == {"near": 12, "far": 16}
    assert len(detector.eval()(images)) == 4
