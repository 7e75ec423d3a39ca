"""The set that is run at every change stays one that takes minutes."""

import conftest
import pytest


def told(item, monkeypatch, **limits):
    """What is said of a test that took a moment, were that more than the limit of its set."""
    call = conftest.pytest_runtest_call(item)
    next(call)
    with monkeypatch.context() as patch:
        patch.setattr(conftest, "LIMITS", {"fast": 5, "medium": 20} | limits)
        with pytest.raises((StopIteration, pytest.fail.Exception)) as ended:
            call.send("what it gave")
    return ended.value.value if ended.type is StopIteration else str(ended.value)


def test_a_fast_test_that_takes_too_long_fails(request, monkeypatch):
    assert told(request.node, monkeypatch, medium=-1) == "what it gave"
    assert "make it cheaper, or mark it medium" in told(request.node, monkeypatch, fast=-1)


def test_a_medium_test_may_take_longer_but_not_long(request, monkeypatch):
    request.node.add_marker("medium")
    assert told(request.node, monkeypatch, fast=-1) == "what it gave"
    assert "make it cheaper, or mark it slow" in told(request.node, monkeypatch, medium=-1)


@pytest.mark.parametrize("mark", ["slow", "soak"])
def test_a_slow_test_may_take_long(request, monkeypatch, mark):
    request.node.add_marker(mark)
    assert told(request.node, monkeypatch, fast=-1, medium=-1) == "what it gave"
