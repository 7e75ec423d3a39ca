"""What is left behind or left out: gradients of gates without a step, networks without their gates, state that does not
follow, and sizes that show only with other inputs, in train mode, or with few channels left.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import tcp_core as tcp
from tcp_core.removal import remove

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(1))
STEPS = 30


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)),
    )


def made(model=None, **options):
    model = network() if model is None else model
    how = {"budget": {"macs": 0.5}, "steps": STEPS, "phase": (0.1, 0.7), "multiple": 1}
    return tcp.Tailor(model, X[:2], **how | options), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def step(tailor, optimizer, x=X, tailored=True):
    optimizer.zero_grad()
    F.cross_entropy(tailor(x), Y).backward()
    optimizer.step()
    return tailor.step() if tailored else None


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of gates that no step was taken on


def importance(between):
    """What the Tailor has measured after ten steps, with something ``between`` them."""
    tailor, optimizer = made(phase=(0.5, 1.0))
    for _ in range(10):
        step(tailor, optimizer)
        between(tailor, optimizer)
    return tailor.controller.importance


def given_up(tailor, optimizer):
    tailor(X * 9).pow(2).sum().mul(1e3).backward()
    optimizer.zero_grad()


def for_its_input(tailor, optimizer):
    x = X.clone().requires_grad_()
    tailor.eval()
    F.cross_entropy(tailor(x), Y.flip(0)).mul(1e3).backward()
    tailor.train().model.zero_grad()


def not_finite(tailor, optimizer):
    (tailor.eval()(X) * float("nan")).sum().backward()
    tailor.train()
    optimizer.zero_grad()


@pytest.mark.parametrize("between", [for_its_input, not_finite])
def test_a_backward_pass_without_a_step_is_not_added_to_the_next(between):
    assert torch.equal(importance(between), importance(lambda *_: None))


def test_a_batch_that_was_given_up_weighs_nothing():
    tailor, optimizer = made()
    step(tailor, optimizer, tailored=False)
    expected = tailor.gate.grad.clone()
    tailor, optimizer = made()
    given_up(tailor.eval(), optimizer)
    step(tailor.train(), optimizer, tailored=False)
    assert torch.equal(tailor.gate.grad, expected)


def test_a_batch_that_was_given_up_weighs_nothing_where_gradients_are_reset_after_the_forward_pass():
    """As in the README's loop: at the forward pass the gradients of the batch before are still there."""

    def gradient(*batches):
        tailor, optimizer = made()
        tailor.eval()
        for x in batches:
            loss = F.cross_entropy(tailor(x), Y)
            optimizer.zero_grad()
            loss.backward()  # of all but the last, no step follows
        return tailor.gate.grad

    assert torch.equal(gradient(9 * X, X), gradient(X))
    assert gradient(X).any()


def test_gradients_that_are_accumulated_are_added():
    def gradient(*parts):
        tailor, optimizer = made()
        tailor.eval()  # by running statistics, so that no part depends on another
        optimizer.zero_grad()
        for part in parts:
            F.cross_entropy(tailor(X[part]), Y[part]).backward()
        return tailor.gate.grad

    first, second = slice(0, 8), slice(8, 16)
    assert torch.allclose(gradient(first, second), gradient(first) + gradient(second))
    assert gradient(first).any()


def test_a_forward_pass_before_the_step_takes_nothing_from_it():
    tailor, optimizer = made()
    step(tailor, optimizer, tailored=False)
    expected = tailor.gate.grad.clone()
    optimizer.zero_grad()
    tailor(X)  # such as one that is logged, with gradients on
    tailor.controller.update = lambda gradient: seen.append(gradient)
    seen = []
    tailor.step()
    assert torch.equal(seen[0], expected)


def test_the_graph_of_a_step_is_not_kept():
    tailor, optimizer = made()
    alive = []
    tailor.model[2].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that create_graph may leak
            F.cross_entropy(tailor(X), Y).backward(create_graph=True)
        optimizer.step()
        tailor.step()
        for parameter in tailor.model.parameters():
            parameter.grad = None
    gc.collect()
    assert not any(reference() is not None for reference in alive)


# ---------------------------------------------------------------------------------------------------------------------
# Networks without their gates


