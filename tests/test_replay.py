"""The transitions of the SAC runs as data: both engines, true to the environment, cut into parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from omrl.behavior import batched, sb3
from omrl.behavior.base import BehaviorConfig, Run, build_shard, replay_name
from omrl.config import parse
from omrl.cutting import build_level
from omrl.datasets.parquet import read_table, read_transitions
from omrl.datasets.quality import LevelConfig
from omrl.datasets.schema import keys
from omrl.envs.base import load_family
from omrl.errors import UserError
from omrl.files import write_json
from omrl.rollouts import EPISODES, RolloutsConfig
from omrl.rollouts import build_shard as build_rollouts
from stages import params

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {"sb3": sb3.train, "batched": batched.train}
SAC = {"net_arch": [8], "batch_size": 8, "learning_starts": 30}


def config(engine: str, **values) -> BehaviorConfig:
    settings = {"engine": engine, "total_steps": 120, "checkpoint_every": 40, "horizon": 25, "keep_replay": True}
    return BehaviorConfig.model_validate(settings | {"sac": SAC} | values)


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """Return a function that trains and rolls out a shard of three tasks with an engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMRL_WORKERS", "1")

    def build(engine: str, env: str) -> tuple[Path, Path]:
        family = load_family(env)
        rows = [
            {"index": i, "parameters": family.sample(i, 0), "random_return": 0.0, "oracle_return": None}
            for i in range(3)
        ]
        write_json("data/tasks/all.json", {"tasks": rows})
        write_json("data/tasks/s.json", {"tasks": [{k: r[k] for k in ("index", "parameters")} for r in rows]})
        write_json("data/code/c.json", {})
        settings = config(engine)
        build_shard(
            ENGINES[engine], shard="s", env=env, env_config={}, config=settings, seed=0, code=["data/code/c.json"],
            target="data/behavior/s",
        )  # fmt: skip
        build_rollouts(
            shard="s", env=env, env_config={}, config=RolloutsConfig(source="replay"), seed=0,
            code=["data/code/c.json"], target="data/rollouts/s",
        )  # fmt: skip
        return tmp_path / "data/behavior/s", tmp_path / "data/rollouts/s"

    return build


