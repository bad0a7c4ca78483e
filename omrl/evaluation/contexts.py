"""Contexts of test tasks: drawn from offline datasets, or made of the agent's own episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omrl.algorithms.base import Algorithm, Belief, Draw, join_beliefs, map_belief
from omrl.data.taskdata import TaskData
from omrl.envs.simulate import Episodes
from omrl.nets.experience import Experience, from_arrays


def draw_rows(
    data: TaskData, place: int, draw: Draw, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the rows of a draw for the task at ``place``: int64 [rows] or [rows, length], and which are no padding."""
    if draw.unit == "row":
        rows = rng.integers(data.rows, size=draw.rows)
        return rows, np.ones_like(rows, dtype=np.bool_)
    if draw.unit == "window":
        first, length = rng.integers(data.rows, size=draw.rows), draw.length
        end = data.end[place][first]
    else:
        known = data.episodes(place)
        begun = int((data.start == np.arange(data.rows)).sum())  # episodes of all tasks, which draw equally many
        chosen = known[rng.integers(len(known), size=draw.count(data.start.size / begun))]
        first, end = chosen[:, 0], chosen[:, 1]
        longest = int((data.end - data.start).max())
        length = min(abs(draw.length) or longest, longest)
        if draw.length < 0:
            first = np.maximum(first, end - length)
    index = first[:, None] + np.arange(length)
    return np.minimum(index, end[:, None] - 1), index < end[:, None]


def gather(
    data: TaskData, drawn: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]], device: torch.device
) -> Experience:
    """Return the experience of every task made of the drawn rows."""
    fields = data.take(np.stack([rows for rows, _ in drawn]))
    if drawn[0][0].ndim == 2:
        fields["valid"] = np.stack([valid for _, valid in drawn]).astype(np.float32)
    return from_arrays(fields, device)


def offline_context(
    algorithm: Algorithm, data: TaskData, transitions: int, rngs: Sequence[np.random.Generator]
) -> Experience:
    """Return a context of about so many transitions of every task, drawn as the method asks for it."""
    draw = algorithm.context_draw(transitions)
    return gather(data, [draw_rows(data, i, draw, rng) for i, rng in enumerate(rngs)], algorithm.device)


def transitions_of(context: Experience) -> list[int]:
    """Return the transitions of every task's context; padding is none."""
    tasks, n = context.shape[:2]
    return [n] * tasks if context.valid is None else context.valid.flatten(1).sum(1).long().tolist()


def offline_belief(
    algorithm: Algorithm, data: TaskData, transitions: int, rngs: Sequence[np.random.Generator]
) -> Belief:
    """Return the belief after such a context."""
    return algorithm.adapt(algorithm.prior(len(rngs)), offline_context(algorithm, data, transitions, rngs))


def experience_of(
    algorithm: Algorithm, episodes: Sequence[Episodes], inference: str, places: Sequence[int]
) -> Experience:
    """Return the agent's own episodes of the given tasks, experience [tasks, episodes, steps, ...] with ``valid``."""

    def stack(name: str) -> NDArray[np.float32]:
        return np.stack([getattr(e, name)[list(places)] for e in episodes], axis=1)

    names = ("observation", "action", "reward", "next_observation")
    fields: dict[str, NDArray[Any]] = {name: stack(name) for name in names}
    fields |= {"terminal": stack("terminated"), "valid": stack("valid")}
    fields["signal"] = fields["reward"] if inference == "dense" else stack("sparse_reward")
    fields["step"] = np.zeros_like(fields["reward"]) + np.arange(fields["reward"].shape[-1], dtype=np.float32)
    return from_arrays(fields, algorithm.device)


def adapt_to_own(
    algorithm: Algorithm,
    beliefs: Belief,
    episodes: Sequence[Episodes],
    kept: NDArray[np.bool_],
    inference: str,
) -> tuple[Belief, list[int]]:
    """Adapt every task's prior to the episodes that it keeps.

    Args:
        algorithm: the method.
        beliefs: the prior of all tasks.
        episodes: one after the other, each of all tasks.
        kept: bool [episodes, tasks].
        inference: which reward inference may see.

    Returns:
        The belief, and the transitions of each task behind it.
    """
    by_row = algorithm.context_draw(1).unit == "row"
    valid = np.stack([e.valid for e in episodes], axis=1)  # [tasks, episodes, steps]
    sizes = (valid.sum(-1) * kept.T).sum(-1)
    if kept.all() and (valid.all() or not by_row):
        context = experience_of(algorithm, episodes, inference, range(valid.shape[0]))
        return algorithm.adapt(beliefs, context.flat() if by_row else context), sizes.tolist()
    found = []
    for place in range(valid.shape[0]):
        chosen = [e for e, keep in zip(episodes, kept[:, place], strict=True) if keep]
        context = experience_of(algorithm, chosen, inference, [place])
        if by_row:
            context = context.flat()
            made = context.valid
            if made is not None:
                context = context.select(made[0] > 0)
        own = map_belief(lambda x, i=place: x[i : i + 1], beliefs)
        found.append(algorithm.adapt(own, context))
    return join_beliefs(found), sizes.tolist()
