"""Sparse-Ant-Dir (FOCAL++'s Sparse-Ant-Fwd-Back): ``ant-dir-2`` with sparse rewards.

The sparse reward of a step, which the context encoder sees, is (r - G)/|G| where the dense reward r exceeds G,
else 0 (FOCAL++ Eq. 35). Actor, critic and the reported return keep the dense one, as in FOCAL++'s tables.
The paper tuned G so that about half of the transitions in the context are non-zero; G depends on the behavior
policies, and a dataset's card (``omrl data``) tells its own share.

Default: G = 3 (FOCAL++ Table 5 and the released configuration).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omrl.envs._ant import AntConfig
from omrl.envs._mujoco import MujocoEnv
from omrl.envs.ant_dir_2 import AntDir2


class SparseAntDirConfig(AntConfig):
    """Sparse-ant-dir.

    Attributes:
        sparse_threshold: G of Eq. 35.
    """

    sparse_threshold: Annotated[float, Field(ge=-1e6, le=1e6)] | None = 3.0


class SparseAntDir(AntDir2):
    """AntDir2 with sparse rewards for the encoder."""

    name = "sparse-ant-dir"
    env_id = "OMRL/SparseAntDir-v0"
    CONFIG = SparseAntDirConfig


class SparseAntDirEnv(MujocoEnv):
    """Gymnasium form of ``SparseAntDir``."""

    family = SparseAntDir


FAMILY = SparseAntDir
ENV = SparseAntDirEnv
