"""Tailored channel pruning: one training run that ends in a smaller network of exactly the budget.

Three lines in a training loop (`Tailor`), one call without one (`fit`), or the parts: `trace`, `Channels.cost`,
`close`, `remove`, `save`, `load`, and `export` for other runtimes.
"""

from importlib import metadata

from .channels import Channels
from .controller import Controller
from .cost import Budget, BudgetError
from .deploy import ExportError, export
from .gates import close
from .latency import Latency, LatencyError
from .removal import remove
from .report import Report
from .storage import FileError, load, save
from .tailor import Tailor
from .tracing import trace
from .training.evaluation import evaluate
from .training.fit import fit
from .training.ladder import Ladder, ladder
from .training.run import FitResult
from .verification import RemovalError

try:
    __version__ = metadata.version("tcp-core")
except metadata.PackageNotFoundError:  # a clone that is on the path
    __version__ = "unknown"

__all__ = [
    "Budget",
    "BudgetError",
    "Channels",
    "Controller",
    "ExportError",
    "FileError",
    "FitResult",
    "Ladder",
    "Latency",
    "LatencyError",
    "RemovalError",
    "Report",
    "Tailor",
    "__version__",
    "close",
    "evaluate",
    "export",
    "fit",
    "ladder",
    "load",
    "remove",
    "save",
    "trace",
]
