"""Parquet files: the same bytes twice, exact values back, and no damage that goes unnoticed."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omrl.core.errors import UserError
from omrl.core.files import write_manifest
from omrl.data import parquet

FOOTER = {
    "schema_version": 1,
    "environment": {"family": "toy", "config": {"radius": 0.2}},
    "tasks": {"3": {"goal": [0.6, -0.8]}},
    "checkpoints": {"data/behavior/a/task=003/step=000000.zip": "ab" * 32},
    "parameters": {"seed": 0},
}
SCALARS = {
    "task": np.int32, "source_task": np.int32, "checkpoint": np.int32, "episode": np.int32, "step": np.int32,
    "deterministic": np.bool_, "reward": np.float32, "sparse_reward": np.float32,
    "terminated": np.bool_, "truncated": np.bool_,
}  # fmt: skip
VECTORS = {"observation": 3, "next_observation": 3, "action": 2}
ORDER = [
    *("task", "source_task", "checkpoint", "episode", "step", "deterministic"),
    *("observation", "next_observation", "action"),
    *("reward", "sparse_reward", "terminated", "truncated", "reward_features"),
]


def make(rows: int, features: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = {}
    for name, dtype in SCALARS.items():
        if dtype is np.float32:
            columns[name] = rng.normal(size=rows).astype(np.float32)
        else:
            columns[name] = rng.integers(0, 2 if dtype is np.bool_ else 100, rows).astype(dtype)
    for name, width in (*VECTORS.items(), ("reward_features", features)):
        columns[name] = rng.normal(size=(rows, width)).astype(np.float32)
    return {name: columns[name] for name in ORDER}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "task=003.parquet"
    columns = make(300)
    parquet.write_transitions(path, columns, FOOTER)
    return path, columns


@pytest.mark.parametrize("rows", [1, 2, 4097])
@pytest.mark.parametrize("features", [0, 1, 4])
def test_values_come_back_bit_for_bit(tmp_path, rows, features):
    columns = make(rows, features)
    parquet.write_transitions(tmp_path / "a.parquet", columns, FOOTER)
    assert same(parquet.read_transitions(tmp_path / "a.parquet"), columns)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_every_finite_number_comes_back_with_its_sign(tmp_path, values):
    columns = make(len(values))
    columns["reward"] = np.array(values, dtype=np.float32)
    parquet.write_transitions(tmp_path / "a.parquet", columns, FOOTER)
    assert parquet.read_transitions(tmp_path / "a.parquet")["reward"].tobytes() == columns["reward"].tobytes()


def test_the_order_of_the_columns_passed_does_not_matter(tmp_path):
    columns = make(50)
    parquet.write_transitions(tmp_path / "a.parquet", columns, FOOTER)
    parquet.write_transitions(tmp_path / "b.parquet", dict(reversed(columns.items())), FOOTER)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_columns_have_the_documented_order_and_types(written):
    schema = pq.read_schema(written[0])
    assert schema.names == ORDER
    types = {np.int32: pa.int32(), np.float32: pa.float32(), np.bool_: pa.bool_()}
    for name, dtype in SCALARS.items():
        assert schema.field(name).type == types[dtype], name
    for name, width in (*VECTORS.items(), ("reward_features", 1)):
        kind = schema.field(name).type
        assert pa.types.is_fixed_size_list(kind), name
        assert kind.list_size == width
        assert kind.value_type == pa.float32()


def test_the_footer_is_json_under_its_key(written):
    raw = pq.read_schema(written[0]).metadata[b"omrl"]
    assert json.loads(raw)["environment"] == FOOTER["environment"]
    footer = parquet.read_footer(written[0])
    assert {key: footer[key] for key in FOOTER} == FOOTER


def test_the_same_rows_make_the_same_bytes(tmp_path, written):
    path, columns = written
    footer = dict(reversed(FOOTER.items()))
    parquet.write_transitions(tmp_path / "again.parquet", columns, footer)
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def test_compression_is_fixed_and_pages_carry_checksums(tmp_path, written):
    group = pq.ParquetFile(written[0]).metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    # a flipped value byte is found by the page checksum itself
    data = bytearray(written[0].read_bytes())
    start = group.column(0).total_compressed_size
    data[start] ^= 1
    (tmp_path / "flip.parquet").write_bytes(data)
    with pytest.raises(OSError, match=r"checksum|CRC|verification"):
        pq.read_table(tmp_path / "flip.parquet", page_checksum_verification=True)


def test_some_columns_can_be_read_alone(written):
    path, columns = written
    assert same(
        parquet.read_transitions(path, ["action", "reward"]),
        {name: columns[name] for name in ("action", "reward")},
    )


def test_an_unknown_column_is_named(written):
    with pytest.raises((UserError, ValueError, KeyError), match="rewards"):
        parquet.read_transitions(written[0], ["rewards"])


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_no_flipped_bit_changes_what_is_read(tmp_path, bit):
    """In magic, page headers, pages, footer: refused by name, or without any effect on what is read."""
    path = tmp_path / "task=003.parquet"
    columns = make(40)
    parquet.write_transitions(path, columns, FOOTER)
    data = path.read_bytes()
    footer = parquet.read_footer(path)
    tail = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    places = sorted({*range(0, tail, 17), *range(tail, len(data), 5), 0, 3, len(data) - 1, len(data) - 5})
    refused = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            found = parquet.read_transitions(path)
            note = parquet.read_footer(path)
        except UserError as error:
            refused += str(path) in str(error)
            continue
        assert same(found, columns), f"other values, no error: byte {place}, footer from {tail}"
        assert note == footer, f"another footer, no error: byte {place}"
    assert refused > 0.5 * len(places)


def test_the_manifest_covers_every_bit(tmp_path):
    path = tmp_path / "task=003.parquet"
    parquet.write_transitions(path, make(20), FOOTER)
    write_manifest(tmp_path, kind="dataset", inputs={}, parameters={}, files={path.name: 20})
    assert parquet.verified(tmp_path, [path.name]) == [path]
    data = path.read_bytes()
    for place in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"task=003\.parquet.*damaged"):
            parquet.verified(tmp_path, [path.name])
    path.unlink()
    with pytest.raises(UserError, match=r"task=003\.parquet: missing"):
        parquet.verified(tmp_path, [path.name])
    with pytest.raises(UserError, match=r"task=004\.parquet"):
        parquet.verified(tmp_path, ["task=004.parquet"])


@pytest.mark.parametrize("keep", [0, 3, 4, 12, 0.3, 0.9, -9, -8, -4, -1])
def test_a_truncated_file_is_named(written, keep):
    path, _ = written
    data = path.read_bytes()
    length = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:length])
    with pytest.raises(UserError, match="task=003") as caught:
        parquet.read_transitions(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="task=003"):
        parquet.read_footer(path)


@pytest.mark.parametrize("read", [parquet.read_transitions, parquet.read_footer, parquet.read_table])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(UserError, match=r"nowhere\.parquet"):
        read(tmp_path / "nowhere.parquet")


def test_text_is_no_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_text("task,reward\n1,2\n")
    with pytest.raises(UserError, match=r"a\.parquet"):
        parquet.read_transitions(tmp_path / "a.parquet")


def test_a_parquet_file_of_someone_else_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet"):
        parquet.read_transitions(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet"):
        parquet.read_footer(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: {**c, "reward": c["reward"][:-1]},
        lambda c: {name: value for name, value in c.items() if name != "action"},
        lambda c: {**c, "rewards": c["reward"]},
        lambda c: {**c, "observation": c["observation"][:, 0]},
    ],
    ids=["short", "missing", "unknown", "flat"],
)
def test_broken_columns_are_never_written(tmp_path, spoil):
    path = tmp_path / "a.parquet"
    with pytest.raises((UserError, ValueError, KeyError)):
        parquet.write_transitions(path, spoil(make(20)), FOOTER)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(monkeypatch, written):
    path, columns = written
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        parquet.write_transitions(path, columns, FOOTER)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_other_tables_make_the_round_trip(tmp_path):
    table = pa.table(
        {"task": pa.array([1, 2], pa.int32()), "seed": pa.array([2**40, 1], pa.int64()), "name": ["a", "b"]}
    )
    parquet.write_table(tmp_path / "a.parquet", table, {"kind": "episodes"})
    parquet.write_table(tmp_path / "b.parquet", table, {"kind": "episodes"})
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    found = parquet.read_table(tmp_path / "a.parquet")
    assert found.to_pydict() == table.to_pydict()
    assert found.schema.types == table.schema.types
    assert parquet.read_footer(tmp_path / "a.parquet")["kind"] == "episodes"


def test_a_table_needs_no_footer(tmp_path):
    parquet.write_table(tmp_path / "a.parquet", pa.table({"x": [1.0]}), None)
    assert parquet.read_table(tmp_path / "a.parquet").to_pydict() == {"x": [1.0]}


def test_damage_to_other_tables_is_named(tmp_path):
    path = tmp_path / "episodes.parquet"
    parquet.write_table(path, pa.table({"x": np.arange(500.0)}), {"kind": "episodes"})
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"episodes\.parquet"):
        parquet.read_table(path)


def test_streamed_parts_and_chosen_rows_are_the_rows(tmp_path, monkeypatch):
    """Rows across row groups, first and last ones, and groups without any."""
    parts = [make(rows, seed=rows) for rows in (7, 30, 1, 12)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    monkeypatch.setattr(parquet, "_ROW_GROUP", 10)
    path = tmp_path / "a.parquet"
    parquet.stream_transitions(path, iter(parts), {"x": 1})
    assert parquet.read_footer(path)["x"] == 1
    again = parquet.read_transitions(path)
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    for rows in ([0], [49], [0, 6, 7, 16, 17, 37, 49], list(range(50)), [20, 21]):
        found = parquet.read_rows(path, np.array(rows))
        assert list(found) == list(again)
        assert all(np.array_equal(found[name], whole[name][rows]) for name in whole), rows
    first = path.read_bytes()
    parquet.stream_transitions(path, iter(parts), {"x": 1})
    assert path.read_bytes() == first
