"""Searches and fetches as bodies and URL parameters, and the queries they ask for."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from cluster.config import SHARDS_MAX, CollectionConfig, Limits
from cluster.errors import FieldError, Invalid
from cluster.index_spec import ITOPK_MAX, ITOPK_STEP
from cluster.query import Query, SearchParams
from cluster.vectors import as_searched, vector_problem
from serve.decoding import decode, invalid_fields
from serve.schemas import Recall

HIT_NUMBERS = 4  # a hit takes the memory of about four numbers (436 MiB for a million)
CANDIDATES_MAX = 65_536  # whose exact distance one query may ask for, k x rerank
LSN_MAX = 2**63 - 1
SEARCH_WIDTH_MAX = 64  # presumed: eight times the widest that cuVS's own benchmark tries
Knob = Annotated[int, Meta(ge=1, le=65_536)]  # FAISS sets aside 8 bytes x ef_search for each query it works on
Rerank = Annotated[float, Meta(ge=1.0, le=1_000.0)]
ItopkSize = Annotated[int, Meta(ge=ITOPK_STEP, le=ITOPK_MAX)]
SearchWidth = Annotated[int, Meta(ge=1, le=SEARCH_WIDTH_MAX)]
Lsn = Annotated[int, Meta(ge=0, le=LSN_MAX)]
VALUES_OF = {"min_lsn": Lsn, "attributes": Any}  # fields of bodies that are mappings
_SHARDS = {str(shard): shard for shard in range(SHARDS_MAX)}
T = TypeVar("T", bound=Struct)
_UNREADABLE = (LookupError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_STEP = re.compile(r"\[(\d+)\]|([^.\[]+)")  # of a place such as points[0].attributes


class SearchParamsBody(Struct, forbid_unknown_fields=True):
    """Raw knobs, or the target whose tuned operating point is taken; without either the collection's own target."""

    nprobe: Knob | None = None
    ef_search: Knob | None = None
    rerank: Rerank | None = None
    itopk_size: ItopkSize | None = None
    search_width: SearchWidth | None = None
    target_recall: Recall | None = None


class SearchBody(Struct, forbid_unknown_fields=True):
    """A search; one of `vectors` and `vector`."""

    vectors: list[list[float]] | None = None
    vector: list[float] | None = None
    k: Annotated[int, Meta(ge=1)] = 10
    timeout_ms: Annotated[float, Meta(gt=0.0)] = 1_000.0
    min_coverage: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    params: SearchParamsBody = msgspec.field(default_factory=SearchParamsBody)
    exact: bool = False
    with_attributes: list[str] = []
    with_vectors: bool = False
    min_lsn: dict[str, Lsn] = {}


class SearchOptions(Struct, forbid_unknown_fields=True):
    """A search's options as URL parameters, where the body is Arrow."""

    k: Annotated[int, Meta(ge=1)] = 10
    timeout_ms: Annotated[float, Meta(gt=0.0)] = 1_000.0
    min_coverage: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    nprobe: Knob | None = None
    ef_search: Knob | None = None
    rerank: Rerank | None = None
    itopk_size: ItopkSize | None = None
    search_width: SearchWidth | None = None
    target_recall: Recall | None = None
    exact: bool = False
    with_attributes: str = ""
    with_vectors: bool = False
    min_lsn: str = ""


class FetchBody(Struct, forbid_unknown_fields=True):
    """Points to fetch by id."""

    ids: list[int | str]
    with_vectors: bool = False
    min_lsn: dict[str, Lsn] = {}


def decode_naming_keys(data: bytes, body: type[T]) -> T:
    """`decode`, whose Invalid names the key of a mapping; msgspec says `min_lsn[...]` instead."""
    try:
        return decode(data, body)
    except Invalid as error:
        place, unnamed, inner = error.errors[0].field.partition("[...]")
        key = _first_wrong_key(data, place) if unnamed else None
        if key is None:
            raise
        raise Invalid.at(f"{place}.{key}{inner}", error.errors[0].message) from None


