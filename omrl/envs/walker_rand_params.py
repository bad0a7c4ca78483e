"""Walker-2D-Params: walk with an unknown body.

Observation (17, float32):

| entries | what | unit | range |
|---|---|---|---|
| 0 | height of the torso | m | 0.8 to 2.0 while the episode lasts |
| 1 | pitch of the torso | rad | -1 to 1 while the episode lasts |
| 2-4 | angles of right thigh, leg, foot | rad | about [-2.6, 0], [-2.6, 0], [-0.785, 0.785] |
| 5-7 | the same on the left | rad | the same |
| 8-9 | velocity of the torso along x and z | m/s | clipped to [-10, 10] |
| 10 | angular velocity of the torso | rad/s | clipped to [-10, 10] |
| 11-16 | angular velocities of the joints 2-7 | rad/s | clipped to [-10, 10] |

Action (6, float32, [-1, 1]): torques of right thigh, leg, foot, left thigh, leg, foot, as fractions of 100 N m.

Reward, of a step of 0.016 s with v the mean velocity along x in it: v + 1 - 0.001 |a|^2. The episode ends when
the torso leaves the ranges above. 200 steps. Features (2): v in m/s and 0.001 |a|^2.

Tasks: 65 multipliers each (see ``_rand_params``); the originals were unseeded and are lost. The papers train
on 20 and test on 5, the released configuration 40 and 10. Published numbers come from MuJoCo 1.31, whose
model files no later version reads; Gymnasium's ``walker2d.xml`` has the same masses, gears, dampings and
frictions, and gets the original's time step. A return near 800 over 200 steps is mostly the bonus for
standing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from omrl.envs._mujoco import MujocoEnv, Physics
from omrl.envs._rand_params import RandParams


class WalkerRandParams(RandParams):
    """Walk with an unknown body."""

    name = bodies = "walker-rand-params"
    env_id = "OMRL/WalkerRandParams-v0"
    xml = "walker2d.xml"
    observation_size = 17
    action_size = 6

    def terminated(self, after: Physics) -> NDArray[np.bool_]:
        """Return which walkers have fallen, bool [B]."""
        height, pitch = after.qpos[:, 1], after.qpos[:, 2]
        return ~((height > 0.8) & (height < 2.0) & (np.abs(pitch) < 1.0))


class WalkerRandParamsEnv(MujocoEnv):
    """Gymnasium form of ``WalkerRandParams``."""

    family = WalkerRandParams


FAMILY = WalkerRandParams
ENV = WalkerRandParamsEnv
