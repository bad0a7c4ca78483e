"""An experiment of one's own: written by ``omrl init``, run with nothing but the installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import Ran, build_wheel

from omrl.core.errors import UserError
from omrl.experiment import check
from omrl.scaffold.init import init, presets

ROOT = Path(__file__).resolve().parents[1]


def test_every_pipeline_can_be_begun_from_and_its_check_passes(tmp_path):
    known = presets()
    assert {"default", "smoke", "sparse-point-robot"} <= set(known)
    for name in set(known) - {"metaworld-ml1"}:  # an extra
        init(tmp_path / f"from-{name}", name, plugin=False)  # it ends with a check
    copied = (tmp_path / "from-sparse-point-robot/params.yaml").read_text()
    original = (ROOT / "pipelines/sparse-point-robot/params.yaml").read_text()
    differing = [(a, b) for a, b in zip(copied.splitlines(), original.splitlines(), strict=True) if a != b]
    assert [a.partition(" #")[0] for a, _ in differing] == ["repository: installed"]


def test_the_skeleton_has_a_method_and_its_test(tmp_path):
    written = {path.relative_to(tmp_path / "my-exp").as_posix() for path in init(tmp_path / "my-exp", "smoke", True)}
    assert {"my_exp/method.py", "tests/test_method.py", "params.yaml", "dvc.yaml", "README.md"} <= written
    assert "meta_train@my-exp-expert-0" in check(tmp_path / "my-exp/params.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=tmp_path / "my-exp", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_an_experiment_is_a_repository_of_its_own_or_part_of_one(tmp_path, monkeypatch):
    init(tmp_path / "a", "smoke", plugin=False)
    assert (tmp_path / "a/.git").is_dir()
    init(tmp_path / "a/inner", "smoke", plugin=False)
    assert not (tmp_path / "a/inner/.git").exists()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    init(tmp_path / "b", "smoke", plugin=False)
    assert "no_scm = true" in (tmp_path / "b/.dvc/config.local").read_text()
    assert "no git here" in (tmp_path / "b/README.md").read_text()
    for other in ("a", "a/inner"):
        assert not (tmp_path / other / ".dvc/config.local").exists()


@pytest.mark.parametrize(
    ("name", "source", "plugin", "message"),
    [
        ("x", "smok", False, r"--from smok: no such pipeline; did you mean 'smoke'\?"),
        ("My_Exp", "smoke", False, r"'My_Exp': expected a name of lower-case letters"),
        ("there", "smoke", False, r"there: exists and is not empty; expected a new folder"),
        ("numpy", "smoke", True, r"'numpy': there is a module numpy already"),
    ],
)
def test_what_init_refuses(tmp_path, name, source, plugin, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with pytest.raises(UserError, match=message):
        init(tmp_path / name, source, plugin)


@pytest.mark.e2e
def test_an_experiment_runs_with_the_installed_package_and_a_changed_plug_in_reruns_its_cells(tmp_path):
    site, folder = tmp_path / "site", tmp_path / "work/my-exp"
    (tmp_path / "build").mkdir()
    folder.parent.mkdir()
    zipfile.ZipFile(build_wheel(tmp_path / "build")).extractall(site)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(site), "DVC_NO_ANALYTICS": "1"}

    def run(*command: str, cwd: Path = folder) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def omrl(*arguments: str, cwd: Path = folder) -> str:
        return run(sys.executable, "-m", "omrl.cli", *arguments, cwd=cwd)

    omrl("init", "my-exp", "--from", "smoke", "--plugin", cwd=folder.parent)
    first = Ran(run("dvc", "repro")).executed
    assert {"code", "meta_train@my-exp-expert-0", "evaluate@my-exp-expert-expert-0", "report"} <= first
    assert "my-exp" in (folder / "reports/results.csv").read_text()
    run("git", "add", "-A")
    assert Ran(run("dvc", "repro")).executed == {"code"}  # it always runs, and finds nothing new
    told = omrl("lineage", "my-exp/expert/expert")
    assert "my_exp.method of no package, method.py SHA-256" in told
    plugin = folder / "my_exp/method.py"
    plugin.write_text(plugin.read_text() + "\n# a comment\n")
    assert Ran(run("dvc", "repro")).executed == {"code"}
    plugin.write_text(plugin.read_text().replace(".square().sum(-1).mean()", ".abs().sum(-1).mean()"))
    cells = {"meta_train@my-exp-expert-0", "meta_train@my-exp-relabelled-0"}
    cells |= {"evaluate@my-exp-expert-expert-0", "evaluate@my-exp-relabelled-expert-0"}
    executed = Ran(run("dvc", "repro")).executed
    assert executed == {"code", "report", *cells}
    omrl("video", "data/models/my-exp/expert/0", "-o", "both.gif")
    assert (folder / "both.gif").read_bytes().startswith(b"GIF8")
