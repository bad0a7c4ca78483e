"""UNICORN: the losses in double precision, whose gradient is whose, FOCAL where reconstruction is off, goldens."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update

from omrl.algorithms.base import Spec, create
from omrl.algorithms.focal import distance_metric_loss
from omrl.algorithms.unicorn import Unicorn
from omrl.core.errors import UserError
from omrl.nets.experience import Experience
from omrl.nets.mlp import Mlp

SMALL = {
    "latent_dim": 3, "encoder_width": 16, "encoder_depth": 2, "width": 16, "depth": 2, "decoder_width": 16,
    "decoder_depth": 2, "meta_batch": 4, "rl_batch": 8, "context_batch": 12,
}  # fmt: skip
OF_THE_DECODER = ("decoder_width", "decoder_depth")
REGULARIZED = {"regularization": {"kind": "kl-dual", "policy": True, "value_penalty": True, "alpha": 2.0}}


def make(with_next: bool = False, seed: int = 0, **values: Any) -> Unicorn:
    algorithm = create("unicorn", SMALL | values, Spec(2, 2, with_next), seed, "cpu")
    assert isinstance(algorithm, Unicorn)
    return algorithm


def made_batch(seed: int = 1, with_next: bool = False, dense: float = 1.0) -> dict[str, Experience]:
    g = torch.Generator().manual_seed(seed)

    def moves() -> Experience:
        s, a = torch.randn(4, 8, 2, generator=g), torch.rand(4, 8, 2, generator=g) * 2 - 1
        return moves_of(s, a, torch.randn(4, 8, generator=g) * dense, s + 0.1 * a, torch.zeros(4, 8))

    s, a = torch.randn(4, 12, 2, generator=g), torch.rand(4, 12, 2, generator=g) * 2 - 1
    context = bag_of(s, a, torch.randn(4, 12, generator=g), s + 0.1 * a if with_next else None)
    return meta_batch(torch.tensor([0, 1, 1, 2]), context, moves(), moves)


def double(net: Mlp, x: np.ndarray) -> np.ndarray:
    """The network in double precision."""
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        x = (np.maximum(x, 0) if place else x) @ weight[0].detach().double().numpy() + bias[0].detach().double().numpy()
    return x


def state(algorithm: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in algorithm.training_state().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- the losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_next", [False, True])
def test_the_first_updates_losses_in_double_precision(with_next):
    algorithm, batch = make(with_next, metric_weight=0.15), made_batch(with_next=with_next)
    with torch.no_grad():  # away from the start, where everything is all but zero
        algorithm.encoder.net.weights[-1].mul_(500)
        algorithm.decoder.weights[-1].mul_(500)
    context = batch["context"]
    z = np.tanh(double(algorithm.encoder.net, algorithm.rows(context).double().numpy())).mean(1)
    together, apart, errors = [], [], []
    for i in range(4):
        inputs = np.concatenate([context.observation[i].numpy(), context.action[i].numpy(), np.tile(z[i], (12, 1))], 1)
        wanted = context.signal[i].numpy()[:, None]
        if with_next:
            wanted = np.concatenate([wanted, context.next_observation[i].numpy()], axis=1)
        errors.append((double(algorithm.decoder, inputs) - wanted) ** 2)
        for j in range(i + 1, 4):
            distance = ((z[i] - z[j]) ** 2).mean()
            alike = batch["context"].task[i] == batch["context"].task[j]
            (together if alike else apart).append(np.sqrt(distance + 1e-3) if alike else 1 / (distance + 0.1))
    metric = sum(together) / (len(together) + 1e-3) + sum(apart) / (len(apart) + 1e-3)
    scalars = update(algorithm, batch)
    assert float(scalars["reconstruction_loss"]) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(scalars["metric_loss"]) == pytest.approx(0.15 * metric, rel=1e-5)


@pytest.mark.parametrize(("beta", "weight"), [(0.15, 1.0), (0.0, 1.0), (1.5, 3.0)])
def test_encoder_and_decoder_descend_the_weighted_sum(beta, weight):
    algorithm, batch = make(metric_weight=beta, reconstruction_weight=weight), made_batch()
    before = copy.deepcopy(algorithm)
    z = before.encoder(algorithm.rows(batch["context"]))
    metric, reconstruction = (
        distance_metric_loss(z, batch["context"].task),
        before.reconstruction_loss(batch["context"], z),
    )
    theirs = list(before.encoder.parameters())
    expected = [torch.zeros_like(p) for p in theirs]
    for factor, loss in ((beta, metric), (weight, reconstruction)):
        for total, gradient in zip(expected, torch.autograd.grad(loss, theirs, retain_graph=True), strict=True):
            total += factor * gradient
    of_decoder = torch.autograd.grad(weight * reconstruction, list(before.decoder.parameters()))
    scalars = update(algorithm, batch)
    assert ("metric_loss" in scalars) == (beta > 0)
    for net, gradients in ((algorithm.encoder, expected), (algorithm.decoder, of_decoder)):
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-8)


def test_the_decoder_learns_dynamics_that_the_context_shows():
    """Tasks push along one axis: s' = s + 0.3 a + w. Reconstruction alone finds w, and z holds it."""
    algorithm = make(True, metric_weight=0, encoder_rate=3e-3, decoder_rate=3e-3, encoder_width=32, decoder_width=32)
    winds = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    def draw(seed: int) -> dict[str, Experience]:
        g = torch.Generator().manual_seed(seed)
        tasks = torch.randint(3, (4,), generator=g)
        s, a = torch.rand(4, 16, 2, generator=g) - 0.5, torch.rand(4, 16, 2, generator=g) * 2 - 1
        following = s + 0.3 * a + winds[tasks].unsqueeze(1)
        moves = moves_of(s, a, torch.zeros(4, 16), following, torch.ones(4, 16))
        return meta_batch(tasks, bag_of(s, a, torch.zeros(4, 16), following), moves, lambda: moves)

    first = float(update(algorithm, draw(0))["reconstruction_loss"])
    for step in range(1, 250):
        update(algorithm, draw(step))
    batch = draw(10**6)
    z = algorithm.infer(batch["context"])
    own, other = (algorithm.reconstruction_loss(batch["context"], code).item() for code in (z, z.roll(1, 0)))
    assert own < 0.02 * first
    assert other > 10 * own  # another task's embedding predicts another task's wind


