"""The controller's figures: runs that differ in their macs budget alone, against the share of the run.

Each takes a dict, {budget: data frame of its run}, with budgets as fractions of the dense network's macs. Trajectories
have, beside their own columns, `share`: the step as a fraction of the run's steps. Budgets have a sequential palette of
their own, told apart by colour-blind readers: the tighter, the darker.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ..training.frames import TRAJECTORY, WIDTHS, require
from ..training.plots import COLORS, DOTS, TEXT_GREY, finished, legend, style
from .results import read_runs

Frames = dict[float, pd.DataFrame]


def read_budgets(root: str | Path, *, network: str, seed: int) -> tuple[pd.DataFrame, Frames, Frames]:
    """Return (runs, trajectories, widths) of the tailored runs below `root` that have a macs budget and no other.

    `runs` has the rows of `results.read_runs`, from the largest budget to the smallest; the other two are
    {budget: data frame}. Raises `ValueError` if there is no run of this network and seed, or two of one budget.
    """
    table = read_runs(root)
    has = table.reindex(columns=["method", "network", "seed", "budget.macs", "budget.params"])
    chosen = has["method"].eq("tailored") & has["network"].eq(network) & has["seed"].eq(seed)
    runs = table[chosen & has["budget.macs"].notna() & has["budget.params"].isna()]
    if runs.empty or runs["budget.macs"].duplicated().any():
        problem = "no run has a macs budget alone" if runs.empty else "two runs have the same budget"
        raise ValueError(
            f"Of the tailored runs of {network!r} with seed {seed} below {root}, {problem}. Name another folder, "
            f"network or seed. Found: {', '.join(table['run'] if runs.empty else runs['run'])}."
        )
    runs = runs.sort_values("budget.macs", ascending=False, ignore_index=True)
    trajectories, widths = {}, {}
    for run, budget, steps in runs[["run", "budget.macs", "steps"]].itertuples(index=False):
        frame = pd.read_csv(Path(root) / run / "trajectory.csv")
        trajectories[budget] = frame.assign(share=frame["step"] / steps)
        widths[budget] = pd.read_csv(Path(root) / run / "widths.csv")
    return runs, trajectories, widths


def cost_by_budget_figure(trajectories: Mapping[float, pd.DataFrame]) -> Figure:
    """Draw how the macs of every run came down along its schedule to its budget.

    The axis is logarithmic: there a schedule is a straight line, and a cost's height above it is what the controller
    answers to. Dotted lines part what happens when, as far as the runs have it in common.
    """
    end = _check(trajectories)
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.9))
        for budget, frame, color in colored(trajectories):
            share, full = 100 * frame["share"].to_numpy(float), frame["macs"].iloc[0] / 100
            percent = frame["macs"].to_numpy(float) / full
            axes.plot(share, frame["macs_schedule"] / full, "--", color=color, lw=1.1)
            # before the first ranking the network is dense, after the last its cost is fixed
            at, percent = np.r_[0, share, end], np.r_[100, percent, percent[-1]]
            axes.plot(at, percent, color=color, drawstyle="steps-post", zorder=3)
            texts = (f"{100 * budget:.4g} %", f"{percent[-1]:.2f} %")
            _beside(axes, percent[-1], texts, color=color, coords="data")
        low = 87 * min(trajectories)
        axes.set(yscale="log", xlim=(0, end), ylim=(low, 103), ylabel="macs, % of dense")
        axes.yaxis.set_minor_locator(NullLocator())
        ticks = [tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100) if tick >= low]
        axes.set_yticks(ticks, ticks)
        axes.set_xlabel("share of the run, %")
        _name_parts(axes, trajectories, end)
        _beside(axes, 1.035, ("budget", "delivered"), color=TEXT_GREY, coords="axes fraction")
        legend(axes, {"cost now": "-", "schedule": "--"})
        axes.get_legend().set_bbox_to_anchor((1, 1.07))
        axes.set_title("Cost of the units still open", pad=32)
        return finished(fig)


def control_by_budget_figure(trajectories: Mapping[float, pd.DataFrame]) -> Figure:
    """Draw, in a column for each budget, the strength, the units that changed sides, and those that lose or are closed.

    The strength is in multiples of its first value, which closes a gate in one look-ahead. Of the units that changed
    sides at a ranking (means over each percent of the run), as many as the losing set grew or shrank by are grey: the
    schedule asked for them. The others were exchanged, because importance had changed. The panel of a run without the
    column `changed` says so.
    """
    end = _check(trajectories)
    with style():
        size = (8.4, 6.6)
        fig, grid = plt.subplots(3, len(trajectories), figsize=size, sharex=True, sharey="row", squeeze=False)
        for (strength, turnover, units), (budget, frame, color) in zip(grid.T, colored(trajectories), strict=True):
            share, line = 100 * frame["share"].to_numpy(float), {"color": color, "drawstyle": "steps-post", "lw": 1.5}
            strength.plot(share, frame["strength"] / frame["strength"].iloc[0], **line)
            _write(strength, 0.5, 1.3, f"{100 * budget:.4g} % of macs", color, ha="center", fontsize=10, weight="bold")

            if "changed" in frame:
                changed, asked = _changed(frame), frame["losing"].diff().abs().fillna(0)
                rankings, edges = np.histogram(share, bins=np.arange(101))
                for number, look in ((changed, color), (asked, "#B0B0B0")):  # the second stands before the first
                    mean = np.histogram(share, edges, weights=number)[0] / rankings.clip(min=1)
                    turnover.stairs(mean, edges, fill=True, color=look, lw=0)
                _write(turnover, 0.03, 0.97, f"{sum(changed - asked):.0f} exchanged", color)
                _write(turnover, 0.03, 0.86, f"{sum(asked):.0f} as scheduled", TEXT_GREY)
            else:
                _write(turnover, 0.5, 0.5, "not recorded", TEXT_GREY, ha="center", va="center", fontsize=9)

            units.plot(share, frame["losing"], **line | {"lw": 1.1, "linestyle": DOTS})
            units.plot(share, frame["closed"], **line)
            back = frame["returned"].diff().fillna(0) > 0
            units.plot(share[back], frame["closed"][back], "^", color=COLORS["text"], ms=5, zorder=4)
            _write(units, 0.03, 0.97, f"\N{BLACK UP-POINTING TRIANGLE} {frame['returned'].iloc[-1]:.0f} came back")
        for axes, title, label, room in zip(
            grid[:, 0],
            ("Strength", "Units changing sides", "Losing (dotted), closed"),
            ("times its first value", "units a ranking", "units"),
            (1, 1.4, 1.2),
            strict=True,
        ):
            axes.set_title(title)
            axes.set(xlim=(0, end), ylim=(0, room * axes.get_ylim()[1]), ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if not any("changed" in frame for frame in trajectories.values()):
            grid[1, 0].set_yticks([])
        fig.supxlabel("share of the run, %", fontsize=10)
        return finished(fig)


def widths_by_budget_figure(widths: Mapping[float, pd.DataFrame]) -> Figure:
    """Draw how many output channels each layer had (grey) and has kept under each budget, in network order."""
    for budget, frame in widths.items():
        require(f"the widths of budget {budget}", frame, WIDTHS)
    layers = next(iter(widths.values()))["layer"].astype(str)
    count = len(layers)
    with style():
        size = (8.4, 1.1 * len(widths) + 0.7 + 0.07 * layers.str.len().max())
        fig, rows = plt.subplots(len(widths), figsize=size, sharex=True, sharey=True, squeeze=False)
        at = np.arange(count)
        for axes, (budget, frame, color) in zip(rows.flat, colored(widths), strict=True):
            axes.bar(at, frame["dense"], width=0.84, color=COLORS["dense"])
            axes.bar(at, frame["tailored"], width=0.84, color=color)
            if count <= 24:  # then there is room for numbers
                for x, kept in zip(at, frame["tailored"], strict=True):
                    axes.text(x, kept, f"{kept:.0f}", ha="center", va="bottom", fontsize=7.5)
            share = 100 * frame["tailored"].sum() / frame["dense"].sum()
            _write(axes, 1.015, 0.5, f"{100 * budget:.4g} % of macs", color, va="bottom", fontsize=9, weight="bold")
            _write(axes, 1.015, 0.46, f"{share:.0f} % of channels", color, fontsize=9)
            axes.grid(visible=False, axis="x")
            axes.tick_params(axis="x", length=0)
        every = math.ceil(count / 64)  # more names than that would run into each other
        axes.set_xticks(at[::every], layers.iloc[::every], rotation=90, fontsize=8 if count <= 45 else 7)
        axes.set(xlim=(-0.8, count - 0.2), ylim=(0, 1.12 * axes.get_ylim()[1]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10], integer=True))
        fig.supylabel("output channels", fontsize=10)
        rows[0, 0].set_title("Width of each layer, from input to output; grey: the dense network's")
        return finished(fig)


def _check(trajectories):
    """Return where the axis ends, in percent of the run: a little after the last set was fixed."""
    for budget, frame in trajectories.items():
        require(f"the trajectory of budget {budget}", frame, (*TRAJECTORY, "share"))
    return min(100, 120 * max(frame["share"].iloc[-1] for frame in trajectories.values()))


def colored(runs):
    """Return [(budget, frame, color)] from the largest budget to the smallest, which is the darkest."""
    budgets = sorted(runs, reverse=True)
    colors = mpl.colormaps["plasma"](np.linspace(0.65, 0.02, len(budgets)))
    return [(budget, runs[budget], color) for budget, color in zip(budgets, colors, strict=True)]


def _changed(frame):
    """Return how many units changed sides at each ranking; where that was not recorded, at least so many."""
    return frame.get("changed", frame["losing"].diff().abs()).fillna(0)


def _name_parts(axes, trajectories, end):
    """Write above the axes what happens when, with lines between."""
    frames = trajectories.values()
    parts = {
        "measured": 0,
        "look-ahead": min(f["share"].iloc[0] for f in frames),
        "along the schedule": min(f["share"].where(f["macs_schedule"] == f["macs"].iloc[0]).max() for f in frames),
        "set is final": max(f["share"].where(_changed(f) > 0, 0).max() for f in frames),
        "made smaller": max(f["share"].iloc[-1] for f in frames),
    }
    edges = np.maximum.accumulate([*(100 * share for share in parts.values()), end])
    for name, start, stop in zip(parts, edges, edges[1:], strict=False):
        axes.axvline(start, color=COLORS["text"], lw=0.8, linestyle=DOTS)
        if stop - start > 0.1 * end:  # else there is no room for its name
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "center"}
            axes.text((start + stop) / 2, 1.035, name, color=TEXT_GREY, fontsize=9, **place)


def _beside(axes, height, texts, *, color, coords):
    """Write two columns right of the axes."""
    for x, text in zip((8, 58), texts, strict=True):
        place = {"xycoords": ("axes fraction", coords), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (1, height), (x, 0), color=color, fontsize=9, **place)


def _write(axes, x, y, text, color=COLORS["text"], **look):
    """Write at a place given in fractions of the axes."""
    axes.text(x, y, text, transform=axes.transAxes, color=color, **{"va": "top", "fontsize": 8} | look)
