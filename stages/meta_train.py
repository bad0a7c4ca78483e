"""Meta-train one algorithm on one dataset with one seed."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.data.pairs import sources
from omrl.experiment import load
from omrl.learning.train import build_model, spec_of
from stages import run


def main() -> None:
    """Write data/models/<algorithm>/<dataset>/<seed>/."""
    name, dataset, seed = sys.argv[1:]
    params = load("env", "env_config", "meta_train", "algorithms")
    family, entry = params.family, params.algorithms[name]
    build_model(
        name=name,
        module=entry.file,
        overrides=entry.overrides,
        sources=sources(layout.datasets(dataset)),
        dataset=dataset,
        seed=int(seed),
        config=params.meta_train,
        spec=spec_of(family),
        inference=family.inference_reward,
        code=[
            layout.code("stages", "meta_train"),
            layout.code("algorithms", name),
            layout.code("envs", params.env),
        ],
        target=layout.models(name, dataset, int(seed)),
    )


if __name__ == "__main__":
    run(main)
