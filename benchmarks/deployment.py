"""How fast tailored networks are where they run: onnxruntime and torch, one thread, beside the dense network.

Per network the dense one and networks of half its macs, all with random weights, which times do not depend on:

- run: the widths of a finished run of the study, where there is one
- any, multiples of 4, multiples of 8: random choices of units, singly or in blocks, that fill the budget

In each round every network of a group runs once, in changing order; medians, quartiles and the medians of the rounds'
ratios are kept, by wall clock and by the processor time of the one thread. The two differ by what else the machine did.

    python benchmarks/deployment.py --out build/benchmarks/deployment.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from training_step import open_as_in

import tcp_core as tcp
from tcp_core import nets
from tcp_core.deploy import running, timing
from tcp_core.selection import fill
from tcp_core.study.results import environment

MACS = 0.5
RUNS = Path(__file__).resolve().parents[1] / "results" / "runs"
TINY = "tiny-imagenet-cpu"
# name: network, classes, side of the images, batches, folder of a finished run
NETWORKS = {
    "ResNet-20": ("resnet20", 10, 32, (1, 64), "cifar10-cpu/pretrained/tailored-macs0.5-seed0"),
    "ResNet-56": ("resnet56", 10, 32, (1, 64), "cifar10-cpu/resnet56/tailored-macs0.5"),
    "ResNet-18, small stem": ("resnet18_small_stem", 100, 64, (1, 64), f"{TINY}/resnet18/tailored-macs0.5-seed0"),
    "MobileNetV2": ("imagenet_mobilenet_v2", 100, 224, (1, 16), f"{TINY}/mobilenet_v2/tailored-macs0.5-seed0"),
    "ResNet-50": ("imagenet_resnet50", 1000, 224, (1, 16), None),
}
MULTIPLES = {"any": 1, "multiples of 4": 4, "multiples of 8": 8}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--files", type=Path, help="folder that ONNX files are kept in and read from again")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each network, batch, runtime and clock")
    parser.add_argument("--beside", default="", help="what else the machine did, to be written down")
    parser.add_argument("--export-only", action="store_true", help="write the ONNX files and measure nothing")
    parser.add_argument("--out", type=Path, help="in an older file of this name only what is measured now is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, loads = [], [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.networks:
            rows += measure(name, options.files or Path(temporary), 0 if options.export_only else options.seconds)
            loads.append(os.getloadavg()[0])
    if options.export_only:
        return
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    if options.out:
        if options.out.exists():  # of networks that were not measured now
            rows = [
                row for row in json.loads(options.out.read_text())["rows"] if row["network"] not in options.networks
            ] + rows
            rows.sort(key=lambda row: list(NETWORKS).index(row["network"]))
        result = {"threads": 1, "macs": MACS, "rows": rows, "load": loads, "beside": options.beside}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result | environment("cpu"), indent=2) + "\n")


def measure(name: str, folder: Path, seconds: float) -> list[dict]:
    """Return one row a choice of widths, runtime and batch of the network of that name."""
    network, _, side, batches, _ = NETWORKS[name]
    models, costs = variants(name)
    example = torch.randn(2, 3, side, side)
    files = {}
    for kind, model in models.items():
        files[kind] = folder / f"{network}_{kind.replace(' ', '_')}.onnx"
        if not files[kind].exists():
            tcp.export(model, files[kind], example)
    if not seconds:
        return []
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, side, side)
        groups = {
            "onnxruntime": {kind: running.call(path, x) for kind, path in files.items()},
            "torch": {kind: running.torch_call(model, x) for kind, model in models.items()},
        }
        for runtime, calls in groups.items():
            wall, cpu = (timed(calls, seconds, clock) for clock in (time.perf_counter, time.process_time))
            quicker = timing.summary(cpu)["speedup"]
            for kind, row in timing.summary(wall).iterrows():
                rows.append(
                    {
                        **{"network": name, "image": side, "runtime": runtime, "batch": batch, "widths": kind},
                        **{"macs": costs[kind] / costs["dense"], "rounds": len(wall)},
                        **{key: round(float(value), 4) for key, value in row.items()},
                        "speedup_cpu": round(float(quicker[kind]), 4),
                    }
                )
        print(name, batch, pd.DataFrame(rows[-2 * len(models) :]).to_string(index=False), sep="\n", flush=True)
    return rows


def timed(calls: dict, seconds: float, clock) -> pd.DataFrame:
    """Return times of as many rounds as fit in so many seconds, 5 at least."""
    one = timing.interleaved(calls, rounds=1, warmup=1).iloc[0].sum() / 1e3
    return timing.interleaved(calls, rounds=min(200, max(5, round(seconds / one))), warmup=0, clock=clock)


def variants(name: str) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Return the networks that are timed, the dense one first, and their macs."""
    network, classes, side, _, run = NETWORKS[name]
    torch.manual_seed(0)
    dense = nets.build(network, num_classes=classes)
    channels = tcp.trace(dense, torch.randn(2, 3, side, side))
    bounds = tcp.Budget(macs=MACS).resolve(channels.cost())
    score = torch.rand(channels.units)
    opened = {}
    if run is not None:
        widths = pd.read_csv(RUNS / run / "widths.csv").set_index("layer")["tailored"]
        opened["run"] = open_as_in(channels, widths)
        assert channels.widths(opened["run"]) == widths.to_dict()
    opened |= {kind: fill(channels, score, bounds, multiple=multiple) for kind, multiple in MULTIPLES.items()}
    costs = {"dense": channels.cost()["macs"]} | {kind: channels.cost(units)["macs"] for kind, units in opened.items()}
    return {"dense": dense} | {kind: tcp.remove(dense, channels, units) for kind, units in opened.items()}, costs


if __name__ == "__main__":
    main()
