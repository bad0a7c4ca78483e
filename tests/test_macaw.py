"""MACAW and its baselines: the closed form against materialized copies, sizes, columns, losses, two goals."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omrl.algorithms.base import Algorithm, Spec, create
from omrl.algorithms.macaw import Macaw, advantage_weights, episode_columns
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.nets.experience import Experience

SMALL = {"width": 8, "depth": 2, "latent_dim": 4, "meta_batch": 3}
INNER = {"inner_batch": 12, "outer_batch": 10}
OWN: dict[str, dict[str, Any]] = {
    "macaw": {**SMALL, **INNER, "head_width": 5},
    "meta-bc": {**SMALL, **INNER},
    "mt-ft": {**SMALL, "batch": 10, "tune_steps": 2},
}
SPEC = Spec(3, 2, False, 5, 4)


def make(name: str = "macaw", spec: Spec = SPEC, seed: int = 0, **values: Any) -> Any:
    return create(name, OWN[name] | values, spec, seed, "cpu")


def batch(seed: int = 1, n: int = 12, tasks: int = 3, spec: Spec = SPEC) -> Experience:
    g = torch.Generator().manual_seed(seed)

    def normal(*width: int) -> torch.Tensor:
        return torch.randn(tasks, n, *width, generator=g)

    state, reward, zero = normal(spec.observation), normal(), torch.zeros(tasks, n)
    extra = {
        "return_to_go": 3 * normal(1), "discount_to_end": torch.rand(tasks, n, 1, generator=g),
        "last_observation": normal(spec.observation),
    }  # fmt: skip
    places = torch.arange(tasks)
    return Experience(
        state, torch.tanh(normal(spec.action)), reward, state + 0.1, zero, reward, places, None, None, extra
    )


def both(seed: int = 1) -> dict[str, Experience]:
    return {"inner": batch(seed), "outer": batch(seed + 100, 10), "transitions": batch(seed, 10)}


def ordered(tasks: int = 2, episodes: tuple[int, ...] = (3, 2, 4), width: int = 2, seed: int = 0) -> TaskData:
    rng, rows = np.random.default_rng(seed), sum(episodes)
    first = np.repeat(np.cumsum([0, *episodes[:-1]]), episodes)
    start = np.broadcast_to(first, (tasks, rows)).astype(np.int64)
    end = start + np.repeat(episodes, episodes)

    def column(*more: int) -> np.ndarray:
        return rng.normal(size=(tasks, rows, *more)).astype(np.float32)

    return TaskData(
        tuple(range(tasks)), column(width), np.tanh(column(2)), column(), column(), column(width),
        np.zeros((tasks, rows), np.float32), np.zeros((tasks, rows), np.int32),
        (np.arange(rows) - start).astype(np.int32), start, end,
    )  # fmt: skip


def reference(algorithm: Macaw) -> Any:
    """The benchmark's other side: every task with materialized copies of every tensor."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "macaw.py"
    spec = importlib.util.spec_from_file_location("benchmark_macaw", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module, module.Reference(algorithm)


# --- the closed form ---------------------------------------------------------------------------------------------

ARMS: dict[str, dict[str, Any]] = {
    "published": {},
    "several steps": {"steps": 3},
    "no advantage regression": {"coefficient": 0.0},
    "bias transforms": {"layers": "bias"},
    "bias transforms, several steps": {"layers": "bias", "steps": 2},
    "ordinary layers": {"layers": "none", "steps": 2},
}


@pytest.mark.parametrize("arm", ARMS)
def test_losses_gradients_and_adapted_weights_are_those_of_materialized_copies(arm, double_precision):
    fast = {"inner_value_rate": 0.05, "inner_policy_rate": 0.03, "coefficient": 0.5}
    algorithm, drawn = make(**(fast | ARMS[arm])), both()
    module, other = reference(algorithm)
    losses = other.losses(drawn)
    sum(losses).backward()
    value_loss, policy_loss = (loss.item() for loss in losses)
    belief = algorithm.adapt(algorithm.prior(3), drawn["inner"])["policy"]
    inner = [other.adapted(module.parts(drawn["inner"], task, algorithm.settings.steps)) for task in range(3)]
    scalars = algorithm.update(algorithm.phases(1)[0], drawn)  # leaves its gradients behind
    assert float(scalars["value_loss"]) == pytest.approx(value_loss, rel=1e-10)
    assert float(scalars["policy_loss"]) == pytest.approx(policy_loss, rel=1e-10)

    def agree(one: torch.Tensor | None, two: torch.Tensor | None) -> None:
        assert one is not None
        assert two is not None
        assert float(two.abs().max()) > 0
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)

    for net, tensors, rho in (
        (algorithm.value, other.value, other.value_rho),
        (algorithm.policy, other.policy, other.policy_rho),
    ):
        for layer, copies, rates in zip(net.layers, tensors, rho, strict=True):
            for name in layer.tensors:
                agree(getattr(layer, name).grad, copies[name].grad)
            if rates.grad is None:  # a head's own step has no later loss
                assert layer.rates.grad is None
                assert algorithm.settings.steps == 1
            else:
                agree(layer.rates.grad, rates.grad)
    if algorithm.coefficient is not None:
        agree(algorithm.coefficient.kappa.grad, other.kappa.grad)
    state = torch.randn(1, 3, generator=torch.Generator().manual_seed(5))
    for task, (_, _, policy) in enumerate(inner):  # and what the adapted policy does
        mean = state
        for i in range(3):
            mean = other.linear(policy[i], other.shapes["policy"][i], mean.relu() if i else mean)
        acted = algorithm.act({"policy": belief[task : task + 1]}, state)
        torch.testing.assert_close(acted, torch.tanh(mean.detach()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arm", ["published", "several steps", "bias transforms, several steps", "ordinary layers"])
def test_adapted_tensors_written_out_are_the_materialized_ones(arm, double_precision):
    algorithm = make(inner_value_rate=0.05, inner_policy_rate=0.03, **ARMS[arm])
    module, other = reference(algorithm)
    context = batch(tasks=1)
    value, _, policy = other.adapted(module.parts(context, 0, algorithm.settings.steps))
    believed = algorithm.adapt(algorithm.prior(1), context)["policy"]
    algorithm.settle(context)
    for net, tensors in ((algorithm.value, value), (algorithm.policy, policy)):
        for layer, copies in zip(net.layers, tensors, strict=True):
            for name in layer.tensors:
                torch.testing.assert_close(getattr(layer, name).detach(), copies[name].detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(algorithm.prior(1)["policy"], believed, rtol=1e-9, atol=1e-12)


def test_a_task_of_the_batch_is_adapted_as_if_alone():
    algorithm, context = make(), batch()
    whole = algorithm.adapt(algorithm.prior(3), context)["policy"]
    for task in range(3):
        alone = algorithm.adapt(algorithm.prior(1), context.of(torch.tensor([task])))["policy"]
        torch.testing.assert_close(alone[0], whole[task], rtol=1e-5, atol=1e-7)
    assert not torch.equal(whole[0], whole[1])


# --- sizes and start values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation", "action", "policy", "headless", "value"),
    [(20, 6, 2_663_263, 2_313_906, 2_262_901), (27, 8, 2_760_829, 2_405_008, 2_333_601),
     (17, 6, 2_632_963, 2_283_606, 2_232_601)],
    ids=["cheetah", "ant", "walker"],
)  # fmt: skip
def test_published_parameter_counts(observation, action, policy, headless, value):
    spec = Spec(observation, action, False)

    def count(network: Any) -> int:
        return sum(tensor.numel() for tensor in network.weights())

    algorithm = create("macaw", {}, spec, 0, "cpu")
    assert isinstance(algorithm, Macaw)
    assert count(algorithm.policy) == policy
    assert count(algorithm.value) == value
    assert sum(len(layer.tensors) for layer in algorithm.policy.layers) == 18
    assert sum(len(layer.tensors) for layer in algorithm.value.layers) == 12
    assert count(create("macaw", {"coefficient": 0}, spec, 0, "cpu").policy) == headless  # type: ignore[attr-defined]


def test_start_values():
    algorithm = create("macaw", {}, Spec(20, 6, False), 0, "cpu")
    assert isinstance(algorithm, Macaw)
    hidden, out = algorithm.policy.layers[1], algorithm.policy.layers[3]
    assert float(hidden.rate("hyper")) == pytest.approx(0.0009995003, rel=1e-5)
    assert algorithm.coefficient is not None
    assert float(algorithm.coefficient()) == pytest.approx(0.0099503309, rel=1e-5)
    assert float(hidden.latent.std()) == pytest.approx(0.01, rel=0.3)
    assert float(out.latent.std()) == pytest.approx(1 / 6, rel=0.3)
    for tensor in (hidden.hyper, hidden.base):
        assert 0.0995 < float(tensor.abs().max()) <= 0.1
    bias = create("macaw", {"layers": "bias"}, Spec(20, 6, False), 0, "cpu")
    assert isinstance(bias, Macaw)
    assert [sum(len(x.tensors) for x in net.layers) for net in (bias.value, bias.policy)] == [16, 24]
    for start in (0.01, 1000.0):
        fixed = make(learn_coefficient=False, coefficient=start)
        assert float(fixed.coefficient()) == pytest.approx(start, rel=1e-5)


def test_log_likelihood_of_one_dimension():
    found = make().log_likelihood(torch.tensor([[[0.3]]]), torch.tensor([[[0.1]]]))
    assert float(found) == pytest.approx(-12.5 * 0.2**2 + 0.69050, abs=1e-5)


# --- columns and weights -----------------------------------------------------------------------------------------


def test_columns_of_a_hand_made_episode():
    data = ordered(1, (3, 2))
    found, r = episode_columns(data, 0.5), data.reward[0]
    expected = [r[0] + r[1] / 2 + r[2] / 4, r[1] + r[2] / 2, r[2], r[3] + r[4] / 2, r[4]]
    np.testing.assert_allclose(found["return_to_go"][0], expected, rtol=1e-6)
    np.testing.assert_array_equal(found["discount_to_end"][0], [1 / 8, 1 / 4, 1 / 2, 1 / 4, 1 / 2])
    np.testing.assert_array_equal(found["last_observation"][0], data.next_observation[0, [2, 2, 2, 4, 4]])


@pytest.mark.parametrize("name", ["macaw", "mt-ft"])
def test_scaled_rewards_are_other_units_of_the_return(name):
    data = ordered()
    plain, scaled = (make(name, gamma=0.5, reward_scale=scale).columns(data) for scale in (1.0, 0.25))
    np.testing.assert_allclose(scaled["return_to_go"], plain["return_to_go"] / 4, rtol=1e-6)
    for same in ("discount_to_end", "last_observation"):
        np.testing.assert_array_equal(scaled[same], plain[same])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 1))
