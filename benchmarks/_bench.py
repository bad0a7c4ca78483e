"""Shared by the benchmarks: time a call, print a table."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


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


def cost(*command: str, cwd: Path, source: Path = ROOT) -> tuple[float, float]:
    """Run a command with the code in ``source``; return its seconds by the clock, and of processor time with children.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(source), "DVC_NO_ANALYTICS": "1"}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
