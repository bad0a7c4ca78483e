"""Meta-environments: one file per family. Importing this package registers all of them with Gymnasium."""

from omrl.envs import base as base
from omrl.envs.base import register_all

register_all()
