"""What holds for every test: one thread, no window, a fixed seed, the same random examples."""

import hypothesis
import matplotlib
import pytest
import torch

matplotlib.use("Agg")  # figures are written, never shown

# Tensors are small here: one thread is fastest, and sums are added in the same order everywhere.
torch.set_num_threads(1)

# No deadline, as the first call into torch is slow; derandomized, so that red stays red.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed():
    """Start every test from the same random numbers."""
    torch.manual_seed(0)
