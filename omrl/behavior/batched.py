"""The ``batched`` engine: SAC for all tasks of a shard as one stacked computation.

Hyperparameters and semantics are those of ``stable_baselines3.SAC`` on one environment per task, and what is
kept is a standard SB3 checkpoint. Every task has its own random streams, named by its own seed, and the
initial networks are those that SB3 would draw. The tasks of a shard are divided among the cores, one process
with one thread each; a task's bytes depend on neither the division nor the other tasks.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from omrl.behavior import sb3
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
from omrl.behavior.stacked import Stack, StackedSac
from omrl.core import events, parallel, seeding
from omrl.core.allocator import keep_memory
from omrl.core.errors import UserError
from omrl.core.files import atomic_path, canonical, remove_dir, write_text
from omrl.core.precision import set_kernels
from omrl.envs.base import Array, Family, load_family

_SNAPSHOT = "unfinished.safetensors"
_SNAPSHOT_S = 120.0  # between savings of unfinished work, at checkpoints
_REPORTED = 50  # environment steps between reports of progress
_UPDATES, _STEPS = 32, 256  # gradient and environment steps that random numbers are drawn for at a time


class Streams:
    """One stream of random numbers per task, drawn many steps at a time.

    Args:
        names: what the stream of each task is seeded with.
        shape: of a task's numbers in one step.
        steps: drawn at a time.
        kind: ``normal``, or ``uniform`` on [0, 1), which is drawn in float64.
    """

    def __init__(self, seeds: list[int], what: str, shape: tuple[int, ...], steps: int, kind: str) -> None:
        self._generators = [torch.Generator().manual_seed(seeding.integer(seed, what)) for seed in seeds]
        self._draw: Callable[..., Tensor] = torch.randn if kind == "normal" else torch.rand
        dtype = torch.float32 if kind == "normal" else torch.float64
        self._numbers = torch.empty(len(seeds), steps, *shape, dtype=dtype)
        self._used = steps
        self._states = self._generator_states()

    def next(self) -> Tensor:
        """Return the numbers of the next step, [N, *shape]; valid until the one after."""
        if self._used == self._numbers.shape[1]:
            self._states = self._generator_states()
            self._fill()
            self._used = 0
        self._used += 1
        return self._numbers[:, self._used - 1]

    def _fill(self) -> None:
        for generator, numbers in zip(self._generators, self._numbers, strict=True):
            self._draw(numbers.shape, generator=generator, out=numbers)

    def _generator_states(self) -> Tensor:
        return torch.stack([generator.get_state() for generator in self._generators])

    def state(self) -> tuple[Tensor, int]:
        """Return where the streams are."""
        return self._states, self._used

    def restore(self, states: Tensor, used: int) -> None:
        """Go to where ``state`` was called."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state.clone())  # set_state reads a view from the start of its storage
        self._states, self._used = states, used
        if used < self._numbers.shape[1]:
            self._fill()


@dataclass
class _Clock:
    """Where every task is."""

    step: int  # environment steps done, the same for all tasks
    updates: int
    age: np.ndarray[Any, np.dtype[np.int64]]  # steps of the running episode, [N]
    episodes: np.ndarray[Any, np.dtype[np.int64]]  # ended, [N]


