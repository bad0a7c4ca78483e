"""Configuration of behavior training, and the resumable way from a shard of tasks to its checkpoints."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from omrl.core import layout, seeding
from omrl.core.config import Config
from omrl.core.files import atomic_dir, canonical, input_hashes, read_input, scratch, write_manifest
from omrl.core.precision import Kernels
from omrl.envs.base import Array, Family, Task
from omrl.envs.simulate import episodes

PROGRESS = "progress.csv"
SCRIPT = "script.json"  # what acts where nothing is trained
SCRIPT_STEPS = (0, 1)  # its "checkpoints": random skills, what the task wants
ENGINES = ("batched", "sb3", "scripted")  # modules of this package
EVALUATION_EPISODES = 5  # behind a return in progress.csv
_PACKAGES = ("gymnasium", "mujoco", "numpy", "stable_baselines3", "torch")


class SacConfig(Config):
    """Soft actor-critic, by the names of ``stable_baselines3.SAC``.

    Attributes:
        learning_rate: of actor, critics and temperature (Adam).
        batch_size: transitions per gradient step.
        gamma: discount. FOCAL's release trains every behavior policy with 0.99; 0.9 is what it meta-trains the
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
    learning_starts: Annotated[int, Field(ge=0, le=10**8)] = 200
    ent_coef: str | float = "auto_0.1"
    net_arch: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=16)] = [64, 64]
    buffer_size: Annotated[int, Field(ge=1, le=10**7)] | None = None
    train_freq: Annotated[int, Field(ge=1, le=10**6)] = 1
    gradient_steps: Annotated[int, Field(ge=1, le=10_000)] = 1

    def temperature(self) -> tuple[float, bool]:
        """Return the initial temperature and whether it is learned."""
        if isinstance(self.ent_coef, str):
            return float(self.ent_coef.removeprefix("auto").removeprefix("_") or 1.0), True
        return self.ent_coef, False

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
        engine: ``sb3``, one ``stable_baselines3.SAC`` process per task, or ``batched``, all tasks as one stacked
            computation: the same algorithm, several times faster, other random numbers. ``scripted`` trains
            nothing, the family's script acts (``rollouts.source: scripted``), and no other key may be given.
        total_steps: environment steps per task.
        checkpoint_every: steps between checkpoints; divides ``total_steps``. Step 0, untrained, is kept too.
        horizon: steps of a training episode.
        keep_replay: also keep every transition of the runs, for ``rollouts.source: replay``.
        matmul: of the ``batched`` engine: ``float32``, or ``fast``: other kernels where as exact, see
            ``omrl.core.precision``; other bits.
        device: of the ``batched`` engine's networks: ``cpu``, or ``cuda``, where all tasks are one group.
        sac: hyperparameters.
    """

    engine: Literal["sb3", "batched", "scripted"] = "batched"
    total_steps: Annotated[int, Field(ge=1, le=10**7)] = 2000
    checkpoint_every: Annotated[int, Field(ge=1, le=10**8)] = 250
    horizon: Annotated[int, Field(ge=1, le=100_000)] = 200
    keep_replay: bool = False
    matmul: Kernels = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    sac: SacConfig = SacConfig()

    @model_validator(mode="after")
    def _grid(self) -> BehaviorConfig:
        if self.engine == "scripted":
            if others := sorted(self.model_fields_set - {"engine"}):
                raise ValueError(f"{others[0]} with engine = scripted: expected no other key, a script is not trained")
            return self
        if self.total_steps % self.checkpoint_every:
            raise ValueError(
                f"total_steps = {self.total_steps} is not a multiple of checkpoint_every = {self.checkpoint_every}: "
                "expected the last step on the checkpoint grid"
            )
        if self.total_steps // self.checkpoint_every > 10_000:
            raise ValueError(
                f"total_steps = {self.total_steps} with checkpoint_every = {self.checkpoint_every}: expected at most "
                "10,000 checkpoints"
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
        if self.engine == "sb3" and (self.matmul, self.device) != ("float32", "cpu"):
            raise ValueError(
                f"matmul = {self.matmul}, device = {self.device} with engine = sb3: expected float32 and cpu; only "
                "the batched engine chooses"
            )
        if (self.matmul, self.device) == ("fast", "cuda"):
            raise ValueError("matmul = fast with device = cuda: expected float32; fast kernels are found on the CPU")
        return self

    def checkpoint_steps(self) -> list[int]:
        """Return the environment steps at which checkpoints are kept: 0, checkpoint_every, ..., total_steps.

        A script's are 0, random skills, and 1, what the task wants.
        """
        if self.engine == "scripted":
            return list(SCRIPT_STEPS)
        return list(range(0, self.total_steps + 1, self.checkpoint_every))

    def resolved(self) -> dict[str, Any]:
        """Return every value that has an effect, defaults included, as JSON types."""
        return {"engine": self.engine} if self.engine == "scripted" else super().resolved()


def task_folder(task: int) -> str:
    """Return the folder name of a task in its shard: ``task=003``."""
    return f"task={task:03d}"


def checkpoint_name(step: int) -> str:
    """Return the file name of a checkpoint: ``step=000250.zip``."""
    return f"step={step:06d}.zip"


def replay_name(last: int) -> str:
    """Return the file name of the transitions up to environment step ``last``: ``replay=000250.parquet``."""
    return f"replay={last:06d}.parquet"


def behavior_seed(seed: int, env: str, task: int) -> int:
    """Return the seed of a task's SAC run. (The release gave every task seed 0: correlated policies.)"""
    return seeding.integer(seed, "behavior", env, task)


