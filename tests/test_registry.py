"""What holds for every method, protocol and environment, because its file is in the folder.

A new method needs one line in ``ARMS``; a new protocol one in ``BRIEF``, unless the defaults do; a new environment
none.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from batches import two_goals
from gymnasium.utils.env_checker import check_env

from omrl import experiment
from omrl.algorithms.base import Algorithm, Phase, Spec, create, load_model, save_model, standardized
from omrl.core import registry
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.envs.base import Family, load_family
from omrl.envs.simulate import Episodes, episodes
from omrl.evaluation.contexts import offline_belief
from omrl.evaluation.protocols.base import Run, protocol
from omrl.learning.train import MetaTrainConfig, Position, make_sampler, observation_scale, train
from omrl.nets.experience import Experience

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = registry.names("omrl.algorithms")
SPEC = Spec(2, 2, False, 5, 2)


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are fastest on one thread, and ``train`` sets the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- methods -----------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A method in one of its forms.

    Attributes:
        module: its file name.
        values: a small configuration that learns two goals.
        steps: that it needs for that.
        good: share of episodes that go to the goal: 1 for what imitates all of its data.
        short: values that put both of its phases into eight updates, or make adapting quick.
        context: transitions that it adapts to.
    """

    module: str
    values: dict[str, Any]
    steps: int
    good: float = 0.0
    short: dict[str, Any] = {}
    context: int = 60


