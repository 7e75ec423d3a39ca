"""Checkpoints of a training run: one file each, whole or not there, the last two kept; nothing in them is executed.

A file is written beside its place, flushed to disk and then renamed, so a run that is killed, or a disk that is full,
leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

KEPT = 2
"""How many checkpoints stay: should the newest be damaged, there is one before it."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that belongs to another run."""


def prepare(folder: str | Path) -> None:
    """Make ``folder``, and raise CheckpointError if files cannot be written to it, before anything is trained."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part") as probe:
            probe.write(b"1")
    except OSError as error:
        raise CheckpointError(
            f"no checkpoints can be written to {folder} ({error}). Choose another folder, or give leave to write there."
        ) from error


def write(folder: str | Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` (tensors, numbers, text, and dicts and lists of these) as the checkpoint of ``step``.

    ``folder`` is one that :func:`prepare` has made. Raises CheckpointError if it cannot be written to or the disk is
    full; older checkpoints are untouched.
    """
    folder = Path(folder)
    path = folder / f"{step:09d}.ckpt"
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        for old in _found(folder)[:-KEPT]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        left = ", ".join(old.name for old in _found(folder)) or "none"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}). Free space there or choose "
            f"another folder, and run again: it goes on from the last good checkpoint ({left})."
        ) from error
    return path


def newest(folder: str | Path) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint that can be read, None if there is none.

    Only tensors and plain values are read (``weights_only``). A damaged file is named in a warning and passed over.
    """
    for path in reversed(_found(Path(folder))):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
            warnings.warn(f"{path} is damaged ({error}); the checkpoint before it is taken.", stacklevel=2)
    return None


def remove(folder: str | Path) -> None:
    """Delete all checkpoints in ``folder``, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in (*_found(folder), *folder.glob("*.part")):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))
