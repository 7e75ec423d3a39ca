"""Parameters that no traced call reaches: what they may take in another call must keep its size."""

from __future__ import annotations

import math

from torch import nn

from .codes import labels_in, varies
from .identities import Identities


def freeze_for_unreached(ids: Identities, unused: set[nn.Module]) -> tuple[str, ...]:
    """Return the names of parameters that no run reached, but for those of ``unused`` modules; freeze what they could
    meet in a branch that the examples do not take.

    What a branch does is not known, so sizes decide: every activation that has one of the sizes of such a layer along
    its channels, or from there on if flattened, keeps its channels.

    Raises:
        ValueError: if a layer takes a number of channels that nothing in the network has: it could be made of any.
    """
    left = {id(p) for module in unused for p in module.parameters(recurse=False)} | ids.reached
    named = {name: p for name, p in ids.model.named_parameters() if id(p) not in left and p.numel()}
    taken: dict[int, str] = {}
    given: set[int] = set()
    for name, parameter in named.items():
        module = ids.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.modules.conv._ConvNd):
            taken.setdefault(module.in_channels, name)
            given.add(module.out_channels)
        elif isinstance(module, nn.Linear):
            taken.setdefault(module.in_features, name)
            given.add(module.out_features)
        else:
            given.update(parameter.shape)
    there = {size for shape in ids.shapes for d in range(len(shape)) for size in (shape[d], math.prod(shape[d:]))}
    for size, name in taken.items():
        if size not in there | given:
            raise ValueError(
                f"parameter {name!r} is reached by no traced call, in train or eval mode, and takes {size} channels, "
                f"which nothing in the network has: it cannot be told what it would be fed. If another call reaches "
                f"it, trace that too: also=[inputs of that call]. If nothing uses it: "
                f"unused=[{name.rpartition('.')[0]!r}]."
            )
    sizes = (taken.keys() | given) - {1}
    if sizes:
        for codes in ids.seen:
            for dim in range(codes.ndim):
                if varies(codes, dim) and {codes.shape[dim], math.prod(codes.shape[dim:])} & sizes:
                    ids.freeze(labels_in(codes), _few(list(named)), "", "unreached")
    return tuple(named)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
