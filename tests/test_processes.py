"""One run over two processes: the same network in both, and that of one process with the doubled batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tcp_core import data, fit

EPOCHS, BATCH = 6, 20


def network(width=12):
    """Without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def images():
    train, val, _ = data.digits()
    return train.split(len(train) - 640)[0], val


def train(batch_size, folder=None, stop=None, **options):
    def on_epoch(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    options = {"budget": {"macs": 0.4}, "epochs": EPOCHS, "batch_size": batch_size, "lr": 0.05, **options}
    return fit(network(), *images(), **options, checkpoints=folder, checkpoint_every=5, on_epoch=on_epoch)


def outcome(result):
    return {
        "weights": result.model.state_dict(),
        "widths": result.widths["tailored"].tolist(),
        "trajectory": result.trajectory.to_dict("list"),
        "losses": result.history[["train_loss", "val_loss"]].to_dict("list"),
        "batches": result.history["train_accuracy"].tolist(),
    }


def start(rank, world, folder, job):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{job.__name__}", rank=rank, world_size=world)
    try:
        torch.save(job(rank, folder), f"{folder}/{job.__name__}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def job_whole(rank, folder):
    return outcome(train(BATCH))


def job_resumed(rank, folder):
    with pytest.raises(KeyboardInterrupt):
        train(BATCH, folder / "checkpoints", stop=2)
    dist.barrier()
    return outcome(train(BATCH, folder / "checkpoints"))


def job_disagree(rank, folder):
    found = []
    for options in ({"lr": 0.1 + rank}, {"budget": {"macs": 0.4 + 0.1 * rank}}):
        with pytest.raises(
            ValueError, match=r"process \d \(.*\) and process \d \(.*\) disagree on (lr|bounds)"
        ) as caught:
            train(BATCH, **options)
        found.append(str(caught.value))
    return found


def run(job, tmp_path):
    mp.spawn(start, (2, tmp_path, job), nprocs=2)
    return [torch.load(tmp_path / f"{job.__name__}-{rank}.pt") for rank in (0, 1)]


def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    first, second = run(job_whole, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    one = outcome(train(2 * BATCH))
    assert first["widths"] == one["widths"]
    assert first["trajectory"]["closed"] == one["trajectory"]["closed"]
    torch.testing.assert_close(first, one, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_two_processes_go_on_together(tmp_path):
    first, second = run(job_resumed, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    whole, _ = run(job_whole, tmp_path)
    torch.testing.assert_close(first, whole, rtol=0, atol=0, equal_nan=True)


def test_processes_that_disagree_are_refused(tmp_path):
    assert all("must be given the same network" in text for text in run(job_disagree, tmp_path)[0])


def test_the_parts_of_a_batch_are_the_batch():
    images = data.digits().train
    options = {"shuffle": True, "augment": "crop", "seed": 3, "epoch": 2, "drop_last": True}
    parts = [images.batches(10, **options, part=(rank, 3)) for rank in range(3)]
    whole = images.batches(30, **options)
    assert [len(part) for part in parts] == [len(whole)] * 3
    for batch, *own in zip(whole, *parts, strict=True):
        for together, separate in zip(batch, zip(*own, strict=True), strict=True):
            assert together.equal(torch.cat(separate))
    with pytest.raises(ValueError, match=r"part=\(0, 2\).* needs drop_last"):
        images.batches(10, part=(0, 2))