BAG = {
    "latent_dim": 3, "encoder_width": 32, "encoder_depth": 2, "width": 32, "depth": 2, "meta_batch": 8, "rl_batch": 32,
    "context_batch": 32,
}  # fmt: skip
SOFT = BAG | {"actor_rate": 3e-3, "critic_rate": 3e-3, "encoder_rate": 3e-3, "reward_scale": 20.0, "gamma": 0.5}
FOCALPP = SOFT | {"hidden": 16, "heads": 4, "blocks": 2, "reduction": 4, "encoder_width": 16, "tau": 0.05}
CLONING = BAG | {"actor_rate": 3e-3, "encoder_rate": 3e-3}
BCQ = BAG | {
    "rate": 3e-3, "gamma": 0.0, "reward_scale": 2.0, "perturbation": 0.5, "candidates": 20, "encoder_rate": 1e-3,
}  # fmt: skip
MBML = BAG | {
    "tasks": 2, "rate": 3e-3, "gamma": 0.0, "reward_scale": 2.0, "vae_kl": 0.02, "vae_clip": 1.0, "perturbation": 0.2,
    "candidates": 20, "bcq_steps": 400, "ensemble_width": 32,
}  # fmt: skip
BOREL = {
    "latent_dim": 2, "hidden": 16, "width": 32, "vae_steps": 450, "vae_rate": 5e-3, "vae_meta_batch": 4,
    "vae_rollouts": 4, "meta_batch": 4, "rl_batch": 32, "gamma": 0.5, "reward_scale": 20.0, "actor_rate": 3e-3,
    "critic_rate": 3e-3, "decode_from": "transition", "beliefs": 6,
}  # fmt: skip
SMAC = SOFT | {"decoder_width": 32, "actor": "awac", "beta": 0.3, "kl_weight": 0.01, "gamma": 0.0, "reward_scale": 5.0}
MAML = {"width": 32, "latent_dim": 16, "meta_batch": 2, "inner_batch": 64, "outer_batch": 64}
MACAW = MAML | {
    "gamma": 0.0, "inner_value_rate": 0.02, "inner_policy_rate": 0.02, "rate_rate": 0.02, "policy_rate": 3e-3,
    "value_rate": 3e-3, "temperature": 0.3,
}  # fmt: skip
MT_FT = {
    "width": 32, "latent_dim": 16, "meta_batch": 2, "batch": 64, "gamma": 0.0, "policy_rate": 3e-3, "value_rate": 3e-3,
    "tune_steps": 40, "tune_policy_rate": 2e-2, "tune_value_rate": 2e-2, "temperature": 0.3,
}  # fmt: skip
PROMPT_DT = {
    "width": 32, "depth": 2, "window": 4, "prompt_length": 3, "prompt_segments": 2, "meta_batch": 4, "rl_batch": 8,
    "rate": 3e-3, "warmup": 20,
}  # fmt: skip
KL_DUAL = {"regularization": {"kind": "kl-dual", "policy": True, "value_penalty": True, "alpha": 2.0}}
ARMS = {
    "bc": Arm("bc", CLONING, 200, 1.0),
    "bc, gaussian, metric": Arm("bc", CLONING | {"likelihood": "gaussian", "encoder_loss": "metric"}, 200, 1.0),
    "bcq": Arm("bcq", BCQ, 350),
    "borel": Arm("borel", BOREL, 800, short={"vae_steps": 4}, context=10),
    "csro": Arm("csro", SOFT | {"club_width": 32, "club_depth": 2, "club_rate": 3e-3}, 250),
    "focal": Arm("focal", SOFT, 250),
    "focal++": Arm("focalpp", FOCALPP, 200),
    "focal++, contrastive": Arm("focalpp", FOCALPP | {"attention": "none"}, 200),
    "macaw": Arm("macaw", MACAW, 500),
    "mbml": Arm("mbml", MBML, 650, short={"bcq_steps": 4}),
    "meta-bc": Arm("meta-bc", MAML | {"inner_policy_rate": 0.02, "rate_rate": 0.02, "policy_rate": 3e-3}, 200, 1.0),
    "mt-ft": Arm("mt-ft", MT_FT, 300, short={"tune_steps": 2}, context=120),
    "pearl": Arm("pearl", SOFT, 800),
    "prompt-dt": Arm("prompt-dt", PROMPT_DT, 400, 0.5),
    "smac": Arm("smac", SMAC, 500),
    "unicorn": Arm("unicorn", SOFT | {"decoder_width": 32}, 250),
}
FORMS = ARMS | {  # further ones with states of their own, which need not prove again that they learn
    "focal, probabilistic, regularized": Arm("focal", SOFT | {"encoder": "probabilistic"} | KL_DUAL, 0),
    "focal, coupled": Arm("focal", SOFT | {"coupled": True}, 0),
    "pearl, regularized": Arm("pearl", SOFT | KL_DUAL, 0),
    "bcq, Bellman gradients": Arm("bcq", BCQ | {"encoder_by_vae": False}, 0),
    "csro, batch": Arm("csro", ARMS["csro"].values | {"negatives": "batch"}, 0),
    "focal++, batch": Arm("focalpp", FOCALPP | {"attention": "batch", "loss": "metric"}, 0),
    "focal++, sequence": Arm("focalpp", FOCALPP | {"attention": "sequence", "gate": "features-and-weights"}, 0),
    "focal++, rows": Arm("focalpp", FOCALPP | {"tokens": "row"}, 0),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(arm: Arm, seed: int = 0, **values: Any) -> Algorithm:
    return create(arm.module, arm.values | values, SPEC, seed, "cpu")


def fit(algorithm: Algorithm, data: TaskData, steps: int, state: Path, **values: Any) -> Position:
    settings = {"steps": steps, "log_every": steps, "checkpoint_every": 10**6, "threads": 1}
    sampler = make_sampler(algorithm, {"transitions": data}, 0)
    return train(algorithm, sampler, parse(MetaTrainConfig, settings | values, "test"), state)


def believes(algorithm: Algorithm, data: TaskData, seed: int = 0, transitions: int = 20) -> Any:
    if columns := algorithm.columns(data):
        data = data.with_columns(columns)
    return offline_belief(algorithm, data, transitions, [np.random.default_rng([seed, i]) for i in range(2)])


def test_every_method_has_a_line():
    assert {arm.module for arm in ARMS.values()} == set(ALGORITHMS), "add the new method to ARMS"


@pytest.mark.parametrize("name", ARMS)
def test_initial_weights_are_the_same_with_any_number_of_threads(name, threads):
    arm, made = ARMS[name], []
    needed = {key: arm.values[key] for key in {"tasks"} & arm.values.keys()}  # else the defaults: real sizes
    for count in (1, 2):  # of the environment: meta-training sets its own afterwards
        torch.set_num_threads(count)
        made.append(create(arm.module, needed, SPEC, 0, "cpu").model_state())
        assert torch.get_num_threads() == count
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


@pytest.mark.parametrize("name", ARMS)
def test_two_goals_are_told_apart_and_solved(name, tmp_path):
    arm = ARMS[name]
    algorithm = make(arm)
    fit(algorithm, two_goals(0, arm.good), arm.steps, tmp_path / "state")
    unseen = two_goals(1, arm.good)
    goal = torch.tensor([0.8, -0.8])
    observations = (torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.5).unbind()
    beliefs = [believes(algorithm, unseen, seed, arm.context) for seed in (0, 1)]
    for belief in beliefs:
        chosen = torch.stack([algorithm.act(belief, s) for s in observations]).mean(0)[:, 0]
        assert float((chosen - goal).abs().max()) < 0.35  # 0.8 where the tasks look alike
    if "online-belief" in algorithm.PROTOCOLS:  # it finds the goal by its own steps, from knowing nothing
        belief, s = algorithm.prior(2), torch.zeros(2, 2)
        assert torch.equal(*algorithm.act(belief, s))
        for _ in range(2 * SPEC.horizon):
            action = algorithm.act(belief, s)
            reward = 1 - (action[:, 0] - goal).abs()
            step = (s, action, reward, s + 0.1 * action, reward * 0, reward)
            belief = algorithm.observe(belief, Experience(*(x.unsqueeze(1) for x in step), task=torch.arange(2)))
        assert float((algorithm.act(belief, s)[:, 0] - goal).abs().max()) < 0.35
    one, two = (algorithm.embedding(belief) for belief in beliefs)
    if one is not None and two is not None:  # another context of a task says what the first one did
        assert float((one - two).norm(dim=-1).max()) < float((one[0] - one[1]).norm())


class Killed(BaseException):
    """A stop that no handler of ordinary errors may catch."""


@pytest.mark.parametrize("name", FORMS)
def test_training_goes_on_from_a_saved_state_to_the_same_bytes(name, tmp_path):
    """Stopped twice, in either phase where there are two; what goes on was made with another seed."""
    arm, data = FORMS[name], two_goals(0, FORMS[name].good)
    settings = {"log_every": 1, "checkpoint_every": 1}
    whole = make(arm, **arm.short)
    rows = fit(whole, data, 8, tmp_path / "whole", **settings).curve.rows
    for seed in (0, 9):
        stopped = make(arm, seed, **arm.short)
        update, left = stopped.update, [3]

        def until(phase: Phase, batch: Mapping[str, Experience], update=update, left=left) -> dict[str, torch.Tensor]:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return update(phase, batch)

        stopped.update = until  # type: ignore[method-assign]
        with pytest.raises(Killed):
            fit(stopped, data, 8, tmp_path / "state", **settings)
    again = make(arm, 10, **arm.short)
    assert fit(again, data, 8, tmp_path / "state", **settings).curve.rows == rows
    one, two = whole.training_state(), again.training_state()
    assert one.keys() == two.keys()
    assert [key for key in one if one[key].numpy().tobytes() != two[key].numpy().tobytes()] == []


@pytest.mark.parametrize("name", FORMS)
def test_a_saved_model_acts_alike_and_inside_the_box(name, tmp_path):
    arm, data = FORMS[name], two_goals(0, FORMS[name].good)
    algorithm = make(arm, **arm.short)
    before = {key: x.clone() for key, x in algorithm.model_state().items()}
    fit(algorithm, data, 8, tmp_path / "state")
    assert any(not torch.equal(x, before[key]) for key, x in algorithm.model_state().items())
    save_model(algorithm, tmp_path / "model", "mine", arm.module)
    loaded = load_model(tmp_path / "model", "cpu")
    for s in (torch.zeros(2, 2), torch.full((2, 2), 100.0)):
        for model in (algorithm, loaded):
            with torch.no_grad():  # a belief may be kept over several steps, and is nobody's to train
                action = model.act(believes(model, data), s)
            assert action.shape == (2, 2)
            assert float(action.abs().max()) <= 1
            assert not action.requires_grad
            assert torch.equal(action, algorithm.act(believes(algorithm, data), s))
    prior = algorithm.prior(2)
    assert torch.equal(loaded.act(loaded.prior(2), torch.zeros(2, 2)), algorithm.act(prior, torch.zeros(2, 2)))


@pytest.mark.parametrize("name", ARMS)
def test_behind_a_scale_a_method_is_what_it_is_on_standardized_data(name, tmp_path):
    """Training, contexts, own steps and the saved model: the same bytes as with data that were standardized before."""
    arm, data = ARMS[name], two_goals(0, ARMS[name].good)
    mean, std = observation_scale(data)
    assert np.allclose(mean, data.observation.reshape(-1, 2).mean(0), atol=1e-6)
    assert np.allclose(std, data.observation.reshape(-1, 2).std(0) + 1e-3, atol=1e-6)
    low, wide = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)

    def scaled(x: Any) -> Any:
        return (x - low) / wide

    before = replace(data, observation=scaled(data.observation), next_observation=scaled(data.next_observation))
    plain = make(arm, **arm.short)
    behind = standardized(make(arm, **arm.short), mean, std)
    assert (type(behind).__name__, behind.PROTOCOLS) == (type(plain).__name__, plain.PROTOCOLS)
    assert type(behind).least_context(behind.config) == type(plain).least_context(plain.config)
    for algorithm, own in ((plain, before), (behind, data)):
        fit(algorithm, own, 8, tmp_path / f"state {own is data}")
    save_model(behind, tmp_path / "model", "mine", arm.module)
    loaded = load_model(tmp_path / "model", "cpu")
    assert (loaded.spec.mean, loaded.spec.std) == (tuple(mean), tuple(std))
    one, two = plain.training_state(), behind.training_state()
    assert one.keys() == two.keys()
    assert [key for key in one if one[key].numpy().tobytes() != two[key].numpy().tobytes()] == []
    raw = torch.full((2, 2), 0.3)
    near = torch.from_numpy(scaled(raw.numpy()))
    beliefs = [believes(plain, before), believes(behind, data), believes(loaded, data)]
    reward = torch.ones(2, 1)
    for _ in range(2):
        expected = plain.act(beliefs[0], near)
        for place, (algorithm, s) in enumerate(((plain, near), (behind, raw), (loaded, raw))):
            action = algorithm.act(beliefs[place], s)
            assert torch.equal(action, expected)
            step = (s[:, None], action[:, None], reward, s[:, None], reward * 0, reward)
            seen = Experience(*step, task=torch.arange(2), valid=reward)
            beliefs[place] = algorithm.observe(beliefs[place], seen)
    fresh, other = behind.untrained(3), plain.untrained(3)
    assert torch.equal(fresh.act(fresh.prior(2), raw), other.act(other.prior(2), near))


