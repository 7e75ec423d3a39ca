"""The table: what single layers take at a grid of widths, kept as a file that can be used again and shared.

Kernels have steps: a width of 36 costs what 48 costs where channels are processed by 16. The steps of a place are
measured first; between two of them a layer costs what it costs at the upper one.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import beside
from ..gates import plain_class
from ..removal import own_parameter
from ..state import left_as_found
from .clock import LatencyError

STEPS = (32, 16, 8, 4)
LONG = 10.0
"""Milliseconds of a layer in the dense network from which a coarser grid is measured, or large batches take hours."""
FLAT = 0.4
"""How far, on average, times may be from those at the upper end of their step, where a straight line would be 1, and
steps half or a quarter as large 0.57 and 0.67."""
TRIALS = 5
"""How often kernels are timed at most, until two trials in a row find the same step."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear layer: the name of its weight, its module, and the shape of its input on one
    sample, whose first dimension are rows: 1, or as many as the forward pass folds into the batch (frames, windows).
    """

    weight: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def grouped(self) -> bool:
        """Whether inputs leave in step with outputs, so that there is one width."""
        return getattr(self.module, "groups", 1) > 1

    @property
    def widths(self) -> tuple[int, int]:
        """Input and output width as the module is; the input's is 1 if it follows the output's."""
        module = self.module
        inputs, outputs = (
            (module.in_features, module.out_features)
            if isinstance(module, nn.Linear)
            else (module.in_channels, module.out_channels)
        )
        return (1 if self.grouped else inputs), outputs

    @property
    def key(self) -> str:
        """What the time depends on, as text."""
        space = "x".join(map(str, self.shape[1:-1] if isinstance(self.module, nn.Linear) else self.shape[2:]))
        rows = f", {self.shape[0]} rows" if self.shape[0] > 1 else ""  # tables of before these have one row's alone
        return f"{self.module} at {space or 1}{rows}"

    def job(self, inputs: int, outputs: int, batch: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
        """Return the layer with other widths, and an input of ``batch`` samples for it, the same row all over."""
        module, generator = self.module, torch.Generator().manual_seed(0)
        bias = module.bias is not None

        def batched(*shape: int) -> tuple[torch.Tensor]:
            x = torch.randn(1, *shape, generator=generator)  # random numbers for all would take longer than the layer
            return (x.expand(batch * self.shape[0], *shape).contiguous(),)

        if isinstance(module, nn.Linear):
            return nn.Linear(inputs, outputs, bias).eval(), batched(*self.shape[1:-1], inputs)
        groups = module.groups
        if self.grouped:
            groups = max(1, outputs * module.groups // module.out_channels)
            inputs = groups * (module.in_channels // module.groups)
            outputs = groups * (module.out_channels // module.groups)
        options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        layer = plain_class(module)(inputs, outputs, module.kernel_size, groups=groups, bias=bias, **options)
        return layer.eval(), batched(inputs, *self.shape[2:])


def layer_calls(model: nn.Module, args: tuple, kwargs: dict) -> list[LayerCall]:
    """Return the calls of torch's own convolutions and linear layers, with gates of their own or without, in the order
    in which they run, on one sample.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a shared one's first, as traced
    found: list[LayerCall] = []

    def note(module: nn.Module, inputs: tuple) -> None:
        if plain_class(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
            return
        weight = own_parameter(module, "weight")
        if id(weight) in names:
            shape = tuple(inputs[0].shape)
            rows = (1,) if len(shape) < weight.ndim else ()  # called on a sample without a batch
            found.append(LayerCall(names[id(weight)], module, rows + shape))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with torch.no_grad(), left_as_found(model):
            model.eval()(*args, **kwargs)
    finally:
        hook.remove()
    return found


def grid(width: int, step: int, *, coarse: bool = False) -> list[int]:
    """Return widths to measure at: every step up to four, then growing by a half, and the width itself; with
    ``coarse``, from one step on times four.
    """
    points = {width, *(min(width, step * n) for n in ((1,) if coarse else (1, 2, 3)))}
    point = 4.0 * step
    while point < width:
        points.add(min(width, round(point / step) * step))
        point *= 4 if coarse else 1.5
    return sorted(points)


@dataclass
class Table:
    """Measurements at one place.

    Attributes:
        place: what they depend on: backend, device, batch, threads.
        steps: the widths at which input and output channels cost more, {"in": int, "out": int}; empty: not known yet.
        ms_per_byte: of memory traffic between layers.
        layers: by key, {"in": widths, "out": widths, "ms": milliseconds by input and output width}.
        path: where the file is; None: nowhere.
    """

    place: dict[str, Any]
    steps: dict[str, int] = field(default_factory=dict)
    ms_per_byte: float | None = None
    layers: dict[str, dict] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def at(cls, path: Path | None, place: Mapping[str, Any]) -> Table:
        """Return the table in a file, an empty one if there is none.

        Raises:
            LatencyError: if it was measured at another place, or is no table.
        """
        if path is None or not path.exists():
            return cls(dict(place), path=path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = cls(content["place"], content["steps"], content["ms_per_byte"], content["layers"], path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise LatencyError(f"{path} is no table of latencies ({type(error).__name__}: {error}).") from error
        differ = [key for key in {**found.place, **place} if found.place.get(key) != place.get(key)]
        if differ:
            there, here = ({key: each.get(key) for key in differ} for each in (found.place, place))
            raise LatencyError(
                f"the table {path} was measured at another place: there {there}, here {here}. Give another path, or "
                f"delete it to measure anew."
            )
        return found

    def save(self) -> None:
        """Write the file whole; warn where that cannot be, for a run can go on."""
        if self.path is None:
            return
        content = {name: getattr(self, name) for name in ("place", "steps", "ms_per_byte", "layers")}
        try:
            with beside(self.path) as part:
                part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"the table of latencies cannot be written to {self.path} ({error}). This run goes on with what it has "
                f"measured; the next one will measure it again.",
                RuntimeWarning,
                stacklevel=3,
            )

    def missing(self, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """Return one call for each key that has not been measured."""
        return list({call.key: call for call in calls if call.key not in self.layers}.values())


def fill_in(table: Table, calls: Sequence[LayerCall], backend, batch: int, progress: bool) -> None:
    """Measure what the table lacks, with a progress bar, and save it after each layer; one that lacks nothing is not
    written, for it may be where nothing can be.
    """
    missing = table.missing(calls)
    if not missing and table.steps:
        return

    def ms(call: LayerCall, inputs: int, outputs: int) -> float:
        # The least, not the median: a layer is so short that some calls are not interrupted on any machine.
        return backend.measure([call.job(inputs, outputs, batch)], 0.02, rounds=3)[0].least

    if not table.steps:
        table.steps = _steps(backend)
        table.ms_per_byte = _ms_per_byte(backend, batch)
        table.save()
    with _bar(len(missing), progress) as bar:
        for call in missing:
            coarse = ms(call, *call.widths) > LONG
            steps = table.steps["in"], table.steps["out"]
            left, right = (grid(width, step, coarse=coarse) for width, step in zip(call.widths, steps, strict=True))
            times = [[ms(call, inputs, outputs) for outputs in right] for inputs in left]
            table.layers[call.key] = {"in": left, "out": right, "ms": times}
            table.save()
            bar.update()


def _steps(backend) -> dict[str, int]:
    """Return the largest step at which a common convolution is flat, for its input and its output channels."""
    call = LayerCall("", nn.Conv2d(64, 64, 3, padding=1), (1, 64, 28, 28))
    widths = range(18, 66, 2)
    steps = {}
    for side in ("in", "out"):
        jobs = [call.job(*((width, 64) if side == "in" else (64, width)), 1) for width in widths]
        least, found = dict.fromkeys(widths, math.inf), []
        while len(found) < 2 or (found[-1] != found[-2] and len(found) < TRIALS):
            for width, timing in zip(widths, backend.measure(jobs, 1.0), strict=True):
                least[width] = min(least[width], timing.least)
            found.append(step_in(least))
        steps[side] = found[-1]
    return steps


def step_in(times: Mapping[int, float]) -> int:
    """Return the largest step that times by width have: each is as that at the upper end of its step. 1: none.

    A width that takes more than a larger one, because a runtime leaves its fast kernels there, counts as the larger.
    """
    times = {width: min(t for other, t in times.items() if other >= width) for width in times}
    reach = max(times.values()) - min(times.values())
    if reach < 0.02 * max(times.values()):
        return 1  # too little to tell
    slope = reach / (max(times) - min(times))
    for step in STEPS:
        uppers = {width: -(-width // step) * step for width in times}
        uppers = {width: up for width, up in uppers.items() if up != width and up in times}
        off = sum(times[up] - times[width] for width, up in uppers.items())
        if uppers and off <= FLAT * slope * sum(up - width for width, up in uppers.items()):
            return step
    return 1


def _ms_per_byte(backend, batch: int) -> float:
    """Return what moving a byte takes, from an element-wise operator on two sizes."""
    sizes = (32, 128)
    jobs = [(nn.ReLU().eval(), (torch.randn(batch, size, 28, 28),)) for size in sizes]
    small, large = (timing.least for timing in backend.measure(jobs, 0.2))
    return max(0.0, large - small) / (2 * 4 * batch * 28 * 28 * (sizes[1] - sizes[0]))


def _bar(total: int, progress: bool):
    """Return a progress bar over ``total`` layers."""
    from tqdm import tqdm

    return tqdm(total=total, desc="timing layers", unit=" layers", disable=not progress)
