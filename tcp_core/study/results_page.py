"""docs/results.md: the study's tables and figures with what they say, every number computed from the runs.

A study is a folder of runs, named after its declaration; each has a section, in the order of `STUDIES`, and one that is
not named there has one of its own name. So runs that are added find their place, and sentences change with the numbers.
"""

import os
from pathlib import Path

import pandas as pd

from . import records, study_plots, tables
from .pages import DATA, GOAL, GOALS_DENSE, GROUP, METHODS, NAMES, absent, heading, lines, number

STUDIES = {
    "cifar10-cpu": (
        "Short runs on CIFAR-10: how fast each method recovers",
        "A few epochs show how soon a network is good again after it was made smaller, not how good it becomes. What "
        "leads here need not lead in a long run.",
    ),
    "cifar10-long": (
        "Long runs on CIFAR-10: how good the networks become",
        "The same comparison in runs of ten to forty epochs.",
    ),
    "cifar10-half": (
        "Long runs at half resolution",
        "Images of 16 x 16, and a start that was trained here and has never seen the validation images.",
    ),
    "cifar10-paper": ("CIFAR-10 as papers run it", "The original images, and as many epochs as papers train for."),
    "tiny-imagenet-cpu": (
        "A stand-in for ImageNet",
        "Real images of ImageNet's classes, but few and small: nobody has converged in so few epochs, and accuracies "
        "say nothing about ImageNet's.",
    ),
    "imagenet-paper": ("ImageNet", "ImageNet's own images at 224 x 224."),
}  # name of the declaration: title, what its runs can show

INTRODUCTION = """\
# Results

*Made by `make report` from [results/runs](../results/runs). Every number, also in sentences, is computed from the runs,
but for those of the last section.
The tables behind this page are in [results/tables](../results/tables); all runs are declared in
[experiments](../experiments).*

Every method starts from the same weights, pretrained or fresh. It is trained for as many epochs, on the same images,
with the same schedule, and is brought to the same budget by the same exact count. The comparators:

- **Taylor, one-shot**: our importance per cost, measured once before pruning, then all at once;
- **L1, uniform** and **L1, global**: the norm of the filters, within each layer or over the whole network;
- **batch-norm slimming**: the scales of the batch norms, after training them under a penalty;
- **fixed strength**: our gates under a penalty that does not adapt and knows no cost, then cut to the budget;
- **Torch-Pruning**: the ranking of that library's GroupNorm pruner, without its sparse training, at the largest
  network within the budget that its ratio reaches. Version 1.6.1 cannot follow the zero-padded shortcuts of CIFAR
  ResNets, so there the residual streams are kept from it, and it does not get down to 15 % of the macs;
- **small from scratch**: the network with uniform widths, trained from fresh weights;
- **random**: any channels.

From a pretrained network the comparators prune before the first step, but for those that train under a penalty first
(batch-norm slimming and fixed strength; the tables say until when). From scratch they train, prune and fine-tune within
the epochs of our one run. The test images are read once, at the end of a run.

Accuracies are percent, mean ± standard deviation over (n) seeds. Differences are points, with their standard error;
where runs of one setting began with different weights, they are taken within each start that both methods have. **A
difference within its 95 % interval, or of one seed, may be chance**; of so few seeds the interval (Welch's) is several
standard errors wide. Standard errors are of seeds alone: neither the start that runs share nor the choice of the 10,000
test images is in them. "The best comparator" is the best at that budget, chosen after the fact: the hardest choice for
ours. The standard error of a mean over budgets takes, for settings of one seed, the standard deviation that the same
data's other settings have, pooled."""

