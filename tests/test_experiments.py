"""Declarations: what they stand for, every kind of refusal, and studies that are killed and started again."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tcp_core import nets
from tcp_core.study import comparators, estimate, experiments, places
from tcp_core.study.declaration import DeclarationError
from tcp_core.study.reading import read

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = """
network: str = "small_resnet"  # name
data: str = "digits"  # name or folder
method: str = "tailored"  # how
macs: float = 0.5  # budget
params: float = 0.0  # budget
epochs: int = 2  # passes
lr: float = 0.1  # rate
seed: int = 0  # of everything
weights: str = ""  # start
widths_of: str = ""  # another run
prune_at: float = 0.0  # share
restart: bool = False  # of the schedule
phase_start: float = 0.0  # share
phase_end: float = 0.0  # share
val_images: int = 180  # held out
size: int = 0  # side
warmup: float = 0.05  # share
mixing: str = "none"  # of batches
workers: int = 0  # that decode
skip_corrupt: bool = False  # images
processes: int = 1  # of a run
sync_batch_norm: bool = False  # over them
threads: int = 0  # of the CPU
batch_size: int = 64  # images a step
precision: str = "fp32"  # of numbers
fail: bool = False  # on purpose
out: str = "../build/runs/fake"  # folder
"""
# what a run does, in a second: its result depends on its parameters and its start alone
BODY = """
import json, pathlib, time
folder = pathlib.Path(out)
(folder / "metrics.json").unlink(missing_ok=True)
given = {"network": network, "data": pathlib.Path(data).name, "method": method, "macs": macs, "params": params}
given |= {"epochs": epochs, "lr": lr, "seed": seed, "weights": "/".join(pathlib.Path(weights).parts[-2:])}
given |= {"widths_of": "/".join(pathlib.Path(widths_of).parts[-2:])}
(folder / "params.json").write_text(json.dumps(given | {"restart": restart, "fail": fail}))
with (folder.parent / "began.txt").open("a") as began:
    print(folder.name, file=began)
start = pathlib.Path(weights).read_text() if weights else "nothing"
start = (pathlib.Path(widths_of) / "widths.csv").read_text() if widths_of else start
for epoch in range(epochs):
    print("epoch", epoch + 1, flush=True)
    time.sleep(0.3)
    assert not fail, "failed on purpose"
(folder / "network.safetensors").write_text(f"{start}, then {network} {method} {seed}")
(folder / "widths.csv").write_text(f"widths of {method} {macs}")
(folder / "metrics.json").write_text(json.dumps({"start": start, "seed": seed, "seconds_train": epochs * 0.3}))
"""
SMALL = """
data: digits
notebook: fake
experiments:
  start:
    grid: {method: dense, seed: [0, 1]}
  from_start:
    fixed: {epochs: 3}
    grid: {method: taylor, macs: [0.5], seed: [0, 1], weights: "run:start/dense-seed{seed}"}
  scratch:
    grid: {macs: [0.5, 0.25]}
"""


@pytest.fixture
def project(tmp_path):
    """Return a function that writes a declaration beside a notebook that takes a second, and gives its path."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "Snakefile", tmp_path)
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in (PARAMETERS, BODY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "fake.ipynb")

    def declare(text=SMALL, name="small"):
        path = tmp_path / "experiments" / f"{name}.yaml"
        path.write_text(text)
        return path

    return declare


def finished(run, **changed):
    """Make the results of a run, as its notebook would."""
    run.folder.mkdir(parents=True, exist_ok=True)
    weights = "/".join(Path(run.params.get("weights", "")).parts[-2:])
    params = run.declared | {"weights": weights, "data": Path(run.params["data"]).name} | changed
    (run.folder / "params.json").write_text(json.dumps(params))
    (run.folder / "metrics.json").write_text(json.dumps({"seconds_train": 60.0}))


def problems(path, **options):
    with pytest.raises(DeclarationError) as caught:
        read(path, **options)
    return caught.value.problems


# Networks of others


