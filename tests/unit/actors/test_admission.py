from __future__ import annotations

import pytest

from actors.admission import OVERFLOW, REFUSAL_WORK, REFUSALS_SHARE, RETRY_S, Admission, Admissions
from cluster.config import Limits
from cluster.errors import Exhausted

LIMITS = Limits(requests_in_flight=12, queue_ms=500)


def admissions(wait_s: dict[str, float] | None = None) -> Admissions:
    waits = wait_s if wait_s is not None else {}
    return Admissions(LIMITS, lambda collection: waits.get(collection, 0.0))


def admit_all(here: Admissions, collection: str) -> list[Admission]:
    """As many as are admitted."""
    taken: list[Admission] = []
    while len(taken) < 1_000:
        try:
            taken.append(here.admit(collection))
        except Exhausted:
            break
    return taken


def test_one_collection_alone_may_have_all_requests_in_flight_and_no_more() -> None:
    here = admissions()
    taken = admit_all(here, "words")
    assert len(taken) == 12
    with pytest.raises(Exhausted, match=r"requests_in_flight: .* 12 requests, 12 of them for 'words'; 12 is") as caught:
        here.admit("words")
    assert caught.value.retry_after_s == RETRY_S
    taken.pop().release()
    assert len(admit_all(here, "words")) == 1


def test_flood_on_one_collection_leaves_the_other_its_share() -> None:
    here = admissions()
    flood = admit_all(here, "flood")
    mine = admit_all(here, "words")
    assert (len(flood), len(mine)) == (12, 6)
    admitted = []
    for admission in flood[:7]:
        admission.release()
        admitted.append(len(admit_all(here, "flood")))
    assert admitted == [0, 0, 0, 0, 0, 0, 1]  # refused until both have their share
    assert here.total == 12
    assert len(admit_all(here, "words")) == 0


def test_share_falls_back_to_the_other_once_a_collection_has_nothing_in_flight() -> None:
    here = admissions()
    flood, mine = admit_all(here, "flood"), admit_all(here, "words")
    for admission in [*mine, *flood[:3]]:
        admission.release()
    assert here.total == 9
    assert len(admit_all(here, "flood")) == 3


def test_many_collections_with_a_share_each_stay_under_twice_the_bound() -> None:
    here = admissions()
    admit_all(here, "flood")
    for number in range(100):
        admit_all(here, f"words-{number}")
    assert here.total == OVERFLOW * 12


def test_admission_is_released_once_however_often_it_is_told() -> None:
    here = admissions()
    first, _second = here.admit("words"), here.admit("words")
    first.release()
    first.release()
    assert here.total == 1
    with here.admit("words") as admission:
        assert here.total == 2
        admission.release()
        assert here.total == 1
    assert here.total == 1


def test_admission_ends_with_its_block_whatever_is_raised_there() -> None:
    here = admissions()
    with pytest.raises(RuntimeError), here.admit("words"):
        raise RuntimeError("a bug")
    assert here.total == 0


def test_collection_whose_shards_are_predicted_to_be_late_is_refused_and_others_are_not() -> None:
    waits = {"words": 0.6}
    here = admissions(waits)
    with pytest.raises(Exhausted, match=r"queue_ms: searches of 'words' wait about 600 ms .* 500 ms is the most"):
        here.admit("words")
    here.admit("birds")
    waits["words"] = 0.5
    here.admit("words")
    assert here.total == 2


def test_retry_after_is_the_time_until_the_wait_is_short_enough() -> None:
    here = admissions({"words": 4.0})
    with pytest.raises(Exhausted) as caught:
        here.admit("words")
    assert caught.value.retry_after_s == 3.5


def refuse(here: Admissions, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Exhausted):
            here.admit("words")


def test_refusals_take_some_of_the_bound_and_answers_give_it_back() -> None:
    here = admissions()
    taken = admit_all(here, "words")  # refused once
    refuse(here, 11)
    assert 12 * REFUSAL_WORK == 3.0
    taken.pop().release()
    refuse(here, 1)  # 11 are in flight, and 3.0 were refused
    for admission in taken[8:]:
        admission.release()
    for _ in range(100):  # answered
        here.admit("words").release()
    assert here.total == 8
    assert len(admit_all(here, "words")) == 4


def test_refusals_of_long_ago_do_not_count_where_nothing_is_in_flight() -> None:
    here = admissions()
    taken = admit_all(here, "words")
    refuse(here, 100)
    for admission in taken:
        admission.release()
    assert len(admit_all(here, "words")) == 12


def test_refusals_take_no_more_than_their_share_of_the_bound() -> None:
    here = admissions()
    taken = admit_all(here, "words")
    refuse(here, 1_000)
    while here.total > 12 * (1.0 - REFUSALS_SHARE):
        taken.pop().release()
    assert here.total == 6
    here.admit("words")  # what was answered gave some back


def test_collection_has_its_share_of_what_refusals_left() -> None:
    here = admissions()
    admit_all(here, "flood")
    for _ in range(1_000):
        with pytest.raises(Exhausted):
            here.admit("flood")
    assert len(admit_all(here, "words")) == 3  # of the half that is left
