"""Peak memory of every step that touches a whole dataset, at the size of the largest one published.

100 tasks x 10,000 transitions x 376 observation dimensions (Humanoid-Dir); each step is a process of its own, so
that its peak is its own. It needs about 10 GB of disk under TMPDIR and some minutes.

    python benchmarks/memory.py [tasks] [rows]
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from omrl.core.files import write_json, write_manifest
from omrl.data.schema import Columns
from omrl.envs.base import Family, load_family

LIMIT = 8 << 30
ENV, HORIZON, STEPS = "humanoid-dir", 1000, 20


def transitions(family: Family, task: int, rows: int, rng: np.random.Generator) -> Columns:
    """Return rows of the family's shapes with random contents."""
    place = np.arange(rows, dtype=np.int32)
    sizes = {
        "observation": family.observation_size,
        "action": family.action_size,
        "next_observation": family.observation_size,
        "reward_features": family.feature_size,
    }
    columns: Columns = {name: rng.standard_normal((rows, size), dtype=np.float32) for name, size in sizes.items()}
    columns |= {name: rng.standard_normal(rows, dtype=np.float32) for name in ("reward", "sparse_reward")}
    columns |= {name: np.full(rows, task, dtype=np.int32) for name in ("task", "source_task")}
    columns |= {name: np.zeros(rows, dtype=np.bool_) for name in ("deterministic", "terminated")}
    return columns | {
        "checkpoint": np.zeros(rows, dtype=np.int32),
        "episode": place // HORIZON,
        "step": place % HORIZON,
        "truncated": place % HORIZON == HORIZON - 1,
    }


def prepare(tasks: int, rows: int) -> None:
    """Lay out data/tasks and data/rollouts as the stages before cutting leave them."""
    from omrl.behavior.rollouts import EPISODES
    from omrl.data.build import task_file
    from omrl.data.parquet import write_table, write_transitions

    family, rng = load_family(ENV), np.random.default_rng(0)
    members: list[dict[str, Any]] = [
        {"index": i, "parameters": family.sample(i, 0), "oracle_return": 1.0, "random_return": 0.0}
        for i in range(tasks)
    ]
    Path("data/tasks").mkdir(parents=True)
    write_json("data/tasks/all.json", {"train": list(range(tasks)), "test": [], "tasks": members})
    folder = Path("data/rollouts/all")
    folder.mkdir(parents=True)
    for row in members:
        footer = {"environment": family.spec(), "task": row["parameters"], "checkpoints": {"0": ""}, "parameters": {}}
        write_transitions(folder / task_file(row["index"]), transitions(family, row["index"], rows, rng), footer)
    count = -(-rows // HORIZON)
    episodes = {
        "episode": np.tile(np.arange(count, dtype=np.int32), tasks),
        "task": np.repeat(np.arange(tasks, dtype=np.int32), count),
        "checkpoint": np.zeros(count * tasks, dtype=np.int32),
        "deterministic": np.zeros(count * tasks, dtype=np.bool_),
        "return": rng.random(count * tasks),
    }
    write_table(folder / EPISODES, pa.table(episodes))
    files: dict[str, int | None] = {task_file(i): rows for i in range(tasks)}
    write_manifest(folder, kind="rollouts", inputs={}, parameters={}, files={**files, EPISODES: count * tasks})


def cut(tasks: int, rows: int) -> None:
    """Cut the level that takes everything."""
    from omrl.data.build import build_level
    from omrl.data.quality import LevelConfig

    build_level(
        name="mixed", level=LevelConfig(steps="all"), rows=rows, family=load_family(ENV), seed=0,
        shards={"all": [0, tasks - 1]}, code=[], target="data/datasets/mixed",
    )  # fmt: skip


def relabel(tasks: int, rows: int) -> None:
    """Relabel the merged support of all tasks for every task."""
    from omrl.data.build import build_relabelled
    from omrl.data.relabel import RelabelConfig

    build_relabelled(
        name="relabelled", config=RelabelConfig(source="mixed"), rows=rows, family=load_family(ENV), seed=0,
        code=[], target="data/datasets/relabelled",
    )  # fmt: skip


def train(tasks: int, rows: int) -> None:
    """Load every task and take some FOCAL steps."""
    from omrl.learning.train import MetaTrainConfig, build_model, spec_of

    family = load_family(ENV)
    build_model(
        name="focal", module="focal", overrides={"width": 64, "encoder_width": 64},
        sources={"transitions": "mixed"}, dataset="mixed", seed=0,
        config=MetaTrainConfig(steps=STEPS, log_every=STEPS, checkpoint_every=STEPS),
        spec=spec_of(family), inference=family.inference_reward,
        code=[], target="data/models/focal",
    )  # fmt: skip


def replay(tasks: int, rows: int) -> None:
    """Keep the replay of one run, as many rows as all tasks together have, and turn it into rollouts."""
    from omrl.behavior.base import replay_name
    from omrl.behavior.replay import ReplayWriter
    from omrl.behavior.rollouts import from_replay
    from omrl.envs.base import StepResult

    family, rng = load_family(ENV), np.random.default_rng(0)
    folder, every = Path("data/replay"), rows
    folder.mkdir()
    writer = ReplayWriter(family, [0], every)
    columns = transitions(family, 0, every, rng)
    names = ("next_observation", "reward", "sparse_reward", "terminated", "reward_features")
    for taken in range(tasks * rows):
        at = slice(taken % every, taken % every + 1)
        result = StepResult(*(columns[name][at] for name in names))
        age, episode = np.array([taken % HORIZON]), np.array([taken // HORIZON])
        writer.add(taken, age, episode, columns["observation"][at], columns["action"][at], result, age == HORIZON - 1)
        if (taken + 1) % every == 0:
            writer.write([folder], taken + 1)
    paths = [folder / replay_name(last) for last in range(every, tasks * rows + 1, every)]
    from_replay(paths, folder / "transitions.parquet", family, 0, 0, {})


def measured(step: Callable[[int, int], None], tasks: int, rows: int, sender: Any) -> None:
    """Run a step and send its peak resident bytes and seconds."""
    start = time.perf_counter()
    step(tasks, rows)
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - start))


def main() -> None:
    tasks, rows = [int(x) for x in sys.argv[1:]] or (100, 10_000)
    context = multiprocessing.get_context("spawn")
    print(f"{tasks} tasks x {rows:,} transitions, {ENV}: peak resident memory, limit {LIMIT / 2**30:.0f} GiB")
    worst = 0
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for step in (prepare, cut, relabel, train, replay):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measured, args=(step, tasks, rows, sender))
            process.start()
            sender.close()
            try:
                peak, seconds = receiver.recv()
            except EOFError:
                sys.exit(f"{step.__name__} failed")
            process.join()
            worst = max(worst, peak)
            print(f"{step.__name__:<12}{peak / 2**30:>8.2f} GiB {seconds:>8.1f} s", flush=True)
        os.chdir("/")
    if worst > LIMIT:
        sys.exit(f"the worst step took {worst / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
