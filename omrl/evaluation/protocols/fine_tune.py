"""Offline adaptation, then learning on in the test task: return over environment steps (MACAW, PEARL+FT, MT+FT).

MACAW's online fine-tuning (appendix C.2 and the released code). In every test task, with a model of its own:

1. adapt to ``context`` transitions of the task's offline data;
2. ``evaluations`` deterministic episodes, which are free: their transitions are neither kept nor counted;
3. one episode with normal noise of standard deviation ``noise`` on the actions; its transitions go into the buffer;
4. from the ``first_update``-th of these episodes on, ``updates`` updates of the method on the buffer
   (``Algorithm.fine_tune``: of MACAW's and MT+FT's value function, then of their policies; of PEARL's and FOCAL's
   whole model, the offline transitions staying their context);
5. again from 2; after ``episodes`` rounds a last evaluation, which counts.

Each evaluation gives a row with ``env_steps``, the task's own steps so far. The first one is what offline adaptation
alone does. Training tasks are not tuned: they have a row of the last round, with no step of their own.

What is left open by the paper (a buffer that begins with the offline batch, 100 updates of each network, ten evaluation
episodes) or differs in the release (50,000 transitions of its own alone, no update before the 27th episode, 100 and 200
updates, three evaluation episodes) is a key; the defaults are the release's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from omrl.algorithms.base import Algorithm, Belief
from omrl.core import seeding
from omrl.data.taskdata import ORDER, TaskData
from omrl.envs.base import Array
from omrl.envs.simulate import Episodes, episodes
from omrl.evaluation.contexts import draw_rows, gather
from omrl.evaluation.protocols.base import ProtocolConfig, Run
from omrl.learning.sampler import Sampler
from omrl.nets.experience import Experience


class FineTuneConfig(ProtocolConfig):
    """The keys of the protocol.

    Attributes:
        episodes: collected, and learned from, in each test task; 500 in the released code.
        repetitions: how often the whole protocol is run.
        context: offline transitions behind the belief at the start.
        evaluations: deterministic episodes of an evaluation; there is one before anything is collected, and one at the
            end, which counts.
        evaluate_every: collected episodes from one evaluation to the next.
        noise: standard deviation of what is added to collected actions.
        first_update: collected episodes before which nothing is updated.
        updates: of the method after each collected episode from then on.
        buffer: how many of the latest transitions are kept.
        keep_offline: the buffer begins with the offline transitions (paper).
    """

    episodes: Annotated[int, Field(ge=1, le=100_000)] = 500
    repetitions: Annotated[int, Field(ge=1, le=1000)] = 1
    context: Annotated[int, Field(ge=2, le=10**6)] = 256
    evaluations: Annotated[int, Field(ge=1, le=1000)] = 3
    evaluate_every: Annotated[int, Field(ge=1, le=10**6)] = 1
    noise: Annotated[float, Field(ge=0)] = 0.2
    first_update: Annotated[int, Field(ge=1, le=10**6)] = 27
    updates: Annotated[int, Field(ge=1, le=10**6)] = 100
    buffer: Annotated[int, Field(ge=2, le=10**7)] = 50_000
    keep_offline: bool = False


Columns = Mapping[str, NDArray[np.float32]]


class Learner:
    """One task's own copy of the method, its buffer, its belief.

    Args:
        run: the evaluation; its model is copied.
        place: of the task.
        context: rows of the task's offline data, int64 [n].
        seed: of the copy's updates and draws.
    """

    def __init__(self, run: Run, place: int, context: NDArray[np.int64], seed: int) -> None:
        model, self.config, self.seed = run.algorithm, run.config, seed
        self.algorithm: Algorithm = model.untrained(seed)
        self.algorithm.load_model_state(model.model_state())
        self.inference = run.data.inference
        data = run.data.of([place])
        self.context: Experience = gather(data, [(context, np.ones_like(context, dtype=np.bool_))], model.device)
        taken = {name: getattr(data, name)[:, context] for name in ORDER}
        self.offline: Columns = taken | {name: values[:, context] for name, values in (data.extra or {}).items()}
        self.own: list[Columns] = [self.offline] if self.config.keep_offline else []
        self.belief: Belief = self.algorithm.adapt(self.algorithm.prior(1), self.context)
        self.collected = self.steps = 0

    def add(self, ran: Episodes, place: int) -> None:
        """Put the task's episode into the buffer, with the method's columns."""
        made = ran.valid[place]
        names = {name: "terminated" if name == "terminal" else name for name in ORDER}
        columns = {name: getattr(ran, own)[place][made][None].astype(np.float32) for name, own in names.items()}
        length = int(made.sum())
        whole = np.zeros((1, length), dtype=np.int64)
        episode = replace(
            TaskData.of_bags([0], **columns, inference=self.inference),
            step=np.arange(length, dtype=np.int32)[None], start=whole, end=whole + length,
        )  # fmt: skip
        self.own.append({**columns, **_shaped(self.algorithm.columns(episode))})
        self.collected, self.steps = self.collected + 1, self.steps + length

    def learn(self) -> None:
        """Go on learning from the buffer."""
        if self.collected < self.config.first_update:
            return
        while len(self.own) > 1 and sum(part["reward"].shape[1] for part in self.own[1:]) >= self.config.buffer:
            self.own.pop(0)
        rows = {name: np.concatenate([part[name] for part in self.own], axis=1) for name in self.own[0]}
        sampler = Sampler(
            self._bag({name: values[:, -self.config.buffer :] for name, values in rows.items()}),
            seeding.integer(self.seed, self.collected), self.algorithm.device, self._bag(self.offline),
        )  # fmt: skip

        self.belief = self.algorithm.fine_tune(sampler.draw, self.config.updates, self.context)

    def _bag(self, columns: Columns) -> TaskData:
        bag = TaskData.of_bags([0], **{name: columns[name] for name in ORDER}, inference=self.inference)
        return bag.with_columns({name: values for name, values in columns.items() if name not in ORDER})


def _shaped(columns: Columns) -> Columns:
    return {name: values if values.ndim == 3 else values[..., None] for name, values in columns.items()}


Streams = Sequence[np.random.Generator]


def _episode(run: Run, learners: Sequence[Learner], rngs: Streams, noise: Streams | None) -> Episodes:
    """Run one episode of every learner's task, with noise on the actions if there are streams for it."""

    def act(observation: Array, t: int) -> Array:
        rows = torch.from_numpy(observation)
        found = [
            x.algorithm.act(x.belief, rows[i : i + 1].to(x.algorithm.device)).cpu().numpy()
            for i, x in enumerate(learners)
        ]
        action = np.concatenate(found)
        if noise is not None:
            normal = np.stack([rng.normal(size=action.shape[1]) for rng in noise])
            action = np.clip(action + run.config.noise * normal, -1, 1).astype(np.float32)
        return action

    env = run.family.batch([t["parameters"] for t in run.tasks], 1)
    return episodes(env, act, run.family.horizon, rngs)


