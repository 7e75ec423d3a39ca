"""Functions of (batch, channels, height, width) without parameters: element-wise or moving data; norms, activations."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@torch.library.custom_op("tcp_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """Mix the channels of x (batch, channels, ...) in a way that no tracer can know."""
    return x.flip(1).cumsum(1) / x.size(1)


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


def sample_space(x):
    grid = torch.linspace(-1, 1, 18, dtype=x.dtype).view(1, 3, 3, 2).expand(x.size(0), -1, -1, -1)
    return F.grid_sample(x, grid, align_corners=False)


def unpool(x):
    if x.size(2) % 2 or x.size(3) % 2:
        return x
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


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
    "turn_space": lambda x: x.rot90(1, (2, 3)),
    "unfold_space": lambda x: x.unfold(2, 2, 1).mean(-1) if x.size(2) > 2 else x,
    "sort_space": lambda x: x.flatten(2).sort(-1).values.view_as(x),
    "largest_of_space": lambda x: x * x.flatten(2).topk(1).values.unsqueeze(-1).tanh(),
    "sample_space": sample_space,
    "unpool": unpool,
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
    "softmax_over_space": lambda x: x * x.flatten(2).softmax(-1).unflatten(2, x.shape[2:]),
    "softmax_over_branches": lambda x: (torch.stack([x, x.tanh()], 1) * torch.stack([x, -x], 1).softmax(1)).sum(1),
    "glu_of_halves": lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1),
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
    "energy": lambda x: x * x.square().sum(1, keepdim=True).tanh(),
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
    "groups_of_two": lambda channels: nn.GroupNorm(channels // math.gcd(2, channels), channels),
    "groups_plain": lambda channels: nn.GroupNorm(math.gcd(4, channels), channels, affine=False),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "instance_plain": lambda channels: nn.InstanceNorm2d(channels),
    "instance_tracked": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
}


def _norm(kind, x):
    """A norm for x; instance norm refuses single pixels."""
    single = x[0, 0].numel() == 1 and kind.startswith("instance")
    return NORMS["none" if single else kind](x.size(1))
