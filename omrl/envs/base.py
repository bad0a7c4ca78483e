"""What a meta-environment is: a distribution of tasks, one reward function, a single and a batched form."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import register
from numpy.typing import NDArray

from omrl.core import registry, seeding
from omrl.core.config import Config, parse
from omrl.core.errors import UserError

PACKAGE, NEEDS = "omrl.envs", ("FAMILY", "ENV")
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
    """B copies that step together; the copies of a task are neighbors: row = task * copies + copy."""

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

    def render(self, row: int = 0, path: Sequence[Array] = ()) -> NDArray[np.uint8]:
        """Return a picture of copy ``row``, uint8 [height, width, 3].

        Args:
            row: which copy.
            path: its observations so far, for those that draw where it was.

        Raises:
            UserError: nothing here can be drawn, or there is no OpenGL.
        """
        raise UserError(f"{type(self).__name__} has no picture: it has no method render")


class Family(abc.ABC):
    """A distribution of tasks over one Gymnasium environment, for one resolved configuration."""

    name: ClassVar[str]
    env_id: ClassVar[str]
    CONFIG: ClassVar[type[Config]]
    observation_size: int  # of the class, or of the instance where the configuration chooses
    action_size: ClassVar[int]
    feature_size: ClassVar[int] = 0
    horizon: int  # steps of a test episode; of the class, or of the instance
    varies: ClassVar[str]  # "reward" or "dynamics": what tasks differ in
    returns: ClassVar[str]  # "dense" or "sparse": the return that the papers report
    # The reward that task inference sees; the actor-critic always has the dense one. Sparse where a paper feeds that
    # (FOCAL App. D.2 and FOCAL++ Eq. 35 for their sparse families), else dense. Of the class, or of the instance.
    inference_reward: Literal["dense", "sparse"]
    context_next_observation: ClassVar[bool]  # does the context encoder see s'?
    renders: ClassVar[bool] = False  # does a report show its scene? Point robots are drawn with their paths there
    capacity: int | None  # how many tasks there are; None: no limit
    first_test: int | None = None  # place of the first task that the published split of a list tests on; None: its end
    relabel_overrides: ClassVar[tuple[str, ...]] = ()  # keys of its configuration that a relabelled set may replace
    reward_form: str = ""  # what the papers call this form of the reported reward, where they publish several

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def sample(self, index: int, seed: int) -> Task:
        """Return task ``index``; a function of (seed, index) only.

        Raises:
            UserError: the family has no such task.
        """

    def tasks(self, train: int, test: int, seed: int) -> list[Task]:
        """Return ``train`` training tasks, then ``test`` test tasks; how many of one changes none of the other.

        Drawn tasks have a stream for training and one for testing, both by ``seed``. A list of ``capacity``
        tasks is taken from its two ends: training tasks are places 0, 1, ..., test tasks the places from
        ``first_test``, so that the published counts give the published split. Whoever asks for more training
        tasks gets the list's last places next; for more test tasks, the places before ``first_test``.

        Raises:
            UserError: the family has fewer tasks.
        """
        if self.capacity is None:
            held_out = seeding.integer(seed, "test tasks")
            return [self.sample(i, seed) for i in range(train)] + [self.sample(i, held_out) for i in range(test)]
        if train + test > self.capacity:
            raise UserError(
                f"tasks.train + tasks.test = {train} + {test}: expected at most {self.capacity}, the number of tasks "
                f"'{self.name}' has"
            )
        first = self.capacity if self.first_test is None else self.first_test
        places = [*range(first), *reversed(range(first, self.capacity))]
        return [self.sample(i, seed) for i in [*places[:train], *reversed(places[-test:] if test else [])]]

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
        collects; without that, NaN. NaN, too, where nothing is better than random.
        """
        floor, oracle = task_row["random_return"], task_row["oracle_return"]
        top = oracle if oracle is not None else best
        return value * np.nan if top is None or top == floor else (value - floor) / (top - floor)

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
            "inference_reward": self.inference_reward,
        }

    def restated(self) -> Family | None:
        """Return the family with the other published form of the reported reward, None where there is one form.

        Both say in ``reward_form`` which they have.
        """
        return None

    def relabelled(self, overrides: dict[str, Any], where: str) -> Self:
        """Return the family whose rewards a relabelled set carries.

        Args:
            overrides: of its configuration.
            where: prefix of messages, ``"params.yaml: relabel.<name>"``.

        Raises:
            UserError: tasks differ in their dynamics, a key that relabelling cannot change, a value without meaning.
        """
        if self.varies != "reward":
            raise UserError(
                f"{where}: tasks of '{self.name}' differ in their dynamics, so a transition of one is impossible in "
                "another; expected 'relabel: {}'"
            )
        for key in overrides:
            if key not in self.relabel_overrides:
                known = ", ".join(self.relabel_overrides) or "no key"
                raise UserError(f"{where}.env_config.{key}: relabelling changes rewards alone; expected {known}")
        return type(self)(parse(self.CONFIG, {**self.config.resolved(), **overrides}, f"{where}.env_config"))

    def references(self, task: Task) -> dict[str, float]:
        """Return further controllers worth a row beside the results: name -> return."""
        return {}

    def plane(self, task: Task) -> dict[str, Any] | None:
        """Return what a picture of the plane shows of ``task`` ({"goal": [x, y], "radius": r}), None if nothing."""
        return None

    def picture(self, task: Task) -> NDArray[np.uint8]:
        """Return a picture of the start of an episode, uint8 [height, width, 3].

        Raises:
            UserError: nothing here can be drawn, or there is no OpenGL.
        """
        batch = self.batch([task])
        batch.reset([seeding.generator(0, self.name, "picture")])
        return batch.render()

    def _check_index(self, index: int) -> None:
        if index < 0 or (self.capacity is not None and index >= self.capacity):
            limit = "" if self.capacity is None else f"0..{self.capacity - 1}"
            raise UserError(
                f"task index {index} is out of range: '{self.name}' has tasks {limit or '0 and up'}; "
                "see tasks.train and tasks.test in params.yaml"
            )


