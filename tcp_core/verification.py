"""Comparing what two networks compute on the example that was traced."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .channels import Channels
from .gates import close
from .outputs import tensors_in
from .state import keeping_modes, left_as_found, random_state_kept


class RemovalError(RuntimeError):
    """The smaller network does not compute what the gated one computes, or it cannot be found out whether it does."""


class NothingFinite(RemovalError):
    """The network's output is not finite anywhere, so nothing can be compared."""


class NotRepeatable(RemovalError):
    """The network gives other outputs each time that it runs, so nothing can be compared."""


def compare(model: nn.Module, small: nn.Module, channels: Channels, open_units: Tensor) -> None:
    """Raise RemovalError unless gated ``model`` and ``small`` agree on the traced example, in eval mode.

    Every tensor in the outputs is compared in shape, floating-point and complex ones in value. Both networks are left
    as they were.
    """
    with left_as_found(model, small):
        run_both(model, small, channels, open_units)


def run_both(
    model: nn.Module, small: nn.Module, channels: Channels, open_units: Tensor, modes: tuple[str, ...] = ("eval",)
) -> None:
    """Compare as :func:`compare` does, but leave behind what running the networks changes in them.

    ``modes``: "eval", "train" or both; in train mode, see :func:`run`, where the network runs on the example in that
    mode and repeats itself, else in eval mode after all.
    """
    gated = close(model, channels, open_units)
    if precision := next((each.dtype for each in model.parameters() if each.is_floating_point()), None):
        gated.gates.gate = gated.gate.detach().to(precision)  # else the gates' own would count as the network's
    for example in (channels.example, *channels.also):
        trained = "train" in modes and _run_both_in_training(model, gated, small, to_model(example, model))
        if "eval" in modes or not trained:
            _run_both(model, gated, small, to_model(example, model))


def _run_both_in_training(model: nn.Module, gated: nn.Module, small: nn.Module, example: tuple[tuple, dict]) -> bool:
    """Compare in train mode; return whether that was possible."""
    try:
        expected, tolerance = run(gated, example, training=True)
    except Exception:  # it may want more samples there, or outputs that could be compared
        return False
    try:
        found, _ = run(small, example, training=True)
        difference = differing(expected, found, tolerance)
    except Exception as error:
        difference = f": the smaller one raised {type(error).__name__}: {error}"
    if not difference:
        return True
    if _changing(model, gated, example, tolerance, training=True):
        return False
    raise RemovalError(f"in train mode gated and smaller network differ{difference}")


def _changing(
    model: nn.Module, gated: nn.Module, example: tuple[tuple, dict], tolerance: float, training: bool = False
) -> str:
    """Return how the outputs of the gated network differ from one run to the next; "" if they do not."""
    with left_as_found(model):
        expected, _ = run(gated, example, training)
    again, _ = run(gated, example, training)
    return differing(expected, again, tolerance)


def _run_both(model: nn.Module, gated: nn.Module, small: nn.Module, example: tuple[tuple, dict]) -> None:
    expected, tolerance = run(gated, example)
    if not any(tensor.isfinite().any() for tensor in expected.values() if has_values(tensor)):
        raise NothingFinite(
            "the network's output on the traced example is not finite (NaN or infinite) anywhere, so nothing can be "
            "compared: the weights have diverged. Lower the learning rate, or go back to weights that are finite."
        )
    try:
        found, _ = run(small, example)
    except RemovalError:
        raise
    except Exception as error:
        raise RemovalError(
            f"the smaller network raised {type(error).__name__}: {error}. A size is probably fixed in the model's "
            f"code; name the module in ignore=..."
        ) from error
    if not (difference := differing(expected, found, tolerance)):
        return
    if changing := _changing(model, gated, example, tolerance):
        raise NotRepeatable(
            f"the network gives other outputs each time it runs on the same input (they differ{changing}), so gated "
            f"and smaller network cannot be compared. Random numbers of torch, Python and NumPy are held still for the "
            f"comparison; find what else changes, or pass verify=False."
        )
    raise RemovalError(
        f"gated and smaller network differ{difference}; this is a defect in the trace: please report it with the "
        f"model. Until then, name the modules concerned in ignore=..."
    )