def test_coupled_adds_the_bellman_gradient_for_the_encoder_alone():
    apart, one, two = make(), make(coupled=True), make(coupled=True)
    for algorithm, dense in ((apart, 1.0), (one, 1.0), (two, -3.0)):
        update(algorithm, made_batch(dense=dense))
    of_encoder, of_decoder = ([[p.grad for p in getattr(a, part).parameters()] for a in (apart, one, two)]
                              for part in ("encoder", "decoder"))  # fmt: skip
    for i, j in ((0, 1), (1, 2)):
        assert not all(torch.equal(x, y) for x, y in zip(of_encoder[i], of_encoder[j], strict=True))
        for x, y in zip(of_decoder[i], of_decoder[j], strict=True):
            torch.testing.assert_close(x, y)
    start = make(coupled=True)
    assert not torch.equal(one.decoder.weights[0], start.decoder.weights[0])  # it takes its own step


def both(batch: dict[str, Experience]) -> dict[str, Experience]:
    """The batch with a signal in the rows to learn from, too: they may be the context."""
    moves = batch["transitions"]
    return {**batch, "transitions": replace(moves, signal=moves.reward)}


# --- switched off ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{}, REGULARIZED, {"encoder": "probabilistic"}, {"coupled": True}, {"context_is_rl_batch": True}], ids=str
)
def test_without_reconstruction_every_arm_is_focals(values):
    shared = {k: v for k, v in SMALL.items() if k not in OF_THE_DECODER} | {"metric_weight": 0.7} | values
    focal = create("focal", shared, Spec(2, 2, True), 3, "cpu")
    unicorn = create("unicorn", shared | {"reconstruction_weight": 0}, Spec(2, 2, True), 3, "cpu")
    assert unicorn.phases(1) == focal.phases(1)
    for i in range(3):
        one, two = (update(algorithm, both(made_batch(i, True))) for algorithm in (focal, unicorn))
        assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in two.items()}
    assert same(state(focal), state(unicorn))


