"""SMAC: starting values, identities of its losses, what stands still online, and that no true reward gets in."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from batches import bag_of, meta_batch, moves_of, update
from test_online import FAMILY, ONLINE, TASKS, hashes, learn, make_folder
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

from omrl.algorithms import smac
from omrl.algorithms.base import Spec, create, load_model
from omrl.algorithms.smac import Smac, awac_weights, log_prob
from omrl.core.errors import UserError
from omrl.data import parquet, schema
from omrl.data.taskdata import TaskData
from omrl.evaluation.contexts import offline_context
from omrl.experiment import check
from omrl.learning import online
from omrl.nets.experience import Experience
from omrl.nets.generative import diagonal_kl

SMALL: dict[str, Any] = {
    "latent_dim": 3, "width": 16, "depth": 2, "encoder_width": 16, "encoder_depth": 2, "decoder_width": 16,
    "rl_batch": 8, "online_rl_batch": 8, "context_batch": 12,
}  # fmt: skip
PAIR = {"latent_dim": 2, "width": 8, "depth": 1, "encoder_width": 8, "encoder_depth": 1, "decoder_width": 8,
        "decoder_depth": 1, "rl_batch": 8, "online_rl_batch": 8, "context_batch": 8, "meta_batch": 2}  # fmt: skip


def make(seed: int = 0, spec: Spec | None = None, **values: Any) -> Smac:
    algorithm = create("smac", SMALL | values, spec or Spec(2, 2, False), seed, "cpu")
    assert isinstance(algorithm, Smac)
    return algorithm


def made_batch(seed: int = 1) -> dict[str, Experience]:
    g = torch.Generator().manual_seed(seed)
    s, a, r = torch.randn(4, 12, 2, generator=g), torch.rand(4, 12, 2, generator=g), torch.randn(4, 12, generator=g)
    moves = moves_of(s[:, :8], a[:, :8], r[:, :8], s[:, :8] + 0.1, torch.zeros(4, 8))
    return meta_batch(torch.tensor([0, 1, 1, 2]), bag_of(s, a, r), moves)


def spread(algorithm: Smac) -> Smac:
    """Move the last layers away from the start, where everything is all but zero."""
    with torch.no_grad():
        for net in (algorithm.encoder, algorithm.q, algorithm.target, algorithm.decoder):
            net.weights[-1].mul_(300)
    return algorithm


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def on(algorithm: Smac, batch: dict[str, Experience]) -> dict[str, torch.Tensor]:
    """Take an update of the self-supervised phase."""
    return algorithm.update(algorithm.online_phase(1), batch)


# --- starting values and identities ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "variance", "kl"), [(64, 0.01083, 8.84), (256, 0.002708, 12.29)])
def test_a_fresh_encoder_at_the_released_sizes(rows, variance, kl):
    algorithm = create("smac", {}, Spec(20, 6, False), 0, "cpu")
    assert isinstance(algorithm, Smac)
    g = torch.Generator().manual_seed(0)
    bag = bag_of(torch.randn(4, rows, 20, generator=g), torch.rand(4, rows, 6, generator=g), torch.zeros(4, rows))
    with torch.no_grad():
        for weight in algorithm.encoder.weights[-1:]:
            found = algorithm.posterior(bag)
            weight.zero_()  # outputs are near 0 from the start; at 0 the numbers are exact
        mean, exact = algorithm.posterior(bag)
    assert float(found[1].mean()) == pytest.approx(variance, rel=2e-2)
    assert float(exact.mean()) == pytest.approx(math.log(2) / rows, rel=1e-5)
    assert float(exact.mean()) == pytest.approx(variance, rel=5e-4)
    assert float(diagonal_kl((mean, exact), (mean, torch.ones_like(mean))).mean()) == pytest.approx(kl, rel=5e-4)


def test_biases_start_at_zero_and_the_target_is_no_copy_unless_asked_for():
    algorithm = make()
    for net in (algorithm.encoder, algorithm.decoder, algorithm.q, algorithm.target):
        assert not any(bias.any() for bias in net.biases)
    trunk = algorithm.policy.trunk
    assert not any(bias.any() for bias in trunk.biases[:-1])
    assert not trunk.biases[-1][..., :2].any()
    assert bool(trunk.biases[-1][..., 2:].all())
    assert not same(copies(algorithm.q), copies(algorithm.target))
    copied = make(target_start="copy")
    assert same(copies(copied.q), copies(copied.target))


def test_weights_have_mean_one_and_an_infinite_temperature_is_cloning():
    score = torch.randn(64, dtype=torch.float64)
    for beta in (0.3, 100.0):
        weights = awac_weights(score, beta)
        assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
        assert float(weights[0] / weights[1]) == pytest.approx(math.exp(float(score[0] - score[1]) / beta), rel=1e-9)
    moved = []
    for values in ({"beta": 1e30}, {"actor": "cloning"}, {"beta": 1e-2}):
        algorithm = spread(make(**values))
        update(algorithm, made_batch())
        moved.append(copies(algorithm.policy))
    assert same(moved[0], moved[1])
    assert not same(moved[0], moved[2])


def test_the_density_is_exact_where_actions_saturate():
    mean, log_std = torch.tensor([[0.3, -2.0]], dtype=torch.float64), torch.tensor([[-0.5, 0.4]], dtype=torch.float64)
    before = torch.tensor([[1.2, -9.0]], dtype=torch.float64)
    known = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)])
    action = TanhTransform()(before)
    assert float(log_prob(mean, log_std, before)) == pytest.approx(float(known.log_prob(action)), rel=1e-6)


def test_losses_of_an_update_by_hand():
    algorithm, batch = spread(make(second_z=False, reward_scale=3.0, gamma=0.5)), made_batch()
    moves, before = batch["transitions"], algorithm.noise.get_state()
    with torch.no_grad():
        mean, variance = algorithm.posterior(batch["context"])
        noise = torch.Generator()
        noise.set_state(before)
        z = mean + variance.sqrt() * torch.randn(4, 3, generator=noise)
        wide = z[:, None].expand(4, 8, 3)
        torch.randn(32, 2, generator=noise)  # the action at s
        following = torch.cat([moves.next_observation, wide], -1).view(32, -1)
        mu, log_std = algorithm.policy(following)
        a2 = torch.tanh(mu + log_std.exp() * torch.randn(32, 2, generator=noise))
        value = algorithm.target(torch.cat([a2, following], -1)).amin(0)[:, 0]
        y = 3 * moves.reward.reshape(-1) + 0.5 * value
        state = torch.cat([moves.action, moves.observation, wide], -1).view(32, -1)
        q = algorithm.q(state)[..., 0]
        q_loss = ((q - y) ** 2).mean(1).sum()
        guess = algorithm.decoder(torch.cat([moves.observation, moves.action, wide], -1).view(32, -1))[:, 0]
        reward_loss = ((guess - moves.reward.reshape(-1)) ** 2).mean()  # unscaled
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = kl_divergence(Normal(mean, variance.sqrt()), standard).sum(1).mean()
    scalars = update(algorithm, batch)
    for name, expected in (("q_loss", q_loss), ("reward_loss", reward_loss), ("kl", kl), ("q_mean", q.mean())):
        assert float(scalars[name]) == pytest.approx(float(expected), rel=1e-4), name


def test_softplus_is_a_variance_or_a_standard_deviation():
    algorithm, other = spread(make()), spread(make(scale="std"))
    context = made_batch()["context"].part(0, 1)
    with torch.no_grad():
        (_, variance), (_, squared) = algorithm.posterior(context), other.posterior(context)
    torch.testing.assert_close(squared, variance.square())
    with torch.no_grad():  # a row that says nothing leaves the widest posterior, not an infinite one
        algorithm.encoder.biases[-1].fill_(1e30)
        assert float(algorithm.posterior(context)[1].max()) == pytest.approx(1e7)


def test_settings_change_what_they_name():
    base = spread(make())
    scalars = update(base, made_batch())
    z = spread(make(second_z=False))
    assert float(update(z, made_batch())["q_loss"]) != float(scalars["q_loss"])
    entropy = spread(make(entropy=0.5, gamma=0.99))
    assert float(update(entropy, made_batch())["q_loss"]) != float(scalars["q_loss"])
    sac = spread(make(actor="sac"))
    update(sac, made_batch())
    assert not same(copies(sac.policy), copies(base.policy))
    assert same(copies(sac.q), copies(base.q))  # the ablation is the actor's alone


def test_minus_q_counts_online_alone_and_is_the_old_or_the_new_critics():
    after = {}
    for name, values in {
        "new": {}, "old": {"actor_critic": "old"}, "none": {"online_q_weight": 0.0}, "cloning": {"actor": "cloning"},
    }.items():  # fmt: skip
        algorithm = spread(make(critic_rate=0.1, beta=1e30, **values))
        on(algorithm, made_batch())
        after[name] = copies(algorithm.policy)
    assert same(after["none"], after["cloning"])
    assert not same(after["new"], after["none"])
    assert not same(after["new"], after["old"])  # the critic moved far between the two


def test_encoder_and_decoder_stand_still_online():
    algorithm = spread(make())
    update(algorithm, made_batch())
    parts = [algorithm.encoder, algorithm.decoder, algorithm.policy, algorithm.q, algorithm.target]
    before = [copies(part) for part in parts]
    scalars = on(algorithm, made_batch(2))
    assert "kl" not in scalars
    assert [same(x, copies(part)) for x, part in zip(before, parts, strict=True)] == [True, True, False, False, False]


def test_beliefs_are_drawn_from_prior_and_posterior():
    algorithm, context = spread(make()), made_batch()["context"]
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([algorithm.prior(4, rng)["z"] for _ in range(500)])
    assert float(drawn.mean()) == pytest.approx(0, abs=0.05)
    assert float(drawn.std()) == pytest.approx(1, abs=0.05)
    belief = algorithm.adapt(algorithm.prior(4), context)
    drawn = torch.stack([algorithm.sample(belief, rng)["z"] for _ in range(2000)])
    torch.testing.assert_close(drawn.mean(0), belief["z"], atol=0.1, rtol=0.1)
    torch.testing.assert_close(drawn.var(0), belief["variance"], atol=0.01, rtol=0.2)
    assert torch.equal(algorithm.embedding(belief), belief["z"])
    s = torch.zeros(4, 2)
    assert torch.equal(algorithm.act(belief, s), algorithm.act(belief, s))
    assert not torch.equal(algorithm.act(belief, s, rng), algorithm.act(belief, s, rng))


def test_where_dynamics_differ_encoder_and_decoder_see_what_follows():
    algorithm = make(spec=Spec(2, 2, True))
    assert algorithm.encoder.weights[0].shape[1] == 2 + 2 + 1 + 2
    assert algorithm.decoder.weights[0].shape[1] == 2 + 2 + 2 + 3


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_goals_are_told_apart_solved_and_decoded(one_thread):
    algorithm = make(
        meta_batch=8, width=32, encoder_width=32, actor_rate=3e-3, critic_rate=3e-3, encoder_rate=3e-3, gamma=0.5,
        beta=0.3, kl_weight=0.01,
    )  # fmt: skip

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        tasks = torch.randint(2, (8,), generator=g)
        goal = (0.8 * (1.0 - 2 * tasks))[:, None]
        s, a = torch.rand(8, 32, 2, generator=g) - 0.5, torch.rand(8, 32, 2, generator=g) * 2 - 1
        return tasks, s, a, 1 - (a[..., 0] - goal).abs()

    for step in range(800):
        tasks, s, a, r = draw(step)
        batch = meta_batch(tasks, bag_of(s, a, r), moves_of(s, a, r, s, torch.ones(8, 32)))
        scalars = update(algorithm, batch)
    assert float(scalars["weight_std"]) > 0.3  # the weights do choose
    tasks, s, a, r = draw(10**6)
    context = bag_of(s, a, r)
    chosen = algorithm.actions(s, algorithm.infer(context))[..., 0].mean(1)
    assert float((chosen - 0.8 * (1.0 - 2 * tasks)).abs().max()) < 0.3
    steps = replace(context, signal=torch.full_like(r, torch.nan))
    guess = algorithm.decode(context, steps, torch.Generator().manual_seed(0))
    assert float((guess - r).abs().mean()) < 0.1


# --- the self-supervised phase -----------------------------------------------------------------------------------

SELF = {"label": "decoded", "resample": "step", "posterior": "offline"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder("smac", PAIR)
    return tmp_path


def test_behind_a_scale_it_decodes_and_learns_on(tmp_path, monkeypatch):
    """What it collects is kept as the simulator gave it; what is decoded is what the method decodes of scaled steps."""
    monkeypatch.chdir(tmp_path)
    make_folder("smac", PAIR, standardize_observations=True)
    before = load_model("data/models/mine/expert/0", "cpu")
    found = learn(**SELF, updates=1, rounds=1)
    after = load_model(found, "cpu")
    assert after.spec == before.spec
    assert len(after.spec.std) == 2
    assert any(not torch.equal(x, before.model_state()[name]) for name, x in after.model_state().items())
    columns = parquet.read_transitions(found / "collected=000.parquet")
    moved = columns["next_observation"] - columns["observation"]
    assert np.allclose(moved, 0.1 * columns["action"], atol=1e-6)  # the family's own units
    assert isinstance(before, online.Decoding)
    raw = made_batch()["transitions"]
    context = replace(raw, signal=raw.reward)
    mean, std = (torch.tensor(x) for x in (before.spec.mean, before.spec.std))

    def scaled(x: Experience) -> Experience:
        return replace(x, observation=(x.observation - mean) / std, next_observation=(x.next_observation - mean) / std)

    guess, wanted = (
        method.decode(change(context), change(raw), torch.Generator().manual_seed(0))
        for method, change in ((before, lambda x: x), (before.inner, scaled))
    )
    assert torch.equal(guess, wanted)
    assert float((guess - before.inner.decode(context, raw, torch.Generator().manual_seed(0))).abs().max()) > 0


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every reward of the simulator NaN."""

    class Poisoned:
        def __init__(self, env: Any) -> None:
            self._env = env

        def reset(self, *arguments: Any) -> Any:
            return self._env.reset(*arguments)

        def step(self, actions: Any) -> Any:
            result = self._env.step(actions)
            return replace(result, reward=result.reward * np.nan, sparse_reward=result.sparse_reward * np.nan)

    batch = type(FAMILY).batch
    monkeypatch.setattr(type(FAMILY), "batch", lambda self, *a, **k: Poisoned(batch(self, *a, **k)))


