"""Errors: the tree, their messages, and that they survive pickling between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from cluster import errors
from cluster.errors import (
    Conflict,
    Corrupt,
    EaglerayError,
    Exhausted,
    Fenced,
    FieldError,
    Invalid,
    NotFound,
    Unavailable,
)
from cluster.query import Coverage

COVERAGE = Coverage(0.5, 0.25, (1, 3))
FIELDS = (FieldError("k", "must be at least 1"), FieldError("vectors[3]", "holds NaN"))

EXAMPLES = [
    (EaglerayError("root"), {"message": "root"}),
    (EaglerayError("root", 1, "two"), {"message": "root"}),
    (Invalid("bad"), {"message": "bad", "errors": ()}),
    (Invalid("bad", FIELDS), {"message": "bad", "errors": FIELDS}),
    (NotFound("gone"), {"message": "gone"}),
    (Conflict("first"), {"message": "first"}),
    (Exhausted("full"), {"message": "full", "retry_after_s": None}),
    (Exhausted("full", 0.25), {"message": "full", "retry_after_s": 0.25}),
    (
        Unavailable("later"),
        {"message": "later", "retry_after_s": 1.0, "coverage": None, "lsn": None, "failed": ()},
    ),
    (
        Unavailable("later", 2.5, COVERAGE, {0: 7}, (1,)),
        {"message": "later", "retry_after_s": 2.5, "coverage": COVERAGE, "lsn": {0: 7}, "failed": (1,)},
    ),
    (Fenced("other"), {"message": "other"}),
    (Corrupt("torn"), {"message": "torn"}),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("error", "attributes"), EXAMPLES)
def test_error_survives_pickling_with_every_attribute(
    error: EaglerayError, attributes: dict[str, object], protocol: int
) -> None:
    assert vars(error) == attributes
    assert error.args[: len(attributes)] == tuple(attributes.values())  # so that every process can build it again
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert vars(copy) == attributes
    assert copy.args == error.args
    assert str(copy) == str(error) == attributes["message"]


def test_examples_cover_every_error_class() -> None:
    classes = {value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, EaglerayError)}
    assert {type(error) for error, _ in EXAMPLES} == classes


def test_every_error_but_the_root_is_a_direct_child_of_it() -> None:
    kinds = {type(error) for error, _ in EXAMPLES} - {EaglerayError}
    assert {kind.__bases__ for kind in kinds} == {(EaglerayError,)}


def test_invalid_at_names_the_field_in_message_and_errors() -> None:
    error = Invalid.at("index.kind", "must be flat")
    assert str(error) == "index.kind: must be flat"
    assert error.errors == (FieldError("index.kind", "must be flat"),)


def test_str_shows_only_the_message() -> None:
    assert str(Unavailable("shard 3 did not answer", 2.0, COVERAGE)) == "shard 3 did not answer"
