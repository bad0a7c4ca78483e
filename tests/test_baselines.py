"""The baselines: losses against closed forms, what trains what, two goals, and that training goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update, update_at

from omrl.algorithms.base import Algorithm, Spec, create, load_model, save_model
from omrl.algorithms.bc import cloning_loss
from omrl.algorithms.bcq import soft_minimum
from omrl.algorithms.mbml import Mbml, of_tasks
from omrl.core.errors import UserError
from omrl.nets.encoders import gaussian_kl
from omrl.nets.experience import Experience
from omrl.nets.generative import diagonal_kl, posterior

SMALL = {"latent_dim": 3, "encoder_width": 16, "encoder_depth": 2, "width": 16, "depth": 2, "meta_batch": 4,
         "rl_batch": 8, "context_batch": 12}  # fmt: skip
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("bc", {}),
    "bc-metric": ("bc", {"encoder_loss": "metric"}),
    "bc-gaussian": ("bc", {"likelihood": "gaussian"}),
    "unicorn": ("unicorn", {"decoder_width": 16}),
    "pearl": ("pearl", {}),
    "pearl-regularized": ("pearl", {"regularization": {"kind": "kl-dual", "policy": True, "alpha": 5.0}}),
    "bcq": ("bcq", {}),
    "bcq-bellman": ("bcq", {"encoder_by_vae": False}),
    "mbml": ("mbml", {"tasks": 3, "bcq_steps": 3, "ensemble_width": 16}),  # the fourth update distills
}


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(arm: str, seed: int = 0, spec: Spec | None = None, **values: Any) -> Any:
    module, chosen = ARMS[arm]
    return create(module, SMALL | chosen | values, spec or Spec(2, 2, False), seed, "cpu")


def made_batch(seed: int = 1, dense: float = 1.0, with_next: bool = False) -> dict[str, Experience]:
    g, tasks = source(seed), torch.tensor([0, 1, 1, 2])
    s, a, r = torch.randn(4, 12, 2, generator=g), torch.rand(4, 12, 2, generator=g), torch.randn(4, 12, generator=g)
    moves = moves_of(s[:, :8], a[:, :8], r[:, :8] * dense, s[:, :8] + 0.1, torch.zeros(4, 8))
    return meta_batch(tasks, bag_of(s, a, r, s + 0.1 if with_next else None), moves, lambda: moves)


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_training_goes_on_from_a_saved_state_and_a_saved_model_acts_alike(arm, tmp_path):
    whole, first, second = make(arm), make(arm), make(arm, 9)
    for i in range(4):
        scalars = update_at(whole, made_batch(i), i, 4)
    assert all(torch.isfinite(value) for value in scalars.values())
    for i in range(2):
        update_at(first, made_batch(i), i, 4)
    second.load_training_state({k: v.clone() for k, v in first.training_state().items()})
    for i in range(2, 4):
        update_at(second, made_batch(i), i, 4)
    state, other = whole.training_state(), second.training_state()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state)
    save_model(whole, tmp_path, "mine", ARMS[arm][0])
    loaded, batch = load_model(tmp_path, "cpu"), made_batch()
    z = whole.infer(batch["context"])
    assert torch.equal(loaded.infer(batch["context"]), z)
    s = batch["transitions"].observation
    assert torch.equal(loaded.actions(s, z), whole.actions(s, z))
    assert whole.actions(s, z).shape == (4, 8, 2)
    assert float(whole.actions(s, z).abs().max()) <= 1


@pytest.mark.parametrize("arm", ["bc", "bc-metric", "unicorn", "pearl", "bcq", "mbml"])
def test_two_goals_are_told_apart_and_solved(arm):
    soft = {"actor_rate": 3e-3, "critic_rate": 3e-3, "reward_scale": 20.0, "gamma": 0.5, "encoder_rate": 3e-3}
    own, steps = {
        "bc": ({"actor_rate": 3e-3, "encoder_rate": 3e-3}, 400),
        "unicorn": (soft, 500),
        "pearl": (soft, 1500),  # Bellman gradients alone: the critic ignores z for a while
        "bcq": ({"rate": 3e-3, "gamma": 0.5, "reward_scale": 2.0, "perturbation": 0.3, "encoder_rate": 1e-3}, 600),
        "mbml": (
            {
                "rate": 3e-3,
                "gamma": 0.5,
                "reward_scale": 2.0,
                "vae_kl": 0.02,
                "vae_clip": 1.0,
                "perturbation": 0.2,
                "candidates": 20,
                "bcq_steps": 700,
            },
            1400,
        ),
    }[ARMS[arm][0]]
    algorithm: Algorithm = make(arm, **({"meta_batch": 8, "width": 32, "encoder_width": 32} | own))
    imitates = ARMS[arm][0] == "bc"

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        g = source(seed)
        tasks = torch.randint(2, (8,), generator=g)
        goal = (0.8 * (1.0 - 2 * tasks))[:, None]
        s, a = torch.rand(8, 32, 2, generator=g) - 0.5, torch.rand(8, 32, 2, generator=g) * 2 - 1
        if imitates:  # a behavior that goes there, more or less
            a = torch.cat([(goal + 0.2 * a[..., 0]).clamp(-1, 1).unsqueeze(-1), a[..., 1:]], dim=-1)
        return tasks, s, a, 1 - (a[..., 0] - goal).abs()

    for step in range(steps):
        tasks, s, a, r = draw(step)
        end = moves_of(s, a, r, s, torch.ones(8, 32))
        update_at(algorithm, meta_batch(tasks, bag_of(s, a, r), end), step, steps)
    tasks, s, a, r = draw(10**6)
    chosen = algorithm.actions(s, algorithm.infer(bag_of(s, a, r)))[..., 0].mean(1)
    assert float((chosen - 0.8 * (1.0 - 2 * tasks)).abs().max()) < 0.25


# --- behavior cloning --------------------------------------------------------------------------------------------


def test_cloning_losses_by_hand():
    mean, log_std, action = (torch.tensor([v], dtype=torch.float64) for v in ((0.3, -0.2), (-0.5, 0.1), (0.5, -0.9)))
    squared = sum((math.tanh(m) - a) ** 2 for m, a in ((0.3, 0.5), (-0.2, -0.9)))
    assert float(cloning_loss(mean, log_std, action, "mse")) == pytest.approx(squared, rel=1e-12)
    likelihood = 0.0
    for m, scale, a in ((0.3, -0.5, 0.5), (-0.2, 0.1, -0.9)):
        u = math.atanh(a)
        density = (
            math.exp(-0.5 * ((u - m) / math.exp(scale)) ** 2) / (math.exp(scale) * math.sqrt(2 * math.pi)) / (1 - a * a)
        )
        likelihood -= math.log(density)
    assert float(cloning_loss(mean, log_std, action, "gaussian")) == pytest.approx(likelihood, rel=1e-12)


def test_an_action_at_the_edge_has_a_finite_likelihood():
    assert math.isfinite(float(cloning_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "gaussian")))


def test_imitation_trains_the_encoder_only_where_it_shall():
    for arm, moves in (("bc", True), ("bc-metric", False)):
        one, two = make(arm), make(arm)
        batch = made_batch()
        other = {**batch, "transitions": replace(batch["transitions"], action=-batch["transitions"].action)}
        update(one, batch)
        update(two, other)
        assert same(copies(one.encoder), copies(two.encoder)) != moves


# --- UNICORN -----------------------------------------------------------------------------------------------------


def test_without_reconstruction_unicorn_is_focal():
    chosen = SMALL | {"metric_weight": 0.7}
    focal = create("focal", chosen, Spec(2, 2, False), 3, "cpu")
    unicorn = create("unicorn", chosen | {"reconstruction_weight": 0}, Spec(2, 2, False), 3, "cpu")
    for i in range(3):
        for algorithm in (focal, unicorn):
            update(algorithm, made_batch(i))
    one, two = focal.training_state(), unicorn.training_state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("with_next", [False, True])
def test_reconstruction_by_hand(with_next):
    algorithm = make("unicorn", spec=Spec(2, 2, with_next))
    batch = made_batch(with_next=with_next)
    z = algorithm.infer(batch["context"])
    c, errors = batch["context"], []
    for t in range(4):
        for j in range(12):
            row = torch.cat([c.observation[t, j], c.action[t, j], z[t]])[None]
            wanted = [c.signal[t, j][None]] + ([c.next_observation[t, j]] if with_next else [])
            errors.append((algorithm.decoder(row)[0] - torch.cat(wanted)).square().mean().item())
    assert algorithm.reconstruction_loss(c, z).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_reconstruction_trains_the_encoder_and_dense_rewards_do_not():
    plain, one, two = make("unicorn", reconstruction_weight=0.0), make("unicorn"), make("unicorn")
    for algorithm, dense in ((plain, 1.0), (one, 1.0), (two, -3.0)):
        update(algorithm, made_batch(dense=dense))
    assert same(copies(one.encoder), copies(two.encoder))
    assert not same(copies(plain.encoder), copies(one.encoder))


# --- Batch PEARL -------------------------------------------------------------------------------------------------


def test_posterior_is_the_product_of_gaussians():
    algorithm, rows = make("pearl"), made_batch()["context"].rows(False)
    mean, variance = algorithm.encoder(rows)
    raw = algorithm.encoder.net(rows.reshape(48, -1)).view(4, 12, 6).double()
    mu, s2 = raw[..., :3], torch.nn.functional.softplus(raw[..., 3:])
    expected = 1 / (1 / s2).sum(1)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(mean.double(), expected * (mu / s2).sum(1), rtol=1e-4, atol=1e-6)
    assert float(gaussian_kl(torch.zeros(2, 3), torch.ones(2, 3), 1.0)) == 0


def test_bellman_gradients_reach_pearls_encoder_and_no_metric_loss_does():
    one, two = make("pearl"), make("pearl")
    scalars = update(one, made_batch(dense=1.0))
    update(two, made_batch(dense=-3.0))
    assert not same(copies(one.encoder), copies(two.encoder))
    assert "metric_loss" not in scalars
    assert "discriminator_loss" not in scalars
    assert "divergence" in update(make("pearl-regularized"), made_batch())
    with pytest.raises(UserError, match="metric_power"):
        make("pearl", metric_power=1)


# --- Contextual BCQ ----------------------------------------------------------------------------------------------


def test_soft_minimum_by_hand():
    q = torch.tensor([[1.0, 5.0], [3.0, -1.0]])
    torch.testing.assert_close(soft_minimum(q, 0.75), torch.tensor([1.5, 0.5]))


def test_target_takes_the_best_candidate():
    learner = make("bcq", gamma=0.9, reward_scale=2.0, candidates=3).learner
    g = source(0)
    following, reward = torch.randn(2, 5, generator=g), torch.tensor([1.0, -1.0])
    latents = torch.randn(2, 3, 4, generator=g)
    best = []
    for i in range(2):
        values = []
        for j in range(3):
            state = following[i][None]
            action = learner.perturb(learner.target_shift, state, learner.generate(state, latents[i, j][None]))
            low, high = sorted(learner.value(learner.target_q, state, action)[:, 0].tolist())
            values.append(0.75 * low + 0.25 * high)
        best.append(max(values))
    y = learner.target(following, reward, torch.tensor([0.0, 1.0]), latents)
    assert y.tolist() == pytest.approx([2.0 + 0.9 * best[0], -2.0], rel=1e-5)


def test_vae_loss_by_hand():
    learner, g = make("bcq").learner, source(0)
    state, action, noise = (torch.randn(3, n, generator=g) for n in (5, 2, 4))
    action = torch.tanh(action)
    mean, log_std = learner.encode(torch.cat([state, action], -1)).double().split(4, dim=-1)
    found = learner.generate(state, (mean + log_std.exp() * noise).float()).double()
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).mean()
    expected = ((found - action).square().mean() + 0.5 * kl).item()
    assert learner.vae_loss(state, action, noise).item() == pytest.approx(expected, rel=1e-5)


def test_perturbation_is_bounded():
    learner = make("bcq", perturbation=0.1).learner
    with torch.no_grad():
        for parameter in learner.shift.parameters():
            parameter.mul_(1000)
    state, action = torch.randn(50, 5, generator=source(0)), torch.rand(50, 2, generator=source(1)) * 2 - 1
    moved = learner.perturb(learner.shift, state, action)
    assert (moved - action).abs().max().item() <= 0.1 + 1e-6
    assert moved.abs().max().item() <= 1


def test_only_bellman_gradients_where_the_vae_shall_not_train_the_encoder():
    for arm, moves in (("bcq", True), ("bcq-bellman", False)):
        algorithm, batch = make(arm), made_batch()
        z = algorithm.encoder(algorithm.rows(batch["context"])).detach().requires_grad_(True)
        vae, q = algorithm.vae_loss(batch["transitions"], z), algorithm.q_loss(batch["transitions"], z)
        (gradient,) = torch.autograd.grad(vae, z, allow_unused=True) if vae.requires_grad else (None,)
        assert (gradient is not None and float(gradient.abs().sum()) > 0) == moves
        assert float(torch.autograd.grad(q, z)[0].abs().sum()) > 0


# --- MBML ----------------------------------------------------------------------------------------------------------


def test_a_task_uses_its_own_networks():
    stack, g = make("mbml").teachers.shift, source(0)
    x, places = torch.randn(4, 5, 4, generator=g), torch.tensor([2, 0, 0, 1])
    everyone = stack(x.reshape(20, 4)).view(3, 4, 5, 2)
    found = of_tasks(stack, x, places)
    for i, place in enumerate(places):
        torch.testing.assert_close(found[i], everyone[place, i])


def test_posterior_and_divergence_by_hand():
    factors, mask = torch.randn(2, 6, 8, generator=source(0)).double(), torch.tensor([[1.0] * 6, [1, 0, 1, 0, 0, 0]])
    mean, variance = posterior(factors, mask.double())
    mu, s2 = factors[1, [0, 2], :4], torch.nn.functional.softplus(factors[1, [0, 2], 4:])
    torch.testing.assert_close(variance[1], 1 / (1 / s2).sum(0))
    torch.testing.assert_close(mean[1], variance[1] * (mu / s2).sum(0))
    one, two = (torch.distributions.Normal(m, v.sqrt()) for m, v in zip(mean, variance, strict=True))
    expected = torch.distributions.kl_divergence(one, two).sum()
    torch.testing.assert_close(diagonal_kl((mean[0], variance[0]), (mean[1], variance[1])), expected)


def test_relabelled_rows_carry_the_other_tasks_rewards():
    algorithm, batch = make("mbml", threshold=1e9), made_batch()
    rows, usable = algorithm.relabelled(batch["context"], batch["context"].task)
    assert rows.shape == (4, 4, 12, 5)
    assert usable.sum(-1).tolist() == [[0, 12, 12, 12], [12, 0, 0, 12], [12, 0, 0, 12], [12, 12, 12, 0]]
    members = range(5)
    for i, j in ((0, 3), (3, 1)):
        torch.testing.assert_close(rows[i, j, :, :4], algorithm.rows(batch["context"])[j, :, :4])
        x = algorithm.rows(batch["context"])[j, :, :4]
        means = algorithm.teachers.models(x)[[int(batch["context"].task[i]) * 5 + k for k in members], :, 0].mean(0)
        torch.testing.assert_close(rows[i, j, :, 4], means)
    assert float(make("mbml", threshold=1e-9).relabelled(batch["context"], batch["context"].task)[1].sum()) == 0


def test_triplet_without_usable_rows_is_the_margin():
    algorithm, g = make("mbml", margin=2.0), source(0)
    own, moved = torch.randn(4, 12, 6, generator=g), torch.randn(4, 4, 12, 6, generator=g)
    different = ~torch.eye(4, dtype=torch.bool)
    assert algorithm.triplet_loss(own, moved, torch.zeros(4, 4, 12), different).item() == 2.0
    # j's rows with i's rewards embed as i's own rows do: the anchor is the positive, far from the negative
    own = torch.cat([torch.arange(4.0)[:, None, None].expand(4, 12, 3) * 10, torch.zeros(4, 12, 3)], dim=-1)
    moved = own.unsqueeze(1).expand(4, 4, 12, 6)
    assert algorithm.triplet_loss(own, moved, torch.ones(4, 4, 12), different).item() == 0.0


def test_phases_follow_each_other_and_teachers_rest_in_the_second():
    algorithm = make("mbml", bcq_steps=2)
    assert [(phase.name, phase.steps) for phase in algorithm.phases(4)] == [("teachers", 2), ("student", 2)]
    for i in range(4):
        before = copies(algorithm.teachers), copies(algorithm.student)
        update_at(algorithm, made_batch(i), i, 4)
        assert same(before[0], copies(algorithm.teachers)) == (i >= 2)
        assert same(before[1], copies(algorithm.student)) == (i < 2)


def test_too_few_tasks_are_named():
    config = make("mbml", tasks=2).config
    assert Mbml.check(config, Spec(2, 2, False, tasks=3), 100) == "tasks = 2: expected tasks.train = 3"
