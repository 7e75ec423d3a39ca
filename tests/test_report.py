"""The report: tables by hand, same bytes each time, and nothing compared that does not belong together."""

import itertools
import json
import subprocess
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from scipy import stats

from tcp_core.study import method_plots, naming, pages, records, study_plots, tables
from tcp_core.study.published import main, trim
from tcp_core.training import frames
from tcp_core.training.plots import save_figure

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "runs"
RUN_NOTEBOOK = ROOT / "notebooks" / "10_run.ipynb"
PUBLISHED = ROOT / "results" / "published.csv"


@pytest.fixture(scope="module")
def study():
    return records.study(FIXTURE, records.run_defaults(RUN_NOTEBOOK))


def run(**changes):
    """Return one row of `results.read_runs`."""
    row = {"run": "d/e/k", "network": "resnet20", "dataset": "digits", "method": "tailored", "seed": 0}
    row |= {"test_accuracy": 0.9, "val_accuracy": 0.9, "dense_macs": 1000, "dense_params": 100, "macs": 499}
    row |= {"params": 60, "budget.macs": 0.5, "utilisation.macs": 0.998, "largest_gate_removed": 0.0}
    row |= {"seconds_train": 100.0, "device": "cpu", "threads": 1, "param.epochs": 3, "param.lr": 0.1}
    return row | changes


DENSE = {"method": "dense", "budget.macs": None, "utilisation.macs": None, "macs": 1000, "params": 100}


def study_of(monkeypatch, *rows, defaults=None):
    monkeypatch.setattr(records, "read_runs", lambda root: pd.DataFrame(rows))
    return records.study("anywhere", defaults)


def test_mean_spread_and_differences_by_hand(monkeypatch):
    rows = [run(seed=seed, test_accuracy=value) for seed, value in enumerate((0.90, 0.92, 0.94))]
    rows += [run(seed=seed, test_accuracy=value, **DENSE) for seed, value in enumerate((0.95, 0.97))]
    rows += [run(seed=seed, test_accuracy=value, method="taylor") for seed, value in enumerate((0.91, 0.93))]
    rows += [run(test_accuracy=0.5, method="random")]
    study = study_of(monkeypatch, *rows)
    table = tables.accuracy(study).set_index("method")
    assert list(table.index) == ["dense", "tailored", "taylor", "random"]
    assert table["accuracy"].to_list() == pytest.approx([96, 92, 92, 50])
    assert table["sd"].to_list() == pytest.approx([2**0.5, 2, 2**0.5, np.nan], nan_ok=True)
    assert table["n"].to_list() == [2, 3, 2, 1]
    assert table["delta_dense"].to_list() == pytest.approx([0, -4, -4, -46])
    assert table["seconds_of_dense"].to_list() == [100] * 4
    assert table["utilisation"].to_list() == pytest.approx([np.nan, 99.8, 99.8, 99.8], nan_ok=True)

    pairs = tables.differences(study).set_index("rival")
    assert pairs["difference"].to_list() == pytest.approx([-4, 0, 42])
    assert pairs.loc["taylor", "se"] == pytest.approx((4 / 3 + 2 / 2) ** 0.5)
    welch = stats.ttest_ind([90, 92, 94], [91, 93], equal_var=False).confidence_interval(0.95)
    assert pairs.loc["taylor", "ci"] == pytest.approx((welch.high - welch.low) / 2)
    assert np.isnan(pairs.loc["random", ["se", "ci"]].astype(float)).all()
    pooled = (2 * 4 + 1 * 2 + 1 * 2) / (2 + 1 + 1)
    assert pairs.loc["random", "se_pooled"] == pytest.approx((4 / 3 + pooled) ** 0.5)
    total = tables.summary(pairs.reset_index()).set_index("part")
    assert total.loc["mean over all", ["difference", "pairs", "wins", "losses", "reached"]].to_list() == [
        0,
        1,
        0,
        0,
        "no",
    ]
    assert total.loc["best comparator", "rival"] == "taylor"
    assert total.loc["dense at 50 % macs", "reached"] == "no"