@pytest.mark.parametrize("posterior", ["offline", "own"])
def test_no_true_reward_reaches_the_learner(folder, monkeypatch, posterior):
    values = SELF | {"posterior": posterior}
    expected = hashes(learn(**values))
    poison(monkeypatch)
    env = FAMILY.batch([TASKS[0]["parameters"]], 1)
    env.reset([np.random.default_rng(0)])
    assert np.isnan(env.step(np.zeros((1, 2), np.float32)).reward).all()  # the poison is there
    found = learn("on", **values)
    assert hashes(found) == expected
    assert all(torch.isfinite(x).all() for x in load_model(found, "cpu").model_state().values())
    with pytest.raises(UserError, match="not finite"):  # the oracle does look
        learn("oracle", **(values | {"label": "simulator"}))


def test_rows_carry_the_decoders_raw_rewards(folder):
    found = learn(**SELF)
    before, after = (load_model(f, "cpu").model_state() for f in ("data/models/mine/expert/0", found))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("encoder", "decoder"))} == still
    for round_ in range(ONLINE["rounds"]):
        columns = parquet.read_transitions(found / f"collected={round_:03d}.parquet")
        assert set(columns["reward_source"]) == {"decoded"}
        np.testing.assert_array_equal(columns["reward"], columns["sparse_reward"])
        assert np.isfinite(columns["reward"]).all()
        own = schema.take(columns, columns["task"] == 0)
        true, _ = FAMILY.reward(
            TASKS[0]["parameters"], own["observation"], own["action"], own["next_observation"], own["reward_features"]
        )
        assert not np.allclose(own["reward"], true)


