"""Behavior training of a shard: resumable, independent of who shares it, the same bytes after a kill."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from omrl.behavior.base import BehaviorConfig, SacConfig, behavior_seed
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_manifest

ROOT = Path(__file__).resolve().parents[1]


def prepare(folder: Path, steps: int = 200) -> None:
    """Lay out a pipeline folder up to the behavior stage, with tiny training."""
    values = yaml.safe_load((ROOT / "pipelines/smoke/params.yaml").read_text())
    values["repository"] = str(ROOT)
    values["behavior"] |= {"total_steps": steps, "checkpoint_every": steps // 2}
    values["dataset"]["levels"] = {"expert": {"steps": "last"}}
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    for stage in ("code", "tasks"):
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, check=True)


def behavior(folder: Path, shard: str = "000-003", **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages.behavior", shard],
        cwd=folder,
        env={**os.environ, "OMRL_WORKERS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_killed_shard_keeps_finished_tasks_and_ends_with_the_same_bytes(tmp_path):
    for name in ("whole", "killed"):
        prepare(tmp_path / name)
    assert behavior(tmp_path / "whole").wait() == 0
    whole = hashes(tmp_path / "whole/data/behavior/000-003")

    process = behavior(tmp_path / "killed")
    scratch = tmp_path / "killed/data/.scratch/behavior"
    deadline = time.monotonic() + 120
    while len(list(scratch.glob("*/task=*"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_ctime_ns for path in scratch.glob("*/task=*")}
    assert not (tmp_path / "killed/data/behavior/000-003").exists()

    again = behavior(tmp_path / "killed")
    shown = again.communicate()[1]
    assert again.returncode == 0
    assert f"{len(finished)} tasks were finished before" in shown
    assert hashes(tmp_path / "killed/data/behavior/000-003") == whole
    assert not list(scratch.glob("*/task=*"))

    # the shard of the test tasks alone: a task does not depend on which others share its shard
    assert behavior(tmp_path / "whole", "004-005").wait() == 0
    seeds = read_manifest(tmp_path / "whole/data/behavior/004-005")["parameters"]["run_seeds"]
    assert seeds == {str(i): behavior_seed(0, "sparse-point-robot", i) for i in (4, 5)}


def test_every_task_has_a_seed_of_its_own():
    assert len({behavior_seed(0, "sparse-point-robot", task) for task in range(100)}) == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_steps": 100, "checkpoint_every": 30}, r"total_steps = 100 is not a multiple of checkpoint_every = 30"),
        ({"sac": {"ent_coef": "automatic"}}, r"sac\.ent_coef.*expected 'auto'"),
        ({"sac": {"ent_coef": "auto_-1"}}, r"sac\.ent_coef.*expected 'auto'"),
        ({"sac": {"net_arch": []}}, r"sac\.net_arch = \[\]"),
        ({"sac": {"net_arch": [64, 0]}}, r"sac\.net_arch\.1 = 0: expected greater than or equal to 1"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        parse(BehaviorConfig, values, "params.yaml: behavior")


def test_temperatures_that_sb3_understands_are_accepted():
    assert [SacConfig(ent_coef=value).ent_coef for value in ("auto", "auto_0.1", 0.2)] == ["auto", "auto_0.1", 0.2]


def test_the_schedule_has_step_zero_and_the_last_step():
    assert BehaviorConfig(total_steps=900, checkpoint_every=300).checkpoint_steps() == [0, 300, 600, 900]
