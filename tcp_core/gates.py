"""Gates: one number in [0, 1] per unit, multiplied into parameters rather than activations, so that they cost nothing.

A gate scales the affine parameters of every batch norm that carries its unit, and weight and bias of every
convolution or linear layer whose output has to be zero where a channel is closed and is so by no other gate. A closed
gate makes its channels exactly zero wherever they are used, so removing them changes nothing.

The multiplication happens where a module's parameter is read (``module.weight``) while the gated model runs, and again
where activation checkpointing runs a part of it anew in mid-backward. At all other times the same attribute is the
parameter itself: optimisers, clipping, ``state_dict`` and whatever else holds the model see nothing of the gates.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils import checkpoint

from .channels import Channels, GateSite
from .given import bare, check_module
from .outputs import tensors_in

_ENTERING = threading.Lock()  # for all gates: one of their own could be neither copied nor pickled

BINDING = "_gates_of_this_module"
"""Where a module keeps what gates its own parameters; gone once the network is smaller."""


class Gated(nn.Module):
    """A model with gates; called like the model.

    ``gate`` is float ``[units]``, all ones at first; a backward pass leaves the loss's gradient with respect to it in
    ``gate.grad``. It is no parameter: what clips, scales or decays ``parameters()`` does not touch it, and
    DistributedDataParallel does not average its gradient.
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.model = model
        self.gates = Gates(torch.ones(channels.units, device=device_of(model), requires_grad=True))
        self.aside: Tensor | None = None
        # where no unit can ever be closed (a stream behind layer norm), a gate would only copy the weight at every step
        self.sites = tuple(site for site in channels.sites if not channels.frozen[site.units[site.units >= 0]].all())
        self.bind()

    @property
    def gate(self) -> Tensor:
        """The gates, a leaf tensor ``[units]``."""
        return self.gates.gate

    def forward(self, *args, **kwargs):
        """Run the model with gated parameters."""
        if not self.sites:
            return self.model(*args, **kwargs)
        if not self.is_bound():
            self.bind()
        gates = self.gates
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._set_aside()
        gates.enter()
        try:
            output = self.model(*args, **kwargs)
        finally:
            gates.leave()
        if torch.is_grad_enabled():
            gates.pending = True
            if not torch.compiler.is_compiling():
                gates.watch(output, self._set_aside)
        return output

    @torch.compiler.disable
    @torch.inference_mode(False)  # indices that were made in it could not be used in a backward pass later
    def bind(self) -> None:
        """Have the modules of the model read their parameters through this object's gates, while these act."""
        self.release()
        self.gates.bound = True
        before = []
        for name, factors in _factors_by_module(self.model, self.sites, self.gate.device).items():
            module = self.model.get_submodule(name)
            before.append((weakref.ref(module), module.__dict__.get(BINDING)))  # a module may lead back to this object
            _bind(module, Binding(self.gates, factors))
            parent, _, child = name.rpartition(".")
            self.bound.append((self.model.get_submodule(parent) if name else None, child, module))
        self._releasing = weakref.finalize(self, _release, self.gates, before)
        self._releasing.atexit = False

    def is_bound(self) -> bool:
        """Whether the modules are still those that were bound, and to these gates: they may have been replaced."""
        return len(self.bound) > 0 and all(  # of a list, torch.compile of torch 2.6 cannot take bool
            (parent is None or parent._modules.get(child) is module)
            and (binding := module.__dict__.get(BINDING)) is not None
            and binding.gates is self.gates
            for parent, child, module in self.bound
        )

    def release(self) -> None:
        """Make the modules read their parameters as they did before they were bound."""
        if releasing := self.__dict__.pop("_releasing", None):
            releasing()
        self.bound: list[tuple[nn.Module | None, str, nn.Module]] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the parameters and of the gates."""
        super().zero_grad(set_to_none)
        self.gate.grad = self.aside = None

    def _set_aside(self) -> None:
        """Set the gates' gradient aside if those of the parameters were reset since: optimisers know nothing of gates.

        Such is what a batch leaves that was given up after its backward pass, or a backward pass for the sake of the
        inputs, as of adversarial examples. It is not added to the next, and is used if there is no next. Called before
        the forward and the backward pass, for they may have been reset before either.
        """
        if self.gate.grad is None:
            return
        trained = [parameter.grad is None for parameter in self.model.parameters() if parameter.requires_grad]
        if trained and all(trained):
            self.aside, self.gate.grad = self.gate.grad.detach(), None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = fn(self.gate.detach()).device
        if device != self.gate.device:
            gradient, self.gate.grad, self.aside = self.gate.grad, None, None
            self.gate.data = self.gate.data.to(device)
            self.gate.grad = None if gradient is None else gradient.to(device)
            self.bind()
        return self

    def __getstate__(self) -> dict:
        # A copy has modules of its own, which it binds when it is first called.
        return {name: value for name, value in self.__dict__.items() if name != "_releasing"} | {"bound": []}


class Gates:
    """The gates of one model, and when they act on what its modules read.

    Attributes:
        gate: float ``[units]``, a leaf tensor.
        acting: how many calls of the gated model are running: one may be in another thread.
        pending: whether a backward pass of it may still come, in which a part of it may run anew.
        backward: whether such a backward pass is running, as far as the model's outputs tell.
        bound: whether modules are to read through them.
    """

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate
        self.acting = 0
        self.pending = self.backward = self.bound = False

    def enter(self, calls: int = 1) -> None:
        """Let the gates act, for one call more."""
        if torch.compiler.is_compiling():
            self.acting += calls
        else:
            with _ENTERING:
                self.acting += calls

    def leave(self) -> None:
        """End one call."""
        self.enter(-1)

    def act(self) -> bool:
        """Whether a parameter that is read now is to be gated."""
        if self.acting:
            return True
        if not self.pending:
            return False
        if torch.compiler.is_compiling():  # which cannot ask whether a backward pass is running
            return self.backward
        if torch._C._current_graph_task_id() == -1:
            return False
        # Checkpointing enables gradients in mid-backward and runs what it had not stored; hooks run without them.
        return torch.is_grad_enabled() or _computing_anew()

    def watch(self, output: Any, begins: Callable[[], None]) -> None:
        """Note when the backward pass of these outputs begins and ends, for checkpointed parts that are compiled, and
        call ``begins`` when the first one begins.
        """
        self.backward = False
        first = True  # of several backward passes of one forward pass, such as one a task, all count

        def begin(_: Tensor) -> None:
            nonlocal first
            if first:
                begins()
            first, self.backward = False, True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

        for tensor in tensors_in(output).values():
            if tensor.requires_grad and not tensor.is_leaf:  # a parameter that is returned would keep its hooks
                tensor.register_hook(begin)

    def _end(self) -> None:
        self.backward = False


class Factor(NamedTuple):
    """One site's gates: units to read (int64 ``[size]``), where they are not fixed (None: nowhere), the shape to view
    them in, and the dtype of the constant that they stand for (None: they scale a parameter).
    """

    units: Tensor
    inside: Tensor | None
    shape: tuple[int, ...]
    constant: torch.dtype | None

    def of(self, gate: Tensor) -> Tensor:
        """Return the gates of this site, 1 where a channel always stays."""
        values = gate.index_select(0, self.units)
        return values if self.inside is None else values.where(self.inside, 1.0)

    def apply(self, parameter: Tensor | None, key: str, gate: Tensor) -> Tensor:
        """Return the parameter as the gates leave it."""
        values = self.of(gate)
        if self.constant is not None:  # a batch norm without affine parameters
            return values.to(self.constant) if key == "weight" else torch.zeros_like(values, dtype=self.constant)
        return parameter * values.to(device=parameter.device, dtype=parameter.dtype).view(self.shape)


class Binding(NamedTuple):
    """What gates a module's parameters: the gates, and by parameter the factors that apply."""

    gates: Gates
    factors: dict[str, tuple[Factor, ...]]

    def gated(self, key: str, parameter: Tensor | None) -> Tensor:
        """Return the module's parameter ``key`` as the gates leave it."""
        for factor in self.factors[key]:
            parameter = factor.apply(parameter, key, self.gates.gate)
        return parameter


