"""Timing, eight bits and profiles of ONNX files, and the figures drawn from them."""

import importlib
import json
import math
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from torch import nn

import tcp_core as tcp
from tcp_core import nets
from tcp_core.deploy import ExportError, profiling, running, timing
from tcp_core.study import deployment_plots as dp


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nets.small_resnet(widths=(8, 12, 16)).eval()


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    return tcp.export(network, tmp_path_factory.mktemp("onnx") / "small.onnx", torch.randn(2, 1, 8, 8))


# -------------------------------------------------------------------------------------------------
# Timing


def test_calls_take_turns_in_changing_order():
    order = []
    times = timing.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=4, warmup=1)
    assert times.shape == (4, 3)
    assert list(times.columns) == ["a", "b", "c"]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_times_are_milliseconds_and_speedups_ratios_of_rounds():
    times = timing.interleaved({"slow": lambda: time.sleep(0.02), ("quick", 1): lambda: time.sleep(0.005)}, rounds=5)
    assert list(times.columns) == ["slow", ("quick", 1)]
    found = timing.summary(times)
    assert 20 <= found.loc["slow", "ms"] < 500
    assert (found["speedup"].iloc[0], found["speedup_q1"].iloc[0]) == (1, 1)
    table = timing.summary(pd.DataFrame({"dense": [4.0, 8.0, 40.0], "tailored": [2.0, 2.0, 20.0]}))
    assert table.loc["tailored"].to_dict() == {
        **{"ms": 2.0, "ms_q1": 2.0, "ms_q3": 11.0},
        **{"speedup": 2.0, "speedup_q1": 2.0, "speedup_q3": 3.0},
    }


def test_processor_time_leaves_out_waiting():
    times = timing.interleaved({"waits": lambda: time.sleep(0.02)}, rounds=3, clock=time.process_time)
    assert (times["waits"] < 20).all()


@pytest.mark.parametrize(("calls", "rounds"), [({}, 3), ({"a": int}, 0)])
def test_nothing_to_time_is_refused(calls, rounds):
    with pytest.raises(ValueError, match="time at least one call"):
        timing.interleaved(calls, rounds=rounds)


# -------------------------------------------------------------------------------------------------
# Running and eight bits


def batches(network, count=3, wrong=1):
    """Images labelled by the network itself, `wrong` of each ten otherwise."""
    for _ in range(count):
        x = torch.randn(10, 1, 8, 8)
        with torch.no_grad():
            y = network(x).argmax(1)
        y[:wrong] = (y[:wrong] + 1) % 10
        yield x, y


@pytest.mark.medium
def test_accuracy_is_that_of_the_file(network, path):
    assert running.accuracy(path, batches(network, wrong=1)) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no images"):
        running.accuracy(path, [])


def test_calls_compute_what_the_network_computes(network, path):
    x = torch.randn(4, 1, 8, 8)
    (found,) = running.call(path, x)()
    mode = network.train().training
    expected = running.torch_call(network, x)()
    assert network.training is mode
    network.eval()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_eight_bits(network, path, tmp_path):
    torch.manual_seed(1)
    out = running.quantise(path, tmp_path / "a" / "small_int8.onnx", torch.randn(64, 1, 8, 8))
    assert [file.name for file in out.parent.iterdir()] == ["small_int8.onnx"]
    assert out.stat().st_size < 0.75 * path.stat().st_size  # a small network: the graph itself weighs as much
    graph = onnx.load(out).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) > 5
    weights = [each for each in graph.initializer if "weight" in each.name and len(each.dims) == 4]
    assert weights
    assert all(each.data_type == onnx.TensorProto.INT8 for each in weights)
    x = torch.randn(200, 1, 8, 8)
    fine, coarse = running.call(path, x)()[0], running.call(out, x)()[0]
    assert 0 < np.abs(fine - coarse).max() < 0.2 * np.abs(fine).max()
    assert (fine.argmax(1) == coarse.argmax(1)).mean() > 0.9


def test_eight_bits_that_overflow_on_this_cpu_are_not_kept(network, path, tmp_path):
    images, x = torch.randn(64, 1, 8, 8), torch.randn(200, 1, 8, 8)
    kept, full, reduced = (
        running.quantise(path, tmp_path / f"{choice}.onnx", images, reduce_range=choice)
        for choice in (None, False, True)
    )
    weights = [each for each in onnx.load(reduced).graph.initializer if "weight" in each.name and len(each.dims) == 4]
    assert max(np.abs(onnx.numpy_helper.to_array(each)).max() for each in weights) == 64
    exact = running.call(path, x)()[0]
    errors = [np.square(running.call(each, x)()[0] - exact).mean() for each in (kept, full, reduced)]
    assert errors[0] <= 1.1 * min(errors[1:])
    assert onnx.load(kept) in (onnx.load(full), onnx.load(reduced))


