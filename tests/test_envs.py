"""Contract of every environment family, and the point robots' published numbers."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import omrl
from omrl.core import registry
from omrl.core.errors import UserError
from omrl.envs._point import PointConfig, sparsify
from omrl.envs.base import Family, load_family

FAMILIES = [name for name in registry.names("omrl.envs") if "point-robot" in name]
EXTRA = pytest.mark.skipif(not importlib.util.find_spec("metaworld"), reason="needs 'make setup-metaworld'")
ALL = [pytest.param(name, marks=EXTRA if name.startswith("metaworld-") else ()) for name in registry.names("omrl.envs")]


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return load_family(request.param)


def streams(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(i) for i in range(count)]


def test_a_point_robot_is_drawn_with_goal_disc_and_path(family):
    task = family.sample(1, 0)
    env = gymnasium.make(family.env_id, task=task, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (480, 480, 3)
    first = env.render()
    observation, *_ = env.step(np.array([1.0, -1.0], dtype=np.float32))
    picture = env.render()
    assert not np.array_equal(picture, first)

    def pixel(x: float, y: float) -> list[int]:
        return picture[int((2 - y) * 120), int((x + 2) * 120)].tolist()

    assert pixel(*observation) == [0, 114, 178]  # the robot, y upwards
    assert pixel(*task["goal"]) == [0, 158, 115]
    beside = pixel(task["goal"][0] + 0.13, task["goal"][1] + 0.02)
    assert (beside != [255, 255, 255]) == (family.returns == "sparse")  # inside the disc of radius 0.2
    far = family.batch([task])
    far.observation = np.array([[50.0, -3.0]], dtype=np.float32)
    assert far.render().shape == (480, 480, 3)  # out of the picture
    assert gymnasium.make(family.env_id).render_mode is None


def test_importing_omrl_registers_every_family_and_outlives_a_broken_one():
    code = (
        "import gymnasium, omrl; from omrl.core import registry; "
        "ids = {i for i in gymnasium.registry if i.startswith('OMRL/')}; "
        "assert len(ids) == len(registry.names('omrl.envs')) > 10, ids; "
        "print(gymnasium.make('OMRL/PointRobot-v0').spec.max_episode_steps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "20"
    direct = "import gymnasium; print(gymnasium.make('omrl:OMRL/AntDir-v0').spec.id)"
    done = subprocess.run([sys.executable, "-c", direct], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OMRL/AntDir-v0"
    broken = "import sys; sys.modules['mujoco'] = None; import omrl.provenance.lockfile; print(omrl.__version__)"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == omrl.__version__


def test_a_threshold_makes_inference_see_the_sparse_reward():
    assert load_family("half-cheetah-dir", {"sparse_threshold": 6.0}).inference_reward == "sparse"
    assert load_family("sparse-cheetah-dir", {"sparse_threshold": None}).inference_reward == "dense"


def test_unknown_names_and_configurations_are_user_errors():
    with pytest.raises(UserError, match="did you mean 'point-robot-wind'"):
        load_family("point-robot-windy")
    with pytest.raises(UserError, match=r"radius = 0: expected greater than 0"):
        load_family("sparse-point-robot", {"radius": 0})


def oracles(config: dict) -> np.ndarray:
    family = load_family("sparse-point-robot", config)
    return np.array([family.oracle_return(family.sample(i, 1337)) for i in range(100)])


@pytest.mark.parametrize(
    ("form", "radius", "mean", "deviation", "low", "high"),
    [
        ("one-minus-distance", 0.2, 13.375, 0.783, 12.70, 14.84),
        ("eq35", 0.2, 12.475, 0.858, 11.50, 14.18),
        ("one-minus-distance", 0.5, 15.164, 0.609, 14.5, 16.1),
        ("eq35", 0.5, 13.909, 0.756, 13.0, 15.2),
    ],
)
def test_sparse_point_robot_bounds(form, radius, mean, deviation, low, high):
    found = oracles({"sparse_reward": form, "radius": radius})
    assert found.mean() == pytest.approx(mean, abs=6e-4)
    assert found.std() == pytest.approx(deviation, abs=6e-4)
    assert found.min() == pytest.approx(low, abs=0.03)
    assert found.max() == pytest.approx(high, abs=0.03)


def test_sparse_point_robot_goals_are_the_published_grid_whatever_the_seed():
    family = load_family("sparse-point-robot")
    angles = sorted(math.atan2(*family.sample(i, 5)["goal"][::-1]) % (2 * math.pi) for i in range(100))
    np.testing.assert_allclose(angles, np.pi * np.arange(100) / 99, atol=1e-12)


def test_dense_return_of_oracle_and_of_random_actions():
    family = load_family("sparse-point-robot")
    family.returns = "dense"
    tasks = [family.sample(i, 1337) for i in range(100)]
    assert np.mean([family.oracle_return(t) for t in tasks]) == pytest.approx(-3.847, abs=1e-3)
    assert np.mean([family.random_return(t) for t in tasks]) == pytest.approx(-20.37, abs=0.05)
    sparse = load_family("sparse-point-robot")
    assert max(sparse.random_return(t) for t in tasks) < 0.01


def test_wind_bounds():
    family = load_family("point-robot-wind")
    tasks = [family.sample(i, 1337) for i in range(50)]
    oracle = np.array([family.oracle_return(t) for t in tasks])
    blind = np.array([family.references(t)["wind-blind"] for t in tasks])
    assert oracle.mean() == pytest.approx(-5.114, abs=5e-4)
    assert oracle.std() == pytest.approx(1.685, abs=5e-3)
    assert (oracle.min(), oracle.max()) == pytest.approx((-9.44, -2.86), abs=6e-3)
    assert blind.mean() == pytest.approx(-5.464, abs=6e-4)
    assert np.mean([family.controlled_return(t, (0, 0), 25) for t in tasks]) == pytest.approx(-5.646, abs=6e-4)


def test_winds_are_the_published_ones_whatever_the_seed():
    family = load_family("point-robot-wind")
    found = {tuple(np.round(family.sample(i, 3)["wind"], 5)) for i in range(50)}
    published = {(-0.0238, 0.0336), (-0.03413, 0.01102), (-0.02219, 0.00645), (-0.00407, 0.04974), (-0.0179, -0.02453)}
    near = [min(abs(x - a) + abs(y - b) for a, b in found) for x, y in published]
    assert max(near) < 2e-4
    assert len(found) == 50


def test_point_robot_goals_are_the_legacy_stream():
    legacy = np.random.RandomState(1337).uniform(-1, 1, 20).reshape(10, 2)
    family = load_family("point-robot")
    np.testing.assert_array_equal([family.sample(i, 1337)["goal"] for i in range(10)], legacy)


def test_left_right_has_the_same_goals_each_on_its_side():
    same, sides = (
        np.array([task["goal"] for task in load_family("point-robot", {"split": split}).tasks(30, 20, 1337)])
        for split in ("same", "left-right")
    )
    np.testing.assert_array_equal(abs(same), abs(sides))
    np.testing.assert_array_equal(same[:, 1], sides[:, 1])
    assert (sides[:30, 0] < 0).all()
    assert (sides[30:, 0] > 0).all()
    assert (same[:30, 0] > 0).any()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 3, width=32),
    st.floats(0.05, 1).map(lambda r: round(r, 3)),
    st.sampled_from(["one-minus-distance", "eq35"]),
)
def test_sparse_reward_is_zero_outside_and_rises_towards_the_goal(distance, radius, form):
    config = PointConfig(radius=radius, sparse_reward=form)
    value, nearer = sparsify(np.array([-distance, -distance / 2], dtype=np.float32), config)
    if distance > radius * 1.0001:
        assert value == 0
    elif distance < radius * 0.9999:
        expected = 1 - distance if form == "one-minus-distance" else (radius - distance) / radius
        assert value == pytest.approx(expected, abs=1e-5)
        assert nearer >= value


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(-3, 3, width=32), st.floats(-3, 3, width=32))
def test_dense_reward_is_the_negative_distance(index, x, y):
    family = load_family("sparse-point-robot")
    task = family.sample(index, 0)
    rows = np.array([[x, y]], dtype=np.float32)
    empty = np.zeros((1, 0), np.float32)
    dense, _ = family.reward(task, rows, rows, rows, empty)
    assert dense[0] == pytest.approx(-math.dist((x, y), task["goal"]), rel=1e-5, abs=1e-5)


def test_importing_envs_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, omrl.envs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_are_file_names_and_ids_are_unique():
    names = registry.names("omrl.envs")
    families = [registry.load("omrl.envs", name).FAMILY for name in names]
    assert [family.name for family in families] == names
    assert len({family.env_id for family in families}) == len(families)
    assert families[0].env_id in gymnasium.registry


def test_published_facts_of_the_families():
    facts = {
        name: (f.capacity, f.horizon, f.varies, f.returns, f.context_next_observation, f.feature_size)
        for name in ("sparse-point-robot", "point-robot", "point-robot-wind")
        for f in [load_family(name)]
    }
    assert facts == {
        "sparse-point-robot": (100, 20, "reward", "sparse", False, 0),
        "point-robot": (None, 20, "reward", "dense", False, 0),
        "point-robot-wind": (50, 20, "dynamics", "dense", True, 0),
    }


@pytest.mark.parametrize("name", ["sparse-point-robot", "point-robot", "point-robot-wind"])
def test_where_episodes_start(name):
    family = load_family(name)
    starts = family.batch([family.sample(0, 0)], 2000).reset(streams(2000))
    if name == "point-robot":
        assert np.abs(starts).max() <= 1
        np.testing.assert_allclose(
            np.quantile(starts, [0.25, 0.5, 0.75], axis=0), [[-0.5] * 2, [0] * 2, [0.5] * 2], atol=0.08
        )
        assert abs(np.corrcoef(starts.T)[0, 1]) < 0.1
    else:
        assert not starts.any()


def test_borels_point_robot():
    config = {"horizon": 60, "start": "half-plane", "sparse_reward": "indicator"}
    family = load_family("sparse-point-robot", config)
    starts = family.batch([family.sample(0, 0)], 2000).reset(streams(2000))
    assert starts.min(0) == pytest.approx([-1.5, -0.5], abs=0.02)
    assert starts.max(0) == pytest.approx([1.5, 1.5], abs=0.02)
    assert starts.mean(0) == pytest.approx([0, 0.5], abs=0.08)
    assert family.horizon == family.spec()["horizon"] == family.make(family.sample(0, 0)).spec.max_episode_steps == 60
    points = np.array([[0.85, 0.0], [0.75, 0.0]], np.float32)
    dense, sparse = family.reward({"goal": [1.0, 0.0]}, points, points, points, points[:, :0])
    assert dense == pytest.approx([-0.15, -0.25])
    assert sparse.tolist() == [1.0, 0.0]
    # every start is within 1.6 + 10 pushes of the disc: what is missing to 60 is the way, on average
    task = {"goal": [1.0, 0.0]}
    rng = np.random.default_rng(0)
    place = rng.uniform([-1.5, -0.5], [1.5, 1.5], (100_000, 2))
    total = 0.0
    for _ in range(60):
        place = place + np.clip(np.array(task["goal"]) - place, -0.1, 0.1)
        total += (np.linalg.norm(place - task["goal"], axis=1) <= 0.2).mean()
    assert family.oracle_return(task) == pytest.approx(total, abs=0.1)
    assert 0 < family.random_return(task) < 3
    assert family.restated() is None


def test_starts_of_a_point_robot_can_be_fixed():
    family = load_family("point-robot", {"start": "origin"})
    assert not family.batch([family.sample(0, 0)], 5).reset(streams(5)).any()
    assert family.controlled_return({"goal": [0.1, 0.0]}, (0.0, 0.0)) == 0


def test_the_two_published_forms_of_the_sparse_return():
    family = load_family("sparse-point-robot")
    other = family.restated()
    assert (family.reward_form, other.reward_form) == ("1 - d", "Eq. 35")
    assert other.restated().config == family.config
    assert load_family("sparse-point-robot", {"sparse_reward": "eq35", "radius": 2.0}).restated() is None
    assert load_family("point-robot").restated() is None
    assert load_family("half-cheetah-dir").restated() is None


def test_relabelling_may_change_what_the_family_allows():
    family = load_family("sparse-point-robot")
    assert family.relabelled({"radius": 0.5}, "x").config.resolved() == {**family.config.resolved(), "radius": 0.5}
    assert family.relabelled({}, "x").config == family.config
    with pytest.raises(
        UserError, match=r"^x\.env_config\.horizon: relabelling changes rewards alone; expected radius, "
    ):
        family.relabelled({"horizon": 3}, "x")
    with pytest.raises(UserError, match=r"^x\.env_config\.radius = 0: expected greater than 0"):
        family.relabelled({"radius": 0}, "x")
    with pytest.raises(UserError, match=r"^x: tasks of 'point-robot-wind' differ in their dynamics"):
        load_family("point-robot-wind").relabelled({}, "x")
    with pytest.raises(UserError, match=r"env_config\.torso: .*expected sparse_threshold"):
        load_family("half-cheetah-vel").relabelled({"torso": 1}, "x")


def test_point_robot_bounds_against_an_independent_mean_over_starts():
    family = load_family("point-robot")
    task = family.sample(0, 1337)
    rng = np.random.default_rng(0)
    place, lost = rng.uniform(-1, 1, (200_000, 2)), rng.uniform(-1, 1, (100_000, 2))
    goal, best, floor = np.array(task["goal"]), 0.0, 0.0
    for _ in range(20):
        place = place + np.clip(goal - place, -0.1, 0.1)
        lost = lost + rng.uniform(-0.1, 0.1, lost.shape)
        best -= np.linalg.norm(place - goal, axis=1).mean()
        floor -= np.linalg.norm(lost - goal, axis=1).mean()
    assert family.oracle_return(task) == pytest.approx(best, abs=0.04)  # four standard errors
    assert family.random_return(task) == pytest.approx(floor, abs=0.65)


def test_batched_steps_stay_in_float32_and_refuse_other_shapes(family):
    batch = family.batch([family.sample(0, 0)], 3)
    batch.reset(streams(3))
    result = batch.step(np.full((3, family.action_size), 0.3))  # float64
    assert result.next_observation.dtype == result.reward.dtype == result.sparse_reward.dtype == np.float32
    assert batch.observation.dtype == np.float32
    assert result.features.shape == (3, family.feature_size)
    for shape in [(family.action_size,), (1, family.action_size), (5, family.action_size)]:
        with pytest.raises(ValueError, match="expected"):
            batch.step(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    ("radius", "form"), [(1.5, "one-minus-distance"), (1e-9, "eq35"), (11, "eq35"), (-0.2, "eq35")]
)
def test_a_radius_without_meaning_is_refused(radius, form):
    with pytest.raises(UserError, match="radius = "):
        load_family("sparse-point-robot", {"radius": radius, "sparse_reward": form})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-math.pi, math.pi), st.floats(-2, 2), st.floats(-2, 2))
def test_rewards_depend_on_the_relative_position_only(seed, angle, dx, dy):
    family = load_family("sparse-point-robot", {"radius": 0.5})
    rng = np.random.default_rng(seed)
    goal, rows = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, (20, 2))
    rows = rows[np.abs(np.linalg.norm(rows - goal, axis=1) - 0.5) > 1e-4]  # not on the rim
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def rewards(place, points):
        points = points.astype(np.float32)
        return family.reward({"goal": place.tolist()}, points, points, points, np.zeros((len(points), 0), np.float32))

    moved = rewards(turn @ goal + [dx, dy], rows @ turn.T + [dx, dy])
    for before, after in zip(rewards(goal, rows), moved, strict=True):
        np.testing.assert_allclose(after, before, atol=2e-5)
