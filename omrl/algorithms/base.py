"""What meta-training and evaluation expect of an algorithm, and how its model is kept on disk."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omrl.core import registry, seeding
from omrl.core.config import Config, parse
from omrl.core.errors import UserError
from omrl.core.files import atomic_path, package_versions, read_json, write_json
from omrl.nets.actor_critic import Transitions
from omrl.nets.encoders import Context

MODEL, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Sizes:
    """What an algorithm knows of the environment.

    Attributes:
        observation, action: widths.
        context_next_observation: does the context hold s'?
    """

    observation: int
    action: int
    context_next_observation: bool

    @property
    def context(self) -> int:
        """Width of a context row: (s, a, r) or (s, a, r, s')."""
        return self.observation * (2 if self.context_next_observation else 1) + self.action + 1


@dataclass(frozen=True)
class BatchSizes:
    """What one update draws: tasks with replacement, and per drawn task two independent bags of rows.

    Attributes:
        meta_batch: tasks.
        context: transitions for the encoder.
        transitions: transitions for actor and critic.
    """

    meta_batch: int
    context: int
    transitions: int


@dataclass(frozen=True)
class MetaBatch:
    """One draw of the sampler: a repeated task has a context and transitions of its own each time.

    Attributes:
        tasks: int64 [meta_batch], places of the drawn tasks in the training set.
        context: for the encoder.
        transitions: for actor and critic.
        more: draws further transitions of the same tasks.
    """

    tasks: Tensor
    context: Context
    transitions: Transitions
    more: Callable[[], Transitions]


def pick_device(device: str = "auto") -> torch.device:
    """Return the device: the first GPU if there is one and ``auto`` is asked for."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


class MetaAlgorithm(abc.ABC):
    """One meta-RL method.

    Args:
        config: an instance of ``CONFIG``.
        sizes: of the environment.
        seed: of initial weights and of everything drawn inside an update.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    CONFIG: ClassVar[type[Config]]

    def __init__(self, config: Config, sizes: Sizes, seed: int, device: str = "auto") -> None:
        self.config, self.sizes, self.seed, self.device = config, sizes, seed, pick_device(device)
        self.generator = torch.Generator().manual_seed(seeding.integer(seed, "algorithm"))

    @classmethod
    def check(cls, config: Any, tasks: int, steps: int) -> str | None:
        """Return what in ``config`` does not fit so many training tasks and updates, as 'key = value: expected ...'."""
        return None

    @abc.abstractmethod
    def batch_sizes(self) -> BatchSizes:
        """Return what an update wants to draw."""

    @abc.abstractmethod
    def update(self, batch: MetaBatch) -> dict[str, Tensor]:
        """Take one gradient step; return scalars for the curves, as tensors on the device."""

    @abc.abstractmethod
    def infer(self, context: Context) -> Tensor:
        """Return the embeddings [tasks, latent] of a context, without gradient."""

    @abc.abstractmethod
    def act(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return the deterministic actions [tasks, n, action] for observations [tasks, n, width]."""

    @abc.abstractmethod
    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the parts whose parameters and buffers are the model."""

    @abc.abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""

    @abc.abstractmethod
    def generators(self) -> dict[str, torch.Generator]:
        """Return the random streams that updates draw from."""

    def model_state(self) -> dict[str, Tensor]:
        """Return the model's tensors by name, on the CPU."""
        return {
            f"{part}.{name}": tensor.detach().to("cpu").contiguous()
            for part, module in self.modules().items()
            for name, tensor in module.state_dict().items()
        }

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Take the model's tensors.

        Raises:
            ValueError: names or shapes are not this model's.
        """
        own = self.model_state()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
            raise ValueError(f"tensors {wrong[:3]} do not fit the configuration")
        for part, module in self.modules().items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def training_state(self) -> dict[str, Tensor]:
        """Return everything that continuing needs: model, optimizers, random streams."""
        state = {f"model/{name}": tensor for name, tensor in self.model_state().items()}
        for name, optimizer in self.optimizers().items():
            for place, entry in optimizer.state_dict()["state"].items():
                state |= {f"optimizer/{name}/{place}/{key}": value.cpu() for key, value in entry.items()}
        return state | {f"generator/{name}": g.get_state() for name, g in self.generators().items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take what ``training_state`` returned."""
        self.load_model_state({k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")})
        for name, optimizer in self.optimizers().items():
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                kind, *rest = key.split("/")
                if kind == "optimizer" and rest[0] == name:
                    entries.setdefault(int(rest[1]), {})[rest[2]] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        for name, generator in self.generators().items():
            generator.set_state(state[f"generator/{name}"])


def create(
    name: str, overrides: dict[str, Any], sizes: Sizes, seed: int, device: str = "auto", where: str = ""
) -> MetaAlgorithm:
    """Return an untrained algorithm.

    Args:
        name: file name in ``omrl/algorithms``.
        overrides: of its configuration.
        sizes: of the environment.
        seed: of weights and draws.
        device: see ``pick_device``.
        where: prefix of messages.

    Raises:
        UserError: unknown algorithm or configuration.
    """
    module = registry.load("omrl.algorithms", name, "algorithm")
    algorithm: MetaAlgorithm = module.ALGORITHM(
        parse(module.CONFIG, overrides, where or f"configuration of '{name}':"), sizes, seed, device
    )
    return algorithm


def save_model(algorithm: MetaAlgorithm, folder: str | Path, name: str, module: str) -> None:
    """Write ``model.safetensors`` and the resolved ``config.json`` to ``folder``.

    Args:
        algorithm: what was trained.
        folder: where to.
        name: of the cell in params.yaml.
        module: file name of the algorithm.
    """
    folder = Path(folder)
    with atomic_path(folder / MODEL) as temporary:
        save_file(algorithm.model_state(), temporary)
    write_json(
        folder / CONFIG,
        {
            "name": name,
            "algorithm": module,
            "config": algorithm.config.resolved(),
            "sizes": vars(algorithm.sizes),
            "seed": algorithm.seed,
            "packages": package_versions("torch", "safetensors"),
        },
    )


def load_model(folder: str | Path, device: str = "auto") -> MetaAlgorithm:
    """Load a model from its folder.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other; the message names it.
    """
    folder = Path(folder)
    saved = read_json(folder / CONFIG)
    hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
    try:
        sizes, name, config, seed = (
            Sizes(**saved["sizes"]),
            saved["algorithm"],
            saved["config"],
            saved["seed"],
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / CONFIG}: not the configuration of a model; {hint}") from None
    algorithm = create(name, config, sizes, seed, device, f"{folder / CONFIG}: config")
    path = folder / MODEL
    if not path.is_file():
        raise UserError(f"{path}: missing; {hint}")
    try:
        algorithm.load_model_state(load_file(path))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: damaged, or not of the configuration beside it ({error}); {hint}") from None
    return algorithm
