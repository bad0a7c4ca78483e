"""Meta-training: what the sampler draws, what the curve says, and that an interruption leaves no trace."""

from __future__ import annotations

import hashlib
import itertools
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
from safetensors.torch import load_file

from omrl.algorithms.base import Draw, Phase, Spec, create, load_model
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
SIZES = Spec(2, 1, True, horizon=20, tasks=2)
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

    return TaskData.of_bags(
        range(tasks),
        observation=column(10000, 2),
        action=column(20000, 1),
        reward=code + 30000,
        sparse_reward=code + 40000,
        next_observation=column(50000, 2),
        terminal=(np.arange(rows)[None] % 7 == 0).repeat(tasks, 0).astype(np.float32),
    )


class Drawn:
    """A sampler with its phase."""

    def __init__(self, meta_batch: int, context: int, rows: int, seed: int = 0, tasks: int = 3, of: int = 50) -> None:
        draws = {"transitions": Draw(rows), "context": Draw(context), "more0": Draw(rows), "more1": Draw(rows)}
        self.phase, self.sampler = (
            Phase("training", 1, meta_batch, draws),
            Sampler(marked(tasks, of), seed, CPU),
        )

    def draw(self) -> dict[str, Experience]:
        return self.sampler.draw(self.phase)


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
    seen = c.signal - 40000  # sparse
    assert torch.equal(c.observation, torch.stack([seen + 10000, seen + 10000.125], -1))
    assert torch.equal(c.action, (seen + 20000)[..., None])
    assert torch.equal(seen // 1000, batch["context"].task[:, None].expand_as(seen).float())
    assert torch.equal(c.next_observation, torch.stack([seen + 50000, seen + 50000.125], -1))
    return row, seen % 1000


def test_rows_belong_together_and_rewards_go_to_their_readers():
    """The encoder gets the sparse reward, actor and critic the dense one."""
    drawn = Drawn(8, 16, 12)
    for _ in range(5):
        batch = drawn.draw()
        assert batch["transitions"].observation.shape == (8, 12, 2)
        assert batch["context"].rows(True).shape == (8, 16, 6)
        check(batch)


def test_tasks_repeat_and_each_repeat_draws_its_own():
    drawn, repeats = Drawn(8, 40, 40, of=1000), 0
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


def test_more_are_other_transitions_of_the_same_tasks():
    batch = Drawn(4, 5, 20, of=1000).draw()
    first, second = batch["more0"], batch["more1"]
    for more in (first, second):
        tasks = (more.reward - 30000) // 1000
        assert torch.equal(tasks, batch["context"].task[:, None].expand_as(tasks).float())
        assert not torch.equal(more.reward, batch["transitions"].reward)
    assert not torch.equal(first.reward, second.reward)


def test_tasks_and_rows_are_uniform():
    drawn, tasks, rows = Drawn(16, 4, 64, of=10), np.zeros(3), np.zeros(10)
    for _ in range(300):
        batch = drawn.draw()
        tasks += np.bincount(batch["context"].task.numpy(), minlength=3)
        rows += np.bincount(check(batch)[0].int().numpy().ravel(), minlength=10)
    # five standard deviations
    assert np.abs(tasks - 1600).max() < 5 * np.sqrt(4800 * 2 / 9)
    assert np.abs(rows - 30720).max() < 5 * np.sqrt(307200 * 0.09)


def test_share_of_positive_pairs_is_that_of_draws_with_replacement():
    """20 tasks, meta-batch 16: 6 of the 120 pairs on average; without replacement there would be none."""
    drawn, pairs = Drawn(16, 1, 1, tasks=20, of=2), []
    for _ in range(2000):
        count = np.bincount(drawn.draw()["context"].task.numpy(), minlength=20)
        pairs.append((count * (count - 1) // 2).sum())
    assert np.mean(pairs) == pytest.approx(6.0, abs=0.3)


def test_draws_repeat_by_seed():
    one, two, other = (Drawn(4, 5, 6, seed).draw() for seed in (0, 0, 1))
    assert torch.equal(one["transitions"].reward, two["transitions"].reward)
    assert torch.equal(one["context"].reward, two["context"].reward)
    assert not torch.equal(one["transitions"].reward, other["transitions"].reward)


def test_drawing_leaves_the_datasets_alone():
    drawn = Drawn(4, 5, 6)
    drawn.draw()["transitions"].observation.zero_()
    assert np.array_equal(drawn.sampler.data.observation, marked().observation)
    check(drawn.draw())


# --- curve -----------------------------------------------------------------------------------------------------


def test_rows_of_the_curve_are_means():
    curve = Curve()
    for step in range(1, 6):
        curve.add({"a": torch.tensor(float(step)), "b": torch.tensor([0.5])})
        if step in (2, 5):
            curve.close(step, "training")
    assert curve.text().split() == ["step,phase,a,b", "2,training,1.5,0.5", "5,training,4,0.5"]
    with pytest.raises(ValueError, match="no step"):
        curve.close(6, "training")


def test_phases_with_other_scalars_leave_cells_empty():
    curve = Curve()
    for step, phase in enumerate(("first", "second"), 1):
        curve.add({"loss": torch.tensor(1.0), phase: torch.tensor(2.0)})
        curve.close(step, phase)
    assert curve.text().split() == ["step,phase,loss,first,second", "1,first,1,2,", "2,second,1,,2"]


# --- loop ------------------------------------------------------------------------------------------------------


def parts(seed: int = 0, **values: Any) -> tuple[Focal, Sampler]:
    algorithm = create("focal", SMALL | values, SIZES, seed, "cpu")
    buffers = marked()
    small = TaskData.of_bags(buffers.tasks, **{n: getattr(buffers, n) / 60000 for n in (
        "observation", "action", "reward", "sparse_reward", "next_observation", "terminal")})  # fmt: skip
    return algorithm, Sampler(small, seed, CPU)


def settings(**values: Any) -> MetaTrainConfig:
    return parse(MetaTrainConfig, {"steps": 23, "log_every": 3, "checkpoint_every": 5, "threads": 1} | values, "test")


def test_the_curve_has_a_row_per_log_every_and_one_for_the_rest(tmp_path):
    curve = train(*parts(), settings(), tmp_path / "state").curve
    assert [row["step"] for row in curve.rows] == [*map(str, range(3, 22, 3)), "23"]


def test_scalars_of_a_row_are_the_mean_of_its_steps(tmp_path, monkeypatch):
    seen: list[float] = []
    original = Focal.update

    def update(self: Focal, phase: Phase, batch: dict[str, Experience]) -> dict[str, torch.Tensor]:
        scalars = original(self, phase, batch)
        seen.append(float(scalars["q_loss"]))
        return scalars

    monkeypatch.setattr(Focal, "update", update)
    rows = train(*parts(), settings(), tmp_path / "state").curve.rows
    got = [float(row["q_loss"]) for row in rows]
    ends = [int(row["step"]) for row in rows]
    expected = [np.mean(seen[first:last]) for first, last in itertools.pairwise([0, *ends])]
    np.testing.assert_allclose(got, expected, rtol=1e-7)


class Killed(BaseException):
    """A stop that no handler of ordinary errors may catch."""


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the ``at``-th update of this process be its last."""
    original, count = Focal.update, [0]

    def update(self: Focal, phase: Phase, batch: dict[str, Experience]) -> dict[str, torch.Tensor]:
        count[0] += 1
        if count[0] == at:
            raise Killed
        return original(self, phase, batch)

    monkeypatch.setattr(Focal, "update", update)


@pytest.mark.parametrize("values", [{}, PENALTIES], ids=["plain", "regularized"])
@pytest.mark.parametrize("stops", [[1], [5], [7], [8], [23], [4, 8, 3], [22, 3]], ids=str)
def test_interruptions_leave_no_trace(tmp_path, stops, values):
    whole, feed = parts(**values)
    expected = train(whole, feed, settings(), tmp_path / "whole").curve.rows
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupted(patch, stop)
            with pytest.raises(Killed):
                train(*parts(**values), settings(), tmp_path / "state")
    algorithm, feed = parts(**values)
    assert train(algorithm, feed, settings(), tmp_path / "state").curve.rows == expected
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
    monkeypatch.setattr(Focal, "update", lambda self, phase, batch: (count.append(1), original(self, phase, batch))[1])
    train(*parts(), settings(), tmp_path / "state")
    assert len(count) == 23 - 18  # rows end at 3, 6, ..., 18; states at the first ends 5 or more apart: 6, 12, 18


@pytest.mark.parametrize("damage", ["empty", "half", "other", "no step"])
def test_a_damaged_state_starts_over(tmp_path, damage):
    whole, feed = parts()
    expected = train(whole, feed, settings(), tmp_path / "whole").curve.rows
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
    assert train(algorithm, feed, settings(), state).curve.rows == expected
    one, two = whole.model_state(), algorithm.model_state()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_stops_with_the_name_and_the_step(tmp_path, monkeypatch, bad):
    original = Focal.update
    monkeypatch.setattr(
        Focal, "update", lambda self, phase, batch: original(self, phase, batch) | {"q_loss": torch.tensor(bad)}
    )
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


def cell(seed: int = 4, name: str = "mine", target: str | None = None, **values: Any) -> None:
    build_model(
        name=name, module="focal", overrides=SMALL, sources={"transitions": "expert"}, dataset="expert",
        seed=seed, config=settings(**values), spec=SIZES, inference="sparse", code=["data/code/focal.json"],
        target=target or f"data/models/mine/expert/{seed}",
    )  # fmt: skip


def hashes(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def test_a_cell_with_standardized_observations_keeps_its_scale(pipeline):
    cell()
    plain = load_file(f"{TARGET}/model.safetensors")
    cell(standardize_observations=True)
    model = load_model(TARGET, "cpu")
    seen = TaskData.load("data/datasets/expert", read_json("data/tasks/all.json")["train"]).observation
    assert np.allclose(model.spec.mean, seen.mean((0, 1)), rtol=1e-5)
    assert np.allclose(model.spec.std, seen.std((0, 1)) + 1e-3, rtol=1e-5)
    assert any(not torch.equal(x, plain[name]) for name, x in model.model_state().items())


@pytest.mark.parametrize(
    "values", [{"std": [1.0]}, {"std": [0.0, 1.0]}, {"std": ["1", 1]}, {"mean": []}, {"std": "12", "mean": "12"}]
)
def test_a_damaged_scale_is_refused(pipeline, values):
    cell(standardize_observations=True)
    about = read_json(f"{TARGET}/config.json")
    about["spec"] |= values
    write_json(f"{TARGET}/config.json", about)
    Path(f"{TARGET}/manifest.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: spec\.(mean|std).*expected"):
        load_model(TARGET, "cpu")


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
    assert model.spec == SIZES
    assert not list(Path("data/.scratch/meta_train").iterdir())
    assert not list(Path(TARGET).parent.glob(".*"))


def test_snapshots_lie_along_the_way_and_the_last_is_the_model(pipeline):
    cell(keep=3, optimizers=True)
    names = [f"snapshot={step:08d}.safetensors" for step in (8, 15, 23)]
    assert sorted(path.name for path in Path(TARGET).glob("snapshot*")) == names
    final = load_file(f"{TARGET}/model.safetensors")
    first, last = (load_file(f"{TARGET}/{names[i]}") for i in (0, 2))
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert not all(torch.equal(first[name], final[name]) for name in final)
    assert any(name.startswith("optimizer/") for name in load_file(f"{TARGET}/training.safetensors"))
    kept = hashes(TARGET)
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 20)
        with pytest.raises(Killed):
            cell(keep=3, optimizers=True)
    cell(keep=3, optimizers=True)
    assert hashes(TARGET) == kept


def test_a_cells_free_name_does_not_change_its_numbers(pipeline):
    cell()
    first = hashes(TARGET)["model.safetensors"]
    cell(name="another", target="data/models/another/expert/4")
    assert hashes("data/models/another/expert/4")["model.safetensors"] == first


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


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"Focal\.update returned NoneType: expected a dict of name -> tensor"),
        ({"loss": 1.0}, r"update returned float as loss: expected a tensor with one number"),
        ({"loss": torch.zeros(4)}, r"update returned a tensor of shape \[4\] as loss: expected a tensor with one"),
    ],
)
def test_an_update_that_returns_something_else_is_told(tmp_path, monkeypatch, returned, message):
    monkeypatch.setattr(Focal, "update", lambda *_: returned)
    with pytest.raises(UserError, match=message):
        train(*parts(), settings(), tmp_path / "state")


def test_phases_that_do_not_sum_to_the_steps_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Focal, "phases", lambda self, steps: [])
    with pytest.raises(UserError, match=rf"Focal\.phases\({settings().steps}\) gives 0 steps: expected meta_train"):
        train(*parts(), settings(), tmp_path / "state")


def test_seeds_draw_batches_of_their_own(pipeline):
    data = training.load_data({"transitions": "expert"}, [0, 1], "sparse", False)
    algorithm = create("focal", {}, Spec(2, 2, False), 0, "cpu")
    one, two = (training.make_sampler(algorithm, data, seed).generator.get_state() for seed in (0, 1))
    assert not torch.equal(one, two)
