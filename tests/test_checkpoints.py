"""Runs that are stopped go on to the same end; a checkpoint is whole or not there."""

import errno
import signal
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from cases import slow
from PIL import Image

from tcp_core import fit, nets
from tcp_core.datasets import sources, streams
from tcp_core.study import comparators
from tcp_core.training import checkpoints
from tcp_core.training.checkpoints import CheckpointError

EPOCHS, BATCH = 6, 20  # 96 steps of 320 images; ours is made smaller after about 14


class Stop(Exception):
    """Stands for whatever ends a run too early."""


class Batches:
    """Batches in an order drawn anew each epoch, as a DataLoader does; raises at one step if told to."""

    def __init__(self, images, stop=None, size=BATCH):
        self.images, self.stop, self.drawn, self.size = images, stop, 0, size

    @classmethod
    def of(cls, size):
        return lambda images, stop: cls(images, stop, size)

    def __len__(self):
        return len(self.images) // self.size

    def __iter__(self):
        for index in torch.randperm(len(self.images)).split(self.size):
            if self.drawn == self.stop:
                raise Stop
            self.drawn += 1
            yield self.images.pixels[index].float() / 255, self.images.labels[index]


@pytest.fixture(scope="module")
def images():
    train, val, _ = sources.digits()
    return train.split(len(train) - 320)[0], val


def network(width=4):
    torch.manual_seed(0)
    model = nets.small_resnet(widths=(width, 8, 12), blocks=1, num_classes=10, in_channels=1)
    model.linear = torch.nn.Sequential(torch.nn.Dropout(0.2), model.linear)  # draws at every step
    return model


def run(
    images, folder=None, *, method="tailored", stop=None, every=7, batches=Batches, make=network, pruning=(), **options
):
    train, val = images
    budget = {"macs": 0.5}
    if method == "tailored":
        options["budget"] = budget
    elif method != "dense":
        how = {"at": 0.3, "batches": 3, "batch_size": BATCH} | dict(pruning)
        options["prune"] = comparators.pruner(method, budget, train=train, **how)
    torch.manual_seed(1)
    options |= {"checkpoints": folder, "checkpoint_every": every}
    return fit(make(), batches(train, stop), val, **{"epochs": EPOCHS} | options)


def same(first, second):
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    for name in ("history", "trajectory", "widths"):
        pair = [getattr(result, name).drop(columns="seconds", errors="ignore") for result in (first, second)]
        pd.testing.assert_frame_equal(*pair)
    assert str(first.report) == str(second.report)
    assert first.frozen_at_step == second.frozen_at_step


@pytest.fixture(scope="module")
def whole(images):
    """The run that was not stopped."""
    return run(images)


@pytest.mark.medium
@pytest.mark.parametrize("method", ["tailored", "taylor", "fixed_strength", *slow("dense", "slimming")])
def test_a_stopped_run_ends_as_one_that_was_not(images, tmp_path, method):
    whole = run(images, method=method)
    for stop in (10, 15, 40):  # before, while and after the network is made smaller; each goes on from the last
        with pytest.raises(Stop):
            run(images, tmp_path, method=method, stop=stop)
    same(whole, run(images, tmp_path, method=method))
    assert len(list(tmp_path.iterdir())) == checkpoints.KEPT


@pytest.mark.medium
def test_a_checkpoint_with_one_number_of_images_for_loss_and_accuracy_is_gone_on_from(images, whole, tmp_path):
    with pytest.raises(Stop):
        run(images, tmp_path, stop=10)
    state = checkpoints.newest(tmp_path)
    earlier = state | {"sums": [sums[:3] for sums in state["sums"]]}
    checkpoints.write(tmp_path, state["step"], earlier)
    same(whole, run(images, tmp_path))


class Remembering(torch.nn.Module):
    """A network whose outputs depend on a buffer that its state does not have."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.net(x) * (1 + self.mean)


class Following(torch.nn.Module):
    """A loss or metric that follows its own mean, and draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()), persistent=False)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, outputs, targets):
        loss = torch.nn.functional.cross_entropy(outputs, targets) * self.mean.clone()
        self.mean.mul_(0.9).add_(0.1 * loss.detach() + 0.01 * torch.rand((), generator=self.generator))
        return loss


