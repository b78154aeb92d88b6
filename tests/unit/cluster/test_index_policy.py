"""The adaptive policy: its choices as a pinned table, and what holds for every input."""

from __future__ import annotations

import re
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster import index_costs
from cluster.config import CollectionConfig, IndexConfig, IndexKindChoice
from cluster.errors import Invalid
from cluster.index_costs import Rates
from cluster.index_policy import (
    FLAT_FLOATS_MAX,
    HNSW_CHURN_MAX,
    MEMORY_MARGIN,
    STRONGER_MAX,
    IndexPlan,
    choose,
    like,
    plan_index,
    stronger,
    with_codes,
    with_store,
)
from cluster.index_spec import HNSW_EF_CONSTRUCTION, HNSW_M, POINTS_PER_CENTROID_MIN, RABITQ_DIMENSIONS, IndexSpec
from tests.formats import policy_table

KINDS: list[IndexKindChoice] = ["auto", "flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq"]


def test_choices_are_those_of_the_table() -> None:
    """After a wanted change: `python -m tests.formats.policy_table`, and look at what changed."""
    assert policy_table.lines() == policy_table.FILE.read_text().splitlines()


def test_table_has_every_kind_the_policy_may_choose_and_refusals() -> None:
    answers = [line.split(" -> ")[1].split(" ")[0] for line in policy_table.FILE.read_text().splitlines()]
    assert set(answers) == {"flat", "hnsw", "ivf_pq", "ivf_rabitq", "cagra", "ivf_flat", "refused:"}


# ---- named examples


def config_of(dimension: int = 384, dtype: Any = "float32", **index: Any) -> CollectionConfig:
    return CollectionConfig(dimension, vector_dtype=dtype, index=IndexConfig(**index))


def chosen(count: int, **options: Any) -> tuple[str, str, str]:
    spec = choose(count, config_of(**options))
    return spec.kind, spec.codes, spec.rerank_store


def test_few_floats_are_scanned_and_more_are_not() -> None:
    most = FLAT_FLOATS_MAX // 384
    assert chosen(most) == ("flat", "float32", "none")
    assert chosen(most + 1) == ("hnsw", "float16", "rows")


def test_target_of_one_is_exact_at_any_count() -> None:
    assert chosen(10_000_000, target_recall=1.0)[0] == "flat"


def test_memory_for_one_index_takes_it_or_a_preferred_one() -> None:
    considered = plan_index(200_000, config_of()).considered[1:]  # without flat, which is too slow
    taken = [choose(200_000, config_of(memory_bytes=needed(candidate.spec))) for candidate in considered]
    preference = [candidate.spec for candidate in considered]
    assert all(preference.index(spec) <= position for position, spec in enumerate(taken))
    graphs = [position for position, spec in enumerate(preference) if spec.kind == "hnsw"]
    assert [taken[position] for position in graphs] == [preference[position] for position in graphs]
    assert choose(200_000, config_of(memory_bytes=min(map(needed, preference)))).kind.startswith("ivf")


def needed(spec: IndexSpec) -> int:
    return ceil(spec.predicted_bytes * MEMORY_MARGIN)


@pytest.mark.parametrize(
    ("dimension", "kind"), [(255, "ivf_pq"), (256, "ivf_rabitq"), (3_072, "ivf_rabitq"), (3_073, "ivf_pq")]
)
def test_compressed_lists_depend_on_the_dimension(dimension: int, kind: str) -> None:
    assert RABITQ_DIMENSIONS == (256, 3_072)
    assert chosen(200_000, dimension=dimension, churn=0.5) == (kind, "float32", "float16")


def test_churn_prefers_lists_over_graphs() -> None:
    assert chosen(200_000, churn=HNSW_CHURN_MAX)[0] == "hnsw"
    assert chosen(200_000, churn=HNSW_CHURN_MAX + 0.01)[0] == "ivf_rabitq"


def test_short_build_prefers_lists_over_graphs() -> None:
    plan = plan_index(200_000, config_of())
    graph, lists = (next(c for c in plan.considered if c.spec.kind == kind) for kind in ("hnsw", "ivf_rabitq"))
    assert chosen(200_000, build_seconds=graph.build_seconds)[0] == "hnsw"
    assert chosen(200_000, build_seconds=lists.build_seconds)[0] == "ivf_rabitq"


