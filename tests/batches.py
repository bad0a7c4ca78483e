"""Experience made by hand, for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from omrl.algorithms.base import Algorithm, Phase
from omrl.data.taskdata import TaskData
from omrl.nets.experience import Experience

PHASE = Phase("training", 1, 4)


def bag_of(s: Tensor, a: Tensor, signal: Tensor, s2: Tensor | None = None) -> Experience:
    """Return a bag for inference; its dense reward and what follows are NaN where not given: nobody may look."""
    nothing = torch.full_like(signal, torch.nan)
    following = torch.full_like(s, torch.nan) if s2 is None else s2
    return Experience(s, a, nothing, following, nothing, signal, torch.arange(len(s)))


def moves_of(s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminal: Tensor) -> Experience:
    """Return rows for actor and critic; the reward of inference is NaN: they may not look at it."""
    return Experience(s, a, r, s2, terminal, torch.full_like(r, torch.nan), torch.arange(len(s)))


def meta_batch(
    tasks: Tensor, bag: Experience, moves: Experience, more: Callable[[], Experience] | None = None, further: int = 2
) -> dict[str, Experience]:
    """Return what one update draws: ``bag`` and ``moves`` of ``tasks``, and ``further`` more draws."""

    def of(experience: Experience) -> Experience:
        return Experience(**{**vars(experience), "task": tasks})

    drawn = {"transitions": of(moves), "context": of(bag)}
    return drawn | {f"more{i}": of(more()) for i in range(further) if more is not None}


def update(algorithm: Algorithm, batch: Mapping[str, Experience], phase: str | None = None) -> dict[str, Tensor]:
    """Take one step of the method's first phase, or the named one."""
    phases = algorithm.phases(1_000_000)
    chosen = next(p for p in phases if phase is None or p.name == phase)
    return algorithm.update(chosen, batch)


def update_at(algorithm: Algorithm, batch: Mapping[str, Experience], step: int, steps: int) -> dict[str, Tensor]:
    """Take step ``step`` (from 0) of ``steps``, in the phase that it belongs to."""
    for phase in algorithm.phases(steps):
        if step < phase.steps:
            return algorithm.update(phase, batch)
        step -= phase.steps
    raise ValueError("no phase has this step")


def two_goals(seed: int, good: float = 0.0, episodes: int = 200, horizon: int = 5) -> TaskData:
    """Return data of two tasks, whose reward says how near the first action comes to 0.8, or to -0.8.

    Args:
        seed: of the data.
        good: share of episodes that go there, more or less; the others' actions are uniform.
        episodes: of each task; four successive ones are a rollout of a checkpoint.
        horizon: steps of each.
    """
    rng, rows = np.random.default_rng(seed), episodes * horizon
    goal = np.array([[0.8], [-0.8]])
    state = rng.uniform(-0.5, 0.5, (2, rows, 2))
    action = rng.uniform(-1, 1, (2, rows, 2))
    well = np.repeat(rng.random((2, episodes)) < good, horizon, axis=1)
    action[..., 0] = np.where(well, goal + 0.2 * action[..., 0], action[..., 0]).clip(-1, 1)
    reward = 1 - np.abs(action[..., 0] - goal)
    step = np.tile(np.arange(horizon), (2, episodes))
    start = np.arange(rows) - step
    columns = {
        "observation": state, "action": action, "reward": reward, "sparse_reward": reward,
        "next_observation": state + 0.1 * action, "terminal": np.zeros_like(reward),
    }  # fmt: skip
    return TaskData(
        tasks=(0, 1), **{name: x.astype(np.float32) for name, x in columns.items()},
        checkpoint=(start // (4 * horizon)).astype(np.int32), step=step.astype(np.int32), start=start,
        end=start + horizon, inference="dense",
    )  # fmt: skip
