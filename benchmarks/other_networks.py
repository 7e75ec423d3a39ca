"""Ours, one-shot Taylor and uniform L1 on small networks of other kinds, at the same macs and length.

The study's long runs are of CIFAR ResNets. Here the networks have no shortcut at all, shortcuts around depthwise
convolutions, concatenations, or attention over channels. Images are at half resolution; each network is trained first,
once. Rows that are there are not run again, and two processes of other networks may share the output.

    python benchmarks/other_networks.py --data cifar10-jpeg --network plain --out results/benchmarks/other_networks.json
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from same_latency import RECIPE, add, given, started, written
from torch import Tensor, nn

import tcp_core as tcp
from tcp_core.datasets import sources
from tcp_core.study.comparators import pruner

METHODS = ("tailored", "taylor", "uniform_l1")


def main() -> None:
    """Run what is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="plain", choices=list(NETWORKS))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.4, 0.15], help="shares of the dense network's")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", type=float, default=0.03, help="peak of the learning rate from the trained network")
    parser.add_argument("--start-epochs", type=int, default=18)
    parser.add_argument(
        "--work", type=Path, default=Path("build/other_networks"), help="the networks that runs start from"
    )
    options = given(parser, table, images=20_000)
    train, val, _ = sources.load(options.data, size=16)
    train, val = train.split(5000)
    if options.images < len(train):
        _, train = train.split(options.images, seed=1)
    torch.set_num_threads(1)
    network, options.network = options.network, f"other_networks:{options.network}"
    for macs, seed, method in itertools.product(options.macs, options.seeds, options.methods):
        key = {"network": network, "macs": macs, "method": method, "seed": seed, "epochs": options.epochs}
        key |= {"images": options.images, "lr": options.lr, "start_epochs": options.start_epochs}
        if any(key.items() <= row.items() for row in written(options.out)["rows"]):
            continue
        budget, how = {"macs": macs}, {"seed": seed, "precision": options.precision, **RECIPE}
        more = {"budget": budget, "multiple": 1}
        if method != "tailored":
            more = {"prune": pruner(method, budget, train=train, multiple=1, **how)}
        model = started(options, train, val)
        dense = tcp.trace(model, train.pixels[:2].float()).cost()["macs"]
        result = tcp.fit(model, train, val, epochs=options.epochs, lr=options.lr, **how, **more)
        last = result.history.iloc[-1]
        row = key | {"train_loss": float(last["train_loss"]), "val_accuracy": float(last["val_accuracy"])}
        row |= {"macs_share": float(last["macs"]) / dense, "widths": result.widths.iloc[:, -1].tolist()}
        print(json.dumps(row), flush=True)
        add(options.out, row | {"precision": options.precision})


def table(rows: list[dict]) -> str:
    """Return the rows as a table in Markdown: training loss / validation accuracy of each method."""
    lines = [f"| {' | '.join(['network', 'macs', 'seed', *METHODS])} |", "| --- | --: | --: | --- | --- | --- |"]
    for setting in dict.fromkeys((row["network"], row["macs"], row["seed"]) for row in rows):
        found = {row["method"]: row for row in rows if (row["network"], row["macs"], row["seed"]) == setting}
        cells = [
            f"{row['train_loss']:.3f} / {row['val_accuracy']:.1%}" if row else "-" for row in map(found.get, METHODS)
        ]
        lines.append(f"| {setting[0]} | {setting[1]:.0%} | {setting[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    layers += [nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else [])]
    return nn.Sequential(*layers)


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def plain(*, num_classes: int, in_channels: int) -> nn.Module:
    """A chain of convolutions, as VGG."""
    layers, inputs = [], in_channels
    for width in (32, 32, 64, 64, 128, 128):
        if width == 2 * inputs:
            layers.append(nn.MaxPool2d(2))
        layers.append(_conv(inputs, width))
        inputs = width
    return nn.Sequential(*layers, *_head(inputs, num_classes))


class Inverted(nn.Module):
    """Expand, filter each channel, project; around it a shortcut where the shapes allow one, as in MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        inner = 4 * inputs
        expand, depthwise = _conv(inputs, inner, 1), _conv(inner, inner, 3, stride, groups=inner)
        self.layers = nn.Sequential(expand, depthwise, _conv(inner, outputs, 1, relu=False))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[batch, outputs, height / stride, width / stride] of [batch, inputs, height, width]."""
        return x + self.layers(x) if self.residual else self.layers(x)


def inverted(*, num_classes: int, in_channels: int) -> nn.Module:
    """Inverted residuals, as MobileNetV2."""
    layers, inputs = [_conv(in_channels, 16)], 16
    for outputs, stride in ((24, 1), (24, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        layers.append(Inverted(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, _conv(inputs, 256, 1), *_head(256, num_classes))


class Appending(nn.Module):
    """Batch norm, ReLU and a convolution, whose output is appended to what entered."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs + growth, height, width] of [batch, inputs, height, width]."""
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """Half as many channels, at half the resolution."""

    def __init__(self, inputs: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs // 2, height // 2, width // 2] of [batch, inputs, height, width]."""
        return nn.functional.avg_pool2d(self.conv(torch.relu(self.norm(x))), 2)


def concatenated(*, num_classes: int, in_channels: int) -> nn.Module:
    """Three dense blocks, as DenseNet."""
    layers, channels = [nn.Conv2d(in_channels, 24, 3, padding=1, bias=False)], 24
    for stage in range(3):
        for _ in range(4):
            layers.append(Appending(channels, 12))
            channels += 12
        if stage < 2:
            layers.append(Transition(channels))
            channels //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *_head(channels, num_classes))


class Attending(nn.Module):
    """A bottleneck with squeeze and excitation, and a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int):
        super().__init__()
        outputs = 4 * inner
        self.layers = nn.Sequential(
            _conv(inputs, inner, 1), _conv(inner, inner, 3, stride), _conv(inner, outputs, 1, relu=False)
        )
        squeezed = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs // 8, 1), nn.ReLU()]
        self.weights = nn.Sequential(*squeezed, nn.Conv2d(outputs // 8, outputs, 1), nn.Sigmoid())
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 4 * inner, height / stride, width / stride] of [batch, inputs, height, width]."""
        out = self.layers(x)
        return torch.relu(out * self.weights(out) + self.shortcut(x))


def attending(*, num_classes: int, in_channels: int) -> nn.Module:
    """Bottlenecks with attention over channels, as SENet."""
    layers, inputs = [_conv(in_channels, 16)], 16
    for inner, stride in ((12, 1), (12, 1), (24, 2), (24, 1), (48, 2), (48, 1)):
        layers.append(Attending(inputs, inner, stride))
        inputs = 4 * inner
    return nn.Sequential(*layers, *_head(inputs, num_classes))


NETWORKS = {network.__name__: network for network in (plain, inverted, concatenated, attending)}


if __name__ == "__main__":
    main()