@pytest.mark.parametrize("engine", ["sb3", "batched"])
@pytest.mark.parametrize("env", ["half-cheetah-vel", "hopper-rand-params", "sparse-point-robot"])
def test_the_kept_transitions_are_what_happened(engine, env, shard):
    family = load_family(env)
    behavior, rollouts = shard(engine, env)
    for task in range(3):
        parts = [read_transitions(behavior / f"task={task:03d}" / replay_name(last)) for last in (40, 80, 120)]
        assert [len(part["task"]) for part in parts] == [40, 40, 40]
        columns = read_transitions(rollouts / f"task={task:03d}.parquet")
        assert len(columns["task"]) == 120
        key = keys(columns)
        assert len(np.unique(key, axis=0)) == 120
        np.testing.assert_array_equal(key, key[np.lexsort(key.T[::-1])])  # in the file's order
        assert set(columns["source_task"].tolist()) == set(columns["task"].tolist()) == {task}
        ended = columns["terminated"] | columns["truncated"]
        assert not (columns["terminated"] & columns["truncated"]).any()
        following = columns["step"][1:] == 0
        np.testing.assert_array_equal(ended[:-1], following)
        assert (columns["step"][columns["truncated"]] == 24).all()
        inner = ~ended[:-1]
        np.testing.assert_array_equal(columns["observation"][1:][inner], columns["next_observation"][:-1][inner])
        assert not np.array_equal(columns["observation"][1:][~inner], columns["next_observation"][:-1][~inner])
        assert (np.abs(columns["action"]) <= 1).all()
        dense, sparse = family.reward(
            family.sample(task, 0), columns["observation"], columns["action"], columns["next_observation"],
            columns["reward_features"],
        )  # fmt: skip
        np.testing.assert_array_equal(dense, columns["reward"])
        np.testing.assert_array_equal(sparse, columns["sparse_reward"])
        began = np.maximum.accumulate(np.where(columns["step"] == 0, np.arange(120), 0))
        np.testing.assert_array_equal(columns["checkpoint"], began // 40 * 40)
    table = read_table(rollouts / EPISODES).to_pandas()
    assert table.groupby("task")["length"].sum().tolist() == [120, 120, 120]
    first = table[table["task"] == 0].iloc[0]
    columns = read_transitions(rollouts / "task=000.parquet")
    rows = columns["episode"] == 0
    reported = columns["sparse_reward" if family.returns == "sparse" else "reward"]
    early = rows & (columns["step"] < family.horizon)
    assert first["return"] == pytest.approx(reported[early].astype(np.float64).sum(), abs=1e-9)
    assert first["dense_return"] == pytest.approx(columns["reward"][rows].astype(np.float64).sum(), abs=1e-9)


def test_parts_of_the_run_are_disjoint_and_cover_it(shard, tmp_path):
    shard("batched", "half-cheetah-vel")
    family, found = load_family("half-cheetah-vel"), {}
    thirds = {"start": [0, 0.333], "middle": [0.333, 0.667], "end": [0.667, 1]}
    for name, part in thirds.items():
        build_level(
            name=name, level=LevelConfig(part=part), rows=15, family=family, seed=0, shards={"s": [0, 2]},
            code=["data/code/c.json"], target=f"data/datasets/{name}",
        )  # fmt: skip
        columns = read_transitions(tmp_path / f"data/datasets/{name}/task=001.parquet")
        found[name] = set(columns["checkpoint"].tolist())
    assert found == {"start": {0}, "middle": {40}, "end": {80}}
    whole = read_transitions(tmp_path / "data/rollouts/s/task=001.parquet")
    assert set(whole["checkpoint"].tolist()) == set().union(*found.values())


def test_a_task_of_a_shard_without_kept_transitions_is_as_before(tmp_path):
    family = load_family("point-robot")
    for keep in (True, False):
        (tmp_path / str(keep)).mkdir()
        run = Run(0, family.sample(0, 0), 3, str(tmp_path / str(keep) / "run"))
        settings = config("batched", keep_replay=keep).resolved()
        batched.train_group("point-robot", {}, [run], settings, str(tmp_path / "work"))
    kept, plain = ({p.name: p.read_bytes() for p in (tmp_path / k / "run").iterdir()} for k in ("True", "False"))
    assert set(kept) - set(plain) == {replay_name(last) for last in (40, 80, 120)}
    assert plain == {name: kept[name] for name in plain}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"source": "replay"}}, r"rollouts\.source = replay: expected behavior\.keep_replay = true"),
        (
            {"rollouts": {"source": "replay"}, "behavior": {"keep_replay": True, "horizon": 10}},
            r"behavior\.horizon = 10: expected at least 20",
        ),
        ({"rollouts": {"source": "buffer"}}, r"rollouts\.source = 'buffer': expected 'checkpoints' or 'replay'"),
        ({"dataset": {"levels": {"start": {"part": [0.5, 0.2]}}}}, r"part = \[0\.5, 0\.2\]: expected \[from, to\]"),
        ({"dataset": {"levels": {"start": {"part": [0, 0.2], "steps": "all"}}}}, "expected either steps"),
    ],
)
def test_impossible_params_are_refused_in_one_line(changes, message, tmp_path):
    values = yaml.safe_load((ROOT / "pipelines/smoke/params.yaml").read_text())
    values["repository"] = str(ROOT)
    for section, entries in changes.items():
        values[section] |= entries
    if "levels" not in changes.get("dataset", {}):
        values["dataset"]["levels"] = {"start": {"steps": "all"}}
    values["dataset"] |= {"train": ["start"], "test": ["start"], "transitions_per_task": 100}
    values["relabel"] = {}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        params.check(path)


def test_a_level_without_checkpoints_is_refused():
    with pytest.raises(UserError, match="expected either steps"):
        parse(LevelConfig, {}, "params.yaml: dataset.levels.x")