def test_without_reconstruction_there_is_no_decoder():
    algorithm = make(reconstruction_weight=0)
    assert set(algorithm.modules()) == {"encoder", "actor_critic"}
    assert not any("decoder" in name for name in algorithm.training_state())
    with pytest.raises(ValueError, match="no decoder"):
        algorithm.reconstruction_loss(made_batch()["context"], torch.zeros(4, 3))


def test_the_decoder_changes_no_other_initial_weight_and_draws_nothing():
    on, off = make(), make(reconstruction_weight=0)
    before = state(off)
    assert all(torch.equal(value, before[name]) for name, value in state(on).items() if name in before)
    update(on, made_batch())
    update(off, made_batch())
    streams = [algorithm.generators()["noise"].get_state() for algorithm in (on, off)]
    assert torch.equal(*streams)


def test_nothing_to_train_the_encoder_is_refused():
    with pytest.raises(UserError, match="metric_weight = 0 with reconstruction_weight = 0"):
        make(metric_weight=0, reconstruction_weight=0)
    update(make(metric_weight=0, reconstruction_weight=0, coupled=True), made_batch())


@pytest.mark.parametrize("with_next", [False, True])
def test_next_observations_are_reconstructed_where_the_context_holds_them(with_next):
    algorithm = make(with_next)
    assert algorithm.decoder.weights[0].shape[1] == 2 + 2 + 3  # s, a, z and never r or s'
    assert algorithm.decoder.weights[-1].shape[2] == (3 if with_next else 1)


# --- golden numbers ----------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. The tolerance covers other CPUs' kernels.
GOLDEN: dict[str, dict[str, float]] = {
    "default": {
        "metric_loss": 10.02958,
        "reconstruction_loss": 0.8034821,
        "z_rms": 0.002283867,
        "v_loss": 2.233124,
        "q_loss": 13310.79,
        "q_mean": -0.0003283967,
        "policy_loss": -1.477286,
        "entropy": 1.479172,
        "gradient_encoder": 0.002661624,
        "gradient_decoder": 0.1202279,
        "gradient_policy": 0.4445151,
        "action_0": 0.002331118,
        "action_1": 0.001944038,
    },
    "next": {
        "metric_loss": 10.02958,
        "reconstruction_loss": 0.9316205,
        "z_rms": 0.0008974965,
        "v_loss": 1.584541,
        "q_loss": 13310.85,
        "q_mean": 0.0005478938,
        "policy_loss": -1.224572,
        "entropy": 1.224115,
        "gradient_encoder": 0.00624229,
        "gradient_decoder": 0.3470306,
        "gradient_policy": 0.8610299,
        "action_0": -0.0003076192,
        "action_1": 0.001723316,
    },
    "regularized": {
        "metric_loss": 10.02958,
        "reconstruction_loss": 0.8034821,
        "z_rms": 0.002283867,
        "discriminator_loss": 0.05888643,
        "v_loss": 1.844581,
        "divergence": -0.05887382,
        "alpha": 1.78182,
        "q_loss": 13308.98,
        "q_mean": -0.0003261771,
        "policy_loss": -1.438614,
        "entropy": 1.335585,
        "gradient_encoder": 0.002661624,
        "gradient_decoder": 0.1202279,
        "gradient_policy": 0.4248962,
        "action_0": 0.002020561,
        "action_1": 0.0002362936,
    },
}


@pytest.mark.parametrize("arm", ["default", "next", "regularized"])
def test_golden_numbers(arm):
    with_next = arm == "next"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        algorithm = make(with_next, **(REGULARIZED if arm == "regularized" else {}))
        for i in range(3):
            scalars = update(algorithm, made_batch(i, with_next))
        batch = made_batch(9, with_next)
        action = algorithm.actions(batch["transitions"].observation, algorithm.infer(batch["context"]))[0, 0]
    finally:
        torch.set_num_threads(threads)
    got = {name: float(value) for name, value in scalars.items()}
    for name, module in (("encoder", algorithm.encoder), ("decoder", algorithm.decoder),
                         ("policy", algorithm.actor_critic.policy)):  # fmt: skip
        got[f"gradient_{name}"] = float(torch.stack([p.grad.norm() for p in module.parameters()]).norm())
    got |= {"action_0": float(action[0]), "action_1": float(action[1])}
    text = json.dumps({name: float(f"{value:.7g}") for name, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(arm, {}), rel=2e-4, abs=1e-7), f"if this change is meant: {text}"