@pytest.mark.parametrize("name", FORMS)
def test_data_that_say_nothing_and_lie_on_the_bounds_leave_everything_finite(name, tmp_path):
    """Equal rows, actions on the edge of the box, no reward: no variance to divide by, no logarithm of zero."""
    arm, data = FORMS[name], two_goals(0, FORMS[name].good)
    still = {n: getattr(data, n) * 0 for n in ("observation", "next_observation", "reward", "sparse_reward")}
    data = TaskData(**{**vars(data), **still, "action": np.ones_like(data.action)})
    algorithm = make(arm, **arm.short)
    fit(algorithm, data, 8, tmp_path / "state", log_every=1)  # raises where a scalar is not finite
    assert all(bool(torch.isfinite(x).all()) for x in algorithm.training_state().values() if x.is_floating_point())
    assert bool(torch.isfinite(algorithm.act(believes(algorithm, data), torch.zeros(2, 2))).all())


# --- protocols ---------------------------------------------------------------------------------------------------

ALL_PROTOCOLS = registry.names("omrl.evaluation.protocols")
BRIEF: dict[str, dict[str, Any]] = {  # beside two episodes, once
    "fine-tune": {"context": 20, "evaluations": 1, "first_update": 1, "updates": 2},
    "online-idaq": {"exploration_episodes": 1, "prior_context": 10},
    "online-prior": {"exploration_episodes": 1, "prior_context": 10},
}


