"""Behavior cloning: losses in double precision, a density that is one, what it leaves alone, golden numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update

from omrl.algorithms import bc
from omrl.algorithms.base import Spec, create
from omrl.core.errors import UserError
from omrl.nets.experience import Experience
from omrl.nets.mlp import Mlp

SMALL = {
    "latent_dim": 3, "encoder_width": 16, "encoder_depth": 2, "width": 16, "depth": 2,
    "meta_batch": 4, "rl_batch": 8, "context_batch": 12,
}  # fmt: skip


def make(**values: Any) -> bc.Bc:
    algorithm = create("bc", SMALL | values, Spec(2, 2, False), 0, "cpu")
    assert isinstance(algorithm, bc.Bc)
    return algorithm


def made_batch(seed: int = 1) -> dict[str, Experience]:
    g = torch.Generator().manual_seed(seed)
    s, a = torch.randn(4, 12, 2, generator=g), torch.rand(4, 12, 2, generator=g) * 2 - 1
    r = torch.randn(4, 12, generator=g)
    state, action = torch.randn(4, 8, 2, generator=g), torch.rand(4, 8, 2, generator=g) * 2 - 1
    moves = moves_of(state, action, torch.full((4, 8), torch.nan), state, torch.zeros(4, 8))
    return meta_batch(torch.tensor([0, 1, 1, 2]), bag_of(s, a, r), moves)


def double(net: Mlp, x: np.ndarray) -> np.ndarray:
    """The network in double precision."""
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        x = (np.maximum(x, 0) if place else x) @ weight[0].detach().double().numpy() + bias[0].detach().double().numpy()
    return x


# --- the losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
def test_the_first_updates_loss_in_double_precision(likelihood):
    algorithm, batch = make(likelihood=likelihood), made_batch()
    with torch.no_grad():  # away from the start, where means are all but zero
        algorithm.policy.trunk.weights[-1].mul_(500)
        algorithm.encoder.net.weights[-1].mul_(500)
    z = np.tanh(double(algorithm.encoder.net, algorithm.rows(batch["context"]).double().numpy())).mean(1)
    losses = []
    for task in range(4):
        state = np.concatenate([batch["transitions"].observation[task].numpy(), np.tile(z[task], (8, 1))], axis=1)
        mean, log_std = np.split(double(algorithm.policy.trunk, state), 2, axis=1)
        log_std, action = np.clip(log_std, -20, 0), batch["transitions"].action[task].double().numpy()
        u = np.arctanh(action)
        density = np.exp(-(((u - mean) / np.exp(log_std)) ** 2) / 2) / np.sqrt(2 * np.pi) / np.exp(log_std)
        loss = (np.tanh(mean) - action) ** 2 if likelihood == "mse" else -np.log(density / (1 - action**2))
        losses.append(loss.sum(1).mean())
    assert float(update(algorithm, batch)["cloning_loss"]) == pytest.approx(np.mean(losses), rel=2e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.8, -1.0), (-1.2, -0.5)])
def test_the_likelihood_is_a_density_over_actions(mean, log_std):
    centers = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000 - 1
    log_likelihood = [
        -bc.cloning_loss(torch.full_like(a, mean), torch.full_like(a, log_std), a, "gaussian")
        for a in centers.view(-1, 1, 1)
    ]
    density = torch.stack(log_likelihood).exp()
    assert float(density.mean() * 2) == pytest.approx(1.0, abs=2e-3)


# --- what trains what --------------------------------------------------------------------------------------------


def test_without_the_metric_loss_it_is_not_computed(monkeypatch):
    monkeypatch.setattr(bc, "distance_metric_loss", lambda *_: pytest.fail("the metric loss is off"))
    assert set(update(make(), made_batch())) == {"cloning_loss", "z_rms"}
    with pytest.raises(pytest.fail.Exception, match="off"):
        update(make(encoder_loss="metric"), made_batch())


def test_neither_dense_rewards_nor_fresh_batches_nor_noise_are_used():
    algorithm = make(likelihood="gaussian")
    scalars = update(algorithm, made_batch())  # its dense rewards are not numbers
    assert all(torch.isfinite(value) for value in scalars.values())
    assert algorithm.generators() == {}
    assert set(algorithm.modules()) == set(algorithm.optimizers()) == {"encoder", "policy"}


def test_imitation_trains_the_encoder_only_where_it_shall():
    for loss, moves in (("cloning", True), ("metric", False)):
        one, two = make(encoder_loss=loss), make(encoder_loss=loss)
        batch = made_batch()
        update(one, batch)
        update(two, {**batch, "transitions": replace(batch["transitions"], action=-batch["transitions"].action)})
        alike = [torch.equal(a, b) for a, b in zip(one.encoder.parameters(), two.encoder.parameters(), strict=True)]
        assert all(alike) != moves


def test_the_metric_loss_leaves_the_policy_alone():
    weak, strong = make(encoder_loss="metric", metric_weight=0.5), make(encoder_loss="metric", metric_weight=50.0)
    batch = made_batch()
    assert float(update(strong, batch)["metric_loss"]) == pytest.approx(
        100 * float(update(weak, batch)["metric_loss"]), rel=1e-6
    )
    gradients = [[p.grad for p in algorithm.policy.parameters()] for algorithm in (weak, strong)]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_deterministic_policy_has_no_std_to_learn():
    for likelihood, learns in (("mse", False), ("gaussian", True)):
        algorithm = make(likelihood=likelihood)
        with torch.no_grad():
            algorithm.policy.trunk.biases[-1][..., 2:] = -0.5  # below the bound, where gradients pass
        update(algorithm, made_batch())
        gradient = algorithm.policy.trunk.weights[-1].grad
        assert gradient is not None
        assert bool(gradient[..., 2:].any()) == learns
        assert bool(gradient[..., :2].any())


@pytest.mark.parametrize(
    "values",
    [{"latent_dim": 0}, {"encoder_loss": "focal"}, {"metric_weight": 0.0}, {"likelihood": "l2"}, {"actor_rate": 0.0},
     {"meta_batch": 1}, {"rl_batch": 0}, {"context_batch": 0}, {"critic_rate": 1e-3}],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(UserError, match=key):
        make(**values)


# --- golden numbers ----------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. In double precision, so that they hold on every CPU.
GOLDEN: dict[str, dict[str, float]] = {
    "mse": {
        "cloning_loss": 0.6645151,
        "z_rms": 0.001379094,
        "gradient_encoder": 2.907698e-05,
        "gradient_policy": 0.1980007,
        "action_0": -0.001808026,
        "action_1": 0.002083637,
    },
    "gaussian": {
        "cloning_loss": 1.42494,
        "z_rms": 0.001346926,
        "gradient_encoder": 4.598042e-05,
        "gradient_policy": 0.1765007,
        "action_0": -0.001395653,
        "action_1": 0.002273288,
    },
    "metric": {  # the encoder's part is FOCAL's: see test_focal.py
        "cloning_loss": 0.6645151,
        "z_rms": 0.001827472,
        "metric_loss": 100.2959,
        "gradient_encoder": 0.009902715,
        "gradient_policy": 0.1980201,
        "action_0": -0.00180816,
        "action_1": 0.00208388,
    },
}


@pytest.mark.parametrize("arm", ["mse", "gaussian", "metric"])
def test_golden_numbers(arm, double_precision):
    values = {"encoder_loss": "metric"} if arm == "metric" else {"likelihood": arm}
    algorithm = make(**values)
    for i in range(3):
        scalars = update(algorithm, made_batch(i))
    batch = made_batch(9)
    action = algorithm.actions(batch["transitions"].observation, algorithm.infer(batch["context"]))[0, 0]
    got = {name: float(value) for name, value in scalars.items()}
    for name, module in algorithm.modules().items():
        gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        got[f"gradient_{name}"] = float(torch.stack(gradients).norm())
    got |= {"action_0": float(action[0]), "action_1": float(action[1])}
    text = json.dumps({name: float(f"{value:.7g}") for name, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(arm, {}), rel=1e-6, abs=1e-12), f"if this change is meant: {text}"
