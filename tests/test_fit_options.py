"""What `fit` takes beside its defaults: a loss, an optimiser, a schedule, clipping, a moving average, a teacher."""

import copy
import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import slow
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tcp_core import Tailor, evaluate, fit, ladder, nets
from tcp_core.datasets import sources, streams
from tcp_core.study import comparators
from tcp_core.training import objective
from tcp_core.training.recipe import parameter_groups, warmup_cosine

EPOCHS, BATCH = 6, 20  # 96 steps with 320 images; ours is made smaller after about 48


@pytest.fixture(scope="module")
def images():
    """(train, val) of 320 and 180 digits."""
    splits = sources.digits()
    return splits.train.split(320)[1], splits.val


def network(seed=0):
    torch.manual_seed(seed)
    return nets.small_resnet(widths=(4, 8, 12))


def run(images, model=None, *, budget=None, **options):
    model = network() if model is None else model
    options = {"epochs": EPOCHS if budget or "prune" in options else 1, "batch_size": BATCH} | options
    return fit(model, *images, budget=budget, **options)


def same(first, second):
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    assert first.history.drop(columns="seconds").equals(second.history.drop(columns="seconds"))


def test_every_keyword_is_described():
    for function in (fit, comparators.pruner):
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        text = inspect.getdoc(function)
        missing = [name for name in names if not re.search(rf"^    (\w+, )*{name}(, \w+)*:", text, re.MULTILINE)]
        assert not missing, (function.__name__, missing)


def test_options_that_would_be_ignored_are_refused(images):
    with pytest.raises(TypeError, match=r"label_smoothing=0\.1 and loss= given: it is cross-entropy's"):
        run(images, loss=F.cross_entropy, label_smoothing=0.1)
    for options in ({"teacher_weight": 0.3}, {"temperature": 2.0}):
        with pytest.raises(TypeError, match=r"need a teacher="):
            run(images, **options)


@pytest.mark.medium
def test_numbers_of_numpy_are_numbers(images):
    number, share = np.int64, np.float32
    found = run(
        images,
        **{"epochs": number(1), "batch_size": number(BATCH), "accumulate": number(1), "seed": number(3)},
        **{"checkpoint_every": number(0), "lr": share(0.125), "momentum": share(0.5), "label_smoothing": share(0.25)},
    )
    same(found, run(images, epochs=1, batch_size=BATCH, seed=3, lr=0.125, momentum=0.5, label_smoothing=0.25))


def test_misspelt_options_are_found_before_anything_else(images):
    for name, meant in (("learning_rate", "lr"), ("batchsize", "batch_size"), ("min_widths", "min_width")):
        with pytest.raises(TypeError, match=f"fit has no option '{name}'; did you mean {meant}\\?"):
            fit(None, None, epochs=0, **{name: 1})  # of no network, even
        with pytest.raises(TypeError, match=f"fit has no option '{name}'; did you mean {meant}\\?"):
            ladder(None, None, budgets=None, epochs=0, **{name: 1})
    with pytest.raises(TypeError, match="fit has no option 'foo'; it has model, train, .*, phase, lookahead, ramp"):
        run(images, foo=1)
    with pytest.raises(TypeError, match=r"Tailor has no option 'lookahed'; did you mean lookahead\?"):
        Tailor(network(), None, budget={"macs": 0.5}, steps=100, lookahed=0.3)
    for name in ("steps", "channels", "example_input"):
        with pytest.raises(TypeError, match=f"{name}= given: .* so leave it out"):
            run(images, budget={"macs": 0.5}, **{name: 1})


def test_options_of_another_object_are_refused(images):
    for name in ("workers", "num_workers"):
        with pytest.raises(TypeError, match=rf"{name}= given: images in memory need none, and a Stream or DataLoader"):
            run(images, budget={"macs": 0.5}, **{name: 2})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clip", (0, -1.0)),
        ("ema", (0, 1, 1.5)),
        ("teacher_weight", (-0.1, 1.1)),
        ("temperature", (0, -1)),
        ("warmup", (2.0, 1, -1)),
        ("checkpoint_every", (-1, 0.5)),
        ("clip", ("1",)),
        ("mixing", (["cutmix"],)),
        ("seed", (-1, 0.5, True)),
        ("epochs", (0, 2.0, True)),
        ("batch_size", (0, 64.0, "64")),
        ("lr", (0, -1, "0.1", math.inf, math.nan)),
        ("momentum", (-0.1, 1, 1.5)),
        ("weight_decay", (-1, -0.05, math.inf)),
        ("label_smoothing", (-0.5, 1.5)),
        ("clip", (True,)),
    ],
)
def test_numbers_out_of_range(images, name, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}; it must be ")):
            run(images, **{name: value})


