"""Mechanics shared by the MuJoCo families: many copies simulated together by ``mujoco.rollout``.

The simulator works in float64 and starts every step's constraint solver from zero, not from the last step's
solution: what follows is then a function of the positions and velocities alone, whichever thread or batch a
copy is simulated in. Gymnasium's environments keep the solution; where the solver converges, as in all models
here, the difference is of the order of its tolerance.

Rewards are computed in float32 from stored features alone, so that relabelling a task with its own parameters
gives back the stored rewards bit for bit.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

import gymnasium
import mujoco
import numpy as np
from mujoco.rollout import Rollout
from numpy.typing import NDArray
from pydantic import Field, field_validator

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs import _opengl
from omrl.envs.base import Array, BatchEnv, Family, SingleEnv, StepResult, Task

_STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS
_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
_FLOOR_EPISODES = 64  # random episodes behind the random floor

Doubles = NDArray[np.float64]


class MujocoConfig(Config):
    """What the MuJoCo families share.

    Attributes:
        sparse_threshold: G of FOCAL++ Eq. 35: the sparse reward is (r - G)/|G| where the dense reward r of the
            step exceeds G, else 0. None: the sparse reward is the dense one. The papers tuned G so that about
            half of the transitions in the context are non-zero, so it depends on the behavior policies.
    """

    sparse_threshold: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None

    @field_validator("sparse_threshold")
    @classmethod
    def _divides(cls, value: float | None) -> float | None:
        if value == 0:
            raise ValueError("expected a number other than 0, by which Eq. 35 divides, or null")
        return value


@dataclass(frozen=True)
class Physics:
    """States of B copies, float64.

    Attributes:
        qpos: positions [B, nq].
        qvel: velocities [B, nv].
        derived: what the family derives from them [B, k], nothing for most.
    """

    qpos: Doubles
    qvel: Doubles
    derived: Doubles


@dataclass(frozen=True)
class Motion:
    """A step of B copies.

    The simulator computes positions of bodies and forces on the way through its own steps, and what a binding
    reads from it after a step was computed for a ``late`` state. With the Euler integrator (half-cheetah) that
    is the state one simulator step before ``before`` and ``after``; at the start of an episode, the start. With
    Runge-Kutta (the others) it is the last stage, which lies where the step ends: the states themselves.

    Attributes:
        before: states before the step.
        after: after it.
        late_before: the late state of ``before``, with what the family derives.
        late_after: that of ``after``.
        action: agent scale, clipped, float32 [B, action_size].
        control: what the actuators got, float64 [B, action_size].
    """

    before: Physics
    after: Physics
    late_before: Physics
    late_after: Physics
    action: Array
    control: Doubles


@cache
def load_model(name: str) -> mujoco.MjModel:
    """Return Gymnasium's model ``name`` (``half_cheetah.xml``), compiled; shared, not to be changed."""
    return mujoco.MjModel.from_xml_path(str(_ASSETS / name))


def sparsify(dense: Array, threshold: float | None) -> Array:
    """Return FOCAL++ Eq. 35 for dense rewards of a step, elementwise, float32 [N]."""
    if threshold is None:
        return dense
    limit = np.float32(threshold)
    return np.where(dense > limit, (dense - limit) / np.abs(limit), np.float32(0.0)).astype(np.float32)


