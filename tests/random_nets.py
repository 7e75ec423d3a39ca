"""Random small networks for property tests of tracing, closing and removing.

A network is built from a *recipe*: a list of `(name, options)` pairs. Every block takes whatever
tensor the block before it gives (it is built on an example of that tensor), so every recipe is a
valid network, recipes nest, and hypothesis can shrink them freely. `repr(network)` is the call that
builds it again.

The blocks cover what real networks do to channels, and also what they should not do but somebody
will: slices at fixed positions, views of fixed sizes, in-place writes into slices, channels folded
into the batch, operators nobody has heard of. All parameters and running statistics are random and
none is zero, so a wrong zero shows in the output.
"""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

CLASSES = 5
INPUT_SHAPE = (2, 3, 8, 8)


@torch.library.custom_op("tcp_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """Mix the channels of x (batch, channels, ...) in a way that no tracer can know."""
    return x.flip(1).cumsum(1) / x.size(1)


# -------------------------------------------------------------------------------------------------
# Element-wise functions and data movement without parameters, (batch, channels, height, width) each


def add_one_to_first_channel_(x):
    """Write into a slice, so that the whole tensor changes without being named."""
    x = x.clone()
    x[:, :1] += 1
    return x


def zero_first_channel_(x):
    x = x.clone()
    x[:, 0].zero_()
    return x


def copy_first_channel_(x):
    x = x.clone()
    x[:, 1] = x[:, 0]
    return x


def double_even_channels_(x):
    x = x.clone()
    x[:, ::2].mul_(2)
    return x


def swap_halves(x):
    first, second = x.chunk(2, 1)
    return torch.cat([second, first], 1)


def gated_halves(x):
    first, second = torch.cat([x, x * 0.5], 1).chunk(2, 1)
    return first * second.sigmoid()


def self_attention_over_space(x):
    tokens = x.flatten(2).transpose(1, 2)
    weights = torch.softmax(tokens @ tokens.transpose(1, 2) / 4, -1)
    return (weights @ tokens).transpose(1, 2).reshape(x.shape)


def attention_over_channels(x):
    tokens = x.flatten(2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).reshape(x.shape)


def tokens_and_back(x):
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, -1, channels).transpose(1, 2).unflatten(2, (height, width))


def windows_and_back(x):
    """Cut the image into windows and put it together again, as Swin does."""
    batch, channels, height, width = x.shape
    if height % 2 or width % 2:
        return x
    x = x.view(batch, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 3, 5, 1)
    x = x.reshape(batch * 4, -1, channels).tanh()
    x = x.view(batch, 2, 2, height // 2, width // 2, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def fold_into_batch(x):
    """Blur every channel with the same filter by taking channels for images."""
    batch, channels, height, width = x.shape
    blurred = F.avg_pool2d(x.reshape(batch * channels, 1, height, width), 3, 1, 1)
    return blurred.reshape(batch, channels, height, width)


def unfold_and_sum(x):
    patches = F.unfold(x, 3, padding=1).view(x.size(0), x.size(1), 9, -1)
    return patches.sum(2).view_as(x)


def straight_through(x):
    return x + (x.sign() - x).detach()


SAFE = {  # f(0) = 0 in every channel, and no channel looks at another
    "relu_": lambda x: x.clone().relu_(),
    "imul": lambda x: x.clone().mul_(1.5),
    "iadd_self": lambda x: x.clone().add_(x.tanh()),
    "times_two": lambda x: 2 * x,
    "negative": lambda x: -x,
    "abs": torch.abs,
    "square": lambda x: x.tanh().square(),
    "power": lambda x: x.tanh() ** 3,
    "sin": torch.sin,
    "expm1": lambda x: torch.expm1(x.tanh()),
    "softsign": lambda x: x / (1 + x.abs()),
    "clamp": lambda x: x.clamp(-1, 2),
    "maximum_zero": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "where_positive": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "swish": lambda x: x * x.sigmoid(),
    "add_sub": lambda x: x + 1 - 1,
    "straight_through": straight_through,
    "detach": lambda x: x.detach() + x,
    "clone": lambda x: x.clone().contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last).relu(),
    "center_over_space": lambda x: x - x.mean((2, 3), keepdim=True),
    "divide_by_spread": lambda x: x / (x.std((2, 3), keepdim=True) + 1),
    "scale_by_peak": lambda x: x * x.amax((2, 3), keepdim=True).sigmoid(),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "ceil_pool": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True) if x.size(2) > 2 else x,
    "adaptive_avg": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2) if x.size(2) < 8 else x,
    "bilinear": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", align_corners=False),
    "bicubic": lambda x: F.interpolate(x, size=(4, 4), mode="bicubic", align_corners=True),
    "pad_space": lambda x: F.pad(x, (1, 1, 1, 1)),
    "crop_space": lambda x: F.pad(x, (-1, 0, -1, 0)) if x.size(2) > 3 else x,
    "pad_space_reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_space_replicate": lambda x: F.pad(x, (1, 0, 1, 0), mode="replicate"),
    "pad_space_circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "slice_space": lambda x: x[:, :, ::2, ::2] if x.size(2) > 3 else x,
    "flip_space": lambda x: x.flip(2),
    "roll_space": lambda x: x.roll((1, -1), (2, 3)),
    "transpose_space": lambda x: x.transpose(2, 3),
    "cumsum_space": lambda x: x.cumsum(2) / 4,
    "tokens_and_back": tokens_and_back,
    "windows_and_back": windows_and_back,
    "fold_into_batch": fold_into_batch,
    "unfold_and_sum": unfold_and_sum,
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
}
MOVING = {  # channels change places, number or company
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "cat_self": lambda x: torch.cat([x, x.relu()], 1),
    "cat_zeros": lambda x: torch.cat([x, x.new_zeros(x.size(0), 2, *x.shape[2:])], 1),
    "cat_zeros_like": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "stack_max": lambda x: torch.stack([x, x.flip(2)], 1).amax(1),
    "stack_flatten": lambda x: torch.stack([x, x.tanh()], 2).flatten(1, 2),
    "swap_halves": swap_halves,
    "gated_halves": gated_halves,
    "glu": lambda x: F.glu(torch.cat([x, x.flip(2)], 1), 1),
    "unbind_sum": lambda x: sum(torch.stack([x, x.abs()], 1).unbind(1)),
    "pad_channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad_channels_module": lambda x: nn.ZeroPad3d((0, 0, 0, 0, 2, 1))(x),
    "pad_and_slice": lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))[:, 2:-2],
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2) if x.size(2) % 2 == 0 else x,
    "unshuffle_shuffle": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2) if x.size(2) % 2 == 0 else x,
}
UNSAFE = {  # f(0) != 0, or channels look at each other: frozen, or right all the same
    "add_one": lambda x: x + 1,
    "iadd_one": lambda x: x.clone().add_(1),
    "rsub_one": lambda x: 1 - x,
    "add_ones_like": lambda x: x + torch.ones_like(x),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": lambda x: torch.exp(-x.square()),
    "cos": torch.cos,
    "clamp_min": lambda x: x.clamp(min=0.1),
    "power_zero": lambda x: x.abs() ** 0.0 + x,
    "greater": lambda x: (x >= 0).to(x.dtype) + x,
    "pad_space_ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "pad_channels_ones": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=1.0),
    "reciprocal": lambda x: 1 / (1 + x.abs()),
    "softmax_channels": lambda x: x.softmax(1),
    "softmax_space": lambda x: x.flatten(2).softmax(-1).view_as(x),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "attention_by_mean": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "attention_by_max": lambda x: x * x.amax(1, keepdim=True),
    "attention_by_norm": lambda x: x * x.square().sum(1, keepdim=True).sigmoid(),
    "attention_by_all": lambda x: x * x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "center_over_channels": lambda x: x - x.mean(1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "response_norm": lambda x: F.local_response_norm(x, 3),
    "cumsum_channels": lambda x: x.cumsum(1) / 4,
    "sort_channels": lambda x: x.sort(1).values,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "group_norm": lambda x: F.group_norm(x, 1),
    "instance_norm": lambda x: F.instance_norm(x) if x.size(2) > 1 else x,
    "fft": lambda x: torch.fft.fft(x, dim=1).real,
    "self_attention": self_attention_over_space,
    "channel_attention": attention_over_channels,
    "cdist": lambda x: x * torch.cdist(x.flatten(2), x.flatten(2)).mean((1, 2))[:, None, None, None],
    "matmul_constant": lambda x: x @ torch.eye(x.size(3), dtype=x.dtype).flip(0),
    "add_first_to_flipped": lambda x: x + x[:, :1],
    "mystery": lambda x: torch.ops.tcp_tests.mystery(x),
}
FIXED = {  # positions or sizes in the code: after removal the same numbers mean other channels
    "slice_front": lambda x: x[:, 1:],
    "slice_back": lambda x: x[:, :-1],
    "slice_every_other": lambda x: x[:, ::2],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select_scale": lambda x: x * x[:, 1:2].sigmoid(),
    "index_list": lambda x: x[:, [2, 0, 1]],
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 0, 2, 1])),
    "split_ints": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "add_one_to_first_channel_": add_one_to_first_channel_,
    "zero_first_channel_": zero_first_channel_,
    "copy_first_channel_": copy_first_channel_,
    "double_even_channels_": double_even_channels_,
    "zeros_of_width": lambda x: torch.cat([x, torch.zeros(x.shape, dtype=x.dtype)], 1),
    "constant_of_width": lambda x: x * torch.linspace(0.5, 1, x.size(1), dtype=x.dtype)[:, None, None],
}
# Not drawn: no operator shows it, so it is found only where the output of one example shows it.
HIDDEN = {"width_in_scale": lambda x: x * x.size(1) ** -0.5}
FUNCTIONS = SAFE | MOVING | UNSAFE | FIXED | HIDDEN

ACTIVATIONS = {
    "none": lambda channels: nn.Identity(),
    "relu": lambda channels: nn.ReLU(),
    "relu_": lambda channels: nn.ReLU(inplace=True),
    "relu6": lambda channels: nn.ReLU6(inplace=True),
    "leaky": lambda channels: nn.LeakyReLU(0.1),
    "hardswish": lambda channels: nn.Hardswish(inplace=True),
    "silu": lambda channels: nn.SiLU(),
    "gelu": lambda channels: nn.GELU(),
    "elu": lambda channels: nn.ELU(),
    "tanh": lambda channels: nn.Tanh(),
    "prelu": lambda channels: nn.PReLU(channels),
    "prelu1": lambda channels: nn.PReLU(),
    "dropout": lambda channels: nn.Dropout(0.3),
    "dropout2d": lambda channels: nn.Dropout2d(0.3),
    "sigmoid": lambda channels: nn.Sigmoid(),
    "softplus": lambda channels: nn.Softplus(),
}
NORMS = {
    "none": lambda channels: nn.Identity(),
    "bn": lambda channels: nn.BatchNorm2d(channels),
    "bn_plain": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "bn_batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "bn_cumulative": lambda channels: nn.BatchNorm2d(channels, momentum=None),
    "group": lambda channels: nn.GroupNorm(math.gcd(2, channels), channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "instance_tracked": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
}


def _norm(kind, x):
    """A norm for x; instance norm refuses single pixels."""
    single = x[0, 0].numel() == 1 and kind.startswith("instance")
    return NORMS["none" if single else kind](x.size(1))


# -------------------------------------------------------------------------------------------------
# Blocks with parameters, built as Block(x, **options) on an example x

BLOCKS = {}


def block(cls):
    """Enter a class under its lower-case name."""
    BLOCKS[cls.__name__.lower()] = cls
    return cls


class Function(nn.Module):
    """One entry of FUNCTIONS as a module."""

    def __init__(self, x, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](x)


class Chain(nn.Sequential):
    """The blocks of a recipe in a row, each built on what the one before it gives for x."""

    def __init__(self, x, recipe):
        super().__init__()
        for name, options in recipe:
            if name in FUNCTIONS and not 3 <= x.size(1) <= 48:
                continue  # fixed slices need three channels, and doubling has to end somewhere
            module = Function(x, name) if name in FUNCTIONS else BLOCKS[name](x, **options)
            self.append(module)
            x = module(x)


def shaped(module, x):
    """(module, its output on x): for building one part on the output of another."""
    return module, module(x)


@block
class Conv(nn.Module):
    """Convolution, norm, activation; groups and stride are lowered to what the input allows."""

    def __init__(
        self,
        x,
        width=8,
        kernel=3,
        stride=1,
        groups=1,
        bias=False,
        norm="bn",
        act="relu",
        padding_mode="zeros",
    ):
        super().__init__()
        groups = math.gcd(groups, math.gcd(x.size(1), width))
        stride = stride if x.size(2) > 3 else 1
        kernel = kernel if x.size(2) > 2 else 1
        self.conv = nn.Conv2d(
            x.size(1),
            width,
            kernel,
            stride,
            kernel // 2,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
        self.norm = _norm(norm, self.conv(x))
        self.act = ACTIVATIONS[act](width)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


@block
class Depthwise(nn.Module):
    """Depthwise convolution with a channel multiplier."""

    def __init__(self, x, multiplier=1, bias=False, norm="bn", act="relu"):
        super().__init__()
        channels = x.size(1)
        self.conv = nn.Conv2d(channels, channels * multiplier, 3, 1, 1, groups=channels, bias=bias)
        self.norm = _norm(norm, self.conv(x))
        self.act = ACTIVATIONS[act](channels * multiplier)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


@block
class Transposed(nn.Module):
    """Transposed convolution, plain or grouped."""

    def __init__(self, x, width=8, groups=1, stride=1, bias=True, norm="bn"):
        super().__init__()
        groups = math.gcd(groups, math.gcd(x.size(1), width))
        stride = stride if x.size(2) < 8 else 1
        self.conv = nn.ConvTranspose2d(
            x.size(1), width, 3, stride, 1, output_padding=stride - 1, groups=groups, bias=bias
        )
        self.norm = _norm(norm, self.conv(x))

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


@block
class Functional(nn.Module):
    """F.conv2d and F.batch_norm on parameters and buffers under names nobody expects."""

    def __init__(self, x, width=8, norm=True, groups=1):
        super().__init__()
        self.groups = math.gcd(groups, math.gcd(x.size(1), width))
        self.kernel = nn.Parameter(torch.randn(width, x.size(1) // self.groups, 3, 3) / 4)
        self.offset = nn.Parameter(torch.randn(width))
        self.scale = nn.Parameter(torch.randn(width)) if norm else None
        self.register_buffer("average", torch.randn(width))
        self.register_buffer("spread", torch.rand(width) + 0.5)

    def forward(self, x):
        if self.scale is None:
            return F.relu(F.conv2d(x, self.kernel, self.offset, padding=1, groups=self.groups))
        x = F.conv2d(x, self.kernel, padding=1, groups=self.groups)
        return F.relu(F.batch_norm(x, self.average, self.spread, self.scale, self.offset, training=self.training))


@block
class Weighted(nn.Module):
    """A convolution whose weight is computed from parameters, or used once more transposed."""

    def __init__(self, x, width=8, kind="scaled"):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(x.size(1), width, 3, 1, 1)
        self.back = nn.Parameter(torch.randn(x.size(1)))
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(self.conv)
        if kind == "spectral":
            nn.utils.parametrizations.spectral_norm(self.conv)
        if kind == "masked":
            self.register_buffer("mask", (torch.rand(self.conv.weight.shape) > 0.3).float())

    def forward(self, x):
        weight, bias = self.conv.weight, self.conv.bias
        if self.kind == "scaled":
            weight = weight * 0.7
        elif self.kind == "standardised":
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
        elif self.kind == "masked":
            weight = weight * self.mask
        elif self.kind == "sliced":
            weight, bias = weight[:-1], bias[:-1]
        elif self.kind == "flipped":
            weight = weight.flip(0)
        elif self.kind == "tied":
            hidden = F.relu(F.conv2d(x, weight, bias, padding=1))
            return F.conv_transpose2d(hidden, weight, self.back, padding=1)
        return F.relu(F.conv2d(x, weight, bias, padding=1))


@block
class Twice(nn.Module):
    """A convolution called twice, or two that share their weight; norms shared or not."""

    def __init__(self, x, kind="module", shared_norm=False):
        super().__init__()
        channels = x.size(1)
        self.first = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second = self.first if kind == "module" else nn.Conv2d(channels, channels, 3, 1, 1)
        self.second.weight = self.first.weight
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = self.norm1 if shared_norm else nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm2(self.second(self.norm1(self.first(x)).relu_())).relu_()


@block
class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation with convolutions or linear layers."""

    def __init__(self, x, width=4, gate="sigmoid", linear=False):
        super().__init__()
        channels, self.linear = x.size(1), linear
        layer = nn.Linear if linear else (lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1))
        self.reduce, self.expand = layer(channels, width), layer(width, channels)
        self.gate = {"sigmoid": nn.Sigmoid(), "hardsigmoid": nn.Hardsigmoid(), "tanh": nn.Tanh()}[gate]

    def forward(self, x):
        weights = x.mean((2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        weights = self.gate(self.expand(F.relu(self.reduce(weights))))
        return x * (weights[:, :, None, None] if self.linear else weights)


@block
class Scale(nn.Module):
    """A raw parameter on the channels: layer scale, bias, position embedding, learned gates."""

    def __init__(self, x, kind="gamma"):
        super().__init__()
        channels = x.size(1)
        shape = {
            "gamma": (channels, 1, 1),
            "gamma4": (1, channels, 1, 1),
            "last": (channels,),
            "bias": (1, channels, 1, 1),
            "position": (1, *x.shape[1:]),
            "sigmoid": (channels, 1, 1),
            "scalar": (),
            "per_pixel": (1, 1, *x.shape[2:]),
            "fusion": (2,),
            "log": (channels, 1, 1),
        }[kind]
        self.kind = kind
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        if self.kind in ("bias", "position"):
            return x + self.gamma
        if self.kind == "sigmoid":
            return x * self.gamma.sigmoid()
        if self.kind == "log":
            return x * torch.exp(self.gamma.tanh())
        if self.kind == "last":
            return (x.permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2)
        if self.kind == "fusion":
            first, second = torch.softmax(self.gamma, 0)
            return first * x + second * x.relu()
        return x * self.gamma


@block
class Buffered(nn.Module):
    """A buffer per channel: normalisation by stored numbers, persistent or not."""

    def __init__(self, x, persistent=True, shift=False):
        super().__init__()
        self.shift = shift
        self.register_buffer("factor", torch.rand(x.size(1), 1, 1) + 0.5, persistent=persistent)

    def forward(self, x):
        return x - self.factor if self.shift else x * self.factor


@block
class Shuffle(nn.Module):
    """Channel shuffle in groups, as ShuffleNet writes it (sizes read from x) or as a module."""

    def __init__(self, x, groups=2, kind="sizes"):
        super().__init__()
        self.groups, self.kind = math.gcd(groups, x.size(1)), kind
        self.module = nn.ChannelShuffle(self.groups)

    def forward(self, x):
        if self.kind == "module":
            return self.module(x)
        batch, channels, height, width = x.size()
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        x = torch.transpose(x, 1, 2).contiguous()
        return x.view(batch, -1, height, width)


@block
class PixelShuffle(nn.Module):
    """Sub-pixel upsampling after a convolution to four times the width."""

    def __init__(self, x, width=4, norm="bn", module=True):
        super().__init__()
        self.conv = Conv(x, width * 4, norm=norm, stride=2)
        self.module = nn.PixelShuffle(2) if module else None

    def forward(self, x):
        x = self.conv(x)
        return self.module(x) if self.module else F.pixel_shuffle(x, 2)


@block
class GroupedView(nn.Module):
    """A view into groups, with sizes read from x or fixed when built, and what is done to them."""

    def __init__(self, x, groups=2, fixed=False, kind="max"):
        super().__init__()
        self.groups, self.kind = math.gcd(groups, x.size(1)), kind
        self.size = x.size(1) // self.groups if fixed else -1

    def forward(self, x):
        grouped = x.view(x.size(0), self.groups, self.size, *x.shape[2:])
        if self.kind == "max":
            return grouped.amax(1)
        if self.kind == "max_inside":
            return grouped.amax(2)
        if self.kind == "scale":
            return (grouped * grouped.sigmoid()).flatten(1, 2)
        return grouped.transpose(1, 2).reshape(x.size(0), -1, *x.shape[2:])


@block
class FixedSplit(nn.Module):
    """torch.split with sizes fixed when the network was built, and a convolution for each part."""

    def __init__(self, x, first=2, width=4, sections=True):
        super().__init__()
        first = min(first, x.size(1) - 1)
        self.sections = [first, x.size(1) - first] if sections else max(first, x.size(1) - first)
        parts = x.split(self.sections, 1)
        self.convs = nn.ModuleList(Conv(part, width) for part in parts)

    def forward(self, x):
        parts = torch.split(x, self.sections, 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


@block
class Tokens(nn.Module):
    """The MLP of a transformer on (batch, tokens, channels), with what may stand around it."""

    def __init__(self, x, width=8, norm="none", residual=True, token=False, attention="none", act="gelu"):
        super().__init__()
        channels = x.size(1)
        heads = math.gcd(2, channels)
        self.norm = {
            "none": nn.Identity(),
            "layer": nn.LayerNorm(channels),
            "bn1d": nn.BatchNorm1d(channels),
        }[norm]
        self.residual, self.kind = residual, attention
        self.token = nn.Parameter(torch.randn(1, 1, channels)) if token else None
        self.attention = {
            "none": lambda: None,
            "module": lambda: nn.MultiheadAttention(channels, heads, batch_first=True),
            "qkv": lambda: nn.Linear(channels, 3 * channels),
            "encoder": lambda: nn.TransformerEncoderLayer(channels, heads, width, dropout=0.0, batch_first=True),
            "gru": lambda: nn.GRU(channels, channels, batch_first=True),
        }[attention]()
        self.up, self.act, self.down = (
            nn.Linear(channels, width),
            ACTIVATIONS[act](width),
            nn.Linear(width, channels),
        )

    def attend(self, y):
        if self.kind == "module":
            return self.attention(y, y, y)[0]
        if self.kind == "qkv":
            query, key, value = self.attention(y).chunk(3, -1)
            return F.scaled_dot_product_attention(query, key, value)
        if self.kind == "gru":
            return self.attention(y)[0]
        return self.attention(y)

    def forward(self, x):
        batch, channels, height, width = x.shape
        y = x.flatten(2).transpose(1, 2)
        if self.token is not None:
            y = torch.cat([self.token.expand(batch, -1, -1), y], 1)
        if self.attention is not None:
            y = y + self.attend(y)
        z = self.norm(y.transpose(1, 2)).transpose(1, 2) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(y)
        z = self.down(self.act(self.up(z)))
        y = y + z if self.residual else z
        if self.token is not None:
            y = y[:, 1:] + y[:, :1]
        return y.transpose(1, 2).reshape(batch, channels, height, width)


@block
class Mixer(nn.Module):
    """A layer along something that is not the channels: pixels (MLP-Mixer), rows, the batch."""

    def __init__(self, x, kind="pixels", bias=True):
        super().__init__()
        self.kind = kind
        if kind == "pixels":
            self.layer = nn.Linear(x[0, 0].numel(), x[0, 0].numel(), bias=bias)
        elif kind == "rows":
            self.layer = nn.Conv2d(x.size(2), x.size(2), 1, bias=bias)
        elif kind == "batch":
            self.layer = nn.Conv2d(1, 1, 3, 1, 1, bias=bias)
        elif kind == "sequence":  # 1-D convolution along the channels, as in ECA attention
            self.layer = nn.Conv1d(1, 1, 3, 1, 1, bias=bias)
        else:
            self.layer = nn.Conv3d(1, 1, 3, 1, 1, bias=bias)

    def forward(self, x):
        if self.kind == "pixels":
            return self.layer(x.flatten(2)).relu().view(x.shape)
        if self.kind == "rows":
            return self.layer(x.transpose(1, 2)).transpose(1, 2).relu()
        if self.kind == "batch":
            return self.layer(x.reshape(-1, 1, *x.shape[2:])).view(x.shape)
        if self.kind == "sequence":
            weights = self.layer(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
            return x * weights[:, :, None, None]
        return self.layer(x.unsqueeze(1)).squeeze(1)


@block
class OtherRank(nn.Module):
    """Convolutions of one and of three dimensions, with their batch norms."""

    def __init__(self, x, width=6, dims=1):
        super().__init__()
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
        self.dims = dims
        self.conv, self.norm = conv(x.size(1), width, 3, 1, 1), norm(width)

    def forward(self, x):
        y = x.flatten(2) if self.dims == 1 else x.unsqueeze(2)
        y = F.relu(self.norm(self.conv(y)))
        return y.unflatten(2, x.shape[2:]) if self.dims == 1 else y.squeeze(2)


@block
class Einsum(nn.Module):
    """A product with a parameter that is neither F.linear nor a convolution."""

    def __init__(self, x, width=6, kind="einsum"):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(x.size(1), width) / 4)

    def forward(self, x):
        if self.kind == "einsum":
            return torch.einsum("bchw,cd->bdhw", x, self.weight)
        if self.kind == "matmul":
            return (x.permute(0, 2, 3, 1) @ self.weight).permute(0, 3, 1, 2)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.t()).permute(0, 3, 1, 2)


@block
class Residual(nn.Module):
    """x + inner(x), or another join; what does not fit is pooled, padded or projected."""

    def __init__(self, x, inner=(), shortcut="project", join="add", act="relu"):
        super().__init__()
        self.inner, y = shaped(Chain(x, inner), x)
        self.shortcut, self.join = shortcut, join
        fits = x.size(1) == y.size(1)
        missing = y.size(1) - x.size(1)
        if not fits and (shortcut == "project" or missing < 0):
            self.shortcut = "project"
            self.project = Conv(x, y.size(1), kernel=1, act="none")
        self.padding = (missing // 2, missing - missing // 2) if self.shortcut == "pad" else (0, 0)
        self.size = y.shape[2:] if y.shape[2:] != x.shape[2:] else None
        self.fits = fits
        self.act = ACTIVATIONS[act](y.size(1))

    def forward(self, x):
        y = self.inner(x)
        if self.size is not None:
            x = F.adaptive_avg_pool2d(x, self.size)
        if not self.fits and self.shortcut == "project":
            x = self.project(x)
        elif not self.fits:
            x = F.pad(x, (0, 0, 0, 0, *self.padding))
        if self.join == "add":
            return self.act(x + y)
        if self.join == "iadd":
            y = y.clone()
            y += x
            return self.act(y)
        if self.join == "mul":
            return self.act(x * y.sigmoid())
        if self.join == "product":
            return self.act(x * y)
        if self.join == "maximum":
            return self.act(torch.maximum(x, y))
        if self.join == "where":
            return self.act(torch.where(y > 0, x, y))
        return self.act(torch.lerp(x, y, 0.25))


@block
class Preact(nn.Module):
    """Pre-activation residual block: the raw sum feeds the next norm and the next sum."""

    def __init__(self, x, width=6, plain=False):
        super().__init__()
        channels = x.size(1)
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(channels, affine=not plain),
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        )
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(width),
            nn.Conv2d(width, channels, 3, 1, 1, bias=plain),
        )

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


@block
class Dense(nn.Module):
    """Dense block: every layer sees the concatenation of all before it."""

    def __init__(self, x, growth=4, layers=2):
        super().__init__()
        widths = [x.size(1) + growth * i for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, growth, 3, 1, 1, bias=False) for width in widths)

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


