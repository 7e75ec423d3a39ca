"""Where a training step's time goes, dense beside tailored, and what faster optimisers and layouts would bring.

ResNet-20 and ResNet-56, batches of 128 at 32 x 32, the widths of runs at half of the macs. Kinds of operators are
torch's profiler's; the choices (fused and foreach SGD, weights in channels_last) take turns, by the processor time of
one thread. Each choice is also compared with the default bit for bit after three steps.

    python benchmarks/step_parts.py --out build/benchmarks/step_parts.json
"""

import argparse
import copy
import json
import re
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile
from training_step import open_as_in

import tcp_core as tcp
from tcp_core import nets
from tcp_core.deploy import timing
from tcp_core.study.results import environment

WIDTHS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"
KINDS = {
    "convolution": "convolution|mkldnn",
    "batch norm": "batch_norm",
    "additions": "^aten::add_?$",
    "activations": "relu|threshold|clamp_min",
    "casts and copies": "copy",
}
CHOICES = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}, "weights in channels_last": {}}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts, choices = [], []
    for name in options.networks:
        dense = nets.build(name, num_classes=10)
        channels = tcp.trace(dense, torch.randn(2, 3, 32, 32))
        widths = pd.read_csv(WIDTHS / f"widths_{name}.csv").set_index("layer")["tailored"]
        models = {"dense": dense, "tailored": tcp.remove(dense, channels, open_as_in(channels, widths))}
        for precision in ("fp32", "bf16"):
            for kind, model in models.items():
                where = {"network": name, "precision": precision, "kind": kind}
                parts.append(where | operators(Training(model, precision)))
            choices += compared(models["tailored"], {"network": name, "precision": precision}, options.rounds)
    norms = batch_norms(3 * options.rounds)
    print(pd.DataFrame(norms).to_string(index=False, float_format="{:.2f}".format))
    print(pd.DataFrame(parts).to_string(index=False, float_format="{:.1f}".format))
    print(pd.DataFrame(choices).to_string(index=False, float_format="{:.3f}".format))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"threads": 1, "batch_size": 128, "operators_ms": parts, "choices": choices, "batch_norm_ms": norms}
        options.out.write_text(json.dumps(result | environment("cpu"), indent=2) + "\n")


class Training:
    """A copy of a network, its optimiser and one batch."""

    def __init__(self, model: nn.Module, precision: str, *, choice: str = "default") -> None:
        torch.manual_seed(0)
        self.model = copy.deepcopy(model).train()
        if choice == "weights in channels_last":
            self.model.to(memory_format=torch.channels_last)
        self.x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (128,))
        self.precision = precision
        recipe = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **recipe, **CHOICES[choice])

    def step(self) -> None:
        """Take one step."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss = F.cross_entropy(self.model(self.x).float(), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def operators(training: Training) -> dict[str, float]:
    """Return milliseconds of processor time of a step by kind of operator, the fastest of three."""
    found = []
    training.step()
    for _ in range(3):
        started = time.process_time()
        with profile() as profiled:
            training.step()
        spent = dict.fromkeys(KINDS, 0.0)
        events = [event for event in profiled.key_averages() if not event.key.startswith("Optimizer")]
        for event in events:
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), None)
            if kind is not None:
                spent[kind] += event.self_cpu_time_total / 1e3
        step = sum(e.cpu_time_total / 1e3 for e in profiled.key_averages() if e.key.startswith("Optimizer.step"))
        whole = sum(event.self_cpu_time_total for event in profiled.key_averages()) / 1e3
        rest = whole - sum(spent.values()) - step
        found.append((time.process_time() - started, spent | {"optimiser": step, "rest": rest, "step": whole}))
    return min(found, key=lambda each: each[0])[1]


def batch_norms(rounds: int) -> list[dict]:
    """Return milliseconds of one batch norm, forward and backward, on maps of the first stage with so many channels."""
    rows = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        calls = {}
        for width in (16, 15, 13, 12, 8):
            x, gradient = (torch.randn(128, width, 32, 32).to(dtype) for _ in range(2))
            x, gradient = (each.contiguous(memory_format=torch.channels_last) for each in (x, gradient))
            norm, x = nn.BatchNorm2d(width), x.requires_grad_()
            calls[width] = lambda norm=norm, x=x, g=gradient: norm(x).backward(g)
        times = timing.summary(timing.interleaved(calls, rounds=rounds, clock=time.process_time))["ms"]
        rows += [{"precision": precision, "channels": width, "ms": ms} for width, ms in times.items()]
    return rows


def compared(model: nn.Module, where: dict, rounds: int) -> list[dict]:
    """Return how long each choice's step takes over the default's, and whether it computes the very same."""
    trainings = {choice: Training(model, where["precision"], choice=choice) for choice in CHOICES}
    for training in trainings.values():
        for _ in range(3):
            training.step()
    states = {choice: list(training.model.state_dict().values()) for choice, training in trainings.items()}
    same = {choice: all(map(torch.equal, states["default"], state)) for choice, state in states.items()}
    times = timing.interleaved(
        {choice: training.step for choice, training in trainings.items()},
        rounds=rounds,
        warmup=0,
        clock=time.process_time,
    )
    return [
        where | {"choice": choice, "ms": row["ms"], "over_default": 1 / row["speedup"], "same_bits": same[choice]}
        for choice, row in timing.summary(times).iterrows()
    ]


if __name__ == "__main__":
    main()
