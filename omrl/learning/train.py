"""Meta-training: a sampler over datasets in memory, the loop, its curve, and how it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omrl.algorithms.base import CONFIG as MODEL_CONFIG
from omrl.algorithms.base import MODEL, BatchSizes, MetaAlgorithm, MetaBatch, Sizes, create, save_model
from omrl.core import layout, seeding
from omrl.core.allocator import keep_memory
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, atomic_path, input_hashes, read_json, scratch, write_manifest, write_text
from omrl.core.precision import Kernels, set_kernels
from omrl.core.progress import Progress
from omrl.data.taskdata import ORDER, TaskBuffers
from omrl.nets.actor_critic import Transitions
from omrl.nets.encoders import Context

CURVE = "curve.csv"
_STATE = "training.safetensors"
_PACKAGES = ("numpy", "safetensors", "torch")


class MetaTrainConfig(Config):
    """Section ``meta_train``.

    Attributes:
        steps: gradient steps.
        log_every: steps per row of the curve; each row is the mean over them.
        checkpoint_every: steps between saves of the training state, from which a killed run goes on.
        threads: of torch. Part of the params because one and two threads give different bits.
        matmul: ``float32``, or ``fast``: other kernels where as exact, see ``omrl.core.precision``; other bits.
        time_limit_terminal: count time-limit ends as terminal, as the released FOCAL code does (0.5 % of the
            rows with 200-step episodes).
    """

    steps: Annotated[int, Field(ge=1, le=10**8)] = 2000
    log_every: Annotated[int, Field(ge=1, le=10**8)] = 100
    checkpoint_every: Annotated[int, Field(ge=1, le=10**8)] = 500
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    matmul: Kernels = "float32"
    time_limit_terminal: bool = False


class Sampler:
    """Draws meta-batches from datasets in memory.

    All columns lie side by side in one table [tasks * rows, width] on the device, so that a draw is one
    gather. Tasks are drawn with replacement, rows uniformly with replacement.

    Args:
        buffers: the training tasks' transitions.
        sizes: what to draw.
        context_next_observation: does the context hold s'?
        seed: of the draws.
        device: where the table lies.
    """

    def __init__(
        self,
        buffers: TaskBuffers,
        sizes: BatchSizes,
        context_next_observation: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._sizes, self._with_next, self._rows, self._device = (
            sizes,
            context_next_observation,
            buffers.rows,
            device,
        )
        self._tasks = len(buffers.tasks)
        self._widths = [1 if getattr(buffers, n).ndim == 2 else getattr(buffers, n).shape[2] for n in ORDER]
        table = torch.from_numpy(buffers.packed())
        self._table = table.reshape(self._tasks * self._rows, -1).to(device)
        self.generator = torch.Generator(device).manual_seed(seeding.integer(seed, "sampler"))

    def _draw(self, tasks: Tensor, count: int) -> list[Tensor]:
        shape = (len(tasks), count)
        rows = torch.randint(self._rows, shape, generator=self.generator, device=self._device)
        flat = (tasks[:, None] * self._rows + rows).reshape(-1)
        drawn = self._table.index_select(0, flat).view(*shape, -1)
        return list(drawn.split(self._widths, dim=-1))

    def _transitions(self, parts: list[Tensor]) -> Transitions:
        s, a, r, s2, terminal, _ = parts
        return Transitions(s, a, r.squeeze(-1), s2, terminal.squeeze(-1))

    def _context(self, parts: list[Tensor]) -> Context:
        s, a, _, s2, _, sparse = parts
        return Context(s, a, sparse.squeeze(-1), s2 if self._with_next else None)

    def draw(self) -> MetaBatch:
        """Return a meta-batch."""
        tasks = torch.randint(self._tasks, (self._sizes.meta_batch,), generator=self.generator, device=self._device)
        transitions = self._draw(tasks, self._sizes.transitions)
        context = self._draw(tasks, self._sizes.context) if self._sizes.context else transitions
        return MetaBatch(
            tasks,
            self._context(context),
            self._transitions(transitions),
            lambda: self._transitions(self._draw(tasks, self._sizes.transitions)),
        )


class Curve:
    """The training curve: one row per ``log_every`` steps, each the mean over them."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Count one step's scalars; nothing is copied off the device."""
        self._names = list(scalars)
        stacked = torch.stack([scalars[name].reshape(()) for name in self._names]).double()
        self._sum = stacked if self._sum is None else self._sum + stacked
        self._count += 1

    def close(self, step: int) -> dict[str, float]:
        """Write the row that ends at ``step``; return it."""
        if self._sum is None:
            raise ValueError("no step since the last row")
        means = (self._sum / self._count).tolist()
        if not self.rows:
            self.rows.append(",".join(["step", *self._names]))
        self.rows.append(",".join([str(step), *(f"{value:.9g}" for value in means)]))
        self._sum, self._count = None, 0
        return dict(zip(self._names, means, strict=True))


