"""Images per second of `Images.batches` beside torchvision's ImageFolder and DataLoader.

Both give the same kind of batches: random crop of the image padded by 4, random mirror image,
normalised float32. Both run once unmeasured (which fills the system's file cache, and ours) and
then `--repeats` times; the best time counts. Goal: 20 times as many images per second.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tcp_core.datasets import sources
from tcp_core.datasets.images import Images

GOAL = 20


def write_digits(root: Path) -> None:
    """The digits as JPEG files of 32 x 32 pixels: the folder that is used when none is given."""
    train, _, test = sources.digits()
    for part, images in (("train", train), ("test", test)):
        for name in images.classes:
            (root / part / name).mkdir(parents=True)
        for index, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
            image = Image.fromarray(pixels[0].numpy()).resize((32, 32)).convert("RGB")
            image.save(root / part / images.classes[label] / f"{index:04}.jpg", quality=75)


def best_rate(batches: Iterable, *, count: int, repeats: int) -> float:
    """Images per second of the fastest of several passes, after one that is not measured."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        seen = sum(len(x) for x, _ in batches)
        seconds.append(time.perf_counter() - start)
        assert seen == count, f"{seen} images came instead of {count}"
    return count / min(seconds[1:])


def measure(root: Path, *, limit: int, batch_size: int, repeats: int, cache: Path) -> dict:
    """Rates in images per second, and how many times the rate of each other one ours is."""
    train = sources.image_folder(root, cache=cache).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:limit]
    subset = Images(train.pixels[order], train.labels[order], train.classes, train.mean, train.std)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(train.pixels.shape[2:], padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(train.mean, train.std),
        ]
    )
    folder = Subset(ImageFolder(str(root / "train"), transform), order.tolist())
    options = {"count": len(order), "repeats": repeats}
    ours = subset.batches(batch_size, shuffle=True, augment="crop_flip", padding=4)
    rates = {"Images.batches": best_rate(ours, **options)}
    for workers in (0, 2):
        loader = DataLoader(
            folder,
            batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,  # so that starting them is not measured
        )
        rates[f"DataLoader, {workers} workers"] = best_rate(loader, **options)
    return {
        "images": len(order),
        "batch_size": batch_size,
        "images_per_second": rates,
        "ratio": {name: rates["Images.batches"] / rate for name, rate in rates.items()},
        "goal": GOAL,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }


def main() -> None:
    """Measure, print a table, and write the numbers as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="image folder; the digits as JPEG if left out")
    parser.add_argument("--images", type=int, default=5000, help="most images to take")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.data or Path(temporary) / "digits"
        if arguments.data is None:
            write_digits(root)
        result = measure(
            root,
            limit=arguments.images,
            batch_size=arguments.batch_size,
            repeats=arguments.repeats,
            cache=Path(temporary) / "cache",
        )
    result = {"data": arguments.data.name if arguments.data else "digits", **result}

    print(f"{result['images']} images of {result['data']}, batches of {result['batch_size']}")
    print(f"{'':24}{'images/s':>12}{'ours / this':>14}")
    for name, rate in result["images_per_second"].items():
        print(f"{name:24}{rate:12,.0f}{result['ratio'][name]:14.1f}")
    reached = min(list(result["ratio"].values())[1:]) >= GOAL
    print(f"goal: {GOAL} times the rate of DataLoader, {'reached' if reached else 'missed'}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
