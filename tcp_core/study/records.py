"""Runs -> records: one row a run, with what it compared in words and its numbers in percent.

Seed, threads and output folder say nothing about what was compared.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..maturity import phase_of
from ..training.frames import training_cost
from .pages import COSTS, KEY, METHODS, absent
from .results import read_runs

# What the run notebook's parameters are to a comparison. IF_CHANGED, and one that stands in none of these, is part of
# the recipe, and is named there unless it has its default: so nothing that differs is averaged or compared by accident.
NAMED = ("network", "data", "size", "epochs", "method", "macs", "params")
RECIPE = ("batch_size", "lr", "weight_decay", "augment", "precision", "val_images", "weights")
IF_CHANGED = (
    *("warmup", "label_smoothing", "mixing", "accumulate"),
    *("processes", "sync_batch_norm", "skip_corrupt"),
)
OF_COMPARATORS = ("prune_at", "restart", "widths_of")
OF_CONTROLLER = ("phase_start", "phase_end")
OF_BOTH = ("multiple",)
BORROWED = "with the widths of"
WORDS = {
    "phase_start": lambda share: f"phase from {100 * share:g} %",
    "phase_end": lambda share: f"to {100 * share:g} % of the run",
    "prune_at": lambda share: f"pruned after {100 * share:g} % of the run",
    "restart": lambda _: "learning rate restarted then",
    "widths_of": lambda run: f"{BORROWED} {METHODS.get(run.split('/')[-1].split('-')[0], run)}",
    "multiple": lambda size: f"widths in multiples of {size:g}" if size else "widths that kernels like",
}
SAYS_NOTHING = ("seed", "threads", "out", "read_test", "checkpoint_every", "workers", "tensorboard", "weights_sha256")


def borrowed(options: pd.Series) -> pd.Series:
    """Say of each of these options whether another run's widths went in: no rival, and it costs that run's training."""
    return options.str.contains(BORROWED, regex=False)


def run_defaults(notebook: str | Path) -> dict:
    """Return the run notebook's parameters with their defaults, which runs older than a parameter had."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}


def study(root: str | Path, defaults: Mapping | None = None) -> pd.DataFrame:
    """Return one row for each finished run below `root`, in the order of every table.

    Columns: `KEY`, start (hash of the weights it began with, "" where none is recorded), run, searched (it compared
    controllers), seed, accuracy (test), val_accuracy, macs and params (percent of dense), requested and before of each
    cost (percent of dense; `before`: what a sparsity-training method had left open by itself), utilisation (of the
    binding budget), largest_gate, training_cost (epochs of the dense network, see `training_cost`), seconds, machine.
    `defaults` stand in for parameters that a run does not have. Raises what `results.read_runs` does.
    """
    rows = _starts_apart(read_runs(root)).to_dict("records")
    return in_order(pd.DataFrame([_run(row, defaults or {}) for row in rows]))


def _starts_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with starts of one name told apart by their weights' hash, where different ones are recorded."""
    if "param.weights_sha256" not in runs:
        return runs
    name, known = runs["param.weights"], runs["param.weights_sha256"]
    several = known.groupby(name).transform("nunique") > 1
    return runs.assign(**{"param.weights": name.mask(several & known.notna(), name + " " + known.str[:8])})


