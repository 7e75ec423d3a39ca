"""The network shrinks in place: the same objects, and everything that holds them goes on."""

import copy
import gc
import io
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import some_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from zoo import random_open

from tcp_core import RemovalError, Tailor, remove, shrinking, trace
from tcp_core.carrying import Cuts, cut_value, take
from tcp_core.maturity import PHASE_TRAINED
from tcp_core.removal import dense_shapes

STEPS = 96


def network(width=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.Conv2d(width, 16, 1, bias=False)),
        *(nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 3), nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randn(8, 3, 8, 8), torch.randint(4, (8,))


def made(seed=0, budget=0.5, **options):
    model = network(seed=seed)
    return model, Tailor(
        model, batch()[0][:2], budget={"macs": budget}, steps=STEPS, **{"phase": PHASE_TRAINED} | options
    )


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.9} | options)


def run(tailor, *optimizers, steps=20, until_shrunk=False, called=None, every=lambda: None, **options):
    """A user's loop, `steps` long or until the network has become smaller; gives the losses."""
    x, y = batch()
    losses = []
    for _ in range(STEPS if until_shrunk else steps):
        loss = F.cross_entropy((tailor if called is None else called)(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        every()
        if tailor.step(**options) and until_shrunk:
            break
    return losses


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# -------------------------------------------------------------------------------------------------
# The same objects


def test_modules_parameters_and_buffers_stay_the_same_objects():
    model, tailor = made()
    before = [*model.modules()], tensors(model)
    sizes = {name: tensor.numel() for name, tensor in before[1].items()}
    optimizer = sgd(model.parameters())
    run(tailor, optimizer, until_shrunk=True)
    assert tailor.shrunk
    assert tailor.model is model
    assert tailor.finish() is model
    assert all(a is b for a, b in zip(model.modules(), before[0], strict=True))
    assert {name: id(t) for name, t in tensors(model).items()} == {name: id(t) for name, t in before[1].items()}
    assert sum(p.numel() for p in model.parameters()) == tailor.report()["current"]["params"]
    assert any(tensor.numel() < sizes[name] for name, tensor in tensors(model).items())
    first, norm, _, depthwise, _, _, _, last, prelu, *_ = model
    assert len(first.weight) == first.out_channels == norm.num_features == len(norm.running_mean)
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == first.out_channels
    assert prelu.num_parameters == last.out_channels
    assert dense_shapes(model) == {name: tuple(tensor.shape) for name, tensor in tensors(network()).items()}
    assert [type(module) for module in model] == [type(module) for module in network()]


def test_what_hangs_on_a_parameter_survives():
    model, tailor = made()
    model.to(memory_format=torch.channels_last)
    weight = model[7].weight
    model[0].weight.label = "stem"
    weak, fired = weakref.ref(weight), []
    weight.register_hook(lambda gradient: fired.append(("hook", gradient.shape)))
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(("after", parameter.grad.shape)))
    model[7].register_forward_hook(lambda module, _, out: fired.append(("forward", out.shape[1])))
    run(tailor, sgd(model.parameters()), until_shrunk=True)
    assert weak() is weight is model[7].weight
    assert model[0].weight.label == "stem"
    assert weight.shape[1] > 1  # else both layouts are the same
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.grad.shape == weight.shape  # cut along
    fired.clear()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert fired == [("forward", len(weight)), ("hook", weight.shape), ("after", weight.shape)]


def test_an_old_loss_that_is_still_alive_does_not_disturb():
    model, tailor = made()
    x, y = batch()
    optimizer, kept = sgd(model.parameters()), []
    run(tailor, optimizer, until_shrunk=True, every=lambda: kept.append(F.cross_entropy(tailor(x), y)))
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    with pytest.raises(RuntimeError):  # of a network that is no more
        kept[-1].backward()


def test_clipping_right_after_counts_what_is_stepped_on():
    model, tailor = made()
    x, y = batch()
    optimizer = sgd(model.parameters())
    run(tailor, optimizer, until_shrunk=True)
    for parameters in (model.parameters, tailor.parameters):
        optimizer.zero_grad()
        (1000 * F.cross_entropy(tailor(x), y)).backward()
        norm = torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm()
        torch.testing.assert_close(nn.utils.clip_grad_norm_(parameters(), 1.0), norm)
        clipped = torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm()
        assert clipped < 1.001


def test_the_dense_tensors_are_freed():
    model, tailor = made()
    optimizer = torch.optim.AdamW(model.parameters())
    run(tailor, optimizer, steps=5)
    held = [*tensors(model).values()]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    memory = [(t, weakref.ref(t.untyped_storage()), t.shape) for t in held]
    run(tailor, optimizer, until_shrunk=True)
    smaller = [storage() for tensor, storage, shape in memory if tensor.shape != shape]
    assert len(smaller) > 20
    gc.collect()
    assert not any(storage is not None for storage in smaller)


def test_nothing_has_changed_where_the_comparison_fails(monkeypatch):
    model, tailor = made()
    optimizer = sgd(model.parameters())
    run(tailor, optimizer, until_shrunk=False, shrink=False)
    assert tailor.frozen
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])

    def fail(*_, **__):
        raise RemovalError("differs")

    with monkeypatch.context() as patch:
        patch.setattr(shrinking, "remove", fail)
        with pytest.raises(RemovalError):
            tailor.step(optimizer)
    assert not tailor.shrunk
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)
    run(tailor, optimizer, steps=1)
    assert tailor.shrunk


