"""What the study's tables are called in words, and the pages that they are written to: CSV, and Markdown to be read."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from .published import ARCHITECTURES

METHODS = {
    "dense": "dense",
    "tailored": "ours",
    "taylor": "Taylor, one-shot",
    "fixed_strength": "fixed strength",
    "global_l1": "L1, global",
    "uniform_l1": "L1, uniform",
    "slimming": "batch-norm slimming",
    "torch_pruning": "Torch-Pruning",
    "small": "small from scratch",
    "random": "random",
}  # in the order of every table
NAMES = {name: names[0] for known in ARCHITECTURES.values() for name, names in known.items()}
NAMES["resnet18_small_stem"] = "ResNet-18 with a small stem"

GROUP = ["data", "network", "setting", "epochs", "recipe"]
KEY = [*GROUP, "budget", "method", "options"]
COSTS = ("macs", "params")
GOAL = 0.3  # points: ours - best comparator, mean over budgets
GOALS_DENSE = {"resnet20": -1.0, "resnet56": -0.3}  # points: ours - dense at 50 % macs, by network
LONG = 10  # epochs from which a run says how good a network becomes, and no longer how soon it recovers


def write(table: pd.DataFrame, name: str, folder: str | Path, *, missing: Iterable[str] = ()) -> str:
    """Write `table` to `folder`/`name`.csv and, to be read, `name`.md, and return the latter's text.

    `name` is one of `PAGES`, which have the title, a note and the columns whose values make the parts of the page;
    `missing` is listed at its end. The same table gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = _formatted(table)
    text.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    title, note, sections = PAGES[name]
    note = f"{GOALS} {note}" if "goal" in table else note
    notes = [note, *(said for data, said in DATA.items() if "data" in table and data in set(table["data"]))]
    page = "\n\n".join([f"# {title}", *notes, *(_parts(text, sections) or ["No run of this kind yet."])])
    page += "".join(["\n\n## Missing\n\n", *(f"- {what}\n" for what in missing)]) if missing else "\n"
    (folder / f"{name}.md").write_text(page, encoding="utf-8", newline="\n")
    return page


def heading(group: Mapping) -> str:
    """Return what a group is in words, such as "ResNet-20, cifar10-jpeg, from scratch, 15 epochs"."""
    said = {name: str(value) for name, value in group.items() if name != "recipe"}
    if "network" in said:
        network = said.pop("network")
        said = {"network": NAMES.get(network, network), **said}
    if "data" in said:
        said["data"] += " (a stand-in for ImageNet)" * said["data"].startswith("tiny-imagenet")
    if "epochs" in said:
        said["epochs"] = f"{float(said['epochs']):g} epochs"
    text = ", ".join(said.values())
    return text[:1].upper() + text[1:]


def number(value: float, digits: int, *, sign: str = "") -> str:
    """Return a number as every table and figure shows it: half rounds away from zero, as by hand, and 0 has no minus.

    >>> number(83.235, 2), f"{83.235:.2f}"
    ('83.24', '83.23')
    """
    return f"{round(value + math.copysign(1e-9, value), digits) + 0.0:{sign}.{digits}f}"