def test_rates_of_the_machine_decide_about_the_build() -> None:
    config = config_of(build_seconds=100.0)
    assert plan_index(200_000, config, Rates(graph_ns=1_000.0)).spec.kind == "hnsw"
    assert plan_index(200_000, config, Rates(graph_ns=100_000.0)).spec.kind == "ivf_rabitq"


def test_float16_rows_are_scanned_as_they_are_where_float32_does_not_fit() -> None:
    floats = 10_000 * 384
    assert chosen(10_000, dtype="float16", memory_bytes=floats * 3) == ("flat", "float16", "none")
    assert chosen(10_000, dtype="float32", memory_bytes=floats * 3)[0] != "flat"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 50_000])
def test_device_auto_of_which_no_gpu_is_known_is_the_cpu(kind: IndexKindChoice, count: int) -> None:
    of_cpu, of_auto = (plan_index(count, config_of(kind=kind, device=device)) for device in ("cpu", "auto"))
    assert of_auto == of_cpu
    assert {candidate.spec.device for candidate in of_auto.considered} == {"cpu"}


# ---- kinds that were named


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("count", [0, 1, 1_000, 2_000_000])
def test_named_kind_is_taken_at_any_count(kind: IndexKindChoice, count: int) -> None:
    spec = choose(count, config_of(dimension=17, kind=kind))
    assert spec.kind == kind
    assert spec.reason == f"{kind} was asked for"


@pytest.mark.parametrize(
    ("options", "params", "codes", "store"),
    [
        ({"kind": "hnsw"}, {"m": HNSW_M, "ef_construction": HNSW_EF_CONSTRUCTION}, "float16", "rows"),
        ({"kind": "hnsw", "dtype": "float16"}, {"m": HNSW_M, "ef_construction": 100}, "float16", "none"),
        ({"kind": "hnsw", "m": 8, "ef_construction": 40}, {"m": 8, "ef_construction": 40}, "float16", "rows"),
        ({"kind": "hnsw", "codes": "float32"}, {"m": HNSW_M, "ef_construction": 100}, "float32", "none"),
        ({"kind": "hnsw", "codes": "sq8", "rerank_store": "none"}, {"m": 32, "ef_construction": 100}, "sq8", "none"),
        ({"kind": "ivf_flat"}, {"nlist": 1_024}, "float32", "none"),
        ({"kind": "ivf_flat", "nlist": 7, "codes": "float16"}, {"nlist": 7}, "float16", "rows"),
        ({"kind": "ivf_sq8"}, {"nlist": 1_024}, "float32", "rows"),
        ({"kind": "ivf_pq"}, {"nlist": 1_024, "pq_m": 96, "pq_bits": 4}, "float32", "rows"),
        ({"kind": "ivf_pq", "pq_bits": 8}, {"nlist": 1_024, "pq_m": 48, "pq_bits": 8}, "float32", "rows"),
        ({"kind": "ivf_pq", "pq_m": 5}, {"nlist": 1_024, "pq_m": 5, "pq_bits": 4}, "float32", "rows"),
        ({"kind": "ivf_rabitq", "rerank_store": "sq8"}, {"nlist": 1_024}, "float32", "sq8"),
        ({"kind": "factory", "factory": "IVF4,PQ8"}, {}, "float32", "rows"),
        ({"kind": "flat"}, {}, "float32", "none"),
        ({"kind": "flat", "codes": "float16"}, {}, "float16", "rows"),
        ({"kind": "flat", "codes": "float16", "dtype": "float16"}, {}, "float16", "none"),
    ],
)
def test_named_kind_takes_its_options(options: dict[str, Any], params: dict[str, int], codes: str, store: str) -> None:
    spec = choose(50_000, config_of(target_recall=0.9, **options))
    assert (spec.params, spec.codes, spec.rerank_store) == (params, codes, store)


def test_factory_string_is_the_reason() -> None:
    spec = choose(1_000, config_of(kind="factory", factory="IVF4,PQ8"))
    assert (spec.factory, spec.reason) == ("IVF4,PQ8", "IVF4,PQ8 was asked for")


