"""Learning on in the environment: a meta-trained model acts, what it collects is kept, and training goes on.

A round is: every task collects ``episodes`` episodes' worth of steps, first with beliefs drawn from the prior, then
with the posterior; then so many updates on the offline data and everything collected so far, all rows alike. The
rewards are the simulator's, or the method's own guess (SMAC's self-supervised phase): then the simulator's are wiped
before anything else sees a step.

Where this and PEARL's and SMAC's released loops differ: all tasks collect in every round, where those draw five, with
replacement; an episode that ends early is followed by another, so that all tasks have the same number of rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from omrl.algorithms.base import CONFIG as MODEL_CONFIG
from omrl.algorithms.base import MODEL, Algorithm, Belief, load_model
from omrl.core import layout, seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.core.files import MANIFEST, atomic_dir, input_hashes, read_json, read_manifest, scratch, write_manifest
from omrl.core.precision import set_kernels
from omrl.data.pairs import sources
from omrl.data.parquet import read_transitions, verified, write_transitions
from omrl.data.schema import SOURCE, Columns, concatenate, take
from omrl.data.taskdata import TaskData
from omrl.envs.base import Array, BatchEnv, Family, StepResult
from omrl.envs.simulate import Episodes
from omrl.evaluation.contexts import adapt_to_own, experience_of, offline_belief, offline_context
from omrl.evaluation.protocols.base import Run
from omrl.learning.train import (
    TRAINING,
    MetaTrainConfig,
    Position,
    load_data,
    load_state,
    make_sampler,
    publish,
    save_state,
    snapshot_steps,
    train,
)
from omrl.nets.experience import Experience

_PACKAGES = ("numpy", "pyarrow", "safetensors", "torch")
_STATE = "state.safetensors"


class OnlineConfig(Config):
    """An entry of section ``online``.

    Attributes:
        algorithm: name in section ``algorithms``; every model of it learns on.
        rounds: how many, each of collecting and training.
        episodes: collected in every task and round, counted in full test episodes: one that ends early is followed by
            another.
        prior_episodes: how many of them, the first ones, follow the method's prior.
        updates: gradient steps in a round.
        tasks: which tasks it acts in and learns from: ``train``, or ``test`` for fine-tuning on unseen ones.
        label: rewards of the collected rows: the ``simulator``'s, or ``decoded`` by the method, which then sees none.
        explore: ``sample`` draws beliefs and actions, ``mean`` follows the mean of both.
        resample: draw a belief per ``episode`` (PEARL) or per ``step`` (SMAC), with ``explore: sample``.
        posterior: of the later episodes: from the agent's ``own`` steps of this round, where the method serves
            ``online-prior``, or from an ``offline`` context.
        context: where training contexts come from: ``offline`` data alone, or ``all`` rows.
        context_size: transitions behind an offline context, which ``posterior: offline`` and ``label: decoded`` use.
        keep: snapshots along the way, evenly spaced over the rounds.
    """

    algorithm: str
    rounds: Annotated[int, Field(ge=1, le=1000)] = 20
    episodes: Annotated[int, Field(ge=1, le=1000)] = 3
    prior_episodes: Annotated[int, Field(ge=0, le=1000)] = 2
    updates: Annotated[int, Field(ge=1, le=10**6)] = 1000
    tasks: Literal["train", "test"] = "train"
    label: Literal["simulator", "decoded"] = "simulator"
    explore: Literal["sample", "mean"] = "sample"
    resample: Literal["episode", "step"] = "episode"
    posterior: Literal["own", "offline"] = "own"
    context: Literal["offline", "all"] = "all"
    context_size: Annotated[int, Field(ge=1, le=10**6)] = 256
    keep: Annotated[int, Field(ge=0, le=1000)] = 0

    @model_validator(mode="after")
    def _fits(self) -> OnlineConfig:
        if self.prior_episodes > self.episodes:
            raise ValueError(
                f"prior_episodes = {self.prior_episodes}: expected at most episodes = {self.episodes}, of which they "
                "are the first"
            )
        if self.posterior == "own" and not self.prior_episodes:
            raise ValueError("posterior = own with prior_episodes = 0: nothing to adapt to; expected 1 or more")
        if self.explore == "mean" and self.resample == "step":
            raise ValueError("resample = step with explore = mean: nothing is drawn; expected resample: episode")
        return self


@runtime_checkable
class Decoding(Protocol):
    """A method that tells rewards from an offline context."""

    def decode(self, context: Experience, steps: Experience, rng: torch.Generator) -> Tensor:
        """Return the rewards [tasks, n] of steps [tasks, n, ...], whose own rewards are not looked at."""


class Unrewarded(BatchEnv):
    """A simulator without its rewards: they are NaN."""

    def __init__(self, env: BatchEnv) -> None:
        self._env = env

    def reset(self, rngs: Sequence[np.random.Generator] | None = None, rows: NDArray[np.intp] | None = None) -> Array:
        """Start new episodes."""
        return self._env.reset(rngs, rows)

    def step(self, actions: Array) -> StepResult:
        """Step, and wipe the rewards."""
        result = self._env.step(actions)
        nothing = np.full_like(result.reward, np.nan)
        return replace(result, reward=nothing, sparse_reward=nothing)


def _collect_episode(run: Run, config: OnlineConfig, ran: list[Episodes], rngs: Any, draw: torch.Generator) -> Episodes:
    """Run the next episode of every task; its rewards are those that ``config.label`` says."""
    algorithm, count, exploring = run.algorithm, len(run.tasks), config.explore == "sample"
    found: Belief = None  # the prior
    if len(ran) >= config.prior_episodes:
        if config.posterior == "own":
            every = np.ones((len(ran), count), dtype=np.bool_)
            found, _ = adapt_to_own(algorithm, algorithm.prior(count), ran, every, run.data.inference)
        else:
            found = offline_belief(algorithm, run.data, config.context_size, rngs)

    def belief() -> Belief:
        if found is None:
            return algorithm.prior(count, draw if exploring else None)
        return algorithm.sample(found, draw) if exploring else found

    before: Callable[[Belief, int], Belief] | None = None
    if exploring and config.resample == "step":

        def before(now: Belief, t: int) -> Belief:
            return belief() if t else now

    env = run.family.batch([t["parameters"] for t in run.tasks], 1)
    decoded = config.label == "decoded"
    last, _ = run.episode(belief(), rngs, draw if exploring else None, before, Unrewarded(env) if decoded else env)
    if not decoded:
        return last
    if not isinstance(algorithm, Decoding):
        raise ValueError(f"{type(algorithm).__name__} decodes no rewards")
    context = offline_context(algorithm, run.data, config.context_size, rngs)
    steps = experience_of(algorithm, [last], run.data.inference, range(count)).flat()
    guess = algorithm.decode(context, steps, draw).cpu().numpy()
    return replace(last, reward=guess, sparse_reward=guess)


def collect(run: Run, config: OnlineConfig, round_: int) -> list[Columns]:
    """Return what a round collects, for every task ``episodes`` times the horizon rows, in order.

    ``checkpoint`` is the number of updates that the model had taken in this phase.
    """
    rngs = [seeding.generator(run.seed, *run.stream, t["index"], round_) for t in run.tasks]
    draw = torch.Generator().manual_seed(seeding.integer(run.seed, *run.stream, "draws", round_))
    need = config.episodes * run.family.horizon
    ran: list[Episodes] = []
    counts = np.zeros(len(run.tasks), dtype=np.int64)
    parts: list[list[Columns]] = [[] for _ in run.tasks]
    while counts.min() < need:
        last = _collect_episode(run, config, ran, rngs, draw)
        for place, task in enumerate(run.tasks):
            rows = min(int(last.valid[place].sum()), need - int(counts[place]))
            if rows:
                parts[place].append(
                    _columns(last, place, rows, task["index"], round_ * config.updates, len(ran), config)
                )
            counts[place] += rows
        ran.append(last)
    return [concatenate(part) for part in parts]


def _columns(
    ran: Episodes, place: int, rows: int, task: int, updates: int, episode: int, config: OnlineConfig
) -> Columns:
    """Return the first ``rows`` steps of a task's episode in the schema of transitions."""
    whole = np.ones(rows, dtype=np.int32)
    terminated = ran.terminated[place, :rows]
    truncated = np.zeros(rows, dtype=np.bool_)
    truncated[-1] = not terminated[-1]
    numbers = {"task": task, "source_task": task, "checkpoint": updates, "episode": episode}
    names = ("observation", "next_observation", "action", "reward", "sparse_reward")
    return {
        **{name: whole * np.int32(value) for name, value in numbers.items()},
        "step": np.arange(rows, dtype=np.int32),
        "deterministic": np.full(rows, config.explore == "mean"),
        **{name: getattr(ran, name)[place, :rows] for name in names},
        "terminated": terminated,
        "truncated": truncated,
        "reward_features": ran.features[place, :rows],
        SOURCE: np.full(rows, config.label),
    }


