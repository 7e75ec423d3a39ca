"""Declared experiments on the command line: what they are, how far they are, and one run executed.

`python -m tcp_core.study.experiments --help` lists the commands; `make study` and the Snakefile call them. The
declarations themselves are read by `tcp_core.study.reading`.
"""

import argparse
import fcntl
import itertools
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import papermill
from jupyter_client import AsyncKernelManager

from . import estimate
from .declaration import LOCK, Declaration, DeclarationError, Run, path_of
from .reading import read


def execute(declaration: Declaration, key: str, *, cores: int = 1) -> None:
    """Execute one run, unless it is done, and print a line when it starts and one when it ends.

    Only one process at a time executes a run: another one waits, and then finds it done. The executed notebook, and as
    a log what it prints, go to `declaration.executed`. cores: how many runs go on at once, for the estimate.
    Raises RuntimeError, with the place and the end of the log, if the notebook fails or leaves no finished run.
    """
    run = declaration.runs[key]
    notebook = declaration.executed / f"{key}.ipynb"
    log = notebook.with_suffix(".log")
    notebook.parent.mkdir(parents=True, exist_ok=True)
    with _locked(run) as lock:
        if key not in declaration.todo():
            skipped = declaration.skipped.get(key)
            print(f"skipped  {key}: {skipped}" if skipped else f"done     {key} (by another process)", flush=True)
            return
        print(f"start    {key}   log: {log}", flush=True)
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as stream:
            try:
                papermill.execute_notebook(
                    *(declaration.notebook, notebook, run.params),
                    **{"kernel_name": "python3", "language": "python", "cwd": declaration.notebook.parent},
                    **{"progress_bar": False, "stdout_file": stream, "stderr_file": stream},
                    kernel_manager_class=_kernel_of(lock, stream),
                )
                fault = "" if run.is_done() else f"the notebook came to its end, but {run.folder} has no metrics.json"
                fault = fault or "\n".join(run.disagreements())
            except Exception as error:  # of a cell, or of the kernel, which may have been killed
                fault = str(error) or repr(error)
            stream.write(fault)
        if fault:
            end = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8")).rstrip().splitlines()[-12:]
            raise RuntimeError(f"FAILED   {key}   log: {log}\n" + "\n".join(f"    {line}" for line in end))
        (run.folder / LOCK).unlink()  # whoever still waits for it finds the run done
    took = _duration(time.perf_counter() - started)
    print(f"done     {key} in {took}   {_progress(declaration, cores)}", flush=True)


