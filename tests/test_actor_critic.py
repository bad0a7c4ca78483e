"""The behavior-regularized actor-critic, every loss against float64 numpy that reads like the equations.

The reference below is written from the equations, one network and one formula at a time; gradients are
compared with its numerical derivative, everything that must be held still held still.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import moves_of
from hypothesis import given, settings
from hypothesis import strategies as st

from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.nets.actor_critic import ActorCritic, ActorCriticConfig, EncoderStep, divergence, join, mmd
from omrl.nets.experience import Experience

TASKS, ROWS, OBS, ACT, LATENT = 3, 5, 2, 2, 4


pytestmark = pytest.mark.usefixtures("double_precision")


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**values: Any) -> ActorCriticConfig:
    base = {"width": 6, "depth": 2, "gamma": 0.9, "reward_scale": 5.0, "critic_rate": 1e-2, "actor_rate": 1e-2}
    return parse(ActorCriticConfig, base | values, "test")


def regularized(**values: Any) -> dict[str, Any]:
    return {"regularization": {"kind": "kl-dual", "policy": True, "alpha": 3.0, "discriminator_rate": 1e-2} | values}


def near(kind: str, **values: Any) -> dict[str, Any]:
    return {"regularization": {"kind": kind, "alpha": 3.0} | values}


def with_next_action(b: Experience) -> Experience:
    """The batch with the data's next actions; one is unknown, as after an episode's last row."""
    action = torch.rand(TASKS, ROWS, ACT, generator=source(13)) * 2 - 1
    action[1, 2] = math.nan
    return replace(b, extra={"next_action": action})


def batch(seed: int = 1) -> Experience:
    g = source(seed)
    return moves_of(
        torch.randn(TASKS, ROWS, OBS, generator=g),
        torch.rand(TASKS, ROWS, ACT, generator=g) * 2 - 1,
        torch.randn(TASKS, ROWS, generator=g),
        torch.randn(TASKS, ROWS, OBS, generator=g),
        (torch.rand(TASKS, ROWS, generator=g) < 0.4).double(),
    )


def embedding(seed: int = 2) -> torch.Tensor:
    return torch.rand(TASKS, LATENT, generator=source(seed)) * 2 - 1


def make(chosen: ActorCriticConfig, *, loud: bool = True) -> ActorCritic:
    """An actor-critic whose last layers are large enough for every term to matter."""
    made = ActorCritic(chosen, OBS, ACT, LATENT, source(0), torch.device("cpu"))
    if loud:
        with torch.no_grad():
            for net in (made.q, made.v, made.c, made.policy.trunk):
                if net is not None:
                    net.weights[-1].mul_(300)
            for parameter in made.target.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=source(7)) * 0.5)
    return made


@pytest.fixture
def noise(monkeypatch):
    """Make the noise of actions the same every time, so that the order of draws does not matter."""
    fixed = torch.randn(10 * TASKS * ROWS, ACT, generator=source(5))
    monkeypatch.setattr(ActorCritic, "_noise", lambda self, rows: fixed[:rows].clone())
    return fixed.numpy()


# --- the reference ---------------------------------------------------------------------------------------------


def net(mlp: Any, x: np.ndarray, which: int = 0) -> np.ndarray:
    last = len(mlp.weights) - 1
    for place in range(last + 1):
        x = x @ mlp.weights[place][which].detach().numpy() + mlp.biases[place][which, 0].detach().numpy()
        x = np.maximum(x, 0) if place < last else x
        if mlp.layer_norm and place < last:
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return x


def act(policy: Any, x: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    out = net(policy.trunk, x)
    mean, log_std = out[:, :ACT], np.clip(out[:, ACT:], -20, 0)
    std = np.exp(log_std)
    noise = noise[: len(x)]
    action = np.tanh(mean + std * noise)
    normal = -0.5 * noise**2 - 0.5 * np.log(2 * np.pi * std**2)
    return action, (normal - np.log(1 - action**2 + 1e-6)).sum(1), mean, log_std


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def kl(c_policy: np.ndarray, c_data: np.ndarray) -> np.ndarray:
    return 1 + np.log(softplus(c_policy) + 1e-8) - softplus(c_data)


def flat(b: Experience, z: torch.Tensor) -> dict[str, np.ndarray]:
    """The batch as rows, a task after the other, each beside its task's z."""
    wide = np.concatenate([np.tile(z[t].detach().numpy(), (ROWS, 1)) for t in range(TASKS)])
    fields = ("observation", "next_observation", "action", "reward", "terminal")
    tensors = {name: getattr(b, name) for name in fields} | dict(b.extra)
    rows = {name: x.numpy().reshape(TASKS * ROWS, -1) for name, x in tensors.items()}
    return {
        "s": np.concatenate([rows["observation"], wide], 1),
        "s2": np.concatenate([rows["next_observation"], wide], 1),
        "a": rows["action"],
        "r": rows["reward"][:, 0],
        "end": rows["terminal"][:, 0],
        "a2": rows.get("next_action"),
    }