def test_the_decoder_is_given_an_offline_context_of_the_same_task(folder):
    seen = []
    model = load_model("data/models/mine/expert/0", "cpu")
    real = Smac.decode

    def spy(self: Smac, context: Experience, steps: Experience, rng: torch.Generator) -> torch.Tensor:
        assert torch.isnan(steps.reward).all()
        assert torch.isnan(steps.signal).all()
        seen.append(context)
        return real(self, context, steps, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Smac, "decode", spy)
        learn(**SELF, rounds=1)
    assert len(seen) == ONLINE["episodes"]
    data = TaskData.load("data/datasets/expert", [0, 1], "dense")
    for context in seen:
        for place in (0, 1):
            known = {row.tobytes() for row in data.observation[place]}
            assert {row.tobytes() for row in context.observation[place].numpy()} <= known
    rngs = [np.random.default_rng(i) for i in range(2)]
    assert offline_context(model, data, 5, rngs).shape == (2, 5)


def test_a_sparse_family_is_refused(tmp_path):
    values = yaml.safe_load((online.Path(__file__).parents[1] / "pipelines/smoke/params.yaml").read_text())
    values["algorithms"]["smac"] = {}
    values["online"] = {"self": {"algorithm": "smac", "label": "decoded"}}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"online\.self\.label = decoded: inference sees the sparse reward"):
        check(file)
    values["env"], values["env_config"] = "point-robot", {}
    values["relabel"], values["dataset"]["train"] = {}, ["expert"]
    file.write_text(yaml.safe_dump(values))
    assert {"online@self", "evaluate_online@self"} <= set(check(file))
    values["online"]["self"]["tasks"] = "test"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"online\.self\.tasks = test with label = decoded: .*test tasks' offline data"):
        check(file)


