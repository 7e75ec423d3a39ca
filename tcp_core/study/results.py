"""A run's folder, and the data frame of all runs.

A run writes `params.json` when it starts, its tables (`history.csv`, and for a tailored network
`trajectory.csv` and `widths.csv`) when it ends, and `metrics.json` last and at once: a run is done
if and only if `metrics.json` is there and not empty. Tables and figures are made from `read_runs` alone.
"""

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..cost import Fraction
from ..files import beside
from ..hardware import device_name
from ..training import checkpoints
from ..training.frames import HISTORY, TRAJECTORY, WIDTHS, require

CHECKPOINTS, SESSIONS = "checkpoints", "sessions.json"
METRICS = (
    *("network", "dataset", "method", "seed", "test_accuracy", "val_accuracy"),
    *("dense_macs", "dense_params", "macs", "params", "budget", "utilisation"),
    *("largest_gate_removed", "seconds_train", "frozen_at_step", "steps"),
    *("versions", "device", "threads", "git_commit", "started"),
)


@functools.cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file; one that has not changed is read once."""
    path = Path(path).absolute()
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


def start_run(out: str | Path, params: Mapping, *, overwrite: bool = False) -> Path:
    """Return the folder `out` of a new run, made if need be, with `params` in its `params.json`.

    A folder whose run is done is refused (`FileExistsError`) unless `overwrite`, which makes it
    count as not done from here on. What an interrupted run left behind is replaced; its checkpoints
    (`out`/checkpoints) stay if it had the same `params`, whatever its `threads`, so that it goes on from there; else
    they are deleted, and a line says what differs. Until the run is done, `sessions.json` has the `environment` that it
    was started in each time.
    """
    out = Path(out)
    if is_done(out) and not overwrite:
        raise FileExistsError(
            f"{out} holds a finished run (it has metrics.json). Choose another folder, delete this "
            "one, or pass overwrite=True."
        )
    out.mkdir(parents=True, exist_ok=True)
    left, sessions = any((out / CHECKPOINTS).glob("*.ckpt")), []
    if changed := _changed(out / "params.json", _plain(params, "params")):
        if left:
            print(f"{out}: its checkpoints are of other parameters ({changed}); they are deleted, and it starts anew.")
        checkpoints.remove(out / CHECKPOINTS)
    elif left and (out / SESSIONS).exists():
        sessions = read_json(out / SESSIONS)["sessions"]
    _write_json(out / SESSIONS, {"sessions": [*sessions, environment()]})
    for name in ("metrics.json", "history.csv", "trajectory.csv", "widths.csv"):
        (out / name).unlink(missing_ok=True)
    _write_json(out / "params.json", params)
    return out


def _changed(before: Path, params: Mapping) -> str:
    """Say in what parameters differ from those in the file `before`, which may not be there; "" if in nothing."""
    if not before.exists():
        return "its params.json is gone"
    old, new = read_json(before), json.loads(json.dumps(params))
    names = [name for name in {**old, **new} if name != "threads" and old.get(name, ...) != new.get(name, ...)]
    return ", ".join(f"{name}: {old.get(name, 'not given')} then, {new.get(name, 'not given')} now" for name in names)


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
    budget of a dense network) and may have more. NaN and infinity become null. Of a run that was stopped and went on,
    commit, versions and time are those of its start, and `sessions` has all of them.
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
    metrics = _plain(metrics, "metrics") | _of_sessions(out / SESSIONS)

    for name, frame in tables.items():
        # ten digits: exact for every cost below 10^10, and the same text on every machine
        frame.to_csv(out / f"{name}.csv", index=False, float_format="%.10g", lineterminator="\n")
    _write_json(out / "metrics.json", metrics)
    checkpoints.remove(out / CHECKPOINTS)
    (out / SESSIONS).unlink(missing_ok=True)


def _of_sessions(path: Path) -> dict:
    """Return what the metrics say of a run that took several sessions; nothing of one that took one."""
    sessions = read_json(path)["sessions"] if path.exists() else []
    if len(sessions) < 2:
        return {}
    dirty = [session["git_dirty"] for session in sessions]
    first = {name: sessions[0][name] for name in ("versions", "git_commit", "started")}
    return first | {"git_dirty": None if None in dirty else any(dirty), "sessions": sessions}


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
    What a run does not have is missing in its row. Links to folders are followed; a run that is reached in two ways
    counts once. Raises `FileNotFoundError` if nothing is there, and `ValueError` with the path of a file that is
    damaged, not of such a run, or contradicts the file beside it.
    """
    root = Path(root)
    done = sorted(folder / "metrics.json" for folder in _folders(root) if is_done(folder))
    if not done:
        raise FileNotFoundError(
            f"No finished run below {root}: a run's folder has metrics.json. "
            "Is the path right, and has a run come to its end?"
        )
    rows = []
    for path in done:
        row = {"run": path.parent.relative_to(root).as_posix()}
        metrics, params = _metrics(path), read_json(path.with_name("params.json"))
        if wrong := list(_contradictions(metrics, params)):
            raise ValueError(f"{path.parent}: {'; '.join(wrong)}. {_what_to_do(path)}")
        row |= _flat(metrics)
        row |= _flat(params, prefix="param.")
        rows.append(row)
    return pd.DataFrame(rows)


def _folders(root: Path) -> Iterator[Path]:
    """Yield all folders below a folder, and it, each once whatever links lead to it."""
    seen = set()
    for folder, below, _ in os.walk(root, followlinks=True):
        below.sort()
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
        else:
            seen.add(real)
            yield Path(folder)


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
    for cost in ("macs", "params"):
        used, dense = metrics[cost], metrics[f"dense_{cost}"]
        if not (isinstance(used, int) and isinstance(dense, int) and 0 < used <= dense):
            raise ValueError(
                f"{path}: {cost} is {used!r} of {dense!r} in the dense network; both must be whole numbers above 0, "
                f"and the first no larger than the second. {todo}"
            )
    return metrics


def _contradictions(metrics, params):
    """Yield in what a run's metrics and parameters contradict each other."""
    if lacking := [name for name in ("network", "method", "epochs") if name not in params]:
        yield f"params.json lacks {', '.join(lacking)}, which those of every run have"
    budget = metrics["budget"] or {}
    for name, there in {"network": "network", "method": "method", "seed": "seed", "data": "dataset"}.items():
        if params.get(name, metrics[there]) != metrics[there]:
            yield f"{name} is {params[name]!r} in params.json and {metrics[there]!r} in metrics.json"
    for cost in ("macs", "params"):
        bound = budget.get(cost) or 0
        if metrics["method"] != "dense" and params.get(cost, bound) != bound:
            yield f"the budget of {cost} is {params[cost]!r} in params.json and {bound!r} in metrics.json"
        if bound and metrics[cost] > Fraction(bound).of(metrics[f"dense_{cost}"]):
            share = metrics[cost] / metrics[f"dense_{cost}"]
            yield f"{cost} is {share:.2%} of the dense network's, which is above the budget of {bound:.2%}"


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
