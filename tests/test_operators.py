"""What operators do to channels and what they cost: recurrent layers, matrices that are buffers, weights that are computed,
norms without weights, transposed convolutions in groups, operators over space, sums over channels.
"""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import random_open

import tcp_core as tcp
from tcp_core.gates import close
from tcp_core.removal import remove


def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


class Recurrent(nn.Module):
    """A recurrent layer behind convolutions."""

    def __init__(self, kind, **options):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.layer = kind(8, 6, batch_first=True, **options)
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        return self.head(self.layer(self.conv(x).transpose(1, 2))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_are_counted_as_if_they_were_unrolled(kind, options):
    model, x = Recurrent(kind, **options), torch.randn(2, 3, 5)
    model(x)
    unrolled = copy.deepcopy(model).double()  # which torch has no single operator for
    with FlopCounterMode(display=False) as counter:
        unrolled.eval()(x[:1].double())
    assert tcp.trace(model, x).cost()["macs"] == counter.get_total_flops() // 2


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.both, self.norm = nn.Linear(4, 8), nn.Bilinear(8, 8, 3), nn.LayerNorm([2, 3])
        self.place = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        y = self.a(x)
        return self.norm(self.both(y, y).unflatten(0, (-1, 1)).expand(-1, 2, -1)) + self.place.sum()


def test_operators_whose_products_are_not_counted_are_named():
    with pytest.warns(UserWarning, match="the macs of _trilinear in both are in no count"):
        tcp.trace(Bilinear(), torch.randn(2, 4))
