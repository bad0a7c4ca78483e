"""What a meta-environment is: a distribution of tasks, one reward function, a single and a batched form."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.registration import register
from numpy.typing import NDArray

from omrl.core import registry
from omrl.core.config import Config, parse
from omrl.core.errors import UserError

Array = NDArray[np.float32]
Task = dict[str, Any]  # JSON numbers and lists


@dataclass(frozen=True)
class StepResult:
    """One step of B parallel copies. Time limits are the caller's business.

    Attributes:
        next_observation: float32 [B, observation_size].
        reward: dense, float32 [B].
        sparse_reward: float32 [B]; equal to ``reward`` where the family has no sparse version.
        terminated: bool [B].
        features: float32 [B, feature_size], what the reward function needs beyond (s, a, s').
    """

    next_observation: Array
    reward: Array
    sparse_reward: Array
    terminated: NDArray[np.bool_]
    features: Array


class BatchEnv(abc.ABC):
    """B copies that step together; the copies of a task are neighbours: row = task * copies + copy."""

    observation: Array  # [B, observation_size]

    @abc.abstractmethod
    def reset(self, rngs: Sequence[np.random.Generator] | None = None, rows: NDArray[np.intp] | None = None) -> Array:
        """Start a new episode in every copy, or in copies ``rows`` alone; return all observations.

        ``rngs`` has one stream for each copy that starts, where starts are random.
        """

    def get_state(self) -> NDArray[np.float64]:
        """Return what a step starts from, float64 [B, k]: the observations, where they are the state."""
        return self.observation.astype(np.float64)

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Go to where ``get_state`` was called."""
        self.observation = state.astype(np.float32)

    @abc.abstractmethod
    def step(self, actions: Array) -> StepResult:
        """Apply agent-scale actions, float32 [B, action_size] in [-1, 1] (clipped)."""


class Family(abc.ABC):
    """A distribution of tasks over one Gymnasium environment, for one resolved configuration."""

    name: ClassVar[str]
    env_id: ClassVar[str]
    CONFIG: ClassVar[type[Config]]
    observation_size: int  # of the class, or of the instance where the configuration chooses
    action_size: ClassVar[int]
    feature_size: ClassVar[int] = 0
    horizon: ClassVar[int]  # steps of a test episode
    varies: ClassVar[str]  # "reward" or "dynamics": what tasks differ in
    returns: ClassVar[str]  # "dense" or "sparse": the return that the papers report
    context_next_observation: ClassVar[bool]  # does the context encoder see s'?
    renders: ClassVar[bool] = False  # is there a simulator to look into?
    capacity: int | None  # how many tasks there are; None: no limit

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def sample(self, index: int, seed: int) -> Task:
        """Return task ``index``; a function of (seed, index) only.

        Raises:
            UserError: the family has no such task.
        """

    @abc.abstractmethod
    def reward(
        self, task: Task, observation: Array, action: Array, next_observation: Array, features: Array
    ) -> tuple[Array, Array]:
        """Return dense and sparse reward of N transitions under ``task``: pure, vectorized, float32 [N] each.

        Stepping and relabelling call this one function.
        """

    @abc.abstractmethod
    def batch(self, tasks: Sequence[Task], copies: int = 1, threads: int = 1) -> BatchEnv:
        """Return the batched form: ``copies`` copies of every task.

        A simulator may use ``threads`` threads; the numbers do not depend on it.
        """

    def oracle_return(self, task: Task) -> float | None:
        """Return what the best controller that knows the task collects in ``horizon`` steps; None: not known."""
        return None

    @abc.abstractmethod
    def random_return(self, task: Task) -> float:
        """Return what uniform random actions collect in ``horizon`` steps, in expectation."""

    def normalize(self, task_row: dict[str, Any], value: Any, best: float | None = None) -> Any:
        """Return (value - random) / (top - random) for a row of data/tasks/all.json: 0 random, 1 top.

        The top is the oracle's return. Where it is not known, it is ``best``, what the best policy at hand
        collects; without that, NaN.
        """
        floor, oracle = task_row["random_return"], task_row["oracle_return"]
        top = oracle if oracle is not None else best
        return value * np.nan if top is None else (value - floor) / (top - floor)

    def make(self, task: Task, horizon: int | None = None) -> gymnasium.Env[Any, Any]:
        """Return the single form: a Gymnasium environment that truncates after ``horizon`` steps."""
        return gymnasium.make(
            self.env_id, max_episode_steps=horizon or self.horizon, task=task, config=self.config.resolved()
        )

    def spec(self) -> dict[str, Any]:
        """Return what identifies the environment in a file's footer."""
        return {
            "family": self.name,
            "env_id": self.env_id,
            "config": self.config.resolved(),
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "feature_size": self.feature_size,
            "horizon": self.horizon,
            "varies": self.varies,
            "returns": self.returns,
        }

    def references(self, task: Task) -> dict[str, float]:
        """Return further controllers worth a row beside the results: name -> return."""
        return {}

    def plane(self, task: Task) -> dict[str, Any] | None:
        """Return what a picture of the plane shows of ``task`` ({"goal": [x, y], "radius": r}), None if nothing."""
        return None

    def picture(self, task: Task) -> NDArray[np.uint8]:
        """Return a rendered picture of the start of an episode, uint8 [height, width, 3].

        Raises:
            UserError: this family has none, or there is no OpenGL.
        """
        raise UserError(f"'{self.name}' has no rendered picture")

    def _check_index(self, index: int) -> None:
        if index < 0 or (self.capacity is not None and index >= self.capacity):
            limit = "" if self.capacity is None else f"0..{self.capacity - 1}"
            raise UserError(
                f"task index {index} is out of range: '{self.name}' has tasks {limit or '0 and up'}; "
                "see tasks.train and tasks.test in params.yaml"
            )


def config_class(name: str) -> type[Config]:
    """Return the configuration class of a family."""
    return registry.load("omrl.envs", name, "environment").FAMILY.CONFIG


def load_family(name: str, config: dict[str, Any] | None = None) -> Family:
    """Return the family ``name`` with ``config`` as overrides of its defaults.

    Raises:
        UserError: no such family, or a configuration it refuses.
    """
    cls = registry.load("omrl.envs", name, "environment").FAMILY
    return cls(parse(cls.CONFIG, config, f"configuration of '{name}':"))


def register_all() -> None:
    """Register every family's id with Gymnasium."""
    for name in registry.names("omrl.envs"):
        module = registry.load("omrl.envs", name)
        entry_point = f"{module.__name__}:ENV"
        taken = gymnasium.registry.get(module.FAMILY.env_id)
        if taken is None:
            register(id=module.FAMILY.env_id, entry_point=entry_point, max_episode_steps=module.FAMILY.horizon)
        elif taken.entry_point != entry_point:
            raise ValueError(f"{entry_point}: env_id '{module.FAMILY.env_id}' is taken by {taken.entry_point}")
