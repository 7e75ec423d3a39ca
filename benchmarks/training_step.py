"""What tailoring costs and saves per training step, measured side by side in one process.

For one network: a dense step, a gated step (the pruning phase), the controller's share of it, and a step of the
tailored network, with the widths that a run of `multiples.py` left. From these and the length of the phase follows the
wall-clock of a whole tailored run over a dense run. Steps of all kinds are interleaved, and medians compared, so that
other load on the machine hits them alike.

    python benchmarks/training_step.py --network resnet56 --multiple 8 --out build/step.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import tcp_core as tcp
from tcp_core import nets
from tcp_core.maturity import phase_of
from tcp_core.study.results import environment

RUN_STEPS = 7_020  # 20 epochs of CIFAR-10's training images without 5,000, in batches of 128
PHASE = phase_of(1.0, RUN_STEPS)  # of a trained network
WIDTHS = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "multiples.json"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, choices=sorted(set(nets.NETWORKS) - {"small_resnet"}))
    parser.add_argument("--widths", type=Path, default=WIDTHS, help="what multiples.py left")
    parser.add_argument("--macs", type=float, default=0.5, help="of which budget")
    parser.add_argument("--multiple", type=int, default=8, help="of which widths")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(options.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (options.batch_size,))
    dense = nets.build(options.network, num_classes=10)
    channels = tcp.trace(dense, x[:2])
    key = {"network": options.network, "macs": options.macs, "multiple": options.multiple, "seed": 0}
    rows = [row for row in json.loads(options.widths.read_text())["rows"] if key.items() <= row.items()]
    if not rows:
        parser.error(f"{options.widths} has no run of {key}: run multiples.py")
    open_units = open_as_in(channels, pd.Series(rows[0]["widths"]))
    small = tcp.remove(dense, channels, open_units)
    threads = sorted({1, torch.get_num_threads()})
    rows = [
        measure(dense, channels, small, x, y, precision, count, options.repeats)
        for precision in ("bf16", "fp32")
        for count in threads
    ]
    macs = channels.cost(open_units)["macs"] / channels.cost()["macs"]
    print(f"{options.network} at {macs:.2%} macs, batches of {options.batch_size}")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    if options.out:
        result = {
            "network": options.network,
            "macs": macs,
            "multiple": options.multiple,
            "batch_size": options.batch_size,
            "phase": PHASE,
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result | environment("cpu"), indent=2) + "\n")


def open_as_in(channels: tcp.Channels, widths: pd.Series) -> torch.Tensor:
    """Return open units, bool ``[units]``, with as many of each layer's outputs as a finished run left.

    Where a layer's outputs are of several families, as in streams that grow by padding, all but one must be told by
    other layers; what no layer tells stays open.
    """
    open_units = torch.ones(channels.units, dtype=torch.bool)
    family_of = torch.full((channels.units,), -1)
    for index, family in enumerate(channels.families):
        family_of[family.units] = index
    known: set[int] = set()
    progress = True
    while progress:
        progress = False
        for layer in channels.layers:
            units = layer.out_units[layer.out_units >= 0]
            unknown = set(family_of[units].tolist()) - known
            if len(unknown) != 1:
                continue
            (index,) = unknown
            others = int(open_units[units[family_of[units] != index]].sum()) + len(layer.out_units) - len(units)
            own = channels.families[index].units
            if int((family_of[units] == index).sum()) == len(own):
                open_units[own[int(widths[layer.name]) - others :]] = False
                known.add(index)
                progress = True
    return open_units


def measure(
    dense: nn.Module,
    channels: tcp.Channels,
    small: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    precision: str,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    """Return the ratios of gated and tailored to dense steps, and the controller's share of a gated step.

    Weights of both networks change.
    """
    torch.set_num_threads(threads)
    tailor = tcp.Tailor(dense, x[:2], budget={"macs": 0.5}, steps=RUN_STEPS, phase=PHASE, channels=channels)
    controller = tailor.controller
    controller.step_count = controller.start  # within the phase, where every interval is ranked
    controller.importance.uniform_()
    networks = {"dense": dense, "gated": tailor, "tailored": small}
    optimizers = {
        kind: torch.optim.SGD((small if kind == "tailored" else dense).parameters(), lr=1e-4, momentum=0.9)
        for kind in networks
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in (*networks, "controller")}
    for _ in range(repeats + 2):
        for kind, network in networks.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(network(x).float(), y)
            optimizers[kind].zero_grad()
            loss.backward()
            optimizers[kind].step()
            if kind == "gated":
                before = time.perf_counter()
                tailor.step()
                seconds["controller"].append(time.perf_counter() - before)
            seconds[kind].append(time.perf_counter() - started)
    median = {kind: statistics.median(values[2:]) for kind, values in seconds.items()}
    # Ranking happens every interval steps only: spread one over them.
    started = time.perf_counter()
    controller._rank()
    ranking = (time.perf_counter() - started) / controller.interval
    run = PHASE[1] * median["gated"] + (1 - PHASE[1]) * median["tailored"]
    return {
        "precision": precision,
        "threads": threads,
        "dense_step_s": median["dense"],
        "gated_over_dense": median["gated"] / median["dense"],
        "controller_share": (median["controller"] + ranking) / median["gated"],
        "tailored_over_dense": median["tailored"] / median["dense"],
        "run_over_dense_run": run / median["dense"],
    }


if __name__ == "__main__":
    main()