def test_methods_are_compared_within_the_starts_that_both_have(monkeypatch):
    """Two starts: of the second one, which is better for everybody, `uniform_l1` and the dense network have no run."""

    def runs(method, *accuracies, start, first=0, **changes):
        changes |= {"param.weights": "resnet20/network.safetensors", "param.weights_sha256": start}
        each = enumerate(accuracies, first)
        return [run(method=method, seed=seed, test_accuracy=value, **changes) for seed, value in each]

    rows = runs("tailored", 0.80, 0.82, start=None) + runs("tailored", 0.90, start="b", first=2)
    rows += runs("taylor", 0.79, 0.81, start=None) + runs("taylor", 0.84, start="b", first=2)
    rows += runs("uniform_l1", 0.80, 0.81, start=None)
    rows += [each | DENSE for each in runs("dense", 0.9, start=None)]
    study = study_of(monkeypatch, *rows)
    assert len(tables.accuracy(study)) == 4  # one row a method
    pairs = tables.differences(study).set_index("rival")
    assert pairs.loc["taylor", "difference"] == pytest.approx((2 * 1 + 1 * 6) / 3)
    assert pairs.loc["taylor", ["n", "n_rival"]].to_list() == [3, 3]
    assert pairs.loc["taylor", ["accuracy", "accuracy_rival"]].to_list() == pytest.approx([84, 244 / 3])
    pooled = (2 + 2 + 0.5) / 3
    assert pairs.loc["taylor", "se"] == pytest.approx((4 * (2 / 2 + 2 / 2) + 2 * pooled) ** 0.5 / 3)
    assert pairs.loc["taylor", "ci"] == pytest.approx(stats.t.ppf(0.975, 3) * pairs.loc["taylor", "se"])
    assert pairs.loc["uniform_l1", ["accuracy", "n", "difference"]].to_list() == pytest.approx([81, 2, 0.5])
    assert pairs.loc["uniform_l1", "se"] == pytest.approx((2 / 2 + 0.5 / 2) ** 0.5)
    assert pairs.loc["dense", "difference"] == pytest.approx(81 - 90)
    beside_dense = tables.accuracy(study).set_index("method")["delta_dense"]
    assert beside_dense["tailored"] == pytest.approx(81 - 90)  # not 84 - 90, with runs from the other start
    assert beside_dense["taylor"] == pytest.approx(80 - 90)
    assert beside_dense["dense"] == 0

    more = [*rows, *(each | DENSE for each in runs("dense", 0.94, start="b"))]  # a seed that there is in both starts
    beside_dense = tables.accuracy(study_of(monkeypatch, *more)).set_index("method")
    assert beside_dense.loc["dense", ["accuracy", "n"]].to_list() == pytest.approx([92, 2])
    assert beside_dense.loc["tailored", "delta_dense"] == pytest.approx(((81 - 90) + (90 - 94)) / 2)

    unread = [
        each | ({"test_accuracy": None} if each["method"] == "taylor" and each["seed"] == 2 else {}) for each in rows
    ]
    pairs = tables.differences(study_of(monkeypatch, *unread)).set_index("rival")
    assert pairs.loc["taylor", ["difference", "n"]].to_list() == pytest.approx([1, 2])

    rows = runs("tailored", 0.80, 0.82, start=None) + runs("taylor", 0.79, 0.83, start="b")
    pairs = tables.differences(study_of(monkeypatch, *rows))
    assert pairs["difference"].to_list() == pytest.approx([0])  # of one start nothing is known, so they are compared
    assert pairs["se"].to_list() == pytest.approx([(2 / 2 + 8 / 2) ** 0.5])


def test_a_network_with_the_widths_of_ours_is_no_comparator(monkeypatch):
    """It would beat ours with what ours found; it is compared, but not among the rivals."""
    rows = [run(), run(test_accuracy=0.8, method="small")]
    rows += [run(test_accuracy=0.95, method="small", **{"param.widths_of": "../runs/d/e/tailored-macs0.5-seed0"})]
    study = study_of(monkeypatch, *rows)
    table, pairs = tables.accuracy(study), tables.differences(study)
    assert sorted(pairs["options_rival"]) == ["", "with the widths of ours"]
    figure = study_plots.training_cost_figure(table)  # in which it would not have the cost of ours
    assert not [text for text in figure.findobj(Text) if "widths" in text.get_text()]
    plt.close(figure)
    total = tables.summary(pairs)
    for part in ("best comparator", "mean over all", "each comparator"):
        assert total[total["part"] == part]["difference"].to_list() == pytest.approx([10]), part


