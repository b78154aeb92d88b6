"""The command line's side of the HTTP API."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from cluster.errors import Conflict, EaglerayError, Exhausted, Invalid, NotFound, Unavailable

JOB_POLL_S = 0.3
JOB_RETRY_S, JOB_POLL_ATTEMPTS = 2.0, 30
ENDED = ("succeeded", "failed", "stopped")
_KINDS: dict[int, type[EaglerayError]] = {400: Invalid, 404: NotFound, 409: Conflict, 413: Exhausted, 429: Exhausted}


@cache
def _tls() -> ssl.SSLContext:
    """One for all clients of the process: to read the certificate authorities takes 20 ms and more."""
    return httpx.create_ssl_context()


class Client:
    """Calls to one endpoint; problems come back as our errors."""

    def __init__(self, target: str, timeout_s: float = 60.0) -> None:
        self.target = target
        self._http = httpx.Client(base_url=target, timeout=timeout_s, verify=_tls())

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded JSON answer (None without one)."""
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.target} does not answer: {error}; is `eagleray up` running?") from error
        if response.is_success:
            return response.json() if response.content else None
        raise _error_of(response)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def collections(self) -> list[dict[str, Any]]:
        return list(self.call("GET", "/v1/collections")["collections"])

    def collection(self, name: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/v1/collections/{name}"))

    def create(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        return dict(self.call("PUT", f"/v1/collections/{name}", config))

    def delete(self, name: str) -> None:
        self.call("DELETE", f"/v1/collections/{name}")

    def search(self, name: str, vectors: NDArray[Any], **options: Any) -> dict[str, Any]:
        body = {"vectors": vectors.tolist(), **options}
        return dict(self.call("POST", f"/v1/collections/{name}/points:search", body))

    def fetch(self, name: str, ids: Sequence[int | str], with_vectors: bool = False) -> dict[str, Any]:
        body = {"ids": list(ids), "with_vectors": with_vectors}
        return dict(self.call("POST", f"/v1/collections/{name}/points:fetch", body))

    def upsert(
        self,
        name: str,
        ids: Sequence[int | str],
        vectors: NDArray[Any],
        attributes: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Insert or replace points: vectors (n, dimension), and each point's attributes. The LSNs of the answer are
        what a search gives as `min_lsn` to see them on any replica."""
        rows = zip(ids, vectors.tolist(), attributes or [{}] * len(ids), strict=True)
        points = [{"id": point_id, "vector": vector, "attributes": more} for point_id, vector, more in rows]
        return dict(self.call("POST", f"/v1/collections/{name}/points:upsert", {"points": points, **options}))

    def delete_points(self, name: str, ids: Sequence[int | str], **options: Any) -> dict[str, Any]:
        """Delete points; ids that there are not do no harm, and are not counted."""
        return dict(self.call("POST", f"/v1/collections/{name}/points:delete", {"ids": list(ids), **options}))

    def vector_of(self, name: str, point_id: int | str) -> NDArray[np.float32]:
        """The stored vector of a point, shape (1, dimension); NotFound."""
        points = self.fetch(name, [point_id], with_vectors=True)["points"]
        if not points:
            raise NotFound(f"no point {point_id!r} in {name!r}")
        return np.array([points[0]["vector"]], dtype=np.float32)

    def snapshots(self, name: str) -> list[dict[str, Any]]:
        return list(self.call("GET", f"/v1/collections/{name}/snapshots")["snapshots"])

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        self.call("DELETE", f"/v1/collections/{name}/snapshots/{snapshot}")

    def roll_back(self, name: str, generation: int | None = None) -> dict[str, Any]:
        """Serve an earlier generation again (None: the one before). Conflict where that takes a job."""
        return dict(self.call("POST", f"/v1/collections/{name}:rollback", {"generation": generation}))

    def jobs(self) -> list[dict[str, Any]]:
        """The last ones, newest first."""
        return list(self.call("GET", "/v1/jobs")["jobs"])

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/v1/jobs/{job_id}"))

    def stop_job(self, job_id: str) -> None:
        self.call("DELETE", f"/v1/jobs/{job_id}")

    def submit_job(self, collection: str | None, body: dict[str, Any]) -> str:
        """The id of a job on a collection, or without one on all."""
        path = "/v1/jobs" if collection is None else f"/v1/collections/{collection}/jobs"
        return str(self.call("POST", path, body)["job_id"])

    def follow_job(self, job_id: str, listener: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Its last status, whatever that is; `listener` gets every one until then."""
        while True:
            status = self._job_status(job_id)
            listener(status)
            if status["state"] in ENDED:
                return status
            time.sleep(JOB_POLL_S)

    def run_job(
        self, collection: str | None, body: dict[str, Any], listener: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Submit a job and follow it to its end; raises Invalid with its message unless it succeeded."""
        status = self.follow_job(self.submit_job(collection, body), listener)
        if status["state"] != "succeeded":
            raise Invalid(f"job {status['job_id']} {status['state']}: {status['report'].get('message', '')}")
        return status

    def _job_status(self, job_id: str) -> dict[str, Any]:
        """A job goes on while the endpoint is away for a while: ask again."""
        for _ in range(JOB_POLL_ATTEMPTS - 1):
            try:
                return self.job(job_id)
            except Unavailable:
                time.sleep(JOB_RETRY_S)
        return self.job(job_id)


def _error_of(response: httpx.Response) -> EaglerayError:
    try:
        detail = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = response.text[:500]
    kind = _KINDS.get(response.status_code, Unavailable)
    return kind(detail or f"status {response.status_code}")
