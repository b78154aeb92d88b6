from __future__ import annotations

import pytest

from cluster.errors import Exhausted
from cluster.index_policy import MEMORY_MARGIN
from cluster.switch_memory import NodeMemory, ReplicaBytes, SwitchMemory, switch_memory

GIB = 1024**3


def node(available: float, total: float = 100.0) -> NodeMemory:
    """With so many GiB beside what is spared."""
    return NodeMemory(int((available + 0.05 * total) * GIB) + 1, int(total * GIB))


def replica(shard: int, where: str, loaded: float, coming: float) -> ReplicaBytes:
    """In GiB; what is coming is given with the margin."""
    return ReplicaBytes(shard, where, int(loaded * GIB), int(coming / MEMORY_MARGIN * GIB))


def needs(told: SwitchMemory) -> dict[str, tuple[float, float]]:
    """GiB beside, and one at a time, by node."""
    return {need.node: (round(need.beside / GIB, 3), round(need.one_at_a_time / GIB, 3)) for need in told.nodes}


def test_generation_that_fits_beside_what_is_loaded_is_loaded_so() -> None:
    replicas = [replica(0, "a", 4, 5), replica(1, "a", 4, 5), replica(0, "b", 4, 5), replica(1, "b", 4, 5)]
    told = switch_memory(replicas, {"a": node(10), "b": node(30)})
    assert told.mode == "beside"
    assert needs(told) == {"a": (10.0, 2.0), "b": (10.0, 2.0)}
    assert told.statement == (
        "node a needs 10.00 GiB beside the 8.00 GiB that 2 replicas have loaded, 10.00 GiB are there; "
        "node b needs 10.00 GiB beside the 8.00 GiB that 2 replicas have loaded, 30.00 GiB are there; "
        "the new generation is loaded beside what is served"
    )


def test_replicas_drop_what_they_have_one_at_a_time_where_only_that_fits() -> None:
    replicas = [replica(0, "a", 4, 5), replica(0, "b", 4, 5)]
    told = switch_memory(replicas, {"a": node(1), "b": node(9)})
    assert told.mode == "one_at_a_time"
    assert told.to_dict()["nodes"] == [
        {"node": name, "replicas": 1, "loaded_bytes": 4 * GIB, "needed_bytes": need.one_at_a_time}
        | {"available_bytes": need.available}
        for name, need in zip("ab", told.nodes, strict=True)
    ]
    assert told.nodes[0].one_at_a_time <= GIB + 1
    assert told.statement.endswith("by one replica of each shard at a time, which drops what is served first")


def test_replica_that_shrinks_makes_no_room_for_another_that_may_come_first() -> None:
    replicas = [replica(0, "a", 9, 1), replica(1, "a", 1, 5), replica(0, "b", 9, 1), replica(1, "b", 1, 5)]
    assert switch_memory(replicas, {"a": node(4), "b": node(4)}).mode == "one_at_a_time"
    with pytest.raises(Exhausted, match=r"still needs 4\.00 GiB more on node a"):
        switch_memory(replicas, {"a": node(3.9), "b": node(4)})


def test_only_replica_of_a_shard_cannot_drop_what_it_serves() -> None:
    with pytest.raises(Exhausted) as caught:
        switch_memory([replica(0, "a", 4, 5)], {"a": node(4)})
    assert str(caught.value) == (
        "memory of the switch: node a needs 5.00 GiB beside the 4.00 GiB that 1 replica has loaded, 4.00 GiB are "
        "there. A second replica of each shard would let one at a time drop what it has and load the new generation. "
        "Free memory there, add nodes, or choose a smaller index"
    )
    assert caught.value.retry_after_s is None


def test_refusal_names_the_nodes_that_lack_memory_only() -> None:
    replicas = [replica(0, "a", 1, 5), replica(0, "b", 1, 5)]
    with pytest.raises(Exhausted) as caught:
        switch_memory(replicas, {"a": node(1), "b": node(50)})
    assert "node a needs 5.00" in str(caught.value)
    assert "node b" not in str(caught.value)


def test_replicas_that_do_not_run_yet_are_counted_where_most_is_left() -> None:
    replicas = [replica(0, "a", 2, 2), replica(1, "", 0, 4), replica(2, "", 0, 3)]
    told = switch_memory(replicas, {"a": node(6), "b": node(5)})
    assert needs(told) == {"a": (5.0, 3.0), "b": (4.0, 4.0)}
    with pytest.raises(Exhausted, match=r"node b needs 7\.00 GiB"):
        switch_memory([*replicas, replica(3, "", 0, 4)], {"a": node(6), "b": node(5)})


def test_some_of_a_node_is_spared() -> None:
    exactly = NodeMemory(10 * GIB, 100 * GIB)
    assert switch_memory([replica(0, "a", 1, 4.9)], {"a": exactly}).mode == "beside"
    with pytest.raises(Exhausted):
        switch_memory([replica(0, "a", 1, 5.1)], {"a": exactly})


def test_nodes_of_which_nothing_is_known_refuse_nothing_and_are_told() -> None:
    told = switch_memory([replica(0, "", 0, 5)], {}).to_dict()
    assert (told["mode"], told["nodes"], told["unknown_replicas"]) == ("beside", [], 1)
    assert str(told["statement"]).startswith("of the nodes of 1 replica nothing is known; the new generation is")
    partly = switch_memory([replica(0, "a", 1, 1), replica(1, "elsewhere", 1, 900)], {"a": node(2)})
    assert (partly.unknown, needs(partly)) == (1, {"a": (1.0, 0.0)})


def test_little_memory_is_told_in_mib() -> None:
    told = switch_memory([replica(0, "a", 0.05, 0.01), replica(1, "a", 0.05, 0.01)], {"a": node(0.09)})
    assert (
        str(told.nodes[0])
        == "node a needs 20.5 MiB beside the 102.4 MiB that 2 replicas have loaded, 92.2 MiB are there"
    )
