"""Hopper-Rand-Params: hop with an unknown body.

Observation (11, float32):

| entries | what | unit | range |
|---|---|---|---|
| 0 | height of the torso | m | above 0.7 while the episode lasts |
| 1 | pitch of the torso | rad | -0.2 to 0.2 while the episode lasts |
| 2-4 | angles of thigh, leg, foot | rad | about [-2.6, 0], [-2.6, 0], [-0.785, 0.785] |
| 5-6 | velocity of the torso along x and z | m/s | clipped to [-10, 10] |
| 7 | angular velocity of the torso | rad/s | clipped to [-10, 10] |
| 8-10 | angular velocities of the joints 2-4 | rad/s | clipped to [-10, 10] |

Action (3, float32, [-1, 1]): torques of thigh, leg, foot, as fractions of 200 N m.

Reward, of a step of 0.016 s with v the mean velocity along x in it: v + 1 - 0.001 |a|^2. The episode ends when
the torso leaves the ranges above, or a joint or velocity reaches 100 in size. 200 steps. Features (2): v in
m/s and 0.001 |a|^2.

Tasks: 41 multipliers each (see ``_rand_params``). FOCAL's released configuration has 40 and 10; SMAC (Fig. 5) and
UNICORN (Table 2) report on it. Gymnasium's ``hopper.xml`` has the original's masses, gears, dampings and frictions,
and gets its time step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from omrl.envs._mujoco import MujocoEnv, Physics
from omrl.envs._rand_params import RandParams

_WILD = 100.0


class HopperRandParams(RandParams):
    """Hop with an unknown body."""

    name = bodies = "hopper-rand-params"
    env_id = "OMRL/HopperRandParams-v0"
    xml = "hopper.xml"
    observation_size = 11
    action_size = 3

    def terminated(self, after: Physics) -> NDArray[np.bool_]:
        """Return which hoppers have fallen or gone wild, bool [B]."""
        rest = np.concatenate([after.qpos[:, 2:], after.qvel], axis=1)
        tame = (np.abs(rest) < _WILD).all(axis=1)  # false for NaN
        return ~(tame & (after.qpos[:, 1] > 0.7) & (np.abs(after.qpos[:, 2]) < 0.2))


class HopperRandParamsEnv(MujocoEnv):
    """Gymnasium form of ``HopperRandParams``."""

    family = HopperRandParams


FAMILY = HopperRandParams
ENV = HopperRandParamsEnv
