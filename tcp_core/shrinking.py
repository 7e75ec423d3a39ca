"""Making a network smaller in place: the same modules and parameters, and all that holds them goes on.

Optimisers and DistributedDataParallel wrappers are found among all living objects at that moment; moving averages have
tensors of their own and are named by the user. Whatever could not go on is an error before anything has changed.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .carrying import Cuts, cut_optimizer, held, is_table, state_tensors
from .channels import Channels
from .removal import check_same_model, misfits, own_tensors, remembered, remove, sizes, written

Average = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Holders:
    """What holds a network's parameters and has state or buckets of their sizes."""

    optimizers: tuple[torch.optim.Optimizer, ...]
    wrappers: tuple[DistributedDataParallel, ...]


def holders(model: nn.Module, given: Iterable[torch.optim.Optimizer] = ()) -> Holders:
    """Return every living optimiser and DistributedDataParallel that holds parameters of ``model``, and ``given``.

    Raises:
        TypeError, ValueError: if what is given is no optimiser, or holds no parameter of the model.
    """
    ours = {id(parameter) for parameter in model.parameters()}
    optimizers = {id(optimizer): optimizer for optimizer in given}
    for optimizer in optimizers.values():
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
            raise TypeError(f"step() takes optimisers; got {type(optimizer).__name__}.")
        if not any(id(parameter) in ours for parameter in held(optimizer)):
            raise ValueError(
                f"this {type(optimizer).__name__} holds no parameter of the model that is tailored: build it from "
                f"tailor.parameters() or from the parameters of the model that the Tailor was given."
            )
    wrappers = []
    for found in _living(torch.optim.Optimizer, DistributedDataParallel):
        if isinstance(found, DistributedDataParallel):
            if any(id(parameter) in ours for parameter in found.parameters()):
                wrappers.append(found)
        elif any(id(parameter) in ours for parameter in held(found)):
            optimizers[id(found)] = found
    return Holders(tuple(optimizers.values()), tuple(wrappers))


def _living(*kinds: type) -> list:
    """Return all objects of these classes that the garbage collector knows."""
    wanted, queue = set(), list(kinds)
    while queue:
        wanted.add(kind := queue.pop())
        queue += kind.__subclasses__()
    # by type, not isinstance, which asks proxies for the class of what they stand for
    return [found for found in gc.get_objects() if type(found) in wanted]


