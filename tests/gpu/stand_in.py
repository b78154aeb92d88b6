"""Whether a run of these tests, or of the GPU benchmarks' steps, has a GPU or the stand-in for one.

With EAGLERAY_GPU_DOUBLE=20 it is `tests.gpu_double`, on a CPU, and all counts of points are a twentieth (by another
number another part): what passes shows that the code of the tests is right. It says nothing about a GPU.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "EAGLERAY_GPU_DOUBLE"
SMALLER = int(os.environ.get(VARIABLE) or 0)
DOUBLE = SMALLER > 0
DOUBLE_BYTES = 8 << 30
WARNING = f"NO GPU: {VARIABLE} is set, a stand-in on the CPU answers, sizes are 1/{SMALLER}. Nothing here is a GPU's."


def open_device(share: float = 1.0) -> Any:
    """The `GpuDevice` of this process; Unavailable, with the reason, where there is none."""
    if DOUBLE:
        from tests.gpu_double import double_device

        return double_device(DOUBLE_BYTES, share)
    from actors.gpu_device import GpuDevice

    return GpuDevice.open(share)
