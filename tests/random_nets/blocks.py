"""Blocks with parameters, built as Block(x, **options) on an example x."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .functions import ACTIVATIONS, FUNCTIONS, _norm

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
    """A buffer per channel, or per pixel: normalisation by stored numbers, a window; persistent or not."""

    def __init__(self, x, persistent=True, shift=False, pixels=False):
        super().__init__()
        self.shift = shift
        shape = (1, 1, *x.shape[2:]) if pixels else (x.size(1), 1, 1)
        self.register_buffer("factor", torch.rand(shape) + 0.5, persistent=persistent)

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
