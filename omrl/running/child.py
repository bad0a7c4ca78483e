"""The process of one cell: DVC, which ends in good order when it is told to, or when who started it is gone.

DVC writes its files in place. So it is never killed here: what it runs is, DVC sees a failed command, lets go of its
locks and ends. Started by path, with DVC's arguments; imports nothing of ours, which would cost half a second.

DVC parses all of dvc.lock to look one cell up, and parses and writes all of it to record one: four seconds of a
thousand cells, for each of them, while all others wait. Here it sees the entry of its cell alone, and the new text
takes that entry's place. The bytes are DVC's own, by its own serializer.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.dvcfile import Lockfile
    from dvc.stage import PipelineStage

_HEAD = "schema: '2.0'\nstages:\n"
_PATIENCE_S = 20.0  # rewriting a dvc.lock of a thousand cells takes DVC 4 s
_PR_SET_PDEATHSIG = 1


def _end_commands() -> None:
    """Kill what DVC has started, until DVC ends; at last end this process, too."""
    import psutil

    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    os._exit(128 + signal.SIGTERM)


def _stop(_number: int, _frame: FrameType | None) -> None:
    threading.Thread(target=_end_commands, daemon=True).start()


def split_lock(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text of a dvc.lock as its head and its entries, each with its name."""
    head, *parts = re.split(r"^(?=  [^\s:])", text, flags=re.M)  # a long name stands as "? name", its entry after ":"
    names = (part.partition("\n")[0].strip().removeprefix("? ").removesuffix(":").strip("'\"") for part in parts)
    return head, list(zip(names, parts, strict=True))


def read_entries(path: str) -> dict[str, str] | None:
    """Return name -> text, or None of a file that is not laid out as DVC does: then DVC itself shall read it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head, parts = split_lock(text)
    entries = dict(parts)
    own = head == _HEAD and text.endswith("\n") and len(entries) == len(parts)
    return entries if own and not re.search(r"^(?! |$)", text[len(head) : -1], flags=re.M) else None


def joined(entries: Iterable[str]) -> str:
    """Return the texts of entries one behind the other, their YAML anchors numbered through, as one document's are.

    Settings that ``<<`` in params.yaml shares between algorithms stand in an entry once, with an anchor. Each entry was
    written as a document of its own, which begins at 1; twice the same anchor would make every reader warn.
    """
    parts: list[str] = []
    count = 0
    for entry in entries:
        numbers: dict[str, int] = {}
        for old in re.findall(r"(?<=[:-] &)id\d{3,}$", entry, flags=re.M):
            numbers[old] = count = count + 1

        def new(found: re.Match[str], numbers: dict[str, int] = numbers) -> str:
            number = numbers.get(found[2])
            return found[0] if number is None else f"{found[1]}id{number:03d}"

        parts.append(re.sub(r"(?<=[:-] )([&*])(id\d{3,})$", new, entry, flags=re.M) if numbers else entry)
    return "".join(parts)


def narrow(cell: str) -> None:
    """Let DVC, in this process, read and write the entry of ``cell`` in dvc.lock and leave the others as they are."""
    from dvc.dvcfile import Lockfile
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml, parse_yaml

    load, dump = Lockfile.load, Lockfile.dump_stages

    def load_one(self: Lockfile, **options: Any) -> Any:
        entries = read_entries(self.path)
        if entries is None or options:
            return load(self, **options)
        return self.validate(parse_yaml(_HEAD + entries[cell], self.path), self.relpath) if cell in entries else {}

    def dump_one(self: Lockfile, stages: Sequence[PipelineStage], **options: Any) -> None:
        entries = read_entries(self.path)  # DVC holds its lock meanwhile
        if entries is None or options:
            return dump(self, stages, **options)
        for stage in stages:
            entries[stage.name] = dumps_yaml({"stages": to_lockfile(stage)}).partition("\n")[2]
        whole = Path(self.repo.tmp_dir, f"dvc.lock.{os.getpid()}")
        whole.write_text(_HEAD + joined(entries.values()), encoding="utf-8")
        whole.replace(self.path)
        self.repo.scm_context.track_file(self.relpath)

    Lockfile.load, Lockfile.dump_stages = load_one, dump_one


def main() -> None:
    """Run DVC with this process's arguments, of which the last is a cell."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
    from dvc.cli import main as dvc

    narrow(sys.argv[-1])
    sys.exit(dvc(sys.argv[1:]))


if __name__ == "__main__":
    main()
