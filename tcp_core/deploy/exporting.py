"""A network as a file that other runtimes read: ONNX, or torch.export's archive. Checked before it is there."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from ..files import beside, expanded
from ..gates import unwrapped
from ..verification import to_model
from .folding import folded

LARGEST_BATCH = 2**31 - 1  # without an upper end torch.export of torch 2.6 refuses convolutional networks
NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}


class ExportError(RuntimeError):
    """A network that cannot be exported, or a file that does not compute what the network computes."""


def export(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    dynamic: bool = True,
    tolerance: float = 1e-4,
) -> Path:
    """Write ``model`` for other runtimes to ``path`` and return the path: ONNX (``.onnx``) or torch.export's archive
    (``.pt2``).

    The network is written as it computes in eval mode on the CPU, with batch norms folded into the convolution or
    linear layer before them. What was written is run, ONNX by onnxruntime, on the example and on random inputs like
    it, one sample and several at once; only if all outputs agree with torch's is there a file. An older file of that
    name is replaced at once or stays. ``model`` itself is untouched, its train or eval mode too.

    Args:
        model: a plain network, tailored or dense, in any mode and on any device. A Tailor is refused: export what its
            ``finish()`` returns.
        path: where to; missing folders are made. Its suffix says the format.
        example: what the model is called with: a tensor with the batch in dimension 0, a tuple of positional
            inputs or a dict of keyword inputs.
        dynamic: take batches of any size. False fixes it to the example's.
        tolerance: the largest difference that passes, as a share of the output's largest value.

    Raises:
        ImportError: if a package is missing that the format needs; the extra ``deploy`` of this package brings them.
        ValueError: for another suffix, or an example that is none.
        OSError: if the file cannot be written; asked before the network is exported.
        ExportError: if torch cannot export the network, the runtime cannot run it, or outputs differ.
    """
    path = expanded(path)
    _check_format(path)
    model = unwrapped(model, "export")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r}; it is a share of the largest output, in (0, 1), for example 1e-4.")
    with beside(path) as temporary, torch.random.fork_rng(devices=[]), torch.no_grad():
        with torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)  # of the inputs that outputs are compared on; the caller's state is restored
            network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
            args, kwargs = to_model(_as_call(example), network)
            size = _batch_size(args, kwargs)
            # A batch of one is a special case to torch.export, which it would fix.
            args, kwargs = _resized((args, kwargs), size, max(2, size) if dynamic else size)
            program = _exported(network, args, kwargs, dynamic)
            module, _ = folded(program)
            if path.suffix == ".onnx":
                _copy_inputs_among_outputs(module)
            program = _exported(module, args, kwargs, dynamic)
            call = _write_onnx(program, temporary) if path.suffix == ".onnx" else _write_archive(program, temporary)
            _compare(network, call, (args, kwargs), (1, 3, max(2, size)) if dynamic else (size,), tolerance, path)
    return path


def _check_format(path: Path) -> None:
    if path.suffix not in NEEDED:
        raise ValueError(
            f"{str(path)!r} ends in {path.suffix or 'nothing'!r}; it must end in .onnx (for onnxruntime, TensorRT, "
            f"OpenVINO and others) or .pt2 (torch.export's archive). For weights alone there is tcp_core.save."
        )
    require(*NEEDED[path.suffix])


def require(*names: str) -> None:
    """Raise ImportError, and say what to do, unless the packages of these names are installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"ONNX files need {' and '.join(missing)}, not installed here; pip install '.[deploy]' in a "
            f"clone of this project brings them."
        )


