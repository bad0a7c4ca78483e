"""The names of ``import omrl``: from data to a table in a notebook, without a pipeline.

    data = omrl.load_dataset("data/datasets/expert")
    family = omrl.make_family("sparse-point-robot")
    agent = omrl.fit("focal", data, family, steps=2000, latent_dim=5)
    belief = agent.adapt(data.context(task=3, rows=200))
    table = omrl.evaluate(agent, family, data, protocol="offline-context")

Errors that a person can mend are ``omrl.core.errors.UserError``, one line each. The numbers are those of the pipeline:
the same method, data, steps, seed and threads give the same weights as stage ``meta_train``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from omrl.algorithms.base import CONFIG as MODEL_CONFIG
from omrl.algorithms.base import PACKAGE as ALGORITHMS
from omrl.algorithms.base import (
    Algorithm,
    Belief,
    Draw,
    Spec,
    algorithm_module,
    build,
    load_model,
    load_tensors,
    save_model,
    standardized,
)
from omrl.core import layout, registry, seeding
from omrl.core.config import parse
from omrl.core.errors import UserError, suggest
from omrl.core.files import read_json
from omrl.data.cards import describe as describe_folder
from omrl.data.taskdata import TaskData
from omrl.envs.base import PACKAGE as ENVS
from omrl.envs.base import Array, Family, load_family
from omrl.evaluation.contexts import draw_rows, gather
from omrl.evaluation.evaluate import parse_evaluate, reward_features
from omrl.evaluation.protocols.base import Run
from omrl.evaluation.protocols.base import protocol as protocol_module
from omrl.evaluation.protocols.base import protocols as protocol_names
from omrl.learning.train import Curve, MetaTrainConfig, make_sampler, observation_scale, spec_of, train
from omrl.nets.experience import Experience

CURVE = "curve.csv"


@dataclass(frozen=True)
class Dataset:
    """A dataset of a pipeline, in memory.

    Attributes:
        folder: ``data/datasets/<name>``.
        data: transitions of all tasks: float32 ``observation`` [tasks, rows, width], ``reward`` [tasks, rows], ...
        tasks: a row per task: index, split (``train`` or ``test``), parameters, oracle and random return.
        env: name of the family.
    """

    folder: Path
    data: TaskData
    tasks: tuple[dict[str, Any], ...]
    env: str

    @property
    def rows(self) -> int:
        """Transitions per task."""
        return self.data.rows

    def indices(self, split: str | None = None) -> list[int]:
        """Return the indices of all tasks, or of those of a split, ``train`` or ``test``."""
        return [task["index"] for task in self.tasks if split in (None, task["split"])]

    def training(self) -> TaskData:
        """Return the transitions of the training tasks."""
        return self.data.of([place for place, task in enumerate(self.tasks) if task["split"] == "train"])

    def context(self, task: int, rows: int, seed: int = 0, agent: Agent | None = None) -> Experience:
        """Return ``rows`` random transitions of a task, with replacement: [1, rows, ...].

        Args:
            task: its index.
            rows: how many transitions.
            seed: of the draw.
            agent: draw as its method asks for it (windows or whole episodes, with its own columns), about so many.

        Raises:
            UserError: no such task, or ``rows`` below 1.
        """
        if task not in self.data.tasks:
            raise UserError(f"task = {task}: {self.folder} has tasks {self.data.tasks[0]} to {self.data.tasks[-1]}")
        if rows < 1:
            raise UserError(f"rows = {rows}: expected 1 or more")
        data = self.data.of([self.data.tasks.index(task)])
        draw, device = Draw(rows), torch.device("cpu")
        if agent is not None:
            draw, device = agent.algorithm.context_draw(rows), agent.algorithm.device
            data = data.with_columns(own) if (own := agent.algorithm.columns(data)) else data
        rng = seeding.generator(seed, "context", task)
        return gather(data, [draw_rows(data, 0, draw, rng)], device)


class Agent:
    """A trained method: it adapts to a task from data, and acts.

    Attributes:
        algorithm: the method itself, see ``omrl.algorithms.base``.
        curve: of its training, a row per 100 steps; None if it was loaded without one.
    """

    def __init__(self, algorithm: Algorithm, module: str, curve: pd.DataFrame | None = None) -> None:
        self.algorithm, self.curve, self._module = algorithm, curve, module

    def __repr__(self) -> str:
        return f"Agent({self._module}, {self.algorithm.config!r})"

    def prior(self, tasks: int = 1) -> Belief:
        """Return the belief of ``tasks`` tasks of which nothing is known."""
        return self.algorithm.prior(tasks)

    def adapt(self, context: Experience, belief: Belief | None = None) -> Belief:
        """Return the belief after a context [tasks, rows, ...], from ``belief``, else from the prior."""
        known = self.prior(context.shape[0]) if belief is None else belief
        return self.algorithm.adapt(known, context.to(self.algorithm.device))

    def act(self, belief: Belief, observation: Any) -> Array:
        """Return deterministic actions in [-1, 1], float32 [tasks, width], for observations [tasks, width].

        An observation [width] gives an action [width].

        Raises:
            UserError: another width than the environment's.
        """
        seen = np.asarray(observation, dtype=np.float32)
        if seen.ndim not in (1, 2) or seen.shape[-1] != self.algorithm.spec.observation:
            raise UserError(
                f"observation of shape {list(seen.shape)}: expected [tasks, {self.algorithm.spec.observation}]"
            )
        with torch.no_grad():
            action = self.algorithm.act(belief, torch.from_numpy(np.atleast_2d(seen)).to(self.algorithm.device))
        found: Array = action.cpu().numpy().reshape(*seen.shape[:-1], -1)
        return found

    def embedding(self, belief: Belief) -> NDArray[np.float32] | None:
        """Return the embeddings [tasks, latent]; None for a method without."""
        found = self.algorithm.embedding(belief)
        return None if found is None else found.detach().cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Write ``model.safetensors``, ``config.json`` and the curve to the folder ``path``, made if absent."""
        Path(path).mkdir(parents=True, exist_ok=True)
        save_model(self.algorithm, path, self._module, self._module)
        if self.curve is not None:
            self.curve.to_csv(Path(path) / CURVE, index=False)


