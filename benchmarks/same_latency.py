"""Accuracy at the same latency: a budget of latency, a budget of macs that ends at that latency, and one-shot pruning
by the same table.

On images at half resolution, from a network that is trained first, once. The macs budget is found before its run: of a
grid of shares the largest at which the best units of the trained network, in the largest multiples that the place
likes, take the latency that is asked for. Each network is timed beside the dense one at its end. Rows that are there
are not run again, and two processes of other seeds may share the output. Trainings disturb what is timed beside them,
so `--time-again` builds the networks of all rows anew, from their widths, and times them in turns.

    python benchmarks/same_latency.py --data cifar10-jpeg --out results/benchmarks/same_latency.json
"""

import argparse
import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import tcp_core as tcp
from tcp_core import nets
from tcp_core.controller import Controller
from tcp_core.datasets import sources
from tcp_core.study.comparators import pruner
from tcp_core.study.results import environment

METHODS = ("latency budget", "macs budget", "one-shot Taylor, latency table")
RECIPE = {"batch_size": 128, "augment": "crop_flip"}
MACS = [round(0.1 * 1.06**step, 3) for step in range(31)]  # shares that are tried, 0.1 to 0.57


def main() -> None:
    """Run what is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20", choices=list(nets.NETWORKS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.4], help="of the dense network's latency")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--start-epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="at which latency is measured")
    parser.add_argument("--work", type=Path, default=Path("build/same_latency"), help="trained networks and tables")
    parser.add_argument("--time-again", action="store_true", help="time the networks of the rows again, train nothing")
    options = given(parser, table)
    train, val = halves(options.data, options.images)
    model = started(options, train, val)
    example = train.pixels[:2].float()
    channels = tcp.trace(model, example)
    file = options.work / f"{options.network}-{options.batch}.json"
    place = tcp.Latency(
        "onnxruntime", batch=options.batch, threads=1, table=file, seconds=5.0, noise=0.3, progress=False
    )
    if options.time_again:
        return time_again(options, model, channels, place)
    for share, seed, method in itertools.product(options.shares, options.seeds, METHODS):
        key = {"network": options.network, "method": method, "latency": share, "seed": seed, "epochs": options.epochs}
        key["images"] = options.images
        if any(key.items() <= row.items() for row in written(options.out)["rows"]):
            continue
        row, small = run(model, channels, place, train, val, key, options.precision)
        timing, dense = place.timings([small, model], example)
        row |= {
            "batch": options.batch,
            "ms": timing.ms,
            "dense_ms": dense.ms,
            "spread": max(timing.spread, dense.spread),
        }
        print(json.dumps({name: value for name, value in row.items() if name != "history"}), flush=True)
        add(options.out, row | {"start_epochs": options.start_epochs, "precision": options.precision})


def given(
    parser: argparse.ArgumentParser, table: Callable[[list[dict]], str], images: int = 45_000
) -> argparse.Namespace:
    """Return what the benchmark was told, with what all that train on halved images are; or show its table and end."""
    parser.add_argument("--data", type=Path, help="folder of images, such as cifar10-jpeg")
    parser.add_argument("--images", type=int, default=images, help="how many to train with; 5,000 others validate")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--show", action="store_true", help="print what there is as a table, run nothing")
    options = parser.parse_args()
    if options.show:
        print(table(written(options.out)["rows"]))
        parser.exit()
    if options.data is None:
        parser.error("--data is needed: the folder of images")
    return options


def written(out: Path) -> dict:
    """Return what is in the output by now."""
    return json.loads(out.read_text()) if out.exists() else {"rows": []}


def add(out: Path, row: dict) -> None:
    """Add a row to the output, and say what it was run with."""
    content, ran = written(out), environment("cpu")
    # rows are added one by one, at other commits and maybe on other machines
    content["rows"].append(row | {"git_commit": ran["git_commit"], "device": ran["device"]})
    content |= ran | {"recipe": RECIPE}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def time_again(options: argparse.Namespace, model: torch.nn.Module, channels: tcp.Channels, place: tcp.Latency) -> None:
    """Time the networks of one network's rows in turns; of all times that this was done, a row has the median."""
    content = written(options.out)
    rows = [row for row in content["rows"] if row["network"] == options.network and row["batch"] == options.batch]
    *timings, dense = place.networks(model, channels, [*(of_widths(channels, row["widths"]) for row in rows), None])
    for row, timing in zip(rows, timings, strict=True):
        found = {"ms": timing.ms, "dense_ms": dense.ms, "spread": max(timing.spread, dense.spread)}
        row["again"] = [*row.get("again", []), found]
        middle = sorted(row["again"], key=lambda each: each["ms"] / each["dense_ms"])[len(row["again"]) // 2]
        row |= middle
    options.out.write_text(json.dumps(content, indent=1) + "\n")


def of_widths(channels: tcp.Channels, widths: list[int]) -> torch.Tensor:
    """Return a set of units, bool ``[units]``, that leaves so many channels in each layer; to a clock it does not
    matter which.
    """
    open_units = torch.zeros(channels.units, dtype=torch.bool)
    for layer, width in zip(channels.layers, widths, strict=True):
        units = layer.out_units[layer.out_units >= 0].unique()
        open_units[units[:width]] = True
    found = list(channels.widths(open_units).values())
    assert found == widths, f"no set of units leaves {widths}, at best {found}"
    return open_units


def table(rows: list[dict]) -> str:
    """Return the rows as a table in Markdown: training loss / validation accuracy of each seed."""
    seeds = sorted({row["seed"] for row in rows})
    head = ["network", "latency", "method", *(f"seed {seed}: loss / accuracy, macs, latency" for seed in seeds)]
    lines = [f"| {' | '.join(head)} |", "| --- | --: | --- |" + " --- |" * len(seeds)]
    for network, share in dict.fromkeys((row["network"], row["latency"]) for row in rows):
        for method in METHODS:
            key = {"network": network, "latency": share, "method": method}
            found = {row["seed"]: row for row in rows if key.items() <= row.items()}
            if found:
                cells = [_cell(found.get(seed)) for seed in seeds]
                lines.append(f"| {' | '.join([network, f'{share:.0%}', method, *cells])} |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    said = f"{row['train_loss']:.3f} / {row['val_accuracy']:.1%}, {row['macs_share']:.1%}"
    return f"{said}, {row['ms'] / row['dense_ms']:.1%}"


def halves(root: Path, images: int) -> list:
    """Return so many training images, evenly of each class, and 5,000 for validation, at half resolution."""
    train, val = sources.image_folder(root).train.split(5000)
    if images < len(train):
        _, train = train.split(images)
    return [
        dataclasses.replace(part, pixels=F.avg_pool2d(part.pixels.float(), 2).round().to(torch.uint8))
        for part in (train, val)
    ]


def started(options: argparse.Namespace, train, val) -> torch.nn.Module:
    """Return the dense network that all runs start from, trained now if it is not there."""
    torch.manual_seed(0)
    model = nets.build(options.network, num_classes=len(train.classes))
    start = options.work / f"{options.network}-{options.start_epochs}-epochs-{options.images}-images.pt"
    if not start.exists():
        result = tcp.fit(model, train, val, epochs=options.start_epochs, lr=0.1, precision=options.precision, **RECIPE)
        print(result.history.iloc[-1].to_dict(), flush=True)
        start.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result.model.state_dict(), start)
    model.load_state_dict(torch.load(start, weights_only=True))
    return model


def run(
    model, channels: tcp.Channels, place: tcp.Latency, train, val, key: dict, precision: str
) -> tuple[dict, torch.nn.Module]:
    """Return one row, and the network that the run left."""
    method, share, seed = key["method"], key["latency"], key["seed"]
    network = copy.deepcopy(model)
    how, more = {}, {}
    if method == "latency budget":
        how = {"budget": {"latency": share}, "latency": place}
    elif method == "macs budget":
        multiple = place.likes(place.cost(model, channels))[0]
        more = {"macs_budget": macs_share(model, channels, place, train, share, multiple, precision)}
        how = {"budget": {"macs": more["macs_budget"]}, "multiple": multiple}
    else:
        options = {"train": train, "seed": seed, "precision": precision, "multiple": "auto"}
        how = {"prune": pruner("taylor", {"latency": share}, latency=place, **options)}
    result = tcp.fit(
        network, train, val, epochs=key["epochs"], lr=0.04, seed=seed, precision=precision, **RECIPE, **how
    )
    last = result.history.iloc[-1]
    row = key | more | {"train_loss": float(last["train_loss"]), "val_accuracy": float(last["val_accuracy"])}
    row |= {"macs_share": float(last["macs"]) / channels.cost()["macs"], "widths": result.widths["tailored"].tolist()}
    row["multiple"] = result.report.get("multiple")
    return row | {"history": result.history[["epoch", "train_loss", "val_accuracy"]].to_dict("list")}, result.model


def macs_share(
    model, channels: tcp.Channels, place: tcp.Latency, train, share: float, multiple: int, precision: str
) -> float:
    """Return the largest share of the macs at which the best units of the trained network take nearly ``share`` of its
    latency.

    Latency does not rise evenly with macs, so a grid of shares is tried, not halved: quickly, each beside the dense
    network, then all that come near in turns and for longer.

    Raises:
        RuntimeError: if none comes within a twentieth of it, for the comparison would not be at the same latency.
    """
    measured = pruner("taylor", {"macs": 0.5}, train=train, batches=100, precision=precision)(model, channels, 1000)
    quick, sets = copy.copy(place), {}
    quick.seconds = 1.0
    for macs in MACS:
        try:
            controller = Controller(channels, {"macs": macs}, steps=1000, multiple=multiple)
        except tcp.BudgetError:  # below the smallest network of such widths
            continue
        controller.importance = measured.limits.importance
        open_units = controller.choose(controller.score())
        timing, dense = quick.networks(model, channels, [open_units, None])
        if abs(timing.ms / dense.ms - share) < 0.15 * share:
            sets[macs] = open_units
    *timings, dense = place.networks(model, channels, [*sets.values(), None])
    tried = {macs: timing.ms / dense.ms for macs, timing in zip(sets, timings, strict=True)}
    print({macs: round(found, 3) for macs, found in tried.items()}, flush=True)
    near = [macs for macs, found in tried.items() if 0.95 * share <= found <= share]
    if not near:
        raise RuntimeError(f"no macs budget takes 95 to 100 % of {share:.0%} of the latency; tried: {tried}")
    return max(near)


if __name__ == "__main__":
    main()
