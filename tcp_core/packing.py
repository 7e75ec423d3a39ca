"""State of any kind as one tensor of bytes."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor


def packed(state: Any) -> Tensor:
    """Return ``state``, of tensors and plain values, as uint8 ``[bytes]`` on the CPU."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def unpacked(state: Tensor) -> Any:
    """Return what :func:`packed` was given, with its tensors on the CPU."""
    return torch.load(io.BytesIO(state.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
