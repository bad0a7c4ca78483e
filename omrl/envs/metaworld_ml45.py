"""Meta-World ML45: 45 manipulation skills to learn from, 5 unseen ones; an extra, see 'make setup-metaworld'.

Observation, action and episodes are those of all Meta-World families, in ``omrl/envs/_metaworld.py``.

Rewards are the package's, each skill has its own. They read contacts, body frames and what the episode started
from, which no few stored numbers replace: features (3) are the simulator's reward, its success, and the index of
the task they are for. They cannot be computed for another task, so relabelling is refused.

Tasks: the benchmark's own list, drawn by ``tasks.seed``, in which every skill has 50 starts and goals. Here
``goals`` of them are used, the same number of each skill. Index i is skill i mod 45 with its start and goal
i div 45 among the 45 ``goals`` training tasks; test tasks follow, skill j mod 5 of the five. So
``tasks: {train: 45, test: 5}`` with ``goals: 1`` has every skill once, and ``{train: 2250, test: 250}`` with
``goals: 50`` is the whole benchmark. Drawing the list takes about half a minute.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.envs._metaworld import MetaworldEnv, MetaworldFamily, package, published
from omrl.envs.base import Array, Task

_SKILLS = (45, 5)  # to learn from, to be tested on
_GOALS = 50  # of each skill in the benchmark's list


class Ml45Config(Config):
    """What ML45 leaves open.

    Attributes:
        goals: starts and goals of each skill.
    """

    goals: Annotated[int, Field(ge=1, le=_GOALS)] = _GOALS


def _benchmark(seed: int) -> Any:
    return package().ML45(seed=seed)


class MetaworldMl45(MetaworldFamily):
    """Learn skills quickly."""

    name = "metaworld-ml45"
    env_id = "OMRL/MetaworldMl45-v0"
    CONFIG = Ml45Config
    feature_size = 3
    varies = "dynamics"  # and the reward: skills have scenes and rewards of their own
    context_next_observation = True
    floor_episodes = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._goals: int = config.resolved()["goals"]
        self.capacity, self.first_test = sum(_SKILLS) * self._goals, _SKILLS[0] * self._goals

    def sample(self, index: int, seed: int) -> Task:
        """Return task ``index``: skills of the benchmark's training part in turn, then those of its test part."""
        self._check_index(index)
        training = _SKILLS[0] * self._goals
        part, place = (0, index) if index < training else (1, index - training)
        skill, goal = place % _SKILLS[part], place // _SKILLS[part]
        name, drawn = published(_benchmark, seed)[part][skill * _GOALS + goal]
        return {"environment": name, "start_and_goal": drawn, "index": index}

    def features(self, task: Task, env: Any, reward: float, success: float) -> list[float]:
        """Return the simulator's reward and success, and the task's index."""
        return [reward, success, task["index"]]

    def reward(
        self, task: Task, observation: Array, action: Array, next_observation: Array, features: Array
    ) -> tuple[Array, Array]:
        """Return dense and sparse reward as the simulator gave them.

        Raises:
            UserError: the transitions are another task's.
        """
        if (features[:, 2] != task["index"]).any():
            raise UserError(
                f"'{self.name}': rewards come from the simulator and cannot be computed for task {task['index']} from "
                f"transitions of task {int(features[features[:, 2] != task['index'], 2][0])}; expected 'relabel: {{}}'"
            )
        return features[:, 0].copy(), features[:, 1].copy()


class MetaworldMl45Env(MetaworldEnv):
    """Gymnasium form of ``MetaworldMl45``."""

    family = MetaworldMl45


FAMILY = MetaworldMl45
ENV = MetaworldMl45Env
