"""The figures of docs/method.md show what the page says of them."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from tcp_core.controller import GAIN, MAX_CHANGE
from tcp_core.study import controller_plots, method_plots
from tcp_core.training.plots import save_figure

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "results" / "runs" / "cifar10-cpu" / "pretrained"


@pytest.fixture(scope="module")
def run():
    return method_plots.closing(steps=700)


@pytest.fixture(scope="module")
def trajectories():
    return controller_plots.read_budgets(RUNS, network="resnet20", seed=0)[1]


@pytest.mark.medium
def test_every_gate_closes_by_itself_and_the_budget_is_met(run):
    last = run.gates[-1]
    assert run.final_at < run.frozen_at == len(run.gates) - 1
    assert last[run.losing].max() == 0
    assert last[~run.losing].min() == 1
    assert (run.gates.diff(dim=0).abs() < 0.5).all()  # they moved there in steps
    assert run.price[~run.losing].sum() > 0.9  # prices are of the dense network, so they add up to more than it costs


@pytest.mark.medium
def test_what_is_kept_has_the_higher_score(run):
    score = run.importance.double() / run.price
    assert score[~run.losing].median() > score[run.losing].quantile(0.95)


def test_the_strengths_of_finished_runs_are_those_of_the_formula_but_for_what_the_page_says(trajectories):
    rankings = limited = last = 0
    for frame in trajectories.values():
        times = (frame["strength"] / frame["strength"].iloc[0]).to_numpy()
        formula = ((frame["macs"] / frame["macs_schedule"]) ** GAIN).clip(0.5, 4).to_numpy()
        final = (formula < 1) & np.isclose(times, 1, atol=0.02)  # then it does not fall below its first value
        off = np.flatnonzero(~np.isclose(times, formula, rtol=0.02) & ~final)
        rankings, last = rankings + len(frame), last + int((off == len(frame) - 1).sum())
        limited += int((off < len(frame) - 1).sum())
        for each in off[off < len(frame) - 1]:
            assert times[each] > formula[each]
            assert np.isclose(times[each - 1] / times[each], MAX_CHANGE)
    assert (rankings, limited, last) == (872, 4, 4)
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert "of 872, all but eight lie on the curve of the formula. Four lie above it" in page


def test_removed_channels_are_not_drawn():
    channels = method_plots.example()
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[[1, 6]] = False
    figure = method_plots.gates_figure(channels, open_units)
    closed, removed = (sum(isinstance(patch, Rectangle) for patch in axes.patches) for axes in figure.axes)
    entries = [units for name, dims in channels.slots.items() if name.endswith("weight") for units in dims]
    assert closed - removed == sum(int(((units == 1) | (units == 6)).sum()) for units in entries if units is not None)


@pytest.mark.medium
def test_each_figure_is_the_same_each_time(run, trajectories, tmp_path):
    channels = method_plots.example()
    open_units = torch.ones(channels.units, dtype=torch.bool)
    for attempt in "ab":
        drawn = {
            "units": method_plots.units_figure(channels),
            "gates": method_plots.gates_figure(channels, open_units),
            "cost": method_plots.cost_figure(channels, {"conv1": "stream", "layer1.0.conv1": "inside the block"}),
            "ranking": method_plots.ranking_figure(run),
            "strength": method_plots.strength_figure(trajectories),
            "freeze": method_plots.freeze_figure(run),
        }
        for name, figure in drawn.items():
            save_figure(figure, tmp_path / attempt / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        if path.suffix == ".png":
            image = matplotlib.image.imread(path)
            assert (image[0] == image[0, 0]).all(), f"{path.name}: something is cut off at the top"
            assert (image[:, -1] == image[0, 0]).all(), f"{path.name}: something is cut off at the right"


def test_the_cost_of_a_unit_is_what_leaving_it_out_saves():
    channels = method_plots.example()
    figure = method_plots.cost_figure(channels, {"conv1": "stream"})
    one = torch.ones(channels.units, dtype=torch.bool)
    one[0] = False
    saved = 100 * (1 - channels.cost(one)["macs"] / channels.cost()["macs"])
    assert figure.axes[0].patches[0].get_width() == pytest.approx(saved)
