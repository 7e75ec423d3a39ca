"""What rules are given and what they leave behind: one operator that ran, and where a gate acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class Call(NamedTuple):
    """One operator that ran."""

    func: Any
    name: str
    args: tuple
    kwargs: dict
    out: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument, wherever it was given."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """Every tensor among the results."""
        return [leaf for leaf in pytree.tree_leaves(self.out) if isinstance(leaf, Tensor)]

    @property
    def written(self) -> list[Tensor]:
        """Every tensor among the arguments that the operator writes to."""
        schema, found = self.func._schema.arguments, []
        for position, each in enumerate(schema):
            if each.alias_info is not None and each.alias_info.is_write:
                found += pytree.tree_leaves(self.argument(position, each.name))
        return [leaf for leaf in found if isinstance(leaf, Tensor)]


@dataclass
class Gate:
    """Where a gate acts, in labels: a batch norm's weight, or a layer's along its output dimension."""

    bias: str | None
    labels: Tensor
    constant: bool = False


def handing_on(rule: Callable) -> Callable:
    """Mark a rule whose operators leave it to what reads their result whether it must be zero where channels are
    closed, and so what they are given.
    """
    rule.hands_on = True
    return rule