PAGES = {
    "overview": (
        "Test accuracy at a glance",
        "Percent, mean ± standard deviation over (n) seeds, by budget: the share of the dense network's macs.",
        GROUP,
    ),
    "accuracy": (
        "Test accuracy by network, budget and method",
        "Mean and standard deviation (sd) over n seeds; the test images were read once a run, at its end. Within a "
        "part only the method differs: same data, start, epochs, schedule and recipe. The budget is the cost that was "
        "asked for, as a share of the dense network's; macs and params are what was delivered. Differences are to the "
        "dense network of the same part; times are compared where both ran on the same kind of machine. Training cost "
        "is multiply-accumulates times images, forward and backward, in epochs of the dense network.",
        GROUP,
    ),
    "summary": (
        "Ours against the others",
        "The best comparator at a budget is the one with the highest mean test accuracy there, chosen after the fact, "
        "which favours it. A difference has a standard error where both sides have two seeds or more; a mean's takes "
        "the pooled standard deviation of the data set for the others.",
        ["part"],
    ),
    "differences": (
        "Ours minus each other method, budget by budget",
        "Positive: ours is better. The standard error is missing where either side has one seed.",
        GROUP,
    ),
    "delivered": (
        "Requested and delivered cost of every run",
        "Percent of the dense network, and of the budget. By itself: the cost of the units that a method with a "
        "strength but no budget had left open before it was brought to the budget.",
        GROUP,
    ),
    "published": (
        "Published results beside ours",
        "**Published rows were not run here**, and no two rows need share data, recipe, length or counting of "
        "costs: read the change from each one's own dense network, not the accuracies. Each section has what was "
        "published within 5 points of macs saved. What the abstract of the paper that this study follows does not "
        'say is "not public". Sources are in the last columns; results/published_dropped.csv says which rows of the '
        "collection were left out.",
        ["network", "budget"],
    ),
    "search": (
        "The controller's variants",
        "Mean **validation** accuracy over budgets and seeds, best first; n counts runs. Test images were not "
        "looked at. Options are named where they differ from the run notebook's defaults.",
        GROUP,
    ),
}
GOALS = (
    f"The study's goals: {GOAL:+.1f} points against the best comparator, in the mean over budgets and settings; and at "
    f"50 % macs and equal epochs no more than {-GOALS_DENSE['resnet56']:.1f} points below the dense network for "
    f"ResNet-56, {-GOALS_DENSE['resnet20']:.1f} for ResNet-20."
)  # of the committed study: runs of somebody else have none
DATA = {
    "cifar10-jpeg": "cifar10-jpeg is a JPEG-encoded copy of CIFAR-10 (quality 75, 4:2:0): accuracies are some points "
    "below those on the original.",
    "tiny-imagenet-100": "tiny-imagenet-100 is a stand-in for ImageNet: 100 of its classes, 300 training images each, "
    "at 64 x 64; accuracies on it say nothing about ImageNet's.",
    "cifar10-madeup": "**cifar10-madeup is no data set: its numbers are made up, to show and to test this report.**",
}
# Digits after the point, by column; what stands here is a number and aligned right.
DIGITS = {
    **dict.fromkeys(("accuracy", "sd", "delta_dense", "difference", "se", "se_pooled", "val_accuracy"), 2),
    **dict.fromkeys(
        ("accuracy_rival", "sd_rival", "utilisation", "delivered", "used", "before", "before_used", "change"), 2
    ),
    **dict.fromkeys(("flops_reduction", "params_reduction", "baseline"), 2),
    **dict.fromkeys(("n", "n_rival", "seconds", "seconds_of_dense", "seed", "pairs", "wins", "losses", "seeds"), 0),
    **{"requested": 1, "goal": 1, "training_cost": 2, "largest_gate": 4},
}
IN_CSV = ("recipe", "machine", "requested_macs", "requested_params", "before_macs", "before_params", "se_pooled")
SIGNED = ("delta_dense", "difference", "change", "goal")
HEADINGS = {
    "accuracy": "test accuracy, %",
    "val_accuracy": "validation accuracy, %",
    "delta_dense": "to dense, points",
    "macs": "macs, % of dense",
    "params": "params, % of dense",
    "utilisation": "budget used, %",
    "training_cost": "training cost, dense epochs",
    "seconds": "training, s",
    "seconds_of_dense": "training, % of dense",
    "rival": "against",
    "options_rival": "with",
    "accuracy_rival": "its test accuracy, %",
    "sd_rival": "its sd",
    "n_rival": "its n",
    "difference": "ours minus it, points",
    "se": "standard error",
    "requested": "asked, % of dense",
    "delivered": "delivered, % of dense",
    "used": "budget used, %",
    "before": "by itself, % of dense",
    "before_used": "by itself, % of budget",
    "largest_gate": "largest gate removed",
    "flops_reduction": "macs saved, %",
    "params_reduction": "params saved, %",
    "baseline": "own dense, %",
    "change": "change, points",
    "goal": "goal, points",
    "seen_at": "seen at",
}


def absent(value) -> bool:
    """Say whether a cell is empty: None or NaN."""
    return value is None or value != value  # only NaN differs from itself


def lines(table: pd.DataFrame, *, without: Iterable[str] = ()) -> list[str]:
    """Return a table in Markdown, line by line, without the columns `IN_CSV`, `without` and those that are empty."""
    return _lines(_in_words(_formatted(table)), without)


def _parts(text, sections):
    """Return a formatted table's parts as Markdown, each with its heading and recipe."""
    text = _in_words(text, sections)
    parts = []
    for values, rows in text.groupby(sections, sort=False):
        group = dict(zip(sections, values, strict=True))
        recipe = [f"Recipe: {group['recipe']}.", ""] if group.get("recipe") else []
        parts.append("\n".join([f"## {heading(group)}", "", *recipe, *_lines(rows, sections)]))
    return parts


def _in_words(text, sections=()):
    for name, words in (("method", METHODS), ("rival", METHODS), ("network", NAMES)):
        if name in text and name not in sections:
            text = text.assign(**{name: [words.get(value, value) for value in text[name]]})
    return text


def _lines(text, without):
    columns = [name for name in text if name not in (*without, *IN_CSV) and text[name].ne("").any()]
    cells = [
        [HEADINGS.get(name, name.replace("_", " ")) for name in columns],
        ["--:" if _digits(name) is not None else "---" for name in columns],
        *([cell or "-" for cell in row] for row in text[columns].to_numpy()),
    ]
    return [f"| {' | '.join(line)} |" for line in cells]


def _digits(name):
    return 2 if name.endswith(("macs", "params", "dense")) else DIGITS.get(name)  # a column may be called by a budget


def _formatted(table):
    """Return every cell as text, numbers with the digits of their column; what is missing is empty."""

    def cell(name, value):
        if absent(value):
            return ""
        if name == "epochs" and not isinstance(value, str):
            return f"{value:g}"
        if _digits(name) is None or isinstance(value, str):
            return str(value)
        return number(value, _digits(name), sign="+" if name in SIGNED else "")

    return pd.DataFrame({name: [cell(name, value) for value in table[name]] for name in table}, dtype=str)
