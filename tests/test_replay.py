"""Replay as data: every transition of the SAC runs, as it happened, from behavior training to a trained model."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from omrl import experiment as params
from omrl.behavior import batched, sb3
from omrl.behavior.base import BehaviorConfig, Run, replay_name
from omrl.behavior.replay import ReplayWriter
from omrl.behavior.rollouts import RolloutsConfig, from_replay
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json
from omrl.data.parquet import read_footer, read_transitions
from omrl.data.quality import part_of
from omrl.data.schema import TYPES, concatenate, keys
from omrl.envs.base import StepResult, load_family
from omrl.provenance.lineage import _row

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"start": [0, 0.34], "middle": [0.34, 0.67], "end": [0.67, 1]}
TINY = {"net_arch": [8], "batch_size": 8, "learning_starts": 20}


def smoke(**changes) -> dict:
    """Return the params of pipelines/smoke with the replay as data."""
    values = yaml.safe_load((ROOT / "pipelines/smoke/params.yaml").read_text())
    values["repository"] = str(ROOT)
    values["behavior"] |= {"keep_replay": True, "checkpoint_every": 50}
    values["rollouts"] = {"source": "replay"}
    levels = {name: {"part": part} for name, part in PARTS.items()}
    values["relabel"]["relabelled"]["source"] = "start"
    values["meta_train"] |= {"steps": 20}
    values["dataset"] |= {"train": ["end", "relabelled"], "test": ["end"], "transitions_per_task": 40, "levels": levels}
    for section, value in changes.items():
        values[section] |= value
    return values


def check(folder: Path, **changes) -> list[str]:
    (folder / "params.yaml").write_text(yaml.safe_dump(smoke(**changes)))
    return params.check(folder / "params.yaml")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The smoke pipeline on replay, every stage run in this process."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMRL_WORKERS", "1")
        check(folder)
        cells = ["plan", "code", "tasks"]
        cells += [f"{stage} {shard}" for stage in ("behavior", "rollouts") for shard in ("000-003", "004-005")]
        cells += [*(f"dataset {level}" for level in PARTS), "relabel relabelled"]
        cells += ["meta_train focal end 0", "evaluate focal end end 0"]
        for cell in cells:
            stage, *arguments = cell.split()
            patch.setattr(sys, "argv", [stage, *arguments])
            importlib.import_module(f"stages.{stage}").main()
    return folder


def shard_of(task: int) -> str:
    return "000-003" if task < 4 else "004-005"


def rollouts_of(folder: Path, task: int) -> Path:
    return folder / f"data/rollouts/{shard_of(task)}/task={task:03d}.parquet"


def test_the_whole_run_is_there_in_order(built):
    for task in (0, 5):
        columns = read_transitions(rollouts_of(built, task))
        assert {name: values.dtype for name, values in columns.items()} == {n: np.dtype(t) for n, t in TYPES.items()}
        assert columns["episode"].tolist() == np.repeat(np.arange(10), 20).tolist()
        assert columns["step"].tolist() == list(range(20)) * 10
        # the last checkpoint before the episode began
        assert columns["checkpoint"].tolist() == np.repeat([0, 0, 0, 50, 50, 100, 100, 100, 150, 150], 20).tolist()
        assert columns["truncated"].tolist() == ([False] * 19 + [True]) * 10
        assert set(columns["task"].tolist()) == set(columns["source_task"].tolist()) == {task}
        assert not columns["deterministic"].any()
        assert len(np.unique(keys(columns), axis=0)) == 200


@pytest.mark.parametrize("task", [0, 5])
def test_acting_again_gives_the_recorded_rows(built, task):
    columns = read_transitions(rollouts_of(built, task))
    family = load_family("sparse-point-robot", smoke()["env_config"])
    parameters = read_json(built / "data/tasks/all.json")["tasks"][task]["parameters"]
    env = family.make(parameters, 20)
    for row in range(200):
        if columns["step"][row] == 0:
            observation, _ = env.reset()
        np.testing.assert_array_equal(observation, columns["observation"][row])
        observation, reward, terminated, truncated, info = env.step(columns["action"][row])
        np.testing.assert_array_equal(observation, columns["next_observation"][row])
        assert np.float32(reward) == columns["reward"][row]
        assert np.float32(info["sparse_reward"]) == columns["sparse_reward"][row]
        assert (terminated, truncated) == (columns["terminated"][row], columns["truncated"][row])


def test_parts_of_a_run_are_apart_and_lie_in_it(built):
    for task in range(6):
        run = {tuple(key) for key in keys(read_transitions(rollouts_of(built, task)))}
        parts = []
        for name, steps in {"start": [0], "middle": [50, 100], "end": [150]}.items():
            columns = read_transitions(built / f"data/datasets/{name}/task={task:03d}.parquet")
            assert set(columns["checkpoint"].tolist()) == set(steps)
            parts.append({tuple(key) for key in keys(columns)})
            assert len(parts[-1]) == 40
        assert len(set.union(*parts)) == 120
        assert set.union(*parts) <= run


@pytest.mark.parametrize("count", [3, 4, 10, 101])
@pytest.mark.parametrize("cuts", [[0, 0.34, 0.67, 1], [0, 0.2, 0.8, 1], [0, 0.1, 0.3, 0.7, 1]])
def test_adjoining_parts_cover_every_checkpoint_once(count, cuts):
    steps = list(range(0, 50 * count, 50))
    found = [step for ends in itertools.pairwise(cuts) for step in part_of(steps, ends)]
    assert found == steps


@pytest.mark.parametrize("dataset", ["start", "end", "relabelled"])
def test_a_row_goes_back_to_its_run(built, dataset):
    pipeline = SimpleNamespace(folder=built)
    for row in (0, 17, 39):
        facts = _row(pipeline, f"data/datasets/{dataset}/task=001.parquet", row)
        assert facts["problems"] == []
        assert len(facts["rollout"]["rows"]) == 1
        assert facts["checkpoint_file"]["path"].endswith(f"step={facts['checkpoint']:06d}.zip")
        seeds = read_json(built / f"data/behavior/{shard_of(facts['source_task'])}/manifest.json")["parameters"]
        assert facts["sb3_run"]["seed"] == seeds["run_seeds"][str(facts["source_task"])]


def test_a_model_is_trained_and_evaluated_on_it(built):
    curve = (built / "data/models/focal/end/0/curve.csv").read_text().splitlines()
    assert len(curve) == 3
    assert (built / "data/evaluations/focal/end/end/0/episodes.parquet").is_file()
    recorded = read_footer(rollouts_of(built, 0))
    assert recorded["parameters"]["rollouts"]["source"] == "replay"
    assert set(recorded["checkpoints"]) == {"0", "50", "100", "150", "200"}


# ------------------------------------------------------------------ the engines


def settings(engine: str, **values) -> BehaviorConfig:
    return BehaviorConfig(engine=engine, total_steps=120, checkpoint_every=30, horizon=15, sac=TINY, **values)


def trained(engine: str, folder: Path, config: BehaviorConfig, env: str = "hopper-rand-params") -> list[Path]:
    """Train tasks, two where they are one computation; return their folders."""
    family = load_family(env)
    folder.mkdir(exist_ok=True)
    runs = [Run(i, family.sample(i, 0), 7 + i, str(folder / f"done-{i}")) for i in range(1 + (engine == "batched"))]
    if engine == "batched":
        batched.train_group(env, {}, runs, config.resolved(), str(folder / "work"))
    else:
        for run in runs:
            sb3.train_task(env, {}, run.task, config.resolved(), run.seed, run.folder, run.index)
    return [Path(run.folder) for run in runs]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def kept(folder: Path) -> dict[str, np.ndarray]:
    return concatenate([read_transitions(folder / replay_name(last)) for last in (30, 60, 90, 120)])


@pytest.mark.parametrize("engine", ["sb3", "batched"])
def test_an_engine_keeps_what_happened_and_trains_as_without(engine, tmp_path):
    with_it = trained(engine, tmp_path / "with", settings(engine, keep_replay=True))
    without = trained(engine, tmp_path / "without", settings(engine))
    for index, (folder, other) in enumerate(zip(with_it, without, strict=True)):
        found = hashes(folder)
        assert {n: h for n, h in found.items() if not n.startswith("replay")} == hashes(other)
        assert [n for n in found if n.startswith("replay")] == [replay_name(last) for last in (30, 60, 90, 120)]
        columns = kept(folder)
        assert len(columns["step"]) == 120
        assert set(columns["task"].tolist()) == {index}
        ended = columns["terminated"] | columns["truncated"]
        assert columns["terminated"].any()  # hoppers fall over
        assert not (columns["terminated"] & columns["truncated"]).any()
        assert (columns["step"][columns["truncated"]] == 14).all()
        inner = np.flatnonzero(~ended[:-1])
        assert np.array_equal(columns["next_observation"][inner], columns["observation"][inner + 1])
        broken = np.flatnonzero(ended[:-1])
        assert not (columns["next_observation"][broken] == columns["observation"][broken + 1]).all(axis=1).any()
        assert np.array_equal(columns["episode"], np.r_[0, np.cumsum(ended)[:-1]])
        assert np.array_equal(np.diff(columns["step"]) == 1, ~ended[:-1])
        family = load_family("hopper-rand-params")
        dense, _ = family.reward(
            family.sample(index, 0),
            *(columns[n] for n in ("observation", "action", "next_observation", "reward_features")),
        )
        np.testing.assert_array_equal(dense, columns["reward"])


def test_an_interrupted_group_keeps_the_same_replay(tmp_path, monkeypatch):
    config = settings("batched", keep_replay=True)
    whole = trained("batched", tmp_path / "whole", config)
    monkeypatch.setattr(batched, "_SNAPSHOT_S", 0.0)
    advance = batched.Group.advance

    def stop(self) -> None:
        if self.clock.step == 77:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(batched.Group, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("batched", tmp_path / "killed", config)
    monkeypatch.setattr(batched.Group, "advance", advance)
    again = trained("batched", tmp_path / "killed", config)
    assert [hashes(folder) for folder in again] == [hashes(folder) for folder in whole]


def test_an_interrupted_sb3_run_leaves_nothing_and_ends_the_same(tmp_path, monkeypatch):
    config = settings("sb3", keep_replay=True)
    whole = trained("sb3", tmp_path / "whole", config)
    save = sb3.save_checkpoint

    def stop(model, path) -> None:
        if model.num_timesteps == 90:
            raise KeyboardInterrupt
        save(model, path)

    monkeypatch.setattr(sb3, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("sb3", tmp_path / "killed", config)
    assert not (tmp_path / "killed/done-0").exists()
    monkeypatch.setattr(sb3, "save_checkpoint", save)
    again = trained("sb3", tmp_path / "killed", config)
    assert [hashes(folder) for folder in again] == [hashes(folder) for folder in whole]


# ------------------------------------------------- the writer and the episode table


def test_episodes_are_counted_across_files(tmp_path):
    """Episodes of 7 steps in files of 10: one that crosses a boundary is one episode."""
    family = load_family("sparse-point-robot")
    writer = ReplayWriter(family, [3], 10)
    rewards = np.random.default_rng(0).standard_normal(30).astype(np.float32)
    zero = np.zeros((1, 2), dtype=np.float32)
    for taken in range(30):
        value = rewards[taken : taken + 1]
        result = StepResult(zero, value, 2 * value, np.array([False]), np.zeros((1, 0), dtype=np.float32))
        age, episode = np.array([taken % 7]), np.array([taken // 7])
        writer.add(taken, age, episode, zero, zero, result, age == 6)
        if taken % 10 == 9:
            writer.write([tmp_path], taken + 1)
    paths = [tmp_path / replay_name(last) for last in (10, 20, 30)]
    table = from_replay(paths, tmp_path / "all.parquet", family, 3, 5, {"environment": {}})
    assert table["length"].tolist() == [7, 7, 7, 7, 2]
    assert table["episode"].tolist() == [0, 1, 2, 3, 4]
    assert table["checkpoint"].tolist() == [0, 0, 10, 20, 20]
    sums = [rewards[start : start + 7].astype(np.float64).sum() for start in range(0, 30, 7)]
    np.testing.assert_allclose(table["dense_return"], sums, rtol=1e-12)
    np.testing.assert_allclose(table["return"], 2 * np.array(sums), rtol=1e-12)
    columns = read_transitions(tmp_path / "all.parquet")
    np.testing.assert_array_equal(columns["reward"], rewards)
    assert columns["checkpoint"].tolist() == np.repeat(table["checkpoint"], table["length"]).tolist()


# ----------------------------------------------------------------------- params


def test_the_params_of_replay_are_sound(tmp_path):
    assert "dataset@start" in check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behavior": {"keep_replay": False}}, r"rollouts\.source = replay: expected behavior\.keep_replay = true"),
        (
            {"rollouts": {"source": "replays"}},
            r"rollouts\.source = 'replays': expected 'checkpoints', 'replay' or 'scripted'",
        ),
        ({"rollouts": {"steps": [100, 200]}}, r"rollouts.*steps = \[100, 200\] with source = replay: expected all"),
        ({"behavior": {"horizon": 10}}, r"behavior\.horizon = 10: expected at least 20"),
        ({"behavior": {"keep_replay": "yes"}}, r"behavior\.keep_replay = 'yes': expected a valid bool"),
        ({"dataset": {"levels": {"end": {"part": [0.9, 0.8]}}}}, r"levels\.end.*part = \[0\.9, 0\.8\]: expected"),
        ({"dataset": {"levels": {"end": {"part": [0.8, 1.1]}}}}, r"levels\.end.*part = \[0\.8, 1\.1\]: expected"),
        ({"dataset": {"levels": {"end": {"part": [0.9, 1]}}}}, r"levels\.end\.part = \[0\.9, 1\.0\]: no checkpoint"),
        ({"dataset": {"levels": {"end": {"part": [0, 1], "steps": "all"}}}}, r"levels\.end.*expected either steps"),
        ({"dataset": {"levels": {"end": {"steps": [200]}}}}, r"levels\.end\.steps has 200: no such checkpoint"),
        (
            {
                "dataset": {
                    "levels": {"end": {"part": [0.6, 1]}, "start": {"steps": "first"}, "expert": {"steps": "last"}}
                }
            },
            r"levels\.expert with rollouts\.source = replay: expected the name replay",
        ),
    ],
)
def test_a_mistake_about_replay_is_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        check(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_every_choice_is_recorded():
    assert BehaviorConfig().resolved()["keep_replay"] is False
    assert RolloutsConfig().resolved()["source"] == "checkpoints"
    assert parse(RolloutsConfig, {"source": "replay"}, "x").resolved()["source"] == "replay"
