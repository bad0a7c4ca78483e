"""Meta-World ML1 reach: the hand goes to a hidden point; an extra, see 'make setup-metaworld'.

Observation, action and episodes are those of all Meta-World families, in ``omrl/envs/_metaworld.py``.

Dense reward (package metaworld 3.1.1, version v2): 10 where the fingertips' middle is within 0.05 m of the goal;
beyond, 10/(1 + 9 u^2), u being the distance from that sphere over the distance of goal and hand at the start.
Sparse: 1 within 0.05 m, else 0. Features (6): middle of the fingertips and the hand's start, m.

Tasks: the benchmark's own lists, drawn by ``tasks.seed``: 50 training tasks, then 50 test tasks. A task is a place
of the object, which is in the way at most, and a goal on [-0.1, 0.1] x [0.8, 0.9] x [0.05, 0.3] m.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from omrl.core.config import Config
from omrl.envs._metaworld import MetaworldEnv, MetaworldFamily, package, published
from omrl.envs.base import Array, Task

_RADIUS = np.float32(0.05)  # m
_ANY = {"environment": "reach-v3", "start_and_goal": [0.0, 0.65, 0.02, 0.0, 0.85, 0.175]}


class Ml1Config(Config):
    """Nothing to set."""


def _benchmark(seed: int) -> Any:
    return package().ML1("reach-v3", seed=seed)


class MetaworldMl1(MetaworldFamily):
    """Reach a hidden point."""

    name = "metaworld-ml1"
    env_id = "OMRL/MetaworldMl1-v0"
    CONFIG = Ml1Config
    feature_size = 6
    varies = "reward"
    context_next_observation = False
    floor_episodes = 16
    capacity = 100
    first_test = 50

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._motions: tuple[Array, Array] | None = None

    def sample(self, index: int, seed: int) -> Task:
        """Return task ``index``: 0-49 are the benchmark's training tasks, 50-99 its test tasks."""
        self._check_index(index)
        train, test = published(_benchmark, seed)
        name, drawn = [*train, *test][index]
        return {"environment": name, "start_and_goal": drawn}

    def features(self, task: Task, env: Any, reward: float, success: float) -> list[float]:
        """Return the middle of the fingertips and the hand's start, m."""
        return [*env.tcp_center, *env.hand_init_pos]

    def reward(
        self, task: Task, observation: Array, action: Array, next_observation: Array, features: Array
    ) -> tuple[Array, Array]:
        """Return dense and sparse reward, from the stored features."""
        goal = np.array(task["start_and_goal"][3:], dtype=np.float32)
        distance = np.sqrt(((features[:, :3] - goal) ** 2).sum(axis=1))
        margin = np.sqrt(((features[:, 3:] - goal) ** 2).sum(axis=1))
        # a tenth is left one margin away: 1/(1 + 9)
        beyond = np.maximum(distance - _RADIUS, np.float32(0.0)) / margin
        dense = np.float32(10.0) / (np.float32(1.0) + np.float32(9.0) * beyond**2)
        return dense, (distance <= _RADIUS).astype(np.float32)

    def random_features(self, task: Task) -> tuple[Array, Array]:
        """Return the motions of random actions; drawn once, the goal moves nothing."""
        if self._motions is None:
            self._motions = super().random_features(_ANY)
        return self._motions


class MetaworldMl1Env(MetaworldEnv):
    """Gymnasium form of ``MetaworldMl1``."""

    family = MetaworldMl1


FAMILY = MetaworldMl1
ENV = MetaworldMl1Env
