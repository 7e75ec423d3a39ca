"""Where latency is measured: one object, given once."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from ..channels import Channels
from ..cost import CostBuilder, CostModel, is_number, is_whole
from ..files import expanded
from ..packing import unpacked
from ..preparing import LIKED
from ..removal import remove
from .backends import backend_of
from .clock import PATIENCE, LatencyError, Timing
from .model import Grids, LatencyCost
from .table import STEPS, LayerCall, Table, fill_in, layer_calls, step_in

TIMED = ("convolution", "addmm", "mm", "linear")
"""Endings of the operators of layers, which are timed; all others move memory."""

LONG_WAIT = 20.0
"""Seconds of one measurement of whole networks from which it is told, where progress is."""

PROBES = 12
"""Networks that a callable is asked about where it cannot time layers."""

T = TypeVar("T")


class Latency:
    """The place where latency is measured, for ``Tailor(..., budget={"latency": "4 ms"}, latency=Latency(...))``.

    Args:
        backend: "torch", "compile" (torch.compile), "onnxruntime", or a callable. One of a single argument is called
            with a network in eval mode and returns its milliseconds; one of two is called with a module and its input,
            and can time single layers, which makes a better table.
        batch: samples in one forward pass.
        threads: of torch and onnxruntime.
        device: where torch runs.
        provider: of onnxruntime: "CPU", "CUDA", "Tensorrt", as far as it was built with them.
        table: the file of measurements. It is read if it is there, and what it lacks is measured and added; by default
            one for each place, in the user's cache folder. A callable's measurements are kept only if a file is given.
        noise: the largest spread of repeated measurements that is accepted before training, as a fraction.
        seconds: what one measurement of a network takes at least.
        progress: show a progress bar while layers are timed, and a line for each network whose measurement took long.

    Raises:
        LatencyError: if the backend is not installed or has no such device.
        ValueError: for other bad input.
    """

    def __init__(
        self,
        backend: str | Callable[..., float] = "torch",
        *,
        batch: int = 1,
        threads: int = 1,
        device: str = "cpu",
        provider: str = "CPU",
        table: str | Path | None = None,
        noise: float = 0.1,
        seconds: float = 2.0,
        progress: bool = True,
    ) -> None:
        for name, value in (("batch", batch), ("threads", threads)):
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name}={value!r}; it must be an int of at least 1.")
        batch, threads = int(batch), int(threads)  # NumPy's, too
        if not all(is_number(value) and value > 0 for value in (noise, seconds)):
            raise ValueError(f"noise and seconds must be positive; got {noise!r}, {seconds!r}.")
        self.backend = backend_of(backend, threads, device, provider)
        self.backend.check()
        self.batch, self.noise, self.seconds, self.progress = batch, noise, seconds, progress
        self.known: Mapping[str, float] | None = None
        self.place = {**self.backend.identity(), "batch": batch, "threads": threads}
        if table is None and not callable(backend):
            key = hashlib.sha256(repr(sorted(self.place.items())).encode()).hexdigest()[:12]
            cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
            table = cache / "tcp_core" / f"latency-{key}.json"
        self.table = Table.at(None if table is None else expanded(table), self.place)

    def __repr__(self) -> str:
        return f"Latency({', '.join(f'{key} {value}' for key, value in self.place.items())})"

    def as_of(self, state: Mapping[str, Any]) -> Latency:
        """Return this place as it was when a run began, for the Tailor that is to go on with it: its dense and its
        smallest network are not measured anew, so a machine that is slower by now, or busy, does not refuse it.

        ``state`` is the run's ``tailor.state_dict()``.
        """
        extra = state.get("_extra_state", state)
        extra = unpacked(extra) if isinstance(extra, Tensor) else extra
        return self.knowing(extra["controller"].get("calibration"))

    def knowing(self, calibration: Mapping[str, float] | None) -> Latency:
        """Return this place with what :attr:`LatencyCost.calibration` was; None: it is measured."""
        place = copy.copy(self)
        place.known = calibration
        return place

    def cost(self, model: nn.Module, channels: Channels) -> LatencyCost:
        """Return the latency of the networks that ``model`` can be made into, as a cost; layers are timed if need be.

        Raises:
            LatencyError: if a measurement fails, or no layer can be timed by itself.
        """
        args, kwargs = channels.example
        if kwargs:
            raise LatencyError("latency is measured with positional inputs; give example_input as a tensor or a tuple.")
        calls = [call for call in layer_calls(model, args, kwargs) if _units(channels, call) is not None]
        if not calls:
            raise LatencyError(
                "latency is predicted from layers that are called as torch's own Conv1d, Conv2d, Conv3d or Linear, and "
                "this network has none: give a budget of macs, params, memory or weights instead."
            )
        _warn_of_untimed(channels, calls)

        def measure(open_units: Tensor) -> tuple[Timing, Timing]:
            return self._on_first(lambda: self._beside_dense(model, channels, open_units))

        if self.backend.times_layers:
            self.table = self._on_first(lambda: self._filled(calls))
            counts = self._counts(channels, calls)
            tables = [self.table.layers[call.key] for call in calls]
            steps = self.table.steps["in"], self.table.steps["out"]
            return LatencyCost(counts, Grids(tables, steps), self.table.ms_per_byte, measure, self.noise, self.known)
        fitted = self._on_first(lambda: self._fitted(model, channels, calls))
        return self._by_macs(channels, calls, *fitted, measure)

    def likes(
        self, cost: LatencyCost | None = None, traced: tuple[nn.Module, Channels] | None = None
    ) -> tuple[int, ...]:
        """Return the multiples that widths should be, largest first: the steps measured here or those that most kernels
        like, whichever are larger, what divides them, and 1 for networks too small for them.

        Without ``cost``, the steps are those of a common convolution; of a callable that takes networks alone, those of
        the model in ``traced``, which comes with its trace.

        Raises:
            LatencyError: if a measurement fails, or there is nothing that a callable could be asked about.
        """
        if cost is not None:
            steps = cost.grids.steps
        elif self.backend.times_layers:
            self.table = self._on_first(lambda: self._filled([]))
            steps = self.table.steps.values()
        elif traced is None:
            raise LatencyError("this callable takes networks alone: give likes(place.cost(model, channels)).")
        else:
            steps = (self._on_first(lambda: self._step(*traced)),)
        return *(step for step in STEPS if 4 <= step <= max(*steps, *LIKED)), 1

    def _filled(self, calls: Sequence[LayerCall]) -> Table:
        fill_in(self.table, calls, self.backend, self.batch, self.progress)
        return self.table

    def _beside_dense(self, model: nn.Module, channels: Channels, open_units: Tensor) -> tuple[Timing, Timing]:
        """Return the times of one network and of the dense one; say so where they took long, for the run waits."""
        started = time.perf_counter()
        timing, dense = self.networks(model, channels, [open_units, None])
        if self.progress and (took := time.perf_counter() - started) > LONG_WAIT:
            from tqdm import tqdm

            tqdm.write(
                f"measured a network beside the dense one, {timing.ms:.4g} and {dense.ms:.4g} ms, in {took:.0f} s",
                file=sys.stderr,
            )
        return timing, dense

    def networks(self, model: nn.Module, channels: Channels, sets: Sequence[Tensor | None]) -> list[Timing]:
        """Return the time of the network of each set of units (None: the dense one), measured side by side."""
        networks = [
            copy.deepcopy(model) if open_units is None else remove(model, channels, open_units, verify=False)
            for open_units in sets
        ]
        return self._timings(networks, channels.example[0])

    def timings(self, models: Sequence[nn.Module], example_input: Tensor | tuple) -> list[Timing]:
        """Return what each of ``models`` takes here, measured side by side: milliseconds, and their spread.

        The models are left as they are. ``example_input`` is what they are called with, a tensor or a tuple of them:
        the first sample of it is repeated to the batch size of this place.
        """
        args = example_input if isinstance(example_input, tuple) else (example_input,)
        args = pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.ndim else x, args)
        return self._timings([copy.deepcopy(model) for model in models], args)

    def _timings(self, networks: Sequence[nn.Module], args: tuple) -> list[Timing]:
        args = pytree.tree_map(self._batched, args)
        jobs = [(network.cpu().eval(), args) for network in networks]
        return self.backend.measure(jobs, self.seconds, patience=PATIENCE)

    def _batched(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return x.expand(self.batch, *x.shape[1:]).contiguous() if x.ndim and x.shape[0] == 1 else x

    def _counts(self, channels: Channels, calls: Sequence[LayerCall]) -> CostModel:
        """Return which channel counts layers have, and the bytes that are moved outside of them."""
        builder = CostBuilder(channels.units, ("layers", "traffic"))
        for call in calls:
            builder.add("layers", 1, *_units(channels, call))
        for operator, storages in channels.activations.work:
            if operator not in self.backend.fused and not operator.endswith(TIMED):
                for storage in storages:
                    builder.add("traffic", storage.bytes * self.batch, storage.units)
        builder.add("traffic", 0.0)
        return builder.build()

    def _fitted(
        self, model: nn.Module, channels: Channels, calls: Sequence[LayerCall]
    ) -> tuple[float, float, tuple[int, int]]:
        """Return milliseconds per multiply-accumulate and per byte, and steps of input and output channels.

        The steps are those of the family that costs most, narrowed unit by unit; the others are such that macs, at
        widths rounded up to the steps, and traffic explain best what whole networks take.
        """

        step = self._step(model, channels)
        steps = step, step
        trial = self._by_macs(channels, calls, 1.0, 1.0, steps)
        sets = list(_probes(channels))
        found = np.array([self.networks(model, channels, [z])[0].ms for z in sets])
        features = np.array([[*trial.parts(z), 1.0] for z in sets])
        size = features.max(0).clip(1e-30)
        weights, _ = nnls(features / size / found[:, None], np.ones(len(sets)))
        per_mac, per_byte, _ = weights / size
        return float(per_mac), float(per_byte), steps

    def _step(self, model: nn.Module, channels: Channels) -> int:
        """Return the step of the family that costs most, from networks in which it alone is narrower."""
        sets = _narrowed(channels)
        times = {width: self.networks(model, channels, [open_units])[0].ms for width, open_units in sets}
        return step_in(times or {1: 1.0})

    def _by_macs(self, channels: Channels, calls, per_mac: float, per_byte: float, steps, measure=None) -> LatencyCost:
        tables = []
        for call in calls:
            per_pair = per_mac * _macs(call) * self.batch / math.prod(call.widths)
            left, right = ([*{min(width, step), width}] for width, step in zip(call.widths, steps, strict=True))
            tables.append(
                {
                    "in": sorted(left),
                    "out": sorted(right),
                    "ms": [[per_pair * i * o for o in sorted(right)] for i in sorted(left)],
                }
            )
        grids = Grids(tables, steps)
        return LatencyCost(self._counts(channels, calls), grids, per_byte, measure, self.noise, self.known)

    @staticmethod
    def _on_first(function: Callable[[], T]) -> T:
        """Return what ``function`` returns in the first process: all must choose by the same measurements."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return function()
        answer: list[Any] = [None, None]
        if distributed.get_rank() == 0:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        distributed.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def _units(channels: Channels, call: LayerCall) -> tuple[Tensor, Tensor] | None:
    """Return the units of a layer's input and output channels (-1: fixed); None if it is no layer of the trace."""
    if all(layer.weight != call.weight for layer in channels.layers):
        return None
    slots = channels.slots.get(call.weight, (None, None))
    outputs, inputs = (
        torch.full((width,), -1) if units is None else units
        for units, width in zip(slots[:2], call.widths[::-1], strict=True)
    )
    return (torch.tensor([-1]) if call.grouped else inputs), outputs


