"""Where a file is, and writing it so that whoever finds it finds all of it."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn


def expanded(path: str | os.PathLike) -> Path:
    """Return ``path`` with a ``~`` at its start as the home folder.

    Raises:
        TypeError: if it is no path; where it is a network, the arguments may have changed places.
    """
    if not isinstance(path, str | os.PathLike):
        swapped = " A network comes first, where there is one, then the path." if isinstance(path, nn.Module) else ""
        raise TypeError(f"{type(path).__name__} given as a path; it must be text or a pathlib.Path.{swapped}")
    return Path(path).expanduser()


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path`` that nobody else writes to; at the end it takes the place of ``path``.

    If anything is raised it is gone, and ``path`` is as it was. Only where the process is killed does it stay, as
    ``.NAME.<8 hexadecimal digits>.part``. The folder is made. A link stays one, and what it leads to is written.

    Raises:
        OSError: at once, if there is a folder at ``path``, or no file can be made there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it.")
    path = path.resolve() if path.is_symlink() else path
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
    except OSError as error:
        raise type(error)(error.errno, f"{path} cannot be written ({error.strerror}); give another place") from error
    try:
        yield part
        part.chmod(mode)  # libraries that put a file of their own there may let nobody else read it
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_hashed(value: Any, file: BinaryIO, kind: str) -> None:
    """Write what torch.save makes of ``value`` to an empty file, behind :func:`first_line` of that kind."""
    file.write(first_line(kind))
    body = _Hashing(file)
    torch.save(value, body)
    file.seek(0)
    file.write(first_line(kind, body.hash.hexdigest()))


def first_line(kind: str, digest: str = "") -> bytes:
    """Return the line that says what a file is and the SHA-256, in hexadecimal digits, of what follows."""
    return f"{kind} sha256 {digest:0>64}\n".encode()


class _Hashing:
    """A file to write to, and the SHA-256 of all that went there (``hash``)."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write, and hash."""
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()
