"""Sawyer-Affordances: tasks, rewards from stored features, the scripted collector, rollouts in the schema.

The contract of all MuJoCo families (batched as single, state, resets, check_env) runs in test_mujoco_envs.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from omrl.behavior.rollouts import RolloutsConfig, rollout
from omrl.core.errors import UserError
from omrl.data.parquet import read_transitions, write_transitions
from omrl.data.relabel import relabel_rows
from omrl.envs.base import load_family
from omrl.envs.sawyer_affordances import AIMS, TOLERANCE, ScriptedCollector

FAMILY = load_family("sawyer-affordances")
TASKS = [FAMILY.sample(i, 0) for i in range(40)]
SETTING = RolloutsConfig(episodes_per_checkpoint=4, deterministic_episodes=0, horizon=75)


def first(aim: str) -> dict:
    return next(task for task in TASKS if task["aim"] == aim)


def play(task: dict, seed: int = 0, skill: str | None = None):
    actor = ScriptedCollector(task, [skill or task["aim"]] * SETTING.episodes_per_checkpoint)
    return rollout(actor, FAMILY, task, index=0, checkpoint=0, config=SETTING, seed=seed)


def success(columns: dict) -> float:
    met = columns["sparse_reward"] == 0
    return float(np.mean([met[columns["episode"] == i].any() for i in range(4)]))


def test_every_aim_is_drawn_and_possible_in_its_scene():
    assert {task["aim"] for task in TASKS} == set(AIMS)
    for task in TASKS:
        assert task["aim"] != "object-in-tray" or (task["object"] and task["tray"])
        assert task["aim"] != "open-drawer" or (task["drawer"] and not task["drawer_open"])
        assert task["aim"] != "close-drawer" or (task["drawer"] and task["drawer_open"])
        assert task["object"] != task["tray"] or not task["object"]


@pytest.mark.parametrize("aim", AIMS)
def test_the_script_does_what_the_task_wants(aim):
    assert success(play(first(aim))[0]) >= 0.75


def test_no_aim_is_met_where_episodes_start_and_scenes_start_as_their_own():
    batch = FAMILY.batch(TASKS, 2)
    seen = batch.reset([np.random.default_rng(i) for i in range(2 * len(TASKS))])
    opening = np.where(seen[:, 7] == 0, 0, 0.19 - np.abs(seen[:, 7]))
    features = np.column_stack([seen[:, :3], seen[:, 4:7], opening, seen[:, 8]]).astype(np.float32)
    for i, task in enumerate(TASKS):
        assert (FAMILY.reward(task, seen, seen, seen, features)[1][2 * i : 2 * i + 2] == -1).all()
        np.testing.assert_allclose(seen[2 * i, 4:6], task["object"] or [0, 0], atol=1e-6)
        handle = task["side"] * (0.07 if task["drawer_open"] else 0.19) if task["drawer"] else 0
        assert seen[2 * i, 7] == pytest.approx(handle)
        assert seen[2 * i, 9] == pytest.approx(-0.1 * task["side"] if task["button"] else 0)


@pytest.mark.parametrize("aim", [aim for aim in AIMS if aim != "move-hand"])
def test_a_hand_that_moves_elsewhere_does_not_succeed(aim):
    assert success(play(first(aim), skill="move-hand")[0]) == 0


def test_absent_parts_are_zeros():
    for part, entries in (("object", slice(4, 7)), ("drawer", slice(7, 8)), ("button", slice(8, 10))):
        task = next(task for task in TASKS if not task[part])
        columns, _ = play(task)
        assert not columns["observation"][:, entries].any()
        assert not columns["next_observation"][:, entries].any()


def test_rewards_by_hand():
    features = np.array([[0.6, 0, 0.2, 0.55, 0.1, 0.02, 0.1, 0.015]], dtype=np.float32)
    expected = {"move-hand": 0.1, "open-drawer": 0.02, "close-drawer": 0.1, "press-button": 0.005}
    for aim, missing in expected.items():
        task = {**TASKS[0], "aim": aim, "goal": [0.6, 0.0, 0.1]}
        dense, sparse = FAMILY.reward(task, features, features, features, features)
        np.testing.assert_allclose(dense, [-missing], atol=1e-6)
        assert sparse[0] == (0 if missing < TOLERANCE[AIMS.index(aim)] else -1)


def test_rollouts_keep_the_schema_their_seed_and_their_rewards(tmp_path):
    task = first("object-in-tray")
    columns, episodes = play(task, seed=3)
    again, _ = play(task, seed=3)
    assert all(columns[name].tobytes() == again[name].tobytes() for name in columns)
    assert columns["action"].tobytes() != play(task, seed=4)[0]["action"].tobytes()
    relabelled = relabel_rows(columns, 0, task, FAMILY.reward)
    assert relabelled["reward"].tobytes() == columns["reward"].tobytes()
    assert relabelled["sparse_reward"].tobytes() == columns["sparse_reward"].tobytes()
    write_transitions(tmp_path / "rows.parquet", columns, {"environment": FAMILY.spec(), "task": task})
    read = read_transitions(tmp_path / "rows.parquet")
    assert all(read[name].tobytes() == columns[name].tobytes() for name in columns)
    np.testing.assert_array_equal(episodes["return"], episodes["sparse_return"])
    assert (episodes["length"] == 75).all()


def test_random_skills_are_those_of_the_scene():
    task = next(task for task in TASKS if not task["drawer"] and task["object"])
    skills = ScriptedCollector.skills(task, 200, np.random.default_rng(0))
    assert "open-drawer" not in skills
    assert {"move-hand", "move-object"} <= set(skills)


def test_no_negative_task():
    with pytest.raises(UserError, match="task index -1 is out of range"):
        FAMILY.sample(-1, 0)


def test_one_reward_for_actor_and_inference():
    """SMAC's domain has one reward; a self-labelling model infers from what it labels."""
    family = load_family("sawyer-affordances", {"reward": "success"})
    task = family.task_array(family.sample(3, 0))[None].repeat(50, 0)
    features = np.random.default_rng(0).uniform(-0.2, 0.8, (50, family.feature_size)).astype(np.float32)
    dense, sparse = family.rewards(task, features, features)
    assert family.inference_reward == "dense"
    np.testing.assert_array_equal(dense, sparse)
    np.testing.assert_array_equal(family.dense(task, features, features), sparse)
    assert set(np.unique(sparse)) <= {-1.0, 0.0}
    assert FAMILY.inference_reward == "sparse"