class Group:
    """Tasks that are trained together in one process.

    Args:
        family: environment.
        runs: the tasks.
        config: section ``behavior``.
        device: of the networks; environments are simulated on the CPU.
    """

    def __init__(self, family: Family, runs: list[Run], config: BehaviorConfig, device: torch.device) -> None:
        self.family, self.runs, self.config, self._device = family, runs, config, device
        self._tasks = [run.task for run in runs]
        seeds = [run.seed for run in runs]
        sac, count = config.sac, len(runs)
        temperature, learned = sac.temperature()
        self.sac = StackedSac(
            family.observation_size,
            family.action_size,
            sac.net_arch,
            count,
            learning_rate=sac.learning_rate,
            gamma=sac.gamma,
            tau=sac.tau,
            temperature=temperature,
            learn_temperature=learned,
            device=device,
        )
        for place, run in enumerate(runs):
            self._load_networks(place, sb3.make_model(family, run.task, config, run.seed))
        self._capacity = sac.buffer_size or config.total_steps
        self._replay = torch.zeros(count, self._capacity, self.sac.row_size, device=device)
        self._first_row = torch.arange(count, device=device)[:, None] * self._capacity
        self._env = family.batch(self._tasks)
        self._rngs = [seeding.generator(seed, "episodes") for seed in seeds]
        self._env.reset(self._rngs)
        size = family.action_size
        self._streams = {
            "warm-up": Streams(seeds, "warm-up", (size,), _STEPS, "uniform"),
            "acting": Streams(seeds, "acting", (size,), _STEPS, "normal"),
            "replay": Streams(seeds, "replay", (sac.batch_size,), _UPDATES, "uniform"),
            "noise": Streams(seeds, "noise", (2 * sac.batch_size, size), _UPDATES, "normal"),
        }
        self.clock = _Clock(0, 0, np.zeros(count, np.int64), np.zeros(count, np.int64))
        self.losses: dict[str, Tensor] = {}
        self.boards = [events.writer(f"behavior/{task_folder(run.index)}") for run in runs]
        tasks = [run.index for run in runs]
        self._kept = ReplayWriter(family, tasks, config.checkpoint_every) if config.keep_replay else None

    # ---------------------------------------------------------------- training

    @torch.no_grad()
    def advance(self) -> None:
        """Take one environment step of every task, and the gradient steps that follow it."""
        sac, clock = self.config.sac, self.clock
        before = torch.from_numpy(self._env.observation)
        if clock.step < sac.learning_starts:
            action = (2 * self._streams["warm-up"].next() - 1).float()
        else:
            noise = self._streams["acting"].next()[:, None].to(self._device)
            action = self.sac.act(before[:, None].to(self._device), noise)[:, 0].cpu()
        result = self._env.step(action.numpy())
        row = torch.cat(
            [
                torch.from_numpy(result.next_observation),
                before,
                action,
                torch.from_numpy(result.reward)[:, None],
                torch.from_numpy(~result.terminated)[:, None].float(),
            ],
            1,
        )
        self._replay[:, clock.step % self._capacity] = row.to(self._device)
        late = clock.age + 1 >= self.config.horizon
        if self._kept is not None:
            self._kept.add(clock.step, clock.age, clock.episodes, before.numpy(), action.numpy(), result, late)
        clock.age += 1
        ended = np.flatnonzero(result.terminated | late)
        if len(ended):
            self._env.reset([self._rngs[i] for i in ended], ended)
            clock.age[ended] = 0
            clock.episodes[ended] += 1
        clock.step += 1
        if clock.step > sac.learning_starts and clock.step % sac.train_freq == 0:
            last = clock.step % self.config.checkpoint_every < sac.train_freq
            for _ in range(sac.gradient_steps):
                self._update(last)

    def _update(self, losses: bool) -> None:
        batch, filled = self.config.sac.batch_size, min(self.clock.step, self._capacity)
        chosen = (self._streams["replay"].next() * filled).long().clamp_(max=filled - 1).to(self._device)
        flat = self._replay.view(-1, self.sac.row_size)
        rows = flat.index_select(0, (chosen + self._first_row).view(-1)).view(len(self.runs), batch, -1)
        self.losses = self.sac.update(rows, self._streams["noise"].next().to(self._device), losses)
        self.clock.updates += 1

    @torch.no_grad()
    def evaluate(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return every task's mean reported return of the deterministic policy, [N]."""

        def act(seen: Array, _: int) -> Array:
            observation = torch.from_numpy(seen).view(len(self.runs), -1, seen.shape[-1]).to(self._device)
            return self.sac.act(observation, None).cpu().reshape(len(seen), -1).numpy()

        return evaluate(self.family, self._tasks, [run.seed for run in self.runs], act)

    def write_replay(self, folders: list[Path]) -> None:
        """Write the transitions since the last checkpoint, if they are kept."""
        if self._kept is not None and self.clock.step:
            self._kept.write(folders, self.clock.step)

    # ------------------------------------------------------- SB3's checkpoints

    def _pieces(self, stack: Stack, flat: Tensor, place: int) -> list[Tensor]:
        """Return views of task ``place``'s part of ``flat``, in the order of SB3's ``parameters()``."""
        layers = stack.views(flat)
        if stack is not self.sac.actor:  # two critics
            return [part[row] for row in (place, len(self.runs) + place) for layer in layers for part in layer]
        size = self.family.action_size
        (weight, bias) = layers[-1]  # mean and log-std are one layer here, two there
        heads = [weight[place, :size], bias[place, :size], weight[place, size:], bias[place, size:]]
        return [part[place] for layer in layers[:-1] for part in layer] + heads

    def _load_networks(self, place: int, model: Any) -> None:
        """Take the parameters of an SB3 model for task ``place``."""
        for stack, module in (
            (self.sac.actor, model.actor),
            (self.sac.critic, model.critic),
            (self.sac.target, model.critic_target),
        ):
            for piece, parameter in zip(self._pieces(stack, stack.flat, place), module.parameters(), strict=True):
                piece.copy_(parameter.detach())

    @torch.no_grad()
    def save(self, place: int, path: Path) -> None:
        """Write task ``place`` as a standard SB3 checkpoint, optimizers included."""
        run, sac, optimizers = self.runs[place], self.sac, self.sac.optimizers
        model = sb3.make_model(self.family, run.task, self.config, run.seed)
        for stack, module, optimizer in (
            (sac.actor, model.actor, optimizers["actor"]),
            (sac.critic, model.critic, optimizers["critic"]),
            (sac.target, model.critic_target, None),
        ):
            parameters = list(module.parameters())
            for parameter, piece in zip(parameters, self._pieces(stack, stack.flat, place), strict=True):
                parameter.copy_(piece)
            if optimizer is not None and self.clock.updates:
                moments = {k: self._pieces(stack, flat, place) for k, flat in optimizer.moments.items()}
                sb3.set_adam(module.optimizer, parameters, self.clock.updates, moments)
        if model.ent_coef_optimizer is not None and model.log_ent_coef is not None:
            model.log_ent_coef.copy_(sac.log_temperature[place])
            if self.clock.updates:
                moments = {k: [sac.actor.spare(flat)[place]] for k, flat in optimizers["actor"].moments.items()}
                sb3.set_adam(model.ent_coef_optimizer, [model.log_ent_coef], self.clock.updates, moments)
        sb3.set_counters(model, self.clock.step, self.clock.updates, int(self.clock.episodes[place]))
        sb3.save_checkpoint(model, path)

    # ------------------------------------------------------------- unfinished work

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, by name; the replay buffer as far as it is filled."""
        filled = min(self.clock.step, self._capacity)
        tensors = {
            "actor": self.sac.actor.flat,
            "critic": self.sac.critic.flat,
            "target": self.sac.target.flat,
            "replay": self._replay[:, :filled],
            "age": torch.from_numpy(self.clock.age),
            "episodes": torch.from_numpy(self.clock.episodes),
        }
        for name, optimizer in self.sac.optimizers.items():
            for key, value in {"step": optimizer.step, **optimizer.moments}.items():
                tensors[f"adam.{name}.{key}"] = value
        return tensors

    def snapshot(self, folder: Path) -> None:
        """Save unfinished work; the last step is a rename."""
        tensors = {name: value.cpu().contiguous() for name, value in self._tensors().items()}
        tensors["environment"] = torch.from_numpy(self._env.get_state())
        used = {}
        for name, stream in self._streams.items():
            tensors[f"stream.{name}"], used[name] = stream.state()
        facts = {
            "step": self.clock.step,
            "updates": self.clock.updates,
            "used": used,
            "episodes": [rng.bit_generator.state for rng in self._rngs],
        }
        with atomic_path(folder / _SNAPSHOT) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        """Continue from a snapshot, if there is one that can be read."""
        try:
            with safetensors.safe_open(folder / _SNAPSHOT, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["facts"])
        except (OSError, safetensors.SafetensorError):
            return
        self.clock = _Clock(
            facts["step"], facts["updates"], tensors["age"].numpy().copy(), tensors["episodes"].numpy().copy()
        )
        for name, value in self._tensors().items():
            value.copy_(tensors[name])
        self._env.set_state(tensors["environment"].numpy())
        for name, stream in self._streams.items():
            stream.restore(tensors[f"stream.{name}"], facts["used"][name])
        for rng, state in zip(self._rngs, facts["episodes"], strict=True):
            rng.bit_generator.state = state


def train_group(env: str, env_config: dict[str, Any], runs: list[Run], config: dict[str, Any], work: str) -> None:
    """Train some tasks together and publish each one's folder with checkpoints and ``progress.csv``.

    Args:
        env: family name.
        env_config: its configuration.
        runs: the tasks; their folders must not exist.
        config: a resolved ``BehaviorConfig``.
        work: folder for unfinished work; what an earlier run of the same left there is continued.
    """
    keep_memory()
    torch.set_num_threads(1)  # one and two threads give different weights
    behavior = BehaviorConfig.model_validate(config)
    set_kernels(behavior.matmul, behavior.device)
    group = Group(load_family(env, env_config), runs, behavior, torch.device(behavior.device))
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    group.resume(folder)
    parallel.advance(group.clock.step * len(runs))
    saved = time.monotonic()
    if group.clock.step == 0:
        _keep(group, folder, 0)
    while group.clock.step < behavior.total_steps:
        group.advance()
        if group.clock.step % _REPORTED == 0:
            parallel.advance(_REPORTED * len(runs))
        if group.clock.step % behavior.checkpoint_every == 0:
            _keep(group, folder, group.clock.step)
            if time.monotonic() - saved > _SNAPSHOT_S:
                group.snapshot(folder)
                saved = time.monotonic()
    for run in runs:
        (folder / task_folder(run.index)).rename(run.folder)
    remove_dir(folder)


def _keep(group: Group, folder: Path, step: int) -> None:
    """Save every task's checkpoint of ``step`` and its line of the learning curve."""
    returns = group.evaluate()
    losses = {name: value.cpu().numpy() for name, value in group.losses.items()}
    folders = [folder / task_folder(run.index) for run in group.runs]
    for own in folders:
        own.mkdir(exist_ok=True)
    group.write_replay(folders)
    for place, (run, own) in enumerate(zip(group.runs, folders, strict=True)):
        group.save(place, own / checkpoint_name(step))
        values = [float(returns[place]), *(float(losses[k][place]) for k in LOSSES if k in losses)]
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"behavior policy of task {run.index} diverged by step {step}: its return or a loss is not finite; "
                "lower behavior.sac.learning_rate in params.yaml"
            )
        group.boards[place].scalars(step, named(values))
        line = progress_line(step, group.clock.updates, values)
        path = own / PROGRESS
        lines = (
            path.read_text(encoding="utf-8").splitlines()[: 1 + step // group.config.checkpoint_every] if step else []
        )
        write_text(path, "\n".join([*(lines or [PROGRESS_HEADER]), line]) + "\n")


def train(
    env: str,
    env_config: dict[str, Any],
    runs: list[Run],
    config: BehaviorConfig,
    work: Path,
    description: str,
    finished: int,
) -> None:
    """Train the tasks of ``runs``, divided among the cores; see ``omrl.behavior.base.Engine``."""
    count = 1 if config.device != "cpu" else min(parallel.worker_count(), max(1, len(runs)))
    groups = [runs[place::count] for place in range(count)] if runs else []
    resolved = config.resolved()
    arguments = []
    for group in groups:
        name = "group-" + hashlib.sha256(canonical([run.index for run in group]).encode()).hexdigest()[:12]
        arguments.append((env, env_config, group, resolved, str(work / name)))
    parallel.run_tasks(
        train_group,
        arguments,
        description=description,
        finished=finished * config.total_steps,
        units=[len(group) * config.total_steps for group in groups],
        unit="task-steps",
    )