def test_networks_of_others_are_declared_by_name(project, tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text("from tcp_core.nets import small_resnet as net\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    grid = "{network: ['own_nets:net', small_resnet, 'torchvision:squeezenet1_1'], macs: [0.5]}"
    runs = read(project(declared(f"a: {{grid: {grid}}}")), budgets=False).runs
    names = ("own_nets-net", "small_resnet", "torchvision-squeezenet1_1")
    assert list(runs) == [f"a/{name}-macs0.5" for name in names]
    assert runs["a/own_nets-net-macs0.5"].params["network"] == "own_nets:net"
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)


@pytest.mark.medium
def test_a_kernel_finds_what_its_parents_folder_has(project, tmp_path):
    lines = ("def net(**options):", "    from tcp_core import nets", "    return nets.small_resnet(**options)")
    (tmp_path / "own_nets.py").write_text("\n".join(lines))  # imports nothing where the network is not made
    path = project(declared("a: {fixed: {network: 'own_nets:net'}, grid: {macs: [0.5]}}"))
    notebook = nbformat.read(tmp_path / "notebooks" / "fake.ipynb", as_version=4)
    notebook.cells[1].source = "import own_nets\n" + notebook.cells[1].source
    nbformat.write(notebook, tmp_path / "notebooks" / "fake.ipynb")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    where = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    told = subprocess.run(command(path, "run", "a/macs0.5"), check=False, **where)
    assert told.returncode == 0, told.stdout + told.stderr


# How long it takes


def left(declaration, cores=1):
    return experiments.table(declaration, cores=cores).splitlines()[-1].split("  ")[-1]


def taken(declaration, run, seconds):
    clock = declaration.executed / f"{run.key}.seconds"
    clock.parent.mkdir(parents=True, exist_ok=True)
    clock.write_text(str(seconds))


def test_the_time_left_is_that_of_the_clock(project):
    """Runs train for 60 s, and take 300 s by the clock: in short runs most is kernel, tracing, images and figures."""
    declaration = read(project(declared("a: {fixed: {macs: 0.5}, grid: {seed: [0, 1, 2, 3]}}")), budgets=False)
    assert left(declaration) == "unknown until a run has ended"
    first = declaration.runs["a/seed0"]
    finished(first)
    assert left(declaration) == "about 3 min"  # all that is known: 3 x 60 s
    taken(declaration, first, 300.0)
    assert left(declaration) == "about 15 min"
    assert left(declaration, cores=3) == "about 5 min"


def test_what_a_run_takes_beside_training_counts_for_other_lengths(project):
    text = (
        "a: {fixed: {macs: 0.5, epochs: 4}, grid: {seed: [0]}}, b: {fixed: {macs: 0.5, epochs: 8}, grid: {seed: [0]}}"
    )
    declaration = read(project(declared(text)), budgets=False)
    finished(declaration.runs["a/seed0"])
    taken(declaration, declaration.runs["a/seed0"], 300.0)
    assert left(declaration) == "about 6 min"  # 8 epochs of 15 s, and 240 s beside


def test_runs_with_threads_and_runs_that_wait_take_longer(project):
    text = declared("a: {fixed: {macs: 0.5}, grid: {seed: [0, 1, 2]}}", fixed="{threads: 2}")
    declaration = read(project(text), budgets=False)
    finished(declaration.runs["a/seed0"])
    assert left(declaration, cores=4) == "about 60 s"
    assert left(declaration, cores=2) == left(declaration, cores=1) == "about 2 min"
    text = "start: {grid: {method: dense}}, rest: {grid: {macs: [0.5], weights: 'run:start/dense'}}, "
    declaration = read(project(declared(text + "other: {grid: {macs: [0.5]}}"), name="waiting"), budgets=False)
    finished(declaration.runs["other/macs0.5"])
    assert left(declaration, cores=8) == "about 2 min"


@pytest.mark.parametrize("kernels", [False, True])
def test_runs_in_a_precision_that_is_slow_here_are_told(project, kernels, monkeypatch):
    monkeypatch.setattr("tcp_core.training.evaluation.has_bf16_kernels", lambda device: kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    declaration = read(project(declared(fixed="{precision: bf16}")), budgets=False)
    said = experiments.table(declaration, cores=1)
    assert ("slow: precision='bf16' on this CPU" in said) is not kernels
    finished(declaration.runs["a/macs0.5"])
    assert "slow:" not in experiments.table(declaration, cores=1)


# What a declaration stands for


def test_keys_folders_and_parameters(project):
    runs = read(project()).runs
    assert list(runs) == [
        *("start/dense-seed0", "start/dense-seed1"),
        *("from_start/taylor-macs0.5-seed0", "from_start/taylor-macs0.5-seed1"),
        *("scratch/macs0.5", "scratch/macs0.25"),
    ]
    run = runs["from_start/taylor-macs0.5-seed1"]
    folder = project().parent.parent / "build" / "runs" / "small"
    assert (run.folder, run.needs) == (folder / run.key, "start/dense-seed1")
    assert run.params == {
        **{"method": "taylor", "macs": 0.5, "params": 0.0, "epochs": 3, "seed": 1, "data": "digits"},
        **{"weights": str(folder / "start/dense-seed1/network.safetensors"), "out": str(folder / run.key)},
    }


@pytest.mark.medium
def test_a_run_may_have_the_widths_of_another(project):
    text = "a: {grid: {macs: [0.5, 0.4]}}, "
    text += "b: {fixed: {method: small, widths_of: 'run:a/macs{macs}'}, grid: {macs: [0.5, 0.4]}}"
    declaration = read(project(declared(text)))
    run = declaration.runs["b/macs0.4"]
    assert run.needs == "a/macs0.4"
    assert run.params["widths_of"] == str(declaration.runs["a/macs0.4"].folder)
    experiments.execute(declaration, "a/macs0.4")
    (declaration.runs["a/macs0.4"].folder / "network.safetensors").unlink()  # its widths are all that is read
    experiments.execute(declaration, "b/macs0.4")
    assert json.loads((run.folder / "metrics.json").read_text())["start"] == "widths of tailored 0.4"
    assert set(read(project(declared(text))).todo()) == {"a/macs0.5", "b/macs0.5"}


def test_a_budget_that_is_not_declared_is_none(project):
    runs = read(project("{data: digits, notebook: fake, experiments: {a: {grid: {params: [0.5]}}}}")).runs
    assert runs["a/params0.5"].budget() == {"params": 0.5}


@given(st.permutations(["network: [small_resnet, resnet20]", "macs: [1, 0.5]", "seed: [0, 1]", "fail: [true, false]"]))
def test_keys_do_not_depend_on_the_order_of_the_file(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    (folder / "notebooks").mkdir()
    (folder / "experiments").mkdir()
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebooks" / "fake.ipynb")
    path = folder / "experiments" / "x.yaml"
    path.write_text(f"{{data: digits, notebook: fake, experiments: {{a: {{grid: {{{', '.join(order)}}}}}}}}}")
    keys = read(path, budgets=False).runs.keys()
    assert len(keys) == 16
    assert {"a/small_resnet-macs1-seed0-fail", "a/resnet20-macs0.5-seed1-no-fail"} <= keys


def test_what_is_done_is_not_to_do_unless_its_network_is_gone_and_needed(project):
    runs = read(project()).runs
    finished(runs["start/dense-seed0"])
    finished(runs["scratch/macs0.5"])
    declaration = read(project())
    assert runs.keys() - declaration.todo().keys() == {"scratch/macs0.5"}
    (runs["start/dense-seed0"].folder / "network.safetensors").touch()
    assert runs.keys() - declaration.todo().keys() == {"scratch/macs0.5", "start/dense-seed0"}
    (runs["start/dense-seed0"].folder / "network.safetensors").unlink()
    finished(runs["from_start/taylor-macs0.5-seed0"])
    assert "start/dense-seed0" not in read(project()).todo()


# Refusals


def declared(experiments="a: {grid: {macs: [0.5]}}", **changed):
    lines = {"data": "digits", "notebook": "fake", "experiments": f"{{{experiments}}}"} | changed
    return "\n".join(f"{key}: {value}" for key, value in lines.items() if value is not None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: [", ["not valid YAML"]),
        ("- a list", ["data, notebook: None given", "experiments: None given"]),
        (declared("a: {grid: {seed: 0, seed: 1}}"), ["'seed' stands twice"]),
        (declared(notebok="fake"), ["notebok: unknown key (did you mean notebook?)", "data, notebook, experiments"]),
        (declared(data=None), ["data: None given"]),
        (declared(data=7), ["data: 7 given"]),
        (declared(notebook="fak"), ["there is no", "did you mean fake?"]),
        (declared(fixed="{epocs: 3}"), ["fixed.epocs: unknown parameter (did you mean epochs?)", "network, method"]),
        (declared("a: {grid: {sead: [1]}}"), ["experiments.a.grid.sead: unknown parameter (did you mean seed?)"]),
        (declared("a: {grid: {}, gird: 1}"), ["experiments.a:", "fixed, grid or both"]),
        (declared("a/b: {grid: {seed: 1}}"), ["experiments.a/b:", "letters"]),
        (declared("..: {grid: {seed: 1}}"), ["experiments...:", "not dots alone"]),
        (declared("a: {grid: []}"), ["experiments.a.grid: an empty list makes no run"]),
        (declared("a: {grid: [{seed: 1}, 3]}"), ["experiments.a.grid[1]: 3 given"]),
        (declared("a: {grid: {seed: []}}"), ["experiments.a.grid.seed: an empty list"]),
        (declared("a: {fixed: {seed: 1}, grid: {seed: [1]}}"), ["a.grid.seed: stands in experiments.a.fixed too"]),
        (declared(fixed="{data: digits}"), ["fixed.data: 'digits' given; this is set by"]),
        (declared(fixed="{epochs: true}"), ["fixed.epochs: True given; it must be of type int"]),
        (declared(fixed="{epochs: 2.0}"), ["fixed.epochs: 2.0 given; it must be of type int"]),
        (declared(fixed="{restart: 1}"), ["fixed.restart: 1 given; it must be of type bool"]),
        (declared(fixed="{lr: 5e-4}"), ["fixed.lr: '5e-4' given; it must be of type float", "5.0e-4"]),
        (declared(fixed="{seed: [1, 2]}"), ["fixed.seed: [1, 2] given; it must be of type int"]),
        (declared(fixed="{epochs: 0}"), ["fixed.epochs: 0 given; it must be at least 1"]),
        (declared(fixed="{lr: .inf}"), ["fixed.lr: inf given; it must be at least 0"]),
        (declared(fixed="{warmup: 1.0}"), ["fixed.warmup: 1.0 given; it must be in [0, 1)"]),
        (declared(fixed="{mixing: cutmx}"), ["it must be one of none, mixup, cutmix (did you mean cutmix?)"]),
        (declared(fixed="{processes: 0}"), ["fixed.processes: 0 given; it must be at least 1"]),
        (declared(fixed="{workers: 2}"), ["workers=2 given", "digits needs 0"]),
        (declared(data="pictures", fixed="{workers: 2}"), ["workers=2 and size=0 given"]),
        (declared(data="imagenet"), ["workers=0 given", "imagenet needs at least 1"]),
        (declared(fixed="{skip_corrupt: true}"), ["skip_corrupt=True and workers=0 given"]),
        (declared(fixed="{sync_batch_norm: true}"), ["sync_batch_norm=True and processes=1 given"]),
        (declared(fixed="{phase_start: 0.3}"), ["a/macs0.5: phase_start=0.3 given without phase_end"]),
        (declared(fixed="{phase_start: 0.9, phase_end: 0.1}"), ["the end must be larger than the start"]),
        (declared(fixed="{phase_start: 1.0}"), ["fixed.phase_start: 1.0 given; it must be in [0, 1)"]),
        (
            declared("a: {grid: {method: taylor, macs: [0.5], phase_end: [0.3]}}"),
            ["phase_start=0.0 and phase_end=0.3 with method taylor given; only tailored has a phase"],
        ),
        (declared(fixed="{prune_at: 0.5}"), ["prune_at=0.5 with method tailored given; only comparators prune"]),
        (
            declared("a: {grid: {method: dense, prune_at: [0.5]}}"),
            ["prune_at=0.5 with method dense given; only comparators prune"],
        ),
        (
            declared("a: {grid: {method: taylor, macs: [0.5]}}", fixed="{restart: true}"),
            ["a/taylor-macs0.5: restart=True given without prune_at"],
        ),
        (declared(fixed="{restart: true}"), ["restart=True with method tailored given", "so leave it out"]),
        (declared(fixed="{size: 16}"), ["size=16 given, to which the images of a folder are resized; digits needs 0"]),
        (declared(data="cifar10", fixed="{val_images: 0}"), ["val_images=0 given, which leaves no images to choose"]),
        (declared(fixed="{processes: 20}"), ["batch_size=64 times processes=20 given, which is more than the 1257"]),
        (
            declared(
                "a: {fixed: {method: dense, val_images: 100}}, b: {grid: {macs: [0.5], weights: 'run:a/run'}}",
                data="pictures",
            ),
            ["b/macs0.5: weights: 'run:a/run' has val_images=100, so it trains on images that this run, with 180"],
        ),
        (
            declared(data="cifar10", fixed="{val_images: 50000}"),
            ["val_images=50000 given, which leaves none of the 50000 images of cifar10"],
        ),
        (declared(fixed="{batch_size: 2000}"), ["batch_size=2000 given, which is more than the 1257 images"]),
        (declared(fixed="{weights: published}"), ["weights: there are none published for small_resnet"]),
        (
            declared(fixed="{network: resnet2}"),
            ["network: 'resnet2' given; it must be one of densenet40_12, googlenet", 'or "timm:NAME", "torchvision:'],
        ),
        (
            declared(fixed="{network: 'no_such_package:net'}"),
            ["network: 'no_such_package:net' given", "there is no no_such_package: install it"],
        ),
        (declared(fixed="{network: 'torchvision:resnet19'}"), ["torchvision has no classifier 'resnet19'"]),
        (declared("a: {grid: {method: [tailord]}}"), ["it must be one of tailored, dense, ", "did you mean tailored?"]),
        (declared("a: {grid: {macs: [1.5]}}"), ["experiments.a.grid.macs: 1.5 given; it must be in [0, 1]"]),
        (declared("a: {grid: {macs: [-0.5]}}"), ["-0.5 given"]),
        (declared("a: {grid: {macs: [.nan]}}"), ["nan given"]),
        (declared("a: {grid: {macs: [0.0001]}}"), ["a/macs0.0001: the macs budget of 74", "floor", "macs >= 2370"]),
        (
            declared("a: {grid: {method: dense, macs: [0.5]}}"),
            ["a/dense-macs0.5: method dense with {'macs': 0.5} given"],
        ),
        (declared("a: {grid: {method: taylor}}"), ["a/taylor: method taylor with no budget given"]),
        (
            declared("a: {grid: {method: fixed_strength, macs: [0.5]}}"),
            ["a/fixed_strength-macs0.5: fixed_strength needs"],
        ),
        (declared("a: {grid: [{macs: [0.5]}, {macs: [0.5]}]}"), ["a/macs0.5: two runs have this key"]),
        (declared("a: {grid: {weights: x.safetensors, macs: [0.5]}}"), ["weights: 'x.safetensors' given", '"run:<key']),
        (declared('a: {grid: {weights: "run:{ned}", macs: [0.5]}}'), ["a/macs0.5: weights 'run:{ned}': 'ned'"]),
        (declared("a: {grid: {weights: 'run:b/x', macs: [0.5]}}"), ["a/macs0.5: weights: there is no run 'b/x'"]),
        (declared("a: {grid: {weights: 'run:a/dense', method: dense}}"), ["a/dense: weights: 'run:a/dense'", "circle"]),
        (
            declared(
                "a: {grid: {weights: 'run:b/dense', method: dense}}, b: {grid: {weights: 'run:a/dense', method: dense}}"
            ),
            [
                "a/dense: weights: 'run:b/dense' leads in a circle",
                "b/dense: weights: 'run:a/dense' leads in a circle",
            ],
        ),
        (
            declared("a: {fixed: {network: resnet20, method: dense}}, b: {grid: {weights: 'run:a/run', macs: [0.5]}}"),
            ["gives a dense resnet20; a dense small_resnet is needed"],
        ),
        (
            declared("a: {grid: {macs: [0.5]}}, b: {grid: {weights: 'run:a/macs0.5', macs: [0.3]}}"),
            ["gives a tailored"],
        ),
        (declared("a: {grid: {method: small, macs: [0.5], widths_of: b}}"), ["widths_of: 'b' given", '"run:<key']),
        (
            declared("a: {grid: {method: small, macs: [0.5], widths_of: 'run:b/x'}}"),
            ["a/small-macs0.5: widths_of: there is no run 'b/x'"],
        ),
        (
            declared("a: {grid: {macs: [0.5]}}, b: {grid: {method: small, macs: [0.3], widths_of: 'run:a/macs0.5'}}"),
            ["is of small_resnet with {'macs': 0.5}; one of small_resnet with {'macs': 0.3} is needed"],
        ),
        (
            declared("a: {grid: {macs: [0.5]}}, b: {grid: {method: taylor, macs: [0.5], widths_of: 'run:a/macs0.5'}}"),
            ["widths_of and method taylor given; only small"],
        ),
        (declared(fixed="{network: vgg16_bn}"), ["a/macs0.5: the model raised", "(2, 1, 8, 8)"]),
        (declared(data="pictures"), ["data: pictures is needed", "DATA=/path/to/pictures"]),
        (
            declared("a: {grid: {macs: [0.5], weights: 'file:x.safetensors'}}"),
            ["there is no WEIGHTS/x.safetensors", "WEIGHTS=/path"],
        ),
    ],
)
def test_refusals(project, text, words):
    found = "\n".join(problems(project(text)))
    assert all(word in found for word in words), found
    assert "small.yaml" in found


def test_a_declaration_that_is_no_text(project):
    path = project(declared())
    path.write_bytes(path.read_bytes() + b"# \xe9\n")
    assert "small.yaml is not a text in UTF-8" in "\n".join(problems(path))


def test_all_problems_are_told_at_once(project):
    text = declared("a: {grid: {sed: 1, macs: 2}}, b: {grid: {method: tailord}}", fixed="{lr: fast}")
    assert len(problems(project(text))) == 4
    assert len(problems(project(f"{text}\nfixd: {{seed: 1}}"))) == 5


def test_a_problem_of_many_runs_is_told_once(project):
    (told,) = problems(project(declared("a: {grid: {weights: 'run:b/x', macs: [0.5], seed: [0, 1, 2, 3, 4]}}")))
    assert "a/macs0.5-seed0, a/macs0.5-seed1, a/macs0.5-seed2 and 2 more: weights: there is no run 'b/x'" in told


def test_no_such_declaration(project):
    assert "declarations in this folder: small" in problems(project().with_name("smal.yaml"))[0]


def image_folder(folder, size=(32, 32)):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            Image.new("RGB", size).save(folder / part / name / "0.png")
    return folder


@pytest.mark.medium
def test_folders_of_images(project, tmp_path):
    path = project(declared("a: {grid: {macs: [0.5]}}", data="pictures", fixed="{network: vgg16_bn}"))
    found = read(path, places=False)
    assert len(found.runs) == 1
    assert "DATA=/path/to/pictures" in found.missing[0]
    folder = image_folder(tmp_path / "pictures")
    assert read(path, data=folder).runs["a/macs0.5"].params["data"] == str(folder)
    for wrong, words in [
        (tmp_path / "absent" / "pictures", "there must be train/<class>/*"),
        (image_folder(tmp_path / "other"), "its last part must be the declared name, pictures"),
        (image_folder(tmp_path / "tiny" / "pictures", (8, 8)), "the model raised"),
    ]:
        assert words in problems(path, data=wrong)[0]
    assert "leave it out" in problems(project(), data=folder)[0]


@pytest.mark.medium
def test_class_folders_may_be_links(project, tmp_path):
    path = project(declared("a: {grid: {macs: [0.5]}}", data="pictures", fixed="{network: vgg16_bn}"))
    whole, part = image_folder(tmp_path / "whole"), tmp_path / "pictures"
    hidden = whole / "train" / "cat" / ".ipynb_checkpoints"
    hidden.mkdir()
    Image.new("RGB", (8, 8)).save(hidden / "0-checkpoint.png")
    for place in ("train", "test"):
        (part / place).mkdir(parents=True)
        for name in ("cat", "dog"):
            (part / place / name).symlink_to(whole / place / name)
    assert read(path, data=part).runs["a/macs0.5"].params["data"] == str(part)
    assert places.facts("pictures", part) == ((3, 32, 32), 2, None)
    assert places.training_images("pictures", part) == 2


def test_a_folder_has_a_name_however_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder(tmp_path / "pictures"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "any" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "link").symlink_to("pictures")
    found = [places.name_of(each) for each in (".", "train/..", "../link", "~/pictures", "~/any")]
    assert found == ["pictures", "pictures", "link", "pictures", "cifar10"]


def test_cifar10_may_lie_in_a_folder_of_any_name(project, tmp_path):
    path = project(declared(data="cifar10"))
    (tmp_path / "datasets" / "cifar-10-batches-py").mkdir(parents=True)
    assert read(path, data=tmp_path / "datasets").runs["a/macs0.5"].declared["data"] == "cifar10"
    assert "macs >=" in problems(project(declared("a: {grid: {macs: [0.0001]}}", data="cifar10")), places=False)[0]


def imagenet_folder(folder, train=1000, val=1000):
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            (folder / part / f"n{number:08d}").mkdir(parents=True)
    return folder


@pytest.mark.medium
def test_imagenet(project, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    path = project(declared(data="imagenet", fixed="{workers: 4, size: 64, network: imagenet_resnet18}"))
    assert "DATA=/path/to/imagenet or the environment variable IMAGENET_ROOT" in problems(path, budgets=False)[0]
    assert read(path, places=False).missing  # the budget is checked nevertheless
    folder = imagenet_folder(tmp_path / "anywhere")
    assert (
        read(path, data=folder, budgets=False).runs["a/macs0.5"].declared["data"]
        == "imagenet"
        == places.name_of(folder)
    )
    monkeypatch.setenv("IMAGENET_ROOT", str(folder))
    assert read(path, budgets=False).runs["a/macs0.5"].params["data"] == str(folder)
    (folder / "val" / "n00000999").rename(folder / "val" / "lost+found")
    (wrong,) = problems(path, budgets=False)
    assert f"data: IMAGENET_ROOT={folder} given; ImageNet has 1,000 class folders" in wrong
    assert "1,000 folders in train/ and 1,000 folders in val/, lost+found among them" in wrong
    (wrong,) = problems(path, data=imagenet_folder(tmp_path / "other", train=3, val=0), budgets=False)
    assert "DATA=" in wrong
    assert "there are 3 folders in train/ and 0 folders in val/" in wrong


@pytest.mark.medium
def test_published_weights(project, tmp_path):
    text = declared(
        "a: {grid: {macs: [0.5], weights: published}}", data="pictures", fixed="{network: imagenet_resnet18}"
    )
    folder = image_folder(tmp_path / "pictures", (64, 64))
    assert "the published ones know 1,000 classes, and pictures has 2" in problems(project(text), data=folder)[0]
    path = project(text.replace("pictures", "imagenet").replace("resnet18", "resnet18, workers: 1, size: 64"))
    run = read(path, places=False).runs["a/macs0.5"]
    finished(run)
    recorded = run.folder / "params.json"
    values = {k: v for k, v in json.loads(recorded.read_text()).items() if k != "workers"}
    recorded.write_text(json.dumps(values | {"streamed": True}))
    assert run.disagreements() == []
    recorded.write_text(json.dumps(values))
    (wrong,) = run.disagreements()
    assert "workers is 1, and the finished run held its images in memory, which are not augmented alike" in wrong


def test_files_of_weights(project, tmp_path):
    path = project(declared("a: {grid: {macs: [0.5], weights: 'file:{network}.safetensors'}}"))
    assert "there is no" in problems(path, weights=tmp_path)[0]
    for network, classes in (("small_resnet", 4), ("resnet20", 10)):
        other = nets.build(network, num_classes=classes, in_channels=1)
        save_file(other.state_dict(), tmp_path / "small_resnet.safetensors")
        assert "small_resnet.safetensors" in problems(path, weights=tmp_path)[0]
        assert len(read(path, weights=tmp_path, budgets=False).runs) == 1  # the run itself will find it
    right = nets.build("small_resnet", num_classes=10, in_channels=1)
    save_file(right.state_dict(), tmp_path / "small_resnet.safetensors")
    run = read(path, weights=tmp_path).runs["a/macs0.5"]
    assert run.params["weights"] == str(tmp_path / "small_resnet.safetensors")
    finished(run)  # and then the file is not needed any more, wherever it was
    assert read(path).todo() == {}


def test_weights_in_folders_within_folders(project, tmp_path):
    run = read(
        project(declared("a: {grid: {macs: [0.5], weights: 'file:a/b/c.pth'}}")), weights=tmp_path, places=False
    ).runs["a/macs0.5"]
    finished(run)  # which records the last two parts
    assert run.disagreements() == []
    finished(run, weights="x/c.pth")
    assert len(run.disagreements()) == 1


def test_a_finished_run_that_started_from_other_weights_is_told(project):
    declaration = read(project())
    start, run = (declaration.runs[key] for key in ("start/dense-seed0", "from_start/taylor-macs0.5-seed0"))
    finished(start)
    weights = start.folder / "network.safetensors"
    weights.write_bytes(b"one")
    finished(run, weights_sha256=hashlib.sha256(b"one").hexdigest())
    assert run.disagreements() == []
    weights.unlink()
    assert run.disagreements() == []
    weights.write_bytes(b"another")
    (wrong,) = run.disagreements()
    assert "started from other weights than those in" in wrong


def test_the_state_of_runs_that_belong_to_somebody_else(project, monkeypatch):
    run = read(project()).runs["scratch/macs0.5"]
    run.folder.mkdir(parents=True)
    (run.folder / ".lock").touch()
    monkeypatch.setattr("builtins.open", functools.partial(refusing_to_write, open))
    assert not run.is_running()
    with pytest.raises(RuntimeError, match="FAILED .*cannot be written .*give another RUNS="):
        experiments.execute(read(project()), "scratch/macs0.5")


def refusing_to_write(really, file, mode="r", *args, **kwargs):
    if str(file).endswith(".lock") and mode != "r":
        raise PermissionError(13, "Permission denied")
    return really(file, mode, *args, **kwargs)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 5}, "seed is 0 in the declaration and 5 in the finished run's params.json; rename or delete"),
        ({"data": "letters"}, "data is 'digits' in the declaration and 'letters'"),
        ({"weights": "dense-seed1/network.safetensors"}, "weights is 'dense-seed0/network.safetensors'"),
    ],
)
def test_results_of_something_else_are_refused(project, changed, words):
    finished(read(project()).runs["from_start/taylor-macs0.5-seed0"], **changed)
    assert words in problems(project())[0]
    assert read(project(), runs=project().parent / "elsewhere")


