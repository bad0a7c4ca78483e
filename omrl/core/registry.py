"""Names to modules, by file name: a family or algorithm exists because its file does."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from omrl.core.errors import UserError, suggest


def names(package: str) -> list[str]:
    """Return the public names in ``package`` (``"omrl.envs"``), sorted; ``_`` in a file name reads ``-``.

    Modules that start with an underscore and ``base`` hold shared code and have no name.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package} is not a package")
    found = (m.name for m in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_") and name != "base")


def load(package: str, name: str, what: str = "name") -> ModuleType:
    """Import the module called ``name`` in ``package``.

    Raises:
        UserError: there is none; the message lists those that exist and suggests the nearest.
    """
    known = names(package)
    if name not in known:
        raise UserError(f"unknown {what} '{name}': {suggest(name, known)}")
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")
