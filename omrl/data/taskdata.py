"""Datasets in memory: one float32 table [tasks, rows, width], held once, whose columns are the fields."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omrl.core.errors import UserError
from omrl.data.parquet import read_transitions, verified
from omrl.data.schema import Columns

_COLUMNS = ["observation", "action", "reward", "sparse_reward", "next_observation", "terminated", "truncated"]
_ORDERED = ["source_task", "checkpoint", "episode", "step"]
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
class TaskData:
    """Transitions of several tasks, the same number of each, in the order in which they were made.

    Attributes:
        tasks: task indices, in the order of the first axis.
        observation, action, next_observation: float32 [tasks, rows, width].
        reward, sparse_reward: float32 [tasks, rows].
        terminal: float32 [tasks, rows], 1 where the target does not bootstrap.
        checkpoint: int32 [tasks, rows], SAC step of the policy that acted.
        step: int32 [tasks, rows], place in the episode.
        start: int64 [tasks, rows], the row at which the row's episode, as far as it is in the dataset, begins.
        end: int64 [tasks, rows], the row after the last of the row's episode.
        inference: which reward inference may see: ``dense`` or ``sparse``; the family says so.
        extra: further columns float32 [tasks, rows, width], see ``Algorithm.columns``.
        table: float32 [tasks, rows, width], of which the others are columns; None where they are apart.
    """

    tasks: tuple[int, ...]
    observation: NDArray[np.float32]
    action: NDArray[np.float32]
    reward: NDArray[np.float32]
    sparse_reward: NDArray[np.float32]
    next_observation: NDArray[np.float32]
    terminal: NDArray[np.float32]
    checkpoint: NDArray[np.int32]
    step: NDArray[np.int32]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    inference: Literal["dense", "sparse"] = "sparse"
    extra: Mapping[str, NDArray[np.float32]] | None = None
    table: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """Transitions per task."""
        return self.reward.shape[1]

    @property
    def signal(self) -> NDArray[np.float32]:
        """The reward that inference may see, [tasks, rows]; no copy."""
        return self.reward if self.inference == "dense" else self.sparse_reward

    @classmethod
    def load(
        cls,
        folder: str | Path,
        tasks: Sequence[int],
        inference: Literal["dense", "sparse"] = "sparse",
        time_limit_terminal: bool = False,
    ) -> TaskData:
        """Read the files of ``tasks`` in a dataset folder, each compared with the folder's manifest.

        Args:
            folder: ``data/datasets/<name>``.
            tasks: task indices.
            inference: which reward inference may see.
            time_limit_terminal: count time-limit ends as terminal, as the released FOCAL code does.

        Raises:
            UserError: a file is missing or damaged, or tasks differ in their number of rows.
        """
        paths = verified(folder, [f"task={task:03d}.parquet" for task in tasks])
        shapes: dict[str, tuple[int, ...]] = {}
        fields: dict[str, NDArray[np.float32]] = {}
        order: dict[str, list[NDArray[np.int64]]] = {"checkpoint": [], "step": [], "start": [], "end": []}
        table = np.zeros((0, 0, 0), dtype=np.float32)
        for place, path in enumerate(paths):
            columns = read_transitions(path, [*_COLUMNS, *_ORDERED])
            terminal = columns.pop("terminated")
            truncated = columns.pop("truncated")
            columns["terminal"] = (terminal | truncated if time_limit_terminal else terminal).astype(np.float32)
            ordered = {name: columns.pop(name) for name in _ORDERED}
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
            order["checkpoint"].append(ordered["checkpoint"])
            order["step"].append(ordered["step"])
            start, end = episode_bounds(*(ordered[name] for name in _ORDERED))
            order["start"].append(start)
            order["end"].append(end)
        for name in ("reward", "terminal", "sparse_reward"):
            fields[name] = fields[name][..., 0]
        stacked = {name: np.stack(values) for name, values in order.items()}
        return cls(
            tuple(tasks),
            observation=fields["observation"],
            action=fields["action"],
            reward=fields["reward"],
            sparse_reward=fields["sparse_reward"],
            next_observation=fields["next_observation"],
            terminal=fields["terminal"],
            checkpoint=stacked["checkpoint"].astype(np.int32),
            step=stacked["step"].astype(np.int32),
            start=stacked["start"],
            end=stacked["end"],
            inference=inference,
            table=table,
        )

    @classmethod
    def of_columns(
        cls,
        tasks: Sequence[int],
        columns: Sequence[Columns],
        inference: Literal["dense", "sparse"],
        time_limit_terminal: bool = False,
    ) -> TaskData:
        """Return the data of every task's columns (``omrl.data.schema``), the same number of rows of each."""
        terminal = [c["terminated"] | c["truncated"] if time_limit_terminal else c["terminated"] for c in columns]
        bounds = [episode_bounds(*(c[name] for name in _ORDERED)) for c in columns]
        names = ("observation", "action", "reward", "next_observation", "sparse_reward", "checkpoint", "step")
        stacked: dict[str, Any] = {name: np.stack([c[name] for c in columns]) for name in names}
        return cls(
            tuple(tasks),
            **stacked,
            terminal=np.stack(terminal).astype(np.float32),
            start=np.stack([start for start, _ in bounds]),
            end=np.stack([end for _, end in bounds]),
            inference=inference,
        )

    def followed_by(self, more: TaskData) -> TaskData:
        """Return the data of the same tasks with further rows behind them; columns of a method are left out."""
        names = (*ORDER, "checkpoint", "step")
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(more, name)], axis=1) for name in names
        }
        for name in ("start", "end"):
            joined[name] = np.concatenate([getattr(self, name), getattr(more, name) + self.rows], axis=1)
        return replace(self, **joined, extra=None, table=None)

    @classmethod
    def of_bags(
        cls,
        tasks: Sequence[int],
        *,
        observation: NDArray[np.float32],
        action: NDArray[np.float32],
        reward: NDArray[np.float32],
        sparse_reward: NDArray[np.float32],
        next_observation: NDArray[np.float32],
        terminal: NDArray[np.float32],
        inference: Literal["dense", "sparse"] = "sparse",
    ) -> TaskData:
        """Return data whose rows have no order: every row is an episode of its own."""
        shape = reward.shape
        rows = np.broadcast_to(np.arange(shape[1]), shape)
        zero = np.zeros(shape, dtype=np.int32)
        return cls(
            tuple(tasks), observation, action, reward, sparse_reward, next_observation, terminal,
            zero, zero, rows, rows + 1, inference,
        )  # fmt: skip

    def next_actions(self) -> NDArray[np.float32]:
        """Return the action of the next row of the same episode, [tasks, rows, width]; NaN after an episode's last.

        Raises:
            UserError: no row has a next one, as in a set of single relabelled rows.
        """
        rows = np.arange(self.rows)
        following = self.action[:, np.minimum(rows + 1, self.rows - 1)].copy()
        following[rows + 1 >= self.end] = np.nan
        if np.isnan(following).all():
            raise UserError(
                "a method asks for the data's next actions (regularization.value_penalty at the next state), and these "
                "data are single rows; expected whole episodes, as relabel.<name>.unit: episode makes them"
            )
        return following

    def with_columns(self, columns: Mapping[str, NDArray[np.float32]]) -> TaskData:
        """Return the data with further columns [tasks, rows, width] (or [tasks, rows])."""
        shaped = {n: v if v.ndim == 3 else v[..., None] for n, v in columns.items()}
        return replace(self, extra={**(self.extra or {}), **shaped})

    def of(self, places: Sequence[int]) -> TaskData:
        """Return a copy with the given tasks alone, by place."""
        chosen = list(places)
        names = (*ORDER, "checkpoint", "step", "start", "end")
        extra = None if self.extra is None else {name: values[chosen] for name, values in self.extra.items()}
        return replace(
            self,
            tasks=tuple(self.tasks[i] for i in chosen),
            **{name: getattr(self, name)[chosen] for name in names},
            extra=extra,
            table=None,
        )

    def packed(self) -> NDArray[np.float32]:
        """Return all columns side by side, as in ``ORDER``, float32 [tasks, rows, width]; no copy if loaded."""
        if self.table is not None:
            return self.table
        parts = [getattr(self, name) for name in ORDER]
        return np.concatenate([part if part.ndim == 3 else part[..., None] for part in parts], axis=2)

    def take(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """Return the fields of an experience made of given rows, int64 [tasks, ...] -> [tasks, ..., width]."""
        place = np.arange(len(rows)).reshape(-1, *[1] * (rows.ndim - 1))
        names = ("observation", "action", "reward", "next_observation", "terminal", "signal", "step")
        fields = {name: getattr(self, name)[place, rows] for name in names}
        return fields | {name: values[place, rows] for name, values in (self.extra or {}).items()}

    def episodes(self, place: int) -> NDArray[np.int64]:
        """Return [first row, row after the last] of every episode of the task at ``place``, int64 [episodes, 2]."""
        first = np.unique(self.start[place])
        return np.stack([first, self.end[place][first]], axis=1)


def episode_bounds(
    source: NDArray[np.int32], checkpoint: NDArray[np.int32], episode: NDArray[np.int32], step: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for every row, the first row of its episode and the row after its last, int64 [rows].

    Rows are of one episode while source task, checkpoint and episode stay and steps count up by one: where
    single rows were drawn, every gap begins another.
    """
    rows = len(step)
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    new = step[1:] != step[:-1] + 1
    for column in (source, checkpoint, episode):
        new |= column[1:] != column[:-1]
    first = np.flatnonzero(np.r_[True, new])
    lengths = np.diff(np.r_[first, rows])
    return np.repeat(first, lengths), np.repeat(first + lengths, lengths)
