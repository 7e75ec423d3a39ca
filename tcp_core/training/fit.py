"""One training loop for dense and tailored networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..channels import Channels
from ..cost import Budget
from ..datasets.images import Images
from ..state import keeping_modes
from ..tailor import Tailor
from ..tracing import trace
from .batches import by_epoch, channels_last, mixer, to_their_end
from .checkpoints import write
from .processes import (
    agree,
    gathered,
    plain_batch_norms,
    rank_and_world,
    share_buffers,
    summed,
    synchronised,
    together,
)
from .run import PRECISIONS, FitResult, Run, autocast, random_state, resumable, set_random_state


def fit(
    model: nn.Module,
    train: Images | Iterable,
    val: Images | Iterable | None = None,
    *,
    budget: Budget | Mapping | None = None,
    prune: Callable[[nn.Module, Channels, int], nn.Module] | None = None,
    epochs: int,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.05,
    restart: float = 0.0,
    label_smoothing: float = 0.0,
    augment: str = "crop_flip",
    mixing: str = "none",
    accumulate: int = 1,
    precision: str = "fp32",
    sync_batch_norm: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_epoch: Callable[[dict], Any] | None = None,
    on_step: Callable[[int, int], Any] | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 0,
    **tailoring: Any,
) -> FitResult:
    """Train ``model`` in one run that ends in a network of exactly the budget.

    Where torch.distributed has been initialised, it is one run over all processes: each trains on its own part of every
    batch, ``batch_size`` images a process, and all end with the same network. Each is given its ``device``; batches
    that are neither ``Images`` nor a ``Stream`` must be divided already (a DistributedSampler).

    SGD with Nesterov momentum; the learning rate rises over the share ``warmup`` of the run and then follows a
    cosine to 0. As soon as the set of units is final, the network is made physically smaller and the same run goes on.

    Args:
        model: the dense network, trained or not; it is trained in place until it is made smaller.
        train: :class:`~tcp_core.datasets.images.Images`, :class:`~tcp_core.datasets.streams.Stream`, or any iterable of
            ``(x, y)`` batches with a length; it, or its sampler, is told the epoch if it has ``set_epoch``.
        val: the same, for the accuracy after each epoch; never the test images. None leaves it out.
        budget: a :class:`Budget` or dict; with neither it nor ``prune`` the dense network is trained.
        prune: another way to make the network smaller, called as ``prune(model, channels, steps)``; it returns what
            is trained in the model's place, see :func:`tcp_core.study.comparators.pruner`.
        epochs: passes over ``train``.
        restart: share of the run after which the learning rate's schedule starts anew, once; 0: it does not.
        weight_decay: of weights with two or more dimensions; batch norms and biases have none.
        augment: "none", "crop" or "crop_flip", for ``Images``.
        mixing: "none", "mixup" or "cutmix" of each batch's images and labels, on the device they are trained on;
            ``train`` must know its ``classes``.
        accumulate: batches a step: their gradients are averaged. Batches left over at an epoch's end are not used.
        precision: "fp32", or "bf16" for autocast.
        sync_batch_norm: of several processes, have the batch norms see all images of a batch (torch's SyncBatchNorm, on
            GPUs only). The network that is returned has its own batch norms again.
        seed: order and augmentation of the training images.
        device: where to train; where the model is, if None.
        on_epoch: called with each row of the history and, as ``widths`` in it, the open channels of each layer.
        on_step: called with the number of steps taken and that of the whole run, after each step.
        checkpoints: a folder for checkpoints. If it has one, the run goes on from there, to the same end as a run that
            was never stopped; with checkpoints of another run it is refused.
        checkpoint_every: steps between two checkpoints; 0: one an epoch.
        tailoring: options of :class:`Tailor` (``ignore``, ``min_width``, ``phase``, ...).

    Raises:
        BudgetError, ValueError: before any training, see :class:`Tailor`.
        FloatingPointError: if the loss or a gradient is not finite, in all processes alike; weights, running statistics
            and the optimiser's state are as before that step.
        CheckpointError: if a checkpoint cannot be written, or the folder has those of another run.
    """
    _check_precision(precision)
    if not 0 <= restart < 1:
        raise ValueError(f"restart={restart!r}; it must be a share of the run in [0, 1), 0 for no restart.")
    for name, value in (("epochs", epochs), ("accumulate", accumulate)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; it must be an int of at least 1.")
    mix = mixer(mixing, train)
    device = _device(model, device)
    model.to(device)
    batches = by_epoch(train, batch_size, augment, seed, device)
    if val is not None:
        by_epoch(val, batch_size, "none", None, device)  # refused now rather than after the first epoch
    length = len(batches(0)) // accumulate
    if not length:
        least = "one batch" if accumulate == 1 else f"{accumulate} batches, which make a step"
        raise ValueError(f"{len(batches(0))} batches to train on; give at least {least}.")
    steps = epochs * length
    example = next(iter(batches(0)))[0][:2]
    channels = trace(model, example, ignore=tailoring.get("ignore", ()))
    pruned = _pruned(model, example, channels, steps, budget, prune, tailoring)
    # the network comes first: where it differs, so do its costs and bounds
    recipe = {"shapes": {name: list(shape) for name, shape in channels.shapes.items()}}
    recipe |= {"epochs": epochs, "steps": steps, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    recipe |= {"warmup": warmup, "restart": restart, "label_smoothing": label_smoothing, "augment": augment}
    recipe |= {"mixing": mixing, "accumulate": accumulate, "sync_batch_norm": sync_batch_norm}
    recipe |= {"precision": precision, "seed": seed, "bounds": {} if pruned is None else pruned.report()["bounds"]}
    agree(recipe)
    saved = resumable(checkpoints, recipe)
    agree({"checkpoint": saved and saved["step"]})  # not if each machine has a folder of its own
    if saved and pruned is not None:
        pruned.resume(saved["pruned"])
    classes = synchronised(model if pruned is None else pruned.model, device) if sync_batch_norm else {}
    groups = _parameter_groups(model if pruned is None else pruned.model, weight_decay)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    again = round(restart * steps)

    def factor(step: int) -> float:
        first, length = (0, again) if step < again else (again, steps - again)
        return warmup_cosine(step - first, length, warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    run = Run(model, pruned, channels, optimizer, schedule, recipe)
    rank, _ = rank_and_world()
    if saved:
        run.restore(saved)
    run.called = together(run.network, device)
    for epoch in range(len(run.history), epochs):
        started = time.perf_counter()
        taken = run.step - epoch * length  # steps of this epoch that were taken before the run was stopped
        if not taken:
            run.begin_epoch(device)
        elif taken < length:  # the same batches are drawn again
            set_random_state(run.epoch_random[rank], device)
        run.network.train()
        given = to_their_end(batches(epoch) if taken < length else ())
        for position in range(length if taken < length else 0):
            if position < taken:
                for _ in range(accumulate):
                    next(given)
                continue
            if position == taken > 0:
                set_random_state(saved["random"][rank], device)
            run.train((mix(*next(given)) for _ in range(accumulate)), accumulate, precision, label_smoothing)
            if on_step is not None:
                on_step(run.step, steps)
            if checkpoints is not None and run.step % (checkpoint_every or length) == 0:
                run.seconds += time.perf_counter() - started
                state = run.state() | {"random": gathered(random_state(device))}
                if rank == 0:
                    write(checkpoints, run.step, state)
                started = time.perf_counter()
        if taken == length:
            set_random_state(saved["random"][rank], device)
        run.seconds += time.perf_counter() - started
        share_buffers(run.network)
        row = run.end_epoch(_validated(run.network, val, precision, device) if val is not None else {})
        if on_epoch is not None:
            on_epoch(row | {"widths": channels.widths(run.open_units)})
    plain_batch_norms(run.trained, classes)
    return run.result(length)


def _pruned(model, example, channels: Channels, steps: int, budget, prune, tailoring: dict) -> nn.Module | None:
    """Return what makes the network smaller and is called in its place; None to train it as it is."""
    if budget is not None and prune is not None:
        raise TypeError("give budget or prune, not both: prune brings its own budget.")
    if budget is not None:
        return Tailor(model, example, budget=budget, steps=steps, channels=channels, **tailoring)
    if tailoring:
        raise TypeError(f"options {sorted(tailoring)} need a budget; without one the dense network is trained.")
    return None if prune is None else prune(model, channels, steps)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images | Iterable,
    *,
    batch_size: int = 512,
    precision: str = "fp32",
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Return ``{"loss", "accuracy"}`` (mean cross-entropy, fraction right) of ``model`` in eval mode on ``images``."""
    _check_precision(precision)
    return _means(_sums(model, images, batch_size, precision, _device(model, device)))


