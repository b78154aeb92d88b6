"""Strict decoding of JSON bodies and URL parameters by msgspec: unknown fields and wrong types name the field."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from cluster.errors import FieldError, Invalid

T = TypeVar("T", bound=Struct)
_AT = re.compile(r" - at `\$\.?([^`]*)`")
_NAMED = re.compile(r"field `([^`]*)`")


@cache
def _decoder(body: type[Struct]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body)


def decode(data: bytes, body: type[T]) -> T:
    """Decode and check a JSON body; Invalid names the field."""
    try:
        decoded: T = _decoder(body).decode(data)
    except msgspec.ValidationError as error:
        raise invalid_of(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid.at("body", f"is not JSON: {error}") from None
    return decoded


def decode_parameters(parameters: Sequence[tuple[str, str]], options: type[T]) -> T:
    """Check URL parameters; Invalid names the parameter."""
    given = dict(parameters)
    if len(given) < len(parameters):
        names = [name for name, _ in parameters]
        raise Invalid.at(next(name for name in names if names.count(name) > 1), "is given more than once")
    try:
        return msgspec.convert(given, options, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_of(error) from None


def invalid_fields(errors: Iterable[FieldError]) -> Invalid:
    fields = tuple(errors)
    return Invalid("; ".join(f"{e.field}: {e.message}" for e in fields), fields)


def invalid_of(error: msgspec.ValidationError) -> Invalid:
    """msgspec's message as one of ours: `Expected `int`, got `str` - at `$.k`` names the field k."""
    text = str(error)
    place = _AT.search(text)
    field = place.group(1) if place else ""
    named = _NAMED.search(text)
    if named:
        field = f"{field}.{named.group(1)}" if field else named.group(1)
    return Invalid.at(field or "body", _AT.sub("", text))
