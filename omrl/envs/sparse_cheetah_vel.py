"""Sparse-Cheetah-Vel: ``half-cheetah-vel`` with sparse rewards for the encoder.

The sparse reward of a step, which the context encoder sees, is (r - G)/|G| where the dense reward r exceeds G,
else 0 (FOCAL++ Eq. 35). Actor, critic and the reported return keep the dense one, as in FOCAL++'s tables.
The paper tuned G so that about half of the transitions in the context are non-zero; G depends on the behavior
policies, and a dataset's card (``omrl data``) tells its own share.

With ``task_list: uniform`` the velocities are drawn for this family by its name, and are not those of
``half-cheetah-vel``; the other lists are the same in both.

Default: G = -0.1 (FOCAL++ Table 5 and the released configuration): within about 0.1 m/s of the velocity.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omrl.envs._mujoco import MujocoEnv
from omrl.envs.half_cheetah_vel import HalfCheetahVel, HalfCheetahVelConfig


class SparseCheetahVelConfig(HalfCheetahVelConfig):
    """Sparse-cheetah-vel.

    Attributes:
        sparse_threshold: G of Eq. 35.
    """

    sparse_threshold: Annotated[float, Field(ge=-1e6, le=1e6)] | None = -0.1


class SparseCheetahVel(HalfCheetahVel):
    """HalfCheetahVel with sparse rewards for the encoder."""

    name = "sparse-cheetah-vel"
    env_id = "OMRL/SparseCheetahVel-v0"
    CONFIG = SparseCheetahVelConfig


class SparseCheetahVelEnv(MujocoEnv):
    """Gymnasium form of ``SparseCheetahVel``."""

    family = SparseCheetahVel


FAMILY = SparseCheetahVel
ENV = SparseCheetahVelEnv