def gated_parameters(model: nn.Module, sites: Iterable[GateSite], gate: Tensor) -> dict[str, Tensor]:
    """Return, by qualified name, the parameters on which gates (float ``[units]``) act, multiplied by them."""
    gates, found = Gates(gate), {}
    parameters = dict(model.named_parameters())
    for name, factors in _factors(model, sites, gate.device).items():
        key = name.rpartition(".")[2]
        found[name] = Binding(gates, {key: factors}).gated(key, parameters.get(name))
    return found


def close(model: nn.Module, channels: Channels, open_units: Tensor) -> Gated:
    """Return the model with all gates but those of ``open_units`` (bool ``[units]``) at zero; tensors are shared."""
    gated = Gated(model, channels)
    gated.gate.data.copy_(channels.check(open_units))
    gated.training = model.training
    return gated


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it is without gates."""
    kind = type(module)
    return kind.__bases__[0] if BINDING in kind.__dict__ else kind


def idle_gates(model: nn.Module) -> Gates | None:
    """Return the gates that would act on the modules of ``model`` if the Tailor around it ran, which it does not."""
    if any(isinstance(module, Gated) for module in model.modules()):
        return None
    bindings = (module.__dict__.get(BINDING) for module in model.modules())
    found = (binding.gates for binding in bindings if binding is not None)
    return next((gates for gates in found if gates.bound and not gates.acting), None)


UNGATED = "is still being tailored, and without its gates it is the dense network"
"""What to say of a model with idle gates."""


def check_ungated(model: Any, verb: str, instead: str = "what it was made of, or what its finish() returns") -> None:
    """Refuse what is no network, or one with gates, in a wrapper too; say what to do it with ``instead``."""
    check_module(model, verb)
    if isinstance(bare(model), Gated):
        raise ValueError(f"this is a {type(bare(model)).__name__}, a network with gates; {verb} {instead}.")


def unwrapped(model: nn.Module, verb: str) -> nn.Module:
    """Return the module inside torch.compile's and the parallel wrappers; a network with gates is refused, by what was
    to be done with it, and one that is still being tailored is warned of.
    """
    check_ungated(model, verb, "what its finish() returns, which is plain and smaller")
    model = bare(model)
    if idle_gates(model) is not None:
        warnings.warn(
            f"this {type(model).__name__} {UNGATED}: not within the budget, and not what tailor(x) computes. "
            f"{verb.capitalize()} it once tailor.shrunk is true, or what finish() returns; to go on with a run later, "
            f"keep tailor.state_dict().",
            RuntimeWarning,
            stacklevel=3,
        )
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Sites and the modules that read them


def _factors(model: nn.Module, sites: Iterable[GateSite], device: torch.device) -> dict[str, tuple[Factor, ...]]:
    """Return, by qualified name, what multiplies each parameter; one used plainly and transposed has two factors."""
    found: dict[str, tuple[Factor, ...]] = {}
    for site in sites:
        inside = site.units >= 0
        units = site.units.clamp(min=0).to(device)
        mask = None if inside.all() else inside.to(device)
        if site.constant:
            norm = model.get_submodule(site.weight.rpartition(".")[0])
            like = norm.running_mean if norm.running_mean is not None else next(model.parameters())
            for name in (site.weight, site.bias):
                found[name] = (Factor(units, mask, (-1,), like.dtype),)
            continue
        module, _, key = site.weight.rpartition(".")
        shape = [1] * _own(model.get_submodule(module), key).ndim
        shape[site.dim] = -1
        found[site.weight] = (*found.get(site.weight, ()), Factor(units, mask, tuple(shape), None))
        if site.bias is not None and site.bias not in found:
            found[site.bias] = (Factor(units, mask, (-1,), None),)
    return found


def _factors_by_module(
    model: nn.Module, sites: Iterable[GateSite], device: torch.device
) -> dict[str, dict[str, tuple[Factor, ...]]]:
    """Return the factors by module and by the name the parameter goes by in it, for every place of each parameter."""
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            places.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, tuple[Factor, ...]]] = {}
    for name, factors in _factors(model, sites, device).items():
        for place in places[id(parameters[name])] if name in parameters else (name,):
            module, _, key = place.rpartition(".")
            found.setdefault(module, {})[key] = factors
    return found


def _computing_anew() -> bool:
    """Say whether, in a backward pass, the code that runs without gradients is part of what checkpointing runs anew.

    A checkpoint in a checkpoint runs its part without gradients. A hook, from which nothing must be hidden, is called
    by the engine itself.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        if frame.f_code is BackwardCFunction.apply.__code__ or frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _bind(module: nn.Module, binding: Binding) -> None:
    """Give the module a subclass of its class in which the bound parameters are read through the gates."""
    plain, keys = plain_class(module), tuple(binding.factors)
    # one for all modules of a kind, for torch.compile specialises on classes
    known = [kind for kind in plain.__subclasses__() if kind.__dict__.get(BINDING) == keys]
    if not known:
        members = {"__module__": getattr(plain, "__module__", None), "__qualname__": plain.__qualname__, BINDING: keys}
        members |= {"__reduce_ex__": _reduced, **{key: _reader(key) for key in keys}}
        known = [type(plain.__name__, (plain,), members)]
    module.__class__ = known[0]
    module.__dict__[BINDING] = binding


