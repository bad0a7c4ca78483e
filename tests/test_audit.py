"""Lineage, verify and the command line on a pipeline that the real ``dvc repro`` built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMOKE, Project

from omrl.core.files import write_manifest
from omrl.data.parquet import read_transitions
from omrl.provenance.lockfile import Pipeline, md5_of

pytestmark = pytest.mark.e2e


def lineage(project: Project, *arguments: str, check: bool = True) -> dict:
    return json.loads(project.omrl("lineage", "--json", *arguments, check=check).stdout)


def objects(project: Project, output: str) -> list[Path]:
    """Return the cache objects of the files of an output folder."""
    pipeline = Pipeline(project.smoke)
    listing = json.loads(pipeline.object_path(pipeline.output_of(output).md5).read_text())
    return [pipeline.object_path(entry["md5"]) for entry in listing]


def damage(path: Path, content: bytes | None = None) -> None:
    """Change a read-only file behind everybody's back; flips one bit unless told otherwise."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(bytes(data) if content is None else content)
    path.chmod(mode)


def test_our_hashes_are_dvcs(built):
    for output in Pipeline(built.smoke).outputs():
        assert md5_of(built.smoke / output.path) == output.md5, output.path


def test_a_number_goes_back_to_every_stage(built):
    result = lineage(built, "focal/expert/expert", "--pipeline", SMOKE)
    metrics = json.loads((built.smoke / "reports/metrics.json").read_text())
    assert result["facts"]["value"] == metrics["focal"]["expert"]["expert"]
    assert set(result["cells"]) >= {
        "evaluate@focal-expert-expert-0", "meta_train@focal-expert-0", "dataset@expert", "rollouts@000-003",
        "rollouts@004-005", "behavior@000-003", "behavior@004-005", "tasks",
    }  # fmt: skip
    assert "relabel@relabelled" not in result["cells"]
    assert result["problems"] == []
    head = built.run("git", "rev-parse", "HEAD").stdout.strip()
    for cell in result["cells"].values():
        assert cell["commit"]["commit"] == head
    training = result["cells"]["meta_train@focal-expert-0"]
    assert training["parameters"]["algorithms.focal"]["latent_dim"] == 4
    code = json.loads((built.smoke / "data/code/algorithms/focal.json").read_text())
    assert training["code"]["data/code/algorithms/focal.json"] == code["fingerprint"]


def test_a_single_value_of_the_metrics_file(built):
    result = lineage(built, f"{SMOKE}/reports/metrics.json:focal.relabelled.expert.mean")
    metrics = json.loads((built.smoke / "reports/metrics.json").read_text())
    assert result["facts"]["value"] == metrics["focal"]["relabelled"]["expert"]["mean"]
    assert "relabel@relabelled" in result["cells"]


@pytest.mark.parametrize("name", ["relabelled/task=004", "mixed/task=001", "expert/task=005"])
def test_a_row_goes_back_to_rollout_checkpoint_and_sb3_run(built, name):
    path, row = f"data/datasets/{name}.parquet", 11
    facts = lineage(built, f"{SMOKE}/{path}:{row}")["facts"]
    columns = read_transitions(built.smoke / path)
    source, step = int(columns["source_task"][row]), int(columns["checkpoint"][row])
    shard = "000-003" if source < 4 else "004-005"
    assert facts["rollout"]["path"] == f"data/rollouts/{shard}/task={source:03d}.parquet"
    (there,) = facts["rollout"]["rows"]
    rollout = read_transitions(built.smoke / facts["rollout"]["path"])
    for key in ("observation", "action", "next_observation", "checkpoint", "episode", "step"):
        np.testing.assert_array_equal(rollout[key][there], columns[key][row])
    assert facts["checkpoint_file"]["path"].endswith(f"task={source:03d}/step={step:06d}.zip")
    assert facts["checkpoint_file"]["sha256"] == facts["checkpoint_file"]["recorded"]
    assert facts["sb3_run"]["seed"] > 0
    assert facts["sb3_run"]["behavior"]["total_steps"] == 200


def test_folders_and_checkpoints_have_a_lineage(built):
    for target, cell in (
        ("data/models/focal/expert/0", "meta_train@focal-expert-0"),
        ("data/datasets/relabelled", "relabel@relabelled"),
        ("data/behavior/004-005/task=005/step=000100.zip", "behavior@004-005"),
    ):
        assert lineage(built, f"{SMOKE}/{target}")["roots"] == [cell]