def test_named_graph_of_float16_rows_reaches_what_their_own_precision_does() -> None:
    assert choose(50_000, config_of(dtype="float16", kind="hnsw", target_recall=0.999)).rerank_store == "none"


# ---- refusals: the numbers, and that following them helps


def refusal(count: int, config: CollectionConfig) -> tuple[str, str]:
    with pytest.raises(Invalid) as caught:
        choose(count, config)
    (error,) = caught.value.errors
    return error.field, error.message


def with_index(config: CollectionConfig, **changes: Any) -> CollectionConfig:
    return replace(config, index=replace(config.index, **changes))


def test_lists_that_points_cannot_train_are_refused_with_the_most_that_they_can() -> None:
    field, message = refusal(1_000, config_of(kind="ivf_flat", nlist=26))
    assert field == "index.nlist"
    assert message == ("26 lists need 1014 points a shard to train, there are 1000: at most 25, or leave it out")
    assert choose(1_000, config_of(kind="ivf_flat", nlist=25)).params == {"nlist": 25}
    assert choose(1_000, config_of(kind="ivf_flat")).params == {"nlist": 25}


def test_lists_of_an_empty_shard_are_not_refused() -> None:
    assert choose(0, config_of(kind="ivf_flat", nlist=4_096)).kind == "ivf_flat"


def test_more_sub_quantizers_than_dimensions_are_refused() -> None:
    field, message = refusal(1_000, config_of(dimension=5, kind="ivf_pq", pq_m=6))
    assert (field, message) == ("index.pq_m", "must be at most the dimension, 5, not 6")
    assert choose(1_000, config_of(dimension=5, kind="ivf_pq", pq_m=5)).params["pq_m"] == 5


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "hnsw", "codes": "sq8", "rerank_store": "none"},
        {"kind": "hnsw", "rerank_store": "none"},
        {"kind": "ivf_sq8", "rerank_store": "none"},
        {"kind": "ivf_pq", "rerank_store": "none"},
        {"kind": "ivf_rabitq", "rerank_store": "none"},
    ],
)
def test_target_beyond_what_the_codes_reach_is_refused_with_what_they_do(options: dict[str, Any]) -> None:
    field, message = refusal(50_000, config_of(target_recall=0.995, **options))
    assert field == "index.target_recall"
    (reached,) = re.findall(r"reaches recall (\S+) at most, 0\.995 is asked for", message)
    assert choose(50_000, config_of(target_recall=float(reached), **options)).kind == options["kind"]
    assert choose(50_000, config_of(target_recall=0.995, **options | {"rerank_store": "rows"})).kind == options["kind"]


def test_memory_that_holds_nothing_is_refused_with_what_each_index_needs() -> None:
    config = config_of(memory_bytes=1_000_000)
    field, message = refusal(200_000, config)
    assert field == "index.memory_bytes"
    assert message.startswith("1000000 bytes for one shard's index are too few for recall 0.95; needed are: ")
    assert "flat" not in message  # however much memory there is, 200,000 x 384 floats are too many to scan
    others = [c.spec for c in plan_index(200_000, config_of()).considered if c.spec.kind != "flat"]
    assert numbers(message) == [needed(spec) for spec in others]


def test_build_seconds_that_are_too_few_are_refused_with_the_prediction() -> None:
    field, message = refusal(5_000_000, config_of(build_seconds=0.5))
    assert field == "index.build_seconds"
    assert message.startswith("0.5 s to build one shard's index are too few; predicted are: hnsw ")
    assert choose(5_000_000, config_of(build_seconds=min(numbers(message)))).kind.startswith("ivf")


def numbers(message: str) -> list[float]:
    """What a refusal says would do, of each index."""
    listed = re.split(r"(?:needed|predicted) are: ", message)[1]
    return [float(number) for number in re.findall(r" ([\d.]*\d)(?:,|\.)", listed)]


# ---- what holds for every input

counts = st.one_of(st.integers(0, 2_000), st.integers(0, 20_000_000))
few = settings(max_examples=300, deadline=None, derandomize=True)