@pytest.mark.medium
def test_what_no_state_has_goes_on_too(images, tmp_path):
    """Buffers that are not persistent, and those of a loss and of a metric, which may be inside of a function."""

    def last(folder=None, stop=None):
        torch.manual_seed(0)
        following, judging = Following(), Following()
        options = {"make": Remembering, "metric": judging, "loss": lambda *args: following(*args)}
        result = run(images, folder, stop=stop, lr=0.02, **options)
        return result, following.mean, judging.mean

    (whole, *means), stops = last(), (10, 40)
    for stop in stops:
        with pytest.raises(Stop):
            last(tmp_path, stop)
    found, *again = last(tmp_path)
    same(whole, found)
    assert all(map(torch.equal, (*means, whole.model.mean), (*again, found.model.mean)))


@pytest.mark.medium
def test_a_checkpoint_without_buffers_beside_the_state_is_gone_on_from(images, whole, tmp_path):
    with pytest.raises(Stop):
        run(images, tmp_path, stop=10)
    state = checkpoints.newest(tmp_path)
    checkpoints.write(tmp_path, state["step"], {k: v for k, v in state.items() if k not in ("hidden", "judging")})
    same(whole, run(images, tmp_path))


@pytest.mark.medium
@pytest.mark.parametrize("every", [1, *slow(16, 0)])
def test_any_interval_will_do(images, whole, tmp_path, every):
    for stop in (1, 17, 33):
        with pytest.raises(Stop):
            run(images, tmp_path, stop=stop, every=every)
    same(whole, run(images, tmp_path, every=every))
    same(whole, run(images, tmp_path, every=every))  # a finished run is done at once


@pytest.mark.medium
def test_images_in_memory_go_on_too(images, tmp_path):
    def stop(row):
        if row["epoch"] == 3:
            raise Stop

    options = {"budget": {"macs": 0.5}, "epochs": EPOCHS, "batch_size": BATCH, "augment": "crop"}
    whole = fit(network(), *images, **options)
    with pytest.raises(Stop):
        fit(network(), *images, **options, checkpoints=tmp_path, checkpoint_every=5, on_epoch=stop)
    same(whole, fit(network(), *images, **options, checkpoints=tmp_path, checkpoint_every=5))


@pytest.mark.medium
def test_a_damaged_checkpoint_is_passed_over(images, whole, tmp_path):
    with pytest.raises(Stop):
        run(images, tmp_path, stop=40)
    first, second = sorted(tmp_path.iterdir())
    second.write_bytes(second.read_bytes()[:1000])
    said = (
        rf"a checkpoint in .* is damaged and passed over \({second.name}: its SHA-256 .*{first.name} before it is taken"
    )
    with pytest.warns(UserWarning, match=said):
        resumed = run(images, tmp_path)
    same(whole, resumed)


@pytest.mark.medium
def test_numbers_of_numpy_are_written_as_python_s(images, tmp_path):
    """They were written, and then refused when they were read: the run started from zero."""
    options = {"lr": np.float64(0.05), "weight_decay": np.float32(5e-4), "accumulate": 1}
    whole = run(images, **options)
    with pytest.raises(Stop):
        run(images, tmp_path, stop=20, **options)
    steps = []
    same(whole, run(images, tmp_path, on_step=lambda step, steps_: steps.append(step), **options))
    assert steps[0] == 15
    for path in tmp_path.iterdir():
        assert type(checkpoints._read(path)["recipe"]["lr"]) is float


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(0.1), float), (np.float32(0.5), float), (np.int64(3), int), (np.bool_(True), bool),
        (np.str_("text"), str), (Path("a/b"), str), (np.arange(3, dtype=np.uint32), torch.Tensor),
        (torch.nn.Parameter(torch.ones(2)), torch.Tensor), (torch.Size([2]), tuple), (frozenset({1}), set),
        (OrderedDict(a=1), dict), (defaultdict(list, a=[np.int8(1)]), dict), (b"x", bytes), (None, type(None)),
        (torch.float32, torch.dtype), (2**200, int),
    ],
)  # fmt: skip
def test_values_come_back_in_plain_types(tmp_path, value, kind):
    checkpoints.write(tmp_path, 1, {"at": [(value, {"deeper": value})]})
    ((found, deeper),) = checkpoints.newest(tmp_path)["at"]
    assert type(found) is type(deeper["deeper"]) is kind
    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found, torch.as_tensor(value).detach())
    else:
        assert found == (str(value) if isinstance(value, Path) else value)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"optimizer\.state\[1\] is a .*Stop, which a checkpoint cannot hold"):
        checkpoints.write(tmp_path, 1, {"optimizer": {"state": [0, Stop()]}})
    assert not list(tmp_path.iterdir())