def _hash(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors; safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save_state(path: Path, algorithm: MetaAlgorithm, sampler: Sampler, curve: Curve, step: int) -> None:
    tensors = algorithm.training_state() | {"generator/sampler": sampler.generator.get_state()}
    about = json.dumps({"step": step, "rows": curve.rows, "sha256": _hash(tensors)})
    with atomic_path(path) as temporary:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, {"about": about})


def _load_state(path: Path, algorithm: MetaAlgorithm, sampler: Sampler, curve: Curve) -> int:
    """Return the step that the saved state stands at; 0 without one, or with a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            about = json.loads(file.metadata()["about"])
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return 0
    whole = about.get("sha256") == _hash(tensors)
    if not whole or not tensors.keys() >= {*algorithm.training_state(), "generator/sampler"}:
        return 0
    sampler.generator.set_state(tensors.pop("generator/sampler"))
    algorithm.load_training_state(tensors)
    curve.rows = about["rows"]
    return int(about["step"])


def train(
    algorithm: MetaAlgorithm,
    sampler: Sampler,
    config: MetaTrainConfig,
    state: Path,
    description: str = "meta-training",
) -> Curve:
    """Take ``config.steps`` gradient steps, going on from ``state`` if an earlier run left one.

    A row of the curve closes at every multiple of ``log_every`` and at the last step; the state is saved at
    the first row's end at or after each multiple of ``checkpoint_every``.

    Raises:
        UserError: a loss is no longer finite.
    """
    keep_memory()
    torch.set_num_threads(config.threads)
    set_kernels(config.matmul)
    curve = Curve()
    done = _load_state(state, algorithm, sampler, curve)
    saved = done
    with Progress(config.steps, description, "steps") as progress:
        if done:
            progress.skip(done)
        shown = done
        for step in range(done + 1, config.steps + 1):
            curve.add(algorithm.update(sampler.draw()))
            if step % config.log_every and step != config.steps:
                continue
            means = curve.close(step)
            progress.advance(step - shown, note=", ".join(f"{k} {v:.3g}" for k, v in list(means.items())[:3]))
            shown = step
            broken = [name for name, value in means.items() if value != value or abs(value) == float("inf")]
            if broken:
                raise UserError(
                    f"{description}: {broken[0]} is not finite at step {step}: training diverged; lower the "
                    "rates or the reward scale of this algorithm in params.yaml"
                )
            if step - saved >= config.checkpoint_every:
                _save_state(state, algorithm, sampler, curve, step)
                saved = step
    return curve


def build_model(
    *,
    name: str,
    module: str,
    overrides: dict[str, Any],
    dataset: str,
    seed: int,
    config: MetaTrainConfig,
    sizes: Sizes,
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Meta-train one cell and publish its folder; a killed run goes on where it was.

    Args:
        name: of the cell's algorithm in params.yaml.
        module: its file name.
        overrides: of its configuration.
        dataset: name of the training dataset.
        seed: of this cell.
        config: section ``meta_train``.
        sizes: of the environment.
        code: fingerprint files this depends on.
        target: ``data/models/<name>/<dataset>/<seed>``.

    Raises:
        UserError: a dataset file is missing or damaged, or training diverged.
    """
    source = layout.datasets(dataset)
    tasks = read_json(layout.TASKS)["train"]
    inputs = input_hashes(layout.TASKS, source, *code)
    own_seed = seeding.integer(seed, "meta_train", name, dataset)
    algorithm = create(module, overrides, sizes, own_seed, where=f"params.yaml: algorithms.{name}")
    key = {
        "name": name,
        "dataset": dataset,
        "seed": seed,
        "meta_train": config.resolved(),
        "config": algorithm.config.resolved(),
        "inputs": inputs,
        "device": algorithm.device.type,
    }
    with scratch("meta_train", key, _PACKAGES) as work:
        buffers = TaskBuffers.load(source, tasks, config.time_limit_terminal)
        sampler = Sampler(buffers, algorithm.batch_sizes(), sizes.context_next_observation, own_seed, algorithm.device)
        curve = train(algorithm, sampler, config, work / _STATE, f"{name} on {dataset}, seed {seed}")
        with atomic_dir(target) as folder:
            save_model(algorithm, folder, name, module)
            write_text(folder / CURVE, "\n".join(curve.rows) + "\n")
            write_manifest(
                folder,
                kind="model",
                inputs=inputs,
                parameters={
                    "algorithm": name,
                    "module": module,
                    "config": algorithm.config.resolved(),
                    "dataset": dataset,
                    "seed": seed,
                    "meta_train": config.resolved(),
                    "device": algorithm.device.type,
                },
                files={MODEL: None, MODEL_CONFIG: None, CURVE: len(curve.rows) - 1},
                packages=_PACKAGES,
            )