def run(run: Run) -> Episodes:
    """Run the protocol; return the last episode of all tasks."""
    config: FineTuneConfig = run.config
    algorithm = run.algorithm
    places = [i for i, task in enumerate(run.tasks) if task["split"] == "test"]
    tuned = replace(run, tasks=[run.tasks[i] for i in places], data=run.data.of(places), rows=run.rows)
    rounds = 0 if run.quick else config.episodes
    last: Episodes | None = None
    for repetition in range(run.repetitions):
        rngs = run.streams(repetition)
        drawn = [draw_rows(run.data, i, algorithm.context_draw(config.context), rng) for i, rng in enumerate(rngs)]
        learners = [
            Learner(run, i, drawn[i][0], seeding.integer(run.seed, *run.stream, run.tasks[i]["index"], repetition))
            for i in places
        ]
        starts, noise = tuned.streams(repetition, "starts"), tuned.streams(repetition, "noise")
        for done in range(rounds + 1):
            if done % config.evaluate_every == 0 or done == rounds:
                for _ in range(config.evaluations):
                    last = _episode(tuned, learners, starts, None)
                    steps = [x.steps for x in learners]
                    sizes = [config.context] * len(places)
                    tuned.add(repetition, done, sizes, last, counted=done == rounds, env_steps=steps)
            if done < rounds:
                collected = _episode(tuned, learners, starts, noise)
                for i, learner in enumerate(learners):
                    learner.add(collected, i)
                    learner.learn()
        others = [i for i in range(len(run.tasks)) if i not in places]
        if others and last is not None:
            rest, count = replace(run, tasks=[run.tasks[i] for i in others], data=run.data.of(others)), len(others)
            context = gather(rest.data, [drawn[i] for i in others], algorithm.device)
            ran, _ = rest.episode(algorithm.adapt(algorithm.prior(count), context), rest.streams(repetition, "starts"))
            rest.add(repetition, rounds, [config.context] * count, ran, counted=True, env_steps=[0] * count)
            last = _merged(last, ran, places, others)
    if last is None:
        raise ValueError("no episode")
    return last


def _merged(one: Episodes, two: Episodes, first: Sequence[int], second: Sequence[int]) -> Episodes:
    """Return the episodes of two groups of tasks at their places."""
    order = np.argsort([*first, *second])
    values: dict[str, Any] = {
        field.name: np.concatenate([getattr(one, field.name), getattr(two, field.name)])[order] for field in fields(one)
    }
    return Episodes(**values)


CONFIG = FineTuneConfig
