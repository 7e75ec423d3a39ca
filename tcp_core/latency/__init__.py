"""Latency as a budget: where it is measured, the table of measurements, and the cost that ranking and filling use.

The core knows none of this: a :class:`Latency` is handed to :class:`tcp_core.Tailor`, which asks it for a cost. How it
works: docs/latency.md.
"""

from .clock import LatencyError
from .place import Latency

__all__ = ["Latency", "LatencyError"]