def served(name: str) -> list[str]:
    return sorted(registry.load("omrl.algorithms", name).ALGORITHM.PROTOCOLS)


SERVED = [(name, chosen) for name, arm in ARMS.items() for chosen in served(arm.module)]


@pytest.fixture(scope="module")
def world() -> tuple[Family, list[dict[str, Any]], TaskData]:
    """Two training and two test tasks of a point robot, with random episodes."""
    family = load_family("sparse-point-robot", {"horizon": SPEC.horizon})
    tasks = [
        {"index": i, "split": "train" if i < 2 else "test", "parameters": family.sample(i, 1337),
         "random_return": 0.0, "oracle_return": 3.0}
        for i in range(4)
    ]  # fmt: skip
    rng, env, count = np.random.default_rng(0), family.batch([t["parameters"] for t in tasks], 1), 6
    made = [
        episodes(env, lambda s, t: rng.uniform(-1, 1, s.shape).astype(np.float32), SPEC.horizon) for _ in range(count)
    ]
    names = ("observation", "action", "reward", "sparse_reward", "next_observation")
    fields = {n: np.concatenate([getattr(e, n) for e in made], axis=1).astype(np.float32) for n in names}
    rows = np.broadcast_to(np.arange(count * SPEC.horizon), (4, count * SPEC.horizon))
    start = rows // SPEC.horizon * SPEC.horizon
    data = TaskData(
        (0, 1, 2, 3), **fields, terminal=np.zeros(rows.shape, np.float32), checkpoint=np.zeros(rows.shape, np.int32),
        step=(rows - start).astype(np.int32), start=start, end=start + SPEC.horizon, inference="dense",
    )  # fmt: skip
    return family, tasks, data


