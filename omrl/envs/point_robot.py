"""Point-Robot: reach a hidden goal in a square from a random start; dense reward.

Observation (2, float32): x and y of the robot, unbounded, in units of the plane; an episode starts uniformly
on [-1, 1]^2. Action (2, float32, [-1, 1]): push along x and y, scaled to [-0.1, 0.1] units per step. Reward:
minus the distance to the goal after the move, for task inference too, as in the papers; the sparse version of
``PointConfig`` is stored beside it. No termination; 20 steps.

Tasks: goals uniform on [-1, 1]^2 from NumPy's legacy generator with seed 1337, x and y drawn in turn per
task, as in the released code; ``tasks.seed`` is that seed. Test goals are from a stream of their own, where the
release has the last 20 of its first 100 draws. With ``split: left-right`` the same goals are mirrored so that
training goals lie on the left (x <= 0) and test goals on the right (x >= 0): no training task is like a test
task. MACAW asks this of velocities (ICML 2021, Table 1).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from omrl.core.config import Config
from omrl.envs._point import PointConfig, PointEnv, PointFamily, legacy_uniform
from omrl.envs.base import Task


class PointRobotConfig(PointConfig):
    """Point-Robot.

    Attributes:
        start: where episodes start: ``origin``; ``square``, uniformly on [-1, 1]^2 (PEARL's Point-Robot);
            ``half-plane``, uniformly on [-1.5, 1.5] x [-0.5, 1.5].
        split: ``same``, training and test goals from one square; ``left-right``, training goals from its left half and
            test goals from its right one.
    """

    start: Literal["origin", "square", "half-plane"] = "square"
    split: Literal["same", "left-right"] = "same"


class PointRobot(PointFamily):
    """Goals in a square, random starts, dense return."""

    name = "point-robot"
    env_id = "OMRL/PointRobot-v0"
    CONFIG: ClassVar[type[Config]] = PointRobotConfig

    def sample(self, index: int, seed: int) -> Task:
        """Return the goal of task ``index``: the legacy stream's draws 2 index and 2 index + 1."""
        self._check_index(index)
        x, y = legacy_uniform(seed, -1.0, 1.0, 2 * (index + 1))[-2:]
        return {"goal": [float(x), float(y)]}

    def tasks(self, train: int, test: int, seed: int) -> list[Task]:
        """Return the goals, mirrored to their side where the split asks for it."""
        tasks = super().tasks(train, test, seed)
        if getattr(self.config, "split", "same") == "same":
            return tasks
        sides = [-1.0] * train + [1.0] * test
        return [{"goal": [side * abs(task["goal"][0]), task["goal"][1]]}
                for side, task in zip(sides, tasks, strict=True)]  # fmt: skip


class PointRobotEnv(PointEnv):
    """Gymnasium form of ``PointRobot``."""

    family = PointRobot


FAMILY = PointRobot
ENV = PointRobotEnv
