"""Saving a tailored network: its widths as JSON and its weights, in one safetensors file. Nothing is pickled.

``load`` takes the dense architecture from the user's own constructor, so no code is stored either. A file may come from
anywhere: it decides how many channels are left and their weights, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn, uint8

from .files import beside, expanded
from .gates import device_of, unwrapped
from .given import check_module
from .removal import dense_shapes, own_parameter, own_tensors, resized, unfilled

KEY = "tailored_channel_pruning"
VERSION = 2
"""1 had no shapes of the dense network, so that a file of another one was not noticed, and no hash."""

HEADER, HEADER_PER_TENSOR = 2**20, 2**11
"""Bytes of JSON, at most, before the weights: so much in any case, and for each tensor of the dense network."""

FIELDS = ("version", "model", "shapes", "dense_shapes", "attributes", "sha256")


class FileError(ValueError):
    """A file that does not hold a tailored network for this model."""


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a tailored (or dense) network to ``path``, a ``.safetensors`` file; return the path.

    The file holds every parameter and buffer; its metadata holds, as JSON, the shape of each now and in the dense
    network, the groups of modules, their channel padding and the width of bare norms, and the SHA-256 of all of it. It
    is whole or not there. What modules return from ``get_extra_state`` may be anything, so it is not stored, and a
    warning says so.

    Raises:
        ValueError: for another suffix, or a Tailor, whose network ``finish()`` returns.
        OSError: if the file cannot be written.
    """
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{str(path)!r} ends in {path.suffix or 'nothing'!r}; it must end in .safetensors, as such a file is "
            f"written. For ONNX files and torch's archives there is tcp_core.export."
        )
    model = unwrapped(model, "save")
    if extra := _with_extra_state(model):
        warnings.warn(
            f"{path} will not hold the extra state of {', '.join(map(repr, extra[:3]))}"
            f"{f' and {len(extra) - 3} more modules' if len(extra) > 3 else ''}: what get_extra_state returns may be "
            f"any object, and nothing is pickled here. load() gives these modules as the dense network has them. Keep "
            f"it in a buffer, or save it beside and call set_extra_state after load().",
            RuntimeWarning,
            stacklevel=2,
        )
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(model).items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    modules = [(name, _attributes(module)) for name, module in model.named_modules()]
    spec = {
        "version": VERSION,
        "model": type(model).__name__,
        "shapes": shapes,
        "dense_shapes": {name: list(shape) for name, shape in dense_shapes(model).items() if name in shapes},
        "attributes": {name: attributes for name, attributes in modules if attributes},
    }
    spec["sha256"] = _digest(spec, tensors)
    with beside(path) as part:
        save_file(tensors, part, metadata={KEY: json.dumps(spec)})
    return path


def load(dense_model: nn.Module, path: str | Path) -> nn.Module:
    """Return the network saved at ``path``: a copy of ``dense_model`` made as small, with the saved weights.

    ``dense_model`` is the freshly built dense architecture; it is untouched, and its device and dtype are kept. It must
    have the shapes of the dense network that was saved. Of its modules, only the sizes, the ``groups`` of convolutions
    and the amounts of padding modules are changed, to what fits the shapes and is no more than the dense network has;
    a file that says anything else is refused before its weights are read.

    Raises:
        FileNotFoundError: if there is no such file.
        FileError: if it is truncated, changed, a pickle, contradicts itself or is of another network or version; the
            message says which, and what differs.
    """
    path = expanded(path)
    check_module(dense_model, "load into")
    dense = _tensors(dense_model)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path that save() returned.")
    most = HEADER + HEADER_PER_TENSOR * len(dense)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if most < header <= path.stat().st_size:
        raise FileError(
            f"{path} has {header:,} bytes before its weights, and {most:,} are more than a "
            f"{type(dense_model).__name__} needs. Build the network that was saved."
        )
    try:
        with safe_open(path, framework="pt") as file:
            spec = _spec(path, file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            _check(path, spec, shapes, dense_model, dense)
            tensors = {name: file.get_tensor(name).clone() for name in shapes}  # of its own, not of the mapped file
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}). It is truncated or another format, such as a pickle "
            f"from torch.save, which is never read here; save the network again with tcp_core.save."
        ) from error
    for name, tensor in tensors.items():
        if name in dense and _kind(tensor) != _kind(dense[name]):
            raise FileError(f"{path} has {tensor.dtype} as {name!r}, which is {dense[name].dtype} in the network.")
    if spec["sha256"] != _digest({key: value for key, value in spec.items() if key != "sha256"}, tensors):
        raise FileError(
            f"{path} has changed since it was saved: its SHA-256 is not that of its contents. Take another copy, or "
            f"save the network again."
        )
    small, _ = resized(dense_model, lambda name, tensor: tensors[name].to(tensor.device, tensor.dtype))
    for name in tensors.keys() - dense.keys():  # a pass had filled them in the network that was saved
        module, _, key = name.rpartition(".")
        small.get_submodule(module)._buffers[key] = tensors[name].to(device_of(dense_model))
    for name, attributes in spec["attributes"].items():
        if "padding" in attributes:
            small.get_submodule(name).padding = tuple(attributes["padding"])
        if "num_features" in attributes:
            small.get_submodule(name).num_features = attributes["num_features"]
    return small


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by the first name it goes by."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _with_extra_state(model: nn.Module) -> list[str]:
    """Return the names of modules whose state is more than parameters and buffers ("" for the network itself)."""
    plain = nn.Module.get_extra_state
    return [name for name, module in model.named_modules() if type(module).get_extra_state is not plain]


