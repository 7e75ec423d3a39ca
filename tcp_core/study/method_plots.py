"""The figures of docs/method.md: `python -m tcp_core.study.method_plots --runs FOLDER --figures FOLDER`.

One for each step of the method. Those of units, gates and cost are of networks as they are built; ranking and freeze
are of a run on digits, as far as its set is final, which takes seconds; the strength is that of finished runs.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.nn import functional as F

from .. import nets
from ..channels import Channels
from ..controller import GAIN
from ..datasets import sources
from ..tailor import Tailor
from ..tracing import trace
from ..training.frames import TRAJECTORY, require
from ..training.plots import COLORS, DOTS, draw_units, finished, save_figure, style
from . import controller_plots

LOSING = COLORS["params"]


def example() -> Channels:
    """Return the trace of a stem, one residual block with a shortcut and a classifier, small enough to draw."""
    torch.manual_seed(0)
    model = nets.small_resnet(widths=(4, 4, 4), blocks=1, num_classes=10, in_channels=1)
    model.layer2 = model.layer3 = nn.Identity()
    return trace(model, torch.randn(2, 1, 8, 8))


@dataclass(frozen=True)
class Closing:
    """A run until its set is final and every losing gate has closed.

    Attributes:
        gates: where every gate stood after each step, float ``[steps, units]``.
        importance, price: of every unit when the set became final, ``[units]``; price is the share of the budget.
        losing: which units lost, bool ``[units]``.
        final_at, frozen_at: the steps after which the set was final, and all its gates closed.
    """

    gates: Tensor
    importance: Tensor
    price: Tensor
    losing: Tensor
    final_at: int
    frozen_at: int


def closing(steps: int = 600, budget: float = 0.4, batch_size: int = 32) -> Closing:
    """Train a small network on digits towards a share ``budget`` of its macs, until its set is fixed.

    ``steps`` are those of the whole run, of which the first half or so is trained.
    """
    digits = sources.digits()
    torch.manual_seed(0)
    model = nets.small_resnet(widths=(16, 32, 64), blocks=1, num_classes=10, in_channels=1)
    tailor = Tailor(model, digits.train.pixels[:2].float(), budget={"macs": budget}, steps=steps)
    controller, optimizer = tailor.controller, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    gates, final, epoch = [controller.gate.clone()], None, 0
    while not tailor.frozen:
        for x, y in digits.train.batches(batch_size, shuffle=True, epoch=epoch):
            loss = F.cross_entropy(tailor(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tailor.step()
            gates.append(controller.gate.clone())
            if final is None and controller.final:
                price = controller.marginal["macs"] / controller.bounds["macs"]
                final = controller.importance.clone(), price, controller.losing.clone(), controller.step_count
            if tailor.frozen:
                break
        epoch += 1
    return Closing(torch.stack(gates), *final, controller.step_count)


def units_figure(channels: Channels) -> Figure:
    """Draw the channels of every weight of a small network: same number, same unit; same colour, same family."""
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.2))
        draw_units(axes, channels)
        axes.set_title("Channels of each weight: a number is a unit, a colour a family")
        return finished(fig)


def gates_figure(channels: Channels, open_units: Tensor) -> Figure:
    """Draw the weights of a small network with closed gates, and those of the network from which they are removed."""
    with style():
        fig, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
        for axes, removed, title in zip(panels, (False, True), ("Gates closed", "Removed"), strict=True):
            draw_units(axes, channels, open_units, removed=removed)
            axes.set_title(title)
        return finished(fig)


def cost_figure(channels: Channels, names: Mapping[str, str]) -> Figure:
    """Draw what one unit of each family costs while all others stay, in percent of the dense network.

    ``names`` has, in words, the families by the first layer that carries them; the others are left out.
    """
    dense, marginal = channels.cost(), channels.cost_model.marginal(torch.ones(channels.units))
    families = [family for family in channels.families if family.layers[0] in names]
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 1.4 + 0.42 * len(families)))
        at = np.arange(len(families))
        for offset, cost in ((-0.19, "macs"), (0.19, "params")):
            share = [100 * float(marginal[cost][family.units[0]]) / dense[cost] for family in families]
            axes.barh(at + offset, share, height=0.36, color=COLORS[cost], label=cost)
            for y, value in zip(at + offset, share, strict=True):
                axes.annotate(f"{value:.2f}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(at, [f"{names[family.layers[0]]} ({len(family.units)} units)" for family in families])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("cost of one unit, % of the dense network")
        axes.set_title("What one unit costs, by where it stands")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        return finished(fig)


def ranking_figure(run: Closing) -> Figure:
    """Draw every unit's importance against its price; units above the line are kept."""
    importance, price, losing = (np.asarray(value, dtype=float) for value in (run.importance, run.price, run.losing))
    losing, score = losing > 0, importance / price
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.6))
        for mask, color, marker, label in ((~losing, COLORS["tailored"], "o", "kept"), (losing, LOSING, "x", "losing")):
            axes.plot(100 * price[mask], importance[mask], marker, color=color, ms=6, mew=1.4, alpha=0.75, label=label)
        edge = np.array([0.8 * price.min(), 1.25 * price.max()])
        middle = np.sqrt(score[losing].max() * score[~losing].min())  # between the two sets, as far as they part
        said = "importance per price at which the budget is full"
        axes.plot(100 * edge, middle * edge, color=COLORS["text"], linestyle=DOTS, lw=1.3, label=said)
        axes.set(xscale="log", yscale="log", xlim=tuple(100 * edge))
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if edge[0] <= tick / 100 <= edge[1]]
        axes.xaxis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="price: macs of the unit, % of the budget", ylabel="importance")
        axes.set_title("Every unit when the set becomes final", pad=24)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0.3)
        return finished(fig)


