"""Finding the units of a network: run it once and carry, beside every activation, which channel each element is.

:mod:`.codes` says what is carried, :mod:`.identities` carries it, :mod:`.layers`, :mod:`.movement` and
:mod:`.arithmetic` say what operators do to it, :mod:`.counting` what operators without channels cost, :mod:`.units`
turns it into :class:`~tcp_core.Channels`. Whatever is not understood freezes the channels that enter it: never wrong,
at worst less prunable.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..channels import Channels, Family
from ..gates import check_ungated
from ..removal import remove
from ..state import left_as_found
from ..verification import (
    NothingFinite,
    NotRepeatable,
    RemovalError,
    full_precision,
    has_values,
    run,
    run_both,
    to_model,
)
from . import layers, movement
from .arithmetic import is_pointwise, pointwise
from .identities import Identities, ModuleRule, Rule
from .units import Units
from .unreached import freeze_for_unreached

RULES: dict[str, Rule] = {
    **dict.fromkeys(("convolution", "_convolution"), layers.convolution),
    **dict.fromkeys(("addmm", "mm", "linear"), layers.linear),
    **dict.fromkeys(("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "dropout"), movement.same),
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like"), movement.like),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"), movement.new),
    **dict.fromkeys(("bernoulli", "uniform", "normal", "exponential", "native_dropout"), movement.like),
    **dict.fromkeys(("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flip", "repeat"), movement.move),
    **dict.fromkeys(("rot90", "pixel_shuffle", "pixel_unshuffle"), movement.move),
    **dict.fromkeys(("slice", "select", "index", "index_select", "roll", "unbind", "split_with_sizes"), movement.pick),
    "unfold": movement.pick,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), movement.view),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), movement.shuffle),
    **dict.fromkeys(("cat", "stack"), movement.cat),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm"), movement.reduce),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum"), movement.along_one),
    "native_group_norm": layers.group_norm,
    "glu": movement.glu,
    "split": movement.split,
    "constant_pad_nd": movement.pad,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler"), movement.sample),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), movement.unpool),
    **dict.fromkeys(("sort", "topk"), movement.order),
    "copy": movement.copy,
}

CHEAP = {"macs": 5e8, "params": 1e8}
"""Networks up to this cost are tried out in double precision, in which depthwise convolutions are slow and a copy takes
twice the memory.
"""

COMPUTED = "size computed in Python"
CHANGING = "outputs that change from run to run"


def rule_of(func: Any, name: str) -> Rule:
    """Return the rule for an operator; ``Identities.unknown`` where there is none."""
    bare = name if name.startswith("_") else name.rstrip("_")  # relu_ is relu, in place
    if bare in RULES:
        return RULES[bare]
    if "batch_norm" in name:
        return layers.batch_norm
    if bare in ("max", "min") and func._overloadname == "dim":
        return movement.reduce
    if movement.spatial_dims(bare):
        return movement.in_space
    return pointwise if is_pointwise(func, bare) else Identities.unknown


def rule_within(module: nn.Module) -> ModuleRule | None:
    """Return the rule for a module that counts as one operator, whatever it consists of."""
    return layers.frozen_norm if layers.is_frozen_norm(module) else None


def rule_of_function(ids: Identities, name: str, args: tuple, kwargs: dict) -> ModuleRule | None:
    """Return the rule for a function that counts as one operator, whatever it consists of."""
    if name == "pad":
        return movement.circular_pad(ids, args, kwargs)
    return layers.recurrent(ids, name, args, kwargs) if name in layers.RECURRENT else None


def trace(
    model: nn.Module,
    example_input: Any,
    *,
    ignore: Iterable[str] | str = (),
    also: Iterable[Any] = (),
    unused: Iterable[str] | str = (),
) -> Channels:
    """Return which channels of ``model`` live and die together.

    The model runs in train mode on two samples and in eval mode on one, and is left as it was found: parameters,
    buffers, attributes and what is in them, modes, ``requires_grad``, hooks and random states. It runs without autocast
    and with constants for random numbers.

    Args:
        model: any module whose forward takes tensors. Operators that are not understood freeze the units that enter
            them and are listed in ``.unknown``.
        example_input: a tensor with the batch in dimension 0, a tuple of positional inputs, or a dict of keyword
            inputs.
        ignore: names or glob patterns of modules whose output channels must all stay, for example ``["layer1.*",
            "fc"]``. What leaves a container counts too.
        also: inputs of further calls, each as ``example_input``, that take branches which ``example_input`` does not,
            for example ``[{"x": images, "aux": True}]``. They are traced and verified too; costs are those of the
            first.
        unused: names or patterns of modules that no call reaches, such as a classifier that was left over. Parameters
            that are reached by no traced call and not named here are listed in ``.unreached``, and whatever has the
            size of what they take or give stays, for it may be what they will be fed.

    Raises:
        ValueError: if the model is TorchScript or a part of it with parameters is, the model raises on an example, an
            example is on another device, torch has defaults that cannot be computed with, a pattern matches no module,
            the output has no values that could be compared, or a layer that no call reaches takes what nothing in the
            network has.
    """
    check_ungated(model, "trace")
    _check_written_in_python(model)
    example = _samples(model, example_input, 1)
    _check_tensors(model)
    ignored = _matching_modules(model, ignore, "ignore")
    left_over = _matching_modules(model, unused, "unused")
    also = list(also)
    ids = Identities(model, rule_of, rule_within, rule_of_function)
    ids.watched = {module: [] for modules in ignored.values() for module in modules}
    with left_as_found(model), full_precision(), torch.inference_mode(False):  # in which operators would not be seen
        ids.run("train", *_samples(model, example_input, 2))  # batch norm wants two values a channel
        for other in also:
            ids.run("train", *_samples(model, other, 2))
            ids.run("eval", *_samples(model, other, 1))
        # Costs are of one sample, also where work does not grow with the batch.
        ids.run("eval", *example, count=True)
        _check_ran(ids, ignored)
        _warn_of_uncounted(ids)
        _warn_of_routed(ids)
        unreached = freeze_for_unreached(ids, set().union(*left_over.values()))
        # Tried out in the state that these runs left: what a forward pass has kept must fit the smaller network too.
        examples = [example, *(_samples(model, other, 1) for other in also)]
        examples = _fill_in(model, examples)
        return replace(_tried(ids, ignored, examples), unreached=unreached, unused=tuple(left_over))


@torch.no_grad()
def _fill_in(model: nn.Module, examples: Sequence[tuple[tuple, dict]]) -> list[tuple[tuple, dict]]:
    """Give parameters that are all zero, as the last norm of a block often is at first, some numbers, and vectors that
    are nearly so, such as layer scales of 1e-6; also buffers and inputs that are all zero, if the model takes that.
    Return the examples. What zeros multiply, or what they would add, shows in no output.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        vector = parameter.numel() == max(parameter.shape, default=1)
        if parameter.abs().amax() < 0.05 if vector else not parameter.any():
            parameter.data.uniform_(0.05, 0.2)
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    statistics = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    empty = [buffer for buffer in model.buffers() if _empty(buffer) and id(buffer) not in statistics]
    for buffer in empty:
        buffer.data.uniform_(0.05, 0.2)
    filled = pytree.tree_map(lambda leaf: leaf.uniform_(0.05, 0.2) if _empty(leaf) else leaf, [*_copied(examples)])
    if not empty and not any(map(_empty, pytree.tree_leaves(examples))):
        return filled
    try:
        for example in filled:
            tensors, _ = run(model, to_model(example, model))
            if not all(tensor.isfinite().all() for tensor in tensors.values() if has_values(tensor)):
                raise ValueError
        return filled
    except Exception:  # zeros that mean something
        for buffer in empty:
            buffer.data.zero_()
        return [*examples]


