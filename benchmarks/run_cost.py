"""Seconds per epoch of a tailored run beside a dense run of an ImageNet-sized network, and what a whole run costs.

Two runs from the same weights take turns, step by step, so that other load on the machine hits them alike: a dense one
and one with a Tailor at a trained network's phase. The Tailor believes in a run whose phase ends after `--gated-epochs`
short epochs; there it shrinks the network, and both go on for `--tailored-epochs`. Pixels and labels are random and
weights untrained. Times do not depend on that, but the widths do, and the Tailor's are extreme: of the last layers
little is left. So other networks of the same macs are timed beside it, every second step:

- rounded: the Tailor's widths, rounded to multiples of 8
- uniform: every family of units keeps the same share

With g and t the median ratios of a gated and a tailored step to the dense step taken just before it, and e the share
of the run at which the phase ends, whole run / dense run = e * g + (1 - e) * t.

    python benchmarks/run_cost.py --precision bf16 --threads 2 --out build/benchmarks/run_cost_bf16_2_threads.json
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile
from torchvision import models
from training_step import open_as_in

import tcp_core as tcp
from tcp_core.maturity import PHASE_TRAINED
from tcp_core.selection import fill
from tcp_core.study.criteria import uniform_l1
from tcp_core.study.results import environment
from tcp_core.training.batches import channels_last
from tcp_core.training.evaluation import PRECISIONS, autocast

GOAL = 0.7
MULTIPLE = 8
PHASE_END = PHASE_TRAINED[1]


class Training:
    """A network, its optimiser and one batch."""

    def __init__(self, network: nn.Module, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        self.network, self.x, self.y, self.dtype = network, channels_last(x), y, PRECISIONS[precision]
        trained = network.model if isinstance(network, tcp.Tailor) else network
        self.optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9)

    def step(self) -> float:
        """Take one step; return its seconds, without a Tailor's own."""
        started = time.perf_counter()
        with autocast(self.x.device, self.dtype):
            logits = self.network(self.x)
        loss = F.cross_entropy(logits.float(), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started

    def operators(self) -> dict[str, float]:
        """Return the seconds of the faster of two steps by kind of operator, as torch's profiler has them."""
        steps = []
        for _ in range(2):
            with profile() as profiled:
                steps.append((self.step(), profiled))
        total, profiled = min(steps, key=lambda step: step[0])
        spent = {"convolution": 0.0, "batch norm": 0.0, "optimiser": 0.0, "copies and casts": 0.0}
        for event in profiled.key_averages():
            for kind, part in (("convolution", "conv"), ("batch norm", "batch_norm"), ("copies and casts", "copy")):
                if part in event.key:
                    spent[kind] += event.self_cpu_time_total / 1e6
                    break
            if event.key.startswith("Optimizer.step"):
                spent["optimiser"] += event.cpu_time_total / 1e6
        return spent | {"rest (activations, additions, pooling ...)": total - sum(spent.values()), "step": total}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="one of torchvision's")
    parser.add_argument("--macs", type=float, default=0.5, help="the budget")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=7, help="of a short epoch")
    parser.add_argument("--gated-epochs", type=int, default=2)
    parser.add_argument("--tailored-epochs", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)

    macs, ratios = result["macs"], result["run_over_dense_run"]
    print(f"{options.network}, {options.precision}, {options.threads} threads, {options.batch_size} x {options.size}^2")
    print(pd.DataFrame(result["epochs"]).to_string(index=False, float_format="{:.3f}".format))
    for kind, seconds in result["step_s"].items():
        whole = "" if kind not in ratios else f"   whole run / dense run {ratios[kind]:.3f}, goal {GOAL}"
        print(f"{kind:10}{macs[kind]:8.2%} macs{seconds:8.3f} s{result['step_over_dense'][kind]:7.3f} x{whole}")
    print(
        f"controller {result['controller_s']:.4f} s a step, ranking included; shrinking {result['shrink_s']:.2f} s once"
    )
    print(pd.DataFrame(result["operators_s"]).to_string(float_format="{:.3f}".format))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result | environment("cpu"), indent=2) + "\n")