# ---------------------------------------------------------------------------------------------------------------------
# Loss and metric


class Segmenting(nn.Module):
    """Logits of each pixel, and, if wanted, those of an auxiliary head."""

    def __init__(self, channels=3, both=False):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()))
        self.more = nn.Sequential(*(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()))
        self.head, self.both = nn.Conv2d(12, channels, 1), both
        self.aux = nn.Conv2d(12, channels, 1) if both else None

    def forward(self, x):
        x = self.body(x)
        out = self.head(self.more(x))
        return (out, self.aux(x)) if self.both else out


def dice(outputs, targets):
    """Of one class, at each image."""
    share = outputs.sigmoid()
    overlap = (share * targets).sum((1, 2, 3))
    return 1 - (2 * overlap / (share.sum((1, 2, 3)) + targets.sum((1, 2, 3)) + 1)).mean()


@pytest.mark.medium
def test_a_loss_of_ones_own(images):
    train, val = images
    batches = [(x, (x > 0.5).float()) for x, _ in train.batches(BATCH)]
    held_out = [(x, (x > 0.5).float()) for x, _ in val.batches(50)]
    torch.manual_seed(0)
    result = fit(Segmenting(1), batches, held_out, budget={"macs": 0.6}, epochs=EPOCHS, loss=dice)
    history = result.history
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert history[["train_accuracy", "val_accuracy"]].isna().all(axis=None)
    with torch.no_grad():
        losses = [float(dice(result.model.eval()(x), y)) * len(x) for x, y in held_out]
    assert history["val_loss"].iloc[-1] == pytest.approx(sum(losses) / len(val), rel=1e-5)
    assert 0.9 < result.report["utilisation"]["macs"] <= 1


@pytest.mark.medium
def test_two_outputs_and_targets_in_a_dict(images):
    def loss(outputs, targets):
        main, aux = outputs
        assert main.dtype == torch.float32  # also under autocast
        return F.cross_entropy(main, targets["pixels"]) + 0.3 * F.cross_entropy(aux, targets["pixels"])

    def error(outputs, targets):
        return (outputs[0].argmax(1) != targets["pixels"]).float().mean()

    batches = [(x, {"pixels": (x[:, 0] > 0.5).long()}) for x, _ in images[0].batches(BATCH)]
    torch.manual_seed(0)
    options = {"loss": loss, "metric": error, "precision": "bf16", "epochs": EPOCHS}
    result = fit(Segmenting(both=True), batches, batches[:2], budget={"params": 0.6}, **options)
    assert (
        evaluate(result.model, batches[:2], loss=loss, metric=error, precision="bf16")["accuracy"]
        == (result.history["val_accuracy"].iloc[-1])
    )
    assert result.history["val_accuracy"].iloc[-1] < 0.2


def test_pixels_are_classified_by_cross_entropy(images):
    x, _ = next(iter(images[0].batches(40)))
    y = (x[:, 0] > 0.5).long()
    y[:, 0] = -100  # which torch's cross-entropy passes over
    torch.manual_seed(0)
    model = Segmenting()
    with torch.no_grad():
        outputs = model.eval()(x)
    found = evaluate(model, [(x, y)])
    right = outputs.argmax(1)[:, 1:] == y[:, 1:]
    assert found == pytest.approx({"loss": float(F.cross_entropy(outputs, y)), "accuracy": float(right.float().mean())})
    assert fit(model, [(x, y)] * 4, epochs=1).history["train_accuracy"].between(0, 1).all()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_ignored_labels_do_not_count_in_any_batches(images, size):
    x, y = next(iter(images[0].batches(8)))
    y, model = torch.cat([torch.full((3,), -100), y[3:]]), network().eval()
    pixels = (x[:, 0] > 0.5).long()
    pixels[0, :5], pixels[1, 0], pixels[2] = -100, -100, -100
    segmenting = Segmenting().eval()
    with torch.no_grad():
        outputs, maps = model(x), segmenting(x)
    found = evaluate(model, list(zip(x.split(size), y.split(size), strict=True)))
    right = (outputs.argmax(1) == y)[3:].float().mean()
    assert found == pytest.approx({"loss": float(F.cross_entropy(outputs, y)), "accuracy": float(right)})
    found = evaluate(segmenting, list(zip(x.split(size), pixels.split(size), strict=True)))
    right, known = (maps.argmax(1) == pixels).sum((1, 2)), (pixels >= 0).sum((1, 2))
    share = (right / known)[known > 0].mean()  # of the images, as where all pixels have labels
    assert found == pytest.approx({"loss": float(F.cross_entropy(maps, pixels)), "accuracy": float(share)})


