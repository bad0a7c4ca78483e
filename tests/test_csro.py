"""CSRO: the bound against its double sum in float64, whose gradient is whose, and a shift of context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from omrl.algorithms.base import Spec, create
from omrl.algorithms.csro import Csro, club_bound
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.learning.sampler import Sampler
from omrl.nets.experience import Experience

SMALL = {
    "latent_dim": 3, "encoder_width": 32, "encoder_depth": 2, "width": 32, "depth": 2, "meta_batch": 8, "rl_batch": 32,
    "context_batch": 32, "actor_rate": 3e-3, "critic_rate": 3e-3, "encoder_rate": 3e-3, "reward_scale": 20.0,
    "gamma": 0.5,
}  # fmt: skip
CLUB = {"club_width": 32, "club_depth": 2, "club_rate": 3e-3}
GOALS = np.array([0.8, -0.8])


def make(seed: int = 0, with_next: bool = False, **values: Any) -> Csro:
    algorithm = create("csro", SMALL | CLUB | values, Spec(2, 2, with_next), seed, "cpu")
    assert isinstance(algorithm, Csro)
    return algorithm


def data(seed: int, behavior: np.ndarray = GOALS, rows: int = 1000) -> TaskData:
    """Two tasks that reward the goal's side; the behavior leans to the side of ``behavior``."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(-0.5, 0.5, (2, rows, 2)).astype(np.float32)
    a = rng.normal(0, 0.5, (2, rows, 2))
    a[..., 0] += 0.4 * np.sign(behavior)[:, None]
    a = a.clip(-1, 1).astype(np.float32)
    r = (1 - np.abs(a[..., 0] - GOALS[:, None])).astype(np.float32)
    end = np.ones_like(r)
    return TaskData.of_bags(
        [0, 1],
        observation=s,
        action=a,
        reward=r,
        sparse_reward=r,
        next_observation=s,
        terminal=end,
        inference="dense",
    )


def trained(name: str, values: dict[str, Any], seed: int, steps: int) -> Any:
    algorithm = create(name, SMALL | values, Spec(2, 2, False), seed, "cpu")
    sampler = Sampler(data(0), seed, algorithm.device)
    (phase,) = algorithm.phases(steps)
    for _ in range(steps):
        algorithm.update(phase, sampler.draw(phase))
    return algorithm


def whole(source: TaskData) -> Experience:
    fields = ("observation", "action", "reward", "next_observation", "terminal", "signal")
    return Experience(**{n: torch.from_numpy(getattr(source, n)) for n in fields}, task=torch.arange(2))


def double_sum(z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, negatives: str) -> torch.Tensor:
    """Twice the log-ratio with every pair written out; rows of another task do not count with ``task``."""
    tasks, n, latent = z.shape
    owner = torch.arange(tasks).repeat_interleave(n)
    z, mean, variance = (x.reshape(-1, latent) for x in (z, mean, variance))
    terms = []
    for i in range(len(z)):
        q = Normal(mean[i], variance[i].sqrt())
        others = z if negatives == "batch" else z[owner == owner[i]]
        terms.append(2 * (q.log_prob(z[i]) - q.log_prob(others).mean(0)))
    return torch.stack(terms).mean()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.sampled_from(["task", "batch"]), st.integers(0, 2**31)
)
def test_the_linear_form_is_the_double_sum(tasks, n, latent, negatives, seed):
    g = torch.Generator().manual_seed(seed)
    z, mean = (torch.randn(tasks, n, latent, generator=g, dtype=torch.float64) for _ in range(2))
    variance = torch.rand(tasks, n, latent, generator=g, dtype=torch.float64) + 0.2
    z.requires_grad_(True)
    found, expected = (f(z, mean, variance, negatives) for f in (club_bound, double_sum))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    one, two = (torch.autograd.grad(loss, z)[0] for loss in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_codes_that_say_nothing_have_no_bound():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 3, generator=g).expand(4, 6, 3)
    mean, variance = torch.randn(4, 6, 3, generator=g), torch.rand(4, 6, 3, generator=g) + 0.2
    for negatives in ("task", "batch"):
        assert abs(float(club_bound(z, mean, variance, negatives))) < 1e-5


def test_a_steps_losses_and_gradients():
    algorithm = make(seed=1, club_weight=7.0, negatives="batch")
    before = make(seed=1, club_weight=7.0, negatives="batch")
    with torch.no_grad():  # away from the start, where all codes are nearly zero
        for each in (algorithm, before):
            each.encoder.net.weights[-1].mul_(300)
            each.club.weights[-1].mul_(300)
    (phase,) = algorithm.phases(1)
    batch = Sampler(data(0), 0, algorithm.device).draw(phase)
    scalars = algorithm.update(phase, batch)

    codes = before.codes(batch["context"])
    torch.testing.assert_close(codes.mean(1), before.encoder(before.rows(batch["context"])))
    mean, variance = before.estimate(batch["context"])
    fit = -Normal(mean, variance.sqrt()).log_prob(codes.detach()).mean()
    assert float(scalars["club_fit"]) == pytest.approx(fit.item(), rel=1e-5)
    # the estimator takes its step first, and on its own loss alone
    fit.backward()
    for mine, theirs in zip(algorithm.club.parameters(), before.club.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    before.club_optimizer.step()
    with torch.no_grad():
        mean, variance = before.estimate(batch["context"])
    bound = double_sum(codes, mean, variance, "batch")
    assert float(scalars["club_bound"]) == pytest.approx(bound.item(), rel=1e-4)
    metric, _ = before.encoder_loss(codes.mean(1), None, batch["context"].task)
    expected = torch.autograd.grad(metric + 7.0 * bound, list(before.encoder.parameters()))
    for parameter, gradient in zip(algorithm.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_estimator_sees_no_reward():
    algorithm = make(with_next=True)
    assert algorithm.club is not None
    assert algorithm.club.weights[0].shape[1] == 4  # s and a; neither r nor s'


@pytest.mark.parametrize(
    "values", [{}, {"coupled": True}, {"regularization": {"kind": "kl-dual", "alpha": 2.0}}], ids=str
)
def test_without_the_bound_it_is_focal(values):
    focal, csro = trained("focal", values, 3, 3), trained("csro", CLUB | {"club_weight": 0.0} | values, 3, 3)
    one, two = focal.training_state(), csro.training_state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_goals_are_told_apart_by_reward_where_the_behavior_misleads():
    """The context of the other task's behavior, with this task's rewards: FOCAL takes one task for the other."""
    worst = {}
    for name, values in (("focal", {}), ("csro", CLUB | {"negatives": "batch"}), ("csro-task", CLUB)):
        algorithm = trained(name.removesuffix("-task"), values, 0, 500)
        for place, behavior in (("own", GOALS), ("other", -GOALS)):
            belief = algorithm.adapt(algorithm.prior(2), whole(data(7, behavior, 500)))
            action = algorithm.act(belief, torch.zeros(2, 2))[:, 0]
            worst[name, place] = float((action - torch.tensor(GOALS)).abs().max())
    assert max(worst[name, "own"] for name in ("focal", "csro", "csro-task")) < 0.25
    assert max(worst["csro", "other"], worst["csro-task", "other"]) < 0.25
    assert worst["focal", "other"] > 1


def test_a_probabilistic_encoder_is_refused():
    with pytest.raises(UserError, match="encoder = probabilistic"):
        make(encoder="probabilistic")
