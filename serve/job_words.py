"""What a job's report says, in words for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.explain import bytes_text, plan_line

Report = dict[str, Any]
NOTHING_MORE = {"message"}  # of a job that could not write its report
FAILURES_SHOWN = 20


def end_in_words(status: dict[str, Any]) -> str:
    """What a job that succeeded did, and what there is to say beside."""
    report, kind = status["report"], status["kind"]
    if kind not in WORDS or report.keys() <= NOTHING_MORE:
        told = f"{kind} succeeded"
    else:
        told = WORDS[kind](status["collection"], report)
    return "; ".join(text for text in (told, report.get("message", "")) if text)


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a job is going to build, and what memory the switch to it takes."""
    lines = [plan_line(plan)] if plan.get("index") else []
    lines += [_gpu_line(plan["gpu"])] if plan.get("gpu") else []
    memory = plan.get("memory", {}).get("switch")
    return [*lines, f"memory: {memory['statement']}"] if memory else lines


def _gpu_line(gpu: dict[str, Any]) -> str:
    """What a generation takes of GPUs, as predicted, and what builds it."""
    name = gpu["name"] or "GPUs"
    has = "" if gpu["memory_bytes"] is None else f" ({bytes_text(gpu['memory_bytes'])})"
    takes = f"indexes take {bytes_text(gpu['predicted_bytes'])} there as predicted"
    why = f" ({gpu['num_gpus_reason']})" if gpu["num_gpus_reason"] else ""
    each = f"{gpu['num_gpus']:g} GPU{has} a replica{why}"
    return f"served on {name}: {each}; {takes}; built on a {gpu['built_on'].upper()}"


def failure_in_words(status: dict[str, Any]) -> str:
    """Why a job did not succeed: what its gate measured, or the first things that were wrong."""
    report = status["report"]
    message = report.get("message", "")
    found = [f"{each['object']}: {each['problem']}" for each in report.get("findings", [])]
    found += [f"{each['object']}: {each['message']}" for each in report.get("failures", [])]
    found = [f"  {each}" for each in found if each not in message]  # which tells the first one
    more = len(found) - FAILURES_SHOWN
    if more > 0:
        found[FAILURES_SHOWN:] = [f"  and {more} more: --json has them"]
    first = f"job {status['job_id']} {status['state']}: {message}"
    return "\n".join([first, *gate_lines(report), *found])


def gate_lines(report: Report) -> list[str]:
    """What the gate of a rebuild measured, and against which bounds; nothing of a report without one."""
    gate = report.get("gate")
    if not gate:
        return []
    lines = [f"gate {'passed' if gate['passed'] else 'failed'}:"]
    for recall in gate["recall"]:
        interval = f"{recall['low']:.4f} to {min(1.0, recall['high']):.4f}"
        asked = _counted(recall["queries"], recall["asked"])
        told = f"{recall['mean']:.4f} ({interval}), target {gate['target_recall']:g}"
        lines.append(f"  recall@{recall['k']} of {asked}: {told}")
    if gate["latency"]:
        latency = gate["latency"]
        bound = f", at most {latency['bound_ms']:.3f}" if latency["binding"] else ""
        lines.append(f"  one query: {latency['new_ms']:.3f} ms, {latency['old_ms']:.3f} ms before{bound}")
    old, new = gate["points"]["old"], gate["points"]["new"]
    same = "the same" if old["checksum"] == new["checksum"] else "another"
    lines.append(f"  points: {new['count']:,} of {old['count']:,}; {same} checksum of ids, vectors and attributes")
    return lines


def _import(collection: str, report: Report) -> str:
    return f"collection {collection}: {report['points']:,} points, generation {report['generation']}"


def _rebuild(collection: str, report: Report) -> str:
    what = f"{report['points']:,} points, {_many(report['shards'], 'shard')}, generation {report['generation']}"
    return "\n".join([*gate_lines(report), f"collection {collection}: {what}"])


def _compact(collection: str, report: Report) -> str:
    left = report["left"]
    return (
        f"collection {collection}: {report['segments_before']:,} -> {report['segments_after']:,} segments, "
        f"{_many(report['tombstones_dropped'], 'deleted row')} dropped, {report['points']:,} points"
        + (f"; segments that still have deleted rows: {left:,}" if left else "")
    )


def _rollback(collection: str, report: Report) -> str:
    back = f"generation {report['back_to_generation']} with every write since"
    return f"collection {collection}: generation {report['generation']}, which is {back}"


def _snapshot(collection: str, report: Report) -> str:
    return f"snapshot {report['name']} of {collection}: {report['points']:,} points, version {report['version']}"


def _restore(collection: str, report: Report) -> str:
    return f"collection {collection}: as snapshot {report['snapshot']} has it, generation {report['generation']}"


def _branch(collection: str, report: Report) -> str:
    return f"collection {report['collection']}: branched from {collection}, version {report['origin_version']}"


def _export(collection: str, report: Report) -> str:
    files = f"{_many(report['files'], 'file')}, {bytes_text(report['bytes'])}"
    return f"{report['target']}: {report['points']:,} points of {collection}, {files}"


def _garbage(collection: str, report: Report) -> str:
    lines = [f"  {kind}: {_sum([each])}" for kind, each in report["garbage"].items() if each["objects"]]
    lines += [f"left alone: {each['collection'] or 'everything'}: {each['why']}" for each in report["held"]]
    if report["unknown"]["objects"]:
        named = ", ".join(report["unknown"]["examples"])
        lines.append(f"left alone, of unknown kind: {_many(report['unknown']['objects'], 'object')}, such as {named}")
    garbage, kept = _sum(report["garbage"].values()), _sum(report["kept"].values())
    what = f"deleted: {_sum([report['removed']])}" if report["deleted"] else f"garbage: {garbage}; --delete deletes it"
    return "\n".join([f"{what}; kept: {kept}", *lines])


def _scrub(collection: str, report: Report) -> str:
    told = [
        f"{report['points']:,} points in {_many(report['segments'], 'segment')}, {bytes_text(report['bytes'])}, "
        f"{_many(report['wal_records'], 'log record')}: all as it was written"
    ]
    recall = report["recall"]
    if recall["queries"]:
        told.append(f"recall@10 {recall['recall_at_10']:.4f} of {recall['queries']:,} stored rows with noise")
    if recall["recent_queries"]:
        asked = _counted(recall["recent_queries"], "recent queries")
        told.append(f"{recall['recent_recall_at_10']:.4f} of {asked}")
    return ", ".join(told)


def _sum(tallies: Any) -> str:
    counted = list(tallies)
    objects, size = sum(each["objects"] for each in counted), sum(each["bytes"] for each in counted)
    return f"{_many(objects, 'object')}, {bytes_text(size)}"


def _counted(queries: int, asked: str) -> str:
    """How many queries, of what kind: `500 rows with noise`."""
    one = {"rows with noise": "row with noise", "recent queries": "recent query"}
    return f"{queries:,} {one.get(asked, asked) if queries == 1 else asked}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


WORDS: dict[str, Callable[[str, Report], str]] = {
    "import": _import,
    "rebuild": _rebuild,
    "compact": _compact,
    "rollback": _rollback,
    "snapshot": _snapshot,
    "restore": _restore,
    "branch": _branch,
    "export": _export,
    "collect_garbage": _garbage,
    "scrub": _scrub,
}