def test_training_images_with_ignored_labels_do_not_count(images):
    batches = [(x, y.clone()) for x, y in images[0].batches(BATCH)]
    for number, (_, y) in enumerate(batches):
        y[: number % 3] = -100
    row = fit(network(), batches, epochs=1, lr=1e-30, warmup=0).history.iloc[0]
    losses, right, known = 0.0, 0, 0
    torch.manual_seed(0)
    model = network().train()
    with torch.no_grad():
        for x, y in batches:
            outputs = model(x)
            losses += float(F.cross_entropy(outputs, y, reduction="sum"))
            right, known = right + int((outputs.argmax(1) == y).sum()), known + int((y >= 0).sum())
    assert (row["train_loss"], row["train_accuracy"]) == pytest.approx((losses / known, right / known))


def test_nothing_but_ignored_labels_is_not_a_number(images):
    x, y = next(iter(images[0].batches(8)))
    assert all(value != value for value in evaluate(network(), [(x, torch.full_like(y, -100))]).values())


def test_a_regression_has_no_accuracy():
    x = torch.randn(160, 6)
    batches = list(zip(x.split(10), x[:, :2].split(10), strict=True))
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    history = fit(model, batches, batches, epochs=2, lr=0.01, loss=lambda y, t: F.mse_loss(y, t)).history
    assert history[["train_accuracy", "val_accuracy"]].isna().all(axis=None)
    assert history["val_loss"].notna().all()


@pytest.mark.parametrize("loss", [lambda outputs, y: outputs, lambda outputs, y: 1.0], ids=["tensor", "float"])
def test_a_loss_that_is_no_number(images, loss):
    with pytest.raises(ValueError, match=r"loss= gave .* in held-out batch 1; it must give one number"):
        run(images, loss=loss)


def test_outputs_that_cross_entropy_cannot_take(images):
    batches = [(x, y) for x, y in images[0].batches(BATCH)]
    with pytest.raises(ValueError, match=r"the network returns tuple in .*Give loss=, a function of"):
        fit(Segmenting(both=True), batches, epochs=1)


@pytest.mark.medium
def test_a_label_without_an_output_is_named(images):
    train, val = images
    batches = list(train.batches(BATCH))
    batches[2][1][3] = 10
    before = (model := network()).state_dict()["linear.weight"].clone()
    seen = []
    message = r"label 10 in {}, but the network has 10 outputs: 0 to 9\. Correct the labels"
    with pytest.raises(ValueError, match=message.format("batch 3 of epoch 1")):
        fit(model, batches, epochs=1, on_step=lambda *_: seen.append(copy.deepcopy(model.state_dict())))
    assert not torch.equal(before, model.state_dict()["linear.weight"])  # two steps were taken
    for name, value in seen[1].items():  # and nothing of the third
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ValueError, match=message.format("held-out batch 3")):
        evaluate(model, batches)
    small = nets.small_resnet(widths=(4, 8, 12), num_classes=9)
    kept = copy.deepcopy(small.state_dict())
    message = r"label 9 in the images of {}, but the network has 9 outputs: 0 to 8"
    known = [(x[y < 9], y[y < 9]) for x, y in train.batches(BATCH)]
    for part, given in (("train", (train, None)), ("val", (known, val))):  # before the first step
        with pytest.raises(ValueError, match=message.format(part)):
            fit(small, *given, epochs=1)
        torch.testing.assert_close(small.state_dict(), kept, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, clipping


@pytest.mark.medium
@pytest.mark.parametrize("budget", [None, {"macs": 0.5}])
def test_the_default_recipe_written_out(images, budget):
    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    def cosine(optimizer, steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, 0.05))

    same(run(images, budget=budget), run(images, budget=budget, optimizer=sgd, weight_decay=5e-4, schedule=cosine))


