"""Promises about the notebooks beyond what nbval compares."""

import csv
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def executed(name, tmp_path, *, times, **parameters):
    """Run a notebook with every code cell ``times`` times in a row, and return the folder it wrote to."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    out = tmp_path / f"out{times}"
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if "parameters" in cell.metadata.get("tags", []):
                overrides = parameters | {"out": str(out)}
                cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in overrides.items())
            cells += [nbformat.v4.new_code_cell(cell.source) for _ in range(times)]
    notebook.cells = cells
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}).execute()
    return out


@pytest.mark.filterwarnings("ignore")  # of the kernel's and the client's own machinery
def test_running_every_cell_twice_changes_nothing(tmp_path):
    once, twice = (executed("10_run.ipynb", tmp_path, times=times, epochs=5) for times in (1, 2))
    first, second = (list(csv.DictReader((out / "history.csv").open())) for out in (once, twice))
    assert [row | {"seconds": None} for row in first] == [row | {"seconds": None} for row in second]
    for name in ("trajectory.csv", "widths.csv", "params.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    test_accuracy = [json.loads((out / "metrics.json").read_text())["test_accuracy"] for out in (once, twice)]
    assert test_accuracy[0] == test_accuracy[1]
