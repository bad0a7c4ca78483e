"""Evaluation protocols: where the context of a task comes from, and which episode counts.

All protocols run deterministic episodes, all tasks at once, and count only the last episode of a repetition.

``offline-context`` (FOCAL's released code): before each episode, ``context_per_episode`` random transitions of
the task's offline dataset are appended to the context, with replacement, and the embedding is inferred anew.
The agent's own transitions never enter the context.

``ood-checkpoint`` (the out-of-distribution test of CSRO and UNICORN): the same, with transitions that other
training tasks' behavior policies made. The reward is this task's, computed by the family's own function; where
tasks differ in reward alone, that is what a rollout of those policies in this task would hold.

``online-prior`` (PEARL): the agent collects its context. The first ``exploration_episodes`` follow embeddings drawn
from the prior, the later ones the embedding of everything collected so far. The prior is empirical: the
embedding of the offline data of a training task drawn at random. PEARL draws from N(0, I), which says nothing
for an encoder that was never pulled towards it.

``online-idaq`` (Wang et al., NeurIPS 2023, with its return-based quantification): as ``online-prior``, but only
in-distribution episodes are context. After the exploration, the best ``kept_share`` of its episodes by return are
kept; a later episode enters if it returns at least what the worst kept one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from omrl.algorithms.base import MetaAlgorithm
from omrl.core import seeding
from omrl.core.config import Config
from omrl.data.taskdata import TaskBuffers
from omrl.envs.base import Family
from omrl.nets.encoders import Context

PROTOCOLS = {
    "offline-context": "context from the task's offline dataset, never from the agent (FOCAL)",
    "ood-checkpoint": "context from other tasks' behavior policies, with this task's reward (CSRO, UNICORN)",
    "online-prior": "the agent collects its context, first with embeddings drawn from the prior (PEARL)",
    "online-idaq": "the agent collects its context and keeps in-distribution, high-return episodes (IDAQ)",
}


FORMS = ("one-minus-distance", "eq35")  # of the sparse reward, by the name of the environments' ``sparse_reward``


class ProtocolConfig(Config):
    """The part of section ``evaluate`` that protocols read.

    Attributes:
        protocol: one of ``PROTOCOLS``.
        episodes: per repetition; 20 for the point robots in FOCAL's released code (400 steps of 20).
        context_per_episode: transitions appended before each episode of an offline protocol.
        repetitions: 2 in FOCAL's released code.
        exploration_episodes: first episodes of an online protocol.
        kept_share: of the exploration that ``online-idaq`` keeps.
        prior_context: transitions behind each embedding of the empirical prior.
    """

    protocol: Literal["offline-context", "ood-checkpoint", "online-prior", "online-idaq"] = "offline-context"
    episodes: Annotated[int, Field(ge=1, le=10_000)] = 20
    context_per_episode: Annotated[int, Field(ge=1, le=65536)] = 20
    repetitions: Annotated[int, Field(ge=1, le=1000)] = 2
    exploration_episodes: Annotated[int, Field(ge=1, le=10_000)] = 10
    kept_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    prior_context: Annotated[int, Field(ge=1, le=65536)] = 256

    @model_validator(mode="after")
    def _exploits(self) -> ProtocolConfig:
        if self.protocol.startswith("online") and self.exploration_episodes >= self.episodes:
            raise ValueError(
                f"exploration_episodes = {self.exploration_episodes} leaves none of episodes = {self.episodes} for the "
                f"adapted policy; expected fewer"
            )
        return self


def gather_context(buffers: TaskBuffers, rows: NDArray[np.int64], with_next: bool, device: torch.device) -> Context:
    """Return the context of every task made of the given rows, int64 [tasks, n]."""
    place = np.arange(len(rows))[:, None]

    def pick(field: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(field[place, rows]).to(device)

    following = pick(buffers.next_observation) if with_next else None
    return Context(pick(buffers.observation), pick(buffers.action), pick(buffers.sparse_reward), following)


def run_episodes(
    algorithm: MetaAlgorithm,
    family: Family,
    tasks: Sequence[dict[str, Any]],
    z: torch.Tensor,
    starts: Sequence[np.random.Generator] | None,
) -> dict[str, NDArray[Any]]:
    """Run one deterministic episode of every task at once.

    Args:
        algorithm: acts.
        family: environment.
        tasks: parameters, one per row of ``z``.
        z: embeddings [tasks, latent].
        starts: streams of random starts.

    Returns:
        ``dense`` and ``sparse`` returns [tasks], ``observation`` [tasks, steps + 1, width], ``action`` [tasks,
        steps, width], ``reward`` and ``sparse_reward`` [tasks, steps], ``alive`` bool [tasks, steps]; after a
        termination the last observation is repeated with reward 0.
    """
    env = family.batch(tasks, 1)
    observation = env.reset(starts)
    alive = np.ones(len(tasks), dtype=np.bool_)
    dense, sparse = np.zeros(len(tasks)), np.zeros(len(tasks))
    path, actions, rewards, sparse_rewards, lived = [observation.copy()], [], [], [], []
    for _ in range(family.horizon):
        action = algorithm.act(torch.from_numpy(observation).to(algorithm.device).unsqueeze(1), z).squeeze(1)
        result = env.step(action.cpu().numpy())
        dense += np.where(alive, result.reward, 0)
        sparse += np.where(alive, result.sparse_reward, 0)
        reported = result.sparse_reward if family.returns == "sparse" else result.reward
        actions.append(action.cpu().numpy())
        rewards.append(np.where(alive, reported, 0))
        sparse_rewards.append(np.where(alive, result.sparse_reward, 0))
        lived.append(alive.copy())
        path.append(np.where(alive[:, None], result.next_observation, path[-1]))
        alive &= ~result.terminated
        observation = result.next_observation
    return {
        "dense": dense,
        "sparse": sparse,
        "observation": np.stack(path, axis=1),
        "action": np.stack(actions, axis=1),
        "reward": np.stack(rewards, axis=1).astype(np.float32),
        "sparse_reward": np.stack(sparse_rewards, axis=1).astype(np.float32),
        "alive": np.stack(lived, axis=1),
    }


def restated(family: Family) -> Family | None:
    """Return the family with the other form of the sparse reward (1 - d, or Eq. 35), None where there is one form.

    FOCAL++ mixes the two: it defines Eq. 35 and prints returns that only 1 - d allows.
    """
    config = family.config.resolved()
    if family.returns != "sparse" or family.feature_size or config.get("sparse_reward") not in FORMS:
        return None
    other = next(form for form in FORMS if form != config["sparse_reward"])
    if other == "one-minus-distance" and config["radius"] > 1:  # 1 - d is negative inside such a disc
        return None
    return type(family)(type(family).CONFIG(**{**config, "sparse_reward": other}))


class _Record:
    """Rows of the episodes table."""

    def __init__(self, family: Family, tasks: Sequence[dict[str, Any]], config: ProtocolConfig) -> None:
        self.family, self.tasks, self.config, self.other = family, tasks, config, restated(family)
        self.rows: list[dict[str, Any]] = []

    def _restated(self, place: int, ran: dict[str, NDArray[Any]]) -> float:
        if self.other is None:
            return float("nan")
        path, action = ran["observation"][place], ran["action"][place]
        none = np.zeros((len(action), 0), dtype=np.float32)
        _, sparse = self.other.reward(self.tasks[place]["parameters"], path[:-1], action, path[1:], none)
        return float(sparse[ran["alive"][place]].sum())

    def add(self, repetition: int, episode: int, sizes: Sequence[int], ran: dict[str, NDArray[Any]]) -> None:
        reported = ran["sparse" if self.family.returns == "sparse" else "dense"]
        for place, task in enumerate(self.tasks):
            self.rows.append(
                {
                    "task": task["index"],
                    "split": task["split"],
                    "repetition": repetition,
                    "episode": episode,
                    "context_transitions": int(sizes[place]),
                    "counted": episode == self.config.episodes - 1,
                    "return": float(reported[place]),
                    "dense_return": float(ran["dense"][place]),
                    "sparse_return": float(ran["sparse"][place]),
                    "normalized": float(self.family.normalize(task, reported[place])),
                    "restated_return": self._restated(place, ran),
                }
            )


def other_tasks_context(
    buffers: TaskBuffers,
    features: NDArray[np.float32],
    family: Family,
    tasks: Sequence[dict[str, Any]],
    count: int,
    rngs: Sequence[np.random.Generator],
) -> TaskBuffers:
    """Return ``count`` transitions per task, made by the policies of other training tasks, with this task's rewards.

    Args:
        buffers: offline data of the tasks, in their order.
        features: what the reward function reads beside them, [tasks, rows, width].
        family: environment; its tasks differ in reward alone.
        tasks: rows of data/tasks/all.json.
        count: transitions.
        rngs: a stream per task.
    """
    training = np.array([i for i, t in enumerate(tasks) if t["split"] == "train"])
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for place, (task, rng) in enumerate(zip(tasks, rngs, strict=True)):
        others = training[training != place]
        source, row = others[rng.integers(len(others), size=count)], rng.integers(buffers.rows, size=count)
        moved = {
            name: getattr(buffers, name)[source, row]
            for name in ("observation", "action", "next_observation", "terminal")
        }
        dense, sparse = family.reward(
            task["parameters"], moved["observation"], moved["action"], moved["next_observation"], features[source, row]
        )
        for name, values in {**moved, "reward": dense, "sparse_reward": sparse}.items():
            parts.setdefault(name, []).append(values)
    return TaskBuffers(tasks=buffers.tasks, **{name: np.stack(values) for name, values in parts.items()})


def _offline(
    algorithm: MetaAlgorithm,
    buffers: TaskBuffers,
    features: NDArray[np.float32] | None,
    record: _Record,
    stream: Sequence[str | int],
    seed: int,
) -> dict[str, NDArray[Any]]:
    config, family, tasks = record.config, record.family, record.tasks
    total = config.episodes * config.context_per_episode
    last: dict[str, NDArray[Any]] = {}
    for repetition in range(config.repetitions):
        rngs = [seeding.generator(seed, *stream, t["index"], repetition) for t in tasks]
        if features is None:
            source, drawn = buffers, np.stack([rng.integers(buffers.rows, size=total) for rng in rngs])
        else:
            source = other_tasks_context(buffers, features, family, tasks, total, rngs)
            drawn = np.tile(np.arange(total), (len(tasks), 1))
        for episode in range(config.episodes):
            size = (episode + 1) * config.context_per_episode
            with_next = algorithm.sizes.context_next_observation
            z = algorithm.infer(gather_context(source, drawn[:, :size], with_next, algorithm.device))
            last = run_episodes(algorithm, family, [t["parameters"] for t in tasks], z, rngs)
            record.add(repetition, episode, [size] * len(tasks), last)
    return last


def collected_context(
    algorithm: MetaAlgorithm, ran: Sequence[dict[str, NDArray[Any]]], task: int, kept: Sequence[bool]
) -> Context:
    """Return the context [1, n, width] that the kept episodes of one task make; rows after a termination left out."""
    chosen = [episode for episode, keep in zip(ran, kept, strict=True) if keep]

    def rows(pick: Any) -> torch.Tensor:
        found = np.concatenate([pick(e)[e["alive"][task]] for e in chosen]).astype(np.float32)
        return torch.from_numpy(found).unsqueeze(0).to(algorithm.device)

    following = None
    if algorithm.sizes.context_next_observation:
        following = rows(lambda e: e["observation"][task, 1:])
    return Context(
        rows(lambda e: e["observation"][task, :-1]),
        rows(lambda e: e["action"][task]),
        rows(lambda e: e["sparse_reward"][task]),
        following,
    )


def _online(
    algorithm: MetaAlgorithm, buffers: TaskBuffers, record: _Record, stream: Sequence[str | int], seed: int
) -> dict[str, NDArray[Any]]:
    config, family, tasks = record.config, record.family, record.tasks
    training = [i for i, t in enumerate(tasks) if t["split"] == "train"]
    rng = seeding.generator(seed, *stream, "prior")
    drawn = rng.integers(buffers.rows, size=(len(tasks), config.prior_context))
    everyone = algorithm.infer(
        gather_context(buffers, drawn, algorithm.sizes.context_next_observation, algorithm.device)
    )
    prior = everyone[training]
    reported = "sparse" if family.returns == "sparse" else "dense"
    for repetition in range(config.repetitions):
        rngs = [seeding.generator(seed, *stream, t["index"], repetition) for t in tasks]
        ran: list[dict[str, NDArray[Any]]] = []
        kept = np.ones((0, len(tasks)), dtype=np.bool_)
        worst = np.full(len(tasks), -np.inf)
        for episode in range(config.episodes):
            sizes = [0] * len(tasks)
            if episode < config.exploration_episodes:
                z = prior[[int(r.integers(len(prior))) for r in rngs]]
            else:
                contexts = [collected_context(algorithm, ran, i, list(kept[:, i])) for i in range(len(tasks))]
                sizes = [c.reward.shape[1] for c in contexts]
                z = torch.cat([algorithm.infer(c) for c in contexts])
            ran.append(run_episodes(algorithm, family, [t["parameters"] for t in tasks], z, rngs))
            enters = ran[-1][reported] >= worst
            kept = np.concatenate([kept, enters[None]])
            if config.protocol == "online-idaq" and episode == config.exploration_episodes - 1:
                returns = np.stack([e[reported] for e in ran])
                count = max(1, round(config.kept_share * len(ran)))
                worst = np.sort(returns, axis=0)[-count]
                kept = returns >= worst
            record.add(repetition, episode, sizes, ran[-1])
    return ran[-1]


def run_protocol(
    algorithm: MetaAlgorithm,
    family: Family,
    buffers: TaskBuffers,
    tasks: Sequence[dict[str, Any]],
    config: ProtocolConfig,
    stream: Sequence[str | int],
    seed: int,
    features: NDArray[np.float32] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """Run the configured protocol on all tasks at once.

    Args:
        algorithm: the meta-trained model.
        family: environment.
        buffers: offline data of the tasks, in their order.
        tasks: rows of data/tasks/all.json.
        config: the protocol.
        stream: names of the random streams; task and repetition are added.
        seed: their root.
        features: [tasks, rows, width], what the reward function reads beside the buffers; ``ood-checkpoint`` only.

    Returns:
        One row per task, repetition and episode, and the last episodes' paths (see ``run_episodes``).
    """
    record = _Record(family, tasks, config)
    if config.protocol.startswith("online"):
        last = _online(algorithm, buffers, record, stream, seed)
    else:
        if (features is not None) != (config.protocol == "ood-checkpoint"):
            raise ValueError("features are for ood-checkpoint, and it needs them")
        last = _offline(algorithm, buffers, features, record, stream, seed)
    return record.rows, last
