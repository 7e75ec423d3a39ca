"""A loop of one's own in two processes: DistributedDataParallel goes on when the network becomes smaller."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_in_place import batch, made, run, sgd
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tcp_core import Tailor


def without_norms():
    """Running statistics are each process's own, so norms are in eval mode."""
    model, tailor = made()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model, tailor


def train(rank, kind):
    model, tailor = without_norms()
    options = {"bucket_view": {"gradient_as_bucket_view": True}, "static": {"static_graph": True}}
    wrapped = DistributedDataParallel(tailor, **options.get(kind, {}))
    optimizer, (x, y) = sgd(model.parameters()), batch()
    x, y = x[rank::2], y[rank::2]
    for _ in range(20):
        optimizer.zero_grad()
        if kind == "accumulated":
            with wrapped.no_sync():
                (cross_entropy(wrapped(x[:2]), y[:2]) / 2).backward()
            (cross_entropy(wrapped(x[2:]), y[2:]) / 2).backward()
        else:
            cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        tailor.step()
    assert tailor.shrunk
    return {"weights": model.state_dict(), "widths": tailor.report()["widths"]}


def unwrapped(rank):
    _, tailor = without_norms()
    tailor(batch()[0]).sum().backward()
    with pytest.raises(RuntimeError, match="2 processes are running, and the Tailor is not wrapped"):
        tailor.step()
    assert tailor.controller.step_count == 0


def refused(rank):
    """Tailors that would move other gates are told of at the first step, in both processes."""
    for options, message in (
        ({"steps": (400, 480)[rank]}, r"process \d \(4.0\) and process \d \(4.0\) disagree on steps"),
        ({"budget": {"macs": (0.5, 0.6)[rank]}}, "disagree on bounds"),
        ({"maturity": (0.0, 1.0)[rank]}, r"\(\d.0\) and process \d \(\d.0\) disagree on maturity"),
    ):
        model, _ = without_norms()
        tailor = Tailor(model, torch.randn(2, 3, 8, 8), **{"budget": {"macs": 0.5}, "steps": 400} | options)
        wrapped, optimizer = DistributedDataParallel(tailor), sgd(model.parameters())
        cross_entropy(wrapped(batch()[0]), batch()[1]).backward()
        optimizer.step()
        with pytest.raises(ValueError, match=message):
            tailor.step()
        assert tailor.controller.step_count == 0
        assert not tailor.checked


def broadcast(rank):
    """Weights of which only the first process has the trained ones until they are broadcast, by whatever means."""
    model, _ = without_norms()
    if rank == 0:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # of rank one, as no start is
                    flat = parameter.flatten(1)
                    parameter.copy_((flat[:, :1] * flat[:1]).view_as(parameter))
    tailor = Tailor(model, torch.randn(2, 3, 8, 8), budget={"macs": 0.5}, steps=400)
    assert (tailor.controller.maturity > 0) == (rank == 0)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    wrapped, optimizer = DistributedDataParallel(tailor), sgd(model.parameters())
    cross_entropy(wrapped(batch()[0]), batch()[1]).backward()
    optimizer.step()
    tailor.step()
    assert tailor.controller.maturity > 0


def job(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    unwrapped(rank)
    refused(rank)
    broadcast(rank)
    found = {kind: train(rank, kind) for kind in ("plain", "accumulated", "bucket_view", "static")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.medium
def test_two_processes_stay_equal_and_are_one_with_the_doubled_batch(tmp_path):
    mp.start_processes(job, (tmp_path,), nprocs=2, start_method="fork")  # without importing all anew
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model, tailor = without_norms()
    run(tailor, sgd(model.parameters()))
    for found in first.values():
        assert found["widths"] == tailor.report()["widths"]
        torch.testing.assert_close(found["weights"], dict(model.state_dict()), rtol=1e-3, atol=1e-4)
