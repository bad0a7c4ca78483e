"""``omrl repro``: a pipeline's graph on Dask. Which cell may start when is decided here; DVC runs and records it."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from omrl.core.errors import UserError, suggest
from omrl.core.files import alone
from omrl.core.parallel import worker_count
from omrl.running.cell import TOPIC, Ending, check_worker, count_running, run_cell
from omrl.running.graph import (
    ALL_CORES,
    FIRST,
    Graph,
    code_changes,
    forget_dead,
    lock_order,
    plan_changes,
    read_graph,
    sort_lock,
)  # fmt: skip
from omrl.running.view import View, clock

if TYPE_CHECKING:
    from distributed import Client, Future

CORES = "cores"  # the Dask resource: on a worker, how many it has; for a cell, how many it takes
_TOLD = {"plan": plan_changes, "code": code_changes}  # what they would write can be told without a run
_LOOK_S = 0.25
_CONNECT_S = 15
_WORKERS_S = 120
_STOP_S = 40.0


class Terminated(BaseException):
    """SIGTERM came."""


def find_folder(name: str | Path | None) -> Path:
    """Return the folder of a pipeline: a folder's path, a name in pipelines/ here or above, or the one we are in.

    Raises:
        UserError: there is none.
    """
    if name is None:
        for folder in [Path(), *Path.cwd().parents]:
            if (folder / "dvc.yaml").is_file():
                return folder
        raise UserError("no pipeline here (no dvc.yaml here or above); expected a folder or a name in pipelines/")
    if (Path(name) / "dvc.yaml").is_file():
        return Path(name)
    known: list[str] = []
    for folder in [Path(), *Path.cwd().parents]:
        if (folder / "pipelines" / name / "dvc.yaml").is_file():
            return folder / "pipelines" / name
        known += sorted(p.parent.name for p in (folder / "pipelines").glob("*/dvc.yaml"))
    raise UserError(f"{name}: no pipeline of that name or path; {suggest(name, known)}")


def is_revision(name: str) -> bool:
    """Is this a git revision, and not a pipeline's folder or name?"""
    try:
        find_folder(name)
    except UserError:
        done = subprocess.run(["git", "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"], capture_output=True)
        return done.returncode == 0
    return False


def explain(folder: Path) -> list[str]:
    """Return which cells a run would start and why, one line each, and last how many; changes nothing."""
    graph = read_graph(folder)
    if not graph.reasons:
        return [f"{folder}: up to date, {len(graph.reads)} cells"]
    reasons = dict(graph.reasons)
    told = {stage: find(folder) for stage, find in _TOLD.items() if stage in reasons}
    known = {stage for stage, changed in told.items() if changed is not None}  # so they are no reason by themselves
    changed = {path for paths in told.values() if paths is not None for path in paths}
    for cell in graph.reads:
        if cell not in reasons and (files := graph.told[cell] & changed):
            reasons[cell] = f"{min(files)} will be another"
    sources = set(reasons) - known
    behind = graph.behind(sources)
    lines = []
    for cell, reads in graph.reads.items():
        if cell in reasons:
            lines.append(f"runs     {cell}: {reasons[cell]}")
        elif cell in behind:
            before = [r for r in reads if r in behind or r in sources]
            lines.append(f"may run  {cell}: reads {', '.join(before[:3])}{' and more' if len(before) > 3 else ''}")
    rest = len(graph.reads) - len(lines)
    return [*lines, f"{folder}: {len(reasons)} cells would run, {len(lines) - len(reasons)} "
            f"may, if what they read changes, {rest} are up to date"]  # fmt: skip


def repro(folder: Path, jobs: int | None = None, address: str | None = None) -> int:
    """Bring a pipeline up to date, ready cells in parallel.

    Args:
        folder: the pipeline's.
        jobs: cores to use here; None for OMRL_WORKERS or all of this machine's.
        address: of a Dask scheduler, to use its workers instead.

    Returns:
        How many cells failed or could not start for want of one that did.

    Raises:
        UserError: no scheduler or worker at ``address``, or another run is under way in this pipeline.
        Terminated: SIGTERM came; like after Ctrl-C, no process of a cell is left.
    """
    start = time.monotonic()
    old = signal.signal(signal.SIGTERM, _terminate)
    try:
        with alone(folder / ".dvc/tmp/omrl-repro.lock"):
            if gone := forget_dead(folder):
                print(f"{folder}: forgot {gone} lock(s) of processes that are gone", file=sys.stderr)
            graph = read_graph(folder)
            if not graph.reasons:
                print(f"{folder}: up to date, {len(graph.reads)} cells", file=sys.stderr)
                return 0
            with _cluster(folder, jobs, address) as client:
                return _build(client, folder, graph, start)
    finally:
        signal.signal(signal.SIGTERM, old)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Terminated


