"""What holds for every test: one thread, no window, a fixed seed, the same random examples, seconds at most."""

import gc
import time

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


def pytest_collection_finish():
    """Take what is there before the first test out of the garbage collector's sight.

    A Tailor looks for optimisers among all living objects. All tests' imports together are 700,000, none of them one.
    """
    gc.collect()
    gc.freeze()


# Seconds of this process's CPU time; the longest should stay far below, on a slower machine too.
LIMITS = {"fast": 5, "medium": 20}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test that takes too long for its set, so that the fast set stays one that is run at every change."""
    before = time.process_time()
    result = yield
    used = time.process_time() - before
    if any(map(item.get_closest_marker, ("slow", "soak"))):
        return result
    limit, next_set = (LIMITS["medium"], "slow") if item.get_closest_marker("medium") else (LIMITS["fast"], "medium")
    if used > limit:
        pytest.fail(
            f"{used:.0f} s of CPU time, more than {limit}: make it cheaper, or mark it {next_set}", pytrace=False
        )
    return result
