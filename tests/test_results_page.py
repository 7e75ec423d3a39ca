"""docs/results.md: its numbers are those of the runs, and a study that is added finds its place."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tcp_core.maturity import phase_of
from tcp_core.study import records, results_page, study_plots, tables
from tcp_core.training.plots import save_figure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
DEFAULTS = records.run_defaults(ROOT / "notebooks" / "10_run.ipynb")
PUBLISHED = pd.read_csv(ROOT / "results" / "published.csv")


def page(study, **places):
    places = {"figures": ROOT / "figures", "experiments": ROOT / "experiments", "folder": ROOT / "docs"} | places
    return results_page.page(study, PUBLISHED, **places)


@pytest.fixture(scope="module")
def study():
    return records.study(ROOT / "results" / "runs", DEFAULTS)


@pytest.mark.medium
def test_the_committed_page_follows_from_the_committed_runs(study):
    """Whoever adds runs must run `make report` and commit what it makes."""
    assert page(study) == PAGE.read_text(encoding="utf-8")


@pytest.mark.medium
def test_every_run_that_was_compared_is_on_the_page(study):
    text = page(study)
    accuracy = tables.accuracy(study)
    overview = tables.overview(accuracy)
    budgets = [name for name in overview if name.endswith("macs") or name == "dense"]
    cells = [cell for name in budgets for cell in overview[name].dropna()]
    assert len(cells) > 30
    assert all(f"| {cell} " in text for cell in cells)
    pairs = tables.differences(study)
    best = tables.summary(pairs).query("part == 'best comparator'")
    assert len(re.findall("the best comparator there", text)) == len(best)
    losses = (best["difference"] < -0.005).sum()
    assert len(re.findall(r"points below \*[^*]+\*, the best comparator there", text)) == losses > 0
    assert len(re.findall("so it is no comparator", text)) == records.borrowed(accuracy["options"]).sum() > 0


def test_runs_whose_test_images_were_not_read_change_no_standard_error(study):
    unread = study[study["method"] == "taylor"].assign(accuracy=np.nan, recipe="another")
    compared = tables.differences(study)
    more = tables.differences(pd.concat([study, unread, unread.assign(recipe="a third")]))
    pd.testing.assert_frame_equal(more[more["recipe"].isin(study["recipe"])].reset_index(drop=True), compared)


def test_a_budget_whose_comparators_were_not_read_has_no_best_one(study):
    unread = study.assign(
        accuracy=study["accuracy"].mask((study["budget"] == "50 % macs") & (study["method"] != "tailored"))
    )
    best = tables.summary(tables.differences(unread)).query("part == 'best comparator'")
    assert len(best) > 0
    assert "50 % macs" not in set(best["budget"])


def test_starts_of_one_name_with_other_weights_are_told_apart(tmp_path):
    folder = ROOT / "results" / "runs" / "cifar10-half" / "pretrained"
    hashes = ["1" * 64, "1" * 64, "2" * 64, None]

    def recipes(hashes):
        for seed, known in enumerate(hashes):
            copy = tmp_path / f"seed{seed}"
            shutil.copytree(folder / "tailored-macs0.3-seed0", copy, dirs_exist_ok=True)
            params = json.loads((copy / "params.json").read_text())
            params |= {"weights_sha256": known} if known else {}
            (copy / "params.json").write_text(json.dumps(params))
        return [*records.study(tmp_path, DEFAULTS).sort_values("run")["recipe"]]

    one, same, other, unknown = recipes(hashes)
    assert one == same
    assert one.endswith("seed0/network.safetensors 11111111")
    assert other.endswith("seed0/network.safetensors 22222222")
    assert unknown.endswith("seed0/network.safetensors")
    shutil.rmtree(tmp_path / "seed2")
    assert len({*recipes(hashes[:2])}) == 1  # one start, whether it is known of all runs or not


def longer(tmp_path, epochs=20, gain=0.02):
    """Return the study with some runs of the short study once more, as if they had been longer."""
    runs = tmp_path / "runs"
    shutil.copytree(ROOT / "results" / "runs", runs, ignore=shutil.ignore_patterns("cifar10-long", "cifar10-half"))
    for path in (ROOT / "results" / "runs" / "cifar10-cpu" / "pretrained").glob("*-seed0"):
        if not re.match("(tailored|taylor)-macs0.(5|15)-|dense", path.name):
            continue
        copy = runs / "cifar10-long" / "pretrained" / path.name
        shutil.copytree(path, copy, dirs_exist_ok=True)
        for name, change in (("params", {"epochs": epochs}), ("metrics", None)):
            value = json.loads((copy / f"{name}.json").read_text())
            value |= change or {"test_accuracy": value["test_accuracy"] + gain}
            (copy / f"{name}.json").write_text(json.dumps(value))
    return records.study(runs, DEFAULTS)


@pytest.mark.medium
def test_a_longer_study_finds_its_section_and_its_figure(tmp_path, study):
    study = longer(tmp_path)
    accuracy = tables.accuracy(study)
    drawn = []
    for name, rows in study_plots.groups(accuracy, by_length=False).items():
        rows = study_plots.several_lengths(rows)
        if len(rows):
            figure = study_plots.length_figure(rows)
            assert [axes.get_title(loc="left") for axes in figure.axes] == ["50 % macs", "15 % macs"]
            assert all(line.get_xdata().max() == 20 for axes in figure.axes for line in axes.get_lines()[:1])
            save_figure(figure, tmp_path / "figures" / f"length-{name}")
            drawn.append(name)
    assert drawn == ["resnet20-cifar10-jpeg-pretrained"]
    assert plt.get_fignums() == []
    text = page(study, figures=tmp_path / "figures", folder=tmp_path)
    title, _ = results_page.STUDIES["cifar10-long"]
    assert f"## {title}" in text
    assert text.index("## Short runs on") < text.index(f"## {title}") < text.index("## A stand-in for")
    assert "### ResNet-20, cifar10-jpeg, from a pretrained network, 20 epochs" in text
    assert "(figures/length-resnet20-cifar10-jpeg-pretrained.png)" in text
    assert "cifar10-long) is declared" not in text
    assert "[cifar10-paper]" in text


def test_what_ran_at_one_length_alone_has_no_figure_of_length(study):
    for _, rows in study_plots.groups(tables.accuracy(study), by_length=False).items():
        if rows["epochs"].nunique() == 1:
            assert study_plots.several_lengths(rows).empty


@pytest.mark.medium
def test_an_unknown_study_has_a_section_of_its_own_name(study):
    other = study.assign(run=study["run"].str.replace("tiny-imagenet-cpu", "mine"))
    assert "\n## mine\n" in page(other)
    flat = study[study["run"].str.startswith("tiny")].copy()
    flat["run"] = [f"run{number}" for number in range(len(flat))]  # not in folders of studies
    assert "Run on AMD EPYC, 1 thread, torch" in page(flat)


def test_a_mean_near_the_goal_says_how_near_and_that_it_may_be_chance():
    columns = ["data", "options", "epochs", "budget", "difference", "network", "setting", "recipe"]
    best = pd.DataFrame([["d", "", 20, "30 % macs", 0.295, "resnet20", "s", "r"]], columns=columns)
    summary = best.assign(part="best comparator")
    methods = ["tailored", "taylor", "dense", "small", "small"]
    accuracy = pd.concat([best.assign(method=method) for method in methods], ignore_index=True)
    accuracy["options"] = ["", "", "", "", f"{records.BORROWED} ours"]
    row = {"data": "d", "options": "", "length": tables.length(20), "pairs": 1, "wins": 1, "losses": 0}

    def said(difference, se):
        reached = "yes" if difference >= 0.3 else "no"
        return results_page._overall(row | {"difference": difference, "se": se, "reached": reached}, summary, accuracy)

    assert "the best of 2 comparators in the mean" in said(0.295, 0.2)
    assert said(0.295, 0.2).endswith("is missed by 0.005, which may be chance.")
    assert said(0.305, 0.001).endswith("is reached by 0.005.")
    assert said(1.0, 0.1).endswith("is reached.")
    assert said(0.0, 0.1).endswith("is missed.")
    assert said(1.0, float("nan")).endswith("is reached, which may be chance.")


def test_sentences_say_which_side_and_whether_it_may_be_chance():
    assert results_page._points(-0.234) == "0.23 points below"
    assert results_page._points(0.5) == "0.50 points above"
    assert results_page._points(0.004) == "level with"
    pair = {"se": 0.2, "ci": 0.4}
    said = "standard error 0.20, 95 % interval ± 0.40"
    assert results_page._chance(pair | {"difference": 0.3}) == f"{said}, so it may be chance"
    assert results_page._chance(pair | {"difference": -0.5}) == said
    assert results_page._chance({"difference": 0.5, "se": np.nan}) == "one seed on a side, so it may be chance"


@pytest.mark.medium
def test_the_caveat_on_rules_before_the_present_one_is_there_as_long_as_it_is_true(study):
    """Runs of before say so on the page; when they have been done again, the sentence has to go."""
    ours = study[(study["method"] == "tailored") & (study["setting"] == "from a pretrained network")]
    named = [run for run in ours["run"] if run.startswith("cifar10-cpu/")]
    began = [json.loads((ROOT / "results" / "runs" / run / "metrics.json").read_text())["started"] for run in named]
    before = [start < "2026-11-27T00:30" for start in began]
    assert any(before) == ("is of a rule before the present one" in page(study))
    assert all(before) or not any(before), "some are of the present rule: say which, or do the others again"
    long = [run for run in ours["run"] if run.startswith("cifar10-long/")]
    metrics = [json.loads((ROOT / "results" / "runs" / run / "metrics.json").read_text()) for run in long]
    late = [each["frozen_at_step"] > 1.1 * phase_of(1.0, each["steps"])[1] * each["steps"] for each in metrics]
    sentence = "the first seed of ours from pretrained networks is made smaller until 15 % of the run, except at 10 %"
    assert any(late) == (sentence in " ".join(page(study).split()))
    named = [run.endswith("-seed0") and "macs0.1-" not in run for run in long]
    assert late == named or not any(late), "the runs with another phase are not the ones that the page names"


@pytest.mark.medium
def test_the_caveat_on_a_start_that_was_trained_again_names_the_runs_from_it(study):
    again = study[study["run"].str.startswith("cifar10-long/pretrained-again/")]
    others = study[study["run"].str.startswith("cifar10-long/pretrained/")]
    assert "start from another network than the runs beside them" in " ".join(page(study).split())
    assert set(again["method"]) == {"tailored", "taylor", "uniform_l1", "dense", "torch_pruning"}
    for method in ("tailored", "taylor", "uniform_l1"):
        assert sorted(again[again["method"] == method]["seed"]) == [2] * 4  # at every budget
        assert set(others[others["method"] == method]["seed"]) == {0, 1}
    assert set(again[again["method"] == "dense"]["seed"]) == {2}
    assert set(others[others["method"] == "dense"]["seed"]) == {0, 1, 2}
    assert set(again[again["method"] == "torch_pruning"]["budget"]) <= {"30 % macs"}