def _first_wrong_key(data: bytes, place: str) -> str | None:
    """Of the mapping at that place; None where it has none, because a later one of that name replaces it."""
    raw, wanted = Raw(data), VALUES_OF.get(place.rpartition(".")[2])
    if wanted is None:
        return None
    try:
        for index, name in _STEP.findall(place):
            raw = _decoded(raw, dict[str, Raw])[name] if name else _decoded(raw, list[Raw])[int(index)]
        values = _decoded(raw, dict[str, Raw])
    except _UNREADABLE:
        return None
    return next((key for key, value in values.items() if not _fits(value, wanted)), None)


def _decoded(raw: Raw, wanted: Any) -> Any:
    return msgspec.json.decode(raw, type=wanted)


def _fits(raw: Raw, wanted: Any) -> bool:
    try:
        _decoded(raw, wanted)
    except _UNREADABLE:
        return False
    return True


def json_query(body: SearchBody, config: CollectionConfig, limits: Limits) -> Query:
    """The query of a JSON search; Invalid names the field and the position."""
    if (body.vectors is None) == (body.vector is None):
        raise Invalid.at("vectors", "give either vectors or vector")
    rows = body.vectors if body.vectors is not None else [body.vector or []]
    name = "vectors[{}]" if body.vectors is not None else "vector"
    params = _search_params(body.k, *_knobs(body.params), body.exact, "params.")
    _check_count(len(rows), limits)
    vectors = rows_to_vectors(rows, config.dimension, name.format)
    min_lsn = read_min_lsn(body.min_lsn) if body.min_lsn else {}
    return _query(vectors, name, body, params, tuple(body.with_attributes), min_lsn, config, limits)


def arrow_query(vectors: NDArray[Any], options: SearchOptions, config: CollectionConfig, limits: Limits) -> Query:
    """The query of an Arrow search, vectors of shape (n, dimension)."""
    if vectors.shape[1] != config.dimension:
        raise Invalid.at("vector", f"has {vectors.shape[1]} numbers, the collection's dimension is {config.dimension}")
    _check_count(len(vectors), limits)
    attributes = tuple(name for name in options.with_attributes.split(",") if name)
    params = _search_params(options.k, *_knobs(options), options.exact, "")
    min_lsn = _min_lsn_of_text(options.min_lsn) if options.min_lsn else {}
    vectors = vectors.astype(np.float32, copy=False)
    return _query(vectors, "vector[{}]", options, params, attributes, min_lsn, config, limits)


def read_min_lsn(asked: Mapping[str, int]) -> dict[int, int]:
    """`min_lsn` by shard number; Invalid where no collection has such a shard.

    One that this collection lacks may be of a routing that was, or is to come: only who serves it can tell.
    """
    for shard in asked:
        if shard not in _SHARDS:
            raise Invalid.at(f"min_lsn.{shard}", f"is no shard; shards are numbered 0 to {SHARDS_MAX - 1}")
    return {_SHARDS[shard]: lsn for shard, lsn in asked.items()}


def _min_lsn_of_text(text: str) -> dict[int, int]:
    """The same as a URL parameter: `0:17,1:4`."""
    asked = {}
    for part in filter(None, text.split(",")):
        shard, _, lsn = part.partition(":")
        if not (lsn.isascii() and lsn.isdecimal() and len(lsn) <= 19 and int(lsn) <= LSN_MAX):
            raise Invalid.at("min_lsn", f"must look like 0:17,1:4 (shard:LSN), not {part[:50]!r}")
        if shard in asked:
            raise Invalid.at("min_lsn", f"names shard {shard} twice")
        asked[shard] = int(lsn)
    return read_min_lsn(asked)


def _knobs(
    given: SearchParamsBody | SearchOptions,
) -> tuple[int | None, int | None, float | None, float | None, int | None, int | None]:
    """In the order of `_search_params`."""
    return (
        given.nprobe,
        given.ef_search,
        given.rerank,
        given.target_recall,
        given.itopk_size,
        given.search_width,
    )


