"""`fit` against a loop written out, its tables, and what it does with bad numbers."""

import copy
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from cases import slow
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import counted

from tcp_core import BudgetError, Tailor, evaluate, fit, nets
from tcp_core.datasets import sources
from tcp_core.study import results
from tcp_core.training import batches, frames
from tcp_core.training.recipe import warmup_cosine
from tcp_core.training.run import Run

EPOCHS, BATCH = 6, 20  # 96 steps with 320 images, about the fewest that tailoring takes


@pytest.fixture(scope="module")
def images():
    """(train, val) of 320 and 180 digits."""
    splits = sources.digits()
    return splits.train.split(320)[1], splits.val


def network(seed=0):
    torch.manual_seed(seed)
    return nets.small_resnet(widths=(8, 12, 16))


def run(images, *, budget, **options):
    train, val = images
    return fit(network(), train, val, **{"budget": budget, "epochs": EPOCHS, "batch_size": BATCH, **options})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------------------------------
# Tailored


@pytest.mark.medium
def test_a_tailored_run_and_its_tables(images):
    rows = []
    result = run(images, budget={"macs": 0.5, "params": 0.6}, on_epoch=rows.append)
    x = torch.zeros(1, 1, 8, 8)
    dense, small = counted(network(), x), counted(result.model, x)
    assert type(result.model) is nets.ResNet
    assert small == result.report["current"]
    assert result.report["dense"] == dense
    assert result.report["frozen"]
    assert result.report["largest_gate_removed"] == 0
    assert 0.95 < max(result.report["utilisation"].values()) <= 1

    widths = [row.pop("widths") for row in rows]
    assert widths[-1] == result.widths.set_index("layer")["tailored"].to_dict()
    history = result.history
    assert tuple(history) == frames.HISTORY
    assert history.to_dict("records") == rows
    assert list(history["epoch"]) == [*range(1, EPOCHS + 1)]
    assert list(history["macs"]) == sorted(history["macs"], reverse=True)
    assert history.iloc[-1][["macs", "params"]].to_dict() == small
    assert list(history["open_units"]) == sorted(history["open_units"], reverse=True)
    assert history[["train_accuracy", "val_accuracy"]].stack().between(0, 1).all()
    assert (history["seconds"] > 0).all()
    assert history["strength"].iloc[-1] == 0
    measured = evaluate(result.model, images[1])
    assert measured == pytest.approx(
        {"loss": history["val_loss"].iloc[-1], "accuracy": history["val_accuracy"].iloc[-1]}
    )

    trajectory = result.trajectory
    assert tuple(trajectory) == (*frames.TRAJECTORY, "changed")
    assert trajectory["step"].is_monotonic_increasing
    assert trajectory["epoch"].tolist() == pytest.approx((trajectory["step"] / 16).tolist())
    assert trajectory.iloc[0][["macs", "params"]].to_dict() == dense
    assert trajectory.iloc[-1][["macs", "params"]].to_dict() == small
    assert trajectory["step"].iloc[-1] == result.frozen_at_step
    assert trajectory["closed"].iloc[-1] == trajectory["losing"].iloc[-1] > 0

    widths = result.widths
    assert tuple(widths) == frames.WIDTHS
    assert widths["layer"].tolist()[0] == "conv1"
    assert widths["layer"].tolist()[-1] == "linear"
    for name, model in (("dense", network()), ("tailored", result.model)):
        assert widths[name].tolist() == [len(model.get_submodule(layer).weight) for layer in widths["layer"]]


@pytest.mark.medium
def test_the_tables_can_be_stored_as_a_run(images, tmp_path):
    result = run(images, budget={"macs": 0.5})
    out = results.start_run(tmp_path / "run", {"seed": 0})
    metrics = dict.fromkeys(results.METRICS) | {"utilisation": result.report["utilisation"]}
    tables = {"history": result.history, "trajectory": result.trajectory, "widths": result.widths}
    results.finish_run(out, metrics=metrics, **tables)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), table, check_dtype=False)


