"""Which of many cases are in the fast set, which in the medium and which in the slow one."""

import itertools

import pytest
from hypothesis import given, settings


def some_of(*values, step, medium=1):
    """Return all combinations of the values: all but every `step`th are slow, others all but every `medium`th medium.

    Where `step * medium` has no divisor in common with the number of values, each value stays among the fast ones.
    """
    cases = []
    for number, case in enumerate(itertools.product(*values)):
        marks = [pytest.mark.slow] if number % step else [pytest.mark.medium] if number % (step * medium) else []
        cases.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return cases


def slow(*values):
    """Return values of one parameter as slow ones."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def searched(some, many, how=None, **strategies):
    """Make a property a test with a few examples, one with some and a slow one with many.

    few: a fifth of some. how: other settings of hypothesis.
    """

    def decorate(holds):
        @pytest.mark.parametrize("examples", [some // 5, pytest.param(some, marks=pytest.mark.medium), *slow(many)])
        def test(examples):
            settings(how or settings(), max_examples=examples)(given(**strategies)(holds))()

        test.__name__, test.__doc__ = holds.__name__, holds.__doc__
        return test

    return decorate
