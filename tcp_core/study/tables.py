"""Runs -> tables. Every number of the study is read from run folders here, and nowhere else.

`study` gives one row a run, `accuracy` one row for each thing that was compared (mean over seeds), and the other
tables follow from these two. Accuracies and costs are in percent, differences of accuracy in points, times in seconds.

Runs are compared only within a `GROUP`: same data, network, start, epochs and recipe, so whatever differs between two
rows of a group is the method. Where a start was trained again, a row may be of several; `differences` keeps them apart.
Seed, threads and output folder say nothing about what was compared.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..maturity import phase_of
from ..training.frames import training_cost
from .pages import COSTS, GOAL, GOALS_DENSE, GROUP, KEY, LONG, METHODS, absent, heading, number
from .published import ARCHITECTURES
from .results import read_runs

# What the run notebook's parameters are to a comparison. IF_CHANGED, and one that stands in none of these, is part of
# the recipe, and is named there unless it has its default: so nothing that differs is averaged or compared by accident.
NAMED = ("network", "data", "size", "epochs", "method", "macs", "params")
RECIPE = ("batch_size", "lr", "weight_decay", "augment", "precision", "val_images", "weights")
IF_CHANGED = (
    *("warmup", "label_smoothing", "mixing", "accumulate"),
    *("processes", "sync_batch_norm", "skip_corrupt"),
)
LEVEL = 0.005  # points: a smaller difference prints as 0.00 and is neither won nor lost
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

NOT_PUBLIC = "not public"


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
    controllers), seed, accuracy (test), val_accuracy, macs and params
    (percent of dense), requested and before of each cost (percent of dense; `before`: what a sparsity-training method
    had left open by itself), utilisation (of the binding budget), largest_gate, training_cost (epochs of the dense
    network, see `training_cost`), seconds, machine. `defaults` stand in
    for parameters that a run does not have. Raises what `results.read_runs` does.
    """
    rows = _starts_apart(read_runs(root)).to_dict("records")
    return _in_order(pd.DataFrame([_run(row, defaults or {}) for row in rows]))


def _starts_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with starts of one name told apart by their weights' hash, where different ones are recorded."""
    if "param.weights_sha256" not in runs:
        return runs
    name, known = runs["param.weights"], runs["param.weights_sha256"]
    several = known.groupby(name).transform("nunique") > 1
    return runs.assign(**{"param.weights": name.mask(several & known.notna(), name + " " + known.str[:8])})


