"""Behavior by a family's script: nothing is trained, and the rollouts let the script act.

Two "checkpoints" stand for what a script can do: at 0 every episode has a random skill among those that the task
allows, at 1 all do what the task wants. A task's folder holds what the script is and what it collects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from omrl.behavior.base import (
    EVALUATION_EPISODES,
    PROGRESS,
    PROGRESS_HEADER,
    SCRIPT,
    BehaviorConfig,
    Run,
    evaluate,
    progress_line,
)
from omrl.core import seeding
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, write_json, write_text
from omrl.core.progress import Progress
from omrl.envs.base import Array, Family, Task, load_family


class Script(Protocol):
    """What acts, as ``omrl.behavior.checkpoints.Actor`` does."""

    observation_size: int

    def sample(self, observation: Array, noise: Array) -> Array:
        """Return actions for the episodes with noise, float32 [B, action_size]."""

    def mean_action(self, observation: Array) -> Array:
        """Return actions for the episodes without, float32 [B, action_size]."""


@runtime_checkable
class Scripted(Protocol):
    """A family with a script."""

    def script(self, task: Task, own: bool, sampled: int, plain: int, rng: np.random.Generator) -> Script:
        """Return what acts in ``sampled`` episodes with noise and ``plain`` ones without.

        Args:
            task: its parameters.
            own: do what the task wants, else a random skill in every episode.
            sampled: episodes with noise.
            plain: without.
            rng: draws the skills.
        """


def script_of(
    family: Family, task: Task, checkpoint: int, sampled: int, plain: int, rng: np.random.Generator
) -> Script:
    """Return the script of a family for one of its two "checkpoints".

    Raises:
        UserError: the family has none.
    """
    if not isinstance(family, Scripted):
        raise UserError(
            f"params.yaml: behavior.engine = scripted: '{family.name}' has no script; expected sb3 or batched"
        )
    return family.script(task, bool(checkpoint), sampled, plain, rng)


def _mean_return(family: Family, run: Run, checkpoint: int) -> float:
    """Return the script's mean return without noise over the steps of a test episode."""
    rng = seeding.generator(run.seed, "script", checkpoint)
    actor = script_of(family, run.task, checkpoint, 0, EVALUATION_EPISODES, rng)
    return float(evaluate(family, [run.task], [run.seed], lambda seen, _: actor.mean_action(seen))[0])


def train(
    env: str,
    env_config: dict[str, Any],
    runs: list[Run],
    config: BehaviorConfig,
    work: Path,
    description: str,
    finished: int,
) -> None:
    """Write down what acts, and its returns, for every run; see ``omrl.behavior.base.Engine``."""
    family = load_family(env, env_config)
    with Progress(len(runs), description, "tasks") as progress:
        for run in runs:
            lines = [progress_line(step, 0, [_mean_return(family, run, step)]) for step in config.checkpoint_steps()]
            with atomic_dir(run.folder) as folder:
                write_text(folder / PROGRESS, "\n".join([PROGRESS_HEADER, *lines]) + "\n")
                write_json(folder / SCRIPT, {"environment": family.spec(), "task": run.task, "scripted": True})
            progress.advance()
