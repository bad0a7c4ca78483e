"""Sawyer-Affordances: scene and wanted behavior vary; a hand with a gripper over a table.

Modeled on SMAC's manipulation domain (Pong et al. 2022, App. C), whose release simulates a Sawyer in PyBullet.
This scene is our own, in MuJoCo, and numbers are not comparable with the paper's. It differs: the hand hangs on
three slide joints (no arm, no rotation) with velocity servos, so that an action is a velocity, not a position
delta (full speed covers the same 0.05 m per step); one drawer, where SMAC has two; no second small object; six
aims for nine; 10 observed numbers, the side of the button among them, for 13; a dense reward besides, which is ours.

Observation (10, float32):

| entries | what | unit | range |
|---|---|---|---|
| 0-2 | hand (between the fingertips) x, y, z; the table is z = 0 | m | about [0.45, 0.9], [-0.25, 0.25], [0.01, 0.3] |
| 3 | distance of the fingers | m | about [0, 0.08] |
| 4-6 | object x, y, z; 0 where absent | m | unbounded |
| 7 | the drawer's handle y; 0 where absent | m | about [0.07, 0.19] to one side, the negative of it to the other |
| 8 | depth of the button; 0 where absent | m | about [0, 0.02] |
| 9 | the button's y; 0 where absent | m | 0.1 or -0.1 |

The tray and the aim are not observed.

Action (4, float32, [-1, 1]): velocity of the hand along x, y, z as a fraction of 1 m/s; fingers, 1 open, -1 closed.

Sparse reward, the reported one: 0 where the aim is met after the step, else -1. Dense: minus what is missing in
m (distance to the goal, opening or depth); with ``reward: success`` the sparse one again, as SMAC has no other.
Features (8): hand, object, opening, depth. No termination. 75 steps.

Tasks: drawer, button, tray and object are each there with probability 0.75, the side is 1 or -1, the drawer
starts open with probability 0.5, object and tray on two of four places; then one of the aims that the scene
allows, not met at the start. ``tasks.seed`` draws them; there is no published list.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import mujoco
import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from omrl.core import seeding
from omrl.core.config import Config
from omrl.envs._mujoco import Doubles, Motion, MujocoConfig, MujocoEnv, MujocoFamily, Physics
from omrl.envs.base import Array, Task

AIMS = ("move-hand", "move-object", "object-in-tray", "open-drawer", "close-drawer", "press-button")
_PLACES = ((0.55, -0.1), (0.55, 0.1), (0.65, -0.1), (0.65, 0.1))
_PRESENT = 0.75
_OPEN = 0.12  # m, the drawer's travel
_DEPTH = 0.02  # m, the button's
_OBJECT = 0.02  # m, half an edge of the object
_FIXTURES_X, _DRAWER_Y, _BUTTON_Y, _HANDLE_Z, _BUTTON_Z = 0.8, 0.19, 0.1, 0.06, 0.06
_AWAY = 5.0  # m along x: where absent parts are, which keeps all models the same size
_HOME = (0.6, 0.0, 0.2)
# what may be missing, m: hand, object and button by SMAC's thresholds; the drawer's, 0.065 there, is tighter
TOLERANCE = np.array([0.08, 0.08, 0.05, 0.03, 0.03, 0.008], dtype=np.float32)
_FAR = 0.12  # m, from home to a goal of the hand: more than its tolerance and the spread of starts
_NOISE = 0.1  # standard deviation of the collector's actions

_SCENE = """
<mujoco model="sawyer-affordances">
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <default><geom friction="1.5 0.05 0.001" condim="4"/></default>
  <worldbody>
    <light pos="0.6 0 2"/>
    <geom name="table" type="box" pos="0.65 0 -0.05" size="0.4 0.4 0.05" rgba=".7 .6 .5 1"/>
    <geom name="pad" type="box" pos="{away} 0 -0.05" size="0.4 0.4 0.05"/>
    <body name="hand" pos="0.6 0 0.2" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0" range="-0.15 0.3" limited="true" damping="5"/>
      <joint name="y" type="slide" axis="0 1 0" range="-0.25 0.25" limited="true" damping="5"/>
      <joint name="z" type="slide" axis="0 0 1" range="-0.185 0.1" limited="true" damping="5"/>
      <geom type="box" pos="0 0 0.08" size="0.02 0.06 0.015" mass="1" rgba=".6 .1 .1 1"/>
      <body name="left" pos="0 0.005 0" gravcomp="1">
        <joint name="left" type="slide" axis="0 1 0" range="0 0.04" limited="true" damping="2"/>
        <geom type="box" pos="0 0.005 0.025" size="0.012 0.005 0.035" mass="0.1"/>
      </body>
      <body name="right" pos="0 -0.005 0" gravcomp="1">
        <joint name="right" type="slide" axis="0 -1 0" range="0 0.04" limited="true" damping="2"/>
        <geom type="box" pos="0 -0.005 0.025" size="0.012 0.005 0.035" mass="0.1"/>
      </body>
    </body>
    <body name="object" pos="{object} 0.02">
      <freejoint/>
      <geom type="box" size="0.02 0.02 0.02" mass="0.05" rgba=".1 .5 .2 1"/>
    </body>
    <geom name="tray" type="box" pos="{tray} 0.001" size="0.05 0.05 0.001" rgba=".2 .2 .7 1"/>
    <body name="drawer" pos="{drawer} 0.06">
      <joint name="drawer" type="slide" axis="0 {inward} 0" range="0 0.12" limited="true" damping="2"
             frictionloss="0.5"/>
      <geom type="box" size="0.008 0.008 0.04" mass="0.2"/>
      <geom type="box" pos="0 {behind} -0.03" size="0.05 0.02 0.02" mass="0.2"/>
    </body>
    <body name="button" pos="{button} 0.06">
      <joint name="button" type="slide" axis="0 0 -1" range="0 0.02" limited="true" stiffness="100" damping="2"/>
      <geom type="cylinder" size="0.025 0.01" mass="0.05" rgba=".8 .1 .1 1"/>
    </body>
  </worldbody>
  <actuator>
    <velocity joint="x" kv="200" ctrlrange="-1 1"/>
    <velocity joint="y" kv="200" ctrlrange="-1 1"/>
    <velocity joint="z" kv="200" ctrlrange="-1 1"/>
    <position name="left" joint="left" kp="400" ctrlrange="-0.02 0.04" forcerange="-10 10"/>
  </actuator>
  <equality><joint joint1="right" joint2="left" polycoef="0 1 0 0 0"/></equality>
  <keyframe><key name="start" qpos="0 0 0 0.04 0.04 {object} 0.02 1 0 0 0 {opening} 0"/></keyframe>