def test_a_value_that_is_no_longer_declared_is_told(project):
    run = read(project()).runs["scratch/macs0.5"]
    finished(run, lr=0.3)
    assert "lr is not declared, so 0.1, and 0.3 in the finished run's params.json" in problems(project())[0]
    finished(run, lr=0.1, workers=2, phase_start=0.02, phase_end=0.15)  # the phase was the default once
    assert "scratch/macs0.5" not in read(project()).todo()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.json", '{"a": ', "is not valid JSON"),
        ("metrics.json", "[]", "holds a list"),
        ("params.json", "{", "is not valid JSON"),
        ("params.json", None, "there is no"),
    ],
)
@pytest.mark.parametrize("asked", ["check", "list", "status"])
def test_damaged_results_are_named(project, name, text, words, asked):
    run = read(project()).runs["scratch/macs0.5"]
    finished(run)
    (run.folder / name).unlink() if text is None else (run.folder / name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        experiments.main([asked, str(project())])
    told = ended.value.code
    assert words in told
    assert str(run.folder / name) in told
    assert f"Delete {run.folder}" in told


def test_a_run_whose_metrics_are_empty_is_not_done(project, capsys):
    run = read(project()).runs["scratch/macs0.5"]
    finished(run)
    (run.folder / "metrics.json").write_text("")
    experiments.main(["list", str(project())])
    assert "left     scratch/macs0.5\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10-paper", "imagenet-paper", "tiny-imagenet-cpu"])
