"""Sparse-Cheetah-Dir (FOCAL++'s Sparse-Cheetah-Fwd-Back): ``half-cheetah-dir`` with sparse rewards.

The sparse reward of a step, which the context encoder sees, is (r - G)/|G| where the dense reward r exceeds G,
else 0 (FOCAL++ Eq. 35). Actor, critic and the reported return keep the dense one, as in FOCAL++'s tables.
The paper tuned G so that about half of the transitions in the context are non-zero; G depends on the behavior
policies, and a dataset's card (``omrl data``) tells its own share.

Default: G = 6 (FOCAL++ Table 5), which only fast policies exceed, near 7 per step there; the released
configuration says 0.5, which fits policies trained for fewer steps.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omrl.envs._mujoco import MujocoEnv
from omrl.envs.half_cheetah_dir import HalfCheetahDir
from omrl.envs.half_cheetah_vel import HalfCheetahConfig


class SparseCheetahDirConfig(HalfCheetahConfig):
    """Sparse-cheetah-dir.

    Attributes:
        sparse_threshold: G of Eq. 35.
    """

    sparse_threshold: Annotated[float, Field(ge=-1e6, le=1e6)] | None = 6.0


class SparseCheetahDir(HalfCheetahDir):
    """HalfCheetahDir with sparse rewards for the encoder."""

    name = "sparse-cheetah-dir"
    env_id = "OMRL/SparseCheetahDir-v0"
    CONFIG = SparseCheetahDirConfig


class SparseCheetahDirEnv(MujocoEnv):
    """Gymnasium form of ``SparseCheetahDir``."""

    family = SparseCheetahDir


FAMILY = SparseCheetahDir
ENV = SparseCheetahDirEnv
