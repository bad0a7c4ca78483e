"""Sparse-Walker: ``walker-rand-params`` with sparse rewards for the encoder.

The sparse reward of a step, which the context encoder sees, is (r - G)/|G| where the dense reward r exceeds G,
else 0 (FOCAL++ Eq. 35). Actor, critic and the reported return keep the dense one, as in FOCAL++'s tables.
The paper tuned G so that about half of the transitions in the context are non-zero; G depends on the behavior
policies, and a dataset's card (``omrl data``) tells its own share.

Default: G = 0.5, the number of the released configuration, which is of another form there (r where r >= 0.5,
else 0); FOCAL++ reports Walker-2D-Params with dense rewards.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omrl.envs._mujoco import MujocoEnv
from omrl.envs._rand_params import RandParamsConfig
from omrl.envs.walker_rand_params import WalkerRandParams


class SparseWalkerConfig(RandParamsConfig):
    """Sparse-walker.

    Attributes:
        sparse_threshold: G of Eq. 35.
    """

    sparse_threshold: Annotated[float, Field(ge=-1e6, le=1e6)] | None = 0.5


class SparseWalker(WalkerRandParams):
    """WalkerRandParams with sparse rewards for the encoder."""

    name = "sparse-walker"
    env_id = "OMRL/SparseWalker-v0"
    CONFIG = SparseWalkerConfig


class SparseWalkerEnv(MujocoEnv):
    """Gymnasium form of ``SparseWalker``."""

    family = SparseWalker


FAMILY = SparseWalker
ENV = SparseWalkerEnv
