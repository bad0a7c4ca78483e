"""Names to modules: by file name for ours, by entry point or dotted name for somebody else's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType

from omrl.core.errors import UserError, suggest

_SHARED = ("base", "contract", "simulate")


def own_names(package: str) -> list[str]:
    """Return the public names in ``package`` (``"omrl.envs"``), sorted; ``_`` in a file name reads ``-``.

    Modules that start with an underscore, and ``_SHARED``, hold shared code and have no name.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package} is not a package")
    found = (m.name for m in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_") and name not in _SHARED)


@cache
def plugins(package: str) -> dict[str, str]:
    """Return name -> module of the entry points of group ``package`` (``omrl.algorithms``, ``omrl.envs``).

    Installed packages have them in their metadata. A name of ours stays ours.
    """
    return {entry.name: entry.module for entry in importlib.metadata.entry_points(group=package)}


def names(package: str) -> list[str]:
    """Return all names that ``load`` knows in ``package``, sorted: ours, and those of installed plug-ins."""
    return sorted({*own_names(package), *plugins(package)})


def load(package: str, name: str, what: str = "name", needs: tuple[str, ...] = (), where: str = "") -> ModuleType:
    """Import the module called ``name`` in ``package``, or somebody else's.

    Args:
        package: ours.
        name: a file name there, or the name of an entry point; with a dot in it, the dotted name of a module
            anywhere on the path.
        what: it is, for messages.
        needs: attributes that a module from outside must have.
        where: prefix of messages about such a module.

    Raises:
        UserError: there is none (the message lists those that exist and suggests the nearest), its import fails, or
            it lacks an attribute.
    """
    if "." not in name and name not in names(package):
        options = suggest(name, names(package))
        own = "" if options.startswith("did") else "; one of your own is named by its module, such as my_package.mine"
        raise UserError(f"{where}unknown {what} '{name}': {options}{own}")
    dotted = module_name(package, name)
    if is_outside(package, name):
        return _outside(name, dotted, what, needs, where)
    return importlib.import_module(dotted)


def module_name(package: str, name: str) -> str:
    """Return the dotted name of the module that ``load`` imports."""
    if "." in name:
        return name
    ours = f"{package}.{name.replace('-', '_')}"
    return ours if name in own_names(package) else plugins(package).get(name, ours)


def is_outside(package: str, name: str) -> bool:
    """Is the module of that name somebody else's?"""
    return not module_name(package, name).startswith(f"{package}.")


def search(folder: Path) -> None:
    """Look for modules in an experiment's own folder, where its params.yaml is, too."""
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.insert(0, path)


def _outside(name: str, dotted: str, what: str, needs: tuple[str, ...], where: str) -> ModuleType:
    if not all(part.isidentifier() for part in dotted.split(".")):
        raise UserError(f"{where}{what} '{name}': expected a name of ours, or a module such as my_package.my_method")
    search(Path.cwd())
    try:
        module = importlib.import_module(dotted)
    except (Exception, SystemExit) as error:  # whatever it runs on import may raise anything
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{where}{what} '{name}': its import fails: {type(error).__name__}: {error} "
            f"({at.filename}, line {at.lineno})"
        ) from None
    for attribute in needs:
        if not hasattr(module, attribute):
            raise UserError(f"{where}{what} '{name}': {module.__file__} lacks {attribute}; expected {', '.join(needs)}")
    return module
