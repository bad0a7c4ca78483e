"""Checkpoints: the same bytes every time, loadable by SB3, and never unpickled by us."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC

from omrl.behavior.base import EVALUATION_EPISODES, BehaviorConfig, SacConfig, evaluate
from omrl.behavior.checkpoints import load_actor
from omrl.behavior.sb3 import make_model, save_checkpoint, train_task
from omrl.core import seeding
from omrl.core.errors import UserError
from omrl.envs.base import load_family
from omrl.envs.simulate import episodes

CONFIG = BehaviorConfig(
    total_steps=60, checkpoint_every=30, horizon=20, sac=SacConfig(batch_size=16, learning_starts=20, net_arch=[16, 16])
)
FAMILY = load_family("sparse-point-robot")
TASK = FAMILY.sample(0, 1337)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("run") / "task=000"
    train_task("sparse-point-robot", {}, TASK, CONFIG.resolved(), 3, str(target))
    return target


def test_a_run_leaves_checkpoints_on_the_grid_and_a_curve(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["progress.csv", "step=000000.zip", "step=000030.zip", "step=000060.zip"]
    lines = (folder / "progress.csv").read_text().splitlines()
    assert lines[0] == "step,gradient_steps,return,actor_loss,critic_loss,ent_coef"
    assert [line.split(",")[:2] for line in lines[1:]] == [["0", "0"], ["30", "10"], ["60", "40"]]


def test_the_same_run_in_another_process_gives_the_same_bytes(folder, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_checkpoints import *\n"
        "train_task('sparse-point-robot', {}, TASK, CONFIG.resolved(), 3, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "again")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_sb3_loads_it_acts_the_same_and_goes_on_learning(folder):
    path = folder / "step=000060.zip"
    model, actor = SAC.load(path, device="cpu"), load_actor(path)
    observation = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    theirs, _ = model.predict(observation, deterministic=True)
    np.testing.assert_allclose(actor.mean_action(observation), theirs, atol=1e-6)
    assert model.num_timesteps == 60
    model.set_env(FAMILY.make(TASK, 20))
    model.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == 100


def test_sampled_actions_have_sb3s_distribution(folder):
    path = folder / "step=000060.zip"
    model, actor = SAC.load(path, device="cpu"), load_actor(path)
    observation = np.array([[0.3, -0.2]], dtype=np.float32)
    noise = np.random.default_rng(0).standard_normal((20000, 2), dtype=np.float32)
    ours = actor.sample(np.repeat(observation, 20000, axis=0), noise)
    torch.manual_seed(0)
    theirs, _ = model.predict(np.repeat(observation, 20000, axis=0), deterministic=False)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.02)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=0.02)


def test_zip_bytes_hold_no_clock_address_or_machine(folder):
    with zipfile.ZipFile(folder / "step=000060.zip") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        data = archive.read("data").decode()
        assert " at 0x" not in data
        assert "start_time" not in json.loads(data)
        assert "Linux" not in archive.read("system_info.txt").decode()


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = make_model(FAMILY, TASK, CONFIG, 0)
    for name in ("a.zip", "b.zip"):
        save_checkpoint(model, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


class Bomb:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewrite(source: Path, target: Path, replace: dict[str, bytes]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, replace.get(name, old.read(name)))


def test_a_crafted_zip_runs_nothing(folder, tmp_path):
    touched, source = tmp_path / "touched", folder / "step=000060.zip"
    bomb = pickle.dumps(Bomb(touched))
    buffer = io.BytesIO()
    torch.save(Bomb(touched), buffer)
    with zipfile.ZipFile(source) as archive:
        data = json.loads(archive.read("data"))
    data["policy_class"] = {":type:": "x", ":serialized:": base64.b64encode(bomb).decode()}
    hidden = json.dumps(data).encode()

    rewrite(source, tmp_path / "data.zip", {"data": hidden})
    load_actor(tmp_path / "data.zip")  # its weights are sound, and the pickle beside them is never opened
    for name, content in (("weights", buffer.getvalue()), ("raw", bomb)):
        rewrite(source, tmp_path / f"{name}.zip", {"data": hidden, "policy.pth": content})
        with pytest.raises(UserError, match=rf"{name}\.zip"):
            load_actor(tmp_path / f"{name}.zip")
    assert not touched.exists()
    # the bomb is a live one: SB3 itself sets it off
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever SB3 stumbles over afterwards
        SAC.load(tmp_path / "data.zip")
    assert touched.exists()


def test_damaged_checkpoints_are_named(folder, tmp_path):
    sound = (folder / "step=000060.zip").read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 16
    for name, content in (("cut", sound[:-500]), ("flipped", bytes(flipped)), ("text", b"hello"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_actor(tmp_path / name)
    with pytest.raises(UserError, match="nowhere: checkpoint is missing"):
        load_actor(tmp_path / "nowhere")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(UserError, match=r"other\.zip"):
        load_actor(tmp_path / "other.zip")


def test_a_policys_return_is_the_one_that_the_family_reports():
    family = load_family("sparse-point-robot")
    tasks = [family.sample(i, 0) for i in range(2)]

    def act(observation: np.ndarray, t: int) -> np.ndarray:
        return np.full((len(observation), 2), 0.5, dtype=np.float32)

    starts = [seeding.generator(seed, "progress", i) for seed in (5, 6) for i in range(EVALUATION_EPISODES)]
    ran = episodes(family.batch(tasks, EVALUATION_EPISODES), act, family.horizon, starts)
    expected, other = (ran.returns(sparse).reshape(2, -1).mean(1) for sparse in (True, False))
    np.testing.assert_array_equal(evaluate(family, tasks, [5, 6], act), expected)
    assert (expected != other).all()
