"""Meta-training: the loop over a method's phases, its curve, its snapshots, and how it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omrl.algorithms.base import CONFIG as MODEL_CONFIG
from omrl.algorithms.base import MODEL, Algorithm, Phase, Spec, create, save_model, standardized
from omrl.core import events, layout, seeding
from omrl.core.allocator import keep_memory
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, atomic_path, input_hashes, read_json, scratch, write_manifest, write_text
from omrl.core.precision import Kernels, set_kernels
from omrl.core.progress import Progress
from omrl.data.taskdata import TaskData
from omrl.envs.base import Family
from omrl.learning.sampler import Sampler

CURVE, TRAINING = "curve.csv", "training.safetensors"
_STATE = "training.safetensors"
_PACKAGES = ("numpy", "safetensors", "torch")


class MetaTrainConfig(Config):
    """Section ``meta_train``.

    Attributes:
        steps: gradient steps.
        log_every: steps per row of the curve; each row is the mean over them.
        checkpoint_every: steps between saves of the training state, from which a killed run goes on; saved at the next
            multiple of ``log_every``.
        keep: snapshots of the model along the way, evenly spaced, the last one at the end; the learning curves'
            points. 0 for none.
        optimizers: also publish the optimizers' state, from which stage ``online`` goes on.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        threads: CPU threads that PyTorch uses. Part of the params because one and two threads give different bits.
        matmul: ``float32``, or ``fast``: other kernels where as exact, see ``omrl.core.precision``; other bits.
        time_limit_terminal: count time-limit ends as terminal, as the released FOCAL code does (0.5 % of the
            rows with 200-step episodes).
        standardize_observations: methods see observations with mean 0 and standard deviation 1 in every entry, by the
            training data, as TD3+BC does. Worth it where entries have small or very different scales.
    """

    steps: Annotated[int, Field(ge=1, le=10**8)] = 2000
    log_every: Annotated[int, Field(ge=1, le=10**8)] = 100
    checkpoint_every: Annotated[int, Field(ge=1, le=10**8)] = 500
    keep: Annotated[int, Field(ge=0, le=1000)] = 0
    optimizers: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    matmul: Kernels = "float32"
    time_limit_terminal: bool = False
    standardize_observations: bool = False


class Curve:
    """The training curve: one row per ``log_every`` steps, each the mean over them, with the phase's name.

    Phases may report different scalars: a column is empty where a phase has no such scalar.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Count one step's scalars; nothing is copied off the device."""
        self._names = list(scalars)
        stacked = torch.stack([scalars[name].reshape(()) for name in self._names]).double()
        self._sum = stacked if self._sum is None else self._sum + stacked
        self._count += 1

    def close(self, step: int, phase: str) -> dict[str, float]:
        """Write the row that ends at ``step``; return its means."""
        if self._sum is None:
            raise ValueError("no step since the last row")
        means: list[float] = (self._sum / self._count).tolist()
        found = dict(zip(self._names, means, strict=True))
        self.rows.append({"step": str(step), "phase": phase} | {k: f"{value:.9g}" for k, value in found.items()})
        self._sum, self._count = None, 0
        return found

    def text(self) -> str:
        """Return the curve as CSV."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [",".join(columns), *(",".join(row.get(name, "") for name in columns) for row in self.rows)]
        return "\n".join(lines) + "\n"


@dataclass
class Position:
    """Where training stands.

    Attributes:
        step: updates taken, over all phases.
        curve: so far.
        snapshots: step -> the model's tensors then.
    """

    step: int = 0
    curve: Curve = field(default_factory=Curve)
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def _hash(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors; safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_state(path: Path, algorithm: Algorithm, sampler: Sampler | None, at: Position) -> None:
    """Write everything from which training goes on; without a sampler, at a place where a new one begins."""
    tensors = algorithm.training_state()
    if sampler is not None:
        tensors["generator/sampler"] = sampler.generator.get_state()
    tensors |= {f"snapshot/{step}/{k}": v for step, state in at.snapshots.items() for k, v in state.items()}
    about = json.dumps({"step": at.step, "rows": at.curve.rows, "sha256": _hash(tensors)})
    with atomic_path(path) as temporary:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, {"about": about})


def load_state(path: Path, algorithm: Algorithm, sampler: Sampler | None) -> Position:
    """Return the position that the saved state stands at; the start without one, or with a damaged one."""
    at = Position()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            about = json.loads(file.metadata()["about"])
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return at
    whole = about.get("sha256") == _hash(tensors)
    own = () if sampler is None else ("generator/sampler",)
    if not whole or not tensors.keys() >= {*algorithm.training_state(), *own}:
        return at
    for key in [key for key in tensors if key.startswith("snapshot/")]:
        _, step, name = key.split("/", 2)
        at.snapshots.setdefault(int(step), {})[name] = tensors.pop(key)
    if sampler is not None:
        sampler.generator.set_state(tensors.pop("generator/sampler"))
    algorithm.load_training_state(tensors)
    at.curve.rows, at.step = about["rows"], int(about["step"])
    return at


def snapshot_steps(steps: int, keep: int) -> list[int]:
    """Return the steps at which ``keep`` snapshots are taken: evenly spaced, the last one at the end."""
    return sorted({round(steps * (i + 1) / keep) for i in range(keep)} - {0}) if keep else []


def begin(algorithm: Algorithm, sampler: Sampler, phase: Phase, data: TaskData) -> None:
    """Let the method prepare for a phase; its columns join the data, of both datasets where it draws from both."""
    if columns := algorithm.begin(phase, data):
        found = {"transitions": data.with_columns(columns)}
        other = sampler.context
        if other is not None and any(draw.source == "context" for draw in phase.draws.values()):
            found["context"] = other.with_columns(algorithm.begin(phase, other))
        sampler.add(found)


def train(
    algorithm: Algorithm,
    sampler: Sampler,
    config: MetaTrainConfig,
    state: Path,
    description: str = "meta-training",
    data: TaskData | None = None,
    phases: list[Phase] | None = None,
    board: events.Writer | None = None,
) -> Position:
    """Take ``config.steps`` gradient steps, going on from ``state`` if an earlier run left one.

    A row of the curve closes at every multiple of ``log_every`` and at the end of a phase; the state is saved at
    the first row's end that is ``checkpoint_every`` or more steps after the last save.

    Args:
        algorithm: the method.
        sampler: serves its draws.
        config: section ``meta_train``.
        state: file of the unfinished state.
        description: shown with the progress.
        data: the transitions' dataset, which ``begin`` is shown; what the sampler has if None.
        phases: instead of the method's own.
        board: where the curve can be watched.

    Raises:
        UserError: a loss is no longer finite.
    """
    keep_memory()
    torch.set_num_threads(config.threads)
    set_kernels(config.matmul, algorithm.device.type)
    data = sampler.data if data is None else data
    own = phases is None
    phases = algorithm.phases(config.steps) if phases is None else phases
    total = sum(phase.steps for phase in phases)
    if own and total != config.steps:
        raise UserError(
            f"{type(algorithm).__name__}.phases({config.steps}) gives {total} steps: expected meta_train.steps in all"
        )
    kept = set(snapshot_steps(total, config.keep))
    at = load_state(state, algorithm, sampler)
    saved = shown = at.step
    with Progress(total, description, "steps") as progress:
        if at.step:
            progress.skip(at.step)
        first = 0
        for phase in phases:
            last = first + phase.steps
            if at.step < last:
                begin(algorithm, sampler, phase, data)
            for step in range(max(first, at.step) + 1, last + 1):
                at.curve.add(_scalars(algorithm, algorithm.update(phase, sampler.draw(phase))))
                at.step = step
                if step in kept:
                    at.snapshots[step] = {name: x.clone() for name, x in algorithm.model_state().items()}
                if step % config.log_every and step != last:
                    continue
                means = at.curve.close(step, phase.name)
                if board is not None:
                    board.scalars(step, means)
                progress.advance(step - shown, note=", ".join(f"{k} {v:.3g}" for k, v in list(means.items())[:3]))
                shown = step
                _refuse_divergence(means, step, description)
                if step - saved >= config.checkpoint_every:
                    save_state(state, algorithm, sampler, at)
                    saved = step
            first = last
    return at


def _scalars(algorithm: Algorithm, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``update`` gave if it is what it shall give."""
    name = f"{type(algorithm).__name__}.update"
    if not isinstance(found, dict):
        raise UserError(f"{name} returned {type(found).__name__}: expected a dict of name -> tensor with one number")
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name} returned {kind} as {key}: expected a tensor with one number")
    return found