def test_cuts_that_fail_half_way_are_undone(monkeypatch):
    model, tailor = made()
    optimizer = sgd(model.parameters())
    run(tailor, optimizer, shrink=False)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    add = Cuts.set

    def spoilt(self, holder, key, value):
        add(self, holder, key, value)
        add(self, object(), "absent", 1)  # which has no attributes

    with monkeypatch.context() as patch:
        patch.setattr(Cuts, "set", spoilt)
        with pytest.raises(AttributeError):
            tailor.step()
    assert not tailor.shrunk
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)
    assert model[0].out_channels == 12
    run(tailor, optimizer, steps=1)
    assert tailor.shrunk


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked for by torch.compile
@pytest.mark.parametrize(
    ("what", "backend"),
    [
        *(("tailor", "aot_eager"), ("model", "eager"), ("layers", "eager")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tailor", "eager"), ("model", "aot_eager"))),
        pytest.param("layers", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_go_on(what, backend):
    torch.compiler.reset()
    runs = []
    for compiled in (False, True):
        model, tailor = made()
        called = tailor
        if compiled and what == "tailor":
            called = torch.compile(tailor, backend=backend, fullgraph=True)
        elif compiled and what == "model":
            model.compile(backend=backend)
        elif compiled:
            model[3].compile(backend=backend)
        optimizer = sgd(model.parameters())
        losses = run(tailor, optimizer, steps=22, called=called)
        assert tailor.shrunk
        runs.append((losses, model.state_dict()))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------
# Optimisers


def halves(model):
    parameters = list(model.parameters())
    return parameters[:6], parameters[6:]


def moved(model, step):
    before = [p.detach().clone() for p in model.parameters()]
    step()
    return [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]


@pytest.mark.medium
def test_every_optimizer_goes_on_whether_given_or_not():
    x, y = batch()
    runs = []
    for given in (0, 1, 2):
        model, tailor = made()
        first, second = halves(model)
        optimizers = [sgd(first), torch.optim.AdamW(second, lr=0.01)]
        losses = []
        for _ in range(25):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(tailor(x), y)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            tailor.step(*optimizers[:given])
            losses.append(loss.item())
        assert tailor.shrunk
        assert all(moved(model, partial(run, tailor, *optimizers, steps=1)))
        runs.append(losses)
    assert runs[0] == runs[1] == runs[2]


def test_a_parameter_that_no_optimizer_trains_is_named_at_once():
    model, tailor = made()
    optimizer = sgd([p for name, p in model.named_parameters() if name != "7.bias"])
    with pytest.raises(RuntimeError, match=r"no optimiser is known that trains '7.bias'.*requires_grad_\(False\)"):
        run(tailor, optimizer)
    assert tailor.controller.step_count == 0
    model[7].bias.requires_grad_(False)
    run(tailor, optimizer)
    assert tailor.shrunk


def test_without_any_optimizer_the_network_is_not_made_smaller_in_a_run():
    model, tailor = made()
    with pytest.raises(RuntimeError, match="no optimiser is known that trains '0.weight' and 11 more parameters"):
        run(tailor)
    assert sum(p.numel() for p in model.parameters()) == tailor.report()["dense"]["params"]
    assert tailor.finish() is model  # a run that is over needs none
    assert sum(p.numel() for p in model.parameters()) == tailor.report()["current"]["params"]


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_are_trained_by_hand_are_noticed_at_the_second_step(through_data):
    model, tailor = made()

    def by_hand():
        for parameter in model.parameters():
            if through_data:
                parameter.data -= 0.05 * parameter.grad
            else:
                with torch.no_grad():
                    parameter -= 0.05 * parameter.grad
            parameter.grad = None

    x, y = batch()
    F.cross_entropy(tailor(x), y).backward()
    by_hand()
    tailor.step()  # one that is made from now on would do
    F.cross_entropy(tailor(x), y).backward()
    by_hand()
    with pytest.raises(RuntimeError, match="call tailor.step\\(shrink=False\\)"):
        tailor.step()
    tailor.step(shrink=False)


def test_an_optimizer_of_something_else_is_refused():
    _, tailor = made()
    other = sgd(network().parameters())
    tailor(batch()[0]).sum().backward()
    with pytest.raises(ValueError, match="this SGD holds no parameter of the model"):
        tailor.step(other)
    with pytest.raises(TypeError, match="takes optimisers; got Sequential"):
        tailor.step(network())


class Factored(torch.optim.Optimizer):
    """Keeps what it would be guessing to cut."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["basis"] = torch.ones(3, len(parameter))
                parameter -= 0.01 * parameter.grad * state["basis"][0].view(-1, *[1] * (parameter.ndim - 1))


def test_state_that_is_not_understood_starts_anew_and_is_named():
    model, tailor = made()
    optimizer = Factored(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tailor, optimizer, until_shrunk=True)
    assert "Factored keeps basis of shape (3, 12) for '0.weight' of shape (12, 3, 3, 3)" in str(caught[0].message)
    run(tailor, optimizer, steps=1)
    assert optimizer.state[model[0].weight]["basis"].shape == (3, len(model[0].weight))


class Slow(torch.optim.SGD):
    """Keeps tensors where nobody looks, as some Lookaheads do."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


def test_state_outside_of_the_state_is_refused_before_training():
    model, tailor = made()
    with pytest.raises(RuntimeError, match="Slow keeps a tensor of a parameter's shape in its attribute 'slow'"):
        run(tailor, Slow(model.parameters()))
    assert tailor.controller.step_count == 0


@pytest.mark.parametrize(
    ("key", "shape", "dims"),
    [
        ("exp_avg", (5, 4, 3, 3), (0, 1)),
        ("row_var", (5, 4, 3, 1), (0, 1)),
        ("col_var", (5, 4, 1, 3), (0, 1)),
        ("scale", (5, 1, 1, 1), (0, None)),
        ("exp_avg_sq_row", (5, 4, 3), (0, 1)),
        ("exp_avg_sq_col", (5, 4, 3), (0, 1)),
    ],
)
def test_shapes_of_state_that_are_understood(key, shape, dims):
    kept = torch.tensor([0, 2, 3]), torch.tensor([1, 3]), None, None
    value = torch.randn(shape)
    expected = value
    for dim, index in enumerate(dims):
        if index is not None:
            expected = expected.index_select(dim, kept[index])
    assert torch.equal(cut_value(key, value, (5, 4, 3, 3), kept), expected)
    step = torch.tensor(7.0)
    assert cut_value("step", step, (5, 4, 3, 3), kept) is step
    flat = torch.randn(5 * 4 * 9)
    found = cut_value("p0", flat, (5, 4, 3, 3), kept)
    assert torch.equal(found.view(3, 2, 3, 3), flat.view(5, 4, 3, 3)[kept[0]][:, kept[1]])
    assert cut_value("basis", torch.randn(7, 5), (5, 4, 3, 3), kept) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 4, 1, 1), (5, 1, 3, 3)])
def test_taking_keeps_the_layout(shape, layout):
    tensor = torch.randn(shape).to(memory_format=layout)
    found = take(tensor, (torch.tensor([0, 2]), None))
    assert torch.equal(found, tensor[[0, 2]])
    assert found.stride() == torch.empty(2, *shape[1:]).to(memory_format=layout).stride()


OPTIMIZERS = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), fused=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_go_on(kind):
    model, tailor = made()
    optimizer = OPTIMIZERS[kind](model.parameters())
    run(tailor, optimizer, steps=14, until_shrunk=True)
    for parameter, state in optimizer.state.items():
        assert state
        for value in state.values():
            if torch.is_tensor(value) and value.numel() > 1:
                assert all(size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True))
    assert all(moved(model, lambda: run(tailor, optimizer, steps=2)))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_muon_beside_adamw():
    """Muon takes matrices only: linear layers here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(32, 6), torch.randint(4, (32,))
    tailor = Tailor(model, x[:2], budget={"macs": 0.5}, steps=STEPS, phase=PHASE_TRAINED)
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == flag] for flag in (True, False))
    optimizers = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)

    def step():
        loss = F.cross_entropy(tailor(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        tailor.step()

    for _ in range(20):
        step()
    assert tailor.shrunk
    assert all(moved(model, step))
    assert all(optimizers[0].state[p]["momentum_buffer"].shape == p.shape for p in matrices)


def test_lbfgs_keeps_its_curvature():
    model, tailor = made()
    x, y = batch()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(tailor(x), y)
        loss.backward()
        return loss

    while not tailor.shrunk:
        optimizer.step(closure)
        tailor.step()
    state = optimizer.state[next(model.parameters())]
    size = sum(p.numel() for p in model.parameters())
    assert len(state["old_dirs"]) == len(state["old_stps"]) == len(state["ro"]) > 0
    for y_, s, ro in zip(state["old_dirs"], state["old_stps"], state["ro"], strict=True):
        assert y_.shape == s.shape == (size,)
        torch.testing.assert_close(ro, 1 / y_.dot(s))
    before = closure().item()
    for _ in range(5):
        optimizer.step(closure)
    assert closure().item() < before


# -------------------------------------------------------------------------------------------------
# Moving averages


def averages(kind, model, tailor):
    average = get_ema_multi_avg_fn(0.9)
    if kind == "timm":
        return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9), model
    if kind == "dict":
        return {name: value.clone() for name, value in model.state_dict().items()}, model
    of = tailor if kind == "tailor" else model
    return AveragedModel(of, multi_avg_fn=average, use_buffers=kind == "buffers"), of


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["model", "buffers", "tailor", "timm", "dict"])
def test_averages_are_carried_and_go_on(kind):
    runs = []
    for shrink in (True, False):
        model, tailor = made()
        average, of = averages(kind, model, tailor)
        tailor.carry(average)
        optimizer = sgd(model.parameters())

        def update(average=average, of=of):
            if kind == "dict":
                for name, value in of.state_dict().items():
                    average[name].lerp_(value.to(average[name].dtype), 0.1) if value.is_floating_point() else None
            elif kind == "timm":
                average.update(of)
            else:
                average.update_parameters(of)

        run(tailor, optimizer, steps=25, every=update, shrink=shrink)
        if kind == "tailor" and not shrink:
            assert torch.equal(average.module.gate, tailor.gate)  # it runs as gated as what it averages
        runs.append((tailor, average))
    (tailor, small), (gated, dense) = runs
    assert tailor.shrunk
    if kind == "dict":
        for name, value in small.items():
            torch.testing.assert_close(value, take(dense[name], tailor.channels.kept(name, tailor.open_units)))
        return
    x = batch()[0]
    assert sum(p.numel() for p in small.parameters()) == tailor.report()["current"]["params"]
    if kind == "tailor":
        assert small.module.shrunk
        torch.testing.assert_close(small.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-5)
    inner = small.module.model if kind == "tailor" else small.module
    dense = dense.module.model if kind == "tailor" else dense.module
    for name, value in tensors(inner).items():
        expected = take(tensors(dense)[name], tailor.channels.kept(name, tailor.open_units))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_an_average_that_is_not_carried_does_not_go_on_in_silence():
    model, tailor = made()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = sgd(model.parameters())
    run(tailor, optimizer, until_shrunk=True, every=lambda: average.update_parameters(model))
    with pytest.raises((RuntimeError, ValueError)):
        average.update_parameters(model)


def test_only_an_average_of_this_network_is_carried():
    _, tailor = made()
    with pytest.raises(ValueError, match="AveragedModel holds no copy of the network"):
        tailor.carry(AveragedModel(network(16)))
    with pytest.raises(ValueError, match=r"'0.bias' of shape \(3,\) is absent"):
        tailor.carry({"0.bias": torch.zeros(3)})
    with pytest.raises(TypeError, match="modules and dicts of tensors by name; got list"):
        tailor.carry([])


# -------------------------------------------------------------------------------------------------
# The gate is nobody's parameter


def test_the_gate_is_no_parameter():
    model, tailor = made()
    assert [id(p) for p in tailor.parameters()] == [id(p) for p in model.parameters()]
    assert not any("gate" in name for name in tailor.state_dict())
    assert [id(b) for b in tailor.buffers()] == [id(b) for b in model.buffers()]
    tailor(batch()[0]).sum().backward()
    assert tailor.gate.grad.any()
    tailor.zero_grad()
    assert tailor.gate.grad is None
    assert tailor.to(torch.float64).gate.dtype == torch.float32


@pytest.mark.medium
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_clipping_the_tailor_is_clipping_the_model(decay):
    found = []
    for whole in (True, False):
        model, tailor = made()
        parameters = (tailor if whole else model).parameters
        run(
            tailor,
            sgd(parameters(), weight_decay=decay),
            every=lambda parameters=parameters: nn.utils.clip_grad_norm_(parameters(), 0.1),
        )
        found.append((tailor.report()["widths"], [p.tolist() for p in model.parameters()]))
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------------
# Stopped and resumed


def stopped(at, kind, file):
    """A loop that saves at one step; gives the losses after it."""
    model, tailor = made()
    optimizer = (torch.optim.AdamW if kind == "adamw" else sgd)(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def step():
        losses = run(tailor, optimizer, steps=1)
        schedule.step()
        return losses

    for _ in range(at):
        step()
    parts = {"tailor": tailor, "optimizer": optimizer, "schedule": schedule}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    return [step() for _ in range(10)], model.state_dict(), tailor


@pytest.mark.medium
@pytest.mark.parametrize(("at", "kind"), some_of([0, 5, 11, 20], ["sgd", "adamw"], step=3))
def test_a_loop_that_is_resumed_is_one_that_was_not_stopped(at, kind):
    file = io.BytesIO()
    losses, weights, first = stopped(at, kind, file)
    assert first.shrunk == (at > 0)
    file.seek(0)
    model, tailor = made(seed=7)  # other weights, which are overwritten
    optimizer = (torch.optim.AdamW if kind == "adamw" else sgd)(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    state = torch.load(file, weights_only=True)
    parameters = [id(p) for p in model.parameters()]
    tailor.load_state_dict(state["tailor"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert tailor.shrunk == (at == 20)

    def step():
        found = run(tailor, optimizer, steps=1)
        schedule.step()
        return found

    assert [step() for _ in range(10)] == losses
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert parameters == [id(p) for p in model.parameters()]
    assert str(tailor.trajectory) == str(first.trajectory)
    assert str(tailor.report()) == str(first.report())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 0.4}, r"bounds is not the same \(.* there, .* here\)"),
        ({"ignore": "0"}, "prunable is not the same"),
        ({"phase": (0.1, 0.3)}, r"phase is not the same \(\[2, 14\] there, \[10, 29\] here\)"),
        ({"maturity": 0.5}, r"maturity is not the same \(None there, 0\.5 here\)"),
        ({"min_width": 3}, r"min_width is not the same \(1 there, 3 here\)"),
        ({"multiple": 4}, r"multiple is not the same \(\(8, 4, 1\) there, \(4,\) here\)"),
    ],
)
def test_the_state_of_another_run_is_refused(options, match):
    model, tailor = made()
    run(tailor, sgd(model.parameters()))
    assert tailor.shrunk
    state = tailor.state_dict()
    other, fresh = made(**options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"this state is of another run: {match}.*Build the Tailor as it was"):
        fresh.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    assert fresh.controller.step_count == 0


def test_the_state_of_another_length_or_network_is_refused():
    model, tailor = made()
    state = tailor.state_dict()
    for other in (
        Tailor(network(), batch()[0][:2], budget={"macs": 0.5}, steps=2 * STEPS, phase=PHASE_TRAINED),
        Tailor(network(16), batch()[0][:2], budget={"macs": 0.5}, steps=STEPS, phase=PHASE_TRAINED),
    ):
        with pytest.raises(ValueError, match=r"this state is of another run: (steps is not the same \(96|network is)"):
            other.load_state_dict(state)


def test_a_state_that_says_nothing_of_maturity_is_taken():
    model, tailor = made()
    state = tailor.progress()
    assert state["run"].pop("maturity") is None  # as of an earlier version
    made(maturity=0.5)[1].resume(state)


def test_strict_loading_means_what_it_means_to_torch():
    model, tailor = made()
    state = tailor.state_dict()
    extra = state.pop("_extra_state")
    with pytest.raises(RuntimeError, match="_extra_state"):
        tailor.load_state_dict(state)
    assert tailor.load_state_dict(state, strict=False).missing_keys == ["_extra_state"]
    tailor.load_state_dict(state | {"_extra_state": extra})


def test_a_tailor_that_is_small_already_takes_only_its_own_state():
    model, tailor = made()
    dense = copy.deepcopy(tailor.state_dict())
    run(tailor, sgd(model.parameters()))
    tailor.load_state_dict(tailor.state_dict())
    with pytest.raises(ValueError, match="made smaller already"):
        tailor.load_state_dict(dense)


def test_copies_are_plain_or_gated_as_what_they_are_copies_of():
    model, tailor = made()
    tailor.gate.data.uniform_(0.2, 0.8)
    x = batch()[0]
    model.eval()
    expected = tailor(x)
    torch.testing.assert_close(copy.deepcopy(tailor)(x), expected)
    plain = copy.deepcopy(model)
    assert [type(m) for m in plain] == [type(m) for m in network()]
    assert not torch.allclose(plain(x), expected)
    torch.testing.assert_close(plain(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), plain(x))


def test_a_tailor_that_is_given_up_leaves_a_plain_network():
    model, tailor = made()
    assert type(model[1]) is not nn.BatchNorm2d
    del tailor
    gc.collect()
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert not any("gates" in name for m in model for name in vars(m))


def test_tailoring_is_silent():
    model, tailor = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tailor, sgd(model.parameters()))


class Grid(nn.Module):
    """Weighs pixels by where they are; the buffer is made by the first forward pass, for its size."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.zeros(1, 1, 1, 1), persistent=False)

    def forward(self, x):
        if self.grid.shape[2:] != x.shape[2:]:
            self.grid = torch.linspace(0, 1, x.shape[-1]).expand(1, 1, *x.shape[2:]).clone()
        return x * (1 + self.grid)


