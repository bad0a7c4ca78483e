"""Curves to watch while something trains: TensorBoard's event files, switched on from outside.

``OMRL_TENSORBOARD=<folder>`` in the environment switches it on, for every program that it reaches: a notebook, one
stage, or all stages that ``dvc repro`` starts. The files hold the time of day and are no output of any stage: what
stages write is the same with and without them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omrl.core.errors import UserError

VARIABLE = "OMRL_TENSORBOARD"


class Writer:
    """Writes the scalars of one run; does nothing without a folder.

    Args:
        folder: of the run; None switches it off.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write ``values`` at ``step``, at once: a worker that is killed has shown what it knew.

        The first call of a process hides what an earlier run of the same name wrote at this step and later.
        """
        if self._folder is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._file = EventFileWriter(str(self._folder))
            start = SessionLog(status=SessionLog.START)
            self._file.add_event(Event(step=step, wall_time=time.time(), session_log=start))
        shown = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._file.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=shown)))
        self._file.flush()


def writer(name: str) -> Writer:
    """Return the writer of a run; one that does nothing unless OMRL_TENSORBOARD names a folder.

    Args:
        name: of the run, such as ``meta_train/focal/expert/0``; it goes below the name of the working folder, so that
            several pipelines can share one TensorBoard.

    Raises:
        UserError: the package tensorboard is not installed, or the folder cannot be made.
    """
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        return Writer(None)
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401 - told before hours of training
    except ImportError:
        raise UserError(
            f"environment variable {VARIABLE} = {folder!r}: the package tensorboard is not installed; run "
            "pip install 'omrl[tensorboard]', or unset the variable"
        ) from None
    target = Path(folder).expanduser() / Path.cwd().name / name
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"environment variable {VARIABLE} = {folder!r}: {error.strerror}: {error.filename}") from None
    return Writer(target)
