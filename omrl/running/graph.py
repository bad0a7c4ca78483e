"""The cells of a pipeline as DVC resolves them: their order, what each waits for, which are not up to date and why."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import omrl
from omrl.core import layout
from omrl.core.errors import UserError
from omrl.core.files import read_json, write_json, write_text
from omrl.experiment import INSTALLED, check, code_units, load, plan_files
from omrl.experiment import read as read_params
from omrl.provenance.fingerprint import fingerprint
from omrl.provenance.lockfile import LOCK
from omrl.running.child import joined, split_lock

FIRST = ("plan", "code")  # they write what running cells read, so they run alone, before all others
ALL_CORES = ("behavior", "rollouts")  # one process per core
_PLAN = layout.DATA / "plan"
_TOLD = (f"{_PLAN}/", f"{layout.CODE}/")
_SHOWN = 3  # paths named in a reason


@dataclass(frozen=True)
class Graph:
    """A pipeline's cells.

    Attributes:
        reads: cell -> the cells whose outputs it reads, in the order in which ``dvc repro`` runs cells.
        reasons: cell -> why it is not up to date, for those that are not.
        threads: stage -> threads that one of its cells computes with, where that is not one.
        told: cell -> the files that it reads of stages ``plan`` and ``code``, which can be told without a run.
    """

    reads: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, str]
    threads: Mapping[str, int] = field(default_factory=dict)
    told: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def behind(self, cells: set[str]) -> set[str]:
        """Return all cells that read, directly or not, an output of one of ``cells``."""
        found: set[str] = set()
        for cell, reads in self.reads.items():  # in order, so one pass is enough
            if not found.isdisjoint(reads) or not cells.isdisjoint(reads):
                found.add(cell)
        return found


def read_graph(folder: Path) -> Graph:
    """Ask DVC for the cells of the pipeline in ``folder`` and for their status.

    Raises:
        UserError: DVC cannot read the pipeline, or another DVC command is at work in it.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    for name in ("params.yaml", "dvc.yaml"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; expected a pipeline's folder with params.yaml and dvc.yaml")
    params = read_params(folder / "params.yaml")
    here = Path.cwd()
    try:
        os.chdir(folder)  # DVC speaks of paths as seen from here
        with Repo() as repo, repo.lock, _params_read_once():
            graph = get_active_graph(repo.index.graph)
            stages = plan_repro(graph, collect_stages(repo, ["dvc.yaml"]))
            locked = set(lock_order(Path()))
            reasons = {s.name: _reason(s.name in locked, next(iter(found.values()))) for s in stages
                       if (found := s.status(check_updates=True))}  # fmt: skip
            told = {s.name: frozenset(d.def_path for d in s.deps if d.def_path.startswith(_TOLD)) for s in stages}
            reads = {s.name: tuple(sorted(other.name for other in graph.successors(s))) for s in stages}
    except LockError as error:
        who = " ".join(str(error).partition("\n\n")[0].partition(". ")[0].split())
        raise UserError(f"{folder}: another DVC command is at work there, wait until it ends: {who}") from None
    except DvcException as error:
        raise UserError(f"{folder}: DVC cannot read this pipeline: {error}") from None
    finally:
        os.chdir(here)
    threads = {}
    for name, section, default in (("meta_train", params.meta_train, 2), ("evaluate", params.evaluate, 1)):
        wanted = section.get("threads")
        threads[name] = wanted if isinstance(wanted, int) else default  # stage 'plan' refuses anything else
    threads |= {"online": threads["meta_train"], "evaluate_online": threads["evaluate"]}
    return Graph(reads, reasons, threads, told)


def code_changes(folder: Path) -> set[str] | None:
    """Return the fingerprint files that stage ``code`` would write otherwise; None if that cannot be told here.

    It can where the code that runs here is the pipeline's.
    """
    params = load("repository", "env", "algorithms", path=folder / "params.yaml")
    own = Path(omrl.__file__).resolve().parent
    if params.repository != INSTALLED and (folder / params.repository / "omrl").resolve() != own:
        return None
    units = code_units(params).items()
    return _changes(folder, {layout.code(kind, name): fingerprint(module) for (kind, name), module in units})


def plan_changes(folder: Path) -> set[str]:
    """Return the files that stage ``plan`` would write otherwise.

    Raises:
        UserError: it would refuse the params.yaml.
    """
    params = folder / "params.yaml"
    check(params)
    return _changes(folder, {_PLAN / name: content for name, content in plan_files(params).items()})


def _changes(folder: Path, contents: Mapping[Path, Any]) -> set[str]:
    """Return the files whose content is another than these, or that are not there."""
    changed = set()
    for path, content in contents.items():
        try:
            known = read_json(folder / path)
        except UserError:
            known = None
        if known != content:
            changed.add(str(path))
    return changed


@contextlib.contextmanager
def _params_read_once() -> Iterator[None]:
    """Let DVC parse a params file once, where it would for every cell: a third of a status's processor time."""
    from dvc.dependency import param

    load = param.load_path
    known: dict[str, Any] = {}

    def once(path: str, fs: Any, **options: Any) -> Any:
        if path not in known:
            known[path] = load(path, fs, **options)
        return known[path]

    param.load_path = once
    try:
        yield
    finally:
        param.load_path = load


def _reason(known: bool, changes: list[Any]) -> str:
    """Say in a few words what DVC's status of a cell means."""
    if not known:
        return "new, dvc.lock does not know it"
    parts = []
    for change in changes:
        if not isinstance(change, dict):
            parts.append(str(change).replace("changed checksum", "its definition in dvc.yaml changed"))
            continue
        for kind, entries in change.items():
            for path, what in entries.items():
                if isinstance(what, dict):  # a params file
                    parts += [f"{key} {state}" for key, state in what.items()]
                else:
                    state = {"deleted": "missing", "not in cache": "not in the cache"}.get(what, what)
                    parts.append(f"{'output ' if kind == 'changed outs' else ''}{path} {state}")
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def lock_order(folder: Path) -> list[str]:
    """Return the cells in dvc.lock, in its order."""
    return [name for name, _ in _entries(folder)[1]]


def _entries(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return dvc.lock as its head and its entries, each with its name."""
    try:
        text = (folder / LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return "", []
    return split_lock(text)


def sort_lock(folder: Path, before: list[str], order: list[str]) -> None:
    """Give dvc.lock the order that one ``dvc repro`` would: cells that stood there, then new ones as they run.

    Args:
        folder: the pipeline's.
        before: cells in dvc.lock when the run began.
        order: the graph's order.
    """
    head, entries = _entries(folder)
    place = {name: i for i, name in enumerate(dict.fromkeys([*before, *order]))}
    ordered = sorted(entries, key=lambda entry: place.get(entry[0], len(place)))
    if ordered != entries:
        write_text(folder / LOCK, head + joined(part for _, part in ordered))


def forget_dead(folder: Path) -> int:
    """Remove from DVC's table of readers and writers what processes left that are gone; return how many.

    DVC does so where the process id is free. It cannot tell that another program has it now.
    """
    path = folder / ".dvc/tmp/rwlock"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        writers: dict[str, Any] = {p: info for p, info in table.get("write", {}).items() if _alive(info)}
        readers = {p: [i for i in infos if _alive(i)] for p, infos in table.get("read", {}).items()}
        before = len(table.get("write", {})) + sum(len(infos) for infos in table.get("read", {}).values())
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        with contextlib.suppress(OSError):  # an empty or half-written table is no table; DVC writes a new one
            path.unlink()
        return 0
    gone = before - len(writers) - sum(len(infos) for infos in readers.values())
    if gone:
        write_json(path, {"write": writers, "read": {p: infos for p, infos in readers.items() if infos}})
    return gone


def _alive(info: dict[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(int(info["pid"]))
        # DVC writes its own arguments there; the interpreter's stand before them in the process's command line
        return str(info["cmd"]).split(" ", 1)[-1] in " ".join(process.cmdline()) and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
