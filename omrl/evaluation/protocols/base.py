"""What protocols share: their configuration, episodes of an adapting method, the table of episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from omrl.algorithms.base import Algorithm, Belief
from omrl.core import registry, seeding
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.envs.base import Array, BatchEnv, Family, StepResult
from omrl.envs.simulate import Episodes, episodes
from omrl.nets.experience import from_arrays

PACKAGE, NEEDS = "omrl.evaluation.protocols", ("CONFIG", "run")


class ProtocolConfig(Config):
    """The keys of section ``evaluate`` that every protocol reads.

    Attributes:
        episodes: of a repetition; the last one counts. 20 for the point robots in FOCAL's released code (400 steps).
        repetitions: how often the protocol is run, with other contexts and starts; results are the mean. 2 in FOCAL's
            released code.
    """

    episodes: Annotated[int, Field(ge=1, le=10_000)] = 20
    repetitions: Annotated[int, Field(ge=1, le=1000)] = 2


def protocol(name: str) -> ModuleType:
    """Return the module of a protocol.

    Raises:
        UserError: there is none of that name.
    """
    return registry.load(PACKAGE, name, "evaluation protocol", NEEDS)


def protocols() -> dict[str, str]:
    """Return name -> first line of the docstring of every protocol."""
    return {name: (protocol(name).__doc__ or "").strip().splitlines()[0] for name in registry.names(PACKAGE)}


@dataclass
class Run:
    """One evaluation: a model, the tasks, a protocol's configuration, and the table that it fills.

    Attributes:
        algorithm: the meta-trained model.
        family: environment.
        data: offline data of the tasks, in their order.
        tasks: rows of data/tasks/all.json.
        config: of the protocol.
        stream: names of the random streams; task and repetition are added.
        seed: their root.
        features: [tasks, rows, width], what the reward function reads beside ``data``.
        quick: for a learning curve: of an offline protocol the last episode alone, of ``fine-tune`` what was before
            learning on. The former is the number of the table.
        rows: the table of episodes, filled by ``add``.
    """

    algorithm: Algorithm
    family: Family
    data: TaskData
    tasks: Sequence[dict[str, Any]]
    config: Any
    stream: Sequence[str | int]
    seed: int
    features: NDArray[np.float32] | None = None
    quick: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def repetitions(self) -> int:
        """How often the whole protocol is run."""
        return int(self.config.repetitions)

    def streams(self, repetition: int, *purpose: str) -> list[np.random.Generator]:
        """Return a random stream of every task."""
        return [seeding.generator(self.seed, *self.stream, t["index"], repetition, *purpose) for t in self.tasks]

    def training(self) -> list[int]:
        """Return the places of the training tasks."""
        return [i for i, t in enumerate(self.tasks) if t["split"] == "train"]

    def episode(
        self,
        belief: Belief,
        rngs: Sequence[np.random.Generator],
        explore: torch.Generator | None = None,
        before_step: Callable[[Belief, int], Belief] | None = None,
        env: BatchEnv | None = None,
    ) -> tuple[Episodes, Belief]:
        """Run one episode of every task at once; the method observes its own steps.

        Args:
            belief: at the start.
            rngs: streams of random starts.
            explore: passed to ``act``.
            before_step: may replace the belief before each step.
            env: in place of the family's own.

        Returns:
            The episode, and the belief after it.
        """
        algorithm, now = self.algorithm, [belief]
        places = np.arange(len(self.tasks), dtype=np.int64)

        def act(observation: Array, t: int) -> Array:
            if before_step is not None:
                now[0] = before_step(now[0], t)
            action = algorithm.act(now[0], torch.from_numpy(observation).to(algorithm.device), explore)
            return checked_action(algorithm, action, (len(observation), self.family.action_size))

        def observe(observation: Array, action: Array, result: StepResult, alive: NDArray[np.bool_], t: int) -> None:
            signal = result.reward if self.data.inference == "dense" else result.sparse_reward
            fields = {
                "observation": observation, "action": action, "reward": result.reward,
                "next_observation": result.next_observation, "terminal": result.terminated, "signal": signal,
                "step": np.full(len(alive), t), "valid": alive,
            }  # fmt: skip
            step = from_arrays({name: x[:, None] for name, x in fields.items()}, algorithm.device, places)
            now[0] = algorithm.observe(now[0], step)

        observing = type(algorithm).observe is not Algorithm.observe
        env = self.family.batch([t["parameters"] for t in self.tasks], 1) if env is None else env
        ran = episodes(env, act, self.family.horizon, rngs, observe if observing else None)
        return ran, now[0]

    def add(
        self,
        repetition: int,
        episode: int,
        sizes: Sequence[int],
        ran: Episodes,
        counted: bool,
        wrong: NDArray[np.float64] | None = None,
        **more: Any,
    ) -> None:
        """Add a row per task.

        Args:
            repetition, episode: which.
            sizes: transitions behind every task's belief.
            ran: the episode.
            counted: does it enter the published return?
            wrong: returns of the same policy with another task's context, where that was tried.
            more: further columns, a value for all tasks or one each.
        """
        family = self.family
        sparse, dense = ran.returns(True), ran.returns(False)
        reported = sparse if family.returns == "sparse" else dense
        other = family.restated()
        path = ran.path()
        for place, task in enumerate(self.tasks):
            again = float("nan")
            if other is not None:
                action = ran.action[place]
                none = np.zeros((len(action), 0), dtype=np.float32)
                values = other.reward(task["parameters"], path[place, :-1], action, path[place, 1:], none)[1]
                again = float(values[ran.valid[place]].sum())
            self.rows.append(
                {
                    "task": task["index"],
                    "split": task["split"],
                    "repetition": repetition,
                    "episode": episode,
                    "context_transitions": int(sizes[place]),
                    "counted": counted,
                    "return": float(reported[place]),
                    "dense_return": float(dense[place]),
                    "sparse_return": float(sparse[place]),
                    "normalized": float(family.normalize(task, reported[place])),
                    "restated_return": again,
                    "wrong_context_return": float("nan") if wrong is None else float(wrong[place]),
                    **{name: x[place] if isinstance(x, np.ndarray | list) else x for name, x in more.items()},
                }
            )


def checked_action(algorithm: Algorithm, action: Any, shape: tuple[int, int]) -> Array:
    """Return what ``act`` gave as an array, if it is what it shall give: finite numbers of that shape."""
    name, expected = f"{type(algorithm).__name__}.act", f"expected a tensor of shape {list(shape)}"
    if not isinstance(action, torch.Tensor):
        raise UserError(f"{name} returned {type(action).__name__}: {expected}")
    found = action.detach().cpu().numpy()
    if found.shape != shape:
        raise UserError(f"{name} returned a tensor of shape {list(found.shape)}: {expected}")
    if not np.isfinite(found).all():
        raise UserError(f"{name} returned a number that is not finite: {expected}, finite, on the scale of [-1, 1]")
    return found


def other_task(tasks: Sequence[dict[str, Any]]) -> NDArray[np.int64] | None:
    """Return, for every task, the place of the next task of its split; None if a split has one task alone."""
    places = np.zeros(len(tasks), dtype=np.int64)
    for split in ("train", "test"):
        own = np.array([i for i, t in enumerate(tasks) if t["split"] == split], dtype=np.int64)
        if len(own) == 1:
            return None
        places[own] = np.roll(own, -1)
    return places