def _sums(model: nn.Module, images: Images | Iterable, batch_size: int, precision: str, device: torch.device) -> list:
    """Return the sum of losses, the number of images that the model is right about, and that of all."""
    loss, right, seen = 0.0, 0, 0
    with keeping_modes(model):
        model.eval()
        for x, y in by_epoch(images, batch_size, "none", None, device)(0):
            with autocast(device, PRECISIONS[precision]):
                logits = model(channels_last(x))
            loss += float(F.cross_entropy(logits.float(), y, reduction="sum"))
            right += int((logits.argmax(1) == y).sum())
            seen += len(y)
    return [loss, right, seen]


def _means(sums: list) -> dict[str, float]:
    loss, right, seen = sums
    if not seen:
        raise ValueError("there are no images to evaluate on; give at least one batch.")
    return {"loss": loss / seen, "accuracy": right / seen}


@torch.no_grad()
def _validated(model: nn.Module, val: Images | Iterable, precision: str, device: torch.device) -> dict[str, float]:
    """Evaluate, each process on its own part of the images; on all of them where they cannot be divided."""
    rank, world = rank_and_world()
    if world == 1 or not hasattr(val, "part"):
        return evaluate(model, val, precision=precision, device=device)
    sums = _sums(model, val.part(rank, world), 512, precision, device)
    return _means(summed(torch.tensor(sums, dtype=torch.float64, device=device)).tolist())


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate's factor at ``step``: linear over the share ``warmup`` of ``steps``, then a cosine."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, steps - rising))))


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}; it must be one of {', '.join(PRECISIONS)}.")


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights decay; batch norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
