"""The contract of the MuJoCo families, the tasks the papers published, and Gymnasium's own environments."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest

from omrl.core import registry
from omrl.core.errors import UserError
from omrl.envs import _opengl, _rand_params
from omrl.envs._mujoco import MujocoFamily, sparsify
from omrl.envs.base import load_family

NAMES = [
    name for name in registry.names("omrl.envs") if issubclass(registry.load("omrl.envs", name).FAMILY, MujocoFamily)
]
EXPECTED = {  # observation, action, varies, sparse threshold
    "ant-dir": (27, 8, "reward", None),
    "ant-dir-2": (27, 8, "reward", None),
    "ant-goal": (113, 8, "reward", None),
    "half-cheetah-dir": (20, 6, "reward", None),
    "half-cheetah-vel": (20, 6, "reward", None),
    "hopper-rand-params": (11, 3, "dynamics", None),
    "humanoid-dir": (376, 17, "reward", None),
    "sparse-ant-dir": (27, 8, "reward", 3.0),
    "sparse-cheetah-dir": (20, 6, "reward", 6.0),
    "sparse-cheetah-vel": (20, 6, "reward", -0.1),
    "sparse-walker": (17, 6, "dynamics", 0.5),
    "walker-rand-params": (17, 6, "dynamics", None),
}


@pytest.fixture(params=NAMES)
def family(request) -> MujocoFamily:
    return load_family(request.param)


def streams(count: int, first: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng(first + i) for i in range(count)]


def actions(family, steps: int, rows: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.2, 1.2, (steps, rows, family.action_size)).astype(np.float32)


def test_the_families_are_those_of_the_papers():
    found = {
        name: (f.observation_size, f.action_size, f.varies, f.physics_config.sparse_threshold)
        for name in NAMES
        for f in [load_family(name)]
    }
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert all(load_family(name).horizon == 200 for name in EXPECTED)
    assert all(load_family(name).context_next_observation == (row[2] == "dynamics") for name, row in EXPECTED.items())


def opengl() -> bool:
    try:
        _opengl._context()
    except UserError:
        return False
    return True


def test_a_picture_shows_the_scene_or_one_line_says_why_not(family):
    env = gymnasium.make(family.env_id, render_mode="rgb_array")
    env.reset(seed=0)
    if not opengl():
        with pytest.raises(UserError, match=r"no picture: OpenGL by .* does not work here.*libegl1"):
            env.render()
        return
    first = env.render()
    assert (first.shape, first.dtype) == ((480, 480, 3), np.uint8)
    assert first.std() > 10  # not one color
    for _ in range(5):
        env.step(np.ones(family.action_size, dtype=np.float32))
    assert not np.array_equal(env.render(), first)
    batch = family.batch([family.sample(0, 1337)], 2)
    batch.reset([np.random.default_rng(0), np.random.default_rng(1)])
    assert not np.array_equal(batch.render(0), batch.render(1))


def test_without_opengl_one_line_names_the_way_out():
    code = (
        "from omrl.core.errors import run\nfrom omrl.envs.base import load_family\n"
        "f = load_family('ant-dir')\nrun(lambda: print(f.picture(f.sample(0, 0))))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**environment, "MUJOCO_GL": "glfw"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: no picture: .*MUJOCO_GL=egl or (MUJOCO_GL=)?osmesa", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ published tasks


def test_a_new_start_needs_a_stream_per_copy(family):
    batch = family.batch([family.sample(0, 0)], 2)
    with pytest.raises(ValueError, match="one generator per copy"):
        batch.reset(streams(2), np.array([0]))


def test_the_velocities_of_focal_and_macaw():
    focal = load_family("half-cheetah-vel")
    velocities = [focal.sample(i, 0)["velocity"] for i in range(100)]
    assert np.round(velocities[:5], 5).tolist() == [0.78607, 0.47605, 0.83438, 1.37795, 0.963]
    published = [2.172, 2.379, 1.055, 2.729, 2.139, 2.692, 1.261, 1.403, 2.712, 1.901]
    published += [1.598, 0.713, 2.840, 1.678, 2.272, 0.708, 1.289, 1.182, 1.532, 0.376]
    np.testing.assert_allclose(velocities[80:], published, atol=5e-4)
    assert np.mean(velocities[:80]) == pytest.approx(1.473, abs=5e-4)
    assert np.mean(velocities[80:]) == pytest.approx(1.731, abs=5e-4)
    assert (focal.capacity, load_family("half-cheetah-vel", {"task_list": "uniform"}).capacity) == (130, None)

    macaw = load_family("half-cheetah-vel", {"task_list": "macaw"})
    velocities = [macaw.sample(i, 0)["velocity"] for i in range(40)]
    np.testing.assert_allclose(velocities[35:], [0.225, 0.6, 1.2, 1.8, 2.025], atol=1e-12)
    np.testing.assert_allclose(sorted(velocities), np.linspace(0.075, 3.0, 40), atol=1e-12)
    assert velocities[:35] == sorted(velocities[:35])
    faster = load_family("half-cheetah-vel", {"task_list": "macaw-faster"}).tasks(26, 14, 0)
    velocities = [task["velocity"] for task in faster]
    np.testing.assert_allclose(velocities, np.linspace(0.075, 3.0, 40), atol=1e-12)
    assert (velocities[25], velocities[26]) == (pytest.approx(1.95), pytest.approx(2.025))

    uniform = load_family("half-cheetah-vel", {"task_list": "uniform"})
    draws = np.array([uniform.sample(i, 0)["velocity"] for i in range(2000)])
    assert draws.mean() == pytest.approx(1.5, abs=0.07)
    assert 0 <= draws.min() < draws.max() <= 3


def test_the_directions():
    cheetah = load_family("half-cheetah-dir")
    assert [cheetah.sample(i, 0)["direction"] for i in range(4)] == [-1.0, 1.0, -1.0, 1.0]
    ant = load_family("ant-dir-2")
    assert [ant.sample(i, 0)["angle"] for i in range(4)] == [0.0, math.pi, 0.0, math.pi]
    smac = load_family("ant-dir")
    degrees = [math.degrees(smac.sample(i, 0)["angle"]) for i in range(4)]
    np.testing.assert_allclose(degrees, [94.3289, 57.1262, 100.1255, 165.3541], atol=5e-5)
    assert smac.capacity == 120


def test_goals_lie_on_the_disc():
    family = load_family("ant-goal")
    goals = np.array([family.sample(i, 0)["goal"] for i in range(3000)])
    radius = np.linalg.norm(goals, axis=1)
    assert radius.max() <= 3
    assert np.mean(radius < 3 / math.sqrt(2)) == pytest.approx(0.5, abs=0.03)  # half of the area
    np.testing.assert_allclose(goals.mean(0), 0, atol=0.08)


# --------------------------------------------------------- Gymnasium's environments


def follow(family, env_id: str, frame_skip: int, seed: int = 1, steps: int = 30, **options):
    """Yield (ours, Gymnasium's observation, info, environment) along the same actions from the same start."""
    task = family.sample(0, 0)
    batch = family.batch([task])
    batch.reset(streams(1, seed))
    peer = gymnasium.make(env_id, **options).unwrapped
    peer.reset(seed=0)
    nq, nv = peer.model.nq, peer.model.nv
    peer.set_state(batch._state[0, 1 : 1 + nq].copy(), batch._state[0, 1 + nq : 1 + nq + nv].copy())
    peer.data.qacc_warmstart[:] = 0
    assert peer.frame_skip == frame_skip
    low, high = peer.model.actuator_ctrlrange.T
    for action in actions(family, steps, 1):
        ours = batch.step(action)
        control = low + (np.clip(action[0], -1, 1).astype(np.float64) + 1) / 2 * (high - low)
        observation, _, terminated, _, info = peer.step(control)
        yield ours, observation, info, peer, terminated


@pytest.mark.parametrize(("variant", "size"), [("papers", 20), ("gymnasium", 17)])
def test_half_cheetah_moves_like_gymnasiums(variant, size):
    family = load_family("half-cheetah-vel", {"observation": variant})
    assert family.observation_size == size
    for ours, observation, info, peer, _ in follow(family, "HalfCheetah-v5", 5):
        np.testing.assert_allclose(ours.next_observation[0, :17], observation, atol=2e-5)
        assert ours.features[0, 0] == pytest.approx(info["x_velocity"], abs=1e-4)
        assert ours.features[0, 1] == pytest.approx(-info["reward_ctrl"] / 2, abs=1e-5)  # 0.05 where it has 0.1
        assert ours.reward[0] == pytest.approx(-abs(info["x_velocity"] - 0.78607) + info["reward_ctrl"] / 2, abs=1e-4)
        if variant == "papers":
            np.testing.assert_allclose(ours.next_observation[0, 17:], peer.data.body("torso").xpos, atol=2e-5)


@pytest.mark.parametrize("cost", ["none", "measured"])
def test_ant_moves_like_gymnasiums(cost):
    family = load_family("ant-dir-2", {"contact_cost": cost})
    contact = []
    for ours, observation, info, _, terminated in follow(family, "Ant-v5", 5, include_cfrc_ext_in_observation=False):
        np.testing.assert_allclose(ours.next_observation[0], observation, atol=5e-4)
        assert ours.features[0, 0] == pytest.approx(info["x_velocity"], abs=0.05)  # Gymnasium's is the last stage's
        assert ours.features[0, 2] == pytest.approx(-info["reward_ctrl"], abs=1e-5)
        assert ours.terminated[0] == terminated
        contact.append((ours.features[0, 3], -info["reward_contact"]))
    ours, peers = np.array(contact).T
    assert peers.max() > 1e-3
    if cost == "none":
        assert not ours.any()
    else:
        # Gymnasium's are those of the last Runge-Kutta stage: a contact may begin or end between it and the end
        assert np.mean(np.abs(ours - peers) < 1e-3) >= 0.8
        assert ours.mean() == pytest.approx(peers.mean(), rel=0.25)


def test_ant_goal_observes_places_and_forces():
    family = load_family("ant-goal", {"contact_cost": "measured"})
    forces = []
    for ours, observation, _, peer, _ in follow(
        family, "Ant-v5", 5, exclude_current_positions_from_observation=False, terminate_when_unhealthy=False
    ):
        np.testing.assert_allclose(ours.next_observation[0, :29], observation[:29], atol=5e-4)
        assert np.abs(ours.next_observation[0, 29:]).max() <= 1
        np.testing.assert_allclose(ours.features[0, :2], peer.data.qpos[:2], atol=5e-4)
        forces.append(ours.next_observation[0, 29:])
        assert ours.features[0, 3] == pytest.approx(5e-4 * (forces[-1] ** 2).sum(), abs=1e-6)
    assert np.abs(forces).max() == 1
    assert not load_family("ant-goal").batch([family.sample(0, 0)]).step(np.ones((1, 8))).next_observation[0, 29:].any()


def test_humanoid_observes_what_gymnasiums_does():
    family = load_family("humanoid-dir", {"contact_cost": "measured"})
    shown, forces = [], []
    for ours, observation, info, peer, _ in follow(family, "Humanoid-v5", 5, steps=12):
        np.testing.assert_allclose(ours.next_observation[0, :45], observation[:45], atol=1e-3)
        mine = ours.next_observation[0]
        inertia = mine[45:185].reshape(14, 10)[1:].ravel()  # v5 leaves the world out
        np.testing.assert_allclose(inertia, observation[45:175], rtol=0.02, atol=0.02)
        np.testing.assert_allclose(mine[269:292][6:], observation[253:270], rtol=1e-4, atol=1e-4)
        assert ours.features[0, 2] == pytest.approx(-info["reward_ctrl"], abs=1e-5)
        # displacement per simulator step of 0.003 s where Gymnasium divides by the step's 0.015 s
        shown.append((ours.features[0, 0] / 5, info["x_velocity"]))
        forces.append(mine[292:])
        assert ours.features[0, 3] == pytest.approx(min(5e-7 * (forces[-1].astype(float) ** 2).sum(), 10), rel=1e-4)
        assert peer.model.opt.timestep == 0.003
    mine, peers = np.array(shown).T
    np.testing.assert_allclose(mine, peers, atol=0.05)
    assert np.abs(forces).max() > 1


def test_humanoid_has_no_contact_forces_where_none_are_asked_for():
    families = [load_family("humanoid-dir", {"contact_cost": cost}) for cost in ("none", "measured")]
    envs = [family.batch([family.sample(0, 0)]) for family in families]
    for env in envs:
        env.reset([np.random.default_rng(0)])
    for _ in range(12):
        none, measured = (env.step(np.ones((1, 17), dtype=np.float32)) for env in envs)
    assert not none.next_observation[0, 292:].any()
    assert none.features[0, 3] == 0 < measured.features[0, 3]
    np.testing.assert_array_equal(none.next_observation[0, :292], measured.next_observation[0, :292])


def test_sparse_walkers_have_the_walkers_bodies():
    dense, sparse = load_family("walker-rand-params"), load_family("sparse-walker")
    assert dense.sample(3, 7) == sparse.sample(3, 7) != dense.sample(4, 7)


@pytest.mark.parametrize(
    ("name", "env_id"), [("walker-rand-params", "Walker2d-v5"), ("hopper-rand-params", "Hopper-v5")]
)
def test_nominal_bodies_move_like_gymnasiums(name, env_id, monkeypatch):
    family = load_family(name, {"refresh_constants": False})
    sizes = {key: getattr(_rand_params._nominal(family.xml), key).size for key in _rand_params.ARRAYS}
    task = {key: [1.0] * size for key, size in sizes.items()}
    monkeypatch.setattr(type(family), "sample", lambda self, index, seed: task)
    peer_model = copy.copy(gymnasium.make(env_id).unwrapped.model)
    assert (peer_model.opt.timestep, family.dt) == (0.002, pytest.approx(0.016))
    peer_model.opt.timestep = 0.004  # the papers' models have twice Gymnasium's
    if name == "walker-rand-params":
        peer_model.geom("foot_geom").friction[0] = 0.9  # as before version 5, and in the papers' model
    batch, data = family.batch([task]), mujoco.MjData(peer_model)
    batch.reset(streams(1))
    data.qpos[:], data.qvel[:] = batch._physics(batch._state, batch._derived).qpos[0], batch._state[0, -peer_model.nv :]
    for action in actions(family, 20, 1):
        before = data.qpos[0]
        data.ctrl[:] = np.clip(action[0], -1, 1)
        mujoco.mj_step(peer_model, data, nstep=4)
        ours = batch.step(action)
        expected = np.concatenate([data.qpos[1:], np.clip(data.qvel, -10, 10)])
        np.testing.assert_allclose(ours.next_observation[0], expected, atol=1e-4)
        velocity = (data.qpos[0] - before) / 0.016
        cost = 1e-3 * (np.clip(action[0], -1, 1) ** 2).sum()
        assert ours.reward[0] == pytest.approx(velocity + 1 - cost, abs=1e-3)


def test_random_policies_collect_what_they_collect_in_gymnasium():
    family = load_family("half-cheetah-dir")
    ours = np.mean([family.random_return(family.sample(i, 0)) * (-1) ** (i + 1) for i in (0, 1)])  # mean distance
    env = gymnasium.make("HalfCheetah-v5", ctrl_cost_weight=0.05, max_episode_steps=200)
    env.action_space.seed(0)
    returns = []
    for episode in range(16):
        env.reset(seed=episode)
        returns.append(sum(env.step(env.action_space.sample())[4]["x_velocity"] for _ in range(200)))
    spread = np.std(returns, ddof=1)
    assert ours == pytest.approx(np.mean(returns), abs=4 * spread * math.sqrt(1 / 16 + 1 / 64))


# ------------------------------------------------------------------------ bodies


def test_bodies_have_the_published_number_of_multipliers():
    for name, count in (("walker-rand-params", 65), ("hopper-rand-params", 41)):
        family = load_family(name)
        task = family.sample(0, 0)
        assert sum(len(values) for values in task.values()) == count
        draws = {key: np.concatenate([family.sample(i, 0)[key] for i in range(100)]) for key in task}
        for key, base in (("body_mass", 1.5), ("body_inertia", 1.5), ("dof_damping", 1.3), ("geom_friction", 1.5)):
            u = np.log(draws[key]) / np.log(base)
            assert -3 <= u.min() < -2.9
            assert 2.9 < u.max() <= 3
            assert np.std(u) == pytest.approx(math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("refresh", [True, False])
def test_a_body_has_its_multipliers_and_constants_on_request(refresh):
    family = load_family("walker-rand-params", {"refresh_constants": refresh})
    task = family.sample(3, 0)
    model, nominal = family.model(task), _rand_params._nominal("walker2d.xml")
    for key in _rand_params.ARRAYS:
        shape = getattr(nominal, key).shape
        np.testing.assert_allclose(getattr(model, key), getattr(nominal, key) * np.reshape(task[key], shape))
    consistent = model.body_subtreemass[0] == pytest.approx(model.body_mass.sum())
    assert consistent == refresh
    assert np.array_equal(model.dof_invweight0, nominal.dof_invweight0) != refresh
    again = family.model(task)
    np.testing.assert_array_equal(again.body_mass, model.body_mass)  # multipliers do not pile up


def test_a_fallen_walker_ends():
    family = load_family("walker-rand-params")
    batch = family.batch([family.sample(0, 0)], 3)
    batch.reset(streams(3))
    state = batch.get_state()
    state[0, 2], state[1, 3] = 0.5, 1.5  # low, tilted
    batch.set_state(state)
    assert batch.step(np.zeros((3, 6))).terminated.tolist() == [True, True, False]


# ------------------------------------------------------------------------- sparse


def test_sparse_rewards_are_eq_35():
    dense = np.array([-0.3, -0.1, -0.05, 0.0], dtype=np.float32)
    np.testing.assert_allclose(sparsify(dense, -0.1), [0, 0, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(sparsify(np.array([2, 3, 4.5], np.float32), 3.0), [0, 0, 0.5])
    assert sparsify(dense, None) is dense
    with pytest.raises(UserError, match=r"sparse_threshold.*other than 0"):
        load_family("sparse-cheetah-vel", {"sparse_threshold": 0})
    family = load_family("sparse-cheetah-vel", {"sparse_threshold": -0.5})
    batch = family.batch([family.sample(9, 0)], 8)  # a slow one
    batch.reset(streams(8))
    results = [batch.step(action) for action in actions(family, 100, 8)]
    sparse, dense = (np.concatenate([getattr(r, key) for r in results]) for key in ("sparse_reward", "reward"))
    np.testing.assert_array_equal(sparse > 0, dense > -0.5)
    assert 0.02 < np.mean(sparse > 0) < 0.9
