"""Point-Robot-Wind: reach one known goal through a hidden constant wind.

Observation (2, float32): x and y of the robot, unbounded, in units of the plane; every episode starts at the
origin. Action (2, float32, [-1, 1]): push along x and y, scaled to [-0.1, 0.1] units per step; the wind is
added to the state at every step. Reward: minus the distance to the goal (1, 0) after the move, for task inference
too; the sparse version of ``PointConfig`` is stored beside it and not used by the papers. No termination; test
episodes have 20 steps (the papers; the released configuration 25).

Tasks: 50 winds, uniform on [-0.05, 0.05]^2 from NumPy's legacy generator with seed 1337, all 50 x before all
50 y, as in the released code; visited in an order seeded by ``tasks.seed`` (the published 40/10 split was
random and unseeded). Tasks differ in their dynamics: the context encoder needs s'.

There is little to gain by adapting: over the 50 winds the oracle returns -5.114 and a controller that ignores
the wind -5.464, while the mean over 10 random test tasks varies by 0.48.
"""

from __future__ import annotations

from omrl.envs._point import PointEnv, PointFamily, legacy_uniform, order
from omrl.envs.base import Task

WINDS = 50
BOUND = 0.05  # units per step, along each axis
GOAL = (1.0, 0.0)
_LEGACY_SEED = 1337


class PointRobotWind(PointFamily):
    """One goal, hidden winds, dense return."""

    name = "point-robot-wind"
    env_id = "OMRL/PointRobotWind-v0"
    varies = "dynamics"
    context_next_observation = True
    capacity = WINDS
    first_test = 40

    def sample(self, index: int, seed: int) -> Task:
        """Return the wind at place ``index`` of the seeded order of the 50 published winds."""
        self._check_index(index)
        draws = legacy_uniform(_LEGACY_SEED, -BOUND, BOUND, 2 * WINDS)
        place = int(order(seed, WINDS, self.name)[index])
        return {"goal": list(GOAL), "wind": [float(draws[place]), float(draws[WINDS + place])]}

    def references(self, task: Task) -> dict[str, float]:
        """Return the wind-blind controller: it drives to the goal and ignores the wind."""
        return {"wind-blind": self.controlled_return(task, (0.0, 0.0))}


class PointRobotWindEnv(PointEnv):
    """Gymnasium form of ``PointRobotWind``."""

    family = PointRobotWind


FAMILY = PointRobotWind
ENV = PointRobotWindEnv