@st.composite
def configs(draw: st.DrawFn) -> CollectionConfig:
    kind = draw(st.sampled_from(["auto", "auto", "auto", *KINDS[1:]]))
    largest = RABITQ_DIMENSIONS[1] if kind == "ivf_rabitq" else 65_536
    return CollectionConfig(
        dimension=draw(st.sampled_from([1, 2, 3, 17, 100, 255, 256, 384, 1_536, largest])),
        metric=draw(st.sampled_from(["l2", "ip", "cosine"])),
        vector_dtype=draw(st.sampled_from(["float32", "float16"])),
        index=IndexConfig(
            kind=kind,
            target_recall=draw(st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.9991, 1.0])),
            memory_bytes=draw(st.one_of(st.none(), st.integers(1, 10**6), st.integers(1, 10**11))),
            build_seconds=draw(st.one_of(st.none(), st.floats(1e-3, 10_000.0))),
            churn=draw(st.sampled_from([0.0, 0.3, 0.31, 1.0])),
        ),
    )


def plan_or_none(count: int, config: CollectionConfig) -> IndexPlan | None:
    try:
        return plan_index(count, config)
    except Invalid:
        return None


def unbounded(config: CollectionConfig) -> CollectionConfig:
    return with_index(config, memory_bytes=None, build_seconds=None, target_recall=min(0.5, config.index.target_recall))


@few
@given(counts, configs())
def test_choice_is_within_every_bound(count: int, config: CollectionConfig) -> None:
    plan = plan_or_none(count, config)
    assume(plan is not None)
    assert plan is not None
    index, spec = config.index, plan.spec
    assert spec.predicted_bytes == index_costs.index_bytes(spec, count, config.dimension, config.metric)
    assert index.memory_bytes is None or spec.predicted_bytes * MEMORY_MARGIN <= index.memory_bytes
    assert plan.chosen.build_seconds is not None
    assert index.build_seconds is None or plan.chosen.build_seconds <= index.build_seconds
    assert plan.chosen.reachable_recall >= index.target_recall
    assert plan.chosen.spec == spec


@few
@given(counts, configs())
def test_exactly_one_candidate_is_not_rejected_and_all_have_numbers(count: int, config: CollectionConfig) -> None:
    plan = plan_index(count, unbounded(config))
    assert [candidate.spec for candidate in plan.considered if candidate.rejected == ""] == [plan.spec]
    assert len({str(candidate.spec) for candidate in plan.considered}) == len(plan.considered)
    for candidate in plan.considered:
        assert candidate.spec.predicted_bytes >= 0
        assert candidate.build_seconds is not None
        assert candidate.build_seconds >= 0.0
        assert candidate.queries_per_s is not None
        assert candidate.queries_per_s > 0.0
        assert 0.0 < candidate.reachable_recall <= 1.0
        assert candidate.spec.reason


@few
@given(counts, configs(), st.integers(0, 10**11))
def test_more_memory_never_gives_less_recall(count: int, config: CollectionConfig, more: int) -> None:
    memory = config.index.memory_bytes
    assume(memory is not None)
    assert memory is not None
    less, roomy = plan_or_none(count, config), plan_or_none(count, with_index(config, memory_bytes=memory + more))
    if less is not None:
        assert roomy is not None
        assert roomy.chosen.reachable_recall >= less.chosen.reachable_recall
        preference = [candidate.spec for candidate in less.considered]
        assert preference.index(roomy.spec) <= preference.index(less.spec)


@few
@given(counts, configs())
def test_following_the_numbers_of_refusals_ends_in_a_choice(count: int, config: CollectionConfig) -> None:
    for _ in range(4):  # one for each bound, and the choice
        try:
            choose(count, config)
            return
        except Invalid as error:
            (found,) = error.errors
            config = followed(config, found.field, found.message)
    raise AssertionError(f"still refused: {config}")


def followed(config: CollectionConfig, field: str, message: str) -> CollectionConfig:
    """The config with what the refusal says would do; it must be more than there was."""
    if field == "index.target_recall":
        (reached,) = re.findall(r"reaches recall (\S+) at most", message)
        assert float(reached) < config.index.target_recall
        return with_index(config, target_recall=float(reached))
    if field == "index.memory_bytes":
        assert config.index.memory_bytes is not None
        assert min(numbers(message)) > config.index.memory_bytes
        return with_index(config, memory_bytes=int(min(numbers(message))))
    assert field == "index.build_seconds"
    assert config.index.build_seconds is not None
    assert min(numbers(message)) > config.index.build_seconds
    return with_index(config, build_seconds=min(numbers(message)))


