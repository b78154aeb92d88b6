"""A plain Ray Serve deployment around a FAISS index, as one writes it first: the peer of `benchmarks.peers`.

    python -m benchmarks.peer_ray_serve INDEX --ef-search 24 --port 8001

It answers POST /defaults and POST /hundred, which is the same with max_ongoing_requests=100:
{"vectors": [[...], ...], "k": 10} -> {"ids": [[...], ...], "distances": [[...], ...]}
"""

from __future__ import annotations

import signal
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import ray
import typer
from ray import serve
from starlette.requests import Request


class FaissIndex:
    def __init__(self, path: str, ef_search: int) -> None:
        self._index = faiss.read_index(path)
        self._params = faiss.SearchParametersHNSW(efSearch=ef_search)

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        vectors = np.array(body["vectors"], dtype=np.float32)
        distances, ids = self._index.search(vectors, body["k"], params=self._params)
        return {"ids": ids.tolist(), "distances": distances.tolist()}


def main(index: Path, ef_search: Annotated[int, typer.Option()], port: Annotated[int, typer.Option()]) -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        ray.init("local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            arguments = (str(index), ef_search)
            serve.run(serve.deployment(FaissIndex).bind(*arguments), name="defaults", route_prefix="/defaults")
            hundred = serve.deployment(FaissIndex, max_ongoing_requests=100).bind(*arguments)
            serve.run(hundred, name="hundred", route_prefix="/hundred")
            print("serves", flush=True)
            stopped.wait()
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