class MujocoBatch(BatchEnv):
    """Copies of one model, or of one model per task, stepping together."""

    def __init__(self, family: MujocoFamily, tasks: Sequence[Task], copies: int, threads: int) -> None:
        self._family = family
        models = [family.model(task) for task in tasks]
        first = models[0]
        rows = len(tasks) * copies
        one = all(model is first for model in models)
        self._models = first if one else [model for model in models for _ in range(copies)]
        self._first = first
        self._task = np.repeat(np.stack([family.task_array(task) for task in tasks]), copies, axis=0)
        # float64: the control is what MuJoCo sees
        self._low, self._high = (np.array(bound) for bound in first.actuator_ctrlrange.T)
        self._state = np.zeros((rows, mujoco.mj_stateSize(first, _STATE)))
        self._late = self._state.copy()
        self._runge_kutta = first.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
        self._derived = np.zeros((rows, family.derived_size))
        self._threads = min(threads, rows)
        self._data = [mujoco.MjData(first) for _ in range(max(self._threads, 1))]
        self._pool = Rollout(nthread=self._threads if self._threads > 1 else 0)
        weakref.finalize(self, self._pool.close)
        self.observation = np.zeros((rows, family.observation_size), dtype=np.float32)
        start = np.zeros((rows, first.nq + first.nv))
        start[:, : first.nq] = first.qpos0
        self._place(np.arange(rows), start)

    def _physics(self, state: Doubles, derived: Doubles) -> Physics:
        nq, nv = self._first.nq, self._first.nv
        return Physics(state[:, 1 : 1 + nq], state[:, 1 + nq : 1 + nq + nv], derived)

    def _model(self, row: int) -> mujoco.MjModel:
        return self._models if isinstance(self._models, mujoco.MjModel) else self._models[row]

    def _derive(self, rows: NDArray[np.intp], state: Doubles, control: Doubles) -> Doubles:
        """Return what the family derives from ``state`` of copies ``rows``, [len(rows), derived_size]."""
        found = np.zeros((len(rows), self._family.derived_size))
        if self._family.derived_size:
            data = self._data[0]
            for place, row in enumerate(rows):
                model = self._model(row)
                mujoco.mj_setState(model, data, state[place], _STATE)
                data.ctrl[:] = control[place]
                data.qacc_warmstart[:] = 0.0
                mujoco.mj_forward(model, data)
                mujoco.mj_rnePostConstraint(model, data)
                found[place] = self._family.derive(model, data)
        return found

    def _place(self, rows: NDArray[np.intp], start: Doubles) -> None:
        """Put copies ``rows`` at positions and velocities ``start`` [len(rows), nq + nv], at rest otherwise."""
        self._state[rows] = 0.0
        self._state[rows, 1 : 1 + start.shape[1]] = start
        self._late[rows] = self._state[rows]
        self._derived[rows] = self._derive(rows, self._state[rows], np.zeros((len(rows), self._first.nu)))
        physics = self._physics(self._state[rows], self._derived[rows])
        self.observation = self.observation.copy()
        self.observation[rows] = self._family.observe(physics, physics)

    def reset(self, rngs: Sequence[np.random.Generator] | None = None, rows: NDArray[np.intp] | None = None) -> Array:
        """Start a new episode in every copy, or in those of ``rows``; one stream per started copy."""
        chosen = np.arange(len(self._state)) if rows is None else rows
        if rngs is None or len(rngs) != len(chosen):
            raise ValueError("starts are random here: reset needs one generator per copy")
        if len(chosen):
            starts = [self._family.start(self._model(row), rng) for row, rng in zip(chosen, rngs, strict=True)]
            self._place(chosen, np.stack(starts))
        return self.observation

    def get_state(self) -> Doubles:
        """Return everything that a step starts from, side by side, float64 [B, k]."""
        return np.concatenate([self._state, self._late, self._derived, self.observation], axis=1)

    def set_state(self, state: Doubles) -> None:
        """Go to where ``get_state`` was called."""
        size, derived = self._state.shape[1], self._derived.shape[1]
        parts = np.split(state, [size, 2 * size, 2 * size + derived], axis=1)
        self._state, self._late, self._derived = (part.copy() for part in parts[:3])
        self.observation = parts[3].astype(np.float32)

    def step(self, actions: Array) -> StepResult:
        """Apply the actions for ``frame_skip`` steps of the simulator.

        Raises:
            ValueError: the actions are not one row per copy.
        """
        family = self._family
        actions = np.clip(np.asarray(actions, dtype=np.float32), np.float32(-1.0), np.float32(1.0))
        if actions.shape != (len(self._state), family.action_size):
            raise ValueError(f"actions of shape {actions.shape}, expected {(len(self._state), family.action_size)}")
        control = self._low + (actions.astype(np.float64) + 1.0) * (0.5 * (self._high - self._low))
        states, _ = self._pool.rollout(
            self._models,
            self._data if self._threads > 1 else self._data[0],
            self._state,
            control[:, None],
            nstep=family.frame_skip,
            skip_checks=False,
        )
        none = self._derived[:, :0]
        before, late_before = self._physics(self._state, none), self._physics(self._late, self._derived)
        # the last simulator step's start, or its end
        late = states[:, -1] if self._runge_kutta else states[:, -2] if family.frame_skip > 1 else self._state
        self._state, self._late = np.ascontiguousarray(states[:, -1]), np.ascontiguousarray(late)
        self._derived = self._derive(np.arange(len(late)), self._late, control)
        after, late_after = self._physics(self._state, none), self._physics(self._late, self._derived)
        self.observation = family.observe(after, late_after)
        features = family.features(Motion(before, after, late_before, late_after, actions, control))
        dense, sparse = family.rewards(self._task, self.observation, features)
        return StepResult(self.observation, dense, sparse, family.terminated(after), features)

    def render(self, row: int = 0) -> NDArray[np.uint8]:
        """Return a picture of copy ``row``, uint8 [480, 480, 3].

        Raises:
            UserError: there is no OpenGL (EGL, OSMesa or a window system).
        """
        model = self._model(row)
        data = mujoco.MjData(model)
        mujoco.mj_setState(model, data, self._state[row], _STATE)
        mujoco.mj_forward(model, data)
        return _opengl.draw(model, data, self._family.viewpoint(model))


class MujocoEnv(SingleEnv):
    """The single form: a batch of one, with the Gymnasium interface."""

    family: ClassVar[type[MujocoFamily]]