def test_buffers_that_a_forward_pass_makes_anew_are_no_other_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Grid(), nn.Conv2d(16, 8, 3), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    average = AveragedModel(model, use_buffers=False)
    channels = trace(model, x)
    assert model[2].grid.numel() == 1  # tracing leaves no trace
    open_units = random_open(channels, 0.5)
    small = remove(model, channels, open_units)
    with torch.no_grad():
        wide = small(torch.randn(1, 3, 16, 12))
    assert wide.shape[0] == 1
    assert small[0].out_channels == int(open_units[channels.families[0].units].sum()) < 16
    other = copy.deepcopy(model)
    other[2].register_buffer("other", torch.zeros(1))
    with pytest.raises(ValueError, match=r"not the model that was traced: '2\.other'"):
        remove(other, channels, open_units)
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=100)
    tailor.carry(average)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(100):
        loss = tailor(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tailor.step()
    assert tailor.finish()[0].out_channels == average.module[0].out_channels < 16


@pytest.mark.parametrize("kind", ["lbfgs", "lists"])
def test_a_copy_takes_along_no_state_that_does_not_fit(kind):
    model, (x, y) = network(), batch()
    if kind == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    else:
        optimizer = sgd(model.parameters())

    def closure(called):
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        loss.backward()
        return loss

    optimizer.step(partial(closure, model))
    if kind == "lists":
        for parameter in model.parameters():
            optimizer.state[parameter]["history"] = [torch.zeros_like(parameter)]
    channels = trace(model, x[:2])
    small = remove(model, channels, random_open(channels, 0.5), optimizer=optimizer)
    if kind == "lists":
        for parameter in small.parameters():
            assert optimizer.state[parameter]["history"][0].shape == parameter.shape
    optimizer.step(partial(closure, small))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in small.parameters()
    )


def test_evaluated_in_inference_mode_and_trained_on_after_a_copy():
    _, tailor = made()
    tailor = copy.deepcopy(tailor)  # its modules are bound anew when it is first called
    with torch.inference_mode():
        tailor.eval()(batch()[0])
    tailor.train()
    assert run(tailor, sgd(tailor.model.parameters()), steps=3)
