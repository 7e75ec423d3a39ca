"""One training loop for dense and tailored networks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..channels import Channels
from ..controller import Controller
from ..cost import Budget, is_whole
from ..datasets.images import Images
from ..files import expanded
from ..gates import check_ungated
from ..group import agree
from ..preparing import check_options
from ..state import keeping_modes
from ..tailor import Tailor, option_names
from ..tracing import trace
from . import identity
from .averaging import Average
from .batches import by_epoch, channels_last, check_own, mixer
from .checkpoints import names, newest
from .evaluation import PRECISIONS, autocast, check_precision, device_of
from .frames import printed, say
from .objective import (
    Objective,
    check_functions,
    check_labels,
    check_parameters,
    check_teacher,
    in_full_precision,
    taught,
    teacher_of,
)
from .processes import plain_batch_norms, rank_and_world, synchronised, together
from .recipe import Optimise, Schedule, described, optimise, scheduled
from .run import FitResult, Run, check_resumable, differing


def fit(
    model: nn.Module,
    train: Images | Iterable,
    val: Images | Iterable | None = None,
    *,
    budget: Budget | Mapping | None = None,
    prune: Callable[[nn.Module, Channels, int], nn.Module] | None = None,
    epochs: int,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
    restart: float = 0.0,
    optimizer: Optimise | None = None,
    schedule: Schedule | None = None,
    clip: float | None = None,
    ema: float | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[[Any, Any], Tensor | float] | None = None,
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.5,
    temperature: float = 4.0,
    augment: str | None = None,
    mixing: str = "none",
    accumulate: int = 1,
    precision: str = "fp32",
    sync_batch_norm: bool = False,
    seed: int | None = None,
    device: torch.device | str | None = None,
    verbose: bool | None = None,
    on_epoch: Callable[[dict], Any] | None = None,
    on_step: Callable[[int, int], Any] | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 0,
    **tailoring: Any,
) -> FitResult:
    """Train ``model`` in one run that ends in a network of exactly the budget.

    As soon as the last losing gate has closed, the network is made physically smaller and the same run goes on. By
    default with SGD and Nesterov momentum; the learning rate rises over the share ``warmup`` of the run and then
    follows a cosine to 0.

    Where torch.distributed has been initialised, it is one run over all processes: each trains on its own part of every
    batch, ``batch_size`` images a process, and all end with the same network. Each is given its ``device``; batches
    that are neither ``Images`` nor a ``Stream`` must be divided already (a DistributedSampler).

    Args:
        model: the dense network, trained or not; it is trained in place until it is made smaller.
        train: :class:`~tcp_core.datasets.images.Images`, :class:`~tcp_core.datasets.streams.Stream`, or any iterable of
            ``(x, y)`` batches with a length; it, or else its samplers (``sampler``, ``batch_sampler`` and what is in
            these), are told the epoch if they have ``set_epoch``. Images in memory need no workers; a ``Stream`` and a
            DataLoader have theirs (``workers``, ``num_workers``).
        val: the same, for the accuracy after each epoch; never the test images. None leaves it out. Its first batch is
            tried before training. Of several processes the means are over the images of all: batches may be divided, or
            be whole in every process. A DistributedSampler repeats images to have equal parts, which then count twice.
        budget: a :class:`Budget` or dict; with neither it nor ``prune`` the dense network is trained.
        prune: another way to make the network smaller, called as ``prune(model, channels, steps)``; it returns what
            is trained in the model's place, see :func:`tcp_core.study.comparators.pruner`.
        epochs: passes over ``train``.
        batch_size: images a batch, of ``Images`` (128 if None). Batches that are made already have their own size.
        lr: peak of the learning rate, 0.1 if None; not with ``optimizer``.
        momentum: of SGD, 0.9 if None; not with ``optimizer``.
        weight_decay: of weights with two or more dimensions; batch norms and biases have none. 5e-4 if None, and with
            ``optimizer`` what that says.
        warmup: share of the run in which the learning rate rises, 0.05 if None; not with ``schedule``.
        restart: share of the run after which the learning rate's schedule starts anew, once; 0: it does not.
        optimizer: another optimiser, as a function of parameter groups (weights; batch norms and biases):
            ``lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)``.
        schedule: another schedule of the learning rate, as a function of (optimizer, steps) that gives one of
            torch.optim.lr_scheduler, which then moves once a step.
        clip: the norm to which the gradients of all weights together are clipped before each step; None: they are not.
        ema: decay of a moving average of the weights, such as 0.999: validation measures it and ``FitResult.model`` is
            it. In step n it is ``min(ema, (1 + n) / (10 + n))``. None: there is none.
        loss: the mean loss of a batch, as a function of (outputs, targets); None: cross-entropy. Outputs are what the
            network returns, in float32; targets are the batch's second part.
        metric: what takes the accuracy's place, as a function of (outputs, targets) that gives a batch's mean; None:
            the share of images or pixels that are right, NaN where outputs are not logits.
        label_smoothing: of cross-entropy, in training.
        teacher: a trained network to learn from, which may be ``model`` as it is now. The loss is then
            ``(1 - teacher_weight) * loss + teacher_weight * T**2 * KL(teacher || network)`` of ``softmax(logits / T)``
            (Hinton et al. 2015), T the ``temperature``. It is copied and runs in eval mode, on the batch as it was
            mixed, on ``device`` and in the run's precision.
        teacher_weight: share of the loss that comes from the teacher.
        temperature: by which logits are divided before the softmax.
        augment: "none", "crop" or "crop_flip", of ``Images`` ("crop_flip" if None). Others come augmented.
        mixing: "none", "mixup" or "cutmix" of each batch's images and labels, on the device they are trained on;
            ``train`` must know its ``classes``.
        accumulate: batches a step: their gradients are averaged. Batches left over at an epoch's end are not used.
        precision: "fp32", or "bf16" for autocast.
        sync_batch_norm: of several processes, have the batch norms see all images of a batch (torch's SyncBatchNorm, on
            GPUs only). The network that is returned has its own batch norms again.
        seed: of order and augmentation, of ``Images`` (0 if None). Batches that are made already have their own.
        device: where to train; where the model is, if None.
        verbose: whether to print a row an epoch; if None, unless ``on_epoch`` or ``on_step`` is given. That a run goes
            on from a checkpoint is said unless it is False.
        on_epoch: called with each row of the history and, as ``widths`` in it, the open channels of each layer.
        on_step: called with the number of steps taken and that of the whole run, after each step.
        checkpoints: a folder for checkpoints. If it has one, the run goes on from there, to the same end as a run that
            was never stopped; with checkpoints of another run it is refused.
        checkpoint_every: steps between two checkpoints; 0: one an epoch.
        tailoring: options of :class:`Tailor` (``ignore``, ``min_width``, ``phase``, ...).

    Raises:
        BudgetError, ValueError, TypeError: before any training, see :class:`Tailor`; ValueError at a batch with a label
            that the network has no output for, the step not taken.
        FloatingPointError: if the loss or a gradient is not finite, in all processes alike; weights, running statistics
            and the optimiser's state are as before that step.
        CheckpointError: if a checkpoint cannot be written, or the folder has those of another run.
    """
    check_names(tailoring)
    check_ungated(model, "train")
    checkpoints = None if checkpoints is None else expanded(checkpoints)
    device = device_of(model, device)
    check_precision(precision, device)
    given = {"epochs": epochs, "seed": seed, "accumulate": accumulate, "checkpoint_every": checkpoint_every}
    given |= {"batch_size": batch_size, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given |= {"warmup": warmup, "restart": restart, "clip": clip, "ema": ema, "label_smoothing": label_smoothing}
    check_numbers(given | {"teacher_weight": teacher_weight, "temperature": temperature})
    epochs, accumulate, checkpoint_every = int(epochs), int(accumulate), int(checkpoint_every)  # NumPy's, too
    batch_size, seed = (None if number is None else int(number) for number in (batch_size, seed))
    _check_pruning(budget, prune, loss, tailoring)
    for name, function in (("on_epoch", on_epoch), ("on_step", on_step)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r}; it must be a function, see fit's documentation, or None.")
    budget = None if budget is None else Budget.of(budget)
    _check_objective(loss, metric, label_smoothing, teacher, teacher_weight, temperature)
    mix = mixer(mixing, train)
    optimised, following = optimise(optimizer, lr, momentum, weight_decay), scheduled(schedule, warmup, restart)
    model.to(device)
    check_own(train, batch_size, augment, seed)
    augment, seed = "crop_flip" if augment is None else augment, 0 if seed is None else seed
    batches = by_epoch(train, batch_size, augment, seed, device)
    if val is not None:
        by_epoch(val, batch_size, "none", None, device)  # refused now rather than after the first epoch
    length = len(batches(0)) // accumulate
    if not length:
        least = "one batch" if accumulate == 1 else f"{accumulate} batches, which make a step"
        raise ValueError(f"{len(batches(0))} batches to train on; give at least {least}.")
    steps = epochs * length
    first_batch = next(iter(batches(0)))[0]
    example = first_batch[:2]
    tracing = {name: tailoring[name] for name in ("ignore", "also", "unused") if name in tailoring}
    channels = trace(model, example, **tracing)
    teacher = teacher_of(teacher, device)
    objective = Objective(loss, metric, label_smoothing, teacher, teacher_weight, temperature)
    _check_outputs(model, example, objective, precision, train, val)
    of_optimizer = described(optimised(model))
    # the network comes first: where it differs, so do its costs and bounds
    recipe = {"shapes": channels.shapes, "model": type(model).__qualname__, **channels.cost()}
    recipe |= {"epochs": epochs, "steps": steps, "batch_size": len(first_batch)}
    recipe |= {**identity.of_data(train), "processes": rank_and_world()[1]}
    recipe |= {"lr": of_optimizer["groups"][0].get("lr"), "optimizer": of_optimizer}
    recipe |= {"warmup": warmup, "restart": restart, "schedule": schedule}
    recipe |= {"clip": clip, "ema": ema, "loss": loss, "metric": metric, **objective.described()}
    recipe |= {"augment": augment, "seed": seed} if isinstance(train, Images) else {}
    recipe |= {"mixing": mixing, "accumulate": accumulate, "sync_batch_norm": sync_batch_norm}
    recipe |= {"precision": precision, "bounds": {}}
    recipe |= {} if budget is None else {"bytes_at": budget.bytes_at(), "place": _place(budget, tailoring)}
    recipe |= {"prune": Tailor if budget is not None else prune, "units": channels.units}
    recipe |= {"prunable": int(channels.prunable.sum())} | ({} if budget is None else _options(tailoring))
    recipe = identity.described(recipe)
    agree(recipe)
    known = set() if checkpoints is None else names(checkpoints)
    saved = None if checkpoints is None else newest(checkpoints)
    agree({"checkpoint": saved and saved["step"]})  # not if each machine has a folder of its own
    pruned = _pruned(model, example, channels, steps, budget, prune, _as_of(saved, recipe, budget, tailoring))
    if pruned is not None:
        recipe["bounds"] = identity.described(_bounds(pruned.report()))
    agree({"bounds": recipe["bounds"]})
    agree({"maturity": None if pruned is None else pruned.report().get("maturity")})  # of the weights they start with
    if checkpoints is not None:
        check_resumable(checkpoints, saved, recipe)
    if saved and pruned is not None:
        pruned.resume(saved["pruned"])
    trained = model if pruned is None else pruned.model
    classes = synchronised(trained, device) if sync_batch_norm else {}
    optimizer = optimised(trained)
    check_parameters(loss, trained, optimizer, kept=checkpoints is None and rank_and_world()[1] == 1)
    run = Run(
        *(model, pruned, channels, optimizer, following(optimizer, steps), recipe),
        **{"device": device, "length": length, "steps": steps, "objective": objective, "mix": mix},
        **{"accumulate": accumulate, "precision": precision, "clip": clip, "on_step": on_step},
        **{"average": None if ema is None else Average(trained, ema)},
        **{"checkpoints": checkpoints, "checkpoint_every": checkpoint_every, "known": known},
        **{"given": {"train": train, "val": val}},
    )
    first = rank_and_world()[0] == 0
    if saved:
        run.restore(saved)
        if first and verbose is not False:
            say(f"resuming from step {run.step} of {steps}")
    if val is not None:
        run.try_out(val)
    run.called = together(run.network, device)
    shown = first and (on_epoch is None and on_step is None if verbose is None else verbose)
    for epoch in range(len(run.history), epochs):
        run.epoch(epoch, batches)
        run.share()
        row = run.end_epoch(run.validate(val))
        if shown:
            say(printed(row, channels.cost(), epochs, share=metric is None))
        if on_epoch is not None:
            on_epoch(row | {"widths": channels.widths(run.open_units)})
    plain_batch_norms(run.trained, classes)
    return run.result()


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda number: is_whole(number) and number >= least


ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": ("an int of at least 1", _whole(1)),
    "seed": ("an int of at least 0, or None", lambda seed: seed is None or _whole(0)(seed)),
    "accumulate": ("an int of at least 1", _whole(1)),
    "checkpoint_every": ("an int of at least 0 steps, 0 for one an epoch", _whole(0)),
    "batch_size": ("an int of at least 1, or None", lambda size: size is None or _whole(1)(size)),
    "lr": ("a finite number above 0, or None", lambda rate: rate is None or 0 < rate < math.inf),
    "momentum": ("a number in [0, 1), or None", lambda share: share is None or 0 <= share < 1),
    "weight_decay": ("a finite number of at least 0, or None", lambda rate: rate is None or 0 <= rate < math.inf),
    "label_smoothing": ("a share of the label in [0, 1]", lambda share: 0 <= share <= 1),
    "warmup": ("a share of the run in [0, 1), or None", lambda share: share is None or 0 <= share < 1),
    "restart": ("a share of the run in [0, 1), 0 for no restart", lambda share: 0 <= share < 1),
    "clip": ("a norm above 0, or None", lambda norm: norm is None or norm > 0),
    "ema": ("a decay in (0, 1), such as 0.999, or None", lambda decay: decay is None or 0 < decay < 1),
    "teacher_weight": ("a share of the loss in [0, 1]", lambda share: 0 <= share <= 1),
    "temperature": ("above 0", lambda value: value > 0),
}
"""What numbers may be, in words, and whether one is that."""


def check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse numbers out of range, of those options in ``given`` that are numbers."""
    for name, (allowed, right) in ALLOWED.items():
        if name not in given:
            continue
        value = given[name]
        try:
            fits = not isinstance(value, bool | np.bool_) and right(value)
        except (TypeError, RuntimeError):  # no number at all, or several in a tensor
            fits = False
        if not fits:
            raise ValueError(f"{name}={value!r}; it must be {allowed}.")


