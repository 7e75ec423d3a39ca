"""Watching a run: a progress bar and curves where somebody sits, rows elsewhere, and TensorBoard's event files."""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..channels import Channels
from ..files import expanded
from .frames import HISTORY, printed
from .processes import rank_and_world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWING_SHARE = 0.1  # of the time, about, that goes into drawing curves when epochs are short


class Watch:
    """What shows one run while it goes on::

        with Watch(channels, epochs=epochs) as watch:
            fit(model, train, epochs=epochs, on_epoch=watch.on_epoch, on_step=watch.on_step)

    In a notebook that somebody has open, ``on_step`` moves a progress bar and ``on_epoch`` redraws one figure of
    curves; those of a resumed run begin where it goes on. Elsewhere (papermill, nbval, a script, a process started from
    a notebook) each epoch prints one row. Of several processes only the first shows and writes.

    Nothing that fails here while training stops it: it is logged, and rows are printed where bar or curves cannot be
    shown, for example because tqdm or IPython is not installed.

    Args:
        channels: those of the dense network, whose cost is 100 %.
        epochs: of the whole run.
        tensorboard: folder for TensorBoard's event files, None for none. They hold the :func:`scalars` of each epoch. A
            run that goes on from a checkpoint, or starts anew, in the same folder replaces the epochs it trains again.
        live: whether to show bar and curves; None: if the front end that runs this cell can be asked for input, as
            JupyterLab can and papermill, nbconvert and nbval cannot.

    Raises:
        ImportError: if ``tensorboard`` is given and the package is not installed.
        OSError: if its folder cannot be made.
    """

    def __init__(
        self, channels: Channels, *, epochs: int, tensorboard: str | Path | None = None, live: bool | None = None
    ):
        if tensorboard is not None:
            _summary_writer()
            tensorboard = expanded(tensorboard)
            tensorboard.mkdir(parents=True, exist_ok=True)
        self.dense, self.epochs, self.folder = channels.cost(), epochs, tensorboard
        self.rows: list[dict] = []
        self._asked, self._next_drawing = live, 0.0
        self._bar = self._figure = self._writer = None

    @cached_property
    def live(self) -> bool:
        """Whether bar and curves are shown, found out by the process that trains: it may be a fork."""
        return _somebody_watches() if self._asked is None else self._asked

    def on_step(self, step: int, steps: int) -> None:
        """Move the bar to ``step`` of ``steps``."""
        if rank_and_world()[0] == 0 and self.live:
            self.live = self._done(self._move, step, steps)

    def on_epoch(self, row: Mapping) -> None:
        """Show and write a row of the history, with the open channels of each layer as ``widths``."""
        if rank_and_world()[0] > 0:
            return
        self.live = self.live and self._done(self._add, row)
        if not self.live:
            self._done(print, printed(row, self.dense, self.epochs), flush=True)
        if self.folder is not None and not self._done(self._write, row):
            self._writer = None  # the next epoch tries a new file

    def close(self) -> None:
        """Draw the curves to their end, and close the bar and the event file."""
        if self.live and self.rows:
            self._done(self._draw)
        for part in (self._bar, self._writer):
            if part is not None:
                self._done(part.close)
        self._bar = self._figure = self._writer = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _done(self, part: Callable, *given: Any, **options: Any) -> bool:
        """Return whether ``part`` could do its work; training is worth more than a picture."""
        try:
            part(*given, **options)
        except Exception as error:
            # logged, not warned: where warnings are errors, one would stop the run
            logging.getLogger(__name__).warning(
                "%s failed (%s: %s); training goes on.", part.__qualname__, type(error).__name__, error
            )
            return False
        return True

    def _move(self, step: int, steps: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._draw()  # above the bar: only a cell's last output is rewritten in place
            done = f"{(step - 1) * self.epochs // steps}/{self.epochs} epochs"
            look = {"desc": done, "unit": " steps", "file": sys.stdout, "ncols": 100}
            self._bar = tqdm(total=steps, initial=step - 1, mininterval=0.5, miniters=1, **look)
        self._bar.update(step - self._bar.n)

    def _add(self, row: Mapping) -> None:
        self.rows.append(dict(row))
        if self._bar is not None:
            self._bar.set_description(f"{row['epoch']}/{self.epochs} epochs", refresh=False)
        if perf_counter() >= self._next_drawing:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import Image, display

        started, png = perf_counter(), io.BytesIO()
        curves(self.rows, self.dense, self.epochs).savefig(png, format="png", dpi=200)
        image = Image(png.getvalue(), retina=True)  # needs no matplotlib backend in the kernel
        if self._figure is None:
            self._figure = display(image, display_id=True)
        else:
            self._figure.update(image)
        now = perf_counter()
        self._next_drawing = now + (now - started) / _DRAWING_SHARE

    def _write(self, row: Mapping) -> None:
        epoch = row["epoch"]
        if self._writer is None:  # what a run before this one wrote from this epoch on counts no more
            self._writer = _summary_writer()(str(self.folder), purge_step=epoch)
        for name, value in scalars(row, self.dense).items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()  # a run that is killed keeps its epochs


def scalars(row: Mapping, dense: Mapping[str, int]) -> dict[str, float]:
    """Return what TensorBoard is given of an epoch, by name; costs are fractions of the dense network's."""
    return {
        **{f"{what}/{part}": row[f"{part}_{what}"] for what in ("accuracy", "loss") for part in ("train", "val")},
        **{f"cost/{name}": row[name] / full for name, full in dense.items()},
        **{name: row[name] for name in ("strength", "lr", "open_units", "seconds")},
        **{f"widths/{layer}": width for layer, width in row["widths"].items()},
    }


def curves(rows: Sequence[Mapping], dense: Mapping[str, int], epochs: int) -> Figure:
    """Draw accuracy, and the open units' cost with the strength, after each of ``rows``, of which there may be none."""
    import matplotlib.pyplot as plt  # which a process that only prints rows need not have
    from matplotlib.ticker import MaxNLocator

    from .plots import COLORS, finished, style

    history = pd.DataFrame(rows, columns=HISTORY).astype(float)
    with style():
        fig, (accuracy, cost) = plt.subplots(1, 2, figsize=(9.6, 3.6))
        strength = cost.twinx()

        marker = "o" if len(rows) <= 20 else None

        def plot(axes, name, values, form, **look):
            if not values.isna().any():  # without validation images there is no such curve
                label = " ".join([name, *(form.format(value) for value in values[-1:])])
                axes.plot(history["epoch"], values, label=label, marker=marker, ms=4, **look)

        for name, part, line, width in (("validation", "val", "-", 1.9), ("training", "train", "--", 1.2)):
            values = 100 * history[f"{part}_accuracy"]
            plot(accuracy, name, values, "{:.1f} %", color=COLORS["tailored"], linestyle=line, linewidth=width)
        for name, full in dense.items():
            plot(cost, name, 100 * history[name] / full, "{:.1f} %", color=COLORS[name])
        plot(strength, "strength", history["strength"], "{:.2g}", color=COLORS["strength"], linewidth=1.2)

        for axes, lines, title in (
            (accuracy, accuracy.lines, "Accuracy, %"),
            (cost, [*cost.lines, *strength.lines], "Cost of the open units, % of dense"),
        ):
            axes.set(xlim=(0, epochs), xlabel="epoch")
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
            axes.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
        if not rows:
            accuracy.set_ylim(0, 100)
        cost.set_ylim(0, 105)
        strength.set_ylim(0, 1.35 * history["strength"].max() if history["strength"].any() else 1)
        strength.grid(visible=False)
        return finished(fig)


def _somebody_watches() -> bool:
    """Return whether this code runs in a kernel whose front end can be asked for input."""
    if "IPython" not in sys.modules or multiprocessing.parent_process() is not None:  # a fork cannot display
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"event files need the package tensorboard ({error}): pip install tensorboard, or leave tensorboard=None."
        ) from error
    return SummaryWriter
