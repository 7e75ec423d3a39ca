"""The columns of a run's data frames: what `fit` returns, figures draw and result folders keep."""

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
