"""A whole curve of accuracy against cost from one run: down a ladder of budgets, rung by rung."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..controller import Controller
from ..cost import Budget, BudgetError
from ..datasets.images import Images
from ..files import beside, expanded
from ..gates import check_ungated
from ..group import agree, gathered
from ..latency.place import Latency
from ..preparing import width_options
from ..storage import load, save
from ..tracing import trace
from . import checkpoints
from .batches import by_epoch
from .evaluation import device_of
from .fit import check_names, check_numbers, fit
from .frames import printed, say, training_cost
from .identity import described, of_data
from .processes import rank_and_world
from .randomness import random_state, set_random_state
from .run import FitResult
from .unsaved import buffers_in, put_into


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
        ValueError: for other bad input, or if ``folder`` holds another ladder, one of other training images too.

    Example:
        >>> curve = tcp.ladder(model, train, val, budgets=[{"macs": 0.7}, {"macs": 0.5}], epochs=10)  # doctest: +SKIP
        >>> curve.table[["macs_share", "val_accuracy"]]  # doctest: +SKIP
    """
    if refused := {"budget", "prune", "checkpoints"} & options.keys():
        raise TypeError(f"{', '.join(sorted(refused))}: a ladder takes budgets=[...], and folder=... for checkpoints.")
    check_names(options)
    check_numbers(options)
    check_ungated(model, "train")
    if isinstance(budgets, Budget | Mapping | str) or not isinstance(budgets, Iterable):
        raise TypeError(
            f"budgets={budgets!r}; a ladder takes a list of budgets, such as [{{'macs': 0.7}}, {{'macs': 0.5}}]."
        )
    budgets = [Budget.of(budget) for budget in budgets]
    epochs = list(epochs) if isinstance(epochs, Iterable) else [epochs] * len(budgets)
    for passes in epochs:
        check_numbers({"epochs": passes})
    epochs = [int(passes) for passes in epochs]
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
    place = None if folder is None else _Folder(expanded(folder))
    done = [] if place is None else place.rungs
    agree({"rungs": len(done), "begun": place is not None and bool(place.plan)})  # one folder for all
    timed = None if place is None else place.timed
    dense, bounds, timed, data = _planned(model, train, budgets, epochs, options, timed)
    said = {
        name: repr(value) if isinstance(value, Latency) else described(value)
        for name, value in sorted(options.items())
        if name not in UNSAID
    }
    plan = {"bounds": bounds, "epochs": epochs, "dense": dense, "options": said, "data": data}
    if any(timed):
        plan["latency"] = [str(budget.latency) for budget in budgets]
    if place is not None:
        dense, bounds = place.begin(plan, timed)
    models = [] if place is None else [place.network(model, rung) for rung in range(len(done))]
    if models:
        model = copy.deepcopy(models[-1]).to(device)

    around = {"train": train, "val": val, **{name: options.get(name) for name in ("loss", "metric")}}
    if done and len(done) < len(budgets):
        place.restore(len(done), model, device, around)
    if done and verbose is not False and rank_and_world()[0] == 0:
        say(f"{len(done)} of {len(budgets)} rungs are in {place.path} already")

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
            place.write(model, done, None if len(done) == len(budgets) else _between(model, device, around))
    table = pd.DataFrame([rung["row"] for rung in done])
    return Ladder(models, table, pd.DataFrame([row for rung in done for row in rung["history"]]))


UNSAID = ("device", "on_step")
"""Options that results do not depend on."""


def _planned(
    model: nn.Module,
    train: Images | Iterable,
    budgets: Sequence[Budget],
    epochs: Sequence[int],
    options: Mapping,
    timed: Sequence[Mapping | None] | None,
) -> tuple[dict[str, float], list[dict], list[Mapping | None], dict[str, Any]]:
    """Return the dense network's costs, each budget in absolute numbers, what latency was calibrated by on each rung,
    and what tells the training data from others; raise where a budget cannot be met. A ladder that goes on brings what
    it was ``timed`` by, which holds.
    """
    _check_bytes(budgets)
    given = {name: options[name] for name in inspect.signature(Controller).parameters if name in options}
    batches = by_epoch(train, options.get("batch_size"), "none", 0, device_of(model, None))(0)
    length = len(batches) // options.get("accumulate", 1)
    tracing = {name: options[name] for name in ("ignore", "also", "unused") if name in options}
    first_batch = next(iter(batches))[0]
    data = of_data(train) | {"batch_size": len(first_batch)}
    data |= {} if data["images"] else {"batches": len(batches)}
    channels = trace(model, first_batch[:2], **tracing)
    dense: dict[str, float] = {}
    bounds, place, calibrations = [], options.get("latency"), []
    for rung, (budget, passes) in enumerate(zip(budgets, epochs, strict=True)):
        known = {"maturity": 1.0} if rung else {}  # later rungs start with a trained network
        then = timed[rung] if timed and rung < len(timed) else None
        latency = place if then is None or place is None else place.knowing(then)
        widths = width_options(model, channels, budget, options.get("multiple", "auto"), latency)
        controller = Controller(channels, budget, steps=passes * length, **(known | given | widths))
        if "maturity" not in known | given:
            controller.look_at(model)
        dense |= controller.dense
        calibrations.append(None if controller.latency is None else controller.latency.calibration)
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
    return dense, [_absolute(budget, here) for budget, here in zip(budgets, bounds, strict=True)], calibrations, data


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


