"""Evaluate one model on every task with the contexts of one test dataset."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.evaluation.evaluate import build_evaluation
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/evaluations/<algorithm>/<train>/<test>/<seed>/."""
    name, train, test, seed = sys.argv[1:]
    params = load("env", "env_config", "evaluate")
    build_evaluation(
        name=name,
        train=train,
        test=test,
        seed=int(seed),
        config=params.evaluate,
        settings=params.protocol,
        family=params.family,
        model=layout.models(name, train, int(seed)),
        code=[
            layout.code("stages", "evaluate"),
            layout.code("algorithms", name),
            layout.code("envs", params.env),
        ],
        target=layout.evaluations(name, train, test, int(seed)),
    )


if __name__ == "__main__":
    run(main)
