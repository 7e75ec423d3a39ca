"""Where a tailored network runs: files for other runtimes, their speed, eight-bit integers. No part of the core."""

from .exporting import ExportError, export

__all__ = ["ExportError", "export"]