@pytest.mark.medium
def test_networks_of_two_inputs_are_named(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, left, right):
            return self.layer(left) + self.layer(right)

    x = torch.randn(2, 4)
    path = tcp.export(Two(), tmp_path / "two.onnx", (x, x))
    for act in (
        lambda: running.call(path, x),
        lambda: running.accuracy(path, [(x, torch.zeros(2))]),
        lambda: running.quantise(path, tmp_path / "eight.onnx", x),
        lambda: profiling.layer_times(path, x),
    ):
        with pytest.raises(ValueError, match=r"two\.onnx has the inputs \w+, \w+, and only networks of one input"):
            act()


def test_what_cannot_be_quantised_leaves_the_older_file(path, tmp_path):
    older = tmp_path / "older.onnx"
    older.write_bytes(b"an older file")
    with pytest.raises(ValueError, match="no images to calibrate on"):
        running.quantise(path, older, torch.randn(0, 1, 8, 8))
    with pytest.raises(ExportError, match="cannot be quantised"):
        running.quantise(path, older, torch.randn(4, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        running.quantise(tmp_path / "absent.onnx", older, torch.randn(4, 1, 8, 8))
    assert older.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [older]


@pytest.mark.medium
@pytest.mark.parametrize(("groups", "bias"), [(4, True), (4, False), (20, True)])
def test_transposed_convolutions_in_groups_are_named_where_eight_bits_fail(groups, bias, tmp_path):
    up = nn.ConvTranspose2d(20, 20, 3, groups=groups, bias=bias)
    model, x = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), up, nn.Conv2d(20, 2, 1)), torch.randn(4, 3, 8, 8)
    path, out = tcp.export(model, tmp_path / "up.onnx", x), tmp_path / "eight.onnx"
    if groups == 4 and bias:
        with pytest.raises(ExportError, match=r"no scales for the bias of .* in groups: build 2\.weight without"):
            running.quantise(path, out, x)
    else:
        assert running.quantise(path, out, x).exists()


# -------------------------------------------------------------------------------------------------
# Where the time goes


def test_every_layer_has_its_time(network, path):
    table = profiling.layer_times(path, torch.randn(16, 1, 8, 8), runs=5)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert table.loc[table["layer"], "name"].tolist() == layers
    assert (table["ms"] > 0).all()
    assert table["share"].sum() == pytest.approx(1)
    assert set(table.loc[~table["layer"], "name"]) <= {*profiling.KINDS, profiling.REST}