@pytest.mark.medium
@pytest.mark.parametrize("budget", [{"macs": 0.5}, *slow(None)])
def test_the_seed_decides_the_run(images, budget):
    first, again, other = (run(images, budget=budget, seed=seed) for seed in (1, 1, 2))
    assert same(first.model.state_dict(), again.model.state_dict())
    pd.testing.assert_frame_equal(first.history.drop(columns="seconds"), again.history.drop(columns="seconds"))
    pd.testing.assert_frame_equal(first.trajectory, again.trajectory)
    assert first.history["train_loss"].tolist() != other.history["train_loss"].tolist()


@pytest.mark.medium
def test_batches_may_come_from_a_loader_or_a_list(images):
    train, val = images
    batches = list(train.batches(BATCH))
    loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True))), batch_size=BATCH)
    found = [
        fit(network(), source, held_out, budget={"macs": 0.5}, epochs=EPOCHS)
        for source, held_out in ((batches, val), (loader, list(val.batches(50))))
    ]
    assert same(*(result.model.state_dict() for result in found))
    for column in ("train_loss", "val_loss", "val_accuracy"):
        assert found[0].history[column].tolist() == pytest.approx(found[1].history[column].tolist(), rel=1e-5)


@pytest.mark.medium
def test_options_reach_the_tailor(images):
    result = run(images, budget={"macs": 0.6}, ignore="layer2.*", min_width=3, phase=(0.1, 0.6), lookahead=0.5)
    widths = result.widths.set_index("layer")
    assert (widths["tailored"] >= 3).all()
    assert (widths["tailored"] == widths["dense"])[["layer2.0.conv1", "layer2.0.conv2"]].all()
    assert 0.5 * 96 < result.frozen_at_step <= 0.6 * 96 + 2


@pytest.mark.medium
def test_widths_in_multiples(images):
    result = run(images, budget={"macs": 0.5}, multiple=4)
    assert (result.widths["tailored"] % 4 == 0)[result.widths["layer"] != "linear"].all()
    assert (result.widths["tailored"] < result.widths["dense"]).any()
    assert 0.8 < result.report["utilisation"]["macs"] <= 1
    assert result.report["largest_gate_removed"] == 0
    with pytest.raises(ValueError, match="multiple=0; it must be an int of at least 1"):
        run(images, budget={"macs": 0.5}, multiple=0)


@pytest.mark.medium
def test_the_learning_rate_starts_anew_where_it_is_told_to(images):
    rates = run(images, budget=None, lr=0.1, warmup=0.0, restart=0.5).history["lr"].tolist()
    assert rates[2] == 0.1  # of the next step, with which the second schedule starts
    assert rates[0] > rates[1]
    assert rates[2] > rates[3] > rates[4] > rates[5]
    with pytest.raises(ValueError, match=r"restart=1\.0; it must be a share of the run in \[0, 1\)"):
        run(images, budget=None, restart=1.0)


def test_a_run_has_one_budget(images):
    with pytest.raises(TypeError, match="budget or prune, not both"):
        run(images, budget={"macs": 0.5}, prune=lambda *_: None)


def test_without_validation_images_there_is_no_accuracy(images):
    result = fit(network(), images[0], budget=None, epochs=1)
    assert result.history[["val_loss", "val_accuracy"]].isna().all(axis=None)


class Noise:
    """Batches that are drawn at random from all sources there are, also while they are validated on."""

    def __init__(self):
        self.generator, self.drawn = np.random.default_rng(3), 0

    def __len__(self):
        return 3

    def __iter__(self):
        for _ in range(3):
            self.drawn += 1
            shift = self.generator.normal() + random.gauss(0, 1)
            yield torch.randn(8, 1, 8, 8) + shift, torch.randint(10, (8,))