@few
@given(counts, configs())
def test_every_considered_index_can_be_built_from_the_points(count: int, config: CollectionConfig) -> None:
    for candidate in plan_index(count, unbounded(config)).considered:
        spec = candidate.spec
        lists = spec.params.get("nlist", 1)
        assert lists == 1 or lists * POINTS_PER_CENTROID_MIN <= count
        assert spec.params.get("pq_m", 1) <= config.dimension
        assert spec.training_points(count) <= count
        if spec.kind.startswith("ivf"):
            assert spec.training_points(count) >= min(count, 128 * lists)


@few
@given(counts, counts, configs())
def test_like_keeps_the_kind_and_fits_the_count(count: int, other: int, config: CollectionConfig) -> None:
    config = unbounded(config)
    spec = choose(count, config)
    same = like(spec, other, config)
    assert like(spec, count, config) == spec
    assert (same.kind, same.codes, same.rerank_store, same.reason) == (
        spec.kind,
        spec.codes,
        spec.rerank_store,
        spec.reason,
    )
    assert same.params.keys() == spec.params.keys()
    lists = same.params.get("nlist", 1)
    assert lists == 1 or lists * POINTS_PER_CENTROID_MIN <= other
    assert same.predicted_bytes == index_costs.index_bytes(same, other, config.dimension, config.metric)


def test_like_keeps_the_lists_that_were_asked_for_as_far_as_points_allow() -> None:
    config = config_of(kind="ivf_flat", nlist=100)
    spec = choose(10_000, config)
    assert like(spec, 9_000, config).params == {"nlist": 100}
    assert like(spec, 1_000, config).params == {"nlist": 25}


# ---- after the build


@settings(few, max_examples=100)  # each goes through several plans
@given(st.integers(20_000, 5_000_000), configs())
def test_stronger_doubles_the_graph_and_ends(count: int, config: CollectionConfig) -> None:
    plan = plan_or_none(count, config)
    assume(plan is not None)
    assert plan is not None
    spec, steps = plan.spec, 0
    while (better := stronger(spec, count, config)) is not None:
        if spec.kind == "hnsw":
            assert better.params == {name: 2 * value for name, value in spec.params.items()}
        else:  # the smallest codes were taken for want of build time
            assert better.predicted_bytes > spec.predicted_bytes
        assert better.predicted_bytes == index_costs.index_bytes(better, count, config.dimension, config.metric)
        memory = config.index.memory_bytes
        assert memory is None or better.predicted_bytes * MEMORY_MARGIN <= memory
        assert better.reason.startswith(spec.reason)
        spec, steps = better, steps + 1
    assert steps <= STRONGER_MAX
    if config.index.kind != "auto":
        assert steps == 0
    elif plan.spec.kind != "hnsw":
        assert steps <= 1
    elif config.index.memory_bytes is None:
        assert steps == STRONGER_MAX


def test_other_codes_and_stores_are_sized_anew_and_say_why() -> None:
    config = config_of()
    spec = choose(200_000, config)
    wider = with_codes(spec, "float32", 200_000, config, "float16 would lose neighbours")
    assert (wider.codes, wider.predicted_bytes) == ("float32", spec.predicted_bytes + 200_000 * 384 * 2)
    assert wider.reason == f"{spec.reason}; float16 would lose neighbours"
    lists = choose(200_000, config_of(churn=1.0))
    smaller = with_store(lists, "rows", 200_000, config, "why")
    assert (smaller.rerank_store, smaller.predicted_bytes) == ("rows", lists.predicted_bytes - 200_000 * 384 * 2)
    assert smaller.reason.endswith("; why")


def test_candidate_is_told_in_plain_data() -> None:
    told = plan_index(200_000, config_of()).considered[0].to_dict()
    assert told.pop("rejected") == "a scan of 76800000 floats takes about 12 ms a query"
    assert told.pop("predicted_queries_per_s") > 0
    assert told.pop("predicted_build_seconds") > 0
    assert told == {
        "kind": "flat",
        "params": {},
        "codes": "float32",
        "rerank_store": "none",
        "predicted_bytes": 307_200_000,
        "reachable_recall": 1.0,
    }
