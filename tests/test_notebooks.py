"""Promises about the notebooks beyond what nbval compares."""

import ast
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import tcp_core as tcp

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def sources(name, **parameters):
    """Return the source of every code cell of a notebook, with these parameters."""
    found = []
    for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells:
        if cell.cell_type == "code":
            given = parameters if "parameters" in cell.metadata.get("tags", []) else {}
            found.append("\n".join([cell.source, *(f"{key} = {value!r}" for key, value in given.items())]))
    return found


def executed(name, out, **parameters):
    """Run a notebook and return the folder it wrote to."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources(name, out=str(out), **parameters)]
    where = {"kernel_name": "python3", "resources": {"metadata": {"path": NOTEBOOKS}}}
    NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120, **where).execute()
    return out


@pytest.mark.medium
def test_running_every_cell_twice_changes_nothing(tmp_path, monkeypatch):
    """Without a kernel, so that nothing is imported anew: the cells have nothing that needs one."""
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    for times in (1, 2):
        given = {"__name__": "__main__"}
        for source in sources("10_run.ipynb", out=str(tmp_path / f"out{times}"), epochs=5):
            for _ in range(times):
                exec(compile(source, "10_run.ipynb", "exec"), given)
    once, twice = tmp_path / "out1", tmp_path / "out2"
    first, second = (list(csv.DictReader((out / "history.csv").read_text().splitlines())) for out in (once, twice))
    assert [row | {"seconds": None} for row in first] == [row | {"seconds": None} for row in second]
    for name in ("trajectory.csv", "widths.csv", "params.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    test_accuracy = [json.loads((out / "metrics.json").read_text())["test_accuracy"] for out in (once, twice)]
    assert test_accuracy[0] == test_accuracy[1]


@pytest.fixture
def cells(monkeypatch):
    """Return a function that executes the first cells of a notebook here, and gives its names."""
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)

    def execute(name, count=None, **parameters):
        given = {"__name__": "__main__"}
        for source in sources(name, **parameters)[:count]:
            exec(compile(source, name, "exec"), given)
        return given

    return execute


@pytest.mark.medium
def test_a_dense_run_needs_no_word_on_budgets(cells, tmp_path):
    cells("10_run.ipynb", method="dense", epochs=1, out=str(tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text())["budget"] is None
    given = json.loads((tmp_path / "params.json").read_text())
    assert (given["macs"], given["params"]) == (0, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"phase_start": 0.3}, "phase_start=0.3 given without phase_end"),
        ({"macs": 0.0}, "method tailored with no budget"),
        ({"prune_at": 0.5}, "only comparators prune"),
        ({"method": "taylor", "restart": True}, "restart=True given without prune_at"),
        ({"skip_corrupt": True}, "skip_corrupt=True and workers=0"),
        ({"method": "fixed_strength"}, "fixed_strength needs"),
    ],
)
def test_a_run_with_contradictions_is_refused_in_its_first_cell(cells, given, words):
    with pytest.raises((AssertionError, ValueError), match=words):
        cells("10_run.ipynb", 2, **given)


@pytest.mark.parametrize(
    ("name", "budgets", "words"),
    [
        ("40_controller.ipynb", "0.7 0.001", "floor"),
        ("60_curve.ipynb", "0.6 0.001", "floor"),
        ("60_curve.ipynb", "0.3 0.6", "largest down"),
        ("60_curve.ipynb", "", "largest down"),
        ("60_curve.ipynb", 0.001, "floor"),  # what `papermill -p budgets 0.001` gives
        ("40_controller.ipynb", "0.5 0.5", "each once"),
        ("40_controller.ipynb", "", "each once"),
        ("40_controller.ipynb", 0.001, "floor"),
    ],
)
def test_budgets_are_refused_before_any_training(cells, monkeypatch, name, budgets, words):
    monkeypatch.setattr(tcp, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises((AssertionError, tcp.BudgetError), match=words):
        cells(name, budgets=budgets)


@pytest.mark.parametrize("given", [{"batches": ""}, {"batches": "0 64"}, {"rounds": 0}])
def test_what_cannot_be_timed_is_refused_in_the_first_cell(cells, given):
    with pytest.raises(AssertionError, match="|".join(given)):
        cells("50_deploy.ipynb", 2, **given)


def test_one_batch_size_may_be_a_number(cells):
    assert cells("50_deploy.ipynb", 2, batches=64)["sizes"] == [64]


@pytest.mark.medium
def test_dense_and_tailored_network_start_alike_and_from_the_seed(cells, monkeypatch):
    starts = []

    def fit(model, *_, **__):
        starts.append(torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()]))
        return SimpleNamespace(model=model, report="")

    monkeypatch.setattr(tcp, "fit", fit)
    for seed in (3, 3, 4):
        cells("50_deploy.ipynb", 3, network="small_resnet", seed=seed)
    first, *others = starts
    assert [torch.equal(first, other) for other in others] == [True, True, True, False, False]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_cell_changes_a_parameter(path):
    """A cell that is run again would work on something else than what was asked for."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    told = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    parameters = {node.target.id for source in told for node in ast.parse(source).body}
    if path.stem == "10_run":
        parameters -= {"macs", "params"}  # set to 0 for the dense method, and told
    for cell in cells:
        if cell.source not in told:
            nodes = ast.walk(ast.parse(cell.source))
            assert not parameters & {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_run_in_two_processes(tmp_path):
    out = executed("10_run.ipynb", tmp_path / "out", epochs=8, batch_size=20, processes=2, tensorboard=True)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["largest_gate_removed"], metrics["images_skipped"]) == (0, 0)
    assert 0.99 < metrics["utilisation"]["macs"] <= 1
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert len(list(csv.DictReader((out / "history.csv").open()))) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_on_a_folder_that_is_decoded_while_training(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "few"
    for part, count in (("train", 110), ("val", 10)):
        for label in range(2):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128, (24, 24, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index:03d}.png")
    (folder / "train" / "class0" / "broken.png").write_bytes(b"no image")
    sized = {"data": str(folder), "size": 16, "workers": 1, "skip_corrupt": True, "val_images": 21}
    recipe = {"epochs": 8, "batch_size": 16, "mixing": "mixup", "label_smoothing": 0.1}
    out = executed("10_run.ipynb", tmp_path / "out", **sized, **recipe)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["images_skipped"] == 1
    assert metrics["test_accuracy"] > 0.9
    assert json.loads((out / "params.json").read_text())["streamed"]
