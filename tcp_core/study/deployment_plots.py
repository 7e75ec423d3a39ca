"""The figures of deployment: milliseconds beside each other, and where they go layer by layer.

The dense network is grey and the tailored one green, as everywhere in the study.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..training.frames import require
from ..training.plots import COLORS, TEXT_GREY, finished, style

LATENCY = ("network", "runtime", "batch", "ms", "ms_q1", "ms_q3")
LAYERS = ("name", "ms", "layer")
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def latency_table(
    latency: pd.DataFrame, accuracy: Mapping[tuple[str, str], float], files: Mapping[tuple[str, str], Path]
) -> pd.DataFrame:
    """Return one row a runtime and network, to be read: accuracy, size of the file, and for each batch size the median
    of its milliseconds, the quartiles in brackets, and how many times faster than the dense network it is.

    `latency` is as for `latency_figure`; `accuracy` goes by (runtime, network), NaN where there is none to tell;
    `files` by (network, last word of the runtime), absent where the runtime needs none.
    """
    require("latency", latency, LATENCY)
    rows = {}
    for (runtime, network), part in latency.groupby(["runtime", "network"], sort=False):
        share, path = accuracy[runtime, network], files.get((network, runtime.split()[-1]))
        row = {"accuracy": "-" if math.isnan(share) else f"{share:.2%}"}
        row["file"] = "-" if path is None or runtime.startswith("torch") else f"{path.stat().st_size / 1e6:.2f} MB"
        for one in part.to_dict("records"):
            row[f"batch {one['batch']}, ms"] = f"{one['ms']:.3g} ({one['ms_q1']:.3g} to {one['ms_q3']:.3g})"
            row[f"batch {one['batch']}, x"] = f"{one['over_dense']:.2f}"
        rows[runtime, network] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["runtime", "network"])


def latency_figure(table: pd.DataFrame) -> Figure:
    """Draw milliseconds a batch of the dense and the tailored network in each runtime, one panel a batch size.

    `table` has one row a measurement: network ("dense" or "tailored"), runtime, batch, ms and its quartiles ms_q1 and
    ms_q3, which the thin lines show. Beside each pair stands how many times faster the tailored network is: the
    rounds' median ratio where the table has it (column `over_dense`), else the ratio of the medians.
    """
    require("latency", table, LATENCY)
    batches, runtimes = list(dict.fromkeys(table["batch"])), list(dict.fromkeys(table["runtime"]))
    with style():
        fig, panels = plt.subplots(
            1, len(batches), figsize=(8.4, 1.1 + 0.72 * len(runtimes)), sharey=True, squeeze=False
        )
        for axes, batch in zip(panels[0], batches, strict=True):
            part = table[table["batch"] == batch].set_index(["network", "runtime"])
            top = part["ms"].max()
            for row, runtime in enumerate(runtimes):
                for network, offset in (("dense", -0.19), ("tailored", 0.19)):
                    one = part.loc[(network, runtime)]
                    axes.barh(row + offset, one["ms"], height=0.34, color=COLORS[network])
                    axes.plot([one["ms_q1"], one["ms_q3"]], [row + offset] * 2, color=COLORS["text"], lw=1)
                    text = f"{one['ms']:.3g}"
                    if network == "tailored":
                        ratio = part.loc[("dense", runtime)]["ms"] / one["ms"]
                        text += f"  ({one.get('over_dense', ratio):.2f} x)"
                    at = min(max(one["ms"], one["ms_q3"]), top * 1.15) + top * 0.02
                    axes.text(at, row + offset, text, va="center", fontsize=8.5, bbox=PAPER, zorder=3)
            axes.set(xlim=(0, top * 1.6), xlabel="ms a batch")
            axes.set_title(f"Batch {batch}")
            axes.grid(visible=False, axis="y")
        panels[0][0].set_yticks(range(len(runtimes)), runtimes)
        panels[0][0].invert_yaxis()
        fig.legend(
            handles=[plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in ("dense", "tailored")],
            labels=["dense", "tailored (times faster)"],
            loc="outside lower right",
            ncols=2,
        )
        return finished(fig)


def layers_figure(layers: Mapping[str, pd.DataFrame], *, title: str) -> Figure:
    """Draw the milliseconds of each layer of the dense and the tailored network, in the network's order, and below them
    those of all other operators by kind.

    `layers` is {"dense": table, "tailored": table} of `tcp_core.deploy.profiling.layer_times`.
    """
    for name, table in layers.items():
        require(name, table, LAYERS)
    merged = pd.concat({name: table.set_index("name")["ms"] for name, table in layers.items()}, axis=1).fillna(0.0)
    is_layer = pd.concat([table.set_index("name")["layer"] for table in layers.values()]).groupby(level=0).first()
    order = [name for name in merged.index if is_layer[name]]
    others = [name for name in merged.index if not is_layer[name]]
    place = {name: row + (0.8 if name in others else 0) for row, name in enumerate(order + others)}
    rows = np.array(list(place.values()))
    merged = merged.loc[order + others]
    with style():
        fig, axes = plt.subplots(figsize=(8.4, 1.5 + 0.2 * len(rows)))
        axes.barh(rows, merged["dense"], height=0.82, color=COLORS["dense"], label="dense")
        axes.barh(rows, merged["tailored"], height=0.42, color=COLORS["tailored"], label="tailored")
        axes.set_yticks(rows, merged.index, fontsize=8.5 if len(rows) < 60 else 6.5)
        axes.set(ylim=(rows[-1] + 0.7, -0.7), xlabel="ms a batch, of the operator with what is fused into it")
        axes.grid(visible=False, axis="y")
        if order and others:
            axes.axhline(place[others[0]] - 0.9, color=TEXT_GREY, lw=0.8, ls=":")
        total = merged.sum()
        axes.set_title(f"{title}: {total['dense']:.3g} ms dense, {total['tailored']:.3g} ms tailored")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09 - 1.2 / (len(rows) + 8)), ncols=2)
        return finished(fig)
