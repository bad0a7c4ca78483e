"""dvc.lock, DVC's cache and git, read without DVC: on small folders made by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from omrl import experiment as params
from omrl.core.errors import UserError
from omrl.core.yamlfile import Loader
from omrl.data.parquet import write_table
from omrl.provenance.lineage import trace
from omrl.provenance.lockfile import Pipeline, find_pipeline, listing, md5_of, md5_of_listing
from omrl.provenance.verify import verify

ROOT = Path(__file__).resolve().parents[1]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


PLAN = {"shards": [], "datasets": ["expert"], "pairs": [], "models": [], "evaluations": []}


@pytest.fixture
def made(tmp_path):
    """A pipeline of three stages: plan, and tasks -> dataset@expert; outputs on disk and in the cache."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache]\n    type = 'reflink,copy'  # a comment\n")
    (tmp_path / "dvc.yaml").write_text("stages: {tasks: {outs: [data/tasks]}, plan: {outs: [data/plan]}}\n")
    (tmp_path / "params.yaml").write_text("rate: 1e-5\ntext: on\n")
    lock = {"schema": "2.0", "stages": {}}
    recorded = {}
    for stage, path, deps in (
        ("plan", "data/plan", []),
        ("tasks", "data/tasks", []),
        ("dataset@expert", "data/datasets/expert", ["data/tasks"]),
    ):
        folder = tmp_path / path
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            (folder / f"{name}.txt").write_text(f"{path} {name}")
        if stage == "plan":
            (folder / "cells.json").write_text(json.dumps(PLAN))
        entries = listing(folder)
        digest = md5_of_listing(entries)
        size = sum((folder / e["relpath"]).stat().st_size for e in entries)
        recorded[path] = {"path": path, "md5": digest, "size": size, "nfiles": len(entries)}
        cache = tmp_path / ".dvc/cache/files/md5"
        objects = {e["md5"]: (folder / e["relpath"]).read_bytes() for e in entries}
        objects[digest] = json.dumps(entries, sort_keys=True).encode()
        for name, content in objects.items():
            (cache / name[:2]).mkdir(parents=True, exist_ok=True)
            (cache / name[:2] / name[2:]).write_bytes(content)
        family, _, argument = stage.partition("@")
        lock["stages"][stage] = {
            "cmd": f"python -m stages.{family} {argument}".strip(),
            "deps": [dict(recorded[p]) for p in deps],
            "params": {"params.yaml": {"rate": 1e-5, "text": "on"}},
            "outs": [dict(recorded[path])],
        }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    return tmp_path


def test_yaml_is_read_as_dvc_writes_it(tmp_path):
    text = "{a: 1e-5, b: on, c: yes, d: 12:30, e: true, f: 0o10, g: .5, h: 2, i: -1.5e3, j: null, k: 2001-01-01}"
    assert yaml.load(text, Loader=Loader) == {
        "a": 1e-5, "b": "on", "c": "yes", "d": "12:30", "e": True, "f": 8, "g": 0.5, "h": 2, "i": -1500.0,
        "j": None, "k": "2001-01-01",
    }  # fmt: skip
    values = (ROOT / "pipelines/smoke/params.yaml").read_text().replace("../..", str(ROOT))
    path = tmp_path / "params.yaml"
    path.write_text(values.replace("batch_size: 32", "batch_size: 32, learning_rate: 1e-3"))
    assert params.load("behavior", path=path).behavior.sac.learning_rate == 0.001


def test_folders_are_hashed_as_dvc_does(made):
    pipeline = Pipeline(made)
    assert {out.path for out in pipeline.outputs()} == {"data/plan", "data/tasks", "data/datasets/expert"}
    for out in pipeline.outputs():
        assert md5_of(made / out.path) == out.md5
        assert pipeline.state(out) == "ok"
        extra = {"data/plan/cells.json"} if out.stage == "plan" else set()
        assert set(pipeline.recorded(out)) == {f"{out.path}/a.txt", f"{out.path}/b.txt"} | extra


def test_a_changed_file_is_named(made):
    (made / "data/datasets/expert/b.txt").write_text("other")
    (made / "data/datasets/expert/c.txt").write_text("new")
    result = trace(Pipeline(made), "data/datasets/expert")
    assert any("expert is modified (b.txt, c.txt)" in problem for problem in result["problems"])
    shutil.rmtree(made / "data/tasks")
    assert any("data/tasks is missing" in p for p in trace(Pipeline(made), "data/datasets/expert")["problems"])


def test_an_input_that_was_rebuilt_since_is_told(made):
    lock = yaml.safe_load((made / "dvc.lock").read_text())
    lock["stages"]["dataset@expert"]["deps"][0]["md5"] = "0" * 32 + ".dir"
    (made / "dvc.lock").write_text(yaml.safe_dump(lock))
    problems = trace(Pipeline(made), "data/datasets/expert")["problems"]
    assert any("read another version of data/tasks" in problem for problem in problems)


