"""The columns of a transition, the same in every Parquet file of rollouts and datasets.

``(source_task, checkpoint, episode, step)`` identifies a physical transition for ever; after relabelling,
``task`` says whose reward the row carries and ``source_task`` whose policy and dynamics produced it.

What a model collected while it learned on has one more column, ``reward_source``: where the row's reward is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]

SCHEMA_VERSION = 1
VECTORS = ("observation", "action", "next_observation", "reward_features")  # float32 [N, width]
KEY = ("source_task", "checkpoint", "episode", "step")
TYPES: dict[str, Any] = {
    "task": np.int32,
    "source_task": np.int32,
    "checkpoint": np.int32,
    "episode": np.int32,
    "step": np.int32,
    "deterministic": np.bool_,
    "observation": np.float32,
    "next_observation": np.float32,
    "action": np.float32,
    "reward": np.float32,
    "sparse_reward": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "reward_features": np.float32,
}
SOURCE = "reward_source"  # the optional last column, text
SOURCES = ("simulator", "decoded", "hidden")  # the true reward; a model's guess; nobody's: NaN


def to_table(columns: Mapping[str, NDArray[Any]]) -> pa.Table:
    """Return the Arrow table of a set of columns.

    Raises:
        ValueError: a column is missing, unknown, of the wrong type or length.
    """
    if set(columns) - {SOURCE} != set(TYPES):
        wrong = sorted((set(columns) - {SOURCE}) ^ set(TYPES))
        raise ValueError(f"columns {wrong} are missing or unknown")
    rows = len(columns["task"])
    arrays, fields = [], []
    for name, kind in TYPES.items():
        values = columns[name]
        if values.dtype != kind or len(values) != rows or values.ndim != (2 if name in VECTORS else 1):
            raise ValueError(f"column {name}: {values.dtype}{values.shape}, expected {np.dtype(kind)} of {rows} rows")
        if name in VECTORS:
            width = values.shape[1]
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            if width:
                array: Any = pa.FixedSizeListArray.from_arrays(flat, width)
            else:
                # Parquet cannot hold fixed-size lists of width 0: empty lists of any size instead
                offsets = pa.array(np.zeros(rows + 1, dtype=np.int32))
                array = pa.ListArray.from_arrays(offsets, flat)
        else:
            array = pa.array(values)
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False))
    if SOURCE in columns:
        sources = columns[SOURCE].tolist()
        if len(sources) != rows or not set(sources) <= set(SOURCES):
            raise ValueError(f"column {SOURCE}: expected one of {', '.join(SOURCES)} for each of {rows} rows")
        arrays.append(pa.array(sources, pa.string()))
        fields.append(pa.field(SOURCE, pa.string(), nullable=False))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def check(schema: pa.Schema) -> None:
    """Raise ValueError unless ``schema`` is that of a file of transitions."""
    if list(schema.names) not in (list(TYPES), [*TYPES, SOURCE]):
        wrong = sorted((set(schema.names) - {SOURCE}) ^ set(TYPES))
        raise ValueError(f"columns {wrong} are missing, unknown or out of order")
    for field in schema:
        if field.name == SOURCE:
            if field.type != pa.string():
                raise ValueError(f"column {SOURCE} is {field.type}")
            continue
        kind = field.type
        if field.name in VECTORS:
            if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)):
                raise ValueError(f"column {field.name} is {kind}, expected a list of float32")
            kind = kind.value_type
        if kind != pa.from_numpy_dtype(TYPES[field.name]):
            raise ValueError(f"column {field.name} is {field.type}")


def from_table(table: pa.Table) -> Columns:
    """Return the columns of an Arrow table: arrays [N], or [N, width] for vectors."""
    columns: Columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if pa.types.is_fixed_size_list(column.type):
            flat = column.flatten().to_numpy(zero_copy_only=False)
            columns[name] = flat.reshape(len(column), column.type.list_size)
        elif pa.types.is_list(column.type):
            if len(column.flatten()):
                raise ValueError(f"column {name} has lists of no fixed size")
            columns[name] = np.zeros((len(column), 0), dtype=np.float32)
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


def take(columns: Columns, rows: NDArray[Any] | slice) -> Columns:
    """Return the given rows of every column."""
    return {name: values[rows] for name, values in columns.items()}


def concatenate(parts: list[Columns]) -> Columns:
    """Return the parts below each other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def keys(columns: Columns) -> NDArray[np.int64]:
    """Return ``(source_task, checkpoint, episode, step)`` of every row, int64 [N, 4]."""
    return np.stack([columns[name].astype(np.int64) for name in KEY], axis=1)


def sort(columns: Columns) -> Columns:
    """Return the rows ordered by (source_task, checkpoint, episode, step)."""
    return take(columns, np.lexsort(keys(columns).T[::-1]))