def _refuse_divergence(means: dict[str, float], step: int, description: str) -> None:
    broken = [name for name, value in means.items() if value != value or abs(value) == float("inf")]
    if broken:
        raise UserError(
            f"{description}: {broken[0]} is not finite at step {step}: training diverged; lower the "
            "rates or the reward scale of this algorithm in params.yaml"
        )


def load_data(
    sources: Mapping[str, str], tasks: Sequence[int], inference: Literal["dense", "sparse"], time_limit_terminal: bool
) -> dict[str, TaskData]:
    """Return the datasets of a training, ``transitions`` and ``context``, which is absent where they are one."""
    return {
        role: TaskData.load(layout.datasets(name), tasks, inference, time_limit_terminal)
        for role, name in sources.items()
    }


def observation_scale(data: TaskData) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of every entry of the observations, all tasks alike.

    1e-3 is added to the latter, as in TD3+BC's release, so that an entry that never changes becomes 0.
    """
    seen = data.observation
    mean = seen.mean(axis=(0, 1), dtype=np.float64)
    square = sum(np.square(each - mean).mean(axis=0) for each in seen) / len(seen)  # task by task: data may be large
    return mean.tolist(), (np.sqrt(square) + 1e-3).tolist()


def make_sampler(algorithm: Algorithm, data: Mapping[str, TaskData], seed: int) -> Sampler:
    """Return the sampler of a training, with the method's own columns in the data."""
    own = {role: x.with_columns(c) if (c := algorithm.columns(x)) else x for role, x in data.items()}
    return Sampler(own["transitions"], seed, algorithm.device, own.get("context"))


