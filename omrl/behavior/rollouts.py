"""Rollouts: every checkpoint of a behavior policy acts, all its episodes at once; transitions to Parquet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from omrl.behavior.base import SCRIPT, SCRIPT_STEPS, checkpoint_name, replay_name, task_folder
from omrl.core import layout, seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, input_hashes, read_input, read_manifest, scratch, sha256, write_manifest
from omrl.core.parallel import run_tasks
from omrl.data.parquet import (
    read_table,
    read_transitions,
    stream_transitions,
    verified,
    write_table,
    write_transitions,
)
from omrl.data.schema import Columns, concatenate
from omrl.envs.base import Array, Family, Task, load_family
from omrl.envs.simulate import Episodes, episodes

if TYPE_CHECKING:
    from omrl.behavior.checkpoints import Actor
    from omrl.behavior.scripted import Script

EPISODES = "episodes.parquet"
_SMALL = ("checkpoint", "episode", "step", "reward", "sparse_reward")  # what the episode table needs
_PACKAGES = ("mujoco", "numpy", "pyarrow", "torch")


class RolloutsConfig(Config):
    """Section ``rollouts``.

    Attributes:
        source: ``checkpoints`` act anew; ``replay``: the transitions of the SAC runs themselves
            (``behavior.keep_replay``), as MACAW's datasets are; then ``steps`` is ``all`` and the rest has no effect;
            ``scripted``: the family's script acts (``behavior.engine: scripted``), its "checkpoint" 0 a random skill
            in every episode, 1 what the task wants.
        steps: SAC steps of the checkpoints that act, or ``all``.
        episodes_per_checkpoint: episodes of every checkpoint with sampled actions.
        deterministic_episodes: further ones with the policy's mean action, for levels with ``deterministic: true``.
        horizon: steps of an episode.
    """

    source: Literal["checkpoints", "replay", "scripted"] = "checkpoints"
    steps: Literal["all"] | list[Annotated[int, Field(ge=0, le=10**8)]] = "all"
    episodes_per_checkpoint: Annotated[int, Field(ge=1, le=100_000)] = 50
    deterministic_episodes: Annotated[int, Field(ge=0, le=100_000)] = 1
    horizon: Annotated[int, Field(ge=1, le=100_000)] = 200

    @field_validator("steps")
    @classmethod
    def _some(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, list) and (not value or sorted(set(value)) != value):
            raise ValueError("expected 'all', or SAC steps in rising order")
        return value

    @model_validator(mode="after")
    def _whole(self) -> RolloutsConfig:
        if self.source == "replay" and self.steps != "all":
            raise ValueError(
                f"steps = {self.steps} with source = replay: expected all; dataset.levels.<name>.part chooses"
            )
        return self

    def checkpoint_steps(self, saved: list[int]) -> list[int]:
        """Return the steps that act, of those that behavior training saves.

        Raises:
            UserError: one of them is not saved.
        """
        if self.steps == "all":
            return saved
        for step in self.steps:
            if step not in saved:
                raise UserError(
                    f"params.yaml: rollouts.steps has {step}: behavior training saves no such checkpoint; expected "
                    f"multiples of behavior.checkpoint_every up to {saved[-1]}"
                )
        return [int(step) for step in self.steps]


def rollout(
    actor: Actor | Script,
    family: Family,
    task: Task,
    *,
    index: int,
    checkpoint: int,
    config: RolloutsConfig,
    seed: int,
) -> tuple[Columns, Columns]:
    """Let one checkpoint act in all its episodes at once.

    Args:
        actor: the policy.
        family: environment.
        task: its parameters.
        index: task index, for the columns.
        checkpoint: SAC step, for the columns.
        config: how many episodes, how long.
        seed: of this checkpoint's rollouts.

    Returns:
        The transitions, ordered by (episode, step), and one row per episode. An episode's ``return`` is the
        reported return of its first ``family.horizon`` steps, the length of a test episode.

    Raises:
        UserError: the policy is of another environment, or its actions are not finite.
    """
    if actor.observation_size != family.observation_size:
        raise UserError(
            f"checkpoint of step {checkpoint}: its policy sees {actor.observation_size} numbers, expected "
            f"{family.observation_size} for '{family.name}'"
        )
    try:
        ran = _run(actor, family, task, config, seed)
    except FloatingPointError:
        raise UserError(
            f"task {index}, checkpoint of step {checkpoint}: its actions are not finite, so its training diverged; "
            "lower behavior.sac.learning_rate in params.yaml, or leave the step out of rollouts.steps"
        ) from None
    sampled = config.episodes_per_checkpoint
    return _transitions(ran, index, checkpoint, sampled), _table(ran, family, index, checkpoint, sampled, seed)


def _run(actor: Actor | Script, family: Family, task: Task, config: RolloutsConfig, seed: int) -> Episodes:
    """Step all episodes together.

    Raises:
        FloatingPointError: an action is not finite.
    """
    sampled, steps = config.episodes_per_checkpoint, config.horizon
    count = sampled + config.deterministic_episodes
    noise = seeding.generator(seed, "noise").standard_normal((steps, sampled, family.action_size), dtype=np.float32)

    def act(observation: Array, t: int) -> Array:
        action = np.empty((count, family.action_size), dtype=np.float32)
        action[:sampled] = actor.sample(observation[:sampled], noise[t])
        if sampled < count:
            action[sampled:] = actor.mean_action(observation[sampled:])
        if not np.isfinite(action).all():
            raise FloatingPointError
        return action

    starts = [seeding.generator(seed, "start", i) for i in range(count)]
    return episodes(family.batch([task], count), act, steps, starts)


def _transitions(ran: Episodes, index: int, checkpoint: int, sampled: int) -> Columns:
    """Return one row per step made, ordered by (episode, step)."""
    flat = ran.valid.reshape(-1)
    rows = int(flat.sum())
    episode, step = (grid.reshape(-1)[flat] for grid in np.indices(ran.valid.shape, dtype=np.int32))
    truncated = np.zeros_like(ran.valid)
    truncated[:, -1] = ran.valid[:, -1] & ~ran.terminated[:, -1]
    names = ("observation", "action", "reward", "sparse_reward", "next_observation")
    store = {name: getattr(ran, name) for name in names} | {"reward_features": ran.features}
    return {
        **{name: values.reshape(len(flat), *values.shape[2:])[flat] for name, values in store.items()},
        "task": np.full(rows, index, dtype=np.int32),
        "source_task": np.full(rows, index, dtype=np.int32),
        "checkpoint": np.full(rows, checkpoint, dtype=np.int32),
        "episode": episode,
        "step": step,
        "deterministic": episode >= sampled,
        "terminated": ran.terminated.reshape(-1)[flat],
        "truncated": truncated.reshape(-1)[flat],
    }


def _table(ran: Episodes, family: Family, index: int, checkpoint: int, sampled: int, seed: int) -> Columns:
    """Return one row per episode."""
    count = len(ran.valid)
    return {
        "episode": np.arange(count, dtype=np.int32),
        "task": np.full(count, index, dtype=np.int32),
        "checkpoint": np.full(count, checkpoint, dtype=np.int32),
        "deterministic": np.arange(count) >= sampled,
        "seed": np.full(count, seed, dtype=np.int64),
        "length": ran.valid.sum(axis=1).astype(np.int32),
        "return": ran.returns(family.returns == "sparse", family.horizon),
        "dense_return": ran.returns(False),
        "sparse_return": ran.returns(True),
    }


def from_replay(paths: Sequence[Path], target: Path, family: Family, index: int, seed: int, footer: Any) -> Columns:
    """Write the transitions of a SAC run as one file, streamed, and return one row per episode.

    The last episode is as long as the run let it be.

    Args:
        paths: what behavior training kept, in order.
        target: the file.
        family: environment.
        index: task index.
        seed: of the SAC run.
        footer: of the file.
    """
    known: list[Columns] = []

    def parts() -> Iterator[Columns]:
        for path in paths:
            part = read_transitions(path)
            known.append({name: part[name].copy() for name in _SMALL})
            yield part

    stream_transitions(target, parts(), footer)
    columns = concatenate(known)
    starts = np.flatnonzero(columns["step"] == 0)
    early = columns["step"] < family.horizon

    def returns(name: str, rows: NDArray[np.bool_]) -> Any:
        return np.add.reduceat(np.where(rows, columns[name].astype(np.float64), 0.0), starts)

    every = np.ones_like(early)
    return {
        "episode": columns["episode"][starts],
        "task": np.full(len(starts), index, dtype=np.int32),
        "checkpoint": columns["checkpoint"][starts],
        "deterministic": np.zeros(len(starts), dtype=np.bool_),
        "seed": np.full(len(starts), seed, dtype=np.int64),
        "length": np.diff(np.r_[starts, len(early)]).astype(np.int32),
        "return": returns("sparse_reward" if family.returns == "sparse" else "reward", early),
        "dense_return": returns("reward", every),
        "sparse_return": returns("sparse_reward", every),
    }


def rollout_task(
    env: str,
    env_config: dict[str, Any],
    task: Task,
    index: int,
    steps: list[int],
    config: dict[str, Any],
    seed: int,
    checkpoints: str,
    run_seed: int,
    folder: str,
) -> None:
    """Roll out a task's checkpoints and publish ``folder`` with its transitions and episode table."""
    import torch

    from omrl.behavior.checkpoints import load_actor
    from omrl.behavior.scripted import script_of

    torch.set_num_threads(1)
    family = load_family(env, env_config)
    resolved = RolloutsConfig.model_validate(config)
    scripted = resolved.source == "scripted"
    hashes = {str(step): sha256(Path(checkpoints) / (SCRIPT if scripted else checkpoint_name(step))) for step in steps}
    footer = {
        "environment": family.spec(),
        "task": task,
        "checkpoints": hashes,
        "parameters": {"rollouts": resolved.resolved(), "seed": seed},
    }
    with atomic_dir(folder) as work:
        target = work / "transitions.parquet"
        if resolved.source == "replay":
            kept = [Path(checkpoints) / replay_name(last) for last in steps[1:]]
            table = from_replay(kept, target, family, index, run_seed, footer)
        else:
            transitions, episodes = [], []
            for step in steps:
                own_seed = seeding.integer(seed, "rollouts", env, index, step)
                actor: Actor | Script
                if scripted:
                    counts = (resolved.episodes_per_checkpoint, resolved.deterministic_episodes)
                    actor = script_of(family, task, step, *counts, seeding.generator(own_seed, "skills"))
                else:
                    actor = load_actor(Path(checkpoints) / checkpoint_name(step))
                columns, table = rollout(
                    actor,
                    family,
                    task,
                    index=index,
                    checkpoint=step,
                    config=resolved,
                    seed=own_seed,
                )
                transitions.append(columns)
                episodes.append(table)
            write_transitions(target, concatenate(transitions), footer)
            table = concatenate(episodes)
        write_table(work / EPISODES, pa.table(table), {"environment": family.spec()})


