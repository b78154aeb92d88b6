"""The wire's JSON bodies, decoded strictly by msgspec: unknown fields and wrong types name the field."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from actors.faiss_index import check_factory
from cluster.config import (
    DIMENSION_MAX,
    FACTORY_CHARACTERS_MAX,
    OPTION_RANGES,
    REPLICAS_MAX,
    SHARDS_MAX,
    Codes,
    CollectionConfig,
    Device,
    IdType,
    IndexKindChoice,
    Limits,
    Metric,
    RerankStore,
    VectorDtype,
)
from cluster.errors import FieldError, Invalid
from cluster.index_policy import choose
from cluster.query import Query, SearchParams
from cluster.vectors import as_searched, vector_problem

HIT_NUMBERS = 4  # a hit takes the memory of about four numbers (436 MiB for a million)
CANDIDATES_MAX = 65_536  # whose exact distance one query may ask for, k x rerank
T = TypeVar("T", bound=Struct)
Knob = Annotated[int, Meta(ge=1, le=65_536)]  # FAISS sets aside 8 bytes x ef_search for each query it works on
Rerank = Annotated[float, Meta(ge=1.0, le=1_000.0)]
Recall = Annotated[float, Meta(gt=0.0, le=1.0)]


def _range(option: str) -> Meta:
    low, high = OPTION_RANGES[option]
    return Meta(ge=low, le=high)


class IndexBody(Struct, forbid_unknown_fields=True):
    """Which index the shards build; null leaves an option to the policy."""

    kind: IndexKindChoice = "auto"
    target_recall: Recall = 0.95
    device: Device = "cpu"
    memory_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    build_seconds: Annotated[float, Meta(gt=0.0)] | None = None
    churn: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    codes: Codes | None = None
    m: Annotated[int, _range("m")] | None = None
    ef_construction: Annotated[int, _range("ef_construction")] | None = None
    nlist: Annotated[int, _range("nlist")] | None = None
    pq_m: Annotated[int, _range("pq_m")] | None = None
    pq_bits: Literal[4, 8] | None = None
    rerank_store: RerankStore | None = None
    factory: Annotated[str, Meta(min_length=1, max_length=FACTORY_CHARACTERS_MAX)] | None = None


class CollectionBody(Struct, forbid_unknown_fields=True):
    """A collection to create."""

    dimension: Annotated[int, Meta(ge=1, le=DIMENSION_MAX)]
    metric: Metric = "cosine"
    id_type: IdType = "int64"
    shards: Annotated[int, Meta(ge=1, le=SHARDS_MAX)] = 1
    replicas: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1
    vector_dtype: VectorDtype = "float32"
    index: IndexBody = msgspec.field(default_factory=IndexBody)

    def to_config(self, check_factory_string: bool = True) -> CollectionConfig:
        """Invalid where options do not go together, or FAISS makes no index of the factory string."""
        config = CollectionConfig.from_dict(msgspec.to_builtins(self))
        if check_factory_string and config.index.factory is not None:
            check_factory(config.index.factory, config.dimension, config.metric)
        return config


class SearchParamsBody(Struct, forbid_unknown_fields=True):
    """Raw knobs, or the target whose tuned operating point is taken; without either the collection's own target."""

    nprobe: Knob | None = None
    ef_search: Knob | None = None
    rerank: Rerank | None = None
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


class SearchOptions(Struct, forbid_unknown_fields=True):
    """A search's options as URL parameters, where the body is Arrow."""

    k: Annotated[int, Meta(ge=1)] = 10
    timeout_ms: Annotated[float, Meta(gt=0.0)] = 1_000.0
    min_coverage: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    nprobe: Knob | None = None
    ef_search: Knob | None = None
    rerank: Rerank | None = None
    target_recall: Recall | None = None
    exact: bool = False
    with_attributes: str = ""
    with_vectors: bool = False


class FetchBody(Struct, forbid_unknown_fields=True):
    """Points to fetch by id."""

    ids: list[int | str]
    with_vectors: bool = False


class ImportBody(Struct, forbid_unknown_fields=True):
    """An import job. `create` allows a new collection and holds its config as far as the file does not give it."""

    kind: Literal["import"]
    source: Annotated[str, Meta(min_length=1)]
    id_column: str = "id"
    vector_column: str = "vector"
    attribute_columns: list[str] | Literal["all"] = []
    mode: Literal["replace"] = "replace"
    create: dict[str, Any] | None = None
    memory_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


_DECODERS: dict[type[Struct], msgspec.json.Decoder[Any]] = {
    body: msgspec.json.Decoder(body) for body in (CollectionBody, SearchBody, FetchBody, ImportBody)
}
_AT = re.compile(r" - at `\$\.?([^`]*)`")
_NAMED = re.compile(r"field `([^`]*)`")


def decode(data: bytes, body: type[T]) -> T:
    """Decode and check a JSON body; Invalid names the field."""
    try:
        decoded: T = _DECODERS[body].decode(data)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid.at("body", f"is not JSON: {error}") from None
    return decoded