def build_model(
    *,
    name: str,
    module: str,
    overrides: dict[str, Any],
    sources: Mapping[str, str],
    dataset: str,
    seed: int,
    config: MetaTrainConfig,
    spec: Spec,
    inference: Literal["dense", "sparse"],
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Meta-train one cell and publish its folder; a killed run goes on where it was.

    Args:
        name: of the cell's algorithm in params.yaml; a free name, on which no random number depends.
        module: its file name.
        overrides: of its configuration.
        sources: ``transitions`` and, where it is another one, ``context`` -> name of a dataset.
        dataset: name of the training dataset or pair.
        seed: of this cell.
        config: section ``meta_train``.
        spec: of the environment; the number of training tasks is set here.
        inference: which reward inference may see.
        code: fingerprint files this depends on.
        target: ``data/models/<name>/<dataset>/<seed>``.

    Raises:
        UserError: a dataset file is missing or damaged, or training diverged.
    """
    tasks = read_json(layout.TASKS)["train"]
    inputs = input_hashes(layout.TASKS, *(layout.datasets(x) for x in sources.values()), *code)
    own_seed = seeding.integer(seed, "meta_train")
    spec = replace(spec, tasks=len(tasks))
    algorithm = create(module, overrides, spec, own_seed, config.device, f"params.yaml: algorithms.{name}")
    parameters = {
        "algorithm": name,
        "module": module,
        "config": algorithm.config.resolved(),
        "dataset": dataset,
        "sources": dict(sources),
        "seed": seed,
        "meta_train": config.resolved(),
        "device": algorithm.device.type,
    }
    with scratch("meta_train", {**parameters, "inputs": inputs}, _PACKAGES) as work:
        data = load_data(sources, tasks, inference, config.time_limit_terminal)
        if config.standardize_observations:
            algorithm = standardized(algorithm, *observation_scale(data["transitions"]))
        sampler = make_sampler(algorithm, data, own_seed)
        board = events.writer(f"meta_train/{name}/{dataset}/{seed}")
        done = train(algorithm, sampler, config, work / _STATE, f"{name} on {dataset}, seed {seed}", board=board)
        with atomic_dir(target) as folder:
            files = publish(algorithm, done, folder, name, module, config.optimizers)
            write_manifest(folder, kind="model", inputs=inputs, parameters=parameters, files=files, packages=_PACKAGES)


def publish(
    algorithm: Algorithm, done: Position, folder: Path, name: str, module: str, optimizers: bool
) -> dict[str, int | None]:
    """Write a trained model, its curve and snapshots; return the files and their rows.

    Args:
        algorithm: what was trained.
        done: where training ended.
        folder: where to.
        name: of the cell.
        module: file name of the algorithm.
        optimizers: also the optimizers and random streams, from which a later phase goes on.
    """
    save_model(algorithm, folder, name, module)
    write_text(folder / CURVE, done.curve.text())
    files: dict[str, int | None] = {MODEL: None, MODEL_CONFIG: None, CURVE: len(done.curve.rows)}
    for step, tensors in done.snapshots.items():
        with atomic_path(folder / snapshot_name(step)) as temporary:
            save_file(tensors, temporary)
        files[snapshot_name(step)] = None
    if optimizers:
        with atomic_path(folder / TRAINING) as temporary:
            save_file({k: v.clone() for k, v in algorithm.training_state().items()}, temporary)
        files[TRAINING] = None
    return files


def snapshot_name(step: int) -> str:
    """Return the file name of a snapshot in a model's folder."""
    return f"snapshot={step:08d}.safetensors"


def spec_of(family: Family, tasks: int = 1) -> Spec:
    """Return what a method knows of the environment."""
    return Spec(
        family.observation_size, family.action_size, family.context_next_observation, family.horizon, tasks,
        family.varies,
    )  # fmt: skip
