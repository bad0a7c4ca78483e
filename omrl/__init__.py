"""OMRL: an open workbench for offline meta-reinforcement learning.

Importing it registers every environment with Gymnasium: ``gymnasium.make("OMRL/PointRobot-v0")``.
"""

import contextlib as _contextlib
import importlib as _importlib
import sys as _sys

__version__ = "0.1.0"

# By name, so that environments are not part of every module's fingerprint. One that cannot be imported must not take
# 'omrl lineage' with it: whoever uses it is told by 'import omrl.envs'.
# Not while 'python -m' looks up a program of ours: a stage first arranges how it ends (stages/__init__.py), and whoever
# needs an environment imports it.
if _sys.argv[:1] != ["-m"]:
    with _contextlib.suppress(Exception):
        _importlib.import_module("omrl.envs")
