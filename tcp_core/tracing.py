"""Finding the units of a network: run it once and carry, beside every activation, which channel each element is.

Every activation gets an integer tensor of its own shape, its **codes**. ``code >> 1`` is a channel label (0: no channel) and
``code & 1`` says that the element may be non-zero although the channel is closed. Data movement applies the very same
operator to the codes; element-wise operators tie the labels of their operands; convolutions and linear layers read labels at
their input and hand out fresh ones at their output. Whatever is not understood freezes the channels that enter it: never
wrong, at worst less prunable. At the end, tied labels become units.

The mechanism is that of torch's own flop counter, a ``TorchDispatchMode``; which operators are element-wise is torch's own
tag, and whether one keeps zero at zero is found by evaluating it at zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from .channels import Channels, Family, GateSite, Layer, Padding
from .cost import CostBuilder
from .removal import RemovalError, remove, tensor_shapes, to_model

# Data movement whose geometry does not depend on the number of channels.
_MOVES = {"permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flip", "repeat", "pixel_shuffle"}
_MOVES |= {"pixel_unshuffle", "movedim", "numpy_T"}
# Data movement that picks positions: right only along dimensions that hold no channels.
_PICKS = {"slice", "select", "narrow", "index", "index_select", "roll", "unbind", "unfold", "split_with_sizes"}
_SAME = {"clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "dropout", "to"}
_LIKE = {"empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "bernoulli", "native_dropout"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "norm"}
_POINTWISE = {"hardswish", "mish", "threshold", "_prelu_kernel"}  # not tagged as such by torch 2.14
_LARGE = 1 << 20  # a parameter with more entries than this is not followed entry by entry


def trace(model: nn.Module, example_input: Any, *, ignore: Iterable[str] | str = ()) -> Channels:
    """Return which channels of ``model`` live and die together.

    The model runs in train and in eval mode on at most two samples and is left exactly as it was found: modes, buffers,
    ``requires_grad``, hooks and the random state.

    Args:
        model: any module whose forward takes tensors. Operators that are not understood freeze the units that enter them and
            are listed in ``.unknown``.
        example_input: a tensor with the batch in dimension 0, a tuple of positional inputs, or a dict of keyword inputs.
        ignore: names or glob patterns of modules whose output channels must all stay, for example ``["layer1.*", "fc"]``.

    Raises:
        ValueError: if the model raises on the example, the example is on another device, or a pattern matches no module.
    """
    args, kwargs = _two_samples(model, example_input)
    ignored = _matching_modules(model, [ignore] if isinstance(ignore, str) else list(ignore))
    tracer = _Tracer(model)
    with _left_as_found(model):
        for mode in ("train", "eval"):
            tracer.run(mode, args, kwargs)
    channels = tracer.channels(ignored, (args, kwargs))
    if failed := _not_removable(model, channels, channels.families):
        for family in failed:
            tracer.freeze(tracer.labels_of(family.units), "size computed in Python", ", ".join(family.layers[:3]))
        channels = tracer.channels(ignored, (args, kwargs))
        if _not_removable(model, channels, channels.families):  # not one family alone: leave all of them
            tracer.freeze(torch.arange(tracer.labels), "size computed in Python", "")
            channels = tracer.channels(ignored, (args, kwargs))
    return channels


def _not_removable(model: nn.Module, channels: Channels, families: Sequence[Family]) -> list[Family]:
    """Try it out: return the families of which a unit cannot be removed after all.

    Sizes that a forward writes out (``x.view(-1, 64)``) or computes from a shape (``x * x.size(1) ** -0.5``) leave no trace in
    the operators, so one unit of every family is removed and the outputs compared; only if that fails, by halves.
    """
    open_units = torch.ones(channels.units, dtype=torch.bool)
    for family in families:
        removable = family.units[channels.prunable[family.units]]
        if len(family.units) > 1:
            open_units[removable[:1]] = False
    if open_units.all():
        return []
    try:
        with _left_as_found(model):
            remove(model, channels, open_units)
        return []
    except (RemovalError, ValueError):
        if len(families) == 1:
            return list(families)
    half = len(families) // 2
    return _not_removable(model, channels, families[:half]) + _not_removable(model, channels, families[half:])


class _Tracer(TorchDispatchMode):
    """Carries codes beside activations; labels, ties and frozen labels accumulate over several runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.labels = 1  # label 0 means no channel
        self.ties: list[Tensor] = []  # int64 [n, 2]
        self.frozen: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.producers: list[Tensor] = []
        self.blame: list[tuple[str, str, Tensor]] = []  # operator, module, frozen labels
        self.dims: dict[tuple[str, int], Tensor] = {}  # labels along a parameter's or buffer's dimension
        self.entries: dict[str, Tensor] = {}  # labels of every entry, for parameters used element by element
        self.fixed: set[str] = set()  # parameters that must keep their shape
        self.gated: dict[str, GateSite] = {}  # batch norms, by the name of the weight; units are labels until the end
        self.raw: dict[str, tuple[str | None, int]] = {}  # layers whose raw output is used: weight -> bias, dimension
        self.layers: dict[str, tuple[str, int]] = {}  # weight -> module, output dimension
        self.calls: list[tuple[float, Tensor | None, Tensor | None]] = []  # macs as scale * inputs * outputs
        self.constant_macs = 0
        self.pads: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.zero: dict[Any, bool] = {}

    # Running the model

    def run(self, mode: str, args: tuple, kwargs: dict) -> None:
        self.counting = mode == "eval"
        self.codes = WeakTensorKeyDictionary()
        self.raw_outputs = WeakTensorKeyDictionary()
        self.views = WeakTensorKeyDictionary()  # views of a parameter: (name, transposed)
        self.storages: dict[int, list[weakref.ref]] = {}
        self.stack: list[nn.Module] = []
        self.batch = next(
            (x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), 1
        )
        self.names = WeakTensorKeyDictionary()
        for name, tensor in (*self.model.named_buffers(), *self.model.named_parameters()):
            self.names[tensor] = name
        self.modules = {module: name for name, module in self.model.named_modules()}
        self.model.train(mode == "train")
        for module in self.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()  # as an identity: what it drops has nothing to do with channels
        hooks = (
            nn.modules.module.register_module_forward_pre_hook(lambda module, _: self.stack.append(module)),
            nn.modules.module.register_module_forward_hook(lambda *_: self.stack.pop() and None),
        )
        try:
            with torch.no_grad(), self:
                output = self.model(*args, **kwargs)
        except Exception as error:
            shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            kinds = [str(x.dtype) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            raise ValueError(
                f"the model raised {type(error).__name__} in {mode} mode on the example input (shapes {shapes}, {kinds}): "
                f"{error}. Give an example that model(example_input) accepts in both modes: the right shape, dtype and device."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in _tensors_in(output):
            self._consume(tensor)
            if (codes := self.codes.get(tensor)) is not None:
                self.outputs.append(_labels(codes).unique())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        rule = self._rule(name, func)
        normalised = "batch_norm" in name
        for position, tensor in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(tensor, Tensor) and not (normalised and position == 0) and name not in ("detach", "alias"):
                self._consume(tensor)
        rule(func, name, args, kwargs, out)
        return out

    def _rule(self, name: str, func):
        bare = name.rstrip("_") if not name.startswith("_") else name
        if name in ("convolution", "_convolution"):
            return self._convolution
        if name in ("addmm", "mm", "linear"):
            return self._linear
        if "batch_norm" in name and "backward" not in name:
            return self._batch_norm
        if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            return self._view
        if name in ("cat", "stack"):
            return self._cat
        if name in ("split", "chunk"):
            return self._split
        if name == "constant_pad_nd":
            return self._pad
        if name in ("channel_shuffle", "native_channel_shuffle"):
            return self._shuffle
        if bare == "copy":
            return self._copy
        if bare in _LIKE:
            return self._like
        if bare in _SAME:
            return self._same
        if bare in _MOVES or bare in _PICKS:
            return self._move
        if bare in _REDUCTIONS and isinstance(func, torch._ops.OpOverload):
            return self._reduce
        if _spatial(bare):
            return self._spatial
        if torch.Tag.pointwise in func.tags or bare in _POINTWISE:
            return self._pointwise
        return self._unknown

    # Bookkeeping

    def fresh(self, count: int) -> Tensor:
        """Return ``count`` new labels."""
        self.labels += count
        return torch.arange(self.labels - count, self.labels)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie label tensors entry by entry, with broadcasting; label 0 ties with nothing."""
        pairs = torch.stack([each.reshape(-1) for each in torch.broadcast_tensors(a, b)], 1)
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs != 0).all(1)]
        if len(pairs):
            self.ties.append(pairs.unique(dim=0))

    def freeze(self, labels: Tensor, operator: str = "", module: str = "") -> None:
        """Freeze labels; with an operator, on account of it."""
        labels = labels.unique()
        labels = labels[labels > 0]
        if len(labels):
            self.frozen.append(labels)
            if operator:
                self.blame.append((operator, module, labels))

    @property
    def here(self) -> str:
        return self.modules.get(self.stack[-1], type(self.stack[-1]).__name__) if self.stack else ""

    def _of(self, tensor: Any) -> Tensor | None:
        """Return a tensor's codes, or None if it holds no channels."""
        if not isinstance(tensor, Tensor):
            return None
        codes = self.codes.get(tensor)
        name = self.names.get(tensor) if codes is None else None
        if name is None or tensor.numel() <= 1:
            return codes
        if tensor.numel() > _LARGE:
            self.fixed.add(name)
            return None
        if name not in self.entries:
            self.entries[name] = self.fresh(tensor.numel()).view(tensor.shape)
        return (self.entries[name] << 1) | 1  # not zero, however closed the channel

    def _set(self, tensor: Tensor, codes: Tensor | None) -> None:
        if codes is None or tensor in self.names or not isinstance(tensor, Tensor):
            return
        self.codes[tensor] = _compact(codes)
        if tensor.device.type != "meta" and tensor.numel():
            self.storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(tensor))

    def _mutate(self, tensor: Tensor, codes: Tensor | None, operator: str) -> None:
        """Record new codes of a tensor that was changed in place; what else looks at its memory is frozen."""
        old = self.codes.get(tensor)
        if codes is None or (old is not None and old.shape == codes.shape and torch.equal(old, codes)):
            return
        for reference in self.storages.get(tensor.untyped_storage().data_ptr(), ()):
            other = reference()
            if other is not None and other is not tensor and (seen := self.codes.get(other)) is not None:
                self.freeze(_labels(seen), operator, self.here)
                self.freeze(_labels(codes), operator, self.here)
        if tensor._is_view() or tensor._base is not None:
            self.freeze(_labels(codes), operator, self.here)
        self._set(tensor, codes)

    def _consume(self, tensor: Tensor) -> None:
        """A layer's raw output is used by something other than a batch norm: the layer itself needs a gate."""
        if (layer := self.raw_outputs.get(tensor)) is not None:
            self.raw[layer[0]] = layer[1:]

    def _channelwise(self, codes: Tensor | None, size: int, dim: int, operator: str) -> Tensor:
        """Return one code per channel (int64 ``[size]``); what differs within a channel's slab is tied."""
        if codes is None:
            return torch.ones(size, dtype=torch.int64)
        moved = codes.movedim(dim, 0)
        if any(_varies(moved, d) for d in range(1, moved.ndim)):
            if dim != 0 and _varies(codes, 0):
                self.freeze(_labels(codes), operator, self.here)
            flat = moved.reshape(size, -1)
            best = flat.amax(1)
            self.tie(flat >> 1, (best >> 1)[:, None].expand_as(flat))
            return (best & ~1) | (flat & 1).amax(1)
        return moved.reshape(size, -1)[:, 0]

    def _register(self, name: str, dim: int, labels: Tensor) -> None:
        """A parameter's dimension follows these labels (0: fixed); uses of one parameter are tied."""
        if (known := self.dims.get((name, dim))) is not None:
            self._tie_positions(known, labels)
            labels = torch.maximum(known, labels)
        self.dims[name, dim] = labels

    def _tie_positions(self, a: Tensor, b: Tensor) -> None:
        """Positions that must stay or go together; one that is fixed on one side is frozen on the other."""
        a, b = torch.broadcast_tensors(a, b)
        self.tie(a, b)
        self.freeze(a[b == 0])
        self.freeze(b[a == 0])

    # Rules: layers

    def _convolution(self, func, name, args, kwargs, out) -> None:
        x, weight, bias = args[:3]
        transposed, groups = args[6], args[8]
        parameter = self.names.get(weight)
        if parameter is None or not isinstance(weight, nn.Parameter) or (transposed and groups > 1):
            return self._unknown(func, name, args, kwargs, out)
        codes = self._channelwise(self._of(x), x.shape[1], 1, name)
        self.freeze((codes >> 1)[(codes & 1) == 1])  # a closed channel that is not zero would be missed
        inputs = codes >> 1
        out_dim = 1 if transposed else 0
        module = self.stack[-1] if self.stack else None
        kernel = math.prod(weight.shape[2:])
        area = math.prod((x if transposed else out).shape[2:]) * x.shape[0] / self.batch
        if groups == 1:
            self._register(parameter, 1 - out_dim, inputs)
            outputs = self._outputs(parameter, out_dim, weight.shape[out_dim])
            self._call(area * kernel, inputs, outputs)
        else:
            outputs = self._outputs(parameter, 0, out.shape[1])
            if not isinstance(module, nn.modules.conv._ConvNd) or module._parameters.get("weight") is not weight:
                # The number of groups is written in the call, so it cannot follow.
                self.freeze(torch.cat([inputs, outputs]), name, self.here)
            by_group = torch.cat([inputs.view(groups, -1), outputs.view(groups, -1)], 1)
            self.tie(by_group, by_group.amax(1, keepdim=True).expand_as(by_group))
            whole = (inputs.view(groups, -1) == 0).any(1)
            self.freeze(by_group[whole])
            self._call(area * kernel * (x.shape[1] // groups), None, outputs)
        self._finish_layer(parameter, bias, out_dim, outputs, out, _shape_codes(outputs, out, 1))

    def _linear(self, func, name, args, kwargs, out) -> None:
        bias, x, weight = (args[0], args[1], args[2]) if name == "addmm" else (None, args[0], args[1])
        if name == "linear":
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            parameter, transposed = self.names.get(weight), True
        else:
            parameter, transposed = self.views.get(weight, (self.names.get(weight), False))
        if parameter is None or kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            return self._unknown(func, name, args, kwargs, out)
        out_dim = 0 if transposed else 1
        size = self.model.get_parameter(parameter).shape[1 - out_dim]
        codes = self._of(x)
        if codes is not None and any(_varies(codes, d) for d in range(codes.ndim - 1)):
            self.freeze(_labels(codes), name, self.here)  # channels among the rows
        codes = self._channelwise(codes, size, x.ndim - 1, name)
        self.freeze((codes >> 1)[(codes & 1) == 1])
        self._register(parameter, 1 - out_dim, codes >> 1)
        outputs = self._outputs(parameter, out_dim, out.shape[-1])
        self._call(out.numel() / out.shape[-1] / self.batch, codes >> 1, outputs)
        self._finish_layer(parameter, bias, out_dim, outputs, out, _shape_codes(outputs, out, -1))

    def _outputs(self, parameter: str, dim: int, size: int) -> Tensor:
        if (parameter, dim) not in self.dims:
            self.dims[parameter, dim] = self.fresh(size)
        labels = self.dims[parameter, dim]
        if (labels == 0).any():
            labels = torch.where(labels == 0, self.fresh(size), labels)
            self.freeze(labels)
        self.producers.append(labels)
        return labels

    def _finish_layer(self, parameter, bias, out_dim, outputs, out, codes) -> None:
        self.layers.setdefault(parameter, (parameter.rpartition(".")[0], out_dim))
        bias_name = None
        if bias is not None:
            if (bias_name := self.names.get(bias)) is None:
                self.freeze(outputs, "bias", self.here)
            else:
                self._register(bias_name, 0, outputs)
        self._set(out, codes)
        self.raw_outputs[out] = (parameter, bias_name, out_dim)

    def _call(self, scale: float, inputs: Tensor | None, outputs: Tensor | None) -> None:
        if self.counting:
            self.calls.append((scale, inputs, outputs))

    def _batch_norm(self, func, name, args, kwargs, out) -> None:
        x, weight, bias = args[:3] if isinstance(args[1], Tensor | None) else (args[0], None, None)
        result = out[0] if isinstance(out, (tuple, list)) else out
        codes = self._of(x)
        if codes is None and weight is None:
            return
        codes = self._channelwise(codes, x.shape[1], 1, name)
        labels = codes >> 1
        for tensor in (t for t in args[1:] if isinstance(t, Tensor)):
            if (parameter := self.names.get(tensor)) is not None:
                self._register(parameter, 0, labels)
            else:
                self.freeze(labels, name, self.here)
        module = self.stack[-1] if self.stack else None
        gateable = self.names.get(weight) if isinstance(weight, nn.Parameter) else None
        if gateable is not None:
            self.gated[gateable] = GateSite(gateable, None if bias is None else self.names.get(bias), labels)
        elif weight is None and isinstance(module, nn.modules.batchnorm._BatchNorm) and module in self.modules:
            prefix = f"{self.modules[module]}." if self.modules[module] else ""
            gateable = f"{prefix}weight"
            self.gated[gateable] = GateSite(gateable, f"{prefix}bias", labels, constant=True)
        else:
            self._consume(x)
        # A closed gate makes the output zero; without one, running statistics may move zero.
        self._set(result, _shape_codes(labels, result, 1, unsafe=int(gateable is None)))

    # Rules: data movement

    def _same(self, func, name, args, kwargs, out) -> None:
        if args[0] in self.names and out is not args[0]:
            self.views[out] = (self.names[args[0]], False)
        self._set(out, self._of(args[0]) if args[0] not in self.names else None)

    def _like(self, func, name, args, kwargs, out) -> None:
        codes = self._of(args[0])
        for position, result in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
            keep = name == "native_dropout" and position == 0
            self._set(result, codes if codes is None or keep else _mark(codes))

    def _move(self, func, name, args, kwargs, out) -> None:
        tensor = args[0]
        if name in ("t", "transpose", "permute") and tensor in self.names and tensor.ndim == 2:
            self.views[out] = (self.names[tensor], out.shape != tensor.shape or out.stride() != tensor.stride())
            return
        codes = self._of(tensor)
        if codes is None:
            if name in ("index", "index_select") and any(self._of(t) is not None for t in pytree.tree_leaves(args[1:])):
                self._unknown(func, name, args, kwargs, out)
            return
        if name in _PICKS and not self._picks_nothing(name, codes, args, kwargs, out):
            return self._unknown(func, name, args, kwargs, out)
        if "pixel" in name and any(_varies(codes, d) for d in range(codes.ndim) if d != codes.ndim - 3):
            return self._unknown(func, name, args, kwargs, out)
        moved = func(codes, *args[1:], **kwargs)
        for result, each in zip(pytree.tree_leaves(out), pytree.tree_leaves(moved), strict=True):
            self._set(result, each)

    def _picks_nothing(self, name: str, codes: Tensor, args, kwargs, out) -> bool:
        """Whether a picking operator leaves the dimensions that hold channels alone."""
        rank = codes.ndim
        if name == "index":
            picked = [d for d, index in enumerate(args[1]) if index is not None]
        elif name == "roll":
            picked = list(args[2]) if len(args) > 2 else list(range(rank))
        else:
            dim_at = 2 if name == "split_with_sizes" else 1
            picked = [args[dim_at] if len(args) > dim_at else kwargs.get("dim", 0)]
        picked = [d % rank for d in picked]
        if name == "slice" and codes.shape[picked[0]] == out.shape[picked[0]]:
            return True
        return not any(_varies(codes, d) for d in picked)

    def _view(self, func, name, args, kwargs, out) -> None:
        tensor = args[0]
        codes = self._of(tensor)
        if codes is None:
            return
        if not all(isinstance(size, int) for size in args[1]):
            return self._unknown(func, name, args, kwargs, out)
        result = codes.reshape(out.shape)
        for ins, outs in _view_groups(codes.shape, out.shape):
            if len(outs) < 2 or not any(_varies(codes, d) for d in ins):
                continue
            if len(ins) > 1:
                return self._unknown(func, name, args, kwargs, out)
            # Splitting the channels into (outer, inner): the same inner channels must go from every outer part.
            for d in outs[:-1]:
                first = result.narrow(d, 0, 1).expand_as(result)
                self._tie_positions(_labels(result), _labels(first))
                result = first
        self._set(out, result)

    def _shuffle(self, func, name, args, kwargs, out) -> None:
        codes = self._of(args[0])
        if codes is None:
            return
        parts = codes.reshape(codes.shape[0], args[1], -1, *codes.shape[2:])
        first = parts[:, :1].expand_as(parts)
        self._tie_positions(_labels(parts), _labels(first))
        self._set(out, first.transpose(1, 2).reshape(codes.shape))

    def _split(self, func, name, args, kwargs, out) -> None:
        codes = self._of(args[0])
        if codes is None:
            return
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % codes.ndim
        parts = codes.split(out[0].shape[dim], dim)
        if _varies(codes, dim):
            if len({part.shape[dim] for part in parts}) > 1:
                return self._unknown(func, name, args, kwargs, out)
            # Equal parts stay equal only if the same positions go from each.
            for part in parts[1:]:
                self._tie_positions(_labels(part), _labels(parts[0]))
            parts = [parts[0] | part & 1 for part in parts]
        for result, part in zip(out, parts, strict=True):
            self._set(result, part)

    def _cat(self, func, name, args, kwargs, out) -> None:
        tensors = [t for t in args[0] if t.numel() or name == "stack"]
        if all(self._of(t) is None for t in tensors):
            return
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
        parts = []
        for tensor in tensors:
            codes = self._of(tensor)
            codes = torch.ones((), dtype=torch.int64).expand(tensor.shape) if codes is None else codes
            parts.append(codes.unsqueeze(dim) if name == "stack" else codes)
        other = [d for d in range(out.ndim) if d != dim]
        crossed = any(_varies(part, d) for part in parts for d in other)
        if crossed:
            if any(_varies(part, dim) for part in parts):
                return self._unknown(func, name, args, kwargs, out)
            # Joined along a dimension without channels: the channels of all parts must agree.
            for part in parts[1:]:
                self._tie_positions(_labels(parts[0].narrow(dim, 0, 1)), _labels(part.narrow(dim, 0, 1)))
            self._set(out, torch.cat(parts, dim))
            return
        narrow = [part[tuple(slice(None) if d == dim else slice(0, 1) for d in range(out.ndim))] for part in parts]
        self._set(out, torch.cat(narrow, dim).expand(out.shape))

    def _pad(self, func, name, args, kwargs, out) -> None:
        codes = self._of(args[0])
        if codes is None:
            return
        amounts = list(args[1])
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        unsafe = int(value != 0)
        for position in range(0, len(amounts), 2):
            dim = codes.ndim - 1 - position // 2
            before, after = amounts[position : position + 2]
            if not before and not after:
                continue
            if not _varies(codes, dim):
                size = codes.shape[dim] + before + after
                codes = _mark(codes, unsafe).narrow(dim, 0, 1)
                codes = codes.expand([size if d == dim else s for d, s in enumerate(codes.shape)])
                continue
            if min(before, after) < 0 or any(_varies(codes, d) for d in range(codes.ndim) if d != dim):
                return self._unknown(func, name, args, kwargs, out)
            front, back = self._padding_labels(position, before, after, unsafe)
            shape = [1] * codes.ndim
            shape[dim] = -1

            def grow(labels: Tensor, codes=codes, dim=dim, shape=shape) -> Tensor:
                sizes = [len(labels) if d == dim else s for d, s in enumerate(codes.shape)]
                return ((labels << 1) | unsafe).view(shape).expand(sizes)

            codes = torch.cat([grow(front), codes, grow(back)], dim)
        self._set(out, codes)

    def _padding_labels(self, position: int, before: int, after: int, unsafe: int) -> tuple[Tensor, Tensor]:
        """Channels made of zeros: a padding module's amounts can follow, amounts written in a call cannot."""
        module = self.stack[-1] if self.stack else None
        follows = isinstance(module, nn.modules.padding._ConstantPadNd) and module in self.modules
        name = self.modules[module] if follows else ""
        if name not in self.pads:
            front, back = self.fresh(before), self.fresh(after)
            if not follows or unsafe:
                self.freeze(torch.cat([front, back]), "pad", self.here)
                return front, back
            self.pads[name] = (position, front, back)
            self.producers += [front, back]
        return self.pads[name][1:]

    def _copy(self, func, name, args, kwargs, out) -> None:
        codes = self._of(args[1])
        if codes is not None:
            codes = codes.expand(args[0].shape)
        elif self._of(args[0]) is not None:
            codes = _mark(self._of(args[0]))
        self._mutate(args[0], codes, name)

    # Rules: arithmetic

    def _pointwise(self, func, name, args, kwargs, out) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        codes = [self._of(t) for t in tensors]
        if not isinstance(out, Tensor) or all(code is None for code in codes):
            if not isinstance(out, Tensor) and any(code is not None for code in codes):
                self._unknown(func, name, args, kwargs, out)
            return
        rank = out.ndim
        shapes = [(1,) * (rank - t.ndim) + tuple(t.shape) for t in tensors]
        codes = [None if c is None else c.reshape(s) if c.shape != s else c for c, s in zip(codes, shapes, strict=True)]
        varying = [d for d in range(rank) if any(c is not None and _varies(c, d) for c in codes)]
        for i, (code, shape) in enumerate(zip(codes, shapes, strict=True)):
            # One value for all channels of the others: if it is a channel itself, it must stay.
            spread = [d for d in varying if shape[d] == 1 and out.shape[d] > 1]
            if code is not None and spread:
                self.freeze(_labels(code), name, self.here)
                codes[i] = None
        at = [slice(None) if d in varying else slice(0, 1) for d in range(rank)]
        pattern, label = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        whole = [out.shape[d] if d in varying else 1 for d in range(rank)]
        views: list[Tensor] = []
        for i, (code, shape) in enumerate(zip(codes, shapes, strict=True)):
            if code is None:
                pattern = pattern | (1 << i)
                # A constant of the same size cannot shrink: the channels it meets stay.
                views += [torch.zeros(whole, dtype=torch.int64)] if any(shape[d] > 1 for d in varying) else []
                continue
            small = code[tuple(at)].expand(whole)
            pattern = pattern | ((small & 1) << i)
            views.append(small >> 1)
        for view in views:
            label = torch.maximum(label, view)
        for view in views:
            self._tie_positions(view, label)
        unsafe = torch.zeros_like(pattern)
        for value in pattern.unique().tolist():
            unsafe = torch.where(pattern == value, int(not self._zero_safe(func, args, kwargs, tensors, value)), unsafe)
        result = ((label << 1) | unsafe).expand(out.shape)
        if out is tensors[0] and name.endswith("_"):
            self._mutate(out, result, name)
        else:
            self._set(out, result)

    def _zero_safe(self, func, args, kwargs, tensors, pattern: int) -> bool:
        """Whether the result is zero when the operands without a bit in ``pattern`` are, whatever the others hold."""
        constants = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
        key = (func, str(constants), tuple(t.dtype for t in tensors), pattern)
        if key not in self.zero:
            draws = iter(range(len(tensors)))
            generator = torch.Generator().manual_seed(0)

            def stand_in(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                values = torch.randn(16, generator=generator, dtype=torch.float64) * 3
                values = values if pattern >> next(draws) & 1 else torch.zeros_like(values)
                return (values > 0 if leaf.dtype == torch.bool else values).to(leaf.dtype)

            try:
                new_args, new_kwargs = pytree.tree_map(stand_in, (args, kwargs))
                self.zero[key] = not func(*new_args, **new_kwargs).any()
            except Exception:  # an operator that dislikes the stand-ins counts as not keeping zero
                self.zero[key] = False
        return self.zero[key]

    def _reduce(self, func, name, args, kwargs, out) -> None:
        codes = self._of(args[0])
        if codes is None:
            return
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if name == "linalg_vector_norm":
            dims = args[2] if len(args) > 2 else kwargs.get("dim")
        if isinstance(dims, Tensor):
            return self._pointwise(func, name, args, kwargs, out)  # max and min of two tensors
        dims = list(range(codes.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = [d % codes.ndim for d in dims]
        result = out if isinstance(out, Tensor) else out[0]
        if any(_varies(codes, d) for d in dims):
            if name != "sum" or isinstance(out, (tuple, list)):
                return self._unknown(func, name, args, kwargs, out)
            # Summands of one sum: as in an addition, they stay or go together.
            small = _narrow(codes)
            label = (small >> 1).amax(dims, keepdim=True)
            self._tie_positions(small >> 1, label)
            codes = ((label << 1) | (small & 1).amax(dims, keepdim=True)).expand_as(codes)
        at = tuple(slice(0, 1) if d in dims else slice(None) for d in range(codes.ndim))
        reduced = codes[at]
        self._set(result, reduced if result.ndim == codes.ndim else reduced.squeeze(dims))
        for extra in () if isinstance(out, Tensor) else out[1:]:
            self._set(extra, _mark(self.codes[result]))

    def _spatial(self, func, name, args, kwargs, out) -> None:
        """Pooling, resizing and padding over the last dimensions; a channel of zeros stays zero."""
        codes = self._of(args[0])
        if codes is None:
            return
        space = range(codes.ndim - _spatial(name), codes.ndim)
        if any(_varies(codes, d) for d in space):
            return self._unknown(func, name, args, kwargs, out)
        at = tuple(slice(0, 1) if d in space else slice(None) for d in range(codes.ndim))
        for position, result in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
            self._set(result, (codes[at] | int(position > 0)).expand(result.shape))

    def _unknown(self, func, name, args, kwargs, out) -> None:
        """Freeze every channel that enters, and keep every parameter whole."""
        for tensor in pytree.tree_leaves((args, kwargs)):
            if not isinstance(tensor, Tensor):
                continue
            if (view := self.views.get(tensor)) is not None:
                self.fixed.add(view[0])
            if (parameter := self.names.get(tensor)) is not None:
                self.fixed.add(parameter)
            if (codes := self.codes.get(tensor)) is not None:
                self.freeze(_labels(codes), name, self.here)
                if func._schema.is_mutable and tensor._is_view():
                    self.freeze(_labels(codes))
        if self.counting and func._overloadpacket in flop_registry:
            # Products of activations, as in attention: their size does not change, so they are a fixed cost.
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.constant_macs += flops // 2 / self.batch

    # From labels to units

    def channels(self, ignored: set[str], example: tuple[tuple, dict]) -> Channels:
        """Return the units found so far."""
        self._merge()
        produced = self._mask(self.producers)
        outputs = self._mask(self.outputs)
        frozen = self._mask(self.frozen)
        for name in self.fixed:
            for (owner, _), labels in self.dims.items():
                if owner == name:
                    frozen[self.component[labels]] = True
        read = torch.zeros_like(frozen)
        for parameter, (_, out_dim) in self.layers.items():
            if (parameter, 1 - out_dim) in self.dims:
                read[self.component[self.dims[parameter, 1 - out_dim]]] = True
        slots = self._entry_slots(frozen)
        # Channels that only leave the model, such as a classifier's, are fixed and no units.
        is_unit = produced & ~(outputs & ~read)
        is_unit[self.component[0]] = False
        self.unit = torch.where(is_unit, is_unit.cumsum(0) - 1, -1)
        frozen = (frozen | outputs)[is_unit]
        for (name, dim), labels in self.dims.items():
            rank = self._tensor(name).ndim
            slots.setdefault(name, [None] * rank)[dim] = labels
        slots = {
            name: tuple(None if labels is None else self.units_of(labels) for labels in dims)
            for name, dims in slots.items()
        }
        slots = {n: d for n, d in slots.items() if any(u is not None and (u >= 0).any() for u in d)}
        builder = CostBuilder(len(frozen))
        for scale, inputs, outputs in self.calls:
            sides = [None if labels is None else self.units_of(labels) for labels in (inputs, outputs)]
            builder.add("macs", scale, *sides)
        builder.add("macs", self.constant_macs)
        for name, parameter in self.model.named_parameters():
            dims = slots.get(name, (None,) * parameter.ndim)
            sides = [units for units in dims if units is not None]
            fixed = math.prod(s for s, units in zip(parameter.shape, dims, strict=True) if units is None)
            builder.add("params", fixed, *sides)
        cost_model = builder.build()
        layers = tuple(
            Layer(module, parameter, self.units_of(self.dims[parameter, dim]))
            for parameter, (module, dim) in self.layers.items()
        )
        kept = [layer.out_units for layer in layers if layer.name in ignored]
        kept += [self.units_of(s.units) for s in self.gated.values() if s.weight.rpartition(".")[0] in ignored]
        prunable = ~frozen & ~_sole(cost_model)
        for units in kept:
            prunable[units[units >= 0]] = False
        return Channels(
            units=len(frozen),
            families=_families(cost_model, slots, layers),
            frozen=frozen,
            prunable=prunable,
            unknown=self._unknown_operators(is_unit),
            slots=slots,
            layers=layers,
            sites=self._sites(),
            paddings=tuple(
                Padding(name, position, self.units_of(front), self.units_of(back))
                for name, (position, front, back) in self.pads.items()
            ),
            shapes=tensor_shapes(self.model),
            cost_model=cost_model,
            example=example,
        )

    def units_of(self, labels: Tensor) -> Tensor:
        """Return the unit of each label, -1 for none."""
        return self.unit[self.component[labels]]

    def labels_of(self, units: Tensor) -> Tensor:
        """Return every label of these units."""
        return torch.isin(self.units_of(torch.arange(self.labels)), units).nonzero().flatten()

    def _merge(self) -> None:
        ties = torch.cat(self.ties) if self.ties else torch.zeros((0, 2), dtype=torch.int64)
        a, b = ties.T.numpy()
        graph = coo_array((torch.ones(len(ties)).numpy(), (a, b)), shape=(self.labels, self.labels))
        _, component = connected_components(graph, directed=False)
        self.component = torch.from_numpy(component).long()

    def _mask(self, labels: Sequence[Tensor]) -> Tensor:
        mask = torch.zeros(int(self.component.max()) + 1, dtype=torch.bool)
        if labels:
            mask[self.component[torch.cat([each.reshape(-1) for each in labels])]] = True
        mask[self.component[0]] = False
        return mask

    def _entry_slots(self, frozen: Tensor) -> dict[str, list[Tensor | None]]:
        """Slots of parameters that were used element by element, where one dimension carries all labels."""
        slots: dict[str, list[Tensor | None]] = {}
        for name, labels in self.entries.items():
            components = self.component[labels]
            dims = [d for d in range(labels.ndim) if (components != components.narrow(d, 0, 1)).any()]
            if len(dims) > 1 or name in self.fixed or any(owner == name for owner, _ in self.dims):
                frozen[components.reshape(-1)] = True
                for (owner, _), others in self.dims.items():
                    if owner == name:
                        frozen[self.component[others]] = True
                continue
            dim = dims[0] if dims else max(range(labels.ndim), key=lambda d: labels.shape[d])
            at = [0] * labels.ndim
            at[dim] = slice(None)
            slots[name] = [labels[tuple(at)] if d == dim else None for d in range(labels.ndim)]
        return slots

    def _tensor(self, name: str) -> Tensor:
        module, _, key = name.rpartition(".")
        return getattr(self.model.get_submodule(module), key)

    def _sites(self) -> tuple[GateSite, ...]:
        sites = [dataclasses.replace(site, units=self.units_of(site.units)) for site in self.gated.values()]
        for weight, (bias, dim) in self.raw.items():
            sites.append(GateSite(weight, bias, self.units_of(self.dims[weight, dim]), dim))
        return tuple(site for site in sites if (site.units >= 0).any())

    def _unknown_operators(self, is_unit: Tensor) -> tuple[tuple[str, str], ...]:
        found = {}
        for operator, module, labels in self.blame:
            if is_unit[self.component[labels]].any():
                found[operator, module] = None
        return tuple(found)


# Codes and shapes


def _varies(codes: Tensor, dim: int) -> bool:
    return codes.shape[dim] > 1 and codes.stride(dim) != 0


def _compact(codes: Tensor) -> Tensor:
    """Return equal codes with stride 0 along every dimension in which they do not vary."""
    small = codes
    for dim in range(codes.ndim):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if small.stride(dim) == 0 or bool((small == first).all()):
                small = first
    return small.expand(codes.shape)


def _narrow(codes: Tensor) -> Tensor:
    """Return one slice of the codes along every dimension in which they do not vary."""
    return codes[tuple(slice(None) if _varies(codes, d) else slice(0, 1) for d in range(codes.ndim))]


def _mark(codes: Tensor, unsafe: int = 1) -> Tensor:
    """Return the codes, marked as possibly not zero."""
    return (_narrow(codes) | unsafe).expand(codes.shape) if unsafe else codes


def _labels(codes: Tensor) -> Tensor:
    """Return the labels, narrowed."""
    return _narrow(codes) >> 1


def _shape_codes(labels: Tensor, out: Tensor, dim: int, unsafe: int = 0) -> Tensor:
    shape = [1] * out.ndim
    shape[dim] = -1
    return ((labels << 1) | unsafe).view(shape).expand(out.shape)


def _spatial(name: str) -> int:
    """Return over how many last dimensions an operator works position by position within channels, or 0."""
    if name.startswith(
        (
            "max_pool",
            "avg_pool",
            "_adaptive_avg_pool",
            "adaptive_",
            "upsample",
            "_upsample",
            "reflection_pad",
            "replication_pad",
        )
    ):
        return next((n for n in (1, 2, 3) if f"{n}d" in name), 0)
    return 0


def _view_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of a view come from which, as the finest groups of equal size; ones are left out."""
    ins = [d for d, size in enumerate(before) if size != 1]
    outs = [d for d, size in enumerate(after) if size != 1]
    groups = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        a, b = [ins[i]], [outs[j]]
        size_a, size_b = before[ins[i]], after[outs[j]]
        i, j = i + 1, j + 1
        while size_a != size_b:
            if size_a < size_b:
                a.append(ins[i])
                size_a *= before[ins[i]]
                i += 1
            else:
                b.append(outs[j])
                size_b *= after[outs[j]]
                j += 1
        groups.append((a, b))
    return groups


# Units


def _sole(model) -> Tensor:
    """Return the units that are all that some channel count consists of, bool ``[units]``."""
    totals = model.counts(torch.ones(model.units))
    sole = torch.zeros(model.units, dtype=torch.bool)
    sole[model.columns[model.times >= totals[model.rows]]] = True
    return sole


def _families(model, slots, layers: Sequence[Layer]) -> tuple[Family, ...]:
    """Group units that stand in the same channel counts equally often (by two random sums over the counts)."""
    if not model.units:
        return ()
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(1 << 24, (len(model.fixed), 2), generator=generator, dtype=torch.int64).double()
    sums = torch.zeros(model.units, 2, dtype=torch.float64)
    sums.index_add_(0, model.columns, model.times[:, None] * keys[model.rows])
    _, family = sums.unique(dim=0, return_inverse=True)
    first = torch.full((int(family.max()) + 1,), model.units).scatter_reduce(
        0, family, torch.arange(model.units), "amin"
    )
    members: dict[int, dict[str, None]] = {}
    for layer in layers:
        for units in slots.get(layer.weight, ()):
            if units is not None:
                for index in family[units[units >= 0]].unique().tolist():
                    members.setdefault(index, {})[layer.name] = None
    order = first.argsort().tolist()
    by_family = family.argsort(stable=True).split(family.bincount().tolist())
    return tuple(Family(by_family[i], tuple(members.get(i, ()))) for i in order)


# The model, before and after


@contextlib.contextmanager
def _left_as_found(model: nn.Module):
    """Restore modes, buffers and random state; keep attention on the path that training takes."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _two_samples(model: nn.Module, example: Any) -> tuple[tuple, dict]:
    args, kwargs = ((), dict(example)) if isinstance(example, dict) else (example, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors or any(x.ndim == 0 or not x.shape[0] for x in tensors[:1]):
        raise ValueError(
            f"example_input must be a tensor with the batch in dimension 0, a tuple of positional inputs or a dict of keyword "
            f"inputs; got {type(example).__name__}. For images: torch.randn(2, 3, 224, 224)."
        )
    devices = {p.device for p in model.parameters()} | {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"model and example input are on different devices: {sorted(map(str, devices))}; move both to one, for example "
            f"example_input.to(next(model.parameters()).device)."
        )
    batch = tensors[0].shape[0]

    def take(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] != batch:
            return x
        # Batch norm in train mode wants two values a channel.
        return (x.repeat(2, *[1] * (x.ndim - 1)) if batch == 1 else x[:2]).detach().clone()

    return to_model(pytree.tree_map(take, (args, kwargs)), model)


def _matching_modules(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    matched = set()
    for pattern in patterns:
        found = {n for n in names if fnmatch.fnmatchcase(n, pattern)}
        found |= {n for n in names for parent in found if n.startswith(f"{parent}.")}
        if not found:
            raise ValueError(f"ignore={pattern!r} matches no module; names look like {names[:6]}.")
        matched |= found
    return matched


def _tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, whatever container holds them."""
    found, seen = [], set()
    queue = [output]
    while queue:
        item = queue.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif id(item) not in seen and not isinstance(item, (str, bytes, int, float, nn.Module, type(None))):
            seen.add(id(item))
            if isinstance(item, dict):
                queue += item.values()
            elif isinstance(item, (list, tuple, set)):
                queue += item
            queue += vars(item).values() if hasattr(item, "__dict__") else ()
    return found
