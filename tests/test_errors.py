"""Errors: one root, a builtin parent each, and messages that say what to do."""

from __future__ import annotations

import builtins
import pickle

import pytest

from hf_capgap import errors
from hf_capgap.errors import CapGapError

CHILDREN = [value for value in vars(errors).values() if isinstance(value, type) and value is not CapGapError]
BUILTINS = {value for value in vars(builtins).values() if isinstance(value, type) and issubclass(value, Exception)}

each_child = pytest.mark.parametrize("child", CHILDREN, ids=[child.__name__ for child in CHILDREN])


def test_there_are_children() -> None:
    assert {"ConfigError", "DataError", "ShapeError"} <= {child.__name__ for child in CHILDREN}


@each_child
def test_a_child_is_also_a_builtin_exception(child: type[CapGapError]) -> None:
    assert issubclass(child, CapGapError)
    assert BUILTINS & set(child.__mro__) - {Exception}


@each_child
def test_a_child_says_what_it_is_for(child: type[CapGapError]) -> None:
    assert child.__doc__
    assert child.__doc__ != CapGapError.__doc__


@pytest.mark.parametrize("child", [CapGapError, *CHILDREN], ids=lambda child: child.__name__)
def test_a_message_has_cause_value_and_fix(child: type[CapGapError]) -> None:
    error = child("The size is wrong", found=[3, 4], fix="Make it 5.")
    assert str(error) == "The size is wrong (found: [3, 4]). Make it 5."


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "Wrong"),
        ({"found": 0}, "Wrong (found: 0)"),
        ({"found": ""}, "Wrong (found: )"),
        ({"fix": "Do right."}, "Wrong. Do right."),
    ],
)
def test_the_parts_of_a_message_are_optional(parts: dict[str, object], message: str) -> None:
    assert str(CapGapError("Wrong", **parts)) == message


@pytest.mark.parametrize("child", [CapGapError, *CHILDREN], ids=lambda child: child.__name__)
def test_an_error_survives_pickling(child: type[CapGapError]) -> None:
    """Errors of data loader workers and of other ranks travel that way."""
    error = child("The size is wrong", found={"size": 3}, fix="Make it 5.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is child
    assert str(copy) == str(error)
