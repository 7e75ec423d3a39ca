"""Latency budgets, bound against delivered: networks x backends x batch sizes, each chosen, removed and measured.

No training: units have fixed made-up importances, which the controller ranks as in a run; table, closed loop and
removal are those of a run. Each row says how long the table took, what was delivered as the run measured it, and what
the removed network takes beside the dense one when both are measured once more, for longer, at the end. Rows that are
in the output already are not measured again.

    python benchmarks/latency_budget.py --out results/benchmarks/latency_budget.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torchvision

import tcp_core as tcp
from tcp_core import nets
from tcp_core.controller import Controller
from tcp_core.cost import Budget
from tcp_core.study.results import environment

NETWORKS = {
    "resnet20": 32,
    "resnet56": 32,
    "resnet18_small_stem": 64,
    "mobilenet_v2": 224,
    "resnet50": 224,
    "efficientnet_b0": 224,
}
STEPS = 200


def main() -> None:
    """Measure what is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "torch"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--device", default="cpu", help="where torch runs; a file holds the rows of one device")
    parser.add_argument("--latency", type=float, default=0.5, help="share of the dense network's latency")
    parser.add_argument("--macs", action="store_true", help="budget the same share of macs instead, multiple='auto'")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement in the loop")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, to be told with the numbers")
    parser.add_argument("--tables", type=Path, default=Path("build/latency"))
    parser.add_argument(
        "--table", action="store_true", help="print the rows that there are as a table, measure nothing"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    if options.table:
        print(table(content["rows"]))
        return
    budget = "macs" if options.macs else "latency"
    for network in options.networks:
        for backend in options.backends:
            for batch in options.batches:
                key = {
                    "network": network,
                    "backend": backend,
                    "batch": batch,
                    "budget": budget,
                    "share": options.latency,
                }
                if any(key.items() <= row.items() for row in content["rows"]):
                    continue
                try:
                    row = key | measure(network, backend, batch, budget, options)
                except tcp.LatencyError as error:  # too noisy now: this row is left for another time
                    print(network, backend, batch, error, flush=True)
                    continue
                print(json.dumps(row), flush=True)
                content["rows"].append(row | {"beside": options.beside})
                content |= environment(options.device)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """Return the rows with a budget of latency as a table in Markdown."""
    head = "network | backend | batch | dense, ms | bound, ms | delivered, ms | of bound | spread | once more, of dense"
    head += " | spread | macs | multiple | networks | table, s"
    lines = [f"| {head} |", "| --- | --- |" + " --: |" * 12]
    for row in sorted(rows, key=lambda row: (list(NETWORKS).index(row["network"]), row["backend"], row["batch"])):
        if row["budget"] == "latency":
            cells = [row["network"], row["backend"], row["batch"]]
            cells += [f"{row[name]:.3g}" for name in ("dense", "bound", "latency")]
            cells += [f"{row['latency'] / row['bound']:.1%}", f"{row['spread']:.1%}"]
            cells += [f"{row[name]:.1%}" for name in ("again_share", "again_spread", "macs_share")]
            cells += [row["multiple"], row["networks"], f"{row['seconds_table']:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def measure(network: str, backend: str, batch: int, budget: str, options: argparse.Namespace) -> dict:
    """Return one row."""
    torch.manual_seed(0)
    size = NETWORKS[network]
    # nets' own mobilenet_v2 is for small images: at 224 it would have nine times the macs
    dense = torchvision.models.get_model(network) if size == 224 else nets.build(network, num_classes=10)
    channels = tcp.trace(dense, torch.randn(2, 3, size, size))
    table = options.tables / f"{network}-{backend}-{batch}.json"
    device = "cpu" if backend == "onnxruntime" else options.device
    place = tcp.Latency(backend, batch=batch, device=device, table=table, seconds=options.seconds, noise=options.noise)
    started = time.perf_counter()
    cost = place.cost(dense, channels)
    seconds = {"table": time.perf_counter() - started}
    started = time.perf_counter()
    controller = Controller(
        channels,
        Budget(**{budget: options.latency}),
        steps=STEPS,
        multiple=place.likes(cost),
        latency=cost if budget == "latency" else None,
    )
    gradient = importance(channels)
    while not controller.frozen:
        controller.update(gradient)
    seconds["run"] = time.perf_counter() - started
    open_units = (controller.gate > 0).cpu()
    if budget == "latency":
        ours = controller.measured | {"bound": controller.bounds["latency"], "dense": controller.dense["latency"]}
    else:
        ours = {"utilisation": channels.cost(open_units)["macs"] / controller.bounds["macs"]}
    place.seconds *= 3
    small, whole = place.networks(dense, channels, [open_units, None])
    return {
        "multiple": controller.multiple,
        "steps": list(cost.grids.steps),
        **{f"seconds_{name}": round(value, 1) for name, value in seconds.items()},
        **ours,
        "again_ms": small.ms,
        "again_dense_ms": whole.ms,
        "again_share": small.ms / whole.ms,
        "again_spread": max(small.spread, whole.spread),
        "macs_share": channels.cost(open_units)["macs"] / channels.cost()["macs"],
    }


def importance(channels: tcp.Channels) -> torch.Tensor:
    """Return made-up gradients of the gates, [units], that differ within layers and between them."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.rand(channels.units, generator=generator) + 0.1
    for family in channels.families:
        gradient[family.units] *= 0.5 + torch.rand((), generator=generator)
    return gradient


if __name__ == "__main__":
    main()
