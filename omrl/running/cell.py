"""One cell, run by DVC in a process of its own: what a Dask worker does."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from omrl.core.errors import UserError
from omrl.running import child

TOPIC = "omrl"  # of the events by which workers tell progress
LOGS = Path(".dvc/tmp/omrl")  # what each cell printed, in the pipeline's folder
_ATTEMPTS = 3  # of a cell whose process was killed from outside
_BLOCKED = "is busy, it is being blocked by"  # DVC, of an output that another process writes
_BLOCKED_S, _AGAIN_S = 30.0, 0.5
_LOOK_S = 0.25
_TELL_S = 1.0
_GRACE_S = 30.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Dask gives its workers a threshold at which glibc returns memory after nearly every operation
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}

_OURS = [Path(child.__file__).resolve().parents[2] / name for name in ("omrl", "stages")]
_running: dict[int, subprocess.Popen[bytes]] = {}
_guard = threading.Lock()


@dataclass(frozen=True)
class Ending:
    """How a cell ended.

    Attributes:
        cell: its name.
        state: ``ran``, ``restored`` (from DVC's run-cache), ``unchanged``, ``failed`` or ``stopped``.
        seconds: it took.
        message: of a failure, in one line.
    """

    cell: str
    state: str
    seconds: float
    message: str = ""


def environment(workers: int, threads: int) -> dict[str, str]:
    """Return the environment of a cell that may use ``workers`` processes of ``threads`` threads each."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        **os.environ,
        **_MALLOC,
        **dict.fromkeys(_THREADS, str(threads)),
        "OMRL_WORKERS": str(workers),
        "PATH": path,
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_cell(folder: str, cell: str, workers: int, threads: int) -> Ending:
    """Run ``dvc repro -s`` of a cell, up to three times where something outside kills it.

    Args:
        folder: the pipeline's, absolute, in a checkout that all workers share.
        cell: its name.
        workers: processes it may use.
        threads: of each.
    """
    start = time.monotonic()
    log = Path(folder) / LOGS / f"{cell}.log"
    if not (Path(folder) / "dvc.yaml").is_file():
        return Ending(cell, "failed", 0.0, f"{folder}: not there on this worker; all must share the checkout")
    log.parent.mkdir(parents=True, exist_ok=True)
    _tell(cell, "")
    for _ in range(_ATTEMPTS):
        code, stopped = _unblocked(folder, cell, environment(workers, threads), log)
        text = log.read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - start
        if stopped:
            return Ending(cell, "stopped", seconds)
        if code == 0:
            ran, restored = f"Running stage '{cell}'" in text, "is cached - skipping run" in text
            return Ending(cell, "ran" if ran else "restored" if restored else "unchanged", seconds)
        if code > 0 and f"exited with {-signal.SIGKILL}" not in text:
            return Ending(cell, "failed", seconds, _message(text, log))
    return Ending(
        cell, "failed", seconds, f"killed {_ATTEMPTS} times (out of memory? try fewer --jobs); its output is in {log}"
    )


def _message(text: str, log: Path) -> str:
    """Return the line that says what went wrong: the stage's own, else DVC's, else where to look."""
    lines = [line.strip() for line in text.splitlines()]
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    dvcs = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if ours:
        return ours[-1]
    return f"{_raised(text) or (dvcs[0] if dvcs else 'failed')}; its output is in {log}"


def _raised(text: str) -> str:
    """Return the last exception that ``text`` shows and where: the deepest frame that is nobody's installed package."""
    _, found, trace = text.rpartition("Traceback (most recent call last):\n")
    frames = re.findall(r'^  File "(.+)", line (\d+), in (.+)$', trace, flags=re.M)
    raised = re.search(r"^(?! )[\w.]+(?:: .*)?$", trace, flags=re.M)
    if not (found and frames and raised):
        return ""
    own = [frame for frame in frames if not any(part in frame[0] for part in ("site-packages", "<frozen"))
           and not any(Path(frame[0]).resolve().is_relative_to(folder) for folder in _OURS)]  # fmt: skip
    path, line, name = (own or frames)[-1]
    return f"{raised[0]} ({path}, line {line}, in {name})"


def _unblocked(folder: str, cell: str, env: dict[str, str], log: Path) -> tuple[int, bool]:
    """Run it; for a while again where DVC finds another process at its output: a killed worker's takes a moment."""
    deadline = time.monotonic() + _BLOCKED_S
    while True:
        code, stopped = _once(folder, cell, env, log)
        blocked = code > 0 and _BLOCKED in log.read_text(encoding="utf-8", errors="replace")
        if stopped or not blocked or time.monotonic() > deadline:
            return code, stopped
        time.sleep(_AGAIN_S)


def _once(folder: str, cell: str, env: dict[str, str], log: Path) -> tuple[int, bool]:
    """Run it; return the exit status, negative for a signal, and whether it was told to stop."""
    # a session of its own: Ctrl-C reaches the scheduler alone, and all of a cell's processes can be found
    process = subprocess.Popen(
        [sys.executable, "-P", child.__file__, "--wait-for-lock", "repro", "-s", cell],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    with _guard:
        _running[process.pid] = process
    try:
        return _follow(process, cell, log)
    finally:
        if process.poll() != 0:
            _kill(process)  # a command that had not yet asked to die with DVC outlives it
        with _guard:
            _running.pop(process.pid, None)


def _follow(process: subprocess.Popen[bytes], cell: str, log: Path) -> tuple[int, bool]:
    assert process.stdout is not None
    told, rest, deadline = 0.0, b"", 0.0
    with open(log, "wb") as stream:
        while True:
            ready, _, _ = select.select([process.stdout], [], [], _LOOK_S)
            if ready:
                block = os.read(process.stdout.fileno(), 1 << 16)
                if not block:
                    break
                stream.write(block)
                stream.flush()
                *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
                shown = [line for line in lines if line.strip()]
                if shown and time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    _tell(cell, shown[-1].decode("utf-8", "replace").strip())
            elif process.poll() is not None:
                break  # a grandchild holds the pipe, which die_with_parent ends
            if not deadline and _cancelled():
                process.terminate()
                deadline = time.monotonic() + _GRACE_S
            if deadline and time.monotonic() > deadline:
                _kill(process)
    return process.wait(), bool(deadline)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tell(cell: str, line: str) -> None:
    """Send the last line to whoever watches; an empty one says that the cell has started."""
    from distributed import get_worker

    with contextlib.suppress(ValueError):  # no worker: called directly
        get_worker().log_event(TOPIC, {"cell": cell, "line": line})


def _cancelled() -> bool:
    """Has the client given this cell up, or gone away?"""
    from distributed import get_worker
    from distributed.worker import thread_state

    try:
        task = get_worker().state.tasks.get(thread_state.key)
    except (ValueError, AttributeError):
        return False
    return task is None or task.state == "cancelled"


def count_running() -> int:
    """Return how many cells run in this process."""
    with _guard:
        return len(_running)


def check_worker(folder: str) -> None:
    """Raise UserError where a worker does not see the pipeline."""
    if not (Path(folder) / "dvc.yaml").is_file():
        raise UserError(f"{folder}: a worker does not see it; all workers must share the checkout, at the same path")