def test_lineage_works_from_the_pipelines_own_folder(built):
    done = built.run(sys.executable, "-m", "omrl.cli", "lineage", "focal/expert/expert/0", cwd=built.smoke)
    assert "Everything above is on disk as dvc.lock records it." in done.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("fokal/expert/expert", "no 'fokal' in the report; did you mean 'focal'?"),
        ("focal/expert/mixed", "no 'mixed' in focal/expert"),
        (f"{SMOKE}/data/datasets/expert/task=000.parquet:999", "row 999 is out of range, expected 0..159"),
        ("data/nothing", "no stage in pipelines/smoke/dvc.lock writes it"),
    ],
)
def test_a_wrong_target_is_one_line_and_code_2(built, target, message):
    done = built.omrl("lineage", target, "--pipeline", SMOKE, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_lineage_says_what_is_not_as_recorded(project):
    damage(project.smoke / "data/datasets/expert/task=002.parquet")
    damage(project.smoke / "data/behavior/000-003/task=001/step=000200.zip")
    done = project.omrl("lineage", "focal/expert/expert", "--pipeline", SMOKE, check=False)
    assert done.returncode == 1
    assert "WARNING: pipelines/smoke/data/datasets/expert is modified" in done.stdout
    assert "** MODIFIED **" in done.stdout
    columns = read_transitions(project.smoke / "data/datasets/mixed/task=001.parquet")
    row = int(np.flatnonzero(columns["checkpoint"] == 200)[0])
    row_done = project.omrl("lineage", f"{SMOKE}/data/datasets/mixed/task=001.parquet:{row}", check=False)
    assert row_done.returncode == 1
    assert "task=001/step=000200.zip is modified" in row_done.stdout


def test_lineage_tells_an_uncommitted_result(project):
    project.edit_params("seeds: [0]", "seeds: [1]")
    project.repro()
    result = lineage(project, "focal/expert/expert", "--pipeline", SMOKE)
    assert result["cells"]["meta_train@focal-expert-1"]["commit"] is None
    assert result["cells"]["dataset@expert"]["commit"] is not None
    assert f"{SMOKE}/params.yaml" in " ".join(result["uncommitted"])


def test_verify_is_quiet_on_a_sound_pipeline(built):
    done = built.omrl("verify")
    assert "pipelines/smoke:" in done.stdout
    assert "0 damaged" in done.stdout


def test_verify_names_files_that_changed_vanished_or_appeared(project):
    damage(project.smoke / "data/rollouts/000-003/task=001.parquet")
    (project.smoke / "data/models/focal/expert/0/curve.csv").unlink()
    (project.smoke / "data/datasets/expert/extra").write_text("x")
    (project.smoke / "reports/results.csv").write_text("edited")
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert done.returncode == 1
    for part in (
        "data/rollouts/000-003/task=001.parquet: modified",
        "data/models/focal/expert/0/curve.csv: missing",
        "data/datasets/expert/extra: not part of the recorded output",
        "reports/results.csv: modified",
    ):
        assert part in done.stdout


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_verify_names_damaged_cache_objects_that_dvc_calls_up_to_date(project, how):
    target = objects(project, "data/datasets/expert")[2]
    if how == "missing":
        target.unlink()
    else:
        damage(target, b"" if how == "truncated" else None)
    if how != "missing":
        assert "up to date" in project.run("dvc", "status", cwd=project.smoke).stdout
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert done.returncode == 1
    assert target.name in done.stdout
    assert "data/datasets/expert/" in done.stdout
    assert done.stdout.count("DAMAGED") == 1


def test_verify_names_a_damaged_listing(project):
    pipeline = Pipeline(project.smoke)
    listing = pipeline.object_path(pipeline.output_of("data/tasks").md5)
    damage(listing, b"[")
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert done.returncode == 1
    assert listing.name in done.stdout


def test_verify_names_what_is_gone_from_the_lock(project):
    lock = project.smoke / "dvc.lock"
    text = lock.read_text()
    lock.write_text(text[: text.index("  meta_train@focal-relabelled-0:")])
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert done.returncode == 1
    for path in ("data/models/focal/relabelled/0", "data/evaluations/focal/expert/expert/0", "reports/metrics.json"):
        assert f"pipelines/smoke/dvc.lock: does not record {path}" in done.stdout


def test_verify_names_a_changed_digit_of_the_lock(project):
    """Of every kind of entry, one after the other."""
    lock = project.smoke / "dvc.lock"
    text = lock.read_text()
    start = text.index("  meta_train@focal-expert-0:")
    for pattern, part in (
        (r"- path: data/datasets/expert\n\s+hash: md5\n\s+md5: .*?(\d)", "from another data/datasets/expert"),
        (
            r"- path: data/datasets/expert\n\s+hash: md5\n\s+md5: .*\n\s+size: (\d)",
            "another size of data/datasets/expert",
        ),
        (r"steps: (\d)", "meta_train@focal-expert-0: meta_train = "),
        (r"data/models/focal/expert/0\n\s+hash: md5\n\s+md5: .*?(\d)", "data/models/focal/expert/0"),
        (r"data/models/focal/expert/0\n.*\n.*\n\s+size: .*\n\s+nfiles: (\d)", "files of data/models/focal/expert/0"),
        (r"cmd: python -m stages.meta_train focal expert (\d)", "has the command"),
    ):
        found = re.compile(pattern).search(text, start)
        assert found is not None, pattern
        digit = "3" if found[1] != "3" else "4"
        lock.write_text(text[: found.start(1)] + digit + text[found.end(1) :])
        done = project.omrl("verify", "--pipeline", SMOKE, check=False)
        assert done.returncode == 1, pattern
        assert part in done.stdout, pattern
    lock.write_text(text)
    assert "0 damaged" in project.omrl("verify", "--pipeline", SMOKE).stdout


def test_verify_goes_on_after_what_it_cannot_read(project):
    unreadable = project.smoke / "data/models/focal/expert/0/curve.csv"
    unreadable.unlink()
    unreadable.symlink_to("/proc/self/mem")
    damage(project.smoke / "reports/results.csv")
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert done.returncode == 1
    assert "data/models/focal/expert/0/curve.csv: unreadable" in done.stdout
    assert "reports/results.csv: modified" in done.stdout


def test_verify_looks_at_the_cache_objects_of_reports(project):
    pipeline = Pipeline(project.smoke)
    for path in ("reports/metrics.json", "reports/figures"):
        place = pipeline.object_path(pipeline.output_of(path).md5)
        damage(place, b"x")
        done = project.omrl("verify", "--pipeline", SMOKE, check=False)
        assert done.returncode == 1, path
        assert place.name in done.stdout


def test_verify_names_a_result_made_from_something_else(project):
    manifest = project.smoke / "data/evaluations/focal/expert/expert/0/manifest.json"
    model = project.smoke / "data/models/focal/expert/0"
    files = json.loads((model / "manifest.json").read_text())
    write_manifest(model, kind="model", inputs={}, parameters={}, files=dict.fromkeys(files["files"]))
    assert manifest.is_file()
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert "evaluations/focal/expert/expert/0: made from another data/models/focal/expert/0" in done.stdout


@pytest.mark.parametrize("content", ["stages:\n  x: " + "9" * 5000, "[" * 3000, "schema: '2.0'\nstages: {x: {cmd: 3}}"])
def test_a_lock_that_dvc_did_not_write_is_one_line(project, content):
    (project.smoke / "dvc.lock").write_text(content)
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert done.returncode == 2
    assert "pipelines/smoke/dvc.lock: damaged" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_raw_reaches_the_terminal(project):
    odd = "data/datasets/expert/\x1b[31mred\u202e"
    (project.smoke / odd).write_text("x")
    done = project.omrl("verify", "--pipeline", SMOKE, check=False)
    assert r"expert/\x1b[31mred\u202e: not part" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_check_list_data_and_version(built):
    stages = built.run("dvc", "stage", "list", "--name-only").stdout.split()
    assert f"params.yaml: ok, {len(stages)} cells" in built.omrl("check").stdout
    smoke = f"{SMOKE}/params.yaml: ok, 17 cells\n"
    assert all(built.omrl("check", name).stdout == smoke for name in ("smoke", SMOKE, f"{SMOKE}/params.yaml"))
    listed = built.omrl("list").stdout
    for name in ("sparse-point-robot", "focal", "offline-context"):
        assert name in listed
    card = built.omrl("data", f"{SMOKE}/data/datasets/mixed").stdout
    assert "960 transitions, 6 tasks of 160" in card
    assert "float32[160, 2]" in built.omrl("data", f"{SMOKE}/data/datasets/mixed/task=000.parquet").stdout
    assert built.omrl("--version").stdout.startswith("omrl 0.")


def test_commands_start_without_torch(built):
    code = "import sys, omrl.cli; print('torch' in sys.modules)"
    assert built.run(sys.executable, "-c", code).stdout.strip() == "False"


def test_problems_end_with_code_2_and_no_traceback(built, tmp_path):
    nowhere = [("check", "nowhere.yaml"), ("check", "nowhere"), ("data", "nowhere")]
    for arguments in (*nowhere, ("verify", "--pipeline", str(tmp_path))):
        done = built.omrl(*arguments, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_a_cache_elsewhere_is_found(project, tmp_path):
    shutil.move(project.folder / ".dvc/cache", tmp_path / "elsewhere")
    project.run("dvc", "config", "--local", "cache.dir", str(tmp_path / "elsewhere"), cwd=project.smoke)
    assert "0 damaged" in project.omrl("verify", "--pipeline", SMOKE).stdout


def test_the_command_is_installed():
    found = Path(sys.executable).parent / "omrl"
    assert subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.startswith("omrl")
