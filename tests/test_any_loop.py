"""Random training loops over random networks: the network that shrinks trains on as the gated one would have."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_nets import INPUT_SHAPE, networks
from test_random_nets import set_mode
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo import counted

from tcp_core import Tailor, trace
from tcp_core.maturity import PHASE_TRAINED

STEPS = 96
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the macs cannot be pruned"),
    pytest.mark.filterwarnings("ignore:.*reached by no traced call"),
]
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a loop is too long to look for a shorter one that fails
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=torch.tensor(1e-3), momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-4, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3, initial_accumulator_value=1e-3),
}


@st.composite
def loops(draw, compiling=False):
    """What a user's loop consists of."""
    names = sorted(OPTIMIZERS)
    return {
        "optimizers": draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)),
        "schedule": draw(st.booleans()),
        "clip": draw(st.sampled_from([None, "norm", "value"])),
        "scale": draw(st.booleans()),
        "accumulate": draw(st.sampled_from([1, 2])),
        "average": draw(st.sampled_from([None, "model", "tailor"])),
        # torch.compile with backend="eager" does not run batch norms anew, with or without a Tailor
        "checkpoint": not compiling and draw(st.booleans()),
        "freeze": draw(st.sampled_from([0, 3])),
        "compile": compiling,
    }


class Whole(nn.Module):
    """A network whose activations are computed anew in the backward pass."""

    def __init__(self, network):
        super().__init__()
        self.network, self.on = network, True

    def forward(self, x):
        return checkpoint(self.network, x, use_reentrant=False) if self.on else self.network(x)


class Loop:
    """One run: `step` takes a step of it."""

    def __init__(self, model, loop, channels, x, **tailoring):
        self.model, self.loop, self.x = model, loop, x
        self.tailor = Tailor(model, x, channels=channels, steps=STEPS, **{"phase": PHASE_TRAINED} | tailoring)
        self.called = torch.compile(self.tailor, backend="eager") if loop["compile"] else self.tailor
        parameters = [p for p in model.parameters() if p.requires_grad]
        count = len(loop["optimizers"])
        parts = [parameters[index::count] for index in range(count)]
        self.optimizers = [OPTIMIZERS[kind](part) for kind, part in zip(loop["optimizers"], parts, strict=True) if part]
        kind = torch.optim.lr_scheduler.ExponentialLR
        self.schedules = [kind(each, 0.97) for each in self.optimizers if loop["schedule"]]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=loop["scale"])
        self.average = None
        if loop["average"]:
            self.of = model if loop["average"] == "model" else self.tailor
            self.average = AveragedModel(self.of, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
            self.tailor.carry(self.average)

    def step(self, **options):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total = 0.0
        for part in range(self.loop["accumulate"]):
            outputs = [out for out in tree_leaves(self.called(self.x + 0.1 * part)) if torch.is_tensor(out)]
            loss = sum(out.square().mean() for out in outputs if out.is_floating_point())
            self.scaler.scale(loss / self.loop["accumulate"]).backward()
            total += loss.item()
        parameters = [p for p in self.tailor.parameters() if p.grad is not None]
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.loop["clip"] == "norm":
            nn.utils.clip_grad_norm_(parameters, 0.5, foreach=False)
        elif self.loop["clip"] == "value":
            nn.utils.clip_grad_value_(parameters, 0.05)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for schedule in self.schedules:
            schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.of)
        self.tailor.step(**options)
        return total


def state_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check(network, loop):
    x = torch.randn(INPUT_SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    set_mode(network, True)
    for parameter in list(network.parameters())[:: loop["freeze"] or 10**6][1:]:
        parameter.requires_grad_(False)
    assume(any(p.requires_grad for p in network.parameters()))
    model = Whole(network)
    model.on = loop["checkpoint"]
    channels = trace(model, x)
    assume(channels.prunable.sum() > 2)
    try:
        sum(out.square().mean() for out in tree_leaves(copy.deepcopy(model)(x))).backward()
    except (RuntimeError, TypeError, AttributeError) as error:
        assume("inplace" not in str(error) and "does not require grad" not in str(error))
        raise
    dense = channels.cost()["params"]
    probe = Tailor(copy.deepcopy(model), x, channels=channels, budget={"params": 1.0}, steps=STEPS)
    floor = probe.report()["floor"]["params"]
    bound = {"params": floor + (dense - floor) // 2}

    whole = Loop(copy.deepcopy(model), loop, channels, x, budget=bound)
    run = Loop(model, loop, channels, x, budget=bound)
    held = state_of(model)
    objects, kinds = [*model.modules()], [type(module) for module in copy.deepcopy(model).modules()]
    first = [run.step() for _ in range(8)]
    sizes = {name: tensor.shape for name, tensor in held.items()}
    tensors = [*held.values(), *(t for o in run.optimizers for s in o.state.values() for t in s.values())]
    memory = [(t, weakref.ref(t.untyped_storage()), t.shape) for t in tensors if torch.is_tensor(t) and t.numel() > 1]
    while not run.tailor.shrunk:
        assert len(first) < STEPS
        first.append(run.step())

    # the same objects, of the promised size, and nothing else alive
    assert run.tailor.finish() is run.tailor.model is model
    assert [*model.modules()] == objects
    assert [type(module) for module in objects] == kinds
    assert all(now is held[name] for name, now in state_of(model).items())
    report = run.tailor.report()
    assert {name: report["current"][name] for name in ("macs", "params")} == counted(model, x)
    gc.collect()
    assert not [shape for tensor, storage, shape in memory if tensor.shape != shape and storage() is not None]
    if any(held[name].shape != size for name, size in sizes.items()):
        assert report["current"]["params"] < dense

    # every parameter that has a gradient moves in the next step
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first.append(run.step())
    trained = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in trained) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
        # a gradient may be too small to change a number
        if parameter.requires_grad and parameter.grad is not None and parameter.grad.abs().max() > 1e-6:
            assert not torch.equal(parameter, before[name]), name
    if run.average is not None:
        inner = run.average.module if loop["average"] == "model" else run.average.module.model
        assert {n: t.shape for n, t in state_of(inner).items()} == {n: t.shape for n, t in state_of(model).items()}

    # and all of it is what the gated network of full size does
    second = [whole.step(shrink=False) for _ in first]
    assert not whole.tailor.shrunk
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second), rtol=1e-6, atol=1e-9)
    assert str(run.tailor.report()["widths"]) == str(whole.tailor.report()["widths"])


@pytest.mark.medium
@settings(SETTINGS, max_examples=4)
@given(network=networks(odd=False), loop=loops())
def test_a_sample_of_loops(network, loop):
    check(network, loop)


@pytest.mark.slow
@settings(SETTINGS, max_examples=120)
@given(network=networks(odd=False), loop=loops())
def test_many_loops(network, loop):
    check(network, loop)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile tells what it does not compile
@settings(SETTINGS, max_examples=8)
@given(network=networks(odd=False), loop=loops(compiling=True))
def test_compiled_loops(network, loop):
    torch.compiler.reset()
    check(network, loop)
