"""Latency as a budget, on made-up clocks with steps: no test here depends on how long anything takes."""

import copy
import functools
import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import searched, some_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tcp_core as tcp
from tcp_core import nets
from tcp_core.controller import Controller
from tcp_core.cost import Budget
from tcp_core.latency import clock as clocks
from tcp_core.latency import place as places
from tcp_core.latency import table as tables
from tcp_core.latency.clock import timed
from tcp_core.latency.model import Grids
from tcp_core.latency.table import Table, grid, step_in
from tcp_core.selection import required_units, settle
from tcp_core.study.comparators import pruner

ROOT = Path(__file__).resolve().parents[1]
STEP = 8


def up(width, step=STEP):
    return -(-width // step) * step


def layer_ms(layer, step=STEP):
    """A made-up kernel that works on whole blocks of channels, and its call."""
    if isinstance(layer, nn.Linear):
        return 0.02  # no step of its own
    inputs = 1 if layer.groups > 1 else up(layer.in_channels, step)
    return 1e-5 * inputs * up(layer.out_channels, step) * math.prod(layer.kernel_size) + 0.01


def of_network(network, step=STEP):
    return 0.3 + sum(layer_ms(m, step) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def of_layer_too(module, x):
    return of_network(module)


def wrong_table(module, x):
    """Whole networks take 30 % longer than their layers, and wide layers more so."""
    if isinstance(module, (nn.Conv2d, nn.Linear, nn.ReLU)):
        return of_network(module)
    return 1.3 * of_network(module) + sum(
        0.2 * layer_ms(m) for m in module.modules() if isinstance(m, nn.Conv2d) and m.out_channels > 32
    )


CLOCKS = {"networks": of_network, "layers": of_layer_too, "wrong": wrong_table}


def ask(clock, network):
    return clock(network) if clock is of_network else clock(network, None)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = nets.build("resnet20", num_classes=10)
    return model, tcp.trace(model, torch.randn(2, 3, 16, 16))


def place(clock, **options):
    return tcp.Latency(clock, progress=False, **options)


def chosen(model, channels, budget, latency, steps=30, **options):
    """A controller that has come to its end on made-up gradients, with the network that it leaves."""
    cost = latency.cost(model, channels)
    options = {"multiple": latency.likes(cost), "phase": (0.0, 1.0)} | options
    controller = Controller(channels, budget, steps=steps, latency=cost, **options)
    gradient = torch.rand(channels.units, generator=torch.Generator().manual_seed(1)) + 0.1
    while not controller.frozen:
        controller.update(gradient)
    return controller, tcp.remove(model, channels, controller.gate > 0, verify=False)


# -------------------------------------------------------------------------------------------------
# The whole of it


@pytest.mark.medium
@pytest.mark.parametrize(
    ("budget", "clock"), some_of([{"latency": 0.7}, {"latency": 0.4}, {"latency": "1.1 ms"}], CLOCKS, step=4)
)
def test_what_is_delivered_is_measured_and_97_to_100_percent_of_the_bound(resnet, clock, budget):
    model, channels = resnet
    controller, small = chosen(model, channels, budget, place(CLOCKS[clock]))
    delivered, bound = ask(CLOCKS[clock], small), controller.bounds["latency"]
    assert delivered == pytest.approx(controller.measured["latency"])
    assert delivered == pytest.approx(controller.cost_model.exact(controller.gate > 0)["latency"])
    assert 0.97 * bound <= delivered <= bound
    assert controller.dense["latency"] == pytest.approx(ask(CLOCKS[clock], model))
    if isinstance(budget["latency"], float):
        assert bound == pytest.approx(budget["latency"] * ask(CLOCKS[clock], model))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("clock", "multiple"),
    [
        *(("networks", None), ("layers", 1)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("layers", None), ("wrong", None), ("networks", 4))),
    ],
)
def test_a_unit_that_crosses_no_step_is_kept(resnet, clock, multiple):
    model, channels = resnet
    options = {} if multiple is None else {"multiple": multiple}
    controller, small = chosen(model, channels, {"latency": 0.5}, place(CLOCKS[clock]), **options)
    assert controller.multiple in ((4, STEP) if multiple is None else (multiple,))
    kept = controller.gate > 0
    assert not kept.all()
    delivered = ask(CLOCKS[clock], small)
    for family in channels.families:
        closed = family.units[~kept[family.units]][: controller.multiple]
        if len(closed):
            more = tcp.remove(model, channels, kept.index_fill(0, closed, True), verify=False)
            assert ask(CLOCKS[clock], more) > delivered + 1e-9


@pytest.mark.medium
def test_latency_beside_macs_and_memory(resnet):
    model, channels = resnet
    budget = {"latency": 0.6, "macs": 0.6, "memory": 0.9}
    controller, small = chosen(model, channels, budget, place(of_layer_too))
    assert of_network(small) <= controller.bounds["latency"]
    found = channels.cost(controller.gate > 0) | channels.bytes(controller.gate > 0)
    assert found["macs"] <= controller.bounds["macs"]
    assert found["memory"] <= controller.bounds["memory"]
    assert max(found["macs"] / controller.bounds["macs"], of_network(small) / controller.bounds["latency"]) > 0.97


def small_net(first=32, second=64):
    return nn.Sequential(
        *(nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU()),
        *(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 4)),
    )


