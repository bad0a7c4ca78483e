"""The process of one cell: DVC, which ends in good order when it is told to, or when who started it is gone.

DVC writes dvc.lock in place. So it is never killed here: what it runs is, DVC sees a failed command, lets go of its
locks and ends. Started by path, with DVC's arguments.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

_PATIENCE_S = 20.0  # rewriting a dvc.lock of a thousand cells takes 4 s
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


def main() -> None:
    """Run DVC with this process's arguments."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
    from dvc.cli import main as dvc

    sys.exit(dvc(sys.argv[1:]))


if __name__ == "__main__":
    main()
