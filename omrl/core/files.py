"""Files that are whole or absent: temporary name first, then one rename; hashes and manifests."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omrl.core import layout
from omrl.core.errors import UserError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it onto ``path`` if the block succeeds.

    A process killed in the block leaves ``path`` as it was; the leftover is overwritten by the next run.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:
            error.filename = str(path)
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` and put it in the place of ``path`` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def remove_dir(path: str | Path) -> None:
    """Remove a folder; a process killed meanwhile leaves no half of it under its name."""
    path = Path(path)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel lets go of it when this process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another process is at this work, left over from a killed 'dvc repro' perhaps; "
                "wait until it ends, or end it, and run again"
            ) from None
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def canonical(value: Any) -> str:
    """Return the one JSON text of ``value`` that hashes are taken of: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as JSON with sorted keys, atomically.

    Raises:
        ValueError: ``value`` holds a NaN or an infinity.
    """
    write_text(path, json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run 'dvc repro' to build it") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, expected JSON ({error}); restore it with 'dvc checkout'") from None


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def package_versions(*packages: str) -> dict[str, str]:
    """Return the public versions of installed ``packages``.

    The local part (``+cpu``) is dropped: it names a build, and a GPU machine must find the same dependencies.
    """
    return {name: importlib.metadata.version(name).split("+")[0] for name in sorted(packages)}


def write_manifest(
    folder: str | Path,
    *,
    kind: str,
    inputs: Mapping[str, str],
    parameters: Mapping[str, Any],
    files: Mapping[str, int | None],
    packages: tuple[str, ...] = ("numpy", "pyarrow"),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``folder/manifest.json``, the birth certificate of an output folder.

    Args:
        folder: the folder; every file named in ``files`` is in it.
        kind: what it is, such as ``"rollouts"``.
        inputs: path -> SHA-256 of that file, or of that folder's own manifest (see ``input_hash``).
        parameters: the resolved parameters that made it.
        files: name in the folder -> number of rows, or None where rows mean nothing.
        packages: distributions whose versions shaped the bytes.
        extra: further keys.
    """
    folder = Path(folder)
    entries = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size, "rows": rows}
        for name, rows in files.items()
    }
    write_json(
        folder / MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "inputs": dict(inputs),
            "parameters": dict(parameters),
            "packages": package_versions(*packages),
            "files": entries,
            **(extra or {}),
        },
    )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``folder/manifest.json``; UserError names it when missing or damaged."""
    manifest = read_json(Path(folder) / MANIFEST)
    if not isinstance(manifest, dict) or not {"kind", "inputs", "files", "parameters"} <= manifest.keys():
        raise UserError(f"{Path(folder) / MANIFEST}: not a manifest of OMRL; restore it with 'dvc checkout'")
    return manifest


def input_hash(path: str | Path) -> str:
    """Return the SHA-256 that stands for an input: a file's own, a folder's manifest's."""
    path = Path(path)
    target = path / MANIFEST if path.is_dir() else path
    if not target.is_file():
        raise UserError(f"{target}: missing; run 'dvc repro' to build it")
    return sha256(target)


def input_hashes(*paths: str | Path) -> dict[str, str]:
    """Return ``{path: input_hash(path)}`` with POSIX paths as written."""
    return {Path(path).as_posix(): input_hash(path) for path in paths}


@contextlib.contextmanager
def scratch(stage: str, key_parts: Any, packages: tuple[str, ...]) -> Iterator[Path]:
    """Yield the folder for unfinished work of ``stage``, named by the hash of all its inputs.

    A run with the same inputs and package versions finds what an interrupted one had finished; any other run
    finds nothing. Only one process at a time has it; it is removed when the block succeeds.

    Args:
        stage: name.
        key_parts: all inputs, as JSON types.
        packages: distributions whose versions shape the bytes.

    Raises:
        UserError: another process is at the same work.
    """
    text = canonical([key_parts, package_versions(*packages)])
    folder = layout.scratch(stage) / hashlib.sha256(text.encode()).hexdigest()[:16]
    lock = folder.with_suffix(".lock")
    with alone(lock):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        remove_dir(folder)
        lock.unlink()
