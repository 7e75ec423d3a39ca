"""What the documentation says is so: links lead somewhere, code runs, numbers are those of files."""

import csv
import inspect
import json
import re

import pytest
import torch
from documentation import NAMES, PAGES, ROOT, anchors, blocks, digits, execute, links, read

from tcp_core.controller import Controller
from tcp_core.maturity import PHASE_ENOUGH, PHASE_FRESH, PHASE_LEAST, PHASE_TRAINED
from tcp_core.study import records, results_page


def test_the_readme_is_one_screen_and_a_half():
    assert len(read("README.md").splitlines()) <= 120
    first = re.sub(r"!\[.*?\)|\*.*?\*\n", "", read("README.md"), flags=re.S).split()[:150]
    assert "pip" in first, "a reader must see soon how to install it"


def test_the_contributors_page_is_short():
    assert len(read("CONTRIBUTING.md").splitlines()) <= 140


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    wrong = []
    for target in links(name):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not there.exists() or not there.is_relative_to(ROOT):
            wrong.append(target)
        elif anchor and anchor not in anchors(there.relative_to(ROOT).as_posix()):
            wrong.append(f"{target}: {there.name} has no such heading")
    assert not wrong


def test_every_page_can_be_found_from_the_index():
    there = {((ROOT / "docs") / target.partition("#")[0]).resolve() for target in links("docs/README.md")}
    assert {path for path in PAGES if path.parent == ROOT / "docs"} - there == {ROOT / "docs" / "README.md"}


def test_every_declaration_is_described():
    declared = {path.name for path in (ROOT / "experiments").glob("*.yaml")}
    assert declared == {
        target.rpartition("/")[2] for target in links("docs/experiments.md") if "../experiments/" in target
    }


def test_every_notebook_for_a_reader_is_in_the_index():
    shown = {target.rpartition("/")[2] for target in links("docs/README.md") if "notebooks" in target}
    there = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} - {"10_run.ipynb", "90_report.ipynb"}
    assert there <= shown


@pytest.mark.parametrize("name", ["docs/method.md"])
def test_decisions_that_are_named_are_in_the_diary(name):
    titles = set(re.findall(r"^\*\*[\d-]+ · (.*?)\.\*\*", read("docs/decisions.md"), re.M))
    named = re.findall(r"\[\*(.*?)\*\]\(decisions\.md\)", read(name))
    assert len(named) > 8
    assert [title for title in named if title not in titles] == []


