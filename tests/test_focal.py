"""FOCAL: the distance-metric loss by hand, who learns from what, that it learns, and golden numbers."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update
from hypothesis import given, settings
from hypothesis import strategies as st

from omrl.algorithms.base import Draw, Spec, create, load_model, save_model
from omrl.algorithms.focal import Focal, distance_metric_loss
from omrl.core.errors import UserError
from omrl.nets.encoders import gaussian_kl
from omrl.nets.experience import Experience

SIZES = Spec(2, 2, False)
BETA = {-2: 1.0, -1: 2.0, 1: 8.0, 2: 16.0}  # FOCAL Table 5(b)
SMALL = {
    "latent_dim": 3, "encoder_width": 16, "encoder_depth": 2, "width": 16, "depth": 2,
    "meta_batch": 4, "rl_batch": 8, "context_batch": 12,
}  # fmt: skip
BOTH_PENALTIES = {"regularization": {"kind": "kl-dual", "policy": True, "value_penalty": True, "alpha": 2.0}}


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def focal(seed: int = 0, spec: Spec = SIZES, **values: Any) -> Focal:
    return create("focal", SMALL | values, spec, seed, "cpu")


def made_batch(
    seed: int = 1, tasks: tuple[int, ...] = (0, 1, 1, 2), n: int = 8, context: int = 12
) -> dict[str, Experience]:
    g, m = source(seed), len(tasks)

    def transitions() -> Experience:
        return moves_of(
            torch.randn(m, n, 2, generator=g),
            torch.rand(m, n, 2, generator=g) * 2 - 1,
            torch.randn(m, n, generator=g),
            torch.randn(m, n, 2, generator=g),
            (torch.rand(m, n, generator=g) < 0.1).float(),
        )

    bag = bag_of(
        torch.randn(m, context, 2, generator=g),
        torch.rand(m, context, 2, generator=g) * 2 - 1,
        torch.randn(m, context, generator=g),
    )
    return meta_batch(torch.tensor(tasks), bag, transitions(), transitions)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- distance-metric loss --------------------------------------------------------------------------------------


def by_pairs(z: np.ndarray, tasks: list[int], power: int, form: str, beta: float, eps: float) -> float:
    """Eq. 13, and the released form, a pair at a time."""
    together, apart = [], []
    for i in range(len(z)):
        for j in range(len(z)):
            if i == j or (form == "released" and i > j):
                continue
            difference = z[i] - z[j]
            norm = math.sqrt(difference @ difference)
            distance = norm if form == "paper" else norm / math.sqrt(z.shape[1])
            if tasks[i] == tasks[j]:
                together.append(norm**2 if form == "paper" else math.sqrt(distance**2 + 1e-3))
            else:
                apart.append(beta / (distance**-power + eps) if power < 0 else -beta * distance**power)
    if form == "paper":
        return sum(together) + sum(apart)
    return sum(together) / (len(together) + 1e-3) + sum(apart) / (len(apart) + 1e-3)


TASK_LISTS = {
    "duplicates": [0, 1, 1, 2, 0, 1],
    "no pair of one task": [0, 1, 2, 3, 4, 5],
    "one task only": [3, 3, 3, 3, 3, 3],
    "two rows": [0, 0],
}


@pytest.mark.parametrize("tasks", TASK_LISTS.values(), ids=TASK_LISTS)
@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_metric_loss_is_the_sum_over_pairs(power, form, tasks):
    z = torch.rand(len(tasks), 5, generator=source(0), dtype=torch.float64) * 2 - 1
    own = distance_metric_loss(z, torch.tensor(tasks), power, form)
    assert float(own) == pytest.approx(by_pairs(z.numpy(), tasks, power, form, BETA[power], 0.1), rel=1e-8)
    other = distance_metric_loss(z, torch.tensor(tasks), power, form, 3.0, 0.7)
    assert float(other) == pytest.approx(by_pairs(z.numpy(), tasks, power, form, 3.0, 0.7), rel=1e-8)


def test_metric_loss_by_hand():
    """z = (0,0), (1,1) of one task and (1,-1) of another: squared distances 2 | 2, 4; per dimension 1 | 1, 2."""
    z, tasks = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.tensor([0, 0, 1])
    paper = {
        -2: 2 * (2 + 1 / 2.1 + 1 / 4.1),
        -1: 2 * (2 + 2 / (math.sqrt(2) + 0.1) + 2 / 2.1),
        1: 2 * (2 - 8 * math.sqrt(2) - 8 * 2),
        2: 2 * (2 - 16 * 2 - 16 * 4),
    }
    apart = {
        -2: 1 / 1.1 + 1 / 2.1,
        -1: 2 / 1.1 + 2 / (math.sqrt(2) + 0.1),
        1: -8 - 8 * math.sqrt(2),
        2: -16 - 32,
    }
    for power in BETA:
        assert float(distance_metric_loss(z, tasks, power, "paper")) == pytest.approx(paper[power], rel=1e-9)
        released = math.sqrt(1.001) / 1.001 + apart[power] / 2.001
        assert float(distance_metric_loss(z, tasks, power)) == pytest.approx(released, rel=1e-9)


@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_table_5b_makes_all_powers_equal_at_a_quarter(power):
    """At a mean squared difference of 1/4 every repulsive term is 4 in size (without eps)."""
    z = torch.tensor([[0.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    loss = distance_metric_loss(z, torch.tensor([0, 1]), power, "released", None, 1e-12)
    assert abs(float(loss)) == pytest.approx(4 / 1.001, rel=1e-8)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_metric_loss_draws_a_task_together_and_tasks_apart(power, form):
    z = torch.tensor([[0.0, 0.0], [0.4, 0.2]], requires_grad=True)
    for tasks, sign in (([0, 0], 1), ([0, 1], -1)):
        (slope,) = torch.autograd.grad(distance_metric_loss(z, torch.tensor(tasks), power, form), z)
        assert sign * float(slope[1] @ (z[1] - z[0]).detach()) > 0
        torch.testing.assert_close(slope[0], -slope[1])


@given(
    st.integers(2, 7), st.sampled_from([-2, -1, 1, 2]), st.sampled_from(["released", "paper"]),
    st.integers(0, 10**6), st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_symmetries_of_the_metric_loss(m, power, form, seed, random):
    """Order of the meta-batch, names of the tasks, signs and order of dimensions, and the origin do not matter."""
    z = torch.rand(m, 4, generator=source(seed), dtype=torch.float64) * 2 - 1
    tasks = torch.randint(3, (m,), generator=source(seed + 1))
    order = random.sample(range(m), m)
    flips = torch.tensor([random.choice([-1.0, 1.0]) for _ in range(4)], dtype=torch.float64)
    names = torch.tensor(random.sample(range(50), 3))
    loss = distance_metric_loss(z, tasks, power, form)
    for other in (
        distance_metric_loss(z[order], tasks[order], power, form),
        distance_metric_loss(z, names[tasks], power, form),
        distance_metric_loss(z * flips, tasks, power, form),
        distance_metric_loss(z[:, random.sample(range(4), 4)], tasks, power, form),
        distance_metric_loss(z + 0.3, tasks, power, form),
    ):
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_gradient_of_the_metric_loss(power, form):
    z = (torch.rand(5, 3, generator=source(0), dtype=torch.float64) * 2 - 1).requires_grad_(True)
    tasks = torch.tensor([0, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda x: distance_metric_loss(x, tasks, power, form), (z,))


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_equal_embeddings_have_a_finite_gradient(power, form):
    """Untrained encoders put all tasks at almost the same place; sqrt and norm have no derivative at 0."""
    z = torch.zeros(4, 3, requires_grad=True)
    distance_metric_loss(z, torch.tensor([0, 1, 1, 2]), power, form).backward()
    assert torch.isfinite(z.grad).all()


def test_embeddings_go_to_the_corners_of_the_cube():
    """What the loss is for: four tasks, two dimensions, each ends near a corner of its own."""
    start = torch.randn(4, 2, generator=source(0)) * 0.3
    raw = (start.repeat(2, 1) + 0.01 * torch.randn(8, 2, generator=source(1))).requires_grad_(True)
    tasks = torch.tensor([0, 1, 2, 3] * 2)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        distance_metric_loss(torch.tanh(raw), tasks).backward()
        optimizer.step()
    z = torch.tanh(raw).detach()
    assert float(z.abs().min()) > 0.9
    torch.testing.assert_close(z[:4], z[4:], atol=0.1, rtol=0)
    assert len({tuple(row) for row in z.sign().tolist()}) == 4


# --- who learns from what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"value_network": False}, BOTH_PENALTIES], ids=["plain", "no V", "penalties"])
def test_metric_loss_does_not_reach_actor_and_critic(values):
    ran = []
    for weight in (1.0, 100.0):
        algorithm = focal(metric_weight=weight, metric_power=-2 if weight == 1 else 2, **values)
        update(algorithm, made_batch())
        ran.append((weights(algorithm.actor_critic), weights(algorithm.encoder)))
    assert equal(ran[0][0], ran[1][0])
    assert not equal(ran[0][1], ran[1][1])


def with_rewards(batch: dict[str, Experience], factor: float) -> dict[str, Experience]:
    old = batch["transitions"]
    new = moves_of(old.observation, old.action, old.reward * factor, old.next_observation, old.terminal)
    return {**batch, "transitions": new}


@pytest.mark.parametrize("values", [{}, {"encoder": "probabilistic"}], ids=["deterministic", "probabilistic"])
@pytest.mark.parametrize("coupled", [False, True])
def test_bellman_gradients_reach_the_encoder_only_when_coupled(coupled, values):
    """The same context and different dense rewards: does the encoder take another step?"""
    ran = []
    for factor in (1.0, -3.0):
        algorithm = focal(coupled=coupled, **values)
        update(algorithm, with_rewards(made_batch(), factor))
        ran.append((weights(algorithm.encoder), weights(algorithm.actor_critic.q)))
    assert equal(ran[0][0], ran[1][0]) == (not coupled)
    assert not equal(ran[0][1], ran[1][1])


def test_encoder_sees_the_context_reward_and_nothing_else_does():
    ran = []
    for sparse in (0.0, 1.0):
        batch, algorithm = made_batch(), focal()
        bag = batch["context"]
        changed = bag_of(bag.observation, bag.action, bag.reward * sparse)
        z = algorithm.infer(changed)
        # the actor-critic alone, with the embedding held equal: its numbers are those of the dense rewards
        scalars = algorithm.actor_critic.update(batch["transitions"], torch.zeros(4, 3), [])
        ran.append((z, scalars["q_loss"]))
    assert not torch.equal(ran[0][0], ran[1][0])
    assert torch.equal(ran[0][1], ran[1][1])


def test_a_repeated_task_keeps_an_embedding_of_its_own():
    algorithm, batch = focal(), made_batch()
    z = algorithm.infer(batch["context"])
    assert not torch.equal(z[1], z[2])  # tasks 1 and 1, two contexts


# --- arms ------------------------------------------------------------------------------------------------------

ARMS = {
    "default": {},
    "paper": {"metric_form": "paper", "metric_weight": 1.0, "value_network": False},
    "coupled": {"coupled": True},
    "probabilistic": {"encoder": "probabilistic"},
    "probabilistic as released": {"encoder": "probabilistic", "probabilistic_metric": False},
    "batch PEARL": {"encoder": "probabilistic", "probabilistic_metric": False, "coupled": True, "prior_std": 1.0},
    "square": {"metric_power": 2},
    "regularized": BOTH_PENALTIES,
    "coupled, regularized, gradient penalty": {
        "coupled": True,
        "regularization": {
            "kind": "kl-dual",
            "policy": True,
            "alpha": 2.0,
            "value_penalty": True,
            "penalty": "gradient",
            "next_state": True,
        },
    },
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_repeats_itself_and_stays_finite(arm):
    def run() -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        algorithm = focal(**ARMS[arm])
        rows = [{k: float(v) for k, v in update(algorithm, made_batch(i)).items()} for i in range(3)]
        return rows, list(algorithm.model_state().values())

    one, two = run(), run()
    assert one[0] == two[0]
    assert equal(one[1], two[1])
    assert all(math.isfinite(value) for row in one[0] for value in row.values())
    assert all(torch.isfinite(value).all() for value in one[1])
    assert len({tuple(row) for row in one[0]}) == 1  # the same columns every step
    start = focal(**ARMS[arm])
    before, after = start.model_state(), dict(zip(start.model_state(), one[1], strict=True))
    for part in start.modules():
        assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part)), part


def test_scalars_tell_the_arm():
    batch = made_batch()
    assert "kl" not in update(focal(), batch)
    assert {"kl", "metric_loss"} <= set(update(focal(encoder="probabilistic"), batch))
    assert "metric_loss" not in update(focal(encoder="probabilistic", probabilistic_metric=False), batch)
    assert "divergence" in update(focal(**BOTH_PENALTIES), batch)


def test_metric_scalar_is_the_weighted_loss_of_the_batch():
    batch, algorithm = made_batch(), focal(metric_weight=7.0, metric_power=-1, metric_eps=0.3, metric_beta=2.5)
    z = algorithm.infer(batch["context"]).double().numpy()
    expected = 7 * by_pairs(z, batch["context"].task.tolist(), -1, "released", 2.5, 0.3)
    assert float(update(algorithm, batch)["metric_loss"]) == pytest.approx(expected, rel=1e-5)


def test_inference_of_the_probabilistic_encoder_is_its_mean():
    algorithm, batch = focal(encoder="probabilistic"), made_batch()
    assert torch.equal(algorithm.infer(batch["context"]), algorithm.infer(batch["context"]))
    assert torch.equal(
        algorithm.infer(batch["context"]), algorithm.encoder(algorithm.rows(batch["context"]))[0].detach()
    )


def test_batch_sizes_follow_the_configuration():
    (phase,) = focal().phases(7)
    assert (phase.steps, phase.meta_batch, phase.replace) == (7, 4, True)
    assert phase.draws == {"transitions": Draw(8), "context": Draw(12, source="context")}
    assert list(focal(context_is_rl_batch=True).phases(7)[0].draws) == ["transitions"]
    assert list(focal(**BOTH_PENALTIES).phases(7)[0].draws) == ["transitions", "context", "more0", "more1"]


# --- acting, saving, loading -----------------------------------------------------------------------------------


def test_actions_use_their_own_tasks_embedding():
    algorithm = focal()
    with torch.no_grad():
        algorithm.actor_critic.policy.trunk.weights[-1].mul_(500)
    seen, z = torch.randn(3, 4, 2, generator=source(0)), torch.randn(3, 3, generator=source(1))
    actions = algorithm.actions(seen, z)
    assert actions.shape == (3, 4, 2)
    assert float(actions.abs().max()) <= 1
    for task in range(3):
        alone = algorithm.actions(seen[task : task + 1], z[task : task + 1])
        torch.testing.assert_close(alone[0], actions[task])
        mean, _ = algorithm.actor_critic.policy(torch.cat([seen[task], z[task].expand(4, 3)], 1))
        torch.testing.assert_close(torch.tanh(mean).detach(), actions[task])
    assert not actions.requires_grad


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        algorithm = focal()
        update(algorithm, made_batch())
        save_model(algorithm, tmp_path / folder, "focal", "focal")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"not tensors at all"),
    ],
)
def test_a_damaged_model_is_named(tmp_path, file, damage):
    save_model(focal(), tmp_path, "focal", "focal")
    (tmp_path / file).unlink() if damage is None else (tmp_path / file).write_bytes(damage)
    with pytest.raises(UserError, match=file):
        load_model(tmp_path, "cpu")


def test_a_model_of_another_configuration_is_named(tmp_path):
    save_model(focal(), tmp_path / "a", "focal", "focal")
    save_model(focal(latent_dim=4), tmp_path / "b", "focal", "focal")
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(tmp_path / "a", "cpu")


def test_seeds_matter_and_repeat():
    one, again, other = (list(focal(seed=s).model_state().values()) for s in (0, 0, 1))
    assert equal(one, again)
    assert not equal(one, other)


# --- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"latent_dim": 0}, {"encoder_width": 0}, {"encoder_rate": 0.0}, {"encoder": "gaussian"}, {"kl_weight": -1.0},
        {"prior_std": 0.0}, {"metric_power": 0}, {"metric_power": -3}, {"metric_form": "eq13"}, {"metric_beta": 0.0},
        {"metric_eps": 0.0}, {"metric_weight": -1.0}, {"meta_batch": 1}, {"rl_batch": 0}, {"context_batch": 0},
        {"coupled": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(UserError, match=key):
        focal(**values)


def test_an_unknown_key_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'latent_dim'"):
        focal(latent_dims=5)


def test_an_unknown_algorithm_gets_a_suggestion():
    with pytest.raises(UserError, match="focal"):
        create("focall", {}, SIZES, 0, "cpu")


def test_context_width_follows_the_sizes():
    assert Spec(2, 2, False).context == 5  # Sparse-Point-Robot
    assert Spec(2, 2, True).context == 7  # Point-Robot-Wind
    assert focal(spec=Spec(3, 1, True)).encoder.net.weights[0].shape[1] == 8


# --- it learns -------------------------------------------------------------------------------------------------


# --- golden numbers --------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. In double precision, so that they hold on every CPU.
GOLDEN: dict[str, dict[str, float]] = {
    "default": {
        "metric_loss": 100.2959,
        "z_rms": 0.001827472,
        "v_loss": 2.029692,
        "q_loss": 21461.88,
        "q_mean": -0.0003499285,
        "policy_loss": -1.396464,
        "entropy": 1.398997,
        "gradient_encoder": 0.009902715,
        "gradient_q": 47.67128,
        "gradient_policy": 0.248389,
        "action_0": -0.0009441257,
        "action_1": -0.003916728,
    },
    "regularized": {
        "metric_loss": 100.2959,
        "z_rms": 0.001827472,
        "discriminator_loss": 0.05950751,
        "v_loss": 1.830856,
        "divergence": -0.05947007,
        "alpha": 1.78067,
        "q_loss": 21456.88,
        "q_mean": -0.0003431132,
        "policy_loss": -1.428608,
        "entropy": 1.325206,
        "gradient_encoder": 0.009902715,
        "gradient_q": 47.36926,
        "gradient_policy": 0.1764675,
        "action_0": 0.0002634969,
        "action_1": -0.003431773,
    },
}


@pytest.mark.parametrize("arm", ["default", "regularized"])
def test_golden_numbers(arm, double_precision):
    algorithm = focal(**ARMS[arm])
    for i in range(3):
        scalars = update(algorithm, made_batch(i))
    batch = made_batch(9)
    action = algorithm.actions(batch["transitions"].observation, algorithm.infer(batch["context"]))[0, 0]
    got = {name: float(value) for name, value in scalars.items()}
    for name, module in (("encoder", algorithm.encoder), ("q", algorithm.actor_critic.q),
                         ("policy", algorithm.actor_critic.policy)):  # fmt: skip
        got[f"gradient_{name}"] = float(torch.stack([p.grad.norm() for p in module.parameters()]).norm())
    got |= {"action_0": float(action[0]), "action_1": float(action[1])}
    text = json.dumps({name: float(f"{value:.7g}") for name, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(arm, {}), rel=1e-6, abs=1e-12), f"if this change is meant: {text}"


def test_without_a_metric_loss_the_encoder_stays_as_it_was_and_the_policy_learns():
    algorithm = focal(metric_weight=0.0)
    before = copy.deepcopy({name: module.state_dict() for name, module in algorithm.modules().items()})
    assert "metric_loss" not in update(algorithm, made_batch())
    after = {name: module.state_dict() for name, module in algorithm.modules().items()}
    assert all(torch.equal(before["encoder"][key], value) for key, value in after["encoder"].items())
    assert any(not torch.equal(before["actor_critic"][key], value) for key, value in after["actor_critic"].items())


def test_the_probabilistic_encoders_prior_has_the_given_width():
    algorithm, batch = focal(encoder="probabilistic", prior_std=0.3), made_batch()
    mean, variance = algorithm.encoder(algorithm.rows(batch["context"]))
    expected = float(gaussian_kl(mean, variance, 0.3).detach())
    assert float(update(algorithm, batch)["kl"]) == pytest.approx(expected, rel=1e-5)


def test_actions_are_drawn_where_asked():
    algorithm, z, s = focal(), torch.zeros(1, 3), torch.zeros(1, 2)
    drawn = torch.cat([algorithm.act(z, s, torch.Generator().manual_seed(i)) for i in range(50)])
    assert float(drawn.std(0).min()) > 0.1
    assert torch.equal(algorithm.act(z, s), algorithm.act(z, s))
