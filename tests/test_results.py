import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tcp_core.hardware import device_name
from tcp_core.study import results
from tcp_core.training import checkpoints, frames


@pytest.fixture
def history():
    rows = [[1, 0.1, 2.0, 0.25, 1.75, 1 / 3, 12.5, 1000, 100, 40, 0.0]]
    return pd.DataFrame(rows, columns=list(frames.HISTORY))


@pytest.fixture
def metrics():
    budget = {"budget": {"macs": 0.5}, "utilisation": {"macs": 0.998}}
    return dict.fromkeys(results.METRICS) | {"network": "resnet20", "params": 60} | budget


def test_a_run_is_done_only_when_it_is_finished(tmp_path, history, metrics):
    out = results.start_run(tmp_path / "a" / "run", {"epochs": 3})
    assert not results.is_done(out)
    results.finish_run(out, history=history, metrics=metrics)
    assert results.is_done(out)
    files = {path.name for path in out.iterdir()}
    assert files == {"params.json", "history.csv", "metrics.json"}


def test_metrics_are_put_in_place_last_and_at_once(tmp_path, history, metrics, monkeypatch):
    out = results.start_run(tmp_path, {})
    moved = []

    def replace(source, target):
        moved.append(Path(target).name)
        assert json.loads(Path(source).read_text())["network"] == "resnet20"  # complete already
        assert (out / "history.csv").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("tcp_core.files.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        results.finish_run(out, history=history, metrics=metrics)
    assert moved == ["metrics.json"]
    assert not results.is_done(out)


def test_csv_is_the_same_text_everywhere(tmp_path, history, metrics):
    out = results.start_run(tmp_path, {})
    results.finish_run(out, history=history, metrics=metrics)
    header, row = (out / "history.csv").read_bytes().decode().removesuffix("\n").split("\n")
    assert header == ",".join(frames.HISTORY)
    assert row == "1,0.1,2,0.25,1.75,0.3333333333,12.5,1000,100,40,0"


def test_nan_and_infinity_become_null(tmp_path, history, metrics):
    out = results.start_run(tmp_path, {"lr": float("nan"), "list": [np.float32("inf"), 1]})
    metrics["test_accuracy"] = torch.tensor(float("nan"))
    results.finish_run(out, history=history, metrics=metrics)
    for name in ("params.json", "metrics.json"):
        assert "NaN" not in (out / name).read_text()
        assert "Infinity" not in (out / name).read_text()
    assert json.loads((out / "params.json").read_text()) == {"lr": None, "list": [None, 1]}


def test_numbers_of_numpy_and_torch_and_paths_are_plain_in_json(tmp_path):
    given = {"a": np.int64(3), "b": torch.tensor(2.5), "c": Path("x/y"), "d": (True, None), 5: "e"}
    plain = {"a": 3, "b": 2.5, "c": "x/y", "d": [True, None], "5": "e"}
    out = results.start_run(tmp_path, given)
    assert json.loads((out / "params.json").read_text()) == plain


def test_what_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"params\['net'\]\['layer'\] is a Linear"):
        results.start_run(tmp_path, {"net": {"layer": torch.nn.Linear(1, 1)}})


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path, history, metrics):
    out = results.start_run(tmp_path, {"epochs": 3})
    results.finish_run(out, history=history, metrics=metrics)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        results.start_run(out, {"epochs": 4})
    results.start_run(out, {"epochs": 4}, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["params.json"]


def test_finish_needs_start_and_complete_tables(tmp_path, history, metrics):
    with pytest.raises(FileNotFoundError, match="start_run"):
        results.finish_run(tmp_path, history=history, metrics=metrics)
    out = results.start_run(tmp_path, {})
    with pytest.raises(ValueError, match="history lacks lr, strength"):
        results.finish_run(out, history=history.drop(columns=["lr", "strength"]), metrics=metrics)
    widths = pd.DataFrame({"layer": ["fc"], "dense": [10]})
    with pytest.raises(ValueError, match="widths lacks tailored"):
        results.finish_run(out, history=history, metrics=metrics, widths=widths)
    del metrics["seed"]
    with pytest.raises(ValueError, match="metrics lacks seed"):
        results.finish_run(out, history=history, metrics=metrics)
    assert [path.name for path in out.iterdir()] == ["params.json"]


def test_a_dense_run_has_no_trajectory(tmp_path, history, metrics):
    out = results.start_run(tmp_path, {})
    results.finish_run(out, history=history, metrics=metrics, trajectory=pd.DataFrame())
    assert not (out / "trajectory.csv").exists()


def test_read_runs_gives_one_row_per_finished_run(tmp_path, history, metrics):
    for name, epochs in (("b", 2), ("a/deep", 1)):
        out = results.start_run(tmp_path / name, {"epochs": epochs, "params": 0.6})
        results.finish_run(out, history=history, metrics=metrics)
    results.start_run(tmp_path / "unfinished", {"epochs": 9})

    runs = results.read_runs(tmp_path)
    assert list(runs["run"]) == ["a/deep", "b"]
    assert list(runs["param.epochs"]) == [1, 2]
    # the metric `params` is a count, the parameter `params` a budget: they do not collide
    assert list(runs["params"]) == [60, 60]
    assert list(runs["param.params"]) == [0.6, 0.6]
    assert list(runs["budget.macs"]) == [0.5, 0.5]
    assert "budget" not in runs


def test_read_runs_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished run"):
        results.read_runs(tmp_path / "nowhere")
    (tmp_path / "metrics.json").write_text("")  # as a full disk leaves it
    with pytest.raises(FileNotFoundError, match="No finished run"):
        results.read_runs(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not valid JSON.* Delete .* and do that run again"):
        results.read_runs(tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([], "holds a list"),
        ({"accuracy": 0.5}, "lacks network, dataset"),
        ({"test_accuracy": 93.0}, r"test_accuracy is 93\.0; it must be a share in \[0, 1\]"),
        ({"val_accuracy": "0.9"}, r"val_accuracy is '0\.9'; it must be a share"),
        ({"test_accuracy": None}, "there is no .*params.json"),
    ],
)
def test_results_of_something_else_are_named(tmp_path, metrics, changed, words):
    """`make report` reads all folders, one of which may be foreign."""
    whole = metrics | changed if isinstance(changed, dict) and "accuracy" not in changed else changed
    (tmp_path / "metrics.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=words) as caught:
        results.read_runs(tmp_path)
    assert str(tmp_path / "") in str(caught.value)


def test_environment_has_what_metrics_need(tmp_path):
    environment = results.environment("cpu")
    assert {"versions", "device", "threads", "git_commit", "started"} <= set(environment)
    assert set(environment) - {"git_dirty"} <= set(results.METRICS)
    assert set(environment["versions"]) == {"python", "tcp_core", "torch", "torchvision", "numpy"}
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["device"] == device_name("cpu")
    assert environment["device"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    results.start_run(tmp_path, environment)  # JSON can hold it


def test_environment_without_git(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    environment = results.environment("cpu")
    assert environment["git_commit"] is None
    assert environment["git_dirty"] is None


def test_checkpoints_stay_for_the_same_run_alone(tmp_path, history, metrics):
    def left():
        return checkpoints.newest(tmp_path / "run" / results.CHECKPOINTS)

    out = results.start_run(tmp_path / "run", {"seed": 0})
    checkpoints.prepare(out / results.CHECKPOINTS)
    checkpoints.write(out / results.CHECKPOINTS, 1, {"step": 1})
    results.start_run(out, {"seed": 0})
    assert left() == {"step": 1}
    results.start_run(out, {"seed": 1})
    assert left() is None
    checkpoints.prepare(out / results.CHECKPOINTS)
    checkpoints.write(out / results.CHECKPOINTS, 1, {"step": 1})
    results.finish_run(out, history=history, metrics=metrics)
    assert left() is None


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_run_knows_the_commit_it_was_made_at():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert results.environment("cpu")["git_commit"] == head.stdout.strip()


def test_every_run_of_the_study_was_made_at_a_commit():
    found = [json.loads(path.read_text()) for path in (ROOT / "results" / "runs").rglob("metrics.json")]
    assert len(found) > 50
    assert {(len(str(metrics["git_commit"])), metrics["git_dirty"]) for metrics in found} == {(40, False)}