FOUND = {
    "steps": "the steps are counted from epochs",
    "channels": "the network is traced here",
    "example_input": "the example is taken from train",
}
"""What a Tailor needs and :func:`fit` gives it."""


def check_names(given: Iterable[str]) -> None:
    """Refuse what is no option of :func:`fit`, nor one of a Tailor that it hands on."""
    own = [name for name in inspect.signature(fit).parameters if name != "tailoring"]
    for name in given:
        if name in ("workers", "num_workers"):
            raise TypeError(
                f"{name}= given: images in memory need none, and a Stream or DataLoader is built with its own: "
                f"Stream(..., workers=8), DataLoader(..., num_workers=8)."
            )
        if name in FOUND:
            raise TypeError(
                f"{name}= given: {FOUND[name]}, so leave it out. In a loop of one's own tcp.Tailor takes it."
            )
    check_options(given, [*own, *(name for name in option_names() if name not in FOUND)], "fit")


def _check_objective(loss, metric, label_smoothing, teacher, teacher_weight, temperature) -> None:
    """Refuse what is no function, and what would be ignored."""
    check_functions(loss=loss, metric=metric)
    if loss is not None and label_smoothing:
        raise TypeError(
            f"label_smoothing={label_smoothing!r} and loss= given: it is cross-entropy's, put it into loss."
        )
    if teacher is None and (teacher_weight, temperature) != (0.5, 4.0):
        raise TypeError(f"teacher_weight={teacher_weight!r}, temperature={temperature!r} need a teacher=.")