@pytest.mark.parametrize("budget", [None, {"macs": 0.5}])
def test_what_is_wrong_with_validation_is_told_before_training(images, budget):
    steps, model = [], network()
    before = weights(model)
    wrong = [(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))]
    given = {"budget": budget, "epochs": EPOCHS, "batch_size": BATCH}
    with pytest.raises(RuntimeError, match="channels") as found:
        fit(model, images[0], wrong, **given, on_step=lambda *at: steps.append(at))
    assert found.value.__notes__ == ["This was the first batch of val, tried before training."]
    assert not steps
    assert same(weights(model), before)
    labels = [(torch.zeros(4, 1, 8, 8), torch.full((4,), 12))]
    with pytest.raises(ValueError, match="held-out batch 1"):
        fit(model, images[0], labels, **given)


class Counted:
    """A loss that depends on how often it was asked, by a number and by a buffer."""

    def __init__(self):
        self.calls, self.norm = 0, nn.BatchNorm1d(10, affine=False)

    def __call__(self, outputs, targets):
        self.calls += 1
        return F.cross_entropy(self.norm(outputs), targets) * (1 + self.calls / 100)


def test_validation_that_is_tried_out_changes_nothing(images, monkeypatch):
    def trained():
        random.seed(1)
        torch.manual_seed(1)
        model = nn.Sequential(network(), nn.Dropout(0.3))
        val, loss, metric = Noise(), Counted(), Counted()
        options = {"loss": lambda *given: loss(*given), "metric": metric, "verbose": False, "batch_size": 20}
        found = fit(model, images[0].split(100)[1], val, budget=None, epochs=2, **options)
        return weights(found.model), found.history.drop(columns="seconds"), val.drawn

    first = trained()
    monkeypatch.setattr(Run, "try_out", lambda self, val: None)
    other = trained()
    assert same(first[0], other[0])
    pd.testing.assert_frame_equal(first[1], other[1])
    assert (first[2], other[2]) == (7, 6)