def test_the_method_states_the_defaults_of_the_controller():
    rows = re.findall(r"^\| `(\w+)` \| ([\d., ]+) \|", read("docs/method.md"), re.M)
    for phase in (PHASE_FRESH, PHASE_TRAINED):
        assert "{} and {} if it".format(*phase) in read("docs/method.md")
    least = f"or sooner, after {PHASE_ENOUGH} steps, but not before {PHASE_TRAINED[0] + PHASE_LEAST} |"
    assert least in read("docs/method.md")
    defaults = {name: parameter.default for name, parameter in inspect.signature(Controller).parameters.items()}
    assert defaults["phase"] == "auto"
    assert len(rows) == 3
    for name, said in rows:
        value = defaults[name] if isinstance(defaults[name], tuple) else (defaults[name],)
        assert tuple(map(float, said.split(","))) == value, name


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "widths"),  # those of the report that the first two print
    [("README.md", (16, 32, 64)), ("docs/loop.md", (16, 32, 64)), ("docs/training.md", (8, 8, 8))],
)
@pytest.mark.filterwarnings("ignore")  # of torch's export
def test_code_runs_and_keeps_its_promises(name, widths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = digits(widths)
    budget = {"macs": 0.5, "params": 0.6}

    def after(code, given):
        if "tailor.finish()" in code:
            sample = re.search(r"```\n(cost .*?)```", read(name), re.S)[1]
            for said, shown in zip(sample.splitlines()[:3], capsys.readouterr().out.splitlines()[:3], strict=True):
                # what does not depend on training: dense, requested, floor
                assert [said.split()[i] for i in (0, 1, 2, -1)] == [shown.split()[i] for i in (0, 1, 2, -1)]
            report = given["tailor"].report()
            assert report["requested"] == budget
            assert 0.98 < max(report["utilisation"].values()) <= 1
            assert sum(p.numel() for p in given["model"].parameters()) == report["current"]["params"]
        if "result = tcp.fit(" in code:
            assert 0.9 < given["result"].report["utilisation"]["macs"] <= 1  # a unit is 5 % of the smallest network
        if "tcp.load(" in code:
            for x, _ in given["loader"][:1]:
                torch.testing.assert_close(given["small"].eval()(x), given["model"].eval()(x))

    execute(name, given, after)
    assert len(blocks(name)) > 1


def test_blocks_that_are_not_run_say_why():
    notes = [note for name in NAMES for _, note in blocks(name) if note]
    assert all(re.match(r"not run: \w+|needs: \w+", note) for note in notes), notes


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.medium
def test_the_readme_has_the_results_at_a_glance():
    study = records.study(ROOT / "results" / "runs", records.run_defaults(ROOT / "notebooks" / "10_run.ipynb"))
    text = read("README.md")
    assert results_page.refreshed(text, results_page.at_a_glance(study)) == text, "run `make report`"
    with pytest.raises(ValueError, match="no part between"):
        results_page.refreshed("no marks", "")


@pytest.mark.parametrize(
    ("network", "what"),
    [("resnet56", "whole tailored run over dense run, ResNet-56"), ("resnet20", "the same, ResNet-20")],
)
def test_the_measured_cost_of_a_run(network, what):
    lines = read("docs/benchmarks.md").splitlines()
    row = next(line for line in lines if line.endswith("| `training_step.py` |") and what in line)
    for measured in read_json(ROOT / "results" / "benchmarks" / f"training_step_{network}.json")["rows"]:
        assert f"{measured['run_over_dense_run']:.2f} ({measured['threads']}" in row


@pytest.mark.parametrize(
    ("file", "networks"),
    [("zoo_exactness.csv", "all {} torchvision classifiers"), ("zoo_exactness_timm.csv", "{} of timm's families")],
)
def test_what_the_zoo_showed(file, networks):
    with (ROOT / "results" / "benchmarks" / file).open(newline="") as table:
        rows = list(csv.DictReader(table))
    error = max(float(row["max_relative_error"]) for row in rows)
    costs = sum(int(row["subsets"]) + 1 for row in rows)
    mismatches = sum(int(row["cost_mismatches"]) for row in rows)
    text = read("docs/benchmarks.md")
    line = next(line for line in text.splitlines() if networks.format(len(rows)) in line)
    assert f"largest difference {error:.1e}".replace("e-0", "e-") in line
    assert f"{mismatches} of {costs:,} costs" in line
    assert all(float(row["least_effect"]) > 0 for row in rows if row["prunable"] != "0")  # else nothing was compared
    none, few = (sum(int(row["prunable"]) <= share * int(row["units"]) for row in rows) for share in (0, 0.5))
    if few:
        assert f"In {none} of timm's networks nothing can go, in {few - none} more less than half" in text


def test_the_estimate_for_imagenet():
    lines = (ROOT / "results" / "benchmarks" / "estimate_imagenet-paper.txt").read_text().splitlines()
    rows = [line.split() for line in lines if re.search(r"imagenet_", line)]
    runs, hours = sum(int(row[3]) for row in rows), next(line for line in lines if line.startswith("all")).split()[-1]
    epochs = sum(int(row[3]) * int(row[4]) for row in rows)
    speed = next(row[6] for row in rows if row[1] == "imagenet_resnet50")
    text = read("docs/experiments.md")
    rounded = f"{round(float(hours.replace(',', '')), -3):,.0f}"
    assert f"{runs} runs, {epochs:,} epochs, take {rounded} hours" in text
    assert f"ResNet-50: {speed} images/s" in text
