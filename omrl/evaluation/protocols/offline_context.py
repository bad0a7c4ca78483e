"""Context from the task's offline dataset, never from the agent (FOCAL).

As in FOCAL's released code: before each episode, ``context_per_episode`` random transitions of the task's offline
dataset are appended to the context, with replacement, and the method adapts anew. The agent's own transitions never
enter the context. Episodes are deterministic, and the last one of a repetition counts.

With the counted episode the policy is also run with the context of another task (the next one of its split): a
method that uses what it infers loses return there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from omrl.algorithms.base import map_belief
from omrl.envs.simulate import Episodes
from omrl.evaluation.contexts import offline_context, transitions_of
from omrl.evaluation.protocols.base import ProtocolConfig, Run, other_task
from omrl.nets.experience import Experience


class OfflineConfig(ProtocolConfig):
    """The keys of an offline protocol.

    Attributes:
        context_per_episode: transitions appended to the context before each episode. A method that reads whole episodes
            gets about so many, Prompt-DT one prompt whatever stands here; the table has those that were shown.
        wrong_context: also run the counted episode with another task's context.
    """

    context_per_episode: Annotated[int, Field(ge=1, le=10**6)] = 20
    wrong_context: bool = True


def run_offline(run: Run, context_of: Callable[[int, list[np.random.Generator]], Experience]) -> Episodes:
    """Run the offline protocols, which differ in where the context is from.

    Args:
        run: the evaluation.
        context_of: (transitions, streams) -> the whole context of every task.

    Returns:
        The last episode.
    """
    config: OfflineConfig = run.config
    algorithm, others = run.algorithm, other_task(run.tasks)
    total = config.episodes * config.context_per_episode
    last: Episodes | None = None
    for repetition in range(run.repetitions):
        rngs = run.streams(repetition)
        whole = context_of(total, rngs)
        count = whole.shape[1]
        for episode in range(config.episodes - 1 if run.quick else 0, config.episodes):
            size = (episode + 1) * config.context_per_episode
            context = whole.part(0, max(1, -(-count * size // total)))
            belief = algorithm.adapt(algorithm.prior(len(rngs)), context)
            counted, wrong = episode == config.episodes - 1, None
            if counted and config.wrong_context and others is not None and not run.quick:
                index = torch.from_numpy(others).to(algorithm.device)
                moved = map_belief(lambda x, index=index: x[index], belief)
                wrong = run.episode(moved, run.streams(repetition, "wrong"))[0].returns(run.family.returns == "sparse")
            last, _ = run.episode(belief, run.streams(repetition, "starts", str(episode)))
            run.add(repetition, episode, transitions_of(context), last, counted, wrong)
    if last is None:
        raise ValueError("no episode")
    return last


def run(run: Run) -> Episodes:
    """Run the protocol on all tasks at once; return the last episode."""
    return run_offline(run, lambda total, rngs: offline_context(run.algorithm, run.data, total, rngs))


CONFIG = OfflineConfig
