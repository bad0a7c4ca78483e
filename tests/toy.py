"""A small dataset of point robots that walk to their goals, written as the pipeline writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from omrl.core.files import write_json, write_manifest
from omrl.data.cards import CardBuilder
from omrl.data.parquet import write_transitions
from omrl.envs.base import load_family

EPISODES = 10


def write_pipeline(folder: Path, train: int = 4, test: int = 2) -> Path:
    """Write ``data/tasks/all.json`` and ``data/datasets/expert``; return the latter's folder."""
    family = load_family("sparse-point-robot")
    tasks = family.tasks(train, test, 1337)
    rows: list[dict[str, Any]] = [
        {
            "index": i, "split": "train" if i < train else "test", "parameters": task,
            "oracle_return": family.oracle_return(task), "random_return": family.random_return(task),
        }
        for i, task in enumerate(tasks)
    ]  # fmt: skip
    split = {part: [row["index"] for row in rows if row["split"] == part] for part in ("train", "test")}
    head = {"env": family.name, "spec": family.spec(), "seed": 1337}
    (folder / "data/tasks").mkdir(parents=True)
    write_json(folder / "data/tasks/all.json", {**head, **split, "tasks": rows})
    target = folder / "data/datasets/expert"
    target.mkdir(parents=True)
    files: dict[str, int | None] = {}
    card = CardBuilder("expert", "level", {"steps": "last"})
    for index, task in enumerate(tasks):
        rng, goal = np.random.default_rng(index), np.array(task["goal"])
        env = family.batch([task], EPISODES)
        seen = env.reset([rng] * EPISODES)
        steps = []
        for t in range(family.horizon):
            action = np.clip((goal - seen) / 0.1 + rng.normal(0, 0.3, seen.shape), -1, 1).astype(np.float32)
            done = env.step(action)
            steps.append((seen, action, done, t))
            seen = done.next_observation
        count = EPISODES * family.horizon

        def column(pick: Any, steps: list[Any] = steps) -> Any:  # by episode, then by step
            return np.concatenate(np.stack([pick(*s) for s in steps], axis=1))

        columns = {
            "task": np.full(count, index, np.int32), "source_task": np.full(count, index, np.int32),
            "checkpoint": np.zeros(count, np.int32),
            "episode": np.repeat(np.arange(EPISODES, dtype=np.int32), family.horizon),
            "step": np.tile(np.arange(family.horizon, dtype=np.int32), EPISODES),
            "deterministic": np.zeros(count, np.bool_),
            "observation": column(lambda s, a, d, t: s), "action": column(lambda s, a, d, t: a),
            "reward": column(lambda s, a, d, t: d.reward), "sparse_reward": column(lambda s, a, d, t: d.sparse_reward),
            "next_observation": column(lambda s, a, d, t: d.next_observation),
            "terminated": np.zeros(count, np.bool_),
            "truncated": np.tile(np.arange(family.horizon) == family.horizon - 1, EPISODES),
            "reward_features": np.zeros((count, 0), np.float32),
        }  # fmt: skip
        name = f"task={index:03d}.parquet"
        footer = {"schema_version": 1, "environment": family.spec(), "task": task, "checkpoints": {}, "parameters": {}}
        write_transitions(target / name, columns, footer)
        files[name] = count
        card.add(columns)
    write_json(target / "card.json", card.card({}))
    write_manifest(target, kind="dataset", inputs={}, parameters={}, files={**files, "card.json": None})
    return target
