"""Checkpoints of a training run: one file each, whole or not there, the last two kept; nothing in them is executed.

A file is written beside its place, flushed to disk and then renamed, so a run that is killed, or a disk that is full,
leaves the checkpoints before it as they were. It starts with a line that has the SHA-256 of what follows: a file in
which a single bit has changed is not read.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import beside, first_line, save_hashed

KEPT = 2
"""How many checkpoints stay: should the newest be damaged, there is one before it."""

FORMAT = 2
"""1 had no hash, and neither the batch size nor the options of the pruning in its recipe."""

KIND = f"tcp_core checkpoint {FORMAT}"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, or that belongs to another run."""


class _Damaged(Exception):
    """Why one file cannot be read."""


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


def names(folder: str | Path) -> set[str]:
    """Return the names of the checkpoints in ``folder``."""
    return {path.name for path in _found(Path(folder))}


def write(folder: str | Path, step: int, state: Mapping[str, Any], known: set[str] | None = None) -> Path:
    """Write ``state`` (see :func:`plain`) as the checkpoint of ``step``, and delete all but the ``KEPT`` last.

    ``folder`` is one that :func:`prepare` has made. Files of later steps are left alone and do not count: a run writes
    in rising order, so they are of a run that went back because they could not be read. ``known`` are the :func:`names`
    that were there when the run began, to which its own are added: any other is of a run beside it.

    Raises:
        CheckpointError: if the folder cannot be written to, the disk is full, the state holds what a checkpoint cannot,
            or another run writes there; older checkpoints are untouched.
    """
    folder, state = Path(folder), plain(state)
    path = folder / f"{step:09d}.ckpt"
    if known is not None and (others := names(folder) - known):
        raise CheckpointError(
            f"another run writes checkpoints to {folder} ({min(others)} is not of this one), and each would delete the "
            f"other's. Give each run a folder of its own."
        )
    try:
        write_file(path, state)
        for old in ([each for each in _found(folder) if _step(each) <= step][:-KEPT], _parts(folder)):
            for each in old:
                each.unlink()
        if known is not None:
            known.add(path.name)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        left = ", ".join(old.name for old in _found(folder)) or "none"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}). Free space there or choose "
            f"another folder, and run again: it goes on from the last good checkpoint ({left})."
        ) from error
    return path


def write_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, which :func:`plain` has made, to one file."""
    with beside(path) as part, part.open("wb") as file:
        save_hashed(state, file, KIND)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def read_file(path: Path) -> dict[str, Any]:
    """Return the state in one file; raise CheckpointError if it cannot be read."""
    try:
        return _read(path)
    except _Damaged as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _parts(folder: Path) -> list[Path]:
    """Return what :func:`tcp_core.files.beside` leaves where a run is killed as it writes a checkpoint."""
    return [path for path in folder.glob(".*.part") if re.fullmatch(r"\.\d+\.ckpt\.[0-9a-f]{8}\.part", path.name)]


def newest(folder: str | Path) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint that can be read, None if ``folder`` has none.

    Only tensors and plain values are read (``weights_only``). A damaged file is named in a warning and passed over; it
    is not deleted.

    Raises:
        CheckpointError: if there are checkpoints and none can be read. Nothing is started anew then and nothing
            deleted: hours of training may be at stake, and the files may be whole elsewhere.
    """
    damaged = []
    for path in reversed(_found(Path(folder))):
        try:
            state = _read(path)
        except _Damaged as error:
            damaged.append(f"{path.name}: {error}")
            continue
        for text in damaged:
            warnings.warn(
                f"a checkpoint in {folder} is damaged and passed over ({text}); {path.name} before it is taken.",
                stacklevel=2,
            )
        return state
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read ({'; '.join(damaged)}). Nothing was started and nothing deleted. "
            f"Put whole copies of them there, or delete them to start anew."
        )
    return None


def remove(folder: str | Path) -> None:
    """Delete all checkpoints in ``folder``, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in (*_found(folder), *_parts(folder)):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def plain(value: Any, place: str = "") -> Any:
    """Return ``value`` in the types that are read again without executing anything.

    These are None, bool, int, float, complex, str, bytes, tensors, and dicts, lists, tuples and sets of them. Numbers
    and arrays of NumPy become Python's and tensors, paths text, and subclasses the class itself.

    Raises:
        CheckpointError: for anything else, with its ``place``.
    """
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    for kinds, kind in (
        ((str, os.PathLike), _text),
        ((int, np.integer), int),
        ((float, np.floating), float),
        ((complex, np.complexfloating), complex),
        ((bytes, bytearray), bytes),
    ):
        if isinstance(value, kinds):
            return kind(value)
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, (torch.dtype, torch.device)):
        return value
    if isinstance(value, Mapping):
        new = {plain(key, place): plain(each, f"{place}.{key}" if place else str(key)) for key, each in value.items()}
        if (versions := getattr(value, "_metadata", None)) is None:  # of the modules in a model's state
            return new
        new = type(torch.nn.Module().state_dict())(new)
        new._metadata = plain(versions)
        return new
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return (set if kind is frozenset else kind)(plain(each, f"{place}[{i}]") for i, each in enumerate(value))
    raise CheckpointError(
        f"{place or 'the state'} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot "
        f"hold; it holds numbers, text, tensors, and dicts and lists of these."
    )


def _text(value: str | os.PathLike) -> str:
    text = str(value) if isinstance(value, str) else os.fspath(value)
    return "".join(text) if isinstance(text, str) else os.fsdecode(text)  # join: no subclass of str


def _read(path: Path) -> dict[str, Any]:
    """Return the state in one file; raise _Damaged if it cannot be read."""
    try:
        with path.open("rb") as file:
            line = file.readline(len(first_line(KIND)))
            said = re.fullmatch(rb"tcp_core checkpoint (\d+) sha256 ([0-9a-f]{64})\n", line)
            if line.startswith(b"PK\3\4") or (said and int(said[1]) != FORMAT):
                raise _Damaged(
                    f"it is of another version of tcp_core, with which the run can be finished (format "
                    f"{int(said[1]) if said else 1}; this one reads {FORMAT})"
                )
            if not said:
                raise _Damaged("it does not start as a checkpoint does")
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != said[2].decode():
                raise _Damaged(f"its SHA-256 is {found[:12]}..., and {said[2][:12].decode()}... was written")
            file.seek(len(line))
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (_Damaged, MemoryError):
        raise
    except Exception as error:  # of the disk, or torch's, which are many
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise _Damaged(f"it holds a {type(state).__name__}")
    return state


def _found(folder: Path) -> list[Path]:
    """Return the checkpoints in order of their steps, the newest last."""
    return sorted((path for path in folder.glob("*.ckpt") if path.stem.isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.stem)


def _sync(folder: Path) -> None:
    """Have a renamed file survive a power cut, before what it replaces is deleted."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