def decode_options(parameters: Sequence[tuple[str, str]]) -> SearchOptions:
    """Check URL parameters; Invalid names the parameter."""
    options = dict(parameters)
    if len(options) < len(parameters):
        names = [name for name, _ in parameters]
        raise Invalid.at(next(name for name in names if names.count(name) > 1), "is given more than once")
    try:
        return msgspec.convert(options, SearchOptions, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None


def check_create(create: dict[str, Any]) -> None:
    """Refuse now what an import job would refuse: the config of a new collection, whose dimension the file may give."""
    try:
        body = _collection_body({"dimension": 1, **create})
        if "dimension" not in create and body.index.pq_m is not None:
            body.dimension = body.index.pq_m  # the file's must be no less
        choose(0, body.to_config(check_factory_string="dimension" in create))
    except Invalid as error:
        raise _invalid_fields(FieldError(f"create.{e.field}", e.message) for e in error.errors) from None


def check_config(fields: dict[str, Any]) -> CollectionConfig:
    """The config that a PUT with these fields would make; Invalid as the endpoint's."""
    return _collection_body(fields).to_config()


def _collection_body(fields: dict[str, Any]) -> CollectionBody:
    try:
        return msgspec.convert(fields, CollectionBody)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None


def _invalid_fields(errors: Iterable[FieldError]) -> Invalid:
    fields = tuple(errors)
    return Invalid("; ".join(f"{e.field}: {e.message}" for e in fields), fields)


def _invalid(error: msgspec.ValidationError) -> Invalid:
    """msgspec's message as one of ours: `Expected `int`, got `str` - at `$.k`` names the field k."""
    text = str(error)
    place = _AT.search(text)
    field = place.group(1) if place else ""
    named = _NAMED.search(text)
    if named:
        field = f"{field}.{named.group(1)}" if field else named.group(1)
    return Invalid.at(field or "body", _AT.sub("", text))


def json_query(body: SearchBody, config: CollectionConfig, limits: Limits) -> Query:
    """The query of a JSON search; Invalid names the field and the position."""
    if (body.vectors is None) == (body.vector is None):
        raise Invalid.at("vectors", "give either vectors or vector")
    rows = body.vectors if body.vectors is not None else [body.vector or []]
    name = "vectors[{}]" if body.vectors is not None else "vector"
    options = SearchOptions(
        body.k,
        body.timeout_ms,
        body.min_coverage,
        **msgspec.structs.asdict(body.params),
        exact=body.exact,
        with_vectors=body.with_vectors,
    )
    params = _search_params(options, "params.")
    vectors = _rows_to_vectors(rows, config.dimension, name, limits)
    return _query(vectors, name, options, params, tuple(body.with_attributes), config, limits)


def arrow_query(vectors: NDArray[Any], options: SearchOptions, config: CollectionConfig, limits: Limits) -> Query:
    """The query of an Arrow search, vectors of shape (n, dimension)."""
    if vectors.shape[1] != config.dimension:
        raise Invalid.at("vector", f"has {vectors.shape[1]} numbers, the collection's dimension is {config.dimension}")
    _check_count(len(vectors), limits)
    attributes = tuple(name for name in options.with_attributes.split(",") if name)
    params = _search_params(options, "")
    return _query(vectors.astype(np.float32, copy=False), "vector[{}]", options, params, attributes, config, limits)


def _search_params(options: SearchOptions, prefix: str) -> SearchParams:
    """Invalid where the accuracy is asked for in two ways, or too many candidates are."""
    params = SearchParams(options.nprobe, options.ef_search, options.rerank, options.target_recall, options.exact)
    knobs = list(params.given)
    if params.exact:
        also, other = [*knobs, *(["target_recall"] if params.target_recall is not None else [])], "exact"
    else:
        also, other = (knobs, f"{prefix}target_recall") if params.target_recall is not None else ([], "")
    if also:
        raise _invalid_fields(FieldError(prefix + name, f"does not go with {other}: leave one out") for name in also)
    candidates = options.k * (params.rerank or 1.0)
    if params.rerank is not None and candidates > CANDIDATES_MAX:
        raise Invalid.at(
            f"{prefix}rerank",
            f"{params.rerank:g} x k {options.k} are {candidates:.0f} candidates, at most {CANDIDATES_MAX} are taken: "
            f"rerank up to {CANDIDATES_MAX / options.k:.1f}, or a smaller k",
        )
    return params


def _query(
    vectors: NDArray[np.float32],
    name: str,
    options: SearchOptions,
    params: SearchParams,
    attributes: tuple[str, ...],
    config: CollectionConfig,
    limits: Limits,
) -> Query:
    if options.k > limits.k:
        raise Invalid.at("k", f"must be at most {limits.k}, not {options.k}")
    if options.timeout_ms > limits.timeout_ms:
        raise Invalid.at("timeout_ms", f"must be at most {limits.timeout_ms}, not {options.timeout_ms:g}")
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
        tuple(dict.fromkeys(attributes)),
        options.with_vectors,
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


def _rows_to_vectors(rows: list[list[float]], dimension: int, name: str, limits: Limits) -> NDArray[np.float32]:
    _check_count(len(rows), limits)
    errors = tuple(
        FieldError(name.format(i), f"has {len(row)} numbers, the collection's dimension is {dimension}")
        for i, row in enumerate(rows)
        if len(row) != dimension
    )
    if errors:
        raise Invalid(f"{errors[0].field} {errors[0].message}", errors[:10])
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, which is then refused by position
        return np.array(rows, dtype=np.float64).reshape(len(rows), dimension).astype(np.float32)


def _check_count(count: int, limits: Limits) -> None:
    if not 1 <= count <= limits.vectors_per_search:
        raise Invalid.at("vectors", f"must hold 1 to {limits.vectors_per_search} vectors, not {count}")