def test_an_optimiser_of_ones_own_keeps_its_weight_decay():
    model = network()

    def adamw(groups):
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.3)

    weights, rest = adamw(parameter_groups(model, None)).param_groups
    assert (weights["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert adamw(parameter_groups(model, 0.01)).param_groups[0]["weight_decay"] == 0.01


@pytest.mark.medium
def test_another_optimiser_and_schedule_are_carried_through_the_shrink(images):
    def one_cycle(optimizer, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1)

    made = []

    def adam(groups):
        made.append(torch.optim.Adam(groups, lr=0.01))
        return made[-1]

    result = run(images, budget={"macs": 0.5}, optimizer=adam, schedule=one_cycle)
    assert result.history["lr"].max() < 0.01
    assert result.history["lr"].iloc[-1] < 1e-4
    parameters = [p for group in made[-1].param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in result.model.parameters()}
    for parameter in parameters:
        assert made[-1].state[parameter]["exp_avg"].shape == parameter.shape
        assert made[-1].state[parameter]["step"] == 96


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def lbfgs(groups):
    return torch.optim.LBFGS([{"params": groups[0]["params"]}])


def plateau(optimizer, steps):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": lambda groups: None}, TypeError, "optimizer= gave NoneType; it must give a torch.optim.Opt"),
        ({"optimizer": lbfgs}, ValueError, "LBFGS, whose steps need a closure"),
        ({"optimizer": lambda groups: sgd(groups[:1])}, ValueError, "holds 15 trainable parameters less"),
        ({"optimizer": sgd([{"params": [torch.zeros(1)]}])}, TypeError, "optimizer=SGD; it must be a function"),
        ({"optimizer": sgd, "lr": 0.2}, TypeError, r"lr=0\.2 and optimizer="),
        ({"schedule": lambda optimizer, steps: 3}, TypeError, "schedule= gave int; it must give a torch.optim.lr_sch"),
        ({"schedule": 3}, TypeError, "schedule=int; it must be a function of"),
        ({"schedule": plateau}, TypeError, "schedule= gave ReduceLROnPlateau; it must give"),
        ({"schedule": plateau, "warmup": 0.1}, TypeError, r"warmup=0\.1 and schedule= given"),
        ({"schedule": plateau, "restart": 0.1}, TypeError, r"restart=0\.1 and schedule= given"),
    ],
    ids=("nothing", "closure", "half", "made", "lr", "number", "no function", "plateau", "warmup", "restart"),
)
def test_what_is_no_optimiser_or_schedule(images, options, error, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        run(images, model, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.medium
def test_clipping_bounds_the_weights_gradient_alone(images):
    moved, model = [], network()
    last = [p.detach().clone() for p in model.parameters()]

    def on_step(step, steps):
        now = [p.detach().clone() for p in model.parameters()]
        moved.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(now, last, strict=True))))
        last[:] = now

    plain = {"momentum": 0.0, "weight_decay": 0.0, "schedule": lambda o, n: torch.optim.lr_scheduler.ConstantLR(o, 1.0)}
    run(images, model, lr=0.1, clip=0.5, on_step=on_step, **plain)
    assert max(moved) == pytest.approx(0.05, rel=1e-3)
    assert len(moved) == 16
    # a bound that is never reached changes nothing, gates neither
    same(*(run(images, budget={"macs": 0.5}, clip=clip) for clip in (None, 1e9)))


# ---------------------------------------------------------------------------------------------------------------------
# Moving average and teacher


@pytest.mark.medium
def test_the_average_written_out(images):
    model, count, expected = network(), 0, {}

    def on_step(step, steps):
        nonlocal count
        count += 1
        share = 1 - min(0.9, (1 + count) / (10 + count))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = expected[name] + share * (value - expected[name])

    expected.update({name: value.clone() for name, value in model.state_dict().items()})
    result = run(images, model, ema=0.9, on_step=on_step)
    assert result.model is model
    for name, value in result.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
            assert not torch.equal(value, result.last[name])
    assert run(images).last is None