def _empty(tensor: Any) -> bool:
    """Say whether something is a tensor of floating-point zeros."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 0 and not tensor.any()


def _copied(examples: Sequence[tuple[tuple, dict]]) -> Sequence[tuple[tuple, dict]]:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, [*examples])


def _tried(ids: Identities, ignored: Patterns, examples: Sequence[tuple[tuple, dict]]) -> Channels:
    """Return the channels, with frozen what turns out not to be removable."""
    model = None
    modes = ("eval",) if ids.operators["train"] == ids.operators["eval"] else ("train", "eval")
    for _ in range(3):
        units = Units(ids)
        channels = units.channels(ignored, examples)
        if model is None:
            cheap = all(cost <= CHEAP[name] for name, cost in channels.cost().items())
            model = _precise(ids.model, examples) if cheap else ids.model
        try:
            failed = _not_removable(model, channels, modes)
        except NotRepeatable:
            ids.freeze(torch.arange(ids.labels), CHANGING, "", "changing")
            return Units(ids).channels(ignored, examples)
        if not failed:
            return channels
        for family in failed:
            ids.freeze(units.labels(family.units), COMPUTED, ", ".join(family.layers[:3]), "computed")
    ids.freeze(torch.arange(ids.labels), COMPUTED, "", "computed")  # no single family is at fault: leave all of them
    return Units(ids).channels(ignored, examples)


def _precise(model: nn.Module, examples: Sequence[tuple[tuple, dict]]) -> nn.Module:
    """Return a copy of the model that computes in double precision, or the model itself where that is not possible.

    A branch may be small beside what it is added to, such as a residual of images of 0 to 255: in single precision
    what is wrong in it would pass for rounding.
    """
    try:
        precise = copy.deepcopy(model).double()
        for example in examples:
            run(precise, to_model(example, precise))
    except Exception:  # a forward that names its dtype, a device without doubles, a model that cannot be copied
        return model
    return precise


def _not_removable(model: nn.Module, channels: Channels, modes: tuple[str, ...]) -> list[Family]:
    """Try it out: return the families from which units cannot be removed after all.

    Sizes that a forward writes out (``x.view(-1, 64)``) or computes from a shape (``x * x.size(1) ** -0.5``) leave no
    trace in the operators, so units of all families are removed and outputs compared; if that fails, by halves.
    A size may be taken from another family's width and fit by coincidence. So families of one size are numbered, and
    each loses as many units as the digit of its number, in as many passes as there are digits. ``modes``: also in train
    mode where the model has operators that it does not have in eval mode.
    """
    digits: list[tuple[int, int, Tensor]] = []  # number among families of one size, base, removable units
    peers: Counter[int] = Counter()
    for family in channels.families:
        removable = family.units[channels.prunable[family.units]]
        most = min(len(removable), len(family.units) - 1, max(1, len(family.units) // 2))
        peers[len(family.units)] += most > 0
        digits.append((peers[len(family.units)] if most > 0 else 0, most + 1, removable))
    while any(number for number, *_ in digits):
        closed = [removable[: number % base] for number, base, removable in digits]
        if failed := _failing(model, channels, closed, range(len(closed)), modes):
            return [channels.families[index] for index in failed]
        digits = [(number // base if base > 1 else 0, base, removable) for number, base, removable in digits]
    # Conditions on a size (``if x.size(1) >= 16``, ``x.size(1) // 8``) may hold as long as few units are gone. In train
    # mode, for one operator may have different sizes in the two, and in eval mode the final network is compared.
    closed = [family.units[channels.prunable[family.units]][: len(family.units) - 1] for family in channels.families]
    failed = _failing(model, channels, closed, range(len(closed)), ("train",), alone=True)
    return [channels.families[index] for index in failed]


def _failing(
    model: nn.Module,
    channels: Channels,
    closed: Sequence[Tensor],
    indices: Sequence[int],
    modes: tuple[str, ...],
    alone: bool = False,
) -> list[int]:
    """Return which families at ``indices`` cannot lose their ``closed`` units; all if no single one is at fault.

    ``alone``: only those that are at fault by themselves; what is left when nearly all units go may be no network.
    """
    open_units = torch.ones(channels.units, dtype=torch.bool)
    for index in indices:
        open_units[closed[index]] = False
    if open_units.all():
        return []
    try:
        run_both(model, remove(model, channels, open_units, verify=False), channels, open_units, modes)
        return []
    except NotRepeatable:
        raise
    except NothingFinite:
        if alone and len(indices) == 1:
            return []
    except (RemovalError, ValueError):
        pass
    half = len(indices) // 2
    parts = (indices[:half], indices[half:]) if half else ()
    found = [index for part in parts for index in _failing(model, channels, closed, part, modes, alone)]
    return found or ([] if alone and half else list(indices))


def _samples(model: nn.Module, example: Any, count: int) -> tuple[tuple, dict]:
    """Return the example as (args, kwargs) with ``count`` samples, in the model's precision."""
    args, kwargs = ((), dict(example)) if isinstance(example, dict) else (example, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].ndim == 0 or not tensors[0].shape[0]:
        raise ValueError(
            f"example_input must be a tensor with the batch in dimension 0, a tuple of positional inputs or a dict "
            f"of keyword inputs; got {type(example).__name__}. For images: torch.randn(2, 3, 224, 224)."
        )
    devices = {p.device for p in model.parameters()} | {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"model and example input are on different devices: {sorted(map(str, devices))}; move both to one, for "
            f"example example_input.to(next(model.parameters()).device)."
        )
    batch = tensors[0].shape[0]

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
            return leaf
        return torch.cat([leaf] * math.ceil(count / batch))[:count].detach().clone()

    return to_model(pytree.tree_map(take, (args, kwargs)), model)


