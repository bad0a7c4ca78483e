"""Mechanics shared by the families whose tasks differ in the body: every mass, inertia, damping, friction.

Every entry of four arrays of the compiled model is multiplied by base^u with u uniform on [-3, 3], drawn one
by one: masses and inertias (base 1.5, so 0.30 to 3.4 times), joint dampings (1.3, 0.46 to 2.2 times),
frictions of all geoms, the floor included (1.5). A file of the original says one multiplier per body; its code
draws one per entry, and so does this. Multipliers always apply to the nominal model.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs._mujoco import Doubles, Motion, MujocoConfig, MujocoFamily, Physics, load_model
from omrl.envs.base import Array, Task

LIMIT = 3.0  # of |u|
ARRAYS = {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}  # in drawing order
_TIMESTEP = 0.004  # s; Gymnasium's models have 0.002
_FASTEST = 10.0  # velocities are clipped in observations
_ALIVE = np.float32(1.0)
_START = 0.005


class RandParamsConfig(MujocoConfig):
    """What the families with random bodies share.

    Attributes:
        refresh_constants: recompute what MuJoCo derives from masses and inertias (``mj_setConst``: subtree
            masses, inverse weights that scale the constraints) after changing them. The original code never
            did, so every published number on these families belongs to ``false``; ``true`` is the right body.
    """

    refresh_constants: bool = True


@cache
def _nominal(xml: str) -> mujoco.MjModel:
    model = copy.copy(load_model(xml))
    model.opt.timestep = _TIMESTEP
    return model


class RandParams(MujocoFamily):
    """Bodies by log-uniform multipliers; move forward, stay up.

    Attributes:
        bodies: name of the family whose bodies these are: one with sparse rewards has those of the dense one.
    """

    bodies: ClassVar[str]
    CONFIG: ClassVar[type[Config]] = RandParamsConfig
    frame_skip = 4
    feature_size = 2
    varies = "dynamics"
    context_next_observation = True

    @property
    def dt(self) -> float:
        """Seconds of simulated time in a step: 0.016."""
        return _TIMESTEP * self.frame_skip

    def sample(self, index: int, seed: int) -> Task:
        """Return the multipliers of task ``index``, an array's entries in row-major order."""
        self._check_index(index)
        rng = seeding.generator(seed, "task", self.bodies, index)
        nominal = _nominal(self.xml)
        return {
            name: [float(base**u) for u in rng.uniform(-LIMIT, LIMIT, getattr(nominal, name).size)]
            for name, base in ARRAYS.items()
        }

    def model(self, task: Task) -> mujoco.MjModel:
        """Return the nominal model with its entries multiplied."""
        model = copy.copy(_nominal(self.xml))
        for name in ARRAYS:
            entries = getattr(model, name)
            entries[:] = entries * np.array(task[name]).reshape(entries.shape)
        config = self.config
        if isinstance(config, RandParamsConfig) and config.refresh_constants:
            mujoco.mj_setConst(model, mujoco.MjData(model))
        return model

    def task_array(self, task: Task) -> Array:
        """Return nothing: the reward is the same for all tasks, float32 [0]."""
        return np.zeros(0, dtype=np.float32)

    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return positions without x, and velocities clipped to [-10, 10]."""
        velocity = np.clip(physics.qvel, -_FASTEST, _FASTEST)
        return np.concatenate([physics.qpos[:, 1:], velocity], axis=1).astype(np.float32)

    def features(self, motion: Motion) -> Array:
        """Return velocity along x and control cost, float32 [B, 2]."""
        velocity = (motion.after.qpos[:, 0] - motion.before.qpos[:, 0]) / self.dt
        cost = np.float32(1e-3) * (motion.action * motion.action).sum(axis=1)
        return np.stack([velocity, cost], axis=1).astype(np.float32)

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return v + 1 - control cost."""
        return features[:, 0] + _ALIVE - features[:, 1]

    def start(self, model: mujoco.MjModel, rng: np.random.Generator) -> Doubles:
        """Return a start: U(-0.005, 0.005) around the standing pose, float64 [nq + nv]."""
        noise: NDArray[Any] = rng.uniform(-_START, _START, model.nq + model.nv)
        noise[: model.nq] += model.qpos0
        return noise
