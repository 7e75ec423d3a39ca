"""The losing set against brute force on small networks, and what the gates do under made-up gradients."""

import copy
import functools
import io
import itertools
import math
import warnings

import pytest
import torch
from cases import searched, some_of
from hypothesis import example
from hypothesis import strategies as st
from random_nets import INPUT_SHAPE, RandomNet
from torch import nn

from tcp_core import Controller, nets, selection, trace
from tcp_core.controller import KEEP, fill, required_units, tighten
from tcp_core.maturity import PHASE_FRESH, PHASE_TRAINED, phase_of
from tcp_core.training import frames

CONV4 = ("conv", {"width": 4})
RECIPES = {  # at most ten units, so that all subsets can be tried
    "chain": [("conv", {"width": 3}), CONV4, ("conv", {"width": 3})],
    "residual": [CONV4, ("residual", {"inner": [("conv", {"width": 3}), CONV4]})],
    "depthwise": [CONV4, ("depthwise", {}), ("conv", {"width": 5})],
    "grouped": [CONV4, ("conv", {"width": 6, "groups": 2}), ("conv", {"width": 5})],
    "dense": [CONV4, ("dense", {"growth": 3, "layers": 2})],
    "shuffled": [CONV4, ("shuffle", {"groups": 2}), ("conv", {"width": 6, "kernel": 1})],
    "partly frozen": [CONV4, ("mystery", {}), ("conv", {"width": 6})],
}


@functools.cache
def traced(name, ignore=()):
    return trace(RandomNet(RECIPES[name]), torch.randn(INPUT_SHAPE, dtype=torch.float64), ignore=ignore)


