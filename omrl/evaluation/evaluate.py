"""Evaluation of one model: episodes under a protocol, diagnostics of its embeddings, and their folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from omrl.algorithms.base import load_model
from omrl.core import layout
from omrl.core.files import atomic_dir, input_hashes, read_json, write_json, write_manifest
from omrl.core.progress import Progress
from omrl.data.parquet import read_transitions, verified, write_table
from omrl.data.taskdata import TaskBuffers
from omrl.envs.base import Family
from omrl.evaluation.embeddings import attention, embedding_variance, esr, rms, sample_embeddings, sparsity_curve
from omrl.evaluation.protocols import ProtocolConfig, run_protocol
from omrl.learning.train import CURVE

EPISODES, EMBEDDINGS, TRAJECTORIES, DIAGNOSTICS = (
    "episodes.parquet",
    "embeddings.parquet",
    "trajectories.parquet",
    "diagnostics.json",
)


class EvaluateConfig(ProtocolConfig):
    """Section ``evaluate``: the protocol, and what is measured beside returns.

    Attributes:
        embedding_context: transitions behind each embedding of the diagnostics.
        embedding_resamples: embeddings per task, each of a context of its own.
        sparsity_ratios: shares of unrewarded transitions at which the embedding variance is taken (FOCAL++ Fig. 6);
            none: not computed.
        trajectories: test tasks whose last episode is kept for the picture.
        threads: of torch.
    """

    embedding_context: Annotated[int, Field(ge=1, le=65536)] = 256
    embedding_resamples: Annotated[int, Field(ge=2, le=1000)] = 8
    sparsity_ratios: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(max_length=1000)] = []
    trajectories: Annotated[int, Field(ge=0, le=10_000)] = 6
    threads: Annotated[int, Field(ge=1, le=256)] = 1


def build_evaluation(
    *,
    name: str,
    train: str,
    test: str,
    seed: int,
    config: EvaluateConfig,
    family: Family,
    code: Sequence[str | Path],
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
    model, data = layout.models(name, train, seed), layout.datasets(test)
    inputs = input_hashes(layout.TASKS, model, data, *code)
    tasks = read_json(layout.TASKS)["tasks"]
    algorithm = load_model(model)
    buffers = TaskBuffers.load(data, [t["index"] for t in tasks])
    stream = ("evaluate", config.protocol, name, train, test)
    with Progress(1, f"evaluate {name} {train} on {test}, seed {seed}", "cells") as progress:
        features = _features(data, buffers, family) if config.protocol == "ood-checkpoint" else None
        rows, last = run_protocol(algorithm, family, buffers, tasks, config, stream, seed, features)
        embeddings = sample_embeddings(
            algorithm, buffers, tasks, config.embedding_context, config.embedding_resamples, stream, seed
        )
        training = [i for i, t in enumerate(tasks) if t["split"] == "train"]
        attended, curve = None, None
        if family.returns == "sparse":
            attended = attention(algorithm, buffers, training, config.embedding_context, stream, seed)
            if config.sparsity_ratios:
                curve = sparsity_curve(
                    algorithm, buffers, training, config.sparsity_ratios, config.embedding_context,
                    config.embedding_resamples, stream, seed,
                )  # fmt: skip
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
        resampled = embeddings[training].astype(np.float64)
        means = resampled.mean(axis=1)
        several = len(means) > 1
        write_json(
            folder / DIAGNOSTICS,
            {
                "esr": esr(means) if several else None,
                "rms": rms(means) if several else None,
                "embedding_variance": embedding_variance(resampled),
                "attention": attended,
                "sparsity": curve,
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


def _features(folder: Path, buffers: TaskBuffers, family: Family) -> NDArray[np.float32]:
    """Return what the reward function reads beside the buffers, [tasks, rows, width]."""
    if not family.feature_size:
        return np.zeros((len(buffers.tasks), buffers.rows, 0), dtype=np.float32)
    paths = verified(folder, [f"task={task:03d}.parquet" for task in buffers.tasks])
    return np.stack([read_transitions(path, ["reward_features"])["reward_features"] for path in paths])


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
