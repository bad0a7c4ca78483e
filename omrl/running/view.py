"""What a person sees of a run: a live table on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from omrl.running.cell import Ending

_WORDS = {"ran": "done", "restored": "taken from DVC's run-cache", "unchanged": "up to date, not run",
          "failed": "FAILED", "stopped": "stopped"}  # fmt: skip


def clock(seconds: float) -> str:
    """Return ``seconds`` as 7 s, 3:07 min or 1:02:03 h."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


class View:
    """Counts cells waiting, running, done and failed on stderr, and shows the last line of each running one.

    Args:
        total: cells in all that are not up to date, or read one that is not.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._lines: dict[str, str] = {}
        self._counts = {"done": 0, "failed": 0}
        self._console = Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> View:
        if sys.stderr.isatty():
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, cell: str, text: str) -> None:
        """Take the last line that a running cell printed; the first one says that it has started."""
        if cell not in self._began and cell not in self._ended:
            self._began[cell] = time.monotonic()
            if self._live is None:
                self._print(f"{cell}: started")
        self._lines[cell] = text

    def end(self, ending: Ending) -> None:
        """Say how a cell ended."""
        self._ended.add(ending.cell)  # events and results come by different ways
        self._began.pop(ending.cell, None)
        self._lines.pop(ending.cell, None)
        self._counts["failed" if ending.state == "failed" else "done"] += 1
        number = sum(self._counts.values())
        how = f"{_WORDS[ending.state]}: {ending.message}" if ending.message else _WORDS[ending.state]
        self._print(f"[{number}/{self.total}] {ending.cell}: {how}, {clock(ending.seconds)}")

    def refresh(self) -> None:
        """Draw the table anew."""
        if self._live is not None:
            self._live.update(self._picture())

    def _print(self, text: str) -> None:
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(Text(text))

    def _picture(self) -> Group:
        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        for cell, began in sorted(self._began.items()):
            table.add_row(
                Text(cell, "bold"),
                clock(now - began),
                Text(self._lines.get(cell, ""), "dim", overflow="ellipsis", no_wrap=True),
            )
        waiting = self.total - len(self._began) - sum(self._counts.values())
        counts = f"{waiting} waiting, {len(self._began)} running, {self._counts['done']} done"
        failed = f", {self._counts['failed']} failed" if self._counts["failed"] else ""
        return Group(table, Text(counts + failed))
