"""Linux's timerfd, which Python has from 3.13 on: asyncio's own timers count whole milliseconds."""

from __future__ import annotations

import ctypes
import os
import time

TFD_CLOEXEC, TFD_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
TFD_TIMER_ABSTIME = 1


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: the interval, which stays 0, and the time to wake at."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """A file descriptor that becomes readable at a time of `time.perf_counter` (CLOCK_MONOTONIC)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._spec = _TimerSpec(0, 0, 0, 0)
        self.fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    def set(self, at_s: float) -> None:
        """Becomes readable at that time, or at once where it is past; unreadable until then."""
        self._spec.value_s, self._spec.value_ns = divmod(max(1, int(at_s * 1e9)), 1_000_000_000)
        if self._libc.timerfd_settime(self.fd, TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def close(self) -> None:
        os.close(self.fd)
