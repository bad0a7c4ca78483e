"""Quality levels: which checkpoints' episodes make a dataset.

The papers name random, medium, expert and mixed and never define them. In the released FOCAL code a level is
a SAC step ("random" is an early checkpoint, not random actions) and "mixed" is all of them. Here a level is
written down, and the common names mean the same everywhere (``NAMES``). Normalized return is 0 for random actions
and 1 for the task's oracle, or for the best checkpoint of its own run where there is no oracle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from omrl.core import seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.data.schema import Columns, take


class LevelConfig(Config):
    """One quality level: ``steps``, ``nearest``, ``band`` or ``part``.

    Attributes:
        steps: SAC steps of the checkpoints, or ``first``, ``last``, ``all`` of those that are rolled out.
        nearest: normalized return (0 random actions, 1 the oracle or the best checkpoint); the checkpoint whose mean is
            nearest to it, chosen per task, of two the earlier.
        band: [low, high] of a checkpoint's mean normalized return, chosen per task.
        part: [from, to] of the run, as fractions of its checkpoints in order: [0, 0.2] is its start, [0.8, 1] its
            end (MACAW's data qualities are parts of the replay buffer).
        deterministic: also take episodes with mean actions.
    """

    steps: Literal["first", "last", "all"] | list[Annotated[int, Field(ge=0, le=10**8)]] | None = None
    nearest: Annotated[float, Field(ge=0, le=1)] | None = None
    band: list[float] | None = None
    part: list[float] | None = None
    deterministic: bool = False

    @model_validator(mode="after")
    def _one(self) -> LevelConfig:
        if sum(x is not None for x in (self.steps, self.nearest, self.band, self.part)) != 1:
            raise ValueError(
                "expected either steps (first, last, all, or a list of SAC steps) or nearest (a normalized return) or "
                "band ([low, high]) or part ([from, to])"
            )
        if self.part is not None and (len(self.part) != 2 or not 0 <= self.part[0] < self.part[1] <= 1):
            raise ValueError(f"part = {self.part}: expected [from, to] with 0 <= from < to <= 1")
        if self.band is not None and (len(self.band) != 2 or not self.band[0] <= self.band[1]):
            raise ValueError(f"band = {self.band}: expected [low, high] of normalized return with low <= high")
        if isinstance(self.steps, list) and (not self.steps or len(set(self.steps)) != len(self.steps)):
            raise ValueError(f"steps = {self.steps}: expected different SAC steps, at least one")
        return self

    def brief(self) -> str:
        """Return the definition as it stands in params.yaml: ``nearest: 0.5``."""
        given = {key: value for key, value in self.resolved().items() if value is not None and value is not False}
        return ", ".join(f"{key}: {value}" for key, value in given.items())


NAMES = {
    "random": LevelConfig(steps="first"),  # the untrained policy
    "medium": LevelConfig(nearest=0.5),
    "expert": LevelConfig(steps="last"),
    "mixed": LevelConfig(steps="all"),
    "replay": LevelConfig(steps="all"),  # of the run's own buffer, ``rollouts.source: replay``
}


class DatasetConfig(Config):
    """Section ``dataset``.

    Attributes:
        train: levels, relabelled sets or pairs to meta-train on, one model each.
        test: levels or relabelled sets that contexts come from in evaluation, of training and test tasks alike.
        transitions_per_task: rows of every task in every dataset.
        levels: name -> which checkpoints: one of ``steps``, ``nearest``, ``band`` and ``part``. The names random,
            medium, expert, mixed and replay must have the definitions of docs/data.md.
    """

    train: Annotated[list[str], Field(min_length=1, max_length=1000)]
    test: Annotated[list[str], Field(min_length=1, max_length=1000)]
    transitions_per_task: Annotated[int, Field(ge=1, le=10**7)] = 10000
    levels: dict[str, LevelConfig]

    @field_validator("levels")
    @classmethod
    def _some(cls, value: dict[str, LevelConfig]) -> dict[str, LevelConfig]:
        for name, level in value.items():
            if not name.replace("-", "").isalnum() or name != name.lower() or len(name) > 64:
                raise ValueError(f"{name!r} names a folder, use lower-case letters, digits and '-', at most 64")
            if level != NAMES.get(name, level):
                raise ValueError(
                    f"{name!r} is {{{NAMES[name].brief()}}} in every pipeline, not {{{level.brief()}}}; expected "
                    "another name for another definition, such as step-500 for {steps: [500]}"
                )
        if not value:
            raise ValueError("expected at least one level")
        return value


def check_levels(
    levels: Mapping[str, LevelConfig],
    checkpoint_steps: Sequence[int],
    sampled: int,
    deterministic: int,
    transitions_per_task: int,
    where: str,
) -> None:
    """Refuse levels that the rollouts cannot produce, before anything is trained.

    Args:
        levels: the levels by name.
        checkpoint_steps: SAC steps that are rolled out.
        sampled: rows of one checkpoint's episodes with sampled actions (an upper bound: episodes may end early).
        deterministic: the same with mean actions.
        transitions_per_task: rows wanted.
        where: prefix of messages.

    Raises:
        UserError: a step that is not rolled out, or more rows than there can be.
    """
    for name, level in levels.items():
        steps: list[int] = list(checkpoint_steps)
        if isinstance(level.steps, list):
            steps = level.steps
        if level.nearest is not None or level.steps in ("first", "last"):
            steps = steps[:1]  # one, whichever it is
        if level.part is not None:
            steps = part_of(steps, level.part)
            if not steps:
                raise UserError(f"{where}.levels.{name}.part = {level.part}: no checkpoint lies in it; widen it")
        for step in steps:
            if step not in checkpoint_steps:
                raise UserError(
                    f"{where}.levels.{name}.steps has {step}: no such checkpoint is rolled out; "
                    f"expected some of {_shown(checkpoint_steps)}"
                )
        rows = len(steps) * (sampled + (deterministic if level.deterministic else 0))
        if rows < transitions_per_task:
            raise UserError(
                f"{where}.transitions_per_task = {transitions_per_task}: level '{name}' has at most {rows} per task; "
                "raise rollouts.episodes_per_checkpoint or rollouts.horizon, or lower it"
            )


def check_names(
    levels: Mapping[str, LevelConfig], rolled_out: Sequence[int], saved: Sequence[int], source: str, where: str
) -> None:
    """Refuse the common names where the rollouts have not what they mean.

    Args:
        levels: the levels by name.
        rolled_out: SAC steps that are rolled out.
        saved: SAC steps of all checkpoints.
        source: ``rollouts.source``.
        where: prefix of messages.

    Raises:
        UserError: ``replay`` without replay, another common name with it, or without the first or last checkpoint.
    """
    for name in levels:
        if name not in NAMES:
            continue
        if (name == "replay") != (source == "replay"):
            expected = "the name replay, or one of your own" if source == "replay" else "rollouts.source = replay"
            raise UserError(f"{where}.levels.{name} with rollouts.source = {source}: expected {expected}")
        if name != "replay" and (rolled_out[0] != saved[0] or rolled_out[-1] != saved[-1]):
            raise UserError(
                f"{where}.levels.{name}: rollouts.steps has {_shown(rolled_out)}: expected the first and the last "
                f"checkpoint, {saved[0]} and {saved[-1]}, among them, or another name such as step-{rolled_out[-1]}"
            )


def part_of(steps: Sequence[int], part: Sequence[float]) -> list[int]:
    """Return the checkpoints in a part of the run: those at place i of n with from <= (i + 0.5)/n < to."""
    return [step for place, step in enumerate(steps) if part[0] <= (place + 0.5) / len(steps) < part[1]]


def _shown(steps: Sequence[int]) -> str:
    if len(steps) > 12:
        return f"{steps[0]}, {steps[1]}, {steps[2]}, ..., {steps[-1]}"
    return ", ".join(map(str, steps))


def choose_checkpoints(name: str, level: LevelConfig, task: int, normalized: Mapping[int, float]) -> list[int]:
    """Return the checkpoint steps of a level for one task.

    Args:
        name: of the level, for messages.
        level: its definition.
        task: index, for messages.
        normalized: step -> mean normalized return of that checkpoint's sampled episodes.

    Raises:
        UserError: a step is not in the rollouts, no checkpoint falls in the band, or there is no scale of returns.
    """
    steps = sorted(normalized)
    if level.steps == "all":
        return steps
    if level.steps in ("first", "last"):
        return [steps[0 if level.steps == "first" else -1]]
    if (level.nearest is not None or level.band is not None) and any(x != x for x in normalized.values()):
        key = "band" if level.nearest is None else "nearest"
        raise UserError(
            f"params.yaml: dataset.levels.{name}.{key} needs normalized returns: in task {task} neither the oracle nor "
            "a checkpoint collects more than random actions; expected steps or part there, or better behavior policies"
        )
    if level.nearest is not None:
        goal = level.nearest
        return [min(steps, key=lambda step: (abs(normalized[step] - goal), step))]
    if isinstance(level.steps, list):
        for step in level.steps:
            if step not in normalized:
                raise UserError(
                    f"params.yaml: dataset.levels.{name}.steps has {step}: the rollouts of task {task} have "
                    f"{_shown(steps)}"
                )
        return sorted(level.steps)
    if level.part is not None:
        chosen = part_of(steps, level.part)
        if not chosen:
            raise UserError(
                f"params.yaml: dataset.levels.{name}.part = {level.part}: none of the checkpoints of task {task} lies "
                f"in it; they are {_shown(steps)}"
            )
        return chosen
    low, high = level.band or (0.0, 0.0)
    found = [step for step in steps if low <= normalized[step] <= high]
    if not found:
        reached = ", ".join(f"{step}: {normalized[step]:.2f}" for step in steps)
        raise UserError(
            f"params.yaml: dataset.levels.{name}.band = [{low}, {high}]: no checkpoint of task {task} has a mean "
            f"normalized return in it; they have {reached}"
        )
    return found


def select(
    columns: Columns,
    checkpoints: Sequence[int],
    rows: int,
    level: LevelConfig,
    rng: np.random.Generator,
    what: str,
) -> Columns:
    """Return exactly ``rows`` transitions of the given checkpoints, in the order of the file.

    Whole episodes are drawn in a seeded order, in turn over the checkpoints so that each contributes the
    same; the last episode is cut at its end.

    Raises:
        UserError: there are fewer transitions than ``rows``.
    """
    usable = np.isin(columns["checkpoint"], list(checkpoints))
    if not level.deterministic:
        usable &= ~columns["deterministic"]
    if int(usable.sum()) < rows:
        raise UserError(
            f"params.yaml: dataset.transitions_per_task = {rows}: {what} has only {int(usable.sum())} transitions; "
            "raise rollouts.episodes_per_checkpoint or lower it"
        )
    index = np.flatnonzero(usable)
    return take(columns, index[draw_episodes(columns["checkpoint"][index], columns["episode"][index], rows, rng)])


def draw_episodes(
    checkpoint: NDArray[Any], episode: NDArray[Any], rows: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the places of ``rows`` transitions that make whole episodes, rising; the last one drawn is cut.

    Args:
        checkpoint: [N], sorted by (checkpoint, episode).
        episode: [N].
        rows: at most N.
        rng: draws the episodes, in turn over the checkpoints.
    """
    starts = np.flatnonzero(np.r_[True, (checkpoint[1:] != checkpoint[:-1]) | (episode[1:] != episode[:-1])])
    lengths = np.diff(np.r_[starts, len(checkpoint)])
    chosen = [np.zeros(0, dtype=np.int64)]
    missing = rows
    for place in _in_turn(checkpoint[starts], rng):
        if not missing:
            break
        taken = min(int(lengths[place]), missing)
        chosen.append(np.arange(starts[place], starts[place] + taken))
        missing -= taken
    return np.sort(np.concatenate(chosen))


def _in_turn(checkpoints: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a random order of episodes in which the checkpoints take turns."""
    draw = rng.random(len(checkpoints))
    turn = np.zeros(len(checkpoints), dtype=np.int64)
    for step in np.unique(checkpoints):
        members = np.flatnonzero(checkpoints == step)
        turn[members[np.argsort(draw[members])]] = np.arange(len(members))
    return np.lexsort((draw, turn))


def level_stream(seed: int, env: str, definition: str, task: int) -> np.random.Generator:
    """Return the stream that draws a task's episodes for a level, by what it is (``brief``), not by its name."""
    return seeding.generator(seed, "dataset", env, definition, task)
