"""What the numbers of this machine depend on: its processor by name, and the kernels that torch has for it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: str | torch.device) -> str:
    """Return the name of a device: of a CPU its model and the vector instructions torch uses, of a GPU its model.

    Virtual machines give CPUs of many generations one name ("AMD EPYC"), and kernels differ by a factor of ten.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name" and value.strip()), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def has_bf16_kernels(device: str | torch.device) -> bool:
    """Return whether torch computes convolutions in bfloat16 on ``device`` by kernels of its own for it.

    Without AVX-512 (or Arm's bf16 instructions) a CPU goes through a reference loop, ten times slower than float32.
    """
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())
