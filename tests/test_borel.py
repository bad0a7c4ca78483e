"""BOReL: the VAE's sizes, identities and losses, beliefs in the data and while acting, two goals, its protocol."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from omrl.algorithms.base import Spec, create, join_beliefs, map_belief
from omrl.algorithms.borel import Borel, Rollouts, rollout_bounds, rollouts
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.envs.base import load_family
from omrl.evaluation.contexts import offline_context, transitions_of
from omrl.evaluation.protocols import online_belief
from omrl.evaluation.protocols.base import Run
from omrl.learning.sampler import Sampler
from omrl.learning.train import begin
from omrl.nets.experience import Experience, from_arrays, joined
from omrl.nets.recurrent import BeliefEncoder, RewardDecoder, gaussian_divergence

CPU = torch.device("cpu")
HORIZON = 5
GOALS = np.array([0.8, -0.8])
SMALL = {
    "latent_dim": 2, "hidden": 16, "width": 32, "vae_steps": 300, "vae_rate": 5e-3, "vae_meta_batch": 4,
    "vae_rollouts": 4, "meta_batch": 4, "rl_batch": 32, "gamma": 0.5, "reward_scale": 20.0, "actor_rate": 3e-3,
    "critic_rate": 3e-3, "decode_from": "transition", "beliefs": 6,
}  # fmt: skip


def make(seed: int = 0, **values: Any) -> Borel:
    algorithm = create("borel", SMALL | values, Spec(2, 2, False, HORIZON), seed, "cpu")
    assert isinstance(algorithm, Borel)
    return algorithm


def data(seed: int = 0, episodes: int = 60, lengths: int = HORIZON) -> TaskData:
    """Two tasks, uniform actions, the reward is nearness to the goal's side; episodes of one checkpoint in fours."""
    rng = np.random.default_rng(seed)
    rows = episodes * lengths
    s = rng.uniform(-0.5, 0.5, (2, rows, 2)).astype(np.float32)
    a = rng.uniform(-1, 1, (2, rows, 2)).astype(np.float32)
    r = (1 - np.abs(a[..., 0] - GOALS[:, None])).astype(np.float32)
    step = np.tile(np.arange(lengths), (2, episodes))
    start = np.arange(rows) - step
    return TaskData(
        tasks=(0, 1), observation=s, action=a, reward=r, sparse_reward=r, next_observation=(s + 0.1 * a),
        terminal=np.zeros_like(r), checkpoint=(start // (4 * lengths)).astype(np.int32), step=step.astype(np.int32),
        start=start, end=start + lengths, inference="dense",
    )  # fmt: skip


def some_rollouts(n: int = 3, t: int = 5, seed: int = 0) -> Rollouts:
    g = torch.Generator().manual_seed(seed)
    s, a, following = (torch.randn(n, t, 2, generator=g) for _ in range(3))
    valid = torch.ones(n, t)
    valid[1, 3:] = 0
    return Rollouts(s, a, following, torch.randn(n, t, generator=g), valid)


# --- the VAE -----------------------------------------------------------------------------------------------------


def size(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("widths", "encoder", "decoder", "transition"), [((21, 6), 76_634, 4_657, True), ((3, 2), 75_994, 2_433, False)]
)
def test_sizes_are_the_releases(widths, encoder, decoder, transition):
    """With its flag in the state. The point's decoder has 48 weights more there, which it does not use."""
    g = torch.Generator().manual_seed(0)
    assert size(BeliefEncoder(*widths, 128, 5, g)) == encoder
    assert size(RewardDecoder(*widths, 5, transition, g)) == decoder


def test_the_prior_is_the_heads_biases_and_equal_beliefs_have_no_divergence():
    algorithm = make()
    mean, log_variance = algorithm.encoder.belief(algorithm.prior(3))
    assert torch.equal(mean, algorithm.encoder.mean.bias.expand(3, 2))
    assert torch.equal(log_variance, algorithm.encoder.log_variance.bias.expand(3, 2))
    assert gaussian_divergence(mean, log_variance, mean, log_variance).tolist() == [0.0] * 3


def test_divergence_is_torchs():
    g = torch.Generator().manual_seed(0)
    m1, v1, m2, v2 = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(4))
    expected = kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp())).sum(-1)
    torch.testing.assert_close(gaussian_divergence(m1, v1, m2, v2), expected)


