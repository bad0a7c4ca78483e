"""Files that are whole or absent: temporary name first, then one rename; hashes and manifests.

What a stage reads it compares with the manifest beside it first (``input_hashes``): DVC's cache and its record of
what it has seen do not notice a bit that a disk turned.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omrl.core import layout
from omrl.core.errors import UserError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
_DIGEST = "sha256"  # key in a manifest: of all its other keys
_RESTORE = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
_DEEPEST = 100  # levels of a JSON file


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
        UserError: another process holds it; the message has its number.
    """
    path = Path(path)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the next line closes it
        except FileNotFoundError:
            continue  # another process has just removed the empty folder
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                number = stream.read(20).strip()
                who = f"process {number}" if number.isascii() and number.isdigit() else "another process"
                raise UserError(
                    f"{path}: {who} is at this work, left over from a killed 'dvc repro' perhaps; "
                    "wait until it ends, or end it, and run again"
                ) from None
            if not _same_file(stream.fileno(), path):
                continue  # its last holder removed it between our opening and locking
            stream.truncate(0)
            stream.write(f"{os.getpid()}\n")
            stream.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
        UserError: it is missing, cannot be read or is not JSON of at most 100 levels; the message names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: missing; run 'dvc repro' to build it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, expected JSON ({error}); restore it with 'dvc checkout'") from None
    if _levels(value) > _DEEPEST:
        raise UserError(f"{path}: damaged, more than {_DEEPEST} levels of JSON; restore it with 'dvc checkout'")
    return value


def _levels(value: Any) -> int:
    """Return how deep ``value`` is nested, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [entry for part in parts for entry in part]
    return depth


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
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "inputs": dict(inputs),
        "parameters": dict(parameters),
        "packages": package_versions(*packages),
        "files": entries,
        **(extra or {}),
    }
    write_json(folder / MANIFEST, {**manifest, _DIGEST: _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in manifest.items() if key != _DIGEST}
    return hashlib.sha256(canonical(kept).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``folder/manifest.json``; UserError names it when missing, damaged or of another form."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"kind", "inputs", "files", "parameters", "packages"} <= manifest.keys():
        raise UserError(f"{path}: not a manifest of OMRL; restore it with 'dvc checkout'")
    try:
        whole = manifest.get(_DIGEST) == _digest(manifest)
    except ValueError:  # a NaN
        whole = False
    if not whole:
        raise UserError(
            f"{path}: damaged, its content is not what its own SHA-256 says; restore it with 'dvc checkout'"
        )
    return manifest


def verified(folder: str | Path, names: Iterable[str] | None = None) -> list[Path]:
    """Return the paths of ``names`` in ``folder`` after comparing each with the folder's manifest.

    It costs one pass of SHA-256 over the bytes (about 1.5 GB/s), once per process while the file stays as it is.

    Args:
        folder: an output folder.
        names: files in it; None for all that its manifest lists.

    Raises:
        UserError: a file is missing or is not what the manifest recorded; the message names it.
    """
    folder = Path(folder)
    entries = read_manifest(folder)["files"]
    paths = []
    for name in entries if names is None else names:
        path = folder / name
        if name not in entries:
            raise UserError(f"{path}: not in {folder / MANIFEST}; it does not belong to this folder")
        if not path.is_file():
            raise UserError(f"{path}: missing; {_RESTORE}")
        if _known_sha256(path) != entries[name]["sha256"]:
            raise UserError(
                f"{path}: damaged, its SHA-256 is not the one in {folder / MANIFEST}; delete it and run 'dvc checkout'"
            )
        paths.append(path)
    return paths


_known: dict[tuple[int, ...], str] = {}


def _known_sha256(path: Path) -> str:
    """Return ``sha256(path)``, taken once per process of a file that the system says has not changed since."""
    facts = path.stat()
    key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    if key not in _known:
        _known[key] = sha256(path)
    return _known[key]


def input_hash(path: str | Path) -> str:
    """Return the SHA-256 that stands for an input: a file's own, a folder's manifest's."""
    path = Path(path)
    target = path / MANIFEST if path.is_dir() else path
    if not target.is_file():
        raise UserError(f"{target}: missing; run 'dvc repro' to build it")
    return sha256(target)


def input_hashes(*paths: str | Path) -> dict[str, str]:
    """Verify what a stage is about to read and return ``{path: input_hash(path)}`` with POSIX paths as written.

    Every file of a folder is compared with its manifest, a single file with the manifest beside it if there is one.
    Parquet files are left to those who read some of them (``verified``): a dataset holds tasks that training leaves
    alone.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    for path in map(Path, paths):
        if path.is_dir():
            verified(path, [name for name in read_manifest(path)["files"] if not name.endswith(".parquet")])
        elif (path.parent / MANIFEST).is_file():
            verified(path.parent, [path.name])
    return {Path(path).as_posix(): input_hash(path) for path in paths}


def read_input(path: str | Path) -> Any:
    """Read a JSON file, compared first with the manifest beside it if there is one."""
    input_hashes(path)
    return read_json(path)


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
