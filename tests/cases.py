"""Which of many cases are in the fast set and which in the slow one."""

import itertools

import pytest
from hypothesis import given, settings


def some_of(*values, step):
    """Return all combinations of the values; all but every `step`th are slow.

    Where `step` has no divisor in common with the number of values, each value stays among the fast ones.
    """
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if number % step else [], id="-".join(map(str, case)))
        for number, case in enumerate(itertools.product(*values))
    ]


def slow(*values):
    """Return values of one parameter as slow ones."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def searched(some, many, how=None, **strategies):
    """Make a property a test with some examples and a slow one with many; `how`: other settings of hypothesis."""

    def decorate(holds):
        @pytest.mark.parametrize("examples", [some, *slow(many)])
        def test(examples):
            settings(how or settings(), max_examples=examples)(given(**strategies)(holds))()

        test.__name__, test.__doc__ = holds.__name__, holds.__doc__
        return test

    return decorate
