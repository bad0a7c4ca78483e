"""Half-Cheetah-Dir (the papers' Half-Cheetah-Fwd-Back): run forward or backward.

Observation, action, starts, horizon and features: those of ``half-cheetah-vel``.

Reward, of a step of 0.05 s with v the mean velocity along x in it: direction * v - 0.05 |a|^2. No termination.

Tasks: backward (-1), then forward (+1), as in the release. FOCAL, FOCAL++ and MACAW test on the two training
tasks; here indices 2 and 3 are the two directions again, with behavior policies of their own, so that
``tasks: {train: 2, test: 2}`` tests on contexts that no model has seen. The papers' plots show one of the two:
backward for FOCAL's.
"""

from __future__ import annotations

from omrl.envs._mujoco import MujocoEnv
from omrl.envs.base import Array, Task
from omrl.envs.half_cheetah_vel import HalfCheetah, task_scalar

DIRECTIONS = (-1.0, 1.0)


class HalfCheetahDir(HalfCheetah):
    """Run backward or forward."""

    name = "half-cheetah-dir"
    env_id = "OMRL/HalfCheetahDir-v0"
    capacity = 2 * len(DIRECTIONS)
    first_test = len(DIRECTIONS)

    def sample(self, index: int, seed: int) -> Task:
        """Return the direction of ``index``: backward for even, forward for odd."""
        self._check_index(index)
        return {"direction": DIRECTIONS[index % 2]}

    def task_array(self, task: Task) -> Array:
        """Return the direction."""
        return task_scalar(task["direction"])

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return direction * v - control cost."""
        return task[:, 0] * features[:, 0] - features[:, 1]


class HalfCheetahDirEnv(MujocoEnv):
    """Gymnasium form of ``HalfCheetahDir``."""

    family = HalfCheetahDir


FAMILY = HalfCheetahDir
ENV = HalfCheetahDirEnv
