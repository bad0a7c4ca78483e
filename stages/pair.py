"""Put two datasets together: transitions of one, contexts of another."""

from __future__ import annotations

import sys

from omrl.core import layout
from omrl.data.pairs import build_pair
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/datasets/<pair>/."""
    (name,) = sys.argv[1:]
    params = load("pairs")
    build_pair(name, params.pairs[name], [layout.code("stages", "pair")], layout.datasets(name))


if __name__ == "__main__":
    run(main)
