"""Train the behavior policies of one shard of tasks."""

from __future__ import annotations

import importlib
import sys

from omrl.behavior.base import build_shard
from omrl.core import layout
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/behavior/<shard>/."""
    (shard,) = sys.argv[1:]
    params = load("env", "env_config", "seed", "behavior")
    engine = params.behavior.engine
    build_shard(
        importlib.import_module(f"omrl.behavior.{engine}").train,
        shard=shard,
        env=params.env,
        env_config=params.env_config,
        config=params.behavior,
        seed=params.seed,
        code=[
            layout.code("stages", "behavior"),
            layout.code("engines", engine),
            layout.code("envs", params.env),
        ],
        target=layout.behavior(shard),
    )


if __name__ == "__main__":
    run(main)