Patterns = dict[str, set[nn.Module]]
"""Each pattern with the modules that it matches, and all within them."""


def _matching_modules(model: nn.Module, patterns: Iterable[str] | str, option: str) -> Patterns:
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    matched = {}
    # a module may be an iterable of others
    for pattern in [patterns] if isinstance(patterns, str | nn.Module | type) else list(patterns):
        if not isinstance(pattern, str):
            kind = pattern if isinstance(pattern, type) else ()
            names = [name for name, module in named if module is pattern or isinstance(module, kind)]
            meant = f": {', '.join(map(repr, names[:3]))} here" if names else ""
            raise TypeError(
                f"{option} has a {getattr(pattern, '__name__', type(pattern).__name__)} in it; it takes names or "
                f"patterns of modules, as model.named_modules() has them{meant}."
            )
        found = [module for name, module in named if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"{option}={pattern!r} matches no module; names look like {[name for name, _ in named[:6]]}."
            )
        matched[pattern] = {inner for module in found for inner in module.modules()}
    return matched


def _check_written_in_python(model: nn.Module) -> None:
    """Refuse TorchScript that holds parameters, which no gate can be put on; a scripted function is no obstacle."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            what = f"module {name!r} of the model" if name else "the model"
            raise ValueError(
                f"{what} is TorchScript (torch.jit.script or torch.jit.trace), in which parameters cannot be gated or "
                f"cut. Give the nn.Module that it was made of, with these weights "
                f"(module.load_state_dict(scripted.state_dict())), and script what finish() returns."
            )


def _check_tensors(model: nn.Module) -> None:
    """Refuse weights without values, and what ``torch.set_default_device`` and ``set_default_dtype`` may have set: what
    is computed beside a model is computed on the CPU, with numbers that hold counts.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device and has no values, which a trace computes with: build the "
                f"model on the CPU or a GPU, or give it weights: model.to_empty(device='cpu'), then initialise or load."
            )
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    if device.type != "cpu":
        raise ValueError(
            f"torch.set_default_device('{device}') is in force, and channels are counted on the CPU: call "
            f"torch.set_default_device(None) and move model and batches with .to('{device}')."
        )
    if torch.finfo(dtype).bits < 32:
        raise ValueError(
            f"torch.set_default_dtype({dtype}) is in force, in which channels cannot be counted: call "
            f"torch.set_default_dtype(torch.float32) once the model is built."
        )