@functools.cache
def single_family(units=8):
    """One hidden layer: all units cost the same."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, units, 3), torch.nn.ReLU(), torch.nn.Conv2d(units, 4, 3))
    return trace(net, torch.randn(2, 1, 6, 6))


names = st.sampled_from(sorted(RECIPES))
widths = st.integers(1, 3)
KINDS = [("macs",), ("params",), ("macs", "params")]


def bounds_between(channels, min_width, shares):
    """Bounds at the given shares of the way from the floor to the dense cost."""
    low = channels.cost_model.exact(required_units(channels, min_width))
    high = channels.cost()
    return {name: low[name] + share * (high[name] - low[name]) for name, share in shares.items()}


@st.composite
def problems(draw):
    """(name, score, bounds, min_width); many scores are equal."""
    name = draw(names)
    channels = traced(name)
    min_width = draw(widths)
    kinds = draw(st.sampled_from(KINDS))
    shares = {kind: draw(st.floats(0, 1)) for kind in kinds}
    score = draw(st.lists(st.floats(0, 4) | st.integers(0, 2), min_size=channels.units, max_size=channels.units))
    return name, torch.tensor(score), bounds_between(channels, min_width, shares), min_width


def within(channels, open_units, bounds):
    cost = channels.cost_model.exact(open_units)
    return all(cost[name] <= bound for name, bound in bounds.items())


def left_out_that_fits(channels, open_units, bounds):
    fitting = []
    for unit in (~open_units).nonzero().flatten().tolist():
        more = open_units.clone()
        more[unit] = True
        if within(channels, more, bounds):
            fitting.append(unit)
    return fitting


def utilisation(channels, open_units, bounds):
    cost = channels.cost_model.exact(open_units)
    return max(cost[name] / bound for name, bound in bounds.items())


def assert_allowed(channels, open_units, min_width):
    assert open_units[~channels.prunable].all()
    for family in channels.families:
        assert open_units[family.units].sum() >= min(min_width, len(family.units))


# -------------------------------------------------------------------------------------------------
# The losing set


@pytest.mark.medium
@pytest.mark.parametrize(("name", "min_width"), some_of(sorted(RECIPES), [1, 2, 3], step=2))
def test_the_floor_is_the_cheapest_allowed_network(name, min_width):
    channels = traced(name)
    required = required_units(channels, min_width)
    assert_allowed(channels, required, min_width)
    cheapest = {"macs": math.inf, "params": math.inf}
    for mask in itertools.product([False, True], repeat=channels.units):
        open_units = torch.tensor(mask)
        try:
            assert_allowed(channels, open_units, min_width)
        except AssertionError:
            continue
        cheapest = {key: min(cheapest[key], value) for key, value in channels.cost_model.exact(open_units).items()}
    assert channels.cost(required) == cheapest


@searched(60, 300, problem=problems())
def test_fill_is_greedy_and_leaves_nothing_that_fits(problem):
    name, score, bounds, min_width = problem
    channels = traced(name)
    winning = fill(channels, score, bounds, min_width)
    assert within(channels, winning, bounds)
    assert_allowed(channels, winning, min_width)
    assert not left_out_that_fits(channels, winning, bounds)

    # The same, one unit at a time.
    rank = score.double().where(channels.prunable, torch.inf).tolist()
    order = sorted(range(channels.units), key=lambda unit: -rank[unit])
    expected = ~channels.prunable
    for family in channels.families:
        best = [unit for unit in order if unit in family.units.tolist()]
        expected[best[:min_width]] = True
    for unit in order:
        more = expected.clone()
        more[unit] = True
        if within(channels, more, bounds):
            expected = more
    assert torch.equal(winning, expected)


def in_multiples(problem, multiple):
    """Return the channels of a problem, its score, bounds that the smallest network of such widths meets, and the
    rest.
    """
    name, score, bounds, min_width = problem
    channels = traced(name)
    floor = channels.cost(required_units(channels, min_width, multiple))
    return channels, score, {key: max(bound, floor[key]) for key, bound in bounds.items()}, min_width


def assert_multiples(channels, winning, multiple):
    for family in channels.families:
        width = int(winning[family.units].sum())
        block = family.block(multiple)  # of units; fewer than the multiple where each is several channels
        assert width % block == 0 or width == len(family.units), family


@searched(60, 300, problem=problems(), multiple=st.sampled_from([2, 3, 8]))
@example(problem=("grouped", torch.zeros(7), {"macs": 25508}, 1), multiple=2)  # room for the fifth unit alone
def test_fill_in_multiples_leaves_no_block_that_fits(problem, multiple):
    channels, score, bounds, min_width = in_multiples(problem, multiple)
    winning = fill(channels, score, bounds, min_width, multiple)
    assert within(channels, winning, bounds)
    assert_allowed(channels, winning, min_width)
    assert_multiples(channels, winning, multiple)
    for family in channels.families:
        inside, block = score[family.units][winning[family.units]], family.block(multiple)
        outside = family.units[~winning[family.units]]
        if channels.prunable[family.units].all() and len(outside):
            assert inside.min() >= score[outside].max()
        best = outside[score[outside].argsort(descending=True, stable=True)][:block]
        more = winning.index_fill(0, best, True)
        assert not len(best) or not within(channels, more, bounds)


@searched(60, 300, problem=problems())
@example(problem=("residual", torch.zeros(7), {"macs": 15730}, 1))  # room for a unit comes with an exchange
def test_tighten_uses_the_budget_as_far_as_exchanges_can(problem):
    name, score, bounds, min_width = problem
    channels = traced(name)
    filled = fill(channels, score, bounds, min_width)
    winning = tighten(channels, filled, score, bounds, min_width)
    assert within(channels, winning, bounds)
    assert_allowed(channels, winning, min_width)
    used = utilisation(channels, winning, bounds)
    assert used >= utilisation(channels, filled, bounds)
    if utilisation(channels, filled, bounds) >= 0.999:
        assert torch.equal(winning, filled)
    if used < 0.99:
        assert not left_out_that_fits(channels, winning, bounds)
        for leaving, entering in itertools.product(winning.nonzero(), (~winning).nonzero()):
            other = winning.clone()
            other[leaving], other[entering] = False, True
            try:
                assert_allowed(channels, other, min_width)
            except AssertionError:
                continue
            assert not within(channels, other, bounds) or utilisation(channels, other, bounds) <= used


@searched(60, 300, problem=problems(), multiple=st.sampled_from([2, 3, 4]))
def test_tighten_keeps_multiples(problem, multiple):
    channels, score, bounds, min_width = in_multiples(problem, multiple)
    filled = fill(channels, score, bounds, min_width, multiple)
    winning = tighten(channels, filled, score, bounds, min_width, multiple)
    assert within(channels, winning, bounds)
    assert_allowed(channels, winning, min_width)
    assert_multiples(channels, winning, multiple)
    assert utilisation(channels, winning, bounds) >= utilisation(channels, filled, bounds)


@pytest.fixture(scope="module")
def resnet20():
    return trace(nets.build("resnet20", num_classes=10), torch.randn(2, 3, 32, 32))


@pytest.mark.medium
@pytest.mark.parametrize("share", [0.7, 0.5, 0.3, 0.15])
@pytest.mark.parametrize("multiple", [1, 4])
def test_coarse_units_use_the_budget_too(resnet20, share, multiple):
    """One channel of the first stream is 8 to 30 % of the budget, so single exchanges leave up to 5 % of it."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(resnet20.units, generator=generator) + 0.1
        for family in resnet20.families:  # families differ more than their units
            score[family.units] *= 0.5 + torch.rand((), generator=generator)
        controller = Controller(resnet20, {"macs": share}, steps=1000, multiple=multiple)
        winning = controller.choose(score.square() / controller.marginal["macs"])
        assert 0.99 <= utilisation(resnet20, winning, controller.bounds) <= 1


