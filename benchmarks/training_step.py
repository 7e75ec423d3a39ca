"""What tailoring costs and saves per training step, measured side by side in one process.

For one network: a dense step, a gated step (the pruning phase), the controller's share of it, and a step of the network
tailored to half the macs. From these and the length of the phase follows the wall-clock of a whole tailored run over a
dense run. Steps of all kinds are interleaved, and medians compared, so that other load on the machine hits them alike.

    python benchmarks/training_step.py --network resnet56 --out build/benchmarks/training_step.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import tcp_core as tcp
from tcp_core import nets
from tcp_core.results import environment


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20", choices=sorted(set(nets.NETWORKS) - {"small_resnet"}))
    parser.add_argument("--macs", type=float, default=0.5, help="budget, as a fraction of the dense network's")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(options.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (options.batch_size,))
    steps, phase = 10_000, (0.05, 0.3)
    kinds = {}
    for kind in ("dense", "gated", "tailored"):
        model = nets.build(options.network, num_classes=10)
        network, tailor = model, None
        if kind != "dense":
            # A run of 48 steps freezes at once; one of 10,000 stays in its phase while it is measured.
            tailor = tcp.Tailor(
                model, x[:2], budget={"macs": options.macs}, steps=48 if kind == "tailored" else steps, phase=phase
            )
            network = tailor
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        kinds[kind] = (network, tailor, optimizer)

    def step(kind: str) -> tuple[float, float]:
        network, tailor, optimizer = kinds[kind]
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = F.cross_entropy(network(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = time.perf_counter()
        if tailor is not None:
            tailor.step(optimizer)
        ended = time.perf_counter()
        return ended - started, ended - before

    while not kinds["tailored"][1].frozen:
        step("tailored")
    controller = kinds["gated"][1].controller
    controller.step_count = controller.start  # measure within the phase, where every interval is ranked
    controller.importance.uniform_()
    seconds = {kind: [] for kind in kinds}
    controlled = []
    for repeat in range(options.repeats + 2):
        for kind in kinds:
            whole, control = step(kind)
            if repeat >= 2:
                seconds[kind].append(whole)
                if kind == "gated":
                    controlled.append(control)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    # Ranking happens every interval steps only: spread it over them.
    ranked = time.perf_counter()
    controller._rank()
    ranked = time.perf_counter() - ranked
    control = statistics.median(controlled) + ranked / controller.interval
    share = phase[1]
    result = {
        "network": options.network,
        "macs": options.macs,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "dense_step_s": median["dense"],
        "gated_over_dense": median["gated"] / median["dense"],
        "controller_share": control / median["gated"],
        "ranking_s": ranked,
        "tailored_over_dense": median["tailored"] / median["dense"],
        "run_over_dense_run": (share * median["gated"] + (1 - share) * median["tailored"]) / median["dense"],
        "repeats": options.repeats,
        **environment("cpu"),
    }
    for name, value in result.items():
        print(f"{name:22} {value:.4g}" if isinstance(value, float) else f"{name:22} {value}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
