"""Evaluation of one model: episodes under a protocol, diagnostics of its embeddings, and their folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from omrl.algorithms.base import load_model, load_tensors
from omrl.core import layout, registry
from omrl.core.config import Config, parse
from omrl.core.errors import UserError, suggest
from omrl.core.files import atomic_dir, input_hashes, read_json, read_manifest, write_json, write_manifest
from omrl.core.progress import Progress
from omrl.data.parquet import read_transitions, verified, write_table
from omrl.data.taskdata import TaskData
from omrl.envs.base import Family
from omrl.envs.simulate import Episodes
from omrl.evaluation.embeddings import (
    OWN,
    attention,
    context_shift,
    embedding_variance,
    esr,
    own_and_offline,
    rms,
    sample_embeddings,
    sparsity_curve,
)
from omrl.evaluation.protocols.base import PACKAGE, ProtocolConfig, Run, protocol
from omrl.learning.train import CURVE

LEARNING, SNAPSHOTS = "learning.parquet", "snapshot=*.safetensors"
EPISODES, EMBEDDINGS, CONTEXTS, TRAJECTORIES, DIAGNOSTICS = (
    "episodes.parquet",
    "embeddings.parquet",
    "contexts.parquet",
    "trajectories.parquet",
    "diagnostics.json",
)


class EvaluateConfig(Config):
    """Section ``evaluate``: the protocol, and what is measured beside returns. The protocol's own keys stand beside.

    Attributes:
        protocol: one of those that ``omrl list`` shows, or a module of one's own.
        embedding_context: transitions behind each embedding of the diagnostics.
        embedding_resamples: embeddings per task, each of a context of its own.
        sparsity_ratios: shares of unrewarded transitions at which the embedding variance is taken (FOCAL++ Fig. 6),
            where the reported return is sparse; an empty list: not computed.
        trajectories: test tasks whose last episode is kept for the picture.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        threads: CPU threads that PyTorch uses.
    """

    protocol: str = "offline-context"
    embedding_context: Annotated[int, Field(ge=1, le=65536)] = 256
    embedding_resamples: Annotated[int, Field(ge=2, le=1000)] = 8
    sparsity_ratios: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(max_length=1000)] = []
    trajectories: Annotated[int, Field(ge=0, le=10_000)] = 6
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1


def parse_evaluate(values: Mapping[str, Any] | None, where: str) -> tuple[EvaluateConfig, ProtocolConfig]:
    """Return the two halves of section ``evaluate``: what every evaluation has, and the protocol's own.

    Raises:
        UserError: an unknown protocol or key, or a value that is not fit.
    """
    given = dict(values or {})
    shared = {key: given.pop(key) for key in list(given) if key in EvaluateConfig.model_fields}
    common = parse(EvaluateConfig, shared, where)
    known = registry.names(PACKAGE)
    if "." not in common.protocol and common.protocol not in known:
        raise UserError(f"{where}.protocol = '{common.protocol}': no such protocol; {suggest(common.protocol, known)}")
    cls = protocol(common.protocol).CONFIG
    for key in given:
        if key not in cls.model_fields:
            options = suggest(key, [*cls.model_fields, *EvaluateConfig.model_fields])
            raise UserError(f"{where}.{key}: unknown key for protocol '{common.protocol}'; {options}")
    own: ProtocolConfig = parse(cls, given, where)
    return common, own


def build_evaluation(
    *,
    name: str,
    train: str,
    test: str,
    seed: int,
    config: EvaluateConfig,
    settings: ProtocolConfig,
    family: Family,
    model: str | Path,
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Evaluate one model with the contexts of one test dataset and publish the folder.

    Args:
        name: of the algorithm, or of the online cell, in params.yaml.
        train, test: dataset names.
        seed: of the model.
        config: section ``evaluate``.
        settings: its protocol's keys.
        family: environment.
        model: the model's folder.
        code: fingerprint files this depends on.
        target: ``data/evaluations/<name>/<train>/<test>/<seed>``.

    Raises:
        UserError: model or dataset is missing or damaged.
    """
    torch.set_num_threads(config.threads)
    model, data = Path(model), layout.datasets(test)
    inputs = input_hashes(layout.TASKS, model, data, *code)
    tasks = read_json(layout.TASKS)["tasks"]
    algorithm = load_model(model, config.device)
    buffers = TaskData.load(data, [t["index"] for t in tasks], family.inference_reward)
    if own := algorithm.columns(buffers):
        buffers = buffers.with_columns(own)
    # no free name in the streams: arms of one table share their contexts
    stream = ("evaluate", config.protocol)
    features = reward_features(data, buffers, family) if config.protocol == "ood-checkpoint" else None
    run = Run(algorithm, family, buffers, tasks, settings, stream, seed, features)
    snapshots = sorted(model.glob(SNAPSHOTS))
    with Progress(1 + len(snapshots), f"evaluate {name} {train} on {test}, seed {seed}", "models") as progress:
        last = protocol(config.protocol).run(run)
        embeddings = sample_embeddings(
            algorithm, buffers, tasks, config.embedding_context, config.embedding_resamples, stream, seed
        )
        contexts = own_and_offline(algorithm, buffers, tasks, run.rows, stream, seed)
        found = _diagnostics(run, embeddings, contexts, config) | {"learned_on": _learned_on(model, family)}
        progress.advance()
        curve = _learning_curve(run, snapshots, config.protocol, progress)
    head = {"algorithm": name, "train_dataset": train, "test_dataset": test, "seed": seed, "protocol": config.protocol}
    written = {
        EPISODES: _episode_table(head, run.rows),
        EMBEDDINGS: None if embeddings is None else _embedding_table(embeddings, tasks),
        CONTEXTS: None if contexts is None else _context_table(*contexts, tasks),
        TRAJECTORIES: _trajectory_table(last, family, tasks, config.trajectories),
        LEARNING: _episode_table(head, curve) if curve else None,
    }
    with atomic_dir(target) as folder:
        files: dict[str, int | None] = {DIAGNOSTICS: None, CURVE: None}
        for file, table in written.items():
            if table is not None:
                write_table(folder / file, table, head)
                files[file] = table.num_rows
        write_json(folder / DIAGNOSTICS, found)
        shutil.copyfile(model / CURVE, folder / CURVE)
        write_manifest(
            folder,
            kind="evaluation",
            inputs=inputs,
            parameters={**head, "evaluate": config.resolved() | settings.resolved()},
            files=files,
            packages=("numpy", "pyarrow", "torch"),
        )


