"""A rendered picture of the environment, where there is OpenGL.

MuJoCo chooses its OpenGL library once, when it is imported, and a broken one can take the process with it:
the picture is made in a process of its own, by EGL, then by OSMesa, then by what a window system offers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omrl.core.errors import run
from omrl.envs.base import Family, Task, load_family

_SECONDS = 60


def picture(family: Family, task: Task) -> tuple[str, bytes | None]:
    """Return caption and PNG of a task's start; None for a family without a simulator to look into.

    Without OpenGL there is a caption that says so, and no picture.
    """
    if not family.renders:
        return "", None
    job = json.dumps({"family": family.name, "config": family.config.resolved(), "task": task})
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "scene.png"
        for backend in ("egl", "osmesa", "glfw"):
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "omrl.report.scene", job, str(target)],
                    env={**os.environ, "MUJOCO_GL": backend},
                    capture_output=True,
                    timeout=_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:  # a driver that hangs
                continue
            if done.returncode == 0 and target.is_file():
                return f"The start of an episode of task 0: {describe(task)}.", target.read_bytes()
    return "No picture of the environment: there is no OpenGL here (tried EGL, OSMesa and a window system).", None


def describe(task: Task) -> str:
    """Return a task's parameters in words, long lists cut."""
    parts = []
    for name, value in task.items():
        long = isinstance(value, list) and len(value) > 4
        parts.append(f"{len(value)} values of {name}" if long else f"{name} {value}")
    return ", ".join(parts)


def _render(job: dict[str, Any], target: str) -> None:
    from matplotlib import image

    image.imsave(target, load_family(job["family"], job["config"]).picture(job["task"]))


if __name__ == "__main__":
    run(lambda: _render(json.loads(sys.argv[1]), sys.argv[2]))