class MujocoFamily(Family):
    """A family on a MuJoCo model: what a file of one adds is its tasks, observation, features and reward."""

    CONFIG: ClassVar[type[Config]] = MujocoConfig
    xml: ClassVar[str]  # of Gymnasium's assets
    frame_skip: ClassVar[int] = 5
    derived_size: int = 0
    horizon = 200
    varies = "reward"
    returns = "dense"
    context_next_observation = False
    renders = True
    relabel_overrides = ("sparse_threshold",)
    capacity: int | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # FOCAL++ feeds Eq. 35 to the encoder of its sparse families; SMAC's Sawyer has no other reward
        sparse = self.returns == "sparse" or self.physics_config.sparse_threshold is not None
        self.inference_reward = "sparse" if sparse else "dense"
        self._motions: tuple[NDArray[np.bool_], Array, Array] | None = None

    @property
    def physics_config(self) -> MujocoConfig:
        """The configuration, by its own type."""
        if not isinstance(self.config, MujocoConfig):
            raise TypeError(f"expected a MujocoConfig, got {type(self.config).__name__}")
        return self.config

    @property
    def dt(self) -> float:
        """Seconds of simulated time in a step."""
        return float(load_model(self.xml).opt.timestep) * self.frame_skip

    def model(self, task: Task) -> mujoco.MjModel:
        """Return the model that ``task`` is simulated with: the same object for all, unless dynamics vary."""
        return load_model(self.xml)

    @abc.abstractmethod
    def task_array(self, task: Task) -> Array:
        """Return what the reward reads of ``task``, float32 [k]."""

    @abc.abstractmethod
    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return observations, float32 [B, observation_size].

        Args:
            physics: the states.
            late: what the simulator had computed bodies and forces for, see ``Motion``.
        """

    @abc.abstractmethod
    def features(self, motion: Motion) -> Array:
        """Return what rewards are computed from, float32 [B, feature_size]."""

    def derive(self, model: mujoco.MjModel, data: mujoco.MjData) -> Doubles:
        """Return what the simulator derives from a late state and this family needs, float64 [derived_size].

        Called for every copy in turn where ``derived_size`` is above 0, which is slow.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return dense rewards, float32 [N]; ``task`` is [N, k] or [1, k]. Elementwise over rows."""

    def terminated(self, after: Physics) -> NDArray[np.bool_]:
        """Return which copies have come to an end that is not the time limit's, bool [B]; none by default."""
        return np.zeros(len(after.qpos), dtype=np.bool_)

    def viewpoint(self, model: mujoco.MjModel) -> mujoco.MjvCamera:
        """Return the camera of a picture: it follows the body."""
        camera = mujoco.MjvCamera()
        camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
        camera.distance, camera.elevation = 0.8 * float(model.stat.extent) if model.stat.extent > 1 else 4.0, -15.0
        return camera

    def start(self, model: mujoco.MjModel, rng: np.random.Generator) -> Doubles:
        """Return a start, float64 [nq + nv]: positions + U(-0.1, 0.1), velocities 0.1 N(0, 1)."""
        qpos = model.qpos0 + rng.uniform(-0.1, 0.1, model.nq)
        return np.concatenate([qpos, 0.1 * rng.standard_normal(model.nv)])

    def rewards(self, task: Array, next_observation: Array, features: Array) -> tuple[Array, Array]:
        """Return dense and sparse reward for rows of tasks, float32 [N] each."""
        dense = self.dense(task, next_observation, features)
        return dense, sparsify(dense, self.physics_config.sparse_threshold)

    def reward(
        self, task: Task, observation: Array, action: Array, next_observation: Array, features: Array
    ) -> tuple[Array, Array]:
        """Return dense and sparse reward, from the stored features."""
        return self.rewards(self.task_array(task)[None], next_observation, features)

    def batch(self, tasks: Sequence[Task], copies: int = 1, threads: int = 1) -> MujocoBatch:
        """Return ``len(tasks) * copies`` copies, simulated on ``threads`` threads; the numbers are the same."""
        return MujocoBatch(self, tasks, copies, threads)

    def random_return(self, task: Task) -> float:
        """Return the mean over 64 episodes of uniform random actions from a fixed stream."""
        if self._motions is None or self.varies != "reward":
            self._motions = self._random_motions(task)
        alive, next_observation, features = self._motions
        empty = np.zeros((len(alive), 0), dtype=np.float32)
        rewards = self.reward(task, empty, empty, next_observation, features)
        reported = rewards[self.returns == "sparse"].astype(np.float64)
        return float((reported * alive).sum() / _FLOOR_EPISODES)

    def _random_motions(self, task: Task) -> tuple[NDArray[np.bool_], Array, Array]:
        """Return, for every step of random episodes: was it before the end, s', features. Rows of steps."""
        rng = seeding.generator(0, self.name, "random floor")
        env = self.batch([task], _FLOOR_EPISODES)
        env.reset([seeding.generator(0, self.name, "random start", i) for i in range(_FLOOR_EPISODES)])
        alive = np.ones(_FLOOR_EPISODES, dtype=np.bool_)
        rows: list[tuple[NDArray[np.bool_], Array, Array]] = []
        for _ in range(self.horizon):
            result = env.step(rng.uniform(-1.0, 1.0, (_FLOOR_EPISODES, self.action_size)).astype(np.float32))
            rows.append((alive.copy(), result.next_observation, result.features))
            alive &= ~result.terminated
        mask, observation, features = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return mask, observation, features