def _attributes(module: nn.Module) -> dict:
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not module.transposed:
        return {"groups": module.groups}
    if isinstance(module, nn.GroupNorm):
        return {"num_groups": module.num_groups}
    if isinstance(module, nn.modules.padding._ConstantPadNd):
        return {"padding": list(module.padding)}
    if isinstance(module, nn.modules.batchnorm._NormBase) and not own_tensors(module):
        return {"num_features": module.num_features}
    return {}


def _digest(spec: Mapping, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all that a file says, however it is laid out."""
    found = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.contiguous().flatten().view(uint8).numpy())
    return found.hexdigest()


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point() or tensor.is_complex():
        return "complex" if tensor.is_complex() else "floating"
    return str(tensor.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What a file says


def _spec(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the metadata says, each field of the type that it must have."""
    if KEY not in metadata:
        raise FileError(f"{path} was not written by tcp_core.save: it has weights but no widths.")
    try:
        spec = json.loads(metadata[KEY], object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path} has widths that cannot be read ({str(error)[:200]}); save the network again."
        ) from error
    if not isinstance(spec, dict):
        raise FileError(f"{path} has widths that cannot be read (a {type(spec).__name__}); save the network again.")
    version = spec.get("version")
    if type(version) is not int or version != VERSION:
        older = (
            " Files of version 1 do not say what the dense network was, so a wrong one would not be noticed: load it "
            "with the tcp_core that saved it, and save the network with this one."
        )
        raise FileError(
            f"{path} has format version {str(version)[:20]}; this version reads {VERSION}."
            f"{older if version == 1 else ' Update tcp_core.'}"
        )
    if differing := sorted(spec.keys() ^ set(FIELDS)):
        raise FileError(f"{path} contradicts itself: {differing[0][:80]!r} is not what its version 2 has or lacks.")
    for field, kind in (
        ("model", str),
        ("sha256", str),
        ("attributes", dict),
        ("shapes", dict),
        ("dense_shapes", dict),
    ):
        if not isinstance(spec[field], kind):
            raise FileError(f"{path} contradicts itself: its {field} are a {type(spec[field]).__name__}.")
    for field in ("shapes", "dense_shapes"):
        for name, shape in spec[field].items():
            if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
                raise FileError(f"{path} contradicts itself: the {field} of {name!r} are no list of sizes.")
    return spec


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


# ---------------------------------------------------------------------------------------------------------------------
# Whether the dense network can be made so


