"""The Meta-World families: what can be told without the package here, and the package itself where it is.

'make test-metaworld' runs this file in the environment that has it.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from omrl import experiment as params
from omrl.behavior.rollouts import RolloutsConfig, rollout
from omrl.core.errors import UserError
from omrl.data.parquet import read_transitions, write_transitions
from omrl.data.relabel import relabel_rows
from omrl.envs import _metaworld, metaworld_ml45
from omrl.envs.base import load_family

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("metaworld-ml1", "metaworld-ml45")
ABSENT = "import sys; sys.modules['metaworld'] = None; from omrl.cli import entry; sys.argv[1:] = {}; entry()"
extra = pytest.mark.skipif(not importlib.util.find_spec("metaworld"), reason="needs 'make setup-metaworld'")


class Uniform:
    """Uniform random actions, as an actor."""

    observation_size = 39

    def sample(self, observation: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return np.clip(noise, -1, 1)

    def mean_action(self, observation: np.ndarray) -> np.ndarray:
        return np.zeros((len(observation), 4), dtype=np.float32)


# ------------------------------------------------------------- without the package


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(_metaworld, "package", lambda: None)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_package_one_line_names_the_way_to_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(UserError, match="run 'make setup-metaworld'") as caught:
        load_family(name)
    assert "\n" not in str(caught.value)


def test_the_command_line_ends_with_2_and_lists_the_families_all_the_same():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ABSENT.format(list(arguments))]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    checked = run("check", "pipelines/metaworld-ml1/params.yaml")
    assert checked.returncode == 2
    assert re.fullmatch(r"error: [^\n]*make setup-metaworld[^\n]*\n", checked.stderr)
    listed = run("list")
    assert listed.returncode == 0
    assert all(f"  {name} " in listed.stdout for name in NAMES)


def test_the_pipelines_params_are_sound(pretended):
    cells = params.check(ROOT / "pipelines/metaworld-ml1/params.yaml")
    assert "meta_train@focal-expert-0" in cells


def test_reward_of_reaching_by_hand(pretended):
    family = load_family("metaworld-ml1")
    task = {"environment": "reach-v3", "start_and_goal": [0.0, 0.6, 0.02, 0.0, 0.9, 0.2]}
    hand = [0.0, 0.6, 0.2]  # 0.3 m away
    places = [[0, 0.86, 0.2], [0, 0.849, 0.2], [0, 0.55, 0.2], [0, 0.9, 0.4]]
    features = np.array([[*place, *hand] for place in places], dtype=np.float32)
    dense, sparse = family.reward(task, features, features, features, features)
    np.testing.assert_allclose(dense, [10, 10 / (1 + 9 * (0.001 / 0.3) ** 2), 1, 10 / 3.25], rtol=1e-4)
    assert sparse.tolist() == [1, 0, 0, 0]
    assert dense.dtype == sparse.dtype == np.float32


@pytest.mark.parametrize(("goals", "indices"), [(1, [0, 44, 45, 49]), (50, [0, 44, 45, 2249, 2250, 2499])])
def test_skills_take_turns_training_before_test(pretended, monkeypatch, goals, indices):
    lists = [
        [(f"{part}-{skill}", [goal]) for skill in range(count) for goal in range(50)]
        for part, count in (("a", 45), ("b", 5))
    ]
    monkeypatch.setattr(metaworld_ml45, "published", lambda benchmark, seed: lists)
    family = load_family("metaworld-ml45", {"goals": goals})
    names = {0: ("a-0", 0), 44: ("a-44", 0), 45: ("a-0", 1), 2249: ("a-44", 49), 2250: ("b-0", 0), 2499: ("b-4", 49)}
    if goals == 1:
        names |= {45: ("b-0", 0), 49: ("b-4", 0)}
    found = [family.sample(i, 0) for i in indices]
    assert [(task["environment"], *task["start_and_goal"]) for task in found] == [names[i] for i in indices]
    assert [task["index"] for task in found] == indices
    with pytest.raises(UserError, match=f"task index {50 * goals} is out of range"):
        family.sample(50 * goals, 0)


def test_relabelling_of_ml45_is_refused(pretended, tmp_path):
    family = load_family("metaworld-ml45", {"goals": 1})
    features = np.array([[2.5, 1, 3], [0.5, 0, 3]], dtype=np.float32)
    dense, sparse = family.reward({"index": 3}, features, features, features, features)
    assert (dense.tolist(), sparse.tolist()) == ([2.5, 0.5], [1, 0])
    with pytest.raises(UserError, match="cannot be computed for task 4 from transitions of task 3; expected 'relabel"):
        family.reward({"index": 4}, features, features, features, features)
    text = (ROOT / "pipelines/metaworld-ml1/params.yaml").read_text()
    assert "metaworld-ml1" in text
    text = text.replace("env: metaworld-ml1", "env: metaworld-ml45")
    (tmp_path / "params.yaml").write_text(text.replace("relabel: {}", "relabel: {relabelled: {source: mixed}}"))
    with pytest.raises(UserError, match=r"relabel\.relabelled: tasks of 'metaworld-ml45' differ in their dynamics"):
        params.check(tmp_path / "params.yaml")


def test_its_environment_is_the_other_one_but_for_the_simulator():
    def pins(name: str) -> set[str]:
        return {line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")}

    ours, theirs = pins("requirements.lock"), pins("requirements-metaworld.lock")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in theirs)
    assert {"mujoco==3.3.0", "metaworld==3.1.1"} <= theirs - ours
    assert {pin.partition("==")[0] for pin in ours - theirs} == {"mujoco", "mujoco-core", "mujoco-studio"}


# ------------------------------------------------------------------ the package itself


@pytest.fixture(scope="module")
def reach():
    return load_family("metaworld-ml1")


@extra
def test_tasks_are_the_benchmarks_own(reach):
    import metaworld

    own = metaworld.ML1("reach-v3", seed=5)
    pairs = [(i, task) for i, task in ((0, own.train_tasks[0]), (49, own.train_tasks[49]), (50, own.test_tasks[0]))]
    for index, task in pairs:
        environment = own.train_classes["reach-v3"]()
        environment.set_task(task)
        assert reach.sample(index, 5)["start_and_goal"] == environment._last_rand_vec.tolist()
    assert len({str(reach.sample(i, 5)) for i in range(100)}) == 100


@extra
def test_copies_that_take_turns_are_the_package_bit_for_bit(reach):
    """Two tasks, two copies, the package's own environment for each: observation, reward, success, a new start."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    tasks = [reach.sample(i, 0) for i in (0, 50)]
    batch, peers = reach.batch(tasks, 2), []
    for task in tasks:
        for _ in range(2):
            peers.append(ALL_V3_ENVIRONMENTS["reach-v3"]())
            chosen = {"rand_vec": np.array(task["start_and_goal"]), "env_cls": type(peers[-1])}
            peers[-1].set_task(_metaworld.package()._encode_task("reach-v3", {**chosen, "partially_observable": True}))
            peers[-1].reset()
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (40, 4, 4)).astype(np.float32)
    following = batch.observation
    for action in actions:
        before, result = following, batch.step(action)
        following = result.next_observation
        for row, peer in enumerate(peers):
            observation, reward, _, _, info = peer.step(np.clip(action[row], -1, 1))
            np.testing.assert_array_equal(following[row], observation.astype(np.float32))
            assert result.reward[row] == pytest.approx(reward, abs=1e-5)
            assert result.sparse_reward[row] == info["success"]
        again = reach.reward(tasks[1], before[2:], action[2:], following[2:], result.features[2:])
        np.testing.assert_array_equal(np.stack(again), np.stack([result.reward[2:], result.sparse_reward[2:]]))
    assert not following[:, 36:].any()  # the goal is hidden
    state, kept = batch.get_state(), batch.step(actions[0])
    other = reach.batch(tasks, 2)
    other.set_state(state)
    np.testing.assert_array_equal(other.step(actions[0]).next_observation, kept.next_observation)
    batch.reset(rows=np.array([3]))
    np.testing.assert_array_equal(batch.observation[3], reach.batch(tasks[1:]).observation[0])
    np.testing.assert_array_equal(batch.observation[:3], kept.next_observation[:3])


