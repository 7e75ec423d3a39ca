"""What users get wrong: each is refused before any training, with a message that says what to do."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import counted

from tcp_core import Budget, BudgetError, Latency, Tailor, close, evaluate, fit, ladder, nets, remove, trace
from tcp_core.datasets import sources

STEPS = 96


@pytest.fixture
def model():
    return nets.small_resnet(widths=(8, 12, 16))


@pytest.fixture
def x():
    return torch.randn(8, 1, 8, 8)


@pytest.fixture
def channels(model, x):
    return trace(model, x)


@pytest.fixture
def batches(x):
    return [(x, torch.zeros(8, dtype=torch.long))] * STEPS


@pytest.fixture(autouse=True)
def left_alone(request):
    """Whatever was refused: the model is as it was."""
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    before = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    yield
    assert [module.training for module in model.modules()] == before[1]
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)


def train(tailor, x, steps=STEPS):
    optimizer = torch.optim.SGD(tailor.model.parameters(), lr=0.01)
    for _ in range(steps):
        if tailor.frozen:
            break
        optimizer.zero_grad()
        tailor(x).square().mean().backward()
        optimizer.step()
        tailor.step(optimizer)
    return tailor


# -------------------------------------------------------------------------------------------------
# Budgets


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"macs": 0}, r"macs must be positive: give a fraction .* float in \(0, 1\] or as '40%'.* got macs=0\."),
        ({"params": 0.0}, r"params must be positive: .* got params=0\.0"),
        ({"macs": -3}, r"macs must be positive: .* got macs=-3"),
        ({"flops": "0%"}, r"flops must be positive: .* got flops='0%'"),
        ({"macs": 1.5}, r"macs is a fraction above 1: give a fraction .* or an absolute number as an int or as '60M'"),
        ({"macs": "150%"}, r"macs is a fraction above 1: .* got macs='150%'"),
        ({"macs": "1.5"}, r"macs is a fraction above 1: .* got macs='1\.5'"),
        ({"macs": "15e-1"}, r"macs is a fraction above 1"),
        ({"macs": "1e-3e"}, r"macs is not a number"),
        ({"macs": math.inf}, r"macs is a fraction above 1"),
        ({"macs": "half"}, r"macs is not a number: .* got macs='half'"),
        ({"macs": [0.5]}, r"macs is not a number"),
        ({"mac": 0.5}, r"unknown budget key 'mac'; allowed keys are \['macs', 'params', 'flops', 'memory', .*\]"),
        ({"FLOPs": 0.5}, r"unknown budget key 'FLOPs'; .* Did you mean flops\?"),
        ({}, r"budget is empty: give at least one of macs, params, flops, .* for example Budget\(macs=0\.5\)"),
        ({"macs": None}, r"budget is empty"),
        (0.5, r"a budget is a Budget or a dict with keys among .*, for example \{'macs': 0\.5\}; got 0\.5"),
        ("40%", r"a budget is a Budget or a dict .* got '40%'"),
        (None, r"a budget is a Budget or a dict .* got None"),
    ],
)
def test_malformed_budgets(model, x, budget, message):
    with pytest.raises(BudgetError, match=message) as error:
        Tailor(model, x, budget=budget, steps=STEPS)
    assert isinstance(error.value, ValueError)


def test_an_empty_budget():
    with pytest.raises(BudgetError, match="budget is empty"):
        Budget()


@pytest.mark.medium
@pytest.mark.parametrize("min_width", [1, 3])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_lowest_feasible_budget_is_named_and_accepted(x, kind, min_width):
    model = nets.small_resnet(widths=(8, 12, 16))
    budgets = {"macs": 0.9, "params": 0.9, kind: 0.001}
    with pytest.raises(
        BudgetError, match=rf"the {kind} budget of [\d,]+ \(0\.\d+% of .*\) is below the floor"
    ) as error:
        Tailor(model, x, budget=budgets, steps=STEPS, min_width=min_width)
    message = str(error.value)
    assert f"{min_width} unit(s) in each family" in message
    lowest = int(message.partition(f"Give {kind} >= ")[2].partition(",")[0])
    with pytest.raises(BudgetError, match="below the floor"):
        Tailor(model, x, budget={kind: lowest - 1}, steps=STEPS, min_width=min_width)
    tailor = train(Tailor(model, x, budget={kind: lowest}, steps=STEPS, min_width=min_width), x)
    assert counted(tailor.finish(), x)[kind] == lowest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_width": 4, "multiple": 3}, r"with 4 unit\(s\), rounded up to .* multiples of 3, in each family"),
        ({"min_width": 0.3, "multiple": 4}, r"with 0\.3 of the units, rounded up .* multiples of 4, in each family"),
        ({"min_width": 0.3, "multiple": 1}, r"with 0\.3 of the units in each family"),
    ],
)
def test_the_floor_says_how_many_units_stay(model, x, options, said):
    with pytest.raises(BudgetError, match=said):
        Tailor(model, x, budget={"macs": 0.001}, steps=STEPS, **options)


# -------------------------------------------------------------------------------------------------
# The model and its example


class Misbehaving(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.conv, self.mode = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), mode

    def forward(self, x):
        if self.mode == ("train" if self.training else "eval"):
            raise KeyError("no auxiliary head")
        return self.conv(x)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_that_raises_in_one_mode(x, mode):
    model = Misbehaving(mode)
    with pytest.raises(
        ValueError, match=rf"raised KeyError in {mode} mode .*no auxiliary head.* accepts in train and"
    ) as e:
        trace(model, x)
    assert isinstance(e.value.__cause__, KeyError)
    assert model.training


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8),
            r"raised RuntimeError in train mode .*shape \(2, 3, 8, 8\).*: the right shape, dtype",
        ),
        (torch.zeros(2, 64), r"raised RuntimeError in train mode .*shape \(2, 64\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.long), r"raised RuntimeError .*torch\.int64 .* the right shape, dtype"),
        (torch.zeros(2, 1, 8, 8, device="meta"), r"different devices: \['cpu', 'meta'\]; move both to one"),
        ((torch.zeros(2, 1, 8, 8),) * 2, r"raised TypeError in train mode .*arguments"),
        ({"image": torch.zeros(2, 1, 8, 8)}, r"raised TypeError in train mode .*'image'"),
        ((), r"example_input must be a tensor with the batch .* got tuple\. For images: torch\.randn\(2, 3, 224"),
        ([], r"example_input must be a tensor .* got list"),
        ({}, r"example_input must be a tensor .* got dict"),
        (None, r"example_input must be a tensor .* got NoneType"),
        ("image.png", r"example_input must be a tensor .* got str"),
        (torch.zeros(2, 1, 8, 8).numpy(), r"example_input must be a tensor .* got ndarray"),
        (torch.tensor(1.0), r"example_input must be a tensor with the batch in dimension 0"),
        (torch.zeros(0, 1, 8, 8), r"example_input must be a tensor with the batch in dimension 0"),
        (torch.full((2, 1, 8, 8), math.nan), r"not finite"),
    ],
)
def test_examples_that_do_not_fit(model, example, message):
    with pytest.raises(ValueError, match=message):
        trace(model, example)
    with pytest.raises(ValueError, match=message):
        Tailor(model, example, budget={"macs": 0.5}, steps=STEPS)


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 8, 8), (64, 1, 8, 8)])
def test_examples_that_do_fit(model, shape):
    x = torch.randn(shape)
    for example in (x, (x,), [x], {"x": x}, x.double()):
        assert trace(model, example).cost() == counted(model, x)


def test_a_model_on_another_device_than_its_example(x):
    with pytest.raises(ValueError, match=r"different devices: \['cpu', 'meta'\].*example_input\.to\(next"):
        trace(nets.small_resnet().to("meta"), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(model, x, dtype):
    half = copy.deepcopy(model).to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"parameter 'conv1\.weight' is torch\.{name}.* Keep the model in float32.*autocast"
    ):
        Tailor(half, x, budget={"macs": 0.5}, steps=STEPS)


def test_all_parameters_frozen(model, x):
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"all parameters .* frozen .* set requires_grad_\(True\) on what is to be trained"
    ):
        Tailor(frozen, x, budget={"macs": 0.5}, steps=STEPS)


@pytest.mark.medium
def test_partly_frozen_networks_are_tailored_and_stay_so(x):
    model = nets.small_resnet(widths=(8, 12, 16))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer1" not in name and "bn" not in name)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=STEPS)
    small = train(tailor, x).finish()
    assert {name: p.requires_grad for name, p in small.named_parameters()} == expected
    for name, parameter in small.named_parameters():
        if not expected[name]:  # cut, not trained
            kept = before[name]
            for dim, index in enumerate(tailor.channels.kept(name, tailor.open_units)):
                kept = kept if index is None else kept.index_select(dim, index)
            assert torch.equal(parameter, kept)
    assert small.layer1[0].conv1.out_channels < 8


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 4, 3)), {}),
        (lambda: nets.small_resnet(widths=(8, 12, 16)), {"ignore": "*"}),
    ],
    ids=["no hidden layer", "one channel", "all ignored"],
)
def test_nothing_to_prune(x, build, options):
    with pytest.raises(ValueError, match=r"no unit of this network can be removed .*hidden conv.*explain\(\)"):
        Tailor(build(), x, budget={"macs": 0.5}, steps=STEPS, **options)


@pytest.mark.parametrize("pattern", ["layer9.*", "conv", "Conv1", ""])
def test_a_pattern_that_matches_nothing(model, x, pattern):
    for ignore in (pattern, ["conv1", pattern]):
        with pytest.raises(ValueError, match=r"ignore='.*' matches no module; names look like \['conv1', 'bn1'"):
            trace(model, x, ignore=ignore)


# -------------------------------------------------------------------------------------------------
# Options of the run


@pytest.mark.medium
@pytest.mark.parametrize(("maturity", "share", "least"), [(None, 30, 40), (0.0, 30, 40), (1.0, 13, 93)])
def test_too_few_steps(model, x, maturity, share, least):
    message = rf"is too short: .* {share}% of the run and needs 12.* at least {least}"
    for steps in (0, 1, least - 1, -5):
        with pytest.raises(ValueError, match=f"steps={steps} {message}"):
            Tailor(model, x, budget={"macs": 0.5}, steps=steps, maturity=maturity)
    Tailor(model, x, budget={"macs": 0.5}, steps=least, maturity=maturity)
    Tailor(model, x, budget={"macs": 0.5}, steps=24, phase=(0.25, 0.75))


@pytest.mark.parametrize("steps", [48.0, "48", None, True])
def test_steps_that_are_no_number_of_steps(model, x, steps):
    with pytest.raises(ValueError, match=r"steps=.* int"):
        Tailor(model, x, budget={"macs": 0.5}, steps=steps)


def test_numbers_of_numpy_are_numbers(model, x):
    whole = np.int64
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=whole(STEPS), min_width=whole(2), multiple=whole(4))
    controller = tailor.controller
    assert [type(each) for each in (controller.steps, controller.min_width, controller.multiple)] == [int] * 3
    Tailor(model, x, budget={"macs": 0.5}, steps=STEPS, maturity=np.float32(0.5)).state_dict()


@pytest.mark.parametrize("multiple", [8.0, None, 0, True, "8"])
def test_a_multiple_that_is_none(model, x, multiple):
    with pytest.raises(ValueError, match=rf"multiple='?{multiple}'?; it must be an int of at least 1"):
        Tailor(model, x, budget={"macs": 0.5}, steps=STEPS, multiple=multiple)


@pytest.mark.parametrize("latency", ["onnxruntime", 4.0, Latency])
def test_a_place_of_latency_that_is_none(model, x, latency):
    with pytest.raises(TypeError, match=r"latency=.*; it must be the place of measurement, latency=tcp\.Latency\("):
        Tailor(model, x, budget={"latency": "4 ms"}, steps=STEPS, latency=latency)


@pytest.mark.parametrize("maturity", [2, -1, "fresh", True, math.nan])
def test_a_maturity_that_is_none(model, x, maturity):
    with pytest.raises(ValueError, match=r"maturity=.*; it must be a number from 0 \(a fresh network\) to 1"):
        Tailor(model, x, budget={"macs": 0.5}, steps=STEPS, maturity=maturity)


@pytest.mark.parametrize("others", [{}, {"macs": 0.9}])
def test_a_floor_of_flops_is_told_in_flops(model, x, others):
    with pytest.raises(BudgetError, match=r"the flops budget of 50 .* Give flops >= (\d+), ") as error:
        Tailor(model, x, budget={"flops": 50} | others, steps=STEPS)
    lowest = int(str(error.value).partition("flops >= ")[2].partition(",")[0])
    Tailor(model, x, budget={"flops": lowest}, steps=STEPS)
    with pytest.raises(BudgetError, match="the flops budget"):
        Tailor(model, x, budget={"flops": lowest - 1}, steps=STEPS)
    with pytest.raises(BudgetError, match="the macs budget"):
        Tailor(model, x, budget={"flops": 0.9, "macs": 50}, steps=STEPS)


@pytest.mark.parametrize("min_width", [0, -1, 1.5, 2.0, None])
def test_a_min_width_that_is_no_width(model, x, min_width):
    with pytest.raises(ValueError, match=rf"min_width must be an int of at least 1, .* got {min_width}"):
        Tailor(model, x, budget={"macs": 0.5}, steps=STEPS, min_width=min_width)


@pytest.mark.parametrize(
    "options",
    [
        {"phase": (0.3, 0.3)},
        {"phase": (0.5, 0.2)},
        {"phase": (-0.1, 0.5)},
        {"phase": (0.1, 1.1)},
        {"phase": 0.5},
        {"phase": "late"},
        {"lookahead": 0},
        {"ramp": 0},
        {"ramp": 1.5},
        {"lookahead": 1.0},
        {"lookahead": -0.5},
        {"lookahead": "x"},
        {"phase": ["a", "b"]},
    ],
)
def test_a_phase_outside_the_run(model, x, options):
    with pytest.raises(
        ValueError,
        match=r'phase must be "auto" or two rising shares of the run in \[0, 1\], lookahead in \(0, 1\) and ramp',
    ):
        Tailor(model, x, budget={"macs": 0.5}, steps=1000, **options)


def test_a_misspelt_option(model, x, batches):
    with pytest.raises(TypeError, match="min_widths"):
        Tailor(model, x, budget={"macs": 0.5}, steps=STEPS, min_widths=2)
    with pytest.raises(TypeError, match="min_widths"):
        fit(model, batches, budget={"macs": 0.5}, epochs=1, min_widths=2)
    with pytest.raises(TypeError, match=r"options \['min_width'\] need a budget"):
        fit(model, batches, budget=None, epochs=1, min_width=2)


def test_a_tailor_in_the_place_of_a_network(model, x, batches):
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=STEPS)
    for wrong in (tailor, nn.DataParallel(tailor)):
        for verb, use in (
            ("trace", lambda wrong: trace(wrong, x)),
            ("tailor", lambda wrong: Tailor(wrong, x, budget={"macs": 0.5}, steps=STEPS)),
            ("train", lambda wrong: fit(wrong, batches, budget={"macs": 0.5}, epochs=1)),
            ("train", lambda wrong: ladder(wrong, batches, budgets=[{"macs": 0.5}], epochs=1)),
        ):
            with pytest.raises(ValueError, match=f"a Tailor, a network with gates; {verb} what it was made of, or"):
                use(wrong)


def test_what_is_no_network(model, x, batches):
    for verb, use in (
        ("trace", lambda wrong: trace(wrong, x)),
        ("train", lambda wrong: fit(wrong, batches, epochs=1)),
        ("evaluate", lambda wrong: evaluate(wrong, model)),
    ):
        with pytest.raises(TypeError, match=f"this is the function small_resnet, no network; call it, and {verb} the"):
            use(nets.small_resnet)
        with pytest.raises(TypeError, match=f"this is a list, no network; {verb} a network"):
            use(batches)


def test_one_average_needs_no_list(model, x):
    average = torch.optim.swa_utils.AveragedModel(model)
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=STEPS, carry=average)
    assert [each for each, _ in tailor.carried] == [average]


def test_a_trace_of_another_model(model, x, channels):
    for other in (nets.small_resnet(widths=(8, 12, 20)), nets.small_resnet(widths=(8, 12, 16), blocks=2)):
        with pytest.raises(
            ValueError, match=r"not the model that was traced: .* shape .* trace this model and use that"
        ):
            Tailor(other, x, budget={"macs": 0.5}, steps=STEPS, channels=channels)


# -------------------------------------------------------------------------------------------------
# Calls in the wrong order


def test_step_without_backward(model, x):
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=STEPS)
    for loss in (None, "forward", "of the bare model"):
        if loss == "forward":
            tailor.eval()(x)
            tailor.train()
        if loss == "of the bare model":
            model.eval()(x).sum().backward()
            model.train()
        with pytest.raises(
            RuntimeError, match=r"no gradient of the gates: call it after loss\.backward\(\).* not model\(x\)"
        ):
            tailor.step()
    assert tailor.controller.step_count == 0


def test_step_twice_after_one_backward(model, x):
    tailor = Tailor(model, x, budget={"macs": 0.5}, steps=STEPS)
    tailor.eval()(x).sum().backward()
    tailor.train().step()
    with pytest.raises(RuntimeError, match=r"no gradient of the gates: .* once per backward"):
        tailor.step()
    assert tailor.controller.step_count == 1


def test_finish_before_the_freeze(x):
    tailor = Tailor(nets.small_resnet(widths=(8, 12, 16)), x, budget={"macs": 0.5}, steps=STEPS)
    for taken in range(5):
        with pytest.raises(
            RuntimeError,
            match=rf"before the set is frozen: {taken} of 96 steps .* about step 48\. Train on, or construct",
        ):
            tailor.finish()
        train(tailor, x, steps=1)
    assert sum(p.numel() for p in tailor.model.parameters()) == tailor.report()["dense"]["params"]


@pytest.mark.medium
def test_step_after_the_end_is_allowed(x):
    tailor = train(Tailor(nets.small_resnet(widths=(8, 12, 16)), x, budget={"macs": 0.5}, steps=STEPS), x)
    tailor.step()
    assert tailor.finish() is tailor.finish()


# -------------------------------------------------------------------------------------------------
# Removing by hand


def test_open_units_of_another_shape_or_kind(model, channels):
    everything = torch.ones(channels.units, dtype=torch.bool)
    for wrong in (everything[:-1], everything.repeat(2), everything[None], everything.float(), everything.long()):
        for use in (remove, close):
            with pytest.raises(
                ValueError, match=rf"must be a bool tensor of shape \({channels.units},\).* got torch\.\w+ of"
            ):
                use(model, channels, wrong)
        with pytest.raises(ValueError, match="must be a bool tensor"):
            channels.cost(wrong)


def test_closing_frozen_units(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 3)

        def forward(self, x):
            return self.c(F.relu(self.b(self.a(x).softmax(1))))

    net = Net()
    channels = trace(net, x)
    assert channels.frozen.any()
    assert channels.prunable.any()
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[channels.frozen.nonzero()[0]] = False
    with pytest.raises(ValueError, match=r"units \[\d+\] are frozen and cannot be removed; close only .*prunable"):
        remove(net, channels, open_units)


def test_bytes_at_what_cannot_be(channels):
    for batch in (-1, 0, 2.5, True):
        with pytest.raises(BudgetError, match=rf"^batch={batch}; it must be an int of at least 1"):
            channels.bytes(batch=batch)
    with pytest.raises(BudgetError, match="^precision='fp8'; it must be one of fp32, fp16, bf16, int8"):
        channels.bytes(precision="fp8")
    assert channels.bytes(batch=np.int64(2))["memory"] == channels.bytes(batch=2)["memory"]


def test_emptying_a_layer(model, channels):
    for layer in channels.layers[:-1]:
        open_units = torch.ones(channels.units, dtype=torch.bool)
        open_units[layer.out_units] = False
        with pytest.raises(
            ValueError, match=rf"no channel would be left in \[.*'{layer.name}'.*\]; keep one unit of each"
        ):
            remove(model, channels, open_units)


def test_removing_from_another_model(channels):
    everything = torch.ones(channels.units, dtype=torch.bool)
    for other in (nets.small_resnet(), nn.Linear(3, 3)):
        with pytest.raises(
            ValueError, match=r"not the model that was traced: '.*' has shape .* trace this model and use"
        ):
            remove(other, channels, everything)


def test_removing_twice_from_the_same_trace(model, channels):
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[channels.prunable.nonzero()[0]] = False
    small = remove(model, channels, open_units)
    with pytest.raises(ValueError, match="not the model that was traced"):
        remove(small, channels, open_units)


# -------------------------------------------------------------------------------------------------
# fit and evaluate


@pytest.mark.parametrize("precision", ["fp16", "FP32", None, torch.bfloat16])
def test_an_unknown_precision(model, batches, precision):
    with pytest.raises(ValueError, match=r"precision=.*; it must be one of fp32, bf16"):
        fit(model, batches, budget=None, epochs=1, precision=precision)
    with pytest.raises(ValueError, match=r"precision=.*; it must be one of fp32, bf16"):
        evaluate(model, batches, precision=precision)


@pytest.mark.medium
@pytest.mark.parametrize("kernels", [False, True])
def test_a_cpu_without_kernels_for_bf16_is_warned_of(model, batches, kernels, monkeypatch):
    monkeypatch.setattr("tcp_core.training.evaluation.has_bf16_kernels", lambda device: kernels)
    for call in (
        lambda: fit(copy.deepcopy(model), batches, budget=None, epochs=1, precision="bf16"),
        lambda: evaluate(model, batches, precision="bf16"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        said = [str(each.message) for each in caught if "has no bf16 kernels" in str(each.message)]
        assert bool(said) is not kernels
        assert all("about ten times slower than precision='fp32'. Use fp32 here." in each for each in said)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, "3", None])
def test_epochs_that_are_no_number_of_epochs(model, batches, epochs):
    with pytest.raises(ValueError, match=rf"epochs='?{epochs}'?; it must be an int of at least 1"):
        fit(model, batches, budget=None, epochs=epochs)


@pytest.mark.medium
def test_a_batch_larger_than_the_data(model):
    images = sources.digits().val
    with pytest.raises(ValueError, match=r"batch_size=181 is larger than the 180 training images; give a smaller one"):
        fit(model, images, budget=None, epochs=1, batch_size=181)


def test_batches_without_a_length(model, batches):
    message = r"iterable with a length, such as a DataLoader, so that steps can be planned"
    with pytest.raises(ValueError, match=message):
        fit(model, (batch for batch in batches), budget=None, epochs=1)
    # Held-out batches that would be used up after one epoch are refused before the first.
    with pytest.raises(ValueError, match=message):
        fit(model, batches, (batch for batch in batches), budget=None, epochs=1)


def test_batches_that_are_a_whole_data_set(model):
    data = sources.digits()
    for use in (lambda wrong: fit(model, wrong, epochs=1), lambda wrong: evaluate(model, wrong)):
        with pytest.raises(
            TypeError, match=r"all parts of a data set \(Splits\); give one of them, such as data\.train"
        ):
            use(data)
        for target in (torch.tensor(3), 3):
            with pytest.raises(TypeError, match=r"so it is a single sample; make batches .*: DataLoader\(dataset"):
                use([(torch.zeros(1, 8, 8), target)])


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_what_is_no_function(model, batches, name):
    for wrong, said in (
        ("mse", f"{name}='mse'; .*mse_loss"),
        (nn.CrossEntropyLoss, rf"{name}=CrossEntropyLoss\(\), or"),
    ):
        with pytest.raises(TypeError, match=f"{said}"):
            fit(model, batches, epochs=1, **{name: wrong})
        with pytest.raises(TypeError, match=f"{said}"):
            evaluate(model, batches, **{name: wrong})
    for other in ("on_epoch", "on_step", "prune"):
        with pytest.raises(TypeError, match=f"{other}=5; it must be a function"):
            fit(model, batches, epochs=1, **{other: 5})


@pytest.mark.parametrize("option", ["ignore", "unused"])
def test_modules_in_the_place_of_their_names(model, x, option):
    for wrong, said in (
        ([model.layer1], "a Sequential in it; it takes names .*: 'layer1' here"),
        (model.layer1, "a .* in it; it takes names .*: 'layer1' here"),
        ([nn.Linear], "a Linear in it; .*: 'linear' here"),
        ([3], "a int in it; it takes names"),
    ):
        with pytest.raises(TypeError, match=f"{option} has {said}"):
            trace(model, x, **{option: wrong})


def test_no_batches(model):
    with pytest.raises(ValueError, match="at least one batch"):
        fit(model, [], budget=None, epochs=1)
    with pytest.raises(ValueError, match="no images to evaluate on; give at least one batch"):
        evaluate(model, [])


def test_a_run_too_short_to_tailor_in(model, batches):
    with pytest.raises(ValueError, match=r"too short.*epochs"):
        fit(model, batches[:20], budget={"macs": 0.5}, epochs=1)


def test_an_unknown_augmentation(model):
    with pytest.raises(ValueError, match=r"augment='mixup'; it must be one of none, crop, crop_flip"):
        fit(model, sources.digits().val, budget=None, epochs=1, augment="mixup")


def test_a_model_without_values_or_of_inference_mode_is_named(model, x):
    with pytest.raises(ValueError, match=r"'conv1.weight' is on the meta device.*model.to_empty"):
        trace(nets.small_resnet().to("meta"), x.to("meta"))
    with torch.inference_mode():
        assert trace(model, x).units == trace(model, x.clone()).units > 0
        made = nets.small_resnet()
    with pytest.raises(ValueError, match="was made under torch.inference_mode"):
        Tailor(made, x, budget={"macs": 0.5}, steps=STEPS)


@pytest.mark.parametrize(
    ("name", "value", "before", "message"),
    [
        ("device", "meta", None, r"set_default_device\('meta'\) is in force.*call torch.set_default_device\(None\)"),
        ("dtype", torch.bfloat16, torch.float32, r"set_default_dtype\(torch.bfloat16\) is in force"),
    ],
)
def test_defaults_that_cannot_be_computed_with_are_named(name, value, before, message):
    model, x = nets.small_resnet(), torch.randn(2, 1, 8, 8)
    put = getattr(torch, f"set_default_{name}")
    put(value)
    try:
        with pytest.raises(ValueError, match=message):
            trace(model, x)
    finally:
        put(before)
    trace(model, x)
