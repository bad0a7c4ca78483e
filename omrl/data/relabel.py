"""Relabelled sets: every task's rewards on the merged transitions of all tasks.

FOCAL++ App. D.2, Figs 5a and 7: merge the (s, a, s') of all tasks, recompute the reward of every transition
for every task, sparsify. Afterwards all tasks have the identical distribution of (s, a, s') and only rewards
tell them apart. The paper does not give the set's size; here the merged transitions are subsampled once, the
same number from every source task, and that one sample is relabelled for every task. The actor-critic's
dense rewards are relabelled too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from omrl.core import seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.data.schema import Columns, concatenate, sort, take

# (task parameters, observation, action, next_observation, features) -> (dense, sparse)
Reward = Callable[[dict[str, Any], Any, Any, Any, Any], tuple[NDArray[np.float32], NDArray[np.float32]]]


class RelabelConfig(Config):
    """One relabelled set.

    Attributes:
        source: the quality level whose transitions are merged.
        radius: of the reward disc in this set; None for the environment's. FOCAL++ Table 5 has 0.5.
        sparse_reward: form of the sparse reward in this set; None for the environment's.
    """

    source: str
    radius: Annotated[float, Field(gt=0)] | None = None
    sparse_reward: Literal["one-minus-distance", "eq35"] | None = None

    def overrides(self) -> dict[str, Any]:
        """Return what differs from the environment's configuration."""
        chosen = {"radius": self.radius, "sparse_reward": self.sparse_reward}
        return {key: value for key, value in chosen.items() if value is not None}


def relabel_rows(columns: Columns, task: int, parameters: dict[str, Any], reward: Reward) -> Columns:
    """Return the same transitions with the rewards of ``task``; ``source_task`` is kept."""
    dense, sparse = reward(
        parameters,
        columns["observation"],
        columns["action"],
        columns["next_observation"],
        columns["reward_features"],
    )
    return {
        **columns,
        "task": np.full(len(dense), task, dtype=np.int32),
        "reward": dense,
        "sparse_reward": sparse,
    }


def quotas(sources: int, rows: int, available: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how many rows each source gives: equal, the remainder to sources in a seeded order.

    Raises:
        UserError: a source has fewer rows than its share.
    """
    share = np.full(sources, rows // sources, dtype=np.int64)
    share[rng.permutation(sources)[: rows % sources]] += 1
    if (share > available).any():
        raise UserError(
            f"params.yaml: dataset.transitions_per_task = {rows}: a source task gives only {int(available.min())} "
            f"transitions to the merged set, {int(share.max())} are needed"
        )
    return share


def merge(
    tasks: Sequence[int],
    available: Sequence[int],
    parts: Iterable[Columns],
    rows: int,
    rng_of: Callable[[str | int], np.random.Generator],
) -> Columns:
    """Return ``rows`` transitions of the merged support of all tasks, without favoring any.

    Args:
        tasks: source tasks, rising.
        available: transitions of each.
        parts: the transitions of each, in the same order; taken one after the other.
        rows: size of the set.
        rng_of: name -> stream; ``"quota"`` and every source task have their own.

    Returns:
        Columns ordered by (source_task, checkpoint, episode, step); no transition twice.
    """
    share = quotas(len(tasks), rows, np.array(available), rng_of("quota"))
    chosen = []
    for task, count, part in zip(tasks, share, parts, strict=True):
        chosen.append(take(part, np.sort(rng_of(task).permutation(len(part["task"]))[:count])))
    return sort(concatenate(chosen))


def merge_stream(seed: int, env: str, name: str) -> Callable[[str | int], np.random.Generator]:
    """Return the streams that draw the merged set ``name``."""
    return lambda part: seeding.generator(seed, "relabel", env, name, part)
