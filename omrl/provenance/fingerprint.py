"""Fingerprints of code: what a program computes, not how it is commented, named or filed.

A unit's fingerprint is the SHA-256 over the abstract syntax, without docstrings, of its module and of every module
of its author that it imports, transitively, wherever in the file the import stands. The author of our units is
us; of a plug-in, whoever wrote the other modules in its top-level package, or beside it in the same folder (installed
packages lie beside each other without having an author in common, so there the package alone counts). A plug-in's
fingerprint holds the modules of ours that it uses, too. Editing a comment, a docstring or the layout leaves it as it
was, and so does renaming or moving a module: an import counts by the content of what it names. Forgetting a
dependency is impossible.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from omrl.core.errors import UserError

OURS = ("omrl", "stages")
# Modules of ours that cannot touch a result. 'omrl' itself has names for notebooks; 'omrl.experiment' hands over
# values, which DVC tracks itself (see its docstring); of the others, a test replaces each by a stand-in that does
# nothing, and finds the same bytes.
NO_RESULT = frozenset(
    {
        "omrl", "omrl.core.allocator", "omrl.core.errors", "omrl.core.events", "omrl.core.progress",
        "omrl.core.registry", "omrl.experiment",
    }
)  # fmt: skip
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")}
Name = Callable[[str], str]  # what an import of a module counts as


def _origin(module: str) -> Path | None:
    """Return the source file of ``module``, or None if there is no such module (a name in one, say)."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _folder(top: str) -> Path | None:
    """Return the folder that a top-level module or package lies in; None for what has no file."""
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or []) or ([spec.origin] if spec.has_location and spec.origin else [])
    return Path(places[0]).resolve().parent if places else None


@cache
def _same_author(top: str, unit: str) -> bool:
    """Do top-level modules ``top`` and ``unit`` count together? Ours always do."""
    if top in OURS or top == unit:
        return True
    folder = _folder(unit)
    return unit not in OURS and folder is not None and folder not in _INSTALLED and _folder(top) == folder


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return body[1:]
    return body


def canonical_syntax(node: Any, name_imports: Callable[[ast.Import | ast.ImportFrom], list[str]] | None = None) -> str:
    """Return one text for an abstract syntax tree, the same on every Python that can parse it.

    ``ast.dump`` differs between versions in what it leaves out, so empty fields are left out here.

    Args:
        node: of the tree, or a list of nodes.
        name_imports: returns what the names of an import statement count as; neighboring ones are sorted.
    """
    if isinstance(node, ast.AST):
        parts = []
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                value = _without_docstring(value)
            if value is None or value == [] or name == "type_comment":
                continue
            parts.append(f"{name}={canonical_syntax(value, name_imports)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        items: list[str] = []
        imports: list[str] = []
        for item in node:
            if name_imports is not None and isinstance(item, ast.Import | ast.ImportFrom):
                imports += name_imports(item)
                continue
            items, imports = [*items, *sorted(imports), canonical_syntax(item, name_imports)], []
        return f"[{','.join([*items, *sorted(imports)])}]"
    return repr(node)


def _base(module: str, node: ast.ImportFrom) -> str:
    """Return the absolute name behind ``from`` in ``module``."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if _is_package(module) else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def _imports(module: str, tree: ast.Module, unit: str) -> set[str]:
    """Return the modules that ``tree`` names in an import statement and that count for ``unit``, with packages."""
    found: set[str] = set()
    for node in ast.walk(tree):
        candidates: list[str] = []
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            candidates = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in candidates:
            if _same_author(name.partition(".")[0], unit) and _origin(name) is not None:
                found.update(_with_packages(name))
    return found


def _is_package(module: str) -> bool:
    origin = _origin(module)
    return origin is not None and origin.name == "__init__.py"


def _with_packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def closure(module: str) -> list[str]:
    """Return ``module`` and all modules that count for it and that importing it brings in, sorted."""
    seen: set[str] = set()
    todo, unit = _with_packages(module), module.partition(".")[0]
    while todo:
        name = todo.pop()
        path = _origin(name)
        if name in seen or path is None or name in NO_RESULT:
            continue
        seen.add(name)
        todo.extend(_imports(name, _tree(path), unit) - seen)
    return sorted(seen)


def _syntax(module: str, call: Name) -> str:
    """Return a module's syntax, in which modules that count go by ``call`` instead of by their names."""
    path = _origin(module)
    if path is None:
        raise UserError(f"module {module}: no source file to take a fingerprint of")

    def names(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [f"import {call(a.name)} as {a.asname or a.name}" for a in node.names]
        base, found = _base(module, node), []
        for alias in node.names:
            inner, bound = f"{base}.{alias.name}", alias.asname or alias.name
            whole = call(inner) != inner and _origin(inner) is not None
            found.append(f"import {call(inner)} as {bound}" if whole else f"{call(base)}.{alias.name} as {bound}")
        return found

    return canonical_syntax(_tree(path), names)


@cache
def _content(module: str, unit: str) -> str:
    """Return the SHA-256 of a module's own syntax; whatever it imports of its author's is nameless here."""
    text = _syntax(module, lambda name: "" if _same_author(name.partition(".")[0], unit) else name)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _module_hash(module: str, unit: str) -> str:
    """Return the SHA-256 of a module's syntax; what it imports of its author's goes by its content."""

    def call(name: str) -> str:
        if not _same_author(name.partition(".")[0], unit):
            return name
        return "" if name in NO_RESULT or _origin(name) is None else _content(name, unit)

    return hashlib.sha256(_syntax(module, call).encode()).hexdigest()


def _template_hashes(module: str) -> dict[str, str]:
    """Return ``module/templates/file`` -> SHA-256 of the files in a package's folder ``templates``: code of a page."""
    path = _origin(module)
    if path is None or not _is_package(module):
        return {}
    files = sorted(file for file in (path.parent / "templates").glob("*") if file.is_file())
    return {f"{module}/templates/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def modules(module: str) -> dict[str, str]:
    """Return module (or template) -> SHA-256 of everything in a unit's fingerprint that has content.

    Raises:
        UserError: a module does not parse or has no source.
    """
    unit = module.partition(".")[0]
    hashes = {name: _module_hash(name, unit) for name in closure(module)}
    empty = hashlib.sha256(b"Module()").hexdigest()
    templates = {name: value for package in hashes for name, value in _template_hashes(package).items()}
    return {name: value for name, value in {**hashes, **templates}.items() if value != empty}


def fingerprint(module: str) -> dict[str, Any]:
    """Return ``{"fingerprint": sha256}`` of a unit of code; no name is in it.

    Raises:
        UserError: a module does not parse or has no source.
    """
    hashes = modules(module)
    own = hashes.get(module, "")
    text = "\n".join([own, *sorted(set(hashes.values()) - {own})])
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def sources(module: str) -> list[Path]:
    """Return the files behind a plug-in's fingerprint that are not ours; none for a unit of ours."""
    names = [name for name in closure(module) if name.partition(".")[0] not in OURS]
    return [path.resolve() for name in names if (path := _origin(name)) is not None]


def origin(module: str) -> dict[str, Any]:
    """Return where a unit is from: ``package`` and ``version`` that installed it (None for a file in a folder),
    ``module``, ``file`` (its name) and ``sha256`` of the file."""  # fmt: skip
    path = _origin(module)
    if path is None:
        raise UserError(f"module {module}: no source file to take a fingerprint of")
    top = module.partition(".")[0]
    found = importlib.metadata.packages_distributions().get(top, [])
    package = found[0] if found else None
    return {
        "package": package,
        "version": None if package is None else importlib.metadata.version(package),
        "module": module,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
