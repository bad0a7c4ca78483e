"""Let every checkpoint of one shard of tasks act."""

from __future__ import annotations

import sys

from omrl.behavior.rollouts import build_shard
from omrl.core import layout
from omrl.experiment import load
from stages import run


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
        code=[layout.code("stages", "rollouts"), layout.code("envs", params.env)],
        target=layout.rollouts(shard),
    )


if __name__ == "__main__":
    run(main)