class Sums(nn.Module):
    """Sums of two layers with an activation after them, into which onnxruntime fuses one of the two; one used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 64, 3, padding=1)
        self.right = nn.Conv2d(16, 64, 1)
        self.twice = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.right(x) + self.left(x)).relu()
        x = self.twice(self.twice(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.mark.medium
def test_layers_that_are_fused_or_used_twice_are_told_apart(tmp_path):
    path = tcp.export(Sums(), tmp_path / "sums.onnx", torch.randn(2, 3, 16, 16))
    table = profiling.layer_times(path, torch.randn(8, 3, 16, 16), runs=9).set_index("name")
    layers = table.index[table["layer"]].tolist()
    assert layers[:4] == ["stem", "left", "right", "twice"] or layers[:4] == ["stem", "right", "left", "twice"]
    assert len(layers) == 6
    assert layers[5] == "head"
    assert table.loc["left", "ms"] > 2 * table.loc["right", "ms"]  # nine times the work


# -------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def latency():
    rows = [
        {"network": network, "runtime": runtime, "batch": batch, "ms": ms * batch, "ms_q1": ms, "ms_q3": 2 * ms * batch}
        | {"over_dense": 1.0 if network == "dense" else 1.7}
        for batch in (1, 64)
        for runtime, scale in (("torch fp32", 4), ("onnxruntime fp32", 2), ("onnxruntime int8", 1))
        for network, ms in (("dense", 1.0 * scale), ("tailored", 0.6 * scale))
    ]
    return pd.DataFrame(rows)


def test_latency_figure(latency, tmp_path):
    figure = dp.latency_figure(latency)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(figure.axes) == 2
    assert sum("1.70 x" in text for text in texts) == 6
    plt.close(figure)


def test_latency_table(latency, path):
    accuracy = dict.fromkeys(latency[["runtime", "network"]].itertuples(index=False, name=None), 0.875)
    accuracy["onnxruntime int8", "dense"] = math.nan
    table = dp.latency_table(latency, accuracy, {("tailored", "fp32"): path})
    assert table.shape == (6, 6)
    assert table.loc[("onnxruntime fp32", "tailored"), "accuracy"] == "87.50%"
    assert table.loc[("onnxruntime int8", "dense"), "accuracy"] == "-"
    assert table.loc[("onnxruntime fp32", "tailored"), "file"].endswith("MB")
    assert table.loc[("torch fp32", "tailored"), "file"] == "-"
    assert table.loc[("onnxruntime fp32", "tailored"), "batch 64, x"] == "1.70"


def test_layers_figure_keeps_the_order_and_marks_what_one_network_lacks():
    dense = pd.DataFrame({"name": ["conv1", "b.0", "a.1", "pooling"], "ms": [1.0, 2, 3, 0.5]})
    tables = {"dense": dense.assign(layer=[True, True, True, False])}
    tables["tailored"] = tables["dense"].drop(index=1).assign(ms=[0.5, 1, 0.25])
    figure = dp.layers_figure(tables, title="a network, batch 64")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "b.0", "a.1", "pooling"]
    assert axes.get_title(loc="left") == "a network, batch 64: 6.5 ms dense, 1.75 ms tailored"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    plt.close(figure)


# -------------------------------------------------------------------------------------------------
# What the page states is what was measured


def test_the_page_has_the_table_of_the_benchmark():
    root = Path(dp.__file__).resolve().parents[2]
    measured = json.loads((root / "results" / "benchmarks" / "deployment.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "deployment.md").read_text(encoding="utf-8").splitlines()
    groups = {}
    for row in measured["rows"]:
        groups.setdefault((row["network"], row["runtime"], row["batch"]), {})[row["widths"]] = row
    assert len(groups) == 20
    for (network, runtime, batch), rows in groups.items():
        dense = rows["dense"]
        cells = [f"{network}, {runtime}, {batch}", f"{dense['ms']:.3g} ({dense['ms_q1']:.3g} to {dense['ms_q3']:.3g})"]
        for kind in ("run", "any", "multiples of 4", "multiples of 8"):
            cells.append(f"{rows[kind]['speedup']:.2f} ({rows[kind]['speedup_cpu']:.2f})" if kind in rows else "-")
        assert f"| {' | '.join(cells)} |" in page


def test_multiples_are_never_slower_than_the_dense_network_as_the_page_says():
    root = Path(dp.__file__).resolve().parents[2]
    rows = json.loads((root / "results" / "benchmarks" / "deployment.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["widths"].startswith("multiples"):
            assert row["speedup"] > 1, row
    assert all(row["macs"] <= 0.5 for row in rows if row["widths"] != "dense")


def test_the_page_has_the_table_of_eight_bits():
    root = Path(dp.__file__).resolve().parents[2]
    rows = json.loads((root / "results" / "benchmarks" / "eight_bits.json").read_text(encoding="utf-8"))["rows"]
    page = (root / "docs" / "deployment.md").read_text(encoding="utf-8").splitlines()
    for network in ("resnet20", "resnet56"):
        fine, full, reduced = [row for row in rows if row["network"] == network]
        assert [row["weights"] for row in (fine, full, reduced)] == ["fp32", "8 bits", "7 bits"]
        cells = [network, f"{fine['accuracy']:.2%}"]
        for row in (full, reduced):
            cells += [f"{row['accuracy']:.2%}", f"{row['rms'] / row['rms_of_logits']:.1%}"]
        assert f"| {' | '.join(cells)} |" in page
        assert full["accuracy"] < fine["accuracy"] - 0.01
        assert abs(reduced["accuracy"] - fine["accuracy"]) < 0.002


def test_the_page_has_the_table_of_other_networks(monkeypatch):
    root = Path(dp.__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    other_networks = importlib.import_module("other_networks")
    rows = json.loads((root / "results" / "benchmarks" / "other_networks.json").read_text(encoding="utf-8"))["rows"]
    assert other_networks.table(rows) in (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    x = torch.randn(2, 3, 16, 16)
    for network in other_networks.NETWORKS.values():
        assert tcp.trace(network(num_classes=10, in_channels=3), x).prunable.all()


def test_the_page_on_scale_has_the_parts_of_a_step():
    root = Path(dp.__file__).resolve().parents[2]
    measured = json.loads((root / "results" / "benchmarks" / "step_parts.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    parts = measured["operators_ms"]
    for dense, tailored in zip(parts[::2], parts[1::2], strict=True):
        assert (dense["kind"], tailored["kind"]) == ("dense", "tailored")
        names = [name for name in dense if name not in ("network", "precision", "kind")]
        cells = [f"{dense[name]:.0f}, {tailored[name]:.0f}" for name in names]
        assert f"| {dense['network']}, {dense['precision']} | {' | '.join(cells)} |" in page
    ratios = [row["over_default"] for row in measured["choices"] if row["choice"] != "default"]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of the default's time" in page
    norms = {(row["precision"], row["channels"]): f"{row['ms']:.1f}" for row in measured["batch_norm_ms"]}
    bf16, fp32 = ([norms[precision, width] for width in (16, 15, 12, 8)] for precision in ("bf16", "fp32"))
    assert "{} ms with 16 channels, {} with 15, {} with 12 and {} with 8 in bf16".format(*bf16) in page
    assert "{}, {}, {} and {} ms in fp32".format(*fp32) in page