@pytest.mark.parametrize("defaults", [None, {"phase_start": 0.0, "phase_end": 0.0}])
def test_a_phase_that_would_have_been_found_is_no_option(monkeypatch, defaults):
    asked = {"param.weights": "w", "param.phase_start": 0.02, "param.phase_end": 0.15, "steps": 1404}
    rows = [run(**asked), run(**asked | {"steps": 7020}), run(**asked | {"param.weights": ""})]
    found = study_of(monkeypatch, *rows, defaults=defaults)
    trained = found[found["setting"] == "from a pretrained network"]
    assert sorted(trained["options"]) == ["", "phase from 2 %, to 15 % of the run"]  # 7,020 steps have a shorter one
    assert found[found["setting"] == "from scratch"]["options"].item() == "phase from 2 %, to 15 % of the run"


@pytest.mark.parametrize(
    ("steps", "frozen_at", "cost"),
    [
        (None, None, 8),  # dense
        (100, 1, 8 * 0.3),  # small from the first step on
        (100, 15, 8 * (0.15 + 0.85 * 0.3)),
        (100, 50, 8 * (0.5 + 0.5 * 0.3)),
        (float("nan"), float("nan"), 8),
    ],
)
def test_training_costs_what_its_networks_cost(steps, frozen_at, cost):
    assert frames.training_cost(8, 0.3, steps, frozen_at) == pytest.approx(cost)


def test_the_overview_has_a_column_for_each_budget(monkeypatch):
    rows = [run(seed=seed, test_accuracy=value) for seed, value in enumerate((0.90, 0.92))]
    rows += [run(**DENSE), run(method="taylor", **{"budget.macs": 0.3}), run(**{"budget.params": 0.5})]
    alone = [run(network="resnet56", **DENSE), run(network="resnet56")]  # nothing to compare with
    table = tables.overview(tables.accuracy(study_of(monkeypatch, *rows, *alone)))
    assert table["network"].unique() == ["resnet20"]
    assert list(table)[-3:] == ["dense", "50 % macs", "30 % macs"]
    cells = table.set_index("method")[["dense", "50 % macs", "30 % macs"]].fillna("").to_dict("index")
    assert [*cells] == ["dense", "tailored", "taylor"]
    assert list(cells["dense"].values()) == ["90.00 (1)", "", ""]
    assert list(cells["tailored"].values()) == ["", "91.00 ± 1.41 (2)", ""]
    assert list(cells["taylor"].values()) == ["", "", "90.00 (1)"]


def test_means_are_those_of_pandas(study):
    table = tables.accuracy(study).set_index(pages.KEY)
    by_key = study[~study["searched"]].groupby(pages.KEY)["accuracy"]
    pd.testing.assert_series_equal(table["accuracy"].sort_index(), by_key.mean(), check_dtype=False)
    pd.testing.assert_series_equal(table["sd"].sort_index(), by_key.std(), check_names=False)
    best = tables.summary(tables.differences(study)).query("part == 'best comparator'")
    mean = tables.summary(tables.differences(study)).query("part == 'mean over all'")
    assert (mean["difference"] * mean["pairs"]).sum() == pytest.approx(best["difference"].sum())
    assert (mean["wins"] + mean["losses"]).sum() == len(best)
    assert mean["losses"].sum() > 0  # the fixture has a loss, and it is shown


@pytest.mark.parametrize(
    "other",
    [
        {"param.lr": 0.2},
        {"param.epochs": 4},
        {"param.weights": "a.safetensors"},
        {"param.label_smoothing": 0.1},  # unknown to the tables
        {"param.size": 16},
        {"dataset": "cifar10"},
        {"network": "resnet56"},
        {"budget.macs": 0.4},
        {"budget.params": 0.6},
        {"param.phase_end": 0.5},
        {"method": "taylor"},
    ],
)
def test_what_differs_is_not_averaged(monkeypatch, other):
    assert len(tables.accuracy(study_of(monkeypatch, run(), run(seed=1, **other)))) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"param.threads": 2, "param.out": "elsewhere"},
        {"param.phase_end": 0.3},  # its default, which the older run lacks
        {"param.prune_at": 0.5},  # says nothing of a run that is not pruned at once
    ],
)
def test_what_says_nothing_is_averaged(monkeypatch, other):
    runs = study_of(monkeypatch, run(), run(seed=1, **other), defaults={"phase_end": 0.3, "prune_at": 0.0})
    assert list(tables.accuracy(runs)["n"]) == [2]