def test_returns_satisfy_their_recursion(lengths, gamma):
    data = ordered(2, tuple(lengths), seed=len(lengths))
    found = episode_columns(data, gamma)
    g = found["return_to_go"].astype(np.float64)
    for row in range(data.rows):
        after = g[:, row + 1] if data.end[0, row] > row + 1 else 0.0
        np.testing.assert_allclose(g[:, row], data.reward[:, row] + gamma * after, atol=1e-5)


def test_advantage_weights_are_normalized_and_clipped_above():
    advantage = torch.tensor([[0.0, 0.0, 0.0, 0.0, 10.0, -1.0] + [0.0] * 30], dtype=torch.float64)
    weight = advantage_weights(advantage, 1.0, 20.0)[0]
    assert float(weight[4]) == pytest.approx(20.0)
    exponent = (-1.0 - float(advantage.mean())) / float(advantage.std())
    assert float(weight[5]) == pytest.approx(math.exp(exponent))
    moved = advantage_weights(7 * advantage + 3, 1.0, 20.0)[0]
    torch.testing.assert_close(moved, weight)


@pytest.mark.parametrize("value", [0.0, 5.0, -1234.567])
def test_equal_advantages_weigh_the_same(value):
    weight = advantage_weights(torch.full((2, 256), value), 1.0, 20.0)
    torch.testing.assert_close(weight, torch.ones(2, 256), rtol=0.02, atol=0)


