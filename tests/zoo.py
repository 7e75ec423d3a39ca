"""The classification networks of torchvision and timm, with what the exactness checks on them share.

`exactness(name, subsets)` traces one network and compares, for random sets of closed units, the closed network with the
removed one, and the predicted cost with torch's own counters.
"""

import contextlib
import math
import re
import time

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tcp_core import close, remove, trace

MAX_PARAMS = 100e6
BATCH = 2
CLASSES = 10


def fused(query, key, value, *args, out_shape=None, **kwargs):
    """Return the FLOPs of attention by the shapes of its inputs."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def recurrent(x, weight, hidden_weight, *args, out_shape=None, **kwargs):
    """Return the FLOPs of one layer of an LSTM in one direction by the shapes of its inputs and weights."""
    return 2 * math.prod(x[:-1]) * (math.prod(weight) + math.prod(hidden_weight))


FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused,
    torch.ops.aten.mkldnn_rnn_layer: recurrent,
}
"""Torch's counter leaves these out where a CPU runs them as one operator."""

# One network of each family, in its smallest size.
REPRESENTATIVES = (
    "resnet18",
    "resnext50_32x4d",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "shufflenet_v2_x0_5",
    "densenet121",
    "googlenet",
    "squeezenet1_1",
    "alexnet",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
)


def names(max_params=MAX_PARAMS):
    """Return the names of torchvision's classifiers with at most `max_params` parameters, smallest first."""
    params = {
        name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    return sorted((name for name in params if params[name] <= max_params), key=lambda name: (params[name], name))


def timm_names(max_params=60e6):
    """Return "timm:NAME" of the smallest network of each of timm's families, a module of its own each."""
    import timm

    smallest = {}
    large = re.compile("base|large|huge|giant|xl|so[0-9]+m|[0-9]{3}m$")  # by name, as building each takes minutes
    for name in timm.list_models():
        if large.search(name):
            continue
        with torch.device("meta"), contextlib.suppress(Exception):  # a few cannot be built there
            params = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
            if params <= max_params:
                family = timm.model_entrypoint(name).__module__
                smallest[family] = min(smallest.get(family, (params, name)), (params, name))
    return [f"timm:{name}" for _, name in sorted(smallest.values())]


def image_size(name):
    """Return the smallest image that network `name` takes in training and in evaluation mode; of timm's its own, 256
    at most where that is allowed.
    """
    if name.startswith("timm:"):
        import timm

        settings = timm.get_pretrained_cfg(name.removeprefix("timm:"))
        return settings.input_size[-1] if settings.fixed_input_size else min(settings.input_size[-1], 256)
    if name == "inception_v3":
        return 299  # its auxiliary classifier, used in training
    if name == "maxvit_t":
        return 224  # seven windows in the last stage
    return 64


def build(name, seed=0, size=None):
    """Return network `name` with random weights, biases and running statistics, none of them zero or tiny."""
    options = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": True}
    if name.startswith("vit"):
        options["image_size"] = size or image_size(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            import timm

            model = timm.create_model(name.removeprefix("timm:"), num_classes=CLASSES)
        else:
            model = torchvision.models.get_model(name, weights=None, **options)
        for key, parameter in model.named_parameters():
            if key.endswith("layer_scale"):  # 1e-6 at the start, which would hide the whole block
                parameter.uniform_(0.5, 1)
            elif parameter.abs().max() < 1e-3 and parameter.dim() > 1:
                parameter.normal_(0, 0.1)  # the transformers' last layer starts at zero, timm's scales at 1e-6
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1) if key.endswith("weight") else parameter.normal_(0, 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def random_open(channels, share, seed=0):
    """Open units when about `share` of the prunable ones close and every family keeps one."""
    generator = torch.Generator().manual_seed(seed)
    closed = channels.prunable & (torch.rand(channels.units, generator=generator) < share)
    for family in channels.families:
        if closed[family.units].all():
            keep = torch.randint(len(family.units), (), generator=generator)
            closed[family.units[keep]] = False
    return ~closed


def counted(model, x):
    """Return the cost by torch's own counters: macs of one sample in evaluation mode, and parameters."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    modes = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels are not counted
    try:
        for parameter in learned:
            parameter.requires_grad_(False)  # the counter cannot take one that is handed from module to module
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.no_grad():
            model.eval()(x[:1].clone())
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
        for parameter in learned:
            parameter.requires_grad_(True)
    macs, remainder = divmod(counter.get_total_flops(), 2)
    assert remainder == 0
    return {"macs": macs, "params": sum(parameter.numel() for parameter in model.parameters())}


def exactness(name, subsets):
    """Return one row of results for network `name` and `subsets` random sets of closed units, in float32.

    `max_relative_error` is the largest difference of closed and removed network, relative to the largest
    output; `cost_mismatches` the number of subsets (and the dense network) for which predicted and counted cost
    differ at all; `least_effect` the smallest change that closing made to the output: were it zero, nothing
    would have been compared.
    """
    model = build(name)
    size = image_size(name)
    x = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    channels = trace(model, x)
    seconds = time.perf_counter() - start
    errors, effects = [0.0], []
    mismatches = int(channels.cost() != counted(model, x))
    with torch.no_grad():
        dense = model(x)
        for seed in range(subsets):
            share = (seed % 10 + 0.5) / 10
            open_units = random_open(channels, share, seed)
            small = remove(model, channels, open_units, verify=False)
            masked, removed = close(model, channels, open_units)(x), small(x)
            scale = masked.abs().max()
            errors.append(float((masked - removed).abs().max() / scale))
            effects.append(float((masked - dense).abs().max() / dense.abs().max()))
            mismatches += channels.cost(open_units) != counted(small, x)
    return {
        "model": name,
        "image_size": size,
        "params": channels.cost()["params"],
        "units": channels.units,
        "prunable": int(channels.prunable.sum()),
        "unknown": len(channels.unknown),
        "trace_seconds": round(seconds, 3),
        "subsets": subsets,
        "max_relative_error": max(errors),
        "cost_mismatches": mismatches,
        "least_effect": min(effects),
    }
