"""Where a network runs: torch, torch.compile, onnxruntime, or whatever a callable asks."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import inspect
import io
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hardware import device_name
from .clock import ROUNDS, LatencyError, Timing, side_by_side, timed

Job = tuple[nn.Module, tuple[Tensor, ...]]
"""A module in eval mode, and the inputs that it is called with."""

ELEMENTWISE = {f"{name}batch_norm{end}" for name in ("", "native_", "cudnn_") for end in ("", "_legit_no_training")}
ELEMENTWISE |= {"_native_batch_norm_legit_no_training"}
ELEMENTWISE |= {f"{name}{ending}" for name in ("relu", "hardtanh", "clamp") for ending in ("", "_")}
"""Operators that a runtime folds into the layer before them."""


@dataclass(frozen=True)
class Torch:
    """Torch as it is, on a device, with so many threads."""

    threads: int
    device: str
    fused = frozenset()
    times_layers = True

    def check(self) -> None:
        """Raise LatencyError if this cannot run here."""
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise LatencyError(f"torch has no device {self.device!r} here: {error}") from error

    def identity(self) -> dict[str, str]:
        """Return what a table of measurements depends on."""
        return {"backend": f"torch {torch.__version__}", "device": device_name(self.device)}

    def measure(self, jobs: Sequence[Job], seconds: float, rounds: int = ROUNDS, patience: int = 1) -> list[Timing]:
        """Return the time of one forward pass of each, interleaved."""
        with torch.no_grad(), _threads(self.threads):
            return timed(
                [self.ready(module, inputs) for module, inputs in jobs],
                seconds=seconds,
                rounds=rounds,
                patience=patience,
            )

    def ready(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Return what runs the module once."""
        module = copy.deepcopy(module).to(self.device)
        inputs = tuple(x.to(self.device) for x in inputs)
        wait = torch.cuda.synchronize if torch.device(self.device).type == "cuda" else lambda: None

        def run() -> None:
            module(*inputs)
            wait()

        return run