def trained(tailor, steps, first=0):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(tailor.model.parameters(), lr=0.05)
    x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    for _ in range(first, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(tailor(x), y).backward()
        optimizer.step()
        tailor.step()


def tailored(clock, budget, steps=60, model=None, **options):
    torch.manual_seed(0)
    options = {"latency": None if clock is None else place(clock), "phase": (0.0, 1.0)} | options
    return tcp.Tailor(model or small_net(), torch.randn(2, 3, 8, 8), budget=budget, steps=steps, **options)


@pytest.mark.medium
def test_a_training_run_ends_within_the_latency_and_says_how_it_knows():
    tailor = tailored(of_network, {"latency": 0.8})
    trained(tailor, 60)
    report = tailor.report()
    assert of_network(tailor.finish()) == pytest.approx(report["current"]["latency"])
    assert report["current"]["latency"] <= report["bounds"]["latency"]
    assert report["measured"]["spread"] == 0
    assert re.search(r"latency +\S+ ms +\S+ ms +\S+ ms", repr(report))
    assert re.search(r"latency \S+ ms was measured, spread 0\.0%, .* callable of_network, .* batch 1", repr(report))


@pytest.mark.medium
def test_fit_passes_the_place_on_and_goes_on_from_checkpoints_although_the_clock_drifts(tmp_path):
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))
    batches = list(zip(x.split(8), y.split(8), strict=True))

    def run(clock, budget=0.8, **options):
        torch.manual_seed(0)
        budget = {"latency": budget}
        options |= {"latency": place(clock), "phase": (0.0, 1.0), "lr": 0.01}
        return tcp.fit(small_net(), batches, budget=budget, epochs=4, **options)

    class Stop(Exception):
        pass

    def stop(step, steps):
        if step == 12:
            raise Stop

    expected = run(of_network)
    with pytest.raises(Stop):
        run(of_network, checkpoints=tmp_path, checkpoint_every=4, on_step=stop)
    found = run(drifted(of_network, 1.02), checkpoints=tmp_path, checkpoint_every=4)
    assert found.report["bounds"] == pytest.approx(expected.report["bounds"])
    assert found.report["dense"] == pytest.approx(expected.report["dense"])
    assert found.report["current"]["latency"] <= found.report["bounds"]["latency"]
    with pytest.raises(tcp.training.checkpoints.CheckpointError, match="bounds"):
        run(of_network, 0.7, checkpoints=tmp_path, checkpoint_every=4)
    with pytest.raises(tcp.training.checkpoints.CheckpointError, match=r"place: .*of_network.* then, .*wrong.* now"):
        run(wrong_table, checkpoints=tmp_path, checkpoint_every=4)


@pytest.mark.medium
def test_a_run_goes_on_although_the_machine_has_become_too_slow_for_it(tmp_path):
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))
    batches = list(zip(x.split(8), y.split(8), strict=True))

    def run(clock, stop=None, **options):
        def on_step(step, steps):
            if step == stop:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        options |= {"latency": place(clock), "phase": (0.0, 1.0), "lr": 0.01, "on_step": on_step}
        return tcp.fit(small_net(), batches, budget={"latency": "0.45 ms"}, epochs=4, **options)

    expected, slower = run(of_network), drifted(of_network, 3.0)
    with pytest.raises(KeyboardInterrupt):
        run(of_network, 12, checkpoints=tmp_path, checkpoint_every=4)
    found = run(slower, checkpoints=tmp_path, checkpoint_every=4)
    assert found.report["bounds"] == expected.report["bounds"]
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(tcp.BudgetError, match="below the floor"):  # another run is measured
        run(slower)
    state = (tailor := tailored(of_network, {"latency": "0.45 ms"})).state_dict()
    again = tailored(None, {"latency": "0.45 ms"}, latency=place(slower).as_of(state))
    again.load_state_dict(state)
    assert again.report()["current"] == pytest.approx(tailor.report()["current"])


def drifted(clock, factor):
    """The same place, whose clock has become slower."""
    return functools.wraps(clock)(lambda *args: factor * clock(*args))


@pytest.mark.medium
def test_a_resumed_run_carries_the_correction():
    tailor = tailored(wrong_table, {"latency": 0.8})
    trained(tailor, 55)
    assert tailor.controller.measured is not None
    again = tailored(drifted(wrong_table, 1.07), {"latency": 0.8})
    again.resume(tailor.progress())
    for name in ("bounds", "dense", "floor", "measured", "multiple"):
        assert getattr(again.controller, name) == pytest.approx(getattr(tailor.controller, name))
    assert again.report()["current"] == pytest.approx(tailor.report()["current"])
    assert again.controller.latency.calibration == tailor.controller.latency.calibration


def test_the_state_of_another_place_is_refused():
    state = (tailor := tailored(of_network, {"latency": 0.8})).state_dict()
    other = tailored(of_network, {"latency": 0.8}, latency=place(of_network, batch=8))
    with pytest.raises(ValueError, match=r"another run: place is not .*batch 1, .* there, .*batch 8, .* here"):
        other.load_state_dict(state)
    state["_extra_state"] = tailor.progress()
    del state["_extra_state"]["run"]["place"]  # as earlier versions saved it
    other.load_state_dict(state)


def normless(convolution=nn.Conv2d):
    """A network in which only the first convolution has a batch norm: all other layers carry gates themselves."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
    body = nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), convolution(64, 64, 3, padding=1), nn.ReLU()
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


class Replacing(nn.Linear):
    """A layer whose pass puts a new tensor in the place of a buffer."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


def test_looking_at_a_networks_layers_leaves_it_as_it_was():
    model = nn.Sequential(Replacing(), nn.BatchNorm1d(4))
    model[1].eval()
    tables.layer_calls(model, (torch.randn(2, 4),), {})
    assert model[0].calls == 0
    assert [module.training for module in model] == [True, False]


