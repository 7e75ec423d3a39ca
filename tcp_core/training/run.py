"""A training run that can be stopped: what is trained and by what, how far it is, and what a checkpoint has of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..channels import Channels
from ..group import gathered
from ..report import Report
from ..state import left_as_found
from ..tailor import SAID_LATER, Tailor
from .averaging import Average
from .batches import channels_last, to_their_end
from .checkpoints import CheckpointError, plain, prepare, write
from .evaluation import PRECISIONS, autocast, sums, validated
from .guard import Guard
from .identity import differences
from .objective import Objective, in_full_precision, taught
from .processes import alone, rank_and_world, share, summed, together
from .randomness import random_numbers_kept, random_state, set_random_state, warn_of_workers
from .unsaved import buffers_in, hidden, put, put_into


@dataclass
class FitResult:
    """What a training run leaves: a plain module and data frames.

    Attributes:
        model: the trained network; with a budget, the tailored one. With ``ema`` it has the averaged weights, which
            the last row of the history was measured with.
        history: one row an epoch: epoch, lr, train_loss, train_accuracy, val_loss, val_accuracy, seconds (of training),
            macs, params, open_units, strength. Accuracies are fractions.
        trajectory: one row a re-ranking: step, epoch, macs, params, macs_schedule, params_schedule, strength, losing,
            closed, returned (so far), changed (sides since the last row). Empty without a budget.
        widths: one row a layer: layer, dense, tailored.
        report: requested, delivered, floor and dense cost; see :meth:`tcp_core.Tailor.report`. Empty without a budget.
        frozen_at_step: the step after which the network was tailored, or None.
        last: with ``ema``, the weights of the last step that are not averaged, by name; else None.
    """

    model: nn.Module
    history: pd.DataFrame
    trajectory: pd.DataFrame
    widths: pd.DataFrame
    report: Report = field(default_factory=Report)
    frozen_at_step: int | None = None
    last: dict[str, Tensor] | None = None


@dataclass
class Run:
    """A run that can be stopped: what is trained and by what, how, and how far it is.

    ``pruned`` is what is called in the place of ``model``, None for the dense network; ``called`` is what is called in
    training; ``average`` is the moving average, or None. ``length`` is the steps of an epoch. ``sums`` (of loss and
    score, and of the images that each is over) and ``seconds`` are of the epoch it is in, ``epoch_random`` is the state
    of every process's random numbers at its start, and ``random`` that where a run was stopped that goes on here.
    ``given`` are the objects (loaders) whose own random generators count, by name. ``writable``: a checkpoint can hold
    what the run has.
    """

    model: nn.Module
    pruned: nn.Module | None
    channels: Channels
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    recipe: dict[str, Any]
    _: KW_ONLY
    device: torch.device
    length: int
    steps: int
    objective: Objective
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    accumulate: int = 1
    precision: str = "fp32"
    clip: float | None = None
    average: Average | None = None
    on_step: Callable[[int, int], Any] | None = None
    checkpoints: str | Path | None = None
    checkpoint_every: int = 0
    known: set[str] = field(default_factory=set)
    given: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    history: list[dict] = field(default_factory=list)
    frozen_at: int | None = None
    sums: Tensor | None = None
    seconds: float = 0.0
    epoch_random: list[dict] | None = None
    random: list[dict] | None = None
    called: nn.Module | None = None
    writable: bool = False

    @property
    def network(self) -> nn.Module:
        """What is trained, gates and all."""
        return self.model if self.pruned is None else self.pruned

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters the optimiser holds; it is made smaller in mid-run."""
        return self.model if self.pruned is None else self.pruned.model

    @property
    def judging(self) -> dict[str, Any]:
        """The loss and the metric, which may be modules with buffers and random numbers of their own."""
        return {"loss": self.objective.loss, "metric": self.objective.metric}

    def epoch(self, number: int, batches: Callable[[int], Iterable]) -> None:
        """Take the steps of epoch ``number`` (from 0) that are left: all, but where the run goes on in mid-epoch."""
        started = time.perf_counter()
        rank, _ = rank_and_world()
        taken = self.step - number * self.length
        if not taken:
            self.sums, self.seconds = torch.zeros(4, device=self.device), 0.0
            self.epoch_random = gathered(self.random_state())
        elif taken < self.length:  # the same batches are drawn again
            self.set_random_state(self.epoch_random[rank])
        self.network.train()
        given = to_their_end(batches(number) if taken < self.length else ())
        for position in range(self.length if taken < self.length else 0):
            if position < taken:
                for _ in range(self.accumulate):
                    next(given)
                continue
            if position == taken > 0:
                self.set_random_state(self.random[rank])
            self.train((self.mix(*next(given)) for _ in range(self.accumulate)), position)
            if self.checkpoints is not None and not self.writable:
                plain(self.state())  # found out at the first step, not at the first checkpoint
                self.writable = True
            if self.on_step is not None:
                self.on_step(self.step, self.steps)
            if self.checkpoints is not None and self.step % (self.checkpoint_every or self.length) == 0:
                self.seconds += time.perf_counter() - started
                state = self.state() | {"random": gathered(self.random_state())}
                if rank == 0:
                    write(self.checkpoints, self.step, state, self.known)
                started = time.perf_counter()
        if taken == self.length:
            self.set_random_state(self.random[rank])
        self.seconds += time.perf_counter() - started

    def random_state(self) -> dict[str, Any]:
        """Return where the random numbers of this process stand."""
        return random_state(self.device, **self.random_sources())

    def set_random_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the random numbers where :meth:`random_state` was called."""
        set_random_state(state, self.device, **self.random_sources())

    def random_sources(self) -> dict[str, Any]:
        """Return the objects whose own random generators count, by name."""
        return {**self.given, "network": self.trained, **self.judging}

    def train(self, batches: Iterable[tuple[Tensor, Any]], position: int) -> None:
        """Take the epoch's step ``position``; a loss or gradient that is not finite, or a label that is none, raises,
        and nothing has changed.
        """
        guard = Guard(self.network)
        sums, total = self.sums, 0.0
        self.optimizer.zero_grad()
        for number, (x, y) in enumerate(batches, 1):
            with alone(self.called) if number < self.accumulate else nullcontext():
                where = f"batch {position * self.accumulate + number} of epoch {len(self.history) + 1}"
                try:
                    outputs, loss = self.forward(channels_last(x), y, where)
                except ValueError:  # of a label, say, which can be told wrong by the outputs alone
                    guard.put_back()
                    raise
                (loss / self.accumulate).backward()
            (score, scored), weight = self.objective.score(outputs, y), self.objective.weight(y, len(x)).to(self.device)
            seen = (loss.detach() * weight, score, weight, scored)
            sums = sums + torch.stack([each.to(self.device, torch.float32) for each in seen])
            total = total + loss.detach() / self.accumulate
        guard.check(total, self.trained, self.optimizer, self.step + 1)
        self.sums = sums
        if self.clip is not None:  # not the gates, which follow a rule of their own
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.trained)
        if self.pruned is not None:
            self.prune()

    def forward(self, x: Tensor, y: Any, where: str) -> tuple[Any, Tensor]:
        """Return the network's outputs, in full precision, and the loss; ``where`` names the batch in errors."""
        objective, lesson = self.objective, None
        with autocast(self.device, PRECISIONS[self.precision]):
            outputs = self.called(x)
            if objective.teacher is not None:
                lesson = in_full_precision(taught(objective.teacher, x))
        outputs = in_full_precision(outputs)
        return outputs, objective.trained_on(outputs, y, lesson, where)

    def prune(self) -> None:
        """Have gates moved, or what else is due, and follow if the network has become smaller by it."""
        before, frozen = self.trained, self.pruned.frozen
        self.pruned.step(self.optimizer)
        if self.trained is not before:  # made smaller, in every process at the same step
            self.called = together(self.network, self.device)
        if self.average is not None and self.pruned.frozen and not frozen:
            if isinstance(self.pruned, Tailor):  # whose gates had closed: the average of what stays goes on
                self.average.cut(self.channels, self.open_units)
            else:  # which cuts what was open, and may draw new weights
                self.average.restart(self.trained)
        if self.pruned.frozen and self.frozen_at is None:
            self.frozen_at = self.step

    def share(self) -> None:
        """Give every process the first one's running statistics, and their average."""
        share(self.network.buffers())
        if self.average is not None:
            share(self.average.values.values())

    @torch.no_grad()
    def try_out(self, val: Any) -> None:
        """Validate on the first batch (of images in memory, on two): what is wrong with it would raise after an epoch.

        Weights, random numbers and whatever else counts in the run are as before.
        """
        judges = self.judging.values()
        try:
            with random_numbers_kept(self.device, **self.random_sources()), left_as_found(self.network, beside=judges):
                sums(self.network, val, 2, self.precision, self.device, self.objective, most=1)
        except Exception as error:
            error.add_note("This was the first batch of val, tried before training.")
            raise

    def validate(self, val: Any) -> dict[str, float]:
        """Return loss and accuracy of the network, or of its average, on ``val``; nothing if that is None."""
        if val is None:
            return {}
        with nullcontext() if self.average is None else self.average.within(self.trained):
            return validated(self.network, val, self.precision, self.device, self.objective)

    @property
    def open_units(self) -> Tensor:
        """The units that are open now, bool ``[units]``."""
        if self.pruned is None:
            return torch.ones(self.channels.units, dtype=torch.bool)
        return self.pruned.open_units

    def end_epoch(self, measured: Mapping[str, float]) -> dict:
        """Add the epoch's row to the history, and return it."""
        open_units = self.open_units
        loss, right, weight, scored = summed(self.sums).tolist()
        row = {
            "epoch": len(self.history) + 1,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": loss / weight,
            "train_accuracy": right / scored if scored else math.nan,
            "val_loss": measured.get("loss", math.nan),
            "val_accuracy": measured.get("accuracy", math.nan),
            "seconds": self.seconds,
            **self.channels.cost(open_units),
            "open_units": int(open_units.sum()),
            "strength": 0.0 if self.pruned is None else self.pruned.strength,
        }
        self.history.append(row)
        return row

    def state(self) -> dict:
        """Return all that a run needs to go on from here, but for the random numbers."""
        return {
            **{name: getattr(self, name) for name in _STATE},
            "sums": gathered(self.sums.cpu()),
            "model": self.trained.state_dict(),
            "hidden": hidden(self.trained),
            "judging": gathered(buffers_in(self.trained, **self.judging)),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "pruned": None if self.pruned is None else self.pruned.progress(),
            "average": None if self.average is None else self.average.state(),
        }

    def restore(self, state: Mapping) -> None:
        """Go on where :meth:`state` was taken; ``pruned`` has been resumed before the optimiser was made."""
        self.trained.load_state_dict(state["model"])
        if "hidden" in state:  # not in those of earlier versions
            put(self.trained, state["hidden"])
            put_into(self.trained, state["judging"][rank_and_world()[0]], **self.judging)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in _STATE:
            setattr(self, name, state[name])
        sums = state["sums"][rank_and_world()[0]].to(self.device)
        self.sums = sums if len(sums) == 4 else torch.cat([sums, sums[2:]])  # one number of images, in earlier versions
        self.random = state["random"]
        warn_of_workers(**self.given)
        if self.average is not None:
            self.average.restart(self.trained)  # of the size that it has by now
            self.average.restore(state["average"])

    def result(self) -> FitResult:
        """Return what the run leaves, at its end."""
        widths = pd.DataFrame({"layer": self.channels.widths().keys(), "dense": self.channels.widths().values()})
        found = FitResult(self.model, pd.DataFrame(self.history), pd.DataFrame(), widths)
        widths["tailored"] = widths["dense"]
        if self.pruned is not None:
            found.model, found.report = self.pruned.finish(self.optimizer), self.pruned.report()
            found.frozen_at_step = self.frozen_at
            widths["tailored"] = widths["layer"].map(found.report["widths"])
            found.trajectory = pd.DataFrame(self.pruned.trajectory)
            if len(found.trajectory):
                found.trajectory.insert(1, "epoch", found.trajectory["step"] / self.length)
        if self.average is not None:
            self.average.exchange(found.model)
            found.last = self.average.values
        return found


