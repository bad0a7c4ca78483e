"""The sampler: serves what a phase's draws ask for, from datasets in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omrl.algorithms.base import Draw, Phase
from omrl.core import seeding
from omrl.data.taskdata import ORDER, TaskData
from omrl.nets.experience import Experience

_SCALARS = ("reward", "terminal", "sparse_reward")


@dataclass
class _Table:
    """A dataset on the device: all columns side by side, [tasks * rows, width]; and where episodes lie."""

    data: TaskData
    flat: Tensor
    widths: list[int]
    names: list[str]
    step: Tensor
    end: Tensor  # of the row's episode, in rows of the whole table
    first: Tensor  # of every episode, in rows of the whole table
    counts: Tensor  # episodes before those of each task, [tasks + 1]
    longest: int
    mean: float  # steps of an episode


def _table(data: TaskData, device: torch.device) -> _Table:
    tasks, rows = data.reward.shape
    widths = [1 if getattr(data, n).ndim == 2 else getattr(data, n).shape[2] for n in ORDER]
    parts = [data.packed()]
    names = list(ORDER)
    for name, values in (data.extra or {}).items():
        parts.append(values)
        names.append(name)
        widths.append(values.shape[-1])
    packed = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    base = np.arange(tasks)[:, None] * rows
    first = [np.unique(data.start[i]) + i * rows for i in range(tasks)]
    return _Table(
        data,
        torch.from_numpy(packed).reshape(tasks * rows, -1).to(device),
        widths,
        names,
        torch.from_numpy(data.step.reshape(-1).astype(np.int64)).to(device),
        torch.from_numpy((data.end + base).reshape(-1)).to(device),
        torch.from_numpy(np.concatenate(first)).to(device),
        torch.from_numpy(np.cumsum([0, *map(len, first)])).to(device),
        int((data.end - data.start).max()),
        tasks * rows / sum(map(len, first)),
    )


class Sampler:
    """Draws meta-batches from datasets in memory.

    A draw of rows is one gather of a table that lies on the device. Tasks are drawn with replacement where the phase
    says so; rows, windows and episodes uniformly with replacement.

    Args:
        data: the training tasks' transitions.
        seed: of the draws.
        device: where the table lies.
        context: the same tasks' transitions in the ``context`` dataset, where it is another one.
    """

    def __init__(self, data: TaskData, seed: int, device: torch.device, context: TaskData | None = None) -> None:
        self._device = device
        self._transitions = _table(data, device)
        self._context = self._transitions if context is None else _table(context, device)
        self._tasks = len(data.tasks)
        self.generator = torch.Generator(device).manual_seed(seeding.integer(seed, "sampler"))

    @property
    def data(self) -> TaskData:
        """The transitions' dataset."""
        return self._transitions.data

    @property
    def context(self) -> TaskData | None:
        """The contexts' dataset, where it is another one."""
        return None if self._context is self._transitions else self._context.data

    def add(self, columns: dict[str, TaskData]) -> None:
        """Take datasets with further columns in the place of ``transitions`` or ``context``."""
        if "transitions" in columns:
            same = self._context is self._transitions
            self._transitions = _table(columns["transitions"], self._device)
            self._context = self._transitions if same else self._context
        if "context" in columns:
            self._context = _table(columns["context"], self._device)

    def _integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self._device)

    def _experience(self, table: _Table, index: Tensor, tasks: Tensor, valid: Tensor | None) -> Experience:
        drawn = table.flat.index_select(0, index.reshape(-1)).view(*index.shape, -1)
        parts = dict(zip(table.names, drawn.split(table.widths, dim=-1), strict=True))
        for name in _SCALARS:
            parts[name] = parts[name].squeeze(-1)
        sparse = parts.pop("sparse_reward")
        fields = {name: parts.pop(name) for name in ORDER if name != "sparse_reward"}
        signal = fields["reward"] if table.data.inference == "dense" else sparse
        step = None if valid is None else table.step.index_select(0, index.reshape(-1)).view(index.shape)
        return Experience(**fields, signal=signal, task=tasks, step=step, valid=valid, extra=parts)

    def _draw(self, tasks: Tensor, draw: Draw) -> Experience:
        table = self._context if draw.source == "context" else self._transitions
        rows = table.data.rows
        if draw.unit == "episode":
            count = table.counts[tasks + 1] - table.counts[tasks]
            drawn = draw.count(table.mean)
            share = torch.rand((len(tasks), drawn), generator=self.generator, device=self._device)
            place = (share * count[:, None]).long().clamp_(max=count[:, None] - 1)
            first = table.first[table.counts[tasks][:, None] + place]
            length = min(abs(draw.length) or table.longest, table.longest)
            if draw.length < 0:
                first = torch.maximum(first, table.end[first] - length)
        else:
            first = tasks[:, None] * rows + self._integers(rows, (len(tasks), draw.rows))
            if draw.unit == "row":
                return self._experience(table, first, tasks, None)
            length = draw.length
        index = first.unsqueeze(-1) + torch.arange(length, device=self._device)
        end = table.end[first].unsqueeze(-1)
        return self._experience(table, torch.minimum(index, end - 1), tasks, (index < end).float())

    def draw(self, phase: Phase) -> dict[str, Experience]:
        """Return what one update of the phase draws, by the names in ``phase.draws``.

        Without replacement, at most as many tasks as there are.
        """
        if phase.replace:
            tasks = self._integers(self._tasks, (phase.meta_batch,))
        else:
            order = torch.randperm(self._tasks, generator=self.generator, device=self._device)
            tasks = order[: phase.meta_batch]
        return {name: self._draw(tasks, draw) for name, draw in phase.draws.items()}
