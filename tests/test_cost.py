"""Budgets, and the bilinear cost against counts made in other ways."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import searched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import INPUT_SHAPE, networks
from zoo import counted, random_open

from tcp_core import Budget, BudgetError, remove, trace
from tcp_core.cost import CostBuilder

DENSE = {"macs": 1_000_003, "params": 777}


# -------------------------------------------------------------------------------------------------
# Budgets


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({"macs": 0.5}, {"macs": 500_001}),
        ({"macs": 1.0}, {"macs": 1_000_003}),
        ({"macs": 1}, {"macs": 1}),
        ({"macs": 60}, {"macs": 60}),
        ({"macs": "60"}, {"macs": 60}),
        ({"macs": "0.5"}, {"macs": 500_001}),
        ({"macs": "40%"}, {"macs": 400_001}),
        ({"macs": " 12.5 % "}, {"macs": 125_000}),
        ({"macs": "100%"}, {"macs": 1_000_003}),
        ({"macs": "60M"}, {"macs": 60_000_000}),
        ({"macs": "1.5k"}, {"macs": 1_500}),
        ({"macs": "0.25G"}, {"macs": 250_000_000}),
        ({"macs": "4e3"}, {"macs": 4_000}),
        ({"macs": "1.5e3"}, {"macs": 1_500}),
        ({"macs": "1.5E+3"}, {"macs": 1_500}),
        ({"macs": "5e-1"}, {"macs": 500_001}),
        ({"params": "0.27m"}, {"params": 270_000}),
        ({"flops": 0.5}, {"macs": 500_001}),
        ({"flops": 1_001}, {"macs": 500}),
        ({"flops": "120M"}, {"macs": 60_000_000}),
        ({"macs": 0.5, "flops": 0.4}, {"macs": 400_001}),
        ({"macs": 300, "flops": 800}, {"macs": 300}),
        ({"macs": 300, "flops": 500}, {"macs": 250}),
        ({"macs": 0.5, "params": "60%"}, {"macs": 500_001, "params": 466}),
    ],
)
def test_what_a_budget_means(given, bounds):
    assert Budget.of(given).resolve(DENSE) == bounds
    assert Budget(**given).resolve(DENSE) == bounds
    assert Budget.of(given).as_dict() == given


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({"memory": "2 MB"}, {"memory": 2_000_000}),
        ({"memory": "0.5MiB"}, {"memory": 524_288}),
        ({"weights": "1.5 kB"}, {"weights": 1_500}),
        ({"weights": 700}, {"weights": 700}),
        ({"weights": "25%", "memory": 0.5}, {"weights": 250, "memory": 1_000_000}),
        ({"latency": "4 ms"}, {"latency": 4.0}),
        ({"latency": "350us"}, {"latency": 0.35}),
        ({"latency": "350 \u00b5s"}, {"latency": 0.35}),
        ({"latency": "0.004 s"}, {"latency": 4.0}),
        ({"latency": "50 %"}, {"latency": 4.5}),
        ({"latency": 0.5}, {"latency": 4.5}),
    ],
)
def test_what_bytes_and_times_mean(given, bounds):
    budget = Budget.of(given)
    assert budget.resolve({"memory": 2_000_001, "weights": 1_000, "latency": 9.0}) == pytest.approx(bounds)
    assert budget.as_dict() == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": "2 Mb"}, r"memory is not a number: .* bytes as an int or as '500 kB', '2 MB'.* got memory='2 Mb'"),
        ({"memory": "2M"}, "memory is not a number"),
        ({"weights": "4 ms"}, "weights is not a number"),
        ({"memory": 1.5}, "memory is a fraction above 1"),
        ({"latency": 4}, r"latency has no unit: .* a time as '4 ms', '350 us' or '0.004 s'; got latency=4"),
        ({"latency": "4"}, "latency has no unit"),
        ({"latency": 4.0}, "latency has no unit"),
        ({"latency": "4 m"}, "latency is not a number"),
        ({"latency": "4 MB"}, "latency is not a number"),
        ({"latency": "0 ms"}, "latency must be positive"),
        ({"macs": "4 ms"}, "macs is not a number"),
        ({"memory": 0.5, "precision": "int3"}, "precision='int3'; it must be one of fp32, fp16, bf16, int8"),
        ({"memory": 0.5, "batch": 0}, "batch=0; it must be an int of at least 1"),
        ({"precision": "int8"}, "the budget is empty"),
        ({"macs": 0.5, "precision": "int8"}, r"precision='int8' says .* no bound on either \(only macs\): give one"),
        ({"macs": 0.5, "batch": 64}, r"batch=64 says .* no bound on memory \(only macs\): give one, or leave it out"),
        ({"weights": 0.5, "batch": 64}, r"batch=64 says .* no bound on memory \(only weights\)"),
        ({"latency": 0.5, "batch": 64}, r"no bound on memory \(only latency\); .* at that of tcp\.Latency\(batch=\)"),
    ],
)
def test_bytes_and_times_without_their_units_are_refused(given, message):
    with pytest.raises(BudgetError, match=message):
        Budget.of(given)


@given(
    percent=st.decimals(min_value="0.01", max_value=100, places=2),
    dense=st.integers(1, 10**10),
    key=st.sampled_from(["macs", "params", "flops"]),
)
def test_a_fraction_is_rounded_down_and_never_by_one_too_many(percent, dense, key):
    cost = "macs" if key == "flops" else key
    exact = math.floor(Fraction(percent) / 100 * dense)
    assert Budget(**{key: f"{percent}%"}).resolve({cost: dense})[cost] == exact
    assert Budget(**{key: float(percent) / 100}).resolve({cost: dense})[cost] == exact


@given(bound=st.integers(2, 10**13))
def test_absolute_numbers_are_taken_as_they_are(bound):
    for given_bound in (bound, str(bound)):
        assert Budget(params=given_bound).resolve({"params": 1}) == {"params": bound}
        assert Budget(flops=given_bound).resolve({"macs": 1}) == {"macs": bound // 2}


def test_numbers_of_numpy_are_numbers():
    assert Budget(macs=np.int64(500), params=np.float32(0.5)).resolve(DENSE) == {"macs": 500, "params": 388}


def test_budgets_are_values():
    budget = Budget(macs=0.5)
    assert Budget.of(budget) is budget
    assert budget == Budget.of({"macs": 0.5})
    assert hash(budget) == hash(Budget(macs=0.5))
    with pytest.raises(AttributeError):
        budget.macs = 0.4


@pytest.mark.parametrize("value", ["", "half", "4O%", "-3", "1.2.3", "60 Mb", [0.5], True, False, math.nan])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(BudgetError, match=r"macs is not a number: give a fraction .* as '40%'.* got macs="):
        Budget(macs=value)


# -------------------------------------------------------------------------------------------------
# The bilinear form


@st.composite
def models(draw):
    """(units, the terms by cost) of a made-up cost: terms are (scale, left, right), -1 fixed, None one."""
    units = draw(st.integers(0, 7))
    side = st.none() | st.lists(st.integers(-1, units - 1), min_size=1, max_size=9)
    terms = st.lists(st.tuples(st.integers(1, 50), side, side), max_size=5)
    return units, {"macs": draw(terms), "params": draw(terms)}


def built(units, terms):
    builder = CostBuilder(units)
    for cost, rows in terms.items():
        for scale, left, right in rows:
            sides = [None if side is None else torch.tensor(side) for side in (left, right)]
            builder.add(cost, scale, *sides)
    return builder.build()


def by_hand(terms, z):
    """The same sum in plain Python."""

    def count(side):
        return 1 if side is None else sum(1 if unit < 0 else z[unit] for unit in side)

    return {
        cost: sum(scale * count(left) * count(right) for scale, left, right in rows) for cost, rows in terms.items()
    }


@searched(50, 200, made_up=models(), data=st.data())
def test_cost_is_the_sum_over_layers(made_up, data):
    units, terms = made_up
    model = built(units, terms)
    z = data.draw(st.lists(st.booleans(), min_size=units, max_size=units))
    found = model.exact(torch.tensor(z, dtype=torch.bool))
    assert found == by_hand(terms, z)
    assert all(type(value) is int for value in found.values())
    assert model.exact() == by_hand(terms, [1] * units)
    half = [0.5 + value / 4 for value in z]  # exact in binary
    assert {name: float(value) for name, value in model(torch.tensor(half)).items()} == by_hand(terms, half)


@searched(50, 200, made_up=models(), data=st.data())
def test_marginal_cost_is_open_minus_closed(made_up, data):
    units, terms = made_up
    model = built(units, terms)
    z = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=units, max_size=units))
    marginal = model.marginal(torch.tensor(z))
    for unit in range(units):
        opened, closed = (by_hand(terms, [*z[:unit], gate, *z[unit + 1 :]]) for gate in (1, 0))
        for cost in terms:
            assert float(marginal[cost][unit]) == opened[cost] - closed[cost]


@searched(25, 100, made_up=models(), data=st.data())
def test_gradient_is_that_of_finite_differences(made_up, data):
    units, terms = made_up
    model = built(units, terms)
    z = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=units, max_size=units))
    for cost in terms:
        gates = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        value = model(gates)[cost]
        if not value.requires_grad or not units:
            continue
        (gradient,) = torch.autograd.grad(value, gates)
        for unit in range(units):
            up, down = (by_hand(terms, [*z[:unit], z[unit] + h, *z[unit + 1 :]])[cost] for h in (0.5, -0.5))
            assert float(gradient[unit]) == up - down  # exact: the cost is quadratic in one gate


@searched(
    5,
    15,
    settings(database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]),
    network=networks(odd=False),
    seed=st.integers(0, 9),
)
def test_cost_and_marginal_cost_are_what_removing_saves(network, seed):
    x = torch.randn(INPUT_SHAPE, dtype=torch.float64)
    channels = trace(network, x)
    open_units = random_open(channels, seed / 10, seed)
    small = remove(network, channels, open_units)
    cost = counted(small, x)
    assert channels.cost(open_units) == cost
    marginal = channels.cost_model.marginal(open_units)
    for unit in torch.randperm(channels.units, generator=torch.Generator().manual_seed(seed))[:4].tolist():
        other = open_units.clone()
        other[unit] = ~other[unit]
        if channels.prunable[unit] and other.any() and (channels.cost_model.counts(other) > 0).all():
            recount = counted(remove(network, channels, other), x)
            sign = 1 if open_units[unit] else -1
            for name in cost:
                assert sign * (cost[name] - recount[name]) == int(marginal[name][unit])


def test_gradient_of_a_traced_network_is_that_of_autograd():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3))
    model = trace(network, torch.randn(2, 3, 8, 8)).cost_model
    z = torch.rand(model.units, dtype=torch.float64, requires_grad=True)
    for name in ("macs", "params"):
        (gradient,) = torch.autograd.grad(model(z)[name], z)
        # No unit stands on both sides of a layer here, so what a unit costs is the gradient.
        torch.testing.assert_close(model.marginal(z.detach())[name], gradient)


def test_costs_of_large_networks_are_exact_integers():
    rows = [(7_919, [0, 1, 2] * 999, list(range(3)) * 997), (224 * 224 * 49, [-1] * 3 + [1], [2] * 2_048)]
    terms = {"macs": rows, "params": []}
    z = [True, False, True]
    assert built(3, terms).exact(torch.tensor(z)) == by_hand(terms, z)