def _run(row, defaults):
    """Return the row of `study` for a row of `read_runs`."""
    own = {k.removeprefix("param."): v for k, v in row.items() if k.startswith("param.") and not absent(v)}
    given = {**defaults, **own}
    phase = tuple(given.get(name) for name in OF_CONTROLLER)
    if given.get("weights") and not absent(row.get("steps")) and phase == phase_of(1.0, row["steps"]):
        given |= {name: defaults.get(name) for name in OF_CONTROLLER}  # as a trained network finds it by itself
    method, folders = row["method"], row["run"].split("/")
    rest = [
        name
        for name in given
        if name not in (*NAMED, *RECIPE, *OF_COMPARATORS, *OF_CONTROLLER, *OF_BOTH, *SAYS_NOTHING)
    ]
    options = {"dense": (), "tailored": (*OF_CONTROLLER, *OF_BOTH)}
    budget = {cost: row[f"budget.{cost}"] for cost in COSTS if not absent(row.get(f"budget.{cost}"))}
    used = [row[f"utilisation.{cost}"] for cost in budget if not absent(row.get(f"utilisation.{cost}"))]
    known = {name: given[name] for name in RECIPE if not absent(given.get(name)) and given[name] != ""}
    size = f" at {given['size']:g} px" if given.get("size") else ""
    return {
        "data": row["dataset"] + size,
        "network": row["network"],
        "setting": "from a pretrained network" if given.get("weights") else "from scratch",
        "epochs": given.get("epochs", 0),
        "recipe": ", ".join(_said(known) + _changed(given, rest, defaults)),
        "budget": " + ".join(f"{100 * share:g} % {cost}" for cost, share in budget.items()) or "dense",
        "method": method,
        "options": ", ".join(_changed(given, options.get(method, (*OF_COMPARATORS, *OF_BOTH)), defaults)),
        "start": "" if absent(given.get("weights_sha256")) else given["weights_sha256"],
        "run": row["run"],
        "searched": len(folders) > 1 and folders[-2].startswith("search"),
        "seed": row["seed"],
        "accuracy": _percent(row["test_accuracy"]),
        "val_accuracy": _percent(row["val_accuracy"]),
        **{cost: 100 * row[cost] / row[f"dense_{cost}"] for cost in COSTS},
        **{f"requested_{cost}": _percent(budget.get(cost)) for cost in COSTS},
        **{f"before_{cost}": _percent(row.get(f"cost_before_fill.{cost}")) / row[f"dense_{cost}"] for cost in COSTS},
        "utilisation": 100 * max(used, default=np.nan),
        "largest_gate": _percent(row.get("largest_gate_removed")) / 100,
        "training_cost": training_cost(
            given.get("epochs", 0), row["macs"] / row["dense_macs"], row.get("steps"), row.get("frozen_at_step")
        ),
        "seconds": row["seconds_train"],
        "machine": _machine(row),
    }


def _machine(row):
    threads = row.get("threads", 0)
    of_cpu = "" if "NVIDIA" in str(row.get("device")) else f", {threads:g} thread{'s' * (threads != 1)}"
    return f"{row.get('device')}{of_cpu}, torch {row.get('versions.torch')}"


def _percent(value):
    return np.nan if absent(value) else 100.0 * value


def _said(given):
    return [
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}" for name, value in given.items()
    ]


def _changed(given, names, defaults):
    """Say which of the parameters `names` are not at their defaults; True is said by the name alone."""
    changed = {name: given[name] for name in names if name in given and given[name] != defaults.get(name)}
    return [
        WORDS[name](value) if name in WORDS else name if value is True else _said({name: value})[0]
        for name, value in changed.items()
    ]


def budget_order(budget: str) -> tuple:
    """Return what budgets are sorted by: dense first, then macs, params and both, each from the largest share down."""
    shares = [-float(part.split()[0]) for part in budget.split(" + ") if part != "dense"]
    return (budget != "dense", len(shares), "params" in budget, *shares)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table sorted by `GROUP` (resnet20 before resnet110), budget, and method: ours, then the comparators."""

    def rank(column):
        if column.name == "budget":
            values = list(map(budget_order, column))
        elif column.name in ("method", "rival"):
            values = [(list(METHODS).index(name), "") if name in METHODS else (len(METHODS), name) for name in column]
        else:
            values = [re.sub(r"\d+", lambda number: number[0].zfill(9), str(value)) for value in column]
        ranks = {value: index for index, value in enumerate(sorted(set(values)))}
        return pd.Series([ranks[value] for value in values], index=column.index)

    by = [name for name in (*KEY, "rival", "options_rival", "seed", "cost", "run") if name in table]
    return table.sort_values(by, key=rank, kind="stable", ignore_index=True)
