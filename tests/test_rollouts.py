"""Rollouts: the rows that stepping one episode at a time would give, whole, in order and repeatable."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from omrl.behavior import rollouts
from omrl.behavior.rollouts import RolloutsConfig, build_shard, rollout
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json, sha256, write_json, write_manifest
from omrl.data import parquet
from omrl.data.schema import TYPES
from omrl.envs.base import load_family

STEPS = [0, 100]
CONFIG = RolloutsConfig(episodes_per_checkpoint=4, deterministic_episodes=2, horizon=25)


class Toy:
    """An actor that adds half its noise to a fixed linear policy, and remembers how it was called."""

    observation_size = 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def mean_action(self, observation):
        self.calls.append(("mean", len(observation)))
        return np.tanh(observation[:, ::-1] + np.float32(0.3)).astype(np.float32)

    def sample(self, observation, noise):
        self.calls.append(("sample", len(observation)))
        return np.tanh(observation[:, ::-1] + np.float32(0.3) + np.float32(0.5) * noise).astype(np.float32)


def act(name: str = "sparse-point-robot", config: RolloutsConfig = CONFIG, seed: int = 7, family=None):
    family = family or load_family(name)
    actor = Toy()
    columns, table = rollout(actor, family, family.sample(3, 1337), index=3, checkpoint=100, config=config, seed=seed)
    return columns, table, actor


@pytest.mark.parametrize("name", ["sparse-point-robot", "point-robot", "point-robot-wind"])
def test_a_rollout_has_the_schema_and_the_order(name):
    columns, table, _ = act(name)
    assert {n: v.dtype for n, v in columns.items()} == {n: np.dtype(t) for n, t in TYPES.items()}
    assert columns["episode"].tolist() == np.repeat(np.arange(6), 25).tolist()
    assert columns["step"].tolist() == list(range(25)) * 6
    assert set(columns["task"].tolist()) == set(columns["source_task"].tolist()) == {3}
    assert set(columns["checkpoint"].tolist()) == {100}
    assert columns["deterministic"].tolist() == [False] * 100 + [True] * 50
    assert np.abs(columns["action"]).max() <= 1
    assert not columns["terminated"].any()
    assert columns["truncated"].tolist() == ([False] * 24 + [True]) * 6
    # a chain: s' of a row is s of the next
    inner = ~columns["truncated"]
    assert np.array_equal(columns["next_observation"][inner], columns["observation"][np.flatnonzero(inner) + 1])
    assert table["length"].tolist() == [25] * 6


@pytest.mark.parametrize("name", ["sparse-point-robot", "point-robot", "point-robot-wind"])
def test_replaying_the_actions_one_by_one_gives_the_stored_rows(name):
    columns, _, _ = act(name)
    family = load_family(name)
    for episode in range(6):
        rows = np.flatnonzero(columns["episode"] == episode)
        env = family.batch([family.sample(3, 1337)], 1)
        env.reset([np.random.default_rng(0)])
        env.observation = columns["observation"][rows[:1]].copy()
        for row in rows:
            result = env.step(columns["action"][row : row + 1])
            assert np.array_equal(result.next_observation[0], columns["next_observation"][row])
            assert result.reward[0] == columns["reward"][row]
            assert result.sparse_reward[0] == columns["sparse_reward"][row]


def test_the_actor_sees_all_episodes_at_once():
    _, _, actor = act()
    assert actor.calls == [("sample", 4), ("mean", 2)] * 25


def test_sampled_episodes_differ_and_deterministic_ones_follow_the_mean():
    columns, _, _ = act()
    paths = columns["action"].reshape(6, 25, 2)
    assert len(np.unique(paths[:4].reshape(4, -1), axis=0)) == 4
    assert np.array_equal(paths[4], paths[5])  # this family starts every episode at the origin
    assert np.array_equal(columns["action"][100:], Toy().mean_action(columns["observation"][100:]))


def test_random_starts_differ_between_episodes():
    columns, _, _ = act("point-robot")
    starts = columns["observation"][columns["step"] == 0]
    assert len(np.unique(starts, axis=0)) == 6


def test_the_same_seed_gives_the_same_rows_and_another_does_not():
    first, again, other = act()[0], act()[0], act(seed=8)[0]
    assert all(first[n].tobytes() == again[n].tobytes() for n in first)
    assert not np.array_equal(first["action"], other["action"])


def test_an_episodes_return_is_the_reported_one_of_the_test_horizon():
    for name, reported in (("sparse-point-robot", "sparse_reward"), ("point-robot-wind", "reward")):
        columns, table, _ = act(name)
        rewards = {n: columns[n].reshape(6, 25).astype(np.float64) for n in ("reward", "sparse_reward")}
        assert table["return"] == pytest.approx(rewards[reported][:, :20].sum(axis=1))
        assert table["dense_return"] == pytest.approx(rewards["reward"].sum(axis=1))
        assert table["sparse_return"] == pytest.approx(rewards["sparse_reward"].sum(axis=1))


class Ending:
    """The wind family, with episodes that terminate: copy i after 5 (i + 1) steps, the last two never."""

    def __init__(self) -> None:
        self._family = load_family("point-robot-wind")

    def __getattr__(self, name):
        return getattr(self._family, name)

    def batch(self, tasks, copies=1):
        env = self._family.batch(tasks, copies)
        step, count = env.step, [0]

        def ending(actions):
            count[0] += 1
            result = step(actions)
            done = count[0] >= 5 * (np.arange(copies) + 1) + (np.arange(copies) >= 4)
            return type(result)(result.next_observation, result.reward, result.sparse_reward, done, result.features)

        env.step = ending
        return env


def test_episodes_that_terminate_end_there_and_are_not_truncated():
    columns, table, _ = act(family=Ending())
    lengths = [5, 10, 15, 20, 25, 25]
    assert table["length"].tolist() == lengths
    assert columns["episode"].tolist() == np.repeat(np.arange(6), lengths).tolist()
    assert columns["step"].tolist() == [step for length in lengths for step in range(length)]
    last = np.cumsum(lengths) - 1
    assert np.flatnonzero(columns["terminated"]).tolist() == last[:4].tolist()
    assert np.flatnonzero(columns["truncated"]).tolist() == last[4:].tolist()
    sums = [columns["reward"][columns["episode"] == e].astype(np.float64).sum() for e in range(6)]
    assert table["dense_return"] == pytest.approx(sums)
    assert table["return"][:4] == pytest.approx(sums[:4])


def test_when_all_episodes_end_early_nothing_else_is_stored():
    config = RolloutsConfig(episodes_per_checkpoint=2, deterministic_episodes=0, horizon=25)
    columns, table, _ = act(family=Ending(), config=config)
    assert table["length"].tolist() == [5, 10]
    assert len(columns["step"]) == 15
    assert all(np.isfinite(columns[n]).all() for n in ("observation", "action", "reward", "next_observation"))
    assert np.isfinite(table["return"]).all()


def test_a_policy_of_another_environment_is_refused():
    actor = Toy()
    actor.observation_size = 11
    family = load_family("sparse-point-robot")
    with pytest.raises(UserError, match=r"11.*2.*sparse-point-robot"):
        rollout(actor, family, family.sample(0, 0), index=0, checkpoint=0, config=CONFIG, seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"episodes_per_checkpoint": 0}, r"episodes_per_checkpoint = 0"),
        ({"deterministic_episodes": -1}, r"deterministic_episodes = -1"),
        ({"horizon": 0}, r"horizon = 0"),
        ({"steps": []}, r"steps"),
        ({"steps": [100, 0]}, r"steps"),
        ({"horizn": 5}, r"horizn: unknown key; did you mean 'horizon'"),
    ],
)
def test_a_mistake_in_the_section_is_named(values, message):
    with pytest.raises(UserError, match=message):
        parse(RolloutsConfig, values, "params.yaml: rollouts")


def test_steps_that_are_not_saved_are_named():
    assert CONFIG.checkpoint_steps([0, 250]) == [0, 250]
    assert RolloutsConfig(steps=[250]).checkpoint_steps([0, 250]) == [250]
    with pytest.raises(UserError, match=r"rollouts\.steps has 300"):
        RolloutsConfig(steps=[250, 300]).checkpoint_steps([0, 250])


def checkpoint(path: Path, seed: int) -> None:
    """Write a SAC checkpoint the size of a toy, as stable_baselines3 lays it out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"latent_pi.0": (8, 2), "latent_pi.2": (8, 8), "mu": (2, 8), "log_std": (2, 8)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"actor.{name}.weight"] = 0.5 * torch.randn(shape, generator=generator)
        weights[f"actor.{name}.bias"] = torch.zeros(shape[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"policy_kwargs": {}}))
        with archive.open("policy.pth", "w") as stream:
            torch.save(weights, stream)


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A folder with what the stage reads: two tasks with two checkpoints each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMRL_WORKERS", "1")
    family = load_family("sparse-point-robot")
    tasks = [{"index": i, "parameters": family.sample(i, 1337)} for i in (4, 5)]
    write_json("data/tasks/a.json", {"env": family.name, "spec": family.spec(), "seed": 1337, "tasks": tasks})
    write_json("data/code/stages/rollouts.json", {})
    names = [f"task={i:03d}/step={step:06d}.zip" for i in (4, 5) for step in STEPS]
    for seed, name in enumerate(names):
        checkpoint(Path("data/behavior/a") / name, seed)
    write_manifest(
        "data/behavior/a",
        kind="behavior",
        inputs={},
        parameters={"behavior": {"total_steps": 100, "checkpoint_every": 100}},
        files=dict.fromkeys(names),
    )
    return Path("data/rollouts/a")