</mujoco>
"""
# columns of qpos
_HAND, _FINGERS, _BODY, _DRAWER, _BUTTON = slice(0, 3), slice(3, 5), slice(5, 8), 12, 13


@lru_cache(maxsize=256)
def _compile(
    side: int, opened: bool, item: tuple[float, ...], tray: tuple[float, ...], there: tuple[bool, bool]
) -> Any:
    def place(position: tuple[float, float], present: bool = True) -> str:
        return f"{position[0] if present else _AWAY} {position[1]}"

    text = _SCENE.format(
        away=_AWAY,
        object=place((item[0], item[1])) if item else place((0, 0), False),
        tray=place((tray[0], tray[1])) if tray else place((0, 0.2), False),
        drawer=place((_FIXTURES_X, side * _DRAWER_Y), there[0]),
        button=place((_FIXTURES_X, -side * _BUTTON_Y), there[1]),
        inward=-side,
        behind=side * 0.05,
        opening=_OPEN if opened else 0,
    )
    return mujoco.MjModel.from_xml_string(text)


class SawyerConfig(MujocoConfig):
    """What is rewarded. The sparse reward is whether the aim is met, so it has no threshold.

    Attributes:
        reward: ``shaped``: the dense reward for actor and critic, the sparse one for task inference; ``success``: the
            sparse one for both, as SMAC has it, which labels its own steps with what it inferred from.
    """

    reward: Literal["shaped", "success"] = "shaped"

    @field_validator("sparse_threshold")
    @classmethod
    def _none(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError(
                "expected no such key: the sparse reward of 'sawyer-affordances' is whether the aim is met"
            )
        return value


class SawyerAffordances(MujocoFamily):
    """Do what the task wants in the scene it has."""

    name = "sawyer-affordances"
    env_id = "OMRL/SawyerAffordances-v0"
    CONFIG = SawyerConfig
    observation_size = 10
    action_size = 4
    feature_size = 8
    derived_size = 5  # are object, drawer and button there; side of the drawer, y of the button
    frame_skip = 10
    horizon = 75
    varies = "dynamics"  # and the reward: scene and aim
    returns = "sparse"
    context_next_observation = True
    capacity = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._one_reward = getattr(config, "reward", "shaped") == "success"
        if self._one_reward:
            self.inference_reward = "dense"  # which is the sparse one, then

    def sample(self, index: int, seed: int) -> Task:
        """Return scene and aim number ``index``."""
        self._check_index(index)
        rng = seeding.generator(seed, "task", self.name, index)
        item, tray, drawer, button = (bool(x) for x in rng.random(4) < _PRESENT)
        side, opened = int(rng.choice([-1, 1])), bool(rng.random() < 0.5) and drawer
        places = [list(_PLACES[i]) for i in rng.permutation(4)]
        feasible = [True, item, item and tray, drawer and not opened, drawer and opened, button]
        aim = str(rng.choice([name for name, able in zip(AIMS, feasible, strict=True) if able]))
        goal = list(_HOME)
        while np.linalg.norm(np.subtract(goal, _HOME)) < _FAR:
            goal = [float(x) for x in rng.uniform((0.52, -0.18, 0.05), (0.72, 0.18, 0.28))]
        if aim == "move-object":
            goal = [*places[2], _OBJECT]
        elif aim == "object-in-tray":
            goal = [*places[1], _OBJECT]
        return {
            "aim": aim,
            "goal": goal,
            "side": side,
            "object": places[0] if item else [],
            "tray": places[1] if tray else [],
            "drawer": drawer,
            "button": button,
            "drawer_open": opened,
        }

    def model(self, task: Task) -> mujoco.MjModel:
        """Return the scene of ``task``."""
        there = (task["drawer"], task["button"])
        return _compile(task["side"], task["drawer_open"], tuple(task["object"]), tuple(task["tray"]), there)

    def viewpoint(self, model: mujoco.MjModel) -> mujoco.MjvCamera:
        """Return a camera on the table, from behind the robot's right shoulder."""
        camera = mujoco.MjvCamera()
        camera.type, camera.lookat[:] = mujoco.mjtCamera.mjCAMERA_FREE, (0.65, 0.0, 0.05)
        camera.distance, camera.azimuth, camera.elevation = 1.0, 30.0, -40.0
        return camera

    @property
    def dt(self) -> float:
        """Seconds of simulated time in a step."""
        return 0.005 * self.frame_skip

    def task_array(self, task: Task) -> Array:
        """Return the aim's place in ``AIMS`` and the goal, float32 [4]."""
        return np.array([AIMS.index(task["aim"]), *task["goal"]], dtype=np.float32)

    def start(self, model: mujoco.MjModel, rng: np.random.Generator) -> Doubles:
        """Return the scene's start, the hand moved by U(-0.02, 0.02) m along each axis."""
        qpos = model.key_qpos[0].copy()
        qpos[_HAND] += rng.uniform(-0.02, 0.02, 3)
        return np.concatenate([qpos, np.zeros(model.nv)])

    def derive(self, model: mujoco.MjModel, data: mujoco.MjData) -> Doubles:
        """Return 1 for object, drawer and button where they are there, else 0; side of the drawer, y of the button."""
        found = [model.body(name).pos[0] < _AWAY for name in ("object", "drawer", "button")]
        sides = [np.sign(model.body("drawer").pos[1]), model.body("button").pos[1]]
        return np.array([*found, *sides], dtype=np.float64)

    def _parts(self, physics: Physics, there: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """Return hand [B, 3], object [B, 3], opening and depth [B, 2]; 0 where absent."""
        hand = physics.qpos[:, _HAND] + np.array(_HOME)
        return hand, physics.qpos[:, _BODY] * there[:, :1], physics.qpos[:, [_DRAWER, _BUTTON]] * there[:, 1:3]

    def observe(self, physics: Physics, late: Physics) -> Array:
        """Return hand, fingers, object, handle, depth and button."""
        there = late.derived
        hand, item, fixtures = self._parts(physics, there)
        fingers = physics.qpos[:, _FINGERS].sum(axis=1, keepdims=True)
        handle = there[:, 1:2] * there[:, 3:4] * (_DRAWER_Y - fixtures[:, :1])
        button = there[:, 2:3] * there[:, 4:5]
        return np.concatenate([hand, fingers, item, handle, fixtures[:, 1:], button], axis=1).astype(np.float32)

    def features(self, motion: Motion) -> Array:
        """Return hand, object, opening and depth, float32 [B, 8]."""
        return np.concatenate(self._parts(motion.after, motion.late_after.derived), axis=1).astype(np.float32)

    def missing(self, task: Array, features: Array) -> Array:
        """Return what is missing to the aim in m, float32 [N], at least 0."""
        aim, goal = task[:, 0].astype(np.intp), task[:, 1:]
        hand, item, opening, depth = features[:, :3], features[:, 3:6], features[:, 6], features[:, 7]
        flat = np.sqrt(((item[:, :2] - goal[:, :2]) ** 2).sum(axis=1))
        each = np.stack(
            [
                np.sqrt(((hand - goal) ** 2).sum(axis=1)),
                np.sqrt(((item - goal) ** 2).sum(axis=1)),
                flat + np.maximum(item[:, 2] - np.float32(2 * _OBJECT), np.float32(0)),
                np.maximum(np.float32(_OPEN) - opening, np.float32(0)),
                np.maximum(opening, np.float32(0)),
                np.maximum(np.float32(_DEPTH) - depth, np.float32(0)),
            ],
            axis=1,
        )
        found: Array = each[np.arange(len(each)), np.broadcast_to(aim, len(each))]
        return found

    def dense(self, task: Array, next_observation: Array, features: Array) -> Array:
        """Return minus what is missing, or with ``reward: success`` the sparse reward."""
        return self.rewards(task, next_observation, features)[0]

    def rewards(self, task: Array, next_observation: Array, features: Array) -> tuple[Array, Array]:
        """Return the dense reward, and 0 where the aim is met, else -1."""
        missing = self.missing(task, features)
        met = missing < TOLERANCE[task[:, 0].astype(np.intp)]
        sparse = np.where(met, np.float32(0), np.float32(-1)).astype(np.float32)
        return (sparse if self._one_reward else -missing), sparse

    def script(self, task: Task, own: bool, sampled: int, plain: int, rng: np.random.Generator) -> ScriptedCollector:
        """Return the collector: every episode with noise has a random skill, or all do what the task wants."""
        aim = str(task["aim"])
        skills = [aim] * (sampled + plain) if own else ScriptedCollector.skills(task, sampled + plain, rng)
        return ScriptedCollector(task, skills[:sampled], skills[sampled:])


class ScriptedCollector:
    """Acts by a script that knows the scene: one skill per copy, Gaussian noise on top.

    Memoryless: what comes next is read from the observation. It is an actor for ``omrl.behavior.rollouts.rollout``.
    """

    observation_size = SawyerAffordances.observation_size

    def __init__(self, task: Task, skills: list[str], plain: list[str] | None = None) -> None:
        """``skills``: one of ``AIMS`` for each copy with noise, ``plain``: without; the same for both if not given."""
        self._task = task
        self._skills = skills
        self._plain = skills if plain is None else plain

    @staticmethod
    def skills(task: Task, count: int, rng: np.random.Generator) -> list[str]:
        """Return a random skill for each of ``count`` copies among those that the scene allows."""
        item, tray = bool(task["object"]), bool(task["tray"])
        able = [True, item, item and tray, task["drawer"], task["drawer"], task["button"]]
        return [str(x) for x in rng.choice([a for a, b in zip(AIMS, able, strict=True) if b], count)]

    def sample(self, observation: Array, noise: Array) -> Array:
        """Return the script's actions with noise of standard deviation 0.1, float32 [B, 4] in [-1, 1]."""
        noisy = self._actions(observation, self._skills) + np.float32(_NOISE) * noise
        return np.clip(noisy, np.float32(-1), np.float32(1)).astype(np.float32)

    def mean_action(self, observation: Array) -> Array:
        """Return the script's actions, float32 [B, 4] in [-1, 1]."""
        return self._actions(observation, self._plain)

    def _actions(self, observation: Array, skills: list[str]) -> Array:
        rows = [self._act(row, skill) for row, skill in zip(observation.astype(np.float64), skills, strict=True)]
        return np.array(rows, dtype=np.float32).reshape(-1, 4)

    def _act(self, seen: NDArray[np.float64], skill: str) -> NDArray[np.float64]:
        task, hand, fingers, item = self._task, seen[:3], seen[3], seen[4:7]
        if skill == "move-hand":
            goal = np.array(task["goal"]) if task["aim"] == skill else np.array(_HOME)
            return _towards(hand, goal, 1.0)
        if skill == "press-button":
            spot = np.array([_FIXTURES_X, -task["side"] * _BUTTON_Y, 0.14])
            above = np.abs(hand - spot)[:2].max() < 0.015
            return _towards(hand, spot - [0, 0, 0.11] if above else spot, -1.0)
        if skill in ("open-drawer", "close-drawer"):
            handle = np.array([_FIXTURES_X, seen[7], _HANDLE_Z])
            wanted = _OPEN + 0.02 if skill == "open-drawer" else -0.02
            goal = handle * [1, 0, 1] + [0, task["side"] * (_DRAWER_Y - wanted), 0]
            return _carry(hand, fingers, handle, goal, 0.016, lift=0.0)
        goal = np.array([*task["tray"], 0.0]) if skill == "object-in-tray" else np.array([*_PLACES[0], 0.0])
        if skill == task["aim"]:
            goal = np.array(task["goal"])
        if np.abs(item - goal)[:2].max() < 0.02:
            return _towards(hand, np.array([*hand[:2], _HOME[2]]), 1.0)
        return _carry(hand, fingers, item, goal, 2 * _OBJECT, lift=0.1)


def _towards(hand: NDArray[np.float64], goal: NDArray[np.float64], fingers: float) -> NDArray[np.float64]:
    """Return the action that takes the hand to ``goal`` as fast as it may."""
    return np.append(np.clip((goal - hand) / 0.05, -1.0, 1.0), fingers)


def _carry(
    hand: NDArray[np.float64],
    fingers: float,
    thing: NDArray[np.float64],
    goal: NDArray[np.float64],
    width: float,
    lift: float,
) -> NDArray[np.float64]:
    """Return the next action of: above the thing, down, close, lift, along to ``goal``."""
    off = np.abs(hand - thing)
    if off[:2].max() > 0.015 and off.max() > 0.025:
        above = thing + np.array([0, 0, 0.1])
        return _towards(hand, above, 1.0)
    if off[2] > 0.02:
        return _towards(hand, thing, 1.0)
    if fingers > width + 0.012:
        return _towards(hand, thing, -1.0)
    far = np.abs(goal - thing)[:2].max() > 0.02
    target = np.array([goal[0], goal[1], max(lift, goal[2]) if far else goal[2]])
    return _towards(hand, target, -1.0) * [0.6, 0.6, 0.6, 1.0]


class SawyerAffordancesEnv(MujocoEnv):
    """Gymnasium form of ``SawyerAffordances``."""

    family = SawyerAffordances


FAMILY = SawyerAffordances
ENV = SawyerAffordancesEnv