def distance(r: Any, policy: Any, x: np.ndarray, data: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """D per row of the kinds without a discriminator."""
    action, _, mean, log_std = act(policy, x, noise)
    if r.kind == "bc":
        return ((action - data) ** 2).mean(1)

    def k(one: np.ndarray, two: np.ndarray) -> float:
        size = abs(one - two) if r.kernel == "laplacian" else (one - two) ** 2
        return math.exp(-size.sum() / (2 * r.sigma))

    found = []
    for row in range(len(x)):
        drawn = [np.tanh(mean[row] + np.exp(log_std[row]) * noise[i * len(x) + row]) for i in range(r.samples)]
        own = np.mean([k(one, two) for one in drawn for two in drawn])
        found.append(own - 2 * np.mean([k(one, data[row]) for one in drawn]) + 1)
    return np.array(found)


def q_values(q: Any, action: np.ndarray, state: np.ndarray) -> np.ndarray:
    x = np.concatenate([action, state], 1)
    return np.stack([net(q, x, k)[:, 0] for k in range(2)])


def c_values(c: Any, action: np.ndarray, state: np.ndarray) -> np.ndarray:
    return net(c, np.concatenate([action, state], 1))[:, 0]


def frozen(agent: ActorCritic) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(agent, name)) for name in ("policy", "q", "v", "c", "target", "alpha")}


