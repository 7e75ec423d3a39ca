"""Exactness on torchvision's networks: one of each family here, all of them in benchmarks/zoo_exactness.py.

In the fast set is one of each kind of block: those of the slow ones are wider, or in another one as well.
"""

import pytest
from zoo import REPRESENTATIVES, exactness, names

# Stem and stages of these are layer-normed, so that only what lies inside the blocks can go.
LAYER_NORMED = ("convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t")


SLOW = ("resnext50_32x4d", "regnet_x_400mf", "mnasnet0_5", "efficientnet_v2_s", "alexnet", "vit_b_16", "swin_v2_t")
SLOW += ("densenet121", "mobilenet_v2", "efficientnet_b0")


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in REPRESENTATIVES]
)
def test_closed_is_removed_and_cost_is_exact(name):
    row = exactness(name, subsets=2)
    assert row["max_relative_error"] < 1e-5
    assert row["cost_mismatches"] == 0
    assert row["least_effect"] > 1e-3
    assert row["prunable"] > (0.5 if name in LAYER_NORMED else 0.95) * row["units"]


def test_representatives_are_in_the_zoo():
    assert set(REPRESENTATIVES) <= set(names())
    assert len(names()) == 63
