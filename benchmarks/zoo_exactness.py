"""Closed against removed, and predicted against counted cost, on every torchvision classifier up to 100 M parameters,
or on the smallest network of each of timm's families.

Prints one row a network and appends it to --out; what the file already has is not done again.

    python benchmarks/zoo_exactness.py --out results/benchmarks/zoo_exactness.csv
    python benchmarks/zoo_exactness.py --timm --subsets 5 --out results/benchmarks/zoo_exactness_timm.csv
"""

import argparse
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo


def main():
    """Run the check for every network that --out does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to append to")
    parser.add_argument("--subsets", type=int, default=30, help="random sets of closed units a network")
    parser.add_argument("--names", nargs="*", default=None, help="these networks only")
    parser.add_argument("--timm", action="store_true", help="timm's instead of torchvision's")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if arguments.out.exists():
        with arguments.out.open(newline="") as file:
            done = {row["model"] for row in csv.DictReader(file)}
    for name in arguments.names or (zoo.timm_names() if arguments.timm else zoo.names()):
        if name in done:
            continue
        row = zoo.exactness(name, arguments.subsets)
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if not done:
                writer.writeheader()
            writer.writerow(row)
        done.add(name)
        print(
            f"{name:30s} {row['params'] / 1e6:6.2f} M  units {row['units']:6,d}  prunable {row['prunable']:6,d}  "
            f"unknown {row['unknown']:3d}  trace {row['trace_seconds']:6.2f} s  subsets {row['subsets']}  "
            f"error {row['max_relative_error']:.1e}  cost mismatches {row['cost_mismatches']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
