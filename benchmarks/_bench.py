"""Shared by the benchmarks: time a call, print a table."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def best(call: Callable[[], Any], runs: int = 3) -> float:
    """Return the shortest of some runs' seconds."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def table(unit: str, work: float, peer: tuple[str, float], ours: tuple[str, float]) -> None:
    """Print rate of peer and ours on the same work, and their ratio."""
    for name, seconds in (peer, ours):
        print(f"{name:<46}{work / seconds:>14,.0f} {unit}")
    print(f"{'ratio':<46}{peer[1] / ours[1]:>14.1f} x")
