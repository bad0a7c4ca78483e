"""Progress of long work: a bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 5.0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Progress:
    """Count ``total`` units of work on stderr, with rate and time left.

    Args:
        total: units in all.
        description: what is being done, in a few words.
        unit: name of a unit, plural.
    """

    def __init__(self, total: int, description: str, unit: str = "steps") -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._skipped = 0
        self._start = self._last = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, rate="", note="")
        return self

    def skip(self, n: int) -> None:
        """Count ``n`` units as found finished: they do not enter the rate."""
        self._skipped += n
        self._last = -_LINE_EVERY_S  # a line at once
        self.advance(n, note=f"{n} {self.unit} were finished before")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more units; ``note`` is shown behind them."""
        self.done += n
        now = time.monotonic()
        rate = (self.done - self._skipped) / max(now - self._start, 1e-9)
        shown = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{rate * 60:.1f} {self.unit}/min"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=shown, note=note)
        elif now - self._last >= _LINE_EVERY_S or self.done >= self.total:
            self._last = now
            left = _clock((self.total - self.done) / rate) if rate > 0 else "?"
            line = f"{self.description}: {self.done}/{self.total} {self.unit}, {shown}, {left} left"
            print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
