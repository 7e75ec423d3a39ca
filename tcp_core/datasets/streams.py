"""Batches of large images from a folder: decoded and cropped by worker processes, batch by batch.

For images that do not fit into memory, such as ImageNet's; small ones are faster in memory (`images`).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from ..files import expanded
from .images import stratified
from .sources import IMAGENET_STATISTICS, Splits, class_files, class_folders, folder_parts, rgb


def load(
    root: str | Path,
    *,
    size: int = 224,
    batch_size: int = 256,
    workers: int = 8,
    seed: int = 0,
    val_images: float | int = 0.05,
    skip_corrupt: bool = False,
) -> Splits:
    """The streams of root/train/<class>/* and of root/val, root/test or both, as
    :func:`tcp_core.datasets.sources.image_folder` reads them into memory: a single held-out part is for testing, and
    ``val_images`` (as in :meth:`Stream.split`) of the training images then validate. Other options as in
    :class:`Stream`.

    Raises:
        FileNotFoundError: if a folder is missing or empty.
        ValueError: if the parts' classes differ, or no image would be left to train on or to validate with.
    """
    root = expanded(root).resolve()
    options = {"size": size, "batch_size": batch_size, "workers": workers, "seed": seed, "skip_corrupt": skip_corrupt}
    # the folders' names are compared first: to list the files of a million images takes minutes
    parts = {part: Stream(root / part, train=part == "train", **options) for part in folder_parts(root)}
    if len(parts) == 3:
        return Splits(**parts)
    train, test = parts.values()
    return Splits(*train.split(val_images), test)


class Stream:
    """Batches ``(x, y)`` of the images in ``root``/<class>/*, for :func:`tcp_core.fit` to train on or to validate with.

    x: float32 ``[batch, 3, size, size]``, normalised; y: int64 ``[batch]``. Order and augmentation depend on ``seed``
    and the epoch alone, whatever the number of workers, so a stopped run goes on with the same batches. Of several
    processes each trains on its own part of every batch, ``batch_size`` images: :func:`tcp_core.fit` sees to it, and a
    loop of one's own does by :meth:`among`.

    Args:
        root: a folder with one folder of images a class; hidden files and folders are passed over.
        size: side of the square that the network sees.
        batch_size: images a batch; when training, what is left at an epoch's end is dropped.
        train: random crop (8 to 100 % of the area) and mirroring, shuffled; else the centre, in order of the names.
        workers: processes that decode; 0: in this one.
        seed: of order and augmentation.
        skip_corrupt: leave out images that cannot be read, name each in a warning and count it in ``skipped``; if False
            such an image is an error. Pillow's limits on decompression bombs hold: raise ``PIL.Image.MAX_IMAGE_PIXELS``
            for images that are larger on purpose.
        mean, std: by which pixels in [0, 1] are normalised; ImageNet's by default.

    Attributes:
        classes: names of the classes, in the order of their labels.
        shape: channels, height and width of one image as the network sees it.
        paths, labels: of the images, bytes and int64 ``[images]``.
        skipped: one line for each image that was left out so far, in this process.

    Raises:
        FileNotFoundError: if ``root`` is not such a folder.
        ValueError: for a number out of range, or a root whose folders are the parts train, val and test; while
            iterating, with the name of an image that cannot be read.
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
        for name, number, least in (("size", size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name}={number!r}; it must be an int of at least {least}.")
        folder = os.fspath(expanded(root))
        try:
            self.classes = tuple(class_folders(folder))
            files = class_files(folder, self.classes)
        except OSError as error:
            raise FileNotFoundError(f"{root} must be a folder with one folder of images a class ({error}).") from error
        if "train" in self.classes and len(self.classes) > 1 and {*self.classes} <= {"train", "val", "test"}:
            raise ValueError(
                f"{root} has the folders {', '.join(self.classes)}, which are parts of a data set and would be taken "
                f"for its classes: give Stream({str(Path(root) / 'train')!r}, train=True) and so on, or "
                f"streams.load({str(root)!r}), which gives them all."
            )
        # in one piece, which workers share: of a list each would soon have a copy, as it counts references in it
        by_folder = (sorted(members, key=os.path.split) for members in files.values())
        self.paths = np.array([os.fsencode(path) for members in by_folder for path in members])
        self.labels = np.repeat(np.arange(len(files)), [len(members) for members in files.values()])
        self.size, self.batch_size, self.train, self.workers, self.seed = size, batch_size, train, workers, seed
        self.skip_corrupt, self.skipped, self.mean, self.std = skip_corrupt, [], mean, std
        self.shape, self.epoch, self.dealt = (3, size, size), 0, None

    def split(self, val_images: float | int, *, seed: int = 0) -> tuple[Stream, Stream]:
        """(train, val): two disjoint parts with the class proportions of the whole; val sees the centre of each image.

        val_images: how many images the second part has, as a fraction (float) or a number (int). The choice is that of
        :meth:`tcp_core.datasets.images.Images.split`. Raises ValueError if one of the parts would be empty.
        """
        chosen = stratified(self.labels, len(self.classes), val_images, seed=seed)
        train, val = copy.copy(self), copy.copy(self)
        val.train = False
        for part, members in ((train, ~chosen), (val, chosen)):
            part.paths, part.labels, part.skipped = self.paths[members], self.labels[members], []
        return train, val

    def part(self, rank: int, world: int) -> Stream:
        """Every ``world``-th image from number ``rank`` on; ``skipped`` is shared."""
        part = copy.copy(self)
        part.paths, part.labels = self.paths[rank::world], self.labels[rank::world]
        return part

    def among(self, rank: int, world: int) -> Stream:
        """The same stream as process ``rank`` of ``world`` trains on it: its own part of every batch; ``skipped`` is
        shared.
        """
        stream = copy.copy(self)
        stream.dealt = (rank, world)
        return stream

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass draw the order and augmentation of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        count, whole = len(self.labels), self.batch_size * self._part()[1]
        return count // whole if self.train else -(-count // whole)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Decoded(self),
            batch_sampler=self._batches(),
            num_workers=self.workers,
            generator=torch.Generator(),  # torch's own is left alone
            collate_fn=_together,
            pin_memory=torch.cuda.is_available(),
        )
        for x, y, faults in loader:
            for fault in faults:
                if not self.skip_corrupt:
                    raise ValueError(f"{fault}. Replace the file, or pass skip_corrupt=True to leave such images out.")
                if fault not in self.skipped:
                    self.skipped.append(fault)
                    warnings.warn(f"{fault}; it is left out, {len(self.skipped)} so far.", stacklevel=2)
            if len(y):
                yield x, y

    def __repr__(self) -> str:
        return f"Stream({len(self.labels):,} images in {len(self.classes)} classes, {len(self)} batches)"

    def _part(self) -> tuple[int, int]:
        if not self.train:
            return 0, 1
        if self.dealt is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"each of {dist.get_world_size()} processes would train on all images: give each its part of every "
                f"batch, stream.among(rank, world), as fit does by itself."
            )
        return self.dealt or (0, 1)

    def _batches(self) -> list[list[int]]:
        """Return the numbers of the images in each of this process's batches, as :class:`~.images.Batches`."""
        count, (rank, world) = len(self.labels), self._part()
        order = np.random.default_rng((self.seed, self.epoch)).permutation(count) if self.train else np.arange(count)
        starts = range(rank * self.batch_size, len(self) * world * self.batch_size, world * self.batch_size)
        return [order[start : start + self.batch_size].tolist() for start in starts]


class _Decoded(Dataset):
    """The images of a stream as the network sees them, each with random numbers of its own; faults as text."""

    def __init__(self, stream: Stream) -> None:
        self.paths, self.labels, size = stream.paths, stream.labels, stream.size
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        centre = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(stream.mean, stream.std)]
        self.change = v2.Compose([v2.PILToTensor(), *(crop if stream.train else centre), *scale])
        self.seed, self.epoch = stream.seed, stream.epoch
        self.resized = 0 if stream.train else round(size * 256 / 224)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        path = os.fsdecode(self.paths[index])
        try:
            image = self._opened(path)
        except Exception as error:  # Pillow's are of many kinds, that for a decompression bomb among them
            return f"{path} cannot be read ({str(error) or type(error).__name__})"
        (own,) = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(own))  # torch.manual_seed would seed a GPU's too
            return self.change(image), int(self.labels[index])

    def _opened(self, path: str) -> Image.Image:
        with Image.open(path) as image:
            image = rgb(image)
        # a line of pixels is no bomb to Pillow, but becomes one as its shorter side is brought to the network's size
        pixels = self.resized**2 * max(image.size) // min(image.size)
        if self.resized and Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"it is {image.width} x {image.height} pixels, which would be scaled to {pixels:,}")
        return image


def _together(samples: list) -> tuple[Tensor, Tensor, list[str]]:
    faults = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    return *(default_collate(good) if good else (torch.empty(0), torch.empty(0, dtype=torch.int64))), faults