CAVEATS = """\
- All runs have any widths (`multiple=1`). By default `Tailor` and `fit` take multiples of 8 or 4; what these cost and
  bring is in [deployment](deployment.md#why-widths-in-multiples-matter).
- The pretrained weights for CIFAR-10 (published CIFAR ResNets by Y. Idelbayev) had seen the validation images in their
  first training. Validation accuracies from that start are too high, for all methods alike. Test accuracies are not
  affected.
- In cifar10-cpu, ours from pretrained networks is of a rule before the present one: in these runs of 3 and 4 epochs the
  importance that was measured while the network was dense counted no more than that of any other step. It would now be
  about 0.2 of the score, and is up to 0.8 in longer runs, see [decisions](decisions.md).
- In cifar10-long, the first seed of ours from pretrained networks is made smaller until 15 % of the run, except at 10 %
  of the macs. All other runs are by 6 % (ResNet-20) or 7 % (ResNet-56) of it, the default of now, which costs less and
  was level in accuracy at half resolution.
- In cifar10-long, the third seeds from the pretrained ResNet-20 (of dense, the fourth), and Torch-Pruning at 30 % of
  the macs, start from another network than the runs beside them: the same published weights, trained on with the same
  seed and recipe on another machine, after the first had been lost. They were added after the first two seeds were
  known: ours and Taylor first, then, with these known, uniform L1 at every budget and dense. Over the eight budgets of
  the long runs ours was 0.23 points above the best comparator in the mean with two seeds, and 0.27 before the last.
- Our rules were chosen in more than a hundred trials on these images, by training loss and validation accuracy
  ([short](../results/controller_trials.csv), [long](../results/controller_trials_long.csv)). The comparators have their
  sources' settings; nobody has tuned them here.
- Training times were taken with other work on the machine. They are in the tables, but say little.
- *Fixed strength* differs from ours by more than adaptation. It ranks by the gates themselves, which know no cost, and
  its one strength was chosen on digits, not swept."""


