"""Pictures of MuJoCo scenes without a window, by EGL or OSMesa.

The library is chosen at the first picture, not when MuJoCo is imported: ``MUJOCO_GL`` where it is set, else what
the system has. A process has one context and draws in one thread.
"""

from __future__ import annotations

import ctypes.util
import importlib
import os
import sys
from functools import cache, lru_cache
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from omrl.core.errors import UserError

SIZE = 480  # pixels, width and height of a picture
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


def _backend() -> str:
    """Return the module of MuJoCo's bindings that makes the context."""
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen:
        return chosen
    if not sys.platform.startswith("linux"):
        return "cgl" if sys.platform == "darwin" else "glfw"
    return next((name for name, library in _LIBRARIES.items() if ctypes.util.find_library(library)), "glfw")


@cache
def _context() -> Any:
    """Return the process's OpenGL context, made current.

    Raises:
        UserError: there is no OpenGL.
    """
    name = _backend()
    try:
        context = importlib.import_module(f"mujoco.{name}").GLContext(SIZE, SIZE)
        context.make_current()
    except Exception as error:  # each library fails in a way of its own
        raise UserError(
            f"no picture: OpenGL by {name} does not work here ({error or type(error).__name__}); install libegl1 or "
            "libosmesa6, or choose with MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        ) from None
    return context


@lru_cache(maxsize=2)  # every model has its meshes on the graphics side
def _canvas(model: mujoco.MjModel) -> tuple[mujoco.MjvScene, mujoco.MjrContext]:
    canvas = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, canvas)
    return mujoco.MjvScene(model, maxgeom=2000), canvas


def draw(model: mujoco.MjModel, data: mujoco.MjData, camera: mujoco.MjvCamera) -> NDArray[np.uint8]:
    """Return a picture of ``data``, whose positions are computed, uint8 [480, 480, 3].

    Raises:
        UserError: there is no OpenGL.
    """
    _context()
    try:
        scene, canvas = _canvas(model)
    except mujoco.FatalError as error:
        raise UserError(f"no picture: MuJoCo found no OpenGL ({error}); try MUJOCO_GL=egl or osmesa") from None
    mujoco.mjv_updateScene(
        model, data, mujoco.MjvOption(), mujoco.MjvPerturb(), camera, mujoco.mjtCatBit.mjCAT_ALL, scene
    )
    rectangle = mujoco.MjrRect(0, 0, SIZE, SIZE)
    mujoco.mjr_render(rectangle, scene, canvas)
    picture = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    mujoco.mjr_readPixels(picture, None, rectangle, canvas)
    return picture[::-1].copy()  # OpenGL counts rows from below