def _check_ran(ids: Identities, ignored: Patterns) -> None:
    """Refuse patterns that could not be obeyed: it is by the outputs of calls, or by weights, that units are kept."""
    for pattern, modules in ignored.items():
        if not any(module in ids.ran or next(module.parameters(recurse=False), None) is not None for module in modules):
            raise ValueError(
                f"ignore={pattern!r} matches only modules that the example does not call, so it is not known which "
                f"channels are theirs; name the modules before or after them."
            )


def _warn_of_routed(ids: Identities) -> None:
    """Warn of macs that are those of the rows that this example's values pick."""
    if ids.routed:
        names = [repr(name) for name in ids.routed]
        warnings.warn(
            f"how many rows {', '.join(names[:3])}{' and others' * (len(names) > 3)} compute on depends on values, and "
            f"with it the macs: they are counted as on the example with the weights of now (at least one row each). A "
            f"budget on macs holds for these rows; one on params holds whatever the rows.",
            stacklevel=3,
        )


def _warn_of_uncounted(ids: Identities) -> None:
    """Warn of operators with matrices of parameters whose macs are in no count."""
    if ids.uncounted:
        found = ", ".join(f"{name} in {where or 'the model'}" for name, where in ids.uncounted.items())
        warnings.warn(
            f"the macs of {found} are in no count, for what this operator multiplies is not known: a budget on macs is "
            f"one for the rest of the network.",
            stacklevel=3,
        )
