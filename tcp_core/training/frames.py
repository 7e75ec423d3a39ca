"""The columns of a run's data frames: what `fit` returns, figures draw and result folders keep."""

import math
from collections.abc import Mapping

HISTORY = (
    *("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),
    *("seconds", "macs", "params", "open_units", "strength"),
)
TRAJECTORY = (
    *("step", "epoch", "macs", "params", "macs_schedule", "params_schedule"),
    *("strength", "losing", "closed", "returned"),
)
WIDTHS = ("layer", "dense", "tailored")


def require(what: str, given, wanted) -> None:
    """Raise `ValueError` if `given`, a frame or dict, lacks a name in `wanted` or is empty."""
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(
            f"{what} lacks {', '.join(missing)}. It has {', '.join(map(str, given)) or 'nothing'}; "
            f"it needs {', '.join(wanted)}."
        )
    if len(given) == 0:
        raise ValueError(f"{what} has no rows.")


def training_cost(
    epochs: float, macs: float, steps: float | None, frozen_at: float | None, before: float = 1.0
) -> float:
    """Return what a run costs, in epochs of the dense network: multiply-accumulates times images, forward and backward.

    `macs` is the tailored network's share of the dense one's, `before` that of the network which the run started from,
    and `frozen_at` the step of `steps` after which it was made smaller; None, or NaN, for a run that was not. Backward
    costs twice what forward does in both networks, so the factor of 3 cancels. What is pruned before the first step
    (`frozen_at` 1) is trained small throughout; its ranking, some hundred batches, is not counted, nor is what made
    the weights that a run starts from.
    """
    if steps is None or frozen_at is None or steps != steps or frozen_at != frozen_at:  # only NaN differs from itself
        return float(epochs) * before
    first = frozen_at / steps if frozen_at > 1 else 0.0
    return epochs * (first * before + (1 - first) * macs)


def printed(row: Mapping, dense: Mapping[str, int], epochs: int, *, share: bool = True) -> str:
    """Return the line that stands for an epoch; costs are in percent of the dense network's.

    Accuracies are shares, or numbers of a metric (``share`` False); one that is NaN is left out.
    """
    scores = {name: row[f"{name}_accuracy"] for name in ("train", "val")}
    shown = [f"{name} {value:{'.2%' if share else '.4g'}}  " for name, value in scores.items() if math.isfinite(value)]
    return (
        f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.3{'f' if row['lr'] >= 0.001 or not row['lr'] else 'g'}}  "
        f"loss {row['train_loss']:.3f}  {''.join(shown)}macs {row['macs'] / dense['macs']:.2%}  "
        f"params {row['params'] / dense['params']:.2%}  {row['seconds']:.1f} s"
    )


def say(text: str) -> None:
    """Print a line, unless whoever read it is gone: training is worth more."""
    try:
        print(text, flush=True)
    except OSError:
        pass
