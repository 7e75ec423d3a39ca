"""Saving a tailored network: its widths as JSON and its weights, in one safetensors file. Nothing is pickled.

``load`` takes the dense architecture from the user's own constructor, so no code is stored either.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .removal import resized

KEY = "tailored_channel_pruning"
_ATTRIBUTES = ("groups", "padding")  # what shapes alone do not tell


class FileError(ValueError):
    """A file that does not hold a tailored network for this model."""


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a tailored (or dense) network to ``path``, a ``.safetensors`` file; return the path.

    The file's metadata holds, as JSON, the shape of every tensor and the groups and channel padding of modules.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in model.state_dict() and id(tensor) not in seen:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    spec = {
        "version": 1,
        "model": type(model).__name__,
        "shapes": {name: list(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())},
        "attributes": {name: _attributes(module) for name, module in model.named_modules() if _attributes(module)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={KEY: json.dumps(spec)})
    return path


def load(dense_model: nn.Module, path: str | Path) -> nn.Module:
    """Return the network saved at ``path``: a copy of ``dense_model`` made as small, with the saved weights.

    ``dense_model`` is the freshly built dense architecture; it is untouched, and its device and dtype are kept.

    Raises:
        FileNotFoundError: if there is no such file.
        FileError: if it is truncated, a pickle, or of another network; the message names the first difference.
    """
    spec, tensors = _read(Path(path))
    shapes = {name: tuple(shape) for name, shape in spec["shapes"].items()}
    dense = {name: tuple(t.shape) for name, t in (*dense_model.named_parameters(), *dense_model.named_buffers())}
    where = f"{path} holds a {spec['model']} that does not fit this {type(dense_model).__name__}"
    if differing := sorted(shapes.keys() ^ dense.keys()):
        raise FileError(f"{where}: only one of them has {differing[0]!r}. Build the network that was saved.")
    for name, shape in shapes.items():
        if len(shape) != len(dense[name]) or any(a > b for a, b in zip(shape, dense[name], strict=True)):
            raise FileError(
                f"{where}: {name!r} is {shape} in the file and {dense[name]} in the dense network. Build the network "
                f"that was "
                f"saved, with the same options."
            )

    def value(name: str, tensor: Tensor) -> Tensor:
        if name in tensors:
            return tensors[name].to(tensor.device, tensor.dtype)
        return tensor[tuple(slice(0, size) for size in shapes[name])]  # a buffer that is not saved with the model

    small, _ = resized(dense_model, value)
    modules = dict(small.named_modules())
    for name, attributes in spec["attributes"].items():
        for key, saved in attributes.items():
            setattr(modules[name], key, tuple(saved) if isinstance(saved, list) else saved)
            if key == "groups":
                modules[name].in_channels = modules[name].weight.shape[1] * saved
    return small


def _attributes(module: nn.Module) -> dict:
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not module.transposed:
        return {"groups": module.groups}
    if isinstance(module, nn.modules.padding._ConstantPadNd):
        return {"padding": list(module.padding)}
    return {}


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path that save() returned.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}). It is truncated or another format, such as a pickle "
            f"from "
            f"torch.save, which is never read here; save the network again with tcp_core.save."
        ) from error
    if KEY not in metadata:
        raise FileError(f"{path} was not written by tcp_core.save: it has weights but no widths.")
    return json.loads(metadata[KEY]), tensors
