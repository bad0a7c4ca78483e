"""Meta-World (Yu et al. 2019) by its own package, shared by the families of its benchmarks.

The package metaworld 3.1.1 needs mujoco 3.3.0 and crashes on 4, so it is an extra with an environment of its own,
and is imported where it is used. The physics, observations and rewards are the package's; what is ours is that the
copies of a task share one simulator, whose whole state is exchanged before and after a step: memory and
construction (0.3 s) grow with the tasks, not with the copies.

Observation (39, float32):

| entries | what | unit | range |
|---|---|---|---|
| 0-2 | hand x, y, z | m | about [-0.525, 0.525], [0.348, 1.025], [-0.0525, 0.7] |
| 3 | opening of the gripper | share of 0.1 m | [0, 1] |
| 4-17 | position and quaternion of up to two objects; 0 where there is none | m, - | unbounded |
| 18-35 | entries 0-17 one step before | | |
| 36-38 | 0: the goal is hidden in the meta-learning benchmarks | | 0 |

Action (4, float32, [-1, 1]): displacement of the hand's target along x, y, z as a fraction of 0.01 m; effort of the
gripper, 1 closes. Every episode of a task starts alike. No termination; 500 steps.

Dense reward: the package's second version, 0 to 10. Sparse: 1 where the package calls the step a success, else 0.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import importlib.util
import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from omrl.core import seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.envs import _opengl
from omrl.envs.base import Array, BatchEnv, Family, SingleEnv, StepResult, Task

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # positions, velocities, the hand's target, the solver's last solution
_SEEN = 18  # observed numbers of one moment

Doubles = NDArray[np.float64]


def package() -> Any:
    """Return the module ``metaworld``.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("metaworld") is None:
        raise UserError(
            "the Meta-World families need the package metaworld, which is not installed here; it has an environment "
            "of its own: run 'make setup-metaworld', then 'source .venv-metaworld/bin/activate'"
        )
    return importlib.import_module("metaworld")


