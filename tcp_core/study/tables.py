"""Records -> tables. Every number of the study follows from `records.study`, one row a run, and from nothing else.

`accuracy` gives one row for each thing that was compared (mean over seeds), and the other tables follow from these two.
Accuracies and costs are in percent, differences of accuracy in points, times in seconds.

Runs are compared only within a `GROUP`: same data, network, start, epochs and recipe, so whatever differs between two
rows of a group is the method. Where a start was trained again, a row may be of several; `differences` keeps them apart.
"""

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from .pages import COSTS, GOAL, GOALS_DENSE, GROUP, KEY, LONG, METHODS, absent, heading, number
from .published import ARCHITECTURES
from .records import borrowed, budget_order, in_order

LEVEL = 0.005  # points: a smaller difference prints as 0.00 and is neither won nor lost
NOT_PUBLIC = "not public"


def accuracy(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over seeds for each `KEY`, beside the dense network of the same `GROUP`.

    `delta_dense` is the difference to it, taken as in `differences`; `n` is the number of seeds; `sd` (of a sample,
    n - 1) is missing for one. Several runs of the same key, start and seed count as one, their mean, with a warning if
    their accuracies differ. `seconds_of_dense` is missing where the two did not run on the same kind of machine.
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
    return in_order(table)


def _to_dense(runs):
    """Return for each `KEY` its difference to dense, within each start that both have runs from, as `differences`."""
    table = _over_seeds(runs, [*KEY, "start"])
    dense = table[table["method"] == "dense"][[*GROUP, "start", "accuracy", "n"]]
    pairs = table.merge(dense, on=GROUP, suffixes=("", "_rival"))
    pairs["difference"] = pairs["accuracy"] - pairs["accuracy_rival"]
    pairs["se_pooled"] = pairs["free_pooled"] = np.nan
    return _over_starts(pairs, KEY)[[*KEY, "difference"]]


def _over_seeds(runs, key):
    """Return the means over seeds for each value of `key`, with the accuracy's `sd` and `n`."""
    runs = runs[~runs["searched"]]
    numbers = ["accuracy", *COSTS, *_each("requested"), *_each("before"), "utilisation", "training_cost", "seconds"]
    one = dict.fromkeys([*key, "start", "seed"])  # of two starts the same seed is two runs
    seeds = runs.groupby(list(one), dropna=False).agg(dict.fromkeys(numbers, "mean") | {"machine": _texts})
    by_key = seeds.reset_index().groupby(key)
    table = by_key[numbers].mean()
    table.insert(1, "sd", by_key["accuracy"].std())
    table.insert(2, "n", by_key["accuracy"].count())
    table["machine"] = by_key["machine"].agg(_texts)
    return table.reset_index()


def repeated(runs: pd.DataFrame) -> list[str]:
    """Return, for each key, start and seed of several runs that do not agree, which they are; empty if there are none.

    Two studies may share a run, done twice with the same result. An old copy of another one is in the way.
    """
    said = []
    for _, rows in runs[~runs["searched"]].groupby([*KEY, "start", "seed"], dropna=False, sort=False):
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
    return in_order(wide.reset_index())


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return ours minus each other method (dense too) of the same `GROUP` and budget, from `records.study`.

    Methods are compared within each start that both have runs from (between all, where there is none), and the mean
    over starts is taken, each weighed by the seeds of the side that has fewer; accuracies and ``n`` are of the runs
    that are compared. `se` is the standard error of the difference, sqrt(sd^2 / n + sd^2 / n), missing where either has
    one seed; `ci` is half the 95 % confidence interval, by Student's t with as many degrees of freedom as Welch (1947)
    has. `se_pooled` is the standard error with, for one seed, the pooled standard deviation of all rows of the data
    set; over several starts, `se` is it.
    """
    table = _over_seeds(runs, [*KEY, "start"])
    free = (table["n"] - 1).clip(lower=0)  # no seed, where the test images were not read
    squares = table.assign(free=free, square=free * table["sd"] ** 2).groupby("data")
    frees = squares["free"].sum().replace(0, np.nan)
    pooled = squares["square"].sum() / frees
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
    sides = [(pairs["sd"] ** 2 / pairs["n"], pairs["n"]), (pairs["sd_rival"] ** 2 / pairs["n_rival"], pairs["n_rival"])]
    pairs["se"] = np.sqrt(sides[0][0] + sides[1][0])
    spread = sum(square**2 / (n - 1) for square, n in sides)
    pairs["free"], pairs["free_pooled"] = pairs["se"] ** 4 / spread, pairs["data"].map(frees)
    pairs["se_pooled"] = np.sqrt(pairs["variance"] + pairs["variance_rival"])
    of = [*GROUP, "options", "budget", "rival", "options_rival"]
    found = _over_starts(pairs, of)
    found["ci"] = stats.t.ppf(0.975, found["free"]) * found["se"]
    shown = ["accuracy", "sd", "n", "accuracy_rival", "sd_rival", "n_rival", "difference", "se", "ci", "se_pooled"]
    return in_order(found[[*of, *shown]])


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
    mean["free"] = groups["free_pooled"].first()
    return pd.concat([pairs[alone], mean.reset_index()], ignore_index=True)


def summary(pairs: pd.DataFrame, *, goals: bool = True) -> pd.DataFrame:
    """Return what the differences come to: against the best comparator, against each one, and against dense.

    The best comparator is chosen anew at every budget, by its mean test accuracy: the hardest choice for ours, as the
    best of several noisy means is more often a lucky one. Networks with the widths of another run are not among them:
    they show what those widths are worth, and need that run first. Column `part`: "mean over all" of a data set, of
    its runs of `LONG` epochs or more and of the others; "mean over budgets" of a group, "best comparator" at each
    budget, "dense at 50 % macs", and "each comparator" over all budgets and settings of long runs, and of the others.
    A mean's standard error comes from `se_pooled`, as if its differences were independent. `goals`: whether to say if
    the goals were reached that the committed study set itself.
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
        "best comparator": in_order(best).drop(columns=[*count, "length"]),
        "dense at 50 % macs": at_half.drop(columns=[*count, "length"]),
        "each comparator": _mean_difference(rivals, ["data", "options", "length", "rival", "options_rival"]),
    }
    table = pd.concat([part.assign(part=name) for name, part in parts.items()], ignore_index=True)
    of_dense = table["network"].map(GOALS_DENSE).where(table["part"] == "dense at 50 % macs")
    table["goal"] = table["part"].map({"mean over budgets": GOAL, "mean over all": GOAL}).fillna(of_dense).astype(float)
    table["reached"] = np.where(table["goal"].isna(), "", np.where(table["difference"] >= table["goal"], "yes", "no"))
    shown = ["options", "length", "budget", "rival", "options_rival", "accuracy", "n", "accuracy_rival", "n_rival"]
    shown += ["difference", "se", "ci", *count]
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
    return in_order(table)[[*KEY, *shown]]


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


def _each(prefix):
    return [f"{prefix}_{cost}" for cost in COSTS]


def _texts(values):
    return "; ".join(sorted(set(values)))


def _mean_difference(pairs, by):
    """Return, for each value of `by`, the mean of the differences with its standard error, and wins and losses."""
    groups = pairs.assign(square=pairs["se_pooled"] ** 2).groupby(by)
    table = groups[["pairs", "wins", "losses"]].sum()
    table["difference"] = groups["difference"].mean()
    table["se"] = np.sqrt(groups["square"].agg(lambda squares: squares.sum(skipna=False))) / table["pairs"]
    return in_order(table.reset_index())


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