@pytest.mark.medium
def test_layers_with_gates_of_their_own_are_in_the_table():
    model, x = normless(), torch.randn(2, 3, 8, 8)
    channels = tcp.trace(model, x)
    expected = place(of_layer_too).cost(model, channels)
    tailor = tailored(of_layer_too, {"latency": 0.5}, model=model, multiple=1)
    names = [call.weight for call in tables.layer_calls(model, (x[:1],), {})]
    assert names == ["0.weight", "3.weight", "5.weight", "9.weight"]
    assert names == [call.weight for call in tables.layer_calls(normless(), (x[:1],), {})]
    cost = tailor.controller.latency
    assert list(cost.grids.rows) == list(expected.grids.rows)
    price = cost.price({})["latency"]
    assert all(price[family.units].min() > 0 for family in channels.families)
    trained(tailor, 60)
    kept = tailor.report()["widths"]
    assert of_network(tailor.finish()) <= tailor.report()["bounds"]["latency"]
    assert max(kept["3"], kept["5"]) < 64  # the units of neither are free


def by_macs(module, x):
    """A made-up place without steps whose time is in proportion to macs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return 1e-6 + counter.get_total_flops() / 2e6


class Frames(nn.Module):
    """Folds frames into the batch, and calls a layer on one sample's features without a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.joined, self.last, self.alone = nn.Linear(32 * 6, 64), nn.Linear(64, 5), nn.Linear(16, 5)
        self.token = nn.Parameter(torch.randn(16))

    def forward(self, x):
        frames = self.second(self.first(x.flatten(0, 1)).relu()).relu().mean((2, 3))
        return self.last(self.joined(frames.unflatten(0, x.shape[:2]).flatten(1)).relu()) + self.alone(self.token)