def test_the_same_run_twice_is_one_seed(monkeypatch):
    table = tables.accuracy(study_of(monkeypatch, run(), run(run="again"), run(seed=1, test_accuracy=0.8)))
    assert list(table["n"]) == [2]
    assert list(table["accuracy"]) == pytest.approx([85])


def test_the_same_run_twice_with_other_results_is_warned_of(monkeypatch):
    """An old copy in a folder of runs would be averaged in, and its row looks like any other."""
    study = study_of(monkeypatch, run(), run(run="d/old/k", test_accuracy=0.1), run(seed=1, test_accuracy=0.8))
    words = r"^d/e/k \(90\.00 %\) and d/old/k \(10\.00 %\) are runs of the same method"
    with pytest.warns(UserWarning, match=words):
        table = tables.accuracy(study)
    assert list(table["n"]) == [2]
    assert tables.repeated(study)[0].endswith("move those away that are not meant")
    searched = study_of(monkeypatch, run(run="d/search_x/k"), run(run="d/search_y/k", test_accuracy=0.1))
    assert tables.repeated(searched) == []


def test_every_parameter_of_the_run_notebook_has_its_place():
    places = (records.NAMED, records.RECIPE, records.IF_CHANGED, records.OF_COMPARATORS, records.OF_CONTROLLER)
    places = (*places, records.OF_BOTH, records.SAYS_NOTHING)
    known = [name for place in places for name in place]
    assert len(known) == len(set(known))
    assert set(records.run_defaults(RUN_NOTEBOOK)) <= set(known), (
        "say in records.py what the parameter is to a comparison"
    )


def test_what_is_missing_is_said(monkeypatch):
    alone = tables.accuracy(study_of(monkeypatch, run()))
    assert tables.missing(alone) == [
        "ResNet-20, digits, from scratch, 3 epochs: no run of dense, no comparator, one seed"
    ]
    unread = tables.accuracy(study_of(monkeypatch, run(test_accuracy=None), run(test_accuracy=None, **DENSE)))
    assert "no test accuracy" in tables.missing(unread)[0]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished run"):
        records.study(tmp_path)


@pytest.mark.parametrize("rows", [[run()], [run(**DENSE)], [run(), run(method="taylor")], [run(run="d/search_x/k")]])
def test_few_runs_still_make_every_table(monkeypatch, rows, tmp_path):
    for name, table in all_tables(study_of(monkeypatch, *rows)).items():
        assert pages.write(table, name, tmp_path).startswith(f"# {pages.PAGES[name][0]}\n")


def all_tables(study):
    accuracy = tables.accuracy(study)
    differences = tables.differences(study)
    return {
        **{"overview": tables.overview(accuracy), "accuracy": accuracy},
        **{"differences": differences, "summary": tables.summary(differences)},
        **{"delivered": tables.delivered(study), "search": tables.search(study)},
        "published": tables.beside_published(accuracy, pd.read_csv(PUBLISHED)),
    }


@pytest.mark.medium
def test_tables_are_the_same_bytes_each_time(study, tmp_path):
    again = records.study(FIXTURE, records.run_defaults(RUN_NOTEBOOK)).sample(frac=1, random_state=0)
    for folder, runs in (("one", study), ("other", again)):  # in whatever order the runs are read
        for name, table in all_tables(runs).items():
            pages.write(table, name, tmp_path / folder)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 2 * len(pages.PAGES)
    for path in files:
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
        assert b"\r" not in path.read_bytes()


def test_search_ranks_variants_by_validation_alone(study):
    table = tables.search(study)
    assert list(table["options"]) == ["to 50 % of the run", "to 30 % of the run"]
    assert table["val_accuracy"].is_monotonic_decreasing
    assert "accuracy" not in table
    assert not study[study["searched"]]["run"].isin(tables.delivered(study)["run"]).any()


