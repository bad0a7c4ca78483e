"""Relabelled sets: every task's rewards on the merged transitions of all tasks.

FOCAL++ App. D.2, Figs 5a and 7: merge the (s, a, s') of all tasks, recompute the reward of every transition
for every task, sparsify. Afterwards all tasks have the identical distribution of (s, a, s') and only rewards
tell them apart. The paper does not give the set's size; here the merged transitions are subsampled once, the
same number from every source task, and that one sample is relabelled for every task. The actor-critic's
dense rewards are relabelled too. BOReL relabels whole episodes, so that a belief can be carried through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omrl.core import seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.data.quality import draw_episodes
from omrl.data.schema import Columns, concatenate, sort, take

# (task parameters, observation, action, next_observation, features) -> (dense, sparse)
Reward = Callable[[dict[str, Any], Any, Any, Any, Any], tuple[NDArray[np.float32], NDArray[np.float32]]]


class RelabelConfig(Config):
    """One relabelled set.

    Attributes:
        source: the quality level whose transitions are merged.
        unit: ``row``, transitions are drawn one by one (FOCAL++); ``episode``, whole episodes, so that methods that
            read them in order can use the set (the last episode of every source task is cut to its share).
        tasks: whose transitions are merged: ``all``, or ``train``, the training tasks alone, so that a test task's
            own data are in no set.
        env_config: what differs from the environment's ``env_config`` in this set: ``radius`` and ``sparse_reward`` of
            the point robots (FOCAL++ Table 5 has a radius of 0.5), ``sparse_threshold`` of the MuJoCo families.
    """

    source: str
    unit: Literal["row", "episode"] = "row"
    tasks: Literal["all", "train"] = "all"
    env_config: dict[str, Any] = {}


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
    unit: Literal["row", "episode"] = "row",
) -> Columns:
    """Return ``rows`` transitions of the merged support of some tasks, without favoring any.

    Args:
        tasks: source tasks, rising.
        available: transitions of each.
        parts: the transitions of each, in the same order; taken one after the other.
        rows: size of the set.
        rng_of: name -> stream; ``"quota"`` and every source task have their own.
        unit: what is drawn, see ``RelabelConfig``.

    Returns:
        Columns ordered by (source_task, checkpoint, episode, step); no transition twice.
    """
    share = quotas(len(tasks), rows, np.array(available), rng_of("quota"))
    chosen = []
    for task, count, part in zip(tasks, share, parts, strict=True):
        rng = rng_of(task)
        if unit == "episode":
            places = draw_episodes(part["checkpoint"], part["episode"], int(count), rng)
        else:
            places = np.sort(rng.permutation(len(part["task"]))[:count])
        chosen.append(take(part, places))
    return sort(concatenate(chosen))


def merge_stream(seed: int, env: str) -> Callable[[str | int], np.random.Generator]:
    """Return the streams that draw a merged set, whatever it is called: sets that differ in reward share the draw."""
    return lambda part: seeding.generator(seed, "relabel", env, part)
