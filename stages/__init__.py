"""One thin program per DVC stage: read params and inputs, call the library, write outputs.

This file runs before anything else of a stage is imported: from here on it dies with the ``dvc`` that started
it, and a signal or an error, in an import too, ends it with one line.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from omrl.core import errors

if sys.argv[0] == "-m":  # while 'python -m stages.<name>' imports this package
    errors.begin(started_by_dvc="DVC_STAGE" in os.environ)


def run(main: Callable[[], None]) -> None:
    """Run a stage's ``main`` as the only process at this cell.

    It dies with its parent: it must not go on writing after the ``dvc repro`` that started it was killed.
    """
    errors.die_with_parent()
    errors.run(lambda: _alone(main))


def _alone(main: Callable[[], None]) -> None:
    from omrl.core.files import alone

    lock = Path("data/.scratch/cells") / f"{'-'.join([Path(sys.argv[0]).stem, *sys.argv[1:]])}.lock"
    try:
        with alone(lock):
            main()
    finally:
        for folder in list(lock.parents)[:3]:  # a refused stage leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()
