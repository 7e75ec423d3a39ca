"""The figures of a run, drawn from its data frames alone, and a picture of a small network's units.

Colours are Okabe and Ito's, told apart by colour-blind readers, and mean the same in every figure:
macs blue, params vermilion, the dense network grey, the tailored one green.
"""

import math
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from ..channels import Channels
from ..cost import Budget
from ..files import expanded
from .frames import HISTORY, TRAJECTORY, WIDTHS, require

COLORS = {
    "macs": "#0072B2",
    "params": "#D55E00",
    "tailored": "#009E73",
    "dense": "#D0D0D0",
    "strength": "#CC79A7",
    "phase": "#FAF3DD",
    "text": "#333333",
}
TEXT_GREY = "#7A7A7A"  # the dense network's grey where a line or a word must be read
DOTS = (0, (1, 1.6))


def style():
    """Return a context in which every new figure has this study's look: `with style(): ...`.

    The functions below use it themselves, and matplotlib's settings are as before once it ends.
    """
    return mpl.rc_context(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "savefig.dpi": 200,
            "savefig.facecolor": "white",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: same text everywhere
            "font.size": 10,
            "text.color": COLORS["text"],
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 9,
            "axes.labelsize": 10,
            "axes.labelcolor": COLORS["text"],
            "axes.edgecolor": "#999999",
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.prop_cycle": mpl.cycler(
                color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
            ),
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.9,
            "lines.solid_capstyle": "round",
            "xtick.color": "#999999",
            "xtick.labelcolor": COLORS["text"],
            "ytick.color": "#999999",
            "ytick.labelcolor": COLORS["text"],
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def save_figure(fig: Figure, path_stem: str | Path) -> tuple[Path, Path]:
    """Save `fig` as `path_stem`.svg and .png and return the two paths; folders are made.

    The same figure gives the same files, byte for byte: no date, no random identifiers.
    """
    stem = expanded(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    svg, png = (stem.with_name(stem.name + suffix) for suffix in (".svg", ".png"))
    with mpl.rc_context({"svg.hashsalt": "tailored channel pruning", "savefig.dpi": 200}):
        fig.savefig(svg, metadata={"Date": None, "Creator": None})
        fig.savefig(png, metadata={"Software": None})
    return svg, png


def cost_figure(trajectory: pd.DataFrame, *, budget, dense, epochs: float | None = None) -> Figure:
    """Draw how a run's cost went down to its budget, and below it the strength that took it there.

    `trajectory` is the run's data frame, `budget` what was asked for (a `Budget` or its dict) and
    `dense` the dense network's costs (`result.report["dense"]`); macs, params and what the budget
    bounds are drawn in percent of those. Gates close in the shaded phase, from the first re-ranking
    to the last; the axis ends at `epochs`, the run's length, if given.
    """
    require("trajectory", trajectory, TRAJECTORY)
    bounds = Budget.of(budget).resolve(dense)
    costs = dict.fromkeys(("macs", "params", *bounds))
    epoch = trajectory["epoch"].to_numpy(float)
    start, stop = epoch[0], epoch[-1]
    end = stop if epochs is None else epochs
    with style():
        fig, (top, bottom) = plt.subplots(2, 1, figsize=(8.4, 5.4), sharex=True, height_ratios=(2.5, 1))
        for axes in (top, bottom):
            axes.axvspan(start, stop, color=COLORS["phase"], linewidth=0, zorder=0)
        labels = []
        for cost in costs:
            color, full = COLORS.get(cost, COLORS["tailored"]), dense[cost] / 100
            percent = trajectory[cost].to_numpy(float) / full
            if cost in bounds:
                bound = bounds[cost] / full
                top.axhline(bound, color=color, linestyle=DOTS, linewidth=1.3)
                top.plot(epoch, trajectory[f"{cost}_schedule"] / full, "--", color=color, lw=1.2)
                text = f"{cost} {percent[-1]:.2f} %\nbudget {bound:.4g} %"
            else:
                text = f"{cost} {percent[-1]:.2f} %\nno budget"
            labels.append((percent[-1], text, color))
            # before the phase the network is dense, after it the kept set and its cost are fixed
            at, percent = np.r_[0, epoch, end], np.r_[100, percent, percent[-1]]
            look = {"lw": 1.9} if cost in bounds else {"lw": 1.3, "alpha": 0.5}
            top.plot(at, percent, color=color, drawstyle="steps-post", zorder=3, **look)
        _label_right(top, labels, gap=14)
        legend(top, {"cost now": "-", "schedule": "--", "budget": DOTS})
        top.set(ylim=(0, 105), xlim=(0, end), ylabel="cost, % of dense")
        top.set_title("Cost, from dense to the budget")

        strength = trajectory["strength"].to_numpy(float)
        bottom.plot(epoch, strength, color=COLORS["strength"], drawstyle="steps-post")
        bottom.set(xlabel="epoch", ylabel="strength", ylim=(0, 1.35 * np.nanmax(strength) or 1))
        bottom.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
        bottom.set_title("How hard losing gates are pushed")
        axis = bottom.get_xaxis_transform()
        bottom.text((start + stop) / 2, 0.95, "gates close", transform=axis, ha="center", va="top")
        return finished(fig)


def widths_figure(widths: pd.DataFrame) -> Figure:
    """Draw how many output channels each layer had (grey) and has kept (green), in network order.

    `widths` is the run's data frame: layer, dense, tailored.
    """
    require("widths", widths, WIDTHS)
    layers = widths["layer"].astype(str)
    dense, tailored = (widths[name].to_numpy(float) for name in ("dense", "tailored"))
    count = len(widths)
    upright = count > 7
    # room for the names below the axes: a letter of 8 points is about 0.07 inches wide
    names_height = 0.07 * layers.str.len().max() if upright else 0.2
    with style():
        size = (min(max(7, 0.165 * count + 1.3), 10.8), 3.6 + names_height)
        fig, axes = plt.subplots(figsize=size)
        at = np.arange(count)
        axes.bar(at, dense, width=0.84, color=COLORS["dense"], label="dense")
        axes.bar(at, tailored, width=0.84, color=COLORS["tailored"], label="tailored")
        if count <= 20:  # then there is room for numbers
            for x, kept in zip(at, tailored, strict=True):
                axes.text(x, kept, f"{kept:.0f}", ha="center", va="bottom", fontsize=8)
        every = math.ceil(count / 58)  # more names than that would run into each other
        axes.set_xticks(at[::every], layers.iloc[::every])
        axes.tick_params(axis="x", rotation=90 if upright else 0, labelsize=8, length=0)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        axes.set(xlabel="layer, input to output", ylabel="output channels", xlim=(-0.8, count - 0.2))
        share = 100 * tailored.sum() / dense.sum()
        axes.set_title(f"Width of each layer: {share:.0f} % of channels kept")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        return finished(fig)


def accuracy_figure(
    history: pd.DataFrame,
    dense_history: pd.DataFrame | None = None,
    frozen_epoch: float | None = None,
    name: str = "tailored",
) -> Figure:
    """Draw training and validation accuracy after each epoch, in percent.

    `history` and the optional `dense_history`, of the dense network trained by the same recipe,
    are data frames of runs; `frozen_epoch` marks where the set of kept channels was fixed. `name` is
    the method that made `history`.
    """
    runs = {name: history} | ({} if dense_history is None else {"dense": dense_history})
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.4))
        labels = []
        for name, frame in runs.items():
            require(f"the history of the {name} network", frame, HISTORY)
            color = TEXT_GREY if name == "dense" else COLORS.get(name, COLORS["macs"])
            val = 100 * frame["val_accuracy"].to_numpy(float)
            train = 100 * frame["train_accuracy"].to_numpy(float)
            marker = "o" if len(frame) <= 20 else None
            axes.plot(frame["epoch"], train, "--", color=color, lw=1.2)
            axes.plot(frame["epoch"], val, color=color, marker=marker, ms=4, zorder=3)
            for last in val[np.isfinite(val)][-1:]:  # none if nothing was validated
                labels.append((last, f"{name}\n{last:.1f} %", color))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100.5))
        _label_right(axes, labels, gap=0.11 * np.diff(axes.get_ylim())[0])
        legend(axes, {"validation": "-", "training": "--"})
        if frozen_epoch is not None:
            axes.axvline(frozen_epoch, color=COLORS["text"], linewidth=1, linestyle=DOTS)
            axes.annotate(
                "kept set fixed", (frozen_epoch, 0.04), (5, 0), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axes.set(xlabel="epoch", ylabel="accuracy, %")
        axes.set_title("Accuracy after each epoch")
        return finished(fig)


def curve_figure(table: pd.DataFrame, dense_accuracy: float, separate: pd.DataFrame | None = None) -> Figure:
    """Draw accuracy against the macs that are left, rung by rung of a ladder.

    `table` is that of :class:`tcp_core.Ladder`, `dense_accuracy` the fraction that the dense network gets right, and
    `separate`, with the same columns `macs_share` and `val_accuracy`, the networks of a run of its own at each budget.
    The axis runs from dense to smaller and is logarithmic.
    """
    require("the ladder's table", table, ("macs_share", "val_accuracy"))
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.4))
        if separate is not None:
            x, y = 100 * separate["macs_share"], 100 * separate["val_accuracy"]
            axes.plot(x, y, "s--", color=COLORS["macs"], ms=6, lw=1.2, label="a run of its own at each budget")
        x, y = 100 * table["macs_share"], 100 * table["val_accuracy"]
        axes.plot([100, *x], [100 * dense_accuracy, *y], "o-", color=COLORS["tailored"], ms=7, label="the ladder")
        axes.plot([100], [100 * dense_accuracy], "D", color=TEXT_GREY, ms=7, zorder=4)
        axes.annotate(
            f"dense {100 * dense_accuracy:.1f}", (100, 100 * dense_accuracy), (10, 6), textcoords="offset points",
            color=TEXT_GREY, fontsize=9,
        )  # fmt: skip
        for share, accuracy in zip(x, y, strict=True):
            axes.annotate(
                f"{accuracy:.1f}", (share, accuracy), (5, 8), textcoords="offset points",
                color=COLORS["tailored"], fontsize=9,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(112, 0.85 * x.min())
        axes.set_xticks([100, *x], [f"{share:.3g}" for share in (100, *x)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.15)
        axes.set(xlabel="macs left, % of dense (smaller networks to the right)", ylabel="validation accuracy, %")
        axes.set_title("Accuracy at every cost, from one run")
        axes.legend(loc="lower left")
        return finished(fig)


def units_figure(channels: Channels, open_units: Tensor | None = None) -> Figure:
    """Draw the channels of every weight of a small network as squares: same number, same unit.

    One row for each dimension of each weight with units; colours are families. With `open_units`
    (bool [units]), channels of closed units are drawn empty.
    """
    longest = max((len(units) for _, units in _dimensions(channels)), default=1)
    with style():
        fig, axes = plt.subplots(figsize=(0.42 * longest + 3.2, 0.36 * len(_dimensions(channels)) + 0.8))
        draw_units(axes, channels, open_units)
        axes.set_title("Channels of each weight; a number is a unit, a colour a family")
        return finished(fig)


def draw_units(axes: Axes, channels: Channels, open_units: Tensor | None = None, *, removed: bool = False) -> None:
    """Draw what `units_figure` shows into `axes`; with `removed`, closed channels have left and the others moved up."""
    family_of = {int(unit): index for index, family in enumerate(channels.families) for unit in family.units}
    palette = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    rows = _dimensions(channels)
    for row, (_, units) in enumerate(rows):
        closed = [unit >= 0 and open_units is not None and not open_units[unit] for unit in units]
        shown = [(unit, shut) for unit, shut in zip(units, closed, strict=True) if not (removed and shut)]
        for column, (unit, shut) in enumerate(shown):
            color = "#EEEEEE" if unit < 0 else palette[family_of[unit] % len(palette)]
            box = plt.Rectangle(
                (column, -row), 0.9, 0.86, facecolor="white" if shut else color, edgecolor=color, alpha=0.9
            )
            axes.add_patch(box)
            text, shade = ("", color) if unit < 0 else (str(unit), color if shut else "white")
            axes.text(column + 0.45, 0.42 - row, text, ha="center", va="center", color=shade, fontsize=9)
    axes.set_yticks([0.42 - row for row in range(len(rows))], [label for label, _ in rows])
    axes.set(xlim=(-0.2, max((len(units) for _, units in rows), default=1)), ylim=(0.8 - len(rows), 1.1), xticks=[])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _dimensions(channels):
    """Return, for each dimension of each weight with units, its name and the units in it; -1 has none."""
    return [
        (f"{name}  {'outputs' if dim == 0 else 'inputs'}" if len(dims) > 1 else name, units.tolist())
        for name, dims in channels.slots.items()
        if name.endswith("weight")
        for dim, units in enumerate(dims)
        if units is not None
    ]


def _label_right(axes, labels, *, gap):
    """Write one or two (value, text, color) right of the axes, at their values but `gap` apart."""
    labels = sorted(labels)
    values = [value for value, _, _ in labels]
    if len(labels) == 2 and values[1] - values[0] < gap:
        middle = sum(values) / 2
        values = [middle - gap / 2, middle + gap / 2]
    for value, (_, text, color) in zip(values, labels, strict=True):
        axes.annotate(
            text, (1, value), (7, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", color=color, fontsize=9,
        )  # fmt: skip


def legend(axes, lines):
    """Explain line styles, {name: style}, above the axes, where no data can be."""
    for name, line in lines.items():
        axes.plot([], [], linestyle=line, color=COLORS["text"], linewidth=1.3, label=name)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(lines), borderpad=0)


def finished(fig):
    """Fix layout and ticks while the style holds, and take the figure out of pyplot's hands.

    Otherwise a notebook would show it twice, and pyplot would keep every figure alive.
    """
    fig.draw_without_rendering()
    plt.close(fig)
    return fig