def test_a_budget_with_room_left_can_count_again():
    controller = Controller(traced("chain"), {"macs": 0.6, "params": 0.6}, steps=600)
    for _ in range(1000):
        controller._weigh({"macs": 100, "params": 50}, {"macs": 100, "params": 100})
    assert controller.weights["macs"] == 1
    assert 0.01 <= controller.weights["params"] < 0.02
    for _ in range(10):
        controller._weigh({"macs": 50, "params": 100}, {"macs": 100, "params": 100})
    assert controller.weights["params"] > controller.weights["macs"]


def test_a_smaller_multiple_where_blocks_leave_much_is_kept_in_the_state(monkeypatch):
    monkeypatch.setattr(selection, "LARGEST_BLOCK", 1.0)  # blocks that are much of the budget
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    channels = trace(network, torch.randn(1, 3, 12, 12))

    def made(multiple):
        return Controller(channels, {"macs": 0.45}, steps=60, phase=(0.0, 1.0), multiple=multiple)

    def used(controller):
        gradients = Gradients(channels.units)
        while not controller.frozen:
            controller.update(gradients())
        return utilisation(channels, controller.gate > 0, controller.bounds)

    controller = made((16, 1))
    assert controller.multiple == 16
    assert used(made(16)) < used(controller) <= 1
    assert controller.multiple == 1
    other = made((16, 1))
    other.load_state_dict(controller.state_dict())
    assert (other.multiple, other.floor) == (controller.multiple, controller.floor)


# -------------------------------------------------------------------------------------------------
# A whole run under made-up gradients


