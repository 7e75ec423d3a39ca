"""Tailoring inside a training loop: three added lines."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Channels
from .controller import Controller
from .cost import Budget
from .gates import Gated, check_ungated, device_of, ungate
from .group import agree, average, check_same_set, group_of
from .maturity import has_zeros, versions
from .packing import packed, unpacked
from .preparing import check_options, check_trace, check_trainable, warn_of_room, warn_of_unknown, width_options
from .removal import check_same_model
from .report import Report, report_of
from .shrinking import Average, check_holders, holders, networks_in, shrink
from .tracing import trace

SAID_LATER = ("bytes_at", "place", "maturity")
"""What states of earlier versions do not say of their run; they are taken without."""


class Tailor(Gated):
    """A model that tailors itself to a budget while it is trained; call it in place of the model.

    Args:
        model: the dense network, trained or not. Its parameters are trained as they are.
        example_input: what the model is called with, see :func:`tcp_core.trace`.
        budget: a :class:`Budget` or a dict such as ``{"macs": 0.5, "params": 0.6}``.
        steps: optimiser steps of the whole run.
        ignore: names or glob patterns of modules whose output channels must all stay.
        also, unused: further calls and modules that no call reaches, see :func:`tcp_core.trace`.
        min_width: the fewest units that stay in each family, or a share of them as a float in (0, 1), so that a cost
            without a budget of its own cannot empty a layer.
        multiple: make widths multiples of this, which kernels like; 1: any. "auto": of what the place of ``latency``
            likes, or 8 and 4 without one, the largest with blocks small enough for the budget; 1 if there is none.
        latency: where latency is measured, a :class:`tcp_core.Latency`; needed for a budget of it.
        channels: the model's trace, if it has been made already; ``example_input`` is then what was traced, or None.
        carry: moving averages of the model that exist already; later ones are given to :meth:`carry`.
        process_group: the processes whose gradients are averaged; those of the DistributedDataParallel that wraps the
            Tailor if None.
        maturity: how far the model is trained, from 0 to 1; told from its weights if None, see
            :func:`tcp_core.maturity.maturity`.
        options: further options of :class:`Controller` (``phase``, ``lookahead``, ``ramp``).

    Raises:
        BudgetError: before any training, if the budget is malformed or below the lowest feasible cost.
        LatencyError: before any training, if latency cannot be measured, or not well enough.
        ValueError: for other bad input; the message says what to do.

    Example:
        >>> tailor = Tailor(model, images[:2], budget={"macs": 0.5}, steps=epochs * len(loader))  # doctest: +SKIP
        >>> for x, y in loader:  # doctest: +SKIP
        ...     loss = loss_fn(tailor(x), y)
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     tailor.step()
        >>> small = tailor.finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        budget: Budget | Mapping,
        steps: int,
        ignore: Iterable[str] | str = (),
        also: Iterable[Any] = (),
        unused: Iterable[str] | str = (),
        min_width: int | float = 1,
        multiple: int | str = "auto",
        latency: Any = None,
        channels: Channels | None = None,
        carry: Iterable[Average] = (),
        process_group: Any = None,
        maturity: float | None = None,
        **options: Any,
    ) -> None:
        check_options(options, option_names(), "Tailor")
        check_ungated(model, "tailor")
        check_trainable(model)
        budget = Budget.of(budget)
        also = tuple(also)
        if channels is None:
            channels = trace(model, example_input, ignore=ignore, also=also, unused=unused)
        else:
            check_trace(channels, example_input, ignore, also, unused)
        check_same_model(model, channels)
        options |= width_options(model, channels, budget, multiple, latency)
        options |= {} if maturity is None else {"maturity": maturity}
        # what is refused is refused before the model's modules are bound to gates
        controller = Controller(channels, budget, steps=steps, min_width=min_width, device=device_of(model), **options)
        if maturity is None:
            controller.look_at(model)
        super().__init__(model, channels)
        self.channels, self.budget, self.controller = channels, budget, controller
        warn_of_room(self.controller.bounds, self.controller.dense)
        self.maturity = None if maturity is None else self.controller.maturity  # as it was given
        self.weights_of_start = None if maturity is not None else versions(model)
        self.looked = False  # whether a forward pass has looked at them
        warn_of_unknown(channels)
        controller.zeros = maturity is None and has_zeros(model)
        self.measured_at = "" if budget.latency is None else repr(latency)
        self.shrunk = False
        self.largest_gate_removed: float | None = None
        self.process_group = process_group
        self.group: Any = None
        self.taken = 0  # calls of step(), after the network was made smaller too
        self.follows = False  # whether this is a copy in an average, whose gates are those of the run that carries it
        self.checked = False  # whether a step has found everything that holds the model fit to go on
        self.unchecked: tuple[float, ...] = ()  # sums of the weights at a step that found no optimiser
        self.carried: list[tuple[Average, Average]] = []
        self.carry(*([carry] if isinstance(carry, nn.Module | Mapping) else carry))

    def forward(self, *args, **kwargs):
        """Run the model with gated parameters."""
        if self.weights_of_start is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._look_again()
        return super().forward(*args, **kwargs)

    def _look_again(self) -> None:
        """Tell how far the network is trained as the first forward pass finds it, and once more if its weights were
        changed since, as by loading some: what is written through ``.data``, or by a broadcast, leaves no other trace.
        """
        first, now = not self.looked, versions(self.model)
        if now is None:
            return
        self.looked = True
        if self.controller.step_count == 0 and (first or now != self.weights_of_start):
            self.weights_of_start = now
            self.controller.look_at(self.model)
            self.controller.zeros = has_zeros(self.model)

    @property
    def frozen(self) -> bool:
        """Whether the set of units is final. From then on the run is ordinary training of the tailored network."""
        return self.controller.frozen

    @property
    def open_units(self) -> Tensor:
        """The units whose gates are not closed, bool ``[units]`` on the CPU."""
        return (self.controller.gate > 0).cpu()

    @property
    def strength(self) -> float:
        """How far losing gates move down at each step; 0 once the set is final."""
        return 0.0 if self.frozen else self.controller.strength

    @property
    def trajectory(self) -> list[dict[str, float]]:
        """One dict per re-ranking, see :class:`Controller`."""
        return self.controller.trajectory

    def carry(self, *averages: Average) -> None:
        """Keep moving averages in step: their gates while these close, their sizes when the network is made smaller.

        Each is a module that holds a copy of the model or of the Tailor (``AveragedModel(tailor)``, timm's
        ``ModelEmaV3``) or a dict of tensors by the names of ``model.state_dict()``. An average that is not carried
        raises at its first update after that, for its tensors have other shapes. One that was made after the network
        has become smaller need not be carried.

        Raises:
            ValueError: if there is no copy of the network in it.
            RuntimeError: if the network has been made smaller already.
        """
        if self.shrunk and averages:
            raise RuntimeError(
                "the network has been made smaller already. An average that is made from it now goes on by itself and "
                "needs no carry(); one of the dense network had to be carried before."
            )
        networks = [networks_in(average, self.model, self.channels) for average in averages]
        self.carried += [(average, each) for average, found in zip(averages, networks, strict=True) for each in found]
        self._share_gates()

    def step(self, *optimizers: torch.optim.Optimizer, shrink: bool = True) -> bool:
        """Move the gates; call it after each ``backward()`` (once per optimiser step if gradients are accumulated).

        As soon as the set is frozen, the network is made physically smaller, in place: modules and parameters stay the
        same objects, and the state of every optimiser that steps on them, of what is carried, and the buckets of
        DistributedDataParallel are cut along. Optimisers are found among all living objects; they may be given as well.

        Args:
            shrink: False leaves the network as large as it is, with closed gates, until a later step or :meth:`finish`.

        Returns:
            Whether the network has been made smaller in this step.

        Raises:
            RuntimeError: if no backward pass went through the Tailor since the last step; at the first step and before
                the network is made smaller, if something that holds it could not go on: no optimiser is known for a
                parameter that requires a gradient, an optimiser keeps what cannot be cut, or several processes train
                and it is not called through DistributedDataParallel. Nothing has changed then.
            ValueError: at the first step, if several processes train and their Tailors are not alike.
        """
        self._count_step()
        if self.shrunk:
            return False
        if not self.frozen and self.gate.grad is None and self.aside is None:
            raise RuntimeError(
                "step() found no gradient of the gates: call it after loss.backward(), with a loss computed from "
                "tailor(x), not model(x); and once per backward."
            )
        given = [optimizer for optimizer in optimizers if optimizer is not None]
        if not self.checked and (now := _sums(self.model)) != self.unchecked:
            found = holders(self.model, given)
            # with none, one may still be made, until something else has trained the weights from a step to the next; an
            # optimiser that forgets parameters will not remember them later
            there = bool(found.optimizers) or self.unchecked != ()
            check_holders(self.model, self.channels, found, trained=shrink and there)
            self._join(group_of(self.process_group, found.wrappers))
            self.checked, self.unchecked = there, now
        if not self.frozen:
            self._move_gates()
        if self.frozen and shrink:
            self._shrink(given, trained=True)
        return self.shrunk

    def finish(self, *optimizers: torch.optim.Optimizer) -> nn.Module:
        """Return the tailored network: the model itself, plain and physically smaller, within the budget.

        Raises:
            RuntimeError: before the set is frozen.
        """
        if not self.frozen:
            controller = self.controller
            refused = f" {int(controller.refused)} of them had gradients that are not finite and moved no gate: see to "
            refused += "the loss first."
            raise RuntimeError(
                f"finish() before the set is frozen: {controller.step_count} of {controller.steps} steps were taken "
                f"and it is frozen at about step {controller.end}.{refused if controller.refused else ''} Train on, or "
                f"construct the Tailor with the number of steps you really take."
            )
        if not self.shrunk:
            self._shrink([each for each in optimizers if each is not None])
        return self.model

    def _count_step(self) -> None:
        """Say once if many more steps are taken than were announced: the network became smaller too soon then."""
        self.taken += 1
        steps = self.controller.steps
        if self.taken == max(steps + 20, steps * 21 // 20):
            warnings.warn(
                f"tailor.step() was called {self.taken} times, but steps={steps} was given: the network was made "
                f"smaller at a step that suits a run of that length, too soon for this one. Give the number of "
                f"optimiser steps of the whole run (epochs x batches), and call tailor.step() once per optimiser step.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _move_gates(self) -> None:
        if self.weights_of_start is not None and not self.looked:  # compiled: one step changes nothing that counts
            self._look_again()
        gradient = self.aside if self.gate.grad is None else self.gate.grad
        gradient = gradient.detach()  # backward(create_graph=True) leaves the graph of the whole step at it
        if self.group is not None:
            average(gradient, self.group)
        self.controller.update(gradient)
        self.gate.grad = self.aside = self.weights_of_start = None
        self.gates.pending = False
        self.gate.data.copy_(self.controller.gate)
        self._share_gates()
        if self.frozen:
            self.gate.requires_grad_(False)

    def _copies(self) -> list[Tailor]:
        """Return the copies of this Tailor in the averages that are carried."""
        averages = {id(average): average for average, _ in self.carried if isinstance(average, nn.Module)}
        modules = (module for average in averages.values() for module in average.modules())
        return [module for module in modules if isinstance(module, Tailor) and module is not self]

    def _share_gates(self) -> None:
        for tailor in self._copies():
            tailor.controller, tailor.follows = self.controller, True
            tailor.gate.data.copy_(self.gate.detach())

    def _join(self, group: Any) -> None:
        """Average the gates' gradients over a group of processes from now on, if their Tailors are alike."""
        if group is not None and self.group is None:
            said = self._run() | {"maturity": self.controller.maturity, "progress": self.controller.step_count}
            said.pop("place")  # it is the first process that measures latency, whatever device the others name
            agree(said, group, _same)
        self.group = group

    def _shrink(self, given: Iterable[torch.optim.Optimizer] = (), trained: bool = False) -> None:
        found = holders(self.model, given)
        check_holders(self.model, self.channels, found, trained)
        losing = self.controller.losing
        if self.group is not None:
            check_same_set(losing.to(self.gate.device), self.group)
        removed = self.gate.detach()[losing.to(self.gate.device)]  # as the forward pass has them
        shrink(self.model, self.channels, ~losing.cpu(), found, [network for _, network in self.carried])
        self._end(float(removed.max()) if len(removed) else 0.0)

    def _end(self, largest_gate_removed: float | None) -> None:
        """Become, with the copies of this Tailor that are carried, a network without gates."""
        for tailor in (*self._copies(), self):
            tailor.release()
            ungate(tailor.model)  # a former Tailor of it may still be held, whose gates are for the dense network
            tailor.largest_gate_removed = largest_gate_removed
            tailor.sites = ()
            tailor.shrunk = True
            tailor.gate.requires_grad_(False)

    # -----------------------------------------------------------------------------------------------------------------
    # Stopped and resumed

    def get_extra_state(self) -> Tensor:
        """Return :meth:`progress` as uint8, for much takes what is in a ``state_dict()`` for tensors: timm's averages,
        safetensors, checkpoints of accelerate and transformers.
        """
        return packed(self.progress())

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Go on where :meth:`get_extra_state` was taken; ``load_state_dict`` calls it before it copies any tensor."""
        self.resume(unpacked(state) if isinstance(state, Tensor) else state)

    def progress(self) -> dict[str, Any]:
        """Return what ``state_dict()`` has beside the model's tensors: the controller, and whose run it is of."""
        return {
            "run": self._run(),
            "controller": self.controller.state_dict(),
            "taken": self.taken,
            "shrunk": self.shrunk,
            "largest_gate_removed": self.largest_gate_removed,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`progress` was taken.

        If the network had been made smaller, it is so again, in place, with all that holds it. A copy in an average
        that is carried keeps the gates of the run that carries it.

        Raises:
            ValueError: if the state is of another network, budget, ``steps`` or option; nothing has changed then.
        """
        here, there = self._run(), state["run"]
        here = {name: value for name, value in here.items() if name in there or name not in SAID_LATER}
        if differing := [name for name in here if not _same(here[name], there.get(name))]:
            name = differing[0]
            values = f" ({there.get(name)} there, {here[name]} here)" if name not in ("network", "prunable") else ""
            raise ValueError(
                f"this state is of another run: {name} is not the same{values}. Build the Tailor as it was built then: "
                f"the same dense network, budget, steps and options."
            )
        losing = state["controller"]["losing"].cpu()
        smaller = state["shrunk"] and not self.shrunk
        if self.shrunk and not (state["shrunk"] and torch.equal(losing, self.controller.losing.cpu())):
            raise ValueError(
                "this Tailor's network has been made smaller already, in another way than the state's: load it into a "
                "fresh Tailor of the dense network."
            )
        if self.follows:
            if smaller:
                raise ValueError(
                    "this average's state is of a network that has been made smaller, and the Tailor that carries it "
                    "has not: load the Tailor's state first."
                )
            return
        if smaller:
            found = holders(self.model)
            check_holders(self.model, self.channels, found, trained=False)
            shrink(self.model, self.channels, ~losing, found, [network for _, network in self.carried], verify=False)
        self.controller.load_state_dict(state["controller"])
        self.controller.to(self.gate.device)
        self.taken = state.get("taken", self.controller.step_count)
        self.gate.grad = self.aside = None
        self.gate.requires_grad_(not self.frozen)
        self.gate.data.copy_(self.controller.gate)
        self._share_gates()
        if smaller:
            self._end(state["largest_gate_removed"])
        self.largest_gate_removed = state["largest_gate_removed"]

    def _run(self) -> dict[str, Any]:
        controller, timed = self.controller, self.budget.latency is not None
        lookahead, ramp = controller.shares
        # with a budget of latency, what kernels like depends on what was measured then
        multiples = {} if timed else {"multiple": controller.multiples}
        return {
            "network": {name: list(shape) for name, shape in self.channels.shapes.items()},
            "prunable": self.channels.prunable.clone(),
            "bounds": {name: bound for name, bound in controller.bounds.items() if name != "latency"},
            "bytes_at": self.budget.bytes_at(),
            "latency": str(self.budget.latency),
            "place": self.measured_at,
            "steps": controller.steps,
            # where "auto" has put the phase is in the controller's own state: the weights may be others by now
            "phase": "auto" if controller.placed else [controller.start, controller.end],
            "maturity": self.maturity,
            **{"lookahead": lookahead, "ramp": ramp},
            **{"min_width": controller.min_width, **multiples},
        }

    def __getstate__(self) -> dict:
        anew = {"carried": [], "follows": False, "checked": False, "unchecked": (), "group": None}
        return super().__getstate__() | anew | {"process_group": None}

    def report(self) -> Report:
        """Return requested, current, floor and dense cost, utilisation, strength and widths, as a dict that prints."""
        return report_of(self)


def option_names() -> list[str]:
    """Return the names of a Tailor's options, those of its Controller that it hands on among them."""
    own = [name for name in inspect.signature(Tailor).parameters if name not in ("model", "budget", "options")]
    handed_on = [
        name for name in inspect.signature(Controller).parameters if name not in (*own, "channels", "budget", "device")
    ]
    return own + handed_on


def _sums(model: nn.Module) -> tuple[float, ...]:
    """Return the sum of each parameter that is trained, and one number more: what changes when anything trains them,
    through ``.data`` too.
    """
    sums = [parameter.detach().float().sum() for parameter in model.parameters() if parameter.requires_grad]
    return (*map(float, sums), 0.0)


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, Tensor):
        return isinstance(there, Tensor) and torch.equal(here, there.cpu())
    return here == there