def test_without_bootstrapping_the_last_state_does_not_count():
    drawn = both()
    moved = {
        name: Experience(**{**vars(x), "extra": {**x.extra, "last_observation": x.extra["last_observation"] + 9}})
        for name, x in drawn.items()
    }
    for bootstrap, counts in ((True, True), (False, False)):
        one, two = make(bootstrap=bootstrap), make(bootstrap=bootstrap)
        phase = one.phases(1)[0]
        first, second = one.update(phase, drawn), two.update(phase, moved)
        assert (float(first["value_loss"]) != float(second["value_loss"])) == counts


# --- what trains what --------------------------------------------------------------------------------------------


def changed(algorithm: Algorithm, drawn: Mapping[str, Experience]) -> set[str]:
    before = algorithm.model_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    algorithm.update(algorithm.phases(1)[0], drawn)
    return {name for name, tensor in algorithm.model_state().items() if not torch.equal(tensor, before[name])}


def test_every_tensor_learns_and_what_is_fixed_does_not():
    head = {"policy.layers.3.rates", "policy.layers.4.rates"}  # no loss comes after the head's one step
    assert changed(make(), both()) == set(make().model_state()) - head
    assert changed(make(steps=2), both()) == set(make().model_state())
    fixed = changed(make(learn_rates=False, learn_coefficient=False), both())
    assert not {name for name in fixed if "rates" in name or "kappa" in name}
    assert "coefficient.kappa" not in make(coefficient=0.0).model_state()


def test_imitation_reads_no_reward():
    drawn = both()
    blind = {
        name: Experience(**{**vars(x), "reward": x.reward * torch.nan, "signal": x.signal * torch.nan, "extra": {}})
        for name, x in drawn.items()
    }
    one, two = make("meta-bc"), make("meta-bc")
    phase = one.phases(1)[0]
    for _ in range(2):
        first, second = one.update(phase, drawn), two.update(phase, blind)
    assert torch.equal(first["policy_loss"], second["policy_loss"])
    assert set(one.modules()) == {"policy"}