class Gradients:
    """Noisy gradients of gates: some units matter more than others, or none does."""

    def __init__(self, units, seed=0, *, spread=1.0, drift=0.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = torch.exp(spread * torch.randn(units, generator=self.generator)) if spread else torch.zeros(units)
        self.drift = drift

    def __call__(self):
        noise = torch.randn(len(self.scale), 2, generator=self.generator)
        self.scale = self.scale * torch.exp(self.drift * noise[:, 1])
        return self.scale * noise[:, 0]


def run(controller, gradients, steps=None):
    """Update `steps` times (all by default), checking at every step what must hold at every step."""
    base = controller.base_strength
    for _ in range(controller.steps if steps is None else steps):
        gate, strength, frozen, final = (
            controller.gate.clone(),
            controller.strength,
            controller.frozen,
            controller.final,
        )
        controller.update(gradients())
        moved = controller.gate - gate
        assert ((controller.gate >= 0) & (controller.gate <= 1)).all()
        assert controller.losing[moved < 0].all(), "a winning gate went down"
        assert not controller.losing[moved > 0].any(), "a losing gate went up"
        assert moved.abs().max() <= controller.strength + 1e-6
        assert base / 2 <= controller.strength <= 4 * base
        change = abs(math.log(controller.strength / strength))
        assert change <= 0.2 + 1e-9 or (controller.final and not final and controller.strength == base)
        if frozen:
            assert not moved.any()
        settled = bool((controller.gate == (~controller.losing).float()).all())
        assert controller.frozen == (frozen or (controller.final and settled))
    return controller


@st.composite
def setups(draw):
    """What `build` makes a controller of; its budget can be met."""
    name, min_width = draw(names), draw(widths)
    phase = draw(st.sampled_from(["auto", (0.05, 0.3), (0.0, 1.0), (0.0, 0.5), (0.3, 0.6), (0.5, 1.0), (0.1, 0.9)]))
    needed = 93 if phase == "auto" else math.ceil(12 / (phase[1] - phase[0]))
    shares = {kind: draw(st.floats(0, 1.1)) for kind in draw(st.sampled_from(KINDS))}
    bounds = bounds_between(traced(name), min_width, shares)
    return {
        "name": name,
        "budget": {kind: math.ceil(bound) for kind, bound in bounds.items()},
        "steps": needed + draw(st.integers(0, 2 * needed)),
        "phase": phase,
        "maturity": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "lookahead": draw(st.sampled_from([0.25, 0.1, 0.5, 0.99])),
        "min_width": min_width,
    }


def build(setup):
    return Controller(traced(setup["name"]), **{key: value for key, value in setup.items() if key != "name"})


@searched(
    40,
    200,
    setup=setups(),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    drift=st.sampled_from([0.0, 0.3]),
)
def test_every_run_ends_frozen_within_a_used_up_budget(setup, seed, spread, drift):
    controller = build(setup)
    channels = controller.channels
    assert controller.schedule(controller.start) == pytest.approx(
        {name: controller.dense[name] for name in controller.bounds}
    )
    ends = {name: min(bound, controller.dense[name]) for name, bound in controller.bounds.items()}
    assert controller.schedule(controller.end) == pytest.approx(ends)
    assert controller.schedule(controller.steps) == pytest.approx(ends)

    run(controller, Gradients(channels.units, seed, spread=spread, drift=drift))
    assert controller.frozen
    open_units = controller.gate > 0
    assert torch.equal(open_units, ~controller.losing)
    assert_allowed(channels, open_units, controller.min_width)
    assert within(channels, open_units, controller.bounds)
    if utilisation(channels, open_units, controller.bounds) < 0.99:
        assert not left_out_that_fits(channels, open_units, controller.bounds)

    rows = controller.trajectory
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {*rows[-1]} == {*frames.TRAJECTORY, "changed"} - {"epoch"}  # fit adds the epoch
    assert {name: rows[-1][name] for name in controller.dense} == channels.cost(open_units)
    assert rows[-1]["losing"] == rows[-1]["closed"] == int((~open_units).sum())
    assert rows[-1]["step"] <= controller.end + 2
    for name in {"macs", "params"} - {*controller.bounds}:
        assert all(math.isnan(row[f"{name}_schedule"]) for row in rows)


@searched(15, 60, setup=setups(), seed=st.integers(0, 99))
def test_only_units_that_are_due_within_the_look_ahead_lose(setup, seed):
    controller = build(setup)
    gradients = Gradients(controller.channels.units, seed)
    for _ in range(controller.steps):
        before = controller.losing
        controller.update(gradients())
        if controller.losing is not before:
            ahead = controller.step_count - 1 + controller.lookahead
            bounds = controller.schedule(ahead)
            assert within(controller.channels, ~controller.losing, bounds)
            assert ahead >= controller.end or not left_out_that_fits(controller.channels, ~controller.losing, bounds)
    assert not controller.trajectory[0]["closed"]


@searched(
    15,
    60,
    setup=setups(),
    seed=st.integers(0, 99),
    scales=st.lists(st.integers(-24, 24), min_size=1, max_size=20),
)
def test_loss_scaling_changes_nothing(setup, seed, scales):
    plain, scaled = build(setup), build(setup)
    gradients = Gradients(plain.channels.units, seed)
    scale = itertools.cycle(scales)
    for _ in range(plain.steps):
        gradient = gradients()
        plain.update(gradient)
        scaled.update(gradient * 2.0 ** next(scale))
        assert torch.equal(plain.importance, scaled.importance)
        assert torch.equal(plain.gate, scaled.gate)
        assert torch.equal(plain.losing, scaled.losing)
    assert str(plain.trajectory) == str(scaled.trajectory)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e38])
def test_finite_gradients_of_any_size_count(size):
    controller = Controller(single_family(), {"macs": 0.5}, steps=96)
    gradient = torch.arange(controller.channels.units) / controller.channels.units
    controller.update(gradient * size)
    assert controller.importance.isfinite().all()
    assert controller.importance[4] > 0
    other = Controller(single_family(), {"macs": 0.5}, steps=96)
    other.update(gradient)
    torch.testing.assert_close(controller.importance, other.importance, rtol=1e-3, atol=1e-6)
    assert not controller.refused


