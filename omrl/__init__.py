"""OMRL: an open workbench for offline meta-reinforcement learning.

Importing it registers every environment with Gymnasium: ``gymnasium.make("OMRL/PointRobot-v0")``.
"""

import contextlib as _contextlib
import importlib as _importlib

__version__ = "0.1.0"

# By name, so that environments are not part of every module's fingerprint. One that cannot be imported must not take
# 'omrl lineage' with it: whoever uses it is told by 'import omrl.envs'.
with _contextlib.suppress(Exception):
    _importlib.import_module("omrl.envs")
