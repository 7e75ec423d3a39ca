"""What tailoring costs beside training, from ResNet-50 to ConvNeXt-XL (350 M parameters); CPU only.

For each network: trace; the controller's step, one re-ranking and the last one; what the gates add to a forward and
backward pass; removal to half the macs, AdamW's state carried along; a checkpoint with SGD's momentum and with
AdamW's moments (written and flushed to disk, then read after the system was told to forget it). The controller is
timed on more networks, and a line through its times against the number of units tells what others would cost.
Needs about 9 GB of memory for ConvNeXt-XL, and 5 GB of disk for a moment.

    python benchmarks/scale.py --out build/benchmarks/scale.json
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

import tcp_core as tcp
from tcp_core.controller import Controller
from tcp_core.gates import Gated, gated_parameters
from tcp_core.study.results import environment
from tcp_core.training import checkpoints
from tcp_core.verification import compare

SIZE = 224
BUDGET = {"macs": 0.5}
XL = [
    CNBlockConfig(256, 512, 3),
    CNBlockConfig(512, 1024, 3),
    CNBlockConfig(1024, 2048, 27),
    CNBlockConfig(2048, None, 3),
]
NETWORKS = {
    "resnet50": models.resnet50,
    "convnext_large": models.convnext_large,
    "convnext_xl": partial(models.ConvNeXt, XL, stochastic_depth_prob=0.5),
}
CONTROLLER_ALONE = {
    "resnet18": models.resnet18,
    "convnext_tiny": models.convnext_tiny,
    "convnext_base": models.convnext_base,
}


def seconds(function: Callable, repeats: int = 1) -> float:
    """Return the median seconds of `repeats` calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def controller_cost(channels: tcp.Channels) -> dict:
    """Return seconds of one step, of a re-ranking in the phase, and of the last, which exchanges units as well."""
    controller = Controller(channels, BUDGET, steps=100_000)
    gradient = torch.randn(channels.units, generator=torch.Generator().manual_seed(0))
    result = {"update_s": seconds(lambda: controller.update(gradient), 50)}  # before the phase: no ranking in it
    controller.importance = gradient.square()
    controller.step_count = (controller.start + controller.end) // 2
    result["rank_s"] = seconds(controller._rank, 5)
    controller.step_count = controller.end - controller.lookahead
    result["last_rank_s"] = seconds(controller._rank)
    result["open_units"] = ~controller.losing
    return result


def gate_cost(model: nn.Module, channels: tcp.Channels) -> dict:
    """Return seconds a step and bytes that multiplying parameters by gates takes, whatever the batch."""
    gated = Gated(model, channels)

    def forward() -> dict[str, torch.Tensor]:
        return gated_parameters(model, gated.sites, gated.gate)

    def both() -> None:
        outputs = list(forward().values())
        sources = [gated.gate, *(model.get_parameter(site.weight) for site in gated.sites)]
        torch.autograd.grad(outputs, sources, [output.detach() for output in outputs])

    with torch.no_grad():
        copied = sum(value.nbytes for value in forward().values())
        alone = seconds(forward, 3)
    return {
        "gates_forward_s": alone,
        "gates_forward_backward_s": seconds(both, 3),
        "gated_copies_bytes": copied,
        "gate_gradient_bytes": gated.gate.nbytes,
        "gate_index_bytes": sum(site.units.nbytes for site in gated.sites),
        "parameter_gradient_bytes": sum(p.nbytes for p in model.parameters()),
    }


def with_state(model: nn.Module, kind: type[torch.optim.Optimizer], **options) -> torch.optim.Optimizer:
    """Return an optimiser that has taken one step, and so has the state of a run; the gradients are dropped."""
    optimizer = kind(model.parameters(), lr=1e-6, **options)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def checkpoint_cost(model: nn.Module, optimizer: torch.optim.Optimizer, tailor: tcp.Tailor, folder: Path) -> dict:
    """Return bytes and seconds of a checkpoint as `fit` writes it."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruned": tailor.progress()}
    checkpoints.prepare(folder)
    started = time.perf_counter()
    path = checkpoints.write(folder, 1, state)
    result = {"write_s": time.perf_counter() - started, "bytes": path.stat().st_size}
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result["read_s"] = seconds(lambda: checkpoints.newest(folder))
    checkpoints.remove(folder)
    return result


def measure(build: Callable[[], nn.Module], folder: Path) -> dict:
    """Return all costs of one network."""
    model = build()
    example = torch.randn(1, 3, SIZE, SIZE)
    started = time.perf_counter()
    channels = tcp.trace(model, example)
    result = {"trace_s": time.perf_counter() - started, "units": channels.units, "families": len(channels.families)}
    result |= {"prunable": int(channels.prunable.sum()), **channels.cost()}
    model.eval()
    with torch.no_grad():
        result["dense_forward_s"] = seconds(lambda: model(example), 3)
    result["controller"] = controller_cost(channels)
    open_units = result["controller"].pop("open_units")
    result |= gate_cost(model, channels)
    tailor = tcp.Tailor(model, example, budget=BUDGET, steps=1000, channels=channels)
    result["checkpoint"] = {}
    for name, kind, options in (("SGD", torch.optim.SGD, {"momentum": 0.9}), ("AdamW", torch.optim.AdamW, {})):
        optimizer = with_state(model, kind, **options)
        result["checkpoint"][name] = checkpoint_cost(model, optimizer, tailor, folder)
    started = time.perf_counter()
    small = tcp.remove(model, channels, open_units, optimizer, verify=False)
    result["removal_s"] = time.perf_counter() - started
    result["verification_s"] = seconds(lambda: compare(model, small, channels, open_units))
    return result


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows, controllers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            rows[name] = measure(NETWORKS[name], Path(folder) / "checkpoints")
            controllers[name] = {"units": rows[name]["units"], **rows[name].pop("controller")}
            print(name, json.dumps(rows[name], indent=1), flush=True)
    for name, build in CONTROLLER_ALONE.items():
        channels = tcp.trace(build(), torch.randn(1, 3, SIZE, SIZE))
        controllers[name] = {"units": channels.units, **controller_cost(channels)}
        del controllers[name]["open_units"]
    units = [row["units"] for row in controllers.values()]
    lines = {}
    for what in ("update_s", "rank_s"):
        slope, start = np.polyfit(units, [row[what] for row in controllers.values()], 1)
        lines[what] = {"seconds_per_unit": slope, "at_zero": start}
    result = {
        "size": SIZE,
        "budget": BUDGET,
        "networks": rows,
        "controller": controllers,
        "controller_line": lines,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps({name: result[name] for name in ("controller", "controller_line", "peak_memory_bytes")}, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result | environment("cpu"), indent=2) + "\n")


if __name__ == "__main__":
    main()
