"""The one loop that runs episodes: for rollouts, protocols, the online phase, references and videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omrl.envs.base import Array, BatchEnv, StepResult


@dataclass(frozen=True)
class Episodes:
    """One episode of each of n copies.

    Attributes:
        observation, action, next_observation, features: float32 [n, steps, width].
        reward, sparse_reward: float32 [n, steps].
        terminated: bool [n, steps], True at the step that ended an episode.
        valid: bool [n, steps], False after a termination, where the numbers mean nothing.
    """

    observation: Array
    action: Array
    reward: Array
    sparse_reward: Array
    next_observation: Array
    features: Array
    terminated: NDArray[np.bool_]
    valid: NDArray[np.bool_]

    def returns(self, sparse: bool, horizon: int | None = None) -> NDArray[np.float64]:
        """Return the undiscounted returns [n] of the first ``horizon`` steps."""
        values = (self.sparse_reward if sparse else self.reward)[:, :horizon].astype(np.float64)
        return np.where(self.valid[:, :horizon], values, 0.0).sum(axis=1)

    def path(self) -> Array:
        """Return the observations with the last one, [n, steps + 1, width]; it is repeated after a termination."""
        path = np.concatenate([self.observation[:, :1], self.next_observation], axis=1)
        for t in range(self.valid.shape[1]):
            path[:, t + 1] = np.where(self.valid[:, t, None], path[:, t + 1], path[:, t])
        return path


def episodes(
    env: BatchEnv,
    act: Callable[[Array, int], Array],
    steps: int,
    starts: Sequence[np.random.Generator] | None = None,
    observe: Callable[[Array, Array, StepResult, NDArray[np.bool_], int], None] | None = None,
) -> Episodes:
    """Run one episode in every copy of ``env``.

    Args:
        env: the copies.
        act: (observations [n, width], step) -> actions [n, width].
        steps: of an episode; it ends early where all copies have terminated, the rest is then not valid.
        starts: streams of random starts, one for each copy.
        observe: told of every step: (observation, action, result, alive before the step, step).
    """
    observation = env.reset(starts)
    n = len(observation)
    alive = np.ones(n, dtype=np.bool_)
    store: dict[str, NDArray[np.float32]] = {}
    terminated, valid = np.zeros((n, steps), dtype=np.bool_), np.zeros((n, steps), dtype=np.bool_)
    for t in range(steps):
        action = act(observation, t)
        result = env.step(action)
        values = {
            "observation": observation,
            "action": action,
            "reward": result.reward,
            "sparse_reward": result.sparse_reward,
            "next_observation": result.next_observation,
            "features": result.features,
        }
        if not store:
            store = {name: np.zeros((n, steps, *x.shape[1:]), dtype=np.float32) for name, x in values.items()}
        for name, x in values.items():
            store[name][:, t] = x
        valid[:, t] = alive
        terminated[:, t] = result.terminated & alive
        if observe is not None:
            observe(observation, action, result, alive.copy(), t)
        alive &= ~result.terminated
        observation = result.next_observation
        if not alive.any():
            break
    return Episodes(**store, terminated=terminated, valid=valid)