def test_committed_declarations_are_right(name, monkeypatch):
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    assert read(ROOT / "experiments" / f"{name}.yaml", places=False, budgets=False).runs


# Hours


def test_estimate(project, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "images_per_second", lambda **how: 0.5)
    experiments.main(["estimate", str(project())])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["start", "small_resnet", "fp32", "2", "2", "1,257", "0.5", "1.4", "2.8"]
    assert lines[4].split() == ["all", "6", "9.8"]
    assert "upper bound" in "".join(lines[5:])
    with pytest.raises(SystemExit, match="DATA=/path/to/pictures"):
        experiments.main(["estimate", str(project(declared(data="pictures")))])


@pytest.mark.medium
def test_a_measured_step():
    before = torch.get_num_threads()
    speed = estimate.images_per_second(
        "small_resnet", shape=(1, 8, 8), classes=10, batch_size=4, threads=2, precision="bf16", seconds=0.01
    )
    assert 1 < speed < 1e6
    assert torch.get_num_threads() == before


# Execution


def command(path, name, *options):
    return [sys.executable, "-m", "tcp_core.study.experiments", name, str(path), *options]


def run(path, name, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(path, name, *options), capture_output=True, text=True, env=environment)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_a_place_with_braces(project, tmp_path):
    path = project(declared())
    place = tmp_path / "{seed} of {x}"  # papermill would fill them in
    for folder in ("notebooks", "experiments"):
        shutil.copytree(tmp_path / folder, place / folder)
    declaration = read(place / "experiments" / path.name)
    experiments.execute(declaration, "a/macs0.5")
    assert declaration.runs["a/macs0.5"].is_done()