def test_delivered_has_every_bound_of_every_run(study):
    table = tables.delivered(study)
    joint = table[table["budget"] == "50 % macs + 40 % params"]
    assert list(joint["cost"]) == ["macs", "params"]
    assert table["used"].le(100 + 1e-9).all()
    assert set(table.dropna(subset="before")["method"]) == {"fixed_strength"}


def test_published_rows_are_marked_and_have_their_source(study):
    published = pd.read_csv(PUBLISHED)
    table = all_tables(study)["published"]
    theirs = table[table["source"] == "published"]
    assert set(table[table["source"] == "here"]["data"]) == {"cifar10-madeup"}
    paper = theirs["method"] == "Tailored Channel Pruning"
    assert set(theirs[paper]["accuracy"]) == {tables.NOT_PUBLIC}
    names = ["method", "accuracy", "flops_reduction", "citation", "seen_at"]
    committed = published[["method", "pruned_top1", "flops_reduction_pct", "citation", "seen_at"]]
    assert set(map(tuple, theirs[~paper][names].to_numpy())) <= set(map(tuple, committed.to_numpy()))
    assert (theirs[~paper]["flops_reduction"] - 50).abs().le(5.1).all()  # the fixture delivers a little less than 50 %


def test_published_file_passes_its_own_checks():
    published = pd.read_csv(PUBLISHED)
    kept, dropped = trim(published)
    assert dropped.sum() == 0
    pd.testing.assert_frame_equal(kept, published)
    assert published[["citation", "seen_at", "pruned_top1", "flops_reduction_pct"]].notna().all(axis=None)
    macs = published["architecture"].map(
        {"ResNet-20": 40.6, "ResNet-56": 125.5, "ResNet-110": 252.9, "VGG-16-BN": 313.7}
    )
    printed = published["pruned_flops"].str.extract(r"^([\d.]+)M$")[0].astype(float)
    assert (100 * (1 - printed / macs) - published["flops_reduction_pct"]).abs().max() < 2


def test_trim_gives_a_reason_for_each_dropped_row():
    good = pd.read_csv(PUBLISHED).iloc[[0]]
    changes = [
        {},
        {"architecture": "LeNet"},
        {"pruned_top1": None},
        {"pruned_top1": 100.1},
        {"flops_reduction_pct": -1.0},
        {"pruned_top1": 97.0},
        {"seen_at": "[quoted] LOW RELIABILITY"},
        {"method": "X (dynamic)"},
        {"seen_at": "[quoted] elsewhere (read via index id 12, Table 1)"},
    ]
    kept, dropped = trim(pd.concat([good.assign(**change) for change in changes], ignore_index=True))
    pd.testing.assert_frame_equal(kept, good.reset_index(drop=True), check_dtype=False)
    assert list(dropped) == [1, 1, 2, 1, 1, 1, 1]
    kept, _ = trim(good.assign(**changes[-1]))
    assert kept["seen_at"].item() == "[quoted] elsewhere (Table 1)"


def figures(study):
    accuracy = tables.accuracy(study)
    pairs = tables.differences(study)
    published = pd.read_csv(PUBLISHED)
    beside = tables.beside_published(accuracy, published)
    (name, rows), *_ = study_plots.groups(accuracy).items()
    assert name == "resnet20-cifar10-madeup-pretrained-e12"
    first = pages.GROUP, list(rows[pages.GROUP].iloc[0])
    ours = study[(study["method"] == "tailored") & ~study["searched"] & study[first[0]].eq(first[1]).all(axis=1)]
    return {
        "pareto": lambda: study_plots.pareto_figure(rows),
        "differences": lambda: study_plots.difference_figure(pairs[pairs[first[0]].eq(first[1]).all(axis=1)]),
        "adaptation": lambda: study_plots.adaptation_figure(pairs),
        "training_cost": lambda: study_plots.training_cost_figure(rows),
        "utilisation": lambda: study_plots.utilisation_figure(tables.delivered(study)),
        "widths": lambda: study_plots.widths_figure(FIXTURE, ours),
        "published": lambda: study_plots.published_figure(beside[beside["network"] == "resnet56"], published),
    }


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", ["pareto", "training_cost", "differences", "adaptation", "utilisation", "widths", "published"]
)
def test_figures_are_the_same_each_time_and_all_their_words_are_inside(study, name):
    before = dict(mpl.rcParams)
    one, other = (figures(study)[name]() for _ in range(2))
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    first, second = FigureCanvasAgg(one), FigureCanvasAgg(other)
    first.draw()
    second.draw()
    np.testing.assert_array_equal(first.buffer_rgba(), second.buffer_rgba())

    words = [*one.texts, *(text for axes in one.axes for text in (*axes.texts, axes.title, axes.xaxis.label))]
    edges = {text.get_text(): text.get_window_extent() for text in words if text.get_text().strip()}
    assert [text for text, box in edges.items() if box.x0 < -1 or box.x1 > one.bbox.x1 + 1] == []
    assert one.axes[-1].get_xlabel() or one.get_supxlabel()


