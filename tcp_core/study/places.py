"""Places of data on this machine: which data set a folder is, and what is known of it before its images are read."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..datasets.sources import image_files

TORCHVISION = "cifar-10-batches-py"


class Facts(NamedTuple):
    """Shape of an image, number of classes and of training images; None for what is not known."""

    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    images: int | None = None


KNOWN = {  # ImageNet's images are of many sizes; this is the one that its networks are counted at
    "digits": Facts((1, 8, 8), 10, 1257),
    "cifar10": Facts((3, 32, 32), 10, 50_000),
    "imagenet": Facts((3, 224, 224), 1000, 1_281_167),
}


def name_of(folder: str | Path) -> str:
    """Return the name of the data in a folder: its own, but "cifar10" and "imagenet" are known by what they hold."""
    folder = Path(os.path.abspath(Path(folder).expanduser()))  # not resolved: a link has a name of its own
    if (folder / TORCHVISION).is_dir():
        return "cifar10"
    return "imagenet" if _is_imagenet(_classes(folder / "train")) else folder.name


def fault(data: str, folder: Path) -> str:
    """Say what keeps a folder from being the place of that data, "" if nothing does; no image is opened or counted."""
    if data == "digits":
        return "digits come with scikit-learn; leave it out"
    if data == "imagenet":
        found = {part: _classes(folder / part) for part in ("train", "val")}
        if all(map(_is_imagenet, found.values())) and found["train"] == found["val"]:
            return ""
        holds = " and ".join(f"{len(names):,} folders in {part}/" for part, names in found.items())
        odd = sorted(found["train"] ^ found["val"] or {name for name in found["train"] if not _is_wnid(name)})[:1]
        holds += f", {odd[0]} among them" if odd and all(found.values()) else ""
        return f"ImageNet has 1,000 class folders such as n01440764 in train/ and the same in val/; there are {holds}"
    if data == "cifar10" and (folder / TORCHVISION).is_dir():
        return ""
    if folder.name != data:
        return f"its last part must be the declared name, {data}"
    if not (folder / "train").is_dir():
        return f"there must be train/<class>/* in it, or, for cifar10, {TORCHVISION}"
    return ""


def facts(data: str, folder: Path | None) -> Facts:
    """Return what is known of that data, from the folder, if it is at hand, or beforehand.

    Of a folder, one image is opened and none counted. ValueError if there is none.
    """
    if data in KNOWN or folder is None or not (folder / "train").is_dir():
        return KNOWN.get(data, Facts())
    first = next(_images(folder), None)
    if first is None:
        raise ValueError(f"there is no image in {folder / 'train'}")
    with Image.open(first) as image:
        return Facts((3, image.height, image.width), len(_classes(folder / "train")))


def training_images(data: str, folder: Path | None) -> int | None:
    """Return how many training images that data has, counted in its folder where they are not known beforehand."""
    if data in KNOWN or folder is None:
        return KNOWN.get(data, Facts()).images
    return sum(1 for _ in _images(folder))


def _classes(part: Path) -> set[str]:
    if not part.is_dir():
        return set()
    return {entry.name for entry in os.scandir(part) if entry.name[0] != "." and entry.is_dir()}


def _images(folder: Path) -> Iterator[str]:
    train = folder / "train"
    return (path for name in sorted(_classes(train)) for path in image_files(train / name))


def _is_imagenet(classes: set[str]) -> bool:
    return len(classes) == 1000 and all(map(_is_wnid, classes))


def _is_wnid(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None