@torch.no_grad()
def _check_outputs(model: nn.Module, example: Tensor, objective: Objective, precision: str, train, val) -> None:
    """Refuse outputs, labels and a teacher that do not go together, as far as one forward pass in eval mode shows."""
    if objective.teacher is None and objective.loss is not None:
        return
    devices = [example.device] if example.is_cuda else []
    context = autocast(example.device, PRECISIONS[precision])
    with keeping_modes(model), torch.random.fork_rng(devices), context:
        outputs = in_full_precision(model.eval()(channels_last(example)))
        lesson = None if objective.teacher is None else in_full_precision(taught(objective.teacher, example))
    if lesson is not None:
        check_teacher(outputs, lesson)
    for part, images in (("train", train), ("val", val)):
        if objective.loss is None and hasattr(images, "labels"):
            check_labels(outputs, torch.as_tensor(images.labels), f"the images of {part}")


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options that decide how a Tailor prunes, those that were not given as well."""
    options = identity.defaults(Tailor, Controller, without=("channels", "device", "carry", "process_group")) | dict(
        given
    )
    options.pop("also", None)  # further inputs, drawn anew each time; what they reach is in the count of units
    ignore = [options["ignore"]] if isinstance(options["ignore"], str) else options["ignore"]
    options["ignore"] = sorted(set(ignore))  # their order decides nothing
    return options


def _bounds(report: Mapping) -> dict:
    """Return a run's bounds as checkpoints compare them: a share of a measured latency is never twice the same."""
    bounds = dict(report["bounds"])
    return bounds | {"latency": str(report["requested"]["latency"])} if "latency" in bounds else bounds


