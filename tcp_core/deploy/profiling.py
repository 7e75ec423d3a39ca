"""Where the time of an ONNX network goes: milliseconds of each layer, as onnxruntime's own profiler has them."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd
from torch import Tensor

from .exporting import require
from .running import input_of, session

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
KINDS = {
    "additions, activations": {
        *("Add", "Mul", "Sub", "Div", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "QuickGelu"),
        *("BatchNormalization", "Sum", "Tanh", "Softmax", "LeakyRelu", "PRelu", "Erf"),
    },
    "changes of layout": {"ReorderInput", "ReorderOutput", "Transpose"},
    "pooling": {"GlobalAveragePool", "AveragePool", "MaxPool", "ReduceMean", "GlobalMaxPool"},
}
REST = "slices, padding and others"
THROUGH = KINDS["additions, activations"]


def layer_times(path: str | Path, x: Tensor, *, runs: int = 20, threads: int = 1) -> pd.DataFrame:
    """Return one row for each convolution and linear layer in the order of the network, then one for each kind of
    the other operators: name, milliseconds a run (the median of ``runs``) and its share of the sum of all.

    ``x`` is a batch of inputs. A layer's time includes what onnxruntime fuses into it (activation, addition). The
    profiler itself takes a few microseconds an operator: compare shares and layers, and take a network's time from
    :func:`~tcp_core.deploy.timing.interleaved`.
    """
    require("onnx", "onnxruntime")
    import onnx

    graph = onnx.load(path).graph
    with tempfile.TemporaryDirectory() as folder:
        ready = session(path, threads=threads, profile=Path(folder) / "profile")
        name = input_of(ready, path)
        for _ in range(runs + 1):
            ready.run(None, {name: x.numpy()})
        events = json.loads(Path(ready.end_profiling()).read_text())
    events = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        durations[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"] / 1e3)
    milliseconds = {
        key: float(pd.Series(values[1:]).median()) for key, values in durations.items()
    }  # the first is slow

    names = _layers(graph)
    found = _layer_of_events(graph, names, [key for key in milliseconds if key[1] in LAYERS])
    rows = dict.fromkeys([*names.values(), *KINDS, REST], 0.0)
    for key, value in milliseconds.items():
        kind = next((kind for kind, operators in KINDS.items() if key[1] in operators), REST)
        if key[1] in LAYERS and key not in found:
            kind = key[0]  # not known whose it is: by onnxruntime's own name
            rows.setdefault(kind, 0.0)
        rows[found.get(key, kind)] += value
    table = pd.DataFrame({"name": list(rows), "ms": list(rows.values())})
    table["share"] = table["ms"] / table["ms"].sum()
    table["layer"] = table["name"].isin(names.values())
    return table[table["ms"] > 0].reset_index(drop=True)


def _layers(graph) -> dict[int, str]:
    """Return the names of layers by the position of their node: of the weight, as torch has it, or of the node."""
    weights = {initializer.name for initializer in graph.initializer}
    names, taken = {}, set()
    for position, node in enumerate(graph.node):
        if node.op_type not in LAYERS:
            continue
        weight = next((name for name in node.input[1:2] if name in weights), node.name)
        name = weight.removesuffix(".weight")
        names[position] = name if name not in taken else node.name  # a layer that is used twice
        taken.add(name)
    return names


def _layer_of_events(graph, names: dict[int, str], keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the layer that each of the profiler's events is the time of.

    Onnxruntime calls an operator by its node, or by the value that comes out after what was fused into it. Where that
    is a sum of two layers, one of them has an event of its own.
    """
    source = {output: position for position, node in enumerate(graph.node) for output in node.output}
    source |= {node.name: position for position, node in enumerate(graph.node)}

    def candidates(position: int | None) -> list[int]:
        if position is None:
            return []
        if position in names:
            return [position]
        node = graph.node[position]
        if node.op_type not in THROUGH:
            return []
        return [layer for name in node.input for layer in candidates(source.get(name))]

    possible = {key: candidates(source.get(_plain(key[0], source))) for key in keys}
    found: dict[tuple[str, str], str] = {}
    left = dict(possible)
    while left:
        key = min(left, key=lambda key: len(left[key]) or len(names) + 1)
        if layers := left.pop(key):
            found[key] = names[max(layers)]
            left = {other: [layer for layer in theirs if layer != max(layers)] for other, theirs in left.items()}
    return found


def _plain(name: str, known: dict[str, int]) -> str:
    """Return the node or value that onnxruntime has made a longer name of."""
    while name not in known and "_" in name:
        name = name.rpartition("_")[0]
    return name
