"""Kills, damage and a full disk: nothing lost, nothing half-written, every message names the file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SMOKE, Project

pytestmark = pytest.mark.e2e

CELLS = [
    "tasks",
    "behavior@000-003",
    "rollouts@000-003",
    "dataset@expert",
    "relabel@relabelled",
    "meta_train@focal-expert-0",
    "evaluate@focal-expert-expert-0",
    "report",
]


def running(folder: Path, text: str) -> list[int]:
    """Return the processes of a project whose command line holds ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if entry.name.isdigit() and text in command and (entry / "cwd").resolve().is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def signalled(folder: Path, stage: str, number: signal.Signals) -> None:
    for process in running(folder, f"stages.{stage}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


@pytest.mark.parametrize("cell", CELLS)
def test_a_killed_stage_leaves_nothing_half_written_and_reruns_to_the_same_bytes(project, cell):
    before = project.lock
    stage, arguments = cell.partition("@")[0], cell.partition("@")[2]
    for delay in (0.0, 0.6):
        process = subprocess.Popen(
            ["dvc", "repro", "--single-item", "--force", cell],
            cwd=project.smoke, env=project.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not running(project.folder, f"stages.{stage}"):
            if process.poll() is not None:
                break  # it was faster than we
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        # dvc writes dvc.lock in place, behind its stage; a stage that stands still cannot end before dvc is killed
        signalled(project.folder, stage, signal.SIGSTOP)
        if running(project.folder, f"stages.{stage}"):
            process.send_signal(signal.SIGKILL)
            process.wait()
            signalled(project.folder, stage, signal.SIGCONT)
        process.wait()
        while running(project.folder, f"stages.{stage}"):  # the stage and its workers die with dvc
            assert time.monotonic() < deadline, f"{arguments} outlived dvc"
            time.sleep(0.05)
    # dvc takes an output away before its command runs; what is there again must be whole
    again = project.repro()
    assert again.executed <= {cell} | {"plan"}
    assert project.lock == before
    assert project.omrl("verify", "--pipeline", SMOKE).returncode == 0


def rerun(project: Project, cell: str) -> str:
    done = project.run("dvc", "repro", "-s", "-f", cell, cwd=project.smoke, check=False)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert "error: " in text
    return text


def restore(project: Project) -> None:
    """Bring back damaged inputs, and outputs that DVC took away before the run that failed."""
    project.run("dvc", "checkout", "--force", cwd=project.smoke)


def test_damaged_and_missing_inputs_are_named(project):
    data = project.smoke / "data"
    before = project.lock
    parquet = data / "rollouts/000-003/task=002.parquet"
    content = parquet.read_bytes()
    parquet.write_bytes(content[: len(content) // 2])
    assert "data/rollouts/000-003/task=002.parquet: damaged" in rerun(project, "dataset@expert")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    parquet.write_bytes(bytes(flipped))
    assert "data/rollouts/000-003/task=002.parquet: damaged" in rerun(project, "dataset@expert")
    restore(project)

    checkpoint = data / "behavior/000-003/task=001/step=000100.zip"
    checkpoint.unlink()
    assert "task=001/step=000100.zip" in rerun(project, "rollouts@000-003")
    restore(project)
    model = data / "models/focal/expert/0/model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    assert "data/models/focal/expert/0/model.safetensors: damaged" in rerun(project, "evaluate@focal-expert-expert-0")
    restore(project)
    (data / "datasets/expert/task=003.parquet").unlink()
    assert "data/datasets/expert/task=003.parquet: missing" in rerun(project, "meta_train@focal-expert-0")
    restore(project)
    assert project.lock == before
    assert project.repro().executed == set()
    assert project.omrl("verify", "--pipeline", SMOKE).returncode == 0


DAMAGED = [
    ("data/models/focal/expert/0/model.safetensors", "evaluate@focal-expert-expert-0"),
    ("data/models/focal/expert/0/config.json", "evaluate@focal-expert-expert-0"),
    ("data/models/focal/expert/0/curve.csv", "evaluate@focal-expert-expert-0"),
    ("data/models/focal/expert/0/manifest.json", "evaluate@focal-expert-expert-0"),
    ("data/tasks/all.json", "dataset@expert"),
    ("data/tasks/000-003.json", "behavior@000-003"),
    ("data/behavior/000-003/task=001/progress.csv", "report"),
    ("data/datasets/mixed/card.json", "report"),
    ("data/evaluations/focal/expert/expert/0/curve.csv", "report"),
    ("data/plan/cells.json", "report"),
]


def test_a_bit_that_dvc_does_not_see_is_refused_by_name(project):
    """The file keeps its time, so that DVC believes that it is what it was."""
    before = project.lock
    for name, cell in DAMAGED:
        path = project.smoke / name
        facts, content = path.stat(), path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(bytes(flipped))
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        command = ["python", "-m", f"stages.{cell.partition('@')[0]}", *ARGUMENTS.get(cell, [])]
        done = project.run(*command, cwd=project.smoke, check=False)
        assert done.returncode == 2, name
        assert f"error: {name}: damaged" in done.stderr, done.stderr
        path.write_bytes(content)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert project.lock == before
    assert project.omrl("verify", "--pipeline", SMOKE).returncode == 0
    assert project.run("git", "status", "--porcelain").stdout == ""


ARGUMENTS = {
    "evaluate@focal-expert-expert-0": ["focal", "expert", "expert", "0"],
    "dataset@expert": ["expert"],
    "behavior@000-003": ["000-003"],
}


def test_a_refused_params_file_takes_nothing_away(project):
    before = sorted(project.smoke.rglob("*"))
    project.edit_params("total_steps: 200", "totl_steps: 200")
    done = project.run("dvc", "repro", cwd=project.smoke, check=False)
    assert done.returncode != 0
    assert (
        "error: params.yaml: behavior.totl_steps: unknown key; did you mean 'total_steps'?" in done.stdout + done.stderr
    )
    assert sorted(project.smoke.rglob("*")) == before
    project.edit_params("totl_steps: 200", "total_steps: 200")
    assert project.repro().nothing


def test_a_changed_fingerprint_file_is_refused_by_name(project):
    """It is sound JSON still, and would stand in the manifest of whatever is made with it."""
    file = project.smoke / "data/code/stages/dataset.json"
    before, stat = project.lock, file.stat()
    file.chmod(0o644)
    with open(file, "a") as stream:
        stream.write("\n")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = project.run("python", "-m", "stages.dataset", "expert", cwd=project.smoke, check=False)
    assert done.returncode == 2
    assert "data/code/stages/dataset.json: damaged" in done.stderr
    assert project.lock == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(project, small_disk):
    data = project.smoke / "data"
    for stage in (["stages.behavior", "000-003"], ["stages.meta_train", "focal", "expert", "0"]):
        work = small_disk / "pipeline"
        shutil.copytree(data / "code", work / "data/code")
        shutil.copytree(data / "tasks", work / "data/tasks")
        shutil.copytree(data / "datasets/expert", work / "data/datasets/expert")
        (work / "params.yaml").write_text(
            (project.smoke / "params.yaml").read_text().replace("repository: source", f"repository: {project.folder}")
        )
        room = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(b"x" * max(0, room.f_bavail * room.f_frsize - 60_000))
        done = project.run("python", "-m", *stage, cwd=work, check=False)
        assert done.returncode == 2, done.stderr
        assert "no space left on the disk" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(work.rglob("model.safetensors"))
        assert not list(work.glob("data/behavior/*/*"))
        shutil.rmtree(work)
        (small_disk / "ballast").unlink()