@searched(15, 60, setup=setups(), seed=st.integers(0, 99), data=st.data())
def test_gradients_that_are_not_finite_move_nothing(setup, seed, data):
    controller = build(setup)
    gradients = Gradients(controller.channels.units, seed)
    refused = 0
    reported = []
    for step in range(4 * controller.steps):
        gradient = gradients()
        if bad := step < controller.steps and data.draw(st.integers(0, 3)) == 0:
            gradient[data.draw(st.integers(0, len(gradient) - 1))] = data.draw(
                st.sampled_from([math.nan, math.inf, -math.inf])
            )
        gate, importance = controller.gate, controller.importance
        if controller.frozen:
            break
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            controller.update(gradient)
        assert all(warning.category is RuntimeWarning for warning in caught)
        reported += [int(str(warning.message).split()[0]) for warning in caught]
        refused += bad
        if bad:
            assert torch.equal(controller.gate, gate)
            assert torch.equal(controller.importance, importance)
        assert int(controller.refused) == refused
        assert controller.importance.isfinite().all()
    assert controller.frozen
    assert sum(reported) <= refused
    assert within(controller.channels, controller.gate > 0, controller.bounds)


def test_the_warning_says_how_many_steps_were_refused():
    controller = Controller(single_family(), {"macs": 0.5}, steps=48, phase=(0.25, 0.5))
    for _ in range(3):
        controller.update(torch.full((single_family().units,), math.nan))
    with pytest.warns(
        RuntimeWarning, match=r"3 step\(s\) had gradients that are not finite .* lower the learning rate"
    ):
        run(controller, Gradients(single_family().units), steps=20)


def test_a_closed_unit_comes_back_when_its_importance_rises():
    channels = single_family()
    unit = int(channels.prunable.nonzero()[0])
    controller = Controller(channels, {"macs": 0.5}, steps=400, phase=(0.0, 1.0), lookahead=0.1)
    gradient = torch.ones(channels.units)
    gradient[unit] = 1e-3  # the least important unit goes first
    while controller.gate[unit] > 0:
        run(controller, lambda: gradient, steps=1)
        assert controller.step_count < 200
    assert controller.losing.sum() < 3
    gradient[unit] = 30.0
    while controller.gate[unit] < 1:
        run(controller, lambda: gradient, steps=1)
        assert controller.step_count < 300
    assert controller.returned == 1
    run(controller, lambda: gradient, steps=400 - controller.step_count)
    assert controller.frozen
    assert controller.gate[unit] == 1
    assert controller.trajectory[-1]["returned"] >= 1


def test_the_least_important_units_lose():
    channels = single_family()
    controller = Controller(channels, {"macs": 0.5}, steps=96)
    strongest = torch.randperm(8)
    gradient = torch.empty(channels.units)
    gradient[channels.prunable.nonzero().flatten()[strongest]] = torch.arange(1.0, 9.0)
    run(controller, lambda: gradient * (torch.randint(2, gradient.shape) * 2 - 1))
    kept = controller.gate[channels.prunable][strongest]
    assert kept.tolist() == [0] * 4 + [1] * 4


def test_a_budget_that_is_no_bound_closes_nothing():
    for budget in ({"macs": 1.0}, {"macs": "1G", "params": "1G"}):
        controller = run(Controller(single_family(), budget, steps=96), Gradients(single_family().units))
        assert controller.frozen
        assert controller.gate.all()


# -------------------------------------------------------------------------------------------------
# Fresh and trained networks