def _place(budget: Budget, tailoring: Mapping[str, Any]) -> str:
    """Return where latency is measured, as a Tailor says it."""
    return "" if budget.latency is None else repr(tailoring.get("latency"))


def _as_of(saved: Mapping | None, recipe: Mapping, budget: Budget | None, tailoring: dict) -> dict:
    """Return the options of a Tailor, the place of latency as it was when this run began if it goes on: measured anew,
    a machine that is slower or busy by now would refuse it.
    """
    latency = tailoring.get("latency")
    if saved is None or budget is None or budget.latency is None or latency is None:
        return tailoring
    bounds = saved["recipe"].get("bounds", {})
    if differing(saved, {**recipe, "bounds": bounds}) or bounds.get("latency") != str(budget.latency):
        return tailoring  # another run, which is refused once its own bounds are known
    return tailoring | {"latency": latency.as_of(saved["pruned"])}


def _check_pruning(budget: Any, prune: Any, loss: Any, tailoring: Mapping[str, Any]) -> None:
    """Refuse what does not go together, or is no function."""
    if prune is not None and not callable(prune):
        raise TypeError(f"prune={prune!r}; it must be a function of (model, channels, steps), or None.")
    if budget is not None and prune is not None:
        raise TypeError("give budget or prune, not both: prune brings its own budget.")
    if getattr(prune, "loss", loss) is not loss:
        own, its = ("cross-entropy" if each is None else repr(each) for each in (loss, prune.loss))
        raise ValueError(f"fit trains by {own} and prune ranks units by {its}: give both the same loss=.")
    if isinstance(budget, list | tuple):
        raise TypeError("budget is one Budget or dict; tcp.ladder(..., budgets=[...]) goes down a list of them.")
    if budget is None and tailoring:
        raise TypeError(f"options {sorted(tailoring)} need a budget; without one the dense network is trained.")


def _pruned(model, example, channels: Channels, steps: int, budget, prune, tailoring: dict) -> nn.Module | None:
    """Return what makes the network smaller and is called in its place; None to train it as it is."""
    if budget is not None:
        return Tailor(model, example, budget=budget, steps=steps, channels=channels, **tailoring)
    return None if prune is None else prune(model, channels, steps)
