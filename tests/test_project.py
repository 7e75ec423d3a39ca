"""Promises about the repository itself: versions, layers, notebooks, results."""

import ast
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import tcp_core

ROOT = Path(__file__).resolve().parents[1]

# The core, in reading order: each part, a file or a folder, imports only parts that stand before it. What surrounds the
# core follows in the same manner: a package imports the core and the packages before it, never what comes after.
CORE = (
    *("cost", "memory", "explanation", "channels", "outputs", "given", "gates", "state", "verification", "carrying"),
    *("removal", "tracing", "maturity", "selection", "complaints", "controller", "preparing", "shrinking", "report"),
    *("packing", "group", "tailor", "files", "storage", "foreign", "nets"),
)
AROUND = ("hardware", "latency", "deploy", "datasets", "training", "study")


def imported(tree, package="tcp_core"):
    """Return the parts of tcp_core that a file of `package` imports, wherever in the file it does.

    `tcp_core` stands for the package itself, whose `__init__` imports everything.
    """
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            # from tcp_core import x: a part, or a name of __init__
            whole = module == "tcp_core"
            names = [f"{module}.{alias.name}" for alias in node.names] if whole else [module]
        for name in names:
            first, *rest = name.split(".")
            if first == "tcp_core":
                found.add(rest[0] if rest else "tcp_core")
    return found


def test_every_part_is_in_the_reading_order():
    parts = {
        path.stem for path in (ROOT / "tcp_core").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == {*CORE, *AROUND}


@pytest.mark.parametrize("name", CORE + AROUND)
def test_a_part_imports_only_what_stands_before_it(name):
    order = CORE + AROUND
    folder = ROOT / "tcp_core" / name
    files = sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]
    package, own = (f"tcp_core.{name}", {name}) if folder.is_dir() else ("tcp_core", set())
    for path in files:
        assert path.exists(), f"{path.name} is missing"
        wrong = imported(ast.parse(path.read_text()), package) - own - set(order[: order.index(name)])
        assert not wrong, f"{name}: {path.name} imports {sorted(wrong)}, not before it in {order}"


@pytest.mark.parametrize(
    ("line", "package", "parts"),
    [
        ("import torch, tcp_core", "tcp_core", {"tcp_core"}),
        ("import tcp_core.cost as c", "tcp_core", {"cost"}),
        ("from tcp_core import fit, cost", "tcp_core", {"fit", "cost"}),
        ("from .cost import Budget", "tcp_core", {"cost"}),
        ("from . import cost", "tcp_core", {"cost"}),
        ("def late():\n    from tcp_core.training.plots import style", "tcp_core", {"training"}),
        ("from torch import nn", "tcp_core", set()),
        ("from . import units", "tcp_core.tracing", {"tracing"}),
        ("from .units import Units", "tcp_core.tracing", {"tracing"}),
        ("from .. import study", "tcp_core.tracing", {"study"}),
        ("from ..study.tables import study", "tcp_core.training", {"study"}),
    ],
)
def test_every_kind_of_import_is_seen(line, package, parts):
    assert imported(ast.parse(line), package) == parts


def required():
    """Return what pyproject.toml asks for, by name: the library's own, and the extras'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [Requirement(text) for texts in project["optional-dependencies"].values() for text in texts]
    return [Requirement(text) for text in project["dependencies"]], extras


def locked():
    """Return the exact versions of constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {requirement.name: re.fullmatch(r"==([\w.]+)", str(requirement.specifier))[1] for requirement in wanted}
    assert len(found) == len(wanted)
    return found


def test_the_version_is_that_of_the_package(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tcp_core.__version__ == project["version"]

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)  # a clone on the path
    assert importlib.reload(tcp_core).__version__ == "unknown"
    monkeypatch.undo()
    importlib.reload(tcp_core)


