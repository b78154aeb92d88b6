"""What `eagleray bench` measures: operating points and shapes of load, read from the command line's words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster.errors import Invalid

PARAMS: dict[str, Callable[[str], float]] = {
    "nprobe": int,
    "ef_search": int,
    "rerank": float,
    "itopk_size": int,
    "search_width": int,
    "target_recall": float,
}
FORMATS = ("json", "arrow")
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Shape:
    """A load: `batch` vectors per request in one format, and a constant rate (vectors per second) or a closed loop."""

    format: str
    batch: int
    connections: int
    rate: float | None = None

    @property
    def loop(self) -> str:
        return "closed" if self.rate is None else "open"

    @property
    def requests_per_s(self) -> float | None:
        """The rate of an open loop."""
        return None if self.rate is None else self.rate / self.batch

    @property
    def in_flight(self) -> int:
        """Most vectors that are asked for at one time in a closed loop."""
        return self.connections * self.batch

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:,.10g} vectors/s"
        connections = f"{self.connections} connection{'s' if self.connections > 1 else ''}"
        return f"{self.format}, {self.batch} a request, {connections}{rate}"


@dataclass(frozen=True)
class BenchPlan:
    """Every shape at every operating point (the search parameters, by name); times in seconds."""

    targets: tuple[str, ...]
    collection: str
    k: int
    points: tuple[dict[str, float], ...]
    shapes: tuple[Shape, ...]
    left_out: tuple[Shape, ...] = ()
    seconds: float = 5.0
    warm_up_s: float = 1.0
    rounds: int = 1
    search_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def expected_s(self) -> float:
        runs = len(self.targets) * len(self.points) * len(self.shapes) * self.rounds
        return runs * (self.seconds + self.warm_up_s)


def check_target(option: str, target: str) -> str:
    """Invalid unless it is http://host:port; what is measured has no TLS of its own."""
    parts = urlsplit(target)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise Invalid.at(option, f"must look like http://127.0.0.1:8000, not {target!r}")
    return target.rstrip("/")


def read_formats(text: str) -> list[str]:
    formats = _words("format", text)
    for name in formats:
        if name not in FORMATS:
            raise Invalid.at("format", f"must be of {', '.join(FORMATS)}, not {name!r}")
    return formats


def read_numbers(option: str, text: str, kind: type[N], least: N) -> list[N]:
    """Comma-separated numbers, each at least `least` and once."""
    numbers = [_number(option, word, kind) for word in _words(option, text)]
    for number in numbers:
        if not least <= number < float("inf"):
            raise Invalid.at(option, f"must be numbers from {least:g} up, not {number:g}")
    return numbers


def read_params(option: str, text: str) -> dict[str, float]:
    """`ef_search=32,rerank=2` as a mapping."""
    params: dict[str, float] = {}
    for word in _words(option, text) if text else []:
        name, _, value = word.partition("=")
        if name not in PARAMS or not value:
            raise Invalid.at(option, f"must look like ef_search=32 (of {', '.join(PARAMS)}), not {word!r}")
        params[name] = _number(option, value, PARAMS[name])
    return params


def read_sweep(text: str) -> list[dict[str, float]]:
    """`ef_search=16,32,64` as one operating point per value."""
    name, _, values = text.partition("=")
    if name not in PARAMS or not values:
        raise Invalid.at("sweep", f"must look like ef_search=16,32,64 (of {', '.join(PARAMS)}), not {text!r}")
    return [{name: _number("sweep", value, PARAMS[name])} for value in _words("sweep", values)]


def operating_points(params: str, target_recall: float | None, sweep: str | None) -> tuple[dict[str, float], ...]:
    """One without a sweep; Invalid where a name is given twice. The endpoint judges the values."""
    fixed = read_params("params", params)
    told = fixed | ({} if target_recall is None else {"target_recall": target_recall})
    if target_recall is not None and "target_recall" in fixed:
        raise Invalid.at("target_recall", "is given by --params as well: leave one out")
    swept = read_sweep(sweep) if sweep is not None else [{}]
    for name in swept[0].keys() & told.keys():
        raise Invalid.at("sweep", f"{name} is fixed by another option as well: leave one out")
    return tuple(told | point for point in swept)


def load_shapes(
    formats: Iterable[str],
    batches: Iterable[int],
    connections: Iterable[int],
    rates: Iterable[float],
    open_connections: int,
    in_flight_max: int,
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Closed loops, then open ones; second those left out, which would ask for too many vectors at one time."""
    kinds = list(product(formats, batches))
    closed = [Shape(name, batch, count) for name, batch in kinds for count in connections]
    opened = [Shape(name, batch, open_connections, rate) for name, batch in kinds for rate in rates]
    taken = [shape for shape in closed if shape.in_flight <= in_flight_max]
    return (*taken, *opened), tuple(shape for shape in closed if shape.in_flight > in_flight_max)


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise Invalid.at(option, f"must be different values between commas, not {text!r}")
    return words


def _number(option: str, word: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(word)
    except ValueError:
        raise Invalid.at(option, f"{word!r} is not {'an integer' if kind is int else 'a number'}") from None