def _between(model: nn.Module, device: Any, around: Mapping[str, Any]) -> dict[str, list]:
    """Return, of each process, what the next rung starts with beside the network: random numbers, and the buffers of a
    loss or metric.
    """
    return {
        "random": gathered(random_state(device, **around, network=model)),
        "judging": gathered(buffers_in(model, loss=around["loss"], metric=around["metric"])),
    }


def _untimed(plan: Mapping) -> dict:
    """Return a plan without milliseconds, which are never twice the same."""

    def without(costs: Mapping) -> dict:
        return {name: value for name, value in costs.items() if name != "latency"}

    return {**plan, "bounds": [without(each) for each in plan["bounds"]], "dense": without(plan["dense"])}


class _Folder:
    """Where a ladder's networks and state are kept: ``ladder.json`` is written after each rung's network.

    Attributes:
        plan: what the ladder that is there was begun with; empty: there is none.
        timed: what latency was calibrated by on each rung then; None: nothing.
        rungs: what is kept of each rung that is done.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, path / "ladder.json"
        saved = json.loads(self.state.read_text(encoding="utf-8")) if self.state.exists() else {}
        self.plan, self.timed, self.rungs = saved.get("plan", {}), saved.get("timed"), saved.get("rungs", [])

    def begin(self, plan: dict, timed: list) -> tuple[dict, list[dict]]:
        """Return the dense network's costs and the bounds of the ladder that is here, which must be the same, or of
        ``plan`` where there is none.
        """
        plan = json.loads(json.dumps(plan))
        if not self.plan:
            self.plan = plan
            if any(timed):  # or a first rung that is stopped would find other milliseconds
                self.timed = timed
                self._write()
            return plan["dense"], plan["bounds"]
        there, here = self.plan, plan
        if "latency" in there:
            there, here = _untimed(there), _untimed(here)
        else:  # of an earlier version, if it has a budget of latency at all
            here = {name: value for name, value in here.items() if name != "latency"}
        noted = "data" in there
        here = here if noted else {name: value for name, value in here.items() if name != "data"}
        for name in (*there, *(name for name in here if name not in there)):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{self.path} holds a ladder with {name} {there.get(name)}, and {here.get(name)} is asked for now: "
                    f"choose another folder, or delete that one."
                )
        if not noted:
            warnings.warn(
                f"the ladder in {self.path} is of an earlier version, which did not note what its training images "
                f"were: it cannot be told whether they are as they were. See to it that they are.",
                stacklevel=3,
            )
            self.plan["data"] = plan["data"]
        return self.plan["dense"], self.plan["bounds"]

    def network(self, dense: nn.Module, rung: int) -> nn.Module:
        return load(copy.deepcopy(dense).cpu(), self.path / f"rung{rung + 1}.safetensors")

    def checkpoints(self, rung: int) -> Path:
        return self.path / f"checkpoints{rung + 1}"

    def restore(self, rungs: int, model: nn.Module, device: Any, around: Mapping[str, Any]) -> None:
        """Go on as after so many rungs; ladders of earlier versions do not know how random numbers stood."""
        if not (path := self._after(rungs)).exists():
            return
        state, (rank, world) = checkpoints.read_file(path), rank_and_world()
        if len(state["random"]) != world:
            return
        set_random_state(state["random"][rank], device, **around, network=model)
        put_into(model, state["judging"][rank], loss=around["loss"], metric=around["metric"])

    def write(self, model: nn.Module, rungs: list[dict], after: dict | None) -> None:
        """Keep a rung's network, and what the next one starts with beside it; None: there is no next one."""
        if rank_and_world()[0] > 0:
            return
        save(model, self.path / f"rung{len(rungs)}.safetensors")
        if after is not None:
            checkpoints.write_file(self._after(len(rungs)), checkpoints.plain(after))
        self.rungs = rungs
        self._write()
        checkpoints.remove(self.checkpoints(len(rungs) - 1))
        for rung in range(1, len(rungs)):
            self._after(rung).unlink(missing_ok=True)

    def _after(self, rungs: int) -> Path:
        return self.path / f"after_rung{rungs}.state"

    def _write(self) -> None:
        if rank_and_world()[0] > 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"plan": self.plan, "rungs": self.rungs} | ({} if self.timed is None else {"timed": self.timed})
        with beside(self.state) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