def collected_name(round_: int) -> str:
    """Return the name of the file with a round's rows."""
    return f"collected={round_:03d}.parquet"


def learn_on(
    algorithm: Algorithm,
    family: Family,
    tasks: Sequence[dict[str, Any]],
    offline: Mapping[str, TaskData],
    config: OnlineConfig,
    training: MetaTrainConfig,
    work: Path,
    seed: int,
    description: str,
) -> Position:
    """Take all rounds, going on from ``work`` if an earlier run left something there.

    Args:
        algorithm: the meta-trained model, changed in place.
        family: environment.
        tasks: rows of data/tasks/all.json, in the order of the data.
        offline: ``transitions`` and, where it is another one, ``context``.
        config: entry of section ``online``.
        training: section ``meta_train``, of which rows of the curve, threads and the like are taken.
        work: folder of the unfinished state and of what was collected.
        seed: of everything drawn here.
        description: shown with the progress.

    Raises:
        UserError: a loss is no longer finite.
    """
    at = load_state(work / _STATE, algorithm, None)
    kept = set(snapshot_steps(config.rounds, config.keep))
    context = offline.get("context", offline["transitions"])
    indices, rows = [t["index"] for t in tasks], config.episodes * family.horizon
    seen = context.with_columns(algorithm.columns(context))
    run = Run(algorithm, family, seen, tasks, config, ("online",), seed)
    once = training.model_copy(update={"keep": 0})
    about = {
        "environment": family.spec(),
        "tasks": {str(t["index"]): t["parameters"] for t in tasks},
        "checkpoints": {},
        "parameters": {"online": config.resolved(), "seed": seed},
    }
    collected: TaskData | None = None
    for round_ in range(config.rounds):
        path = work / collected_name(round_)
        taken = at.step >= (round_ + 1) * config.updates
        if not taken and not path.is_file():
            write_transitions(path, concatenate(collect(run, config, round_)), {**about, "round": round_})
        columns = read_transitions(path)
        more = TaskData.of_columns(
            indices,
            [take(columns, slice(i * rows, (i + 1) * rows)) for i in range(len(tasks))],
            context.inference,
            training.time_limit_terminal,
        )
        collected = more if collected is None else collected.followed_by(more)
        if taken:
            continue
        data = {"transitions": offline["transitions"].followed_by(collected)}
        if config.context == "offline":
            data["context"] = context
        elif "context" in offline:
            data["context"] = context.followed_by(collected)
        sampler = make_sampler(algorithm, data, seeding.integer(seed, "online", round_))
        inner = work / f"round={round_:03d}.safetensors"
        part = train(
            algorithm, sampler, once, inner, f"{description}, round {round_ + 1} of {config.rounds}",
            phases=[algorithm.online_phase(config.updates)],
        )  # fmt: skip
        at.curve.rows += [{**row, "step": str(int(row["step"]) + at.step)} for row in part.curve.rows]
        at.step += config.updates
        if round_ + 1 in kept:
            at.snapshots[at.step] = {name: x.clone() for name, x in algorithm.model_state().items()}
        save_state(work / _STATE, algorithm, None, at)
        inner.unlink(missing_ok=True)
    return at


