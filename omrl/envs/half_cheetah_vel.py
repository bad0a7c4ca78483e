"""Half-Cheetah-Vel: run at a hidden velocity.

Observation (20, float32), the papers': Gymnasium's 17 entries, then the position of the torso. With
``observation: gymnasium`` only the first 17.

| entries | what | unit | range |
|---|---|---|---|
| 0 | height of the torso over its start | m | unbounded |
| 1 | pitch of the torso | rad | unbounded |
| 2-4 | angles of back thigh, shin, foot | rad | about [-0.52, 1.05], [-0.785, 0.785], [-0.4, 0.785] |
| 5-7 | angles of front thigh, shin, foot | rad | about [-1, 0.7], [-1.2, 0.87], [-0.5, 0.5] |
| 8-9 | velocity of the torso along x and z | m/s | unbounded |
| 10 | angular velocity of the torso | rad/s | unbounded |
| 11-16 | angular velocities of the joints 2-7 | rad/s | unbounded |
| 17-19 | x, y, z of the torso | m | unbounded; y is 0 |

The release reads 17-19 from the simulator's body positions, which lag one simulator step (0.01 s) behind
after a step: so do these. They make the distance covered observable.

Action (6, float32, [-1, 1]): torques of back thigh, shin, foot, front thigh, shin, foot, as fractions of 120,
90, 60, 120, 60, 30 N m.

Reward, of a step of 0.05 s with v the mean velocity along x in it: -|v - v*| - 0.05 |a|^2 (Finn et al. 2017;
FOCAL and MACAW use it so). No termination. 200 steps. Features (2): v in m/s and 0.05 |a|^2.

Tasks, by ``task_list``: ``focal``, velocities uniform on [0, 3] m/s from NumPy's legacy generator with seed
1337, in that order (FOCAL: the first 80 of 100 to train, the last 20 to test); ``pearl``, the same, of which
PEARL trains on 100 and tests on the next 30; ``macaw``, the 40 velocities 0.075, 0.15, ..., 3 (MACAW tests on
indices 2, 7, 15, 23, 26), visited so that MACAW's training tasks come first; ``macaw-faster``, the same in
their order: the 26 up to 1.95 to train, the 14 faster ones to test (MACAW Table 1); ``uniform``, fresh draws
by ``tasks.seed``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs._mujoco import Motion, MujocoConfig, MujocoEnv, MujocoFamily, Physics
from omrl.envs._point import legacy_uniform
from omrl.envs.base import Array, Task

FASTEST = 3.0  # m/s
_LEGACY_SEED, _LEGACY_DRAWS = 1337, 130  # PEARL's count; a shorter list is a prefix of it
_MACAW_COUNT, _MACAW_TEST = 40, (2, 7, 15, 23, 26)
_LISTS: dict[str, tuple[int, int]] = {  # how many tasks, place of the first one to test on
    "focal": (_LEGACY_DRAWS, 80),
    "pearl": (_LEGACY_DRAWS, 100),
    "macaw": (_MACAW_COUNT, _MACAW_COUNT - len(_MACAW_TEST)),
    "macaw-faster": (_MACAW_COUNT, 26),
}
TORSO_HEIGHT = 0.7  # m, of the torso's body when its z joint is at 0
CONTROL_COST = np.float32(0.05)


class HalfCheetahConfig(MujocoConfig):
    """What the half-cheetah families share.

    Attributes:
        observation: ``papers``, 20 entries, or ``gymnasium``, 17.
    """

    observation: Literal["papers", "gymnasium"] = "papers"


class HalfCheetahVelConfig(HalfCheetahConfig):
    """Half-Cheetah-Vel.

    Attributes:
        task_list: which velocities; see the module.
    """

    task_list: Literal["focal", "pearl", "macaw", "macaw-faster", "uniform"] = "focal"


def task_scalar(value: float) -> Array:
    """Return ``value`` as a task's array, float32 [1]."""
    return np.array([value], dtype=np.float32)


class HalfCheetah(MujocoFamily):
    """Observation and features of the half-cheetah families."""

    CONFIG = HalfCheetahConfig
    xml = "half_cheetah.xml"
    observation_size = 20
    action_size = 6
    feature_size = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not isinstance(config, HalfCheetahConfig):
            raise TypeError(f"expected a HalfCheetahConfig, got {type(config).__name__}")
        self._torso = config.observation == "papers"
        self.observation_size = 20 if self._torso else 17

    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return positions without x, velocities, and the torso's lagging position."""
        parts = [physics.qpos[:, 1:], physics.qvel]
        if self._torso:
            x, z = late.qpos[:, 0], late.qpos[:, 1] + TORSO_HEIGHT
            parts.append(np.stack([x, np.zeros_like(x), z], axis=1))
        return np.concatenate(parts, axis=1).astype(np.float32)

    def features(self, motion: Motion) -> Array:
        """Return velocity along x and control cost, float32 [B, 2]."""
        velocity = (motion.after.qpos[:, 0] - motion.before.qpos[:, 0]) / self.dt
        cost = CONTROL_COST * (motion.action * motion.action).sum(axis=1)
        return np.stack([velocity, cost], axis=1).astype(np.float32)


class HalfCheetahVel(HalfCheetah):
    """Run at a hidden velocity."""

    name = "half-cheetah-vel"
    env_id = "OMRL/HalfCheetahVel-v0"
    CONFIG = HalfCheetahVelConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._list: Any = getattr(config, "task_list", "focal")
        self.capacity, self.first_test = _LISTS.get(self._list, (None, None))

    def sample(self, index: int, seed: int) -> Task:
        """Return the velocity at place ``index`` of the list."""
        self._check_index(index)
        if self._list in ("focal", "pearl"):
            velocity = legacy_uniform(_LEGACY_SEED, 0.0, FASTEST, _LEGACY_DRAWS)[index]
        elif self._list in ("macaw", "macaw-faster"):
            last = _MACAW_TEST if self._list == "macaw" else ()
            places = [*(i for i in range(_MACAW_COUNT) if i not in last), *last]
            velocity = np.linspace(0.075, FASTEST, _MACAW_COUNT)[places[index]]
        else:
            velocity = seeding.generator(seed, "task", self.name, index).uniform(0.0, FASTEST)
        return {"velocity": float(velocity)}

    def task_array(self, task: Task) -> Array:
        """Return the velocity to run at."""
        return task_scalar(task["velocity"])

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return -|v - v*| - control cost."""
        return -np.abs(features[:, 0] - task[:, 0]) - features[:, 1]


class HalfCheetahVelEnv(MujocoEnv):
    """Gymnasium form of ``HalfCheetahVel``."""

    family = HalfCheetahVel


FAMILY = HalfCheetahVel
ENV = HalfCheetahVelEnv
