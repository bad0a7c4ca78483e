"""Evaluate one model on every task with the contexts of one test dataset."""

from __future__ import annotations

import sys

from omrl.core.errors import run
from omrl.evaluation.evaluate import build_evaluation
from omrl.experiment import load


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
        family=params.family,
        code=[
            "data/code/stages/evaluate.json",
            f"data/code/algorithms/{name}.json",
            f"data/code/envs/{params.env}.json",
        ],
        target=f"data/evaluations/{name}/{train}/{test}/{seed}",
    )


if __name__ == "__main__":
    run(main)