def numerical(loss: Any, network: Any) -> tuple[float, float]:
    """Derivative of ``loss()`` along a random direction of the network's weights, and what ``.grad`` says."""
    g, step = source(11), 1e-6
    direction = [torch.randn(p.shape, generator=g) for p in network.parameters()]
    said = sum(float((p.grad * d).sum()) for p, d in zip(network.parameters(), direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(network.parameters(), direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss())
            for p, d in zip(network.parameters(), direction, strict=True):
                p.sub_(d, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step), said


def with_grads(network: Any, trained: Any) -> Any:
    """The network as it was before its step, with the gradient of that step."""
    for p, q in zip(network.parameters(), trained.parameters(), strict=True):
        p.grad = q.grad
    return network


# --- divergence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c_policy", "c_data", "expected"),
    [(math.log(math.e - 1), math.log(math.e - 1), 0.0), (0.0, 0.0, -0.0597), (1.0, -1.0, 0.9592)],
)
def test_known_values_of_the_divergence(c_policy, c_data, expected):
    """0 for the best discriminator of equal distributions (c = 0.5413), below 0 for c = 0."""
    got = float(divergence(torch.tensor(c_policy), torch.tensor(c_data)))
    assert got == pytest.approx(expected, abs=6e-5)


def test_divergence_is_the_kl_at_the_best_discriminator():
    """E_policy[1 + log w] - E_data[w] with w = policy / data is KL(policy || data), and no w exceeds it."""
    policy, data = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])

    def estimate(w: np.ndarray) -> float:
        c = torch.tensor(np.log(np.expm1(w)))  # softplus(c) = w
        zero = torch.zeros_like(c)
        first = divergence(c, zero) - divergence(zero, zero)
        second = divergence(zero, c) - divergence(zero, zero)
        return float((torch.tensor(policy) * first + torch.tensor(data) * second).sum() + divergence(zero, zero)[0])

    truth = float((policy * np.log(policy / data)).sum())
    assert estimate(policy / data) == pytest.approx(truth, abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert estimate(policy / data * np.exp(rng.normal(0, 0.3, 3))) < truth + 1e-6


def test_divergence_is_finite_for_a_sure_discriminator():
    c = torch.tensor([-500.0, 500.0], requires_grad=True)
    estimate = divergence(c, c.flip(0))
    estimate.sum().backward()
    assert torch.isfinite(estimate).all()
    assert torch.isfinite(c.grad).all()


def test_every_row_is_beside_its_own_task():
    rows = torch.arange(TASKS * ROWS * OBS, dtype=torch.float64).view(TASKS, ROWS, OBS)
    joined = join(rows, embedding())
    for task in range(TASKS):
        for row in range(ROWS):
            assert torch.equal(joined[task * ROWS + row], torch.cat([rows[task, row], embedding()[task]]))


# --- one step --------------------------------------------------------------------------------------------------

CASES = {
    "released": {},
    "no value network": {"value_network": False},
    "policy": regularized(),
    "policy, without value network": regularized() | {"value_network": False},
    "value": regularized(policy=False, value_penalty=True),
    "both": regularized(value_penalty=True),
    "both, at s'": regularized(value_penalty=True, next_state=True),
    "both, clipped": regularized(value_penalty=True, alpha=2000.0),
    "constant": regularized(value_penalty=True, adaptive=False),
    "gradient penalty": regularized(penalty="gradient"),
    "other weights": regularized(value_penalty=True, alpha_rate=0.3)
    | {"tau": 0.1, "mean_weight": 0.2, "log_std_weight": 0.7},
    "one discriminator step": regularized(value_penalty=True, discriminator_steps=1),
    "mmd": near("mmd", sigma=0.5),
    "mmd, constant, gaussian": near("mmd", sigma=0.5, kernel="gaussian", samples=3, adaptive=False),
    "mmd, value": near("mmd", sigma=0.5, policy=False, value_penalty=True, next_state=True),
    "bc": near("bc", alpha=0.0),
    "bc, another weight": near("bc", alpha=0.0, weight=0.4) | {"entropy_in_policy": False},
    "bc, both": near("bc", value_penalty=True, next_state=True) | {"value_network": False},
    "bc, value": near("bc", policy=False, value_penalty=True, next_state=True),
    "no entropy in the target": {"entropy_in_target": False},
    "no entropy in the target, without value network": {"entropy_in_target": False, "value_network": False},
    "no entropy in the policy": regularized() | {"entropy_in_policy": False},
    "layer norm": {"critic_layer_norm": True},
    "rebrac": near("bc", value_penalty=True, next_state=True)
    | {"critic_layer_norm": True, "value_network": False, "entropy_in_target": False, "entropy_in_policy": False},
}


STORED = {"both, clipped": 5000.0}  # an alpha that has wound up beyond alpha_max, as it does while it adapts


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_the_equations(case, noise):
    chosen = config(**CASES[case])
    agent, b, z, r = make(chosen), batch(), embedding(), chosen.regularization
    if r.next_actions:
        b = with_next_action(b)
    stored = STORED.get(case, r.alpha)
    agent.alpha.fill_(stored)
    rows, old = flat(b, z), frozen(agent)
    extra = [batch(20 + i) for i in range(r.further_batches)]
    scalars = {name: float(value) for name, value in agent.update(b, z, extra).items()}
    new = frozen(agent)

    action, log_prob, _, _ = act(old["policy"], rows["s"], noise)
    alpha = min(max(stored, 0), r.alpha_max)
    d = penalty = np.zeros(TASKS * ROWS)
    if r.active:
        if r.kind == "kl-dual":  # with the discriminator after its steps
            d = kl(c_values(new["c"], action, rows["s"]), c_values(new["c"], rows["a"], rows["s"]))
        else:
            d = distance(r, old["policy"], rows["s"], rows["a"], noise)
        assert scalars["divergence"] == pytest.approx(d.mean(), rel=1e-9)
        assert scalars["alpha"] == alpha
    if r.value_penalty:
        penalty = d
        if r.next_actions:
            penalty = np.nan_to_num(distance(r, old["policy"], rows["s2"], rows["a2"], noise))
            assert (penalty == 0).sum() == 1
        elif r.next_state:
            following = act(old["policy"], rows["s2"], noise)[0]
            penalty = kl(c_values(new["c"], following, rows["s2"]), c_values(new["c"], rows["a"], rows["s"]))

    # Eq. 7
    if chosen.value_network:
        value = net(old["target"], rows["s2"])[:, 0]
    else:
        following, following_log_prob, _, _ = act(old["policy"], rows["s2"], noise)
        value = q_values(old["target"], following, rows["s2"]).min(0)
        value = value - following_log_prob * chosen.entropy_in_target
    y = 5.0 * rows["r"] + 0.9 * (1 - rows["end"]) * (value - alpha * penalty)

    def q_loss() -> float:
        return float(((q_values(old["q"], rows["a"], rows["s"]) - y) ** 2).mean(1).sum())

    assert scalars["q_loss"] == pytest.approx(q_loss(), rel=1e-9)
    assert scalars["q_mean"] == pytest.approx(q_values(old["q"], rows["a"], rows["s"]).mean(), rel=1e-9)
    got, said = numerical(q_loss, with_grads(old["q"], agent.q))
    assert said == pytest.approx(got, rel=1e-5)

    # V, towards the Q just updated
    smallest = q_values(new["q"], action, rows["s"]).min(0)
    if chosen.value_network:

        def v_loss() -> float:
            value = smallest - log_prob * chosen.entropy_in_target
            return float(((net(old["v"], rows["s"])[:, 0] - value) ** 2).mean())

        assert scalars["v_loss"] == pytest.approx(v_loss(), rel=1e-9)
        got, said = numerical(v_loss, with_grads(old["v"], agent.v))
        assert said == pytest.approx(got, rel=1e-5)

    # Eq. 8, with the entropy's weight 1 and the release's regularizers
    def policy_loss() -> float:
        action, log_prob, mean, log_std = act(old["policy"], rows["s"], noise)
        entropy = log_prob.mean() * chosen.entropy_in_policy
        loss = entropy - q_values(new["q"], action, rows["s"]).min(0).mean()
        if r.kind == "bc" and r.in_policy:  # mean |Q| is held still
            gain = r.weight * q_values(new["q"], action, rows["s"]).min(0).mean() / abs(smallest).mean()
            loss = entropy - gain + distance(r, old["policy"], rows["s"], rows["a"], noise).mean()
        elif r.kind == "mmd" and r.in_policy:
            loss += alpha * distance(r, old["policy"], rows["s"], rows["a"], noise).mean()
        elif r.in_policy:
            both = c_values(new["c"], action, rows["s"]), c_values(new["c"], rows["a"], rows["s"])
            loss += alpha * kl(*both).mean()
        return float(loss + chosen.mean_weight * (mean**2).mean() + chosen.log_std_weight * (log_std**2).mean())

    assert scalars["policy_loss"] == pytest.approx(policy_loss(), rel=1e-9)
    assert scalars["entropy"] == pytest.approx(-log_prob.mean(), rel=1e-9)
    got, said = numerical(policy_loss, with_grads(old["policy"], agent.policy))
    assert said == pytest.approx(got, rel=1e-4)

    # alpha: a plain step, stored unclipped
    adapted = r.kind in ("kl-dual", "mmd") and r.adaptive
    moved = stored + r.alpha_rate * (d.mean() - r.target_divergence) if adapted else stored
    assert float(agent.alpha) == pytest.approx(moved, rel=1e-9)

    # the target network, after its online network's step
    online = agent.v if chosen.value_network else agent.q
    for before, after, now in zip(
        old["target"].parameters(), agent.target.parameters(), online.parameters(), strict=True
    ):
        torch.testing.assert_close(after, (1 - chosen.tau) * before + chosen.tau * now.detach())


@pytest.mark.parametrize(("kind", "weight"), [("value", 5.0), ("gradient", 5.0), ("value", 2.0)])
def test_discriminator_loss_and_its_gradient(kind, weight, noise):
    agent = make(config(**regularized(penalty=kind, penalty_weight=weight)))
    with torch.no_grad():
        agent.c.weights[-1].mul_(5 if kind == "value" else 10)  # |c|, and its slope, on both sides of 1
    b, z = batch(), embedding()
    rows = flat(b, z)
    mixed = torch.rand(TASKS * ROWS, 1, generator=copy.deepcopy(agent.noise)).numpy()
    action = act(agent.policy, rows["s"], noise)[0]
    between = action + mixed * (rows["a"] - action)

    def slope(x: np.ndarray) -> np.ndarray:
        """Norm of dc/da, by the chain rule from the top."""
        weights = [w[0].detach().numpy() for w in agent.c.weights]
        biases = [bias[0, 0].detach().numpy() for bias in agent.c.biases]
        on = []
        for w, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = x @ w + bias
            on.append(x > 0)
            x = np.maximum(x, 0)
        back = np.tile(weights[-1][:, 0], (len(x), 1))
        for w, where in zip(weights[-2::-1], on[::-1], strict=True):
            back = (back * where) @ w.T
        return np.linalg.norm(back[:, :ACT], axis=1)

    def loss() -> float:
        x = np.concatenate([between, rows["s"]], 1)
        size = np.abs(net(agent.c, x)[:, 0]) if kind == "value" else slope(x)
        assert 0 < (size > 1).sum() < len(size)
        estimate = kl(c_values(agent.c, action, rows["s"]), c_values(agent.c, rows["a"], rows["s"]))
        return float(-estimate.mean() + weight * (np.maximum(size - 1, 0) ** 2).mean())

    got = agent.discriminator_loss(b, z)
    assert float(got.detach()) == pytest.approx(loss(), rel=1e-9)
    got.backward()
    derivative, said = numerical(loss, agent.c)
    assert said == pytest.approx(derivative, rel=1e-4)
    assert all(p.grad is None for p in agent.policy.parameters())


def test_discriminator_steps_take_the_batch_and_then_the_fresh_ones(monkeypatch):
    agent, seen = make(config(**regularized())), []
    original = ActorCritic.discriminator_loss
    monkeypatch.setattr(ActorCritic, "discriminator_loss", lambda self, b, z: (seen.append(b), original(self, b, z))[1])
    b, extra = batch(), [batch(8), batch(9)]
    agent.update(b, embedding(), extra)
    assert [id(one) for one in seen] == [id(one) for one in [b, *extra]]


def test_terminal_rows_do_not_bootstrap():
    agent, b, z = make(config()), batch(), embedding()
    ended = moves_of(b.observation, b.action, b.reward, b.next_observation, torch.ones(TASKS, ROWS))
    torch.testing.assert_close(agent.q_target(ended, z, None), 5.0 * b.reward.reshape(-1))
    going = moves_of(b.observation, b.action, b.reward, b.next_observation, torch.zeros(TASKS, ROWS))
    torch.testing.assert_close(
        agent.q_target(going, z, None) - agent.q_target(ended, z, None),
        0.9 * agent.target(join(b.next_observation, z)).squeeze(-1),
    )
    assert not agent.q_target(going, z, None).requires_grad


def test_a_hand_computed_target_with_constant_networks():
    """k r + gamma (Vbar - alpha D) with k = 5, r = 1, gamma = 0.9, Vbar = 2, alpha = 3, D = 0.9592."""
    agent, b = make(config()), batch()
    with torch.no_grad():
        agent.target.weights[-1].zero_()
        agent.target.biases[-1].fill_(2.0)
    one = moves_of(b.observation, b.action, torch.ones(TASKS, ROWS), b.next_observation, torch.zeros(TASKS, ROWS))
    y = agent.q_target(one, embedding(), torch.full((TASKS * ROWS,), 3 * 0.9592))
    torch.testing.assert_close(y, torch.full((TASKS * ROWS,), 5 * 1 + 0.9 * (2 - 2.8776)))


# --- the kinds without a discriminator -------------------------------------------------------------------------


def test_known_values_of_the_discrepancy():
    """sigma 1: a pair at distance 1 has k = e^-1/2 in both kernels; the sample that is the data's action has k = 1."""
    samples, data, e = torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[0.0]]), math.exp(-0.5)
    for kernel in ("laplacian", "gaussian"):
        expected = (2 + 2 * e) / 4 - (1 + e) + 1
        assert mmd(samples, data, kernel, 1.0).tolist() == pytest.approx([expected])
        assert mmd(data.unsqueeze(0), data, kernel, 1.0).tolist() == [0.0]
    apart = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[-1.0, 0.0]])
    assert float(mmd(*apart, "laplacian", 2.0)) == pytest.approx(2 - 2 * math.exp(-3 / 4))
    assert float(mmd(*apart, "gaussian", 2.0)) == pytest.approx(2 - 2 * math.exp(-5 / 4))


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_one_action_of_the_data_estimates_the_discrepancy_up_to_a_constant(kernel):
    """Averaged over the data's actions, D is MMD^2(policy, behavior) + 1 - E k(y, y')."""
    samples = torch.randn(4, 1, ACT, generator=source(3), requires_grad=True)
    data = torch.randn(6, ACT, generator=source(4))

    def k(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        size = (one - two).abs() if kernel == "laplacian" else (one - two).square()
        return torch.exp(-size.sum() / (2 * 0.7))

    x = samples[:, 0]
    within = torch.stack([k(one, two) for one in data for two in data]).mean()
    whole = torch.stack([k(one, two) for one in x for two in x]).mean() + within
    whole = whole - 2 * torch.stack([k(one, two) for one in x for two in data]).mean()
    estimate = mmd(samples.expand(4, 6, ACT), data, kernel, 0.7).mean()
    assert float(estimate.detach()) == pytest.approx(float((whole + 1 - within).detach()), rel=1e-12)
    (one,), (two,) = torch.autograd.grad(estimate, samples), torch.autograd.grad(whole, samples)
    torch.testing.assert_close(one, two)


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["laplacian", "gaussian"]), st.floats(0.05, 50))
@settings(max_examples=40, deadline=None)
def test_the_discrepancy_is_at_least_zero_and_knows_no_order(n, width, kernel, sigma):
    samples = torch.randn(n, 7, width, generator=source(n)).tanh()
    data = torch.randn(7, width, generator=source(width)).tanh()
    found = mmd(samples, data, kernel, sigma)
    assert float(found.min()) > -1e-12
    torch.testing.assert_close(mmd(samples.flip(0), data, kernel, sigma), found)


