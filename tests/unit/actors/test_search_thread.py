"""The thread that computes for coroutines: order, errors, cancellation, the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Iterator

import numpy as np
import pytest

from actors.search_thread import SearchThread
from cluster.errors import Invalid, Unavailable


@pytest.fixture
def thread() -> Iterator[SearchThread]:
    thread = SearchThread(lambda: None, "it has ended")
    yield thread
    thread.close()


def run(test: Awaitable[None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20.0):
            await test

    asyncio.run(within())


def test_jobs_are_done_in_one_thread_in_order() -> None:
    begun: list[threading.Thread] = []
    thread = SearchThread(lambda: begun.append(threading.current_thread()), "it has ended")

    async def test() -> None:
        done: list[int] = []

        def job(number: int) -> threading.Thread:
            done.append(number)
            return threading.current_thread()

        threads = await asyncio.gather(*(thread.run(job, number) for number in range(50)))
        assert done == list(range(50))
        assert set(threads) == set(begun)

    run(test())
    thread.close()


def test_errors_are_raised_where_they_are_awaited(thread: SearchThread) -> None:
    def fail(error: Exception) -> None:
        raise error

    async def test() -> None:
        for error in (Invalid.at("k", "too large"), ZeroDivisionError("a bug")):
            with pytest.raises(type(error)) as caught:
                await thread.run(fail, error)
            assert caught.value is error
        assert await thread.run(lambda value: value + 1, 1) == 2

    run(test())


def test_job_that_was_cancelled_before_its_turn_is_not_done(thread: SearchThread) -> None:
    async def test() -> None:
        go_on, done = threading.Event(), list[int]()
        first = asyncio.ensure_future(thread.run(go_on.wait, 20.0))
        second, third = (asyncio.ensure_future(thread.run(done.append, number)) for number in (2, 3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait({second})
        go_on.set()
        await asyncio.gather(first, third)
        assert done == [3]

    run(test())


def test_result_of_a_job_that_was_cancelled_meanwhile_is_dropped(thread: SearchThread) -> None:
    async def test() -> None:
        begun, go_on = threading.Event(), threading.Event()

        def job(_: None) -> None:
            begun.set()
            go_on.wait(20.0)

        call = asyncio.ensure_future(thread.run(job, None))
        await asyncio.to_thread(begun.wait, 20.0)
        call.cancel()
        await asyncio.wait({call})
        go_on.set()
        assert await thread.run(str, 7) == "7"

    run(test())


def test_jobs_that_wait_at_the_end_are_told(thread: SearchThread) -> None:
    async def test() -> None:
        begun, go_on = threading.Event(), threading.Event()

        def job(number: int) -> int:
            begun.set()
            go_on.wait(20.0)
            return number

        first, second = (asyncio.ensure_future(thread.run(job, number)) for number in (1, 2))
        await asyncio.to_thread(begun.wait, 20.0)
        thread.close()
        go_on.set()
        assert await first == 1
        for late in (second, thread.run(job, 3)):
            with pytest.raises(Unavailable, match="it has ended"):
                await late

    run(test())


def test_job_whose_event_loop_has_ended_does_not_end_the_thread(thread: SearchThread) -> None:
    go_on = threading.Event()

    async def leave() -> None:
        asyncio.ensure_future(thread.run(go_on.wait, 20.0))  # noqa: RUF006  # nobody awaits it
        await asyncio.sleep(0)

    asyncio.run(leave())
    go_on.set()

    async def test() -> None:
        assert await thread.run(str, 7) == "7"

    run(test())


def test_argument_is_let_go_of_after_the_job(thread: SearchThread) -> None:
    async def test() -> None:
        vectors = np.ones(10)
        gone = weakref.ref(vectors)
        assert await thread.run(np.sum, vectors) == 10.0
        del vectors
        await thread.run(lambda _: None, None)  # the first is over for certain
        gc.collect()
        assert gone() is None

    run(test())
