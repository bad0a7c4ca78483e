"""Errors that a person can act on."""

from __future__ import annotations

import ctypes
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_USER_ERROR = 2
LONGEST = 300  # characters of a message
# packages that the library does without, and the extra of pyproject.toml that brings them
_EXTRA = {
    **dict.fromkeys(("dask", "distributed", "dvc", "jinja2", "matplotlib", "sklearn", "stable_baselines3"), "pipeline"),
    "tensorboard": "tensorboard",
    "PIL": "video",
}
_PR_SET_PDEATHSIG = 1
_KEPT = "finished work is kept, run again to resume"
_MEMORY = (
    "cannot allocate memory", "not enough memory", "can't allocate memory", "out of memory", "std::bad_alloc",
    "failed to map segment",
)  # fmt: skip


class UserError(Exception):
    """A problem the user can fix, told in one line.

    The message names the file and key, the value found and what was expected.
    """


def printable(text: str) -> str:
    """Return ``text`` with escapes in the place of control, bidirectional and surrogate characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, limit: int = 80, *, quote: bool = True) -> str:
    """Return ``repr(value)`` (or plain text) for a message: nothing unprintable, at most ``limit`` characters."""
    try:
        text = repr(value) if quote else str(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, a structure too deep
        return f"<{type(value).__name__}>"
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text)} characters)"


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _alike(name: str, option: str) -> float:
    """Return how alike two names are, in 0..1: half as wholes, half word by word ('encoder_lr' is a kind of rate)."""
    words, others = re.split(r"[-_.]", name), re.split(r"[-_.]", option)
    best = [max(_ratio(a, b) for b in others) for a in words] + [max(_ratio(a, b) for a in words) for b in others]
    return (_ratio(name, option) + sum(best) / (2 * max(len(words), len(others)))) / 2


def suggest(name: object, options: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? available: a, b"`` for a name that is not among ``options``.

    A long list is left out when there is something near, and cut off else.
    """
    known, wanted = sorted(options), str(name)[:100]
    near = max(known, key=lambda option: (_alike(wanted, option), option), default=None)
    if near is not None and max(_alike(wanted, near), _ratio(wanted, near)) < 0.6:
        near = None
    if near and len(known) > 12:
        return f"did you mean '{near}'?"
    hint = f"did you mean '{near}'? " if near else ""
    available = ", ".join(known) if known else "none"
    return f"{hint}available: {available if len(available) <= 120 else available[:120].rpartition(',')[0] + ', ...'}"


class Stopped(BaseException):
    """A signal asked this program to end; raised where it is, so that everything is put away on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def for_terminal(text: str) -> str:
    """Return ``text`` as a terminal may see it: what is not printable is escaped, but for line ends."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 105]} ... {line[-100:]}"


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere a no-op).

    Args:
        parent: process id that is expected to be the parent; if it is not any more, end at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # the parent died before the request was in force


def _adopted() -> bool:
    """Has the parent died, so that the first process, or one that a session manager sent, took this one over?

    The number of the real parent is not known here. It is in our session, unless we have a session of our own;
    and if it has number 1, in a container, it is DVC itself.
    """
    parent = os.getppid()
    if parent == 0:  # outside the container
        return False
    try:
        foreign = os.getsid(parent) != os.getsid(0) != os.getpid()
        return foreign or (parent == 1 and b"dvc" not in Path("/proc/1/cmdline").read_bytes())
    except OSError:
        return parent == 1


def begin(started_by_dvc: bool) -> None:
    """Prepare a program before its heavy imports: it dies with its parent, signals and errors end in one line."""
    die_with_parent()
    if started_by_dvc and sys.platform == "linux" and _adopted():
        os._exit(1)
    _listen(_leave)
    sys.excepthook = _unhandled


def _listen(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)


def _told(number: int) -> str:
    if number == signal.SIGINT:
        return f"interrupted; {_KEPT}"
    return f"stopped by {signal.Signals(number).name}; {_KEPT}"


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: nothing was begun."""
    os.write(2, f"{_told(number)}\n".encode())
    os._exit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # once is enough; the second would hit the clean-up
    raise Stopped(number)


def _unhandled(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    line = explain(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        _tell(line)
        sys.stderr.flush()
        os._exit(EXIT_USER_ERROR)


def _tell(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """Return the line to show for ``error``, or None if it is a defect of ours that needs its traceback."""
    text = str(error)
    if isinstance(error, UserError):
        return _one_line(text)
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in _EXTRA:
        return f"the package {missing} is not installed; run pip install 'omrl[{_EXTRA[missing]}]'"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    name = getattr(error, "filename", None)
    if full or "No space left on device" in text:  # Rust and C++ libraries have no errno to show
        where = f" while writing {name}" if name else ""
        return _one_line(f"no space left on the disk{where}; free some and run again, finished work is kept")
    if (isinstance(error, OSError) and error.errno == errno.EFBIG) or "File too large" in text:
        return "a file would be larger than is allowed here (see 'ulimit -f'); raise the limit and run again"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files (see 'ulimit -n'); raise the limit and run again"
    scarce = isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN)
    if scarce or isinstance(error, MemoryError) or any(part in text.lower() for part in _MEMORY):
        return f"not enough memory; free some, or set OMRL_WORKERS=1, and run again: {_KEPT.partition(',')[0]}"
    if isinstance(error, OSError) and name is not None and error.strerror:
        return _one_line(f"{name}: {error.strerror.lower()}; correct its permissions or what stands in its place")
    return None


def run(main: Callable[[], None]) -> None:
    """Run a program: user errors end in one line on stderr and exit code 2, without a traceback.

    SIGINT, SIGTERM and SIGHUP end it with one line and 130, 143 and 129, with everything put away. It outlives the
    shell that started it, so that ``nohup omrl repro &`` goes on after a log-out.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    _listen(_stop)
    try:
        main()
        sys.stdout.flush()
    except (Stopped, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        print(_told(number), file=sys.stderr)
        sys.exit(128 + number)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        _tell(line)
        sys.exit(EXIT_USER_ERROR)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