@pytest.mark.parametrize("case", ["mmd", "bc", "kl-dual"])
def test_a_strong_regularizer_draws_the_policy_to_the_data(case):
    """The data do 0.5 and -0.5 everywhere; nothing is rewarded."""
    values = {
        "mmd": near("mmd", alpha=100.0, adaptive=False),
        "bc": near("bc", alpha=0.0, weight=1e-3),
        "kl-dual": near("kl-dual", alpha=100.0, adaptive=False, penalty="gradient", discriminator_rate=1e-2),
    }[case]
    agent, b = make(config(**values, entropy_in_policy=False), loud=False), batch()
    data = torch.tensor([0.5, -0.5]).expand(TASKS, ROWS, ACT)
    b, z = replace(b, action=data, reward=torch.zeros(TASKS, ROWS)), embedding()
    state = join(b.observation, z)
    start = (torch.tanh(agent.policy(state)[0]) - data.reshape(-1, ACT)).abs().mean()
    for _ in range(200):
        scalars = agent.update(b, z, [b, b])
    end = (torch.tanh(agent.policy(state)[0]) - data.reshape(-1, ACT)).abs().mean()
    assert end.item() < 0.3 * start.item()
    assert all(torch.isfinite(value) for value in scalars.values())


def test_bc_does_not_see_the_scale_of_q(noise):
    """TD3+BC Eq. 5: Q / mean |Q|."""
    agents = [make(config(**near("bc", alpha=0.0))) for _ in range(2)]
    with torch.no_grad():
        for agent, scale in zip(agents, (1.0, 1000.0), strict=True):
            agent.q.weights[-1].mul_(scale)
            agent.q.biases[-1].mul_(scale)
            agent.optimizers["q"].param_groups[0]["lr"] = 0.0
    for agent in agents:
        agent.update(batch(), embedding(), [])
    for one, two in zip(agents[0].policy.parameters(), agents[1].policy.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("kind", ["mmd", "bc"])
def test_a_penalty_at_the_next_state_needs_the_next_actions(kind):
    agent = make(config(**near(kind, value_penalty=True, next_state=True)))
    with pytest.raises(UserError, match="needs the data's next actions"):
        agent.update(batch(), embedding(), [])


@pytest.mark.parametrize("kind", ["mmd", "bc"])
def test_without_a_discriminator_no_further_batch_is_needed(kind):
    agent = make(config(**near(kind)))
    assert agent.c is None
    assert "c" not in agent.optimizers
    assert agent.config.regularization.further_batches == 0
    assert config(**regularized()).regularization.further_batches == 2


def test_layer_norm_adds_no_tensor_and_holds_the_features_still():
    plain, normed = make(config()), make(config(critic_layer_norm=True))
    assert plain.state_dict().keys() == normed.state_dict().keys()
    seen = []
    for agent in (plain, normed):
        hidden = type(agent.q)(6, [32], 32, source(1), layer_norm=agent.q.layer_norm)
        with torch.no_grad():  # the identity after the hidden layer, to look at it
            hidden.weights[-1].copy_(torch.eye(32))
            hidden.biases[-1].zero_()
        seen.append(hidden(torch.randn(5, 6, generator=source(2)) * 1e3).detach())
    assert float(seen[0].max()) > 100
    torch.testing.assert_close(seen[1].mean(1), torch.zeros(5))
    torch.testing.assert_close(seen[1].var(1, unbiased=False), torch.ones(5))


@pytest.mark.parametrize("scale", [1e2, 1e5])
def test_layer_norm_bounds_what_q_promises_far_from_the_data(scale):
    """|Q| <= |w| sqrt(width) + |b| of the last layer, wherever; without it Q grows with the distance."""
    plain, normed = make(config()), make(config(critic_layer_norm=True))
    seen = []
    for agent in (plain, normed):
        weight, bias = agent.q.weights[-1][0, :, 0].detach(), agent.q.biases[-1][0, 0, 0].detach()
        limit = float(weight.norm() * len(weight) ** 0.5 + bias.abs())
        inputs = scale * torch.randn(50, agent.q.weights[0].shape[1], generator=source(2))
        with torch.no_grad():
            seen.append(float(agent.q(inputs)[0].abs().max()) / limit)
    assert seen[0] > scale / 1000
    assert seen[1] <= 1 + 1e-5


# --- alpha -----------------------------------------------------------------------------------------------------


def test_alpha_winds_up_beyond_what_is_used(noise):
    """Stored without clamp, as released: from 1.9 with alpha_max 2 it goes on rising, and its use does not."""
    agent = make(config(**regularized(alpha=1.9, alpha_max=2.0, target_divergence=-10.0)))
    used = [float(agent.update(batch(), embedding(), [])["alpha"]) for _ in range(3)]
    assert used == [1.9, 2.0, 2.0]
    assert float(agent.alpha) > 20


def test_alpha_below_zero_is_used_as_zero(noise):
    agent = make(config(**regularized(alpha=0.5, target_divergence=100.0)))
    used = [float(agent.update(batch(), embedding(), [])["alpha"]) for _ in range(2)]
    assert used == [0.5, 0.0]
    assert float(agent.alpha) < -100


# --- who learns from what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["released", "no value network", "both", "mmd", "bc"])
def test_nothing_reaches_an_attached_embedding(case):
    """z is detached inside: an encoder behind it gets no gradient from critic, V, policy or discriminator."""
    z = embedding().requires_grad_(True)
    agent = make(config(**CASES[case]))
    agent.update(batch(), z, [])
    assert z.grad is None


def test_coupled_gradients_are_the_critics_and_the_own_loss(noise):
    """Figs 5 and 9: the encoder gets d(Q loss + own loss)/dz; the Q networks get the same step as decoupled."""
    b, start = batch(), embedding()
    encoder = torch.nn.Parameter(start.clone())
    coupled, plain = make(config()), make(config())
    old = frozen(coupled)["q"]
    y = coupled.q_target(b, start, None)
    optimizer = torch.optim.SGD([encoder], lr=1.0)
    z = encoder * 1
    coupled.update(b, z, [], EncoderStep(optimizer, (z**3).sum()))
    plain.update(b, start, [])

    probe = start.clone().requires_grad_(True)
    rows = torch.cat([b.action.reshape(-1, ACT), join(b.observation, probe)], -1)
    ((old(rows).squeeze(-1) - y) ** 2).mean(-1).sum().backward()
    torch.testing.assert_close(encoder.detach(), start - probe.grad - 3 * start**2)
    assert float(probe.grad.abs().min()) > 0
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(coupled.state_dict()[name], value, msg=name)


def test_the_target_network_is_never_trained():
    for chosen in (config(), config(value_network=False)):
        agent = make(chosen)
        agent.update(batch(), embedding(), [])
        assert not any(p.requires_grad or p.grad is not None for p in agent.target.parameters())
        held = {id(p) for o in agent.optimizers.values() for group in o.param_groups for p in group["params"]}
        assert not held & {id(p) for p in agent.target.parameters()}


def test_a_step_leaves_every_network_trainable():
    """Networks are held still for parts of a step; none may stay so."""
    agent = make(config(**CASES["both"]))
    for _ in range(2):
        agent.update(batch(), embedding(), [])
    for name in ("policy", "q", "v", "c"):
        assert all(p.requires_grad for p in getattr(agent, name).parameters()), name


def test_every_network_moves_and_the_batch_does_not():
    agent, b, z = make(config(**CASES["both"])), batch(), embedding()
    kept = copy.deepcopy(b), z.clone()
    old = frozen(agent)
    agent.update(b, z, [])
    for name in ("policy", "q", "v", "c", "target"):
        pairs = zip(old[name].parameters(), getattr(agent, name).parameters(), strict=True)
        assert any(not torch.equal(before, after) for before, after in pairs), name
    assert torch.equal(z, kept[1])
    for name in ("observation", "action", "reward", "next_observation", "terminal"):
        assert torch.equal(getattr(b, name), getattr(kept[0], name)), name


# --- what is off costs nothing ---------------------------------------------------------------------------------


def test_without_regularization_there_is_no_discriminator(monkeypatch):
    agent = make(config())
    assert agent.c is None
    assert set(agent.optimizers) == {"policy", "q", "v"}
    monkeypatch.setattr(ActorCritic, "discriminator_loss", lambda *_: pytest.fail("a discriminator step"))
    scalars = agent.update(batch(), embedding(), [])
    assert not {"divergence", "alpha", "discriminator_loss"} & set(scalars)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="there is no discriminator"):
        agent.discriminator_loss(batch(), embedding())