def test_the_more_a_network_is_trained_the_earlier_it_gets_smaller():
    phases = [
        Controller(single_family(), {"macs": 0.5}, steps=1000, maturity=maturity).phase
        for maturity in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert phases[0] == PHASE_FRESH
    assert phases[-1] == PHASE_TRAINED
    for early, late in itertools.pairwise(reversed(phases)):
        assert early[0] < late[0] < late[1]
        assert early[1] < late[1]
    # of a trained network: no more steps than are enough, in long runs a least share
    ends = {steps: phase_of(1.0, steps)[1] for steps in (1, 100, 1461, 1900, 4222, 4750, 450_000)}
    assert ends == {1: 0.15, 100: 0.15, 1461: 0.15, 1900: 0.12, 4222: 0.065, 4750: 0.06, 450_000: 0.06}
    assert phase_of(0.0, 10**6) == PHASE_FRESH
    asked = Controller(single_family(), {"macs": 0.5}, steps=1000, maturity=1.0, phase=(0.3, 0.4))
    assert asked.phase == (0.3, 0.4)
    assert (asked.start, asked.end) == (300, 400)


@pytest.mark.medium
@pytest.mark.parametrize(("maturity", "steps"), [(1.0, 5000), (1.0, 400), (0.0, 5000)])
def test_what_a_trained_network_says_of_its_units_is_kept(maturity, steps):
    """The dense network and the one that gets smaller say the opposite of each other."""
    channels = single_family()
    controller = Controller(channels, {"macs": 0.5}, steps=steps, maturity=maturity, phase=(0.02, 0.9))
    units = channels.prunable.nonzero().flatten()
    dense, later = torch.ones(2, channels.units)
    dense[units], later[units] = torch.arange(1.0, 9.0), torch.arange(8.0, 0.0, -1)
    run(controller, lambda: dense if controller.step_count < controller.start else later)
    first = controller.losing[units[:4]].all()
    assert controller.frozen
    assert first if maturity == 1 and steps == 5000 else not first  # 100 steps of 5000, but 8 of 400: too few to go by


@pytest.mark.medium
def test_what_the_dense_network_finds_level_is_decided_by_what_is_measured_later():
    channels = single_family()
    controller = Controller(channels, {"macs": 0.5}, steps=10_000, maturity=1.0)
    units = channels.prunable.nonzero().flatten()
    dense, later = torch.ones(2, channels.units)
    dense[units], later[units] = torch.linspace(1.0, 1.05, 8), torch.linspace(2.0, 1.0, 8)
    run(controller, lambda: dense if controller.step_count < controller.start else later)
    assert controller.trust == KEEP < 1
    assert controller.frozen
    assert controller.losing[units[-4:]].all()


@pytest.mark.parametrize("maturity", [-0.1, 1.1, math.nan, "high", None])
def test_a_maturity_that_is_none(maturity):
    with pytest.raises(ValueError, match=r"maturity=.*must be a number from 0 \(a fresh network\) to 1 \(trained\)"):
        Controller(single_family(), {"macs": 0.5}, steps=100, maturity=maturity)


# -------------------------------------------------------------------------------------------------
# Interruption


def test_a_restored_controller_keeps_the_phase_that_was_decided():
    """When a run goes on its weights are others than at its start, and so may be what they say."""
    controller = Controller(single_family(), {"macs": 0.5}, steps=1000, maturity=1.0)
    gradients = Gradients(single_family().units)
    run(controller, gradients, steps=60)
    other = Controller(single_family(), {"macs": 0.5}, steps=1000, maturity=0.2)
    other.load_state_dict(controller.state_dict())
    assert (other.start, other.end, other.lookahead, other.ramp) == (20, 150, 26, controller.ramp)
    for _ in range(controller.steps - controller.step_count):
        gradient = gradients()
        controller.update(gradient)
        other.update(gradient)
    assert str(other.state_dict()) == str(controller.state_dict())


@searched(15, 60, setup=setups(), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_a_restored_controller_goes_on_identically(setup, seed, share):
    controller, other = build(setup), build(setup)
    gradients = Gradients(controller.channels.units, seed)
    run(controller, gradients, steps=round(share * controller.steps))
    file = io.BytesIO()
    torch.save(controller.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))  # tensors and plain values only
    for _ in range(controller.steps - controller.step_count):
        gradient = gradients()
        controller.update(gradient)
        other.update(gradient)
    first, second = controller.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert str(value) == str(second[name]), name  # as text: NaN is not equal to itself
    assert torch.equal(first["importance"], second["importance"])


def test_a_state_taken_in_memory_is_not_changed_by_later_steps():
    gradients = Gradients(single_family().units)
    controller = run(Controller(single_family(), {"macs": 0.5}, steps=96), gradients, steps=8)
    state = controller.state_dict()
    before = copy.deepcopy(state)
    gradient = gradients()
    gradient[0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        controller.update(gradient)
    run(controller, gradients, steps=4)
    for name, value in before.items():
        assert str(state[name]) == str(value), f"{name} changed"


def test_a_restored_controller_does_not_warn_again():
    controller = Controller(single_family(), {"macs": 0.5}, steps=96)
    controller.update(torch.full((single_family().units,), math.nan))
    with pytest.warns(RuntimeWarning, match="1 step"):
        run(controller, Gradients(single_family().units), steps=controller.start)
    other = Controller(single_family(), {"macs": 0.5}, steps=96)
    other.load_state_dict(controller.state_dict())
    run(other, Gradients(single_family().units), steps=2)  # a warning would be an error
