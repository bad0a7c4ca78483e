"""Mechanics shared by the point robots: a point on the plane that is pushed, no simulator.

The state is kept in float32 and rewards are computed from it as stored, so that relabelling a task with its
own parameters gives back the stored rewards bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs.base import Array, BatchEnv, Family, SingleEnv, StepResult, Task

STEP = np.float32(0.1)  # length of a full action along an axis, in units of the plane
_ROLLOUTS = 4096  # random rollouts behind the random floor
_PICTURE = 480  # pixels, width and height of a picture
_REACH = 2.0  # a picture shows [-2, 2]^2
_GRID = 32  # starts along an axis behind the controllers' average over random starts
STARTS = {  # corners of the boxes that episodes start in, in units of the plane
    "square": ((-1.0, -1.0), (1.0, 1.0)),
    "half-plane": ((-1.5, -0.5), (1.5, 1.5)),
}
# what the papers call the two forms of the sparse reward that FOCAL++ mixes
FORMS = {"one-minus-distance": "1 - d", "eq35": "Eq. 35"}


class PointConfig(Config):
    """Reward, starts and length of an episode of the point robots.

    Attributes:
        sparse_reward: with d the distance to the goal and R the radius,
            ``one-minus-distance``: 1 - d inside the disc, else 0 (FOCAL App. D.2). FOCAL++ Table 1's 12.96 is
            possible only under this one: the oracle has 13.375, under Eq. 35 only 12.475.
            ``eq35``: (R - d)/R inside the disc, else 0 (FOCAL++ Eq. 35 with threshold -R).
            ``indicator``: 1 inside the disc, else 0 (BOReL's stepping; its relabelling had -d inside).
        radius: R, in units of the plane: 0.2 in FOCAL Table 4, 0.5 for the relabelled set (FOCAL++ Table 5).
        horizon: steps of a test episode: 20 in PEARL, FOCAL and FOCAL++, 60 in BOReL.
        start: where episodes start: ``origin``; ``square``, uniformly on [-1, 1]^2 (PEARL's Point-Robot);
            ``half-plane``, uniformly on [-1.5, 1.5] x [-0.5, 1.5] (BOReL, in its data and its evaluation).
    """

    sparse_reward: Literal["one-minus-distance", "eq35", "indicator"] = "one-minus-distance"
    radius: Annotated[float, Field(gt=0, le=10)] = 0.2
    horizon: Annotated[int, Field(ge=1, le=10_000)] = 20
    start: Literal["origin", "square", "half-plane"] = "origin"

    @model_validator(mode="after")
    def _rewarding(self) -> Self:
        if self.radius < 0.001:
            raise ValueError(
                f"radius = {self.radius}: expected at least 0.001, float32 cannot tell smaller discs apart"
            )
        if self.sparse_reward == "one-minus-distance" and self.radius > 1:
            raise ValueError(
                f"radius = {self.radius} with sparse_reward = 'one-minus-distance': expected a radius of at most 1, "
                "beyond which 1 - d is negative inside the disc"
            )
        return self


def sparsify(dense: Array, config: PointConfig) -> Array:
    """Return the sparse reward for dense rewards -d, elementwise, float32."""
    distance = -dense
    radius = np.float32(config.radius)
    if config.sparse_reward == "eq35":
        value = (radius - distance) / radius
    elif config.sparse_reward == "indicator":
        value = np.ones_like(distance)
    else:
        value = np.float32(1.0) - distance
    return np.where(distance <= radius, value, np.float32(0.0)).astype(np.float32)


def push(state: Array, action: Array, wind: Array) -> Array:
    """Return s' = s + 0.1 clip(a, -1, 1) + wind, float32 [B, 2]."""
    return state + STEP * np.clip(action, np.float32(-1.0), np.float32(1.0)) + wind


def distance_reward(goal: Sequence[float] | Array, next_observation: Array) -> Array:
    """Return -||s' - goal||, float32 [N]; ``goal`` is [2] or [N, 2]."""
    offset = next_observation - np.asarray(goal, dtype=np.float32)
    x, y = offset[:, 0], offset[:, 1]
    return -np.sqrt(x * x + y * y)


@cache
def legacy_uniform(seed: int, low: float, high: float, count: int) -> NDArray[np.float64]:
    """Return draws of NumPy's legacy generator, which the released code used; read-only."""
    values = np.random.RandomState(seed).uniform(low, high, count)
    values.setflags(write=False)
    return values


def order(seed: int, count: int, family: str) -> NDArray[np.int64]:
    """Return the order in which the tasks of a published grid are visited: a permutation, by seed."""
    return seeding.generator(seed, "task order", family).permutation(count)


class PointBatch(BatchEnv):
    """Copies of point robots stepping together."""

    def __init__(self, family: PointFamily, tasks: Sequence[Task], copies: int) -> None:
        self._config = family.point
        self._start, self._sparse = family.point.start, family.returns == "sparse"
        self._goal = np.repeat(np.array([t["goal"] for t in tasks], dtype=np.float32), copies, axis=0)
        wind = np.array([t.get("wind", (0.0, 0.0)) for t in tasks], dtype=np.float32)
        self._wind = np.repeat(wind, copies, axis=0)
        self.observation = np.zeros((len(tasks) * copies, 2), dtype=np.float32)

    def reset(self, rngs: Sequence[np.random.Generator] | None = None, rows: NDArray[np.intp] | None = None) -> Array:
        """Put every copy, or those of ``rows``, at its start: the origin, or a draw from its stream."""
        chosen = np.arange(len(self.observation)) if rows is None else rows
        self.observation = self.observation.copy()
        if self._start == "origin":
            self.observation[chosen] = 0.0
            return self.observation
        if rngs is None or len(rngs) != len(chosen):
            raise ValueError("starts are random here: reset needs one generator per copy")
        for row, rng in zip(chosen, rngs, strict=True):
            self.observation[row] = draw_start(rng, self._start)
        return self.observation

    def step(self, actions: Array) -> StepResult:
        """Push every copy once.

        Raises:
            ValueError: the actions are not one row per copy.
        """
        actions = np.asarray(actions, dtype=np.float32)  # float64 would make the state float64
        if actions.shape != self.observation.shape:
            raise ValueError(f"actions of shape {actions.shape}, expected {self.observation.shape}")
        self.observation = push(self.observation, actions, self._wind)
        dense = distance_reward(self._goal, self.observation)
        rows = len(dense)
        return StepResult(
            self.observation,
            dense,
            sparsify(dense, self._config),
            np.zeros(rows, dtype=np.bool_),
            np.zeros((rows, 0), dtype=np.float32),
        )

    def render(self, row: int = 0, path: Sequence[Array] = ()) -> NDArray[np.uint8]:
        """Return a picture of copy ``row``, uint8 [480, 480, 3]; ``path``: where it was before, [steps, 2]."""
        radius = self._config.radius if self._sparse else None
        return draw([*path, self.observation[row]], [float(v) for v in self._goal[row]], radius)


def draw_start(rng: np.random.Generator, start: str) -> Array:
    """Return a place in the box ``start`` of ``STARTS``, float32 [2]."""
    low, high = STARTS[start]
    return rng.uniform(low, high).astype(np.float32)


def _disc(canvas: NDArray[np.float64], center: Sequence[float], radius: float, color: str, opacity: float = 1) -> None:
    """Draw a filled disc with smooth edges; ``center`` and ``radius`` in units of the plane."""
    scale = _PICTURE / (2 * _REACH)
    x, y, r = (center[0] + _REACH) * scale, (_REACH - center[1]) * scale, radius * scale
    rows, columns = (slice(max(0, int(v - r - 1)), max(0, int(v + r + 2))) for v in (y, x))
    part = canvas[rows, columns]
    down, along = np.ogrid[rows.start : rows.start + part.shape[0], columns.start : columns.start + part.shape[1]]
    covered = opacity * np.clip(r + 0.5 - np.hypot(down + 0.5 - y, along + 0.5 - x), 0, 1)[..., None]
    rgb = np.array([int(color[i : i + 2], 16) for i in (0, 2, 4)])
    part[:] = (1 - covered) * part + covered * rgb


def draw(path: Sequence[Array], goal: Sequence[float], radius: float | None) -> NDArray[np.uint8]:
    """Return a picture of the square [-2, 2]^2, uint8 [480, 480, 3]: goal, reward disc, path and robot.

    Args:
        path: positions, the last of which is where the robot is.
        goal: of the task.
        radius: of the disc where the sparse reward is given; None: no disc.
    """
    canvas = np.full((_PICTURE, _PICTURE, 3), 255.0)
    canvas[:: _PICTURE // 8] = canvas[:, :: _PICTURE // 8] = 232.0  # a line every half unit
    if radius is not None:
        _disc(canvas, goal, radius, "009e73", 0.3)
    _disc(canvas, goal, 0.05, "009e73")
    for place in path[:-1]:
        _disc(canvas, [float(v) for v in place], 0.02, "0072b2", 0.5)
    _disc(canvas, [float(v) for v in path[-1]], 0.06, "0072b2")
    return np.round(canvas).astype(np.uint8)


class PointEnv(SingleEnv):
    """The single form: a batch of one, with the Gymnasium interface; its pictures show the path so far."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}
    family: ClassVar[type[PointFamily]]
    _batch: PointBatch

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode."""
        observation, info = super().reset(seed=seed, options=options)
        self._path = [observation]
        return observation, info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Push once; ``info["sparse_reward"]`` is the sparse reward."""
        found = super().step(action)
        if self.render_mode is not None:
            self._path.append(found[0])
        return found

    def render(self) -> Any:
        """Return a picture, uint8 [480, 480, 3]; None unless ``render_mode`` is ``rgb_array``."""
        return self._batch.render(0, self._path) if self.render_mode == "rgb_array" else None


class PointFamily(Family):
    """Point robots: rewards, controllers with known returns, pictures of the plane."""

    CONFIG: ClassVar[type[Config]] = PointConfig
    observation_size = 2
    action_size = 2
    horizon = 20
    varies = "reward"
    returns = "dense"
    inference_reward: Literal["dense", "sparse"] = "dense"
    context_next_observation = False
    capacity: int | None = None
    relabel_overrides = ("radius", "sparse_reward")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.horizon = self.point.horizon
        self.reward_form = FORMS.get(self.point.sparse_reward, "") if self.returns == "sparse" else ""

    @property
    def point(self) -> PointConfig:
        """The configuration, by its own type."""
        if not isinstance(self.config, PointConfig):
            raise TypeError(f"expected a PointConfig, got {type(self.config).__name__}")
        return self.config

    def reward(
        self, task: Task, observation: Array, action: Array, next_observation: Array, features: Array
    ) -> tuple[Array, Array]:
        """Return -||s' - goal|| and its sparse version, on the state after the move (FOCAL App. D.2)."""
        dense = distance_reward(task["goal"], next_observation)
        return dense, sparsify(dense, self.point)

    def batch(self, tasks: Sequence[Task], copies: int = 1, threads: int = 1) -> PointBatch:
        """Return ``len(tasks) * copies`` robots that step together, on one thread."""
        return PointBatch(self, tasks, copies)

    def restated(self) -> Self | None:
        """Return the family with the other of FOCAL++'s forms of the sparse reward, where that is what is reported.

        FOCAL++ mixes the two: it defines Eq. 35 and prints returns that only 1 - d allows.
        """
        if not self.reward_form:
            return None
        other = next(form for form in FORMS if form != self.point.sparse_reward)
        if other == "one-minus-distance" and self.point.radius > 1:  # 1 - d is negative inside such a disc
            return None
        return type(self)(type(self).CONFIG(**{**self.config.resolved(), "sparse_reward": other}))

    def _starts(self) -> Array:
        """Return the starts that a controller's return is averaged over, float32 [S, 2]."""
        if self.point.start == "origin":
            return np.zeros((1, 2), dtype=np.float32)
        centers = (np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID
        low, high = STARTS[self.point.start]
        x, y = np.meshgrid(*(a + (b - a) * centers for a, b in zip(low, high, strict=True)))
        return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)

    def controlled_return(self, task: Task, believed_wind: Sequence[float], horizon: int | None = None) -> float:
        """Return what the greedy controller collects that believes in ``believed_wind``.

        It moves along each axis as far as it can towards the goal. With the true wind that is optimal: it
        minimizes |dx| and |dy| at every step. Where starts are random, the mean over the
        centers of a 32 x 32 grid, which for dense rewards is within 0.004 of the mean over all starts.
        """
        starts = self._starts()
        env = self.batch([task], len(starts))
        env.observation = starts
        goal = np.array(task["goal"], dtype=np.float32)
        wind = np.array(believed_wind, dtype=np.float32)
        total = np.zeros(len(starts))
        for _ in range(horizon or self.horizon):
            result = env.step((goal - env.observation - wind) / STEP)
            total += result.sparse_reward if self.returns == "sparse" else result.reward
        return float(total.mean())

    def oracle_return(self, task: Task) -> float:
        """Return the optimal return (see ``controlled_return``)."""
        return self.controlled_return(task, task.get("wind", (0.0, 0.0)))

    def random_return(self, task: Task) -> float:
        """Return the mean over 4096 rollouts of uniform random actions from a fixed stream."""
        rng = seeding.generator(0, self.name, "random floor")
        env = self.batch([task], _ROLLOUTS)
        starts = (seeding.generator(0, self.name, "random start", i) for i in range(_ROLLOUTS))
        env.reset(list(starts) if self.point.start != "origin" else None)
        total = np.zeros(_ROLLOUTS)
        for _ in range(self.horizon):
            result = env.step(rng.uniform(-1.0, 1.0, (_ROLLOUTS, 2)).astype(np.float32))
            total += result.sparse_reward if self.returns == "sparse" else result.reward
        return float(total.mean())

    def plane(self, task: Task) -> dict[str, Any]:
        """Return goal and reward disc for a picture of the plane."""
        return {"goal": list(task["goal"]), "radius": self.point.radius if self.returns == "sparse" else None}
