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
VERSION = 1


class FileError(ValueError):
    """A file that does not hold a tailored network for this model."""


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a tailored (or dense) network to ``path``, a ``.safetensors`` file; return the path.

    The file holds every parameter and buffer; its metadata holds, as JSON, the shape of each and the groups and channel
    padding of modules.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(model).items()}
    spec = {
        "version": VERSION,
        "model": type(model).__name__,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
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
        FileError: if it is truncated, a pickle, contradicts itself or is of another network; the message says which.
    """
    spec, tensors = _read(Path(path))
    dense = _tensors(dense_model)
    where = f"{path} holds a {spec['model']} that does not fit this {type(dense_model).__name__}"
    if differing := sorted(tensors.keys() ^ dense.keys()):
        raise FileError(f"{where}: only one of them has {differing[0]!r}. Build the network that was saved.")
    for name, tensor in dense.items():
        shape, full = tuple(tensors[name].shape), tuple(tensor.shape)
        if len(shape) != len(full) or any(a > b for a, b in zip(shape, full, strict=True)):
            raise FileError(
                f"{where}: {name!r} is {shape} in the file and {full} in the dense network. Build the network that was "
                f"saved, with the same options."
            )
    small, _ = resized(dense_model, lambda name, tensor: tensors[name].to(tensor.device, tensor.dtype))
    modules = dict(small.named_modules())
    for name, attributes in spec["attributes"].items():
        if name not in modules:
            raise FileError(f"{where}: only the file has the module {name!r}. Build the network that was saved.")
        for key, saved in attributes.items():
            setattr(modules[name], key, tuple(saved) if isinstance(saved, list) else saved)
            if key == "groups":
                modules[name].in_channels = modules[name].weight.shape[1] * saved
    return small


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by the first name it goes by."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


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
            f"from torch.save, which is never read here; save the network again with tcp_core.save."
        ) from error
    if KEY not in metadata:
        raise FileError(f"{path} was not written by tcp_core.save: it has weights but no widths.")
    try:
        spec = json.loads(metadata[KEY])
        version, shapes = spec["version"], {name: tuple(shape) for name, shape in spec["shapes"].items()}
        whole = isinstance(spec["model"], str) and all(isinstance(each, dict) for each in spec["attributes"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path} has widths that cannot be read ({error!r}); save the network again.") from error
    if version != VERSION:
        raise FileError(f"{path} has format version {version!r}; this version reads {VERSION}. Update tcp_core.")
    if not whole or shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise FileError(f"{path} contradicts itself: its widths are not those of its weights; save the network again.")
    return spec, tensors
