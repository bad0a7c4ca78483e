"""Fingerprints of code: what a program computes, not how it is commented.

A unit's fingerprint is the SHA-256 over the abstract syntax, without docstrings, of its module and of every
module of ours that it imports, transitively, wherever in the file the import stands. Editing a comment, a
docstring or the layout leaves it as it was; forgetting a dependency is impossible.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from omrl.core.errors import UserError

OURS = ("omrl", "stages")
# the reader of params.yaml hands over values, which DVC tracks itself (see its docstring); event files are no output
_NOT_CODE_OF_A_RESULT = frozenset({"omrl.core.events", "omrl.experiment"})


def _origin(module: str) -> Path | None:
    """Return the source file of ``module``, or None if there is no such module (a name in one, say)."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


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


def canonical_syntax(node: Any) -> str:
    """Return one text for an abstract syntax tree, the same on every Python that can parse it.

    ``ast.dump`` differs between versions in what it leaves out, so empty fields are left out here.
    """
    if isinstance(node, ast.AST):
        parts = []
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                value = _without_docstring(value)
            if value is None or value == [] or name == "type_comment":
                continue
            parts.append(f"{name}={canonical_syntax(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(canonical_syntax(item) for item in node)}]"
    return repr(node)


def _imports(module: str, tree: ast.Module) -> set[str]:
    """Return the modules of ours that ``tree`` names in an import statement, with their packages."""
    found: set[str] = set()
    for node in ast.walk(tree):
        candidates: list[str] = []
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if _is_package(module) else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            candidates = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in candidates:
            if name.split(".")[0] in OURS and _origin(name) is not None:
                found.update(_with_packages(name))
    return found


def _is_package(module: str) -> bool:
    origin = _origin(module)
    return origin is not None and origin.name == "__init__.py"


def _with_packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def closure(module: str) -> list[str]:
    """Return ``module`` and all modules of ours that importing it brings in, sorted."""
    seen: set[str] = set()
    todo = _with_packages(module)
    while todo:
        name = todo.pop()
        path = _origin(name)
        if name in seen or path is None or name in _NOT_CODE_OF_A_RESULT:
            continue
        seen.add(name)
        todo.extend(_imports(name, _tree(path)) - seen)
    return sorted(seen)


@cache
def _module_hash(module: str) -> str:
    path = _origin(module)
    if path is None:
        raise UserError(f"module {module}: no source file to take a fingerprint of")
    return hashlib.sha256(canonical_syntax(_tree(path)).encode()).hexdigest()


def _template_hashes(module: str) -> dict[str, str]:
    """Return ``module/templates/file`` -> SHA-256 of the files in a package's folder ``templates``: code of a page."""
    path = _origin(module)
    if path is None or not _is_package(module):
        return {}
    files = sorted(file for file in (path.parent / "templates").glob("*") if file.is_file())
    return {f"{module}/templates/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def fingerprint(module: str) -> dict[str, Any]:
    """Return ``{"fingerprint": sha256, "modules": {module or template: sha256}}`` of a unit of code.

    Raises:
        UserError: a module does not parse or has no source.
    """
    hashes: dict[str, str] = {}
    for name in closure(module):
        hashes |= {name: _module_hash(name), **_template_hashes(name)}
    text = "".join(f"{name} {value}\n" for name, value in hashes.items())
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest(), "modules": hashes}
