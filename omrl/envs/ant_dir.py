"""Ant-Dir: run in a hidden direction.

Observation, action and costs: see ``omrl.envs._ant``. Reward, end and features: those of ``ant-dir-2``, with
any angle.

Tasks, by ``task_list``: ``smac``, angles uniform on [0, 2 pi) from NumPy's legacy generator with seed 1337, in
that order (SMAC: the first 100 of 120 to train, the last 20 to test); ``uniform``, fresh draws by
``tasks.seed`` (FOCAL, PEARL and MACAW drew theirs unseeded; MACAW's 50 angles are in files of its own).
UNICORN and CSRO use this family for their random/medium/expert tables.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs._ant import LEGACY_DRAWS, LEGACY_SEED, AntConfig, AntRun
from omrl.envs._mujoco import MujocoEnv
from omrl.envs._point import legacy_uniform
from omrl.envs.base import Task

_TRAINING = 100  # of SMAC's list


class AntDirConfig(AntConfig):
    """Ant-Dir.

    Attributes:
        task_list: which angles; see the module.
    """

    task_list: Literal["smac", "uniform"] = "smac"


class AntDir(AntRun):
    """Run in a hidden direction."""

    name = "ant-dir"
    env_id = "OMRL/AntDir-v0"
    CONFIG = AntDirConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._list: Any = getattr(config, "task_list", "smac")
        self.capacity, self.first_test = (LEGACY_DRAWS, _TRAINING) if self._list == "smac" else (None, None)

    def sample(self, index: int, seed: int) -> Task:
        """Return the angle at place ``index`` of the list, in rad."""
        self._check_index(index)
        if self._list == "smac":
            turn = legacy_uniform(LEGACY_SEED, 0.0, 1.0, LEGACY_DRAWS)[index]
        else:
            turn = seeding.generator(seed, "task", self.name, index).uniform()
        return {"angle": float(2 * math.pi * turn)}


class AntDirEnv(MujocoEnv):
    """Gymnasium form of ``AntDir``."""

    family = AntDir


FAMILY = AntDir
ENV = AntDirEnv
