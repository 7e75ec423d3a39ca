"""Tailored channel pruning: one training run that ends in a smaller network of exactly the budget.

Three lines in a training loop (`Tailor`), one call without one (`fit`), or the parts: `trace`, `Channels.cost`,
`close`, `remove`, `save`, `load`.
"""

from .channels import Channels
from .controller import Controller
from .cost import Budget, BudgetError
from .gates import close
from .removal import RemovalError, remove
from .storage import FileError, load, save
from .tailor import Report, Tailor
from .tracing import trace
from .training.fit import FitResult, evaluate, fit

__all__ = [
    "Budget",
    "BudgetError",
    "Channels",
    "Controller",
    "FileError",
    "FitResult",
    "RemovalError",
    "Report",
    "Tailor",
    "close",
    "evaluate",
    "fit",
    "load",
    "remove",
    "save",
    "trace",
]