def build(seed: int = 0) -> None:
    build_shard(
        shard="a",
        env="sparse-point-robot",
        env_config={},
        config=CONFIG,
        seed=seed,
        code=["data/code/stages/rollouts.json"],
        target="data/rollouts/a",
    )


def test_a_shard_is_published_whole_and_the_same_twice(shard):
    build()
    before = {path.name: path.read_bytes() for path in shard.iterdir()}
    assert set(before) == {"task=004.parquet", "task=005.parquet", "episodes.parquet", "manifest.json"}
    build()
    assert {path.name: path.read_bytes() for path in shard.iterdir()} == before
    columns = parquet.read_transitions(shard / "task=005.parquet")
    order = np.lexsort((columns["step"], columns["episode"], columns["checkpoint"]))
    assert np.array_equal(order, np.arange(2 * 6 * 25))
    assert sorted(set(columns["checkpoint"].tolist())) == STEPS
    footer = parquet.read_footer(shard / "task=005.parquet")
    assert footer["task"] == load_family("sparse-point-robot").sample(5, 1337)
    assert footer["environment"] == load_family("sparse-point-robot").spec()
    for step in STEPS:
        assert sha256(f"data/behavior/a/task=005/step={step:06d}.zip") in str(footer["checkpoints"])
    manifest = read_json(shard / "manifest.json")
    assert manifest["files"]["task=005.parquet"]["rows"] == 300
    assert set(manifest["inputs"]) == {
        "data/tasks/a.json",
        "data/behavior/a",
        "data/code/stages/rollouts.json",
    }
    table = parquet.read_table(shard / "episodes.parquet")
    assert table.num_rows == manifest["files"]["episodes.parquet"]["rows"] == 2 * 2 * 6
    wanted = {"task", "checkpoint", "episode", "deterministic", "seed", "length", "return", "sparse_return"}
    assert wanted <= set(table.column_names)
    # every task and checkpoint has a stream of its own
    assert len(set(table.column("seed").to_pylist())) == 4