_STATE = ("recipe", "step", "history", "frozen_at", "seconds", "epoch_random")


def differing(saved: Mapping, recipe: Mapping) -> list[str]:
    """Return what of a run's recipe is not as in a checkpoint."""
    later = (*SAID_LATER, "train")
    # earlier versions took these two for batches that have their own, which did not heed them
    then = {k: v for k, v in saved.get("recipe", {}).items() if k in recipe or k not in ("seed", "augment")}
    return differences(then, {name: each for name, each in recipe.items() if name in then or name not in later})


def check_resumable(checkpoints: str | Path, saved: Mapping | None, recipe: Mapping) -> None:
    """Raise CheckpointError unless checkpoints can be written, and the newest one is of this run."""
    prepare(checkpoints)
    if saved is not None and (found := differing(saved, recipe)):
        more = f"; {len(found) - 5} more differ" if len(found) > 5 else ""
        raise CheckpointError(
            f"{checkpoints} has checkpoints of another run: {'; '.join(found[:5])}{more}. Run it as it was begun "
            f"to go on with it, delete them to start anew, or choose another folder."
        )
    if saved is not None and "train" not in saved.get("recipe", {}) and recipe["train"]:
        warnings.warn(
            f"the checkpoint in {checkpoints} is of an earlier version, which did not note the training images' "
            f"{', '.join(recipe['train'])}: it cannot be told whether they are as they were. See to it that they are.",
            stacklevel=3,
        )
