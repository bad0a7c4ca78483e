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

EXIT_USER_ERROR = 2
# packages that the library does without, and the extra of pyproject.toml that brings them
_EXTRA = {
    **dict.fromkeys(("dask", "distributed", "dvc", "jinja2", "matplotlib", "sklearn", "stable_baselines3"), "pipeline"),
    "tensorboard": "tensorboard",
    "PIL": "video",
}
_PR_SET_PDEATHSIG = 1


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


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


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


def explain(error: BaseException) -> str | None:
    """Return the line to show for ``error``, or None if it is a defect of ours that needs its traceback."""
    if isinstance(error, UserError):
        return _one_line(str(error))
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in _EXTRA:
        return f"the package {missing} is not installed; run pip install 'omrl[{_EXTRA[missing]}]'"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):  # Rust and C++ libraries have no errno to show
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"no space left on the disk{where}; free some and run again, finished work is kept"
    return None


def run(main: Callable[[], None]) -> None:
    """Run a program: user errors end in one line on stderr and exit code 2, without a traceback.

    It dies with its parent: a stage must not go on writing after the ``dvc repro`` that started it was killed.
    """
    die_with_parent()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, run again to resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