def test_what_a_model_keeps_beside_its_state_is_kept(tmp_path):
    checkpoints.write(tmp_path, 1, {"model": torch.nn.BatchNorm2d(3).state_dict()})
    assert checkpoints.newest(tmp_path)["model"]._metadata[""] == {"version": 2}


def flipped(path, random):
    """The file with one bit changed."""
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)


@pytest.mark.medium
def test_no_file_in_which_a_bit_has_changed_loads_as_good(tmp_path):
    model = network()
    state = {"model": model.state_dict(), "history": [{"loss": 0.5}], "text": "x" * 100}
    checkpoints.write(tmp_path, 7, state)
    path = checkpoints.write(tmp_path, 14, state)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        path.write_bytes(whole)
        flipped(path, random)
        with pytest.warns(UserWarning, match=r"000000014.ckpt: .*; 000000007.ckpt before it is taken"):
            checkpoints.newest(tmp_path)
    for length in (0, 1, 60, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="damaged and passed over"):
            checkpoints.newest(tmp_path)
    path.write_bytes(whole + b"0")
    with pytest.warns(UserWarning, match="SHA-256"):
        checkpoints.newest(tmp_path)


def test_a_file_that_cannot_be_read_never_makes_a_new_one_vanish(tmp_path):
    """They are of later steps than what is written from then on."""
    for step in (70, 80, 90):
        checkpoints.write(tmp_path, step, {"step": step})
    bad = tmp_path / "000000090.ckpt"
    bad.write_bytes(b"damaged")
    for step in (81, 82, 83):
        with pytest.warns(UserWarning, match="damaged"):
            assert checkpoints.newest(tmp_path)["step"] == max(80, step - 1)
        checkpoints.write(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000082.ckpt", "000000083.ckpt", "000000090.ckpt"]
    checkpoints.write(tmp_path, 90, {"step": 90})
    assert checkpoints.newest(tmp_path)["step"] == 90
    checkpoints.write(tmp_path, 1_000_000_000, {"step": 1_000_000_000})
    assert checkpoints.newest(tmp_path)["step"] == 1_000_000_000
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.medium
def test_a_run_of_which_nothing_can_be_read_is_not_started_anew(images, tmp_path):
    with pytest.raises(Stop):
        run(images, tmp_path, stop=40)
    for path in tmp_path.iterdir():
        flipped(path, np.random.default_rng(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read .*Nothing was started and nothing del"):
        run(images, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_checkpoint_of_the_version_before_is_named_as_that(tmp_path):
    torch.save({"step": 3}, tmp_path / "000000003.ckpt")
    with pytest.raises(CheckpointError, match=r"of another version of tcp_core.*format 1; this one reads 2"):
        checkpoints.newest(tmp_path)


@pytest.mark.medium
def test_a_full_disk_leaves_the_last_good_checkpoint(images, whole, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(images, tmp_path, stop=20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "save", full)
        with pytest.raises(CheckpointError, match=r"step 21 could not be written .*No space left.*000000014.ckpt"):
            run(images, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    same(whole, run(images, tmp_path))


def test_a_folder_that_cannot_be_made_is_a_clear_error(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoints can be written to .*file.* another folder"):
        run(images, tmp_path / "file")


@pytest.fixture(scope="module")
def begun(images, tmp_path_factory):
    """A function that gives the folder of a run of ten steps with these options."""
    folders = {}

    def folder(options):
        if str(options) not in folders:
            folders[str(options)] = tmp_path_factory.mktemp("begun")
            with pytest.raises(Stop):
                run(images, folders[str(options)], stop=10, **options)
        return folders[str(options)]

    return folder


@pytest.mark.medium
@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({}, {"lr": 0.2}, "lr: 0.1 then, 0.2 now"),
        ({}, {"momentum": 0.8}, r"optimizer.groups.0.momentum: 0.9 then, 0.8 now"),
        ({}, {"method": "dense"}, r"bounds.macs: \d+ then, absent now"),
        ({}, {"phase": (0.1, 0.3)}, r"phase: 'auto' then, \(0.1, 0.3\) now"),
        ({}, {"multiple": 2}, "multiple: 'auto' then, 2 now"),
        ({}, {"min_width": 2}, "min_width: 1 then, 2 now"),
        ({}, {"lookahead": 0.3}, "lookahead: 0.2 then, 0.3 now"),
        ({}, {"ramp": 0.5}, "ramp: 0.4 then, 0.5 now"),
        ({}, {"ignore": "layer1.0.conv1"}, r"prunable: \d+ then, \d+ now; ignore: \(\) then, \('layer1\.0"),
        ({}, {"method": "taylor"}, r"prune.*: .*Tailor.* then, .*now"),
        ({"method": "taylor"}, {}, r"prune.*now"),
        ({"method": "taylor"}, {"method": "slimming"}, r"prune.method: 'taylor' then, 'slimming' now"),
        ({"method": "taylor"}, {"method": "taylor", "pruning": {"at": 0.5}}, "prune.at: 0.3 then, 0.5 now"),
        ({"method": "random"}, {"method": "random", "pruning": {"seed": 3}}, "prune.seed: 0 then, 3 now"),
        ({"method": "dense"}, {"method": "taylor"}, "bounds.macs: absent then"),
        ({}, {"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss"),
        (
            {"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1)},
            {"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.2)},
            "loss.sha256",
        ),
        ({"ema": 0.9}, {"ema": 0.99}, "ema: 0.9 then, 0.99 now"),
        ({}, {"batches": Batches.of(10)}, "steps: 96 then, 192 now; batch_size: 20 then, 10 now"),
        ({}, {"epochs": 7}, "epochs: 6 then, 7 now; steps: 96 then, 112 now"),
        ({}, {"make": lambda: network(5)}, r"shapes.conv1.weight: \(4, 1, 3, 3\) then, \(5, 1, 3, 3\) now"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_what_differs(images, begun, then, now, said):
    folder = begun(then)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=rf"has checkpoints of another run: .*{said}.* delete them to start anew"):
        run(images, folder, **now)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()} != {}


@pytest.mark.medium
def test_patterns_in_another_order_are_the_same_run(images, begun):
    folder = begun({"ignore": ["layer3.0.conv1", "layer1.0.conv1"]})
    run(images, folder, ignore=["layer1.0.conv1", "layer3.0.conv1", "layer1.0.conv1"])


@pytest.mark.medium
def test_batches_of_another_size_are_refused_also_with_as_many_steps(images, tmp_path):
    """Images in memory are counted by the batch, and half of them in half the batch are as many steps."""
    train, val = images
    options = {"budget": {"macs": 0.5}, "epochs": EPOCHS, "checkpoints": tmp_path, "checkpoint_every": 5}

    def stop(step, steps):
        if step == 6:
            raise Stop

    with pytest.raises(Stop):
        fit(network(), train, val, batch_size=20, on_step=stop, **options)
    half = train.split(160)[1]
    with pytest.raises(CheckpointError, match="batch_size: 20 then, 10 now; images: 320 then, 160 now"):
        fit(network(), half, val, batch_size=10, **options)


def stream_of(folder, **options):
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            Image.new("L", (8, 8), 16 * number).save(folder / name / f"{number}.png")
    return streams.Stream(folder, **{"size": 8, "batch_size": 4, "train": True, "workers": 0} | options)


def begin(train, folder, stop=None, **options):
    def on_step(step, steps):
        if step == stop:
            raise Stop

    torch.manual_seed(0)
    model = nets.small_resnet(widths=(4, 8, 12), in_channels=train.shape[0])
    options |= {"epochs": 2, "checkpoints": folder, "checkpoint_every": 1, "on_step": on_step, "verbose": False}
    return fit(model, train, **options)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"seed": 1}, "train.seed: 0 then, 1 now"),
        ({"train": False}, "train.train: True then, False now"),
        ({"mean": (0.5,) * 3}, r"train.mean: .*0.485.* then, \(0.5, 0.5, 0.5\) now"),
    ],
)
def test_another_stream_is_another_run(tmp_path, option, said):
    stream = stream_of(tmp_path / "images")
    with pytest.raises(Stop):
        begin(stream, tmp_path / "c", stop=3)
    with pytest.raises(CheckpointError, match=f"has checkpoints of another run: .*{said}"):
        begin(stream_of(tmp_path / "images", **option), tmp_path / "c")
    begin(stream, tmp_path / "c", seed=0)  # which says the same


@pytest.mark.medium
def test_images_normalised_otherwise_are_another_run(images, tmp_path):
    with pytest.raises(Stop):
        begin(images[0], tmp_path, stop=2)
    with pytest.raises(CheckpointError, match=r"train.mean: \(0.30\d*,\) then, \(0.0,\) now"):
        begin(replace(images[0], mean=(0.0,)), tmp_path)
    begin(replace(images[0], mean=(images[0].mean[0] * (1 + 1e-9),)), tmp_path)


@pytest.mark.medium
def test_a_checkpoint_that_does_not_say_what_the_images_were_made_with_is_gone_on_from(tmp_path):
    """With a word, as it cannot be told; the seed that it noted was heeded by images in memory alone."""
    stream = stream_of(tmp_path / "images", seed=3)
    with pytest.raises(Stop):
        begin(stream, tmp_path / "c", stop=3)
    state = checkpoints.newest(tmp_path / "c")
    recipe = {name: each for name, each in state["recipe"].items() if name != "train"} | {"seed": 0, "augment": "crop"}
    checkpoints.write(tmp_path / "c", state["step"], state | {"recipe": recipe})
    with pytest.warns(UserWarning, match="did not note the training images' mean, std, seed, train: it cannot be t"):
        begin(stream, tmp_path / "c")


@pytest.mark.medium
def test_a_second_run_in_the_same_folder_ends_at_its_first_checkpoint(images, tmp_path):
    """As in a sweep that forgot to vary the folder: each would delete the other's checkpoints."""

    def beside(step, _):
        if step == 1:  # while the folder is still empty
            fit(network(), images[0], epochs=2, seed=1, checkpoints=tmp_path, verbose=False, on_step=first)

    def first(step, _):
        if step == 1:
            fit(network(), images[0], epochs=1, seed=2, checkpoints=tmp_path, verbose=False)

    with pytest.raises(CheckpointError, match=r"another run writes checkpoints to .* \(\d+\.ckpt is not of this one\)"):
        fit(network(), images[0], epochs=1, checkpoints=tmp_path, verbose=False, on_step=beside)
    assert len(checkpoints.names(tmp_path)) == 1  # that of the only run that had come to one


@pytest.mark.medium
def test_defaults_that_are_written_out_are_the_same_run(images, whole, tmp_path):
    with pytest.raises(Stop):
        run(images, tmp_path, stop=20)
    same(whole, run(images, tmp_path, phase="auto", min_width=1, ignore=(), multiple="auto"))


def test_removing_checkpoints_leaves_other_files(tmp_path):
    checkpoints.prepare(tmp_path / "c")
    checkpoints.write(tmp_path / "c", 1, {"x": torch.ones(2)})
    left = tmp_path / "c" / ".000000002.ckpt.0a1b2c3d.part"  # by a run that was killed as it wrote
    for name in ("other", "000000001.part", "000000002.part", left.name):
        (tmp_path / "c" / name).write_text("mine")
    checkpoints.write(tmp_path / "c", 2, {"x": torch.ones(2)})
    assert not left.exists()
    left.write_text("")
    checkpoints.remove(tmp_path / "c")
    mine = ["000000001.part", "000000002.part", "other"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == mine
    assert all((tmp_path / "c" / name).read_text() == "mine" for name in mine)
    assert checkpoints.newest(tmp_path / "c") is checkpoints.newest(tmp_path / "absent") is None
    checkpoints.remove(tmp_path / "absent")


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def train_to(out, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nets.small_resnet(widths=(8, 16, 32), blocks=1, num_classes=10, in_channels=1)
    options = {"budget": {"macs": 0.4}, "epochs": 6, "batch_size": 64, "checkpoints": folder, "checkpoint_every": 1}
    result = fit(model, *sources.digits()[:2], **options)
    torch.save([result.model.state_dict(), result.history["val_loss"].tolist()], out)


def run_and_kill(folder, out, seconds=None):
    """Train in a process of its own to the end, or for some seconds; say whether it was killed."""
    process = mp.get_context("fork").Process(target=train_to, args=(out, folder))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_killed(tmp_path, waits):
    """A checkpoint is written at every step, so most of a run's time, and of the kills, falls into writing one."""
    run_and_kill(None, tmp_path / "whole.pt")
    kills = sum(run_and_kill(tmp_path / "c", tmp_path / "out.pt", seconds) for seconds in waits)
    assert kills == len(waits)
    run_and_kill(tmp_path / "c", tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), torch.load(tmp_path / "whole.pt"), rtol=0, atol=0)


@pytest.mark.medium
def test_a_killed_run_goes_on(tmp_path):
    check_killed(tmp_path, [0.6, 0.4])


@pytest.mark.soak
def test_a_run_killed_twenty_times_goes_on(tmp_path):
    random = np.random.default_rng()
    check_killed(tmp_path, random.uniform(0.05, 0.4, size=20).tolist())
