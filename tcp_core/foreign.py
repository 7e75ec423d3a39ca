"""Networks that others define, by name: timm's, torchvision's, and any function that can be imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from functools import partial

import torchvision
from torch import nn

FORMS = '"timm:NAME", "torchvision:NAME" or "package.module:function"'


def build(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """Return the freshly initialised network of that name, see :func:`builder`.

    Raises TypeError if a user's function returns something else than a network, or cannot be called in this way.
    """
    model = builder(name)(num_classes=num_classes, in_channels=in_channels)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name!r} returned {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def builder(name: str) -> Callable[..., nn.Module]:
    """Return what is called with ``num_classes`` and ``in_channels`` for the network of that name; nothing is built.

    Raises:
        ValueError: if there is no such network or function, or it cannot be called so.
        ImportError: if the package that has it is not installed.
    """
    place, _, network = name.partition(":")
    if not place or not network:
        raise ValueError(f"{name!r} is no network's name; it must be {FORMS}.")
    if place == "timm":
        return _timm(network)
    if place == "torchvision":
        return _torchvision(network)
    return _function(name, place, network)


def _timm(network: str) -> Callable[..., nn.Module]:
    if importlib.util.find_spec("timm") is None:
        raise ImportError(f"'timm:{network}' needs the package timm, which is not installed here: pip install timm")
    import timm

    if not timm.is_model(network):
        raise ValueError(f"timm has no network {network!r}{_nearest(network, timm.list_models())}.")

    def build(*, num_classes: int, in_channels: int) -> nn.Module:
        return timm.create_model(network, num_classes=num_classes, in_chans=in_channels)

    return build


def _torchvision(network: str) -> Callable[..., nn.Module]:
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        raise ValueError(f"torchvision has no classifier {network!r}{_nearest(network, known)}.")
    # auxiliary heads would make two outputs of one, and this is what they announce as a later default
    options = {"googlenet": {"aux_logits": False, "init_weights": True}}
    options["inception_v3"] = options["googlenet"]
    return partial(_with_stem, partial(torchvision.models.get_model, network, **options.get(network, {})))


def _with_stem(make: Callable[..., nn.Module], *, num_classes: int, in_channels: int) -> nn.Module:
    """Put, for images of other than three channels, a like convolution in the place of the first one."""
    model = make(num_classes=num_classes)
    if in_channels == 3:
        return model
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    sizes = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    model.set_submodule(name, nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **sizes))
    return model


def _function(name: str, module: str, function: str) -> Callable[..., nn.Module]:
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name!r} names the module {module}, and there is no {error.name}: install it, or start in the folder "
            f"that has it (or set PYTHONPATH)."
        ) from error
    if not callable(found):
        there = [key for key, value in vars(importlib.import_module(module)).items() if callable(value)]
        raise ValueError(f"{module} has no function {function!r}{_nearest(function, there)}.")
    try:
        inspect.signature(found).bind(num_classes=10, in_channels=3)
    except TypeError as error:
        raise ValueError(
            f"{name!r} is called with num_classes=... and in_channels=..., which it does not take ({error}); write a "
            f"function that does."
        ) from None
    except ValueError:  # of a builtin, which has no signature
        pass
    return found


def _nearest(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""
