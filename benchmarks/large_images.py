"""Images per second of a `Stream`, beside those of a ResNet-50 training step on the same device.

The images are made in a temporary folder: random crops of the two photographs that come with scikit-learn (640 x 427),
resized to 500 x 375 and saved as JPEG at quality 97. Decoding is what costs, and depends on size and quality.
One worker keeps one core busy, so images per second of the step over those of one worker is the number of cores that
one device needs.

    python benchmarks/large_images.py --out build/benchmarks/large_images.json
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from input_pipeline import best_rate
from PIL import Image
from run_cost import Training
from sklearn.datasets import load_sample_images
from torchvision import models

from tcp_core.datasets.streams import Stream
from tcp_core.study.results import environment
from tcp_core.training.evaluation import PRECISIONS

WIDTH, HEIGHT, QUALITY = 500, 375, 97


def write_photographs(root: Path, count: int) -> float:
    """Write `count` images in two classes; return the mean size of a file in KB (1,000 bytes)."""
    numbers = random.Random(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    size = 0
    for index in range(count):
        photograph = photographs[index % 2]
        height = photograph.height * numbers.uniform(0.6, 1)
        width = height * WIDTH / HEIGHT
        left = numbers.uniform(0, photograph.width - width)
        top = numbers.uniform(0, photograph.height - height)
        path = root / f"class{index % 2}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        crop.save(path, quality=QUALITY)
        size += path.stat().st_size
    return size / count / 1000


def decoding_rate(root: Path) -> float:
    """Return images per second of reading and decoding alone, in this process."""
    paths = sorted(root.glob("*/*.jpg"))
    started = time.perf_counter()
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB")
    return len(paths) / (time.perf_counter() - started)


def step_rate(precision: str, *, threads: int, batch_size: int, size: int, repeats: int = 5) -> float:
    """Return images per second of ResNet-50's training step."""
    torch.set_num_threads(threads)
    x, y = torch.randn(batch_size, 3, size, size), torch.randint(1000, (batch_size,))
    training = Training(models.resnet50(), x, y, precision)
    return batch_size / statistics.median([training.step() for _ in range(repeats + 1)][1:])


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--step-batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="of the training step; decoding has one a worker")
    parser.add_argument("--repeats", type=int, default=2, help="passes, after one that is not measured")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        weight = write_photographs(Path(folder), options.images)
        count = options.images - options.images % options.batch_size
        for workers in options.workers:
            stream = Stream(folder, size=options.size, batch_size=options.batch_size, train=True, workers=workers)
            rates[workers] = best_rate(stream, count=count, repeats=options.repeats)
        decoding = decoding_rate(Path(folder))
    steps = {
        precision: step_rate(precision, threads=options.threads, batch_size=options.step_batch_size, size=options.size)
        for precision in PRECISIONS
    }
    one = rates[1] if 1 in rates else rates[options.workers[0]]
    cores = {precision: rate / one for precision, rate in steps.items()}

    print(f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {weight:.0f} KB each, cropped to {options.size}")
    for workers, rate in rates.items():
        print(f"Stream, {workers} workers          {rate:8.1f} images/s")
    print(f"decoding alone            {decoding:8.1f} images/s")
    for precision, rate in steps.items():
        print(f"ResNet-50 step, {precision}      {rate:8.1f} images/s, fed by {cores[precision]:.3f} cores")
    if options.out:
        result = {
            "images": options.images,
            "pixels": [WIDTH, HEIGHT],
            "kilobytes_per_image": weight,
            "size": options.size,
            "batch_size": options.batch_size,
            "images_per_second": {f"{workers} workers": rate for workers, rate in rates.items()},
            "decoding_alone_images_per_second": decoding,
            "step_batch_size": options.step_batch_size,
            "step_threads": options.threads,
            "step_images_per_second": steps,
            "cores_per_device": cores,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result | environment("cpu"), indent=2) + "\n")


if __name__ == "__main__":
    main()
