"""OMRL: an open workbench for offline meta-reinforcement learning.

Importing it registers every environment with Gymnasium: ``gymnasium.make("OMRL/PointRobot-v0")``. The names below are
what a notebook needs, see ``omrl.frontdoor``; each is imported when it is first used, PyTorch with it.
"""

import contextlib as _contextlib
import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from omrl.frontdoor import (
        Agent,
        Dataset,
        describe,
        evaluate,
        fit,
        list_algorithms,
        list_environments,
        list_protocols,
        load_agent,
        load_dataset,
        make_family,
    )

__version__ = "0.1.0"
__all__ = [
    "Agent",
    "Dataset",
    "describe",
    "evaluate",
    "fit",
    "list_algorithms",
    "list_environments",
    "list_protocols",
    "load_agent",
    "load_dataset",
    "make_family",
]


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module 'omrl' has no attribute '{name}'")
    return getattr(_importlib.import_module("omrl.frontdoor"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# By name, so that environments are not part of every module's fingerprint. One that cannot be imported must not take
# 'omrl lineage' with it: whoever uses it is told by 'import omrl.envs'.
# Not while 'python -m' looks up a program of ours: a stage first arranges how it ends (stages/__init__.py), and whoever
# needs an environment imports it.
if _sys.argv[:1] != ["-m"]:
    with _contextlib.suppress(Exception):
        _importlib.import_module("omrl.envs")
