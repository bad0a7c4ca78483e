"""Mechanics shared by the ant families.

Observation (27, float32), the papers':

| entries | what | unit | range |
|---|---|---|---|
| 0 | height of the torso | m | unbounded |
| 1-4 | orientation of the torso, a quaternion w, x, y, z | | [-1, 1] |
| 5-12 | hip 1, ankle 1, ..., hip 4, ankle 4 | rad | about [-0.52, 0.52], [0.52, 1.22] in size |
| 13-15 | velocity of the torso along x, y, z | m/s | unbounded |
| 16-18 | angular velocity of the torso about x, y, z | rad/s | unbounded |
| 19-26 | angular velocities of the joints 5-12 | rad/s | unbounded |

Action (8, float32, [-1, 1]): torques of the model's hip 4, ankle 4, hip 1, ankle 1, hip 2, ankle 2, hip 3,
ankle 3 (its order of actuators), as fractions of 150 N m.

The contact cost is 0.0005 times the sum of the squared external forces on the bodies, each clipped to [-1, 1].
In the papers' MuJoCo 2.0 with mujoco-py these forces were never computed and stayed 0, so the published runs
very likely had none: ``contact_cost: none``, the default. ``measured`` computes them for the state at the
end of the step, copy by copy, which makes simulation several times slower.
"""

from __future__ import annotations

from typing import Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from omrl.core.config import Config
from omrl.envs._mujoco import Doubles, Motion, MujocoConfig, MujocoFamily, Physics
from omrl.envs.base import Array

CONTACT_COST = 5e-4
BODIES = 14  # the world included
LEGACY_SEED, LEGACY_DRAWS = 1337, 120  # SMAC's published list; FOCAL's angles were unseeded


class AntConfig(MujocoConfig):
    """What the ant families share.

    Attributes:
        contact_cost: ``none`` or ``measured``, see the module.
    """

    contact_cost: Literal["none", "measured"] = "none"


class Ant(MujocoFamily):
    """Observation and features of the ant families."""

    CONFIG = AntConfig
    xml = "ant.xml"
    observation_size = 27
    action_size = 8
    feature_size = 4
    control_weight = np.float32(0.5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not isinstance(config, AntConfig):
            raise TypeError(f"expected an AntConfig, got {type(config).__name__}")
        self._measured = config.contact_cost == "measured"
        self.derived_size = 6 * BODIES if self._measured else 0

    def derive(self, model: mujoco.MjModel, data: mujoco.MjData) -> Doubles:
        """Return the external forces and torques on the bodies, clipped to [-1, 1], float64 [84]."""
        return np.clip(data.cfrc_ext, -1.0, 1.0).ravel()

    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return positions without x and y, and velocities."""
        return np.concatenate([physics.qpos[:, 2:], physics.qvel], axis=1).astype(np.float32)

    def _costs(self, motion: Motion) -> list[Array]:
        """Return control and contact cost, float32 [B] each."""
        control = self.control_weight * (motion.action * motion.action).sum(axis=1)
        forces = motion.late_after.derived
        return [control, (CONTACT_COST * (forces * forces).sum(axis=1)).astype(np.float32)]

    def features(self, motion: Motion) -> Array:
        """Return velocity along x and y in m/s, control cost, contact cost, float32 [B, 4]."""
        velocity = (motion.after.qpos[:, :2] - motion.before.qpos[:, :2]) / self.dt
        return np.stack([velocity[:, 0], velocity[:, 1], *self._costs(motion)], axis=1).astype(np.float32)


class AntRun(Ant):
    """Run in a direction that a task gives as an angle; stay up."""

    def task_array(self, task: dict[str, float]) -> Array:
        """Return the direction's cosine and sine."""
        return np.array([np.cos(task["angle"]), np.sin(task["angle"])], dtype=np.float32)

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return the velocity in the task's direction - costs + 1."""
        along = features[:, 0] * task[:, 0] + features[:, 1] * task[:, 1]
        return along - features[:, 2] - features[:, 3] + np.float32(1.0)

    def terminated(self, after: Physics) -> NDArray[np.bool_]:
        """Return which ants lie, jump or are not finite, bool [B]."""
        height = after.qpos[:, 2]
        finite = np.isfinite(after.qpos).all(axis=1) & np.isfinite(after.qvel).all(axis=1)
        return ~(finite & (height >= 0.2) & (height <= 1.0))
