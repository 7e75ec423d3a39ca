"""Where images come from: digits that need no download, CIFAR-10, and any folder of images.

`digits` needs no download, `cifar10` reads torchvision's format, `image_folder` reads any
`root/{train,val,test}/<class>/*`; `load` picks one of them by name or path.
"""

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import beside, expanded, first_line, save_hashed
from .images import Images

# Inputs of the published CIFAR-10 and ImageNet weights: load(..., **IMAGENET_STATISTICS)
IMAGENET_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DECODING = 2  # raised when `_decode` changes, so that files cached before are made again
KIND = "tcp_core images"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Splits(NamedTuple):
    """The parts of a data set, `Images` or a `Stream`; None where it has no such part."""

    train: Images
    val: Images | None
    test: Images | None


def load(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    download: bool = False,
    size: int | tuple[int, int] | None = None,
    cache: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """The data set of that name ("digits", "cifar10"), or the one at that path: an image folder, or CIFAR-10.

    CIFAR-10 is recognised by the folder cifar-10-batches-py in it. root, download: for `cifar10`;
    size, cache: for `image_folder` alone; mean, std: for all, those of the training images if None.

    Raises ValueError or FileNotFoundError, saying what to do, if there is no such data set.
    """
    cifar = name_or_path == "cifar10" or (expanded(name_or_path) / "cifar-10-batches-py").is_dir()
    if size is not None and (cifar or name_or_path == "digits"):
        raise ValueError(
            f"size={size} given, to which the images of a folder are resized; {'cifar10' if cifar else 'digits'} has "
            f"one size, so leave it out."
        )
    if name_or_path == "digits":
        return digits(mean=mean, std=std)
    if name_or_path == "cifar10":
        if root is None:
            raise ValueError(
                "cifar10 needs root, the folder that holds (or with download=True will hold) cifar-10-batches-py"
            )
        return cifar10(root, download=download, mean=mean, std=std)
    if cifar:
        return cifar10(name_or_path, mean=mean, std=std)
    return image_folder(name_or_path, size=size, cache=cache, mean=mean, std=std)


def digits(*, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Splits:
    """Scikit-learn's 1,797 handwritten digits, gray, 8 x 8.

    Always the same stratified parts: 1,257 train, 180 val and 360 test images.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed here: pip install scikit-learn", name=error.name
        ) from error
    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    whole = Images(pixels, labels, tuple(str(digit) for digit in range(10)), (0.0,), (1.0,))
    rest, test = whole.split(360)
    train, val = rest.split(180)
    return _normalised(Splits(train, val, test), mean, std)


def cifar10(
    root: str | Path,
    *,
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """CIFAR-10 (Krizhevsky 2009), 50,000 train and 10,000 test images, from torchvision's format.

    Raises FileNotFoundError if `root` does not hold it, whole, and download is False.
    """
    from torchvision.datasets import CIFAR10

    root, parts = expanded(root), []
    for train in (True, False):
        try:
            part = CIFAR10(str(root), train=train, download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {root}, or not whole ({error}); pass download=True to fetch "
                "it, or as root the folder that holds cifar-10-batches-py"
            ) from error
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(part.targets)
        parts.append(Images(pixels, labels, tuple(part.classes), (0.0,) * 3, (1.0,) * 3))
    return _normalised(Splits(parts[0], None, parts[1]), mean, std)


def image_folder(
    root: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    cache: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """The images of root/train/<class>/* and of root/val, root/test or both, in RGB.

    size: (height, width), or one number for both: images are resized to cover it and cropped at
        the centre; None if all have one size already.
    cache: folder that keeps the decoded images for the next start; if None the environment
        variable TCP_CACHE, or ~/.cache/tcp_core. Made again whenever a file's name, size or time
        of change differs, and, with a warning, if what is kept is damaged (by its SHA-256).

    Raises FileNotFoundError for a missing or empty folder, ValueError for an unreadable image, for
    images of several sizes without `size`, and for parts whose classes differ.
    """
    root = expanded(root).resolve()
    files = {part: class_files(root / part, classes) for part, classes in folder_parts(root).items()}
    size = (size, size) if isinstance(size, int) else size
    if cache is None:
        cache = os.environ.get("TCP_CACHE") or "~/.cache/tcp_core"
    parts = {part: _read(root / part, files[part], size, expanded(cache)) for part in files}
    shapes = {part: tuple(images.pixels.shape[2:]) for part, images in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the images of {root} differ in height and width: {shapes}; pass size to resize them")
    return _normalised(Splits(**{"val": None, "test": None, **parts}), mean, std)


def folder_parts(root: Path) -> dict[str, list[str]]:
    """The parts (train, val, test) of an image folder, and the classes of each: the same for all.

    Only the folders' names are read. Raises FileNotFoundError or ValueError if one is missing or their classes differ.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}; pass the path of an image folder with train/<class>/* and "
            'test/<class>/* (or val) in it, or, for images in memory, one of the names "digits", "cifar10"'
        )
    present = [part for part in Splits._fields if (root / part).is_dir()]
    if "train" not in present or len(present) < 2:
        raise FileNotFoundError(
            f"{root} has {', '.join(present) or 'none'} of the folders train, val, test; it "
            "needs train and at least one of val, test, each with one folder of images a class"
        )
    parts = {part: class_folders(root / part) for part in present}
    for part in present[1:]:
        if differing := set(parts[part]) ^ set(parts["train"]):
            raise ValueError(
                f"{root / 'train'} and {root / part} must have the same classes, but only one "
                f"of them has {', '.join(sorted(differing)[:10])}; add or remove these folders"
            )
    return parts


def class_folders(folder: str | Path) -> list[str]:
    """The names of the folders in `folder`, sorted, hidden ones left out; FileNotFoundError if there are none."""
    entries = list(os.scandir(folder))
    names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    if not names:
        found = "has files but no folders" if entries else "is empty"
        raise FileNotFoundError(f"{folder} {found}; it must hold one folder of images for each class")
    return names


def class_files(folder: str | Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """The paths of the images of every class, sorted by name; FileNotFoundError if a class has none."""
    files = {name: sorted(image_files(os.path.join(folder, name))) for name in classes}
    if empty := [name for name in classes if not files[name]]:
        raise FileNotFoundError(
            f"no image in {os.path.join(folder, empty[0])}; every class needs at least one file that ends in "
            f"{', '.join(SUFFIXES)}"
        )
    return files


def image_files(folder: str | Path) -> Iterator[str]:
    """The paths of the images in `folder` and its subfolders, in no order, links followed, hidden names left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":  # a notebook server's checkpoints, macOS's files beside files
                continue
            if entry.is_dir():
                yield from image_files(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path


def _read(folder: Path, files: dict[str, list[str]], size: tuple[int, int] | None, cache: Path) -> Images:
    """Decode, or take from the cache, the images of one part."""
    place = hashlib.sha256(f"{folder}|{size}".encode()).hexdigest()[:16]
    saved = cache / f"{folder.parent.name}-{folder.name}-{place}.pt"
    states = {name: [(path, *_size_and_time(path)) for path in members] for name, members in files.items()}
    fingerprint = hashlib.sha256(json.dumps([DECODING, states]).encode()).hexdigest()
    stored = _from_cache(saved, fingerprint)
    if stored is None:
        counts = torch.tensor([len(members) for members in files.values()])
        stored = {
            "fingerprint": fingerprint,
            "pixels": _decode_all([*itertools.chain(*files.values())], size),
            "labels": torch.arange(len(counts)).repeat_interleave(counts),
        }
        _to_cache(saved, stored)
    return Images(stored["pixels"], stored["labels"], tuple(files), (0.0,) * 3, (1.0,) * 3)


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _decode_all(paths: list[str], size: tuple[int, int] | None) -> Tensor:
    first = _decode(paths[0], size)
    pixels = np.empty((len(paths), *first.shape), dtype=np.uint8)

    def fill(position: int) -> None:
        image = _decode(paths[position], size)
        if image.shape != first.shape:
            raise ValueError(
                f"{paths[position]} has height x width {image.shape[0]} x {image.shape[1]}, but "
                f"{paths[0]} has {first.shape[0]} x {first.shape[1]}; pass size to resize them all"
            )
        pixels[position] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(paths))):
            pass  # waits, and raises what fill raised
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _decode(path: str, size: tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image = rgb(image)
    except Exception as error:  # Pillow's are of many kinds, that for a decompression bomb among them
        raise ValueError(f"{path} cannot be read as an image ({error}); replace it or delete it") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, eight bits each: of gray in 16 bits the upper eight, as Pillow has them of colours in 16 bits.

    Raises ValueError for gray in 32 bits, of which a file does not say what is white.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:  # which Pillow would clip: all above 255 would be white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"gray of 32-bit {'integers' if image.mode == 'I' else 'floats'}; convert it to eight bits")
    return image.convert("RGB")


def _from_cache(path: Path, fingerprint: str) -> dict | None:
    try:
        with path.open("rb") as file:
            header = file.readline(len(first_line(KIND)))
            if header.startswith(b"PK\3\4"):  # of an earlier version, which had no hash
                return None
            if header != first_line(KIND, hashlib.file_digest(file, "sha256").hexdigest()):
                raise ValueError("the file is not what was written")
            file.seek(len(header))
            stored = torch.load(file, weights_only=True)
        return stored if stored["fingerprint"] == fingerprint else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception:  # of the disk, or torch's, which are many
        # without torch's own message, which proposes to load the file unsafely
        warnings.warn(f"the cache file {path} is unreadable and is made again", stacklevel=2)
        return None


def _to_cache(path: Path, stored: dict) -> None:
    try:
        with beside(path) as part, part.open("wb") as file:
            save_hashed(stored, file, KIND)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"could not keep the decoded images in {path.parent} ({error}); they will be decoded "
            "again next time. Pass a writable folder as cache, or set TCP_CACHE.",
            stacklevel=2,
        )


def _normalised(splits: Splits, mean: Sequence[float] | None, std: Sequence[float] | None) -> Splits:
    """All parts with the given mean and std, or with those of the training images."""
    if mean is None or std is None:
        channels = splits.train.pixels.transpose(0, 1).flatten(1)
        counts = torch.stack([channel.bincount(minlength=256) for channel in channels]).double()
        shares = counts / counts.sum(1, keepdim=True)
        values = torch.arange(256).double() / 255
        average = shares @ values
        deviation = (shares @ values**2 - average**2).clamp(min=0).sqrt()
        mean = average.tolist() if mean is None else mean
        # images of one colour are left as they are
        std = [spread or 1.0 for spread in deviation.tolist()] if std is None else std
    return Splits(*(part if part is None else replace(part, mean=tuple(mean), std=tuple(std)) for part in splits))
