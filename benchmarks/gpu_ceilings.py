"""What this GPU does at most, measured with PyTorch where it is installed, and what a flat search could reach by that.

A flat search of a batch reads every vector once and multiplies each with every query: its time is at least the larger
of bytes / bandwidth and operations / throughput. Bandwidth is that of a copy within the device, which reads and writes.
Throughput is that of a square product of matrices: float32 without tensor cores, which is what float32 scores need,
and float16 with them. All of it runs in a process of its own: PyTorch and FAISS may bring CUDA libraries of different
versions, and what it takes of the device is given back when it ends.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

COPY_BYTES = 4 << 30
SIDE = 8_192
REPEATS, WARM_UPS = 10, 3
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second (read and written) and operations per second by the name of a number format."""

    bytes_per_s: float
    operations_per_s: dict[str, float]

    def flat_bound(self, count: int, dimension: int, codes: str, batch: int) -> tuple[float, str]:
        """(vectors per second that a flat search of `batch` queries could reach, and what bounds it)."""
        size = 4 if codes == "float32" else 2
        read_s = count * dimension * size / self.bytes_per_s
        multiply_s = 2.0 * count * dimension * batch / self.operations_per_s[codes]
        return batch / max(read_s, multiply_s), "memory" if read_s >= multiply_s else f"{codes} products"


def measured_ceilings() -> Ceilings | str:
    """Of device 0; why not, where they cannot be measured."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    command = [sys.executable, "-m", "benchmarks.gpu_ceilings"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"PyTorch did not answer within {TIMEOUT_S:g} s"
    if done.returncode:
        return f"PyTorch could not measure: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return told if isinstance(told, str) else Ceilings(**told)


def main() -> None:
    """Print the ceilings, or why they cannot be measured, as JSON."""
    import torch

    if not torch.cuda.is_available():
        print(json.dumps("PyTorch sees no GPU"))
        return
    print(json.dumps({"bytes_per_s": _copied(torch), "operations_per_s": _multiplied(torch)}))


def _copied(torch: Any) -> float:
    """Half of what is free at most: an index may be there already."""
    free, _ = torch.cuda.mem_get_info()
    size = min(COPY_BYTES, free // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    return 2.0 * size / _median_s(torch, lambda: target.copy_(source))


def _multiplied(torch: Any) -> dict[str, float]:
    """TF32 is told beside the two that bounds are computed from."""
    found = {}
    for name, tensor_cores in (("float32", False), ("tf32", True), ("float16", True)):
        dtype = torch.float16 if name == "float16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = tensor_cores
        left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        found[name] = 2.0 * SIDE**3 / _median_s(torch, lambda a=left, b=right, c=out: torch.matmul(a, b, out=c))
    return found


def _median_s(torch: Any, work: Callable[[], object]) -> float:
    for _ in range(WARM_UPS):
        work()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


if __name__ == "__main__":
    main()
