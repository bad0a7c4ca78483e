"""Meta-training: what the sampler draws, what the curve says, and that an interruption leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omrl.algorithms.base import Spec, create, load_model
from omrl.algorithms.focal import Focal
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json, write_json, write_manifest
from omrl.data import parquet
from omrl.data.taskdata import TaskData
from omrl.learning import train as training
from omrl.learning.train import Curve, MetaTrainConfig, Sampler, build_model, train
from omrl.nets.experience import Experience

CPU = torch.device("cpu")
SIZES = Spec(2, 1, True)
SMALL = {
    "latent_dim": 2, "encoder_width": 8, "encoder_depth": 1, "width": 8, "depth": 1,
    "meta_batch": 4, "rl_batch": 6, "context_batch": 5,
}  # fmt: skip
PENALTIES = {"regularization": {"kind": "kl-dual", "policy": True, "alpha": 1.0}}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def marked(tasks: int = 3, rows: int = 50) -> TaskData:
    """Transitions whose every number names task, row and column."""
    code = (np.arange(tasks)[:, None] * 1000 + np.arange(rows)).astype(np.float32)

    def column(offset: float, width: int) -> np.ndarray:
        return np.stack([code + offset + 0.125 * i for i in range(width)], -1).astype(np.float32)

    return TaskData(
        tuple(range(tasks)), column(10000, 2), column(20000, 1), code + 30000, code + 40000, column(50000, 2),
        (np.arange(rows)[None] % 7 == 0).repeat(tasks, 0).astype(np.float32),
    )  # fmt: skip


def sampler(sizes: BatchSpec, seed: int = 0, with_next: bool = True, **shape: int) -> Sampler:
    return Sampler(marked(**shape), sizes, with_next, seed, CPU)


# --- sampler ---------------------------------------------------------------------------------------------------


def check(batch: dict[str, Experience]) -> tuple[torch.Tensor, torch.Tensor]:
    """All fields of a row belong together and to the row's task; return the rows of RL and context batch."""
    t, c = batch["transitions"], batch["context"]
    code = t.reward - 30000  # dense
    assert torch.equal(t.observation, torch.stack([code + 10000, code + 10000.125], -1))
    assert torch.equal(t.action, (code + 20000)[..., None])
    assert torch.equal(t.next_observation, torch.stack([code + 50000, code + 50000.125], -1))
    row = code % 1000
    assert torch.equal(t.terminal, (row % 7 == 0).float())
    assert torch.equal(code // 1000, batch["context"].task[:, None].expand_as(code).float())
    seen = c.reward - 40000  # sparse
    assert torch.equal(c.observation, torch.stack([seen + 10000, seen + 10000.125], -1))
    assert torch.equal(c.action, (seen + 20000)[..., None])
    assert torch.equal(seen // 1000, batch["context"].task[:, None].expand_as(seen).float())
    if c.next_observation is not None:
        assert torch.equal(c.next_observation, torch.stack([seen + 50000, seen + 50000.125], -1))
    return row, seen % 1000


def test_rows_belong_together_and_rewards_go_to_their_readers():
    """The encoder gets the sparse reward, actor and critic the dense one."""
    drawn = sampler(BatchSpec(8, 16, 12))
    for _ in range(5):
        batch = drawn.draw()
        assert batch["transitions"].observation.shape == (8, 12, 2)
        assert algorithm.rows(batch["context"]).shape == (8, 16, 6)
        check(batch)


def test_context_has_next_observations_only_when_asked():
    assert sampler(BatchSpec(2, 3, 4), with_next=False).draw().context.next_observation is None


def test_tasks_repeat_and_each_repeat_draws_its_own():
    drawn, repeats = sampler(BatchSpec(8, 40, 40), rows=1000), 0
    for _ in range(10):
        batch = drawn.draw()
        rl, context = check(batch)
        for i in range(8):
            assert not torch.equal(rl[i], context[i])  # independent draws
            for j in range(i):
                if batch["context"].task[i] == batch["context"].task[j]:
                    repeats += 1
                    assert not torch.equal(rl[i], rl[j])
                    assert not torch.equal(context[i], context[j])
    assert repeats > 0


def test_a_context_size_of_zero_means_the_rl_batch_itself():
    rl, context = check(sampler(BatchSpec(4, 0, 9)).draw())
    assert torch.equal(rl, context)


def test_more_are_other_transitions_of_the_same_tasks():
    batch = sampler(BatchSpec(4, 5, 20), rows=1000).draw()
    first, second = batch.more(), batch.more()
    for more in (first, second):
        tasks = (more.reward - 30000) // 1000
        assert torch.equal(tasks, batch["context"].task[:, None].expand_as(tasks).float())
        assert not torch.equal(more.reward, batch["transitions"].reward)
    assert not torch.equal(first.reward, second.reward)


def test_tasks_and_rows_are_uniform():
    drawn, tasks, rows = sampler(BatchSpec(16, 4, 64), rows=10), np.zeros(3), np.zeros(10)
    for _ in range(300):
        batch = drawn.draw()
        tasks += np.bincount(batch["context"].task.numpy(), minlength=3)
        rows += np.bincount(check(batch)[0].int().numpy().ravel(), minlength=10)
    # five standard deviations
    assert np.abs(tasks - 1600).max() < 5 * np.sqrt(4800 * 2 / 9)
    assert np.abs(rows - 30720).max() < 5 * np.sqrt(307200 * 0.09)


def test_share_of_positive_pairs_is_that_of_draws_with_replacement():
    """20 tasks, meta-batch 16: 6 of the 120 pairs on average; without replacement there would be none."""
    drawn, pairs = sampler(BatchSpec(16, 1, 1), tasks=20, rows=2), []
    for _ in range(2000):
        count = np.bincount(drawn.draw().tasks.numpy(), minlength=20)
        pairs.append((count * (count - 1) // 2).sum())
    assert np.mean(pairs) == pytest.approx(6.0, abs=0.3)


def test_draws_repeat_by_seed():
    one, two, other = (sampler(BatchSpec(4, 5, 6), seed).draw() for seed in (0, 0, 1))
    assert torch.equal(one.transitions.reward, two.transitions.reward)
    assert torch.equal(one.context.reward, two.context.reward)
    assert not torch.equal(one.transitions.reward, other.transitions.reward)


def test_drawing_leaves_the_datasets_alone():
    buffers = marked()
    drawn = Sampler(buffers, BatchSpec(4, 5, 6), True, 0, CPU)
    drawn.draw().transitions.observation.zero_()
    assert np.array_equal(buffers.observation, marked().observation)
    check(drawn.draw())


# --- curve -----------------------------------------------------------------------------------------------------


def test_rows_of_the_curve_are_means():
    curve = Curve()
    for step in range(1, 6):
        curve.add({"a": torch.tensor(float(step)), "b": torch.tensor([0.5])})
        if step in (2, 5):
            curve.close(step)
    assert curve.rows == ["step,a,b", "2,1.5,0.5", "5,4,0.5"]
    with pytest.raises(ValueError, match="no step"):
        curve.close(6)


# --- loop ------------------------------------------------------------------------------------------------------


def parts(seed: int = 0, **values: Any) -> tuple[Focal, Sampler]:
    algorithm = create("focal", SMALL | values, SIZES, seed, "cpu")
    buffers = marked()
    small = TaskData(buffers.tasks, *(getattr(buffers, n) / 60000 for n in (
        "observation", "action", "reward", "sparse_reward", "next_observation", "terminal")))  # fmt: skip
    return algorithm, Sampler(small, algorithm.batch_sizes(), True, seed, CPU)


def settings(**values: Any) -> MetaTrainConfig:
    return parse(MetaTrainConfig, {"steps": 23, "log_every": 3, "checkpoint_every": 5, "threads": 1} | values, "test")


def test_the_curve_has_a_row_per_log_every_and_one_for_the_rest(tmp_path):
    curve = train(*parts(), settings(), tmp_path / "state")
    assert [row.split(",")[0] for row in curve.rows] == ["step", *map(str, range(3, 22, 3)), "23"]


def test_scalars_of_a_row_are_the_mean_of_its_steps(tmp_path, monkeypatch):
    seen: list[float] = []
    original = Focal.update

    def update(self: Focal, batch: dict[str, Experience]) -> dict[str, torch.Tensor]:
        scalars = original(self, batch)
        seen.append(float(scalars["q_loss"]))
        return scalars

    monkeypatch.setattr(Focal, "update", update)
    rows = [row.split(",") for row in train(*parts(), settings(), tmp_path / "state").rows]
    place = rows[0].index("q_loss")
    got = [float(row[place]) for row in rows[1:]]
    expected = [np.mean(seen[max(0, int(row[0]) - (3 if row[0] != "23" else 2)) : int(row[0])]) for row in rows[1:]]
    np.testing.assert_allclose(got, expected, rtol=1e-7)


class Killed(BaseException):
    """A stop that no handler of ordinary errors may catch."""


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the ``at``-th update of this process be its last."""
    original, count = Focal.update, [0]

    def update(self: Focal, batch: dict[str, Experience]) -> dict[str, torch.Tensor]:
        count[0] += 1
        if count[0] == at:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(Focal, "update", update)


@pytest.mark.parametrize("values", [{}, PENALTIES], ids=["plain", "regularized"])
@pytest.mark.parametrize("stops", [[1], [5], [7], [8], [23], [4, 8, 3], [22, 3]], ids=str)
def test_interruptions_leave_no_trace(tmp_path, stops, values):
    whole, feed = parts(**values)
    expected = train(whole, feed, settings(), tmp_path / "whole").rows
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupted(patch, stop)
            with pytest.raises(Killed):
                train(*parts(**values), settings(), tmp_path / "state")
    algorithm, feed = parts(**values)
    assert train(algorithm, feed, settings(), tmp_path / "state").rows == expected
    one, two = whole.training_state(), algorithm.training_state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_second_run_goes_on_instead_of_starting_over(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 20)
        with pytest.raises(Killed):
            train(*parts(), settings(), tmp_path / "state")
    count: list[int] = []
    original = Focal.update
    monkeypatch.setattr(Focal, "update", lambda self, batch: (count.append(1), original(self, batch))[1])
    train(*parts(), settings(), tmp_path / "state")
    assert len(count) == 23 - 18  # rows end at 3, 6, ..., 18; states at the first ends 5 or more apart: 6, 12, 18


@pytest.mark.parametrize("damage", ["empty", "half", "other", "no step"])
def test_a_damaged_state_starts_over(tmp_path, damage):
    whole, feed = parts()
    expected = train(whole, feed, settings(), tmp_path / "whole").rows
    state = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 20)
        with pytest.raises(Killed):
            train(*parts(), settings(), state)
    data = state.read_bytes()
    if damage == "no step":
        from safetensors.torch import save_file

        save_file({"generator/other": torch.zeros(1)}, state, {"about": json.dumps({"step": 6, "rows": []})})
    else:
        state.write_bytes({"empty": b"", "half": data[: len(data) // 2], "other": b"not tensors"}[damage])
    algorithm, feed = parts()
    assert train(algorithm, feed, settings(), state).rows == expected
    one, two = whole.model_state(), algorithm.model_state()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_stops_with_the_name_and_the_step(tmp_path, monkeypatch, bad):
    original = Focal.update
    monkeypatch.setattr(Focal, "update", lambda self, batch: original(self, batch) | {"q_loss": torch.tensor(bad)})
    with pytest.raises(UserError, match=r"q_loss is not finite at step 3.*params\.yaml"):
        train(*parts(), settings(), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_threads_are_those_of_the_configuration(tmp_path):
    train(*parts(), settings(steps=1, threads=2), tmp_path / "state")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"log_every": 0}, {"checkpoint_every": 0}, {"threads": 0}, {"steps": 1.5}, {"step": 3}],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(values):
    with pytest.raises(UserError, match=next(iter(values))):
        settings(**values)


# --- cell ------------------------------------------------------------------------------------------------------

ROWS = 40


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A folder with three tasks, the first two for training, and one dataset."""
    monkeypatch.chdir(tmp_path)
    make_pipeline()
    return tmp_path


def make_pipeline() -> None:
    write_json("data/tasks/all.json", {"train": [0, 1], "test": [2]})
    write_json("data/code/focal.json", {"fingerprint": "1"})
    folder = Path("data/datasets/expert")
    folder.mkdir(parents=True)
    files: dict[str, int | None] = {}
    for task in range(3):
        rng, row = np.random.default_rng(task), np.arange(ROWS)
        columns: dict[str, Any] = {
            "task": np.full(ROWS, task), "source_task": np.full(ROWS, task), "checkpoint": np.zeros(ROWS),
            "episode": row // 10, "step": row % 10,
        }  # fmt: skip
        columns = {name: value.astype(np.int32) for name, value in columns.items()}
        columns["deterministic"] = np.zeros(ROWS, np.bool_)
        for name, width in (("observation", 2), ("next_observation", 2), ("action", 1), ("reward_features", 1)):
            columns[name] = rng.normal(size=(ROWS, width)).astype(np.float32)
        for name in ("reward", "sparse_reward"):
            columns[name] = rng.normal(size=ROWS).astype(np.float32)
        columns["terminated"], columns["truncated"] = np.zeros(ROWS, np.bool_), row % 10 == 9
        footer = {"schema_version": 1, "environment": {}, "tasks": {}, "checkpoints": {}, "parameters": {}}
        parquet.write_transitions(folder / f"task={task:03d}.parquet", columns, footer)
        files[f"task={task:03d}.parquet"] = ROWS
    write_manifest(folder, kind="dataset", inputs={}, parameters={}, files=files)


TARGET = "data/models/mine/expert/4"


def cell(seed: int = 4, **values: Any) -> None:
    build_model(
        name="mine", module="focal", overrides=SMALL, dataset="expert", seed=seed, config=settings(**values),
        sizes=SIZES, code=["data/code/focal.json"], target=f"data/models/mine/expert/{seed}",
    )  # fmt: skip


def hashes(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def test_a_cell_is_whole_and_tells_what_it_is(pipeline):
    cell()
    assert sorted(hashes(TARGET)) == ["config.json", "curve.csv", "manifest.json", "model.safetensors"]
    manifest = read_json(f"{TARGET}/manifest.json")
    assert manifest["kind"] == "model"
    assert set(manifest["inputs"]) == {"data/tasks/all.json", "data/datasets/expert", "data/code/focal.json"}
    assert manifest["parameters"]["meta_train"]["threads"] == 1
    assert manifest["parameters"]["config"]["latent_dim"] == 2
    assert manifest["files"]["curve.csv"]["rows"] == 8
    model = load_model(TARGET, "cpu")
    assert model.sizes == SIZES
    assert not list(Path("data/.scratch/meta_train").iterdir())
    assert not list(Path(TARGET).parent.glob(".*"))


def test_the_same_cell_gives_the_same_bytes_and_another_seed_does_not(pipeline):
    cell()
    first = hashes(TARGET)
    cell()
    assert hashes(TARGET) == first
    cell(seed=5)
    assert hashes("data/models/mine/expert/5")["model.safetensors"] != first["model.safetensors"]


def test_the_test_tasks_data_are_not_looked_at(pipeline):
    path = Path("data/datasets/expert/task=002.parquet")
    path.write_bytes(b"damaged")
    cell()


def test_time_limits_reach_the_target_only_if_asked_for(pipeline):
    models = []
    for flag in (False, True):
        cell(time_limit_terminal=flag)
        models.append(hashes(TARGET)["model.safetensors"])
    assert models[0] != models[1]


@pytest.mark.parametrize("place", ["save_model", "write_manifest", "write_text"])
def test_a_stop_while_publishing_leaves_nothing_half_done(pipeline, monkeypatch, place):
    cell()
    expected = hashes(TARGET)
    for earlier in (True, False):
        if not earlier:
            for path in Path(TARGET).iterdir():
                path.unlink()
            Path(TARGET).rmdir()

        def stop(*_: Any, **__: Any) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, place, stop)
            with pytest.raises(Killed):
                cell()
        assert Path(TARGET).exists() == earlier
        if earlier:
            assert hashes(TARGET) == expected
        cell()
        assert hashes(TARGET) == expected


def test_a_killed_process_goes_on_to_the_same_bytes(pipeline):
    long = {"steps": 1200, "log_every": 100, "checkpoint_every": 100}
    cell(**long)
    expected = hashes(TARGET)
    for path in Path(TARGET).iterdir():
        path.unlink()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_training as t; t.cell(**{long})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(Path("data/.scratch").glob("meta_train/*/training.safetensors")):
            assert process.poll() is None, "the process ended before its first saved state"
            assert time.monotonic() < deadline, "no saved state within two minutes"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not list(Path(TARGET).iterdir())
    assert list(Path("data/.scratch").glob("meta_train/*/training.safetensors"))
    cell(**long)
    assert hashes(TARGET) == expected


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("data/datasets/expert/task=001.parquet", r"task=001\.parquet"),
        ("data/datasets/expert/manifest.json", r"expert/manifest\.json"),
        ("data/tasks/all.json", r"all\.json"),
        ("data/code/focal.json", r"focal\.json"),
    ],
)
def test_a_missing_input_is_named(pipeline, path, names):
    Path(path).unlink()
    with pytest.raises(UserError, match=names):
        cell()
    assert not Path(TARGET).exists()