def _as_call(example: Any) -> tuple[tuple, dict]:
    args, kwargs = ((), dict(example)) if isinstance(example, dict) else (example, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    return args, kwargs


def _batch_size(args: tuple, kwargs: dict) -> int:
    tensors = _tensors((args, kwargs))
    if not tensors or tensors[0].ndim == 0 or not tensors[0].shape[0]:
        raise ValueError(
            "example must be a tensor with the batch in dimension 0, a tuple of positional inputs or a dict of keyword "
            f"inputs; got {[type(leaf).__name__ for leaf in pytree.tree_leaves((args, kwargs))]}. For images: "
            f"torch.randn(2, 3, 224, 224)."
        )
    return tensors[0].shape[0]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _resized(call: tuple[tuple, dict], size: int, wanted: int) -> tuple[tuple, dict]:
    """Return the inputs with ``wanted`` samples instead of ``size``, repeated where there are too few."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != size:
            return leaf
        return torch.cat([leaf] * math.ceil(wanted / size))[:wanted].detach().clone()

    return pytree.tree_map(resize, call)


def _exported(network: nn.Module, args: tuple, kwargs: dict, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        batch, size = torch.export.Dim("batch", min=1, max=LARGEST_BATCH), _batch_size(args, kwargs)
        shapes = torch.export.ShapesCollection()
        for tensor in _tensors((args, kwargs)):
            if tensor.ndim and tensor.shape[0] == size:
                shapes[tensor] = {0: batch}
        shapes = shapes.dynamic_shapes(network, args, kwargs)
    try:
        return torch.export.export(network, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        hint = " If a size of the batch is written out in its forward, give dynamic=False." if dynamic else ""
        raise ExportError(
            f"{type(network).__name__} cannot be exported: torch.export raised {type(error).__name__}: "
            f"{_first_lines(error)} Its forward must be made of tensor operators, without Python control flow that "
            f"depends on values.{hint}"
        ) from error


def _copy_inputs_among_outputs(module: fx.GraphModule) -> None:
    """Have inputs that are handed through copied: in ONNX no output is an input, so torch would rename the input."""
    output = module.graph.output_node()
    for given in output.all_input_nodes:
        if given.op == "placeholder":
            with module.graph.inserting_before(output):
                output.replace_input_with(given, module.graph.call_function(torch.ops.aten.clone.default, (given,)))
    module.recompile()


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 500 else f"{text[:500]} ..."


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime

    outputs = len(program.graph_signature.user_outputs)
    for put in (spec.arg for spec in program.graph_signature.output_specs):
        if not isinstance(put, TensorArgument) and getattr(put, "value", put) is not None:
            what = repr(put.value) if hasattr(put, "value") else "a size"
            raise ExportError(
                f"ONNX files give tensors alone, and among the outputs is {what}: have forward return tensors only, or "
                f"export to .pt2."
            )
    names = ["output"] if outputs == 1 else [f"output_{index}" for index in range(outputs)]
    try:
        written = torch.onnx.export(program, (), dynamo=True, output_names=names, verbose=False)
        content = _tidied(written.model_proto, program).SerializeToString()
    except Exception as error:
        raise ExportError(f"torch.onnx cannot write this network: {_first_lines(error)}") from error
    path.write_bytes(content)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings go to the standard output and concern its own optimiser
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot read the network as it was written: {_first_lines(error)}") from error
    given = [node.name for node in session.get_inputs()]

    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        flat = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if leaf is not None]
        named = dict(zip(program.graph_signature.user_inputs, flat, strict=True))
        found = session.run(None, {name: named[name].numpy() for name in given})
        return [torch.from_numpy(array) for array in found]

    return call


def _tidied(written: Any, program: torch.export.ExportedProgram) -> Any:
    """Return the ONNX model without lines of source code and their places on this machine, and with the batch's size
    called that, not s77 or another of torch's symbols.
    """
    for graph in (written.graph, *written.functions):
        for inner in _with_branches(graph):
            values = [*inner.value_info, *(put for put in (*inner.input, *inner.output) if not isinstance(put, str))]
            for entry in (inner, *inner.node, *values, *getattr(inner, "initializer", ())):
                del entry.metadata_props[:]
            for symbol in map(str, program.range_constraints):
                for dim in (dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param):
                    dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)
    return written


def _with_branches(graph: Any) -> Iterator[Any]:
    """Return a graph, or a function, and the graphs in its nodes: branches of conditions, bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _with_branches(inner)


def _write_archive(program: torch.export.ExportedProgram, path: Path) -> Callable[..., Any]:
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _compare(
    network: nn.Module,
    call: Callable[..., Any],
    example: tuple[tuple, dict],
    sizes: tuple[int, ...],
    tolerance: float,
    path: Path,
) -> None:
    size = _batch_size(*example)
    for wanted in sizes:
        for like in (lambda x: x, _noise_like):
            args, kwargs = pytree.tree_map(like, _resized(example, size, wanted))
            expected = _tensors(network(*args, **kwargs))
            again = _tensors(network(*args, **kwargs))
            try:
                found = _tensors(call(*args, **kwargs))
            except Exception as error:
                raise ExportError(
                    f"what would be {path.name} fails on a batch of {wanted}: {_first_lines(error)} Nothing was "
                    f"written."
                ) from error
            if [x.shape for x in found] != [x.shape for x in expected]:
                raise ExportError(
                    f"{path.name} would give outputs of shapes {[tuple(x.shape) for x in found]} on a batch of "
                    f"{wanted}, and torch gives {[tuple(x.shape) for x in expected]}. Nothing was written."
                )
            for index, (a, b, c) in enumerate(zip(expected, found, again, strict=True)):
                if not _difference(a, c) <= tolerance:
                    raise ExportError(
                        "the network gives other outputs when it is called again, in eval mode: something in it is "
                        "random or counts calls. Nothing was written."
                    )
                if not (error := _difference(a, b)) <= tolerance:
                    raise ExportError(
                        f"output {index} of {path.name} would differ from torch's by {error:.2g} of its largest value "
                        f"on a batch of {wanted} (tolerance {tolerance:g}). Nothing was written; please report it with "
                        f"the network."
                    )


def _noise_like(leaf: Any) -> Any:
    """Return random numbers with a floating-point input's mean and spread; anything else as it is."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    spread = leaf.std() if leaf.numel() > 1 and leaf.std() > 0 else 1.0
    return torch.randn_like(leaf) * spread + leaf.mean()


def _difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference over the largest expected value; inf where only one is not finite."""
    if not expected.numel():
        return 0.0
    expected, found = expected.double(), found.double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().clamp(min=torch.finfo(torch.float32).tiny) if finite.numel() else 1.0
    error = torch.where(same, 0.0, (expected - found).abs() / scale)
    return float(error.nan_to_num(nan=math.inf).max())
