"""Shared fixtures: clones of the project in which the real ``dvc repro`` runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if threading.current_thread() is threading.main_thread():
    # 'nohup' and shells that put a job in the background have these ignored, and what a test starts inherits that
    for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(_number) is signal.SIG_IGN:
            signal.signal(_number, _default)

ROOT = Path(__file__).resolve().parents[1]
SMOKE = "pipelines/smoke"


@dataclass
class Project:
    """A clone of the project; ``folder`` is its root, the smoke pipeline is what it runs."""

    folder: Path
    first: Ran | None = None

    @property
    def smoke(self) -> Path:
        return self.folder / SMOKE

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # the clone's own code, not the checkout the tests run from
        return {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder), "DVC_NO_ANALYTICS": "1"}

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def repro(self, *arguments: str) -> Ran:
        done = self.run("dvc", "repro", *arguments, cwd=self.smoke)
        return Ran(done.stdout + done.stderr)

    def omrl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "omrl.cli", *arguments, check=check)

    def edit_params(self, old: str, new: str) -> None:
        file = self.smoke / "params.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    @property
    def lock(self) -> bytes:
        return (self.smoke / "dvc.lock").read_bytes()

    def copy(self, target: Path) -> Project:
        shutil.copytree(self.folder, target, symlinks=True)
        return Project(target)


@dataclass
class Ran:
    """What a ``dvc repro`` said it did."""

    text: str

    @property
    def executed(self) -> set[str]:
        """Cells whose command ran."""
        return {name.rpartition(":")[2] for name in re.findall(r"Running stage '([^']+)'", self.text)}

    @property
    def restored(self) -> set[str]:
        """Cells whose outputs came from the run-cache."""
        found = re.findall(r"Stage '([^']+)' is cached - skipping run", self.text)
        return {name.rpartition(":")[2] for name in found}

    @property
    def nothing(self) -> bool:
        return "Data and pipelines are up to date." in self.text and not self.executed


def clone(target: Path) -> Project:
    """Make a fresh clone of what the working tree holds: what git tracks or would track, committed."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        source = ROOT / name
        if name.startswith(f"{SMOKE}/") or (source.is_file() and not name.startswith("pipelines/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    shutil.rmtree(target / SMOKE / "reports", ignore_errors=True)
    (target / SMOKE / "dvc.lock").unlink(missing_ok=True)
    project = Project(target)
    project.run("git", "init", "-q", "-b", "main")
    commit(project, "clone")
    return project


def build_wheel(folder: Path) -> Path:
    """Build the wheel in ``folder`` from a copy of what git knows, and return it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
    for name in listed.splitlines():
        preset = name.endswith(("params.yaml", "dvc.yaml"))
        if (name.startswith(("omrl/", "stages/")) or preset or name in top) and (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "copy" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--wheel-dir", str(folder), str(folder / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def commit(project: Project, message: str) -> None:
    project.run("git", "add", "-A")
    project.run(
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "commit",
        "-q",
        "--no-verify",
        "-m",
        message,
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Project:
    """The smoke pipeline, built once from nothing and committed. Do not change it: take ``project``."""
    project = clone(tmp_path_factory.mktemp("built") / "omrl")
    project.first = project.repro()
    commit(project, "results")
    return project


@pytest.fixture
def project(built, tmp_path) -> Project:
    """A copy of the built project, data and cache included, free to change."""
    return built.copy(tmp_path / "omrl")


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Double precision on one thread, for numbers that have to hold on every CPU.

    The metric loss has no gradient along a shift of all embeddings, only rounding, which Adam scales up to a whole
    step: in single precision such numbers belong to the kernels of one CPU.
    """
    import torch  # two seconds that the end-to-end tests do not need

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
