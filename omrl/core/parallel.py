"""Independent tasks on the cores that exist, one process each, results on disk.

Workers are spawned, compute with one thread (their bytes must not depend on the machine's core count) and
die with their parent, so that a killed stage leaves nothing running.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any

from omrl.core.errors import UserError, die_with_parent, explain
from omrl.core.progress import Progress

_LOOK_S = 0.5  # between looks at what workers report
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def worker_count(workers: int | None = None) -> int:
    """Return how many processes to use: ``workers``, else OMRL_WORKERS, else the cores of this machine.

    Raises:
        UserError: OMRL_WORKERS is not a positive integer.
    """
    if workers is not None:
        return max(1, workers)
    text = os.environ.get("OMRL_WORKERS", "")
    if not text:
        return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) >= 1):
        raise UserError(f"environment variable OMRL_WORKERS = {text!r}: expected a positive integer below 100000")
    return int(text)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """Run in the worker; return None, or the text of a user error. Other errors travel as exceptions."""
    try:
        function(*arguments)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        return line
    return None


def run_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    workers: int | None = None,
    description: str = "tasks",
    finished: int = 0,
    units: Sequence[int] | None = None,
    unit: str = "tasks",
) -> None:
    """Call ``function(*args)`` for every tuple in ``arguments``, several at a time, each in a worker process.

    Args:
        function: importable function of picklable arguments; it publishes its own result on disk.
        arguments: one tuple per task.
        workers: processes; None for OMRL_WORKERS or the number of cores.
        description: shown with the progress.
        finished: units of an earlier run, shown as done.
        units: of work in each tuple, where ``function`` reports them by ``advance``; None: one each, at its end.
        unit: name of a unit, plural.

    Raises:
        UserError: the first one of a worker; tasks that have finished stay finished.
    """
    count = min(worker_count(workers), max(1, len(arguments)))
    total = len(arguments) if units is None else sum(units)
    with Progress(total + finished, description, unit) as progress:
        if finished:
            progress.skip(finished)
        if not arguments:
            return
        saved = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))  # read by the libraries when a worker starts
        try:
            _run_pool(function, arguments, count, progress, units is not None)
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def advance(n: int) -> None:
    """Report ``n`` units of work done, in a worker; elsewhere nothing happens."""
    if _reported is not None:
        with _reported.get_lock():
            _reported.value += n


_reported: Any = None  # in a worker: the units that all workers have done


def _start_worker(parent: int, reported: Any) -> None:
    global _reported
    die_with_parent(parent)
    _reported = reported


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back what a terminal or a batch system sends to a whole group; processes started meanwhile inherit that."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_pool(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    count: int,
    progress: Progress,
    reports: bool,
) -> None:
    context = multiprocessing.get_context("spawn")
    pool: ProcessPoolExecutor | None = None
    pending: set[Future[str | None]] = set()
    shown = 0
    try:
        with _signals_held():
            resource_tracker.ensure_running()  # without a hang-up; the other signals it ignores itself
        with _signals_held():  # what starts here never gets them: this process tells its workers to end
            try:
                reported = context.Value("q", 0)
                pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(os.getpid(), reported))
            except OSError as error:
                raise UserError(
                    f"no semaphores for worker processes ({error.strerror}); expected /dev/shm to exist and to be "
                    "writable"
                ) from None
            pending = {pool.submit(_call, function, args) for args in arguments}
        while pending:
            done, pending = wait(pending, _LOOK_S if reports else None, return_when=FIRST_COMPLETED)
            if reports and reported.value > shown:
                progress.advance(reported.value - shown)
                shown = reported.value
            for future in done:
                problem = future.result()
                if problem is not None:
                    raise UserError(problem)
                if not reports:
                    progress.advance()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); finished tasks are kept, run again, "
            "with OMRL_WORKERS=1 if memory is short"
        ) from None
    finally:
        for future in pending:
            future.cancel()
        if pool is not None:
            processes = list((pool._processes or {}).values()) if pending else []
            for process in processes:  # a failure or a signal: do not wait for the others
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
