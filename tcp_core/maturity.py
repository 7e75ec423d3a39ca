"""How far a network is trained already, told from its weights alone, and when it is made smaller by that.

Whatever a network is started with, the entries of a weight matrix are independent then; training ties them together. So
no data, no gradient and no scale is needed, and it does not matter whether there are batch norms, whether layers are
frozen or a new head was put on, nor how losses are scaled, clipped or accumulated. The controller asks it of the layers
whose channels may be removed, each as much as these cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .channels import Channels

SIDE = (256, 1024)
"""Rows and columns of a weight matrix that are looked at, evenly spread, at most."""

TRAINED = 1 / 3
"""The excess at which a network counts as trained: ResNet-20 has it after some eight epochs on CIFAR-10."""

PHASE_FRESH, PHASE_TRAINED = (0.2, 0.5), (0.02, 0.15)
"""Where the network is made smaller, by default, as shares of the run: if it starts fresh, and if it was trained, at
the longest."""

PHASE_ENOUGH, PHASE_LEAST = 190, 0.04
"""So many steps of phase are enough for a trained network, but for the share of the run that it has at least. What is
left of the run trains the small network."""


def maturity(model: nn.Module, worth: Mapping[str, float] | None = None) -> float:
    """Return 0 for a network as it was initialised, 1 for a trained one, and what lies between for one on its way.

    It is the mean :func:`excess` of the weights, each 1 at most, over ``TRAINED``; in tenths, so that processes which
    start with other random numbers agree. By ``worth`` a weight counts as much as is said of its name (float), and not
    at all if nothing is: what cannot be removed, such as a new head or a table of words, then says nothing of what can.
    Without it, a weight counts as much as it has entries.
    """
    total = found = 0.0
    for name, parameter in model.named_parameters():
        share = parameter.numel() if worth is None else worth.get(name, 0.0)
        if parameter.ndim < 2 or not parameter.is_floating_point() or not share:
            continue
        if (value := excess(parameter)) is not None:
            total, found = total + share, found + min(value, 1.0) * share
    return round(min(1.0, found / total / TRAINED), 1) if total else 0.0


def worth(channels: Channels, price: Tensor) -> dict[str, float]:
    """Return, by the name of a layer's weight, the price of what may be removed of its outputs, of prices by unit
    (``[units]``); units that several layers make are divided between them.
    """
    makers, made = torch.zeros(channels.units), {}
    for layer in channels.layers:
        units = layer.out_units.unique()
        made[layer.weight] = units[units >= 0]
        makers[made[layer.weight]] += 1
    share = price * channels.prunable / makers.clamp(min=1)
    return {weight: float(share[units].sum()) for weight, units in made.items()}


def has_zeros(model: nn.Module) -> bool:
    """Return whether a weight that is trained is all zero, as the last one of a branch that begins at zero is. Biases
    do not count: many begin so.
    """
    trained = ((name.rpartition(".")[2], each) for name, each in model.named_parameters() if each.requires_grad)
    return any(each.numel() > 0 and not each.detach().any() for name, each in trained if name != "bias")


@torch.no_grad()
def excess(weight: Tensor) -> float | None:
    """Return by how much the squared singular values of ``weight`` (first dimension by all others) are spread more
    than those of a matrix of independent entries, as a share; 0 within two standard deviations. None if it cannot be
    told: fewer than two rows or columns, or nothing but zeros.

    For independent entries of variance v and kurtosis k, the mean of tr((W Wᵀ)²) is v² n m (n + m + k - 2). The ratio
    to it is John's statistic of sphericity (Biometrika 58, 1971; for many rows: Ledoit and Wolf, Annals of Statistics
    30, 2002), with a standard deviation of about 2 / (n + m). Orthogonal starts lie below it, whence 0.
    """
    matrix = weight.detach().flatten(1)
    rows, columns = (-(-size // most) for size, most in zip(matrix.shape, SIDE, strict=True))
    matrix = matrix[::rows, ::columns].cpu().double()  # a device may have no float64
    (n, m), scale = matrix.shape, matrix.abs().max()
    if min(n, m) < 2 or not scale > 0 or not scale.isfinite():
        return None
    matrix = matrix / scale
    variance = matrix.square().mean()
    kurtosis = matrix.pow(4).mean() / variance**2
    gram = matrix @ matrix.T if n <= m else matrix.T @ matrix
    ratio = gram.square().sum() / (variance**2 * n * m * (n + m + kurtosis - 2))
    return max(0.0, float(ratio) - 1 - 4 / (n + m))


def phase_of(maturity: float, steps: int) -> tuple[float, float]:
    """Return where the phase lies by default in a run of ``steps``, as shares of it, between fresh and trained."""
    start, longest = PHASE_TRAINED
    end = min(longest, start + max(PHASE_LEAST, PHASE_ENOUGH / max(steps, 1)))
    ends = zip(PHASE_FRESH, (start, end), strict=True)
    return tuple(round(fresh + maturity * (trained - fresh), 4) for fresh, trained in ends)


def versions(model: nn.Module) -> list[tuple[int, int]] | None:
    """Return what changes of each parameter when its values are: where they lie, and how often they were written. None
    within torch.func, whose tensors lie nowhere.
    """
    parameters = [parameter for parameter in model.parameters() if not parameter.is_inference()]
    try:
        return [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    except RuntimeError:
        return None