def _learned_on(model: Path, family: Family) -> dict[str, Any] | None:
    """Return which algorithm it was that learned on in the environment, and in each task how; None if none did."""
    parameters = read_manifest(model)["parameters"]
    phase = parameters.get("online")
    if phase is None:
        return None
    steps = phase["episodes"] * family.horizon
    return {
        "algorithm": parameters["algorithm"],
        "rounds": phase["rounds"],
        "steps": steps,
        "updates": phase["updates"],
    }


def _learning_curve(run: Run, snapshots: Sequence[Path], name: str, progress: Progress) -> list[dict[str, Any]]:
    """Return the counted episodes of every snapshot under the protocol, with the gradient step beside."""
    rows: list[dict[str, Any]] = []
    for path in snapshots:
        load_tensors(run.algorithm, path)
        once = replace(run, quick=True, rows=[])
        protocol(name).run(once)
        step = int(path.stem.partition("=")[2])
        rows += [{"step": step, **row} for row in once.rows if row["counted"]]
        progress.advance()
    return rows


def _diagnostics(
    run: Run,
    embeddings: NDArray[np.float32] | None,
    contexts: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Return what the papers measure of embeddings and attention; None where a method has no such thing."""
    training, sparse = run.training(), run.family.returns == "sparse"
    found: dict[str, Any] = dict.fromkeys(("esr", "rms", "embedding_variance", "attention", "sparsity"))
    if embeddings is not None:
        resampled = embeddings[training].astype(np.float64)
        means = resampled.mean(axis=1)
        found["embedding_variance"] = embedding_variance(resampled)
        if len(means) > 1:
            found |= {"esr": esr(means), "rms": rms(means)}
    if contexts is not None:
        test = [i for i, t in enumerate(run.tasks) if t["split"] == "test"]
        found |= context_shift(contexts[0].astype(np.float64), contexts[1].astype(np.float64), test) or {}
    if sparse:
        size, seed = config.embedding_context, run.seed
        found["attention"] = attention(run.algorithm, run.data, training, size, run.stream, seed)
        if config.sparsity_ratios and embeddings is not None and run.algorithm.context_draw(1).unit == "row":
            found["sparsity"] = sparsity_curve(
                run.algorithm, run.data, training, config.sparsity_ratios, size, config.embedding_resamples,
                run.stream, seed,
            )  # fmt: skip
    drawn = {"transitions": config.embedding_context, "resamples": config.embedding_resamples}
    return found | {"tasks": len(training), "contexts": drawn}


def reward_features(folder: Path, buffers: TaskData, family: Family) -> NDArray[np.float32]:
    """Return what the reward function reads beside the buffers, [tasks, rows, width]."""
    if not family.feature_size:
        return np.zeros((len(buffers.tasks), buffers.rows, 0), dtype=np.float32)
    paths = verified(folder, [f"task={task:03d}.parquet" for task in buffers.tasks])
    return np.stack([read_transitions(path, ["reward_features"])["reward_features"] for path in paths])


def _episode_table(head: dict[str, Any], rows: list[dict[str, Any]]) -> pa.Table:
    integers = ("task", "repetition", "episode", "context_transitions", "step", "env_steps")
    columns: dict[str, Any] = {
        key: pa.array([value] * len(rows), pa.int32() if key == "seed" else pa.string()) for key, value in head.items()
    }
    for key in [key for key in rows[0] if key != OWN]:
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


def _context_table(own: NDArray[np.float32], offline: NDArray[np.float32], tasks: Sequence[dict[str, Any]]) -> pa.Table:
    """Return the embeddings of contexts with their ``source``, the agent's ``own`` episodes or ``offline`` data."""
    parts = {"own": _embedding_table(own, tasks), "offline": _embedding_table(offline, tasks)}
    return pa.concat_tables(
        [table.append_column("source", pa.array([name] * len(table), pa.string())) for name, table in parts.items()]
    ).combine_chunks()


def _trajectory_table(last: Episodes, family: Family, tasks: Sequence[dict[str, Any]], count: int) -> pa.Table:
    """Return the last episode of the first ``count`` test tasks; the start has step 0 and reward 0."""
    places = [i for i, t in enumerate(tasks) if t["split"] == "test"][:count]
    path = last.path()
    steps = path.shape[1]
    values = np.where(last.valid, last.sparse_reward if family.returns == "sparse" else last.reward, 0)
    reward = np.concatenate([np.zeros((len(tasks), 1)), values], axis=1).astype(np.float32)[places]
    return pa.table(
        {
            "task": pa.array(np.repeat([tasks[i]["index"] for i in places], steps), pa.int32()),
            "step": pa.array(np.tile(np.arange(steps), len(places)), pa.int32()),
            "observation": _vectors(path[places].reshape(-1, path.shape[-1])),
            "reward": pa.array(reward.reshape(-1), pa.float32()),
        }
    )
