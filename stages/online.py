"""Let every model of one algorithm act in the environment and learn on."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.experiment import load
from omrl.learning.online import build_online
from stages import run


def main() -> None:
    """Write data/online/<name>/<train>/<seed>/ for every training dataset and seed."""
    (name,) = sys.argv[1:]
    params = load("env", "env_config", "dataset", "meta_train", "seeds", "online")
    config = params.online[name]
    build_online(
        name=name,
        config=config,
        cells=[(train, seed) for train in params.dataset.train for seed in params.seeds],
        training=params.meta_train,
        family=params.family,
        code=[
            layout.code("stages", "online"),
            layout.code("algorithms", config.algorithm),
            layout.code("envs", params.env),
        ],
        target=layout.online(name),
    )


if __name__ == "__main__":
    run(main)