@lru_cache(maxsize=4)
def published(benchmark: Callable[[Any], Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Return the training and test tasks that the package draws by ``seed``, as (class name, start and goal)."""
    drawn = benchmark(seed)
    return _decoded(drawn.train_tasks), _decoded(drawn.test_tasks)


def _decoded(tasks: Sequence[Any]) -> list[Any]:
    # the package pickled them a moment ago, in this process
    return [(task.env_name, pickle.loads(task.data)["rand_vec"].tolist()) for task in tasks]  # noqa: S301


class _Simulator:
    """One task's simulator, in which all copies of the task take turns."""

    def __init__(self, task: Task) -> None:
        module = package()
        env_class = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS[task["environment"]]
        self.env = env_class()
        chosen = {"rand_vec": np.array(task["start_and_goal"]), "env_cls": env_class, "partially_observable": True}
        self.env.set_task(module._encode_task(task["environment"], chosen))
        observation, _ = self.env.reset()
        self.start, self.first = self.state(), np.asarray(observation, dtype=np.float32)

    def state(self) -> Doubles:
        """Return what a step starts from, float64 [k]."""
        env = self.env
        state = np.zeros(mujoco.mj_stateSize(env.model, _STATE))
        mujoco.mj_getState(env.model, env.data, state, _STATE)
        return np.concatenate([env._prev_obs, state])

    def step(self, state: Doubles, action: Array) -> tuple[Array, float, float]:
        """Go to ``state``, act; return observation, reward and success."""
        env = self.env
        env._prev_obs = state[:_SEEN].copy()
        mujoco.mj_setState(env.model, env.data, state[_SEEN:], _STATE)
        env.curr_path_length = 0  # time limits are the caller's business
        observation, reward, _, _, info = env.step(action)
        return np.asarray(observation, dtype=np.float32), float(reward), float(info["success"])


class MetaworldBatch(BatchEnv):
    """Copies of tasks; one simulator for each task."""

    def __init__(self, family: MetaworldFamily, tasks: Sequence[Task], copies: int) -> None:
        self._family = family
        self._tasks = list(tasks)
        self._simulators = [_Simulator(task) for task in tasks]
        self._copies = copies
        self._state = [simulator.start for simulator in self._simulators for _ in range(copies)]
        self.observation = np.stack([simulator.first for simulator in self._simulators for _ in range(copies)])

    def reset(self, rngs: Sequence[np.random.Generator] | None = None, rows: NDArray[np.intp] | None = None) -> Array:
        """Start anew in every copy, or in those of ``rows``; starts are the tasks' own, so ``rngs`` are not used."""
        self.observation = self.observation.copy()
        for row in range(len(self._state)) if rows is None else rows:
            simulator = self._simulators[row // self._copies]
            self._state[row], self.observation[row] = simulator.start, simulator.first
        return self.observation

    def get_state(self) -> Doubles:
        """Return simulators' states, padded to the longest, and observations, float64 [B, k]."""
        width = max(len(state) for state in self._state)
        padded = np.stack([np.pad(state, (0, width - len(state))) for state in self._state])
        return np.concatenate([padded, self.observation], axis=1)

    def set_state(self, state: Doubles) -> None:
        """Go to where ``get_state`` was called."""
        size = self._family.observation_size
        self._state = [row[: len(own)].copy() for row, own in zip(state, self._state, strict=True)]
        self.observation = state[:, -size:].astype(np.float32)

    def step(self, actions: Array) -> StepResult:
        """Apply the actions, copy by copy.

        Raises:
            ValueError: the actions are not one row per copy.
        """
        family, rows = self._family, len(self._state)
        actions = np.clip(np.asarray(actions, dtype=np.float32), np.float32(-1.0), np.float32(1.0))
        if actions.shape != (rows, family.action_size):
            raise ValueError(f"actions of shape {actions.shape}, expected {(rows, family.action_size)}")
        before, following = self.observation, np.empty_like(self.observation)
        features = np.empty((rows, family.feature_size), dtype=np.float32)
        dense, sparse = np.empty(rows, dtype=np.float32), np.empty(rows, dtype=np.float32)
        for row in range(rows):
            simulator = self._simulators[row // self._copies]
            following[row], reward, success = simulator.step(self._state[row], actions[row])
            self._state[row] = simulator.state()
            features[row] = family.features(self._tasks[row // self._copies], simulator.env, reward, success)
        for place, task in enumerate(self._tasks):
            part = slice(place * self._copies, (place + 1) * self._copies)
            dense[part], sparse[part] = family.reward(
                task, before[part], actions[part], following[part], features[part]
            )
        self.observation = following
        return StepResult(following, dense, sparse, np.zeros(rows, dtype=np.bool_), features)

    def render(self, row: int = 0, path: Sequence[Array] = ()) -> NDArray[np.uint8]:
        """Return a picture of copy ``row``, uint8 [480, 480, 3].

        Raises:
            UserError: there is no OpenGL.
        """
        env = self._simulators[row // self._copies].env
        mujoco.mj_setState(env.model, env.data, self._state[row][_SEEN:], _STATE)
        mujoco.mj_forward(env.model, env.data)
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        camera.lookat[:] = (0.0, 0.6, 0.1)  # the middle of the table
        camera.distance, camera.azimuth, camera.elevation = 1.6, 140.0, -30.0
        return _opengl.draw(env.model, env.data, camera)


class MetaworldFamily(Family):
    """A benchmark of Meta-World: what a file of one adds is its tasks, features and reward.

    Raises:
        UserError: the package is not installed.
    """

    observation_size = 39
    action_size = 4
    horizon = 500
    returns = "dense"
    inference_reward = "dense"  # the benchmark's own reward; the sparse one is its success
    renders = True
    floor_episodes: ClassVar[int]  # random episodes behind the random floor

    def __init__(self, config: Config) -> None:
        package()
        super().__init__(config)

    @abc.abstractmethod
    def features(self, task: Task, env: Any, reward: float, success: float) -> list[float]:
        """Return what ``reward`` needs beyond (s, a, s'), [feature_size].

        Args:
            task: parameters.
            env: the package's environment, after the step.
            reward: the package's reward of it.
            success: 1 or 0, what the package says.
        """

    def spec(self) -> dict[str, Any]:
        """Return what identifies the environment, the package's version included."""
        return {**super().spec(), "metaworld": importlib.metadata.version("metaworld")}

    def batch(self, tasks: Sequence[Task], copies: int = 1, threads: int = 1) -> MetaworldBatch:
        """Return ``copies`` copies of every task; they take turns, whatever ``threads``."""
        return MetaworldBatch(self, tasks, copies)

    def random_features(self, task: Task) -> tuple[Array, Array]:
        """Return next observations and features of ``floor_episodes`` episodes of uniform random actions."""
        rng = seeding.generator(0, self.name, "random floor")
        env = self.batch([task], self.floor_episodes)
        shape = (self.floor_episodes, self.action_size)
        results = [env.step(rng.uniform(-1.0, 1.0, shape).astype(np.float32)) for _ in range(self.horizon)]
        return np.concatenate([r.next_observation for r in results]), np.concatenate([r.features for r in results])

    def random_return(self, task: Task) -> float:
        """Return the mean over ``floor_episodes`` episodes of uniform random actions from a fixed stream."""
        following, features = self.random_features(task)
        dense, _ = self.reward(task, following, following[:, :4], following, features)
        return float(dense.astype(np.float64).sum() / self.floor_episodes)


class MetaworldEnv(SingleEnv):
    """The single form: a batch of one, with the Gymnasium interface."""

    family: ClassVar[type[MetaworldFamily]]
