"""ONNX files in onnxruntime on the CPU: calls, accuracy, eight-bit integers."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import beside, expanded
from .exporting import ExportError, require

if TYPE_CHECKING:
    import onnxruntime


def session(path: str | Path, *, threads: int = 1, profile: str | Path | None = None) -> onnxruntime.InferenceSession:
    """Return the network at ``path``, an ``.onnx`` file, ready to be run by that many threads.

    ``profile`` is what the name of the file with the time of each operator begins with, where one is wanted.
    """
    require("onnxruntime")
    import onnxruntime

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path that export() returned.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def input_of(ready: onnxruntime.InferenceSession, path: str | Path) -> str:
    """Return the name of a network's one input; ValueError if it has more."""
    names = [entry.name for entry in ready.get_inputs()]
    if len(names) != 1:
        raise ValueError(
            f"{path} has the inputs {', '.join(names)}, and only networks of one input are taken here; run it by "
            f"onnxruntime's own session.run."
        )
    return names[0]


def call(path: str | Path, x: Tensor, *, threads: int = 1) -> Callable[[], list[np.ndarray]]:
    """Return a call without arguments that runs the network at ``path`` on ``x``, to be timed."""
    ready = session(path, threads=threads)
    feed = {input_of(ready, path): x.numpy()}
    return lambda: ready.run(None, feed)


def torch_call(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a call without arguments that runs a copy of ``model`` on ``x`` in torch, eval mode, to be timed."""
    model = copy.deepcopy(model).cpu().eval()

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def accuracy(path: str | Path, batches: Iterable[tuple[Tensor, Tensor]], *, threads: int = 1) -> float:
    """Return the share of images whose largest output is at their label; ``batches`` are ``(images, labels)``."""
    ready = session(path, threads=threads)
    name = input_of(ready, path)
    right = seen = 0
    for x, y in batches:
        logits = ready.run(None, {name: x.numpy()})[0]
        right += int((torch.from_numpy(logits).argmax(1) == y).sum())
        seen += len(y)
    if not seen:
        raise ValueError("no images to measure the accuracy on; give at least one batch.")
    return right / seen


def quantise(
    path: str | Path, out: str | Path, images: Tensor, *, batch_size: int = 32, reduce_range: bool | None = None
) -> Path:
    """Write the network at ``path`` with eight-bit weights and activations to ``out``, and return ``out``.

    Onnxruntime's static quantisation: each weight has a scale per output channel, each activation the range that it
    takes on ``images`` (``[count, ...]``, a hundred or so, prepared as those of training; never the test's). The file
    has pairs of QuantizeLinear and DequantizeLinear, which runtimes turn into integer kernels. Outputs are *not* those
    of the network at ``path``: measure the accuracy.

    Args:
        path, out: files, ``.onnx``.
        images: what ranges are taken from.
        batch_size: images at once.
        reduce_range: whether weights take seven bits of their eight. x86-64 CPUs without VNNI add pairs of products in
            sixteen bits, which overflow with weights of eight: outputs are wrong and nothing says so. None runs both
            *here* on the first batch and keeps the one nearer to the network at ``path``; give True where the file
            goes to CPUs without VNNI, or to ones unknown.

    Raises:
        ValueError: without images, or if the network has several inputs.
        ExportError: if it cannot be quantised, or what comes out is not finite.
    """
    require("onnx", "onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, out = expanded(path), expanded(out)
    if not len(images):
        raise ValueError("no images to calibrate on; give about a hundred of the training images.")
    name = input_of(session(path), path)
    batches = [batch.numpy() for batch in images.split(batch_size)]

    class Reader(quantization.CalibrationDataReader):
        """The images, batch by batch, as onnxruntime asks for them."""

        def __init__(self) -> None:
            self.feeds = iter([{name: batch} for batch in batches])

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    def outputs_of(file: Path) -> list[np.ndarray]:
        return session(file).run(None, {name: batches[0]})

    def distance(found: Path) -> float:
        outputs = outputs_of(found)
        if not all(np.isfinite(array).all() for array in outputs):
            raise ExportError(f"{path.name} with eight bits gives outputs that are not finite. Nothing was written.")
        return sum(float(np.square(a - b).mean()) for a, b in zip(outputs, expected, strict=True))

    ranges = (False, True) if reduce_range is None else (reduce_range,)
    try:
        expected = outputs_of(path)
        with beside(out) as part, tempfile.TemporaryDirectory() as folder, _quiet():
            prepared, *written = (Path(folder) / f"{number}.onnx" for number in range(1 + len(ranges)))
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            for each, reduced in zip(written, ranges, strict=True):
                quantization.quantize_static(
                    str(prepared),
                    str(each),
                    Reader(),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=reduced,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                )
            shutil.copyfile(min(written, key=distance), part)
    except ExportError:
        raise
    except Exception as error:
        names = _grouped_transposed(path)
        why = f" Onnxruntime has no scales for the bias of transposed convolutions in groups: build {names} without."
        raise ExportError(
            f"{path.name} cannot be quantised: {error}.{why if names else ''} Nothing was written."
        ) from error
    return out


def _grouped_transposed(path: Path) -> str:
    """Return the weights' names of transposed convolutions in groups of several outputs that have a bias."""
    import onnx

    graph = onnx.load(path).graph
    shapes = {each.name: each.dims for each in graph.initializer}
    return ", ".join(
        node.input[1]
        for node in graph.node
        if node.op_type == "ConvTranspose"
        and len(node.input) > 2
        and any(each.name == "group" and each.i > 1 for each in node.attribute)
        and shapes.get(node.input[1], (0, 0))[1] > 1
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's remarks on its own defaults off the notebook's page."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
