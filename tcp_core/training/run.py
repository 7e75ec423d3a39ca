"""A training run that can be stopped: what is trained and by what, how far it is, and what a checkpoint has of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..channels import Channels
from ..tailor import Report
from .batches import channels_last
from .checkpoints import CheckpointError, newest, prepare
from .guard import Guard
from .processes import alone, gathered, rank_and_world, summed, together

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass
class FitResult:
    """What a training run leaves: a plain module and data frames.

    Attributes:
        model: the trained network; with a budget, the tailored one.
        history: one row an epoch: epoch, lr, train_loss, train_accuracy, val_loss, val_accuracy, seconds (of training),
            macs, params, open_units, strength. Accuracies are fractions.
        trajectory: one row a re-ranking: step, epoch, macs, params, macs_schedule, params_schedule, strength, losing,
            closed, returned (so far), changed (sides since the last row). Empty without a budget.
        widths: one row a layer: layer, dense, tailored.
        report: requested, delivered, floor and dense cost; see :meth:`tcp_core.Tailor.report`. Empty without a budget.
        frozen_at_step: the step after which the network was tailored, or None.
    """

    model: nn.Module
    history: pd.DataFrame
    trajectory: pd.DataFrame
    widths: pd.DataFrame
    report: Report = field(default_factory=Report)
    frozen_at_step: int | None = None


@dataclass
class Run:
    """A run that can be stopped: what is trained and by what, and how far it is.

    ``pruned`` is what is called in the place of ``model``, None for the dense network; ``called`` is what is called in
    training. ``sums`` (of loss, hits and images) and ``seconds`` are of the epoch it is in, ``epoch_random`` is the
    state of every process's random numbers at its start.
    """

    model: nn.Module
    pruned: nn.Module | None
    channels: Channels
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    recipe: dict[str, Any]
    step: int = 0
    history: list[dict] = field(default_factory=list)
    frozen_at: int | None = None
    sums: Tensor | None = None
    seconds: float = 0.0
    epoch_random: list[list[Tensor]] | None = None
    called: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """What is trained, gates and all."""
        return self.model if self.pruned is None else self.pruned

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters the optimiser holds; it is made smaller in mid-run."""
        return self.model if self.pruned is None else self.pruned.model

    def begin_epoch(self, device: torch.device) -> None:
        """Forget the sums of the epoch before, and keep the random numbers with which this one starts."""
        self.sums, self.seconds = torch.zeros(3, device=device), 0.0
        self.epoch_random = gathered(random_state(device))

    def train(
        self, batches: Iterator[tuple[Tensor, Tensor]], count: int, precision: str, label_smoothing: float
    ) -> None:
        """Take one step on ``count`` batches; a loss or gradient that is not finite raises, and nothing has changed."""
        guard = Guard(self.network)
        sums, total = self.sums, 0.0
        self.optimizer.zero_grad()
        for position, (x, y) in enumerate(batches, 1):
            with alone(self.called) if position < count else nullcontext():
                with autocast(x.device, PRECISIONS[precision]):
                    logits = self.called(channels_last(x))
                logits = logits.float()
                loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
                (loss / count).backward()
            right = (logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
            sums = sums + torch.stack([loss.detach() * len(y), right, right.new_tensor(len(y))])
            total = total + loss.detach() / count
        guard.check(total, self.trained, self.optimizer, self.step + 1)
        self.sums = sums
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.pruned is not None:
            before = self.trained
            self.pruned.step(self.optimizer)
            if self.trained is not before:  # made smaller, in every process at the same step
                self.called = together(self.network, x.device)
            if self.pruned.frozen and self.frozen_at is None:
                self.frozen_at = self.step

    @property
    def open_units(self) -> Tensor:
        """The units that are open now, bool ``[units]``."""
        if self.pruned is None:
            return torch.ones(self.channels.units, dtype=torch.bool)
        return self.pruned.open_units

    def end_epoch(self, measured: Mapping[str, float]) -> dict:
        """Add the epoch's row to the history, and return it."""
        open_units = self.open_units
        loss, right, seen = summed(self.sums).tolist()
        row = {
            "epoch": len(self.history) + 1,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": loss / seen,
            "train_accuracy": right / seen,
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
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "pruned": None if self.pruned is None else self.pruned.progress(),
        }

    def restore(self, state: Mapping) -> None:
        """Go on where :meth:`state` was taken; ``pruned`` has been resumed before the optimiser was made."""
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in _STATE:
            setattr(self, name, state[name])
        self.sums = state["sums"][rank_and_world()[0]].to(next(self.trained.parameters()).device)

    def result(self, steps_per_epoch: int) -> FitResult:
        """Return what the run leaves, at its end."""
        widths = pd.DataFrame({"layer": self.channels.widths().keys(), "dense": self.channels.widths().values()})
        history = pd.DataFrame(self.history)
        if self.pruned is None:
            widths["tailored"] = widths["dense"]
            return FitResult(self.model, history, pd.DataFrame(), widths)
        small = self.pruned.finish(self.optimizer)
        report = self.pruned.report()
        widths["tailored"] = widths["layer"].map(report["widths"])
        trajectory = pd.DataFrame(self.pruned.trajectory)
        if len(trajectory):
            trajectory.insert(1, "epoch", trajectory["step"] / steps_per_epoch)
        return FitResult(small, history, trajectory, widths, report, self.frozen_at)


_STATE = ("recipe", "step", "history", "frozen_at", "seconds", "epoch_random")


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the random numbers, torch's own and the device's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Go on with the random numbers where :func:`random_state` was called."""
    torch.set_rng_state(state[0])
    for value in state[1:]:
        torch.cuda.set_rng_state(value, device)


def resumable(checkpoints: str | Path | None, recipe: dict) -> dict | None:
    """Return the newest checkpoint, which must be of this run."""
    if checkpoints is None:
        return None
    prepare(checkpoints)
    saved = newest(checkpoints)
    if saved is not None and saved["recipe"] != recipe:
        name = next(name for name in recipe if saved["recipe"].get(name) != recipe[name])
        there, here = ("" if name == "shapes" else f" ({value[name]})" for value in (saved["recipe"], recipe))
        raise CheckpointError(
            f"{checkpoints} has checkpoints of another run: its {name}{there} differ from this one's{here}. Delete "
            f"them to start anew, or choose another folder."
        )
    return saved


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Return the context of a forward pass: autocast to ``dtype``, or nothing if it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