@extra
def test_gymnasium_accepts_the_single_form(reach):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observations are what they are
        check_env(reach.make(reach.sample(0, 0)).unwrapped, skip_render_check=True)


@extra
def test_a_picture_shows_the_copy_that_is_asked_for(reach):
    batch = reach.batch([reach.sample(0, 0)], 2)
    batch.step(np.array([[1, 1, 0, 0], [-1, -1, 0, 0]], dtype=np.float32))
    try:
        first = batch.render(0)
    except UserError:
        pytest.skip("no OpenGL here")
    assert (first.shape, first.dtype) == ((480, 480, 3), np.uint8)
    assert not np.array_equal(first, batch.render(1))


@extra
def test_random_hands_collect_less_than_ones_that_reach(reach):
    task = reach.sample(0, 0)
    batch, total = reach.batch([task]), 0.0
    goal = np.array(task["start_and_goal"][3:])
    for _ in range(reach.horizon):
        seen = batch.observation[0, :3]
        move = np.clip((goal - seen) / 0.05, -1, 1)
        total += batch.step(np.append(move, 0).astype(np.float32)[None]).reward[0]
    assert total > 3000
    assert 0 < reach.random_return(task) < 1500


@extra
@pytest.mark.parametrize("name", NAMES)
def test_rollouts_keep_the_schema_and_their_rewards(name, tmp_path):
    family = load_family(name, {"goals": 1} if name == "metaworld-ml45" else {})
    setting = RolloutsConfig(episodes_per_checkpoint=2, deterministic_episodes=1, horizon=20)
    skills = set()
    for index in (0, family.capacity - 1):
        task = family.sample(index, 1337)
        skills.add(task["environment"])
        columns, episodes = rollout(Uniform(), family, task, index=index, checkpoint=0, config=setting, seed=3)
        write_transitions(tmp_path / "rows.parquet", columns, {"environment": family.spec(), "task": task})
        read = read_transitions(tmp_path / "rows.parquet")
        assert all(read[key].tobytes() == columns[key].tobytes() for key in columns)
        assert len(read["step"]) == 60
        assert np.isfinite(read["observation"]).all()
        assert (episodes["return"] > 0).all()
        relabelled = relabel_rows(read, index, task, family.reward)
        assert relabelled["reward"].tobytes() == columns["reward"].tobytes()
        assert relabelled["sparse_reward"].tobytes() == columns["sparse_reward"].tobytes()
    assert len(skills) == (2 if name == "metaworld-ml45" else 1)
    assert family.spec()["metaworld"] == "3.1.1"