def evaluated(name: str, chosen: str, world: tuple[Family, list[dict[str, Any]], TaskData]) -> tuple[Run, Episodes]:
    family, tasks, data = world
    algorithm, module = make(ARMS[name], **ARMS[name].short), protocol(chosen)
    if columns := algorithm.columns(data):
        data = data.with_columns(columns)
    config = parse(module.CONFIG, {"episodes": 2, "repetitions": 1} | BRIEF.get(chosen, {}), "evaluate")
    features = np.zeros((len(tasks), data.rows, 0), np.float32)
    run = Run(algorithm, family, data, tasks, config, ("test", chosen), 0, features)
    return run, module.run(run)


def test_every_protocol_has_a_method():
    assert {chosen for _, chosen in SERVED} == set(ALL_PROTOCOLS)


@pytest.mark.parametrize(("name", "chosen"), SERVED)
def test_a_method_serves_its_protocols_the_same_each_time(name, chosen, world):
    run, last = evaluated(name, chosen, world)
    assert last.reward.shape == (4, SPEC.horizon)
    assert sorted(row["task"] for row in run.rows if row["counted"]) == [0, 1, 2, 3]
    for row in run.rows:
        assert row.keys() >= {"split", "repetition", "episode", "context_transitions", "return", "normalized"}
        assert row["split"] == ("train" if row["task"] < 2 else "test")
        assert np.isfinite([row["return"], row["normalized"], row["dense_return"], row["sparse_return"]]).all()
        assert row["context_transitions"] >= 0
    if chosen == "offline-context":  # a prompt of one segment, then two; else 20 transitions, then 40
        shown = [row["context_transitions"] for row in run.rows if row["task"] == 3]
        assert shown == ([3, 6] if name == "prompt-dt" else [20, 40])
    again, other = evaluated(name, chosen, world)
    assert repr(again.rows) == repr(run.rows)  # NaN equals NaN in print alone
    np.testing.assert_array_equal(last.action, other.action)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_check_refuses_the_protocols_that_a_method_cannot_serve(name, tmp_path, monkeypatch):
    values = yaml.safe_load((ROOT / "pipelines" / "smoke" / "params.yaml").read_text())
    own = next(arm for arm in ARMS.values() if arm.module == name)
    small = own.values | own.short
    if "tasks" in small:
        small["tasks"] = values["tasks"]["train"]
    values["algorithms"], values["meta_train"] = {name: small}, {"steps": 8}
    monkeypatch.chdir(tmp_path)
    can = served(name)
    for chosen in ALL_PROTOCOLS:
        values["evaluate"] = {"protocol": chosen, **BRIEF.get(chosen, {})}
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(values))
        if chosen in can:
            assert any(cell.startswith("evaluate@") for cell in experiment.check(file))
            continue
        message = rf"evaluate\.protocol = '{chosen}': algorithm '{name}' cannot serve it; it serves {can[0]}"
        with pytest.raises(UserError, match=message):
            experiment.check(file)


# --- environments ------------------------------------------------------------------------------------------------

EXTRA = pytest.mark.skipif(not importlib.util.find_spec("metaworld"), reason="needs 'make setup-metaworld'")
FAMILIES = [
    pytest.param(name, marks=EXTRA if name.startswith("metaworld-") else ()) for name in registry.names("omrl.envs")
]


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return load_family(request.param, {"goals": 2} if request.param == "metaworld-ml45" else None)


def actions(family: Family, steps: int, rows: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.2, 1.2, (steps, rows, family.action_size)).astype(np.float32)


def streams(count: int, first: int = 0) -> list[np.random.Generator]:
    return [gymnasium.utils.seeding.np_random(first + i)[0] for i in range(count)]


