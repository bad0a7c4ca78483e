"""The batched engine: the numbers of SB3's own update, SB3's own files, and tasks that do not see each other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.distributions import normal

from omrl.behavior import batched, sb3
from omrl.behavior.base import BehaviorConfig, Run
from omrl.behavior.checkpoints import load_actor
from omrl.behavior.stacked import StackedSac
from omrl.core.errors import UserError
from omrl.core.precision import set_kernels
from omrl.envs.base import load_family

CPU = torch.device("cpu")
TINY = {"net_arch": [16, 12], "batch_size": 8, "learning_starts": 20, "gamma": 0.97, "tau": 0.05}


@pytest.fixture(autouse=True)
def _default_kernels():
    yield
    set_kernels("float32")


def config(**values) -> BehaviorConfig:
    settings = {"engine": "batched", "total_steps": 60, "checkpoint_every": 30, "horizon": 25, "sac": TINY} | values
    return BehaviorConfig.model_validate(settings)


def runs(family, count: int, folder: Path | None = None, seed: int = 0) -> list[Run]:
    return [Run(i, family.sample(i, 0), seed + i, str(folder / f"done-{i}") if folder else "") for i in range(count)]


def hashes(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("kernels", ["float32", "fast"])
@pytest.mark.parametrize("ent_coef", ["auto_0.2", 0.1])
@pytest.mark.parametrize("name", ["half-cheetah-vel", "sparse-point-robot"])
def test_an_update_is_that_of_stable_baselines3(name, ent_coef, kernels, monkeypatch):
    set_kernels(kernels)
    family, count, batch = load_family(name), 3, 8
    settings = config(sac=TINY | {"ent_coef": ent_coef})
    group = batched.Group(family, runs(family, count), settings, CPU)
    models = [sb3.make_model(family, run.task, settings, run.seed) for run in group.runs]
    width, size = family.observation_size, family.action_size
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        rows = torch.randn(count, batch, group.sac.row_size, generator=generator)
        rows[..., 2 * width : -2].tanh_()
        rows[..., -1] = (rows[..., -1] > 0).float()
        noise = torch.randn(count, 2 * batch, size, generator=generator)
        with torch.no_grad():
            losses = group.sac.update(rows, noise, losses=True)
        for i, model in enumerate(models):
            row = rows[i]
            sample = ReplayBufferSamples(
                row[:, width : 2 * width], row[:, 2 * width : -2], row[:, :width], 1 - row[:, -1:], row[:, -2:-1]
            )
            draws = iter([noise[i, :batch], noise[i, batch:]])
            model.set_logger(Logger(folder=None, output_formats=[]))
            monkeypatch.setattr(model.replay_buffer, "sample", lambda *_, sample=sample, **__: sample)
            monkeypatch.setattr(normal, "_standard_normal", lambda *_, draws=draws, **__: next(draws))
            model.train(1, batch)
            for key, value in losses.items():
                assert model.logger.name_to_value[f"train/{key}"] == pytest.approx(float(value[i]), abs=2e-6)
            for stack, module in (
                (group.sac.actor, model.actor),
                (group.sac.critic, model.critic),
                (group.sac.target, model.critic_target),
            ):
                pieces = group._pieces(stack, stack.flat, i)
                for piece, parameter in zip(pieces, module.parameters(), strict=True):
                    torch.testing.assert_close(piece, parameter.detach(), atol=5e-7, rtol=1e-5)
            if model.log_ent_coef is not None:
                torch.testing.assert_close(group.sac.log_temperature[i, :1], model.log_ent_coef.detach())


@pytest.mark.parametrize("kernels", ["float32", "fast"])
@pytest.mark.parametrize(("observation", "action", "hidden"), [(2, 2, [64, 64]), (20, 6, [128, 96, 33]), (5, 3, [7])])
def test_updates_of_one_task_are_those_among_many(observation, action, hidden, kernels):
    """To the bit, whatever the number of tasks and the place: kernels must not be chosen by them."""
    set_kernels(kernels)
    batch, found = 50, []
    for tasks, place in ((1, 0), (2, 1), (7, 3)):
        settings = {"learning_rate": 1e-3, "gamma": 0.9, "tau": 0.01, "temperature": 0.2, "learn_temperature": True}
        sac = StackedSac(observation, action, hidden, tasks, device=CPU, **settings)
        generator = torch.Generator().manual_seed(0)
        for stack, networks in ((sac.actor, [place]), (sac.critic, [place, tasks + place])):
            for piece in (part for layer in stack.views(stack.flat) for part in layer):
                for network in networks:
                    piece[network] = torch.randn(piece.shape[1:], generator=generator) / piece.shape[-1] ** 0.5
        for _ in range(3):
            rows, noise = torch.randn(tasks, batch, sac.row_size), torch.randn(tasks, 2 * batch, action)
            rows[place] = torch.randn(rows.shape[1:], generator=generator)
            noise[place] = torch.randn(noise.shape[1:], generator=generator)
            sac.update(rows, noise)
        acted = sac.act(rows[:, :1, :observation], noise[:, :1])[place]
        layers = [layer for stack in (sac.actor, sac.critic) for layer in stack.views(stack.flat)]
        pieces = [part[place] for layer in layers for part in layer]
        found.append([acted, sac.log_temperature[place], *pieces])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.isfinite(one).all()
            assert torch.equal(one, same)


def test_checkpoints_are_sb3s_and_act_alike(tmp_path):
    family = load_family("half-cheetah-vel")
    settings = config()
    group = batched.Group(family, runs(family, 2), settings, CPU)
    for step in range(settings.total_steps):
        if step == 0:
            group.save(1, tmp_path / "start.zip")
        group.advance()
    group.save(1, tmp_path / "end.zip")
    fresh = sb3.make_model(family, group.runs[1].task, settings, group.runs[1].seed)
    observation = np.random.default_rng(0).standard_normal((50, family.observation_size)).astype(np.float32)
    untrained = SAC.load(tmp_path / "start.zip")
    np.testing.assert_array_equal(
        untrained.predict(observation, deterministic=True)[0], fresh.predict(observation, deterministic=True)[0]
    )
    model = SAC.load(tmp_path / "end.zip", env=family.make(group.runs[1].task, 25))
    assert (model.num_timesteps, model._n_updates) == (60, 40)
    expected = model.predict(observation, deterministic=True)[0]
    with torch.no_grad():
        ours = group.sac.act(torch.from_numpy(np.stack([observation, observation])), None)[1].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_allclose(load_actor(tmp_path / "end.zip").mean_action(observation), expected, atol=1e-6)
    for piece, parameter in zip(
        group._pieces(group.sac.actor, group.sac.actor.flat, 1), model.actor.parameters(), strict=True
    ):
        assert torch.equal(piece, parameter)
    before = [p.detach().clone() for p in model.actor.parameters()]
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(40, reset_num_timesteps=False)  # SB3 can go on from here
    assert any(not torch.equal(a, b) for a, b in zip(before, model.actor.parameters(), strict=True))
    assert model.actor.optimizer.state_dict()["state"][0]["step"] > 40


@pytest.mark.parametrize("matmul", ["float32", "fast"])
@pytest.mark.parametrize("name", ["half-cheetah-vel", "point-robot"])
def test_a_task_does_not_depend_on_its_company(name, matmul, tmp_path):
    family = load_family(name)
    settings = config(matmul=matmul).resolved()
    together, alone = runs(family, 3, tmp_path / "together"), runs(family, 3, tmp_path / "alone")[1:2]
    for members, folder in ((together, "together"), (alone, "alone")):
        (tmp_path / folder).mkdir()
        batched.train_group(name, {}, members, settings, str(tmp_path / folder / "work"))
        assert not (tmp_path / folder / "work").exists()
    one = hashes(alone[0].folder)
    assert list(one) == ["progress.csv", "step=000000.zip", "step=000030.zip", "step=000060.zip"]
    assert hashes(together[1].folder) == one
    assert hashes(together[0].folder) != one


def test_an_interrupted_group_ends_with_the_same_bytes(tmp_path, monkeypatch):
    family = load_family("half-cheetah-vel")
    settings = config(total_steps=120, sac=TINY | {"buffer_size": 50}).resolved()
    whole, killed = runs(family, 2, tmp_path / "whole"), runs(family, 2, tmp_path / "killed")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    batched.train_group("half-cheetah-vel", {}, whole, settings, str(tmp_path / "whole/work"))

    monkeypatch.setattr(batched, "_SNAPSHOT_S", 0.0)
    advance = batched.Group.advance

    def stop(self) -> None:
        if self.clock.step == 77:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(batched.Group, "advance", stop)
    work = tmp_path / "killed/work"
    with pytest.raises(KeyboardInterrupt):
        batched.train_group("half-cheetah-vel", {}, killed, settings, str(work))
    assert not Path(killed[0].folder).exists()
    taken: list[int] = []

    def count(self) -> None:
        taken.append(self.clock.step)
        advance(self)

    monkeypatch.setattr(batched.Group, "advance", count)
    batched.train_group("half-cheetah-vel", {}, killed, settings, str(work))
    assert taken[0] == 60  # the last checkpoint before the interruption
    for a, b in zip(whole, killed, strict=True):
        assert hashes(a.folder) == hashes(b.folder)

    (tmp_path / "killed/work").mkdir()
    (tmp_path / "killed/work/unfinished.safetensors").write_bytes(b"damaged")
    again = runs(family, 2, tmp_path / "again")
    (tmp_path / "again").mkdir()
    batched.train_group("half-cheetah-vel", {}, again, settings, str(tmp_path / "killed/work"))
    assert hashes(again[0].folder) == hashes(whole[0].folder)


@pytest.mark.parametrize("name", ["half-cheetah-vel", "point-robot"])
def test_the_replay_buffer_holds_what_happened(name):
    family = load_family(name)
    settings = config(horizon=7, sac=TINY | {"buffer_size": 40})
    group = batched.Group(family, runs(family, 2), settings, CPU)
    steps, last = range(15, 55), []
    for _ in range(steps.stop):
        group.advance()
    replay, width = group._replay.numpy(), family.observation_size
    assert replay.shape[1] == len(steps)
    for task, run in enumerate(group.runs):
        rows = replay[task][[step % len(steps) for step in steps]]
        following, before, action = rows[:, :width], rows[:, width : 2 * width], rows[:, 2 * width : -2]
        for i, step in list(enumerate(steps))[1:]:
            assert np.array_equal(before[i], following[i - 1]) == (step % 7 != 0)
        assert (rows[:, -1] == 1).all()  # a time limit is not an end
        assert (np.abs(action) <= 1).all()
        last.append(action)
        if name == "point-robot":
            dense, _ = family.reward(run.task, before, action, following, np.zeros((len(rows), 0), np.float32))
            np.testing.assert_array_equal(rows[:, -2], dense)
    assert not np.array_equal(*last)
    assert group.clock.episodes.tolist() == [7, 7]


def test_streams_are_the_same_however_they_are_cut():
    whole = batched.Streams([1, 2], "a", (3,), 4, "normal")
    expected = [whole.next().clone() for _ in range(11)]
    single = batched.Streams([2], "a", (3,), 4, "normal")
    for numbers in expected:
        torch.testing.assert_close(single.next()[0], numbers[1], rtol=0, atol=0)
    stopped = batched.Streams([1, 2], "a", (3,), 4, "normal")
    for _ in range(6):
        stopped.next()
    other = batched.Streams([5, 6], "a", (3,), 4, "normal")
    other.restore(*stopped.state())
    for numbers in expected[6:]:
        torch.testing.assert_close(other.next(), numbers, rtol=0, atol=0)
    assert len({float(n[0, 0]) for n in expected}) == 11


def test_divergence_is_a_user_error(tmp_path):
    family = load_family("point-robot")
    values = {"learning_rate": 1.0, "net_arch": [16], "gamma": 1.0, "tau": 1.0}
    settings = config(sac=TINY | values, total_steps=3000)
    group = runs(family, 1, tmp_path)
    with pytest.raises(UserError, match=r"task 0 diverged by step \d+: .* lower behavior\.sac\.learning_rate"):
        batched.train_group("point-robot", {}, group, settings.resolved(), str(tmp_path / "work"))
