"""What a training loop is fed with: batches by epoch, on its device, mixed where wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torchvision.transforms import v2

from ..datasets.images import Images
from ..datasets.streams import Stream
from .processes import rank_and_world

BATCH_SIZE = 128  # of images in memory, where none is given
MIXING = {"none": None, "mixup": v2.MixUp, "cutmix": v2.CutMix}


def by_epoch(images: Images | Iterable, batch_size: int | None, augment: str, seed: int | None, device: torch.device):
    """Return a function from the epoch's number to its batches; ``seed`` None keeps the order and every image.

    ``batch_size`` is of images in memory; batches that are made already have their own.
    """
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

    class Moved:
        def __len__(self) -> int:
            return len(images)

        def __iter__(self):
            return ((_moved(x, device), _moved(y, device)) for x, y in images)

    moved = Moved()
    told = images if hasattr(images, "set_epoch") else getattr(images, "sampler", None)

    def of_epoch(epoch: int) -> Moved:
        if hasattr(told, "set_epoch"):
            told.set_epoch(epoch)
        return moved

    return of_epoch


def _moved(value, device: torch.device):
    """Return a tensor, or tuples, lists and dicts of some, on the device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


def check_batch_size(images: Images | Iterable, batch_size: int | None) -> None:
    """Raise ValueError if batches that are made already have another size than the one that was asked for."""
    if batch_size is None or isinstance(images, Images):
        return
    own = getattr(images, "batch_size", None)
    if own is not None and own != batch_size:
        raise ValueError(
            f"batch_size={batch_size} given, but this {type(images).__name__} makes batches of {own}: build it with "
            f"batch_size={batch_size}, or leave batch_size out here."
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
