"""Experience: what a method is given to learn from, to adapt to and to observe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Experience:
    """Steps of several tasks, float32 [tasks, n, ...] as a bag, or [tasks, n, t, ...] as windows or episodes.

    Attributes:
        observation, action, next_observation: [..., width].
        reward: [...], the dense reward that actor and critic learn from.
        terminal: [...], 1 where a target does not bootstrap.
        signal: [...], the reward that inference may see: the family says whether it is the sparse one.
        task: int64 [tasks], places of the tasks in the training set; -1 where that means nothing.
        step: int64 [...], place in the episode.
        valid: [...], 1 for steps that were made, 0 for padding of a window or an episode; None for all.
        extra: columns that the method computed once from whole episodes, see ``Algorithm.columns``.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminal: Tensor
    signal: Tensor
    task: Tensor
    step: Tensor | None = None
    valid: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """[tasks, n] or [tasks, n, t]."""
        return self.reward.shape

    def rows(self, next_observation: bool) -> Tensor:
        """Return (s, a, signal), or (s, a, signal, s'), side by side: [..., width], an encoder's input."""
        parts = [self.observation, self.action, self.signal.unsqueeze(-1)]
        if next_observation:
            parts.append(self.next_observation)
        return torch.cat(parts, dim=-1)

    def _map(self, change: Any) -> Experience:
        changed = {name: change(getattr(self, name)) for name in _FIELDS}
        changed |= {name: None if (x := getattr(self, name)) is None else change(x) for name in ("step", "valid")}
        return replace(self, **changed, extra={name: change(values) for name, values in self.extra.items()})

    def part(self, first: int, last: int) -> Experience:
        """Return the steps (or windows) ``first`` to ``last`` - 1 of every task."""
        return self._map(lambda x: x[:, first:last])

    def select(self, chosen: Tensor) -> Experience:
        """Return the steps where ``chosen``, bool [n], the same of every task."""
        return self._map(lambda x: x[:, chosen])

    def of(self, places: Tensor) -> Experience:
        """Return the given tasks' steps, int64 [m]."""
        return replace(self._map(lambda x: x[places]), task=self.task[places])

    def to(self, device: torch.device) -> Experience:
        """Return it on another device."""
        return replace(self._map(lambda x: x.to(device)), task=self.task.to(device))

    def flat(self) -> Experience:
        """Return windows or episodes as bags [tasks, n * t, ...]; bags as they are. ``valid`` tells the padding."""
        if self.reward.ndim == 2:
            return self
        tasks = self.reward.shape[0]
        trailing = self.reward.ndim
        return self._map(lambda x: x.reshape(tasks, -1, *x.shape[trailing:]))


_FIELDS = ("observation", "action", "reward", "next_observation", "terminal", "signal")


def joined(parts: Sequence[Experience]) -> Experience:
    """Return bags of the same tasks as one, a part behind the other; they have the same columns."""
    first, *more = parts

    def both(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=1)

    if not more:
        return first
    extra = {name: torch.cat([part.extra[name] for part in parts], dim=1) for name in first.extra}
    return replace(first, **{name: both(name) for name in _FIELDS}, step=None, valid=None, extra=extra)


def from_arrays(
    columns: Mapping[str, NDArray[Any]], device: torch.device, task: NDArray[np.int64] | None = None
) -> Experience:
    """Return the experience of arrays by field name, [tasks, n, ...] or [tasks, n, t, ...].

    Args:
        columns: the fields of ``Experience``; further names become ``extra``. ``step`` and ``valid`` may be absent.
        device: where the tensors lie.
        task: places in the training set, [tasks]; -1 if absent.
    """

    def tensor(name: str) -> Tensor:
        kind = np.int64 if name == "step" else np.float32
        return torch.from_numpy(np.ascontiguousarray(columns[name], dtype=kind)).to(device)

    known = {name: tensor(name) for name in _FIELDS}
    extra = {name: tensor(name) for name in columns if name not in (*_FIELDS, "step", "valid")}
    places = np.full(len(known["reward"]), -1, dtype=np.int64) if task is None else task
    step, valid = (tensor(name) if name in columns else None for name in ("step", "valid"))
    return Experience(**known, task=torch.from_numpy(places).to(device), step=step, valid=valid, extra=extra)
