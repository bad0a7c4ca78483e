"""Ant-Dir-2 (the papers' Ant-Fwd-Back): run along x, forward or backward.

Observation, action and costs: see ``omrl.envs._ant``.

Reward, of a step of 0.05 s with v the mean velocity in it: v along the task's direction - 0.5 |a|^2 - contact
cost + 1 for not ending. The episode ends when the torso's height leaves [0.2, 1.0] m. 200 steps. Features (4):
velocity along x and y in m/s, control cost, contact cost.

Tasks: forward (angle 0), then backward (pi), as in FOCAL's release. The papers test on the two training tasks;
indices 2 and 3 are the two directions again, with behavior policies of their own. FOCAL's later code dropped
every cost and bonus from the reward: its numbers are not comparable.
"""

from __future__ import annotations

import math

from omrl.envs._ant import AntRun
from omrl.envs._mujoco import MujocoEnv
from omrl.envs.base import Task

ANGLES = (0.0, math.pi)


class AntDir2(AntRun):
    """Run forward or backward."""

    name = "ant-dir-2"
    env_id = "OMRL/AntDir2-v0"
    capacity = 2 * len(ANGLES)
    first_test = len(ANGLES)

    def sample(self, index: int, seed: int) -> Task:
        """Return the direction of ``index``: forward for even, backward for odd."""
        self._check_index(index)
        return {"angle": ANGLES[index % 2]}


class AntDir2Env(MujocoEnv):
    """Gymnasium form of ``AntDir2``."""

    family = AntDir2


FAMILY = AntDir2
ENV = AntDir2Env