def test_multi_task_regression_sees_the_code_in_training_and_zeros_in_tests():
    algorithm, drawn = make("mt-ft"), batch(n=10)
    coded = algorithm.rows(drawn, drawn.task)
    torch.testing.assert_close(coded.state[1, 0], torch.cat([drawn.observation[1, 0], torch.tensor([0.0, 1, 0, 0])]))
    assert not algorithm.rows(drawn).state[..., 3:].any()
    before = algorithm.model_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    belief = algorithm.adapt(algorithm.prior(3), drawn)["policy"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in algorithm.model_state().items())
    alone = algorithm.adapt(algorithm.prior(1), drawn.of(torch.tensor([2])))["policy"]
    torch.testing.assert_close(alone[0], belief[2])
    assert not torch.equal(belief[0], belief[1])


def test_advantages_of_multi_task_regression_use_the_value_before_its_step():
    drawn = {"transitions": batch(n=10)}
    slow, quick = make("mt-ft", value_rate=1e-6), make("mt-ft", value_rate=1e-1)
    for algorithm in (slow, quick):
        algorithm.update(algorithm.phases(1)[0], drawn)
    for one, two in zip(slow.policy.weights(), quick.policy.weights(), strict=True):
        assert torch.equal(one, two)
    targets = [make("mt-ft", bootstrap=b).update(slow.phases(1)[0], drawn)["value_loss"] for b in (False, True)]
    assert not torch.equal(*targets)


# --- configuration and acting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_exploring_draws_from_the_given_stream(name):
    algorithm, observation = make(name), batch().observation[:, 0]
    belief = algorithm.adapt(algorithm.prior(3), batch())
    tried = [algorithm.act(belief, observation, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(tried[0], tried[1])
    assert not torch.equal(tried[0], tried[2])


@pytest.mark.parametrize(
    "values",
    [{"width": 0}, {"steps": 5}, {"layers": "film"}, {"gamma": 1.5}, {"coefficient": -1.0}, {"inner_batch": 1},
     {"temperature": 0.0}, {"policy_rates": 1e-3}],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(UserError, match=key):
        make(**values)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.filterwarnings("ignore:std")
def test_the_least_context_is_the_fewest_rows_that_adapt(name):
    algorithm = make(name, **({} if name == "mt-ft" else {"steps": 3}))
    least = algorithm.least_context(algorithm.config)
    assert bool(algorithm.adapt(algorithm.prior(3), batch(n=least))["policy"].isfinite().all())
    if name == "mt-ft":  # one row has no standard deviation
        assert not algorithm.adapt(algorithm.prior(3), batch(n=least - 1))["policy"].isfinite().all()
        return
    with pytest.raises(ValueError, match="5 rows for 3 inner steps"):
        algorithm.adapt(algorithm.prior(3), batch(n=least - 1))


def test_rows_without_the_columns_are_refused():
    bare = Experience(**{**vars(batch()), "extra": {}})
    with pytest.raises(ValueError, match="return_to_go"):
        make().adapt(make().prior(3), bare)


# --- golden numbers ----------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. In double precision, so that they hold on every CPU.
GOLDEN: dict[str, dict[str, float]] = {
    "macaw": {
        "value_loss": 4.6030454,
        "policy_loss": 10.990354,
        "return_to_go": 0.61363983,
        "advantage": 2.0927596,
        "value_step": 0.0010008494,
        "policy_step": 0.0010005263,
        "coefficient": 0.0099632596,
        "action_0": 0.51799364,
        "action_1": -0.027303959,
    },
    "meta-bc": {
        "policy_loss": 9.9626585,
        "policy_step": 0.00099933966,
        "action_0": -0.16400355,
        "action_1": -0.17769685,
    },
    "mt-ft": {
        "value_loss": 9.4360414,
        "policy_loss": 12.007871,
        "return_to_go": 0.47108778,
        "advantage": 2.8666775,
        "action_0": 0.16366452,
        "action_1": 0.51130482,
    },
}


@pytest.mark.parametrize("name", OWN)
def test_golden_numbers(name, double_precision):
    algorithm = make(name)
    phase = algorithm.phases(3)[0]
    for i in range(3):
        scalars = algorithm.update(phase, both(i))
    action = algorithm.act(algorithm.adapt(algorithm.prior(3), batch(9)), batch(9).observation[:, 0])
    got = {key: float(value) for key, value in scalars.items()}
    got |= {"action_0": float(action[0, 0]), "action_1": float(action[2, 1])}
    text = json.dumps({key: float(f"{value:.8g}") for key, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(name, {}), rel=1e-6, abs=1e-12), f"if this change is meant: {text}"
