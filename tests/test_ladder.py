"""Down a ladder of budgets: one network a rung, each within its budget, and a ladder that is stopped goes on."""

import copy
import importlib
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from cases import slow

import tcp_core as tcp
from tcp_core import BudgetError, nets
from tcp_core.datasets import sources

ladder_module = importlib.import_module("tcp_core.training.ladder")  # the package has a function of that name
BUDGETS = [{"macs": 0.7}, {"macs": "45%", "params": 0.6}, {"macs": 0.2}]


@pytest.fixture(scope="module")
def images():
    train, val, _ = sources.digits()
    return train.split(320)[1], val.split(100)[1]


def build(seed=0):
    torch.manual_seed(seed)
    return nets.small_resnet(widths=(8, 16, 24), blocks=1, num_classes=10, in_channels=1)


def descend(images, model=None, **options):
    how = {"budgets": BUDGETS, "epochs": [10, 8, 8], "batch_size": 32, "lr": 0.05, "phase": (0.1, 0.5)}
    return tcp.ladder(model or build(), *images, **how | options)


@pytest.fixture(scope="module")
def curve(images):
    return descend(images)


@pytest.mark.medium
def test_every_rung_meets_its_budget_of_the_dense_network_and_uses_it(curve, images):
    dense = tcp.trace(build(), images[0].pixels[:2].float()).cost()
    for rung, (budget, model) in enumerate(zip(BUDGETS, curve.models, strict=True)):
        cost = tcp.trace(model, images[0].pixels[:2].float()).cost()
        bounds = tcp.Budget.of(budget).resolve(dense)
        used = {name: cost[name] / bound for name, bound in bounds.items()}
        assert 0.97 <= max(used.values()) <= 1  # a unit of so small a network is some percent
        row = curve.table.iloc[rung]
        assert (row["rung"], row["macs"], row["params"]) == (rung + 1, cost["macs"], cost["params"])
        assert row["macs_share"] == cost["macs"] / dense["macs"]
    assert curve.table["macs"].is_monotonic_decreasing
    assert curve.table["budget"].to_list() == ["70% macs", "45% macs + 60% params", "20% macs"]


@pytest.mark.medium
def test_shares_are_told_apart_in_the_table(images):
    curve = descend(images, budgets=[{"macs": 0.604}, {"macs": 0.596}], epochs=8, multiple=1)
    assert curve.table["budget"].to_list() == ["60.4% macs", "59.6% macs"]


@pytest.mark.medium
def test_networks_are_kept_apart_and_are_as_good_as_the_table_says(curve, images):
    for model, accuracy in zip(curve.models, curve.table["val_accuracy"], strict=True):
        assert tcp.evaluate(model, images[1])["accuracy"] == pytest.approx(accuracy)
    storages = [{p.data_ptr() for p in model.parameters()} for model in curve.models]
    assert not set.intersection(*storages)


@pytest.mark.medium
def test_widths_that_kernels_like_hold_on_every_rung(images):
    curve = descend(images, budgets=[{"macs": 0.6}, {"macs": 0.35}], epochs=8, multiple=4)
    for model in curve.models:
        widths = tcp.trace(model, images[0].pixels[:2].float()).widths()
        assert all(width % 4 == 0 for name, width in widths.items() if name != "linear"), widths