@pytest.mark.parametrize("transition", [True, False])
def test_the_factorized_decoder_is_the_plain_one(transition):
    g = torch.Generator().manual_seed(0)
    net = RewardDecoder(3, 2, 4, transition, g).double()
    s, following = (torch.randn(2, 5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    a, z = torch.randn(2, 5, 2, generator=g).double(), torch.randn(2, 6, 4, generator=g).double()
    found = net(z, net.features(s, a, following))
    for n in range(2):
        for b in range(6):
            for t in range(5):
                parts = [torch.relu(net.state(following[n, t]))]
                if transition:
                    assert net.action is not None
                    parts += [torch.relu(net.action(a[n, t])), torch.relu(net.state(s[n, t]))]
                x = torch.cat([z[n, b], *parts])
                for layer in (net.first, net.second):
                    x = torch.relu(layer(x))
                torch.testing.assert_close(found[n, b, t], net.last(x)[0])


@pytest.mark.usefixtures("double_precision")
def test_losses_belief_by_belief_and_drawn_beliefs_expect_the_same():
    algorithm = make()
    steps = Rollouts(*(x.double() for x in some_rollouts()))
    noise = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    everything = torch.arange(6)
    error, divergence = algorithm.vae_losses(steps, everything, noise)
    expected, kl = 0.0, 0.0
    for n in range(3):
        length = int(steps.valid[n].sum())
        hidden, before = algorithm.prior(1).double(), Normal(torch.zeros(2), torch.ones(2))
        for t in range(length + 1):
            if t:
                one = (x[n : n + 1, t - 1 : t] for x in (steps.action, steps.next_observation, steps.signal))
                hidden = algorithm.encoder(*one, hidden)[:, 0]
            mean, log_variance = (x[0] for x in algorithm.encoder.belief(hidden))
            belief = Normal(mean, (log_variance / 2).exp())
            kl += kl_divergence(belief, before).sum().item()
            before = belief
            z = (mean + belief.stddev * noise[n, t]).view(1, 1, 2)
            row = slice(n, n + 1)
            features = algorithm.decoder.features(
                steps.observation[row, :length], steps.action[row, :length], steps.next_observation[row, :length]
            )
            expected += (algorithm.decoder(z, features)[0, 0] - steps.signal[n, :length]).square().mean().item()
    assert error.item() == pytest.approx(expected / 3, rel=1e-9)
    assert divergence.item() == pytest.approx(kl / 3, rel=1e-9)
    singles = [algorithm.vae_losses(steps, everything[t : t + 1], noise[:, t : t + 1])[0].item() for t in range(6)]
    assert np.mean(singles) == pytest.approx(error.item(), rel=1e-9)


def test_the_kl_counts_with_its_weight():
    found = []
    for weight in (0.0, 0.5):
        algorithm, source = make(kl_weight=weight, beliefs=0), data()
        vae = algorithm.phases(400)[0]
        found.append(algorithm.update(vae, Sampler(source, 0, CPU).draw(vae)))
    assert float(found[1]["vae_loss"] - found[0]["vae_loss"]) == pytest.approx(0.5 * float(found[0]["kl"]), rel=1e-4)


def test_padding_stands_behind_all_episodes_of_a_rollout():
    values = torch.arange(12.0).view(1, 4, 3)  # four episodes of up to three steps, two rollouts
    valid = torch.tensor([[[1.0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]])
    wide = values.unsqueeze(-1)
    part = Experience(wide, wide, values, wide, values, values, torch.zeros(1, dtype=torch.int64), valid=valid)
    found = rollouts([part], 2)
    assert found.signal.tolist() == [[0, 1, 2, 3, 4], [6, 7, 9, 10, 11]]
    assert found.valid.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    two = rollouts([part, part.part(0, 2)], 1)
    assert two.signal.tolist() == [[0, 1, 2, 3, 6, 7, 9, 10, 11, 0, 1, 2, 3]]


def test_the_first_half_of_a_rollout_is_the_contexts():
    """Relabelling is a pair of datasets: the first episode from the relabelled one, the second the task's own."""
    algorithm = make(episodes=3)
    vae, policy = algorithm.phases(400)
    own, mixed = data(0), data(1)
    batch = Sampler(own, 0, CPU, mixed).draw(vae)
    found = rollouts([batch["context"], batch["transitions"]], 4)
    assert found.valid.shape == (16, 3 * HORIZON)
    assert all(r in mixed.reward for r in found.signal[:, :HORIZON].flatten().numpy())
    assert all(r in own.reward for r in found.signal[:, HORIZON:].flatten().numpy())
    assert (vae.name, vae.steps, policy.name, policy.steps) == ("vae", 300, "policy", 100)


# --- beliefs in the data -----------------------------------------------------------------------------------------


def test_rollouts_in_the_data_are_successive_episodes_of_a_checkpoint():
    source = data(episodes=10, lengths=2)  # checkpoints: episodes 0-3, 4-7, 8-9
    assert rollout_bounds(source, 0, 3).tolist() == [[0, 6], [6, 8], [8, 14], [14, 16], [16, 20]]


def test_rollouts_of_a_relabelled_set_go_through_checkpoints_that_have_one_episode_each():
    source = data(episodes=10, lengths=2)
    of_each = np.array([0, 10, 20, 0, 10, 10, 0, 10, 20, 30], dtype=np.int32)  # by source task and checkpoint
    source = replace(source, checkpoint=np.tile(of_each.repeat(2), (2, 1)))
    assert rollout_bounds(source, 0, 2).tolist() == [[0, 4], [4, 8], [8, 12], [12, 16], [16, 20]]


def test_few_updates_in_the_environment_are_the_policys():
    algorithm, source = make(), data()
    phase = algorithm.online_phase(5)
    assert (phase.name, phase.steps) == ("online", 5)
    assert {name: draw.unit for name, draw in phase.draws.items()} == {"transitions": "row"}
    sampler = Sampler(source.with_columns(algorithm.begin(phase, source)), 0, CPU)
    assert "policy_loss" in algorithm.update(phase, sampler.draw(phase))


def test_columns_hold_the_belief_before_and_after_every_step():
    algorithm, source = make(episodes=2), data(episodes=6)
    vae, policy = algorithm.phases(400)
    assert algorithm.begin(vae, source) == {}
    columns = algorithm.begin(policy, source)
    for task in range(2):
        for first, end in rollout_bounds(source, task, 2):
            hidden = algorithm.prior(1)
            for row in range(first, end):
                torch.testing.assert_close(torch.from_numpy(columns["belief"][task, row]), algorithm._vector(hidden)[0])
                fields = ("action", "next_observation", "signal")
                one = (torch.from_numpy(getattr(source, n)[task, row : row + 1]).unsqueeze(0) for n in fields)
                hidden = algorithm.encoder(*one, hidden)[:, 0]
                torch.testing.assert_close(
                    torch.from_numpy(columns["next_belief"][task, row]), algorithm._vector(hidden)[0]
                )
                seam = row + 1 < end and source.step[task, row + 1] == 0
                following = source.observation[task, row + 1] if seam else source.next_observation[task, row]
                np.testing.assert_array_equal(columns["following"][task, row], following)


def test_the_policy_learns_on_state_and_belief_and_the_vae_rests():
    algorithm, source = make(), replace(data(), reward=data(1).reward, inference="sparse")
    (_, policy) = algorithm.phases(301)
    before = {name: x.clone() for name, x in algorithm.model_state().items()}
    sampler = Sampler(source.with_columns(algorithm.begin(policy, source)), 0, CPU)
    batch = sampler.draw(policy)
    rows = algorithm._augmented(batch["transitions"])
    assert rows.observation.shape == (4, 32, 2 + 4)
    extra = batch["transitions"].extra
    assert torch.equal(rows.next_observation, torch.cat([extra["following"], extra["next_belief"]], -1))
    assert torch.equal(rows.reward, batch["transitions"].signal)
    dense = make(policy_reward="dense")._augmented(batch["transitions"])
    assert torch.equal(dense.reward, batch["transitions"].reward)
    assert not torch.equal(dense.reward, rows.reward)
    algorithm.update(policy, batch)
    moved = {name.split(".")[0] for name, x in algorithm.model_state().items() if not torch.equal(x, before[name])}
    assert moved == {"actor_critic"}


@pytest.mark.parametrize("regularization", [{}, {"kind": "kl-dual", "alpha": 1.0}])
def test_the_policy_learns_on_relabelled_rollouts_too_where_asked(regularization):
    algorithm, own, mixed = make(policy_context=0.25, regularization=regularization), data(0), data(1, lengths=6)
    (_, policy) = algorithm.phases(301)
    sampler = Sampler(own, 0, CPU, mixed)
    begin(algorithm, sampler, policy, own)
    batch = sampler.draw(policy)
    for name, source, rows in (("transitions", own, 24), ("context", mixed, 8)):
        columns, drawn = algorithm.begin(policy, source), batch[name]
        assert drawn.reward.shape == (4, rows)
        for task, place in enumerate(drawn.task.tolist()):
            for n in range(rows):
                (row,) = np.flatnonzero((source.observation[place] == drawn.observation[task, n].numpy()).all(-1))
                for key, column in columns.items():
                    np.testing.assert_array_equal(drawn.extra[key][task, n].numpy(), column[place, row])
    whole = joined([batch["transitions"], batch["context"]])
    assert whole.reward.tolist() == torch.cat([batch["transitions"].reward, batch["context"].reward], 1).tolist()
    learned: list[Experience] = []

    def record(rows: Experience, z: torch.Tensor, extra: list[Experience]) -> dict[str, torch.Tensor]:
        learned.extend([rows, *extra])
        return {}

    algorithm.actor_critic.update = record  # type: ignore[method-assign, assignment]
    algorithm.update(policy, batch)
    sets = 1 + algorithm.settings.regularization.further_batches
    assert [rows.reward.shape for rows in learned] == [(4, 32)] * sets
    assert torch.equal(learned[0].reward, whole.signal)
    assert list(make(policy_context=1.0).phases(301)[1].draws) == ["context"]
    assert list(make().phases(301)[1].draws) == ["transitions"]


# --- acting ------------------------------------------------------------------------------------------------------


def test_observing_steps_is_adapting_to_the_episode():
    algorithm, source = make(), data()
    rows = np.arange(2 * HORIZON)[None].repeat(2, 0)
    fields = source.take(rows.reshape(2, 2, HORIZON)) | {"valid": np.ones((2, 2, HORIZON))}
    fields["valid"][1, 0, 3:] = 0
    whole = from_arrays(fields, CPU)
    belief = algorithm.prior(2)
    assert whole.valid is not None
    for episode in range(2):
        for t in range(HORIZON):
            names = ("observation", "action", "reward", "next_observation", "terminal", "signal", "valid")
            parts = {name: getattr(whole, name)[:, episode, t : t + 1] for name in names}
            belief = algorithm.observe(belief, Experience(**parts, task=torch.arange(2)))
    torch.testing.assert_close(belief, algorithm.adapt(algorithm.prior(2), whole))
    half = algorithm.adapt(algorithm.prior(2), whole.part(0, 1))
    torch.testing.assert_close(belief, algorithm.adapt(half, whole.part(1, 2)))  # it goes on from what it knew
    assert join_beliefs([map_belief(lambda x, i=i: x[i : i + 1], belief) for i in range(2)]).equal(belief)


def test_a_context_has_about_as_many_steps_as_asked_for_however_long_the_datas_episodes_are():
    for lengths, asked in ((HORIZON, 100), (4 * HORIZON, 100), (4 * HORIZON, 1)):
        context = offline_context(make(), data(lengths=lengths), asked, [np.random.default_rng(i) for i in range(2)])
        assert transitions_of(context) == [max(asked, lengths)] * 2


# --- the protocol ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["last", "sum"])
def test_a_belief_goes_on_through_the_episodes_and_all_are_reported(counts):
    family = load_family("sparse-point-robot", {"horizon": HORIZON, "radius": 0.9})
    tasks = [
        {"index": i, "split": split, "parameters": {"goal": goal}}
        for i, (split, goal) in enumerate((("train", [0.3, 0.3]), ("test", [0.0, 0.4])))
    ]
    for task in tasks:
        task |= {"oracle_return": 4.0, "random_return": 0.0}
    algorithm = make()
    seen: list[torch.Tensor] = []
    act = algorithm.act

    def spy(belief: torch.Tensor, observation: torch.Tensor, rng: Any = None) -> torch.Tensor:
        seen.append(belief.clone())
        return act(belief, observation, rng)

    algorithm.act = spy  # type: ignore[method-assign]
    config = parse(online_belief.CONFIG, {"episodes": 3, "repetitions": 2, "counts": counts}, "evaluate")
    run = Run(algorithm, family, data(), tasks, config, ("evaluate",), 0)
    last = online_belief.run(run)
    assert last.reward.shape == (2, HORIZON)
    assert len(seen) == 2 * 3 * HORIZON
    for step, belief in enumerate(seen):
        fresh = torch.equal(belief, algorithm.prior(2))
        assert fresh == (step % (3 * HORIZON) == 0)  # known nothing before the first of a repetition's steps alone
    assert len(run.rows) == 2 * 3 * 2
    for task in range(2):
        rows = [row for row in run.rows if row["task"] == task and row["repetition"] == 0]
        own = [row["sparse_return"] for row in rows]
        assert [row["sum_return"] for row in rows] == pytest.approx(np.cumsum(own))
        assert [row["counted"] for row in rows] == [False, False, True]
        assert [row["context_transitions"] for row in rows] == [0, HORIZON, 2 * HORIZON]
        published = sum(own) if counts == "sum" else own[-1]
        assert rows[-1]["return"] == pytest.approx(published)
        each = published / 3 if counts == "sum" else published
        assert rows[-1]["normalized"] == pytest.approx(family.normalize(tasks[task], each))
    alone = Run(algorithm, family, data(), tasks, config, ("evaluate",), 0)
    alone.add(1, 2, [0, 0], last, True)  # what the last episode has under the other form of the reward
    for task in range(2):
        again = [row["restated_return"] for row in run.rows if row["task"] == task and row["repetition"] == 1]
        own = alone.rows[task]["restated_return"]
        assert own > 0
        assert again[-1] == pytest.approx(own + sum(again[:-1]) if counts == "sum" else own)


def test_a_bag_of_rows_is_no_rollout():
    algorithm, source = make(), data()
    bag = from_arrays(source.take(np.arange(5)[None].repeat(2, 0)), CPU)
    with pytest.raises(ValueError, match="made of episodes"):
        algorithm.adapt(algorithm.prior(2), bag)
    with pytest.raises(UserError, match="decode_from"):
        make(decode_from="state")