def accuracy(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over seeds for each `KEY`, beside the dense network of the same `GROUP`.

    `delta_dense` is the difference to it, taken as in `differences`; `n` is the number of seeds; `sd` (of a sample,
    n - 1) is missing for one. Several runs with the same key and seed count as one, their mean, with a warning if their
    accuracies differ. `seconds_of_dense` is missing where the two did not run on the same kind of machine.
    """
    for text in repeated(runs):
        warnings.warn(text, stacklevel=2)
    table = _over_seeds(runs, KEY)
    dense = table[table["method"] == "dense"][[*GROUP, "seconds", "machine"]]
    beside = table[GROUP].merge(dense, on=GROUP, how="left").set_axis(table.index)
    delta = table[KEY].merge(_to_dense(runs), on=KEY, how="left").set_axis(table.index)["difference"]
    table.insert(list(table).index("n") + 1, "delta_dense", delta)
    relative = 100 * table["seconds"] / beside["seconds"]
    relative = relative.where(table["machine"] == beside["machine"])
    table.insert(list(table).index("machine"), "seconds_of_dense", relative)
    return _in_order(table)


def _to_dense(runs):
    """Return for each `KEY` its difference to dense, within each start that both have runs from, as `differences`."""
    table = _over_seeds(runs, [*KEY, "start"])
    dense = table[table["method"] == "dense"][[*GROUP, "start", "accuracy", "n"]]
    pairs = table.merge(dense, on=GROUP, suffixes=("", "_rival"))
    pairs["difference"], pairs["se_pooled"] = pairs["accuracy"] - pairs["accuracy_rival"], np.nan
    return _over_starts(pairs, KEY)[[*KEY, "difference"]]


def _over_seeds(runs, key):
    """Return the means over seeds for each value of `key`, with the accuracy's `sd` and `n`."""
    runs = runs[~runs["searched"]]
    numbers = ["accuracy", *COSTS, *_each("requested"), *_each("before"), "utilisation", "training_cost", "seconds"]
    seeds = runs.groupby([*key, "seed"], dropna=False).agg(dict.fromkeys(numbers, "mean") | {"machine": _texts})
    by_key = seeds.reset_index().groupby(key)
    table = by_key[numbers].mean()
    table.insert(1, "sd", by_key["accuracy"].std())
    table.insert(2, "n", by_key["accuracy"].count())
    table["machine"] = by_key["machine"].agg(_texts)
    return table.reset_index()


def repeated(runs: pd.DataFrame) -> list[str]:
    """Return, for each key and seed of several runs that do not agree, which they are; empty if there are none.

    Two studies may share a run, done twice with the same result. An old copy of another one is in the way.
    """
    said = []
    for _, rows in runs[~runs["searched"]].groupby([*KEY, "seed"], dropna=False, sort=False):
        if rows["accuracy"].nunique(dropna=False) > 1:
            each = [f"{run} ({number(share, 2)} %)" for run, share in zip(rows["run"], rows["accuracy"], strict=True)]
            said.append(
                f"{', '.join(each[:-1])} and {each[-1]} are runs of the same method, budget, recipe and seed with "
                "different test accuracies, and count as one, their mean; move those away that are not meant"
            )
    return said


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table `accuracy` at a glance: methods by budgets, "mean ± sd (n)", for each group with a comparator.

    The dense network's accuracy stands in a column of its own.
    """
    compared = table.groupby(GROUP)["method"].transform(lambda methods: bool({*methods} - {"dense", "tailored"}))
    table = table[compared & ~table["budget"].str.contains("params")]
    spread = ["" if absent(sd) else f" ± {number(sd, 2)}" for sd in table["sd"]]
    said = [f"{number(mean, 2)}{sd} ({n})" for mean, sd, n in zip(table["accuracy"], spread, table["n"], strict=True)]
    table = table.assign(said=said)
    budgets = sorted(set(table["budget"]), key=budget_order)
    wide = table.pivot(index=[*GROUP, "method", "options"], columns="budget", values="said")[budgets]
    return _in_order(wide.reset_index())


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return ours minus each other method (dense too) of the same `GROUP` and budget, from the table `study`.

    Methods are compared within each start that both have runs from (between all, where there is none), and the mean
    over starts is taken, each weighed by the seeds of the side that has fewer; accuracies and ``n`` are of the runs
    that are compared. `se` is the standard error of the difference, sqrt(sd^2 / n + sd^2 / n), missing where either has
    one seed. `se_pooled` is the same with, for one seed, the pooled standard deviation of all rows of the data set;
    over several starts, `se` is it.
    """
    table = _over_seeds(runs, [*KEY, "start"])
    free = (table["n"] - 1).clip(lower=0)  # no seed, where the test images were not read
    squares = table.assign(free=free, square=free * table["sd"] ** 2).groupby("data")
    pooled = squares["square"].sum() / squares["free"].sum().replace(0, np.nan)
    table = table.assign(variance=(table["sd"] ** 2).fillna(table["data"].map(pooled)) / table["n"])
    ours = table[table["method"] == "tailored"].drop(columns="method")
    rivals = table[table["method"] != "tailored"].rename(columns={"method": "rival"})
    dense = rivals["budget"] == "dense"
    pairs = pd.concat(
        [
            ours.merge(rivals[~dense], on=[*GROUP, "budget"], suffixes=("", "_rival")),
            ours.merge(rivals[dense].drop(columns="budget"), on=GROUP, suffixes=("", "_rival")),
        ],
        ignore_index=True,
    )
    pairs["difference"] = pairs["accuracy"] - pairs["accuracy_rival"]
    pairs["se"] = np.sqrt(pairs["sd"] ** 2 / pairs["n"] + pairs["sd_rival"] ** 2 / pairs["n_rival"])
    pairs["se_pooled"] = np.sqrt(pairs["variance"] + pairs["variance_rival"])
    of = [*GROUP, "options", "budget", "rival", "options_rival"]
    shown = ["accuracy", "sd", "n", "accuracy_rival", "sd_rival", "n_rival", "difference", "se", "se_pooled"]
    return _in_order(_over_starts(pairs, of)[[*of, *shown]])


def _over_starts(pairs, of):
    """Return one row for each value of `of`: of the starts that both sides have, or of all where they share none."""
    same = pairs["start"] == pairs["start_rival"]
    shared = same.groupby([pairs[name] for name in of]).transform("any")
    pairs = pairs[same | ~shared]
    alone = ~pairs.duplicated(of, keep=False)
    several = pairs[~alone]
    weight = several[["n", "n_rival"]].min(axis=1)
    total = weight.groupby([several[name] for name in of]).transform("sum")
    read = (weight > 0) | (total == 0)  # not a start of which one side's test images were not read
    several, share = several[read], (weight / total)[read]
    means = {name: share * several[name] for name in ("accuracy", "accuracy_rival", "difference")}
    squares = (share * several["se_pooled"]) ** 2
    groups = several.assign(**means, square=squares).groupby(of, sort=False)
    mean = groups[[*means, "n", "n_rival"]].sum(min_count=1)
    mean["se"] = mean["se_pooled"] = np.sqrt(groups["square"].agg(lambda each: each.sum(skipna=False)))
    return pd.concat([pairs[alone], mean.reset_index()], ignore_index=True)


def summary(pairs: pd.DataFrame, *, goals: bool = True) -> pd.DataFrame:
    """Return what the differences come to: against the best comparator, against each one, and against dense.

    The best comparator is chosen anew at every budget, by its mean test accuracy: the hardest choice for ours, as the
    best of several noisy means is more often a lucky one. Networks with the widths of another run are not among them:
    they show what those widths are worth, and need that run first. Column `part`: "mean over all" of a data set, of
    its runs of `LONG` epochs or more and of the others; "mean over budgets" of a group, "best comparator" at each
    budget, "dense at 50 % macs", and "each comparator" over all budgets. A mean's standard error comes from
    `se_pooled`, as if its differences were independent. `goals`: whether to say if the goals were reached that the
    committed study set itself.
    """
    better, worse = pairs["difference"] >= LEVEL, pairs["difference"] <= -LEVEL
    pairs = pairs.assign(pairs=1, wins=1 * better, losses=1 * worse)
    pairs["length"] = pairs["epochs"].map(length)
    rivals = pairs[(pairs["rival"] != "dense") & ~borrowed(pairs["options_rival"]) & pairs["difference"].notna()]
    ours = [*GROUP, "options"]
    best = rivals.loc[rivals.groupby([*ours, "budget"])["difference"].idxmin()] if len(rivals) else rivals
    at_half = pairs[(pairs["rival"] == "dense") & (pairs["budget"] == "50 % macs")]
    count = ["pairs", "wins", "losses"]
    parts = {
        "mean over all": _mean_difference(best, ["data", "options", "length"]),
        "mean over budgets": _mean_difference(best, ours),
        "best comparator": _in_order(best).drop(columns=[*count, "length"]),
        "dense at 50 % macs": at_half.drop(columns=[*count, "length"]),
        "each comparator": _mean_difference(rivals, ["data", "options", "rival", "options_rival"]),
    }
    table = pd.concat([part.assign(part=name) for name, part in parts.items()], ignore_index=True)
    of_dense = table["network"].map(GOALS_DENSE).where(table["part"] == "dense at 50 % macs")
    table["goal"] = table["part"].map({"mean over budgets": GOAL, "mean over all": GOAL}).fillna(of_dense).astype(float)
    table["reached"] = np.where(table["goal"].isna(), "", np.where(table["difference"] >= table["goal"], "yes", "no"))
    shown = ["options", "length", "budget", "rival", "options_rival", "accuracy", "n", "accuracy_rival", "n_rival"]
    shown += ["difference", "se", *count]
    return table[["part", *GROUP, *shown, *(("goal", "reached") if goals else ())]]


def length(epochs: float) -> str:
    """Return in words whether a run is a long one; see `LONG`."""
    return f"{LONG} epochs or more" if epochs >= LONG else f"fewer than {LONG} epochs"


def missing(table: pd.DataFrame) -> list[str]:
    """Return, for each group of the table `accuracy`, what it lacks for a comparison; empty if nothing."""
    said = []
    for group, rows in table.groupby(GROUP, sort=False):
        have = set(rows["method"])
        lacks = [f"no run of {METHODS[name]}" for name in ("dense", "tailored") if name not in have]
        lacks += [] if have - {"dense", "tailored"} else ["no comparator"]
        lacks += ["one seed" if rows["n"].max() else "no test accuracy"] if rows["n"].max() < 2 else []
        if lacks:
            said.append(f"{heading(dict(zip(GROUP[:-1], group, strict=False)))}: {', '.join(lacks)}")
    return said


def delivered(runs: pd.DataFrame) -> pd.DataFrame:
    """Return requested beside delivered cost: one row for each run and each cost that was bounded.

    `before` is the cost of the units that a sparsity-training method had left open by itself, before it was brought to
    the budget; `used` and `before_used` are percent of the budget, which is 100.
    """
    runs = runs[~runs["searched"]]
    source = {"requested": "requested_{}", "delivered": "{}", "before": "before_{}"}
    rows = [
        runs.assign(cost=cost, **{name: runs[column.format(cost)] for name, column in source.items()}) for cost in COSTS
    ]
    table = pd.concat(rows).dropna(subset="requested")
    table["used"] = 100 * table["delivered"] / table["requested"]
    table["before_used"] = 100 * table["before"] / table["requested"]
    shown = ["seed", "cost", "requested", "delivered", "used", "before", "before_used", "largest_gate", "run"]
    return _in_order(table)[[*KEY, *shown]]


def beside_published(table: pd.DataFrame, published: pd.DataFrame, *, within: float = 5) -> pd.DataFrame:
    """Return our rows of the table `accuracy`, each with what was published for that network at a comparable cost.

    Comparable: a FLOPs reduction `within` so many points of ours. `source` says which is which; `change` is from
    the dense network of the same source. The paper this study follows has a row too: its numbers are not public.
    """
    sections = []
    ours = table[(table["method"] == "tailored") & table["budget"].str.fullmatch(r"[\d.]+ % macs")]
    for (network, budget), rows in ours.groupby(["network", "budget"], sort=False):
        for dataset, known in ARCHITECTURES.items():
            mine = rows[[family(data) == dataset for data in rows["data"]]]
            if mine.empty or network not in known:
                continue
            others = published[(published["dataset"] == dataset) & published["architecture"].isin(known[network])]
            others = others[(others["flops_reduction_pct"] - 100 + mine["macs"].mean()).abs() <= within]
            sections.append(
                pd.concat([_as_ours(mine), _as_the_paper(network), _as_published(others)]).assign(
                    network=network, budget=budget
                )
            )
    columns = ["network", "budget", "source", "method", "data", "epochs", "flops_reduction", "params_reduction"]
    columns += ["baseline", "accuracy", "change", "n", "citation", "seen_at"]
    return pd.concat(sections, ignore_index=True)[columns] if sections else pd.DataFrame(columns=columns)


def family(data):
    """Return the published data set that a run's data can stand beside; the small copies of ImageNet have none."""
    name = data.lower().replace("-", "")
    return next((family for family in ARCHITECTURES if name.startswith(family.lower().replace("-", ""))), None)


def search(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the controller's variants by mean validation accuracy: one row a variant, the best of a group first.

    Runs of experiments whose name starts with "search"; each budget's mean over seeds has a column, and `val_accuracy`
    is the mean of these. Variants that lack a budget are not comparable with the others: their column is empty.
    """
    runs = runs[runs["searched"]]
    keys = [*GROUP, "method", "options"]
    by_budget = runs.pivot_table("val_accuracy", keys, "budget", aggfunc="mean", sort=False)
    by_budget = by_budget[sorted(by_budget, key=budget_order)]
    table = by_budget.copy()
    table.insert(0, "val_accuracy", by_budget.mean(axis=1))
    table.insert(1, "n", runs.groupby(keys)["val_accuracy"].count())
    order = [*GROUP, "val_accuracy", "method", "options"]
    return table.reset_index().sort_values(order, ascending=[True] * 5 + [False, True, True], ignore_index=True)


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


def _each(prefix):
    return [f"{prefix}_{cost}" for cost in COSTS]


def _texts(values):
    return "; ".join(sorted(set(values)))


def budget_order(budget: str) -> tuple:
    """Return what budgets are sorted by: dense first, then macs, params and both, each from the largest share down."""
    shares = [-float(part.split()[0]) for part in budget.split(" + ") if part != "dense"]
    return (budget != "dense", len(shares), "params" in budget, *shares)


def _in_order(table):
    """Sort by `GROUP` (resnet20 before resnet110), budget, then ours before the comparators in a fixed order."""

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


def _mean_difference(pairs, by):
    """Return, for each value of `by`, the mean of the differences with its standard error, and wins and losses."""
    groups = pairs.assign(square=pairs["se_pooled"] ** 2).groupby(by)
    table = groups[["pairs", "wins", "losses"]].sum()
    table["difference"] = groups["difference"].mean()
    table["se"] = np.sqrt(groups["square"].agg(lambda squares: squares.sum(skipna=False))) / table["pairs"]
    return _in_order(table.reset_index())


def _as_ours(rows):
    said = rows["options"].where(rows["options"] == "", " (" + rows["options"] + ")")
    return pd.DataFrame(
        {
            "source": "here",
            "method": "ours, " + rows["setting"] + said,
            "data": rows["data"],
            "epochs": [f"{epochs:g}" for epochs in rows["epochs"]],
            **{f"{name}_reduction": 100 - rows[cost] for name, cost in (("flops", "macs"), ("params", "params"))},
            "baseline": rows["accuracy"] - rows["delta_dense"],
            "accuracy": rows["accuracy"],
            "change": rows["delta_dense"],
            "n": rows["n"],
        }
    )


def _as_the_paper(network):
    row = {"source": "published", "method": "Tailored Channel Pruning", "data": "CIFAR-10"}
    row |= dict.fromkeys(("epochs", "baseline", "accuracy", "change"), NOT_PUBLIC)
    row |= {"citation": "Lee, Jeon, Lee and Kim, IEEE Access 13 (2025), doi:10.1109/ACCESS.2025.3529465"}
    return pd.DataFrame([row])


def _as_published(rows):
    table = pd.DataFrame(
        {
            "source": "published",
            "method": rows["method"] + np.where(rows["architecture"] == "VGG-16", ' ("VGG-16")', ""),
            **{"data": rows["dataset"], "epochs": rows["epochs"]},
            "flops_reduction": rows["flops_reduction_pct"],
            "params_reduction": rows["params_reduction_pct"],
            "baseline": rows["baseline_top1"],
            "accuracy": rows["pruned_top1"],
            "change": rows["pruned_top1"] - rows["baseline_top1"],
            **{"citation": rows["citation"], "seen_at": rows["seen_at"]},
        }
    )
    return table.sort_values(["flops_reduction", "method", "accuracy"])