def test_one_run(project, tmp_path, capsys):
    key = "scratch/macs0.5"
    experiments.main(["run", str(project()), key])
    told = capsys.readouterr().out
    assert f"done     {key} in " in told
    assert "1 done, 0 running, 5 left, time left: about" in told
    executed = tmp_path / "build" / "executed" / "small" / "scratch"
    assert "epoch 1\nepoch 2\n" in (executed / "macs0.5.log").read_text()
    assert "epoch 2" in (executed / "macs0.5.ipynb").read_text()
    assert not (tmp_path / "build/runs/small" / key / ".lock").exists()
    experiments.main(["run", str(project()), key])
    assert f"done     {key} already; to do it again, delete " in capsys.readouterr().out
    assert (tmp_path / "build/runs/small/scratch/began.txt").read_text().split() == ["macs0.5"]


@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_a_run_that_fails(project):
    path = project(declared("a: {grid: {macs: [0.5], fail: [true]}}"))
    with pytest.raises(SystemExit) as ended:  # with a text, which makes the status 1
        experiments.main(["run", str(path), "a/macs0.5-fail"])
    told = ended.value.code
    assert "FAILED   a/macs0.5-fail   log: " in told
    assert "failed on purpose" in told
    assert "\x1b" not in told


def test_no_run_at_once_is_refused(project, capsys):
    """Snakemake would wait for ever."""
    with pytest.raises(SystemExit):
        experiments.main(["study", str(project()), "--cores", "0"])
    assert "--cores 0 given; it must be 1 or more" in capsys.readouterr().err