def check_holders(model: nn.Module, channels: Channels, found: Holders, trained: bool) -> None:
    """Raise RuntimeError if the network cannot be made smaller in place.

    ``trained``: it is being trained, so every parameter that requires a gradient must be held by an optimiser.
    """
    check_same_model(model, channels)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:
            raise RuntimeError(
                f"parameter {name!r} is a {type(parameter.data).__name__}, which cannot be cut: a Tailor works with "
                f"whole tensors. Train with DistributedDataParallel rather than with sharded parameters."
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "grad_sample"):
            raise RuntimeError(
                f"parameter {name!r} has gradients per sample (grad_sample), which hooks of modules compute without "
                f"the gates: they are too large where a gate is closing. Tailor with ordinary gradients."
            )
        for key, value in state_tensors(vars(parameter)):
            if name in channels.slots and value.numel() > 1 and value.shape == parameter.shape:
                raise RuntimeError(
                    f"parameter {name!r} has a tensor of its shape in its attribute {key.split('.')[1]!r}, as some "
                    f"optimisers keep: it is not known how to cut it. Use an optimiser that keeps such tensors in "
                    f"optimizer.state."
                )
    stepped = {id(parameter) for optimizer in found.optimizers for parameter in held(optimizer)}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in stepped]
    if trained and left:
        raise RuntimeError(
            f"no optimiser is known that trains {left[0]!r}"
            f"{f' and {len(left) - 1} more parameters' if len(left) > 1 else ''}: its state could not go along when "
            f"the network becomes smaller. Give tailor.step() the optimiser that does, or set requires_grad_(False) on "
            f"what is not trained. If you update parameters by hand, call tailor.step(shrink=False), and "
            f"tailor.finish() once tailor.frozen."
        )
    for optimizer in found.optimizers:
        kind = type(optimizer).__name__
        if getattr(optimizer, "parameters_as_bucket_view", False):
            raise RuntimeError(
                f"{kind} keeps the parameters as views of its buckets, which cannot become smaller; construct it with "
                f"parameters_as_bucket_view=False."
            )
        shapes = {tuple(p.shape) for p in held(optimizer) if id(p) in names and names[id(p)] in channels.slots}
        rest = {key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state")}
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for place, holder in (("its attribute", rest), *(("its parameter groups as", group) for group in options)):
            for key, value in state_tensors(holder):
                if id(value) in stepped or value.numel() == 1 or is_table(key):
                    continue
                if tuple(value.shape) in shapes:
                    raise RuntimeError(
                        f"{kind} keeps a tensor of a parameter's shape in {place} {key.split('.')[1]!r}, outside of "
                        f"its state: it is not known how to cut it. Use an optimiser that keeps such tensors in "
                        f"optimizer.state."
                    )
    for wrapper in found.wrappers:
        what = {
            "mixed_precision": wrapper.mixed_precision is not None,
            "a Python reducer": wrapper._use_python_reducer,
            "delay_all_reduce_named_params": bool(wrapper._delay_all_reduce_params),
            "a built-in communication hook": bool(_hook_name(wrapper)) and not wrapper._comm_hooks,
        }
        if unable := [name for name, there in what.items() if there]:
            raise RuntimeError(
                f"a DistributedDataParallel with {unable[0]} cannot be rebuilt when the network becomes smaller; leave "
                f"that out."
            )


def networks_in(average: Average, model: nn.Module, channels: Channels) -> list[Average]:
    """Return the copies of the traced network in a moving average, or what was given if it is a dict of tensors.

    What holds the ``model`` itself beside its copies, such as a learner with its target, may be given.

    Raises:
        ValueError: if there is none, or tensors of the dict are not the network's.
    """
    if isinstance(average, nn.Module):
        if found := [module for module in average.modules() if module is not model and not misfits(module, channels)]:
            return found
        raise ValueError(
            f"{type(average).__name__} holds no copy of the network: carry(...) takes averages such as "
            f"AveragedModel(model), with the same names and shapes of parameters and buffers, before the network is "
            f"made smaller."
        )
    if not isinstance(average, Mapping):
        raise TypeError(f"carry() takes modules and dicts of tensors by name; got {type(average).__name__}.")
    for name, tensor in average.items():
        if channels.shapes.get(name) != tuple(tensor.shape):
            raise ValueError(
                f"the average's {name!r} of shape {tuple(tensor.shape)} is {channels.shapes.get(name, 'absent')} in "
                f"the network: a dict must have the names of model.state_dict()."
            )
    return [average]


def shrink(
    model: nn.Module,
    channels: Channels,
    open_units: Tensor,
    found: Holders,
    averages: Iterable[Average] = (),
    verify: bool = True,
) -> None:
    """Make ``model`` physically smaller in place, keeping only ``open_units``, and with it what ``found`` holds and
    ``averages`` (each as :func:`networks_in` gives it).

    First the smaller network is made as a copy and compared (``verify``), then all is computed, then it is put in
    place; an error leaves everything as it was.

    Raises:
        ValueError: if a frozen unit would go, a layer would be empty, or the model is not the one that was traced.
        RemovalError: if the smaller network does not compute what the gated one does.
    """
    open_units = channels.check(open_units)
    if verify:
        remove(model, channels, open_units)
    cuts = Cuts()
    for network in (model, *averages):
        _add_network(cuts, network, model, channels, open_units)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {index: channels.kept(name, open_units) for index, name in names.items()}
    for optimizer in found.optimizers:
        cut_optimizer(cuts, optimizer, kept, names)
    with torch.no_grad():
        cuts.apply()
    for wrapper in found.wrappers:
        _rebuild(wrapper)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return, for every name of a parameter or buffer, the first one that the same tensor has: tied ones have more."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _add_network(cuts: Cuts, network: Average, model: nn.Module, channels: Channels, open_units: Tensor) -> None:
    if isinstance(network, Mapping):
        first = _first_names(model)
        for name, tensor in network.items():
            cuts.add(tensor, channels.kept(first.get(name, name), open_units))
        return
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        cuts.add(tensor, channels.kept(name, open_units))
    for module in network.modules():
        after = {name: tuple(cuts.shape(tensor)) for name, tensor in own_tensors(module).items()}
        for name, value in (sizes(module, cuts.shape) | remembered(module, after)).items():
            cuts.set(module, name, value)
    for (name, attribute), value in written(network, channels, open_units).items():
        cuts.set(network.get_submodule(name), attribute, value)


def _hook_name(wrapper: DistributedDataParallel) -> str:
    return wrapper._get_ddp_logging_data().get("comm_hook", "")


def _rebuild(wrapper: DistributedDataParallel) -> None:
    """Give a wrapper buckets of the new sizes, as torch does where one is unpickled."""
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        with warnings.catch_warnings():  # that it is set already
            warnings.simplefilter("ignore")
            wrapper._set_static_graph()
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