@pytest.mark.medium
def test_validation_measures_the_average_that_is_returned(images):
    result = run(images, budget={"macs": 0.5}, ema=0.9)
    plain = run(images, budget={"macs": 0.5})
    measured = evaluate(result.model, images[1])
    row = result.history.iloc[-1]
    assert measured == pytest.approx({"loss": row["val_loss"], "accuracy": row["val_accuracy"]})
    assert result.history["train_loss"].equals(plain.history["train_loss"])  # averaging does not change training
    assert result.history["val_loss"].iloc[-1] != plain.history["val_loss"].iloc[-1]
    for name, value in plain.model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, result.last[name])


@pytest.mark.medium
def test_the_average_is_cut_with_the_network(images):
    """Gates that close leave the average of what stays as it was: it equals that of the kept channels, one by one."""
    seen = []
    result = run(images, budget={"macs": 0.5}, ema=0.9, on_step=lambda step, steps: seen.append(step))
    assert {name: value.shape for name, value in result.last.items()} == {
        name: value.shape for name, value in result.model.state_dict().items() if value.is_floating_point()
    }
    assert seen[-1] == 96


@pytest.mark.medium
@pytest.mark.parametrize("method", ["taylor", "fixed_strength", "small", "slimming"])
def test_comparators_take_the_same_options(images, method):
    at = 0.0 if method == "small" else 0.3
    prune = comparators.pruner(method, {"macs": 0.5}, train=images[0], at=at, batches=3, batch_size=BATCH)
    options = {"ema": 0.9, "teacher": network(1), "clip": 1.0, "accumulate": 2, "precision": "bf16"}
    result = run(images, prune=prune, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3), **options)
    measured = evaluate(result.model, images[1], precision="bf16")
    assert measured["loss"] == pytest.approx(result.history["val_loss"].iloc[-1], rel=1e-3)
    assert result.report["utilisation"]["macs"] <= 1


def test_distillation_is_that_of_hinton():
    torch.manual_seed(0)
    own, lesson = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (lesson / 3).softmax(1), (own / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(objective.distillation(own, lesson, 3.0), expected)
    assert float(objective.distillation(own, own, 3.0)) == pytest.approx(0, abs=1e-6)
    pixels = objective.distillation(own[..., None].expand(5, 7, 4), lesson[..., None].expand(5, 7, 4), 3.0)
    torch.testing.assert_close(pixels, expected)


@pytest.mark.medium
@pytest.mark.parametrize("mixing", ["none", "mixup"])
def test_a_teacher_may_be_the_model_itself(images, mixing):
    model, taught = network(), []
    start = copy.deepcopy(model)
    handle = model.register_forward_hook(lambda module, given, out: taught.append((module.training, len(given[0]))))
    result = run(images, model, epochs=1, teacher=model, teacher_weight=1.0, mixing=mixing)
    handle.remove()
    assert result.model is model
    assert (False, BATCH) in taught  # the copy, in eval mode
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.linear.weight, start.linear.weight)
    # what a network is taught by itself alone is nearly what it knew
    x, _ = next(iter(images[1].batches(180)))
    with torch.no_grad():
        assert float(objective.distillation(model.eval()(x), start.eval()(x), 4.0)) < 1


def test_a_teacher_is_given_whole_numbers_as_they_are():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.hidden, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.hidden(self.words(x).mean(1)).relu())

    batches = [(torch.randint(0, 20, (8, 5)), torch.randint(0, 3, (8,))) for _ in range(4)]
    result = fit(Words(), batches, epochs=20, budget={"macs": 0.5}, teacher=Words(), multiple=1)
    assert result.report["current"]["macs"] <= result.report["bounds"]["macs"]


def test_a_teacher_of_other_classes_is_refused(images):
    other = nets.small_resnet(widths=(4, 8, 12), num_classes=5)
    message = r"teacher's outputs have shape \(2, 5\) and the network's \(2, 10\)"
    with pytest.raises(ValueError, match=message):
        run(images, teacher=other)
    with pytest.raises(ValueError, match="teacher= compares logits .*, and the network returns tuple"):
        fit(Segmenting(both=True), list(images[0].batches(BATCH)), epochs=1, teacher=other, loss=lambda a, b: a)