def run(network: nn.Module, example: tuple[tuple, dict], training: bool = False) -> tuple[dict[str, Tensor], float]:
    """Return the tensors that ``network`` returns on ``example`` in eval mode, by place, and up to which share of the
    largest value two networks that compute the same may differ by rounding.

    With ``training`` in train mode, for branches that run only there; but norms take their running statistics, which
    those of a few samples are too far from, and dropout keeps everything.

    In full precision (no autocast, no TF32), from the same random numbers at each call; operators that draw them give
    constants (see :class:`WithoutChance`).

    Raises:
        RemovalError: if there is nothing in the output that could be compared.
    """
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    calm = WithoutChance()
    with random_state_kept(network), keeping_modes(network), torch.no_grad(), full_precision(), WholeDropout(), calm:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        network.train(training)
        for module in network.modules() if training else ():
            if isinstance(module, UNLIKE_IN_TRAINING):
                module.eval()
        output = network(*args, **kwargs)
        tensors = {place: tensor.detach().clone() for place, tensor in tensors_in(output).items()}
    if not any(has_values(tensor) for tensor in tensors.values()):
        raise RemovalError(nothing_to_compare(output))
    # Rounding differs with the order of summation; a wrongly removed channel moves outputs by far more than this.
    return tensors, torch.finfo(calm.coarsest).eps ** 0.5


UNLIKE_IN_TRAINING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU)
"""Modules that train by the statistics of a batch or by chance, which is not what is compared."""


