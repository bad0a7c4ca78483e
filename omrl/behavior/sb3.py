"""The ``sb3`` engine: ``stable_baselines3.SAC``, one process per task. The only module that imports it.

The policy is trained on the dense reward (the sparse one is never seen: FOCAL's behavior policies were
trained so, and SAC fails on it); ends by time limit are not terminal.
"""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from omrl.behavior.base import (
    LOSSES,
    PROGRESS,
    PROGRESS_HEADER,
    BehaviorConfig,
    Run,
    checkpoint_name,
    evaluate,
    named,
    progress_line,
    task_folder,
)
from omrl.behavior.replay import ReplayWriter
from omrl.core import events
from omrl.core.files import atomic_dir, atomic_path, package_versions, write_text
from omrl.core.parallel import run_tasks
from omrl.envs.base import Family, StepResult, Task, load_family

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
# what depends on the clock or on the moment of saving; SAC.load gives each its initial value
_VOLATILE = [
    "start_time",
    "ep_info_buffer",
    "ep_success_buffer",
    "_last_obs",
    "_last_episode_starts",
    "_last_original_obs",
]


def save_checkpoint(model: SAC, path: str | Path) -> None:
    """Write ``model`` as a standard SB3 zip whose bytes depend on the model alone.

    SB3 itself stamps entry dates, the start time, episode wall times, a description of the machine, and, in
    comments that loading ignores, memory addresses. The optimizers' states are kept (they double the file):
    ``SAC.load`` insists on them, and training can be continued.
    """
    buffer = io.BytesIO()
    model.save(buffer, exclude=_VOLATILE)
    with (
        zipfile.ZipFile(buffer) as source,
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as target,
    ):
        for name in sorted(source.namelist()):
            content = source.read(name)
            if name == "data":
                content = _canonical_data(content)
            elif name == "system_info.txt":
                versions = package_versions("gymnasium", "numpy", "stable_baselines3", "torch")
                content = "".join(f"- {key}: {value}\n" for key, value in versions.items()).encode()
            target.writestr(zipfile.ZipInfo(name, _ZIP_DATE), content)


def _canonical_data(content: bytes) -> bytes:
    data = json.loads(content)
    for key, value in data.items():
        if isinstance(value, dict) and ":serialized:" in value:
            data[key] = {":type:": value[":type:"], ":serialized:": value[":serialized:"]}
    return json.dumps(data, sort_keys=True, indent=1).encode()


def make_model(family: Family, task: Task, config: BehaviorConfig, seed: int) -> SAC:
    """Return an untrained SAC for ``task`` on the CPU."""
    sac = config.sac
    return SAC(
        "MlpPolicy",
        family.make(task, config.horizon),
        learning_rate=sac.learning_rate,
        buffer_size=sac.buffer_size or config.total_steps,
        learning_starts=sac.learning_starts,
        batch_size=sac.batch_size,
        tau=sac.tau,
        gamma=sac.gamma,
        train_freq=sac.train_freq,
        gradient_steps=sac.gradient_steps,
        ent_coef=sac.ent_coef,
        policy_kwargs={"net_arch": list(sac.net_arch)},
        seed=seed,
        device="cpu",
    )


def train_task(
    env: str, env_config: dict[str, Any], task: Task, config: dict[str, Any], seed: int, folder: str, index: int = 0
) -> None:
    """Train one task's policy and publish ``folder`` with its checkpoints and ``progress.csv``.

    Args:
        env: family name.
        env_config: its configuration.
        task: the task's parameters.
        config: a resolved ``BehaviorConfig``.
        seed: of this run.
        folder: where the finished work goes, by one rename.
        index: of the task, for kept transitions.
    """
    torch.set_num_threads(1)  # one and two threads give different weights
    family = load_family(env, env_config)
    behavior = BehaviorConfig.model_validate(config)
    model = make_model(family, task, behavior, seed)
    model.set_logger(Logger(folder=None, output_formats=[]))
    kept = KeepReplay(family, index, behavior) if behavior.keep_replay else None
    rows = [PROGRESS_HEADER]
    board = events.writer(f"behavior/{task_folder(index)}")
    with atomic_dir(folder) as work:
        for step in behavior.checkpoint_steps():
            if step:
                model.learn(
                    behavior.checkpoint_every, callback=kept, log_interval=sys.maxsize, reset_num_timesteps=False
                )
                if kept is not None:
                    kept.writer.write([work], step)
            save_checkpoint(model, work / checkpoint_name(step))
            losses = [model.logger.name_to_value.get(f"train/{name}") for name in LOSSES]
            values = [_mean_return(model, family, task, seed), *(math.nan if x is None else float(x) for x in losses)]
            board.scalars(step, named(values))
            rows.append(progress_line(step, model._n_updates, values))
        write_text(work / PROGRESS, "\n".join(rows) + "\n")


class KeepReplay(BaseCallback):
    """Keeps every transition of a run."""

    def __init__(self, family: Family, index: int, config: BehaviorConfig) -> None:
        super().__init__()
        self.writer = ReplayWriter(family, [index], config.checkpoint_every)
        self._age, self._episode = np.zeros(1, np.int64), np.zeros(1, np.int64)

    def _on_step(self) -> bool:
        values, info = self.locals, self.locals["infos"][0]
        before, ended = np.asarray(self.model._last_obs), bool(values["dones"][0])
        late = ended and info["TimeLimit.truncated"]
        following = info["terminal_observation"][None] if ended else values["new_obs"]
        result = StepResult(
            following,
            values["rewards"],
            np.array([info["sparse_reward"]], dtype=np.float32),
            np.array([ended and not late]),
            info.get("features", np.zeros(0, dtype=np.float32))[None],
        )
        action = values["buffer_actions"]
        taken = self.num_timesteps - 1
        self.writer.add(taken, self._age, self._episode, before, action, result, np.array([late]))
        self._age = np.zeros(1, np.int64) if ended else self._age + 1
        self._episode = self._episode + ended
        return True


def train(
    env: str,
    env_config: dict[str, Any],
    runs: list[Run],
    config: BehaviorConfig,
    work: Path,
    description: str,
    finished: int,
) -> None:
    """Train the tasks of ``runs``, one process each; see ``omrl.behavior.base.Engine``."""
    resolved = config.resolved()
    arguments = [(env, env_config, run.task, resolved, run.seed, run.folder, run.index) for run in runs]
    run_tasks(train_task, arguments, description=description, finished=finished)


def set_adam(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    steps: int,
    moments: dict[str, list[torch.Tensor]],
) -> None:
    """Give ``optimizer`` the state of Adam after ``steps`` steps.

    Args:
        optimizer: of an SB3 model.
        parameters: its parameters.
        steps: taken.
        moments: ``exp_avg`` and ``exp_avg_sq`` of every parameter; empty before the first step.
    """
    for place, parameter in enumerate(parameters):
        if moments:
            state = {name: values[place].detach().cpu().clone() for name, values in moments.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **state}


def set_counters(model: SAC, step: int, updates: int, episodes: int) -> None:
    """Tell ``model`` how far it has been trained elsewhere."""
    model.num_timesteps = model._total_timesteps = step
    model._n_updates, model._episode_num = updates, episodes


def _mean_return(model: SAC, family: Family, task: Task, seed: int) -> float:
    return float(evaluate(family, [task], [seed], lambda seen, _: model.predict(seen, deterministic=True)[0])[0])
