"""Where everything lies below ``data/``: the one place beside dvc.yaml that spells these paths.

Every function returns a path relative to the pipeline's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

DATA = Path("data")
CELLS = DATA / "plan/cells.json"  # what params.yaml asks for
SHARDS = DATA / "plan/shards.json"  # the shards alone
TASKS = DATA / "tasks/all.json"  # every task, with the split
CODE = DATA / "code"
ORIGINS = "origins.json"  # in it: package, version and file of plug-ins
MODELS, ONLINE = DATA / "models", DATA / "online"


def code(kind: Literal["stages", "engines", "envs", "algorithms"], name: str) -> Path:
    """Return the fingerprint file of a unit of code."""
    return CODE / kind / f"{name}.json"


def tasks(shard: str) -> Path:
    """Return the file with the tasks of one shard."""
    return DATA / "tasks" / f"{shard}.json"


def behavior(shard: str) -> Path:
    """Return the folder of a shard's behavior policies."""
    return DATA / "behavior" / shard


def rollouts(shard: str) -> Path:
    """Return the folder of a shard's rollouts."""
    return DATA / "rollouts" / shard


def datasets(name: str) -> Path:
    """Return the folder of a quality level or relabelled set."""
    return DATA / "datasets" / name


def models(algorithm: str, train: str, seed: int) -> Path:
    """Return the folder of a meta-trained model."""
    return MODELS / algorithm / train / str(seed)


def online(name: str) -> Path:
    """Return the folder of an entry of section ``online``: <train>/<seed>/ below it are models."""
    return ONLINE / name


def evaluated_online(name: str) -> Path:
    """Return the folder of all evaluations of an entry of section ``online``."""
    return DATA / "evaluations" / name


def evaluations(algorithm: str, train: str, test: str, seed: int) -> Path:
    """Return the folder of a model's evaluation with the contexts of one test dataset."""
    return DATA / "evaluations" / algorithm / train / test / str(seed)


def scratch(stage: str) -> Path:
    """Return the folder for unfinished work of a stage."""
    return DATA / ".scratch" / stage
