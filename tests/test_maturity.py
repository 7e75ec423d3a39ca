"""How far a network is trained, told from its weights: on many starts, and as training goes on."""

import copy
import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import tcp_core as tcp
from tcp_core import nets
from tcp_core.datasets.sources import digits
from tcp_core.maturity import PHASE_FRESH, PHASE_TRAINED, excess, maturity

NETWORKS = ("resnet20", "resnet56", "small_resnet", "vgg16_bn", "mobilenet_v2", "densenet40_12", "googlenet")
FOREIGN = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "squeezenet1_1", "swin_t")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_ours_starts_fresh(name):
    torch.manual_seed(0)
    assert maturity(nets.build(name, num_classes=10)) == 0


@pytest.mark.parametrize("name", FOREIGN)
def test_a_network_of_torchvision_starts_fresh(name):
    torch.manual_seed(0)
    assert maturity(getattr(torchvision.models, name)(weights=None)) == 0


STARTS = {
    "default": lambda weight: None,
    "normal": lambda weight: nn.init.normal_(weight, std=3.0),
    "uniform": lambda weight: nn.init.uniform_(weight, -1e-3, 1e-3),
    "xavier": nn.init.xavier_uniform_,
    "truncated": lambda weight: nn.init.trunc_normal_(weight, std=0.02),
    "orthogonal": nn.init.orthogonal_,
    "identity": lambda weight: nn.init.dirac_(weight) if weight.ndim > 2 else nn.init.eye_(weight),
    "zeros": nn.init.zeros_,
    "constant": lambda weight: nn.init.constant_(weight, 0.1),
}


def plain(norm=True, width=16):
    layers, inputs = [], 1
    for outputs in (width, 2 * width, 2 * width, 4 * width):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs) if norm else nn.Identity()]
        layers, inputs = [*layers, nn.ReLU()], outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("start", [name for name in STARTS if name != "constant"])
@pytest.mark.parametrize("make", [plain, lambda: plain(width=3), perceptron])
def test_whatever_a_network_is_started_with_it_is_fresh(start, make):
    for seed in range(3):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                STARTS[start](parameter)
        assert maturity(model) <= 0.1


@pytest.mark.parametrize("shape", [(16, 9), (64, 27), (512, 4608), (2000, 50), (10, 3000)])
def test_independent_entries_have_no_excess_and_tied_ones_have(shape):
    torch.manual_seed(0)
    found = [excess(torch.randn(shape)) for _ in range(5)]
    assert max(found) < 0.05
    few = min(shape) // 2
    low_rank = torch.randn(shape[0], few) @ torch.randn(few, shape[1]) + 0.3 * torch.randn(shape)
    assert excess(low_rank) > 0.3
    for scale in (1e-30, 1e-3, 1e30):
        assert excess(low_rank * scale) == pytest.approx(excess(low_rank), rel=1e-3)


def test_weights_that_tell_nothing():
    assert excess(torch.zeros(8, 8)) is None
    assert excess(torch.randn(1, 64)) is None
    assert excess(torch.full((8, 8), torch.nan)) is None
    assert maturity(nn.ReLU()) == 0


@pytest.fixture(scope="module")
def images():
    part = digits().train
    return (part.pixels.float() / 255 - part.mean[0]) / part.std[0], part.labels


def trained(model, images, optimizer, epochs):
    pixels, labels = images
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()
    return model


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
}


MAKERS = {"plain": plain, "no norm": lambda: plain(norm=False), "perceptron": perceptron}
FAST = {("perceptron", "sgd"), ("perceptron", "adam"), ("no norm", "adam")}


@pytest.fixture(scope="module")
def mature(images):
    """A function that gives a network as it is after 15 epochs."""
    torch.manual_seed(0)
    model = plain()
    trained(model, images, OPTIMIZERS["sgd"](model.parameters()), 15)
    return lambda: copy.deepcopy(model)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("make", "optimizer"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product(MAKERS, OPTIMIZERS)
    ],
)
def test_maturity_rises_while_a_network_is_trained(make, optimizer, images):
    torch.manual_seed(0)
    model = MAKERS[make]()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    seen = [maturity(model)]
    for epochs in (1, 4, 10):
        seen.append(maturity(trained(model, images, optimizer, epochs)))
    assert seen[0] <= 0.1
    assert all(before <= after for before, after in itertools.pairwise(seen))
    assert seen[-1] >= 0.8

    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen backbone
    model[-1] = nn.Linear(model[-1].in_features, 7)  # and a new head
    assert maturity(model) >= 0.8