def test_every_requirement_is_a_range_with_one_exact_version():
    own, extras = required()
    versions = locked()
    assert {requirement.name for requirement in own + extras} == versions.keys()
    for requirement in own + extras:
        assert ">=" in str(requirement.specifier)
        assert "==" not in str(requirement.specifier)
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_make_and_conda_install_the_exact_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (from_pip,) = (entry["pip"] for entry in environment if isinstance(entry, dict))
    assert from_pip == ["--constraint constraints.txt", "--editable .[deploy,study,test]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"python={project['requires-python'].removeprefix('>=')}" in environment
    command = ["make", "--dry-run", "--always-make", "lint"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    versions = locked()
    assert f"pip install torch=={versions['torch']} torchvision=={versions['torchvision']}\n" in said
    assert "pip install --constraint constraints.txt --editable '.[deploy,study,test]'\n" in said


WITHOUT_EXTRAS = """
import sys

blocked = {blocked!r}
sys.modules.update(dict.fromkeys(blocked))  # None: as if not installed
import torch
import tcp_core as tcp
from tcp_core import nets
from tcp_core.datasets import images, streams
from tcp_core.training.watching import Watch

x, y = torch.randn(320, 1, 8, 8), torch.arange(320) % 10
model = nets.small_resnet(widths=(4, 8, 12))
channels = tcp.trace(model, x[:2])
batches = list(zip(x.split(20), y.split(20), strict=True))
with Watch(channels, epochs=6) as watch:
    result = tcp.fit(model, batches, batches[:2], budget={{"macs": 0.5}}, epochs=6, on_epoch=watch.on_epoch)
tcp.save(result.model, sys.argv[1])
tcp.load(nets.small_resnet(widths=(4, 8, 12)), sys.argv[1])
tcp.export(torch.nn.Linear(2, 3), sys.argv[1] + ".pt2", torch.randn(1, 2))
print(len(result.history))
"""
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "torch-pruning": "torch_pruning", "pytest-xdist": "xdist"}


@pytest.mark.medium
def test_the_library_needs_no_extra(tmp_path):
    """`pip install .` brings all that the core, `fit`, `Watch` and torch's archives need; the rest is imported late."""
    own, extras = required()
    names = {requirement.name for requirement in extras} - {requirement.name for requirement in own}
    blocked = {MODULES.get(name, name) for name in names} | {"pytest"}
    command = [sys.executable, "-c", WITHOUT_EXTRAS.format(blocked=blocked), str(tmp_path / "small.safetensors")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1] == "6"


@pytest.mark.parametrize("name", ["cost", "tracing.codes"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"tcp_core.{name}")
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


def notebooks():
    """Yield the name and the code cells of every notebook."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path.name, [cell for cell in cells if cell["cell_type"] == "code"]


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def test_checked_cells_have_outputs_and_count():
    """nbval silently skips a checked cell that was stripped."""
    faults = [
        f"{name}: {''.join(cell['source'])[:60]!r}"
        for name, cells in notebooks()
        for cell in cells
        if tagged(cell, "nbval-check-output") and not (cell["outputs"] and cell["execution_count"])
    ]
    assert not faults, "checked cells without output or count; run and save:\n" + "\n".join(faults)


def test_run_notebooks_are_committed_stripped():
    faults = [
        name
        for name, cells in notebooks()
        if any(tagged(cell, "parameters") for cell in cells)
        and any(
            (cell["outputs"] or cell["execution_count"]) and not tagged(cell, "nbval-check-output") for cell in cells
        )
    ]
    assert not faults, f"strip: jupyter nbconvert --clear-output --inplace {' '.join(faults)}"


def parameter_fault(line):
    """Say what keeps a line of a parameters cell from being `name: type = literal  # comment`."""
    try:
        (statement,) = ast.parse(line).body
        code, comment = line[: statement.end_col_offset], line[statement.end_col_offset :]
    except (SyntaxError, ValueError):
        return "is not one statement on one line"
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return "is not an annotated assignment"
    try:
        value = ast.literal_eval(statement.value)
    except (ValueError, TypeError):
        return f"has no literal value in {code!r}"
    if not isinstance(value, bool | int | float | str | None):
        return "has a value that is not flat"
    if not re.fullmatch(r" +# *\S.*", comment):
        return "lacks a comment behind the value"
    return None


def test_parameters_are_flat_annotated_literals_with_comment():
    """papermill replaces such lines, and a reader learns what each one means."""
    faults = [
        f"{name}: {line!r} {fault}"
        for name, cells in notebooks()
        for cell in cells
        if tagged(cell, "parameters")
        for line in "".join(cell["source"]).splitlines()
        if line.strip() and not line.startswith("#") and (fault := parameter_fault(line))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('data: str = "digits"  # name or folder', None),
        ("macs: float | None = 0.5  # of the dense network's", None),
        ("shift: int = -1  # may be negative", None),
        ("lr: float = 0.1", "comment"),
        ("lr: float = 0.1  #", "comment"),
        ("lr = 0.1  # learning rate", "annotated"),
        ("lr: float  # learning rate", "literal"),
        ("lr: float = 0.1 * 3  # learning rate", "literal"),
        ("widths: tuple = (1, 2)  # of each layer", "flat"),
        ("lr: float = (", "one statement"),
        ("a: int = 1; b: int = 2  # two", "one statement"),
    ],
)
def test_parameter_fault(line, fault):
    found = parameter_fault(line)
    assert found is fault is None or fault in found


def test_no_tracked_file_is_large():
    # safe.directory: in a container the checkout may belong to somebody else
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.split("\0") if name]
    large = [str(path) for path in paths if path.is_file() and path.stat().st_size > 1_000_000]
    assert not large, f"over 1 MB: {large}"


def test_committed_runs_are_complete():
    runs = ROOT / "results" / "runs"
    folders = {path.parent for name in ("params", "metrics") for path in runs.rglob(f"{name}.json")}
    faults = [
        f"{folder.relative_to(ROOT)} lacks {name}"
        for folder in sorted(folders)
        for name in ("params.json", "history.csv", "metrics.json")
        if not (folder / name).exists()
    ]
    assert not faults, "\n".join(faults)


def test_committed_runs_say_what_made_them():
    for path in sorted((ROOT / "results" / "runs").rglob("metrics.json")):
        metrics = read_json(path)
        assert {"python", "torch", "torchvision", "numpy"} <= metrics["versions"].keys(), path
        assert metrics["device"], path
        assert re.fullmatch("[0-9a-f]{40}", metrics["git_commit"]), path
        assert metrics["git_dirty"] is False, path


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
