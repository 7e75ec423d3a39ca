"""Bytes: the peak of the activations that are alive together, and the size of the weights.

An activation's size is proportional to a channel count, so what is alive after one operator is linear in the units
that stay, and the peak is the largest of these linear forms: exact, but not bilinear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from .cost import PRECISIONS, CostModel


@dataclass(frozen=True)
class Storage:
    """Memory that one or more activations share: bytes of each of its parts, and the unit that each part goes with.

    ``units`` is int64, -1 for a part that always stays; ``itemsize`` is that of floating-point numbers, 0 for others.
    """

    bytes: float
    itemsize: int
    units: Tensor


@dataclass(frozen=True)
class Activations:
    """What is alive when: storages, and for each moment of one sample's forward pass which of them are.

    Attributes:
        units: number of units.
        storages: in the order in which they were allocated.
        moments: per moment the indices of the storages that are alive; those within another's are left out.
        work: per operator its name and the storages that it reads and writes, views left out.
        precision, batch: what bytes are counted at, see :class:`~tcp_core.Budget`.
    """

    units: int
    storages: Sequence[Storage]
    moments: Sequence[Sequence[int]]
    work: Sequence[tuple[str, Sequence[Storage]]] = ()
    precision: str | None = None
    batch: int = 1

    def at(self, precision: str | None, batch: int) -> Activations:
        """Return the same, counted at another precision or for more samples (whatever does not grow with them)."""
        return replace(self, precision=precision, batch=batch)

    def exact(self, open_units: Tensor | None = None) -> dict[str, int]:
        """Return ``{"memory": bytes}`` at the peak for the network that keeps ``open_units`` (all by default)."""
        z = torch.ones(self.units) if open_units is None else open_units
        return {"memory": int(self._load(z).max())}

    def marginal(self, z: Tensor) -> dict[str, Tensor]:
        """Return by how much each unit moves the peak while the others stay at ``z`` (binary), float64 ``[units]``."""
        load = self._load(z)[:, None]
        more, less = ((load + sign * self._matrix).max(0) - load.max() for sign in (1, -1))
        by_group = torch.from_numpy(np.stack([more, -less]))[:, self._group]
        return {"memory": by_group[0].where(z == 0, by_group[1])}

    def price(self, bounds: Mapping[str, float]) -> dict[str, Tensor]:
        """Return what units take at the moments at which the dense network is above the bound, the more the further.

        The peak of the dense network alone would say nothing of the next one, which is above the bound as well.
        """
        load = self._load(torch.ones(self.units))
        above = (load - bounds.get("memory", load.max())).clip(min=0)
        above = above if above.any() else (load == load.max()).astype(float)
        return {"memory": torch.from_numpy(above / above.sum() @ self._matrix)[self._group]}

    def _load(self, z: Tensor) -> np.ndarray:
        """Return the bytes that are alive at each moment, float64 ``[moments]``."""
        count = torch.zeros(self._matrix.shape[1], dtype=torch.float64).index_add(0, self._group, z.double())
        return self._base + self._matrix @ count.numpy()

    def __post_init__(self) -> None:
        """Derive the linear forms: bytes of each moment that stay, and bytes by group of units that go alike."""
        rows = torch.cat([torch.full_like(s.units, i) for i, s in enumerate(self.storages)] or [torch.tensor([])])
        columns = torch.cat([storage.units for storage in self.storages] or [torch.tensor([])])
        shape = len(self.storages), self.units + 1  # the last column: what always stays
        entries = torch.ones(len(rows)), (rows.long(), torch.where(columns < 0, self.units, columns).long())
        parts = csr_array(entries, shape=shape, dtype=np.float64)
        # Units with equal columns, told by two random sums over them, which are exact.
        keys = torch.randint(1 << 24, (shape[0], 2), generator=torch.Generator().manual_seed(0)).double()
        sums = torch.from_numpy(parts.T @ keys.numpy())[:-1]
        group = sums.unique(dim=0, return_inverse=True)[1] if self.units else torch.zeros(0, dtype=torch.int64)
        groups = int(group.max()) + 1 if self.units else 0
        first = torch.full((groups,), self.units).scatter_reduce(0, group, torch.arange(self.units), "amin")
        size = np.array([_bytes(s.bytes, s.itemsize, self.precision) * self.batch for s in self.storages])
        alive = np.zeros((max(1, len(self.moments)), shape[0]))
        for moment, storages in enumerate(self.moments):
            alive[moment, list(storages)] = 1
        alive = alive * size
        object.__setattr__(self, "_group", group)
        object.__setattr__(self, "_matrix", alive @ parts[:, first.numpy()].toarray())
        object.__setattr__(self, "_base", alive @ parts[:, [self.units]].toarray()[:, 0])

    def __repr__(self) -> str:
        return (
            f"Activations({len(self.storages)} storages, {len(self.moments)} moments, {self.exact()['memory']:,} bytes)"
        )


def _bytes(size: float, itemsize: int, precision: str | None) -> float:
    return size if precision is None or not itemsize else size / itemsize * PRECISIONS[precision]


def weights_at(model: CostModel, precision: str | None) -> CostModel:
    """Return the cost ``"weights"`` in bytes at a precision, from one with a term ``(itemsize, scale in bytes)`` each.

    ``model.terms`` maps each item size of floating-point numbers, and ``"0"`` for all others, to its terms.
    """
    terms = [
        (scale * _bytes(1.0, int(itemsize), precision), left, right)
        for itemsize, (scale, left, right) in model.terms.items()
    ]
    return replace(model, terms={"weights": tuple(torch.cat(column) for column in zip(*terms, strict=True))})
