"""Random streams derived from names.

Every stream is a function of the root seed and of what it is for, never of the order in which things
happen: adding a task, a checkpoint or a worker shifts nobody else's numbers.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def _entropy(root: int, names: tuple[str | int, ...]) -> int:
    text = json.dumps([int(root), *names], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def generator(root: int, *names: str | int) -> np.random.Generator:
    """Return the PCG64 stream of ``names`` under the seed ``root``, e.g. ``generator(0, "rollouts", 3)``."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_entropy(root, names))))


def integer(root: int, *names: str | int) -> int:
    """Return a seed in [0, 2**31 - 1] for libraries that take one integer."""
    return _entropy(root, names) % (2**31)
