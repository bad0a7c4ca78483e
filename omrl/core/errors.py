"""Errors that a person can act on."""

from __future__ import annotations

import ctypes
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


class UserError(Exception):
    """A problem the user can fix, told in one line.

    The message names the file and key, the value found and what was expected.
    """


def suggest(name: object, options: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? available: a, b"`` for a name that is not among ``options``.

    A long list is left out when there is something near.
    """
    known = sorted(options)
    near = difflib.get_close_matches(str(name), known, n=1)
    if near and len(known) > 12:
        return f"did you mean '{near[0]}'?"
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}available: {', '.join(known) if known else 'none'}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


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
