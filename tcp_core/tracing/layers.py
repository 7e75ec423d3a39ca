"""Rules for layers: they read labels at their input and hand out labels at their output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call, Gate
from .codes import along, labels_in, varies
from .counting import recurrent_macs
from .identities import Identities, ModuleRule


def convolution(ids: Identities, call: Call) -> None:
    """Read dimension 1, write dimension 1; grouped: whole groups are tied, input and output together."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    name = ids.names.get(weight)
    if name not in ids.parameters:
        return _without_weight(ids, call, weight)
    inputs = _inputs(ids, ids.channelwise(x, 1, call.name), call.name)
    out_dim = 1 if transposed else 0
    positions = math.prod((x if transposed else call.out).shape[2:]) * x.shape[0]
    scale = positions * math.prod(weight.shape[2:])
    if groups == 1:
        ids.register(name, 1 - out_dim, inputs)
        outputs = _outputs(ids, name, out_dim, weight)
        _count(ids, scale, inputs, outputs)
    else:
        if transposed:  # the weight's dimension 1 is that of one group's outputs, and stays
            ids.register(name, 0, inputs)
            outputs = _outputs_beside(ids, name, weight.shape[1] * groups)
        else:
            outputs = _outputs(ids, name, out_dim, weight)
        if not isinstance(ids.module, nn.modules.conv._ConvNd) or ids.module._parameters.get("weight") is not weight:
            # The number of groups is written in the call, so it cannot follow.
            ids.freeze(torch.cat([inputs, outputs]), call.name)
        _tie_groups(
            ids, torch.cat([inputs.view(groups, -1), outputs.view(groups, -1)], 1), f"convolution of {groups} groups"
        )
        _count(ids, scale * x.shape[1] // groups, None, outputs)
    _finish(ids, name, out_dim, outputs, bias, call.out, 1, follows=groups > 1)


def linear(ids: Identities, call: Call) -> None:
    """Read and write the last dimension of addmm, mm and linear."""
    if call.name == "addmm":
        bias, x, weight = call.args[:3]
    else:
        x, weight, bias = *call.args[:2], call.argument(2, "bias")
    name, transposed = ids.transposed.get(weight, (ids.names.get(weight), call.name == "linear"))
    if name not in ids.parameters:
        return _without_weight(ids, call, weight)
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return ids.unknown(call)
    out_dim = 0 if transposed else 1
    codes = ids.of(x)
    if codes is not None and any(varies(codes, dim) for dim in range(codes.ndim - 1)):
        ids.freeze(labels_in(codes), call.name)  # channels among the rows
    inputs = _inputs(ids, ids.channelwise(x, x.ndim - 1, call.name), call.name)
    ids.register(name, 1 - out_dim, inputs)
    outputs = _outputs(ids, name, out_dim, ids.parameters[name])
    _count(ids, call.out.numel() // call.out.shape[-1], inputs, outputs)
    _finish(ids, name, out_dim, outputs, bias, call.out, call.out.ndim - 1)


def _without_weight(ids: Identities, call: Call, weight: Tensor) -> None:
    """Freeze what enters a product with something that is no parameter: a buffer, or what is computed."""
    module = ids.module
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or module not in ids.modules:
        return ids.unknown(call)
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    what = "weight that is stored in a buffer" if weight in ids.names else "weight that is computed"
    ids.weightless.setdefault(ids.here, (what, outputs, len(ids.layers)))
    ids.unknown(call, "weight", what)


def batch_norm(ids: Identities, call: Call) -> None:
    """Pass labels on; a gate on weight and bias makes a closed channel zero whatever came in."""
    x, result = call.args[0], call.outputs[0]
    weight, bias = call.args[1:3] if call.args[1] is None or isinstance(call.args[1], Tensor) else (None, None)
    plain_norm = isinstance(ids.module, nn.modules.batchnorm._NormBase) and ids.module in ids.modules
    if ids.of(x) is None and weight is None:
        if plain_norm:
            _constant_gate(ids, torch.zeros(x.shape[1], dtype=torch.int64))
        return
    labels = ids.channelwise(x, 1, call.name) >> 1
    for tensor in call.args[1:]:
        if isinstance(tensor, Tensor):
            if (name := ids.names.get(tensor)) is not None:
                ids.register(name, 0, labels)
            elif (codes := ids.of(tensor)) is not None:
                ids.tie_positions(labels, codes >> 1)  # repeated for each sample, by an instance norm
            else:
                ids.freeze(labels, call.name)
    gated = True
    plain = bias is None or isinstance(bias, nn.Parameter)  # a buffer cannot be gated
    if isinstance(weight, nn.Parameter) and weight in ids.names and plain:
        ids.keep_gate(ids.norms, ids.names[weight], Gate(None if bias is None else ids.names.get(bias), labels))
    elif weight is None and plain_norm:
        gated = _constant_gate(ids, labels)
    elif (
        isinstance(ids.module, nn.modules.instancenorm._InstanceNorm)
        and weight in ids.moved
        and (bias is None or bias in ids.moved)
    ):
        name, of_bias = ids.moved[weight], None if bias is None else ids.moved[bias]
        ids.keep_gate(ids.norms, name, Gate(of_bias, ids.entries[name]))
    else:
        gated = False  # running statistics may then move zero
    if not gated:
        ids.consume(x)
    ids.set(result, along(labels, result, 1, unsafe=int(not gated)))


def _constant_gate(ids: Identities, labels: Tensor) -> bool:
    """Put a gate in the place of the weight that a norm does not have; return whether that is possible: such a norm may
    be called on what has other channels, or another number of them, for it has nothing of their size.
    """
    prefix = f"{ids.here}." if ids.here else ""
    place, size = f"{prefix}weight", ids.module.num_features
    rows = labels.view(-1, size) if len(labels) % size == 0 else None  # an instance norm's repeat for each sample
    known = ids.norms.pop(place, None)
    if place in ids.ungated or rows is None or (rows != rows[0]).any():
        ids.ungated.add(place)
        if known is not None:
            ids.freeze(known.labels, "norm of several widths")
        return False
    if known is not None:
        ids.tie_positions(known.labels, rows[0])
    ids.norms[place] = Gate(f"{prefix}bias", rows[0], constant=True)
    return True


FROZEN_NORM = ("weight", "bias", "running_mean", "running_var")


def is_frozen_norm(module: nn.Module) -> bool:
    """Say whether a module is the batch norm of detectors (torchvision's, detectron2's), which has buffers only."""
    if not type(module).__name__.startswith("FrozenBatchNorm"):
        return False
    buffers = [module._buffers.get(name) for name in FROZEN_NORM]
    plain = all(isinstance(buffer, Tensor) and buffer.ndim == 1 for buffer in buffers)
    return plain and not any(True for _ in module.parameters())


def frozen_norm(ids: Identities, args: tuple, outputs: list[Tensor]) -> None:
    """Give the channels that came in to all that has as many: with gates on its scale and shift, a norm of buffers is
    zero where a channel is closed, which the operators that it consists of do not tell.
    """
    labels = ids.channelwise(args[0], 1, "frozen batch norm") >> 1
    prefix = f"{ids.here}." if ids.here else ""
    for name in FROZEN_NORM:
        ids.register(prefix + name, 0, labels)
    ids.norms[f"{prefix}weight"] = Gate(f"{prefix}bias", labels)
    for tensor in outputs:
        dim = 1 if tensor.ndim > 1 else 0
        if tensor.ndim and tensor.shape[dim] == len(labels):
            ids.set(tensor, along(labels, tensor, dim))


RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""Recurrent layers as functions."""


def recurrent(ids: Identities, name: str, args: tuple, kwargs: dict) -> ModuleRule:
    """Freeze what enters a recurrent layer, and count it, at once: most run as some twenty operators a step."""
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            ids.keep(tensor, name)
            ids.consume(tensor)
    if ids.counting:
        ids.constant_macs += recurrent_macs(args[0], [arg for arg in args if isinstance(arg, (list, tuple))][-1])
    return lambda ids, args, outputs: None


def group_norm(ids: Identities, call: Call) -> None:
    """Tie the channels of each group and pass labels on: a group is normalised by itself, so whole groups can go."""
    x, weight, bias = call.args[:3]
    groups = call.args[6]
    # A number of groups that is written in a call, or in a module without tensors of that size, cannot follow.
    own = ids.module._parameters if isinstance(ids.module, nn.GroupNorm) and ids.module in ids.modules else {}
    if groups == 1 or weight is None or own.get("weight") is not weight or own.get("bias") is not bias:
        ids.consume(x)
        return ids.unknown(call)
    labels = ids.channelwise(x, 1, call.name) >> 1
    _tie_groups(ids, labels.view(groups, -1), f"norm of {groups} groups")
    names = [None if tensor is None else ids.names[tensor] for tensor in (weight, bias)]
    for name in filter(None, names):
        ids.register(name, 0, labels)
    ids.keep_gate(ids.norms, names[0], Gate(names[1], labels))
    ids.set(call.outputs[0], along(labels, call.outputs[0], 1))
    for statistics in call.outputs[1:]:  # one number a group
        ids.set(statistics, along(labels[:: x.shape[1] // groups], statistics, 1, unsafe=1))


def _tie_groups(ids: Identities, labels: Tensor, operator: str) -> None:
    """Let the channels of each group, int64 ``[groups, channels]``, stay or go together."""
    ids.tie(labels, labels.amax(1, keepdim=True), operator)
    ids.freeze(labels[(labels == 0).any(1)], kind="tied")


def _inputs(ids: Identities, codes: Tensor, operator: str) -> Tensor:
    lifted = (codes >> 1)[(codes & 1) == 1]
    ids.freeze(lifted, operator, kind="lifted")  # a closed channel that is not zero would be missed
    return codes >> 1


def _outputs(ids: Identities, name: str, dim: int, weight: Tensor) -> Tensor:
    """Return the labels along a weight's output dimension, the same at every use of the weight."""
    size = weight.shape[dim]
    labels = ids.dims.get((name, dim))
    if labels is None:
        labels = ids.dims[name, dim] = ids.fresh(size)
    elif (labels == 0).any():  # also used where some of its channels are fixed
        ids.freeze(labels, name, "", kind="fixed")
        labels = torch.where(labels == 0, ids.fresh(size), labels)
        ids.freeze(labels, name, "", kind="fixed")
    ids.producers.append(labels)
    return labels


def _outputs_beside(ids: Identities, name: str, size: int) -> Tensor:
    """Return the labels of the outputs of a weight that has no dimension for them, the same at every use of it."""
    if name not in ids.outputs_beside:
        ids.outputs_beside[name] = ids.fresh(size)
    ids.producers.append(ids.outputs_beside[name])
    return ids.outputs_beside[name]


def _finish(
    ids: Identities,
    name: str,
    out_dim: int,
    outputs: Tensor,
    bias: Tensor | None,
    out: Tensor,
    dim: int,
    follows: bool = False,
) -> None:
    """Give a layer's output its codes, and say what it needs. ``follows``: it is zero but for the bias where a channel
    is closed, for its inputs are of the same unit; a second gate on the same path would only make the unit seem worth
    more than it is.
    """
    ids.layers.setdefault(name, out_dim)
    bias_name = None if bias is None else ids.names.get(bias)
    if bias_name is not None:
        ids.register(bias_name, 0, outputs)
    elif bias is not None:
        ids.freeze(outputs, "bias that is computed")  # computed, so it can neither be gated nor cut
    ids.set(out, along(outputs, out, dim))
    if not follows:
        ids.need(out, name, out_dim, Gate(bias_name, outputs))
    elif bias_name in ids.parameters:
        ids.need(out, bias_name)


def _count(ids: Identities, scale: float, inputs: Tensor | None, outputs: Tensor) -> None:
    if ids.counting:
        ids.calls.append((scale, inputs, outputs))
