"""Seconds that trace() takes on ten ImageNet networks at 224 x 224, beside one forward pass of the dense network.

python benchmarks/tracing_time.py --out results/tracing_time.json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from tcp_core import trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

SIZE = 224
REPEATS = 3
NETWORKS = (
    "resnet50",
    "mobilenet_v2",
    "densenet201",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "regnet_y_400mf",
    "googlenet",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
)


def seconds(function):
    """Return the median wall-clock time of REPEATS calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(name):
    """Return one row of results for network `name`: its units and the two times."""
    model = zoo.build(name, size=SIZE)
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    model(x)  # the first pass chooses kernels
    forward, tracing = seconds(lambda: model(x)), seconds(lambda: trace(model, x))
    units = trace(model, x).units
    return {"model": name, "units": units, "trace_seconds": tracing, "forward_seconds": forward}


def main():
    """Measure, print a table and write it with the conditions to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'model':20s} {'units':>7s} {'trace, s':>9s} {'forward, s':>11s} {'ratio':>6s}")
    for name in NETWORKS:
        row = measure(name)
        rows.append(row)
        ratio = row["trace_seconds"] / row["forward_seconds"]
        print(
            f"{name:20s} {row['units']:7,d} {row['trace_seconds']:9.2f} {row['forward_seconds']:11.3f} {ratio:6.1f}",
            flush=True,
        )
    conditions = {
        "image_size": SIZE,
        "batch": 1,
        "repeats": REPEATS,
        "statistic": "median",
        "threads": arguments.threads,
        "device": "cpu",
        "processor": platform.machine(),
        "torch": torch.__version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
