"""Batch norms folded into the convolution or linear layer before them, in the graph that torch.export makes."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fusion

ATEN = torch.ops.aten
LAYERS = (
    *(ATEN.conv1d.default, ATEN.conv2d.default, ATEN.conv3d.default, ATEN.conv1d.padding, ATEN.conv2d.padding),
    *(ATEN.conv3d.padding, ATEN.conv_transpose1d.default, ATEN.conv_transpose2d.input, ATEN.conv_transpose3d.input),
    ATEN.linear.default,
)
GROUPS = 6  # where the number of groups stands among the arguments: of a convolution, then of a transposed one
NOTHING_IN_EVAL = (ATEN.dropout.default, ATEN.feature_dropout.default, ATEN.alpha_dropout.default)


def folded(program: torch.export.ExportedProgram) -> tuple[fx.GraphModule, list[str]]:
    """Return the program's module with batch norms folded, and the names of those that could not be.

    A batch norm is folded where a convolution or linear layer feeds nothing else. What stays is what follows another
    operator (before an activation's convolution, after a concatenation) or normalises with the batch's own statistics.
    The program and its tensors are untouched.
    """
    module = program.module()  # a graph of its own; the tensors are the program's, and are replaced, not written to
    _drop_dropout(module.graph)
    left = []
    for norm in [node for node in module.graph.nodes if node.target is ATEN.batch_norm.default]:
        if not _fold(module, norm):
            left.append(norm.args[3].target.rpartition(".")[0] if isinstance(norm.args[3], fx.Node) else norm.name)
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
        module.graph.erase_node(node)  # made again when the module is exported
    module.graph.eliminate_dead_code()
    _forget_unused(module)
    module.recompile()
    return module, left


def _drop_dropout(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in NOTHING_IN_EVAL and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _fold(module: fx.GraphModule, norm: fx.Node) -> bool:
    """Fold one batch norm into the layer before it; say whether that could be."""
    layer, scale, shift, mean, variance, training, _, epsilon, _ = norm.args
    if training or layer.target not in LAYERS or len(layer.users) > 1 or layer.kwargs or norm.kwargs:
        return False
    own = [*layer.args[1:3], *([None] if len(layer.args) == 2 else [])]  # its weight and bias
    if any(node is not None and node.op != "get_attr" for node in (*own, scale, shift, mean, variance)):
        return False  # computed anew in each pass, or no running statistics
    transposed = "transpose" in str(layer.target)
    if transposed and len(layer.args) > GROUPS and layer.args[GROUPS] > 1:
        return False
    weight, bias, scale, shift, mean, variance = (
        None if node is None else _value(module, node.target) for node in (*own, scale, shift, mean, variance)
    )
    if layer.target is ATEN.linear.default:
        if norm.meta["val"].ndim != 2:
            return False  # its channels are dimension 1, the layer's outputs the last
        scale = torch.ones_like(mean) if scale is None else scale
        shift = torch.zeros_like(mean) if shift is None else shift
        new = fusion.fuse_linear_bn_weights(weight, bias, mean, variance, epsilon, scale, shift)
    else:
        new = fusion.fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, scale, shift, transpose=transposed)
    with module.graph.inserting_before(layer):
        nodes = [_attribute(module, layer, position, value) for position, value in enumerate(new, 1)]
    layer.args = (layer.args[0], *nodes, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return True


def _value(module: nn.Module, target: str) -> Tensor:
    place, _, name = target.rpartition(".")
    return getattr(module.get_submodule(place), name)


def _attribute(module: fx.GraphModule, layer: fx.Node, position: int, value: Tensor) -> fx.Node:
    """Return a node that reads ``value`` in the place of the layer's weight (1) or bias (2).

    It goes by the old name, unless something else reads that too.
    """
    old, kind = (layer.args[position] if position < len(layer.args) else None), ("weight", "bias")[position - 1]
    place, _, _ = layer.args[1].target.rpartition(".")
    owner = module.get_submodule(place)
    if old is not None and len(old.users) == 1:
        place, _, name = old.target.rpartition(".")
        owner = module.get_submodule(place)
    elif old is None and getattr(owner, kind, None) is None:
        name = kind
    else:
        name = f"{kind}_{layer.name}"
    setattr(owner, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    return module.graph.get_attr(f"{place}.{name}" if place else name)


def _forget_unused(module: fx.GraphModule) -> None:
    """Delete parameters and buffers that no node reads; else they would be written with the rest."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in names:
        if name not in read:
            place, _, own = name.rpartition(".")
            delattr(module.get_submodule(place), own)
