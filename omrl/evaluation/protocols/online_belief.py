"""The belief goes on through several episodes, from knowing nothing (BOReL, VariBAD).

The belief starts from the method's own prior; the agent acts, observes each of its steps, and keeps the belief from one
episode to the next: nothing is adapted in between. Every episode is in the table, with the sum of the returns so far
beside it. ``counts`` says what is published: the ``last`` episode's return, or the ``sum`` over all, which also counts
what exploring cost; it is normalized by as many times the floor and the ceiling.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from omrl.envs.simulate import Episodes
from omrl.evaluation.protocols.base import ProtocolConfig, Run


class BeliefConfig(ProtocolConfig):
    """The keys of the protocol.

    Attributes:
        episodes: through which the belief goes on: 2 in BOReL, 4 on its grid.
        counts: which of them is the result: the ``last``, or the ``sum`` of all.
    """

    episodes: Annotated[int, Field(ge=1, le=10_000)] = 2
    counts: Literal["last", "sum"] = "last"


def run(run: Run) -> Episodes:
    """Run the protocol on all tasks at once; return the last episode."""
    config: BeliefConfig = run.config
    family, count = run.family, len(run.tasks)
    last: Episodes | None = None
    for repetition in range(run.repetitions):
        rngs = run.streams(repetition)
        belief = run.algorithm.prior(count)
        total, restated, seen = np.zeros(count), np.zeros(count), np.zeros(count, dtype=np.int64)
        for episode in range(config.episodes):
            last, belief = run.episode(belief, rngs)
            total += last.returns(family.returns == "sparse")
            counted = episode == config.episodes - 1
            more: dict[str, Any] = {"sum_return": total.tolist()}
            if counted and config.counts == "sum":
                each = total / config.episodes
                normalized = [float(family.normalize(t, r)) for t, r in zip(run.tasks, each, strict=True)]
                more |= {"return": total.tolist(), "normalized": normalized}
            run.add(repetition, episode, seen.tolist(), last, counted, **more)
            restated += [row["restated_return"] for row in run.rows[-count:]]
            if counted and config.counts == "sum":
                for row, value in zip(run.rows[-count:], restated.tolist(), strict=True):
                    row["restated_return"] = value
            seen += last.valid.sum(axis=1)
    if last is None:
        raise ValueError("no episode")
    return last


CONFIG = BeliefConfig