@lru_cache(maxsize=256)
def _search_params(
    k: int,
    nprobe: int | None,
    ef_search: int | None,
    rerank: float | None,
    target_recall: float | None,
    itopk_size: int | None,
    search_width: int | None,
    exact: bool,
    prefix: str,
) -> SearchParams:
    """Invalid where the accuracy is asked for in two ways, or too many candidates are. Clients ask for few different
    ones: they are kept."""
    params = SearchParams(nprobe, ef_search, rerank, target_recall, exact, itopk_size, search_width)
    knobs = list(params.given)
    if params.exact:
        also, other = [*knobs, *(["target_recall"] if params.target_recall is not None else [])], "exact"
    else:
        also, other = (knobs, f"{prefix}target_recall") if params.target_recall is not None else ([], "")
    if also:
        raise invalid_fields(FieldError(prefix + name, f"does not go with {other}: leave one out") for name in also)
    candidates = k * (params.rerank or 1.0)
    if params.rerank is not None and candidates > CANDIDATES_MAX:
        raise Invalid.at(
            f"{prefix}rerank",
            f"{params.rerank:g} x k {k} are {candidates:.0f} candidates, at most {CANDIDATES_MAX} are taken: "
            f"rerank up to {CANDIDATES_MAX / k:.1f}, or a smaller k",
        )
    return params


def _query(
    vectors: NDArray[np.float32],
    name: str,
    options: SearchBody | SearchOptions,
    params: SearchParams,
    attributes: tuple[str, ...],
    min_lsn: Mapping[int, int],
    config: CollectionConfig,
    limits: Limits,
) -> Query:
    if options.k > limits.k:
        raise Invalid.at("k", f"must be at most {limits.k}, not {options.k}")
    check_timeout(options.timeout_ms, limits)
    check_answer(len(vectors) * options.k, config, options.with_vectors, "k", limits)
    problem = vector_problem(vectors, config.metric)
    if problem is not None:
        raise Invalid.at(name.format(problem[0]), problem[1])
    return Query(
        as_searched(vectors, config.metric),
        options.k,
        params,
        options.timeout_ms,
        options.min_coverage,
        tuple(dict.fromkeys(attributes)) if attributes else (),
        options.with_vectors,
        min_lsn,
    )


def answer_numbers(hits: int, config: CollectionConfig, with_vectors: bool) -> int:
    """The size of an answer, as `Limits.answer_numbers` counts it."""
    return hits * (HIT_NUMBERS + (config.dimension if with_vectors else 0))


def check_answer(hits: int, config: CollectionConfig, with_vectors: bool, field: str, limits: Limits) -> None:
    """Invalid where so many hits could make an answer over `answer_numbers`."""
    numbers = answer_numbers(hits, config, with_vectors)
    if numbers > limits.answer_numbers:
        raise Invalid.at(
            field,
            f"{hits} hits {'with' if with_vectors else 'without'} vectors count as {numbers} numbers of answer, "
            f"at most {limits.answer_numbers} are given: ask for less at a time",
        )


def check_timeout(timeout_ms: float, limits: Limits) -> None:
    """Invalid where it is more than the endpoint's bound."""
    if timeout_ms > limits.timeout_ms:
        raise Invalid.at("timeout_ms", f"must be at most {limits.timeout_ms}, not {timeout_ms:g}")


def rows_to_vectors(rows: list[list[float]], dimension: int, name: Callable[[int], str]) -> NDArray[np.float32]:
    """Lists of numbers as vectors (n, dimension); `name` is what a message calls a row.

    A number beyond float32 becomes infinity, which `vector_problem` finds. `struct` takes half of numpy's time for
    lists, and no array of float64 between.
    """
    if any(len(row) != dimension for row in rows):
        errors = tuple(
            FieldError(name(i), f"has {len(row)} numbers, the collection's dimension is {dimension}")
            for i, row in enumerate(rows)
            if len(row) != dimension
        )
        raise Invalid(f"{errors[0].field} {errors[0].message}", errors[:10])
    row_format = struct.Struct(f"{dimension}f")
    packed = bytearray(row_format.size * len(rows))
    for i, row in enumerate(rows):
        row_format.pack_into(packed, i * row_format.size, *row)
    return np.frombuffer(packed, np.float32).reshape(len(rows), dimension)


def _check_count(count: int, limits: Limits) -> None:
    if not 1 <= count <= limits.vectors_per_search:
        raise Invalid.at("vectors", f"must hold 1 to {limits.vectors_per_search} vectors, not {count}")
