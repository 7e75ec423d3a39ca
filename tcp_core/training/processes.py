"""One run over many processes: torchrun, accelerate launch, or from a notebook.

Every process trains the same network on its own part of each batch. DistributedDataParallel averages the gradients of
the parameters and the Tailor those of the gates, so the controller decides the same everywhere.
"""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gates import plain_class


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join() -> torch.device:
    """Join the processes that torchrun, accelerate launch or :func:`launch` have started, and return this one's device.

    Each process has the GPU of its local rank, or the CPU where there is none. Started alone, it is left alone.
    """
    gpu = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    if not gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def launch(function: Callable[[], Any], processes: int) -> Any:
    """Return what ``function()`` returns in the first of ``processes`` processes, which are forked from this one.

    Made for notebooks, by accelerate's notebook_launcher: ``function`` may be defined in a cell and use all that the
    kernel holds, but nothing may have been put on a GPU before. It calls :func:`join` for its device. What it returns
    comes back on the CPU. With one process it is merely called.

    Raises:
        RuntimeError: if a process fails, with its traceback.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}; it must be at least 1.")
    if processes == 1:
        return function()
    if 0 < torch.cuda.device_count() < processes:
        raise ValueError(
            f"processes={processes}, but there are {torch.cuda.device_count()} GPUs; give at most one each."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # it would show bars that we do not use
        from accelerate import notebook_launcher

    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        try:
            notebook_launcher(_launched, (function, Path(folder)), num_processes=processes, use_port=port)
        except Exception as error:
            faults = sorted(Path(folder).glob("fault-*"))
            texts = [f"in {fault.name[6:]}:\n{fault.read_text(encoding='utf-8')}" for fault in faults] or [str(error)]
            raise RuntimeError(f"a process of {processes} failed, {texts[0]}") from None
        # written by our own fork a moment ago, so it may be any object
        return torch.load(Path(folder) / "result", map_location="cpu", weights_only=False)


def _launched(function: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)  # as torchrun does; a fork cannot use the threads that the kernel had
    join()
    try:
        result = function()
        if rank_and_world()[0] == 0:
            torch.save(result, folder / "result")
        dist.barrier()
    except BaseException:
        (folder / f"fault-process {rank_and_world()[0]}").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()


def summed(values: Tensor) -> Tensor:
    """Return the sum of every process's ``values``."""
    if rank_and_world()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def share(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's tensors: running statistics, say, are of each process's own batches."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def together(network: nn.Module, device: torch.device) -> nn.Module:
    """Return what is called in training: the network, wrapped where there are several processes."""
    if rank_and_world()[1] == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def alone(network: nn.Module) -> AbstractContextManager:
    """Return the context of a backward pass whose gradients stay in this process, to be added to by the next one."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


SYNCHRONISED = ("cuda", "xpu")
"""Devices on which torch's SyncBatchNorm runs."""


def synchronised(model: nn.Module, device: torch.device) -> dict[str, type]:
    """Make the model's batch norms see the batches of all processes, and return their classes by name.

    Parameters and buffers are the same tensors as before. With one process nothing is changed.
    """
    if device.type not in SYNCHRONISED:
        raise ValueError(
            f"sync_batch_norm=True on {device.type}: torch's SyncBatchNorm runs on {' and '.join(SYNCHRONISED)} only. "
            f"Leave it out, or train on GPUs."
        )
    if rank_and_world()[1] == 1:
        return {}
    norms = nn.modules.batchnorm._BatchNorm
    classes = {name: plain_class(module) for name, module in model.named_modules() if isinstance(module, norms)}
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return classes


def plain_batch_norms(model: nn.Module, classes: Mapping[str, type]) -> None:
    """Undo :func:`synchronised`, also in the smaller network; torch has no function for this."""
    for name, kind in classes.items():
        model.get_submodule(name).__class__ = kind  # a SyncBatchNorm differs from them in its forward alone