class SingleEnv(gymnasium.Env[Any, Any]):
    """The single form of a family: a batch of one, with the Gymnasium interface.

    Observations, actions and pictures are those of the batch. Without a task it is the first one of seed 1337.

    Args:
        task: parameters.
        config: of the family, overrides of its defaults.
        render_mode: ``rgb_array``, or None.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}
    family: ClassVar[type[Family]]

    def __init__(
        self, task: Task | None = None, config: dict[str, Any] | None = None, render_mode: str | None = None
    ) -> None:
        family = self.family(parse(self.family.CONFIG, config, f"configuration of '{self.family.name}':"))
        self.task = task if task is not None else family.sample(0, 1337)
        self.render_mode = render_mode
        self._batch = family.batch([self.task])
        self.observation_space = spaces.Box(-np.inf, np.inf, (family.observation_size,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (family.action_size,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        return self._batch.reset([self.np_random])[0].copy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Act once; ``info["sparse_reward"]`` is the sparse reward, ``info["features"]`` what rewards need."""
        result = self._batch.step(np.asarray(action, dtype=np.float32)[None])
        info = {"sparse_reward": float(result.sparse_reward[0]), "features": result.features[0].copy()}
        terminated = bool(result.terminated[0])
        return result.next_observation[0].copy(), float(result.reward[0]), terminated, False, info

    def render(self) -> Any:
        """Return a picture, uint8 [480, 480, 3]; None unless ``render_mode`` is ``rgb_array``.

        Raises:
            UserError: there is no OpenGL.
        """
        return self._batch.render() if self.render_mode == "rgb_array" else None


def family_class(name: str, where: str = "") -> type[Family]:
    """Return the class of a family: one of ours, of an installed plug-in, or of a module ``package.module``.

    Args:
        name: of it.
        where: prefix of messages.

    Raises:
        UserError: there is none, or its module lacks something.
    """
    module = registry.load(PACKAGE, name, "environment", NEEDS, where)
    if registry.is_outside(PACKAGE, name):
        cls = module.FAMILY
        if not (isinstance(cls, type) and issubclass(cls, Family)):
            raise UserError(
                f"{where}environment '{name}': {module.__file__}: FAMILY: expected a class of omrl's Family"
            )
        missing = [x for x in ("name", "env_id", "CONFIG", "action_size", "varies", "returns") if not hasattr(cls, x)]
        if missing := sorted(cls.__abstractmethods__) + missing:
            raise UserError(
                f"{where}environment '{name}': {module.__file__}: {cls.__name__} lacks {', '.join(missing)}"
            )
        if not (isinstance(cls.CONFIG, type) and issubclass(cls.CONFIG, Config)):
            raise UserError(
                f"{where}environment '{name}': {module.__file__}: CONFIG: expected a class of omrl's Config"
            )
        _register(module)
    family: type[Family] = module.FAMILY
    return family


def config_class(name: str, where: str = "") -> type[Config]:
    """Return the configuration class of a family."""
    return family_class(name, where).CONFIG


def load_family(name: str, config: dict[str, Any] | None = None) -> Family:
    """Return the family ``name`` with ``config`` as overrides of its defaults.

    Raises:
        UserError: no such family, or a configuration it refuses.
    """
    cls = family_class(name)
    return cls(parse(cls.CONFIG, config, f"configuration of '{name}':"))


def _register(module: ModuleType) -> None:
    entry_point = f"{module.__name__}:ENV"
    taken = gymnasium.registry.get(module.FAMILY.env_id)
    if taken is None:
        horizon = getattr(module.FAMILY, "horizon", None)  # of the class, unless the configuration chooses
        register(id=module.FAMILY.env_id, entry_point=entry_point, max_episode_steps=horizon)
    elif taken.entry_point != entry_point:
        raise UserError(f"{entry_point}: env_id '{module.FAMILY.env_id}' is taken by {taken.entry_point}")


def register_all() -> None:
    """Register the id of every family of ours with Gymnasium; a plug-in's when it is loaded."""
    for name in registry.own_names(PACKAGE):
        _register(registry.load(PACKAGE, name))