def test_drawing_a_belief_at_every_step_is_refused_where_steps_are_read(tmp_path):
    values = yaml.safe_load((online.Path(__file__).parents[1] / "pipelines/smoke/params.yaml").read_text())
    values["algorithms"] = {"prompt-dt": {"window": 5}}
    values["dataset"]["train"] = ["expert"]
    values["online"] = {"on": {"algorithm": "prompt-dt", "resample": "step", "posterior": "offline"}}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"online\.on\.resample = step: algorithm 'prompt-dt' reads the"):
        check(file)
    values["online"] = {}
    values["evaluate"] = {
        "protocol": "online-prior", "episodes": 3, "exploration_episodes": 2, "resample": "step", "repetitions": 2
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"evaluate\.resample = step: algorithm 'prompt-dt' reads the episode's steps"):
        check(file)
    values["algorithms"] = {"focal": {}}
    file.write_text(yaml.safe_dump(values))
    assert "evaluate@focal-expert-expert-0" in check(file)


def test_rows_that_end_have_no_following_value_and_the_target_follows_at_its_rate():
    batch = made_batch()
    ended = {**batch, "transitions": replace(batch["transitions"], terminal=torch.ones(4, 8))}
    one, two = (spread(make(gamma=gamma, reward_scale=3.0, tau=0.25)) for gamma in (0.9, 0.0))
    before = copies(one.target)
    assert torch.equal(update(one, ended)["q_loss"], update(two, batch)["q_loss"])
    for was, now, goal in zip(before, copies(one.target), copies(one.q), strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * goal)


def test_the_actors_weights_are_of_advantages(monkeypatch):
    scores, values = [], []
    algorithm, batch = spread(make()), made_batch()
    smallest = algorithm._smallest

    def weights(score: torch.Tensor, beta: float) -> torch.Tensor:
        scores.append(score)
        return torch.ones_like(score)

    def of_critics(net: Any, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        found = smallest(net, state, action)
        if net is algorithm.q:
            values.append(found)
        return found

    monkeypatch.setattr(smac, "awac_weights", weights)
    monkeypatch.setattr(algorithm, "_smallest", of_critics)
    update(algorithm, batch)
    own, drawn = values[:2]
    assert torch.equal(scores[0], own - drawn)
