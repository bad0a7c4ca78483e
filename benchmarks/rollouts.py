"""Rollouts of one checkpoint: ours against a plain SB3 loop (load, predict per step, Gymnasium step)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from _bench import best, table
from stable_baselines3 import SAC

from omrl.behavior.base import BehaviorConfig
from omrl.behavior.checkpoints import load_actor
from omrl.behavior.rollouts import RolloutsConfig, rollout
from omrl.behavior.sb3 import make_model, save_checkpoint
from omrl.envs.base import load_family

EPISODES, HORIZON = 50, 200


def main() -> None:
    torch.set_num_threads(1)
    family = load_family("sparse-point-robot")
    task = family.sample(0, 1337)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.zip"
        save_checkpoint(make_model(family, task, BehaviorConfig(), 0), path)

        def peer() -> None:
            model, env = SAC.load(path, device="cpu"), family.make(task, HORIZON)
            rows = []
            for _ in range(EPISODES):
                observation, done = env.reset()[0], False
                while not done:
                    action, _ = model.predict(observation, deterministic=False)
                    following, reward, terminated, truncated, _ = env.step(action)
                    rows.append((observation, action, reward, following))
                    observation, done = following, terminated or truncated
            np.array([row[2] for row in rows], dtype=np.float32)

        def ours() -> None:
            config = RolloutsConfig(episodes_per_checkpoint=EPISODES, deterministic_episodes=0, horizon=HORIZON)
            rollout(load_actor(path), family, task, index=0, checkpoint=0, config=config, seed=0)

        work = EPISODES * HORIZON
        table(
            "transitions/s", work, ("SB3 predict loop", best(peer, 2)), ("omrl.behavior.rollouts.rollout", best(ours))
        )


if __name__ == "__main__":
    main()