class Balanced(nn.Module):
    """A loss that follows how often each class is seen, while it trains (Menon et al., 2021)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.full((10,), 0.1))

    def forward(self, outputs, targets):
        if self.training:
            self.share.mul_(0.9).add_(0.1 * F.one_hot(targets, 10).float().mean(0))
        return F.cross_entropy(outputs + self.share.clamp(min=1e-3).log(), targets)


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, lambda loss: lambda *given: loss(*given)], ids=["module", "inside"]
)
def test_a_loss_is_held_out_in_eval_mode(images, wrap):
    train, val = images[0].split(100)
    weight, shares = [], []
    for held_out in (None, val):
        model, loss = network(), Balanced()
        fit(model, train, held_out, budget=None, epochs=2, batch_size=BATCH, loss=wrap(loss), verbose=False)
        weight.append(weights(model))
        shares.append(loss.share.clone())
        assert loss.training
    assert same(*weight)
    assert torch.equal(*shares)
    evaluate(model, val, loss=wrap(loss), metric=wrap(loss))
    assert torch.equal(loss.share, shares[1])
    assert loss.training


# -------------------------------------------------------------------------------------------------
# Dense


def test_without_a_budget_the_dense_network_is_trained_in_place(images):
    train, val = images
    model = network()
    result = fit(model, train, val, budget=None, epochs=2, batch_size=64)
    assert result.model is model
    assert result.report == {}
    assert result.trajectory.empty
    assert result.frozen_at_step is None
    assert tuple(result.history) == frames.HISTORY
    assert (result.history["macs"] == counted(model, torch.zeros(1, 1, 8, 8))["macs"]).all()
    assert (result.history["strength"] == 0).all()
    assert result.widths["tailored"].equals(result.widths["dense"])


def test_training_is_sgd_with_warmup_and_cosine_written_out(images):
    train, _ = images
    options = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01, "warmup": 0.3, "label_smoothing": 0.1}
    found = fit(network(), train, budget=None, epochs=2, batch_size=64, augment="crop", seed=3, **options)

    model, velocity, losses = network(), {}, []
    for step in range(10):
        if step % 5 == 0:
            batches = list(train.batches(64, shuffle=True, augment="crop", seed=3, epoch=step // 5, drop_last=True))
        # 10 steps of which 3 are warm-up
        share = (step + 1) / 4 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 7))
        x, y = batches[step % 5]
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        losses.append(loss.item())
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            gradient = gradient + 0.01 * (parameter.ndim > 1) * parameter.detach()
            velocity[parameter] = 0.8 * velocity.get(parameter, torch.zeros_like(parameter)) + gradient
            with torch.no_grad():
                parameter -= 0.05 * share * (gradient + 0.8 * velocity[parameter])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    means = [sum(losses[:5]) / 5, sum(losses[5:]) / 5]
    assert found.history["train_loss"].tolist() == pytest.approx(means, rel=1e-3)


def test_the_learning_rate_rises_and_falls_to_zero():
    factors = [warmup_cosine(step, 200, 0.1) for step in range(201)]
    top = factors.index(max(factors))
    assert top == 20
    assert factors[top] == 1
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert 0 < factors[0] < 0.1
    assert factors[-1] == 0
    assert warmup_cosine(0, 200, 0) == 1


@pytest.mark.medium
@pytest.mark.parametrize("budget", [{"macs": 0.5}, *slow(None)])
def test_half_precision_autocast_trains_in_full_precision_parameters(images, budget):
    result = run(images, budget=budget, precision="bf16")
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert result.history[["train_loss", "val_loss"]].notna().all(axis=None)
    plain = run(images, budget=budget)
    assert result.history["train_loss"].tolist() != plain.history["train_loss"].tolist()
    assert result.history["train_loss"].tolist() == pytest.approx(plain.history["train_loss"].tolist(), rel=0.2)


@pytest.mark.medium
@pytest.mark.parametrize("budget", [None, {"macs": 0.5}])
def test_gradients_of_several_batches_are_one_step(images, budget):
    """Without batch norm, whose statistics are each batch's own, small batches added up are a large one."""

    def fitted(batch_size, accumulate):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
        options = {"budget": budget, "epochs": EPOCHS, "batch_size": batch_size, "accumulate": accumulate, "lr": 0.02}
        return fit(model, images[0], **options, on_step=lambda step, steps: seen.append((step, steps)))

    seen = []
    small, large = fitted(BATCH // 2, 2), fitted(BATCH, 1)
    assert (
        seen[: len(seen) // 2] == seen[len(seen) // 2 :] == [(step, seen[-1][1]) for step in range(1, seen[-1][1] + 1)]
    )
    torch.testing.assert_close(small.model.state_dict(), large.model.state_dict(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.tensor(small.history["train_loss"]), torch.tensor(large.history["train_loss"]), rtol=1e-4, atol=0
    )
    assert small.widths.equals(large.widths)


@pytest.mark.medium
@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_images_of_a_batch_are_mixed(images, mixing):
    torch.manual_seed(0)
    result = run(images, budget={"macs": 0.5}, mixing=mixing, label_smoothing=0.1)
    assert result.history["train_loss"].iloc[-1] > run(images, budget={"macs": 0.5}).history["train_loss"].iloc[-1]
    x, y = next(iter(images[0].batches(BATCH)))
    mixed, shares = batches.mixer(mixing, images[0])(x, y)
    assert mixed.shape == x.shape
    torch.testing.assert_close(shares.sum(1), torch.ones(BATCH))
    assert (shares.gather(1, y[:, None]) > 0).all()


def test_mixing_needs_classes_and_a_name(images):
    with pytest.raises(ValueError, match="mixing='blur'; it must be one of none, mixup, cutmix"):
        run(images, budget=None, mixing="blur")
    with pytest.raises(ValueError, match="needs to know the classes"):
        fit(network(), list(images[0].batches(BATCH)), epochs=1, mixing="mixup")


def test_batches_must_be_as_many_as_they_say(images):
    class Short(list):
        def __len__(self):
            return 5

    with pytest.raises(ValueError, match="came to their end before their length"):
        fit(network(), Short(list(images[0].batches(BATCH))[:4]), epochs=1)
    with pytest.raises(ValueError, match="4 batches to train on; give at least 5 batches, which"):
        fit(network(), list(images[0].batches(BATCH))[:4], epochs=1, accumulate=5)
    with pytest.raises(ValueError, match="SyncBatchNorm runs on cuda and xpu only"):
        run(images, budget=None, sync_batch_norm=True)


# -------------------------------------------------------------------------------------------------
# Bad numbers, and nothing half done


@pytest.mark.parametrize(("budget", "bad_step"), [(None, 0), (None, 20), ({"macs": 0.5}, 6), ({"macs": 0.5}, 40)])
def test_a_loss_that_is_not_finite_stops_before_the_step(images, budget, bad_step):
    model = network()
    trained, before = [model], []

    class Batches(list):
        def __iter__(self):
            for x, y in super().__iter__():
                # Not inside the forward pass, where the parameters are multiplied by their gates.
                before.append(weights(trained[-1]))
                yield x, y

    def spoil(model, args):
        if not (model.training and torch.is_grad_enabled()):
            return None  # tracing or verification
        trained.append(model)
        return (torch.full_like(args[0], math.nan),) if len(trained) == bad_step + 2 else None

    model.register_forward_pre_hook(spoil)
    message = rf"loss is nan at step {bad_step + 1}; .* not taken\. Lower lr .*warmup"
    with pytest.raises(FloatingPointError, match=message):
        fit(model, Batches(images[0].batches(BATCH)), budget=budget, epochs=EPOCHS)
    assert len(trained) == bad_step + 2
    assert same(trained[-1].state_dict(), before[-1])
    assert all(value.isfinite().all() for value in before[-1].values())


def test_divergence_is_named(images):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step .* Lower lr \(now .*\), lengthen warmup"):
        run(images, budget=None, lr=1e30)


def test_a_budget_that_cannot_be_met_is_refused_before_training(images):
    model = network()
    before = weights(model)
    with pytest.raises(BudgetError, match="below the floor"):
        fit(model, images[0], budget={"macs": 0.001}, epochs=EPOCHS, batch_size=BATCH)
    assert same(before, weights(model))
    assert model.training


# -------------------------------------------------------------------------------------------------
# Evaluation


def mixed_modes(model):
    model.train()
    model.layer1.eval()
    model.layer3[0].bn1.eval()
    return {name: module.training for name, module in model.named_modules()}


def test_evaluation_is_the_mean_over_images(images):
    _, val = images
    model = network()
    modes, before = mixed_modes(model), weights(model)
    measured = evaluate(model, val, batch_size=37)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert same(before, weights(model))

    x, y = next(iter(val.batches(len(val))))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x)
    expected = {"loss": float(F.cross_entropy(logits, y)), "accuracy": float((logits.argmax(1) == y).float().mean())}
    assert measured == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, list(val.batches(50))) == pytest.approx(expected, rel=1e-5)


def test_evaluation_restores_modes_when_it_fails(images):
    model = network()
    modes = mixed_modes(model)
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(2, 5, 8, 8), torch.zeros(2, dtype=torch.long))])
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_tailor_can_be_evaluated_while_its_gates_close(images):
    train, val = images
    tailor = Tailor(network(), next(iter(val.batches(2)))[0], budget={"macs": 0.5}, steps=96)
    dense = evaluate(tailor.model, val)
    assert evaluate(tailor, val) == pytest.approx(dense)
    with torch.no_grad():
        tailor.gate[0] = 0.0
    assert evaluate(tailor, val) != pytest.approx(dense)
    with pytest.warns(RuntimeWarning, match="still being tailored"):
        assert evaluate(tailor.model, val) == pytest.approx(dense)


def test_networks_of_other_tasks_of_one_dimension():
    x, y = torch.randn(160, 6), torch.randint(3, (160,))
    batches = list(zip(x.split(10), y.split(10), strict=True))
    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    )
    result = fit(model, batches, budget={"params": 0.5}, epochs=EPOCHS)
    assert 0.95 < result.report["utilisation"]["params"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_tailored_networks_learn_the_digits(share):
    splits = sources.digits()
    torch.manual_seed(0)
    model = nets.small_resnet(widths=(16, 32, 64))
    result = fit(model, splits.train, splits.val, budget={"macs": share}, epochs=15, batch_size=32, augment="crop")
    assert evaluate(result.model, splits.test)["accuracy"] > 0.95
