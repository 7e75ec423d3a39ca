"""Which activations are alive when: storages are watched while the model runs, one moment after each operator."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .codes import narrow


class Liveness:
    """Storages in the order in which they were allocated, with what is known of their channels, and moments.

    Attributes:
        storages: (bytes of a part, item size of floating-point numbers or 0, label of each part).
        work: (operator, indices of the storages it reads and writes), views left out.
        moments: per moment the set of storages (indices) that are alive; the caller holds the inputs all along.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor]) -> None:
        self.storages: list[tuple[float, int, Tensor]] = []
        self.work: list[tuple[str, tuple[int, ...]]] = []
        self.moments: list[frozenset[int]] = []
        self._alive: dict[StorageWeakRef, int] = {}
        self._weights = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        for tensor in inputs:
            self._add(tensor, None)

    def before(self) -> None:
        """Look for what has died since the last operator."""
        self._alive = {reference: index for reference, index in self._alive.items() if not reference.expired()}

    def after(self, operator: str, inputs: Iterable[Tensor], outputs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Add an operator's outputs with their codes; nothing has died while it ran."""
        known = len(self.storages)
        touched = [StorageWeakRef(tensor.untyped_storage()) for tensor in inputs]
        for tensor, codes in outputs:
            self._add(tensor, codes)
            touched.append(StorageWeakRef(tensor.untyped_storage()))
        if len(self.storages) > known or operator.endswith("_"):
            self.work.append((operator, tuple({self._alive[each] for each in touched if each in self._alive})))
        moment = frozenset(self._alive.values())
        if self.moments and self.moments[-1] <= moment:
            self.moments.pop()  # the peak is not within another one
        if not self.moments or not moment <= self.moments[-1]:
            self.moments.append(moment)

    def _add(self, tensor: Tensor, codes: Tensor | None) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self._alive or reference in self._weights or not storage.nbytes():
            return
        labels = torch.zeros(1, dtype=torch.int64) if codes is None else (narrow(codes) >> 1).flatten()
        itemsize = tensor.element_size() if tensor.is_floating_point() else 0
        self._alive[reference] = len(self.storages)
        self.storages.append((storage.nbytes() / len(labels), itemsize, labels))
