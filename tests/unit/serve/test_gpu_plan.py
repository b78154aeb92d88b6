"""What `eagleray plan` and `explain` tell of indexes for GPUs: bytes there, and no time that nobody measured."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.gpu_memory import PROCESS_BYTES, GpuFacts, gpu_need
from cluster.index_policy import plan_index
from serve.explain import bytes_text, index_name, plan_line, print_segment
from serve.plan import CollectionPlan, plan_count, plan_for, print_plan
from tests.unit.serve.command_line import cells

COUNT, GPU = 2_000_000, GpuFacts(80 * 10**9, "H100")


def printed(write: Any, *arguments: Any) -> str:
    out = io.StringIO()
    write(Console(file=out, width=250), *arguments)
    return out.getvalue()


def planned(gpu: GpuFacts | None = GPU, **index: Any) -> CollectionPlan:
    return plan_count(COUNT, {"dimension": 768, "index": index or {"device": "auto"}}, gpu)


def test_plan_for_a_gpu_prints_its_bytes_and_dashes_for_what_was_not_measured() -> None:
    plan = planned()
    output = printed(print_plan, plan)
    spec, need = plan.index.spec, gpu_need(plan.index.spec, COUNT, 768)
    assert spec.kind == "cagra"
    assert f"\n{index_name('cagra', 'float32', 'rows', spec.params, 'gpu')}\n" in output
    taken = next(row for row in cells(output) if row[-1] == "taken")
    assert taken == [
        "cagra on a GPU (float32 codes, rerank from rows, graph_degree 64, intermediate_graph_degree 128)",
        bytes_text(spec.predicted_bytes),
        bytes_text(spec.gpu_bytes),
        "-",
        "0.999",
        "-",
        "taken",
    ]
    of_cpu = next(row for row in cells(output) if row[0].startswith("hnsw"))
    assert of_cpu[2] == "-"
    assert "-" not in of_cpu[3:6]
    there = f"{bytes_text(need.index)} of index, {bytes_text(need.search)} for a search of the largest batch"
    share = f"0.25 GPU, since a quarter of a GPU holds twice its {spec.gpu_bytes} bytes"
    assert f"  on {share}: {there}, {bytes_text(PROCESS_BYTES)} of process; {bytes_text(need.build)} to build" in output
    assert f"\ntotal: {bytes_text(spec.predicted_bytes)}; times are" in output


def test_plan_as_data_has_null_for_what_was_not_measured() -> None:
    told = planned().to_dict()
    assert (told["predicted_build_seconds_per_shard"], told["predicted_queries_per_s"]) == (None, None)
    assert told["index"]["device"] == "gpu"
    assert told["num_gpus"] == 0.25
    assert told["num_gpus_reason"].startswith("a quarter of a GPU holds")
    on_cpus = planned(device="cpu").to_dict()
    assert (on_cpus["num_gpus"], on_cpus["num_gpus_reason"]) == (0.0, "")
    assert {each.get("device", "cpu") for each in told["considered"]} == {"cpu", "gpu"}


def test_plan_takes_the_replica_s_share_of_the_memory() -> None:
    small = GpuFacts(16 * 10**9)
    assert planned(small).index.spec.kind == "cagra"
    share = planned(small, device="auto", num_gpus=0.25)
    assert share.index == plan_index(COUNT, share.config, gpu=GpuFacts(4 * 10**9))
    assert share.index.spec.kind != "cagra"


def test_plan_without_a_gpu_is_that_of_the_cpu_and_has_no_column_for_gpus() -> None:
    plan = planned(None)
    assert plan.index == plan_index(COUNT, CollectionConfig(768, index=IndexConfig(device="cpu")))
    assert "GPU" not in printed(print_plan, plan)
    assert plan_for({"dimension": 768, "index": {"device": "auto"}}, COUNT, None, gpu=GPU).index == planned().index


def test_plan_of_what_only_gpus_have_is_refused_without_one() -> None:
    with pytest.raises(Invalid, match=r"cagra is for GPUs, it cannot be had here"):
        planned(None, kind="cagra", device="auto")
    assert planned(GPU, kind="cagra", device="auto").index.spec.kind == "cagra"


def test_import_s_plan_line_leaves_out_what_was_not_measured() -> None:
    index = planned().index.spec.to_dict()
    plan = {"index": index, "segments": 2, "predicted_bytes": 8_000_000_000, "predicted_build_seconds": None}
    assert plan_line(plan) == "builds: 2 x cagra on a GPU (float32 codes), 8.0 GB"
    assert plan_line(plan | {"predicted_build_seconds": 12.0}).endswith(", 8.0 GB, about 12 s")


def segment(**there: Any) -> dict[str, Any]:
    spec = planned().index.spec
    return {
        "segment_id": "import-1-000000",
        "count": COUNT,
        "index_kind": spec.kind,
        "index_params": spec.params,
        "codes": spec.codes,
        "rerank_store": spec.rerank_store,
        "index_bytes": spec.predicted_bytes,
        "predicted_bytes": spec.predicted_bytes,
        "reason": spec.reason,
        "considered": [],
        "operating_points": [],
        "built": {"predicted_seconds": None, "seconds": 20.0, "threads": 2},
        "device": "gpu",
        "gpu_predicted_bytes": spec.gpu_bytes,
        "gpu_measured_bytes": None,
        "out_of_memory": 0,
        "degraded": "",
        **there,
    }


def test_segment_on_a_gpu_is_explained_with_its_bytes_there() -> None:
    output = printed(print_segment, 0, segment(), False)
    assert "2,000,000 points: cagra on a GPU (float32 codes, rerank from rows" in output
    assert "built in 20 s with 2 threads, all on a CPU" in output
    assert "\n  on the GPU: 6.7 GB predicted\n" in output
    output = printed(print_segment, 0, segment(gpu_measured_bytes=6_500_000_000), False)
    assert "\n  on the GPU: 6.7 GB predicted, 6.5 GB measured\n" in output


def test_segment_whose_twin_answers_says_why() -> None:
    why = {"out_of_memory": 3, "degraded": "the GPU was lost"}
    output = printed(print_segment, 0, segment(**why), False)
    told = "6.7 GB predicted, out of memory in 3 searches; the CPU answers: the GPU was lost"
    assert f"\n  on the GPU: {told}\n" in output


def test_segment_says_what_its_figures_were_measured_on() -> None:
    point = {"target_recall": 0.95, "recall_low": 0.95, "queries_per_s": 0.0, "met": True}
    there = point | {"params": {"itopk_size": 64}, "recall": 0.97, "latency_ms": 0.1}
    twin = point | {"params": {"ef_search": 80}, "recall": 0.9512, "latency_ms": 0.42}
    built = {"seconds": 20.0, "threads": 2, "gpu": "NVIDIA double"}
    facts = segment(operating_points=[there], built=built, cpu_twin={"recall": 0.96, "operating_points": [twin]})
    output = printed(print_segment, 0, facts, False)
    assert "built in 20 s with 2 threads, all on NVIDIA double\n" in output
    assert "\n  its twin on the CPU: recall@10 0.9512 at ef_search 80, 0.42 ms a query\n" in output
