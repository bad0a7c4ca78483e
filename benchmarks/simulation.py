"""Environment steps per second: our batched form with 100 tasks against one Gymnasium environment per core.

Walkers have a model of their own per task, half-cheetahs share one. Memory per task is the growth of resident
memory when the batch is made and stepped, divided by the tasks.
"""

from __future__ import annotations

import resource
from typing import Any

import gymnasium
import numpy as np
from _bench import best, table

from omrl.core.parallel import worker_count
from omrl.envs.base import BatchEnv, load_family

TASKS, STEPS = 100, 60
CASES = {"half-cheetah-vel": "HalfCheetah-v5", "walker-rand-params": "Walker2d-v5"}


def resident() -> int:
    """Return this process's resident bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def drive(batch: BatchEnv, actions: Any) -> None:
    """Reset and step a batch."""
    batch.reset([np.random.default_rng(i) for i in range(TASKS)])
    for row in actions:
        batch.step(row)


def main() -> None:
    rng = np.random.default_rng(0)
    for name, peer_id in CASES.items():
        family = load_family(name)
        env = gymnasium.make(peer_id).unwrapped  # as many simulator steps per step: 5 and 4
        action = env.action_space.sample()

        def one(env: Any = env, action: Any = action) -> None:
            env.reset(seed=0)
            for _ in range(TASKS * STEPS // 4):
                env.step(action)

        tasks = [family.sample(i, 0) for i in range(TASKS)]
        actions = rng.uniform(-1, 1, (STEPS, TASKS, family.action_size)).astype(np.float32)
        before = resident()
        for threads in sorted({1, worker_count()}):
            batch = family.batch(tasks, threads=threads)

            seconds = best(lambda batch=batch, actions=actions: drive(batch, actions))
            if threads == 1:
                print(f"{name}: {(resident() - before) / TASKS / 1024:,.0f} KiB per task")
            print(f"{name}, {TASKS} tasks, {threads} thread(s)")
            table("steps/s", TASKS * STEPS, ("one Gymnasium environment", 4 * best(one)), ("batched", seconds))


if __name__ == "__main__":
    main()
