"""Encoders and the networks under them: against float64 arithmetic, and the symmetries a bag of rows has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from batches import bag_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from omrl.nets.encoders import DeterministicEncoder, ProbabilisticEncoder, gaussian_kl
from omrl.nets.generative import decoded, perturbed, posterior, vae_loss
from omrl.nets.mlp import Mlp, Policy


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_row(net: Mlp, row: np.ndarray, which: int = 0) -> np.ndarray:
    """An MLP on one row, a layer at a time."""
    last = len(net.weights) - 1
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        row = row @ weight[which].detach().numpy() + bias[which, 0].detach().numpy()
        if place != last:
            row = np.maximum(row, 0)
    return row


# --- networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [1, 2, 3])
def test_a_stack_computes_each_network_apart(stack):
    net = Mlp(4, [7, 5], 3, source(), stack=stack)
    rows = torch.randn(6, 4, generator=source(1))
    before = rows.clone()
    out = net(rows).detach().numpy().reshape(stack, 6, 3)
    for which in range(stack):
        expected = [one_row(net, row, which) for row in rows.numpy()]
        np.testing.assert_allclose(out[which], expected, rtol=1e-12)
    assert torch.equal(rows, before)  # relu in place must not reach the caller's rows


def test_networks_of_a_stack_start_different():
    net = Mlp(4, [8], 1, source(), stack=2)
    assert all(not torch.equal(weight[0], weight[1]) for weight in net.weights)


@pytest.mark.parametrize("stack", [1, 2])
def test_first_and_second_derivatives_of_a_stack(stack):
    """The gradient penalty differentiates twice; relu in place must survive it."""
    net = Mlp(3, [5, 4], 2, source(), stack=stack)
    rows = torch.randn(4, 3, generator=source(1), requires_grad=True)
    assert torch.autograd.gradcheck(net, (rows,))
    assert torch.autograd.gradgradcheck(lambda x: net(x).square(), (rows,))


def test_initial_weights_are_those_of_the_released_code():
    """Hidden weights within 1/sqrt(n_out), the output size taken for the fan-in; hidden bias 0.1; last 3e-3."""
    net = Mlp(300, [100, 400], 50, source(), stack=2)
    for weight, bound in zip(
        map(torch.detach, net.weights), (1 / math.sqrt(100), 1 / math.sqrt(400), 3e-3), strict=True
    ):
        assert float(weight.abs().max()) <= bound
        assert float(weight.abs().max()) > 0.99 * bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert abs(float(weight.mean())) < 0.02 * bound
    assert all(bool((bias == 0.1).all()) for bias in list(net.biases)[:-1])
    assert 0 < float(net.biases[-1].detach().abs().max()) <= 3e-3


def test_policy_heads_start_within_a_thousandth():
    policy = Policy(5, [256], 3, source())
    assert float(policy.trunk.weights[-1].detach().abs().max()) <= 1e-3
    assert float(policy.trunk.biases[-1].detach().abs().max()) <= 1e-3


def test_the_same_source_gives_the_same_weights():
    one, two = (Mlp(4, [8, 8], 2, source(3)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_log_std_is_clamped():
    policy = Policy(2, [4], 2, source())
    for value, expected in ((5.0, 0.0), (-50.0, -20.0), (-3.0, -3.0)):
        with torch.no_grad():
            policy.trunk.weights[-1].zero_()
            policy.trunk.biases[-1].fill_(value)
        mean, log_std = policy(torch.ones(3, 2))
        assert torch.all(log_std == expected)
        assert torch.all(mean == value)  # the clamp is for log-std alone
    wider = Policy(2, [4], 2, source(), log_std_max=2.0)
    with torch.no_grad():
        wider.trunk.weights[-1].zero_()
        wider.trunk.biases[-1].fill_(5.0)
    assert torch.all(wider(torch.ones(1, 2))[1] == 2.0)


def test_log_probability_against_scipy():
    policy = Policy(4, [16], 3, source(), log_std_max=2.0)
    with torch.no_grad():
        policy.trunk.weights[-1].mul_(300)
    x, noise = torch.randn(50, 4, generator=source(1)), torch.randn(50, 3, generator=source(2))
    action, log_prob, mean, log_std = (out.detach().numpy() for out in policy.sample(x, noise))
    raw = mean + np.exp(log_std) * noise.numpy()
    np.testing.assert_allclose(action, np.tanh(raw), rtol=1e-12)
    normal = stats.norm.logpdf(raw, mean, np.exp(log_std)).sum(-1)
    np.testing.assert_allclose(log_prob, normal - np.log(1 - action**2 + 1e-6).sum(-1), rtol=1e-9)


def test_density_of_actions_integrates_to_one():
    policy = Policy(2, [4], 1, source(), log_std_max=2.0)
    with torch.no_grad():
        policy.trunk.weights[-1].zero_()
        policy.trunk.biases[-1].copy_(torch.tensor([0.3, -0.7]).view(1, 1, 2))

    def density(action: float) -> float:
        noise = (math.atanh(action) - 0.3) / math.exp(-0.7)
        return math.exp(float(policy.sample(torch.zeros(1, 2), torch.tensor([[noise]]))[1].detach()))

    assert integrate.quad(density, -1 + 1e-9, 1 - 1e-9)[0] == pytest.approx(1, abs=1e-4)


def test_extreme_actions_have_finite_log_probability_and_gradient():
    policy = Policy(2, [4], 2, source())
    with torch.no_grad():
        policy.trunk.biases[-1].fill_(40.0)  # tanh is 1 to the last bit
    _, log_prob, _, _ = policy.sample(torch.ones(3, 2), torch.zeros(3, 2))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())


# --- context ---------------------------------------------------------------------------------------------------


def test_context_rows_hold_s_a_r_and_next_state_only_if_given():
    s, a, r = torch.full((2, 3, 2), 1.0), torch.full((2, 3, 1), 2.0), torch.full((2, 3), 3.0)
    bag = bag_of(s, a, r, torch.full((2, 3, 2), 4.0))
    assert bag.rows(False)[1, 2].tolist() == [1, 1, 2, 3]
    assert bag.rows(True)[1, 2].tolist() == [1, 1, 2, 3, 4, 4]


# --- deterministic encoder -------------------------------------------------------------------------------------


def encoder(last: float = 100.0) -> DeterministicEncoder:
    made = DeterministicEncoder(5, [9, 8], 3, source())
    with torch.no_grad():
        made.net.weights[-1].mul_(last)  # away from the linear part of tanh
    return made


def test_embedding_is_the_mean_of_tanh_rows():
    net, rows = encoder(), torch.randn(4, 6, 5, generator=source(1))
    z = net(rows).detach().numpy()
    for task in range(4):
        expected = np.mean([np.tanh(one_row(net.net, row)) for row in rows[task].numpy()], axis=0)
        np.testing.assert_allclose(z[task], expected, rtol=1e-12)


@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_order_of_tasks_and_of_rows_does_not_matter(random, tasks, n):
    net, rows = encoder(), torch.randn(tasks, n, 5, generator=source(random.randrange(1000)))
    by_task = random.sample(range(tasks), tasks)
    by_row = random.sample(range(n), n)
    z = net(rows)
    torch.testing.assert_close(net(rows[by_task]), z[by_task])
    torch.testing.assert_close(net(rows[:, by_row]), z)


@given(st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_repeating_the_whole_context_changes_nothing(n, times):
    net, rows = encoder(), torch.randn(2, n, 5, generator=source(n))
    torch.testing.assert_close(net(rows.repeat(1, times, 1)), net(rows))


def test_tasks_do_not_see_each_other():
    net, rows = encoder(), torch.randn(3, 4, 5, generator=source(1), requires_grad=True)
    net(rows)[1].sum().backward()
    assert torch.all(rows.grad[[0, 2]] == 0)
    assert torch.any(rows.grad[1] != 0)


def test_embeddings_stay_within_the_cube():
    z = encoder(1e6)(torch.randn(3, 4, 5, generator=source(1)) * 1e3)
    assert float(z.detach().abs().max()) <= 1


def test_gradient_of_the_encoder():
    assert torch.autograd.gradcheck(encoder(), (torch.randn(2, 3, 5, generator=source(1), requires_grad=True),))


# --- probabilistic encoder -------------------------------------------------------------------------------------


def probabilistic() -> ProbabilisticEncoder:
    made = ProbabilisticEncoder(5, [9], 3, source())
    with torch.no_grad():
        made.net.weights[-1].mul_(200)
    return made


def test_posterior_is_the_product_of_the_rows_gaussians():
    net, rows = probabilistic(), torch.randn(2, 4, 5, generator=source(1))
    mean, variance = (out.detach().numpy() for out in net(rows))
    for task in range(2):
        factors = [np.tanh(one_row(net.net, row)) for row in rows[task].numpy()]
        for d in range(3):
            # log-density of the product on a grid, normalized by quadrature
            grid = np.linspace(-6, 6, 40001)
            log = sum(stats.norm.logpdf(grid, f[d], math.sqrt(np.log1p(np.exp(f[3 + d])))) for f in factors)
            weight = np.exp(log - log.max())
            weight /= weight.sum()
            centre = (weight * grid).sum()
            assert mean[task, d] == pytest.approx(centre, abs=1e-8)
            assert variance[task, d] == pytest.approx((weight * (grid - centre) ** 2).sum(), rel=1e-6)


def test_more_context_narrows_the_posterior():
    net, rows = probabilistic(), torch.randn(1, 8, 5, generator=source(1))
    variances = [float(net(rows[:, :n])[1].detach().max()) for n in (1, 2, 4, 8)]
    assert variances == sorted(variances, reverse=True)
    torch.testing.assert_close(net(rows[:, :1].repeat(1, 4, 1))[1], net(rows[:, :1])[1] / 4)


def test_order_of_rows_does_not_matter_to_the_posterior():
    net, rows = probabilistic(), torch.randn(2, 6, 5, generator=source(1))
    for one, two in zip(net(rows), net(rows.flip(1)), strict=True):
        torch.testing.assert_close(one, two)


def test_gradient_of_the_posterior():
    assert torch.autograd.gradcheck(probabilistic(), (torch.randn(2, 3, 5, generator=source(1), requires_grad=True),))


def test_a_mask_leaves_rows_out_of_the_posterior():
    factors = torch.randn(2, 5, 6, generator=source(1))
    whole, all_rows = posterior(factors), posterior(factors, torch.ones(2, 5))
    some = posterior(factors, torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]))
    few = posterior(factors[:, [0, 2]])
    for place in range(2):
        assert torch.equal(whole[place], all_rows[place])
        torch.testing.assert_close(some[place][0], few[place][0])
    assert some[0][1].tolist() == [0, 0, 0]
    assert some[1][1].tolist() == pytest.approx([1e7] * 3)


def test_an_unbounded_posterior_is_the_nets_own():
    one, two = (ProbabilisticEncoder(5, [9], 3, source(), bounded=bounded) for bounded in (True, False))
    rows = torch.randn(2, 4, 5, generator=source(1))
    raw = two.net(rows.view(8, 5)).view(2, 4, 6)
    torch.testing.assert_close(two(rows), posterior(raw))
    torch.testing.assert_close(one(rows), posterior(torch.tanh(raw)))


# --- the actions' VAE ------------------------------------------------------------------------------------------


def test_loss_of_the_vae_a_row_at_a_time():
    state, action = torch.randn(4, 3, generator=source(1)), torch.rand(4, 2, generator=source(2)) * 2 - 1
    noise, weight = torch.randn(4, 3, generator=source(3)), 0.7
    encoder, decoder = Mlp(5, [8], 6, source(4), last=2.0), Mlp(6, [8], 2, source(5), last=1.0)
    with torch.no_grad():
        encoder.biases[-1][..., 3] = -50.0  # a log-std below the clamp
    squared, kl = [], []
    for i in range(4):
        mean, log_std = np.split(one_row(encoder, torch.cat([state[i], action[i]]).numpy()), 2)
        log_std = log_std.clip(-4, 15)
        latent = mean + np.exp(log_std) * noise[i].numpy()
        found = np.tanh(one_row(decoder, np.concatenate([state[i].numpy(), latent])))
        np.testing.assert_allclose(decoded(decoder, state[i][None], torch.tensor(latent)[None]).detach()[0], found)
        squared.append((found - action[i].numpy()) ** 2)
        kl.append([stats_kl(m, math.exp(s)) for m, s in zip(mean, log_std, strict=True)])
    got = vae_loss(encoder, decoder, state, action, noise, weight)
    assert got.item() == pytest.approx(np.mean(squared) + weight * np.mean(kl), rel=1e-9)


def stats_kl(mean: float, std: float) -> float:
    """KL(N(mean, std^2) || N(0, 1))."""
    return 0.5 * (mean**2 + std**2 - 1) - math.log(std)


@given(st.floats(0, 2), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_perturbed_action_stays_near_and_within_its_box(size, seed):
    net = Mlp(4, [8], 2, source(seed), last=10.0)
    state, action = torch.randn(6, 2, generator=source(seed)), torch.rand(6, 2, generator=source(seed + 1)) * 2 - 1
    moved = perturbed(net, state, action, size).detach()
    assert float((moved - action).abs().max()) <= size + 1e-12
    assert float(moved.abs().max()) <= 1


def test_kl_to_the_prior_against_quadrature():
    mean, std, prior = 0.3, 0.2, 0.5

    def integrand(x: float) -> float:
        own = stats.norm.logpdf(x, mean, std)
        return math.exp(own) * (own - stats.norm.logpdf(x, 0, prior))

    expected = integrate.quad(integrand, -3, 3)[0]
    got = gaussian_kl(torch.tensor([[mean]]), torch.tensor([[std**2]]), prior)
    assert float(got) == pytest.approx(expected, rel=1e-9)


def test_kl_is_zero_for_the_prior_itself_and_sums_over_tasks_and_dimensions():
    prior = 0.05
    same = torch.full((3, 4), prior**2)
    assert float(gaussian_kl(torch.zeros(3, 4), same, prior)) == pytest.approx(0, abs=1e-12)
    # shifted by one prior standard deviation: 1/2 for every dimension of every task
    assert float(gaussian_kl(torch.full((3, 4), prior), same, prior)) == pytest.approx(6.0)


def test_gradient_of_the_kl():
    mean = torch.randn(2, 3, generator=source(1), requires_grad=True)
    variance = (torch.rand(2, 3, generator=source(2)) + 0.1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m, v: gaussian_kl(m, v, 0.3), (mean, variance))