@pytest.mark.medium
def test_names_at_the_right_do_not_overlap(study):
    axes = figures(study)["pareto"]().axes[0]
    boxes = sorted(
        (text.get_window_extent() for text in axes.texts if "dense" not in text.get_text()), key=lambda b: b.y0
    )
    assert len(boxes) == 9
    assert all(below.y1 < above.y0 + 3 for below, above in zip(boxes, boxes[1:], strict=False))


def test_a_method_that_ends_early_is_named_at_its_end(monkeypatch):
    """A line from its point to the right margin would look like its curve, and best of all at the right."""
    rows = [run(test_accuracy=0.8), run(test_accuracy=0.7, macs=99, **{"budget.macs": 0.1}), run(**DENSE)]
    rows += [run(method="taylor", test_accuracy=0.82), run(method="torch_pruning", test_accuracy=0.81)]
    rows += [run(method="uniform_l1", test_accuracy=0.6, macs=99, **{"budget.macs": 0.1})]
    rows += [run(method="random", test_accuracy=None)]  # the test images were not read
    axes = study_plots.pareto_figure(tables.accuracy(study_of(monkeypatch, *rows))).axes[0]
    names = {text.get_text(): text for text in axes.texts}
    point = axes.transData.transform((49.9, 81))
    for name in ("Torch-Pruning 81.0", "Taylor, one-shot 82.0"):
        box = names[name].get_window_extent()
        assert axes.bbox.x0 < box.x0 < box.x1 < axes.bbox.x1
        assert abs(box.y0 + box.y1 - 2 * point[1]) / 2 < 0.2 * axes.bbox.height
        assert max(box.x0 - point[0], point[0] - box.x1) < 0.1 * axes.bbox.width
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    lines = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    assert {line.arrow_patch.get_edgecolor() for line in lines} == {mpl.colors.to_rgba(naming.LEADER["color"])}
    assert all(line.xy[0] == pytest.approx(9.9) for line in lines if line.get_text())


def test_bars_of_differences_are_drawn_to_their_ends(monkeypatch):
    """One that the axis cuts looks as if it went to the other side alone."""
    rows = [run(seed=seed, test_accuracy=value) for seed, value in enumerate((0.90, 0.92))]
    rows += [run(seed=seed, test_accuracy=value, method="taylor") for seed, value in enumerate((0.88, 0.94))]
    rows += [run(seed=seed, test_accuracy=value, method="random") for seed, value in enumerate((0.20, 0.21))]
    for name in ("uniform_l1", "global_l1", "slimming"):
        rows += [run(seed=seed, test_accuracy=0.905, method=name) for seed in (0, 1)]
    axes = study_plots.difference_figure(tables.differences(study_of(monkeypatch, *rows))).axes[0]
    low, high = axes.get_xlim()
    bars = [path.vertices[:, 0] for bar in axes.collections for path in bar.get_paths()]
    assert len(bars) == 4  # all but that of a method which is 70 points off
    assert all(low < ends.min() < ends.max() < high for ends in bars)
    assert high < 35


def test_the_widest_layer_is_named(tmp_path, monkeypatch):
    layers = pd.DataFrame({"layer": [f"layer{index}" for index in range(60)], "dense": 8, "tailored": 4})
    layers.loc[51, "dense"] = 64
    layers.to_csv(tmp_path / "widths.csv", index=False)
    figure = study_plots.widths_figure(tmp_path, study_of(monkeypatch, run(run=".")))
    assert "layer51" in [label.get_text() for label in figure.axes[-1].get_xticklabels()]


