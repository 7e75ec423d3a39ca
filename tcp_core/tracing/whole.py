"""Functions that count as one operator, whatever they consist of."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class WholeFunctions(TorchFunctionMode):
    """While it is active, such functions run under a rule of their own; ``ids`` are the Identities that gather."""

    def __init__(self, ids: Any) -> None:
        super().__init__()
        self.ids = ids

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, ids = kwargs or {}, self.ids
        if ids.within or (rule := ids.rule_of_function(ids, getattr(func, "__name__", ""), args, kwargs)) is None:
            return func(*args, **kwargs)
        before = ids.arguments
        ids.within, ids.arguments = rule, args
        try:
            return func(*args, **kwargs)
        finally:
            ids.within, ids.arguments = None, before