def clock(network, factor=1.0):
    """A made-up time, by which a network is as fast as its layers are narrow."""
    widths = [m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    return factor * (1 + 0.1 * sum(widths))


def slow_clock(network):
    return clock(network, 2.0)


@pytest.mark.medium
def test_latency_falls_from_rung_to_rung_in_parts_of_the_dense_network_s(images, tmp_path):
    how = {"budgets": [{"latency": 0.8}, {"latency": 0.5}], "epochs": 8, "folder": tmp_path}
    curve = descend(images, latency=tcp.Latency(clock, progress=False), **how)
    for model, share, (_, row) in zip(curve.models, (0.8, 0.5), curve.table.iterrows(), strict=True):
        assert clock(model) == pytest.approx(row["latency"])
        assert 0.9 * share <= clock(model) / clock(build()) <= share
    with pytest.raises(ValueError, match="holds a ladder with"):  # measured in another place
        descend(images, latency=tcp.Latency(slow_clock, progress=False), **how)


@pytest.mark.medium
def test_a_ladder_of_latency_goes_on_though_the_machine_is_never_twice_the_same(images, tmp_path):
    factors = iter([1.0] * 1000)

    def shaking(network):
        return clock(network, next(factors))

    def run(stop=None, budgets=({"latency": 0.8}, {"latency": 0.5}), **options):
        def on_epoch(row):
            if row["epoch"] == stop:
                raise Stop

        latency = tcp.Latency(shaking, progress=False)
        return descend(images, budgets=budgets, epochs=8, latency=latency, on_epoch=on_epoch, **options)

    expected = run(budgets=[{"latency": 0.8}]).models[0]
    with pytest.raises(Stop):
        run(3, folder=tmp_path)
    factors = iter([1.01] * 1000)
    with pytest.raises(Stop):
        run(12, folder=tmp_path)
    factors = iter([3.0, *[2.9] * 1000])
    with pytest.raises(ValueError, match=r"holds a ladder with latency \['0.8', '0.5'\], and \['0.8', '0.6'\]"):
        run(budgets=[{"latency": 0.8}, {"latency": 0.6}], folder=tmp_path)
    found = run(folder=tmp_path)
    torch.testing.assert_close(found.models[0].state_dict(), expected.state_dict(), rtol=0, atol=0)
    # the second rung began on the machine as it was by then, with the milliseconds of the ladder's start
    assert 0.9 * 0.5 / 1.01 <= clock(found.models[1]) / clock(build()) <= 0.5
    assert found.table["latency_share"].iloc[1] <= 0.5


@pytest.mark.medium
def test_epochs_are_counted_on(curve):
    assert curve.history["epoch"].to_list() == list(range(1, 27))
    assert curve.history.groupby("rung").size().to_list() == [10, 8, 8]
    assert curve.table["epochs"].to_list() == [10, 8, 8]


@pytest.mark.medium
def test_training_is_charged_for_the_network_that_is_trained(curve):
    """Rungs start at the cost of the one above and are small from somewhere in the phase on."""
    shares = [1.0, *curve.table["macs_share"]]
    for above, below, (_, row) in zip(shares, shares[1:], curve.table.iterrows(), strict=False):
        least, most = (row["epochs"] * (share * above + (1 - share) * below) for share in (0.1, 0.5))
        assert least < row["training_cost"] <= most + 1e-9


@pytest.mark.medium
@pytest.mark.parametrize("given", [{}, {"verbose": False}, {"on_epoch": lambda row: None}])
def test_rows_are_in_percent_of_the_dense_network(images, capsys, given):
    dense = tcp.trace(build(), images[0].pixels[:2].float()).cost()["macs"]
    curve = descend(images, budgets=[{"macs": 0.6}, {"macs": 0.3}], epochs=8, **given)
    lines = capsys.readouterr().out.splitlines()
    if given:
        assert not lines
        return
    assert [line.split(";")[0] for line in lines if line.startswith("rung")] == [
        "rung 1 of 2: 60% macs",
        "rung 2 of 2: 30% macs",
    ]
    rows = [line for line in lines if line.startswith("epoch")]
    assert len(rows) == 16
    assert rows[8].startswith("epoch   1/8")
    for line, macs in zip(rows, curve.history["macs"], strict=True):
        assert f"macs {macs / dense:.2%}" in line


class Stop(Exception):
    pass


@pytest.mark.medium
@pytest.mark.parametrize("after", [14, *slow(5, 10)])
def test_a_ladder_that_was_stopped_ends_as_if_it_had_not_been(curve, images, tmp_path, after):
    def stop(row):
        if row["epoch"] == after:
            raise Stop

    with pytest.raises(Stop):
        descend(images, folder=tmp_path, on_epoch=stop)
    seen = []
    again = descend(images, folder=tmp_path, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == list(range(after, 27))  # its row had not been kept yet
    assert [row["rung"] for row in seen] == again.history["rung"].to_list()[after - 1 :]
    for model, expected in zip(again.models, curve.models, strict=True):
        for name, tensor in expected.state_dict().items():
            assert model.state_dict()[name].equal(tensor), name
    drop = ["seconds"]
    pd.testing.assert_frame_equal(again.table.drop(columns=drop), curve.table.drop(columns=drop))
    pd.testing.assert_frame_equal(again.history.drop(columns=drop), curve.history.drop(columns=drop))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ladder.json",
        *(f"rung{rung}.safetensors" for rung in (1, 2, 3)),
    ]
    small = tcp.load(build(seed=5), tmp_path / "rung2.safetensors")
    x = images[1].pixels[:4].float()
    assert torch.equal(small.eval()(x), curve.models[1].eval()(x))


@pytest.mark.medium
def test_a_rung_starts_with_the_random_numbers_and_the_loss_that_it_would_have_had(images, tmp_path):
    class Following(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(()))

        def forward(self, outputs, targets):
            loss = torch.nn.functional.cross_entropy(outputs, targets) * (1 + 0.1 * self.mean.clamp(max=2))
            self.mean.mul_(0.9).add_(0.1 * loss.detach())
            return loss

    def run(stop=None, **options):
        steps = []

        def on_step(step, of):
            steps.append(step)
            if len(steps) == stop:
                raise Stop

        model = build()
        model.linear = torch.nn.Sequential(torch.nn.Dropout(0.2), model.linear)
        options |= {"budgets": [{"macs": 0.7}, {"macs": 0.4}], "epochs": 6, "loss": Following(), "on_step": on_step}
        return descend(images, model, **options)

    whole = run()
    with pytest.raises(Stop):
        run(61, folder=tmp_path)  # the first step of the second rung, of which there is no checkpoint
    again = run(folder=tmp_path)
    for one, other in zip(again.models, whole.models, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.medium
def test_another_ladder_in_the_folder_is_refused(images, tmp_path):
    descend(images, folder=tmp_path, budgets=[{"macs": 0.5}], epochs=8)
    for change, name in (
        ({"budgets": [{"macs": 0.4}], "epochs": 8}, "bounds"),
        ({"budgets": [{"macs": 0.5}], "epochs": 9}, "epochs"),
        ({"budgets": [{"macs": 0.5}], "epochs": 8, "lr": 0.1}, "options"),
    ):
        with pytest.raises(ValueError, match=f"holds a ladder with {name}"):
            descend(images, folder=tmp_path, **change)
    assert len(json.loads((tmp_path / "ladder.json").read_text())["rungs"]) == 1


@pytest.mark.medium
def test_a_ladder_of_other_images_is_refused(images, tmp_path, capsys):
    train, val = images
    how = {"folder": tmp_path, "budgets": [{"macs": 0.5}], "epochs": 8}
    first = descend(images, **how)
    capsys.readouterr()
    assert descend(images, **how).table.equals(first.table)  # read, not trained
    assert capsys.readouterr().out == f"1 of 1 rungs are in {tmp_path} already\n"
    more = sources.digits().train.split(352)[1]
    brighter = replace(train, mean=(0.5,))
    for others, said in ((more, "'images': 352"), (brighter, r"'mean': \[0\.5\]")):
        with pytest.raises(
            ValueError, match=rf"holds a ladder with data .*'images': 320.* and .*{said}.* is asked for"
        ):
            descend((others, val), **how)
    state = json.loads((tmp_path / "ladder.json").read_text())
    del state["plan"]["data"]  # as of an earlier version
    (tmp_path / "ladder.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="did not note what its training images were"):
        assert descend((more, val), verbose=False, **how).table.equals(first.table)
    assert not capsys.readouterr().out


@pytest.mark.medium
def test_functions_among_the_options_are_the_same_in_the_next_process(images, tmp_path):
    how = {"folder": tmp_path, "budgets": [{"macs": 0.5}], "epochs": 8, "verbose": False, "lr": None}
    first = descend(images, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3), **how)
    again = descend(images, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3), **how)
    assert again.table.equals(first.table)  # read, not trained


@pytest.mark.medium
def test_functions_that_hold_other_numbers_are_another_ladder(images, tmp_path):
    def made(lr):
        return lambda groups: torch.optim.SGD(groups, lr=lr)

    how = {"folder": tmp_path, "budgets": [{"macs": 0.5}], "epochs": 8, "verbose": False, "lr": None}
    descend(images, optimizer=made(0.05), **how)
    with pytest.raises(ValueError, match="holds a ladder with options"):
        descend(images, optimizer=made(0.1), **how)


@pytest.mark.medium
def test_a_teacher_stays_the_network_that_it_was(images, tmp_path, monkeypatch):
    taught = []

    def spy(model, *args, **options):
        taught.append([parameter.clone() for parameter in options["teacher"].parameters()])
        return tcp.fit(model, *args, **options)

    monkeypatch.setattr(ladder_module, "fit", spy)
    model, how = build(), {"budgets": [{"macs": 0.7}, {"macs": 0.4}], "epochs": 8}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    curve = descend(images, model, teacher=model, folder=tmp_path / "whole", **how)
    for each in taught:
        assert all(map(torch.equal, each, before))
    # stopped between the rungs, and gone on by a process that has built the network anew
    state = json.loads((tmp_path / "whole" / "ladder.json").read_text())
    (tmp_path / "whole" / "ladder.json").write_text(json.dumps(state | {"rungs": state["rungs"][:1]}))
    again = build()
    resumed = descend(images, again, teacher=again, folder=tmp_path / "whole", **how)
    assert all(map(torch.equal, resumed.models[1].parameters(), curve.models[1].parameters()))


def test_fit_says_where_a_list_of_budgets_is_taken(images):
    with pytest.raises(TypeError, match="tcp.ladder"):
        tcp.fit(build(), *images, budget=BUDGETS, epochs=8)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"budgets": [{"macs": 0.5}, {"macs": 0.5}], "epochs": 8}, BudgetError, "not below the one before"),
        ({"budgets": [{"macs": 0.5}, {"macs": 0.7}], "epochs": 8}, BudgetError, "from the largest to the smallest"),
        (
            {"budgets": [{"macs": 0.5, "params": 0.3}, {"macs": 0.3, "params": 0.5}], "epochs": 8},
            BudgetError,
            "allows more params",
        ),
        (
            {"budgets": [{"memory": "9 kB"}, {"memory": "8 kB", "precision": "fp16"}], "epochs": 8},
            BudgetError,
            "budget 2 .* counts bytes at precision='fp16', and budget 1 .* at precision=None; .* the same precision",
        ),
        (
            {"budgets": [{"memory": 0.8, "batch": 2}, {"macs": 0.5}, {"memory": 0.4, "batch": 4}], "epochs": 8},
            BudgetError,
            "budget 3 .* at batch=4, and budget 1 .* at batch=2",
        ),
        ({"budgets": [{"macs": 0.5}, {"macs": 0.0001}], "epochs": 8}, BudgetError, "below the floor"),
        ({"budgets": [{"macs": 0.5}, {"flop": 0.1}], "epochs": 8}, BudgetError, "unknown budget key"),
        ({"budgets": [], "epochs": 8}, ValueError, "at least one"),
        ({"epochs": [8, 8, 1]}, ValueError, "steps=10 is too short"),
        ({"unused": ["nothing"]}, ValueError, "nothing"),
        ({"epochs": [8, 8]}, ValueError, "3 budgets and 2 numbers of epochs"),
        ({"epochs": 3.0}, ValueError, "epochs=3.0; it must be an int"),
        ({"budgets": {"macs": 0.5}}, TypeError, r"budgets=\{'macs': 0.5\}; a ladder takes a list"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1; it must be"),
        ({"prune": None}, TypeError, "budgets="),
        ({"min_width": 0.5}, ValueError, "min_width=0.5: on a ladder a share"),
    ],
)
def test_what_cannot_be_is_refused_before_training(images, options, error, text):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        descend(images, model, **options)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
