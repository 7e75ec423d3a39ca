"""The networks that pruning papers report on, as large as those papers count them, and weights for them.

Those for small images are written out here; those for ImageNet are torchvision's. No forward holds a channel count, so
a network still runs once channels have been removed from it.
"""

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import foreign
from .files import expanded


def build(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The freshly initialised network of that name.

    name: one of `NETWORKS`, or another's: "timm:NAME", "torchvision:NAME", or "package.module:function", which is
        called with num_classes and in_channels and returns an nn.Module; see :mod:`tcp_core.foreign`.

    Raises ValueError for an unknown name, ImportError where its package is not installed.
    """
    if ":" in name:
        return foreign.build(name, num_classes=num_classes, in_channels=in_channels)
    if name not in NETWORKS:
        close = difflib.get_close_matches(name, NETWORKS, n=1)
        raise ValueError(
            f"unknown network {name!r}{f' (did you mean {close[0]}?)' if close else ''}; it must be one of "
            f"{', '.join(sorted(NETWORKS))}, or {foreign.FORMS}. "
            "Any other torch.nn.Module can be passed directly instead of a name."
        )
    return NETWORKS[name](num_classes=num_classes, in_channels=in_channels)


def load_weights(model: nn.Module, place: str | Path, *, name: str = "") -> None:
    """Give ``model`` the weights at ``place``; they must fit it whole, or nothing of it is changed.

    place: a .safetensors file, or any other that torch.save has written of a state dict (also of one under "state_dict"
        or "model", and with the "module." that DistributedDataParallel puts before names); or "published", for
        torchvision's IMAGENET1K_V1 weights of the network that is called ``name`` in `NETWORKS`.

    The counters ``num_batches_tracked`` of batch norms may be absent. Raises FileNotFoundError where there is no such
    file or nothing can be fetched, ValueError for a file of something else, another network or other classes.
    """
    given = _published(name) if place == "published" else _weights(expanded(place))
    where = f"the published weights of {name}" if place == "published" else str(place)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in given.items()}
    wrong = [key for key in own | shapes if own.get(key) != shapes.get(key)]
    wrong = [key for key in wrong if key in shapes or not key.endswith("num_batches_tracked")]
    head = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    both = [key for key in wrong if key in own and key in shapes and own[key][1:] == shapes[key][1:]]
    if wrong and wrong == [key for key in both if key.rpartition(".")[0] in head]:
        raise ValueError(
            f"{where}: weights of a network with {shapes[wrong[0]][0]} classes, and this one has {own[wrong[0]][0]}; "
            f"give weights for the same classes, or build the network with as many."
        )
    if wrong:
        there, here = (str(known.get(wrong[0], "absent")) for known in (shapes, own))
        raise ValueError(
            f"{where}: not the weights of this {type(model).__name__}. {len(wrong)} of {len(own | shapes)} tensors "
            f"differ, first of them {wrong[0]!r}: {there} there, {here} here. Give weights of the same network."
        )
    model.load_state_dict(given, strict=False)


def _published(name: str) -> dict[str, Tensor]:
    network = name.removeprefix("imagenet_")
    if network == name or name not in NETWORKS:
        known = ", ".join(sorted(known for known in NETWORKS if known.startswith("imagenet_")))
        raise ValueError(f"there are no published weights of {name!r}, only of {known}; give the path of a file.")
    weights = torchvision.models.get_model_weights(network).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # offline, refused, cut off, another hash, a damaged file kept from before
        raise FileNotFoundError(
            f"the published weights of {name} cannot be fetched ({error}); fetch {weights.url} where there is a "
            f"connection, and give the path of that file instead of 'published'."
        ) from error


def _weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}; give the path of a .safetensors or .pth file.")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        for nest in ("state_dict", "model"):
            state = state[nest] if isinstance(state.get(nest), dict) else state
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("no state dict in it")
    except Exception as error:  # whatever the two readers make of a file that is something else
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}); it must be a whole .safetensors file, or one "
            f"that torch.save has written of a state dict alone: torch.save(model.state_dict(), path)."
        ) from error
    return state


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride == 2:
            # Given six numbers, this module pads the channel dimension of a batch of images.
            # As a module, and not inside a lambda, its padding can be adjusted after removal.
            before = (outputs - inputs) // 2
            after = outputs - inputs - before
            self.shortcut = nn.ZeroPad3d((0, 0, 0, 0, before, after))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, outputs, height / stride, width / stride] of [batch, inputs, height, width]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x[:, :, ::2, ::2])
        return F.relu(out + x)


class ResNet(nn.Module):
    """Three stages of basic blocks, the second and third at half the resolution of the one before.

    He et al. 2016, section 4.2. Parameter names follow Y. Idelbayev's published CIFAR-10 weights.
    """

    def __init__(self, blocks: int, *, widths: Sequence[int], num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        if len(widths) != 3 or list(widths) != sorted(widths) or widths[0] < 1 or blocks < 1:
            raise ValueError(
                f"got blocks={blocks}, widths={tuple(widths)}; blocks must be at least 1 and "
                "widths three positive numbers that do not decrease, for example (16, 32, 64)"
            )
        self.conv1 = _conv(in_channels, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks=blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks=blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks=blocks, stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, height, width]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def resnet(depth: int, *, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """The CIFAR ResNet of that depth (20, 32, 44, 56, 110, ...): 6n + 2 layers, widths 16, 32, 64.

    Raises ValueError for a depth that is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"a CIFAR ResNet cannot have depth {depth}: it must be 6n + 2 with n >= 1, "
            "for example 20, 32, 44, 56 or 110"
        )
    return ResNet((depth - 2) // 6, widths=(16, 32, 64), num_classes=num_classes, in_channels=in_channels)


def small_resnet(
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    num_classes: int = 10,
    in_channels: int = 1,
) -> ResNet:
    """A CIFAR ResNet of any width, `blocks` blocks a stage; trains on 8x8 digits in seconds."""
    return ResNet(blocks, widths=widths, num_classes=num_classes, in_channels=in_channels)


def _stage(inputs: int, outputs: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)))