@contextlib.contextmanager
def _cluster(folder: Path, jobs: int | None, address: str | None) -> Iterator[Client]:
    """Yield a client: of a cluster of threads in this process, or of an existing scheduler."""
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is told here
    # the threads only wait for processes, so long silences are no sign of trouble
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.admin.tick.limit": "1h"}))
        if address is None:
            cores = worker_count(jobs)
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=1, threads_per_worker=cores, processes=False, dashboard_address="127.0.0.1:0",
                    resources={CORES: cores}, silence_logs=logging.CRITICAL,
                )
            )  # fmt: skip
            yield stack.enter_context(Client(cluster))
            return
        try:
            client = stack.enter_context(Client(address, timeout=_CONNECT_S))
        except (OSError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--scheduler {address}: no Dask scheduler answers there ({reason[:120]})") from None
        try:
            client.wait_for_workers(1, timeout=_WORKERS_S)
        except TimeoutError:
            raise UserError(f"--scheduler {address}: it has no workers after {_WORKERS_S} s") from None
        client.run(check_worker, str(folder.resolve()))
        yield client


class _Run:
    """One run: hands ready cells to Dask, takes their endings."""

    def __init__(self, client: Client, folder: Path, view: View) -> None:
        self.client, self.folder, self.view = client, str(folder.resolve()), view
        self.endings: dict[str, Ending] = {}
        self._futures: dict[Future[Any], str] = {}
        self._ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        named = [int(worker["resources"].get(CORES, 0)) for worker in workers]
        self.declared = all(named)
        self.cores = max(1, min(named) if self.declared else min(int(worker["nthreads"]) for worker in workers))

    def start(self, cell: str, graph: Graph) -> None:
        """Hand a cell over."""
        stage = cell.partition("@")[0]
        whole = stage in ALL_CORES
        threads = 1 if whole else graph.threads.get(stage, 1)
        cores = self.cores if whole else min(threads, self.cores)
        # the name is new for each run, so that an earlier one's result is not taken for this one's
        future = self.client.submit(
            run_cell, self.folder, cell, cores if whole else 1, threads, pure=False,
            key=f"{cell}-{time.time_ns():x}", resources={CORES: cores} if self.declared else None,
        )  # fmt: skip
        self._futures[future] = cell
        future.add_done_callback(self._ended.put)

    def wait(self) -> Ending | None:
        """Return the ending of a cell, None if none came for a moment."""
        self.view.refresh()
        try:
            future = self._ended.get(timeout=_LOOK_S)
        except queue.Empty:
            if self.client.status != "running":
                raise UserError("the Dask scheduler is gone; finished cells are kept, run again to go on") from None
            return None
        cell = self._futures.pop(future)
        if future.status in ("cancelled", "lost"):
            raise UserError("the Dask scheduler is gone; finished cells are kept, run again to go on")
        if future.status == "error":
            ending = Ending(cell, "failed", 0.0, " ".join(str(future.exception()).split()))
        else:
            ending = future.result()
        self.endings[cell] = ending
        self.view.end(ending)
        return ending

    @property
    def running(self) -> bool:
        """Are there cells handed over that have not ended?"""
        return bool(self._futures)

    def stop(self) -> None:
        """End all running cells and wait until their processes are gone (without a scheduler, workers do so alone)."""
        if self.client.status != "running":
            return
        deadline = time.monotonic() + _STOP_S
        with contextlib.suppress(Exception):  # whatever state the cluster is in
            self.client.cancel(list(self._futures), force=True)
            while any(self.client.run(count_running).values()) and time.monotonic() < deadline:
                time.sleep(0.1)


def _build(client: Client, folder: Path, graph: Graph, start: float) -> int:
    before, order = lock_order(folder), list(graph.reads)
    first = [cell for cell in FIRST if cell in graph.reasons]
    affected = set(graph.reasons) | graph.behind(set(graph.reasons))
    with View(len(affected)) as view:
        client.subscribe_topic(TOPIC, lambda event: view.line(event[1]["cell"], event[1]["line"]))
        run = _Run(client, folder, view)
        try:
            for cell in first:  # alone, and one after the other
                run.start(cell, graph)
                while (ending := run.wait()) is None:
                    pass
                if ending.state == "failed":
                    return _summary(folder, run, affected, start)
            if first:
                graph = read_graph(folder)
                affected = set(graph.reasons) | graph.behind(set(graph.reasons))
                view.total = len(affected) + len(first)
            _run_all(run, graph, affected)
            return _summary(folder, run, affected | set(first), start)
        except BaseException:
            run.stop()
            raise
        finally:
            client.unsubscribe_topic(TOPIC)
            sort_lock(folder, before, order)


def _run_all(run: _Run, graph: Graph, affected: set[str]) -> None:
    """Start every cell as soon as all it reads is there; cells behind a failed one are left."""
    waiting = {cell: set(reads) & affected for cell, reads in graph.reads.items() if cell in affected}
    changed = set(graph.reasons)  # or may have changed, by what they read
    readers: dict[str, list[str]] = {}
    for cell, reads in waiting.items():
        for other in reads:
            readers.setdefault(other, []).append(cell)
    ready = [cell for cell, reads in waiting.items() if not reads]
    while ready or run.running:
        for cell in ready:
            if cell in changed:
                run.start(cell, graph)
            else:  # nothing that it reads has run after all
                run.endings[cell] = Ending(cell, "unchanged", 0.0)
                run.view.end(run.endings[cell])
        ended = [run.endings[cell] for cell in ready if cell not in changed]
        if not ended and (one := run.wait()):
            ended = [one]
        ready = []
        for ending in ended:
            if ending.state == "failed":
                continue
            for reader in readers.get(ending.cell, []):
                waiting[reader].discard(ending.cell)
                if ending.state != "unchanged":
                    changed.add(reader)
                if not waiting[reader]:
                    ready.append(reader)


def _summary(folder: Path, run: _Run, affected: set[str], start: float) -> int:
    failed = [ending for ending in run.endings.values() if ending.state == "failed"]
    left = len(affected) - len(run.endings)
    states = [ending.state for ending in run.endings.values()]
    parts = [f"{states.count('ran')} cells run"]
    parts += [f"{states.count('restored')} taken from the run-cache"] * ("restored" in states)
    parts += [f"{states.count('unchanged')} up to date after all"] * ("unchanged" in states)
    parts += [f"{len(failed)} failed"] * bool(failed) + [f"{left} not started, they read one that failed"] * bool(left)
    print(f"{folder}: {', '.join(parts)}, {clock(time.monotonic() - start)}", file=sys.stderr)
    for ending in failed:
        print(f"failed: {ending.cell}: {ending.message}", file=sys.stderr)
    return len(failed) + left
