"""Event files: what is written can be read, nothing is written unasked, outputs do not change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from omrl.behavior import batched, sb3
from omrl.behavior.base import BehaviorConfig, Run
from omrl.core import events
from omrl.core.errors import UserError

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture
def board(tmp_path, monkeypatch) -> Path:
    (tmp_path / "pipeline").mkdir()
    monkeypatch.chdir(tmp_path / "pipeline")
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "board"))
    return tmp_path / "board" / "pipeline"


def test_scalars_are_on_disk_at_once_and_a_second_run_replaces_the_first(board):
    first = events.writer("meta_train/focal/0")
    for step in (10, 20, 30):
        first.scalars(step, {"loss": step / 10, "q": -1.0})
        assert read(board / "meta_train/focal/0")["loss"][-1] == (step, step / 10)
    again = events.writer("meta_train/focal/0")
    again.scalars(20, {"loss": 7.0, "q": -1.0})
    assert read(board / "meta_train/focal/0") == {"loss": [(10, 1.0), (20, 7.0)], "q": [(10, -1.0), (20, -1.0)]}


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv(events.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # and nothing is needed
    events.writer("a").scalars(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_and_a_folder_that_cannot_be_are_one_line(board, tmp_path, monkeypatch):
    (tmp_path / "board").write_text("a file")
    with pytest.raises(UserError, match=r"OMRL_TENSORBOARD = '.*board': (Not a directory|File exists)"):
        events.writer("a")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(UserError, match=r"pip install 'omrl\[tensorboard\]', or unset the variable"):
        events.writer("a")


@pytest.mark.parametrize("engine", ["batched", "sb3"])
def test_behavior_policies_can_be_watched_and_their_bytes_stay(engine, board, tmp_path, monkeypatch):
    sac = {"net_arch": [8], "learning_starts": 10, "batch_size": 16}
    config = BehaviorConfig(engine=engine, total_steps=60, checkpoint_every=30, horizon=20, sac=sac)
    task = {"goal": [0.5, 0.5]}

    def train(folder: Path) -> dict[str, bytes]:
        if engine == "batched":
            run = Run(3, task, 0, str(folder))
            batched.train_group("point-robot", {}, [run], config.resolved(), str(tmp_path / f"work-{folder.name}"))
        else:
            sb3.train_task("point-robot", {}, task, config.resolved(), 0, str(folder), 3)
        return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

    watched = train(tmp_path / "watched")
    shown = read(board / "behavior/task=003")
    rows = [line.split(",") for line in watched["progress.csv"].decode().splitlines()]
    returns = [(int(row[0]), pytest.approx(float(row[2]), abs=1e-4)) for row in rows[1:]]
    assert shown["return"] == returns
    assert [step for step, _ in shown["critic_loss"]] == [30, 60]
    monkeypatch.delenv(events.VARIABLE)
    assert train(tmp_path / "plain") == watched