def build_shard(
    *,
    shard: str,
    env: str,
    env_config: dict[str, Any],
    config: RolloutsConfig,
    seed: int,
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Roll out the checkpoints of a shard and publish them as one folder; resumable task by task.

    Args:
        shard: name; ``data/tasks/<shard>.json`` and ``data/behavior/<shard>`` are its inputs.
        env: family name.
        env_config: its configuration.
        config: section ``rollouts``.
        seed: root seed.
        code: fingerprint files this depends on.
        target: ``data/rollouts/<shard>``.

    Raises:
        UserError: a checkpoint is missing or damaged.
    """
    tasks_file, behavior = layout.tasks(shard), layout.behavior(shard)
    tasks = read_input(tasks_file)["tasks"]
    inputs = input_hashes(tasks_file, behavior, *code)
    steps, run_seeds = _inputs(behavior, [t["index"] for t in tasks], config)
    parameters = {"env": env, "env_config": env_config, "rollouts": config.resolved(), "seed": seed}
    with scratch("rollouts", {**parameters, "inputs": inputs}, _PACKAGES) as work:
        folders = {t["index"]: work / task_folder(t["index"]) for t in tasks}
        todo = [t for t in tasks if not folders[t["index"]].exists()]
        run_tasks(
            rollout_task,
            [
                (
                    env,
                    env_config,
                    t["parameters"],
                    t["index"],
                    steps,
                    config.resolved(),
                    seed,
                    str(behavior / task_folder(t["index"])),
                    run_seeds.get(str(t["index"]), 0),
                    str(folders[t["index"]]),
                )
                for t in todo
            ],
            description=f"rollouts {shard}",
            finished=len(tasks) - len(todo),
        )
        _publish(folders, load_family(env, env_config), inputs, {**parameters, "threads": 1}, target)


def _inputs(behavior: Path, tasks: Sequence[int], config: RolloutsConfig) -> tuple[list[int], Mapping[str, int]]:
    """Verify what behavior training left; return the steps that act, and the seeds of the SAC runs by task.

    Raises:
        UserError: a file is missing or damaged, or was made by another kind of engine.
    """
    facts = read_manifest(behavior)["parameters"]
    trained = facts["behavior"]
    scripted = config.source == "scripted"
    if (trained.get("engine") == "scripted") != scripted:
        raise UserError(
            f"params.yaml: rollouts.source = {config.source}: {behavior} was made by behavior.engine = "
            f"{trained.get('engine')}; expected both to be scripted, or neither"
        )
    saved = SCRIPT_STEPS if scripted else range(0, trained["total_steps"] + 1, trained["checkpoint_every"])
    steps = config.checkpoint_steps(list(saved))
    names = [SCRIPT] if scripted else [checkpoint_name(step) for step in steps]
    if config.source == "replay":
        names += [replay_name(last) for last in steps[1:]]
    verified(behavior, [f"{task_folder(task)}/{name}" for task in tasks for name in names])
    return steps, facts.get("run_seeds", {})


def _publish(
    folders: Mapping[int, Path], family: Family, inputs: dict[str, str], parameters: dict[str, Any], target: str | Path
) -> None:
    """Put the tasks' files together as one folder with its manifest."""
    with atomic_dir(target) as folder:
        rows: dict[str, int | None] = {}
        tables = []
        for index, source in folders.items():
            name = f"{task_folder(index)}.parquet"
            shutil.copyfile(source / "transitions.parquet", folder / name)
            tables.append(read_table(source / EPISODES))
            rows[name] = int(np.sum(tables[-1].column("length").to_numpy()))
        episodes = pa.concat_tables(tables)
        write_table(folder / EPISODES, episodes, {"environment": family.spec()})
        write_manifest(
            folder,
            kind="rollouts",
            inputs=inputs,
            parameters=parameters,
            files={**rows, EPISODES: episodes.num_rows},
            packages=_PACKAGES,
        )
