"""One run over two processes: the same network in both, and that of one process with the doubled batch."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tcp_core import evaluate, fit, nets
from tcp_core.datasets import sources
from tcp_core.training import processes

EPOCHS, BATCH = 6, 20


def network(width=12):
    """Without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def images():
    train, val, _ = sources.digits()
    return train.split(len(train) - 640)[0], val


def train(batch_size, folder=None, stop=None, make=network, **options):
    def on_epoch(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    options = {"budget": {"macs": 0.4}, "epochs": EPOCHS, "batch_size": batch_size, "lr": 0.05, **options}
    return fit(make(), *images(), **options, checkpoints=folder, checkpoint_every=5, on_epoch=on_epoch)


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


def job_options(rank, folder):
    """An optimiser and schedule of one's own, clipping, an average and a teacher; stopped and resumed."""
    options = {"make": with_norms, "ema": 0.9, "clip": 1.0, "teacher": with_norms(), "accumulate": 2, "lr": None}
    options |= {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=2e-3), "epochs": 8}
    options |= {"schedule": torch.optim.lr_scheduler.CosineAnnealingLR}
    whole = train(BATCH // 2, **options)
    with pytest.raises(KeyboardInterrupt):
        train(BATCH // 2, folder / "options", stop=2, **options)
    dist.barrier()
    resumed = train(BATCH // 2, folder / "options", **options)
    for first, second in ((whole.model.state_dict(), resumed.model.state_dict()), (whole.last, resumed.last)):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    return outcome(whole)


def job_disagree(rank, folder):
    found = []
    others = {"lr": 0.1 + rank}, {"budget": {"macs": 0.4 + 0.1 * rank}}, {"make": partial(network, 12 + rank)}
    for options, name in zip(others, ("lr", "bounds", "shapes"), strict=True):
        with pytest.raises(ValueError, match=rf"process \d.* and process \d.* disagree on {name}") as caught:
            train(BATCH, **options)
        found.append(str(caught.value))
    return found


def with_norms():
    torch.manual_seed(0)
    return nets.small_resnet(widths=(4, 8, 12))


def on_the_cpu(self, x):
    """What torch's SyncBatchNorm computes, which itself runs on GPUs only: statistics of all processes' images."""
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    world, size = dist.get_world_size(), x.numel() // x.shape[1]
    mean = all_reduce(x.mean((0, 2, 3))) / world
    square = all_reduce(x.square().mean((0, 2, 3))) / world
    var, count = square - mean**2, size * world
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
    scale = self.weight * (var + self.eps).rsqrt()
    return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def job_synchronised(rank, folder):
    nn.SyncBatchNorm.forward, processes.SYNCHRONISED = on_the_cpu, ("cpu",)
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # which refuses the CPU
    whole = train(BATCH, make=with_norms, sync_batch_norm=True)
    kinds = {type(module) for module in whole.model.modules()}
    assert nn.BatchNorm2d in kinds
    assert nn.SyncBatchNorm not in kinds
    return outcome(whole)


def job_with_norms(rank, folder):
    return outcome(train(BATCH, make=with_norms))


def job_accumulated(rank, folder):
    return outcome(train(BATCH // 2, accumulate=2))


def job_held_out(rank, folder):
    """What the history says of Images, of batches that are divided, and of batches that each process has whole."""
    val = images()[1]
    batches = list(val.batches(30))  # six
    divided = batches[:1] if rank == 0 else batches[1:]
    sampled = TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    sampled = DataLoader(sampled, 30, sampler=DistributedSampler(sampled, shuffle=False))
    found = []
    for held_out in (val, divided, batches, sampled):
        result = fit(network(), images()[0], held_out, epochs=1, batch_size=BATCH, lr=0.05)
        found.append(result.history[["val_loss", "val_accuracy"]].iloc[0].tolist())
    return found, evaluate(result.model, batches)


class Spoiling(nn.Sequential):
    """Spoils its output, or the gradient alone, at one step of one process."""

    what, forwards = "", 0

    def forward(self, x):
        y = super().forward(x)
        self.forwards += self.training and torch.is_grad_enabled()
        if self.forwards == 8 + 1 and dist.get_rank() == 1 and self.training:  # one was the trace's
            if self.what == "loss":
                return y + y.new_tensor(float("nan"))
            y.register_hook(lambda gradient: gradient * float("inf"))
        return y


def job_refused(rank, folder):
    said = []
    for what in ("loss", "gradient"):
        model = Spoiling(*network())
        model.what = what
        with pytest.raises(FloatingPointError) as caught:
            train(BATCH, make=lambda model=model: model, budget=None)
        said.append((str(caught.value), model.state_dict()))
    return said


def run(job, tmp_path):
    mp.start_processes(start, (2, tmp_path, job), nprocs=2, start_method="fork")  # without importing all anew
    return [torch.load(tmp_path / f"{job.__name__}-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each of two processes came to."""
    return run(job_whole, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def one():
    """What one process with the doubled batch came to."""
    return outcome(train(2 * BATCH))


@pytest.mark.medium
def test_two_processes_are_one_with_the_doubled_batch(whole, one):
    first, second = whole
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert first["widths"] == one["widths"]
    assert first["trajectory"]["closed"] == one["trajectory"]["closed"]
    torch.testing.assert_close(first, one, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional:FutureWarning")
def test_batch_norms_see_the_batches_of_all_processes(tmp_path):
    first, second = run(job_synchronised, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    one = outcome(train(2 * BATCH, make=with_norms))
    assert first["widths"] == one["widths"]
    torch.testing.assert_close(first, one, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.medium
def test_running_statistics_are_the_same_in_all_processes(tmp_path):
    first, second = run(job_with_norms, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_two_processes_add_up_batches(tmp_path, one):
    first, second = run(job_accumulated, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert first["widths"] == one["widths"]
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-2, atol=1e-3)


@pytest.mark.medium
def test_two_processes_go_on_together(tmp_path, whole):
    first, second = run(job_resumed, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first, whole[0], rtol=0, atol=0, equal_nan=True)


def test_all_processes_refuse_a_step_that_one_would_spoil(tmp_path):
    first, second = run(job_refused, tmp_path)
    for (here, weights), (there, others) in zip(first, second, strict=True):
        torch.testing.assert_close(weights, others, rtol=0, atol=0)
        assert all(value.isfinite().all() for value in weights.values())
        step = {text.split(" at step ")[1].split(";")[0] for text in (here, there)}
        assert len(step) == 1
        assert here.startswith("the loss is 2.")
        assert "but the gradient of '0.weight' and 5 more is not finite" in here
    assert second[0][0].startswith("the loss is nan at step")


@pytest.mark.medium
def test_held_out_batches_are_summed_whether_divided_or_whole(tmp_path):
    first, second = run(job_held_out, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    found, whole = first
    for each in found:
        assert each == pytest.approx([whole["loss"], whole["accuracy"]], rel=1e-5)


@pytest.mark.slow
def test_two_processes_take_all_options(tmp_path):
    first, second = run(job_options, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.medium
def test_processes_that_disagree_are_refused(tmp_path):
    assert all("must be given the same network" in text for text in run(job_disagree, tmp_path)[0])


@pytest.mark.medium
def test_a_function_of_a_notebook_runs_in_two_processes():
    """Forked, so it need not be importable, and sees what the notebook has made; its result comes back."""
    (model, *rest), ranks = (with_norms(), *images()), []

    def in_each():
        ranks.append(processes.rank_and_world())
        result = fit(model, *rest, budget={"macs": 0.4}, epochs=EPOCHS, batch_size=BATCH, device=processes.join())
        return result, ranks

    result, theirs = processes.launch(in_each, 2)
    assert (theirs, ranks) == ([(0, 2)], [])
    assert result.report["largest_gate_removed"] == 0
    assert sum(p.numel() for p in result.model.parameters()) == result.report["current"]["params"]
    assert processes.launch(lambda: 3, 1) == 3
    with pytest.raises(ValueError, match="processes=0; it must be at least 1"):
        processes.launch(in_each, 0)


def test_a_process_that_fails_is_told_of():
    def fail():
        raise KeyError(f"in process {processes.rank_and_world()[0]}")

    with pytest.raises(RuntimeError, match=r"a process of 2 failed, in process \d:(.|\n)*KeyError: 'in process \d"):
        processes.launch(fail, 2)


SCRIPT = """
import pathlib
import torch
from tcp_core import fit, nets
from tcp_core.datasets import sources
from tcp_core.training import processes
torch.manual_seed(0)
device = processes.join()
train, val, _ = sources.digits()
result = fit(
    nets.small_resnet(widths=(4, 8, 12)), train.split(len(train) - 640)[0], val,
    budget={"macs": 0.4}, epochs=6, batch_size=20, device=device,
)
rank, world = processes.rank_and_world()
pathlib.Path(__file__).with_name(f"said-{rank}").write_text(f"{world} {result.report['current']['macs']}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        # its launcher for several processes, which asks for GPUs by its name alone
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
         "--dynamo_backend=no", "--main_process_port=0"],
    ],
)  # fmt: skip
def test_launched_from_outside(tmp_path, command):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    said = subprocess.run(
        [sys.executable, "-m", *command, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    # not what they printed: lines of two processes run into each other
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("2 ")


def test_the_parts_of_a_batch_are_the_batch():
    images = sources.digits().train
    options = {"shuffle": True, "augment": "crop", "seed": 3, "epoch": 2, "drop_last": True}
    parts = [images.batches(10, **options, part=(rank, 3)) for rank in range(3)]
    whole = images.batches(30, **options)
    assert [len(part) for part in parts] == [len(whole)] * 3
    for batch, *own in zip(whole, *parts, strict=True):
        for together, separate in zip(batch, zip(*own, strict=True), strict=True):
            assert together.equal(torch.cat(separate))
    with pytest.raises(ValueError, match=r"part=\(0, 2\).* needs drop_last"):
        images.batches(10, part=(0, 2))
