"""Configuration of behavior training, and the resumable way from a shard of tasks to its checkpoints."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from omrl import seeding
from omrl.config import Config
from omrl.files import atomic_dir, canonical, input_hashes, read_json, scratch, write_manifest
from omrl.parallel import run_tasks

PROGRESS = "progress.csv"
_PACKAGES = ("gymnasium", "mujoco", "numpy", "stable_baselines3", "torch")


class SacConfig(Config):
    """Soft actor-critic, by the names of ``stable_baselines3.SAC``.

    Attributes:
        learning_rate: of actor, critics and temperature (Adam).
        batch_size: transitions per gradient step.
        gamma: discount. The release trains every behavior policy with 0.99; 0.9 is what it meta-trains the
            point robots with, and learns them several times faster.
        tau: rate of the target networks.
        learning_starts: uniform random steps before the first gradient step.
        ent_coef: temperature; ``auto`` or ``auto_<initial value>`` learns it.
        net_arch: hidden layers of actor and critics (ReLU).
        buffer_size: replay transitions; None for all of ``total_steps``.
        train_freq: environment steps between gradient steps.
        gradient_steps: gradient steps at a time.
    """

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 128
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.9
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    learning_starts: Annotated[int, Field(ge=0)] = 200
    ent_coef: str | float = "auto_0.1"
    net_arch: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [64, 64]
    buffer_size: Annotated[int, Field(ge=1)] | None = None
    train_freq: Annotated[int, Field(ge=1)] = 1
    gradient_steps: Annotated[int, Field(ge=1)] = 1

    @field_validator("ent_coef")
    @classmethod
    def _temperature(cls, value: str | float) -> str | float:
        if isinstance(value, str):
            start = value.removeprefix("auto").removeprefix("_")
            try:
                ok = value == "auto" or (value.startswith("auto_") and 0 < float(start) < math.inf)
            except ValueError:
                ok = False
        else:
            ok = value >= 0
        if not ok:
            raise ValueError("expected 'auto', 'auto_<initial value above 0>' or a number from 0")
        return value


class BehaviorConfig(Config):
    """Section ``behavior``.

    Attributes:
        engine: ``sb3``, one ``stable_baselines3.SAC`` process per task.
        total_steps: environment steps per task.
        checkpoint_every: steps between checkpoints; divides ``total_steps``. Step 0, untrained, is kept too.
        horizon: steps of a training episode.
        sac: hyperparameters.
    """

    engine: Literal["sb3"] = "sb3"
    total_steps: Annotated[int, Field(ge=1, le=10**8)] = 2000
    checkpoint_every: Annotated[int, Field(ge=1)] = 250
    horizon: Annotated[int, Field(ge=1)] = 200
    sac: SacConfig = SacConfig()

    @model_validator(mode="after")
    def _grid(self) -> BehaviorConfig:
        if self.total_steps % self.checkpoint_every:
            raise ValueError(
                f"total_steps = {self.total_steps} is not a multiple of checkpoint_every = {self.checkpoint_every}: "
                "expected the last step on the checkpoint grid"
            )
        if self.sac.learning_starts >= self.total_steps:
            raise ValueError(
                f"sac.learning_starts = {self.sac.learning_starts} leaves no step to learn: expected less than "
                f"total_steps = {self.total_steps}"
            )
        if self.checkpoint_every % self.sac.train_freq:
            raise ValueError(
                f"checkpoint_every = {self.checkpoint_every} is not a multiple of sac.train_freq = "
                f"{self.sac.train_freq}: SB3 stops only between its collections of train_freq steps"
            )
        return self

    def checkpoint_steps(self) -> list[int]:
        """Return the environment steps at which checkpoints are kept: 0, checkpoint_every, ..., total_steps."""
        return list(range(0, self.total_steps + 1, self.checkpoint_every))


def task_folder(task: int) -> str:
    """Return the folder name of a task in its shard: ``task=003``."""
    return f"task={task:03d}"


def checkpoint_name(step: int) -> str:
    """Return the file name of a checkpoint: ``step=000250.zip``."""
    return f"step={step:06d}.zip"


def behavior_seed(seed: int, env: str, task: int) -> int:
    """Return the seed of a task's SAC run. (The release gave every task seed 0: correlated policies.)"""
    return seeding.integer(seed, "behavior", env, task)


TrainTask = Callable[[str, dict[str, Any], dict[str, Any], dict[str, Any], int, str], None]


def build_shard(
    train_task: TrainTask,
    *,
    shard: str,
    env: str,
    env_config: dict[str, Any],
    config: BehaviorConfig,
    seed: int,
    code: list[str],
    target: str | Path,
) -> None:
    """Train the behavior policies of a shard and publish them as one folder.

    Every task is trained in a scratch folder named by the hash of all its inputs and published there by one
    rename, so a run that was killed continues with the tasks it had not finished, and the final bytes are
    those of an uninterrupted run.

    Args:
        train_task: the engine's function (env, env_config, task parameters, config, seed, folder).
        shard: name; ``data/tasks/<shard>.json`` holds its tasks.
        env: family name.
        env_config: its configuration.
        config: section ``behavior``.
        seed: root seed.
        code: fingerprint files this training depends on.
        target: ``data/behavior/<shard>``.
    """
    tasks_file = f"data/tasks/{shard}.json"
    tasks = read_json(tasks_file)["tasks"]
    resolved = config.resolved()
    key = {
        "shard": shard,
        "env": env,
        "env_config": env_config,
        "config": resolved,
        "seed": seed,
        "code": input_hashes(*code),
    }
    with scratch("behavior", key, _PACKAGES) as work:
        folders = {t["index"]: work / _scratch_name(t["index"], t["parameters"]) for t in tasks}
        todo = [t for t in tasks if not folders[t["index"]].exists()]
        run_tasks(
            train_task,
            [
                (
                    env,
                    env_config,
                    t["parameters"],
                    resolved,
                    behavior_seed(seed, env, t["index"]),
                    str(folders[t["index"]]),
                )
                for t in todo
            ],
            description=f"behavior {shard}",
            finished=len(tasks) - len(todo),
        )
        with atomic_dir(target) as folder:
            names: dict[str, int | None] = {}
            expected = [PROGRESS, *(checkpoint_name(step) for step in config.checkpoint_steps())]
            for index, source in folders.items():
                shutil.copytree(source, folder / task_folder(index))
                names |= {f"{task_folder(index)}/{name}": None for name in expected}
            write_manifest(
                folder,
                kind="behavior",
                inputs=input_hashes(tasks_file, *code),
                parameters={
                    "env": env,
                    "env_config": env_config,
                    "behavior": resolved,
                    "seed": seed,
                    "threads": 1,
                    "run_seeds": {str(t["index"]): behavior_seed(seed, env, t["index"]) for t in tasks},
                },
                files=names,
                packages=_PACKAGES,
            )


def _scratch_name(index: int, parameters: Mapping[str, Any]) -> str:
    return f"{task_folder(index)}-{hashlib.sha256(canonical(parameters).encode()).hexdigest()[:12]}"