class Stop(Exception):
    """Ends a run too early."""


@pytest.mark.medium
@pytest.mark.parametrize("method", ["tailored", *slow("taylor")])
def test_all_of_it_goes_on_from_a_checkpoint(images, tmp_path, capsys, method):
    def stopping(at):
        def on_step(step, steps):
            if step == at:
                raise Stop

        return on_step

    def trained(folder=None, at=None, **more):
        options = {"budget": {"macs": 0.5}}
        if method != "tailored":
            options = {"prune": comparators.pruner(method, {"macs": 0.5}, train=images[0], at=0.3, batches=2)}
        options |= {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=2e-3), "clip": 1.0, "ema": 0.95}
        options |= {"teacher": network(1), "schedule": torch.optim.lr_scheduler.CosineAnnealingLR, **more}
        return run(images, **options, checkpoints=folder, checkpoint_every=7, on_step=stopping(at))

    whole = trained()
    for at in (10, 40):  # before and after the network is made smaller
        with pytest.raises(Stop):
            trained(tmp_path, at)
    capsys.readouterr()
    resumed = trained(tmp_path)
    assert capsys.readouterr().out == "resuming from step 35 of 96\n"
    same(whole, resumed)
    torch.testing.assert_close(whole.last, resumed.last, rtol=0, atol=0)
    for more in ({"ema": 0.9}, {"teacher": network(2)}, {"clip": 2.0}, {"label_smoothing": 0.1}):
        with pytest.raises(RuntimeError, match=f"checkpoints of another run: .*{next(iter(more))}"):
            trained(tmp_path, **more)
    with pytest.raises(RuntimeError, match="checkpoints of another run: .*lr"):
        trained(tmp_path, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    with pytest.raises(RuntimeError, match="checkpoints of another run: .*optimizer"):
        trained(tmp_path, optimizer=lambda groups: torch.optim.Adam(groups, lr=2e-3))


# ---------------------------------------------------------------------------------------------------------------------
# What is shown, and batches that are made already


@pytest.mark.medium
def test_a_row_an_epoch_unless_somebody_else_shows_it(images, capsys):
    rows = []
    for options, shown in (
        ({}, 1),
        ({"verbose": False}, 0),
        ({"on_epoch": rows.append}, 0),
        ({"on_step": lambda *_: None}, 0),
        ({"on_epoch": rows.append, "verbose": True}, 1),
    ):
        run(images, **options)
        out = capsys.readouterr().out
        assert out.count("\n") == out.count("epoch   1/1  lr 0.000  loss") == shown


def test_batches_have_their_own_size(images):
    train, _ = images
    x, y = next(iter(train.batches(320)))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    fit(network(), loader, epochs=1, batch_size=32)
    with pytest.raises(ValueError, match="batch_size=16 given, but this DataLoader makes batches of 32: build it with"):
        fit(network(), loader, epochs=1, batch_size=16)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (lambda x, y: {"image": x, "label": y}, "a dict with the keys 'image', 'label'"),
        (lambda x, y: (x, y, y), "a tuple of Tensor, Tensor, Tensor"),
        (lambda x, y: ({"pixels": x}, y), "a tuple of dict, Tensor"),
        (lambda x, y: [*zip(x, y, strict=True)], "a list of tuple, tuple, tuple, tuple, ..."),
        (lambda x, y: x, "a Tensor"),
        (lambda x, y: None, "a NoneType"),
    ],
)
def test_batches_that_are_no_pairs_are_told_what_they_are(images, batch, said):
    batches = [batch(*pair) for pair in images[0].batches(32)]
    words = rf"a batch is {re.escape(said)}; it must be a pair \(x, y\), .* collate_fn"
    with pytest.raises(TypeError, match=words):
        fit(network(), batches, epochs=1)
    with pytest.raises(TypeError, match=words):
        evaluate(network(), batches)


class Told:
    """A batch sampler that knows the epoch itself, and has a sampler that does."""

    def __init__(self, sampler):
        self.sampler, self.told = sampler, []

    def set_epoch(self, epoch):
        self.told.append(epoch)
        self.sampler.set_epoch(epoch)

    def __len__(self):
        return 10

    def __iter__(self):
        return iter(BatchSampler(self.sampler, 32, True))


