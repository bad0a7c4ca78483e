"""Evaluate the models that learned on in the environment."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.evaluation.evaluate import build_evaluation
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/evaluations/<name>/<train>/<test>/<seed>/ for every training and test dataset and seed."""
    (name,) = sys.argv[1:]
    params = load("env", "env_config", "dataset", "seeds", "evaluate", "online")
    cells = [
        (train, test, seed) for train in params.dataset.train for test in params.dataset.test for seed in params.seeds
    ]
    for train, test, seed in cells:
        build_evaluation(
            name=name,
            train=train,
            test=test,
            seed=seed,
            config=params.evaluate,
            settings=params.protocol,
            family=params.family,
            model=layout.online(name) / train / str(seed),
            code=[
                layout.code("stages", "evaluate_online"),
                layout.code("algorithms", params.online[name].algorithm),
                layout.code("envs", params.env),
            ],
            target=layout.evaluations(name, train, test, seed),
        )


if __name__ == "__main__":
    run(main)