def test_groups_that_differ_in_recipe_alone_have_two_names(monkeypatch):
    table = tables.accuracy(study_of(monkeypatch, run(), run(**{"param.lr": 0.2})))
    assert list(study_plots.groups(table)) == ["resnet20-digits-scratch-e3", "resnet20-digits-scratch-e3_recipe2"]


@pytest.mark.medium
def test_the_fixture_is_what_its_script_writes_and_says_that_it_is_made_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FIXTURE.parent)
    import make

    monkeypatch.setattr(make, "RUNS", tmp_path / "runs")
    make.main()
    written, committed = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (make.RUNS, FIXTURE)
    )
    assert written == committed
    assert sum(map(len, written.values())) < 200_000
    datasets = {json.loads(text)["dataset"] for path, text in written.items() if path.name == "metrics.json"}
    assert datasets == {"cifar10-madeup"} <= set(pages.DATA)


def test_trimming_again_writes_the_committed_file(tmp_path, capsys):
    main(PUBLISHED, tmp_path / "published.csv")
    assert (tmp_path / "published.csv").read_bytes() == PUBLISHED.read_bytes()
    assert "rows kept" in capsys.readouterr().out
    header = PUBLISHED.with_name("published_dropped.csv").read_text().splitlines()
    assert (tmp_path / "published_dropped.csv").read_text().splitlines()[0] == header[0] == "reason,rows"


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(83.235, 2, "83.24"), (-1.335, 2, "-1.34"), (-0.001, 2, "0.00"), (2.5, 0, "3")]
)
def test_numbers_are_rounded_as_by_hand(value, digits, text):
    assert pages.number(value, digits) == text


@pytest.mark.medium
def test_runs_of_ones_own_have_no_goals(study, tmp_path):
    """The goals are those of the committed study: of other runs, a report that names them would be wrong."""
    differences = tables.differences(study)
    own = pages.write(tables.summary(differences, goals=False), "summary", tmp_path / "own")
    committed = pages.write(tables.summary(differences), "summary", tmp_path / "committed")
    assert "goal" in committed
    assert "goal" not in own
    assert "goal" not in (tmp_path / "own" / "summary.csv").read_text()
    rows = next(iter(study_plots.groups(differences[differences["rival"] != "dense"]).values()))
    told = [study_plots.difference_figure(rows, goals=goals).get_supxlabel() for goals in (True, False)]
    assert ["goal" in text for text in told] == [True, False]


def test_only_the_committed_study_is_reported_with_goals():
    for runs, given in ((None, True), ("somewhere", False)):
        command = ["make", "--dry-run", "report", *([f"RUNS={runs}"] if runs else [])]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert ("-p goals True" in said) == given


@pytest.mark.medium
def test_committed_tables_follow_from_committed_runs(tmp_path):
    """Whoever adds runs, or changes a table, must run `make report` and commit what it makes."""
    study = records.study(ROOT / "results" / "runs", records.run_defaults(RUN_NOTEBOOK))
    for name, table in all_tables(study).items():
        missing = tables.missing(tables.accuracy(study)) if name == "accuracy" else ()
        pages.write(table, name, tmp_path, missing=missing)
    committed = {path.name: path.read_bytes() for path in (ROOT / "results" / "tables").iterdir()}
    assert committed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's and the client's own machinery
def test_committed_figures_follow_from_committed_runs(tmp_path):
    places = {"tables": str(tmp_path / "tables"), "figures": str(tmp_path / "figures")}
    execute("90_report", {"runs": str(ROOT / "results" / "runs"), "goals": True, **places})
    five = ROOT / "results" / "runs" / "cifar10-cpu" / "pretrained"
    execute("40_controller", {"runs": str(five), "network": "resnet20", "figures": places["figures"]})
    for name, figure in method_plots.figures(five).items():
        save_figure(figure, tmp_path / "figures" / name)
    committed, drawn = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (ROOT / "figures", tmp_path / "figures")
    )
    assert committed.keys() == drawn.keys()
    trained = ("method_ranking", "method_freeze")  # of a run made now: the last digit may differ from CPU to CPU
    assert [name for name in drawn if drawn[name] != committed[name] and not name.startswith(trained)] == []


def execute(name, parameters):
    notebook = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), parameters)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
