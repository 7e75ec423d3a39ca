import json
import re
from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tcp_core.study import controller_plots as cp
from tcp_core.study import results
from tcp_core.training import frames

FIVE = (0.15, 0.25, 0.35, 0.5, 0.7)


def trajectory(budget, *, end=0.3, changed=True, returned=3):
    share = np.linspace(0.05, end, 60)
    down = np.clip((share - 0.11) / (end - 0.11), 0, 1)
    frame = pd.DataFrame(0.0, index=range(60), columns=[*frames.TRAJECTORY, "share"])
    frame["share"], frame["step"] = share, 1000 * share
    frame["macs"] = frame["macs_schedule"] = 40_000_000 * budget**down
    frame["strength"] = 0.02 * (1 + np.sin(np.pi * down))
    frame["losing"] = np.minimum(np.arange(60), 40)
    frame["closed"] = (frame["losing"] - 12).clip(lower=0)
    frame["returned"] = np.where(np.arange(60) < 30, 0, returned)
    return frame.assign(changed=np.where(frame.index.isin(range(1, 41)), 3, 0)) if changed else frame


def widths(layers=20):
    return pd.DataFrame({"layer": [f"layer{i}.conv" for i in range(layers)], "dense": 64, "tailored": 32})


CASES = {
    "five": lambda: {budget: trajectory(budget) for budget in FIVE},
    "one": lambda: {0.5: trajectory(0.5)},
    "unrecorded": lambda: {budget: trajectory(budget, changed=False) for budget in FIVE[:2]},
    "mixed": lambda: {0.5: trajectory(0.5), 0.2: trajectory(0.2, changed=False)},
    "whole run": lambda: {0.5: trajectory(0.5, end=1.0)},
    "nothing to do": lambda: {1.0: trajectory(1.0).assign(losing=0, closed=0, returned=0, changed=0)},
}
FIGURES = {"cost": cp.cost_by_budget_figure, "control": cp.control_by_budget_figure}


def boxes(fig):
    """Every text that is seen, with its place; the bare numbers at ticks are matplotlib's to place."""
    drawn = [text for text in fig.findobj(mpl.text.Text) if text.get_visible()]
    return {text: text.get_window_extent() for text in drawn if re.search("[^0-9.]", text.get_text())}


@pytest.mark.medium
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_texts_do_not_overlap_and_nothing_is_left_open(draw, case):
    before = dict(mpl.rcParams)
    fig = draw(case())
    for (one, place), (other, there) in combinations(boxes(fig).items(), 2):
        assert not place.overlaps(there), (one.get_text(), other.get_text())
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


@pytest.mark.medium
@pytest.mark.parametrize("layers", [8, 57, 110])
def test_names_of_layers_do_not_touch(layers):
    fig = cp.widths_by_budget_figure({0.5: widths(layers)})
    places = [label.get_window_extent() for label in fig.axes[-1].get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in zip(places, places[1:], strict=False))
    assert "50 % of channels" in {text.get_text() for text in boxes(fig)}


def test_budget_and_delivered_cost_stand_side_by_side():
    texts = {text.get_text() for text in boxes(cp.cost_by_budget_figure(CASES["five"]()))}
    assert {"15 %", "15.00 %", "70 %", "70.00 %", "budget", "delivered", "look-ahead", "set is final"} <= texts


def test_changes_are_those_the_schedule_asked_for_and_exchanges():
    texts = [text.get_text() for text in boxes(cp.control_by_budget_figure(CASES["mixed"]()))]
    assert "40 as scheduled" in texts  # 40 rankings at which one more unit lost
    assert "80 exchanged" in texts  # and two changed places
    assert texts.count("not recorded") == 1
    assert texts.count("▲ 3 came back") == 2


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"trajectory of budget 0\.5 lacks share"):
        cp.cost_by_budget_figure({0.5: trajectory(0.5).drop(columns="share")})
    with pytest.raises(ValueError, match=r"widths of budget 0\.5 lacks tailored"):
        cp.widths_by_budget_figure({0.5: widths().drop(columns="tailored")})


def test_tighter_budgets_are_darker():
    colors = [color for _, _, color in cp.colored(CASES["five"]())]
    luminance = [np.dot(color[:3], (0.2126, 0.7152, 0.0722)) for color in colors]
    assert luminance == sorted(luminance, reverse=True)


def write_run(root, name, **metrics):
    folder = root / name
    folder.mkdir(parents=True)
    common = {"method": "tailored", "network": "resnet20", "seed": 0, "steps": 1000, "budget": None}
    common |= {"dense_macs": 1000, "dense_params": 1000, "macs": 100, "params": 100}
    found = dict.fromkeys(results.METRICS) | common | metrics
    (folder / "params.json").write_text(
        json.dumps({name: found[name] for name in ("network", "method")} | {"epochs": 1})
    )
    (folder / "metrics.json").write_text(json.dumps(found))
    trajectory(0.5).drop(columns="share").to_csv(folder / "trajectory.csv", index=False)
    widths().to_csv(folder / "widths.csv", index=False)


def test_runs_of_one_network_and_seed_are_read_by_budget(tmp_path):
    write_run(tmp_path, "a", budget={"macs": 0.3})
    write_run(tmp_path, "b", budget={"macs": 0.5})
    write_run(tmp_path, "dense", method="dense")
    write_run(tmp_path, "joint", budget={"macs": 0.3, "params": 0.3})
    write_run(tmp_path, "params", budget={"params": 0.3})
    write_run(tmp_path, "peer", method="taylor", budget={"macs": 0.3})
    write_run(tmp_path, "seed1", seed=1, budget={"macs": 0.3})
    runs, trajectories, layers = cp.read_budgets(tmp_path, network="resnet20", seed=0)
    assert runs["run"].tolist() == ["b", "a"]
    assert list(trajectories) == list(layers) == [0.5, 0.3]
    np.testing.assert_allclose(trajectories[0.3]["share"], trajectory(0.5)["share"])

    with pytest.raises(ValueError, match="no run has a macs budget alone.*Found: a, b, dense"):
        cp.read_budgets(tmp_path, network="resnet56", seed=0)
    write_run(tmp_path, "again", budget={"macs": 0.3})
    with pytest.raises(ValueError, match="two runs have the same budget.*Found: a, again, b"):
        cp.read_budgets(tmp_path, network="resnet20", seed=0)