def _check(
    path: Path, spec: Mapping, shapes: Mapping[str, tuple], model: nn.Module, dense: Mapping[str, Tensor]
) -> None:
    """Raise FileError unless ``model``, whose tensors are ``dense``, can be made as small as the file says."""
    kind = spec["model"] if spec["model"].isidentifier() and len(spec["model"]) <= 80 else "network"
    where = f"{path} holds a {kind} that does not fit this {type(model).__name__}"
    build = "Build the network that was saved, with the same options."
    if (
        shapes != {name: tuple(shape) for name, shape in spec["shapes"].items()}
        or shapes.keys() != spec["dense_shapes"].keys()
    ):
        raise FileError(f"{path} contradicts itself: its widths are not those of its weights; save the network again.")
    if differing := sorted((shapes.keys() ^ dense.keys()) - (unfilled(model) & shapes.keys())):
        raise FileError(f"{where}: only one of them has {differing[0]!r}. {build}")
    saved = {name: tuple(spec["dense_shapes"][name]) for name in dense}
    differing = [name for name, tensor in dense.items() if saved[name] != tuple(tensor.shape)]
    if differing:
        texts = []
        for name in differing[:3]:
            pruned = f" (pruned to {shapes[name]})" if shapes[name] != saved[name] else ""
            texts.append(
                f"{name!r} is {saved[name]}{pruned} in the file and {tuple(dense[name].shape)} in the dense network"
            )
        more = f"; {len(differing) - 3} more differ" if len(differing) > 3 else ""
        raise FileError(
            f"{where}: {'; '.join(texts)}{more}. A tailored network is smaller than its own dense network, which this "
            f"one is not. {build}"
        )
    for name, tensor in dense.items():
        shape, full = shapes[name], tuple(tensor.shape)
        if len(shape) != len(full) or any(not min(b, 1) <= a <= b for a, b in zip(shape, full, strict=True)):
            raise FileError(f"{path} contradicts itself: {name!r} is {shape}, pruned from {full}.")
    names = {id(tensor): name for name, tensor in dense.items()}
    for name, module in model.named_modules():
        own = {
            key: shapes[names[id(tensor)]]
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        groups = _check_sizes(path, name, module, own)
        _check_attributes(path, name, module, spec["attributes"].get(name, {}), groups)
    if unknown := sorted(spec["attributes"].keys() - dict(model.named_modules()).keys()):
        raise FileError(f"{where}: only the file has the module {unknown[0][:80]!r}. {build}")


def _check_sizes(path: Path, name: str, module: nn.Module, own: Mapping[str, tuple]) -> int:
    """Return the groups of a convolution or group norm (1 of anything else), if the shapes of its own tensors go
    together.
    """
    groups, outputs = 1, None
    weight = own_parameter(module, "weight")
    fits = True
    if isinstance(module, nn.modules.conv._ConvNd) and weight is None:
        groups = module.groups  # its weight is computed, so nothing can be removed
    elif isinstance(module, nn.modules.conv._ConvNd):
        shape, full = own["weight"], tuple(weight.shape)
        fits = shape[2:] == full[2:]
        if module.groups > 1:  # whole groups are removed, so what a group has stays
            groups, rest = divmod(module.groups * shape[0], full[0])
            if rest or shape[1] != full[1]:  # but in the last one, an ordinary layer to the run that came after
                groups, fits = 1, fits and shape[0] <= full[0] // module.groups
        outputs = shape[1] * groups if module.transposed else shape[0]
    elif isinstance(module, nn.Linear) and weight is not None:
        outputs = own["weight"][0]
    elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        lengths = {shape[0] for key, shape in own.items() if key in _OF_NORMS}
        fits = len(lengths) <= 1
        if isinstance(module, nn.GroupNorm):  # here, too, whole groups are removed
            groups, rest = divmod(module.num_groups * max(lengths, default=module.num_channels), module.num_channels)
            fits = fits and not rest
    if outputs is not None and own.get("bias", (outputs,)) != (outputs,):
        fits = False
    if not fits:
        raise FileError(f"{path} contradicts itself: the shapes in {name!r} do not go together: {dict(own)}.")
    return groups


_OF_NORMS = ("weight", "bias", "running_mean", "running_var")


def _check_attributes(path: Path, name: str, module: nn.Module, said: Any, groups: int) -> None:
    """Raise FileError unless a file says of one module what only can be so."""
    allowed = f"only groups, and the padding of padding modules, may be, and {name!r} is a "
    allowed += type(module).__name__
    dense = _attributes(module)
    if not isinstance(said, dict) or said.keys() - dense.keys():
        what = sorted(said.keys() - dense.keys())[0][:80] if isinstance(said, dict) else said
        raise FileError(f"{path} sets {what!r} of module {name!r}: {allowed}. It was not written by tcp_core.save.")
    if "groups" in dense:
        found = said.get("groups", 1)
        if type(found) is not int or found != groups:
            raise FileError(f"{path} sets groups of {name!r} to {str(found)[:40]}, where its weights have {groups}.")
    if "num_groups" in dense and said.get("num_groups", dense["num_groups"]) != groups:  # older files do not say it
        raise FileError(
            f"{path} sets num_groups of {name!r} to {str(said.get('num_groups'))[:40]}, where its weights have "
            f"{groups}: build the network that was saved, with as many groups."
        )
    if "num_features" in dense:
        found = said.get("num_features", dense["num_features"])  # older files do not say it
        if type(found) is not int or not 1 <= found <= dense["num_features"]:
            raise FileError(
                f"{path} sets num_features of {name!r} to {str(found)[:40]}; the dense network has "
                f"{dense['num_features']}, which can only become fewer."
            )
    if "padding" in dense:
        found = said.get("padding")
        ints = isinstance(found, list) and all(type(amount) is int for amount in found)
        full = dense["padding"]
        if (
            not ints
            or len(found) != len(full)
            or not all(a == b or 0 <= a <= b for a, b in zip(found, full, strict=True))
        ):
            raise FileError(
                f"{path} sets padding of {name!r} to {str(found)[:80]}; the dense network has {full}, of which amounts "
                f"of channels can only become smaller."
            )
