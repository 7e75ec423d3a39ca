"""A run's folder, and the data frame of all runs.

A run writes `params.json` when it starts, its tables (`history.csv`, and for a tailored network
`trajectory.csv` and `widths.csv`) when it ends, and `metrics.json` last and at once: a run is done
if and only if `metrics.json` is there and not empty. Tables and figures are made from `read_runs` alone.
"""

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..files import beside
from ..hardware import device_name
from ..training import checkpoints
from ..training.frames import HISTORY, TRAJECTORY, WIDTHS, require

CHECKPOINTS = "checkpoints"
METRICS = (
    *("network", "dataset", "method", "seed", "test_accuracy", "val_accuracy"),
    *("dense_macs", "dense_params", "macs", "params", "budget", "utilisation"),
    *("largest_gate_removed", "seconds_train", "frozen_at_step", "steps"),
    *("versions", "device", "threads", "git_commit", "started"),
)


def start_run(out: str | Path, params: Mapping, *, overwrite: bool = False) -> Path:
    """Return the folder `out` of a new run, made if need be, with `params` in its `params.json`.

    A folder whose run is done is refused (`FileExistsError`) unless `overwrite`, which makes it
    count as not done from here on. What an interrupted run left behind is replaced; its checkpoints
    (`out`/checkpoints) stay if it had the same `params`, so that it goes on from there.
    """
    out = Path(out)
    if is_done(out) and not overwrite:
        raise FileExistsError(
            f"{out} holds a finished run (it has metrics.json). Choose another folder, delete this "
            "one, or pass overwrite=True."
        )
    out.mkdir(parents=True, exist_ok=True)
    before = out / "params.json"
    if not before.exists() or read_json(before) != json.loads(json.dumps(_plain(params, "params"))):
        checkpoints.remove(out / CHECKPOINTS)
    for name in ("metrics.json", "history.csv", "trajectory.csv", "widths.csv"):
        (out / name).unlink(missing_ok=True)
    _write_json(out / "params.json", params)
    return out


def finish_run(
    out: str | Path,
    *,
    history: pd.DataFrame,
    metrics: Mapping,
    trajectory: pd.DataFrame | None = None,
    widths: pd.DataFrame | None = None,
) -> None:
    """Write a run's tables, then its `metrics.json`, which marks the run as done.

    `history`, `trajectory` and `widths` are data frames with at least the columns HISTORY,
    TRAJECTORY and WIDTHS of tcp_core.training.frames; the last two are None or empty for a run without a budget.
    `metrics` needs the keys METRICS (None where a key says nothing about this run, such as the
    budget of a dense network) and may have more. NaN and infinity become null.
    Checkpoints are deleted. Raises `FileNotFoundError` if `start_run` was not called for `out`, and `ValueError` naming
    the columns or keys that are missing; in both cases nothing is written.
    """
    out = Path(out)
    if not (out / "params.json").exists():
        raise FileNotFoundError(f"{out} has no params.json: call start_run(out, params) first.")
    tables = {"history": history}
    require("history", history, HISTORY)
    for name, frame, columns in (
        ("trajectory", trajectory, TRAJECTORY),
        ("widths", widths, WIDTHS),
    ):
        if frame is not None and len(frame):
            require(name, frame, columns)
            tables[name] = frame
    require("metrics", metrics, METRICS)
    metrics = _plain(metrics, "metrics")

    for name, frame in tables.items():
        # ten digits: exact for every cost below 10^10, and the same text on every machine
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.10g", lineterminator="\n")
    _write_json(out / "metrics.json", metrics)
    checkpoints.remove(out / CHECKPOINTS)


def is_done(out: str | Path) -> bool:
    """Say whether the run in folder `out` has finished; an empty `metrics.json`, as a full disk leaves, is none."""
    path = Path(out) / "metrics.json"
    return path.is_file() and path.stat().st_size > 0