@pytest.mark.medium
def test_a_network_that_is_still_tailored_is_not_taken_for_the_result(tmp_path):
    pytest.importorskip("onnxruntime")
    tailor, optimizer = made()
    with pytest.warns(RuntimeWarning, match="still being tailored.*Save it once tailor.shrunk"):
        tcp.save(tailor.model, tmp_path / "best.safetensors")
    with pytest.warns(RuntimeWarning, match="still being tailored.*Export it once"):
        tcp.export(tailor.model, tmp_path / "best.pt2", X[:2])
    batches = [(X, Y)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tcp.evaluate(tailor.model, batches)  # all gates are open
        tcp.save(network(), tmp_path / "other.safetensors")
    while tailor.open_units.all():
        step(tailor, optimizer)
    with pytest.warns(RuntimeWarning, match=r"still being tailored.*evaluate\(tailor"):
        tcp.evaluate(tailor.model, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tcp.evaluate(tailor, batches)
        while not step(tailor, optimizer):
            pass
        tcp.evaluate(tailor.model, batches)
        tcp.save(tailor.model, tmp_path / "best.safetensors")


def test_an_average_that_begins_after_the_shrink_needs_no_carrying():
    tailor, optimizer = made()
    while not step(tailor, optimizer):
        pass
    with pytest.raises(RuntimeError, match="made smaller already"):
        tailor.carry(torch.optim.swa_utils.AveragedModel(tailor.model))


# ---------------------------------------------------------------------------------------------------------------------
# What is known when training begins


def test_weights_that_are_loaded_later_decide_where_the_phase_lies():
    trained = network()
    for parameter in trained.parameters():
        if parameter.ndim > 1:  # as training does, tie the entries together
            rows = parameter.data.flatten(1)
            rows += 3 * rows[:1] * torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(2))
    expected, _ = made(copy.deepcopy(trained), steps=200, phase="auto")
    tailor, optimizer = made(steps=200, phase="auto")
    assert (tailor.controller.maturity, expected.controller.maturity) == (0.0, 1.0)
    tailor.model.load_state_dict(trained.state_dict())
    step(tailor, optimizer)
    assert tailor.controller.phase == expected.controller.phase
    assert tailor.controller.trust == expected.controller.trust
    place = tailor.controller.phase
    tailor.model.load_state_dict(network(3).state_dict())  # what is loaded in mid-run is not a start
    step(tailor, optimizer)
    assert tailor.controller.phase == place


def test_a_maturity_that_was_given_stays():
    tailor, optimizer = made(steps=200, phase="auto", maturity=1.0)
    tailor.model.load_state_dict(network(3).state_dict())
    step(tailor, optimizer)
    assert tailor.controller.maturity == 1.0


def test_a_budget_above_the_dense_network_is_told_of():
    with pytest.warns(RuntimeWarning, match="the network is within the budget already.*are the units right"):
        made(budget={"macs": "600M"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(budget={"macs": 1.0})
        made(budget={"macs": 0.5, "params": "600M"})


# ---------------------------------------------------------------------------------------------------------------------
# State that does not follow


class Preconditioned(torch.optim.SGD):
    """Keeps a matrix for each dimension of a parameter, as Shampoo (by name) and Kron (in a list) do."""

    listed = False

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                factors = [torch.rand(size, size) for size in parameter.shape]
                own = {"Q": factors} if self.listed else {f"precond_{n}": each for n, each in enumerate(factors)}
                self.state[parameter].update(own)
        return super().step(closure)


@pytest.mark.parametrize("listed", [False, True])
def test_a_matrix_of_a_dimension_is_not_taken_for_a_moment(listed):
    torch.manual_seed(0)
    layers = (nn.Linear(12, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    model = nn.Sequential(*layers)
    optimizer = Preconditioned(model.parameters(), lr=0.01)
    optimizer.listed = listed
    x = torch.randn(16, 12)
    F.cross_entropy(model(x), Y).backward()
    optimizer.step()
    channels = tcp.trace(model, x[:2])
    open_units = torch.ones(channels.units, dtype=torch.bool)
    for family in channels.families:  # equally many of both sides: what is cut by chance would be square
        open_units[family.units[channels.prunable[family.units]][:16]] = False
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        small = remove(model, channels, open_units, optimizer=optimizer)
    assert any("for '2.weight' of shape (32, 32), which cannot be cut" in str(each.message) for each in seen)
    assert not optimizer.state[small[2].weight]


class Anchored(torch.optim.SGD):
    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.param_groups[0]["anchor"] = [p.detach().clone() for p in self.param_groups[0]["params"]]


def test_tensors_outside_of_state_are_named_at_the_first_step():
    tailor, _ = made()
    with pytest.raises(RuntimeError, match="parameter groups as 'anchor'"):
        step(tailor, Anchored(tailor.model.parameters(), lr=0.02))
    tailor, optimizer = made()
    tailor.model[0].weight.hess = torch.rand_like(tailor.model[0].weight)
    with pytest.raises(RuntimeError, match="'0.weight' has a tensor of its shape in its attribute 'hess'"):
        step(tailor, optimizer)


def test_an_optimiser_may_be_loaded_before_the_tailor():
    tailor, optimizer = made()
    while not step(tailor, optimizer):
        pass
    states = copy.deepcopy((tailor.state_dict(), optimizer.state_dict()))
    other, of_other = made(network(5))
    of_other.load_state_dict(states[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(states[0])
    for one, two in zip(tailor.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["momentum_buffer"], of_other.state[two]["momentum_buffer"])


# ---------------------------------------------------------------------------------------------------------------------
# Sizes that show only sometimes


class Sized(nn.Module):
    """Multiplies by something of the width, where ``how`` says so."""

    def __init__(self, how):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 4, 1, bias=False)
        self.how = how
        self.register_buffer("share", torch.tensor(0.0))

    def forward(self, x, mask=None):
        x = F.relu(self.norm(self.first(x)))
        width = x.shape[1] ** -0.5
        if self.how == "behind a mask":
            x = x + mask * x * width
        elif self.how == "behind a buffer":
            x = x + self.share * x * width
        elif self.how == "in training":
            x = x * (width if self.training else 24**-0.5)
        elif self.how == "where it is wide":
            x = x * 0.5 if x.shape[1] >= 12 else x
        elif self.how == "by groups of eight":
            x = x / (x.shape[1] // 8)
        elif self.how == "of an image":
            x = x * width
        return self.last(x)


@pytest.mark.parametrize(
    ("how", "inputs", "prunable"),
    [
        ("", (X[:2],), 24),
        ("", (torch.zeros(2, 3, 8, 8),), 24),
        ("of an image", (torch.zeros(2, 3, 8, 8),), 0),
        ("behind a mask", (X[:2], torch.zeros(2, 1, 8, 8)), 0),
        ("behind a buffer", (X[:2],), 0),
        ("in training", (X[:2],), 0),
        ("where it is wide", (X[:2],), 0),
        ("by groups of eight", (X[:2],), 0),
    ],
)
def test_sizes_are_found_whatever_hides_them(how, inputs, prunable):
    model = Sized(how)
    before = copy.deepcopy(model.state_dict())
    channels = tcp.trace(model, inputs)
    assert int(channels.prunable.sum()) == prunable
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class NotZero(Sized):
    """Refuses what zeros are filled with."""

    def forward(self, x, mask=None):
        assert self.share == 0
        assert mask is None or not mask.any()
        return super().forward(x)


def test_zeros_that_mean_something_stay():
    channels = tcp.trace(NotZero(""), (X[:2], torch.zeros(2, 1)))
    assert channels.prunable.sum() == 24
    assert not channels.example[0][1].any()


class Clamped(nn.Conv2d):
    def forward(self, x):
        self.weight.data.clamp_(-9, 9)  # which changes nothing as yet
        return super().forward(x)


class ActNorm(nn.Module):
    """Set by the first batch, as in flows."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("known", torch.tensor(False))

    def forward(self, x):
        if self.training and not self.known:
            self.bias.data.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.known.fill_(True)
        return x + self.bias


@pytest.mark.parametrize("layer", [Clamped(3, 24, 3), nn.Sequential(nn.Conv2d(3, 24, 3), ActNorm(24))])
def test_parameters_that_a_forward_pass_writes_to_stay(layer):
    channels = tcp.trace(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(24, 4, 1)), X[:2])
    assert not channels.prunable.any()
    assert {cause.kind for cause in channels.causes} == {"fixed"}


# ---------------------------------------------------------------------------------------------------------------------
# Norms of buffers


@pytest.mark.medium
def test_frozen_batch_norms_are_pruned_as_batch_norms_are():
    images = torch.randn(2, 3, 32, 32)

    def build(norm):
        torch.manual_seed(0)
        return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)

    expected = tcp.trace(build(nn.BatchNorm2d), images)
    model = build(FrozenBatchNorm2d)
    for name, buffer in model.named_buffers():
        buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    channels = tcp.trace(model, images)
    assert torch.equal(channels.prunable, expected.prunable)
    assert channels.cost()["macs"] == expected.cost()["macs"]
    assert channels.bytes()["memory"] == expected.bytes()["memory"]
    assert sorted(site.weight for site in channels.sites) == sorted(site.weight for site in expected.sites)
    open_units = torch.rand(channels.units, generator=torch.Generator().manual_seed(3)) > 0.5
    open_units[torch.stack([family.units[0] for family in channels.families])] = True
    small = remove(model, channels, open_units)
    assert sum(p.numel() for p in small.parameters()) == channels.cost(open_units)["params"]
    gated = tcp.close(model, channels, open_units)
    with torch.no_grad():
        for one, two in zip(gated(images).values(), small(images).values(), strict=True):
            assert torch.allclose(one, two, atol=1e-4 * float(one.abs().max()))