def _release(gates: Gates, before: Iterable[tuple[weakref.ref, Binding | None]]) -> None:
    """Bind modules to what they were bound to before, if that still wants them; else make them plain."""
    gates.bound = False
    for reference, binding in before:
        if (module := reference()) is None:
            continue
        now = module.__dict__.pop(BINDING, None)
        if now is not None and now.gates is not gates:
            module.__dict__[BINDING] = now
        elif binding is not None and binding.gates.bound:
            _bind(module, binding)
        else:
            module.__class__ = plain_class(module)


def ungate(model: nn.Module) -> None:
    """Make every module of ``model`` plain, whoever's gates it is bound to."""
    for module in model.modules():
        if module.__dict__.pop(BINDING, None) is not None:
            module.__class__ = plain_class(module)


def _own(module: nn.Module, key: str) -> Tensor | None:
    """Return a module's own parameter, or buffer: detectors have batch norms of buffers."""
    return module._parameters[key] if key in module._parameters else module._buffers.get(key)


def _reader(key: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter = _own(module, key)
        binding = module.__dict__.get(BINDING)
        return binding.gated(key, parameter) if binding is not None and binding.gates.act() else parameter

    return property(read)


def _reduced(module: nn.Module, protocol: int) -> tuple:
    """Copy or pickle the module as it is without gates."""
    plain = plain_class(module)
    made, arguments, state, *rest = plain.__reduce_ex__(module, protocol)
    arguments = tuple(plain if argument is type(module) else argument for argument in arguments)
    state = {name: value for name, value in state.items() if name != BINDING}
    return (_new if made.__name__ == "__newobj__" else made), arguments, state, *rest


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    return kind.__new__(kind, *arguments)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter lies."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