LOSSES = ("actor_loss", "critic_loss", "ent_coef")
PROGRESS_HEADER = ",".join(["step", "gradient_steps", "return", *LOSSES])


def progress_line(step: int, updates: int, values: Sequence[float]) -> str:
    """Return a line of ``progress.csv``: mean return, then the ``LOSSES`` if there was an update."""
    shown = [f"{value:.9g}" if math.isfinite(value) else "" for value in values]
    shown += [""] * (1 + len(LOSSES) - len(shown))
    return ",".join([str(step), str(updates), *shown])


def evaluate(
    family: Family, tasks: Sequence[Task], seeds: Sequence[int], act: Callable[[Array, int], Array]
) -> NDArray[np.float64]:
    """Return every task's mean reported return over ``EVALUATION_EPISODES`` test episodes, [N].

    Args:
        family: environment.
        tasks: N of them.
        seeds: of the tasks' runs; they draw the starts.
        act: (observations [N * EVALUATION_EPISODES, width], a task's side by side, step) -> actions.
    """
    starts = [seeding.generator(seed, "progress", i) for seed in seeds for i in range(EVALUATION_EPISODES)]
    ran = episodes(family.batch(tasks, EVALUATION_EPISODES), act, family.horizon, starts)
    return ran.returns(family.returns == "sparse").reshape(len(tasks), -1).mean(1)


def named(values: Sequence[float]) -> dict[str, float]:
    """Return the values of a line of ``progress.csv`` by name: the return, then the ``LOSSES`` that there are."""
    return {name: value for name, value in zip(("return", *LOSSES), values, strict=False) if math.isfinite(value)}


@dataclass(frozen=True)
class Run:
    """One task to train a behavior policy for.

    Attributes:
        index: of the task.
        task: its parameters.
        seed: of this run.
        folder: where the finished work goes, by one rename.
    """

    index: int
    task: dict[str, Any]
    seed: int
    folder: str


class Engine(Protocol):
    """What a module ``omrl.behavior.<engine>`` has to offer as ``train``."""

    def __call__(
        self,
        env: str,
        env_config: dict[str, Any],
        runs: list[Run],
        config: BehaviorConfig,
        work: Path,
        description: str,
        finished: int,
    ) -> None:
        """Train every run and publish its folder.

        Args:
            env: family name.
            env_config: its configuration.
            runs: what is left to do.
            config: section ``behavior``.
            work: folder for unfinished work, kept between runs with the same inputs.
            description: shown with the progress.
            finished: tasks of an earlier run.
        """


def build_shard(
    train: Engine,
    *,
    shard: str,
    env: str,
    env_config: dict[str, Any],
    config: BehaviorConfig,
    seed: int,
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Train the behavior policies of a shard and publish them as one folder.

    Every task is trained in a scratch folder named by the hash of all its inputs and published there by one
    rename, so a run that was killed continues with the tasks it had not finished, and the final bytes are
    those of an uninterrupted run.

    Args:
        train: the engine.
        shard: name; ``data/tasks/<shard>.json`` holds its tasks.
        env: family name.
        env_config: its configuration.
        config: section ``behavior``.
        seed: root seed.
        code: fingerprint files this training depends on.
        target: ``data/behavior/<shard>``.
    """
    tasks_file = layout.tasks(shard)
    tasks = read_input(tasks_file)["tasks"]
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
        runs = [
            Run(
                t["index"],
                t["parameters"],
                behavior_seed(seed, env, t["index"]),
                str(work / _scratch_name(t["index"], t["parameters"])),
            )
            for t in tasks
        ]
        todo = [run for run in runs if not Path(run.folder).exists()]
        train(env, env_config, todo, config, work, f"behavior {shard}", len(runs) - len(todo))
        with atomic_dir(target) as folder:
            for run in runs:
                shutil.copytree(run.folder, folder / task_folder(run.index))
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
                    "run_seeds": {str(run.index): run.seed for run in runs},
                },
                files={f"{task_folder(run.index)}/{name}": None for run in runs for name in _files(config)},
                packages=_PACKAGES,
            )


def _files(config: BehaviorConfig) -> list[str]:
    """Return the names of the files that a run leaves."""
    if config.engine == "scripted":
        return [PROGRESS, SCRIPT]
    steps = config.checkpoint_steps()
    return [PROGRESS, *map(checkpoint_name, steps), *(map(replay_name, steps[1:]) if config.keep_replay else ())]


def _scratch_name(index: int, parameters: Mapping[str, Any]) -> str:
    return f"{task_folder(index)}-{hashlib.sha256(canonical(parameters).encode()).hexdigest()[:12]}"