@pytest.mark.medium
def test_a_large_new_head_says_nothing_of_what_macs_are_spent_on(mature, images):
    model, x = mature(), images[0][:2]
    head = nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)
    model = nn.Sequential(*list(model)[:-1], *head)
    assert maturity(model) <= 0.3  # by entries
    for budget, least, most in (({"macs": 0.5}, 0.7, 1.0), ({"params": 0.5}, 0.0, 0.3)):
        found = tcp.Tailor(model, x, budget=budget, steps=1000).controller.maturity
        assert least <= found <= most


class Words(nn.Module):
    """A fresh network on word vectors that were trained elsewhere and stay as they are."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(500, 32)
        with torch.no_grad():
            self.words.weight.copy_(torch.randn(500, 4) @ torch.randn(4, 32))
        self.words.requires_grad_(False)
        self.first, self.second, self.head = nn.Conv1d(32, 24, 3), nn.Conv1d(24, 24, 3), nn.Linear(24, 4)

    def forward(self, x):
        x = self.second(self.first(self.words(x).transpose(1, 2)).relu()).relu()
        return self.head(x.mean(2))


def test_word_vectors_do_not_make_a_fresh_network_a_trained_one():
    torch.manual_seed(0)
    model = Words()
    assert maturity(model) == 1  # by entries
    tailor = tcp.Tailor(model, torch.randint(500, (2, 12)), budget={"macs": 0.5}, steps=1000)
    assert tailor.controller.maturity == 0


@pytest.mark.medium
def test_a_trained_network_gets_smaller_early_and_a_fresh_one_late(images, mature):
    model, x = mature(), images[0][:2]
    fresh = tcp.Tailor(plain(), x, budget={"macs": 0.5}, steps=1000)
    weights = copy.deepcopy(model.state_dict())
    late = tcp.Tailor(model, x, budget={"macs": 0.5}, steps=1000)
    assert fresh.report()["phase"] == PHASE_FRESH
    assert "phase 20 to 50 % of the run, for the weights at the start were those of a fresh network" in str(
        fresh.report()
    )
    assert late.report()["phase"] == PHASE_TRAINED
    assert "phase 2 to 15 % of the run, for the weights at the start were those of a trained network" in str(
        late.report()
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])  # it was only looked at
    asked = tcp.Tailor(model, x, budget={"macs": 0.5}, steps=1000, phase=(0.1, 0.25))
    assert "phase 10 to 25 % of the run, as asked" in str(asked.report())
    known = tcp.Tailor(model, x, budget={"macs": 0.5}, steps=1000, maturity=0.5)
    assert "phase 11 to 32.5 % of the run, for the weights at the start were those of one 50% on its way" in str(
        known.report()
    )


@pytest.mark.medium
def test_a_run_that_goes_on_in_a_fresh_network_keeps_its_phase(images, mature):
    """Checkpoints bring the weights, and what was decided from those that the run started with."""
    model = mature()
    x, y = images[0][:32], images[1][:32]
    tailor = tcp.Tailor(model, x, budget={"macs": 0.5}, steps=400)
    for _ in range(5):
        F.cross_entropy(tailor(x), y).backward()
        tailor.step()
    again = tcp.Tailor(plain(), x, budget={"macs": 0.5}, steps=400)
    assert again.controller.phase == PHASE_FRESH
    again.resume(tailor.progress())
    assert again.controller.phase == PHASE_TRAINED
    assert again.report()["maturity"] == 1
    assert str(again.report()) == str(tailor.report())


class Branched(nn.Module):
    """A network whose second layer has a branch beside it; ``kind`` says how that begins."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1)
        self.down, self.up = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(4, 24, 1, bias=False)
        self.head, self.kind, self.calls = nn.Linear(24, 10), kind, 0
        with torch.no_grad():
            for weight in self.parameters():  # tied together, as by training
                if weight.ndim > 1:
                    rows, columns = torch.randn(len(weight), 1), torch.randn(1, weight[0].numel())
                    weight += 0.2 * (rows * columns).view_as(weight)
        if kind in ("adapter", "cut off"):
            nn.init.zeros_(self.up.weight)
        if kind == "zero head":
            nn.init.zeros_(self.head.weight)
        if kind == "frozen":
            nn.init.zeros_(self.up.weight).requires_grad_(False)

    def forward(self, x):
        x = self.stem(x).relu()
        branch = self.up(self.down(x).relu())
        if self.training:
            self.calls += 1
            if self.kind == "dropped" and self.calls == 1:  # as stochastic depth may, for a whole batch
                branch = branch * 0
        if self.kind == "cut off":
            branch = branch.detach()
        return self.head((self.layer(x) + branch).relu().mean((2, 3)))


