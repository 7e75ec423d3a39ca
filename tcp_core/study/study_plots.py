"""The figures that compare many runs, drawn from the frames of `tables` alone.

Ours is green and drawn last, dense grey, each comparator has a quiet colour and a marker of its own in every figure. A
point is the mean over seeds, a bar its standard deviation or standard error as the axis says; one seed has no bar.
Marks are named where they stand rather than in a legend.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..training.frames import WIDTHS, require
from ..training.plots import COLORS, DOTS, TEXT_GREY, finished, style
from .naming import name_inside, name_right
from .pages import COSTS, GOAL, GROUP, METHODS, heading, number
from .published import ARCHITECTURES
from .records import borrowed, budget_order
from .tables import LEVEL, family

OURS = COLORS["tailored"]
LOST = "#8C2D5A"  # where a comparator is better
# Muted colours after Paul Tol, none near the study's green, blue or vermilion; the marker tells them apart too.
LOOK = {
    "tailored": (OURS, "o"),
    "dense": (TEXT_GREY, "D"),
    "taylor": ("#AA4499", "s"),
    "fixed_strength": ("#B5506A", "^"),
    "global_l1": ("#6699CC", "v"),
    "uniform_l1": ("#332288", "P"),
    "slimming": ("#B8932F", "X"),
    "torch_pruning": ("#8A6D5A", "p"),
    "small": ("#5F6B6D", "<"),
    "random": ("#A3A3A3", "*"),
}
OTHER = ("#A3A3A3", "h")


def groups(table: pd.DataFrame, *, by_length: bool = True) -> dict[str, pd.DataFrame]:
    """Return the rows of each `pages.GROUP`, by a name that suits a file, such as "resnet20-cifar10-jpeg-scratch-e15".

    Groups that differ in nothing but the recipe are numbered. Without `by_length` runs of all lengths are one group.
    """
    named = {}
    same = GROUP if by_length else [name for name in GROUP if name != "epochs"]
    for _, rows in table.groupby(same, sort=False):
        first = rows.iloc[0]
        setting = first["setting"].replace("network", "").split()[-1]
        length = f"-e{first['epochs']:g}" * by_length
        name = f"{first['network']}-{first['data'].replace(' ', '')}-{setting}{length}"
        before = sum(other.split("_recipe")[0] == name for other in named)
        named[f"{name}_recipe{before + 1}" if before else name] = rows
    return named


def pareto_figure(table: pd.DataFrame) -> Figure:
    """Draw test accuracy against the macs that are left, for one group of the table `accuracy`.

    Budgets on parameters, alone or jointly, are left out. The axis of macs runs from dense to smaller and is
    logarithmic, so that equal steps are equal shares.
    """
    where = _where(table)
    table = table[table["budget"].str.fullmatch(r"[\d.]+ % macs|dense")]
    dense = table[table["method"] == "dense"]
    lines = list(table[table["method"] != "dense"].groupby(["method", "options"], sort=False))
    with style():
        left = sorted({float(name.split()[0]) for name in table["budget"] if name != "dense"}, reverse=True)
        fig, axes = plt.subplots(figsize=(8.4, 4.9 if len(left) > 1 else 3.9))
        labels, inside = [], []
        for (method, options), rows in reversed(lines):
            color, marker = LOOK.get(method, OTHER)
            ours = method == "tailored"
            x, y = rows["macs"], rows["accuracy"]
            look = {"lw": 2.6, "ms": 8, "zorder": 5} if ours else {"lw": 1.1, "ms": 5.5, "zorder": 3, "alpha": 0.85}
            alike = [name for (other, name), _ in lines if other == method]
            several = len(alike) > 1  # then options tell them apart
            if several and options != alike[0]:
                look |= {"mfc": "white", "linestyle": "--"}
            axes.errorbar(x, y, rows["sd"].fillna(0), color=color, marker=marker, elinewidth=1.2, capsize=2.5, **look)
            text = f"{_method(method, options if several else '')} {number(y.iloc[-1], 1)}"
            to_the_end = float(rows["budget"].iloc[-1].split()[0]) == left[-1]
            (labels if to_the_end else inside).append(
                (x.iloc[-1], y.iloc[-1], text, color, "bold" if ours else "normal")
            )
        for _, row in dense.iterrows():
            axes.axhline(row["accuracy"], color=TEXT_GREY, linestyle=DOTS, linewidth=1.2)
            axes.errorbar(row["macs"], row["accuracy"], np.nan_to_num(row["sd"]), color=TEXT_GREY, marker="D", ms=6.5)
            axes.annotate(
                f"dense {number(row['accuracy'], 1)}", (row["macs"], row["accuracy"]), (9, 5),
                textcoords="offset points", color=TEXT_GREY, fontsize=9,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(108, 0.93 * min(left, default=90))
        axes.set_xticks([100, *left], [f"{x:g}" for x in (100, *left)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="macs left, % of dense (smaller networks to the right)", ylabel="test accuracy, %")
        name_right(axes, labels)
        name_inside(axes, inside)
        return _titled(fig, "Accuracy against cost", f"{where}; {_bars(table)}")


def training_cost_figure(table: pd.DataFrame) -> Figure:
    """Draw test accuracy against the cost of training, one panel a budget on macs, for rows of the table `accuracy`.

    They may be of several lengths: a method's points are joined in the order of theirs. Budgets at which nothing was
    compared are left out.
    """
    words = "training, in epochs of the dense network", "Accuracy against the cost of training"
    return _by_budget(table[table["method"] != "dense"], "training_cost", *words)


def several_lengths(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the table `accuracy` that `length_figure` draws; empty if nothing ran at two lengths.

    These are the budgets on macs at which methods were compared and one of them ran at two lengths, and dense.
    """
    dense, by = table["method"] == "dense", table["budget"]
    lengths = table[~dense].groupby(["budget", "method", "options"])["epochs"].nunique()
    methods = table[~dense].groupby("budget")["method"].nunique()
    several = {budget for budget, *_ in lengths.index[lengths > 1]} & set(methods.index[methods > 1])
    several = {budget for budget in several if "params" not in budget}
    return table[by.isin(several) | dense] if several else table[:0]


