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
    cost = {"dense_macs": 1000, "dense_params": 100, "macs": 499, "params": 60}
    return dict.fromkeys(results.METRICS) | {"network": "resnet20", "method": "tailored", "seed": 0} | cost | budget


PARAMS = {"network": "resnet20", "method": "tailored", "epochs": 3}


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
    assert {path.name for path in out.iterdir()} == {"params.json", "sessions.json"}


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
    assert {path.name for path in out.iterdir()} == {"params.json", "sessions.json"}


def test_a_dense_run_has_no_trajectory(tmp_path, history, metrics):
    out = results.start_run(tmp_path, {})
    results.finish_run(out, history=history, metrics=metrics, trajectory=pd.DataFrame())
    assert not (out / "trajectory.csv").exists()


def test_read_runs_gives_one_row_per_finished_run(tmp_path, history, metrics):
    for name, epochs in (("b", 2), ("a/deep", 1)):
        out = results.start_run(tmp_path / name, PARAMS | {"epochs": epochs, "params": 0.6})
        results.finish_run(out, history=history, metrics=metrics | {"budget": {"macs": 0.5, "params": 0.6}})
    results.start_run(tmp_path / "unfinished", PARAMS)

    runs = results.read_runs(tmp_path)
    assert list(runs["run"]) == ["a/deep", "b"]
    assert list(runs["param.epochs"]) == [1, 2]
    # the metric `params` is a count, the parameter `params` a budget: they do not collide
    assert list(runs["params"]) == [60, 60]
    assert list(runs["param.params"]) == [0.6, 0.6]
    assert list(runs["budget.macs"]) == [0.5, 0.5]
    assert "budget" not in runs


def test_links_are_followed_and_a_run_counts_once(tmp_path, history, metrics):
    far = tmp_path / "far" / "study"
    results.finish_run(results.start_run(far / "a", PARAMS), history=history, metrics=metrics)
    root = tmp_path / "runs"
    root.mkdir()
    (root / "linked").symlink_to(far)
    assert list(results.read_runs(root)["run"]) == ["linked/a"]
    (root / "once more").symlink_to(far)
    (far / "circle").symlink_to(root)
    assert list(results.read_runs(root)["run"]) == ["linked/a"]


@pytest.mark.parametrize(
    ("params", "changed", "words"),
    [
        ({"network": "resnet56"}, {}, "network is 'resnet56' in params.json and 'resnet20' in metrics.json"),
        ({"method": "taylor"}, {}, "method is 'taylor' in params.json and 'tailored' in metrics.json"),
        ({"seed": 1}, {}, "seed is 1 in params.json and 0 in metrics.json"),
        ({"data": "digits"}, {"dataset": "cifar10"}, "data is 'digits' in params.json and 'cifar10' in metrics.json"),
        ({"macs": 0.3}, {}, r"the budget of macs is 0\.3 in params.json and 0\.5 in metrics.json"),
        ({"macs": 0.5}, {"budget": None}, r"the budget of macs is 0\.5 in params.json and 0 in metrics.json"),
        ({}, {"macs": 501}, r"macs is 50\.10% of the dense network's, which is above the budget of 50\.00%"),
        ({}, {"macs": 1001}, "macs is 1001 of 1000 in the dense network"),
        ({}, {"macs": "many"}, "macs is 'many' of 1000 in the dense network"),
        ({}, {"dense_params": 0}, "params is 60 of 0 in the dense network"),
    ],
)
def test_a_run_that_contradicts_itself_is_named(tmp_path, history, metrics, params, changed, words):
    results.finish_run(results.start_run(tmp_path / "run", PARAMS | params), history=history, metrics=metrics | changed)
    with pytest.raises(ValueError, match=words) as caught:
        results.read_runs(tmp_path)
    assert str(tmp_path / "run") in str(caught.value)


def test_a_run_exactly_at_its_bound_is_read(tmp_path, history, metrics):
    changed = {"budget": {"macs": 0.29}, "dense_macs": 100, "macs": 29}  # 0.29 * 100 is below 29 in floating point
    results.finish_run(results.start_run(tmp_path, PARAMS), history=history, metrics=metrics | changed)
    assert list(results.read_runs(tmp_path)["macs"]) == [29]


def test_params_of_another_program_are_named(tmp_path, history, metrics):
    results.finish_run(results.start_run(tmp_path, {}), history=history, metrics=metrics)
    with pytest.raises(ValueError, match=r"params.json lacks network, method, epochs"):
        results.read_runs(tmp_path)


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
        ({}, "there is no .*params.json"),
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


def test_a_run_of_several_sessions_is_of_the_first_and_says_so(tmp_path, history, metrics, monkeypatch):
    sessions = iter(
        [
            results.environment("cpu") | {"git_commit": commit * 40, "git_dirty": dirty, "started": commit}
            for commit, dirty in (("a", True), ("b", False), ("c", False))
        ]
    )
    monkeypatch.setattr(results, "environment", lambda device=None: next(sessions))
    out = results.start_run(tmp_path / "run", PARAMS)
    checkpoints.prepare(out / results.CHECKPOINTS)
    checkpoints.write(out / results.CHECKPOINTS, 1, {"step": 1})
    results.start_run(out, PARAMS)
    metrics |= {"git_commit": "b" * 40, "git_dirty": False, "started": "b"}
    results.finish_run(out, history=history, metrics=metrics)
    found = results.read_json(out / "metrics.json")
    assert (found["git_commit"], found["git_dirty"], found["started"]) == ("a" * 40, True, "a")
    assert [session["git_commit"][0] for session in found["sessions"]] == ["a", "b"]
    assert not (out / results.SESSIONS).exists()
    results.start_run(out, PARAMS, overwrite=True)  # done anew, not gone on with
    results.finish_run(out, history=history, metrics=metrics)
    found = results.read_json(out / "metrics.json")
    assert found["git_commit"] == "b" * 40
    assert "sessions" not in found
    assert len(results.read_runs(tmp_path)) == 1


def test_checkpoints_stay_for_the_same_run_alone(tmp_path, history, metrics, capsys):
    def left():
        return checkpoints.newest(tmp_path / "run" / results.CHECKPOINTS)

    out = results.start_run(tmp_path / "run", {"seed": 0})
    checkpoints.prepare(out / results.CHECKPOINTS)
    checkpoints.write(out / results.CHECKPOINTS, 1, {"step": 1})
    results.start_run(out, {"seed": 0, "threads": 1})
    results.start_run(out, {"seed": 0, "threads": 2})  # of which it says nothing
    assert left() == {"step": 1}
    assert capsys.readouterr().out == ""
    results.start_run(out, {"seed": 1, "lr": 0.1, "threads": 2})
    assert left() is None
    said = capsys.readouterr().out
    assert "its checkpoints are of other parameters (seed: 0 then, 1 now, lr: not given then, 0.1 now)" in said
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
