import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import tcp_core as tcp
from tcp_core import trace
from tcp_core.training import frames, plots

DENSE = {"macs": 40_000_000, "params": 270_000}


def trajectory(steps=30):
    down = np.clip(np.linspace(-0.2, 1.2, steps), 0, 1)
    frame = pd.DataFrame(0.0, index=range(steps), columns=list(frames.TRAJECTORY))
    frame["epoch"] = np.linspace(0.2, 6, steps)
    frame["macs"] = frame["macs_schedule"] = DENSE["macs"] * (1 - 0.5 * down)
    frame["params"] = DENSE["params"] * (1 - 0.3 * down)
    frame["params_schedule"] = np.nan
    frame["strength"] = 0.02 * np.sin(np.pi * down)
    return frame


def history(epochs=5):
    frame = pd.DataFrame(0.5, index=range(epochs), columns=list(frames.HISTORY))
    return frame.assign(epoch=range(1, epochs + 1))


def widths(layers):
    names = [f"layer{i}.conv" for i in range(layers)]
    return pd.DataFrame({"layer": names, "dense": 64, "tailored": 32})


def rungs():
    return pd.DataFrame({"macs_share": [0.7, 0.4, 0.15], "val_accuracy": [0.88, 0.85, 0.715]})


def texts(fig):
    return "\n".join(text.get_text() for text in fig.findobj(mpl.text.Text))


FIGURES = {
    "cost": lambda: plots.cost_figure(trajectory(), budget={"macs": 0.5}, dense=DENSE, epochs=12),
    "widths": lambda: plots.widths_figure(widths(20)),
    "accuracy": lambda: plots.accuracy_figure(history(), history(), frozen_epoch=2.5),
    "curve": lambda: plots.curve_figure(rungs(), 0.9, rungs()),
}


@pytest.mark.medium
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figures_are_saved_the_same_each_time(draw, tmp_path):
    first = plots.save_figure(draw(), tmp_path / "new" / "first.v1")
    second = plots.save_figure(draw(), tmp_path / "second")
    assert [path.name for path in first] == ["first.v1.svg", "first.v1.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "<dc:date>" not in first[0].read_text()


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figures_leave_no_trace(draw):
    before = dict(mpl.rcParams)
    draw()
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []  # a notebook would show an open one a second time


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_every_axis_has_a_title_and_a_unit(draw):
    for axes in draw().axes:
        assert axes.get_title(loc="left")
        assert axes.get_ylabel()
    assert axes.get_xlabel()


def test_cost_is_in_percent_of_dense_with_its_budget():
    text = texts(plots.cost_figure(trajectory(), budget={"macs": 0.5}, dense=DENSE))
    assert "macs 50.00 %\nbudget 50 %" in text
    assert "params 70.00 %\nno budget" in text
    absolute = {"macs": 20_000_000, "params": "80%"}
    text = texts(plots.cost_figure(trajectory(), budget=absolute, dense=DENSE))
    assert "macs 50.00 %\nbudget 50 %" in text
    assert "params 70.00 %\nbudget 80 %" in text


def test_every_cost_with_a_budget_is_drawn():
    frame = trajectory()
    frame["latency"], frame["latency_schedule"] = 4e-7 * frame["macs"], 4e-7 * frame["macs_schedule"]
    dense = DENSE | {"latency": 4e-7 * DENSE["macs"]}
    assert "latency 50.00 %\nbudget 60 %" in texts(plots.cost_figure(frame, budget={"latency": 0.6}, dense=dense))
    with pytest.raises(tcp.BudgetError, match=r"needs that latency; dense has macs, params\. Give"):
        plots.cost_figure(frame, budget={"latency": 0.6}, dense=DENSE)


@pytest.mark.medium
@pytest.mark.parametrize("layers", [1, 7, 8, 56, 300])
def test_names_of_layers_do_not_touch(layers):
    fig = plots.widths_figure(widths(layers))
    boxes = [label.get_window_extent() for label in fig.axes[0].get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_accuracy_without_validation_and_of_one_epoch():
    frame = history(1).assign(val_accuracy=np.nan)
    assert "tailored\n" not in texts(plots.accuracy_figure(frame))
    assert "tailored\n50.0 %" in texts(plots.accuracy_figure(history(1)))


def test_missing_columns_are_named():
    frame = trajectory().drop(columns="strength")
    with pytest.raises(ValueError, match="trajectory lacks strength"):
        plots.cost_figure(frame, budget={"macs": 0.5}, dense=DENSE)
    with pytest.raises(ValueError, match="widths has no rows"):
        plots.widths_figure(widths(0))


def test_a_curve_names_the_accuracy_of_every_rung():
    assert {"dense 90.0", "88.0", "71.5"} <= set(texts(plots.curve_figure(rungs(), 0.9)).split("\n"))


def test_units_are_drawn_square_by_square():
    channels = trace(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3)), torch.randn(1, 1, 8, 8))
    axes = plots.units_figure(channels, torch.tensor([True, False, True])).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.weight  outputs", "0.weight  inputs"] + [
        "2.weight  outputs",
        "2.weight  inputs",
    ]
    numbers = [text.get_text() for text in axes.texts if text.get_text()]
    assert numbers == ["0", "1", "2", "0", "1", "2"]
    assert sum(patch.get_facecolor()[:3] == (1, 1, 1) for patch in axes.patches) == 2  # the closed unit, twice
