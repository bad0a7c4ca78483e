"""A script's data through the pipeline: from the family's collector to a trained model and its report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from omrl import experiment as params
from omrl.behavior.base import BehaviorConfig
from omrl.behavior.rollouts import RolloutsConfig, build_shard
from omrl.behavior.scripted import script_of
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json, sha256
from omrl.data.parquet import read_footer, read_table, read_transitions
from omrl.data.schema import TYPES
from omrl.envs.base import load_family
from omrl.provenance.lineage import _row

ROOT = Path(__file__).resolve().parents[1]
SHARD = "000-002"


def scripted(**changes) -> dict:
    """Return the params of pipelines/smoke with Sawyer-Affordances' script as behavior."""
    values = yaml.safe_load((ROOT / "pipelines/smoke/params.yaml").read_text())
    values |= {"repository": str(ROOT), "env": "sawyer-affordances", "env_config": {}, "relabel": {}}
    values |= {"tasks": {"train": 2, "test": 1, "seed": 0}, "shards": {SHARD: [0, 2]}}
    values["behavior"] = {"engine": "scripted"}
    values["rollouts"] = {"source": "scripted", "episodes_per_checkpoint": 3, "horizon": 75}
    levels = {"skills": {"steps": [0]}, "own": {"steps": [1], "deterministic": True}}
    values["dataset"] = {"train": ["skills"], "test": ["own"], "transitions_per_task": 150, "levels": levels}
    values["algorithms"]["focal"] |= {"meta_batch": 2}
    values["meta_train"] |= {"steps": 20}
    values["evaluate"] |= {"episodes": 1, "repetitions": 1}
    for section, value in changes.items():
        values[section] = value if section in ("env", "behavior") else values[section] | value
    return values


def check(folder: Path, **changes) -> list[str]:
    (folder / "params.yaml").write_text(yaml.safe_dump(scripted(**changes)))
    return params.check(folder / "params.yaml")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every stage, run in this process."""
    folder = tmp_path_factory.mktemp("scripted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMRL_WORKERS", "1")
        check(folder)
        cells = ["plan", "code", "tasks"]
        cells += [
            f"behavior {SHARD}",
            f"rollouts {SHARD}",
            "dataset skills",
            "dataset own",
            "meta_train focal skills 0",
            "evaluate focal skills own 0",
            "report",
        ]
        for cell in cells:
            stage, *arguments = cell.split()
            patch.setattr(sys, "argv", [stage, *arguments])
            importlib.import_module(f"stages.{stage}").main()
    return folder


def test_nothing_is_trained_and_what_acts_is_written_down(built):
    folder = built / "data/behavior" / SHARD
    names = sorted(path.name for path in (folder / "task=000").iterdir())
    assert names == ["progress.csv", "script.json"]
    assert read_json(folder / "manifest.json")["parameters"]["behavior"] == {"engine": "scripted"}
    task = read_json(built / "data/tasks/all.json")["tasks"][0]["parameters"]
    assert read_json(folder / "task=000/script.json")["task"] == task


@pytest.mark.parametrize("task", [0, 2])
def test_rows_are_in_the_schema_and_their_rewards_are_the_familys(built, task):
    path = built / f"data/rollouts/{SHARD}/task={task:03d}.parquet"
    columns, family = read_transitions(path), load_family("sawyer-affordances")
    assert {name: values.dtype for name, values in columns.items()} == {n: np.dtype(t) for n, t in TYPES.items()}
    assert columns["checkpoint"].tolist() == np.repeat([0, 1], 4 * 75).tolist()
    assert columns["episode"].tolist() == np.tile(np.repeat(range(4), 75), 2).tolist()
    assert columns["deterministic"].tolist() == (columns["episode"] == 3).tolist()
    parameters = read_json(built / "data/tasks/all.json")["tasks"][task]["parameters"]
    stored = (columns[n] for n in ("observation", "action", "next_observation", "reward_features"))
    _, sparse = family.reward(parameters, *stored)
    np.testing.assert_array_equal(sparse, columns["sparse_reward"])
    footer = read_footer(path)
    assert footer["parameters"]["rollouts"]["source"] == "scripted"
    script = sha256(built / f"data/behavior/{SHARD}/task={task:03d}/script.json")
    assert footer["checkpoints"] == {"0": script, "1": script}


def test_own_aims_are_met_and_random_skills_meet_them_less(built):
    table = read_table(built / f"data/rollouts/{SHARD}/episodes.parquet").to_pandas()
    returns = table.groupby("checkpoint")["return"].mean()
    assert returns[1] > returns[0]
    assert returns[1] > -60


def test_a_row_goes_back_to_the_script_and_the_report_names_it(built):
    facts = _row(SimpleNamespace(folder=built), "data/datasets/skills/task=001.parquet", 7)
    assert facts["problems"] == []
    assert facts["checkpoint_file"]["path"] == f"data/behavior/{SHARD}/task=001/script.json"
    metrics = json.loads((built / "reports/metrics.json").read_text())
    assert "script" in metrics["reference"]
    assert "single-task SAC" not in metrics["reference"]
    assert not (built / "reports/pictures/behavior.png").exists()


def test_checkpoints_do_not_act_where_a_script_was_written_down(built, monkeypatch):
    monkeypatch.chdir(built)
    with pytest.raises(UserError, match=r"checkpoints: data/behavior/000-002 was made by behavior\.engine = scripted"):
        build_shard(
            shard=SHARD, env="sawyer-affordances", env_config={}, config=RolloutsConfig(), seed=0, code=[], target="no"
        )
    assert not Path("no").exists()


def test_skills_are_drawn_and_own_is_the_tasks_aim():
    family = load_family("sawyer-affordances")
    task = next(t for t in (family.sample(i, 0) for i in range(40)) if t["drawer"] and t["aim"] == "open-drawer")
    batch = family.batch([task], 8)
    seen = batch.reset([np.random.default_rng(i) for i in range(8)])

    def acts(own: bool, seed: int) -> bytes:
        return script_of(family, task, int(own), 0, 8, np.random.default_rng(seed)).mean_action(seen).tobytes()

    assert acts(True, 0) == acts(True, 1)
    assert acts(False, 0) == acts(False, 0) != acts(False, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "half-cheetah-vel", "rollouts": {"horizon": 200}}, r"scripted: 'half-cheetah-vel' has no script"),
        ({"rollouts": {"source": "checkpoints"}}, r"engine = scripted with rollouts\.source = checkpoints: expected r"),
        ({"behavior": {}}, r"engine = batched with rollouts\.source = scripted: expected behavior\.engine = scripted"),
        ({"behavior": {"engine": "scripted", "total_steps": 10}}, r"total_steps with engine = scripted: expected no"),
        ({"rollouts": {"steps": [0, 2]}}, r"rollouts\.steps has 2"),
        ({"env_config": {"sparse_threshold": 0.5}}, r"sparse_threshold = 0\.5: expected no such key"),
    ],
)
def test_a_mistake_about_scripts_is_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        check(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_family_without_a_script_is_refused_where_it_would_act():
    with pytest.raises(UserError, match="'point-robot' has no script"):
        script_of(load_family("point-robot"), {}, 0, 1, 1, np.random.default_rng(0))


def test_what_is_recorded_is_what_has_an_effect():
    assert parse(BehaviorConfig, {"engine": "scripted"}, "x").resolved() == {"engine": "scripted"}
    assert set(BehaviorConfig().resolved()) > {"engine", "total_steps", "sac"}
    assert parse(RolloutsConfig, {"source": "scripted"}, "x").resolved()["source"] == "scripted"