def begun(kind, images, steps=100, taken=3, **options):
    """Return the Tailor of a trained network after a few steps, the first ones of 100 until gates may move."""
    torch.manual_seed(0)
    pixels, labels = images
    tailor = tcp.Tailor(Branched(kind).train(), pixels[:2], budget={"macs": 0.5}, steps=steps, **options)
    optimizer = torch.optim.SGD(tailor.model.parameters(), lr=0.05)
    go_on(tailor, optimizer, images, taken)
    return tailor, optimizer


def go_on(tailor, optimizer, images, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(tailor(images[0][:64]), images[1][:64]).backward()
        optimizer.step()
        tailor.step(optimizer)


def test_a_trained_network_with_branches_that_begin_at_zero_counts_as_fresh(images):
    tailor, optimizer = begun("adapter", images, taken=2)
    assert tailor.report()["maturity"] == 1
    assert tailor.report()["phase"] == PHASE_TRAINED
    go_on(tailor, optimizer, images, 1)  # the first step at which gates could move
    assert tailor.report()["maturity"] == 0
    assert tailor.report()["phase"] == PHASE_FRESH
    assert tailor.controller.trust == 0
    assert "phase 20 to 50 % of the run, for branches of the network began at zero" in str(tailor.report())
    go_on(tailor, optimizer, images, 17)
    assert tailor.open_units.all()
    assert not tailor.trajectory
    go_on(tailor, optimizer, images, 80)
    assert tailor.shrunk


@pytest.mark.parametrize("kind", ["whole", "zero head", "dropped", "cut off", "frozen"])
def test_what_is_no_branch_that_begins_at_zero_is_left_early(kind, images):
    """A head of zeros hides everything for a step; a branch that is dropped has weights; what gets no gradient later is
    not awaited.
    """
    tailor, _ = begun(kind, images)
    assert tailor.report()["maturity"] == 1
    assert tailor.report()["phase"] == PHASE_TRAINED
    assert "those of a trained network" in str(tailor.report())


def test_a_maturity_that_is_given_holds_for_branches_that_begin_at_zero_too(images):
    assert begun("adapter", images, maturity=1.0)[0].report()["phase"] == PHASE_TRAINED
    asked = begun("adapter", images, phase=(0.02, 0.2))[0].report()
    assert asked["phase"] == (0.02, 0.2)
    assert asked["maturity"] == 0  # what was measured first counts no more than what came later


def test_branches_that_begin_at_zero_are_seen_behind_a_head_of_zeros_and_a_refused_step(images):
    torch.manual_seed(0)
    model = Branched("adapter")
    nn.init.zeros_(model.head.weight)
    tailor = tcp.Tailor(model, images[0][:2], budget={"macs": 0.5}, steps=300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    (F.cross_entropy(tailor(images[0][:64]), images[1][:64]) * float("inf")).backward()
    tailor.step(optimizer)
    go_on(tailor, optimizer, images, 5)
    assert tailor.report()["maturity"] == 1
    with pytest.warns(RuntimeWarning, match="1 step"):
        go_on(tailor, optimizer, images, 60)
    assert tailor.report()["phase"] == PHASE_FRESH


def test_a_run_that_goes_on_remembers_that_branches_began_at_zero(images):
    whole, _ = begun("adapter", images, taken=40)
    tailor, _ = begun("adapter", images, taken=1)
    again = tcp.Tailor(Branched("whole"), images[0][:2], budget={"macs": 0.5}, steps=100)
    again.resume(tailor.progress())
    again.model.load_state_dict(tailor.model.state_dict())
    go_on(again, torch.optim.SGD(again.model.parameters(), lr=0.05), images, 39)
    assert again.report()["phase"] == PHASE_FRESH
    assert torch.equal(again.controller.importance, whole.controller.importance)
    assert torch.equal(again.open_units, whole.open_units)

    earlier = tailor.progress()  # of a version that did not ask for it
    earlier["controller"] = {name: each for name, each in earlier["controller"].items() if name != "silent"}
    again = tcp.Tailor(Branched("whole"), images[0][:2], budget={"macs": 0.5}, steps=100)
    again.resume(earlier)
    assert not again.controller.silent.any()
