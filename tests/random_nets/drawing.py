"""Whole networks, and the strategies that draw them."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from .blocks import Chain, Conv, shaped
from .functions import ACTIVATIONS, FIXED, MOVING, NORMS, SAFE, UNSAFE

CLASSES = 5
INPUT_SHAPE = (2, 3, 8, 8)


# Heads


class Head(nn.Module):
    """What makes the output: a tensor, a tuple, a dict, or more in training than in evaluation."""

    def __init__(self, x, kind="pool"):
        super().__init__()
        self.kind = kind
        channels, pixels = x.size(1), x[0, 0].numel()
        self.linear = nn.Linear(channels * (pixels if kind in ("flatten", "fixed_view") else 1), CLASSES)
        self.features = channels * pixels
        if kind == "hidden":
            self.hidden, self.norm = nn.Linear(channels, 7), nn.BatchNorm1d(7)
            self.linear = nn.Linear(7, CLASSES)
        if kind == "conv":
            self.linear = nn.Conv2d(channels, CLASSES, 1)
        if kind in ("tuple", "dict", "auxiliary"):
            self.second = Conv(x, 4)
            self.other = nn.Linear(4, CLASSES)

    def forward(self, x):
        if self.kind == "features":
            return x
        if self.kind == "flatten":
            return self.linear(torch.flatten(x, 1))
        if self.kind == "fixed_view":
            return self.linear(x.reshape(-1, self.features))
        if self.kind == "conv":
            return F.adaptive_avg_pool2d(self.linear(x), 1).flatten(1)
        if self.kind == "maximum":
            return self.linear(x.amax((2, 3)))
        if self.kind == "reshape":
            return self.linear(F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1))
        if self.kind == "hidden":
            return self.linear(F.relu(self.norm(self.hidden(x.mean((2, 3))))))
        out = self.linear(x.mean((2, 3)))
        if self.kind == "pool" or (self.kind == "auxiliary" and not self.training):
            return out
        other = self.other(self.second(x).mean((2, 3)))
        return {"out": out, "other": [other, x]} if self.kind == "dict" else (out, other)


HEADS = (
    "pool",
    "flatten",
    "conv",
    "maximum",
    "reshape",
    "hidden",
    "features",
    "tuple",
    "dict",
    "auxiliary",
    "fixed_view",
)


class RandomNet(nn.Module):
    """The network of a recipe, in float64, for inputs of INPUT_SHAPE.

    `frozen` sets requires_grad of every third parameter to False, `mixed` leaves every other norm
    and dropout in evaluation mode, `hook` doubles what the first convolution gives in a hook.
    """

    def __init__(self, recipe, *, head="pool", seed=0, frozen=False, mixed=False, hook=False):
        super().__init__()
        self.arguments = {
            "recipe": recipe,
            "head": head,
            "seed": seed,
            "frozen": frozen,
            "mixed": mixed,
            "hook": hook,
        }
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            self.body, x = shaped(Chain(torch.zeros(INPUT_SHAPE), recipe), torch.zeros(INPUT_SHAPE))
            self.head = Head(x, head)
            for parameter in dict.fromkeys(self.parameters()):
                if parameter.dim() < 2:
                    parameter.copy_(torch.randn_like(parameter) * 0.5 + torch.randn_like(parameter).sign())
            for name, buffer in self.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(torch.randn_like(buffer) * 0.5)
                elif name.endswith("running_var"):
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
                elif name.endswith("num_batches_tracked"):
                    buffer.fill_(3)
        self.double()
        if frozen:
            for parameter in list(self.parameters())[::3]:
                parameter.requires_grad_(False)
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        if hook and convolutions:
            convolutions[0].register_forward_hook(lambda module, args, out: out * 2)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.arguments["mixed"]:
            still = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d | nn.Dropout)]
            for module in still[::2]:
                module.training = False
        return self

    def forward(self, x):
        return self.head(self.body(x))

    def __repr__(self):
        defaults = {"head": "pool", "seed": 0, "frozen": False, "mixed": False, "hook": False}
        rest = {name: value for name, value in self.arguments.items() if name != "recipe"}
        rest = "".join(f", {name}={value!r}" for name, value in rest.items() if value != defaults[name])
        return f"RandomNet({self.arguments['recipe']!r}{rest})"


# Strategies


def _one_of(*values):
    return st.sampled_from(values)


def _options(name, **options):
    """(name, some options); the rest keep their defaults, so that shrunk recipes are short."""
    return st.tuples(st.just(name), st.fixed_dictionaries({}, optional=options))


_BOOL = st.booleans()
_WIDTH = _one_of(8, 4, 6, 12)
_NORM = st.one_of(_one_of("bn", "none", "bn_plain"), st.sampled_from(sorted(NORMS)))
_ACT = st.one_of(_one_of("relu", "relu_", "none"), st.sampled_from(sorted(ACTIVATIONS)))

_CONV = _options(
    "conv",
    width=_WIDTH,
    kernel=_one_of(3, 1),
    stride=_one_of(1, 2),
    groups=_one_of(1, 2, 4),
    bias=_BOOL,
    norm=_NORM,
    act=_ACT,
    padding_mode=_one_of("zeros", "reflect", "circular"),
)
_LAYERS = st.one_of(
    _options("depthwise", multiplier=_one_of(1, 2, 3), bias=_BOOL, norm=_NORM, act=_ACT),
    _options(
        "transposed",
        width=_WIDTH,
        groups=_one_of(1, 2),
        stride=_one_of(1, 2),
        bias=_BOOL,
        norm=_NORM,
    ),
    _options("functional", width=_WIDTH, norm=_BOOL, groups=_one_of(1, 2)),
    _options("twice", kind=_one_of("module", "weight"), shared_norm=_BOOL),
    _options(
        "squeezeexcite",
        width=_one_of(4, 2),
        gate=_one_of("sigmoid", "hardsigmoid", "tanh"),
        linear=_BOOL,
    ),
    _options(
        "scale",
        kind=_one_of(
            *(
                "gamma",
                "gamma4",
                "last",
                "bias",
                "position",
                "sigmoid",
                "scalar",
                "per_pixel",
                "fusion",
                "log",
            )
        ),
    ),
    _options("shuffle", groups=_one_of(2, 3, 4), kind=_one_of("sizes", "module")),
    _options("pixelshuffle", width=_one_of(4, 2), norm=_NORM, module=_BOOL),
    _options("preact", width=_WIDTH, plain=_BOOL),
    _options("dense", growth=_one_of(4, 3), layers=_one_of(1, 2, 3)),
    _options("chunkunit", depthwise=_BOOL, shuffle=_BOOL),
    _options("inverted", expand=_one_of(1, 2)),
    _options(
        "tokens",
        width=_WIDTH,
        norm=_one_of("none", "layer", "bn1d"),
        residual=_BOOL,
        token=_BOOL,
        attention=_one_of("none", "none", "module", "qkv", "encoder", "gru"),
        act=_one_of("gelu", "relu", "none", "softplus", "dropout"),
    ),
    _options("otherrank", width=_WIDTH, dims=_one_of(1, 3)),
)
_ODD_LAYERS = st.one_of(
    _options(
        "weighted",
        width=_WIDTH,
        kind=_one_of(
            "scaled",
            "standardised",
            "masked",
            "sliced",
            "flipped",
            "tied",
            "weight_norm",
            "spectral",
        ),
    ),
    _options("buffered", persistent=_BOOL, shift=_BOOL, pixels=_BOOL),
    _options(
        "groupedview",
        groups=_one_of(2, 4),
        fixed=_BOOL,
        kind=_one_of("shuffle", "max", "max_inside", "scale"),
    ),
    _options("fixedsplit", first=_one_of(2, 3), width=_WIDTH, sections=_BOOL),
    _options("mixer", kind=_one_of("pixels", "rows", "batch", "sequence", "volume"), bias=_BOOL),
    _options("einsum", width=_WIDTH, kind=_one_of("einsum", "matmul", "transposed")),
)


def _functions(table):
    return st.tuples(st.sampled_from(sorted(table)), st.just({}))


def _evenly(*choices):
    """Like st.one_of, which flattens nested choices and so prefers the table with most entries."""
    return st.integers(0, len(choices) - 1).flatmap(lambda index: choices[index])


def _recipes(depth, odd, min_size=1):
    """Lists of blocks, nested `depth` deep; `odd` adds what a tracer may have to freeze."""
    choices = [_CONV, _LAYERS, _LAYERS, _functions(SAFE), _functions(MOVING)]
    if depth:
        inner = _recipes(depth - 1, odd)
        joins = _one_of("add", "iadd", "mul", "product", "maximum", "where", "lerp")
        shortcuts = _one_of("project", "pad")
        branches = st.lists(inner, min_size=1, max_size=3)
        choices += [
            _options("residual", inner=inner, shortcut=shortcuts, join=joins, act=_ACT),
            st.tuples(st.just("concat"), st.fixed_dictionaries({"branches": branches})),
        ]
    if odd:
        choices += [_evenly(_ODD_LAYERS, _functions(UNSAFE), _functions(FIXED))]
    return st.lists(_evenly(*choices), min_size=min_size, max_size=min_size + 2)


@st.composite
def networks(draw, *, odd=True):
    """Random networks (RandomNet); with odd=False only of blocks that a good tracer can follow."""
    # A convolution in front: otherwise many recipes would do everything to the frozen input.
    recipe = [draw(_CONV), *draw(_recipes(2, odd, min_size=2)), draw(_CONV)]
    heads = [head for head in HEADS if odd or head != "fixed_view"]
    return RandomNet(
        recipe,
        head=draw(st.sampled_from(heads)),
        seed=draw(st.integers(0, 99)),
        frozen=draw(_BOOL),
        mixed=draw(_BOOL),
        hook=draw(_BOOL),
    )
