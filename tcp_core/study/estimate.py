"""How many hours a declaration takes, from training steps measured on the device at hand."""

import statistics
import time
from collections import Counter

import torch
from torch.nn import functional as F

from .. import nets
from ..training.batches import channels_last
from ..training.evaluation import PRECISIONS, autocast
from . import places
from .declaration import Declaration
from .results import environment

NOTE = """\
Measured: a step of the dense network (forward, backward, SGD) on {device}, {threads} thread(s); images are neither
decoded nor validated with. It stands for every method, as an upper bound: how fast the smaller network is that the
others come to train is not known beforehand (until then, a step of ours with its gates takes a few percent more)."""
HEADER = ("experiment", "network", "precision", "runs", "epochs", "images", "images/s", "hours a run", "hours in all")
MEASURED = ("network", "precision", "size", "batch_size", "threads")  # what the speed depends on


def table(declaration: Declaration) -> str:
    """Return, as text, the hours of all runs of a declaration on one device like the one at hand; nothing is saved.

    One row an experiment, network, size and number of epochs. Images are the training images: counted, or known.
    Raises RuntimeError if the data is neither known nor at hand.
    """
    shape, classes, _ = places.facts(declaration.data, declaration.images)
    if shape is None:
        raise RuntimeError("\n".join(declaration.missing))
    images = places.training_images(declaration.data, declaration.images)
    counts = Counter(
        (key.split("/")[0], run.values["epochs"], tuple(run.values.get(name) for name in MEASURED))
        for key, run in declaration.runs.items()
        if key not in declaration.skipped
    )
    speeds = {
        case: images_per_second(shape=shape, classes=classes, **dict(zip(MEASURED, case, strict=True)))
        for case in dict.fromkeys(case for _, _, case in counts)
    }
    rows, total = [HEADER], 0.0
    for (experiment, epochs, case), runs in counts.items():
        hours = epochs * images / speeds[case] / 3600
        total += runs * hours
        numbers = (f"{images:,}", f"{speeds[case]:,.1f}", f"{hours:,.1f}", f"{runs * hours:,.1f}")
        rows.append((experiment, *case[:2], str(runs), str(epochs), *numbers))
    rows.append(("all", "", "", str(counts.total()), "", "", "", "", f"{total:,.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    row = "  ".join(f"{{:{'<' if column < 3 else '>'}{width}}}" for column, width in enumerate(widths))
    threads = {case[-1] or torch.get_num_threads() for case in speeds}
    note = NOTE.format(device=environment()["device"], threads=" or ".join(map(str, sorted(threads))))
    return "\n".join([*(row.format(*cells) for cells in rows), note])


def images_per_second(
    network: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    batch_size: int,
    size: int = 0,
    precision: str = "fp32",
    threads: int = 0,
    seconds: float = 2.0,
) -> float:
    """Return how many images a second the dense network is trained on: the median of steps that take ``seconds``.

    On a CPU a batch has no more pixels than eight images of 224 x 224; on a GPU it has ``batch_size`` images. shape: of
    an image; size: the side of the square that it is made, 0 if it is left as it is; threads: 0 for torch's choice.
    """
    shape = (shape[0], size, size) if size else shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        batch_size = min(batch_size, max(8, 8 * 224**2 // (shape[1] * shape[2])))
    model = nets.build(network, num_classes=classes, in_channels=shape[0]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    x = channels_last(torch.randn(batch_size, *shape, device=device))
    y = torch.randint(classes, (batch_size,), device=device)
    took: list[float] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        while len(took) < 3 or sum(took[1:]) < seconds:  # the first one, which warms up, does not count
            started = time.perf_counter()
            with autocast(device, PRECISIONS[precision]):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            next(model.parameters()).flatten()[0].item()  # waits for the device
            took.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return batch_size / statistics.median(took[1:])
