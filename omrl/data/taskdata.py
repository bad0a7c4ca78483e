"""Datasets in memory: one float32 table [tasks, rows, width], held once, whose columns are the fields."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omrl.core.errors import UserError
from omrl.data.parquet import read_transitions, verified

_COLUMNS = ["observation", "action", "reward", "sparse_reward", "next_observation", "terminated", "truncated"]
# of the columns in a table, and so of what a draw yields
ORDER = ("observation", "action", "reward", "next_observation", "terminal", "sparse_reward")


IN_MEMORY = 6 << 30  # bytes; a larger table is mapped


def _allocate(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array to fill: in memory, or mapped from a nameless file in TMPDIR, whose pages the system may drop."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


@dataclass(frozen=True)
class TaskBuffers:
    """Transitions of several tasks, the same number of each.

    Attributes:
        tasks: task indices, in the order of the first axis.
        observation, action, next_observation: float32 [tasks, rows, width].
        reward, sparse_reward: float32 [tasks, rows].
        terminal: float32 [tasks, rows], 1 where the target does not bootstrap.
        table: float32 [tasks, rows, width], of which the others are columns; None where they are apart.
    """

    tasks: tuple[int, ...]
    observation: NDArray[np.float32]
    action: NDArray[np.float32]
    reward: NDArray[np.float32]
    sparse_reward: NDArray[np.float32]
    next_observation: NDArray[np.float32]
    terminal: NDArray[np.float32]
    table: NDArray[np.float32] | None = None

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
        shapes: dict[str, tuple[int, ...]] = {}
        fields: dict[str, NDArray[np.float32]] = {}
        table = np.zeros((0, 0, 0), dtype=np.float32)
        for place, path in enumerate(paths):
            columns = read_transitions(path, _COLUMNS)
            terminal = columns.pop("terminated")
            truncated = columns.pop("truncated")
            columns["terminal"] = (terminal | truncated if time_limit_terminal else terminal).astype(np.float32)
            if not place:
                shapes = {name: values.shape for name, values in columns.items()}
                widths = {name: 1 if len(shape) == 1 else shape[1] for name, shape in shapes.items()}
                table = _allocate((len(tasks), len(terminal), sum(widths[n] for n in ORDER)))
                fields = dict(zip(ORDER, np.split(table, np.cumsum([widths[n] for n in ORDER])[:-1], 2), strict=True))
            for name, values in columns.items():
                if values.shape != shapes[name]:
                    raise UserError(
                        f"{path}: column {name} is {values.shape}, expected {shapes[name]} as in {paths[0]}"
                    )
                fields[name][place] = values.reshape(len(values), -1)
        scalars = {name: field[..., 0] for name, field in fields.items() if len(shapes[name]) == 1}
        return cls(tuple(tasks), **{**fields, **scalars}, table=table)

    def packed(self) -> NDArray[np.float32]:
        """Return all columns side by side, as in ``ORDER``, float32 [tasks, rows, width]; no copy if loaded."""
        if self.table is not None:
            return self.table
        parts = [getattr(self, name) for name in ORDER]
        return np.concatenate([part if part.ndim == 3 else part[..., None] for part in parts], axis=2)
