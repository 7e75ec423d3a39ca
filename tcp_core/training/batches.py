"""What a training loop is fed with: batches by epoch, on its device, mixed where wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torchvision.transforms import v2

from ..cost import is_number
from ..datasets.images import Images
from ..datasets.sources import Splits
from ..datasets.streams import Stream
from .processes import rank_and_world

BATCH_SIZE = 128  # of images in memory, where none is given
MIXING = {"none": None, "mixup": v2.MixUp, "cutmix": v2.CutMix}


def by_epoch(images: Images | Iterable, batch_size: int | None, augment: str, seed: int | None, device: torch.device):
    """Return a function from the epoch's number to its batches; ``seed`` None keeps the order and every image.

    ``batch_size``, ``augment`` and ``seed`` are of images in memory; batches that are made already have their own. A
    ``Stream`` is seen as it is held out, each image's centre, where ``seed`` is None.
    """
    if isinstance(images, Splits):
        raise TypeError("these are all parts of a data set (Splits); give one of them, such as data.train or data.val.")
    if isinstance(images, Images):
        batch_size = BATCH_SIZE if batch_size is None else batch_size
        images = images.to(device)
        if seed is None:
            return lambda epoch: images.batches(batch_size)
        if len(images) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} is larger than the {len(images)} training images; give a smaller one."
            )
        return lambda epoch: images.batches(
            batch_size, shuffle=True, augment=augment, seed=seed, epoch=epoch, drop_last=True, part=rank_and_world()
        )
    if not hasattr(images, "__len__"):
        raise ValueError(
            "batches must come from an iterable with a length, such as a DataLoader, so that steps can be planned."
        )

    if isinstance(images, Stream):
        images = images.among(*rank_and_world())
        images.train = images.train and seed is not None

    class Moved:
        def __len__(self) -> int:
            return len(images)

        def __iter__(self):
            return ((_moved(x, device), _moved(y, device)) for x, y in map(_pair, images))

    moved, told = Moved(), _told(images)

    def of_epoch(epoch: int) -> Moved:
        for each in told:
            each.set_epoch(epoch)
        return moved

    return of_epoch


def _told(loader: Any) -> list:
    """Return what is told the epoch: the loader if it can be, else the samplers in it, and in its batch sampler."""
    found, todo, seen = [], [loader], set()
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if hasattr(each, "set_epoch"):
            found.append(each)
        else:
            todo += [getattr(each, name, None) for name in ("sampler", "batch_sampler")]
    return found


def _pair(batch: Any) -> tuple[Tensor, Any]:
    """Return a batch's images and targets; raise TypeError, saying what to do, if it is anything but these two."""
    if not isinstance(batch, Mapping | Tensor):  # which may have two parts that are something else
        try:
            x, y = batch
        except (TypeError, ValueError):
            x = None
        if isinstance(x, Tensor) and not is_number(y) and not (isinstance(y, Tensor) and not y.ndim):
            return x, y
        if isinstance(x, Tensor):
            raise TypeError(
                f"a batch has {y!r} as its targets, so it is a single sample; make batches of the data set: "
                f"DataLoader(dataset, batch_size={BATCH_SIZE}, shuffle=True)."
            )
    if isinstance(batch, Mapping):
        said = f"{type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list):
        kinds = [type(each).__name__ for each in batch[:4]] + ["..."] * (len(batch) > 4)
        said = f"{type(batch).__name__} of {', '.join(kinds)}"
    else:
        said = type(batch).__name__
    raise TypeError(
        f"a batch is a {said}; it must be a pair (x, y), x one tensor and y the targets. Give a loader with a "
        f"collate_fn that makes pairs, or a class with __len__ and an __iter__ that yields them: (batch['image'], "
        f"batch['label']). Networks of several inputs are trained with tcp.Tailor in a loop of one's own."
    )


def _moved(value, device: torch.device):
    """Return a tensor, or tuples, lists and dicts of some, on the device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


def check_own(images: Images | Iterable, batch_size: int | None, augment: str | None, seed: int | None) -> None:
    """Raise ValueError if batches that are made already have another size, or seed, than the one that was asked for;
    warn of a seed for what has none, and of an augmentation, which they have had: it does nothing.
    """
    if isinstance(images, Images):
        return
    kind, own = type(images).__name__, getattr(images, "batch_size", None)
    if batch_size is not None and own is not None and own != batch_size:
        raise ValueError(
            f"batch_size={batch_size} given, but this {kind} makes batches of {own}: build it with "
            f"batch_size={batch_size}, or leave batch_size out here."
        )
    own = getattr(images, "seed", None)
    if seed is not None and own not in (None, seed):
        raise ValueError(
            f"seed={seed} given, but this {kind} has seed={own}: build it with seed={seed}, or leave seed out here."
        )
    if seed is not None and own is None:
        warnings.warn(
            f"seed={seed} changes nothing: this {kind} has an order of its own; seed it where it is built.",
            RuntimeWarning,
            stacklevel=3,
        )
    if augment is not None:
        warnings.warn(
            f"augment={augment!r} changes nothing: it is for Images, and this {kind} gives its images as they are "
            f"trained on.",
            RuntimeWarning,
            stacklevel=3,
        )


def to_their_end(batches: Iterable) -> Iterator:
    """Yield all batches; asked for one more than there are, say that their length was wrong."""
    yield from batches
    raise ValueError("the batches came to their end before their length (len) said they would; make the two agree.")


def mixer(mixing: str, images: Images | Iterable) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what mixes the images of one batch with each other, and their labels, on the batch's device.

    "none" changes nothing. Else labels become float ``[batch, classes]``, the share of each class: MixUp (Zhang et al.
    2018) and CutMix (Yun et al. 2019) as torchvision has them, with torch's own random numbers and alpha 1.
    """
    if mixing not in list(MIXING):  # a list, as what is given need not have a hash
        raise ValueError(f"mixing={mixing!r}; it must be one of {', '.join(MIXING)}.")
    if mixing == "none":
        return lambda x, y: (x, y)
    if not hasattr(images, "classes"):
        raise ValueError(
            f"mixing={mixing!r} needs to know the classes: give Images, a Stream or batches with the attribute "
            f"`classes`, or mix in your own loader."
        )
    return MIXING[mixing](num_classes=len(images.classes))


def channels_last(x: Tensor) -> Tensor:
    """Return images with their channels innermost in memory: convolutions of the whole network then run faster."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