def list_algorithms() -> list[str]:
    """Return the names of all methods, installed plug-ins included."""
    return registry.names(ALGORITHMS)


def list_environments() -> list[str]:
    """Return the names of all families, installed plug-ins included."""
    return registry.names(ENVS)


def list_protocols() -> list[str]:
    """Return the names of all evaluation protocols."""
    return list(protocol_names())


def load_dataset(path: str | Path) -> Dataset:
    """Read a dataset of a built pipeline, every file compared with its manifest.

    Args:
        path: ``.../data/datasets/<name>``; the tasks are read from ``data/tasks/all.json`` beside it.

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = Path(path)
    about = read_json(folder.resolve().parents[1] / layout.TASKS.relative_to(layout.DATA))
    tasks = tuple(about["tasks"])
    data = TaskData.load(folder, [task["index"] for task in tasks], about["spec"]["inference_reward"])
    return Dataset(folder, data, tasks, about["env"])


def make_family(name: str, **config: Any) -> Family:
    """Return an environment family: a distribution of tasks over one environment.

    Args:
        name: one of ``list_environments()``, or a module ``package.module``.
        config: overrides of its defaults.

    Raises:
        UserError: no such family, or a configuration that it refuses.
    """
    return load_family(name, config)


def fit(
    method: str | type[Algorithm],
    data: Dataset,
    family: Family,
    *,
    steps: int = 2000,
    seed: int = 0,
    device: str = "auto",
    threads: int = 2,
    standardize_observations: bool = False,
    **settings: Any,
) -> Agent:
    """Meta-train a method on the training tasks of a dataset.

    Args:
        method: a name of ``list_algorithms()``, a module ``package.module``, or a class.
        data: the dataset.
        family: its family.
        steps: gradient steps, 1 or more.
        seed: of weights and draws.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        threads: of torch; two threads give other bits than one.
        standardize_observations: the method sees observations with mean 0 and standard deviation 1 in every entry.
        settings: overrides of the method's configuration.

    Raises:
        UserError: unknown method, setting or device, another family than the data's, a loss that is not finite.
    """
    _same_family(data, family)
    config = parse(MetaTrainConfig, {"steps": steps, "device": device, "threads": threads}, "fit:")
    tasks = data.training()
    spec = spec_of(family, len(tasks.tasks))
    cls, name = _method(method)
    values = parse(cls.CONFIG, settings, f"fit: settings of '{name}'")
    if wrong := cls.check(values, spec, steps):
        raise UserError(f"fit: {wrong}")
    own_seed = seeding.integer(seed, "meta_train")
    algorithm = build(cls, values, spec, own_seed, device)
    if standardize_observations:
        algorithm = standardized(algorithm, *observation_scale(tasks))
    with tempfile.TemporaryDirectory() as scratch:
        sampler = make_sampler(algorithm, {"transitions": tasks}, own_seed)
        done = train(algorithm, sampler, config, Path(scratch) / "state", f"fit {name}")
    return Agent(algorithm, name, _frame(done.curve))


def load_agent(path: str | Path, *, device: str = "auto", method: type[Algorithm] | None = None) -> Agent:
    """Load what ``Agent.save`` or stage ``meta_train`` wrote.

    Args:
        path: the folder, ``data/models/...`` of a pipeline for instance.
        device: ``auto``, ``cpu`` or ``cuda``.
        method: the class, if it cannot be imported by its module's name (one of a notebook).

    Raises:
        UserError: a file is missing or damaged, or the method cannot be imported.
    """
    folder = Path(path)
    saved = read_json(folder / MODEL_CONFIG)
    if method is None:
        algorithm = load_model(folder, device)
    else:
        values = parse(method.CONFIG, saved.get("config"), f"{folder / MODEL_CONFIG}: config")
        try:
            algorithm = build(method, values, Spec(**saved["spec"]), saved["seed"], device)
        except (KeyError, TypeError):
            raise UserError(f"{folder / MODEL_CONFIG}: not the configuration of a model") from None
        load_tensors(algorithm, folder / "model.safetensors")
    curve = pd.read_csv(folder / CURVE) if (folder / CURVE).is_file() else None
    return Agent(algorithm, saved["algorithm"], curve)


def evaluate(
    agent: Agent, family: Family, data: Dataset, protocol: str = "offline-context", seed: int = 0, **settings: Any
) -> pd.DataFrame:
    """Let an agent adapt to every task of a dataset and act.

    Args:
        agent: what ``fit`` returned.
        family: of the dataset.
        data: where contexts are from.
        protocol: one of ``list_protocols()``.
        seed: of contexts and random starts.
        settings: of the protocol, such as ``episodes`` and ``repetitions``.

    Returns:
        A row per repetition, episode and task: ``task``, ``split``, ``return`` (the one that papers report),
        ``normalized`` (0 random, 1 oracle), ``counted`` (True for the episodes that results are made of), ...

    Raises:
        UserError: unknown protocol or setting, a protocol that the method cannot serve, another family.
    """
    _same_family(data, family)
    common, own = parse_evaluate({"protocol": protocol, **settings}, "evaluate:")
    algorithm = agent.algorithm
    if protocol not in algorithm.PROTOCOLS:
        raise UserError(f"protocol = '{protocol}': {agent!r:.40} serves {', '.join(sorted(algorithm.PROTOCOLS))}")
    least = algorithm.least_context(algorithm.config)
    for key in ("context_per_episode", "context"):
        if isinstance(size := getattr(own, key, None), int) and size < least:
            raise UserError(
                f"evaluate: {key} = {size}: expected {least} or more, the fewest that {agent!r:.40} adapts to"
            )
    buffers = data.data
    if columns := algorithm.columns(buffers):
        buffers = buffers.with_columns(columns)
    features = reward_features(data.folder, buffers, family) if protocol == "ood-checkpoint" else None
    run = Run(algorithm, family, buffers, data.tasks, own, ("evaluate", common.protocol), seed, features)
    with torch.no_grad():
        protocol_module(protocol).run(run)
    return pd.DataFrame(run.rows)


def describe(what: Dataset | Agent | Family | str | Path) -> str:
    """Return a text about a dataset (or its folder), an agent or a family.

    Raises:
        UserError: a path that is no dataset.
    """
    if isinstance(what, Agent):
        settings = ", ".join(f"{key} {value}" for key, value in what.algorithm.config.resolved().items())
        return f"{what._module} on {what.algorithm.device}: {settings}"
    if isinstance(what, Family):
        return "\n".join(f"{key}: {value}" for key, value in what.spec().items())
    return describe_folder(what.folder if isinstance(what, Dataset) else what)


def _frame(curve: Curve) -> pd.DataFrame:
    frame = pd.DataFrame(curve.rows)
    numbers = [name for name in frame.columns if name != "phase"]
    return frame.astype({"step": int}).astype({name: float for name in numbers if name != "step"})


def _same_family(data: Dataset, family: Family) -> None:
    if data.env != family.name:
        raise UserError(f"{data.folder} is of the family '{data.env}', not '{family.name}'")


def _method(method: str | type[Algorithm]) -> tuple[type[Algorithm], str]:
    """Return a method's class, and the name by which it is found again."""
    if isinstance(method, str):
        if "." not in method and method not in list_algorithms():
            raise UserError(f"fit: unknown method '{method}': {suggest(method, list_algorithms())}")
        return algorithm_module(method).ALGORITHM, method
    if not (isinstance(method, type) and issubclass(method, Algorithm)):
        raise UserError(f"fit: method = {method!r}: expected a name, a module or a class of omrl's Algorithm")
    if missing := sorted(method.__abstractmethods__):
        raise UserError(f"fit: {method.__name__} lacks {', '.join(missing)}")
    module = method.__module__
    ours = module.startswith(f"{ALGORITHMS}.")
    return method, module.removeprefix(f"{ALGORITHMS}.").replace("_", "-") if ours else module