def read_widths(out: str | Path) -> dict[str, int]:
    """Return the widths that the run in folder `out` ended with: output channels by layer.

    Raises `FileNotFoundError` if it is no finished run with a budget.
    """
    path = Path(out) / "widths.csv"
    if not is_done(out) or not path.exists():
        raise FileNotFoundError(f"there is no finished run with widths in {out}.")
    widths = pd.read_csv(path).set_index("layer")["tailored"]
    return {str(layer): int(width) for layer, width in widths.items()}


def read_runs(root: str | Path) -> pd.DataFrame:
    """Return one data frame of all finished runs below `root`, one row per run, sorted by folder.

    `run` is the run's folder relative to `root`. Metrics keep their names, nested ones are joined
    by a dot (`budget.macs`, `versions.torch`); parameters stand behind `param.` (`param.epochs`),
    because several names, `params` first of all, mean one thing as parameter and another as metric.
    What a run does not have is missing in its row. Raises `FileNotFoundError` if nothing is there, and `ValueError`
    with the path of a file that is damaged or not of such a run.
    """
    root = Path(root)
    done = sorted(path for path in root.rglob("metrics.json") if is_done(path.parent))
    if not done:
        raise FileNotFoundError(
            f"No finished run below {root}: a run's folder has metrics.json. "
            "Is the path right, and has a run come to its end?"
        )
    rows = []
    for path in done:
        row = {"run": path.parent.relative_to(root).as_posix()}
        row |= _flat(_metrics(path))
        row |= _flat(read_json(path.with_name("params.json")), prefix="param.")
        rows.append(row)
    return pd.DataFrame(rows)


def read_json(path: str | Path) -> dict:
    """Return what a JSON file of a run holds; ValueError, with its path, if it is not there or holds something else."""
    path = Path(path)
    todo = _what_to_do(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}, which a finished run has. {todo}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}). {todo}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not the names and values of a run. {todo}")
    return found


def _metrics(path):
    """Return a run's metrics, found to be those of a run; ValueError, with the path, if they are not."""
    metrics = read_json(path)
    todo = _what_to_do(path)
    if lacking := [name for name in METRICS if name not in metrics]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}, which the metrics of every run have. {todo}")
    for name in ("test_accuracy", "val_accuracy"):
        value = metrics[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value <= 1):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a share in [0, 1], or null. {todo}")
    return metrics


def environment(device: str | torch.device | None = None) -> dict:
    """Return what the numbers of a run depend on beside its parameters; call it as the run starts.

    Keys: `versions` (python, tcp_core, torch, torchvision, numpy), `device` (its name and, of a CPU, the
    instructions that torch uses), `threads` (of torch on the CPU), `git_commit` and `git_dirty` (whether
    code differs from that commit; both None outside a git checkout), `started` (UTC, ISO 8601).
    Without `device`, the GPU is meant if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    packages = ("tcp_core", "torch", "torchvision", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **_git_state(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # used from a source tree that is not installed


def _git_state():
    repository = Path(__file__).resolve().parents[2]

    def git(*arguments):
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # an installed copy may lie in somebody else's repository, whose commit says nothing
        if Path(git("rev-parse", "--show-toplevel")).resolve() != repository:
            return {"git_commit": None, "git_dirty": None}
        # results and prose may change between two runs of a study; the code may not
        code = ("tcp_core", "notebooks", "experiments", "pyproject.toml")
        return {
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": git("status", "--porcelain", "--", *code) != "",
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def _plain(value, where):
    """Return `value` as JSON can hold it; `where` names it in the error."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a JSON file cannot hold. Allowed: numbers, "
        "text, True, False, None, paths, and lists and dicts of these."
    )


def _write_json(path, value):
    text = json.dumps(_plain(value, path.stem), indent=2, ensure_ascii=False, allow_nan=False)
    with beside(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _what_to_do(path):
    return f"Delete {path.parent} and do that run again, or move it away if it is no run of this study."


def _flat(value, prefix=""):
    row = {}
    for key, item in value.items():
        if isinstance(item, dict):
            row |= _flat(item, f"{prefix}{key}.")
        else:
            row[f"{prefix}{key}"] = item
    return row