class VGG16(nn.Sequential):
    """VGG-16 with batch norm and a head 512-512-classes (Li et al. 2017).

    Papers print 313.5 or 313.7 M macs: the second where the counter adds biases too.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3):
        features = []
        inputs = in_channels
        for outputs, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            if features:
                features.append(nn.MaxPool2d(2))
            for _ in range(repeats):
                features += _conv_bn(inputs, outputs, 3)
                inputs = outputs
        head = [nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
        super().__init__(
            OrderedDict(
                features=nn.Sequential(*features),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(*head, nn.Linear(512, num_classes)),
            )
        )
        _initialise(self)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by a depthwise 3x3, project by 1x1 (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        expand = _conv_bn(inputs, hidden, 1, activation=nn.ReLU6) if expansion > 1 else []
        depthwise = _conv_bn(hidden, hidden, 3, stride=stride, groups=hidden, activation=nn.ReLU6)
        project = _conv_bn(hidden, outputs, 1, activation=None)
        self.layers = nn.Sequential(*expand, *depthwise, *project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[batch, outputs, height / stride, width / stride] of [batch, inputs, height, width]."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Sequential):
    """MobileNetV2 of Sandler et al. 2018 with the stem's and the second stage's stride 1, not 2.

    Most CIFAR code has these strides; a 32 x 32 image ends as a 4 x 4 map. Nothing else is changed:
    as in the paper, a block that changes the width has no shortcut. That makes 88.0 M macs and
    2.24 M parameters; code that puts a 1x1 convolution there has 2.30 M parameters.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3):
        features = _conv_bn(in_channels, 32, 3, activation=nn.ReLU6)
        inputs = 32
        for expansion, outputs, repeats, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for index in range(repeats):
                features.append(
                    InvertedResidual(inputs, outputs, stride=stride if index == 0 else 1, expansion=expansion)
                )
                inputs = outputs
        features += _conv_bn(inputs, 1280, 1, activation=nn.ReLU6)
        super().__init__(
            OrderedDict(
                features=nn.Sequential(*features),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(1280, num_classes),
            )
        )
        _initialise(self)


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, whose output is appended to the input's channels."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = _conv(inputs, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs + growth, height, width] of [batch, inputs, height, width]."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class DenseNet40(nn.Sequential):
    """DenseNet-40 with growth 12, no bottleneck, no compression (Huang et al. 2017).

    The stem has 24 channels, twice the growth, as in the code of the pruning papers, which print
    282.92 M macs and 1.04 to 1.06 M parameters; Huang et al. give it 16 (1.02 M parameters).
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3):
        growth, channels = 12, 24
        features = [_conv(in_channels, channels, 3)]
        for block in range(3):
            if block > 0:
                features += [nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, channels, 1)]
                features.append(nn.AvgPool2d(2))
            for _ in range(12):
                features.append(DenseLayer(channels, growth))
                channels += growth
        super().__init__(
            OrderedDict(
                features=nn.Sequential(*features, nn.BatchNorm2d(channels), nn.ReLU()),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(channels, num_classes),
            )
        )
        _initialise(self)


class Inception(nn.Module):
    """Four parallel branches whose outputs are concatenated (Szegedy et al. 2015)."""

    def __init__(
        self,
        inputs: int,
        width1: int,
        reduce3: int,
        width3: int,
        reduce5: int,
        width5: int,
        width_pool: int,
    ):
        super().__init__()
        self.branch1 = nn.Sequential(*_conv_bn(inputs, width1, 1))
        self.branch3 = nn.Sequential(*_conv_bn(inputs, reduce3, 1), *_conv_bn(reduce3, width3, 3))
        self.branch5 = nn.Sequential(
            *_conv_bn(inputs, reduce5, 1),
            *_conv_bn(reduce5, width5, 3),
            *_conv_bn(width5, width5, 3),
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_conv_bn(inputs, width_pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sum of the branches' widths, height, width] of [batch, inputs, height, width]."""
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], 1)


