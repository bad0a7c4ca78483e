"""A film of a policy before and after it knows the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_evaluation import FAMILY, TASKS, GoalReader, buffers
from typer.testing import CliRunner

from omrl.algorithms.base import Spec, create, save_model
from omrl.behavior.rollouts import RolloutsConfig, rollout
from omrl.cli import app
from omrl.core.errors import UserError
from omrl.core.files import write_json, write_manifest
from omrl.data.parquet import write_transitions
from omrl.report import video


def test_the_adapted_policy_is_on_the_right_and_reaches_the_goal(tmp_path):
    data, task = buffers().of([4]), TASKS[4]
    pictures, (before, after) = video.film(GoalReader(), FAMILY, data, task, 30)
    assert len(pictures) == FAMILY.horizon + 1
    assert pictures[0].shape == (240, 484, 3)
    assert after == pytest.approx(task["oracle_return"], abs=1e-3)
    assert before == 0  # an agent that believes in the origin stays there
    left, right = pictures[-1][:, :240], pictures[-1][:, 244:]
    np.testing.assert_array_equal(pictures[0][:, :240], pictures[0][:, 244:])
    assert not np.array_equal(left, right)
    video.write(pictures, tmp_path / "a.gif", 10)
    video.write(pictures, tmp_path / "b.gif", 10)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.n_frames > 10, film.size, film.info["duration"]) == (True, (484, 240), 100)


class Uniform:
    """Random actions."""

    observation_size = 2

    def sample(self, observation: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return np.clip(noise, -1, 1)

    def mean_action(self, observation: np.ndarray) -> np.ndarray:
        return np.zeros((len(observation), 2), dtype=np.float32)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """An untrained model in a pipeline's folder with one dataset."""
    monkeypatch.chdir(tmp_path)
    head = {"env": FAMILY.name, "spec": FAMILY.spec()}
    write_json("data/tasks/all.json", {**head, "train": [0, 1, 2], "test": [3, 4], "tasks": TASKS})
    setting = RolloutsConfig(episodes_per_checkpoint=3, deterministic_episodes=0, horizon=20)
    files: dict[str, int | None] = {}
    for task in TASKS:
        index = task["index"]
        columns, _ = rollout(Uniform(), FAMILY, task["parameters"], index=index, checkpoint=0, config=setting, seed=1)
        write_transitions(f"data/datasets/expert/task={index:03d}.parquet", columns, {"environment": FAMILY.spec()})
        files[f"task={index:03d}.parquet"] = 60
    write_manifest("data/datasets/expert", kind="dataset", inputs={}, parameters={}, files=files)
    folder = Path("data/models/focal/expert/0")
    save_model(create("focal", {"width": 8, "encoder_width": 8}, Spec(2, 2, False), 0, "cpu"), folder, "focal", "focal")
    write_manifest(
        folder,
        kind="model",
        inputs={},
        parameters={"dataset": "expert"},
        files={"config.json": None, "model.safetensors": None},
    )
    return folder


def test_the_command_films_the_first_unseen_task_from_the_files(model):
    ran = CliRunner().invoke(app, ["video", str(model), "--transitions", "40"])
    assert ran.exit_code == 0, ran.output
    assert ran.output.startswith("video.gif: task 3, left before any context")
    with Image.open("video.gif") as film:
        assert film.size == (484, 240)


def test_what_is_missing_is_named(model):
    with pytest.raises(UserError, match=r"--task 9: expected one of 0\.\.4"):
        video.video(model, 9, None, 40, Path("a.gif"))
    with pytest.raises(UserError, match="no dataset 'medium' to draw the context from; name one with --dataset"):
        video.video(model, None, "medium", 40, Path("a.gif"))
    with pytest.raises(UserError, match=r"data/models/none/manifest\.json"):
        video.video(Path("data/models/none"), None, None, 40, Path("a.gif"))
    assert not Path("a.gif").exists()
