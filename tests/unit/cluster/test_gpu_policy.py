"""Which index a GPU gets: by count, dimension, memory, target, churn and metric; what holds for every input."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster import index_costs
from cluster.config import CollectionConfig
from cluster.errors import Invalid
from cluster.gpu_memory import PROCESS_BYTES, GpuFacts, gpu_need, index_bytes
from cluster.gpu_policy import (
    GPU_KINDS,
    GRAPH_CHURN_MAX,
    GRAPH_DEGREE_MAX,
    GRAPH_DIMENSION_MAX,
    GRAPH_LARGE,
    GRAPH_POINTS_MIN,
    NPROBE_MAX,
    POINTS_MIN,
    SCAN_BYTES_MAX,
    gpu_for,
    pq_sizes,
)
from cluster.index_policy import FLAT_FLOATS_MAX, IndexPlan, choose, like, plan_index, stronger, with_codes
from cluster.index_spec import IndexSpec
from tests.unit.cluster.gpu_plans import H100, ROOMY, chosen, config_of, refused

few = settings(max_examples=100, deadline=None, derandomize=True)


def fitting(spec: IndexSpec, count: int, dimension: int, builds: bool = True) -> GpuFacts:
    """GPUs with just enough memory for the index."""
    need = gpu_need(spec, count, dimension)
    return GpuFacts(PROCESS_BYTES + (need.peak if builds else need.load), builds=builds)


# ---- by count, dimension, target, churn, metric


def test_short_scan_is_exact_and_a_longer_one_asks_a_graph() -> None:
    most = SCAN_BYTES_MAX // (768 * 4)
    assert chosen(most) == ("flat", "float32", "gpu")
    assert chosen(most + 1) == ("cagra", "float32", "gpu")
    assert chosen(most + 1, dimension=384)[0] == "flat"


def test_rows_of_half_the_bytes_are_scanned_up_to_twice_the_count() -> None:
    most = SCAN_BYTES_MAX // (768 * 2)
    assert chosen(most, dtype="float16") == ("flat", "float16", "gpu")
    assert chosen(most + 1, dtype="float16") == ("cagra", "float16", "gpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_target_of_one_is_exact_in_full_precision_at_any_count(dtype: str) -> None:
    spec = choose(20_000_000, config_of(dtype=dtype, target_recall=1.0), H100)
    assert (spec.kind, spec.codes, spec.is_exact) == ("flat", "float32", True)


def test_rounded_codes_are_not_exact_and_rank_twice_the_candidates_by_the_rows() -> None:
    spec = choose(20_000, config_of(dtype="float16"), H100)
    assert (spec.codes, spec.rerank_store, spec.is_exact, spec.rerank) == ("float16", "rows", False, 2.0)


@pytest.mark.parametrize(("count", "degree"), [(GRAPH_LARGE - 1, 32), (GRAPH_LARGE, 64)])
def test_graph_of_many_points_has_more_neighbours(count: int, degree: int) -> None:
    spec = choose(count, config_of(), H100)
    assert spec.params == {"graph_degree": degree, "intermediate_graph_degree": 2 * degree}


def test_few_points_are_not_made_a_graph() -> None:
    count = SCAN_BYTES_MAX // (GRAPH_DIMENSION_MAX * 4) + 1
    assert chosen(count, dimension=GRAPH_DIMENSION_MAX)[0] == "cagra"
    lists = plan_index(GRAPH_POINTS_MIN - 1, config_of(dimension=65_536), gpu=H100)
    assert lists.spec.kind == "ivf_flat"
    assert reasons(lists)["cagra"] == f"a graph on GPUs takes at most {GRAPH_DIMENSION_MAX} dimensions"
    told = reasons(plan_index(GRAPH_POINTS_MIN - 1, config_of(), gpu=H100))
    assert told["cagra"] == f"{GRAPH_POINTS_MIN - 1} points are few for a graph: from {GRAPH_POINTS_MIN} on"


def reasons(plan: IndexPlan) -> dict[str, str]:
    """The first reason for which each kind on a GPU was not taken."""
    return {c.spec.kind: c.rejected for c in reversed(plan.considered) if c.spec.device == "gpu"}


def test_much_churn_takes_lists_of_whole_vectors() -> None:
    assert chosen(1_000_000, churn=GRAPH_CHURN_MAX)[0] == "cagra"
    assert chosen(1_000_000, churn=GRAPH_CHURN_MAX + 0.01) == ("ivf_flat", "float32", "gpu")


def test_build_without_a_gpu_takes_lists_whose_seconds_on_the_cpu_are_known() -> None:
    plan = plan_index(1_000_000, config_of(), gpu=replace(H100, builds=False))
    assert (plan.spec.kind, plan.spec.device) == ("ivf_flat", "gpu")
    on_cpu = replace(plan.spec, device="cpu")
    assert plan.chosen.build_seconds == index_costs.build_seconds(on_cpu, 1_000_000, 768, index_costs.REFERENCE)
    assert reasons(plan)["cagra"] == "only a GPU builds a graph for GPUs, and the build has none"


def test_inner_product_takes_only_exact_search_on_a_gpu() -> None:
    assert chosen(5_000_000, metric="ip") == ("flat", "float32", "gpu")
    plan = plan_index(5_000_000, config_of(metric="ip"), gpu=H100)
    assert {each.kind for each in (c.spec for c in plan.considered) if each.device == "gpu"} == set(GPU_KINDS)
    for kind in ("cagra", "ivf_flat", "ivf_pq"):
        assert reasons(plan)[kind] == "cuVS clusters and links badly by an inner product"
    assert chosen(50_000_000, metric="ip")[2] == "cpu"  # where it does not fit
    assert chosen(5_000_000, metric="ip", device="auto")[2] == "cpu"  # nor where the scan is long and nobody insists


# ---- by memory


def test_memory_steps_down_from_graph_to_lists_to_the_cpu() -> None:
    count, config = 5_000_000, config_of()
    there = [c.spec for c in plan_index(count, config, gpu=ROOMY).considered if c.spec.device == "gpu"]
    wanted = [spec for spec in there if spec.kind != "flat"]
    assert [(spec.kind, spec.codes) for spec in wanted[:2]] == [("cagra", "float32"), ("cagra", "float16")]
    sizes = [spec.params.get("pq_m", 0) for spec in wanted if spec.kind == "ivf_pq"]
    assert sizes == list(pq_sizes(768)) == [384, 192, 96]
    for position, spec in enumerate(wanted):
        taken = choose(count, config, fitting(spec, count, 768))
        assert wanted.index(taken) <= position
    smallest = fitting(wanted[-1], count, 768)
    assert smallest.memory_bytes is not None
    less = replace(smallest, memory_bytes=smallest.memory_bytes - 1)
    plan = plan_index(count, config, gpu=less)
    assert plan.spec.device == "cpu"
    assert plan.spec.reason.endswith("; on a CPU, since no GPU takes it")
    told = reasons(plan)["ivf_pq"]
    assert [int(number) for number in re.findall(r"\d{5,}", told)][-1] == less.memory_bytes


def test_float16_graph_is_taken_where_float32_does_not_fit() -> None:
    count = 5_000_000
    spec = plan_index(count, config_of(), gpu=ROOMY).considered[2].spec
    assert (spec.kind, spec.codes) == ("cagra", "float16")
    assert chosen(count, fitting(spec, count, 768)) == ("cagra", "float16", "gpu")
    assert chosen(count, fitting(spec, count, 768), gpu_full="refuse") == ("cagra", "float16", "gpu")


def test_full_gpu_is_refused_with_numbers_that_would_do() -> None:
    count, small = 5_000_000, GpuFacts(10**10)
    assert chosen(count, small)[0] == "ivf_pq"
    field, message = refused(count, small, gpu_full="refuse")
    assert field == "index.gpu_full"
    needed = [int(each) for each in re.findall(r"takes (\d+) bytes of GPU memory, 10000000000 can be had", message)]
    assert len(needed) == 2  # in float32 and in float16
    assert message.endswith(": use more shards, or set gpu_full to step_down")
    assert ": raise num_gpus, use more shards" in refused(count, small, gpu_full="refuse", num_gpus=0.5)[1]
    while True:  # what loads may still not fit while it is built
        facts = GpuFacts(min(needed))
        try:
            assert choose(count, config_of(gpu_full="refuse"), facts).kind == "cagra"
            break
        except Invalid as error:
            more = [int(each) for each in re.findall(r"takes (\d+) bytes", error.message)]
            assert min(more) > min(needed)
            needed = more


def test_index_that_is_not_wanted_is_not_refused_for_its_size() -> None:
    assert chosen(2_000_000, GpuFacts(20 * 10**9), gpu_full="refuse", churn=0.5)[0] == "ivf_flat"
    assert chosen(1_000, GpuFacts(1), gpu_full="refuse", device="auto") == ("flat", "float32", "cpu")


def test_unknown_memory_bounds_nothing() -> None:
    for gpu in (None, ROOMY):
        assert chosen(100_000_000, gpu, gpu_full="refuse") == ("cagra", "float32", "gpu")


def test_twin_must_fit_the_host_unless_there_is_to_be_none() -> None:
    bounds = {"memory_bytes": 2 * 10**9}
    assert chosen(1_000_000, **bounds) == ("ivf_pq", "float32", "gpu")
    told = reasons(plan_index(1_000_000, config_of(**bounds), gpu=H100))["cagra"]
    assert re.fullmatch(r"its twin on the host needs \d+ bytes, memory_bytes allows 2000000000", told)
    assert chosen(1_000_000, cpu_twin=False, **bounds) == ("cagra", "float32", "gpu")


# ---- device auto


def test_auto_takes_a_gpu_only_where_the_cpu_would_scan_too_long() -> None:
    most = FLAT_FLOATS_MAX // 768
    assert chosen(most, device="auto") == ("flat", "float32", "cpu")
    assert chosen(most, device="gpu") == ("flat", "float32", "gpu")
    assert chosen(most + 1, device="auto") == ("flat", "float32", "gpu")
    assert chosen(most + 1, device="auto", kind="ivf_flat")[2] == "gpu"
    assert chosen(most, device="auto", kind="ivf_flat")[2] == "cpu"
    assert chosen(most + 1, device="cpu")[2] == chosen(most + 1, None, device="auto")[2] == "cpu"


def test_auto_considers_both_and_says_why_the_others_were_not_taken() -> None:
    small, large = (plan_index(count, config_of(device="auto"), gpu=H100) for count in (5_000, 1_000_000))
    assert [c.spec.device for c in large.considered] == sorted((c.spec.device for c in large.considered), reverse=True)
    assert {c.spec.device for c in small.considered} == {"gpu", "cpu"}
    assert reasons(small)["flat"] == "a CPU scans 3840000 floats in about 0.6 ms: no GPU is taken for that"
    preferred = [c.rejected for c in large.considered if c.rejected.startswith("would do as well")]
    assert preferred
    assert set(preferred) == {"would do as well; cagra on a GPU (float32 codes) is preferred"}


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "hnsw"},
        {"kind": "ivf_rabitq"},
        {"kind": "ivf_pq", "pq_bits": 4},
        {"kind": "ivf_pq", "pq_m": 100},
        {"kind": "ivf_pq", "rerank_store": "sq8"},
        {"kind": "ivf_flat", "codes": "float16"},
        {"kind": "ivf_flat", "metric": "ip"},
        {"kind": "ivf_flat", "nlist": NPROBE_MAX + 1},
    ],
)
def test_auto_serves_what_no_gpu_takes_on_the_cpu(options: dict[str, Any]) -> None:
    config = config_of(device="auto", **options)
    assert plan_index(2_000_000, config, gpu=H100) == plan_index(2_000_000, config)
    assert gpu_for(config, 1.0, 4, 4, 10**10, "", 0, True) is None


# ---- what holds for every input


@st.composite
def asked(draw: st.DrawFn) -> CollectionConfig:
    kind = draw(st.sampled_from(["auto", "auto", "auto", *GPU_KINDS]))
    metric = draw(st.sampled_from(["l2", "cosine"] if kind not in ("auto", "flat") else ["l2", "ip", "cosine"]))
    return config_of(
        draw(st.sampled_from([1, 3, 97, 96, 768, 4_096])),
        draw(st.sampled_from(["float32", "float16"])),
        metric,
        kind=kind,
        device=draw(st.sampled_from(["auto", "gpu"])),
        target_recall=draw(st.sampled_from([0.5, 0.95, 0.999] if kind != "auto" else [0.5, 0.95, 0.9991, 1.0])),
        churn=draw(st.sampled_from([0.0, 0.31])),
    )


facts = st.builds(GpuFacts, st.one_of(st.none(), st.integers(1, 10**10), st.integers(1, 10**12)), builds=st.booleans())
counts = st.one_of(st.integers(0, 2_000), st.integers(0, 100_000_000))


@few
@given(counts, asked(), facts)
def test_one_index_is_taken_and_it_fits(count: int, config: CollectionConfig, gpu: GpuFacts) -> None:
    plan = plan_index(count, config, gpu=gpu)
    assert [c.spec for c in plan.considered if not c.rejected] == [plan.spec]
    assert len({str(c.spec) for c in plan.considered}) == len(plan.considered)
    for spec in (c.spec for c in plan.considered if c.spec.device == "gpu"):
        assert spec.kind in GPU_KINDS
        assert spec.rerank_store == "rows"
        assert spec.gpu_bytes == index_bytes(spec, count, config.dimension)
        assert spec.predicted_bytes == index_costs.index_bytes(spec, count, config.dimension, config.metric)
        lists = spec.params.get("nlist", 1)
        assert lists == 1 or lists * 39 <= count
        assert lists <= NPROBE_MAX
        assert config.dimension % spec.params.get("pq_m", 1) == 0
    if plan.spec.device == "gpu" and gpu.memory_bytes is not None:
        need = gpu_need(plan.spec, count, config.dimension)
        assert PROCESS_BYTES + (need.peak if gpu.builds else need.load) <= gpu.memory_bytes
    assert plan.chosen.reachable_recall >= config.index.target_recall


@few
@given(counts, asked(), facts, st.integers(0, 10**11))
def test_more_memory_never_takes_what_is_less_preferred(
    count: int, config: CollectionConfig, gpu: GpuFacts, more: int
) -> None:
    assume(gpu.memory_bytes is not None)
    assert gpu.memory_bytes is not None
    less = plan_index(count, config, gpu=gpu)
    roomy = plan_index(count, config, gpu=replace(gpu, memory_bytes=gpu.memory_bytes + more))
    preference = [c.spec for c in less.considered]
    assert preference.index(roomy.spec) <= preference.index(less.spec)


@few
@given(counts, counts, asked(), facts)
def test_like_fits_another_count(count: int, other: int, config: CollectionConfig, gpu: GpuFacts) -> None:
    spec = plan_index(count, config, gpu=gpu).spec
    same = like(spec, other, config)
    assert like(spec, count, config) == spec
    assert same.device == spec.device
    if spec.device == "gpu":
        assert same.kind == ("flat" if other < POINTS_MIN else spec.kind)
        assert same.gpu_bytes == index_bytes(same, other, config.dimension)


# ---- after the build


def test_stronger_graph_has_twice_the_neighbours_as_far_as_it_fits() -> None:
    config, count = config_of(), 200_000
    spec = plan_index(count, replace(config, index=replace(config.index, kind="cagra"))).spec
    degrees = [spec.params["graph_degree"]]
    while (better := stronger(spec, count, config)) is not None:
        assert better.params["intermediate_graph_degree"] == 2 * better.params["graph_degree"]
        assert better.gpu_bytes == index_bytes(better, count, 768) > spec.gpu_bytes
        degrees.append(better.params["graph_degree"])
        spec = better
    assert degrees == [32, 64, GRAPH_DEGREE_MAX]
    first = stronger(replace(spec, params={"graph_degree": 32, "intermediate_graph_degree": 64}), count, config)
    assert first is not None
    enough = fitting(first, count, 768)
    assert (
        stronger(replace(first, params={n: v // 2 for n, v in first.params.items()}), count, config, enough) is not None
    )
    assert stronger(first, count, config, enough) is None


def test_stronger_codes_are_of_twice_the_bytes_and_lists_of_vectors_have_none() -> None:
    config, count = config_of(), 1_000_000
    spec = choose(count, config_of(kind="ivf_pq", pq_m=96), H100)
    sizes = []
    while (better := stronger(spec, count, config)) is not None:
        sizes.append(better.params["pq_m"])
        spec = better
    assert sizes == [192, 384]
    for kind in ("flat", "ivf_flat"):
        assert stronger(choose(count, config_of(kind=kind), H100), count, config) is None


def test_codes_that_lose_neighbours_become_larger_ones_or_lists_where_these_do_not_fit() -> None:
    config, count = config_of(), 5_000_000
    spec = plan_index(count, config, gpu=ROOMY).considered[2].spec
    assert (spec.kind, spec.codes) == ("cagra", "float16")
    wider = with_codes(spec, "float32", count, config, "they would lose neighbours", H100)
    assert (wider.kind, wider.codes, wider.gpu_bytes) == ("cagra", "float32", index_bytes(wider, count, 768))
    assert wider.reason == f"{spec.reason}; they would lose neighbours"
    lists = with_codes(spec, "float32", count, config, "they would lose neighbours", fitting(spec, count, 768))
    assert (lists.kind, lists.device, lists.params["pq_m"]) == ("ivf_pq", "gpu", 384)
    assert lists.reason == wider.reason


def test_candidate_of_a_gpu_is_told_without_times() -> None:
    plan = plan_index(1_000_000, config_of(), gpu=H100)
    told = plan.chosen.to_dict()
    assert (told["predicted_build_seconds"], told["predicted_queries_per_s"]) == (None, None)
    assert (told["device"], told["gpu_bytes"]) == ("gpu", plan.spec.gpu_bytes)
    of_cpu = next(c for c in plan.considered if c.spec.device == "cpu").to_dict()
    assert of_cpu.keys() == told.keys() - {"device", "gpu_bytes"}
