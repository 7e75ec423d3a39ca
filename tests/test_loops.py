"""Loops that people have: averages of other libraries, optimisers with state of many kinds, several tasks, several
threads, compiled code, and steps that are miscounted.
"""

import copy
import gc
import io
import re
import threading
import warnings
import weakref
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import nn
from torch.func import functional_call, grad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tcp_core as tcp
from tcp_core.controller import Controller
from tcp_core.maturity import PHASE_TRAINED
from tcp_core.selection import least

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (64,), generator=torch.Generator().manual_seed(1))
STEPS = 40


def network(width=64):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(32, width), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, 4)),
    )


def made(model=None, **options):
    model = network() if model is None else model
    return tcp.Tailor(model, X[:2], **{"budget": {"macs": 0.5}, "steps": STEPS, "phase": (0.1, 0.7)} | options)


def run(tailor, *optimizers, steps=STEPS, after=lambda step: None):
    """Take steps, and return in which one the network was made smaller."""
    at = None
    for number in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(tailor(X), Y).backward()
        for optimizer in optimizers:
            optimizer.step()
        if tailor.step() and at is None:
            at = number
        after(number)
    return at


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# ---------------------------------------------------------------------------------------------------------------------
# Averages, and what takes state_dict() for tensors


class Average(nn.Module):
    """An average of the values of state_dict(), as timm's ModelEmaV3 and others keep it."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mean, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 0.1)
            else:
                mean.copy_(value)


def test_an_average_over_the_state_of_the_tailor_goes_along():
    tailor = made()
    average = Average(tailor)
    tailor.carry(average)
    assert run(tailor, sgd(tailor.model), after=lambda _: average.update(tailor)) is not None
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in tailor.model.parameters()]


def test_the_state_of_a_tailor_is_tensors_and_goes_through_other_formats():
    tailor = made()
    run(tailor, sgd(tailor.model), steps=10)
    state = tailor.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    to_safetensors(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    again = made(copy.deepcopy(tailor.model))
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert again.controller.step_count == 10
    assert torch.equal(again.gate, tailor.gate)
    again.load_state_dict(state | {"_extra_state": tailor.progress()})  # as it was before it was packed


def test_an_older_state_of_an_average_does_not_rewind_the_run():
    tailor = made()
    average = AveragedModel(tailor, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    tailor.carry(average)
    kept = {}

    def after(step):
        average.update_parameters(tailor)
        if step == 1:
            kept.update(copy.deepcopy(average.state_dict()))
        if step == 10:
            average.load_state_dict(kept)
            assert tailor.controller.step_count == 11
            assert torch.equal(average.module.gate, tailor.gate)

    assert run(tailor, sgd(tailor.model), after=after) is not None
    tailor.finish()


def test_a_copy_of_an_average_is_a_run_of_its_own():
    tailor = made()
    average = AveragedModel(tailor)
    tailor.carry(average)
    run(tailor, sgd(tailor.model), steps=10)
    own = copy.deepcopy(average.module)
    run(tailor, sgd(tailor.model), steps=5)
    own.load_state_dict(tailor.state_dict())
    assert own.controller.step_count == 15
    assert own.controller is not tailor.controller


def test_an_average_of_the_smaller_network_waits_for_the_tailor():
    tailor = made()
    average = AveragedModel(tailor)
    tailor.carry(average)
    run(tailor, sgd(tailor.model))
    states = copy.deepcopy((tailor.state_dict(), average.state_dict()))
    tailor = made()
    average = AveragedModel(tailor)
    tailor.carry(average)
    with pytest.raises(ValueError, match="load the Tailor's state first"):
        average.load_state_dict(states[1])
    tailor.load_state_dict(states[0])
    average.load_state_dict(states[1])
    assert torch.equal(average.module.model[0].weight, states[1]["module.model.0.weight"])


def test_a_learner_with_its_target_is_carried():
    learner = nn.Module()
    learner.online, learner.target = (model := network()), copy.deepcopy(model)
    tailor = made(model)
    tailor.carry(learner)
    assert run(tailor, sgd(model)) is not None
    assert [p.shape for p in learner.target.parameters()] == [p.shape for p in model.parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers


class Strange(torch.optim.Optimizer):
    """Keeps what ``begin`` gives for each parameter, and takes plain steps."""

    def __init__(self, parameters, begin, **options):
        super().__init__(parameters, {"lr": 0.01, **options})
        self.begin = begin

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                self.state[parameter].update(self.begin(parameter))
            parameter.sub_(0.01 * parameter.grad)


class Projector:
    def __init__(self, parameter):
        self.matrix = torch.ones(parameter.shape)


def levels(parameter):
    return {"momentum": torch.zeros_like(parameter), "table": torch.linspace(-1, 1, 64)}


@pytest.mark.parametrize(
    ("begin", "named"),
    [
        (lambda p: {"projector": Projector(p)}, r"keeps projector \(a Projector\) for"),
        (levels, r"keeps table of shape \(64,\)"),
        (lambda p: {"qmap1": torch.ones(48)}, r"keeps qmap1 of shape \(48,\)"),
    ],
)
def test_state_that_is_not_of_entries_starts_anew_and_is_named(begin, named):
    tailor = made()
    optimizer = Strange(tailor.model.parameters(), begin)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert run(tailor, optimizer) is not None
    assert told
    assert all(re.search(f"{named}.*starts anew", str(each.message)) for each in told)


def test_gradients_in_a_queue_are_cut():
    tailor = made(network(width=40))  # of which no weight is square
    optimizer = Strange(tailor.model.parameters(), lambda p: {"queue": deque([p.grad.clone(), p.grad.clone()])})
    assert run(tailor, optimizer) is not None
    for parameter in tailor.model.parameters():
        assert all(each.shape == parameter.shape for each in optimizer.state[parameter]["queue"])


def test_state_whose_kind_depends_on_the_size_of_a_parameter_starts_anew():
    def factors(parameter):
        shape = parameter.shape
        return {"exp_avg_sq_row": torch.ones(shape[:-1])} if len(shape) > 1 else {"exp_avg_sq": torch.ones(shape)}

    tailor = made()
    optimizer = Strange(tailor.model.parameters(), factors, min_dim_size_to_factor=16)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert run(tailor, optimizer) is not None
    assert {str(each.message).split(" for ")[0] for each in told} == {
        f"Strange keeps exp_avg_sq_row of shape ({n},)" for n in (64, 48, 4)
    }
    assert optimizer.state[tailor.model[1].weight]["exp_avg_sq"].shape == tailor.model[1].weight.shape


def test_a_table_at_the_optimiser_is_no_parameters():
    tailor = made()
    optimizer = sgd(tailor.model)
    optimizer.name2qmap = {"dynamic": torch.linspace(-1, 1, 64)}
    assert run(tailor, optimizer) is not None


def test_gradients_per_sample_are_refused():
    tailor = made()
    tailor.model[0].weight.grad_sample = torch.zeros(64, 64, 32)
    with pytest.raises(RuntimeError, match=r"'0.weight' has gradients per sample \(grad_sample\)"):
        run(tailor, sgd(tailor.model), steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Passes and steps


def test_several_backward_passes_of_one_forward_pass_count():
    """As one a task, with the gradients of each taken apart (PCGrad)."""
    tailor = made()
    output = tailor(X)
    losses = [F.cross_entropy(output[half], Y[half]) for half in (slice(0, 32), slice(32, 64))]
    for loss in losses:
        tailor.model.zero_grad()
        loss.backward(retain_graph=True)
    seen = tailor.gate.grad.clone()
    apart = [torch.autograd.grad(loss, tailor.gate, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(seen, sum(apart))


def test_more_steps_than_announced_are_told_of():
    tailor = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tailor, sgd(tailor.model), steps=STEPS + 5)
    with pytest.warns(RuntimeWarning, match=r"called 60 times, but steps=40 was given.*epochs x batches"):
        run(tailor, sgd(tailor.model), steps=100)
    again = made(network())
    again.load_state_dict(tailor.state_dict())
    assert again.taken == tailor.taken


def test_weights_loaded_before_compiled_code_runs_decide_where_the_phase_lies():
    torch.manual_seed(0)
    trained = network()
    for parameter in trained.parameters():
        if parameter.ndim == 2:  # entries that are tied together, as training does
            parameter.data = torch.outer(torch.randn(len(parameter)), torch.randn(parameter.shape[1]))
    tailor = made(phase="auto", steps=400)
    compiled = torch.compile(tailor, backend="eager")
    tailor.model.load_state_dict(trained.state_dict())
    F.cross_entropy(compiled(X), Y).backward()
    tailor.step(sgd(tailor.model))
    assert tailor.controller.phase == PHASE_TRAINED


def test_functional_calls_before_the_first_step():
    tailor = made().eval()
    values = {name: value.detach() for name, value in tailor.named_parameters()}
    gradients = grad(lambda values: F.cross_entropy(functional_call(tailor, values, (X,)), Y))(values)
    F.cross_entropy(tailor(X), Y).backward()
    for name, parameter in tailor.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Threads, hooks, and what is left behind


class Gate(nn.Module):
    """Waits where a thread is told to."""

    def __init__(self):
        super().__init__()
        self.events = {}

    def forward(self, x):
        if events := self.events.get(threading.current_thread().name):
            events[0].set()
            events[1].wait()
        return x


def test_a_call_in_another_thread_takes_the_gates_from_nobody():
    waiting = Gate()
    model = nn.Sequential(waiting, *network())
    tailor = made(model)
    run(tailor, sgd(model), steps=15)
    assert (tailor.gate < 1).any()
    tailor.eval()
    found = {}

    def call():
        with torch.no_grad():
            found[threading.current_thread().name] = tailor(X)

    threads = {}
    with torch.no_grad():
        expected = tailor(X)
    for name in "AB":
        waiting.events[name] = threading.Event(), threading.Event()
        threads[name] = threading.Thread(target=call, name=name)
        threads[name].start()
        waiting.events[name][0].wait()
    for name in "AB":
        waiting.events[name][1].set()
        threads[name].join()
        assert torch.equal(found[name], expected)
    assert model[1].weight is model[1]._parameters["weight"]


class WithBias(nn.Module):
    """Returns one of its parameters, as SigLIP does."""

    def __init__(self):
        super().__init__()
        self.net, self.bias = network(), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.net(x) + self.bias, self.bias


def test_a_parameter_that_is_returned_keeps_no_hooks():
    tailor = made(WithBias())
    for _ in range(3):
        tailor(X)
    assert not tailor.model.bias._backward_hooks


def test_a_tailor_that_a_module_leads_back_to_is_freed():
    tailor = made()
    tailor.model[0].register_forward_hook(lambda *_, tailor=tailor: None)
    alive = weakref.ref(tailor)
    del tailor
    gc.collect()
    assert alive() is None


def test_a_tailor_that_is_refused_leaves_the_model_plain(tmp_path):
    model = network()
    with pytest.raises(tcp.BudgetError) as error:
        made(model, budget={"macs": 0.0001})
    assert all(
        type(module).__module__.startswith("torch.nn")
        and type(module) in (nn.Sequential, nn.Linear, nn.BatchNorm1d, nn.ReLU)
        for module in model.modules()
    )
    assert error.value is not None  # its traceback is alive


def test_a_loaded_network_has_no_gradients(tmp_path):
    tailor = made()
    run(tailor, sgd(tailor.model))
    tcp.save(tailor.finish(), tmp_path / "small.safetensors")
    dense = network()
    F.cross_entropy(dense(X), Y).backward()
    small = tcp.load(dense, tmp_path / "small.safetensors")
    assert all(parameter.grad is None for parameter in small.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_options_of_numpy_are_kept_as_plain_numbers():
    tailor = made(phase=tuple(np.array([0.1, 0.6])), ramp=np.float64(0.4), min_width=np.float64(0.1))
    buffer = io.BytesIO()
    torch.save(tailor.progress(), buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.medium
@pytest.mark.parametrize("steps", [251, 305, 1001])
@pytest.mark.parametrize("refused", [0, 12])
def test_a_phase_that_ends_with_the_run_ends_in_time(steps, refused):
    """Also where units change places in the last ranking, and where steps are refused after it."""
    model = nn.Sequential(nn.Linear(32, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 4))
    channels = tcp.trace(model, X[:2])
    controller = Controller(channels, {"macs": 0.5}, steps=steps, phase=(0.0, 1.0))
    base = 1 + 0.2 * torch.rand(channels.units, generator=torch.Generator().manual_seed(0))
    due = controller.end - controller.lookahead
    for step in range(steps):
        gradient = base.clone()
        if step == due:  # the best of those that lose, and the worst that win, change places
            gradient[controller.losing] *= 30
        if steps - refused - 2 <= step < steps - 2:
            gradient[0] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.update(gradient)
    assert controller.frozen
    assert torch.equal(controller.gate, (~controller.losing).float())


def test_a_share_of_a_width_is_not_rounded_up_by_its_last_bit():
    class Family:
        def __init__(self, units):
            self.units = range(units)

    assert [least(share, Family(n)) for share, n in ((0.07, 100), (0.28, 25), (0.14, 50), (0.071, 100))] == [7, 7, 7, 8]
