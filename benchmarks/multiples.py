"""What widths in multiples cost in accuracy, and what they bring in time, at the same macs.

On images at half resolution, from published CIFAR-10 weights that are trained on with them first, once, or, where none
are given, from a network that is trained here. Each network is timed beside the dense one on images of 32 x 32, and so
is a step of its training. Rows that are there are not run again, and two processes of other networks may share the
output.

    python benchmarks/multiples.py --data cifar10-jpeg --weights weights --out results/benchmarks/multiples.json
"""

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from same_latency import RECIPE, add, given, halves, started, written
from training_step import measure

import tcp_core as tcp
from tcp_core import nets

SIZE = 32  # of the images that networks are timed with
NETWORKS = list(nets.NETWORKS)
PLACES = [(backend, batch) for backend in ("onnxruntime", "torch") for batch in (1, 64)]


def main() -> None:
    """Run what is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with <network>-cifar10.safetensors; without: trained here")
    parser.add_argument("--network", default="resnet56", choices=NETWORKS)
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5])
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 8, 16, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--start-epochs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/multiples"), help="the networks that runs start from")
    options = given(parser, table)
    train, val = halves(options.data, options.images)
    model = (adapted if options.weights else started)(options, train, val)
    for macs, seed, multiple in itertools.product(options.macs, options.seeds, options.multiples):
        key = {"network": options.network, "macs": macs, "multiple": multiple, "seed": seed, "epochs": options.epochs}
        key |= {"images": options.images, "start": "published" if options.weights else "trained here"}
        if any(key.items() <= row.items() for row in written(options.out)["rows"]):
            continue
        how = {"epochs": options.epochs, "lr": 0.04, "seed": seed, "precision": options.precision, **RECIPE}
        try:
            result = tcp.fit(copy.deepcopy(model), train, val, budget={"macs": macs}, multiple=multiple, **how)
        except tcp.BudgetError as error:  # the smallest network of such widths has more macs
            add(options.out, key | {"refused": str(error)})
            continue
        last, report = result.history.iloc[-1], result.report
        row = key | {"start_epochs": options.start_epochs, "precision": options.precision}
        row |= {"train_loss": float(last["train_loss"]), "val_accuracy": float(last["val_accuracy"])}
        row |= {
            "utilisation": report["utilisation"]["macs"],
            "widths": result.widths.set_index("layer")["tailored"].to_dict(),
        }
        row["timings"] = list(timings(result.model, model))
        row["training"] = training(result.model, model)
        print(json.dumps(row), flush=True)
        add(options.out, row)


def table(rows: list[dict]) -> str:
    """Return the rows as a table in Markdown; times are the dense network's over those of the tailored one."""
    head = [
        "network, budget",
        "widths",
        "loss / accuracy",
        "macs used",
        *(f"{place}, {batch}" for place, batch in PLACES),
    ]
    lines = [f"| {' | '.join([*head, 'training step'])} |", "| --- | --- |" + " --: |" * (len(head) - 1)]
    before = None
    for row in sorted(rows, key=lambda row: (*_setting(row), row["multiple"])):
        network, macs, seed = _setting(row)
        title = f"{NETWORKS[network]}, {-macs:.0%}" + (f", seed {seed}" if seed else "")
        widths = "any" if row["multiple"] == 1 else f"multiples of {row['multiple']}"
        cells = ["" if before == _setting(row) else title, widths, *_cells(row)]
        lines.append(f"| {' | '.join(cells)} |")
        before = _setting(row)
    return "\n".join(lines)


def _setting(row: dict) -> tuple[int, float, int]:
    return NETWORKS.index(row["network"]), -row["macs"], row["seed"]


def _cells(row: dict) -> list[str]:
    if "refused" in row:
        return ["cannot be met", *["-"] * (len(PLACES) + 2)]
    faster = [each["dense_ms"] / each["ms"] for each in row["timings"]]
    faster.append(1 / row["training"]["tailored_over_dense"])
    said = [f"{row['train_loss']:.3f} / {row['val_accuracy']:.1%}", f"{row['utilisation'] * row['macs']:.1%}"]
    return said + [f"{each:.2f}" for each in faster]


def adapted(options: argparse.Namespace, train, val) -> torch.nn.Module:
    """Return the network that all runs start from: the published one, trained on with these images."""
    start = options.work / f"{options.network}-published-{options.start_epochs}-epochs-{options.images}-images.pt"
    model = nets.build(options.network, num_classes=len(train.classes))
    if not start.exists():
        nets.load_weights(model, options.weights / f"{options.network}-cifar10.safetensors")
        how = {"epochs": options.start_epochs, "lr": 0.04, "precision": options.precision, **RECIPE}
        start.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tcp.fit(model, train, val, **how).model.state_dict(), start)
    model.load_state_dict(torch.load(start, weights_only=True))
    return model


def timings(small: torch.nn.Module, dense: torch.nn.Module):
    """Yield, for each place, milliseconds of both networks, measured side by side, and their larger spread."""
    example = torch.randn(2, 3, SIZE, SIZE)
    for backend, batch in PLACES:
        ours, whole = tcp.Latency(backend, batch=batch, threads=1, noise=1.0).timings([small, dense], example)
        spread = max(ours.spread, whole.spread)
        yield {"backend": backend, "batch": batch, "ms": ours.ms, "dense_ms": whole.ms, "spread": spread}


def training(small: torch.nn.Module, dense: torch.nn.Module) -> dict[str, float]:
    """Return what a step of the tailored network's training takes, of the dense one's, in fp32 on one thread."""
    small, dense = copy.deepcopy(small), copy.deepcopy(dense)  # they are trained on
    x = torch.randn(RECIPE["batch_size"], 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (len(x),))
    return measure(dense, tcp.trace(dense, x[:2]), small, x, y, "fp32", threads=1, repeats=7)


if __name__ == "__main__":
    main()