class GoogLeNet(nn.Sequential):
    """GoogLeNet as CIFAR code has it: 3x3 stem of stride 1, batch norm, no auxiliary heads.

    Each 5x5 convolution is two 3x3 ones. Papers print 1.52 G macs and 6.15 M parameters.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3):
        super().__init__(
            OrderedDict(
                stem=nn.Sequential(*_conv_bn(in_channels, 192, 3)),
                a3=Inception(192, 64, 96, 128, 16, 32, 32),
                b3=Inception(256, 128, 128, 192, 32, 96, 64),
                pool3=nn.MaxPool2d(3, stride=2, padding=1),
                a4=Inception(480, 192, 96, 208, 16, 48, 64),
                b4=Inception(512, 160, 112, 224, 24, 64, 64),
                c4=Inception(512, 128, 128, 256, 24, 64, 64),
                d4=Inception(512, 112, 144, 288, 32, 64, 64),
                e4=Inception(528, 256, 160, 320, 32, 128, 128),
                pool4=nn.MaxPool2d(3, stride=2, padding=1),
                a5=Inception(832, 256, 160, 320, 32, 128, 128),
                b5=Inception(832, 384, 192, 384, 48, 128, 128),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(1024, num_classes),
            )
        )
        _initialise(self)


def imagenet(network: str, *, num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """torchvision's network of that name, with a stem for images of `in_channels` channels.

    Its fresh weights are drawn as those of all networks here, so that methods that draw them anew start alike.
    """
    model = torchvision.models.get_model(network, weights=None, num_classes=num_classes)
    _initialise(model)
    return model if in_channels == 3 else _with_stem(model, in_channels)


def resnet18_small_stem(*, num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stem of stride 2: 64 x 64 images reach the first stage as 16 x 16 maps."""
    return _with_stem(imagenet("resnet18", num_classes=num_classes), in_channels, kernel=3)


def _with_stem(model: nn.Module, in_channels: int, *, kernel: int | None = None) -> nn.Module:
    """Put in the place of the first convolution one for other images."""
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    stem = _conv(in_channels, old.out_channels, kernel or old.kernel_size[0], stride=old.stride[0])
    _initialise(stem)
    model.set_submodule(name, stem)
    return model


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def _conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> list[nn.Module]:
    """Convolution without bias, batch norm and activation, as a list to put into a Sequential."""
    layers = [_conv(inputs, outputs, kernel, stride=stride, groups=groups), nn.BatchNorm2d(outputs)]
    return layers if activation is None else [*layers, activation()]


def _initialise(model: nn.Module) -> None:
    """Draw weights from N(0, 2 / fan_in), zero biases (He et al. 2015, equation 10).

    Fan-in, and not fan-out, because it is right for depthwise convolutions too. Batch norms start
    at weight 1 and bias 0, as torch makes them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


NETWORKS = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in (20, 32, 44, 56, 110)},
    "small_resnet": small_resnet,
    "vgg16_bn": VGG16,
    "mobilenet_v2": MobileNetV2,
    "densenet40_12": DenseNet40,
    "googlenet": GoogLeNet,
    **{f"imagenet_{name}": partial(imagenet, name) for name in ("resnet18", "resnet34", "resnet50", "mobilenet_v2")},
    "resnet18_small_stem": resnet18_small_stem,
}