@block
class Concat(nn.Module):
    """Branches side by side, brought to one image size."""

    def __init__(self, x, branches=()):
        super().__init__()
        self.branches = nn.ModuleList(Chain(x, branch) for branch in branches)
        self.size = self.branches[0](x).shape[2:]

    def forward(self, x):
        return torch.cat([F.adaptive_avg_pool2d(branch(x), self.size) for branch in self.branches], 1)


@block
class ChunkUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels goes through a branch, then all are shuffled."""

    def __init__(self, x, depthwise=True, shuffle=True):
        super().__init__()
        # An even width first, so that both halves have the same number of channels.
        self.stem, x = shaped(Conv(x, 8), x)
        half = x[:, :4]
        self.branch = Chain(
            half,
            [
                ("conv", {"width": 4, "kernel": 1}),
                ("depthwise", {"act": "none"}) if depthwise else ("conv", {"width": 4}),
                ("conv", {"width": 4, "kernel": 1}),
            ],
        )
        self.shuffle = Shuffle(x) if shuffle else nn.Identity()

    def forward(self, x):
        kept, worked = self.stem(x).chunk(2, dim=1)
        return self.shuffle(torch.cat((kept, self.branch(worked)), dim=1))


@block
class Inverted(nn.Module):
    """MobileNetV2's inverted residual."""

    def __init__(self, x, expand=2):
        super().__init__()
        channels = x.size(1)
        self.body = Chain(
            x,
            [
                ("conv", {"width": channels * expand, "kernel": 1, "act": "relu6"}),
                ("depthwise", {"act": "relu6"}),
                ("conv", {"width": channels, "kernel": 1, "act": "none"}),
            ],
        )

    def forward(self, x):
        return x + self.body(x)


# -------------------------------------------------------------------------------------------------
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


# -------------------------------------------------------------------------------------------------
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
    _options("buffered", persistent=_BOOL, shift=_BOOL),
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