def test_what_an_interrupted_run_finished_is_kept_and_not_made_again(shard, monkeypatch):
    build()
    whole = {path.name: path.read_bytes() for path in shard.iterdir()}
    ran: list[int] = []

    def one_then_stop(function, arguments, **_):
        for call in arguments:
            if ran:
                raise KeyboardInterrupt
            function(*call)
            ran.append(call[3])

    monkeypatch.setattr(rollouts, "run_tasks", one_then_stop)
    (shard / "manifest.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        build()
    assert ran == [4]

    def rest(function, arguments, **_):
        for call in arguments:
            ran.append(call[3])
            function(*call)

    monkeypatch.setattr(rollouts, "run_tasks", rest)
    build()
    assert ran == [4, 5]
    assert {path.name: path.read_bytes() for path in shard.iterdir()} == whole
    assert not [path for path in Path("data/.scratch").rglob("*") if path.is_file()]


def test_another_seed_does_not_use_what_an_interrupted_run_finished(shard, monkeypatch):
    def first_only(function, arguments, **_):
        function(*arguments[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "run_tasks", first_only)
        with pytest.raises(KeyboardInterrupt):
            build(seed=0)
    here = lambda function, arguments, **_: [function(*call) for call in arguments]  # noqa: E731
    monkeypatch.setattr(rollouts, "run_tasks", here)
    build(seed=1)
    assert parquet.read_footer(shard / "task=004.parquet")["parameters"]["seed"] == 1
    table = parquet.read_table(shard / "episodes.parquet")
    build(seed=0)
    other = parquet.read_table(shard / "episodes.parquet")
    assert not set(table.column("seed").to_pylist()) & set(other.column("seed").to_pylist())


def test_a_missing_checkpoint_is_named_and_nothing_is_published(shard):
    Path("data/behavior/a/task=005/step=000100.zip").unlink()
    with pytest.raises(UserError, match=r"data/behavior/a/task=005/step=000100\.zip"):
        build()
    assert not shard.exists()


def test_a_damaged_checkpoint_is_named(shard):
    path = Path("data/behavior/a/task=004/step=000000.zip")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"data/behavior/a/task=004/step=000000\.zip"):
        build()
    assert not shard.exists()


def test_a_checkpoint_exchanged_for_another_is_refused(shard):
    folder = Path("data/behavior/a/task=004")
    (folder / "step=000000.zip").write_bytes((folder / "step=000100.zip").read_bytes())
    with pytest.raises(UserError, match=r"task=004/step=000000\.zip"):
        build()


def test_missing_behavior_policies_are_named(shard):
    Path("data/behavior/a/manifest.json").unlink()
    with pytest.raises(UserError, match=r"data/behavior/a/manifest\.json: missing"):
        build()
