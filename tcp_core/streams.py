"""Batches of large images from a folder: decoded and cropped by worker processes, batch by batch.

For images that do not fit into memory, such as ImageNet's; small ones are faster in memory (:mod:`tcp_core.images`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .data import IMAGENET_STATISTICS
from .processes import rank_and_world


class Stream:
    """Batches ``(x, y)`` of the images in ``root``/<class>/*, for :func:`tcp_core.fit` to train on or to validate with.

    x: float32 ``[batch, 3, size, size]``, normalised; y: int64 ``[batch]``. Order and augmentation depend on ``seed``
    and the epoch alone, whatever the number of workers, so a stopped run goes on with the same batches. Of several
    processes (torch.distributed) each trains on its own part of the images, and validates with all.

    Args:
        root: a folder with one folder of images a class.
        size: side of the square that the network sees.
        batch_size: images a batch; when training, what is left at an epoch's end is dropped.
        train: random crop (8 to 100 % of the area) and mirroring, shuffled; else the centre, in order of the names.
        workers: processes that decode; 0: in this one.
        seed: of order and augmentation.
        skip_corrupt: leave out images that cannot be read, name each in a warning and count it in ``skipped``; if False
            such an image is an error.
        mean, std: by which pixels in [0, 1] are normalised; ImageNet's by default.

    Raises:
        FileNotFoundError: if ``root`` is not such a folder.
        ValueError: while iterating, with the name of an image that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int = 224,
        batch_size: int = 256,
        train: bool = False,
        workers: int = 8,
        seed: int = 0,
        skip_corrupt: bool = False,
        mean: tuple[float, ...] = IMAGENET_STATISTICS["mean"],
        std: tuple[float, ...] = IMAGENET_STATISTICS["std"],
    ) -> None:
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        centre = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        change = v2.Compose(
            [
                v2.PILToTensor(),
                *(crop if train else centre),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )
        try:
            self.folder = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{root} must be a folder with one folder of images a class ({error}).") from error
        self.classes = tuple(self.folder.classes)
        self.seed, self.train, self.skip_corrupt, self.skipped = seed, train, skip_corrupt, []
        self.images = _Decoded(self.folder, change)
        rank, world = rank_and_world()
        share = {"num_replicas": world, "rank": rank, "shuffle": True, "seed": seed, "drop_last": True}
        self.order = DistributedSampler(self.images, **share) if train else None
        self.loader = DataLoader(
            self.images,
            batch_size=batch_size,
            sampler=self.order,
            drop_last=train,
            num_workers=workers,
            generator=torch.Generator(),  # torch's own is left alone
            collate_fn=_together,
            persistent_workers=False,  # new ones each epoch, which know its number
            pin_memory=torch.cuda.is_available(),
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass draw the order and augmentation of ``epoch``."""
        self.images.seed = self.seed * 1_000_003 + epoch
        if self.order is not None:
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y, faults in self.loader:
            for fault in faults:
                if not self.skip_corrupt:
                    raise ValueError(f"{fault}. Replace the file, or pass skip_corrupt=True to leave such images out.")
                if fault not in self.skipped:
                    self.skipped.append(fault)
                    warnings.warn(f"{fault}; it is left out, {len(self.skipped)} so far.", stacklevel=2)
            if len(y):
                yield x, y

    def __repr__(self) -> str:
        return f"Stream({len(self.folder):,} images in {len(self.classes)} classes, {len(self)} batches)"


class _Decoded(Dataset):
    """The images of a folder as the network sees them, each with random numbers of its own; faults as text."""

    def __init__(self, folder: ImageFolder, change: v2.Transform) -> None:
        self.folder, self.change, self.seed = folder, change, 0

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        path, label = self.folder.samples[index]
        try:
            image = self.folder.loader(path)
        except (
            OSError,
            SyntaxError,
            ValueError,
        ) as error:  # what Pillow raises for files that are no image, or cut off
            return f"{path} cannot be read ({error})"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * len(self) + index)
            return self.change(image), label


def _together(samples: list) -> tuple[Tensor, Tensor, list[str]]:
    faults = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    return *(default_collate(good) if good else (torch.empty(0), torch.empty(0, dtype=torch.int64))), faults
