"""Sparse-Point-Robot: reach a hidden goal on a half circle; reward only near it.

Observation (2, float32): x and y of the robot, unbounded, in units of the plane; every episode starts at the
origin. Action (2, float32, [-1, 1]): push along x and y, scaled to [-0.1, 0.1] units per step. Dense reward:
minus the distance to the goal after the move. Sparse reward: see ``PointConfig``. No termination; test
episodes have 20 steps, episodes in the data 200 (FOCAL Table 3).

Tasks: 100 goals (cos t, sin t), t equally spaced on [0, pi], both ends included. FOCAL writes "unit circle",
FOCAL++ "sampled uniformly"; the released code has this grid. Changing the number of goals would change every
goal, so the grid is always the published one, visited in an order seeded by ``tasks.seed``. The published
80/20 split was random and unseeded.

The context encoder sees (s, a, r) with the sparse reward; the papers report the sparse return. BOReL's
Point-Robot-Sparse is ``{horizon: 60, start: half-plane, sparse_reward: indicator}`` with 80 and 20 goals. Bounds over
the 100 goals, 20 steps: oracle 13.375 with 1 - d, 12.475 with Eq. 35; uniform random actions 0.00.
"""

from __future__ import annotations

import math

from omrl.envs._point import PointEnv, PointFamily, order
from omrl.envs.base import Task

GOALS = 100


class SparsePointRobot(PointFamily):
    """Goals on a half circle, sparse return."""

    name = "sparse-point-robot"
    env_id = "OMRL/SparsePointRobot-v0"
    returns = "sparse"
    inference_reward = "sparse"
    capacity = GOALS
    first_test = 80

    def sample(self, index: int, seed: int) -> Task:
        """Return the goal at place ``index`` of the seeded order of the grid."""
        self._check_index(index)
        angle = math.pi * int(order(seed, GOALS, self.name)[index]) / (GOALS - 1)
        return {"goal": [math.cos(angle), math.sin(angle)]}


class SparsePointRobotEnv(PointEnv):
    """Gymnasium form of ``SparsePointRobot``."""

    family = SparsePointRobot


FAMILY = SparsePointRobot
ENV = SparsePointRobotEnv
