"""Contextual BCQ: losses in double precision, whose gradient reaches what, acting without chance, golden numbers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update

from omrl.algorithms.base import Spec, create, load_model, save_model
from omrl.algorithms.bcq import Bcq, soft_minimum
from omrl.core.errors import UserError
from omrl.nets.actor_critic import join
from omrl.nets.experience import Experience
from omrl.nets.mlp import Mlp

SMALL = {
    "latent_dim": 3, "encoder_width": 16, "encoder_depth": 2, "width": 16, "depth": 2,
    "meta_batch": 4, "rl_batch": 8, "context_batch": 12, "candidates": 5,
}  # fmt: skip
LATENT = 4  # 2 per action entry


def make(seed: int = 0, **values: Any) -> Bcq:
    algorithm = create("bcq", SMALL | values, Spec(2, 2, False), seed, "cpu")
    assert isinstance(algorithm, Bcq)
    return algorithm


def made_batch(seed: int = 1) -> dict[str, Experience]:
    g = torch.Generator().manual_seed(seed)
    s, a = torch.randn(4, 20, 2, generator=g), torch.rand(4, 20, 2, generator=g) * 2 - 1
    r, ends = torch.randn(4, 20, generator=g), (torch.rand(4, 8, generator=g) < 0.3).float()
    moves = moves_of(s[:, :8], a[:, :8], r[:, :8], s[:, :8] + 0.1 * a[:, :8], ends)
    context = bag_of(s[:, 8:], a[:, 8:], r[:, 8:])
    return meta_batch(torch.tensor([0, 1, 1, 2]), context, moves)


def spread(algorithm: Bcq) -> Bcq:
    """Move the last layers away from the start, where everything is all but zero."""
    learner = algorithm.learner
    nets = [algorithm.encoder.net, learner.encode, learner.decode, learner.shift, learner.q]
    with torch.no_grad():
        for net in [*nets, learner.target_shift, learner.target_q]:
            net.weights[-1].mul_(100)
    return algorithm


def double(net: Mlp, x: np.ndarray, place_in_stack: int = 0) -> np.ndarray:
    """One network of the stack in double precision."""
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        w, b = (p[place_in_stack].detach().double().numpy() for p in (weight, bias))
        x = (np.maximum(x, 0) if place else x) @ w + b
    return x


def side(*parts: Any) -> np.ndarray:
    return np.concatenate([np.atleast_2d(np.asarray(part, dtype=np.float64)) for part in parts], axis=-1)


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


# --- the losses --------------------------------------------------------------------------------------------------


def test_the_first_updates_losses_in_double_precision():
    algorithm, batch = make(gamma=0.9, reward_scale=0.1, soft_min=0.6, perturbation=0.4, vae_first=False), made_batch()
    spread(algorithm)
    far = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(5)) * 3  # s' that s does not pass for
    batch = {**batch, "transitions": replace(batch["transitions"], next_observation=far)}
    learner, t = algorithm.learner, batch["transitions"]
    z = np.tanh(double(algorithm.encoder.net, algorithm.rows(batch["context"]).double().numpy().reshape(48, -1)))
    z = z.reshape(4, 12, 3).mean(1)
    stream = torch.Generator()
    stream.set_state(algorithm.generators()["noise"].get_state())
    noise = torch.randn(32, LATENT, generator=stream).double().numpy()
    latents = torch.randn(32, 5, LATENT, generator=stream).double().numpy().clip(-0.5, 0.5)
    squared, kl, errors = [], [], []
    for row in range(32):
        i, j = divmod(row, 8)
        state, action = side(t.observation[i, j], z[i]), np.asarray(t.action[i, j], dtype=np.float64)
        mean, log_std = np.split(double(learner.encode, side(state, action))[0], 2)
        log_std = log_std.clip(-4, 15)
        decoded = np.tanh(double(learner.decode, side(state, mean + np.exp(log_std) * noise[row])))[0]
        squared.append((decoded - action) ** 2)
        kl.append(-0.5 * (1 + 2 * log_std - mean**2 - np.exp(2 * log_std)))
        following, best = side(t.next_observation[i, j], z[i]), -np.inf
        for latent in latents[row]:
            candidate = np.tanh(double(learner.decode, side(following, latent)))
            shift = 0.4 * np.tanh(double(learner.target_shift, side(following, candidate)))
            inputs = side(following, (candidate + shift).clip(-1, 1))
            values = [double(learner.target_q, inputs, k).item() for k in (0, 1)]
            best = max(best, 0.6 * min(values) + 0.4 * max(values))
        y = 0.1 * float(t.reward[i, j]) + 0.9 * (1 - float(t.terminal[i, j])) * best
        errors.append([(double(learner.q, side(state, action), k).item() - y) ** 2 for k in (0, 1)])
    scalars = update(algorithm, batch)
    assert float(scalars["vae_loss"]) == pytest.approx(np.mean(squared) + 0.5 * np.mean(kl), rel=1e-4)
    assert float(scalars["q_loss"]) == pytest.approx(np.mean(errors, axis=0).sum(), rel=1e-4)
    assert float(scalars["z_rms"]) == pytest.approx(np.sqrt(np.mean(z**2)), rel=1e-4)


@pytest.mark.parametrize("by_vae", [True, False])
def test_every_network_descends_its_own_loss_and_no_other(by_vae):
    algorithm, batch = spread(make(encoder_by_vae=by_vae, vae_first=False)), made_batch()
    before = copy.deepcopy(algorithm)
    z = before.encoder(algorithm.rows(batch["context"]))
    losses = {"vae": before.vae_loss(batch["transitions"], z), "q": before.q_loss(batch["transitions"], z)}
    learner = before.learner
    expected = {}
    for name, net, loss in (
        ("encoder", before.encoder, losses["q"] + (losses["vae"] if by_vae else 0)),
        ("encode", learner.encode, losses["vae"]),
        ("decode", learner.decode, losses["vae"]),
        ("q", learner.q, losses["q"]),
    ):
        expected[name] = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    update(algorithm, batch)
    own = algorithm.learner
    nets = {"encoder": algorithm.encoder, "encode": own.encode, "decode": own.decode, "q": own.q}
    for name, net in nets.items():
        for parameter, gradient in zip(net.parameters(), expected[name], strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("first", [True, False])
def test_the_target_decodes_with_the_vae_as_the_order_says(first):
    algorithm, batch = spread(make(vae_first=first, rate=0.1)), made_batch()
    before = copy.deepcopy(algorithm)
    z, found = before.encoder(algorithm.rows(batch["context"])), {}
    vae_loss = before.vae_loss(batch["transitions"], z)
    stream = before.noise.get_state()
    scalars = update(algorithm, batch)
    encoder = torch.autograd.grad(vae_loss, list(before.encoder.parameters()), retain_graph=True)
    for name, learner in (("stepped", algorithm.learner), ("old", copy.deepcopy(before.learner))):
        before.learner.decode.load_state_dict(learner.decode.state_dict())
        before.noise.set_state(stream)
        found[name] = before.q_loss(batch["transitions"], z)
    right, wrong = ("stepped", "old") if first else ("old", "stepped")
    assert scalars["q_loss"].item() == pytest.approx(found[right].item(), rel=1e-6)
    assert scalars["q_loss"].item() != pytest.approx(found[wrong].item(), rel=1e-4)
    by_q = torch.autograd.grad(found[right], list(before.encoder.parameters()))
    for parameter, one, two in zip(algorithm.encoder.parameters(), encoder, by_q, strict=True):
        torch.testing.assert_close(parameter.grad, one + two, rtol=1e-4, atol=1e-7)


def test_the_perturbation_climbs_the_stepped_q1_at_sampled_actions():
    algorithm, batch = spread(make(perturbation=0.4)), made_batch()
    stream = torch.Generator()
    stream.set_state(algorithm.generators()["noise"].get_state())
    torch.randn(32, LATENT, generator=stream)
    torch.randn(32, 5, LATENT, generator=stream)
    latents = torch.randn(32, LATENT, generator=stream).clamp(-0.5, 0.5)
    z = algorithm.encoder(algorithm.rows(batch["context"])).detach()  # of the encoder before its step
    shift = copy.deepcopy(algorithm.learner.shift)
    scalars = update(algorithm, batch)
    learner, state = algorithm.learner, join(batch["transitions"].observation, z)
    with torch.no_grad():
        sampled = learner.generate(state, latents)
    gain = learner.value(learner.q, state, learner.perturb(shift, state, sampled))[0].mean()
    assert float(scalars["q_mean"]) == pytest.approx(gain.item(), rel=1e-5)
    for parameter, gradient in zip(
        learner.shift.parameters(), torch.autograd.grad(-gain, list(shift.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_targets_follow_slowly_and_only_the_optimizers_see_the_rest():
    algorithm = spread(make(tau=0.25))
    learner = algorithm.learner
    old = {name: copies(net) for name, net in (("q", learner.target_q), ("shift", learner.target_shift))}
    update(algorithm, made_batch())
    for name, target, online in (("q", learner.target_q, learner.q), ("shift", learner.target_shift, learner.shift)):
        for was, now, goal in zip(old[name], copies(target), copies(online), strict=True):
            torch.testing.assert_close(now, 0.75 * was + 0.25 * goal)
        assert not any(p.requires_grad for p in target.parameters())
    stepped = [p for o in algorithm.optimizers().values() for group in o.param_groups for p in group["params"]]
    trained = [p for m in algorithm.modules().values() for p in m.parameters() if p.requires_grad]
    assert len(stepped) == len({id(p) for p in stepped}) == len(trained)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, [1.0, -1.0]), (0.0, [3.0, 5.0]), (0.75, [1.5, 0.5])])
def test_the_soft_minimum_lies_between_both(weight, expected):
    q = torch.tensor([[1.0, 5.0], [3.0, -1.0]])
    assert soft_minimum(q, weight).tolist() == expected


def test_latents_that_actions_are_sampled_from_are_clipped():
    algorithm, seen = make(vae_clip=0.3), []
    algorithm.learner.decode.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0][:, -LATENT:]))
    update(algorithm, made_batch())
    algorithm.actions(made_batch()["transitions"].observation, torch.zeros(4, 3))
    posterior, target, perturbed, acting = (float(latent.detach().abs().max()) for latent in seen)
    assert posterior > 0.3  # the VAE's own latents are not
    assert target == perturbed == acting == pytest.approx(0.3)


# --- switched off ------------------------------------------------------------------------------------------------


def test_what_is_switched_off_has_no_effect():
    algorithm, batch = spread(make(kl_weight=0.0, perturbation=0.0, soft_min=1.0)), made_batch()
    learner, z = algorithm.learner, torch.zeros(4, 3)
    state, action = join(batch["transitions"].observation, z), batch["transitions"].action.reshape(-1, 2)
    assert torch.equal(learner.perturb(learner.shift, state, action), action)
    noise = torch.zeros(32, LATENT)
    mean = learner.encode(torch.cat([state, action], -1))[:, :LATENT]
    expected = (learner.generate(state, mean) - action).square().mean()
    assert learner.vae_loss(state, action, noise).item() == pytest.approx(expected.item(), rel=1e-6)
    before = copies(learner.shift)
    update(algorithm, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(learner.shift), strict=True))


def test_the_discount_counts_where_an_episode_goes_on():
    learner, g = spread(make(gamma=0.0, reward_scale=2.0)).learner, torch.Generator().manual_seed(0)
    following, latents, reward = torch.randn(6, 5, generator=g), torch.zeros(6, 5, LATENT), torch.randn(6, generator=g)
    torch.testing.assert_close(learner.target(following, reward, torch.zeros(6), latents), 2 * reward)
    learner = spread(make(gamma=0.9, reward_scale=2.0)).learner
    torch.testing.assert_close(learner.target(following, reward, torch.ones(6), latents), 2 * reward)


# --- acting ------------------------------------------------------------------------------------------------------


def test_acting_takes_the_candidate_of_the_largest_q1_in_double_precision():
    algorithm = spread(make(perturbation=0.4))
    learner, observation = algorithm.learner, made_batch()["transitions"].observation
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    actions, places = algorithm.actions(observation, z), set()
    for i in range(4):
        for j in range(8):
            state, found = side(observation[i, j], z[i]), []
            for latent in learner.latents:
                candidate = np.tanh(double(learner.decode, side(state, latent)))
                moved = (candidate + 0.4 * np.tanh(double(learner.shift, side(state, candidate)))).clip(-1, 1)
                found.append((double(learner.q, side(state, moved), 0).item(), moved[0]))
            place = int(np.argmax([value for value, _ in found]))
            places.add(place)
            np.testing.assert_allclose(actions[i, j].numpy(), found[place][1], atol=1e-5)
    assert len(places) > 1


def test_acting_draws_nothing_and_a_row_does_not_depend_on_the_others():
    algorithm, observation = spread(make()), made_batch()["transitions"].observation
    z, stream = torch.linspace(-1, 1, 12).view(4, 3), algorithm.generators()["noise"].get_state()
    everyone = algorithm.actions(observation, z)
    assert torch.equal(algorithm.actions(observation, z), everyone)
    torch.testing.assert_close(algorithm.actions(observation[2:3, 4:5], z[2:3]), everyone[2:3, 4:5])
    assert torch.equal(algorithm.generators()["noise"].get_state(), stream)
    assert not everyone.requires_grad


def test_the_latents_of_acting_belong_to_the_seed_and_to_the_model(tmp_path):
    one, again, other = make(0), make(0), make(1)
    assert torch.equal(one.learner.latents, again.learner.latents)
    assert not torch.equal(one.learner.latents, other.learner.latents)
    save_model(one, tmp_path, "mine", "bcq")
    assert torch.equal(load_model(tmp_path, "cpu").learner.latents, one.learner.latents)
    before = one.learner.latents.clone()
    update(one, made_batch())
    assert torch.equal(one.learner.latents, before)


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"latent_dim": 0}, {"rate": 0.0}, {"encoder_rate": 0.0}, {"gamma": 1.1}, {"reward_scale": 0.0}, {"tau": 0.0},
     {"soft_min": 1.1}, {"candidates": 0}, {"perturbation": -0.1}, {"vae_latent": 0}, {"vae_clip": 0.0},
     {"kl_weight": -1.0}, {"meta_batch": 1}, {"rl_batch": 0}, {"context_batch": 0}, {"encoder_by_vae": "yes"}],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(UserError, match=key):
        make(**values)


# --- golden numbers ----------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. The tolerance covers other CPUs' kernels.
GOLDEN: dict[str, dict[str, float]] = {
    "default": {
        "vae_loss": 0.4355882,
        "q_loss": 2.271373,
        "z_rms": 0.09390011,
        "q_mean": 0.1497262,
        "gradient_encoder": 0.08568276,
        "gradient_decode": 0.7512349,
        "gradient_q": 0.5536801,
        "gradient_shift": 0.00143911,
        "action_0": 0.2039066,
        "action_1": 0.05679981,
    },
    "bellman": {
        "vae_loss": 0.4356948,
        "q_loss": 2.271311,
        "z_rms": 0.09482158,
        "q_mean": 0.1497743,
        "gradient_encoder": 0.04226668,
        "gradient_decode": 0.7514708,
        "gradient_q": 0.5535509,
        "gradient_shift": 0.001479765,
        "action_0": 0.204521,
        "action_1": 0.05683011,
    },
}


@pytest.mark.parametrize("arm", ["default", "bellman"])
def test_golden_numbers(arm):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        algorithm = spread(make(encoder_by_vae=arm == "default"))
        for i in range(3):
            scalars = update(algorithm, made_batch(i))
        batch = made_batch(9)
        action = algorithm.actions(batch["transitions"].observation, algorithm.infer(batch["context"]))[0, 0]
    finally:
        torch.set_num_threads(threads)
    got, learner = {name: float(value) for name, value in scalars.items()}, algorithm.learner
    for name, module in (("encoder", algorithm.encoder), ("decode", learner.decode), ("q", learner.q),
                         ("shift", learner.shift)):  # fmt: skip
        got[f"gradient_{name}"] = float(torch.stack([p.grad.norm() for p in module.parameters()]).norm())
    got |= {"action_0": float(action[0]), "action_1": float(action[1])}
    text = json.dumps({name: float(f"{value:.7g}") for name, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(arm, {}), rel=2e-4, abs=1e-7), f"if this change is meant: {text}"