def length_figure(table: pd.DataFrame) -> Figure:
    """Draw test accuracy against the length of the run, one panel a budget, for rows that `several_lengths` gives.

    The dense network of each length is drawn beside.
    """
    return _by_budget(table, "epochs", "epochs of the run", "Accuracy against length")


def _by_budget(table, column, label, title):
    """Draw test accuracy against ``column``, one panel a budget on macs at which two methods were compared.

    Networks with the widths of another run are left out: neither length nor cost of that run is theirs.
    """
    table = table[~borrowed(table["options"])]
    dense = table[table["method"] == "dense"].sort_values("epochs")
    table = table[table["budget"].str.fullmatch(r"[\d.]+ % macs")]
    table = table[table.groupby("budget")["method"].transform("nunique") > 1]
    require("the table of accuracy, for two methods at one budget on macs,", table, GROUP)
    budgets = sorted(table.groupby("budget"), key=lambda item: budget_order(item[0]))
    several = table.groupby("method")["options"].nunique() > 1  # then options tell them apart
    with style():
        size = (max(6.4, 1.2 + 3.2 * len(budgets)), 4.4)
        fig, panels = plt.subplots(1, len(budgets), figsize=size, sharey=True, squeeze=False)
        lines = {}
        for axes, (budget, rows) in zip(panels[0], budgets, strict=True):
            if len(dense):
                look = {"color": TEXT_GREY, "linestyle": DOTS, "lw": 1.2, "marker": "D", "ms": 6}
                lines.setdefault(METHODS["dense"], axes.plot(dense[column], dense["accuracy"], **look)[0])
            for (method, options), points in rows.groupby(["method", "options"], sort=False):
                color, marker = LOOK.get(method, OTHER)
                points = points.sort_values("epochs")
                look = {"lw": 2.2, "ms": 8, "zorder": 5} if method == "tailored" else {"lw": 1.1, "ms": 6, "zorder": 3}
                name = _method(method, options if several[method] else "")
                x, y, bars = points[column], points["accuracy"], points["sd"].fillna(0)
                drawn = axes.errorbar(x, y, bars, color=color, marker=marker, elinewidth=1.2, capsize=2.5, **look)
                lines.setdefault(name, drawn)
            axes.set_title(budget, fontsize=10)
            axes.set(xlim=(0, 1.12 * rows[column].max()), xlabel=label)
        panels[0, 0].set_ylabel("test accuracy, %")
        fig.legend(lines.values(), lines, loc="outside lower center", ncols=min(len(lines), 2 + len(budgets) // 2))
        return _titled(fig, title, f"{_where(table)}; {_bars(table)}")


def difference_figure(pairs: pd.DataFrame, *, goals: bool = True) -> Figure:
    """Draw ours minus each comparator with its standard error, budget by budget, for one group of `differences`.

    goals: whether to draw the goal that the committed study set itself.
    """
    pairs = pairs[pairs["rival"] != "dense"]
    budgets = list(dict.fromkeys(pairs["budget"]))
    several = pairs.groupby("rival")["options_rival"].transform("nunique") > 1  # then options tell them apart
    options = pairs["options_rival"].where(several, "")
    names = [_method(*name) for name in zip(pairs["rival"], options, strict=True)]
    rows = list(dict.fromkeys(names))
    far, bars = pairs["difference"].abs(), pairs["se"].fillna(0)
    reach = _reach(far, bars)
    with style():
        size = (8.4, 1.55 + 0.31 * len(rows))
        fig, panels = plt.subplots(1, len(budgets), figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, budget in zip(panels[0], budgets, strict=True):
            axes.axvline(0, color=COLORS["text"], linewidth=1)
            if goals:
                axes.axvline(GOAL, color=OURS, linestyle=DOTS, linewidth=1.2)
            here = pairs["budget"] == budget
            for row, name in zip(pairs[here].to_dict("records"), np.array(names)[here], strict=True):
                at, gain, bar = rows.index(name), row["difference"], np.nan_to_num(row["se"])
                color = OURS if gain >= LEVEL else LOST if gain <= -LEVEL else COLORS["text"]
                look = {"color": color, "mfc": color if bar else "white", "ms": 5, "elinewidth": 1.4, "capsize": 2.5}
                inside = abs(gain) <= reach
                marker = "o" if inside else ">" if gain > 0 else "<"
                axes.errorbar(
                    np.clip(gain, -reach, reach), at, xerr=bar if bar and inside else None, marker=marker, **look
                )
                axes.annotate(
                    _signed(gain), (1, at), (2, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", color=color, fontsize=9, annotation_clip=False,
                )  # fmt: skip
            axes.set_title(budget, fontsize=10)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        low = min(0, (pairs["difference"] - bars).min()) - 0.12 * reach
        axes.set(xlim=(max(low, -1.12 * reach), 1.12 * reach), ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticks(range(len(rows)), rows)
        dotted = "; dotted: goal" * goals
        fig.supxlabel(
            f"ours minus the comparator, points of test accuracy (bar: standard error; hollow: one seed{dotted})",
            fontsize=9,
        )
        return _titled(fig, "Ours against each comparator: right of the line, ours is better", _where(pairs))


def _reach(far, bars):
    """Return how far the axis of differences goes: to the end of every bar, but of methods that are far off.

    One of these must not squeeze the others: its bar ends beyond twice what four of five points need.
    """
    least = max(1.0, 1.25 * far.quantile(0.8))
    reach, before = least, 0.0
    while reach > before:  # whoever is within it has its bar drawn to the end
        drawn = (far + bars <= 2 * least) | (far <= reach)
        reach, before = max(reach, (far + bars)[drawn].max()), reach
    return reach


def utilisation_figure(delivered: pd.DataFrame) -> Figure:
    """Draw how much of its budget each run of the table `delivered` used, by method and by the cost that was bounded.

    A second panel shows where methods that have a strength, but no budget, had come by themselves.
    """
    found = set(delivered["method"])
    methods = [name for name in METHODS if name in found] + sorted(found - set(METHODS))
    by_itself = delivered["before_used"].notna().any()
    with style():
        size = (8.4, 1.7 + 0.33 * len(methods))
        ratios = [2, 1.3] if by_itself else [1]
        fig, panels = plt.subplots(1, len(ratios), figsize=size, sharey=True, squeeze=False, width_ratios=ratios)
        for axes, column in zip(panels[0], ("used", "before_used"), strict=False):
            axes.axvline(100, color=COLORS["text"], linewidth=1)
            for at, method in enumerate(methods):
                for cost in COSTS:
                    dots = delivered[(delivered["method"] == method) & (delivered["cost"] == cost)][column].dropna()
                    apart = np.linspace(-0.22, 0.22, len(dots)) if len(dots) > 1 else [0]
                    axes.plot(
                        dots, at + np.array(apart[: len(dots)]), "o", ms=6, color=COLORS[cost], mec="white", mew=0.5
                    )
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        first = panels[0, 0]
        lowest = min(98.9, delivered["used"].min() - 0.2)  # a hundredth of a percent must not look like much
        first.set(xlim=(lowest, None), ylim=(len(methods) - 0.4, -0.6), xlabel="cost delivered, % of the budget")
        first.set_yticks(range(len(methods)), [METHODS.get(name, name) for name in methods])
        for cost in [cost for cost in COSTS if cost in set(delivered["cost"])]:
            first.plot([], [], "o", ms=6, color=COLORS[cost], mew=0, label=f"{cost} bounded")
        fig.legend(loc="outside lower right", ncols=2, borderpad=0)
        first.set_title("As delivered", fontsize=10)
        if by_itself:
            panels[0, 1].set_title("By itself", fontsize=10)
            panels[0, 1].set_xlabel("cost by itself, % of the budget")
        fig.get_layout_engine().set(w_pad=0.12)
        below = "one dot a run, the line is the budget" + "; by itself: before it was brought to the budget" * bool(
            by_itself
        )
        return _titled(fig, "Requested and delivered cost", below)


def adaptation_figure(pairs: pd.DataFrame) -> Figure:
    """Draw what adapting the strength buys: ours beside fixed strength, for these rows of the table `differences`."""
    pairs = pairs[pairs["rival"] == "fixed_strength"]
    require("the table of differences, for ours beside fixed strength,", pairs, GROUP)
    where = [*GROUP[:-1], "budget"]
    apart = [name for name in where if pairs[name].nunique() > 1 or name == "budget"]  # what all share is said once
    names = [heading({name: row[name] for name in apart}) for row in pairs.to_dict("records")]
    shared = heading({name: pairs[name].iloc[0] for name in where if name not in apart})
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 1.5 + 0.36 * len(pairs)))
        at = np.arange(len(pairs))
        axes.hlines(at, pairs["accuracy_rival"], pairs["accuracy"], color=COLORS["dense"], linewidth=3, zorder=1)
        for suffix, method in (("", "tailored"), ("_rival", "fixed_strength")):
            color, marker = LOOK[method]
            bars = pairs[f"sd{suffix}"].fillna(0)
            look = {"fmt": marker, "ms": 7, "color": color, "elinewidth": 1.4, "capsize": 2.5, "label": METHODS[method]}
            axes.errorbar(pairs[f"accuracy{suffix}"], at, xerr=bars, **look)
        for row, gain in enumerate(pairs["difference"]):
            axes.annotate(
                _signed(gain), (1, row), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=OURS if gain > 0 else LOST,
            )  # fmt: skip
        axes.set_yticks(at, names)
        axes.set(ylim=(len(pairs) - 0.4, -0.6), xlabel="test accuracy, % (at the right: the difference, points)")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        below = "; ".join(filter(None, [shared, _bars(pairs)]))
        return _titled(fig, "What the controller buys", below)


def widths_figure(root: str | Path, runs: pd.DataFrame) -> Figure:
    """Draw each layer's width before (grey) and after (green), one panel a budget, for one group's runs of ours.

    Widths are means over seeds, read from the runs' folders below `root`.
    """
    budgets = runs.groupby("budget", sort=False)
    names = pd.read_csv(Path(root) / runs["run"].iloc[0] / "widths.csv")["layer"]
    with style():
        # long names stand below the lowest panel, at its expense
        size = (8.4, 1.25 + 1.25 * len(budgets) + 0.12 * max(0, names.str.len().max() - 14))
        fig, panels = plt.subplots(len(budgets), 1, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axes, (budget, rows) in zip(panels[:, 0], budgets, strict=True):
            frames = [pd.read_csv(Path(root) / run / "widths.csv") for run in rows["run"]]
            for frame in frames:
                require("widths", frame, WIDTHS)
            widths = pd.concat(frames).groupby("layer", sort=False)[["dense", "tailored"]].mean()
            at = np.arange(len(widths))
            axes.bar(at, widths["dense"], width=0.84, color=COLORS["dense"], label="dense")
            axes.bar(at, widths["tailored"], width=0.84, color=OURS, label="kept")
            share = 100 * widths["tailored"].sum() / widths["dense"].sum()
            axes.set_title(f"{budget}: {share:.0f} % of channels kept", fontsize=10)
            axes.grid(visible=False, axis="x")
            axes.tick_params(axis="x", rotation=90, labelsize=7.5, length=0)
        every = -(-len(widths) // 48)  # more names than that would run into each other
        widest = np.flatnonzero(widths["dense"] == widths["dense"].max())
        named = slice((widest % every).min(), None, every)  # one of the widest layers among them
        axes.set_xticks(at[named], widths.index[named])
        axes.set(xlim=(-0.8, len(widths) - 0.2), xlabel="layer, input to output")
        fig.supylabel("output channels", fontsize=10)
        panels[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        return _titled(fig, "Width of each layer, before and after", f"{_where(runs)}; mean over seeds")


def published_figure(beside: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Draw change of accuracy against macs saved, for one network's rows of `beside_published` and all published ones.

    Changes are from each one's own dense network. They are not a ranking: the others' data, recipe and length differ.
    """
    network = beside["network"].iloc[0]
    ours = beside[beside["source"] == "here"]
    dataset = family(ours["data"].iloc[0])
    known = published["architecture"].isin(ARCHITECTURES[dataset][network])
    published = published[known & (published["dataset"] == dataset)]
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.6))
        axes.axhline(0, color=COLORS["text"], linewidth=1)
        change = published["pruned_top1"] - published["baseline_top1"]
        grey = {"ms": 5, "color": "#B0B0B0", "mew": 0, "label": "published, each on its own data and recipe"}
        axes.plot(published["flops_reduction_pct"], change, "o", **grey)
        ours = ours[ours["change"].astype(float).notna()]  # a setting without a dense run has no change
        for marker, (which, rows) in zip("os^Dv", ours.groupby(["method", "data", "epochs"], sort=False), strict=False):
            label = "{}, {}, {} epochs".format(*which)
            look = {"color": OURS, "marker": marker, "ms": 7.5, "zorder": 4, "label": label}
            axes.plot(rows["flops_reduction"], rows["change"].astype(float), **look)
        axes.set(xlabel="macs saved, % of dense", ylabel="accuracy, change from dense, points")
        fig.legend(loc="outside lower left", borderpad=0)
        below = "change from each one's own dense network: no ranking, as data, recipe and length differ"
        return _titled(fig, f"Beside published results: {heading({'network': network})}", below)


def _method(method, options):
    return METHODS.get(method, method) + (f" ({options})" if options else "")


def _where(table):
    return heading({name: table[name].iloc[0] for name in GROUP[:-1] if table[name].nunique() == 1})


def _bars(table):
    return "mean ± sd over seeds" if table["n"].max() > 1 else "one seed"


def _signed(points):
    return number(points, 2, sign="+").replace("-", "−")


def _titled(fig, title, below):
    """Give a figure its title, and in smaller letters below what it shows; the figure is then finished."""
    heading = fig.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=11.5, fontweight="bold")
    fig.draw_without_rendering()  # the layout must stand before the second line's place can be told
    corner = heading.get_window_extent().transformed(fig.transFigure.inverted())
    line = fig.text(corner.x0, corner.y0, below, fontsize=9.5, va="bottom")
    width = line.get_window_extent().transformed(fig.transFigure.inverted()).width
    line.set_fontsize(9.5 * min(1.0, (1 - 2 * corner.x0) / width))  # what does not fit would be cut off
    return finished(fig)
