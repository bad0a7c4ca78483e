"""What is in a folder under data/, told from its card, its manifest or its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omrl.core.errors import UserError, printable
from omrl.core.files import MANIFEST, read_json, read_manifest
from omrl.data import cards

_LISTED = 40  # entries of a folder


def describe(path: str | Path) -> str:
    """Return a text about a file or folder that a stage wrote.

    Raises:
        UserError: there is nothing, or it is damaged, or nothing can be told of such a file.
    """
    path = Path(path)
    if path.suffix == ".parquet" or (path / "card.json").is_file():
        return cards.describe(path)
    if path.suffix == ".json" and path.is_file():
        return _text([f"{path}:", *_outline(read_json(path))])
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder under data/, a .parquet or a .json file")
    if (path / MANIFEST).is_file():
        return _describe_manifest(path)
    return _describe_listing(path)


def _text(lines: list[str]) -> str:
    return "\n".join(map(printable, lines))


def _size(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.lstat().st_size


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} B"


def _describe_manifest(path: Path) -> str:
    manifest = read_manifest(path)
    lines = [f"{path}: {manifest['kind']}", "made from:"]
    try:
        lines += [f"  {name}  {digest[:12]}" for name, digest in manifest["inputs"].items()]
        lines += ["parameters:", *_outline(manifest["parameters"], "  "), "files:"]
        files = list(manifest["files"].items())
        for name, entry in files[:_LISTED]:
            rows = "" if entry["rows"] is None else f", {entry['rows']:,} rows"
            lines.append(f"  {name}: {_bytes(entry['bytes'])}{rows}")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path / MANIFEST}: damaged; restore it with 'dvc checkout'") from None
    return _text(lines + [f"  and {len(files) - _LISTED} more"] * (len(files) > _LISTED))


def _describe_listing(path: Path) -> str:
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    lines = [f"{path}: {len(entries)} entries, {_bytes(_size(path))}"]
    for entry in entries[:_LISTED]:
        kind = ""
        if (entry / MANIFEST).is_file():
            kind = f", {read_manifest(entry)['kind']}"
        elif entry.is_dir():
            kind = f", {sum(1 for _ in entry.iterdir())} entries"
        lines.append(f"  {entry.name}{'/' * entry.is_dir()}: {_bytes(_size(entry))}{kind}")
    return _text(lines + [f"  and {len(entries) - _LISTED} more"] * (len(entries) > _LISTED))


def _outline(value: Any, indent: str = "") -> list[str]:
    """Return JSON as lines, two levels deep, long lists and texts cut."""
    lines = []
    for key, item in (value if isinstance(value, dict) else {"": value}).items():
        if isinstance(item, dict) and item and not indent.startswith("    "):
            lines += [f"{indent}{key}:", *_outline(item, indent + "  ")]
        else:
            text = str(item)
            lines.append(f"{indent}{key}: {text if len(text) <= 100 else text[:97] + '...'}")
    return lines[:_LISTED] + [f"{indent}and {len(lines) - _LISTED} more lines"] * (len(lines) > _LISTED)