@dataclass(frozen=True)
class Compiled(Torch):
    """Torch's compiler. Layers are timed as torch runs them, for compiling each would take hours; networks compiled."""

    fused = ELEMENTWISE

    def check(self) -> None:
        """Raise LatencyError if this cannot run here."""
        super().check()
        if torch.device(self.device).type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            raise LatencyError("torch.compile needs a C++ compiler on the CPU and finds none; install g++ or clang.")

    def identity(self) -> dict[str, str]:
        """Return what a table of measurements depends on."""
        return {"backend": f"torch.compile {torch.__version__}", "device": device_name(self.device)}

    def measure(self, jobs: Sequence[Job], seconds: float, rounds: int = ROUNDS, patience: int = 1) -> list[Timing]:
        """Return the time of one forward pass of each, interleaved."""
        if all(isinstance(module, SINGLE) for module, _ in jobs):
            return super().measure(jobs, seconds, rounds, patience)
        torch._dynamo.reset()  # each network is a new one; the compiler would give up after eight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = [(torch.compile(module, dynamic=False), inputs) for module, inputs in jobs]
            return super().measure(compiled, seconds, rounds, patience)

    def ready(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Return what runs the module once, compiled already."""
        run = super().ready(module, inputs)
        run()
        return run


SINGLE = (nn.modules.conv._ConvNd, nn.Linear, nn.ReLU)


@dataclass(frozen=True)
class OnnxRuntime:
    """Onnxruntime with one execution provider, as its names have it: "CPU", "CUDA", "Tensorrt"."""

    threads: int
    provider: str
    fused = ELEMENTWISE
    times_layers = True

    def check(self) -> None:
        """Raise LatencyError if this cannot run here."""
        for name in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(name) is None:
                raise LatencyError(f"backend 'onnxruntime' needs {name}, which is not installed: pip install {name}")
        import onnxruntime

        there = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
        if self.provider not in there:
            raise LatencyError(f"onnxruntime has no provider {self.provider!r} here; it has {', '.join(there)}.")

    def identity(self) -> dict[str, str]:
        """Return what a table of measurements depends on."""
        version = importlib.metadata.version("onnxruntime")
        device = "cuda" if self.provider in ("CUDA", "Tensorrt") and torch.cuda.is_available() else "cpu"
        return {"backend": f"onnxruntime {version} {self.provider}", "device": device_name(device)}

    def measure(self, jobs: Sequence[Job], seconds: float, rounds: int = ROUNDS, patience: int = 1) -> list[Timing]:
        """Return the time of one run of each session, interleaved."""
        return timed(
            [self.ready(module, inputs) for module, inputs in jobs], seconds=seconds, rounds=rounds, patience=patience
        )

    def ready(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Return what runs the module's session once, inputs and outputs in main memory."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        if single := isinstance(module, SINGLE):  # of one sample: tracing sixty-four takes longer than timing them
            options.add_free_dimension_override_by_name("batch", len(inputs[0]))
            options.enable_mem_pattern = False  # or the second call asks for memory anew, which takes longer than it
        file = _onnx(module, tuple(x[:1] for x in inputs) if single else inputs, any_batch=single)
        session = onnxruntime.InferenceSession(file, options, providers=[f"{self.provider}ExecutionProvider"])
        feed = {put.name: x.numpy() for put, x in zip(session.get_inputs(), inputs, strict=True)}
        return lambda: session.run(None, feed)


@dataclass(frozen=True)
class Asked:
    """A callable that returns milliseconds: of a network, or of a module and its inputs, layers then too."""

    ask: Callable[..., float]
    fused = frozenset()

    @property
    def times_layers(self) -> bool:
        """Whether it takes the inputs as well."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        try:
            parameters = inspect.signature(self.ask).parameters.values()
        except (TypeError, ValueError):
            return False
        return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 2

    def check(self) -> None:
        """Nothing can be said before it is asked."""

    def identity(self) -> dict[str, str]:
        """Return what a table of measurements depends on."""
        return {
            "backend": f"callable {getattr(self.ask, '__qualname__', type(self.ask).__name__)}",
            "device": "its own",
        }

    def measure(self, jobs: Sequence[Job], seconds: float, rounds: int = ROUNDS, patience: int = 1) -> list[Timing]:
        """Return what it answers, the median of three; it takes its own time."""
        return side_by_side([[self._once(*job) for job in jobs] for _ in range(3)])

    def _once(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
        with torch.no_grad():
            answer = self.ask(module, *inputs) if self.times_layers else self.ask(module)
        try:
            ms = float(answer)
        except (TypeError, ValueError):
            ms = math.nan
        if not 0 < ms < math.inf:
            raise LatencyError(
                f"the latency backend {self.identity()['backend'].removeprefix('callable ')!r} returned {answer!r} for "
                f"{type(module).__name__}; it must return milliseconds, a positive number."
            )
        return ms


def backend_of(name: str | Callable, threads: int, device: str, provider: str):
    """Return the backend of a name, or around a callable; ValueError for options that it does not have."""
    made = {
        "torch": lambda: Torch(threads, device),
        "compile": lambda: Compiled(threads, device),
        "onnxruntime": lambda: OnnxRuntime(threads, provider),
    }
    if not callable(name) and name not in made:
        raise ValueError(
            f"backend={name!r}; it must be one of {', '.join(made)}, or a callable that takes a module and returns "
            f"milliseconds."
        )
    if callable(name) and (device != "cpu" or provider != "CPU"):
        given = f"device={device!r}" if device != "cpu" else f"provider={provider!r}"
        raise ValueError(f"{given} came with a callable, which runs networks where it likes: leave it out.")
    if name == "onnxruntime" and device != "cpu":
        raise ValueError(f"device={device!r} is where torch runs; for onnxruntime give provider=, such as 'CUDA'.")
    if name in ("torch", "compile") and provider != "CPU":
        raise ValueError(f"provider={provider!r} is of onnxruntime; for {name!r} give device=, such as 'cuda'.")
    return Asked(name) if callable(name) else made[name]()


def _onnx(module: nn.Module, inputs: tuple[Tensor, ...], *, any_batch: bool) -> bytes:
    """Return the module as ONNX of fixed sizes but for the batch, by the older exporter: it takes a quarter of the
    newer one's time. With ``any_batch``, a dimension of that name, there is one input.
    """
    file, options = io.BytesIO(), {}
    if any_batch:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, file, dynamo=False, **options)
    return file.getvalue()


@contextlib.contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