@contextmanager
def _locked(run: Run) -> Iterator[int]:
    """Hold the run's lock; gives its file descriptor."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"wait     {run.key}: another process executes it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _kernel_of(lock: int, log: TextIO) -> type[AsyncKernelManager]:
    """Return a manager of kernels of this interpreter that hold the lock as well and complain in the log.

    A kernel outlives its killed parent by a second or more, in which it still writes; until then the run is not free.
    """

    class Manager(AsyncKernelManager):
        def format_kernel_cmd(self, *arguments, **options) -> list[str]:
            return [sys.executable, *super().format_kernel_cmd(*arguments, **options)[1:]]

        async def start_kernel(self, **options) -> None:
            await super().start_kernel(pass_fds=[lock], stderr=log, **options)

    return Manager


def table(declaration: Declaration, *, cores: int = 1) -> str:
    """Return how far each experiment is, as text, and what is not at hand for the rest."""
    rows = [("experiment", "runs", "done", "running", "left", "time left")]
    for name in dict.fromkeys(run.key.split("/")[0] for run in declaration.runs.values()):
        runs = [run for key, run in declaration.runs.items() if key.startswith(f"{name}/")]
        rows.append((name, *_counts(declaration, runs), _time_left(declaration, runs, cores)))
    runs = list(declaration.runs.values())
    rows.append(("all", *_counts(declaration, runs), _time_left(declaration, runs, cores)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}  " + "  ".join(f"{cell:>7}" for cell in row[1:5]) + f"  {row[5]}" for row in rows]
    lines += [f"not at hand: {text}" for text in declaration.missing]
    reasons = list(declaration.skipped.values())
    return "\n".join([*lines, *(f"skipped: {reasons.count(why)} runs, {why}" for why in dict.fromkeys(reasons))])


def _counts(declaration: Declaration, runs: Sequence[Run]) -> tuple[int, int, int, int]:
    """Return how many there are, how many are done, how many running, and how many left."""
    todo = declaration.todo()
    left = [run for run in runs if run.key in todo]
    running = sum(run.is_running() for run in left)
    skipped = sum(run.key in declaration.skipped for run in runs)
    return len(runs), len(runs) - len(left) - skipped, running, len(left) - running


def _progress(declaration: Declaration, cores: int) -> str:
    runs = list(declaration.runs.values())
    _, done, running, left = _counts(declaration, runs)
    return f"{done} done, {running} running, {left} left, time left: {_time_left(declaration, runs, cores)}"


def _time_left(declaration: Declaration, runs: Sequence[Run], cores: int) -> str:
    """Estimate the time until `runs` are done: seconds an epoch of the same network's finished runs, else of all."""
    rates: dict[str, list[float]] = {}
    for run in declaration.runs.values():
        if run.is_done():
            seconds = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8")).get("seconds_train")
            if seconds:
                rates.setdefault(run.values.get("network"), []).append(seconds / run.values.get("epochs", 1))
    todo = [run for key, run in declaration.todo().items() if run in runs]
    if not todo:
        return "-"
    if not rates:
        return "unknown until a run has ended"
    every = list(itertools.chain(*rates.values()))
    seconds = [
        statistics.median(rates.get(run.values.get("network"), every))
        * run.values.get("epochs", 1)
        * (0.5 if run.is_running() else 1)  # half way, for want of better knowledge
        for run in todo
    ]
    return f"about {_duration(max(sum(seconds) / cores, max(seconds)))}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def study(path: Path, options: Sequence[str], snakemake: Sequence[str]) -> None:
    """Become Snakemake, which does all runs that are left, unless another process does them already.

    The lock is our own, because Snakemake's stays behind when it is killed.
    """
    project = path.parent.parent
    (project / "build").mkdir(exist_ok=True)
    lock = os.open(project / "build" / f"{path.stem}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{path.stem} is being run by another process; `status` says how far it is") from None
    os.set_inheritable(lock, True)  # held until Snakemake ends, however it ends
    command = [sys.executable, "-m", "snakemake", "--snakefile", project / "Snakefile", "--directory", project]
    command += ["--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "--keep-going", "--quiet"]
    command += ["rules", "host", "progress", "reason"]
    os.execv(sys.executable, [*map(str, command), *snakemake, "--config", f"experiments={path}", *options])


def main(arguments: Sequence[str] | None = None) -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(prog="python -m tcp_core.study.experiments", description="Declared experiments.")
    help = "check: is it right; list: all runs; status: how far it is; estimate: hours of all runs on this device, "
    help += "measured; study: do what is left; run: do one run"
    parser.add_argument("command", choices=("check", "list", "status", "estimate", "study", "run"), help=help)
    parser.add_argument("declaration", help="name of a file in experiments/, or a path that ends in .yaml")
    parser.add_argument("key", nargs="?", help="of the run, for `run`; `list` prints the keys")
    parser.add_argument("--data", help="where the declared images lie")
    parser.add_argument("--weights", help="folder of the weights declared as file:...")
    parser.add_argument("--runs", help="folder of all results (default: build/runs)")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="runs at once, for estimates of time")
    parser.add_argument("--snakemake", default="--cores all", help="options of Snakemake, for `study`")
    given = parser.parse_args(arguments)
    places = {name: getattr(given, name) for name in ("data", "weights", "runs")}
    try:
        if given.command == "study":
            absolute = {name: Path(place).expanduser().absolute() for name, place in places.items() if place}
            options = [f"{name}={place}" for name, place in absolute.items()]
            study(path_of(given.declaration), options, shlex.split(given.snakemake))
        short = given.command in ("status", "estimate", "run")
        declaration = read(given.declaration, **places, places=given.command in ("check", "run"), budgets=not short)
        if given.command == "run":
            if given.key not in declaration.runs:
                parser.error(f"no run {given.key!r} in {given.declaration}; `list` prints the keys")
            execute(declaration, given.key, cores=given.cores)
            return
        if given.command == "estimate":
            print(estimate.table(declaration))
            return
        if given.command == "check":
            print(f"{declaration.path}: {len(declaration.runs)} runs, all as they should be")
            return
        if given.command == "list":
            todo = declaration.todo()
            for key, run in declaration.runs.items():
                state = "left" if key in todo else "skipped" if key in declaration.skipped else "done"
                print(f"{'running' if key in todo and run.is_running() else state:8} {key}")
        print(table(declaration, cores=given.cores))
    except (DeclarationError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
