"""Humanoid-Dir: run in a hidden direction.

Observation (376, float32), the papers'. All but the first 45 entries are what the simulator derives from the
state:

| entries | what | unit | range |
|---|---|---|---|
| 0 | height of the torso | m | 1 to 2 while the episode lasts |
| 1-4 | orientation of the torso, a quaternion w, x, y, z | | [-1, 1] |
| 5-21 | angles of the joints below | rad | the joints' limits |
| 22-24 | velocity of the torso along x, y, z | m/s | unbounded |
| 25-27 | angular velocity of the torso about x, y, z | rad/s | unbounded |
| 28-44 | angular velocities of the joints 5-21 | rad/s | unbounded |
| 45-184 | inertias and masses of the 14 bodies (10 each, the world first) | kg m^2, kg m, kg | unbounded |
| 185-268 | angular and linear velocity of the 14 bodies | rad/s, m/s | unbounded |
| 269-291 | forces that the actuators make in the 23 degrees of freedom | N m | unbounded |
| 292-375 | external torque and force on the 14 bodies | N m, N | unbounded |

Joints, in order: abdomen z, y, x; right hip x, z, y; right knee; left hip x, z, y; left knee; right shoulder
1, 2; right elbow; left shoulder 1, 2; left elbow. Entries 45-268 are about the whole body's center of mass.

Action (17, float32, [-1, 1]): controls of the joints, scaled to [-0.4, 0.4] and by each joint's gear (25 to
300 N m), in the model's order of actuators.

Reward, of a step of 0.015 s: 0.25 * (displacement of the center of mass along the task's direction) / 0.003 s
- 0.1 |control|^2 - min(5e-7 * sum of squared external forces, 10) + 5 for not ending. The division by the
simulator's time step, not by the step's own length, is the release's. The episode ends when the torso's height
leaves [1, 2] m. 200 steps. Features (4): displacement along x and y per 0.003 s in m/s, control cost, contact
cost.

The external forces were very likely 0 in the published runs, see ``omrl/envs/_ant.py``: ``contact_cost: none``, the
default, has neither the cost nor entries 292-375, which stay 0. ``measured`` has both; random actions then cost 0.3
a step on average and up to 10, and single entries reach thousands.

Tasks: angles uniform on [0, 2 pi), drawn by ``tasks.seed``; the originals were unseeded. FOCAL's configuration
has 80 training and 20 test tasks; the paper reports nothing on them.
"""

from __future__ import annotations

import math
from typing import Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs._mujoco import Doubles, Motion, MujocoConfig, MujocoEnv, MujocoFamily, Physics, load_model
from omrl.envs.base import Array, Task

_SIMULATED = 140 + 84 + 23 + 84  # what the observation takes from the simulator
_START = 0.01


class HumanoidDirConfig(MujocoConfig):
    """Humanoid-Dir.

    Attributes:
        contact_cost: ``none`` or ``measured``, see the module.
    """

    contact_cost: Literal["none", "measured"] = "none"


class HumanoidDir(MujocoFamily):
    """Run in a hidden direction."""

    CONFIG = HumanoidDirConfig
    name = "humanoid-dir"
    env_id = "OMRL/HumanoidDir-v0"
    xml = "humanoid.xml"
    observation_size = 45 + _SIMULATED
    action_size = 17
    feature_size = 4
    derived_size = _SIMULATED + 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._measured = isinstance(config, HumanoidDirConfig) and config.contact_cost == "measured"

    def sample(self, index: int, seed: int) -> Task:
        """Return the direction of task ``index``, an angle in rad."""
        self._check_index(index)
        return {"angle": float(seeding.generator(seed, "task", self.name, index).uniform(0.0, 2 * math.pi))}

    def task_array(self, task: Task) -> Array:
        """Return the direction's cosine and sine."""
        return np.array([np.cos(task["angle"]), np.sin(task["angle"])], dtype=np.float32)

    def derive(self, model: mujoco.MjModel, data: mujoco.MjData) -> Doubles:
        """Return inertias, velocities and forces of the bodies, and x and y of the center of mass."""
        center = (model.body_mass[:, None] * data.xipos).sum(0) / model.body_mass.sum()
        forces = data.cfrc_ext if self._measured else np.zeros_like(data.cfrc_ext)
        parts = (data.cinert, data.cvel, data.qfrc_actuator, forces)
        return np.concatenate([*(part.ravel() for part in parts), center[:2]])

    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return positions without x and y, velocities, and what the simulator derives."""
        parts = [physics.qpos[:, 2:], physics.qvel, late.derived[:, :_SIMULATED]]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def features(self, motion: Motion) -> Array:
        """Return displacement of the center of mass per simulator step, control cost, contact cost."""
        before, after = motion.late_before.derived[:, -2:], motion.late_after.derived[:, -2:]
        speed = (after - before) / float(load_model(self.xml).opt.timestep)
        control = 0.1 * (motion.control * motion.control).sum(axis=1)
        forces = motion.late_after.derived[:, _SIMULATED - 84 : _SIMULATED]
        contact = np.minimum(5e-7 * (forces * forces).sum(axis=1), 10.0)
        return np.stack([speed[:, 0], speed[:, 1], control, contact], axis=1).astype(np.float32)

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return a quarter of the displacement along the direction - costs + 5."""
        along = features[:, 0] * task[:, 0] + features[:, 1] * task[:, 1]
        return np.float32(0.25) * along - features[:, 2] - features[:, 3] + np.float32(5.0)

    def terminated(self, after: Physics) -> NDArray[np.bool_]:
        """Return which humanoids have fallen or jumped, bool [B]."""
        height = after.qpos[:, 2]
        return ~((height >= 1.0) & (height <= 2.0))

    def start(self, model: mujoco.MjModel, rng: np.random.Generator) -> Doubles:
        """Return a start: U(-0.01, 0.01) around the standing pose, float64 [nq + nv]."""
        noise: Doubles = rng.uniform(-_START, _START, model.nq + model.nv)
        noise[: model.nq] += model.qpos0
        return noise


class HumanoidDirEnv(MujocoEnv):
    """Gymnasium form of ``HumanoidDir``."""

    family = HumanoidDir


FAMILY = HumanoidDir
ENV = HumanoidDirEnv
