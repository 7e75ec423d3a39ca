"""A declaration that was found right, and the runs that it stands for; `reading` makes it of a YAML file."""

import fcntl
from dataclasses import dataclass
from pathlib import Path

from . import results

BUDGETS = ("macs", "params")
PLACES = {"data": "the key `data` of the declaration and DATA=...", "out": "RUNS=..."}
HOW = ("checkpoint_every", "workers", "tensorboard")  # not recorded, for results do not depend on how much they are
NETWORK, WIDTHS, LOCK = "network.safetensors", "widths.csv", ".lock"
STARTS = ("weights", "widths_of")  # parameters that may name another run
FORMER = {"phase_start": 0.02, "phase_end": 0.15}  # defaults that the run notebook had when committed runs were made


class DeclarationError(ValueError):
    """All that is wrong with a declaration; `problems` has one text for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n- ".join([f"{len(problems)} problem(s), nothing was run:", *problems]))


@dataclass(frozen=True)
class Run:
    """One declared run.

    key: `<experiment>/<what tells it from the others>`; declared: the values it was declared with; values: these and
    the notebook's defaults; params: what the notebook is given, with the places of this machine; folder: of its
    results; needs: key of the run whose network it starts from, or whose widths it has, or None.
    """

    key: str
    declared: dict
    values: dict
    params: dict
    folder: Path
    needs: str | None

    @property
    def needed_file(self) -> str:
        """The file of the run in `needs` that this one reads."""
        return WIDTHS if self.declared.get("widths_of") else NETWORK

    def is_done(self) -> bool:
        """Say whether its results are there."""
        return results.is_done(self.folder)

    def is_running(self) -> bool:
        """Say whether a process holds its lock."""
        try:
            with open(self.folder / LOCK) as file:  # to look at another's results takes no leave to write
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError) as error:
            return isinstance(error, BlockingIOError)
        return False

    def budget(self) -> dict[str, float]:
        """Return the costs that are bounded, as fractions of the dense network's."""
        return {name: self.values[name] for name in BUDGETS if self.values.get(name)}

    def disagreements(self) -> list[str]:
        """Say in what its finished results differ from what is declared; places of other machines do not count.

        What is not declared has the notebook's default, or had the one of then.
        """
        try:
            results.read_json(self.folder / "metrics.json")
            recorded = results.read_json(self.folder / "params.json")
        except ValueError as error:
            return [str(error)]
        faults = []
        todo = "rename or delete that folder, or choose another place with RUNS=..."
        for name, value in self.declared.items():
            if name in HOW:
                continue
            there = recorded.get(name, "nothing")
            if name in STARTS and value:  # recorded as file and its folder, which is another one on each machine
                value = "/".join(Path(self.params[name]).parts[-2:]) if self.needs else value.removeprefix("file:")
                parts = min(value.count("/"), str(there).count("/")) + 1
                value, there = ("/".join(str(each).split("/")[-parts:]) for each in (value, there))
            if there != value:
                faults.append(
                    f"{self.folder}: {name} is {value!r} in the declaration and {there!r} in the finished run's "
                    f"params.json; {todo}"
                )
        for name, value in self.values.items():
            there = recorded.get(name, value)
            if name not in (*self.declared, *HOW) and there not in (value, FORMER.get(name, value)):
                faults.append(
                    f"{self.folder}: {name} is not declared, so {value!r}, and {there!r} in the finished run's "
                    f"params.json; declare it, or {todo}"
                )
        if "workers" in self.values and bool(self.values["workers"]) != bool(recorded.get("streamed")):
            faults.append(
                f"{self.folder}: workers is {self.values['workers']}, and the finished run "
                f"{'streamed its images' if recorded.get('streamed') else 'held its images in memory'}, which are not "
                f"augmented alike; {todo}"
            )
        weights = Path(self.params.get("weights") or "published")
        if (known := recorded.get("weights_sha256")) and weights.is_file() and results.sha256(weights) != known:
            faults.append(f"{self.folder}: the finished run started from other weights than those in {weights}; {todo}")
        return faults


@dataclass(frozen=True)
class Declaration:
    """A declaration that was found right: its data and their folder, its runs by key, what this machine lacks to
    execute them, and, by key, why runs of a library that is not installed are skipped.
    """

    path: Path
    notebook: Path
    data: str
    images: Path | None
    runs: dict[str, Run]
    missing: list[str]
    skipped: dict[str, str]

    @property
    def executed(self) -> Path:
        """Folder of the executed notebooks and their logs."""
        return project_of(self.path) / "build" / "executed" / self.path.stem

    def todo(self) -> dict[str, Run]:
        """Return the runs that are not done, and those done whose network is gone but needed by one that is not."""
        found = {key for key, run in self.runs.items() if not run.is_done() and key not in self.skipped}
        waiting = list(found)
        while waiting:
            run = self.runs[waiting.pop()]
            needed, file = run.needs, run.needed_file
            if needed and needed not in found and not (self.runs[needed].folder / file).exists():
                found.add(needed)
                waiting.append(needed)
        return {key: run for key, run in self.runs.items() if key in found}


def path_of(name: str | Path) -> Path:
    """Return the file of a declaration that is given as path or as name."""
    return Path(name if str(name).endswith(".yaml") else f"experiments/{name}.yaml").absolute()


def project_of(path: Path) -> Path:
    """Return the folder that holds the folder of declarations."""
    return path.parent.parent
