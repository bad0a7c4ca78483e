"""Experience made by hand, for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from omrl.algorithms.base import Algorithm, Phase
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
