"""Build one relabelled set."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.data.build import build_relabelled
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/datasets/<name>/."""
    (name,) = sys.argv[1:]
    params = load("env", "env_config", "seed", "dataset", "relabel")
    build_relabelled(
        name=name,
        config=params.relabel[name],
        rows=params.dataset.transitions_per_task,
        family=params.family,
        seed=params.seed,
        code=[layout.code("stages", "relabel"), layout.code("envs", params.env)],
        target=layout.datasets(name),
    )


if __name__ == "__main__":
    run(main)
