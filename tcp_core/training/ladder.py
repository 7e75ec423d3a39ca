"""A whole curve of accuracy against cost from one run: down a ladder of budgets, rung by rung."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..controller import Controller
from ..cost import Budget, BudgetError
from ..datasets.images import Images
from ..latency.place import Latency
from ..maturity import maturity
from ..preparing import width_options
from ..storage import load, save
from ..tracing import trace
from . import checkpoints
from .batches import by_epoch
from .evaluation import device_of
from .fit import fit
from .frames import printed, say, training_cost
from .identity import described
from .processes import agree, rank_and_world
from .run import FitResult


@dataclass
class Ladder:
    """What a ladder leaves.

    Attributes:
        models: the network of each rung, from the largest down, on the CPU; plain modules that share nothing.
        table: one row a rung: rung (from 1), budget (as given), each cost and its share of the dense network's (macs,
            macs_share, ...), train_loss, val_loss, val_accuracy (a fraction, after the rung's last epoch), epochs,
            training_cost (epochs of the dense network, see :func:`tcp_core.training.frames.training_cost`), seconds.
        history: one row an epoch of all rungs, see :class:`tcp_core.FitResult`, with ``rung``; epochs are counted on.
    """

    models: list[nn.Module]
    table: pd.DataFrame
    history: pd.DataFrame


def ladder(
    model: nn.Module,
    train: Images | Iterable,
    val: Images | Iterable | None = None,
    *,
    budgets: Sequence[Budget | Mapping],
    epochs: int | Sequence[int],
    folder: str | Path | None = None,
    on_epoch: Callable[[dict], Any] | None = None,
    verbose: bool | None = None,
    **options: Any,
) -> Ladder:
    """Bring ``model`` down to each budget in turn, and keep the network of every rung.

    Each rung is a run of :func:`tcp_core.fit` that starts from the network of the rung above: its gates close, it is
    made smaller and trained to the end of a learning-rate schedule of its own. Training the dense network, and all that
    the upper rungs cost, is paid once for the whole curve.

    Args:
        model: the dense network, trained or not; it goes down the ladder itself.
        train, val: as in :func:`tcp_core.fit`.
        budgets: from the largest to the smallest. Fractions are of the *dense* network's cost at every rung.
        epochs: passes over ``train`` on each rung: one number for all, or one for each.
        folder: where each rung's network (``rung1.safetensors``, for :func:`tcp_core.load`), the table and checkpoints
            are kept. A ladder that was stopped goes on from there.
        on_epoch: called with each row of the history.
        verbose: whether to print a row an epoch, see :func:`tcp_core.fit`; costs are in percent of the *dense*
            network's.
        options: further options of :func:`tcp_core.fit`, the same on every rung. A ``teacher`` is as it is now on all
            of them, also if it is ``model`` itself. ``min_width`` is a number of units, not a share, which would be one
            of the rung above.

    Raises:
        BudgetError: before any training, if a budget cannot be met or is not below the one before it, or counts bytes
            at another ``precision`` or ``batch``.
        ValueError: for other bad input, or if ``folder`` holds another ladder.

    Example:
        >>> curve = tcp.ladder(model, train, val, budgets=[{"macs": 0.7}, {"macs": 0.5}], epochs=10)  # doctest: +SKIP
        >>> curve.table[["macs_share", "val_accuracy"]]  # doctest: +SKIP
    """
    if refused := {"budget", "prune", "checkpoints"} & options.keys():
        raise TypeError(f"{', '.join(sorted(refused))}: a ladder takes budgets=[...], and folder=... for checkpoints.")
    budgets = [Budget.of(budget) for budget in budgets]
    epochs = [epochs] * len(budgets) if isinstance(epochs, int) else list(epochs)
    if not budgets or len(epochs) != len(budgets):
        raise ValueError(
            f"{len(budgets)} budgets and {len(epochs)} numbers of epochs; give one for each, at least one."
        )
    if isinstance(options.get("min_width"), float):
        raise ValueError(
            f"min_width={options['min_width']!r}: on a ladder a share would be of what the rung above has left; give "
            f"the fewest units of a family as an int."
        )
    if isinstance(options.get("teacher"), nn.Module):
        options["teacher"] = copy.deepcopy(options["teacher"])  # the network itself gets smaller
    device = device_of(model, options.get("device"))
    model.to(device)  # as fit does
    dense, bounds = _planned(model, train, budgets, epochs, options)
    said = {
        name: repr(value) if isinstance(value, Latency) else described(value)
        for name, value in sorted(options.items())
        if name not in UNSAID
    }
    plan = {"bounds": bounds, "epochs": epochs, "dense": dense, "options": said}
    place = None if folder is None else _Folder(Path(folder), json.loads(json.dumps(plan)))
    done = [] if place is None else place.read()
    agree({"rungs": len(done)})  # not if each machine has a folder of its own
    models = [] if place is None else [place.network(model, rung) for rung in range(len(done))]
    if models:
        model = copy.deepcopy(models[-1]).to(device)

    silent = on_epoch is not None or options.get("on_step") is not None if verbose is None else not verbose
    shown = not silent and rank_and_world()[0] == 0
    for rung in range(len(done), len(budgets)):
        before, passes = sum(epochs[:rung]), epochs[rung]

        def numbered(row: dict, rung: int = rung, before: int = before) -> dict:
            return {"rung": rung + 1, **row, "epoch": row["epoch"] + before}

        def ended(row: dict, numbered: Callable[[dict], dict] = numbered, passes: int = passes) -> None:
            if shown:
                say(printed(row, dense, passes, share=options.get("metric") is None))
            if on_epoch is not None:
                on_epoch(numbered(row))

        if shown:
            say(f"rung {rung + 1} of {len(budgets)}: {_in_words(budgets[rung])}; percentages are of the dense network")
        result = fit(
            model,
            train,
            val,
            budget=bounds[rung],
            epochs=epochs[rung],
            checkpoints=None if place is None else place.checkpoints(rung),
            on_epoch=ended,
            verbose=verbose if verbose is False else None,  # rows are printed here, that a run goes on is said there
            **options,
        )
        model = result.model
        history = [numbered(row) for row in result.history.to_dict("records")]
        above = done[-1]["row"]["macs"] if done else dense["macs"]
        done.append({"row": _row(rung, budgets[rung], result, history, dense, above), "history": history})
        models.append(copy.deepcopy(model).cpu())
        if place is not None:
            place.write(model, done)
    table = pd.DataFrame([rung["row"] for rung in done])
    return Ladder(models, table, pd.DataFrame([row for rung in done for row in rung["history"]]))


UNSAID = ("device", "on_step")
"""Options that results do not depend on."""


def _planned(
    model: nn.Module, train: Images | Iterable, budgets: Sequence[Budget], epochs: Sequence[int], options: Mapping
) -> tuple[dict[str, float], list[dict]]:
    """Return the dense network's costs, and each budget in absolute numbers; raise where one cannot be met."""
    _check_bytes(budgets)
    given = {name: options[name] for name in inspect.signature(Controller).parameters if name in options}
    batches = by_epoch(train, options.get("batch_size"), "none", 0, device_of(model, None))(0)
    length = len(batches) // options.get("accumulate", 1)
    tracing = {name: options[name] for name in ("ignore", "also", "unused") if name in options}
    channels = trace(model, next(iter(batches))[0][:2], **tracing)
    dense: dict[str, float] = {}
    bounds = []
    for rung, (budget, passes) in enumerate(zip(budgets, epochs, strict=True)):
        known = {"maturity": 1.0 if rung else maturity(model)}  # later rungs start with a trained network
        widths = width_options(model, channels, budget, options.get("multiple", "auto"), options.get("latency"))
        controller = Controller(channels, budget, steps=passes * length, **(known | given | widths))
        dense |= controller.dense
        above, here = bounds[-1] if bounds else {}, dict(controller.bounds)
        if bounds and not any(here[name] < above.get(name, float("inf")) for name in here):
            raise BudgetError(
                f"budget {rung + 1} ({budget.as_dict()}) is not below the one before it "
                f"({budgets[rung - 1].as_dict()}); give budgets from the largest to the smallest."
            )
        if higher := [name for name in here if here[name] > above.get(name, here[name])]:
            raise BudgetError(
                f"budget {rung + 1} ({budget.as_dict()}) allows more {higher[0]} than the one before it "
                f"({budgets[rung - 1].as_dict()}), and what was removed does not come back."
            )
        bounds.append(here)
    return dense, [_absolute(budget, here) for budget, here in zip(budgets, bounds, strict=True)]


def _check_bytes(budgets: Sequence[Budget]) -> None:
    """Refuse rungs that count bytes differently: these could not be told from the largest to the smallest."""
    first: dict[str, tuple[int, Any]] = {}
    for rung, budget in enumerate(budgets, 1):
        for name, value in budget.bytes_at().items():
            above, expected = first.setdefault(name, (rung, value))
            if value != expected:
                raise BudgetError(
                    f"budget {rung} ({budget.as_dict()}) counts bytes at {name}={value!r}, and budget {above} "
                    f"({budgets[above - 1].as_dict()}) at {name}={expected!r}; give all budgets of a ladder that bound "
                    f"memory or weights the same {name}."
                )


def _absolute(budget: Budget, bounds: Mapping[str, float]) -> dict:
    """Return the budget with its bounds in absolute numbers, which hold on all rungs: fractions are of dense."""
    given = {name: value for name, value in budget.as_dict().items() if name in ("precision", "batch")}
    return {name: f"{bound!r} ms" if name == "latency" else bound for name, bound in bounds.items()} | given


def _row(
    rung: int, budget: Budget, result: FitResult, history: list[dict], dense: Mapping[str, float], above: float
) -> dict:
    costs = {name: value for name, value in result.report["current"].items() if name in dense}
    last = {name: history[-1][name] for name in ("train_loss", "val_loss", "val_accuracy")}
    return {
        "rung": rung + 1,
        "budget": _in_words(budget),
        **costs,
        **{f"{name}_share": value / dense[name] for name, value in costs.items()},
        **last,
        "epochs": len(history),
        "training_cost": training_cost(
            len(history),
            costs["macs"] / dense["macs"],
            result.report["steps"],
            result.frozen_at_step,
            above / dense["macs"],
        ),
        "seconds": sum(row["seconds"] for row in history),
    }


def _in_words(budget: Budget) -> str:
    given = {name: f"{100 * each:.4g}%" if isinstance(each, float) else each for name, each in budget.as_dict().items()}
    return " + ".join(f"{value} {name}" for name, value in given.items())


class _Folder:
    """Where a ladder's networks and state are kept: ``ladder.json`` is written after each rung's network."""

    def __init__(self, path: Path, plan: dict) -> None:
        self.path, self.plan, self.state = path, plan, path / "ladder.json"

    def read(self) -> list[dict]:
        """Return what is kept of each rung that is done."""
        if not self.state.exists():
            return []
        saved = json.loads(self.state.read_text(encoding="utf-8"))
        for name, value in self.plan.items():
            if saved["plan"][name] != value:
                raise ValueError(
                    f"{self.path} holds a ladder with {name} {saved['plan'][name]}, and {value} is asked for now: "
                    f"choose another folder, or delete that one."
                )
        return saved["rungs"]

    def network(self, dense: nn.Module, rung: int) -> nn.Module:
        return load(copy.deepcopy(dense).cpu(), self.path / f"rung{rung + 1}.safetensors")

    def checkpoints(self, rung: int) -> Path:
        return self.path / f"checkpoints{rung + 1}"

    def write(self, model: nn.Module, rungs: list[dict]) -> None:
        if rank_and_world()[0] > 0:
            return
        save(model, self.path / f"rung{len(rungs)}.safetensors")
        part = self.state.with_suffix(".part")
        part.write_text(json.dumps({"plan": self.plan, "rungs": rungs}, indent=1), encoding="utf-8")
        os.replace(part, self.state)
        checkpoints.remove(self.checkpoints(len(rungs) - 1))