def test_without_value_network_there_is_no_v():
    agent = make(config(value_network=False))
    assert agent.v is None
    assert set(agent.optimizers) == {"policy", "q"}
    assert "v_loss" not in agent.update(batch(), embedding(), [])


def test_targets_start_equal_to_their_networks():
    for chosen in (config(), config(value_network=False)):
        agent = make(chosen, loud=False)
        online = agent.v if agent.v is not None else agent.q
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), agent.target.parameters(), strict=True))


# --- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"tau": 0.0}, "tau"),
        ({"width": 0}, "width"),
        ({"actor_rate": 0.0}, "actor_rate"),
        ({"reward_scale": -1.0}, "reward_scale"),
        ({"gamma": "0.9"}, "gamma"),
        ({"regularization": {"penalty": "norm"}}, "regularization.penalty"),
        ({"regularization": {"alpha": -1.0}}, "regularization.alpha"),
        ({"regularization": {"discriminator_steps": 0}}, "regularization.discriminator_steps"),
        ({"regularization": {"police": True}}, "regularization.police"),
        ({"regularization": {"kind": "kl"}}, "regularization.kind"),
        ({"regularization": {"policy": True}}, "policy: true with kind: none"),
        ({"regularization": {"value_penalty": True}}, "value_penalty: true with kind: none"),
        ({"regularization": {"kind": "bc", "policy": False}}, "policy: false with value_penalty: false"),
        ({"regularization": {"kind": "kl-dual", "adaptive": False}}, "alpha = 0 with adaptive: false"),
        ({"regularization": {"kind": "mmd", "adaptive": False}}, "alpha = 0 with adaptive: false"),
        ({"regularization": {"kind": "kl-dual", "alpha": 1e6}}, r"alpha = 1e\+06 is above alpha_max = 2000"),
        ({"regularization": {"kind": "bc", "value_penalty": True, "next_state": True}}, "alpha = 0 with kind: bc"),
        ({"regularization": {"kind": "mmd", "value_penalty": True}}, "no form at s"),
        ({"regularization": {"kind": "kl-dual", "next_state": True}}, "next_state: true switches nothing on"),
        ({"regularization": {"kind": "mmd", "sigma": 0.0}}, "regularization.sigma"),
        ({"regularization": {"kind": "bc", "weight": 0.0}}, "regularization.weight"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, names):
    with pytest.raises(UserError, match=names):
        config(**values)


@pytest.mark.parametrize("case", CASES)
def test_a_resolved_configuration_is_read_back(case):
    chosen = config(**CASES[case])
    assert parse(ActorCriticConfig, chosen.resolved(), "test") == chosen


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["reward_scale", "log_std_max", "actor_rate"])
def test_a_hyperparameter_is_a_finite_number(key, value):
    with pytest.raises(UserError, match=key):
        config(**{key: value})


def test_log_std_max_stays_above_the_lower_clamp():
    """torch.clamp with min above max returns max everywhere: a policy that cannot learn its spread."""
    with pytest.raises(UserError, match="log_std_max"):
        config(log_std_max=-30.0)