def test_gymnasium_accepts_the_single_form(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unbounded plane is what it is
        check_env(family.make(family.sample(1, 0)).unwrapped, skip_render_check=True)
    made = gymnasium.make(family.env_id)
    assert type(made.unwrapped).__module__ == type(family).__module__
    with pytest.raises(UserError, match="unknown key"):
        gymnasium.make(family.env_id, config={"no such key": 1})


def test_a_task_depends_on_seed_and_index_only(family):
    count = min(family.capacity or 6, 6)
    first = [family.sample(i, 7) for i in range(count)]
    assert [family.sample(i, 7) for i in reversed(range(count))] == first[::-1]
    assert len({str(task) for task in first}) > 1
    with pytest.raises(UserError, match=r"task index -1 is out of range.*tasks\.train"):
        family.sample(-1, 0)
    if family.capacity is not None:
        with pytest.raises(UserError, match=f"task index {family.capacity} is out of range"):
            family.sample(family.capacity, 0)


def test_how_many_tasks_train_does_not_change_the_test_tasks_and_the_reverse(family):
    train, test = (1, 2) if family.capacity == 4 else (5, 3)
    tasks = family.tasks(train, test, 7)
    more = family.tasks(train + 1, test, 7)
    assert more[:train] == tasks[:train]
    assert more[train + 1 :] == tasks[train:]
    assert family.tasks(train, 1, 7) == tasks[: train + 1]
    assert len(tasks) == train + test
    if family.capacity is None:
        assert len({str(task) for task in more}) == len(more)
        assert family.tasks(train, test, 8)[train:] != tasks[train:]
    else:
        everything = [family.sample(i, 7) for i in range(family.capacity)]
        for count in (1, family.first_test, family.capacity - 1):
            taken = family.tasks(count, family.capacity - count, 7)
            assert sorted(map(str, taken)) == sorted(map(str, everything))
        # the published split
        assert family.tasks(family.first_test, family.capacity - family.first_test, 7) == everything
        with pytest.raises(UserError, match=rf"tasks\.train \+ tasks\.test = 2 \+ {family.capacity}: expected at most"):
            family.tasks(2, family.capacity, 7)


def test_the_family_says_which_reward_inference_sees(family):
    # FOCAL and FOCAL++ feed sparse rewards to the encoder of their sparse families alone; SMAC's Sawyer has no other
    sparse = family.name.startswith(("sparse-", "sawyer-"))
    assert family.inference_reward == ("sparse" if sparse else "dense")
    assert family.spec()["inference_reward"] == family.inference_reward


def test_batched_is_single_bit_for_bit_and_the_reward_function_is_what_stepping_pays(family):
    """In any company, on one thread or two; finite, inside the spaces, in float32, in memory of its own."""
    tasks = [family.sample(i, 1) for i in range(3)]
    batch, threaded = family.batch(tasks, 2), family.batch(tasks, 2, threads=2)
    single = family.make(tasks[1])
    observation, _ = single.reset(seed=3)
    start = batch.reset(streams(6))
    np.testing.assert_array_equal(start[3], observation)
    np.testing.assert_array_equal(threaded.reset(streams(6)), start)
    assert single.observation_space.contains(observation)
    for t, action in enumerate(actions(family, 40, 6)):
        kept = observation.copy()
        many, other = batch.step(action), threaded.step(action)
        following, reward, terminated, truncated, info = single.step(action[3])
        np.testing.assert_array_equal(observation, kept)
        np.testing.assert_array_equal(many.next_observation, other.next_observation)
        np.testing.assert_array_equal(many.next_observation[3], following)
        np.testing.assert_array_equal(many.features[3], info["features"])
        assert (many.reward[3], many.sparse_reward[3]) == (reward, info["sparse_reward"])
        assert many.terminated[3] == terminated
        assert truncated == (t + 1 == family.horizon)
        for values in (many.next_observation, many.reward, many.sparse_reward, many.features):
            assert values.dtype == np.float32
            assert np.isfinite(values).all()
        assert many.features.shape == (6, family.feature_size)
        assert single.observation_space.contains(following)
        stored = (observation[None], action[3:4], many.next_observation[3:4], many.features[3:4])
        dense, sparse = family.reward(tasks[1], *stored)  # own-task relabelling
        assert (dense[0], sparse[0]) == (many.reward[3], many.sparse_reward[3])
        assert dense.dtype == sparse.dtype == np.float32
        observation = following
        if truncated or terminated:
            break
    short = family.make(tasks[0], 2)
    short.reset(seed=0)
    assert [short.step(np.zeros(family.action_size, np.float32))[3] for _ in range(2)] == [False, True]


def test_a_step_depends_on_the_state_alone(family):
    """What get_state returns is everything: a solver's warm start, say, is not carried along."""
    task, steps = family.sample(0, 0), actions(family, 16, 2)
    whole, parts = family.batch([task], 2), family.batch([task], 2)
    whole.reset(streams(2))
    parts.reset(streams(2))
    for action in steps[:8]:
        whole.step(action)
        parts.step(action)
    state = parts.get_state()
    parts.reset(streams(2, 5))
    parts.set_state(state)
    for action in steps[8:]:
        a, b = whole.step(action), parts.step(action)
        np.testing.assert_array_equal(a.next_observation, b.next_observation)
        np.testing.assert_array_equal(a.features, b.features)


def test_a_copy_that_starts_anew_leaves_the_others_alone(family):
    task = family.sample(0, 0)
    batch, other, fresh = family.batch([task], 3), family.batch([task], 3), family.batch([task], 1)
    for env in (batch, other):
        env.reset(streams(3))
        for action in actions(family, 5, 3):
            env.step(action)
    batch.reset(streams(1, 9), np.array([1]))
    np.testing.assert_array_equal(batch.observation[1], fresh.reset(streams(1, 9))[0])
    action = actions(family, 1, 3)[0]
    a, b, c = batch.step(action), other.step(action), fresh.step(action[1:2])
    np.testing.assert_array_equal(a.next_observation[[0, 2]], b.next_observation[[0, 2]])
    np.testing.assert_array_equal(a.next_observation[1], c.next_observation[0])
    np.testing.assert_array_equal(a.features[1], c.features[0])


def test_two_tasks_really_differ(family):
    batch = family.batch([family.sample(i, 0) for i in range(2)])
    batch.reset([np.random.default_rng(0), np.random.default_rng(0)])
    rewards = np.stack([batch.step(np.repeat(a, 2, axis=0)).reward for a in actions(family, 20, 1)])
    assert np.abs(rewards[:, 0] - rewards[:, 1]).max() > 1e-3


def test_returns_are_normalized_between_floor_and_oracle_or_the_best_at_hand(family):
    task = family.sample(1, 0)
    oracle = family.oracle_return(task)
    if oracle is None:
        row = {"random_return": 1.0, "oracle_return": None}
        assert np.isnan(family.normalize(row, 3.0))
        assert family.normalize(row, 3.0, best=5.0) == 0.5
        return
    row = {"oracle_return": oracle, "random_return": family.random_return(task)}
    assert oracle > row["random_return"]
    assert family.normalize(row, oracle) == 1
    assert family.normalize(row, row["random_return"]) == 0


_ACTOR_CRITIC = {"policy": "actor_rate", "q": "critic_rate", "v": "critic_rate"}
RATES = {
    "focal": _ACTOR_CRITIC | {"encoder": "encoder_rate"},
    "focalpp": _ACTOR_CRITIC | {"encoder": "encoder_rate"},
    "pearl": _ACTOR_CRITIC | {"encoder": "encoder_rate"},
    "csro": _ACTOR_CRITIC | {"encoder": "encoder_rate", "club": "club_rate"},
    "unicorn": _ACTOR_CRITIC | {"encoder": "encoder_rate", "decoder": "decoder_rate"},
    "bc": {"encoder": "encoder_rate", "policy": "actor_rate"},
    "borel": {"vae": "vae_rate", "policy": "actor_rate", "q": "critic_rate"},
    "smac": {"q": "critic_rate", "context": "encoder_rate", "policy": "actor_rate"},
    "macaw": {
        "value": "value_rate", "policy": "policy_rate", "value_rates": "rate_rate", "policy_rates": "rate_rate",
        "coefficient": "rate_rate",
    },
    "mt-ft": {"value": "value_rate", "policy": "policy_rate"},
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_has_its_own_rate(name):
    keys = RATES[name]
    values = {key: 1e-3 * (i + 1) for i, key in enumerate(sorted(set(keys.values())))}
    found = create(name, values, Spec(2, 2, False), 0, "cpu").optimizers()
    assert {n: o.param_groups[0]["lr"] for n, o in found.items()} == {n: values[key] for n, key in keys.items()}