def test_rows_and_numbers_that_do_not_exist_are_user_errors(made):
    pipeline = Pipeline(made)
    with pytest.raises(UserError, match="only Parquet files"):
        trace(pipeline, "data/datasets/expert/a.txt:3")
    with pytest.raises(UserError, match="expected a row number"):
        trace(pipeline, "data/datasets/expert/a.txt:x")
    with pytest.raises(UserError, match="no stage in"):
        trace(pipeline, "data/nothing")
    with pytest.raises(UserError, match="expected <algorithm>/"):
        trace(pipeline, "focal/expert")


def test_the_seeds_behind_a_number_come_in_their_order(made):
    (made / "reports").mkdir()
    (made / "reports/metrics.json").write_text(json.dumps({"focal": {"expert": {"medium": {"mean": 1.0}}}}))
    lock = yaml.safe_load((made / "dvc.lock").read_text())
    seeds = (2, 10, 0)
    paths = [f"data/evaluations/focal/expert/medium/{seed}" for seed in seeds]
    asked = [{"algorithm": "focal", "train": "expert", "test": "medium", "seed": seed} for seed in seeds]
    (made / "data/plan/cells.json").write_text(json.dumps(PLAN | {"evaluations": asked}))
    for stage, path in [*((f"evaluate@{i}", p) for i, p in enumerate(paths)), ("report", "reports")]:
        lock["stages"][stage] = {"cmd": "python", "outs": [{"path": path, "md5": "0" * 32 + ".dir", "size": 1}]}
    (made / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    found = trace(Pipeline(made), "focal/expert/medium/mean")["facts"]["evaluations"]
    assert found == [paths[2], paths[0], paths[1]]


@pytest.mark.parametrize("content", ["", "stages: 3", "stages: {a: {outs: 1}}", "\x00", "a: [", "stages: {a: [1]}"])
def test_a_damaged_lock_is_a_user_error(made, content):
    (made / "dvc.lock").write_text(content)
    with pytest.raises(UserError, match=r"dvc\.lock: damaged, expected DVC's lock file"):
        Pipeline(made)


def test_without_a_lock_or_a_pipeline_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"dvc\.lock: missing; run 'dvc repro'"):
        Pipeline(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not inside a pipeline"):
        find_pipeline(Path("data/x"))


def test_a_pipeline_is_found_from_inside_it(made, monkeypatch):
    monkeypatch.chdir(made / "data/datasets")
    assert find_pipeline(Path("expert")).resolve() == made.resolve()


def damage_of(folder: Path) -> dict[str, str]:
    _, damage = verify(Pipeline(folder))
    return {Path(entry.path).relative_to(folder).as_posix(): f"{entry.problem}; {entry.repair}" for entry in damage}


def test_verify_names_files_and_cache_objects(made):
    assert damage_of(made) == {}
    target = made / "data/datasets/expert/a.txt"
    content = target.read_bytes()
    digest = md5(content)
    cached = f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}"
    (made / cached).write_bytes(b"")
    found = damage_of(made)
    assert list(found) == [cached]
    assert "0 bytes" in found[cached]
    assert "dvc commit --force dataset@expert" in found[cached]  # the file itself is sound
    target.write_bytes(content[:-1] + b"?")
    found = damage_of(made)
    assert set(found) == {cached, "data/datasets/expert/a.txt"}
    assert "dvc repro --force --single-item dataset@expert" in found[cached]
    (made / cached).unlink()
    assert "missing from the cache" in damage_of(made)[cached]


@pytest.mark.parametrize("stage", ["plan", "tasks"])
def test_verify_names_an_output_of_dvc_yaml_that_the_lock_lacks(made, stage):
    lock = yaml.safe_load((made / "dvc.lock").read_text())
    del lock["stages"][stage]
    (made / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert f"does not record data/{stage}" in damage_of(made)["dvc.lock"]


def test_a_mean_that_the_evaluations_do_not_give_is_told(made):
    place = "data/evaluations/focal/expert/medium/0"
    (made / "reports").mkdir()
    (made / "reports/metrics.json").write_text(json.dumps({"focal": {"expert": {"medium": {"mean": 1.0}}}}))
    rows = [("test", True, 2.0), ("test", False, 9.0), ("train", True, 9.0)]
    table = [{"split": split, "counted": counted, "task": 4, "return": value} for split, counted, value in rows]
    write_table(made / place / "episodes.parquet", pa.Table.from_pylist(table))
    asked = [{"algorithm": "focal", "train": "expert", "test": "medium", "seed": 0}]
    (made / "data/plan/cells.json").write_text(json.dumps(PLAN | {"evaluations": asked}))
    lock = yaml.safe_load((made / "dvc.lock").read_text())
    for stage, path in (("evaluate@0", place), ("report", "reports")):
        out = {"path": path, "md5": "0" * 32 + ".dir", "size": 1}
        lock["stages"][stage] = {"cmd": "python", "outs": [out]}
    (made / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    found = trace(Pipeline(made), "focal/expert/medium")
    assert found["facts"]["seed_means"] == {"0": 2.0}
    assert any("says mean 1.0, the evaluations give 2.0" in problem for problem in found["problems"])