def differing(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> str:
    """Return how two networks' outputs differ, as part of a sentence; "" if they agree."""
    if expected.keys() != found.keys():
        places = sorted(expected.keys() ^ found.keys())
        return f": only one of them returns output{places[0]}"
    for place, a in expected.items():
        b = found[place]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f": output{place} is {a.dtype} of shape {tuple(a.shape)} in one and {b.dtype} of {tuple(b.shape)}"
        if not has_values(a):
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        # on the CPU, for a device may have no float64
        a, b = ((x if x.layout is torch.strided else x.to_dense()).cpu().to(wide) for x in (a, b))
        same = (a == b) | (a.isnan() & b.isnan())  # infinities too
        gap = (a - b).abs().masked_fill(same, 0)
        scale = a.abs().masked_fill(~a.isfinite(), 0).amax().clamp(min=torch.finfo(torch.float32).tiny)
        error = float(gap.amax() / scale) if a.numel() else 0.0
        if not error <= tolerance:
            return f" by {error:.2g} of the largest output{place}"
    return ""


def has_values(tensor: Tensor) -> bool:
    """Say whether a tensor's values can be compared up to rounding; of integers and truth values only shapes can."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0


def nothing_to_compare(output: Any) -> str:
    """Return what to say of an output without values."""
    kinds = sorted({str(tensor.dtype) for tensor in tensors_in(output).values()})
    what = f"tensors of {', '.join(kinds)} only" if kinds else f"no tensor (it is {type(output).__name__})"
    return (
        f"nothing can be compared: the model's output on the example in eval mode holds {what}. Let forward return the "
        f"values before argmax or decoding (the logits), in a tensor, container or plain object, or trace the part of "
        f"the model that does."
    )


class WholeDropout(TorchFunctionMode):
    """Dropout of whole channels keeps everything: the operators that it consists of do not show whose size its mask
    has. That of SELU networks shifts what it keeps, so a closed channel is not zero behind it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "dropout" in (name := getattr(func, "__name__", "")):
            tensor = args[0] if args else kwargs["input"]
            training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
            in_place = name.endswith("_") or (args[3] if len(args) > 3 else kwargs.get("inplace", False))
            if training and "alpha" in name:
                return tensor.add_(1).sub_(1) if in_place else tensor + 1 - 1
            if training:
                return tensor if in_place else tensor.clone()
        return func(*args, **kwargs)


class WithoutChance(TorchDispatchMode):
    """Operators that draw random numbers give constants: what they draw depends on how many channels there are.

    Dropout keeps everything, noise is half a standard deviation everywhere, permutations change nothing; what is left
    draws the same numbers at every call. ``coarsest`` is the floating dtype with the fewest digits that was seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = torch.float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            out = steady(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point():
            if torch.finfo(out.dtype).eps > torch.finfo(self.coarsest).eps:
                self.coarsest = out.dtype
        return out


def steady(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return what an operator that draws random numbers gives where it draws the same everywhere."""
    schema = func._schema
    given = {each.name: each.default_value for each in schema.arguments}
    given |= dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
    name = schema.name.split("::")[-1].strip("_").removesuffix("_like")
    first = given[schema.arguments[0].name]
    if name in ("native_dropout", "fused_dropout"):
        return first.clone(), torch.ones_like(first, dtype=torch.bool if name == "native_dropout" else torch.uint8)
    for chance in ("generator", "dropout_p"):  # a user's generator would go on, and no one would take it back
        if chance in kwargs:
            kwargs = kwargs | {chance: None if chance == "generator" else 0.0}
        elif given.get(chance):
            position = [each.name for each in schema.arguments].index(chance)
            args = (*args[:position], None if chance == "generator" else 0.0, *args[position + 1 :])
    torch.manual_seed(0)
    out = func(*args, **kwargs)
    if name == "bernoulli":
        p = given.get("p", first)
        return out.copy_(p) if isinstance(p, Tensor) else out.fill_(p if out.is_floating_point() else 1)
    if name in ("rand", "uniform"):
        low, high = given.get("from") or 0.0, 1.0 if given.get("to") is None else given["to"]
        return out.fill_((low + high) / 2)
    if name in ("randn", "normal"):
        mean, std = given.get("mean", 0.0), given.get("std", 1.0)
        return out.copy_(torch.as_tensor(mean + std / 2))
    if name in ("randint", "random"):
        return out.fill_(given.get("low", given.get("from")) or 0)
    if name in ("exponential", "geometric", "log_normal", "cauchy"):
        return out.fill_(1)
    if name == "randperm":
        return out.copy_(torch.arange(len(out)))
    if name == "multinomial":
        return out.copy_(torch.arange(out.shape[-1]) % first.shape[-1])
    if name in ("poisson", "binomial"):
        return out.copy_(first if name == "poisson" else (first * given["prob"]).round())
    return out


@contextlib.contextmanager
def full_precision():
    """Compute float32 in float32: autocast, TF32 and its kin, and attention's fused path of eval mode are off, as they
    were before at the end.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(_ieee())
        yield


@contextlib.contextmanager
def _ieee():
    backends = torch.backends
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer switches
        matmul = "highest"
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        conv = backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = conv
        return
    if matmul != "highest":  # the older and the newer switches must agree
        torch.set_float32_matmul_precision("highest")
    # From the outside in: what is not set of itself follows what is around it, and must go on to.
    outer, inner = (backends, backends.cudnn, backends.mkldnn), [backends.cuda.matmul]
    inner += [getattr(each, op) for each in outer[1:] for op in ("conv", "rnn", "matmul") if hasattr(each, op)]
    before = []
    for each in outer:
        before.append((each, each.fp32_precision))
        each.fp32_precision = "none"
    for each in outer:
        each.fp32_precision = "ieee"
    for each in inner:
        if each.fp32_precision != "ieee":
            before.append((each, each.fp32_precision))
            each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, value in reversed(before):
            each.fp32_precision = value
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)


def to_model(example: tuple[tuple, dict], model: nn.Module) -> tuple[tuple, dict]:
    """Return the example's tensors on the model's device, floating ones in its precision: as they are where any
    parameter has theirs, else in that of the first parameter of real numbers.
    """
    parameter = next(iter(model.parameters()), torch.empty(0))
    precisions = [each.dtype for each in model.parameters() if each.is_floating_point()]

    def move(x):
        if not isinstance(x, Tensor):
            return x
        other = x.is_floating_point() and precisions and x.dtype not in precisions
        return x.to(parameter.device, precisions[0] if other else x.dtype)

    return pytree.tree_map(move, example)
