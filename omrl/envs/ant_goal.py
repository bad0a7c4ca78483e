"""Ant-Goal: walk to a hidden place.

Observation (113, float32): position of the torso (x, y in m), then entries 0-26 of ``omrl.envs._ant`` (that is,
all 15 positions and 14 velocities), then the 84 external forces and torques on the 14 bodies, clipped to
[-1, 1]: zeros with ``contact_cost: none``, as they very likely were in the papers' runs.

Action: see ``omrl.envs._ant``.

Reward, of a step of 0.05 s: -(|x - gx| + |y - gy|) - 0.1 |a|^2 - contact cost, with the torso's place after the
step. No termination. 200 steps. Features (4): x and y in m, control cost, contact cost.

Tasks: goals uniform on the disc of 3 m (radius 3 sqrt(u), angle 2 pi u'), drawn by ``tasks.seed``; the
originals were unseeded. FOCAL's configuration has 150 training and 30 test tasks; PEARL's author could not
reproduce the published curve on this one.
"""

from __future__ import annotations

import math

import numpy as np

from omrl.core import seeding
from omrl.envs._ant import BODIES, Ant
from omrl.envs._mujoco import Motion, MujocoEnv, Physics
from omrl.envs.base import Array, Task

RADIUS = 3.0  # m


class AntGoal(Ant):
    """Walk to a hidden place."""

    name = "ant-goal"
    env_id = "OMRL/AntGoal-v0"
    observation_size = 29 + 6 * BODIES
    control_weight = np.float32(0.1)

    def sample(self, index: int, seed: int) -> Task:
        """Return the goal of task ``index``, in m."""
        self._check_index(index)
        radius, turn = seeding.generator(seed, "task", self.name, index).uniform(size=2)
        radius, angle = RADIUS * math.sqrt(radius), 2 * math.pi * turn
        return {"goal": [radius * math.cos(angle), radius * math.sin(angle)]}

    def task_array(self, task: Task) -> Array:
        """Return the goal."""
        return np.array(task["goal"], dtype=np.float32)

    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return positions, velocities, and clipped external forces."""
        forces = late.derived if self._measured else np.zeros((len(physics.qpos), 6 * BODIES))
        return np.concatenate([physics.qpos, physics.qvel, forces], axis=1).astype(np.float32)

    def features(self, motion: Motion) -> Array:
        """Return the torso's place, control cost, contact cost, float32 [B, 4]."""
        place = motion.after.qpos
        return np.stack([place[:, 0], place[:, 1], *self._costs(motion)], axis=1).astype(np.float32)

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return minus the city-block distance to the goal, minus costs."""
        distance = np.abs(features[:, 0] - task[:, 0]) + np.abs(features[:, 1] - task[:, 1])
        return -distance - features[:, 2] - features[:, 3]


class AntGoalEnv(MujocoEnv):
    """Gymnasium form of ``AntGoal``."""

    family = AntGoal


FAMILY = AntGoal
ENV = AntGoalEnv
