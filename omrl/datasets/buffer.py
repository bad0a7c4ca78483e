"""Datasets in memory: one contiguous float32 array per field, [tasks, rows, width]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omrl.datasets.parquet import read_transitions, verified
from omrl.errors import UserError

_COLUMNS = ["observation", "action", "reward", "sparse_reward", "next_observation", "terminated", "truncated"]


@dataclass(frozen=True)
class TaskBuffers:
    """Transitions of several tasks, the same number of each.

    Attributes:
        tasks: task indices, in the order of the first axis.
        observation, action, next_observation: float32 [tasks, rows, width].
        reward, sparse_reward: float32 [tasks, rows].
        terminal: float32 [tasks, rows], 1 where the target does not bootstrap.
    """

    tasks: tuple[int, ...]
    observation: NDArray[np.float32]
    action: NDArray[np.float32]
    reward: NDArray[np.float32]
    sparse_reward: NDArray[np.float32]
    next_observation: NDArray[np.float32]
    terminal: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """Transitions per task."""
        return self.reward.shape[1]

    @classmethod
    def load(cls, folder: str | Path, tasks: Sequence[int], time_limit_terminal: bool = False) -> TaskBuffers:
        """Read the files of ``tasks`` in a dataset folder, each compared with the folder's manifest.

        Args:
            folder: ``data/datasets/<name>``.
            tasks: task indices.
            time_limit_terminal: count time-limit ends as terminal, as the released FOCAL code does.

        Raises:
            UserError: a file is missing or damaged, or tasks differ in their number of rows.
        """
        paths = verified(folder, [f"task={task:03d}.parquet" for task in tasks])
        arrays: dict[str, NDArray[np.float32]] = {}
        for place, path in enumerate(paths):
            columns = read_transitions(path, _COLUMNS)
            terminal = columns.pop("terminated")
            truncated = columns.pop("truncated")
            columns["terminal"] = (terminal | truncated if time_limit_terminal else terminal).astype(np.float32)
            if not place:
                shapes = {name: (len(tasks), *values.shape) for name, values in columns.items()}
                arrays = {name: np.empty(shape, dtype=np.float32) for name, shape in shapes.items()}
            for name, values in columns.items():
                if values.shape != arrays[name].shape[1:]:
                    raise UserError(
                        f"{path}: column {name} is {values.shape}, expected {arrays[name].shape[1:]} as in {paths[0]}"
                    )
                arrays[name][place] = values
        return cls(tuple(tasks), **arrays)