def load_for_training(folder: Path, device: str, seed: int) -> Algorithm:
    """Return a model with the state of its optimizers and random streams, where ``meta_train.optimizers`` published it.

    Else the optimizers are fresh, and the streams begin at ``seed``: at the model's own they would repeat what
    meta-training drew.

    Raises:
        UserError: a file is missing, damaged, or not of the configuration beside it.
    """
    names = [MODEL, MODEL_CONFIG]
    if TRAINING in read_manifest(folder)["files"]:
        names.append(TRAINING)
    path = verified(folder, names)[-1]
    algorithm = load_model(folder, device)
    for name, stream in algorithm.generators().items():
        stream.manual_seed(seeding.integer(seed, "stream", name))
    if path.name == TRAINING:
        try:
            algorithm.load_training_state(load_file(path))
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: damaged, or not of the configuration beside it ({error})") from None
    return algorithm


def build_online(
    *,
    name: str,
    config: OnlineConfig,
    cells: Sequence[tuple[str, int]],
    training: MetaTrainConfig,
    family: Family,
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Let every model of an algorithm learn on, and publish all of them; a killed run goes on where it was.

    Args:
        name: of the entry in params.yaml; a free name, on which no random number depends.
        config: the entry.
        cells: training dataset and seed of every model.
        training: section ``meta_train``.
        family: environment.
        code: fingerprint files this depends on.
        target: ``data/online/<name>``.

    Raises:
        UserError: a model or dataset is missing or damaged, or training diverged.
    """
    torch.set_num_threads(training.threads)
    set_kernels(training.matmul)
    everything = read_json(layout.TASKS)
    tasks = [t for t in everything["tasks"] if t["split"] == config.tasks]
    used = {train_: sources(layout.datasets(train_)) for train_, _ in cells}
    paths = {
        (train_, seed): (
            layout.TASKS,
            layout.models(config.algorithm, train_, seed),
            *(layout.datasets(x) for x in used[train_].values()),
            *code,
        )
        for train_, seed in cells
    }
    parameters = {"algorithm": config.algorithm, "online": config.resolved(), "meta_train": training.resolved()}
    every = {path: digest for each in paths.values() for path, digest in input_hashes(*each).items()}
    whole = {**parameters, "cells": [list(cell) for cell in cells], "inputs": every}
    with scratch("online", whole, _PACKAGES) as work:
        for train_, seed in cells:
            place, finished = work / train_ / str(seed), work / "finished" / train_ / str(seed)
            if (finished / MANIFEST).is_file():
                continue
            place.mkdir(parents=True, exist_ok=True)
            model = layout.models(config.algorithm, train_, seed)
            own_seed = seeding.integer(seed, "online")
            algorithm = load_for_training(model, training.device, own_seed)
            offline = load_data(
                used[train_], [t["index"] for t in tasks], family.inference_reward, training.time_limit_terminal
            )
            done = learn_on(
                algorithm, family, tasks, offline, config, training, place, own_seed, f"{name} on {train_}, seed {seed}"
            )
            with atomic_dir(finished) as folder:
                module = read_json(model / MODEL_CONFIG)["algorithm"]
                files = publish(algorithm, done, folder, name, module, training.optimizers)
                for round_ in range(config.rounds):
                    shutil.copyfile(place / collected_name(round_), folder / collected_name(round_))
                    files[collected_name(round_)] = len(tasks) * config.episodes * family.horizon
                write_manifest(
                    folder, kind="online model", inputs=input_hashes(*paths[train_, seed]),
                    parameters={**parameters, "name": name, "dataset": train_, "seed": seed},
                    files=files, packages=_PACKAGES,
                )  # fmt: skip
            shutil.rmtree(place)
        with atomic_dir(target) as folder:
            shutil.copytree(work / "finished", folder, dirs_exist_ok=True)