def glance(summary: pd.DataFrame, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each setting: ours and, in brackets, its difference to the best comparator, at each budget.

    From the tables `summary` and `accuracy`; the dense network's accuracy and the fewest seeds stand beside.
    """
    best = summary[summary["part"] == "best comparator"]
    rows = []
    for group, pairs in best.groupby([*GROUP, "options"], sort=False, dropna=False):
        row = dict(zip([*GROUP, "options"], group, strict=True))
        same = (accuracy[GROUP] == pd.Series(row)[GROUP]).all(axis=1)
        dense = accuracy[same & (accuracy["method"] == "dense")]["accuracy"]
        row["seeds"] = f"{min(pairs['n'].min(), pairs['n_rival'].min()):.0f}"
        row["dense"] = number(dense.item(), 2) if len(dense) else ""
        for pair in pairs.to_dict("records"):
            se = "" if absent(pair["se"]) else f" ± {number(pair['se'], 2)}"
            row[pair["budget"]] = f"{number(pair['accuracy'], 2)} ({number(pair['difference'], 2, sign='+')}{se})"
        rows.append(row)
    fixed = [*GROUP, "options", "seeds", "dense"]
    budgets = sorted({name for row in rows for name in row} - set(fixed), key=records.budget_order)
    return pd.DataFrame(rows, columns=[*fixed, *budgets])


def page(
    study: pd.DataFrame, published: pd.DataFrame, *, figures: str | Path, experiments: str | Path, folder: str | Path
) -> str:
    """Return the page's text, for a file in ``folder``, from `records.study` and the table of what was published.

    ``figures`` is the folder of the report's figures: those that are there are shown; ``experiments`` that of the
    declarations: those without runs are named.
    """
    accuracy = tables.accuracy(study)
    pairs = tables.differences(study)
    summary = tables.summary(pairs)
    place = _Place(Path(figures), Path(folder))
    text = [INTRODUCTION, *(said for data, said in DATA.items() if data in set(accuracy["data"]))]
    text += ["## All of it at a glance", GLANCE, *_glance_and_reading(summary, accuracy)]
    home = study.groupby(GROUP)["run"].agg(lambda runs: min(map(_order, runs))).to_dict()
    shown = None
    for name, rows in sorted(study_plots.groups(accuracy).items(), key=lambda item: home[_key(item[1])]):
        if not _budgets(rows):
            continue
        if (of := home[_key(rows)][1]) != shown:
            title, note = STUDIES.get(of, (of, ""))
            machines = sorted(set(study[study["run"].str.split("/").str[0] == of]["machine"]))
            text += [f"## {title}", f"{note} Run on {_listed(machines)}.".strip()]
            shown = of
        text += _section(name, rows, _of(study, rows), _of(pairs, rows), _of(summary, rows), place)
    text += _lengths(accuracy, place) + _beside(accuracy, published, place)
    text += ["## What these numbers do not say", "\n".join([CAVEATS, *_not_run(study, Path(experiments), place)])]
    return "\n\n".join(text) + "\n"


def at_a_glance(study: pd.DataFrame) -> str:
    """Return the part of the page that the README repeats: the table at a glance and what it comes to."""
    accuracy = tables.accuracy(study)
    summary = tables.summary(tables.differences(study))
    return "\n\n".join(_glance_and_reading(summary, accuracy))


def refreshed(text: str, part: str) -> str:
    """Return ``text`` with what stands between its two `MARKS` replaced by ``part``."""
    before, _, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"the text has no part between the lines {MARKS[0]!r} and {MARKS[1]!r}.")
    return f"{before}{MARKS[0]}\n\n{part}\n\n{MARKS[1]}{after}"


MARKS = "<!-- results: made by `make report` -->", "<!-- end of results -->"
GLANCE = (
    "Ours and, in brackets, its difference to the best comparator at that budget, with its standard error. `seeds` is "
    "the fewest on either side."
)


def _order(run):
    """Return what a study is sorted by: its place in `STUDIES`, then its name."""
    name = run.split("/")[0]
    return (list(STUDIES).index(name) if name in STUDIES else len(STUDIES), name)


def _not_run(study, experiments, place):
    run = {name.split("/")[0] for name in study["run"]}
    names = [path.stem for path in sorted(experiments.glob("*.yaml")) if path.stem not in {*run, "small"}]
    return [f"- [{name}]({place.to(experiments / f'{name}.yaml')}) is declared and was not run." for name in names]


def _key(rows):
    return tuple(rows[GROUP].iloc[0])


def _part(summary, name):
    return summary[summary["part"] == name]


def _of(table, rows):
    """Return the rows of `table` of the same group as `rows`."""
    return table[(table[GROUP] == rows[GROUP].iloc[0]).all(axis=1)]


def _budgets(rows):
    """Return the budgets at which ours was compared with another method than dense."""
    by = rows[rows["budget"] != "dense"].groupby("budget", sort=False)["method"].agg(set)
    return [budget for budget, methods in by.items() if "tailored" in methods and len(methods) > 1]


def _glance_and_reading(summary, accuracy):
    said = [_overall(row, summary, accuracy) for row in _part(summary, "mean over all").to_dict("records")]
    return [_table(glance(summary, accuracy)), "\n".join(f"- {each}" for each in said)]


def _overall(row, summary, accuracy):
    """Say what the mean over all settings of a data set is, and what it rests on."""
    best = _part(summary, "best comparator")
    best = best[(best["data"] == row["data"]) & (best["options"] == row["options"])]
    best = best[best["epochs"].map(tables.length) == row["length"]]
    se = "" if absent(row["se"]) else f", standard error {number(row['se'], 2)}"
    level = row["pairs"] - row["wins"] - row["losses"]
    draws = f", {_count(level, 'draw')}" if level else ""
    said = (
        f"**{', '.join(filter(None, [row['data'], row['options'], row['length']]))}.** Over "
        f"{_count(row['pairs'], 'budget')} in all settings ours is {_points(row['difference'])} the best of "
        f"{_comparators(accuracy, best)} in the mean{se}: {_count(row['wins'], 'win')}, "
        f"{_count(row['losses'], 'loss', 'losses')}{draws}. The study's goal, "
        f"{number(GOAL, 1)} points above it, is {'reached' if row['reached'] == 'yes' else 'missed'}"
    )
    beyond = row["difference"] - GOAL
    if number(row["difference"], 1) == number(GOAL, 1):
        said += f" by {number(abs(beyond), 3)}"
    near = absent(row["se"]) or abs(beyond) < 2 * row["se"]
    said += ", which may be chance." if near else "."
    if len(best) > 2:
        largest = best.loc[best["difference"].abs().idxmax()]
        rest = best.drop(largest.name)["difference"].mean()
        where = heading({name: largest[name] for name in ("network", "setting", "epochs")})
        said += (
            f" Without the largest of these differences ({_signed(largest['difference'])}: {where}, at "
            f"{largest['budget']}) the mean is {_signed(rest)}; the median of all is "
            f"{_signed(best['difference'].median())}."
        )
    return said


def _comparators(accuracy, best):
    """Say of how many methods the best was taken, at the budgets of ``best``."""
    rivals = accuracy[~accuracy["method"].isin(["tailored", "dense"]) & ~records.borrowed(accuracy["options"])]
    rivals = rivals.merge(best[[*GROUP, "budget"]].drop_duplicates())
    counts = rivals.groupby([*GROUP, "budget"])[["method", "options"]].apply(lambda rows: len(rows.drop_duplicates()))
    low, high = counts.min(), counts.max()
    return _count(high, "comparator") if low == high else f"{low} to {high} comparators"


def _section(name, rows, runs, pairs, summary, place):
    """Return a group's heading, recipe, table, reading and figure."""
    group = rows.iloc[0]
    said = [*_reading(rows, pairs, _part(summary, "best comparator")), *_fixed_strength(runs, pairs)]
    text = [f"### {heading({key: group[key] for key in GROUP[:-1]})}", f"Recipe: {group['recipe']}."]
    text += [_table(tables.overview(rows)), "\n".join(said)]
    text += place.show(f"pareto-{name}", f"Test accuracy against macs, {heading({'network': group['network']})}")
    if len(others := _of_parameters(rows)):
        text += ["Budgets on parameters, and on both:", _table(others)]
    return text


def _reading(rows, pairs, best):
    cost = rows.set_index(["budget", "method", "options"])["training_cost"]
    said = []
    for pair in best.to_dict("records"):
        rival = METHODS.get(pair["rival"], pair["rival"])
        ours = cost[pair["budget"], "tailored", pair["options"]]
        theirs = cost[pair["budget"], pair["rival"], pair["options_rival"]]
        said.append(
            f"- At {pair['budget']} ours is {_points(pair['difference'])} *{rival}*, the best comparator there "
            f"({_chance(pair)}). Training cost as much as {number(ours, 1)} dense epochs, "
            f"against {number(theirs, 1)}."
        )
    for pair in pairs[records.borrowed(pairs["options_rival"])].to_dict("records"):
        said.append(
            f"- At {pair['budget']} a network {pair['options_rival']}, trained from fresh weights, has "
            f"{number(pair['accuracy_rival'], 2)}: ours is {_points(pair['difference'])} it "
            f"({_chance(pair)}). It needs the run of ours first, so it is no comparator."
        )
    for pair in pairs[(pairs["rival"] == "dense") & (pairs["budget"] == "50 % macs")].to_dict("records"):
        goal, reached = GOALS_DENSE.get(pair["network"]), ""
        if goal is not None:
            reached = f", {'' if pair['difference'] >= goal else 'not '}within the goal of {number(-goal, 1)}"
        said.append(
            f"- At half the macs ours is {_points(pair['difference'])} the dense network of as many epochs{reached} "
            f"({_chance(pair)})."
        )
    return said


def _fixed_strength(runs, pairs):
    fixed = pairs[pairs["rival"] == "fixed_strength"]
    left = runs[runs["method"] == "fixed_strength"]["before_macs"]
    if fixed.empty or left.isna().all():
        return []
    low, high = number(left.min(), 0), number(left.max(), 0)
    ends = [f"{_signed(d)} points ({b})" for d, b in zip(fixed["difference"], fixed["budget"], strict=True)]
    return [
        f"- The penalty of fixed strength had by itself come down to {low} % of the macs"
        f"{'' if low == high else f' in one run and {high} % in another'}, whatever the budget. Cut to the budget, the "
        f"difference of ours to it is {_listed(ends)}."
    ]


def _of_parameters(rows):
    table = rows[(rows["method"] == "tailored") & rows["budget"].str.contains("params")]
    return table[["budget", "accuracy", "n", "delta_dense", "macs", "params", "utilisation"]]


def _lengths(accuracy, place):
    """Return the figures of accuracy against length and against the cost of training, as far as they are there."""
    lengths, costs = [], []
    for name, rows in study_plots.groups(accuracy, by_length=False).items():
        where = heading({key: rows[key].iloc[0] for key in ("network", "data", "setting")})
        lengths += place.show(f"length-{name}", f"Accuracy against length, {where}")
        costs += place.show(f"training-cost-{name}", f"Accuracy against the cost of training, {where}")
    lengths = ["## Does the order change with length?", LENGTH, *lengths] if lengths else []
    return lengths + (["## Accuracy against the cost of training", COST, *costs] if costs else [])


LENGTH = (
    "The same start, recipe and budget at several lengths. A point is a whole run with its own schedule, not a moment "
    "of a longer one. Where lines cross, what recovers fast is not what ends best."
)
COST = (
    "A run that is small after a part of its steps costs less than one that trains the dense network first. The cost "
    "counts multiply-accumulates times images, forward and backward, in epochs of the dense network. What made the "
    "weights that a run starts from is not in it."
)


def _beside(accuracy, published, place):
    beside = tables.beside_published(accuracy, published)
    text = ["## Beside published results", BESIDE]
    for network, rows in beside.groupby("network", sort=False):
        said = []
        for budget, near in rows.groupby("budget", sort=False):
            change = pd.to_numeric(near["change"], errors="coerce")
            others, ours = change[near["source"] == "published"].dropna(), change[near["source"] == "here"].dropna()
            if len(others) and len(ours):
                said.append(
                    f"- {NAMES.get(network, network)}, {budget}: {_range(ours)} here; {_range(others)} in "
                    f"{_count(len(others), 'published result')}."
                )
        if said:
            text += ["\n".join(said)]
            text += place.show(f"published-{network}", f"Change of accuracy against macs saved, {network}")
    return text if len(text) > 2 else []


BESIDE = (
    "Others' data, recipes and lengths differ, so this is no ranking. What can be compared is the change from each "
    "one's own dense network, in points, at a cost within 5 points of ours "
    "([all rows with their sources](../results/tables/published.md)). Of the paper that this study follows only the "
    "abstract is public."
)


class _Place:
    """Where the page stands: relative links from ``folder``, and the figures that are there."""

    def __init__(self, figures, folder):
        self.figures, self.folder = figures, folder

    def to(self, path):
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def show(self, stem, words):
        path = self.figures / f"{stem}.png"
        return [f"![{words}]({self.to(path)})"] if path.exists() else []


def _table(table):
    """Return a table as Markdown, without what all of its rows have in common."""
    shared = [name for name in GROUP if name in table and table[name].nunique() == 1]
    return "\n".join(lines(table, without=shared))


def _points(difference):
    side = "above" if difference > 0 else "below"
    return f"{number(abs(difference), 2)} points {side}" if number(abs(difference), 2) != "0.00" else "level with"


def _chance(pair):
    if absent(pair["se"]):
        return "one seed on a side, so it may be chance"
    within = abs(pair["difference"]) < pair["ci"]
    said = f"standard error {number(pair['se'], 2)}, 95 % interval ± {number(pair['ci'], 2)}"
    return said + ", so it may be chance" * bool(within)


def _signed(points):
    return number(points, 2, sign="+")


def _range(changes):
    low, high = _signed(changes.min()), _signed(changes.max())
    return low if low == high else f"{low} to {high}"


def _count(number_of, one, many=None):
    return f"{number_of:.0f} {one if number_of == 1 else many or one + 's'}"


def _listed(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
