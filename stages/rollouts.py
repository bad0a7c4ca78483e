"""Let every checkpoint of one shard of tasks act."""

from __future__ import annotations

import sys

from omrl.behavior.rollouts import build_shard
from omrl.core.errors import run
from omrl.experiment import load


def main() -> None:
    """Write data/rollouts/<shard>/."""
    (shard,) = sys.argv[1:]
    params = load("env", "env_config", "seed", "rollouts")
    build_shard(
        shard=shard,
        env=params.env,
        env_config=params.env_config,
        config=params.rollouts,
        seed=params.seed,
        code=["data/code/stages/rollouts.json", f"data/code/envs/{params.env}.json"],
        target=f"data/rollouts/{shard}",
    )


if __name__ == "__main__":
    run(main)
