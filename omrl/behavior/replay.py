"""The transitions that a behavior policy saw while it learned, kept as data (MACAW's setting).

A SAC run of T steps makes T transitions. They are written as they come, a file per checkpoint interval, so
that long runs need no memory for them, and files of unfinished runs are those of finished ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omrl.behavior.base import replay_name
from omrl.data.parquet import write_transitions
from omrl.data.schema import Columns
from omrl.envs.base import Array, Family, StepResult

_SCALARS = ("reward", "sparse_reward")
_FLAGS = ("terminated", "truncated")
_COUNTS = ("checkpoint", "episode", "step")


class ReplayWriter:
    """Collects the transitions of N runs that step together, and writes them at every checkpoint.

    A row's ``checkpoint`` is the last one before its episode began: the policy that acted is that one, further
    trained. ``episode`` counts the run's episodes, ``step`` the steps in it.

    Args:
        family: environment.
        tasks: task index of every run.
        every: environment steps between checkpoints.
    """

    def __init__(self, family: Family, tasks: Sequence[int], every: int) -> None:
        self._family, self._tasks, self._every = family, list(tasks), every
        runs = len(self._tasks)
        widths = {
            "observation": family.observation_size,
            "action": family.action_size,
            "next_observation": family.observation_size,
            "reward_features": family.feature_size,
        }
        self._arrays: dict[str, NDArray[np.generic]] = {
            **{name: np.empty((runs, every, width), dtype=np.float32) for name, width in widths.items()},
            **{name: np.empty((runs, every), dtype=np.float32) for name in _SCALARS},
            **{name: np.empty((runs, every), dtype=np.bool_) for name in _FLAGS},
            **{name: np.empty((runs, every), dtype=np.int32) for name in _COUNTS},
        }

    def add(
        self,
        taken: int,
        age: NDArray[np.int64],
        episode: NDArray[np.int64],
        observation: Array,
        action: Array,
        result: StepResult,
        truncated: NDArray[np.bool_],
    ) -> None:
        """Keep one step of every run.

        Args:
            taken: environment steps before this one.
            age: steps before this one in the running episode [N].
            episode: its number [N].
            observation: [N, observation_size].
            action: [N, action_size].
            result: of the step.
            truncated: did the time limit end the episode [N]?
        """
        place = taken % self._every
        values = {
            "observation": observation,
            "action": action,
            "next_observation": result.next_observation,
            "reward_features": result.features,
            "reward": result.reward,
            "sparse_reward": result.sparse_reward,
            "terminated": result.terminated,
            "truncated": truncated & ~result.terminated,
            "checkpoint": (taken - age) // self._every * self._every,
            "episode": episode,
            "step": age,
        }
        for name, value in values.items():
            self._arrays[name][:, place] = value

    def write(self, folders: Sequence[Path], last: int) -> None:
        """Write the transitions of the interval that ends at environment step ``last``, one file per run."""
        for run, folder in enumerate(folders):
            columns: Columns = {name: values[run] for name, values in self._arrays.items()}
            task = np.full(self._every, self._tasks[run], dtype=np.int32)
            columns |= {"task": task, "source_task": task, "deterministic": np.zeros(self._every, dtype=np.bool_)}
            footer = {"environment": self._family.spec(), "steps": [last - self._every, last]}
            write_transitions(folder / replay_name(last), columns, footer)