class Tied(nn.Module):
    """Layers that share one weight, which is also known as the network's own."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(16, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.second, self.last = nn.Linear(64, 128), nn.Linear(128, 4)
        self.shared = self.layers[0].weight
        for layer in self.layers:
            layer.weight = self.shared

    def forward(self, x):
        x = self.first(x).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(self.second(x).relu())


@pytest.mark.medium
@pytest.mark.parametrize(("network", "shape"), [(Frames, (6, 3, 8, 8)), (Tied, (16,))])
def test_all_rows_and_all_layers_of_a_shared_weight_are_timed(network, shape):
    torch.manual_seed(0)
    model, x, batch = network(), torch.randn(1, *shape), 3
    channels = tcp.trace(model, x)
    cost = place(by_macs, batch=batch).cost(model, channels)
    calls = tables.layer_calls(model, (x,), {})
    assert sum(map(places._macs, calls)) == channels.cost()["macs"]
    layers, _ = cost.parts(torch.ones(channels.units))
    assert layers == pytest.approx(1e-6 * len(calls) + batch * channels.cost()["macs"] / 1e6)
    macs, price = channels.cost_model.price({})["macs"], cost.price({})["latency"]
    for family in channels.families:
        expected = batch * float(macs[family.units].sum()) / 1e6
        assert float(price[family.units].sum()) == pytest.approx(expected, rel=0.01)


def test_a_table_tells_layers_of_other_rows_apart():
    conv = nn.Conv2d(3, 16, 3)
    one, more = (tables.LayerCall("0.weight", conv, (rows, 3, 8, 8)).key for rows in (1, 6))
    assert one == f"{conv} at 8x8"  # as in tables of before, which have one row's time
    assert more == f"{conv} at 8x8, 6 rows"


def test_layers_that_can_be_narrowed_and_are_in_no_table_are_named():
    own = type("Own", (nn.Conv2d,), {})
    with pytest.warns(RuntimeWarning, match=r"1 layer\(s\) that can become narrower are in no table: 5\. They"):
        tailored(of_layer_too, {"latency": 0.9}, model=normless(own))
    layers = nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    with pytest.raises(tcp.LatencyError, match="this network has none: give a budget of macs, params"):
        tailored(of_layer_too, {"latency": 0.9}, model=nn.Sequential(*layers))


# -------------------------------------------------------------------------------------------------
# The closed loop


@searched(
    75,
    300,
    wrong=st.floats(0.7, 1.4),
    bend=st.floats(-0.3, 0.3),
    block=st.floats(0.002, 0.02),
    bound=st.floats(0.2, 0.95),
)
def test_the_loop_ends_near_the_bound_though_the_model_is_wrong(wrong, bend, block, bound):
    units = round(1 / block)
    calls = []

    def choose(aim):  # a model that says every unit costs one block
        return torch.arange(units) < int(aim / block + 1e-9)

    def measure(winning):
        calls.append(winning)
        share = float(winning.sum()) * block
        return wrong * share * (1 + bend * share)

    winning, found, networks = settle(choose, measure, bound, floor=block)
    assert found == measure(winning) <= bound
    assert networks <= 10
    room = measure(torch.arange(units) < int(winning.sum()) + 1)
    assert found >= 0.97 * bound or room > bound or winning.all()


def test_the_loop_returns_the_smallest_network_if_nothing_is_within_the_bound():
    winning, found, _ = settle(lambda aim: torch.arange(10) < int(aim), lambda winning: 100.0, 5.0, floor=2.0)
    assert (int(winning.sum()), found) == (2, 100.0)


def test_the_loop_withstands_measurements_that_contradict_each_other():
    generator = np.random.default_rng(0)
    for _ in range(50):
        _, found, networks = settle(
            lambda aim: torch.arange(1000) < int(aim * 1000),
            lambda winning: float(winning.sum()) / 1000 * generator.normal(1, 0.05),
            0.5,
            floor=0.01,
        )
        assert 0.45 <= found <= 0.5
        assert networks <= 10


@pytest.mark.medium
def test_a_run_that_cannot_stay_within_says_so(resnet):
    model, channels = resnet
    slow = [1.0]

    def clock(network):
        return of_network(network) * (1.0 if network_is_dense(network) else slow[0])

    def network_is_dense(network):
        return sum(p.numel() for p in network.parameters()) == channels.cost()["params"]

    cost = place(clock).cost(model, channels)
    controller = Controller(channels, {"latency": 0.5}, steps=100, latency=cost, multiple=8, phase=(0.0, 1.0))
    slow[0] = 50.0

    def run():
        while not controller.frozen:
            controller.update(torch.ones(channels.units))

    with pytest.warns(RuntimeWarning, match=r"no network was measured within the latency of \S+ ms; the nearest"):
        run()


# -------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32])
def test_steps_are_found(step):
    noise = np.random.default_rng(0)
    for widths in (range(1, 65), range(18, 66, 2)):
        times = {w: 0.1 + up(w, step) * (1 + 0.002 * noise.normal()) for w in widths}
        assert step_in(times) == step
        left = {w: t * (1.5 if w % 4 else 1.0) for w, t in times.items()}  # a kernel of their own at other widths
        assert step_in(left) == max(step, 4)
    assert step_in({1: 1.0}) == 1
    assert step_in({w: 1 + 1e-4 * w for w in range(1, 65)}) == 1  # no difference that could be told


def test_steps_hidden_by_noise_are_looked_for_again():
    trials = []

    class Noisy:
        def measure(self, jobs, seconds):
            trials.append(len(jobs))
            noisy = 5.0 if len(trials) == 1 else 0.0
            generator = np.random.default_rng(len(trials))
            times = [up(m.in_channels) * up(m.out_channels) * (1 + noisy * generator.random()) for m, _ in jobs]
            return [clocks.Timing(t, 0.0, t) for t in times]

    assert tables._steps(Noisy()) == {"in": 8, "out": 8}
    assert len(trials) <= 8

    class Smooth:
        def measure(self, jobs, seconds):
            times = [float(m.in_channels * m.out_channels) for m, _ in jobs]
            return [clocks.Timing(t, 0.0, t) for t in times]

    assert tables._steps(Smooth()) == {"in": 1, "out": 1}


@pytest.mark.medium
@pytest.mark.parametrize("step", [4, 8, 16])
def test_steps_are_found_from_whole_networks(resnet, step):
    model, channels = resnet
    cost = place(lambda network: of_network(network, step)).cost(model, channels)
    assert cost.grids.steps == (step, step)


@given(width=st.integers(1, 2048), step=st.sampled_from([1, 4, 8, 16, 32]))
def test_a_grid_has_the_steps_and_the_width_itself(width, step):
    points = grid(width, step)
    assert points == sorted(set(points))
    assert points[-1] == width
    assert all(min(width, n * step) in points for n in range(1, 5))
    assert len(points) <= 24
    assert all(point % step == 0 for point in points[:-1])
    coarse = grid(width, step, coarse=True)
    assert set(coarse) <= {*range(step, width, step), width}
    assert coarse[-1] == width
    assert len(coarse) <= min(len(points), 7)
    assert all(b <= max(4 * a, step) for a, b in zip(coarse, coarse[1:], strict=False))


@searched(25, 100, data=st.data(), steps=st.tuples(st.sampled_from([1, 4, 8]), st.sampled_from([1, 4, 8])))
def test_tables_are_read_as_they_were_measured(data, steps):
    layers = []
    for _ in range(data.draw(st.integers(1, 4))):
        left, right = (grid(data.draw(st.integers(1, 80)), step) for step in steps)
        layers.append({"in": left, "out": right, "ms": [[a * b + 1.0 for b in right] for a in left]})
    grids = Grids(layers, steps)
    for _ in range(5):
        at = [(data.draw(st.sampled_from(each["in"])), data.draw(st.sampled_from(each["out"]))) for each in layers]
        widths = [np.array(side) for side in zip(*at, strict=True)]
        np.testing.assert_allclose(grids(*widths), widths[0] * widths[1] + 1.0)
        # one channel less costs the same, but at the lower end of a step
        fewer = [np.maximum(width - 1, 1) for width in widths]
        expected = [grids.up(width.astype(float), side) for side, width in enumerate(fewer)]
        np.testing.assert_allclose(grids(*fewer), grids(*expected))
        assert (grids(*fewer) <= grids(*widths)).all()


def test_a_width_that_is_slower_than_the_next_is_not_paid_for():
    grids = Grids([{"in": [1], "out": [4, 8, 16], "ms": [[5.0, 3.0, 4.0]]}], (1, 4))
    assert grids(np.array([1]), np.array([4])) == grids(np.array([1]), np.array([8])) == 3.0


@pytest.mark.medium
def test_what_a_unit_adds(resnet):
    model, channels = resnet
    cost = place(of_layer_too).cost(model, channels)
    cost.calibrate(required_units(channels, 1, 8))
    controller, _ = chosen(model, channels, {"latency": 0.5}, place(of_layer_too), multiple=1)
    kept = controller.gate > 0
    extra = cost.marginal(kept)["latency"]
    family = next(f for f in channels.families if 0 < kept[f.units].sum() < len(f.units) and len(f.layers) == 2)
    closed = family.units[~kept[family.units]]
    more = kept.index_fill(0, closed[:STEP], True)
    added = cost.exact(more)["latency"] - cost.exact(kept)["latency"]
    assert float(extra[closed[:STEP]].sum()) == pytest.approx(added)  # a whole step, shared by its units
    one = kept.index_fill(0, closed[:1], True)
    assert cost.exact(one)["latency"] == pytest.approx(cost.exact(more)["latency"])
    assert cost.marginal(one)["latency"][closed[1:STEP]].abs().max() < 1e-12  # the rest of the step is free


def counted(clock):
    def ask(module, x):
        ask.layers += isinstance(module, (nn.Conv2d, nn.Linear))
        return clock(module, x)

    ask.layers = 0
    ask.__qualname__ = "counted"
    return ask


def test_a_second_run_reads_the_file_and_another_network_adds_to_it(resnet, tmp_path):
    model, channels = resnet
    path = tmp_path / "tables" / "latency.json"
    first = counted(of_layer_too)
    cost = place(first, table=path).cost(model, channels)
    assert first.layers > 100
    second = counted(of_layer_too)
    again = place(second, table=path).cost(model, channels)
    assert second.layers == 0
    assert again.exact() == cost.exact()
    other = small_net()
    place(second, table=path).cost(other, tcp.trace(other, torch.randn(2, 3, 8, 8)))
    assert second.layers > 0
    before = len(json.loads(path.read_text())["layers"])
    place(second, table=path).cost(model, channels)
    assert len(json.loads(path.read_text())["layers"]) == before
    assert list(path.parent.iterdir()) == [path]


def test_a_table_that_was_interrupted_goes_on(resnet, tmp_path):
    model, channels = resnet

    def interrupted(module, x):
        if isinstance(module, nn.Linear):
            raise KeyboardInterrupt
        return of_layer_too(module, x)

    interrupted.__qualname__ = "counted"
    path = tmp_path / "latency.json"
    with pytest.raises(KeyboardInterrupt):
        place(interrupted, table=path).cost(model, channels)
    clock = counted(of_layer_too)
    place(clock, table=path).cost(model, channels)
    assert 0 < clock.layers < 50


def test_a_table_that_lacks_nothing_is_not_written_and_one_that_cannot_be_stops_nothing(resnet, tmp_path, monkeypatch):
    model, channels = resnet
    path = tmp_path / "latency.json"
    place(of_layer_too, table=path).cost(model, channels)
    before = path.stat().st_ino, path.stat().st_mtime_ns
    latency = place(of_layer_too, table=path)
    latency.cost(model, channels)
    latency.likes()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before  # it may be where nothing can be written

    def full(here, there):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tcp_core.files.os.replace", full)
    with pytest.warns(RuntimeWarning, match=r"cannot be written to .*No space left"):
        cost = place(of_layer_too, table=tmp_path / "other.json").cost(model, channels)
    assert [each.name for each in tmp_path.iterdir()] == ["latency.json"]
    assert list(cost.grids.rows) == list(latency.cost(model, channels).grids.rows)


@pytest.mark.medium
def test_a_measurement_that_fails_in_mid_step_leaves_the_step_to_be_taken_again():
    failing = []

    def clock(network):
        if failing:
            raise ConnectionError("the phone is unplugged")
        return of_network(network)

    def run(fail):
        tailor = tailored(functools.wraps(of_network)(clock), {"latency": 0.8})
        controller = tailor.controller
        trained(tailor, controller.end - controller.lookahead)
        nn.functional.cross_entropy(tailor(torch.ones(4, 3, 8, 8)), torch.arange(4)).backward()
        if fail:
            failing.append(True)
            with pytest.raises(ConnectionError):
                tailor.step(shrink=False)
            failing.clear()
        tailor.step(shrink=False)
        return controller.state_dict()

    torch.testing.assert_close(run(fail=True), run(fail=False), rtol=0, atol=0, equal_nan=True)


def test_tables_of_other_places_and_no_tables_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "latency.json"
    Table({**place(of_layer_too).place, "device": "a phone", "batch": 8}, path=path).save()
    with pytest.raises(
        tcp.LatencyError, match=r"measured at another place: there .*a phone.*here .*its own.* delete it"
    ):
        place(of_layer_too, table=path)
    path.write_text("{}")
    with pytest.raises(tcp.LatencyError, match="is no table of latencies"):
        place(of_layer_too, table=path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tcp.Latency("torch").table.path.parent == tmp_path / "tcp_core"
    assert tcp.Latency("torch").table.path != tcp.Latency("torch", batch=2).table.path
    assert place(of_layer_too).table.path is None


def test_a_progress_bar_says_how_far_it_is(resnet, capsys):
    model, channels = resnet
    tcp.Latency(of_layer_too).cost(model, channels)
    assert re.search(r"timing layers: 100%.*layers", capsys.readouterr().err)


@pytest.mark.parametrize("shown", [True, False])
def test_a_run_that_waits_for_measurements_says_so(resnet, capsys, monkeypatch, shown):
    model, channels = resnet
    monkeypatch.setattr(places, "LONG_WAIT", -1.0)
    cost = tcp.Latency(of_layer_too, progress=shown).cost(model, channels)
    cost.calibrate(required_units(channels, 1, 1))
    assert ("measured a network beside the dense one" in capsys.readouterr().err) == shown


# -------------------------------------------------------------------------------------------------
# Widths that kernels like


@pytest.mark.medium
@pytest.mark.parametrize("latency", [None, of_layer_too, of_network])
def test_multiples_that_the_place_likes(latency):
    tailor = tailored(latency, {"macs": 0.5}, model=small_net(128, 256))
    trained(tailor, 60)
    report = tailor.report()
    assert report["multiple"] == 4  # blocks of 8 would be more than 4 % of this budget
    assert f"widths are multiples of {report['multiple']}" in repr(report)
    assert all(width % 4 == 0 for name, width in report["widths"].items() if report["dense_widths"][name] >= 8)
    assert 0.9 <= report["utilisation"]["macs"] <= 1
    assert "latency" not in report["dense"]


def test_a_callable_of_networks_is_asked_about_networks_alone():
    asked = []

    def clock(network):
        asked.append(type(network))
        network(torch.ones(1, 3, 8, 8))  # a bare convolution of 64 channels cannot be called so
        return of_network(network, 16)

    latency, model = place(clock), small_net(128, 256)
    tailored(clock, {"macs": 0.5}, model=model)
    assert {*asked} == {nn.Sequential}
    assert latency.likes(None, (model, tcp.trace(model, torch.randn(2, 3, 8, 8)))) == (16, 8, 4, 1)
    with pytest.raises(tcp.LatencyError, match=r"give likes\(place\.cost\(model, channels\)\)"):
        latency.likes()


@pytest.mark.medium
def test_wide_networks_get_the_larger_multiple(resnet):
    _, channels = resnet
    assert Controller(channels, {"macs": 0.2}, steps=100, multiple=(8, 4, 1)).multiple == 4
    wide = nn.Sequential(nn.Conv2d(3, 1024, 3), nn.ReLU(), nn.Conv2d(1024, 1024, 3), nn.ReLU(), nn.Conv2d(1024, 4, 3))
    traced = tcp.trace(wide, torch.randn(1, 3, 8, 8))
    assert Controller(traced, {"macs": 0.5}, steps=100, multiple=(8, 4, 1)).multiple == 8


@pytest.mark.medium
def test_by_default_widths_are_what_kernels_like_where_that_costs_little(resnet):
    model, channels = resnet
    x = torch.randn(2, 3, 16, 16)

    def multiple(model, budget, x=x, **options):
        return tcp.Tailor(copy.deepcopy(model), x, budget=budget, steps=100, **options).controller.multiple

    assert [multiple(model, {"macs": share}) for share in (0.5, 0.25, 0.15)] == [8, 8, 4]
    assert multiple(model, {"macs": 0.5}, multiple=1) == 1
    tiny = nets.small_resnet(widths=(8, 16, 24), blocks=1, num_classes=10, in_channels=3)
    assert multiple(tiny, {"macs": 0.2}) == 1  # 4 units would be much of it
    assert multiple(model, {"macs": 0.1}) == 1
    deep = nets.build("resnet56", num_classes=10)
    assert [multiple(deep, {"macs": share}) for share in (0.5, 0.3, 0.15)] == [8, 8, 4]  # 14.3 % have all widths 8
    tailor = tcp.Tailor(copy.deepcopy(model), x, budget={"macs": 0.5}, steps=100)
    assert tailor.report()["floor"] == channels.cost(required_units(channels, 1))  # what any budget can go down to
    floor = channels.cost(required_units(channels, 1))["params"]
    assert multiple(model, {"macs": 0.5, "params": floor}) == 1  # any widths are better than no network
    with pytest.raises(tcp.BudgetError, match="below the floor"):
        multiple(model, {"macs": 0.5, "params": floor - 1})


# -------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.medium
def test_what_cannot_be_met_is_refused_with_what_can(resnet):
    model, _ = resnet
    with pytest.raises(
        tcp.BudgetError, match=r"latency budget of 0\.1 ms .* is below the floor.* Give latency >= \S+ ms"
    ):
        tcp.Tailor(model, torch.randn(2, 3, 16, 16), budget={"latency": "0.1 ms"}, steps=100, latency=place(of_network))


@pytest.mark.parametrize("answer", [math.nan, math.inf, 0.0, -1.0, None, "fast"])
@pytest.mark.parametrize("arguments", [1, 2])
def test_a_callable_that_returns_no_time(answer, arguments):
    clock = (lambda network: answer) if arguments == 1 else (lambda module, x: answer)
    with pytest.raises(
        tcp.LatencyError, match=r"backend '.*lambda.*' returned .* must return milliseconds, a positive"
    ):
        tailored(clock, {"latency": 0.5})


def test_a_machine_that_is_too_noisy(resnet):
    generator = np.random.default_rng(0)

    def noisy(network):
        return of_network(network) * generator.uniform(0.5, 1.5)

    with pytest.raises(
        tcp.LatencyError, match=r"too noisy to measure latency: .* are \d+\.\d% apart, more than noise=10%"
    ):
        tailored(noisy, {"latency": 0.5})


def test_a_machine_whose_speed_changes_is_warned_of_and_networks_are_compared():
    calls, drifting = [0], [False]

    def clock(network):
        calls[0] += drifting[0]
        return of_network(network) * (1 + 0.3 * (calls[0] // 2))  # two networks take turns

    latency = place(clock)
    model = small_net()
    channels = tcp.trace(model, torch.randn(2, 3, 16, 16))
    cost = latency.cost(model, channels)
    drifting[0], calls[0] = True, -1
    with pytest.warns(RuntimeWarning, match=r"own speed changes: .* are \d+\.\d% apart. .* share .* will hold"):
        Controller(channels, Budget(latency=0.9), steps=100, latency=cost)


@pytest.mark.medium
def test_a_machine_that_becomes_noisy_is_warned_of_and_the_run_goes_on():
    generator, quiet = np.random.default_rng(0), [True]

    def clock(network):
        return of_network(network) * (1 if quiet[0] else generator.uniform(0.4, 1.0))

    tailor = tailored(clock, {"latency": 0.9})
    quiet[0] = False
    with pytest.warns(RuntimeWarning, match=r"noisy now: .* are \d+\.\d% apart, more than noise=10%"):
        trained(tailor, 60)
    assert tailor.frozen
    assert tailor.report()["measured"]["spread"] > 0.1


def test_any_networks_can_be_timed_side_by_side():
    asked = []

    def clock(network, x):
        asked.append(tuple(x.shape))
        return of_network(network)

    models = [small_net(), small_net(8, 16).train()]
    found = place(clock, batch=4).timings(models, torch.randn(2, 3, 8, 8))
    assert [timing.ms for timing in found] == [pytest.approx(of_network(each)) for each in models]
    assert {*asked} == {(4, 3, 8, 8)}
    assert models[1].training


def test_options_that_make_no_sense():
    with pytest.raises(tcp.BudgetError, match=r"latency budget needs a place .* latency=tcp\.Latency\("):
        tailored(None, {"latency": 0.5})
    with pytest.raises(ValueError, match=r"the budget has no bound on it: .*'latency': '4 ms'.* multiple at 'auto'"):
        tailored(of_network, {"macs": 0.5}, multiple=8)
    with pytest.raises(ValueError, match="multiple='wide'; it must be an int of at least 1, or 'auto'"):
        tailored(None, {"macs": 0.5}, multiple="wide")
    with pytest.raises(ValueError, match="backend='tvm'; it must be one of torch, compile, onnxruntime, or a callable"):
        tcp.Latency("tvm")
    with pytest.raises(ValueError, match="batch=0; it must be an int of at least 1"):
        tcp.Latency(of_network, batch=0)
    with pytest.raises(ValueError, match="must be positive"):
        tcp.Latency(of_network, noise=0)
    with pytest.raises(tcp.LatencyError, match="torch has no device 'cuda:9' here"):
        tcp.Latency("torch", device="cuda:9")
    with pytest.raises(tcp.BudgetError, match="latency has no unit"):
        tailored(of_network, {"latency": 4})


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnxruntime", {"device": "cuda"}, r"device='cuda' is where torch runs; for onnxruntime give provider="),
        ("torch", {"provider": "CUDA"}, r"provider='CUDA' is of onnxruntime; for 'torch' give device="),
        ("compile", {"provider": "CUDA"}, r"for 'compile' give device="),
        (of_network, {"device": "cuda"}, r"device='cuda' came with a callable, .* leave it out"),
        (of_layer_too, {"provider": "CUDA"}, r"provider='CUDA' came with a callable, .* leave it out"),
    ],
)
def test_options_that_a_backend_does_not_have(backend, options, message):
    with pytest.raises(ValueError, match=message):
        tcp.Latency(backend, **options)


def test_what_is_not_installed(monkeypatch):
    pytest.importorskip("onnxruntime")
    with pytest.raises(tcp.LatencyError, match=r"no provider 'Fancy' here; it has .*CPU"):
        tcp.Latency("onnxruntime", provider="Fancy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(tcp.LatencyError, match=r"needs onnx, which is not installed: pip install onnx"):
        tcp.Latency("onnxruntime")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(tcp.LatencyError, match=r"needs a C\+\+ compiler"):
        tcp.Latency("compile")


# -------------------------------------------------------------------------------------------------
# Real clocks: that they run and leave the model alone; how long it takes is not looked at


@pytest.mark.medium
@pytest.mark.parametrize("backend", ["torch", "onnxruntime", pytest.param("compile", marks=pytest.mark.slow)])
def test_real_backends(backend, tmp_path, monkeypatch):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr(tables, "grid", lambda width, step, coarse: sorted({min(width, 16), width}))
    torch.manual_seed(0)
    model = small_net()
    latency = tcp.Latency(backend, batch=2, noise=100, seconds=0.01, table=tmp_path / "t.json", progress=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tailor = tcp.Tailor(model, torch.randn(2, 3, 8, 8), budget={"latency": 0.99}, steps=100, latency=latency)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    report = tailor.report()
    assert 0 < report["floor"]["latency"]
    assert 0 < report["dense"]["latency"]
    place = json.loads((tmp_path / "t.json").read_text())["place"]
    assert place["backend"].startswith({"torch": "torch 2", "compile": "torch.compile 2"}.get(backend, backend))


def test_networks_that_take_turns_are_compared_with_each_other():
    (alone,) = clocks.side_by_side([[3.0], [1.0], [2.0]])
    assert alone == (2.0, 0.5, 1.0, 0.5)
    (once,) = clocks.side_by_side([[4.0]])
    assert once == (4.0, 0.0, 4.0, 0.0)
    slow, quick = clocks.side_by_side([[4.0, 2.0], [6.0, 3.0], [8.0, 4.0]])  # the machine slows down
    assert (slow.ms, slow.spread, slow.least, slow.drift) == (6.0, 0.0, 4.0, pytest.approx(1 / 3))
    assert quick.spread == 0
    first, _, third = clocks.side_by_side([[4.0, 2.0, 4.0], [4.0, 2.0, 5.0], [4.0, 2.0, 6.0]])
    assert third.spread == third.drift == pytest.approx(0.2)
    assert first.drift == 0 < first.spread  # the largest of the ratios


def test_medians_are_to_each_other_as_the_ratio_is_whatever_the_machine_does():
    generator = np.random.default_rng(0)
    for _ in range(20):
        speed = np.exp(generator.normal(0, 1, 7))[:, None]
        rounds = (speed * [3.0, 1.0] * np.exp(generator.normal(0, 0.01, (7, 2)))).tolist()
        slow, quick = clocks.side_by_side(rounds)
        assert slow.ms / quick.ms == pytest.approx(float(np.median([a / b for a, b in rounds])))
        assert slow.drift > 10 * slow.spread


def test_networks_that_disagree_are_measured_more_often_and_known_the_better():
    generator = np.random.default_rng(0)
    now, calls = [0.0], [0]

    def run(ms, noise):
        def call():
            calls[0] += 1
            now[0] += ms / 1000 * float(np.exp(generator.normal(0, noise)))

        return call

    def found(noise, patience):
        calls[0] = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
            return timed([run(2000.0, noise), run(1000.0, noise)], seconds=2.9, patience=patience)

    found(0.001, 4)
    assert calls[0] == 2 * (2 + 3)  # warmed up twice, three rounds
    most = {patience: max(found(0.2, patience) and calls[0] for _ in range(10)) for patience in (1, 4)}
    assert most == {1: 2 * (2 + 7), 4: 2 * (2 + 28)}
    off = [[abs(a.ms / b.ms / 2 - 1) for a, b in (found(0.2, patience) for _ in range(100))] for patience in (1, 4)]
    assert np.mean(off[1]) < 0.75 * np.mean(off[0])  # about half with four times as many, but that few agree by chance
    rounds = np.exp(generator.normal(0, 0.2, (28, 2)))
    few, many = (clocks.side_by_side(rounds[:count].tolist())[0].spread for count in (7, 28))
    assert many < 0.75 * few


def test_medians_of_minima():
    calls = []
    first, second = timed([lambda: calls.append(1), lambda: calls.append(2)], seconds=0.01, rounds=3)
    assert first.ms > 0 < second.ms
    assert {1, 2} == set(calls)


@pytest.mark.parametrize(
    ("noise", "seconds", "rounds"), [(0.0, 1.0, 3), (0.03, 1.0, 3), (0.3, 9.0, 7), (0.3, 1.0, 3), (0.3, 1.4, 4)]
)
def test_long_calls_are_few_where_they_agree_or_would_keep_the_run_waiting(noise, seconds, rounds, monkeypatch):
    now, calls = [0.0], [0]
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call():
        calls[0] += 1
        now[0] += 10.0 * (1 + noise * (calls[0] % 2))

    (found,) = timed([call], seconds=seconds)
    assert calls[0] == 2 + rounds
    assert found.ms == pytest.approx(10_000, rel=noise + 1e-9)


def test_budgets_of_latency_are_compared_in_milliseconds():
    assert Budget(latency="2 ms").resolve({"latency": 8.0}) == {"latency": 2.0}
    assert Budget(latency=0.25).resolve({"latency": 8.0}) == {"latency": 2.0}


def test_of_several_processes_the_first_measures(monkeypatch):
    sent = [("what the first found", None)]

    def receive(answer):
        answer[:] = sent[0]

    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
    here = tcp.Latency._on_first
    assert here(lambda: pytest.fail("measured by another process")) == "what the first found"
    sent[0] = (None, tcp.LatencyError("no clock"))
    with pytest.raises(tcp.LatencyError, match="no clock"):
        here(lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda answer: sent.append(tuple(answer)))
    assert here(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        here(lambda: 1 / 0)
    assert sent[1] == (5, None)
    assert isinstance(sent[2][1], ZeroDivisionError)  # the others raise it as well, instead of waiting


def script(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def between(page, start):
    """What stands on a page after a mark."""
    return page.partition(f"<!-- {start} -->\n")[2].partition("\n<!-- end -->")[0]


def test_the_page_has_the_table_of_the_benchmark():
    benchmark = script("latency_budget")
    rows = json.loads((ROOT / "results" / "benchmarks" / "latency_budget.json").read_text())["rows"]
    page = (ROOT / "docs" / "latency.md").read_text()
    assert between(page, "table") == benchmark.table(rows)
    rows = [row for row in rows if row["budget"] == "latency"]
    assert f"All {len(rows)} use 98 to 100 % of the bound" in page
    assert all(0.98 <= row["latency"] / row["bound"] <= 1 for row in rows)
    assert all(row["again_share"] <= row["share"] * (1 + row["spread"] + row["again_spread"]) for row in rows)
    took = [row["seconds_table"] for row in rows if row["network"] == "resnet50"]
    assert "The tables of ResNet-50 took {:.0f} s, {:.0f} s, {:.0f} s and {:.0f} s".format(*took) in page


def test_what_multiples_cost_and_bring_is_as_the_pages_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it takes parts of the others
    rows = json.loads((ROOT / "results" / "benchmarks" / "multiples.json").read_text())["rows"]
    assert between((ROOT / "docs" / "deployment.md").read_text(), "multiples") == script("multiples").table(rows)
    speed = (ROOT / "docs" / "benchmarks.md").read_text()
    for row in rows:
        if "refused" not in row:
            assert 0.98 < row["utilisation"] <= 1
            line = next(
                line for line in speed.splitlines() if line.endswith("| `multiples.py` |") and row["network"] in line
            )
            assert f"{row['training']['run_over_dense_run']:.2f} ({row['multiple']})" in line


@pytest.mark.medium
def test_one_shot_comparators_have_the_same_table_and_loop(resnet):
    model, channels = resnet
    prune = pruner("uniform_l1", {"latency": 0.5}, latency=place(of_layer_too))
    one_shot = prune(model, channels, 100)
    bound = one_shot.limits.bounds["latency"]
    assert 0.97 * bound <= of_network(one_shot.finish()) <= bound
    assert one_shot.limits.measured["latency"] == pytest.approx(of_network(one_shot.finish()))
    with pytest.raises(ValueError, match="torch_pruning knows neither multiples nor latency"):
        pruner("torch_pruning", {"latency": 0.5}, latency=place(of_layer_too))
    with pytest.raises(tcp.BudgetError, match="needs a place"):
        pruner("uniform_l1", {"latency": 0.5})(model, channels, 100)


@pytest.mark.medium
def test_a_multiple_that_cannot_meet_the_budget_gives_way_to_a_smaller_one(resnet):
    model, channels = resnet
    cost = place(of_layer_too).cost(model, channels)
    cost.calibrate(required_units(channels, 1, 16))
    bound = 0.9 * cost.calibration["smallest"]
    controller, small = chosen(model, channels, {"latency": f"{bound} ms"}, place(of_layer_too), multiple=(16, 8, 4))
    assert controller.multiple == 8
    assert 0.97 * bound <= of_network(small) <= bound


def test_accuracy_at_the_same_latency_is_as_the_page_says():
    benchmark = script("same_latency")
    rows = json.loads((ROOT / "results" / "benchmarks" / "same_latency.json").read_text())["rows"]
    page = (ROOT / "docs" / "latency.md").read_text()
    assert between(page, "same latency") == benchmark.table(rows)
    for row in rows:  # they are at one latency, so that accuracies can be compared
        assert row["ms"] / row["dense_ms"] == pytest.approx(row["latency"], rel=0.1)
        assert len(row["history"]["epoch"]) == row["epochs"]
        assert row["history"]["train_loss"][-1] == row["train_loss"]
    scan = json.loads((ROOT / "results" / "benchmarks" / "same_latency_scan.json").read_text())
    default, eights = (scan[widths]["seeds"] for widths in ("default widths", "multiples of 8"))
    assert min(min(found.values()) for found in default) > 0.43
    assert all(
        1.1 < one[macs] / two[macs] for one, two in zip(default, eights, strict=True) for macs in ("0.15", "0.254")
    )
