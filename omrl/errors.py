"""Errors that a person can act on."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2


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


def explain(error: BaseException) -> str | None:
    """Return the line to show for ``error``, or None if it is a defect of ours that needs its traceback."""
    if isinstance(error, UserError):
        return _one_line(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; free some and run again, finished work is kept"
    return None


def run(main: Callable[[], None]) -> None:
    """Run a program: user errors end in one line on stderr and exit code 2, without a traceback."""
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
