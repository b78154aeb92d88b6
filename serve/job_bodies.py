"""The wire's JSON bodies of jobs, told apart by their `kind`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from cluster.config import COLLECTION_NAME, SHARDS_MAX, CollectionConfig
from cluster.errors import FieldError, Invalid
from cluster.gpu_memory import GpuFacts
from cluster.index_policy import choose
from cluster.snapshots import NAME as SNAPSHOT_NAME
from jobs.rebuild import RebuildOptions, changed_config
from jobs.scrub import SAMPLE_MAX
from serve.decoding import decode, invalid_fields
from serve.schemas import Memory, collection_body

TEXT_CHARACTERS_MAX = 4_096
GENERATION_MAX = 2**53
GRACE_S_MAX = 366 * 86_400.0
NAMES = ("into", "name", "snapshot")
Seed = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(pattern=f"^{COLLECTION_NAME.pattern}$")]
SnapshotName = Annotated[str, Meta(pattern=f"^{SNAPSHOT_NAME.pattern}$")]
Generation = Annotated[int, Meta(ge=1, le=GENERATION_MAX)]


class ImportBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="import"):
    """An import job. `create` allows a new collection and holds its config as far as the file does not give it."""

    source: Annotated[str, Meta(min_length=1)]
    id_column: str = "id"
    vector_column: str = "vector"
    attribute_columns: list[str] | Literal["all"] = []
    mode: Literal["replace"] = "replace"
    create: dict[str, Any] | None = None
    memory_bytes: Memory | None = None
    seed: Seed = 0


class RebuildBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="rebuild"):
    """A rebuild of the collection's index, which is as it was configured but for the fields of `index` and `shards`
    that are given."""

    index: dict[str, Any] = {}
    shards: Annotated[int, Meta(ge=1, le=SHARDS_MAX)] | None = None
    memory_bytes: Memory | None = None
    seed: Seed = 0


class CompactBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="compact"):
    """A compaction of all shards, or of one."""

    shard: Annotated[int, Meta(ge=0, lt=SHARDS_MAX)] | None = None
    memory_bytes: Memory | None = None


class RollbackBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="rollback"):
    """A rollback to an earlier generation (null: the one before), however many writes it lacks."""

    generation: Generation | None = None


class SnapshotBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="snapshot"):
    """A snapshot of everything that was acknowledged before, under a name."""

    name: SnapshotName


class RestoreBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="restore"):
    """The points of a snapshot become the collection's."""

    snapshot: SnapshotName


class BranchBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="branch"):
    """A new collection, `into`, with the points of a snapshot (null: of now), which shares its files."""

    into: Name
    snapshot: SnapshotName | None = None


class ExportBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="export"):
    """Parquet files of the points of a snapshot (null: of now), written to a folder or object-storage URL."""

    target: Annotated[str, Meta(min_length=1, max_length=TEXT_CHARACTERS_MAX)]
    snapshot: SnapshotName | None = None


class CollectGarbageBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="collect_garbage"):
    """Tell what nothing needs any more, and with `delete` delete it, as far as it is older than `grace_s`."""

    delete: bool = False
    grace_s: Annotated[float, Meta(ge=0.0, le=GRACE_S_MAX)] | None = None


class ScrubBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="scrub"):
    """Read everything that is stored, and say what is not as it was written; measure recall with `sample` queries."""

    sample: Annotated[int, Meta(ge=0, le=SAMPLE_MAX)] | None = None
    seed: Seed = 0
    memory_bytes: Memory | None = None


JobBody = (
    ImportBody
    | RebuildBody
    | CompactBody
    | RollbackBody
    | SnapshotBody
    | RestoreBody
    | BranchBody
    | ExportBody
    | CollectGarbageBody
    | ScrubBody
)
JOB_BODIES: tuple[type[Struct], ...] = get_args(JobBody)


class RollbackNowBody(Struct, forbid_unknown_fields=True):
    """A rollback that is answered when it is done."""

    generation: Generation | None = None


def decode_job(data: bytes) -> JobBody:
    """The body of a job on a collection, of any kind; Invalid names the field."""
    either: Any = JobBody  # mypy knows no type of a union
    body: JobBody = decode(data, either)
    for field in NAMES:
        if str(getattr(body, field, "")).endswith("\n"):  # which Python's `$` of a pattern does not see
            raise Invalid.at(field, "ends in a line break")
    return body


def decode_job_of_all(data: bytes) -> CollectGarbageBody:
    """The body of a job on all collections; Invalid names the field."""
    body = decode_job(data)
    if not isinstance(body, CollectGarbageBody):
        raise Invalid.at("kind", f"{kind_of(body)} works on one collection: POST it to /v1/collections/NAME/jobs")
    return body


def kind_of(body: JobBody) -> str:
    return str(body.__struct_config__.tag)


def check_create(create: dict[str, Any], gpus: Callable[[CollectionConfig], GpuFacts | None]) -> None:
    """Refuse now what an import job would refuse: the config of a new collection, whose dimension the file may give.

    `gpus` tells what there is of GPUs for it, or raises that there are none.
    """
    try:
        body = collection_body({"dimension": 1, **create})
        if "dimension" not in create and body.index.pq_m is not None:
            body.dimension = body.index.pq_m  # the file's must be no less
        config = body.to_config(check_factory_string="dimension" in create)
        choose(0, config, gpus(config))
    except Invalid as error:
        raise invalid_fields(FieldError(f"create.{e.field}", e.message) for e in error.errors) from None


def check_rebuild(
    body: RebuildBody, config: CollectionConfig, points: int, gpus: Callable[[CollectionConfig], GpuFacts | None]
) -> None:
    """Refuse now what a rebuild would refuse: an index that no shard could build. Invalid names the field.

    `gpus` as of `check_create`.
    """
    collection_body({"dimension": 1, "index": body.index})  # fields that no index has, values that none can have
    wanted = changed_config(config, RebuildOptions("", body.index, body.shards))
    choose(points // wanted.shards, wanted, gpus(wanted))
