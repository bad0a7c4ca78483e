"""Names to modules, by file name: a family or algorithm exists because its file does."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from omrl.core.errors import UserError, suggest

_SHARED = ("base", "simulate")


def names(package: str) -> list[str]:
    """Return the public names in ``package`` (``"omrl.envs"``), sorted; ``_`` in a file name reads ``-``.

    Modules that start with an underscore, and ``_SHARED``, hold shared code and have no name.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package} is not a package")
    found = (m.name for m in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_") and name not in _SHARED)


def load(package: str, name: str, what: str = "name", needs: tuple[str, ...] = (), where: str = "") -> ModuleType:
    """Import the module called ``name`` in ``package``, or somebody else's module ``package.module``.

    Args:
        package: ours.
        name: a file name there; with a dot in it, the dotted name of a module anywhere on the path.
        what: it is, for messages.
        needs: attributes that a module from outside must have.
        where: prefix of messages about such a module.

    Raises:
        UserError: there is none (the message lists those that exist and suggests the nearest), its import fails, or
            it lacks an attribute.
    """
    if "." in name:
        return _outside(name, what, needs, where)
    known = names(package)
    if name not in known:
        raise UserError(f"unknown {what} '{name}': {suggest(name, known)}")
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")


def module_name(package: str, name: str) -> str:
    """Return the dotted name of the module that ``load`` imports."""
    return name if "." in name else f"{package}.{name.replace('-', '_')}"


def _outside(name: str, what: str, needs: tuple[str, ...], where: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{where}{what} '{name}': expected a name of ours, or a module such as my_package.my_method")
    if str(Path.cwd()) not in sys.path:  # an experiment's own folder, where params.yaml is
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever it runs on import may raise anything
        raise UserError(f"{where}{what} '{name}': its import fails: {type(error).__name__}: {error}") from None
    for attribute in needs:
        if not hasattr(module, attribute):
            raise UserError(f"{where}{what} '{name}': {module.__file__} lacks {attribute}; expected {', '.join(needs)}")
    return module
