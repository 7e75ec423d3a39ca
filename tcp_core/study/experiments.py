"""Declared experiments on the command line: what they are, how far they are, and one run executed.

`python -m tcp_core.study.experiments --help` lists the commands; `make study` and the Snakefile call them. The
declarations themselves are read by `tcp_core.study.reading`.
"""

import argparse
import fcntl
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
import psutil
import torch
from jupyter_client import AsyncKernelManager

from ..training.evaluation import slow_here
from . import estimate
from .declaration import LOCK, Declaration, DeclarationError, Run, path_of
from .reading import read
from .results import CHECKPOINTS, read_json


def execute(declaration: Declaration, key: str, *, cores: int = 1, before: float = 0.0) -> None:
    """Execute one run, unless it is done, and print a line when it starts and one when it ends.

    Only one process at a time executes a run: another one waits, and then finds it done. The executed notebook, and as
    a log what it prints, go to `declaration.executed`. For the estimate: `cores`, how many runs go on at once, and
    `before`, seconds that this process took until now.
    Raises RuntimeError, with the place and the end of the log, if the notebook fails or leaves no finished run.
    """
    run = declaration.runs[key]
    notebook = declaration.executed / f"{key}.ipynb"
    log = notebook.with_suffix(".log")
    notebook.parent.mkdir(parents=True, exist_ok=True)
    with _locked(run) as (lock, waited):
        if key not in declaration.todo():
            how = " (by another process)" if waited else f" already; to do it again, delete {run.folder}"
            skipped = declaration.skipped.get(key)
            print(f"skipped  {key}: {skipped}" if skipped else f"done     {key}{how}", flush=True)
            return
        print(f"start    {key}   log: {log}", flush=True)
        started, resumed = time.perf_counter(), (run.folder / CHECKPOINTS).exists()
        with log.open("w", encoding="utf-8") as stream:
            try:
                papermill.execute_notebook(
                    *(*map(_unformatted, (declaration.notebook, notebook)), run.params),
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
        took = before + time.perf_counter() - started
        if not resumed:  # else it is the time of the rest alone
            notebook.with_suffix(".seconds").write_text(f"{took:.1f}", encoding="utf-8")
        (run.folder / LOCK).unlink()  # whoever still waits for it finds the run done
    print(f"done     {key} in {_duration(took)}   {_progress(declaration, cores)}", flush=True)


def _unformatted(path: Path) -> str:
    """Return a path as papermill has to be given it, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _locked(run: Run) -> Iterator[tuple[int, bool]]:
    """Hold the run's lock; gives its file descriptor, and whether another process had it first."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        file = open(run.folder / LOCK, "a")
    except OSError as error:
        raise RuntimeError(
            f"FAILED   {run.key}: {run.folder} cannot be written ({error}); give another RUNS="
        ) from error
    with file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            print(f"wait     {run.key}: another process executes it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno(), waited


def _kernel_of(lock: int, log: TextIO) -> type[AsyncKernelManager]:
    """Return a manager of kernels of this interpreter that hold the lock as well and complain in the log.

    A kernel outlives its killed parent by a second or more, in which it still writes; until then the run is not free.
    """

    # networks of one's own are found there, as when a declaration is read; papermill goes to the notebook's folder
    folder = os.getcwd()

    class Manager(AsyncKernelManager):
        def format_kernel_cmd(self, *arguments, **options) -> list[str]:
            return [sys.executable, *super().format_kernel_cmd(*arguments, **options)[1:]]

        async def start_kernel(self, **options) -> None:
            env = dict(options.pop("env", None) or os.environ)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")]))
            await super().start_kernel(pass_fds=[lock], stderr=log, env=env, **options)

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = sorted({run.values.get("precision", "fp32") for run in declaration.todo().values()})
    lines += [f"slow: {said}" for precision in precisions if (said := slow_here(precision, device))]
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
    """Estimate the time until `runs` are done, from the finished ones.

    A run takes as long as those of the same network and epochs took by the clock; where there is none, the seconds of
    training an epoch of the same network, else of any, and what runs take beside training: to start Python and the
    notebook, to read images and trace, to validate and test, to draw. In short runs that is most of it.
    """
    todo = [run for key, run in declaration.todo().items() if run in runs]
    finished = [run for run in declaration.runs.values() if run.is_done()]
    times = [(run, *_seconds(declaration, run)) for run in finished]
    times = [entry for entry in times if entry[1]]
    if not todo:
        return "-"
    if not times:
        return "unknown until a run has ended"
    seconds = {}
    for run in todo:
        network, epochs = (run.values.get(name) for name in ("network", "epochs"))
        same = [entry for entry in times if entry[0].values.get("network") == network] or times
        alike = [wall for other, _, wall in same if wall and other.values.get("epochs") == epochs]
        if same is times or not alike:
            rate = statistics.median(training / other.values.get("epochs", 1) for other, training, _ in same)
            beside = [wall - training for _, training, wall in times if wall]
            alike = [rate * run.values.get("epochs", 1) + (statistics.median(beside) if beside else 0)]
        # half way, for want of better knowledge
        seconds[run.key] = statistics.median(alike) * (0.5 if run.is_running() else 1)
    # a run waits for the one it starts from, and one with several threads takes the place of as many
    chains = [seconds[run.key] + seconds.get(run.needs, 0) for run in todo]
    threads = (min(run.values.get("threads") or 1, cores) for run in todo)
    together = sum(seconds[run.key] * count for run, count in zip(todo, threads, strict=True)) / cores
    return f"about {_duration(max(together, *chains))}"


def _seconds(declaration: Declaration, run: Run) -> tuple[float | None, float | None]:
    """Return how long a finished run trained, and how long it took by the clock, None where it is not known."""
    training = read_json(run.folder / "metrics.json").get("seconds_train")
    file = declaration.executed / f"{run.key}.seconds"
    return training, float(file.read_text(encoding="utf-8")) if file.is_file() else None


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
    if given.cores < 1:
        parser.error(f"--cores {given.cores} given; it must be 1 or more, or not be given for all of this machine's")
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
            before = time.time() - psutil.Process().create_time()
            execute(declaration, given.key, cores=given.cores, before=before)
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
