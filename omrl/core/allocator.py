"""Memory that is freed and needed again at once stays with the process."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 1 << 30  # bytes


def keep_memory() -> bool:
    """Tell glibc not to return large blocks to the system; return whether it listened.

    By default every tensor above 128 KiB is mapped anew and its pages are cleared on first touch, which can
    take a third of a training step. Changes no numbers. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