def strength_figure(trajectories: Mapping[float, pd.DataFrame]) -> Figure:
    """Draw the strength wanted at each ratio of cost to schedule, and what it was at the rankings of finished runs."""
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 4.2))
        ratio = np.geomspace(0.8, 1.6, 400)
        axes.plot(ratio, (ratio**GAIN).clip(0.5, 4), color=COLORS["text"], lw=1.3)
        for budget, frame, color in controller_plots.colored(trajectories):
            require(f"the trajectory of budget {budget}", frame, TRAJECTORY)
            times = frame["strength"] / frame["strength"].iloc[0]
            label = f"{100 * budget:.4g} % of macs"
            axes.plot(frame["macs"] / frame["macs_schedule"], times, ".", color=color, ms=5, alpha=0.6, label=label)
        axes.set(xscale="log", yscale="log", xlim=(ratio[0], ratio[-1]), ylim=(0.45, 4.6))
        for axis, ticks in ((axes.xaxis, (0.8, 0.9, 1, 1.2, 1.4, 1.6)), (axes.yaxis, (0.5, 1, 2, 4))):
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_minor_locator(NullLocator())
        axes.set(xlabel="cost now / schedule now", ylabel="strength, times its first value")
        axes.set_title("The strength answers how far the cost is from its schedule")
        axes.legend(loc="lower right", markerscale=2)
        return finished(fig)


def freeze_figure(run: Closing) -> Figure:
    """Draw every gate after each step, and where the set became final and the last gate closed."""
    gates, losing = run.gates.numpy(), run.losing.numpy().astype(bool)
    steps = np.arange(len(gates))
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 3.9))
        axes.plot(steps, gates[:, ~losing], color=COLORS["tailored"], lw=0.9, alpha=0.5)
        axes.plot(steps, gates[:, losing], color=LOSING, lw=0.7, alpha=0.4)
        for at, text, side in ((run.final_at, "set is final", "right"), (run.frozen_at, "removed", "center")):
            axes.axvline(at, color=COLORS["text"], lw=1, linestyle=DOTS)
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 9}
            axes.annotate(text, (at, 1), (0, 4), ha=side, **place)
        axes.set(xlim=(0, 1.04 * run.frozen_at), ylim=(-0.03, 1.03), xlabel="step", ylabel="gate")
        axes.set_title("Every gate, a line each", pad=22)
        for name, color in (("kept", COLORS["tailored"]), ("losing at the end", LOSING)):
            axes.plot([], [], color=color, lw=1.5, label=name)
        axes.legend(loc="lower left")
        return finished(fig)


def figures(runs: str | Path, *, network: str = "resnet20", seed: int = 0) -> dict[str, Figure]:
    """Return all figures by name; the strength's is of the tailored runs in folder ``runs``."""
    small, run = example(), closing()
    open_units = torch.ones(small.units, dtype=torch.bool)
    open_units[[1, 6]] = False
    torch.manual_seed(0)
    large = trace(nets.build(network, num_classes=10), torch.randn(2, 3, 32, 32))
    names = {
        **{"conv1": "stream, all stages", "layer2.0.conv2": "stream, added in stage 2"},
        **{"layer3.0.conv2": "stream, added in stage 3", "layer1.1.conv1": "inside a block of stage 1"},
        **{"layer2.1.conv1": "inside a block of stage 2", "layer3.1.conv1": "inside a block of stage 3"},
    }
    _, trajectories, _ = controller_plots.read_budgets(runs, network=network, seed=seed)
    return {
        "method_units": units_figure(small),
        "method_gates": gates_figure(small, open_units),
        "method_cost": cost_figure(large, names),
        "method_ranking": ranking_figure(run),
        "method_strength": strength_figure(trajectories),
        "method_freeze": freeze_figure(run),
    }


def main() -> None:
    """Write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", required=True, help="folder of finished runs with several budgets on macs")
    parser.add_argument("--figures", required=True, type=Path, help="folder for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the run on digits does not depend on the machine's cores
    for name, figure in figures(options.runs).items():
        save_figure(figure, options.figures / name)


if __name__ == "__main__":
    main()
