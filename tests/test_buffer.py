"""Datasets in memory: the stored numbers, stacked by task, and never a damaged file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omrl.algorithms.base import Draw, Phase
from omrl.core import seeding
from omrl.core.errors import UserError
from omrl.core.files import write_manifest
from omrl.data import parquet, taskdata
from omrl.data.taskdata import TaskData
from omrl.learning.train import Sampler

VECTORS = {"observation": 3, "next_observation": 3, "action": 2}
FIELDS = ["observation", "action", "reward", "sparse_reward", "next_observation"]
ROWS = 60


def make(task: int, rows: int = ROWS, horizon: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(task)
    row = np.arange(rows)
    columns = {
        "task": np.full(rows, task),
        "source_task": np.full(rows, task),
        "checkpoint": np.zeros(rows),
        "episode": row // horizon,
        "step": row % horizon,
    }
    columns = {name: value.astype(np.int32) for name, value in columns.items()}
    columns["deterministic"] = np.zeros(rows, np.bool_)
    for name, width in (*VECTORS.items(), ("reward_features", 1)):
        columns[name] = rng.normal(size=(rows, width)).astype(np.float32)
    for name in ("reward", "sparse_reward"):
        columns[name] = rng.normal(size=rows).astype(np.float32)
    columns["terminated"] = row == 7
    columns["truncated"] = row % horizon == horizon - 1
    return columns


def build(folder, tasks: dict[int, dict[str, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, int | None] = {}
    for task, columns in tasks.items():
        name = f"task={task:03d}.parquet"
        footer = {"schema_version": 1, "environment": {}, "tasks": {}, "checkpoints": {}, "parameters": {}}
        parquet.write_transitions(folder / name, columns, footer)
        files[name] = len(columns["task"])
    write_manifest(folder, kind="dataset", inputs={}, parameters={}, files=files)


@pytest.fixture
def folder(tmp_path):
    build(tmp_path / "expert", {task: make(task) for task in (0, 1, 12)})
    return tmp_path / "expert"


def flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[:2])


def test_buffers_hold_the_stored_numbers(folder):
    tasks = [0, 1, 12]
    buffers = TaskData.load(folder, tasks, time_limit_terminal=False)
    assert list(buffers.tasks) == tasks
    assert buffers.rows == ROWS
    for index, task in enumerate(tasks):
        columns = make(task)
        for name in FIELDS:
            expected = columns[name].reshape(ROWS, -1)
            assert np.array_equal(getattr(buffers, name)[index].reshape(ROWS, -1), expected), (task, name)


def test_arrays_are_float32_of_one_shape(folder):
    buffers = TaskData.load(folder, [0, 1, 12], time_limit_terminal=True)
    for name in (*FIELDS, "terminal"):
        array = getattr(buffers, name)
        assert array.dtype == np.float32, name
        assert array.shape[:2] == (3, ROWS), name
    assert buffers.observation.shape == (3, ROWS, 3)
    assert buffers.action.shape == (3, ROWS, 2)


def test_terminal_is_termination_alone_or_with_time_limits(folder):
    columns = make(0)
    apart = TaskData.load(folder, [0])
    assert np.array_equal(flat(apart.terminal)[0], columns["terminated"].astype(np.float32))
    together = TaskData.load(folder, [0], time_limit_terminal=True)
    assert np.array_equal(flat(together.terminal)[0], (columns["terminated"] | columns["truncated"]).astype(np.float32))
    assert flat(together.terminal)[0].sum() == 4


def test_the_order_asked_for_is_the_order_given(folder):
    forth, back = (TaskData.load(folder, tasks, time_limit_terminal=False) for tasks in ([0, 12], [12, 0]))
    assert list(back.tasks) == [12, 0]
    assert np.array_equal(forth.observation[::-1], back.observation)


def test_a_subset_reads_only_its_own_files(folder):
    (folder / "task=001.parquet").write_bytes(b"damaged")
    buffers = TaskData.load(folder, [0, 12], time_limit_terminal=False)
    assert buffers.observation.shape == (2, ROWS, 3)


def test_a_task_that_the_dataset_lacks_is_named(folder):
    with pytest.raises(UserError, match=r"5") as caught:
        TaskData.load(folder, [0, 5], time_limit_terminal=False)
    assert "expert" in str(caught.value)


def test_a_missing_file_is_named(folder):
    (folder / "task=012.parquet").unlink()
    with pytest.raises(UserError, match=r"task=012\.parquet"):
        TaskData.load(folder, [0, 12], time_limit_terminal=False)


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        TaskData.load(tmp_path / "nowhere", [0], time_limit_terminal=False)


def test_tasks_of_different_length_are_refused(tmp_path):
    build(tmp_path / "mixed", {0: make(0), 1: make(1, ROWS - 20)})
    with pytest.raises(UserError, match=r"task=001\.parquet.*40.*60.*task=000\.parquet"):
        TaskData.load(tmp_path / "mixed", [0, 1], time_limit_terminal=False)


def test_any_flipped_bit_of_a_dataset_is_refused(folder):
    """Page checksums leave out the footer and the page headers; the manifest's hash covers every byte."""
    path = folder / "task=001.parquet"
    data = path.read_bytes()
    for place in [*range(0, len(data), len(data) // 60), len(data) - 3, len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"task=001\.parquet"):
            TaskData.load(folder, [0, 1], time_limit_terminal=False)


def test_a_file_exchanged_for_another_sound_one_is_refused(folder):
    (folder / "task=001.parquet").write_bytes((folder / "task=000.parquet").read_bytes())
    with pytest.raises(UserError, match=r"task=001\.parquet"):
        TaskData.load(folder, [1])


def test_a_damaged_manifest_is_named(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        TaskData.load(folder, [0])


def batches(buffers: TaskData) -> list[torch.Tensor]:
    """Return the tensors of three draws."""
    sampler = Sampler(buffers, 3, torch.device("cpu"))
    phase = Phase("training", 1, 4, {"transitions": Draw(8), "context": Draw(6)})
    found: list[torch.Tensor] = []
    for _ in range(3):
        batch = sampler.draw(phase)
        t, c = batch["transitions"], batch["context"]
        found += [c.task, c.observation, c.action, c.signal, c.next_observation]
        found += [t.observation, t.action, t.reward, t.next_observation, t.terminal]
    return found


def test_batches_are_those_of_stacked_columns(folder):
    """The numbers that published results were trained on: one generator, tasks first, then rows of each."""
    tasks = [0, 1, 12]
    found = batches(TaskData.load(folder, tasks))
    columns = {name: torch.from_numpy(np.stack([make(t)[name] for t in tasks])) for name in (*FIELDS, "terminated")}
    generator = torch.Generator().manual_seed(seeding.integer(3, "sampler"))
    expected: list[torch.Tensor] = []
    for _ in range(3):
        drawn = torch.randint(3, (4,), generator=generator)
        rows = torch.randint(ROWS, (4, 8), generator=generator)
        context = torch.randint(ROWS, (4, 6), generator=generator)

        def of(name: str, rows: torch.Tensor, drawn: torch.Tensor = drawn) -> torch.Tensor:
            return columns[name][drawn[:, None], rows].float()

        expected += [drawn, *(of(n, context) for n in ("observation", "action", "sparse_reward", "next_observation"))]
        expected += [of(n, rows) for n in ("observation", "action", "reward", "next_observation", "terminated")]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_mapped_table_gives_the_same_batches(folder, monkeypatch):
    held = TaskData.load(folder, [0, 1, 12])
    monkeypatch.setattr(taskdata, "IN_MEMORY", 100)
    mapped = TaskData.load(folder, [0, 1, 12])
    assert isinstance(mapped.table, np.memmap)
    assert not isinstance(held.table, np.memmap)
    for ours, theirs in zip(batches(mapped), batches(held), strict=True):
        assert torch.equal(ours, theirs)
    assert np.array_equal(mapped.observation, held.observation)


def test_a_table_is_held_once(folder):
    buffers = TaskData.load(folder, [0, 1])
    assert buffers.packed() is buffers.table
    for name in (*FIELDS, "terminal"):
        assert np.shares_memory(getattr(buffers, name), buffers.table), name


# --- order -----------------------------------------------------------------------------------------------------


def test_episodes_are_runs_of_successive_steps(folder):
    data = TaskData.load(folder, [0, 12])
    assert data.episodes(1).tolist() == [[0, 20], [20, 40], [40, 60]]
    assert data.step[0].tolist() == list(range(20)) * 3
    following = data.next_actions()
    assert np.isnan(following[0, [19, 39, 59]]).all()
    np.testing.assert_array_equal(following[0, 20:39], data.action[0, 21:40])


def test_single_rows_have_no_next_action(folder):
    data = TaskData.load(folder, [0, 12])
    rows = np.tile(np.arange(data.rows), (2, 1))
    with pytest.raises(UserError, match=r"regularization\.value_penalty at the next state.*unit: episode"):
        replace(data, start=rows, end=rows + 1).next_actions()


def test_single_rows_are_episodes_of_their_own():
    one = np.array([3, 3, 3, 4, 4], dtype=np.int32)
    step = np.array([0, 1, 3, 4, 0], dtype=np.int32)
    start, end = taskdata.episode_bounds(one * 0, one, one * 0, step)
    assert start.tolist() == [0, 0, 2, 3, 4]
    assert end.tolist() == [2, 2, 3, 4, 5]


@pytest.mark.parametrize("inference", ["dense", "sparse"])
def test_windows_and_episodes_are_drawn_whole(folder, inference):
    data = TaskData.load(folder, [0, 1, 12], inference)
    sampler = Sampler(data, 3, torch.device("cpu"))
    draws = {"w": Draw(7, "window", 5), "e": Draw(4, "episode"), "part": Draw(4, "episode", 6, "context"),
             "last": Draw(4, "episode", -6), "steps": Draw(50, "episode", by_step=True)}  # fmt: skip
    batch = sampler.draw(Phase("training", 1, 2, draws, replace=False))
    assert [tuple(batch[name].shape) for name in draws] == [(2, 7, 5), (2, 4, 20), (2, 4, 6), (2, 4, 6), (2, 2, 20)]
    for drawn in batch.values():
        assert sorted(drawn.task.tolist()) == sorted(set(drawn.task.tolist()))  # no task twice
        assert drawn.valid is not None
        assert drawn.step is not None
        for i, task in enumerate(drawn.task.tolist()):
            for window, valid, step in zip(drawn.reward[i], drawn.valid[i], drawn.step[i], strict=True):
                (first,) = np.flatnonzero(data.reward[task] == float(window[0]))
                length = int(valid.sum())
                assert length == min(len(window), data.end[task][first] - first)
                assert window[:length].tolist() == data.reward[task][first : first + length].tolist()
                assert step[:length].tolist() == data.step[task][first : first + length].tolist()
    assert bool(batch["e"].valid.all())
    assert int(batch["part"].step[..., 0].max()) == 0
    assert int(batch["last"].step[..., -1].min()) == 19
    expected = batch["e"].reward if inference == "dense" else None
    assert (expected is not None) == torch.equal(batch["e"].signal, batch["e"].reward)


def test_columns_of_a_method_come_back_beside_the_row(folder):
    data = TaskData.load(folder, [0, 1])
    wide = data.with_columns({"twice": 2 * data.reward})
    batch = Sampler(wide, 0, torch.device("cpu")).draw(Phase("training", 1, 4, {"transitions": Draw(9)}))
    rows = batch["transitions"]
    assert torch.equal(rows.extra["twice"].squeeze(-1), 2 * rows.reward)


def test_a_context_of_another_dataset(folder):
    data = TaskData.load(folder, [0, 1])
    other = TaskData.of_bags([0, 1], **{n: getattr(data, n) * 0 + 9 for n in (*FIELDS, "terminal")})
    sampler = Sampler(data, 0, torch.device("cpu"), other)
    batch = sampler.draw(Phase("training", 1, 4, {"transitions": Draw(5), "context": Draw(5, source="context")}))
    assert (batch["context"].reward == 9).all()
    assert (batch["transitions"].reward != 9).all()