def test_outside_of_a_clone_it_says_where_declarations_are(tmp_path):
    with pytest.raises(DeclarationError, match="a clone of the repository has"):
        read(tmp_path / "experiments" / "small.yaml")


def test_status_and_list(project, capsys):
    runs = read(project()).runs
    finished(runs["start/dense-seed0"])
    experiments.main(["list", str(project()), "--cores", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left     start/dense-seed0"  # its network is gone, and needed
    (runs["start/dense-seed0"].folder / "network.safetensors").touch()
    experiments.main(["status", str(project()), "--cores", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["start", "2", "1", "0", "1", "about", "60", "s"]
    assert lines[-1].split()[:5] == ["all", "6", "1", "0", "5"]


def test_runs_of_a_peer_that_is_not_installed_are_skipped(project, capsys, monkeypatch):
    path = project(declared("a: {grid: {method: [torch_pruning, taylor], macs: [0.5]}}"))
    monkeypatch.setattr(comparators.importlib.util, "find_spec", lambda name: None)
    declaration = read(path)
    assert list(declaration.todo()) == ["a/taylor-macs0.5"]
    experiments.main(["list", str(path), "--cores", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "skipped  a/torch_pruning-macs0.5"
    assert lines[-2].split()[:5] == ["all", "2", "0", "0", "1"]
    assert lines[-1].startswith("skipped: 1 runs, torch_pruning is a library that is not installed")
    experiments.execute(declaration, "a/torch_pruning-macs0.5")
    assert "pip install torch-pruning" in capsys.readouterr().out


def results_of(tmp_path):
    folder = tmp_path / "build" / "runs" / "small"
    names = ("params.json", "metrics.json", "network.safetensors")
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.name in names}


TINY = """
data: digits
notebook: fake
experiments:
  start: {fixed: {epochs: 15}, grid: {method: dense, fail: [false, true]}}
  from_start: {grid: {macs: [0.5], weights: ["run:start/dense-no-fail"]}}
  from_failed: {grid: {macs: [0.5], weights: ["run:start/dense-fail"]}}
"""


@pytest.mark.slow
def test_a_failure_stops_those_alone_that_start_from_it(project, tmp_path):
    told = run(project(TINY), "study", "--snakemake", "--cores 2")
    assert told.returncode == 1
    assert {path.parent.name for path in tmp_path.rglob("metrics.json")} == {"dense-no-fail", "macs0.5"}
    assert "FAILED   start/dense-fail" in told.stderr
    assert not (tmp_path / "build/runs/small/from_failed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
def test_a_killed_study_goes_on_to_the_same_results(project, tmp_path, everything):
    path = project(TINY.replace("[false, true]", "[false]").replace("dense-fail", "dense-no-fail"))
    options = ["--snakemake", "--cores 2"]
    study = subprocess.Popen(command(path, "study", *options), start_new_session=True)
    began = tmp_path / "build/runs/small/start/began.txt"
    while not began.exists():
        time.sleep(0.05)
        assert study.poll() is None
    (os.killpg if everything else os.kill)(study.pid, signal.SIGKILL)
    study.wait()
    told = run(path, "study", *options)
    assert told.returncode == 0, told.stderr
    # a run that a killed Snakemake leaves behind goes on, and is waited for; one that was killed is done again
    assert began.read_text().split() == ["dense-no-fail"] * (2 if everything else 1)
    killed = results_of(tmp_path)
    shutil.rmtree(tmp_path / "build")
    assert run(path, "study", *options).returncode == 0
    assert results_of(tmp_path) == killed
    assert len(killed) == 9
