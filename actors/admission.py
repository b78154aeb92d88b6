"""Which searches an endpoint takes on: no more than it can answer in time, and no collection at another's cost."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from cluster.config import Limits
from cluster.errors import Exhausted

RETRY_S = 1.0
REFUSAL_WORK = 0.25  # of an answer's, in the endpoint process: some 100 us of uvicorn and the kernel to some 400
REFUSALS_SHARE = 0.5  # of the bound at most: clients that ask again at once would otherwise keep it down
OVERFLOW = 2  # times `requests_in_flight` are never exceeded, however many collections claim their shares


class Admission:
    """One request that is worked on, until it is released: by `release`, once, or by leaving its `with` block."""

    __slots__ = ("_admissions", "_collection")

    def __init__(self, admissions: Admissions, collection: str) -> None:
        self._admissions: Admissions | None = admissions
        self._collection = collection

    def release(self) -> None:
        """The request is over. To say so again does nothing."""
        if self._admissions is not None:
            self._admissions.released(self._collection)
            self._admissions = None

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Admissions:
    """The requests in flight in one endpoint, from before their bodies are read until they are answered.

    While fewer than `requests_in_flight` are, a collection may have all of them. From then on it is refused more than
    its share, which is the same for every collection that has requests in flight: those of others come in as those of
    the greedy one are answered. `wait_s` predicts how long a search of a collection waits for its shards.

    To refuse is work, too, which those in flight wait for. So each refusal takes some of the bound, and gives it back
    over as many answers as may be in flight, or once nothing is: what is answered stays fast under any overload.
    """

    def __init__(self, limits: Limits, wait_s: Callable[[str], float]) -> None:
        self._bound = limits.requests_in_flight
        self._queue_s = limits.queue_ms / 1000.0
        self._wait_s = wait_s
        self._in_flight: dict[str, int] = {}
        self._refusals = 0.0  # work of the last ones, in answers
        self.total = 0

    def admit(self, collection: str) -> Admission:
        """Exhausted, at once, where the request would only wait."""
        mine = self._in_flight.get(collection, 0)
        if self.total + self._refusals >= self._bound:
            self._check_share(collection, mine)
        wait_s = self._wait_s(collection)
        if wait_s > self._queue_s:
            raise Exhausted(
                f"queue_ms: searches of {collection!r} wait about {wait_s * 1000.0:.0f} ms for a shard, "
                f"{self._queue_s * 1000.0:g} ms is the most; ask again later, or add replicas",
                max(RETRY_S, wait_s - self._queue_s),
            )
        self._in_flight[collection] = mine + 1
        self.total += 1
        return Admission(self, collection)

    def released(self, collection: str) -> None:
        """One of a collection's requests is over."""
        self.total -= 1
        self._refusals = self._refusals * (1.0 - 1.0 / self._bound) if self.total else 0.0
        left = self._in_flight[collection] - 1
        if left:
            self._in_flight[collection] = left
        else:
            del self._in_flight[collection]

    def _check_share(self, collection: str, mine: int) -> None:
        active = len(self._in_flight) + (mine == 0)
        share = (self._bound - self._refusals) / active
        if mine >= share or self.total >= OVERFLOW * self._bound:
            self._refusals = min(REFUSALS_SHARE * self._bound, self._refusals + REFUSAL_WORK)
            raise Exhausted(
                f"requests_in_flight: this endpoint answers {self.total} requests, {mine} of them for {collection!r}; "
                f"{self._bound} is the most, of which {share:.0f} are its share now; ask again later, or add endpoints",
                RETRY_S,
            )
