"""Cut one quality level from the rollouts."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.core.files import read_input
from omrl.data.build import build_level
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/datasets/<level>/."""
    (name,) = sys.argv[1:]
    params = load("env", "env_config", "seed", "dataset")
    build_level(
        name=name,
        level=params.dataset.levels[name],
        rows=params.dataset.transitions_per_task,
        family=params.family,
        seed=params.seed,
        shards=read_input(layout.SHARDS)["shards"],
        code=[layout.code("stages", "dataset"), layout.code("envs", params.env)],
        target=layout.datasets(name),
    )


if __name__ == "__main__":
    run(main)
