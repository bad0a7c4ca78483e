"""End to end through the real ``dvc repro``: what reruns, what does not, and the same bytes twice."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import yaml
from conftest import SMOKE, clone

pytestmark = pytest.mark.e2e

CELLS = {
    "plan", "code", "tasks", "report",
    "behavior@000-003", "behavior@004-005", "rollouts@000-003", "rollouts@004-005",
    "dataset@random", "dataset@medium", "dataset@expert", "dataset@mixed", "relabel@relabelled",
    "meta_train@focal-expert-0", "meta_train@focal-relabelled-0",
    "evaluate@focal-expert-expert-0", "evaluate@focal-relabelled-expert-0",
}  # fmt: skip


def test_one_command_builds_every_result_from_nothing(built):
    assert built.first.executed == CELLS
    results = pd.read_csv(built.smoke / "reports/results.csv")
    assert list(results.columns) == [
        "algorithm", "train_dataset", "test_dataset", "seed", "task", "episode", "return", "normalized",
    ]  # fmt: skip
    assert set(results.task) == {4, 5}
    assert len(results) == 2 * 1 * 2 * 2  # train datasets x test datasets x test tasks x repetitions
    metrics = json.loads((built.smoke / "reports/metrics.json").read_text())
    shown = metrics["focal"]["expert"]["expert"]["mean"]
    cell = results[results.train_dataset == "expert"]
    assert shown == pytest.approx(cell["return"].mean())
    html = (built.smoke / "reports/index.html").read_text()
    assert "<html" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_second_repro_runs_nothing(project):
    before = project.lock
    assert project.repro().nothing
    assert project.lock == before


def test_swapping_a_level_reruns_what_depends_on_it_and_back_is_a_checkout(project):
    before, report = project.lock, (project.smoke / "reports/metrics.json").read_bytes()
    project.edit_params("train: [expert, relabelled]", "train: [medium]")
    swapped = project.repro()
    assert swapped.executed == {
        "plan",
        "meta_train@focal-medium-0",
        "evaluate@focal-medium-expert-0",
        "report",
    }
    assert "medium" in json.loads((project.smoke / "reports/metrics.json").read_text())["focal"]
    project.edit_params("train: [medium]", "train: [expert, relabelled]")
    back = project.repro()
    assert back.executed == {"plan"}
    assert (project.smoke / "reports/metrics.json").read_bytes() == report
    # DVC keeps the swapped cells in the lock; those of the first choice are as they were
    old, new = (yaml.safe_load(text)["stages"] for text in (before, project.lock))
    assert {name: new[name] for name in old} == old
    assert project.repro().nothing


def test_adding_tasks_trains_only_the_new_shard(project):
    project.edit_params("test: 2", "test: 3")
    project.edit_params('"004-005": [4, 5]', '"004-005": [4, 5]\n  "006-006": [6, 6]')
    executed = project.repro().executed
    assert {name for name in executed if name.startswith(("behavior", "rollouts"))} == {
        "behavior@006-006",
        "rollouts@006-006",
    }
    assert "report" in executed


def test_editing_an_algorithm_reruns_its_cells_only(project):
    file = project.folder / "omrl/algorithms/focal.py"
    file.write_text(file.read_text() + "\n\n_PROBE = 1\n")
    executed = {name.partition("@")[0] for name in project.repro().executed}
    # the report names the fingerprint of the code, so it is made again although no number has changed
    assert executed == {"code", "meta_train", "evaluate", "report"}


def test_editing_comments_and_docstrings_reruns_nothing(project):
    for name in ("omrl/algorithms/focal.py", "omrl/behavior/sb3.py", "omrl/core/files.py"):
        file = project.folder / name
        file.write_text(file.read_text().replace('"""', '"""Edited. ', 1) + "# a comment\n")
    assert project.repro().executed == {"code"}


def test_two_fresh_clones_give_the_same_lock(built, tmp_path):
    other = clone(tmp_path / "omrl")
    other.repro()
    assert other.lock == built.lock
    for name in ("results.csv", "metrics.json", "results.md", "index.html", "lineage.json"):
        assert (other.smoke / "reports" / name).read_bytes() == (built.smoke / "reports" / name).read_bytes(), name


def test_dvc_shows_metrics_and_plots(project):
    metrics = project.run("dvc", "metrics", "show", cwd=project.smoke).stdout
    assert "focal" in metrics
    project.run("dvc", "plots", "show", "-o", "shown", cwd=project.smoke)
    assert (project.smoke / "shown/index.html").stat().st_size > 1000


def test_a_typo_stops_before_any_work(project):
    project.edit_params("steps: 40", "setps: 40")
    done = project.run("dvc", "repro", cwd=project.smoke, check=False)
    assert done.returncode != 0
    assert "params.yaml: meta_train.setps: unknown key; did you mean 'steps'?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_model_that_learned_on_is_evaluated_reported_and_traced(project):
    project.edit_params("online: {}", "online:\n  on: { algorithm: focal, rounds: 2, updates: 10, keep: 1 }\n#")
    executed = project.repro().executed
    assert executed == {"plan", "online@on", "evaluate_online@on", "report"}
    metrics = json.loads((project.smoke / "reports/metrics.json").read_text())
    assert set(metrics["on"]) == {"expert", "relabelled"}
    text = project.omrl("lineage", "on/expert/expert", "--pipeline", SMOKE).stdout
    cells = [line.strip("│ ").strip() for line in text.splitlines()]
    order = [cells.index(f"{c}") for c in ("evaluate_online@on", "online@on", "meta_train@focal-expert-0")]
    assert order == sorted(order)
    assert "behavior@000-003" in cells
    row = project.omrl("lineage", "data/online/on/expert/0/collected=001.parquet:3", "--pipeline", SMOKE).stdout
    assert "collected in round 1, after 10 further updates of data/models/focal/expert/0; reward: simulator" in row
    assert project.repro().nothing
    project.edit_params("rounds: 2", "rounds: 1")
    assert project.repro().executed == {"plan", "online@on", "evaluate_online@on", "report"}
    project.edit_params("online:\n  on: { algorithm: focal, rounds: 1, updates: 10, keep: 1 }\n#", "online: {}")
    assert project.repro().executed == {"plan"}
    assert not (project.smoke / "data/online/on").exists()
