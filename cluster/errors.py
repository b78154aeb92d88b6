"""Every error a caller can meet.

    EaglerayError
    |- Invalid      the request is wrong: change it                       (400)
    |- NotFound     the named thing does not exist                        (404)
    |- Conflict     something else was committed first, or differs        (409)
    |- Exhausted    a bound was hit: send less, or later                  (413, 429)
    |- Unavailable  not now: retry after `retry_after_s`                  (503)
    |- Fenced       another writer took over: this one must stop          (409)
    `- Corrupt      stored bytes are not what was written                 (500)

All arguments go to `super().__init__`, so that an error survives pickling between processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request: its path, such as `vectors[3]`, and what is wrong with it."""

    field: str
    message: str


class EaglerayError(Exception):
    """Root of the tree; `message` is for people."""

    def __init__(self, message: str, *details: object) -> None:
        super().__init__(message, *details)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Invalid(EaglerayError):
    """The request is wrong; `errors` names the fields where that is known."""

    def __init__(self, message: str, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(message, errors)
        self.errors = errors

    @classmethod
    def at(cls, field: str, message: str) -> Invalid:
        return cls(f"{field}: {message}", (FieldError(field, message),))


class NotFound(EaglerayError):
    """The named thing does not exist."""


class Conflict(EaglerayError):
    """Something else was committed first, or what exists differs from what was asked for."""


class Exhausted(EaglerayError):
    """A named bound was hit. `retry_after_s` is None where sending the same again cannot help."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class Unavailable(EaglerayError):
    """Not now; the same request may succeed after `retry_after_s` seconds. A write may have been applied or not.

    Of a write that went to shards, `lsn` has those that acknowledged it (shard -> LSN), `failed` the others.
    """

    def __init__(
        self,
        message: str,
        retry_after_s: float = 1.0,
        coverage: object = None,
        lsn: Mapping[int, int] | None = None,
        failed: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, retry_after_s, coverage, lsn, failed)
        self.retry_after_s = retry_after_s
        self.coverage = coverage
        self.lsn = lsn
        self.failed = failed


class Fenced(EaglerayError):
    """Another writer took over; this one must stop."""


class Corrupt(EaglerayError):
    """Stored bytes are not what was written; the message names the object."""
