"""Parquet files that are whole, the same bytes every time, and never read damaged.

Page checksums are written and verified: by default pyarrow reads a flipped bit silently. They cover the
pages, not the footer and the page headers; where a manifest stands beside the file, its SHA-256 covers all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from omrl.core.errors import UserError
from omrl.core.files import atomic_path, canonical
from omrl.core.files import verified as verified  # for those who read tables
from omrl.data.schema import SCHEMA_VERSION, Columns, check, concatenate, from_table, take, to_table

_FOOTER = b"omrl"
_DIGEST = b"omrl-sha256"  # of the footer: no page checksum covers it
_ROW_GROUP = 1 << 16


_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "write_page_checksum": True,
    "store_schema": True,
}


def _metadata(footer: dict[str, Any]) -> dict[bytes, bytes]:
    text = canonical(footer).encode()
    return {_FOOTER: text, _DIGEST: hashlib.sha256(text).hexdigest().encode()}


def write_table(path: str | Path, table: pa.Table, footer: dict[str, Any] | None = None) -> None:
    """Write ``table`` with ``footer`` as canonical JSON in its metadata: atomic, deterministic, with checksums."""
    table = table.replace_schema_metadata(_metadata(footer or {}))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=_ROW_GROUP, **_OPTIONS)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file that verifies page checksums; what is wrong with it becomes a UserError that names it."""
    hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, memory_map=False) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {hint}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EMFILE, errno.EISDIR):
            raise
        raise UserError(f"{path}: damaged Parquet file ({error}); {hint}") from None


def read_table(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, verifying page checksums.

    Raises:
        UserError: it is missing, truncated, damaged or lacks a column; the message names the file.
    """
    with _reading(path) as file:
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"{path}: lacks the columns {', '.join(sorted(missing))}")
        table = file.read(columns)
        table.validate(full=True)
        return table


def read_footer(path: str | Path) -> dict[str, Any]:
    """Return the JSON footer of a file; UserError names the file when it is missing, damaged or not ours."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        if hashlib.sha256(metadata[_FOOTER]).hexdigest().encode() != metadata[_DIGEST]:
            raise ValueError("its own SHA-256 differs")
        footer = json.loads(metadata[_FOOTER])
        if not isinstance(footer, dict):
            raise ValueError("not a JSON object")
        return footer
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run 'dvc repro' to build it") from None
    except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no footer of OMRL, or damaged ({error}); restore it with 'dvc checkout'") from None


def write_transitions(path: str | Path, columns: Columns, footer: dict[str, Any]) -> None:
    """Write transitions in the schema of ``omrl.data.schema``."""
    write_table(path, to_table(columns), {"schema_version": SCHEMA_VERSION, **footer})


def stream_transitions(path: str | Path, parts: Iterable[Columns], footer: dict[str, Any]) -> None:
    """Write transitions that come in parts, one part in memory at a time; at least one part.

    A part is a row group (several, where it is long), so the bytes depend on how the rows are divided.
    """
    parts = iter(parts)
    first = to_table(next(parts))
    schema = first.schema.with_metadata(_metadata({"schema_version": SCHEMA_VERSION, **footer}))
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, **_OPTIONS) as writer:
        writer.write_table(first.cast(schema), row_group_size=_ROW_GROUP)
        del first
        for part in parts:
            writer.write_table(to_table(part).cast(schema), row_group_size=_ROW_GROUP)


def read_transitions(path: str | Path, columns: list[str] | None = None) -> Columns:
    """Read transitions, all columns or some, as arrays [N] and [N, width]."""
    table = read_table(path, columns)
    with _transitions(path):
        if columns is None:
            check(table.schema)
        return from_table(table)


def read_rows(path: str | Path, rows: NDArray[np.int64]) -> Columns:
    """Read some rows of a file of transitions, all columns, with one row group in memory at a time.

    Args:
        path: of the file.
        rows: indices in rising order, at least one.
    """
    parts, start = [], 0
    with _reading(path) as file, _transitions(path):
        check(file.schema_arrow)
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            own = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            if len(own):
                table = file.read_row_group(group)
                table.validate(full=True)
                parts.append(take(from_table(table), own))
            start = end
    return concatenate(parts)


@contextlib.contextmanager
def _transitions(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, pa.ArrowException) as error:
        hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
        raise UserError(f"{path}: not a file of transitions, or damaged ({error}); {hint}") from None