@pytest.mark.medium
def test_samplers_are_told_the_epoch_wherever_they_are(images):
    data = TensorDataset(*next(iter(images[0].batches(320))))
    orders = []
    for how in ("sampler", "batch_sampler", "own"):
        sampler = DistributedSampler(data, num_replicas=1, rank=0)
        batches = Told(sampler) if how == "own" else BatchSampler(sampler, 32, True)
        options = {"sampler": sampler, "batch_size": 32} if how == "sampler" else {"batch_sampler": batches}
        seen = []
        keep = lambda outputs, targets, seen=seen: seen.append(targets) or F.cross_entropy(outputs, targets)  # noqa: E731
        fit(network(), DataLoader(data, **options), epochs=3, loss=keep)
        orders.append(torch.cat(seen).view(3, 320))
        if how == "own":
            assert batches.told[-3:] == [0, 1, 2]
    first = orders[0]
    assert not first[0].equal(first[1])
    assert not first[1].equal(first[2])
    assert all(order.equal(first) for order in orders)


@pytest.mark.medium
def test_seed_and_augment_are_of_images_in_memory(images):
    """Beside batches that are made already they were ignored."""
    loader = DataLoader(TensorDataset(*next(iter(images[0].batches(320)))), batch_size=32)
    with pytest.warns(RuntimeWarning, match="seed=1 changes nothing: this DataLoader has an order of its own; seed it"):
        fit(network(), loader, epochs=1, seed=1)
    with pytest.warns(RuntimeWarning, match="augment='crop' changes nothing: it is for Images, and this DataLoader"):
        fit(network(), loader, epochs=1, augment="crop")
    same(fit(network(), *images, epochs=1), fit(network(), *images, epochs=1, seed=0, augment="crop_flip"))


@pytest.mark.medium
def test_a_stream_has_its_own_size_and_its_classes_are_no_parts(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (12, 12), (number, 40, 80)).save(tmp_path / part / name / f"{number}.png")
    stream = streams.Stream(tmp_path / "train", size=8, batch_size=4, train=True, workers=0)
    model = nets.small_resnet(widths=(4, 8, 12), num_classes=2, in_channels=3)
    with pytest.raises(ValueError, match="batch_size=16 given, but this Stream makes batches of 4"):
        fit(model, stream, epochs=1, batch_size=16)
    with pytest.raises(ValueError, match=r"seed=1 given, but this Stream has seed=0: build it with seed=1, or leave"):
        fit(model, stream, epochs=1, seed=1)
    with pytest.warns(RuntimeWarning, match="augment='none' changes nothing: it is for Images, and this Stream"):
        fit(model, stream, epochs=1, augment="none")
    fit(model, stream, epochs=1, seed=0)
    with pytest.raises(
        ValueError, match=r"has the folders train, val, which are parts .*Stream\('.*train', train=True\)"
    ):
        streams.Stream(tmp_path, size=8)
    assert streams.Stream(tmp_path / "val", size=8).classes == ("a", "b")


# ---------------------------------------------------------------------------------------------------------------------
# A loss with parameters


class Scaled(nn.Module):
    """Cross-entropy at a temperature that is learned."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.scale, targets)


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameters_of_a_loss_that_nothing_trains_are_told_of(images, wrapped):
    scaled = Scaled()
    loss = (lambda outputs, targets: scaled(outputs, targets)) if wrapped else scaled
    with pytest.warns(UserWarning, match=r"scale requires a gradient, and fit trains the network's parameters only"):
        run(images, loss=loss)
    assert scaled.scale == 1


def test_parameters_of_a_loss_may_be_frozen_the_networks_or_the_optimisers(images, tmp_path):
    run(images, loss=Scaled().requires_grad_(False))
    model = network()
    run(images, model, loss=lambda outputs, targets: F.cross_entropy(outputs, targets) + 0 * model.linear.weight.sum())
    scaled = Scaled()

    def optimizer(groups):
        return torch.optim.SGD([*groups, {"params": [scaled.scale]}], lr=0.1)

    run(images, loss=scaled, optimizer=optimizer)
    assert scaled.scale != 1
    with pytest.raises(ValueError, match="the optimizer holds 1 parameters that are not the network's"):
        run(images, loss=scaled, optimizer=optimizer, checkpoints=tmp_path)
