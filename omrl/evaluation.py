"""Adaptation and return: what an evaluation protocol is, and diagnostics of the embeddings.

Protocol ``offline-context`` (FOCAL's released code): per repetition, before each of ``episodes`` episodes,
``context_per_episode`` random transitions of the task's offline dataset are appended to the context, with
replacement; the embedding is inferred anew from all of it, and one deterministic episode is run. Only the
last episode of a repetition counts. The agent's own transitions never enter the context.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from omrl import seeding
from omrl.algorithms.base import MetaAlgorithm, load_model
from omrl.config import Config
from omrl.datasets.buffer import TaskBuffers
from omrl.datasets.parquet import write_table
from omrl.encoders import Context
from omrl.envs.base import Family
from omrl.files import atomic_dir, input_hashes, read_json, write_json, write_manifest
from omrl.progress import Progress
from omrl.training import CURVE

PROTOCOLS = {"offline-context": "context from the task's offline dataset, never from the agent (FOCAL)"}
EPISODES, EMBEDDINGS, TRAJECTORIES, DIAGNOSTICS = (
    "episodes.parquet",
    "embeddings.parquet",
    "trajectories.parquet",
    "diagnostics.json",
)


class EvaluateConfig(Config):
    """Section ``evaluate``.

    Attributes:
        protocol: ``offline-context``.
        episodes: per repetition; 20 for the point robots in the released code (400 steps of 20).
        context_per_episode: transitions appended before each episode.
        repetitions: 2 in the released code.
        embedding_context: transitions behind each embedding of the diagnostics.
        embedding_resamples: embeddings per task, each of a context of its own.
        trajectories: test tasks whose last episode is kept for the picture.
        threads: of torch.
    """

    protocol: Literal["offline-context"] = "offline-context"
    episodes: Annotated[int, Field(ge=1, le=10_000)] = 20
    context_per_episode: Annotated[int, Field(ge=1)] = 20
    repetitions: Annotated[int, Field(ge=1, le=1000)] = 2
    embedding_context: Annotated[int, Field(ge=1)] = 256
    embedding_resamples: Annotated[int, Field(ge=2)] = 8
    trajectories: Annotated[int, Field(ge=0)] = 6
    threads: Annotated[int, Field(ge=1, le=256)] = 1


def gather_context(buffers: TaskBuffers, rows: NDArray[np.int64], with_next: bool, device: torch.device) -> Context:
    """Return the context of every task made of the given rows, int64 [tasks, n]."""
    place = np.arange(len(rows))[:, None]

    def pick(field: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(field[place, rows]).to(device)

    following = pick(buffers.next_observation) if with_next else None
    return Context(pick(buffers.observation), pick(buffers.action), pick(buffers.sparse_reward), following)


def run_episodes(
    algorithm: MetaAlgorithm,
    family: Family,
    tasks: Sequence[dict[str, Any]],
    z: torch.Tensor,
    starts: Sequence[np.random.Generator] | None,
) -> dict[str, NDArray[Any]]:
    """Run one deterministic episode of every task at once.

    Args:
        algorithm: acts.
        family: environment.
        tasks: parameters, one per row of ``z``.
        z: embeddings [tasks, latent].
        starts: streams of random starts.

    Returns:
        ``dense`` and ``sparse`` returns [tasks], ``observation`` [tasks, steps + 1, width] and ``reward``
        [tasks, steps]; after a termination the last observation is repeated with reward 0.
    """
    env = family.batch(tasks, 1)
    observation = env.reset(starts)
    alive = np.ones(len(tasks), dtype=np.bool_)
    dense, sparse = np.zeros(len(tasks)), np.zeros(len(tasks))
    path, rewards = [observation.copy()], []
    for _ in range(family.horizon):
        action = algorithm.act(torch.from_numpy(observation).to(algorithm.device).unsqueeze(1), z).squeeze(1)
        result = env.step(action.cpu().numpy())
        dense += np.where(alive, result.reward, 0)
        sparse += np.where(alive, result.sparse_reward, 0)
        reported = result.sparse_reward if family.returns == "sparse" else result.reward
        rewards.append(np.where(alive, reported, 0))
        path.append(np.where(alive[:, None], result.next_observation, path[-1]))
        alive &= ~result.terminated
        observation = result.next_observation
    return {
        "dense": dense,
        "sparse": sparse,
        "observation": np.stack(path, axis=1),
        "reward": np.stack(rewards, axis=1).astype(np.float32),
    }


def offline_context(
    algorithm: MetaAlgorithm,
    family: Family,
    buffers: TaskBuffers,
    tasks: Sequence[dict[str, Any]],
    config: EvaluateConfig,
    stream: Sequence[str | int],
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """Run the protocol ``offline-context`` on all tasks at once.

    Args:
        algorithm: the meta-trained model.
        family: environment.
        buffers: offline data of the tasks, in their order.
        tasks: rows of data/tasks/all.json.
        config: section ``evaluate``.
        stream: names of the random streams; task and repetition are added.
        seed: their root.

    Returns:
        One row per task, repetition and episode, and the last episodes' paths (see ``run_episodes``).
    """
    rows: list[dict[str, Any]] = []
    last: dict[str, NDArray[Any]] = {}
    for repetition in range(config.repetitions):
        rngs = [seeding.generator(seed, *stream, t["index"], repetition) for t in tasks]
        drawn = np.stack(
            [rng.integers(buffers.rows, size=config.episodes * config.context_per_episode) for rng in rngs]
        )
        for episode in range(config.episodes):
            size = (episode + 1) * config.context_per_episode
            context = gather_context(
                buffers, drawn[:, :size], algorithm.sizes.context_next_observation, algorithm.device
            )
            z = algorithm.infer(context)
            last = run_episodes(algorithm, family, [t["parameters"] for t in tasks], z, rngs)
            reported = last["sparse" if family.returns == "sparse" else "dense"]
            for place, task in enumerate(tasks):
                rows.append(
                    {
                        "task": task["index"],
                        "split": task["split"],
                        "repetition": repetition,
                        "episode": episode,
                        "context_transitions": size,
                        "counted": episode == config.episodes - 1,
                        "return": float(reported[place]),
                        "dense_return": float(last["dense"][place]),
                        "sparse_return": float(last["sparse"][place]),
                        "normalized": float(family.normalize(task, reported[place])),
                    }
                )
    return rows, last


def esr(means: NDArray[np.float64]) -> float:
    """Return the effective separation rate of task embeddings [tasks, latent] (FOCAL Table 1).

    The share of task pairs with ||z_i - z_j|| > sqrt(2 l / 3), the root mean square distance of two points
    drawn uniformly from (-1, 1)^l.
    """
    first, second = np.triu_indices(len(means), 1)
    return float((np.square(means[first] - means[second]).mean(axis=1) > 2 / 3).mean())


def rms(means: NDArray[np.float64]) -> float:
    """Return the RMS distance of task embeddings [tasks, latent] per dimension (FOCAL Table 1).

    As in the released script: the mean over dimensions of the standard deviation over tasks, times
    sqrt(2 n / (n - 1)). At most 1.42 for embeddings in (-1, 1).
    """
    n = len(means)
    return float(means.std(axis=0).mean() * np.sqrt(2 * n / (n - 1)))


def embedding_variance(embeddings: NDArray[np.float64]) -> float:
    """Return the variance of a task's embedding over resampled contexts (FOCAL++ Table 2, Eq. 20).

    Args:
        embeddings: [tasks, resamples, latent]; averaged over tasks and dimensions.
    """
    return float(embeddings.var(axis=1, ddof=1).mean())


def build_evaluation(
    *,
    name: str,
    train: str,
    test: str,
    seed: int,
    config: EvaluateConfig,
    family: Family,
    code: Sequence[str],
    target: str | Path,
) -> None:
    """Evaluate one model with the contexts of one test dataset and publish the folder.

    Args:
        name: of the algorithm in params.yaml.
        train, test: dataset names.
        seed: of the model.
        config: section ``evaluate``.
        family: environment.
        code: fingerprint files this depends on.
        target: ``data/evaluations/<name>/<train>/<test>/<seed>``.

    Raises:
        UserError: model or dataset is missing or damaged.
    """
    torch.set_num_threads(config.threads)
    model, data = Path("data/models") / name / train / str(seed), Path("data/datasets") / test
    inputs = input_hashes("data/tasks/all.json", model, data, *code)
    tasks = read_json("data/tasks/all.json")["tasks"]
    algorithm = load_model(model)
    buffers = TaskBuffers.load(data, [t["index"] for t in tasks])
    stream = ("evaluate", config.protocol, name, train, test)
    with Progress(1, f"evaluate {name} {train} on {test}, seed {seed}", "cells") as progress:
        rows, last = offline_context(algorithm, family, buffers, tasks, config, stream, seed)
        embeddings = sample_embeddings(algorithm, buffers, tasks, config, stream, seed)
        progress.advance()
    head = {
        "algorithm": name,
        "train_dataset": train,
        "test_dataset": test,
        "seed": seed,
        "protocol": config.protocol,
    }
    with atomic_dir(target) as folder:
        write_table(folder / EPISODES, _episode_table(head, rows), head)
        write_table(folder / EMBEDDINGS, _embedding_table(embeddings, tasks), head)
        paths = _trajectory_table(last, tasks, config.trajectories)
        write_table(folder / TRAJECTORIES, paths, head)
        training = embeddings[[t["split"] == "train" for t in tasks]].astype(np.float64)
        means = training.mean(axis=1)
        several = len(means) > 1
        write_json(
            folder / DIAGNOSTICS,
            {
                "esr": esr(means) if several else None,
                "rms": rms(means) if several else None,
                "embedding_variance": embedding_variance(training),
                "tasks": len(means),
                "contexts": {
                    "transitions": config.embedding_context,
                    "resamples": config.embedding_resamples,
                },
            },
        )
        shutil.copyfile(model / CURVE, folder / CURVE)
        write_manifest(
            folder,
            kind="evaluation",
            inputs=inputs,
            parameters={**head, "evaluate": config.resolved()},
            files={
                EPISODES: len(rows),
                EMBEDDINGS: embeddings.shape[0] * embeddings.shape[1],
                TRAJECTORIES: paths.num_rows,
                DIAGNOSTICS: None,
                CURVE: None,
            },
            packages=("numpy", "pyarrow", "torch"),
        )


def sample_embeddings(
    algorithm: MetaAlgorithm,
    buffers: TaskBuffers,
    tasks: Sequence[dict[str, Any]],
    config: EvaluateConfig,
    stream: Sequence[str | int],
    seed: int,
) -> NDArray[np.float32]:
    """Return embeddings [tasks, resamples, latent] of resampled contexts of every task."""
    rngs = [seeding.generator(seed, *stream, "embeddings", t["index"]) for t in tasks]
    shape = (config.embedding_resamples, config.embedding_context)
    drawn = np.stack([rng.integers(buffers.rows, size=shape) for rng in rngs], axis=1)
    with_next = algorithm.sizes.context_next_observation
    found = [
        algorithm.infer(gather_context(buffers, rows, with_next, algorithm.device)).cpu().numpy() for rows in drawn
    ]
    return np.stack(found, axis=1)


def _episode_table(head: dict[str, Any], rows: list[dict[str, Any]]) -> pa.Table:
    integers = ("task", "repetition", "episode", "context_transitions")
    columns: dict[str, Any] = {
        key: pa.array([value] * len(rows), pa.int32() if key == "seed" else pa.string()) for key, value in head.items()
    }
    for key in rows[0]:
        kind = pa.int32() if key in integers else None
        columns[key] = pa.array([row[key] for row in rows], kind)
    return pa.table(columns)


def _vectors(values: NDArray[np.float32]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[-1])


def _embedding_table(embeddings: NDArray[np.float32], tasks: Sequence[dict[str, Any]]) -> pa.Table:
    count, resamples, latent = embeddings.shape
    return pa.table(
        {
            "task": pa.array(np.repeat([t["index"] for t in tasks], resamples), pa.int32()),
            "split": pa.array(np.repeat([t["split"] for t in tasks], resamples).tolist(), pa.string()),
            "resample": pa.array(np.tile(np.arange(resamples), count), pa.int32()),
            "embedding": _vectors(embeddings.reshape(-1, latent)),
        }
    )


def _trajectory_table(last: dict[str, NDArray[Any]], tasks: Sequence[dict[str, Any]], count: int) -> pa.Table:
    """Return the last episode of the first ``count`` test tasks; the start has step 0 and reward 0."""
    places = [i for i, t in enumerate(tasks) if t["split"] == "test"][:count]
    steps = last["observation"].shape[1]
    reward = np.concatenate([np.zeros((len(tasks), 1), np.float32), last["reward"]], axis=1)[places]
    return pa.table(
        {
            "task": pa.array(np.repeat([tasks[i]["index"] for i in places], steps), pa.int32()),
            "step": pa.array(np.tile(np.arange(steps), len(places)), pa.int32()),
            "observation": _vectors(last["observation"][places].reshape(-1, last["observation"].shape[-1])),
            "reward": pa.array(reward.reshape(-1), pa.float32()),
        }
    )