def _warn_of_untimed(channels: Channels, calls: Sequence[LayerCall]) -> None:
    """Warn of layers with units that may be removed and no row in the table."""
    timed = {call.weight for call in calls}
    of_weight = {layer.weight: layer.name for layer in channels.layers if layer.weight not in timed}

    def may_narrow(weight: str) -> bool:
        units = [each[each >= 0] for each in channels.slots.get(weight, ())[:2] if each is not None]
        return any(bool(channels.prunable[each].any()) for each in units)

    if missing := [name for weight, name in of_weight.items() if may_narrow(weight)]:
        names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        warnings.warn(
            f"latency: {len(missing)} layer(s) that can become narrower are in no table: {names}. They are not called "
            f"as torch's own Conv1d, Conv2d, Conv3d or Linear, so their units count as free and are the last to go. "
            f"What is delivered is measured all the same; build them of torch's own layers to have them priced.",
            RuntimeWarning,
            stacklevel=3,
        )


def _macs(call: LayerCall) -> float:
    """Return the multiply-accumulates of a layer on one sample."""
    return math.prod(_output_shape(call)) * call.module.weight[0].numel()


def _output_shape(call: LayerCall) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(copy.deepcopy(call.module).to("meta")(torch.empty(call.shape)).shape)


def _narrowed(channels: Channels) -> Iterator[tuple[int, Tensor]]:
    """Return widths, and the dense network with the family that costs most at that width: the upper 48, by twos."""
    price = channels.cost_model.price({})["macs"]
    whole = [family for family in channels.families if channels.prunable[family.units].all() and len(family.units) > 2]
    if not whole:
        return
    units = max(whole, key=lambda family: (len(family.units) >= 64, float(price[family.units].sum()))).units
    for width in range(len(units), max(2, len(units) - 48), -2):
        open_units = torch.ones(channels.units, dtype=torch.bool)
        open_units[units[width:]] = False
        yield width, open_units


def _probes(channels: Channels) -> Iterator[Tensor]:
    """Return sets of units that stay: all, and random shares of each family's."""
    generator = torch.Generator().manual_seed(0)
    yield torch.ones(channels.units, dtype=torch.bool)
    for _ in range(PROBES - 1):
        open_units = torch.ones(channels.units, dtype=torch.bool)
        for family in channels.families:
            removable = family.units[channels.prunable[family.units]]
            share = 0.2 + 0.8 * float(torch.rand((), generator=generator))
            least = int(len(removable) == len(family.units))
            open_units[removable[max(least, round(share * len(removable))) :]] = False
        yield open_units
