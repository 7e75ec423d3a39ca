"""The cost: a table, interpolated and brought into line with what whole networks take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..cost import CostModel
from .clock import LatencyError, Timing


class Grids:
    """Tables of several layers, evaluated at once: milliseconds by input and output width.

    Widths are first rounded up to the steps of the place, then interpolated linearly.
    """

    def __init__(self, tables: list[Mapping], steps: tuple[int, int]) -> None:
        self.steps = steps
        self.axes = [_padded([table[side] for table in tables]) for side in ("in", "out")]
        self.tops = [np.array([table[side][-1] for table in tables], float) for side in ("in", "out")]
        shape = len(tables), self.axes[0].shape[1], self.axes[1].shape[1]
        self.ms = np.zeros(shape)
        for row, table in enumerate(tables):
            # Slower at a smaller width: then the larger one costs no more, and the units between are free.
            ms = np.asarray(table["ms"], float)
            for axis in (0, 1):
                ms = np.flip(np.minimum.accumulate(np.flip(ms, axis), axis), axis)
            self.ms[row] = np.pad(ms, [(0, size - had) for size, had in zip(shape[1:], ms.shape, strict=True)], "edge")
        self.rows = np.arange(len(tables))

    def up(self, width: np.ndarray, side: int) -> np.ndarray:
        """Return the upper end of the step that a width is in."""
        step = self.steps[side]
        return np.minimum(np.ceil(width / step) * step, np.maximum(self.tops[side], width))

    def __call__(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Return the milliseconds of each layer, float64 ``[layers]``."""
        (i, u), (j, v) = (
            self._place(self.up(np.asarray(width, float), side), side) for side, width in enumerate((inputs, outputs))
        )
        a, b, c, d = (self.ms[self.rows, i + di, j + dj] for di in (0, 1) for dj in (0, 1))
        return (1 - u) * ((1 - v) * a + v * b) + u * ((1 - v) * c + v * d)

    def _place(self, width: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        axis = self.axes[side]
        index = np.clip((axis <= width[:, None]).sum(1) - 1, 0, axis.shape[1] - 2)
        low, high = axis[self.rows, index], axis[self.rows, index + 1]
        share = np.divide(width - low, high - low, out=np.zeros_like(width), where=np.isfinite(high) & (high > low))
        return index, np.maximum(share, 0)


def _padded(axes: list[list[int]]) -> np.ndarray:
    size = max(map(len, axes)) + 1
    padded = np.array([[*axis, *[axis[-1]] * (size - len(axis))] for axis in axes], float)
    # A repeated last width would be found too late: the padding lies beyond every width.
    for row, axis in enumerate(axes):
        padded[row, len(axis) :] = np.inf
    return padded


class LatencyCost:
    """What ranking and filling need of latency (see :class:`tcp_core.cost.Cost`), and how it is measured.

    Milliseconds are ``scale * (offset + slope * (layers + traffic))``: layers from the table, traffic in proportion to
    bytes. ``offset`` and ``slope`` are such that the dense and the smallest network come out as measured.

    Attributes:
        calibration: what these two were measured at, "dense" and "smallest"; a run that goes on takes it along.
    """

    def __init__(
        self,
        counts: CostModel,
        grids: Grids,
        ms_per_byte: float,
        measure: Callable[[Tensor], tuple[Timing, Timing]] | None,
        noise: float,
        known: Mapping[str, float] | None = None,
    ) -> None:
        self.counts, self.grids, self.ms_per_byte = counts, grids, ms_per_byte
        self.calibration: dict[str, float] = {}
        self._offset, self._slope, self._scale = 0.0, 1.0, 1.0
        self._measure, self.noise, self.known = measure, noise, known
        self._layers, self._traffic = counts.terms["layers"], counts.terms["traffic"]

    def calibrate(self, smallest: Tensor, known: Mapping[str, float] | None = None) -> None:
        """Bring the model into line with the dense and the ``smallest`` network, measured now or, in a run that goes
        on, ``known`` from when it began, here or at construction.

        Raises:
            LatencyError: if repeated measurements are too far apart.
        """
        known = self.known if known is None else known
        if known is None:
            timing, dense = self._measure(smallest)
            if (spread := max(timing.spread, dense.spread)) > self.noise:
                raise LatencyError(
                    f"this machine is too noisy to measure latency: the quartiles of repeated measurements of the "
                    f"dense network ({dense.ms:.3g} ms) and the smallest are {spread:.1%} apart, more than "
                    f"noise={self.noise:.0%}. End other work on it, or give Latency(..., seconds=...) more time or a "
                    f"larger noise."
                )
            if dense.drift > self.noise:
                warnings.warn(
                    f"the machine's own speed changes: repeated measurements of the dense network ({dense.ms:.3g} ms) "
                    f"are {dense.drift:.1%} apart. Networks beside each other can be compared, so a share of the dense "
                    f"latency will hold; milliseconds are as this machine was now.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            known = {"dense": dense.ms, "smallest": timing.ms}
        self.calibration = dict(known)
        full, least = known["dense"], known["smallest"]
        low, high = self._raw(smallest), self._raw(torch.ones(self.counts.units))
        self._slope = (full - least) / (high - low) if high > low and full > least else full / high
        self._offset, self._scale = full - self._slope * high, 1.0

    def exact(self, open_units: Tensor | None = None) -> dict[str, float]:
        """Return ``{"latency": milliseconds}`` of the network that keeps ``open_units`` (all by default)."""
        z = torch.ones(self.counts.units) if open_units is None else open_units
        return {"latency": self._scale * (self._offset + self._slope * self._raw(z))}

    def marginal(self, z: Tensor) -> dict[str, Tensor]:
        """Return what each unit costs, float64 ``[units]``: a closed one its share of its layers' next steps, 0 if they
        have room; an open one what its layers' units cost in the mean.
        """
        n = self.counts.counts(z).numpy()
        more, mean = torch.zeros_like(self.counts.fixed), torch.zeros_like(self.counts.fixed)
        _, left, right = self._layers
        widths = n[left.numpy()], n[right.numpy()]
        here = self.grids(*widths)
        for side, index in enumerate((left, right)):
            width = widths[side]
            up, step = self.grids.up(width, side), self.grids.steps[side]
            beyond = np.minimum(up + step, np.maximum(self.grids.tops[side], up))
            low = np.minimum(self.grids.axes[side][:, 0], width)
            above, below = (self.grids(*((w, widths[1]) if side == 0 else (widths[0], w))) for w in (beyond, low))
            ahead = np.where((width < up) | (beyond <= up), 0, (above - here) / np.maximum(beyond - up, 1))
            behind = np.where(width > low, (here - below) / np.maximum(width - low, 1), here / np.maximum(width, 1))
            more.index_add_(0, index, torch.from_numpy(ahead))
            mean.index_add_(0, index, torch.from_numpy(behind))
        scale, left, _ = self._traffic
        for each in (more, mean):
            each.index_add_(0, left, scale * self.ms_per_byte)
        factor = self._scale * self._slope
        of_unit = [
            torch.zeros(self.counts.units, dtype=torch.float64).index_add(
                0, self.counts.columns, self.counts.times * each[self.counts.rows] * factor
            )
            for each in (more, mean)
        ]
        return {"latency": of_unit[0].where(z == 0, of_unit[1])}

    def price(self, bounds: Mapping[str, float]) -> dict[str, Tensor]:
        """Return what each unit of the dense network costs in the mean of its layers, whatever the bounds."""
        return self.marginal(torch.ones(self.counts.units))

    def measure(self, open_units: Tensor) -> Timing:
        """Return what the network that keeps ``open_units`` takes, measured.

        It takes turns with the dense one; what that one takes more or less than before, the machine is slower or
        faster than then, and the answer is corrected by it. A spread above ``noise`` is warned of: a run is not thrown
        away for it.
        """
        timing, dense = self._measure(open_units)
        drift, spread = self.calibration["dense"] / dense.ms, max(timing.spread, dense.spread)
        if spread > self.noise:
            warnings.warn(
                f"the machine is noisy now: the quartiles of repeated measurements are {spread:.1%} apart, more than "
                f"noise={self.noise:.0%}. The delivered latency is no more exact than that: measure the network again "
                f"on a quiet machine.",
                RuntimeWarning,
                stacklevel=2,
            )
        return Timing(timing.ms * drift, spread, timing.least * drift, timing.drift)

    def agree(self, open_units: Tensor, ms: float) -> None:
        """Have the model say of ``open_units`` what was measured, and of all others in proportion."""
        self._scale *= ms / self.exact(open_units)["latency"]

    def _raw(self, z: Tensor) -> float:
        layers, traffic = self.parts(z)
        return layers + self.ms_per_byte * traffic

    def parts(self, z: Tensor) -> tuple[float, float]:
        """Return what layers take by the table, in milliseconds, and the bytes moved outside of them."""
        n = self.counts.counts(z).numpy()
        _, left, right = self._layers
        scale, units, _ = self._traffic
        return float(self.grids(n[left], n[right]).sum()), float((scale.numpy() * n[units]).sum())
