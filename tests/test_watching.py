"""Bar and curves where somebody sits, rows elsewhere, event files on demand, and nothing that stops a run."""

import logging
import math
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from papermill.clientwrap import PapermillNotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tcp_core import trace
from tcp_core.training import watching
from tcp_core.training.watching import Watch

EPOCHS, STEPS = 4, 10
ROWS = [f"epoch   {epoch}/{EPOCHS}  lr 0.100" for epoch in range(1, EPOCHS + 1)]


@pytest.fixture(scope="module")
def channels():
    return trace(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)), torch.rand(2, 1, 8, 8))


def row(epoch, channels, **changes):
    dense = channels.cost()
    return {
        **{"epoch": epoch, "lr": 0.1, "train_loss": 1 / epoch, "train_accuracy": 0.5, "val_loss": 2.0},
        **{"val_accuracy": 0.25, "seconds": 1.23, "macs": dense["macs"] // 2, "params": dense["params"]},
        **{"open_units": 3, "strength": 0.01 * epoch, "widths": {"0": 4 - epoch % 2, "2": 10}},
        **changes,
    }


def train(watch, channels, first=1, last=EPOCHS, **changes):
    for epoch in range(first, last + 1):
        for step in range((epoch - 1) * STEPS, epoch * STEPS):
            watch.on_step(step + 1, EPOCHS * STEPS)
        watch.on_epoch(row(epoch, channels, **changes))


def read(folder):
    """Return what TensorBoard shows of a folder: name -> {epoch: value}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all(len({event.step for event in found}) == len(found) for found in scalars.values())
    return {tag: {event.step: event.value for event in found} for tag, found in scalars.items()}


@pytest.fixture
def screen(monkeypatch):
    """Let IPython's display show to a list: one entry an output, a list of the pictures that replaced each other."""
    outputs = []

    class Handle:
        def __init__(self, picture):
            self.pictures = [picture]

        def update(self, picture):
            self.pictures.append(picture)

    def display(picture, display_id):
        assert display_id
        outputs.append(handle := Handle(picture))
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(watching, "curves", lambda *_: Figure(figsize=(1, 1)))  # the true ones take 0.3 s
    return outputs


def test_a_script_prints_one_row_an_epoch(channels, capsys):
    with Watch(channels, epochs=EPOCHS) as watch:
        train(watch, channels, last=2)
        watch.on_epoch(row(10, channels, val_accuracy=math.nan))
    assert capsys.readouterr() == (
        "epoch   1/4  lr 0.100  loss 1.000  train 50.00%  val 25.00%  macs 50.00%  params 100.00%  1.2 s\n"
        "epoch   2/4  lr 0.100  loss 0.500  train 50.00%  val 25.00%  macs 50.00%  params 100.00%  1.2 s\n"
        "epoch  10/4  lr 0.100  loss 0.100  train 50.00%  macs 50.00%  params 100.00%  1.2 s\n",
        "",
    )


def test_live_is_one_figure_and_a_bar_below_it(channels, capsys, screen, monkeypatch):
    monkeypatch.setattr(watching, "_DRAWING_SHARE", 1e9)  # every epoch is drawn
    with Watch(channels, epochs=EPOCHS, live=True) as watch:
        watch.on_step(1, EPOCHS * STEPS)
        assert len(screen) == 1  # above the bar, before it
        train(watch, channels)
    assert [len(output.pictures) for output in screen] == [1 + EPOCHS + 1]
    assert all(picture.data.startswith(b"\x89PNG") for picture in screen[0].pictures)
    bar, errors = capsys.readouterr()
    assert not errors
    assert "epoch " not in bar
    assert bar.startswith("\r0/4 epochs:")
    assert bar.splitlines()[-1].startswith("4/4 epochs: 100%")
    assert f"{EPOCHS * STEPS}/{EPOCHS * STEPS}" in bar


def test_curves_are_not_drawn_more_often_than_they_are_worth(channels, screen):
    with Watch(channels, epochs=EPOCHS, live=True) as watch:
        train(watch, channels)
    assert [len(output.pictures) for output in screen] == [2]  # at the start and at the end


def test_a_run_that_goes_on_starts_its_bar_there(channels, capsys, screen):
    with Watch(channels, epochs=EPOCHS, live=True) as watch:
        train(watch, channels, first=3)
    assert capsys.readouterr().out.startswith("\r2/4 epochs:  50%")


@pytest.mark.parametrize("epochs", [0, 1, 30])
def test_curves(channels, epochs):
    rows = [row(epoch, channels, val_accuracy=math.nan) for epoch in range(1, epochs + 1)]
    accuracy, cost, strength = watching.curves(rows, channels.cost(), 30).axes
    names = [line.get_label() for axes in (accuracy, cost, strength) for line in axes.lines]
    shown = ["training 50.0 %", "macs 50.0 %", "params 100.0 %", f"strength {0.01 * epochs:.2g}"]
    assert names == (shown if epochs else ["validation", "training", "macs", "params", "strength"])
    assert accuracy.get_xlim() == (0, 30)


def test_a_step_costs_little(channels, screen):
    watch = Watch(channels, epochs=EPOCHS, live=True)
    watch.on_step(1, 10_001)
    started = time.perf_counter()
    for step in range(2, 10_002):
        watch.on_step(step, 10_001)
    watch.close()
    assert (time.perf_counter() - started) / 10_000 < 100e-6  # about 3e-6; here a machine may be busy


def test_event_files_hold_what_was_given(channels, tmp_path):
    with Watch(channels, epochs=EPOCHS, tensorboard=tmp_path / "new" / "events", live=False) as watch:
        train(watch, channels, val_loss=math.nan, val_accuracy=math.nan)
    found = read(tmp_path / "new" / "events")
    for epoch in range(1, EPOCHS + 1):
        wanted = {"accuracy/train": 0.5, "loss/train": 1 / epoch, "cost/params": 1.0, "cost/macs": 0.5}
        wanted |= {"strength": 0.01 * epoch, "lr": 0.1, "open_units": 3, "seconds": 1.23}
        wanted |= {"widths/0": 4 - epoch % 2, "widths/2": 10}
        assert {name: values[epoch] for name, values in found.items()} == pytest.approx(wanted)


def test_a_killed_run_keeps_its_epochs_and_a_resumed_one_doubles_none(channels, tmp_path):
    train(Watch(channels, epochs=EPOCHS, tensorboard=tmp_path), channels, last=3)  # never closed
    assert read(tmp_path)["lr"].keys() == {1, 2, 3}
    with Watch(channels, epochs=EPOCHS, tensorboard=tmp_path) as watch:
        train(watch, channels, first=3, lr=0.5)
    assert read(tmp_path)["lr"] == pytest.approx({1: 0.1, 2: 0.1, 3: 0.5, 4: 0.5})
    with Watch(channels, epochs=EPOCHS, tensorboard=tmp_path) as watch:
        train(watch, channels, last=1, lr=0.25)  # anew
    assert read(tmp_path)["lr"] == {1: 0.25}


def test_event_files_that_fail_are_tried_again(channels, tmp_path, caplog, capsys):
    watch = Watch(channels, epochs=EPOCHS, tensorboard=tmp_path)
    train(watch, channels, last=1)

    def full(*_):
        raise OSError(28, "no space left on device")

    watch._writer.add_scalar = full
    train(watch, channels, first=2)
    watch.close()
    assert "no space left on device" in caplog.text
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert read(tmp_path)["lr"].keys() == {1, 3, 4}


def test_without_tensorboard_only_event_files_are_refused(channels, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Watch(channels, epochs=EPOCHS).close()
    with pytest.raises(ImportError, match="pip install tensorboard, or leave tensorboard=None"):
        Watch(channels, epochs=EPOCHS, tensorboard=tmp_path)


def broken(*_, **__):
    raise RuntimeError("the front end is gone")


@pytest.mark.parametrize("missing", ["tqdm", "IPython.display", "a display"])
def test_rows_are_printed_where_nothing_can_be_shown(channels, capsys, caplog, monkeypatch, missing):
    if missing == "a display":
        monkeypatch.setattr("IPython.display.display", broken)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    with Watch(channels, epochs=EPOCHS, live=True) as watch:
        train(watch, channels)
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text
    assert [line[: len(ROWS[0])] for line in capsys.readouterr().out.splitlines()] == ROWS


def test_a_display_that_breaks_in_mid_run_is_left_out(channels, capsys, screen, monkeypatch, caplog):
    monkeypatch.setattr(watching, "_DRAWING_SHARE", 1e9)
    with Watch(channels, epochs=EPOCHS, live=True) as watch:
        train(watch, channels, last=2)
        screen[0].update = broken
        train(watch, channels, first=3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    out = capsys.readouterr().out
    assert [line in out for line in ROWS] == [False, False, True, True]


def test_rows_that_cannot_be_printed_stop_nothing(channels, monkeypatch, caplog):
    monkeypatch.setattr("builtins.print", broken)
    with Watch(channels, epochs=EPOCHS) as watch:
        train(watch, channels)
    assert len(caplog.records) == EPOCHS


def test_only_the_first_process_shows_and_writes(channels, tmp_path, capsys, screen, monkeypatch):
    monkeypatch.setattr(watching, "rank_and_world", lambda: (1, 2))
    for live in (True, False):
        with Watch(channels, epochs=EPOCHS, tensorboard=tmp_path, live=live) as watch:
            train(watch, channels)
    assert not screen
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")  # of the kernel's and the client's own machinery
def test_a_notebook_shows_bar_and_curves_to_somebody_and_rows_to_papermill():
    assert issubclass(PapermillNotebookClient, NotebookClient)  # as is nbconvert's
    run = f"""
import torch, tcp_core as tcp
from tcp_core.datasets.images import Images
from tcp_core.training.watching import Watch
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
images = Images(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 10, list("0123456789"), (0,), (1,))
with Watch(tcp.trace(model, torch.rand(2, 1, 4, 4)), epochs={EPOCHS}) as watch:
    told = {{"on_epoch": watch.on_epoch, "on_step": watch.on_step}}
    tcp.fit(model, images, images, epochs={EPOCHS}, batch_size=10, augment="none", **told)
"""
    saved, seen = (new_code_cell(run) for _ in range(2))
    client = NotebookClient(new_notebook(cells=[saved, seen]), kernel_name="python3", timeout=120)

    def text(outputs):
        assert {output.get("name") for output in outputs} == {"stdout"}
        return "".join(output.text for output in outputs)

    with client.setup_kernel():
        client.execute_cell(saved, 0)
        client.kc.allow_stdin = True  # a front end that somebody sits at
        client.execute_cell(seen, 1)
    assert [line.split()[1] for line in text(saved.outputs).splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    figure, *bar = seen.outputs
    assert "image/png" in figure.data
    bar = text(bar)
    assert bar.rsplit("\r", 1)[1].startswith("4/4 epochs: 100%")
    assert "loss" not in bar