def measure(options: argparse.Namespace) -> dict:
    """Return epochs, median steps, the whole run's ratio, and where a step's time goes."""
    torch.manual_seed(0)
    model = models.get_model(options.network, weights=None)
    x = torch.randn(options.batch_size, 3, options.size, options.size)
    y = torch.randint(1000, (options.batch_size,))
    gated_steps = options.gated_epochs * options.batches
    tailor = tcp.Tailor(
        copy.deepcopy(model),
        x[:2],
        budget={"macs": options.macs},
        steps=round(gated_steps / PHASE_END),
        phase=PHASE_TRAINED,
    )
    channels, dense_cost = tailor.channels, tailor.controller.dense
    dense, tailored = Training(model, x, y, options.precision), Training(tailor, x, y, options.precision)
    dense.step()  # the first step chooses kernels and allocates
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    controller: list[float] = []

    def note(kind: str, took: float) -> float:
        seconds.setdefault(kind, []).append(took)
        ratios.setdefault(kind, []).append(took / seconds["dense"][-1])
        return took

    epochs, others, shrink, cost = [], {}, 0.0, {"dense": dense_cost, "gated": dense_cost}
    for epoch in range(options.gated_epochs + options.tailored_epochs):
        row = {"epoch": epoch + 1, "dense_s": 0.0, "tailored_s": 0.0, "macs": channels.cost(tailor.open_units)["macs"]}
        for batch in range(options.batches):
            row["dense_s"] += note("dense", dense.step())
            if tailor.shrunk:
                row["tailored_s"] += note("tailored", tailored.step())
                for kind, training in others.items() if batch % 2 else ():
                    note(kind, training.step())
                continue
            took = tailored.step()
            started = time.perf_counter()
            tailor.step(tailored.optimizer)
            own = time.perf_counter() - started
            row["tailored_s"] += took + own
            if not tailor.shrunk:
                note("gated", took + own)
                controller.append(own)
                continue
            shrink = own
            cost["tailored"] = channels.cost(tailor.open_units)
            for kind, open_units in same_macs(model, tailor).items():
                cost[kind] = channels.cost(open_units)
                small = tcp.remove(model, channels, open_units, verify=False)
                others[kind] = Training(small, x, y, options.precision)
                others[kind].step()
        epochs.append(row)
    ratio = {kind: statistics.median(values) for kind, values in ratios.items()}
    given = ("network", "size", "batch_size", "batches", "precision")
    return {
        **{name: getattr(options, name) for name in given},
        "macs": {kind: values["macs"] / dense_cost["macs"] for kind, values in cost.items()},
        "params": {kind: values["params"] / dense_cost["params"] for kind, values in cost.items()},
        "multiple_of_rounded": MULTIPLE,
        "epochs": epochs,
        "step_s": {kind: statistics.median(values) for kind, values in seconds.items()},
        "step_over_dense": ratio,
        "controller_s": statistics.median(controller),
        "shrink_s": shrink,
        "phase_end": PHASE_END,
        "run_over_dense_run": {
            kind: PHASE_END * ratio["gated"] + (1 - PHASE_END) * ratio[kind] for kind in ("tailored", *others)
        },
        "goal": GOAL,
        "operators_s": {
            kind: training.operators()
            for kind, training in (("dense", dense), ("tailored", tailored), ("uniform", others["uniform"]))
        },
        "widths": channels.widths(tailor.open_units),
    }


def same_macs(model: nn.Module, tailor: tcp.Tailor) -> dict[str, torch.Tensor]:
    """Return other sets of open units, bool ``[units]``, of about the macs that the Tailor's has."""
    channels = tailor.channels
    widths = pd.Series(channels.widths(tailor.open_units))
    return {
        "rounded": open_as_in(channels, ((widths / MULTIPLE).round() * MULTIPLE).clip(lower=MULTIPLE)),
        "uniform": fill(channels, uniform_l1(model, tailor.controller), tailor.controller.bounds),
    }


if __name__ == "__main__":
    main()
