"""The evaluation protocol, and diagnostics against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from omrl.algorithms.base import ContextAlgorithm, Phase, Spec
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.envs.base import load_family
from omrl.envs.simulate import Episodes
from omrl.evaluation.embeddings import (
    attention,
    context_shift,
    embedding_variance,
    esr,
    own_and_offline,
    rms,
    sample_embeddings,
    sparsity_curve,
)
from omrl.evaluation.protocols.base import Run, other_task, protocol
from omrl.evaluation.protocols.ood_checkpoint import other_tasks_context
from omrl.nets.experience import Experience

FAMILY = load_family("sparse-point-robot")
TASKS = [
    {
        "index": i,
        "split": "train" if i < 3 else "test",
        "parameters": FAMILY.sample(i, 1337),
        "oracle_return": FAMILY.oracle_return(FAMILY.sample(i, 1337)),
        "random_return": 0.0,
    }
    for i in range(5)
]


class GoalReader(ContextAlgorithm):
    """Reads the goal off the context and drives there: an oracle that can be checked to the last bit.

    The buffers below carry the goal in their observations, so the mean observation of a context is the goal.
    """

    CONFIG = Config

    def __init__(self) -> None:
        super().__init__(Config(), Spec(2, 2, False), 0, "cpu")
        self.sizes_seen: list[int] = []

    latent = 2

    def phases(self, steps: int) -> list[Phase]:
        return []

    def update(self, phase: Phase, batch: Any) -> dict[str, torch.Tensor]:
        return {}

    def infer(self, context: Experience) -> torch.Tensor:
        self.sizes_seen.append(context.observation.shape[1])
        assert float(context.signal.min()) == 7.0  # the sparse column, not the dense one
        return context.observation.mean(dim=1)

    def actions(self, observation: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return ((z[:, None] - observation) / 0.1).clamp(-1, 1)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}


def buffers(rows: int = 50) -> TaskData:
    goals = np.array([t["parameters"]["goal"] for t in TASKS], dtype=np.float32)
    observation = np.repeat(goals[:, None], rows, axis=1)
    flat = np.zeros((len(TASKS), rows), np.float32)
    return TaskData.of_bags(
        [t["index"] for t in TASKS], observation=observation, action=observation * 0, reward=flat - 5,
        sparse_reward=flat + 7, next_observation=observation, terminal=flat,
    )  # fmt: skip


def evaluate(algorithm: Any, name: str = "offline-context", quick: bool = False, **values: Any) -> tuple[Any, Any]:
    """Return the rows and the last episode of a protocol with ``values`` of its keys."""
    places = values.pop("places", range(5))
    features = values.pop("features", None)
    family = values.pop("family", FAMILY)
    config = protocol(name).CONFIG(**values)
    tasks = [TASKS[i] for i in places]
    run = Run(algorithm, family, buffers().of(places), tasks, config, ("test",), 0, features, quick)
    return run.rows, protocol(name).run(run)


def read_goals(**values: Any) -> tuple[list[dict[str, Any]], Episodes, GoalReader]:
    algorithm = GoalReader()
    rows, last = evaluate(algorithm, **values)
    return rows, last, algorithm


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda good: good.numpy(), r"GoalReader\.act returned ndarray: expected a tensor of shape \[5, 2\]"),
        (lambda good: good[:, :1], r"act returned a tensor of shape \[5, 1\]: expected a tensor of shape \[5, 2\]"),
        (lambda good: good * float("nan"), r"act returned a number that is not finite"),
    ],
)
def test_actions_that_are_none_are_refused(given, message):
    algorithm = GoalReader()
    act = algorithm.act
    algorithm.act = lambda *args: given(act(*args))
    with pytest.raises(UserError, match=message):
        evaluate(algorithm, episodes=2)


def test_actions_with_a_gradient_are_taken():
    algorithm = GoalReader()
    act = algorithm.act
    algorithm.act = lambda *args: act(*args).requires_grad_()
    found, expected = evaluate(algorithm, episodes=2)[0], read_goals(episodes=2)[0]
    assert [row["return"] for row in found] == [row["return"] for row in expected]


def test_context_grows_and_only_the_last_episode_of_a_repetition_counts():
    rows, _, algorithm = read_goals(episodes=4, context_per_episode=10, repetitions=2)
    assert algorithm.sizes_seen == [10, 20, 30, 40] * 2
    assert len(rows) == 5 * 4 * 2
    for row in rows:
        assert row["context_transitions"] == 10 * (row["episode"] + 1)
        assert row["counted"] == (row["episode"] == 3)
    assert {(r["task"], r["split"]) for r in rows} == {(t["index"], t["split"]) for t in TASKS}


def test_an_agent_that_knows_the_goal_has_the_oracles_return():
    rows, last, _ = read_goals(episodes=1, repetitions=1)
    for row, task in zip(rows, TASKS, strict=True):
        assert row["return"] == pytest.approx(task["oracle_return"], abs=1e-3)
        assert row["normalized"] == pytest.approx(1, abs=1e-3)
        assert row["return"] == row["sparse_return"] > 0 > row["dense_return"]
    np.testing.assert_allclose(last.path()[:, -1], [t["parameters"]["goal"] for t in TASKS], atol=1e-5)
    assert last.path().shape == (5, FAMILY.horizon + 1, 2)


def test_a_task_is_evaluated_the_same_whoever_else_is():
    alone, _ = evaluate(GoalReader(), episodes=2, repetitions=2, places=[4])
    assert all(math.isnan(row["wrong_context_return"]) for row in alone)  # there is no other task
    together = [row for row in read_goals(episodes=2, repetitions=2)[0] if row["task"] == 4]
    for row in [*together, *alone]:
        del row["wrong_context_return"]
    assert together == alone


def test_the_other_task_is_the_next_of_the_split():
    assert other_task(TASKS).tolist() == [1, 2, 0, 4, 3]


def test_repetitions_have_streams_of_their_own():
    run = Run(GoalReader(), FAMILY, buffers(), TASKS, None, ("test",), 0)
    first = [[rng.random() for rng in run.streams(repetition)] for repetition in (0, 1)]
    assert len({*first[0], *first[1]}) == 10


def test_a_carried_belief_sees_the_familys_reward():
    seen = []

    class Sees(GoalReader):
        def observe(self, belief: Any, step: Experience) -> Any:
            seen.append(step.signal[:, 0])
            return belief

    goals = torch.tensor([t["parameters"]["goal"] for t in TASKS], dtype=torch.float32)
    ran, _ = Run(Sees(), FAMILY, buffers(), TASKS, None, ("test",), 0).episode(goals, [np.random.default_rng(0)] * 5)
    np.testing.assert_array_equal(torch.stack(seen, 1), ran.sparse_reward)
    assert (ran.sparse_reward != ran.reward).any()


def test_another_tasks_context_leads_to_its_goal():
    rows, _, _ = read_goals(episodes=2, repetitions=1)
    goals = np.array([t["parameters"]["goal"] for t in TASKS])
    for row in rows:
        if row["counted"]:
            other = {0: 1, 1: 2, 2: 0, 3: 4, 4: 3}[row["task"]]
            far = np.linalg.norm(goals[row["task"]] - goals[other]) > 0.2
            assert far == (row["wrong_context_return"] < row["return"] - 1)
        else:
            assert math.isnan(row["wrong_context_return"])
    assert all(math.isnan(r["wrong_context_return"]) for r in read_goals(episodes=1, wrong_context=False)[0])


@pytest.mark.parametrize("env_config", [{}, {"start": "half-plane"}])
@pytest.mark.parametrize("name", ["offline-context", "online-prior"])
def test_a_quick_run_is_what_counts_in_the_table(name, env_config):
    values = {"episodes": 3, "repetitions": 2, "family": load_family("sparse-point-robot", env_config)}
    if name == "online-prior":
        values |= {"exploration_episodes": 2, "prior_context": 5}
    whole, _ = evaluate(Searcher(), name, **values)
    quick, _ = evaluate(Searcher(), name, quick=True, **values)
    columns = ("task", "repetition", "return", "dense_return", "context_transitions")
    found, wanted = (
        [[row[name] for name in columns] for row in rows if row["counted"]] for rows in (quick, whole)
    )  # random starts too
    assert found == wanted
    assert len(found) == 10
    if name == "offline-context":
        assert all(row["counted"] for row in quick)


def test_steps_after_a_termination_do_not_count():
    class Ends(type(FAMILY)):  # type: ignore[misc]
        def batch(self, tasks, copies=1):
            env, steps = super().batch(tasks, copies), itertools.count(1)
            original = env.step

            def step(actions):
                result = original(actions)
                result.terminated[0] = next(steps) >= 3
                return result

            env.step = step
            return env

    z = torch.tensor([t["parameters"]["goal"] for t in TASKS], dtype=torch.float32)
    found, whole = (
        Run(GoalReader(), family, buffers(), TASKS, None, ("test",), 0).episode(z, [np.random.default_rng(0)] * 5)[0]
        for family in (Ends(FAMILY.config), FAMILY)
    )
    assert found.returns(True)[0] == 0 < whole.returns(True)[0]
    assert found.valid[0].tolist() == [True] * 3 + [False] * 17
    assert (found.path()[0, 3:] == found.path()[0, 3]).all()
    np.testing.assert_array_equal(found.returns(True)[1:], whole.returns(True)[1:])


def test_embeddings_are_of_resampled_contexts():
    algorithm = GoalReader()
    found = sample_embeddings(algorithm, buffers(), TASKS, 6, 3, ("test",), 0)
    assert found.shape == (5, 3, 2)
    assert algorithm.sizes_seen == [6, 6, 6]
    np.testing.assert_allclose(found[:, 0], [t["parameters"]["goal"] for t in TASKS], atol=1e-6)


def test_the_other_form_of_the_sparse_reward_is_told_beside():
    rows, last, _ = read_goals(episodes=1, repetitions=1)
    other = FAMILY.restated()
    assert other is not None
    for place, (row, task) in enumerate(zip(rows, TASKS, strict=True)):
        # 1 - d summed over the steps inside R = 0.2; Eq. 35: (R - d) / R
        distance = np.linalg.norm(last.path()[place, 1:] - task["parameters"]["goal"], axis=1)
        inside = distance <= 0.2
        assert row["return"] == pytest.approx((1 - distance)[inside].sum(), abs=1e-4)
        assert row["restated_return"] == pytest.approx((1 - distance / 0.2)[inside].sum(), abs=1e-4)
    again = other.restated()
    assert again is not None
    assert again.config.resolved() == FAMILY.config.resolved()
    assert load_family("point-robot").restated() is None
    assert load_family("sparse-point-robot", {"sparse_reward": "eq35", "radius": 2.0}).restated() is None


class Searcher(GoalReader):
    """Goes to the best rewarded place of its context; the offline data, of reward 7, tell it a task's goal."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[Experience] = []
        self.acted: list[torch.Tensor] = []

    def infer(self, context: Experience) -> torch.Tensor:
        self.contexts.append(context)
        best = context.signal.argmax(dim=1)
        return context.observation[torch.arange(len(best)), best]

    def actions(self, observation: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        self.acted.append(z)
        return super().actions(observation, z)


def online(name: str, **values: Any) -> tuple[list[dict[str, Any]], Searcher]:
    algorithm = Searcher()
    return evaluate(algorithm, name, repetitions=1, **values)[0], algorithm


def test_online_prior_explores_with_training_embeddings_and_uses_its_own_transitions_alone():
    rows, algorithm = online("online-prior", episodes=8, exploration_episodes=6, prior_context=5)
    training = {tuple(np.float32(t["parameters"]["goal"])) for t in TASKS[:3]}
    tried = [{tuple(z.numpy()) for z in zs} for zs in algorithm.acted[: 6 * FAMILY.horizon]]
    assert set().union(*tried) == training
    assert [c.shape for c in algorithm.contexts[1:]] == [(5, 6 * 20), (5, 7 * 20), (5, 7 * 20)]
    assert all(float(c.signal.max()) <= 1 for c in algorithm.contexts[1:3])
    assert float(algorithm.contexts[3].signal.min()) == 7  # offline, as many: what the policy would do with those
    told = [r["offline_context_return"] for r in rows]
    assert np.isnan(told[: 7 * 5]).all()
    assert min(told[7 * 5 :]) > 10
    assert [r["context_transitions"] for r in rows if r["task"] == 4] == [0] * 6 + [120, 140]
    # a training task meets its own goal among six draws of three, with this seed, and stays there
    assert [r["return"] for r in rows if r["task"] == 0 and r["counted"]] > [10.0]


def test_online_idaq_keeps_the_best_of_the_exploration():
    rows, algorithm = online("online-idaq", episodes=8, exploration_episodes=6, prior_context=5, kept_share=0.2)
    for task in range(5):
        explored = sorted(r["return"] for r in rows if r["task"] == task and r["episode"] < 6)
        kept = sum(value >= explored[-1] for value in explored)  # the best one, with its equals
        assert algorithm.contexts[1 + task].shape == (1, 20 * kept)
        assert rows[6 * 5 + task]["context_transitions"] == 20 * kept
    assert {r["counted"] for r in rows if r["episode"] < 7} == {False}


class Counter(Searcher):
    """A method without a posterior, whose belief grows by one with every step of its own."""

    def observe(self, belief: Any, step: Experience) -> Any:
        return belief + 1


@pytest.mark.parametrize("posterior", ["mean", "episode", "step"])
def test_a_method_without_a_posterior_keeps_what_its_steps_told(posterior):
    algorithm = Counter()
    evaluate(algorithm, "online-prior", repetitions=1, episodes=2, exploration_episodes=1, posterior=posterior)
    last = [z - algorithm.acted[FAMILY.horizon] for z in algorithm.acted[FAMILY.horizon : 2 * FAMILY.horizon]]
    for t, grown in enumerate(last):
        np.testing.assert_allclose(grown, t, atol=1e-5)


def test_online_protocols_leave_episodes_for_the_adapted_policy():
    with pytest.raises(ValueError, match="exploration_episodes = 10 leaves none of episodes = 10"):
        protocol("online-prior").CONFIG(episodes=10)


def test_ood_contexts_come_from_other_training_tasks_with_this_tasks_reward():
    features = np.zeros((5, 50, 0), np.float32)
    rngs = [np.random.default_rng(i) for i in range(5)]
    run = Run(GoalReader(), FAMILY, buffers(), TASKS, None, ("test",), 0)
    found = other_tasks_context(run, features, 40, rngs)
    goals = np.array([t["parameters"]["goal"] for t in TASKS], dtype=np.float32)
    for place, task in enumerate(TASKS):
        others = {tuple(goals[i]) for i in range(3) if i != place}
        assert {tuple(row.numpy()) for row in found.observation[place]} == others
        dense, sparse = FAMILY.reward(
            task["parameters"], found.observation[place].numpy(), found.action[place].numpy(),
            found.next_observation[place].numpy(), features[place, :40],
        )  # fmt: skip
        np.testing.assert_array_equal(found.reward[place], dense)
        np.testing.assert_array_equal(found.signal[place], sparse)
    algorithm = Searcher()
    evaluate(algorithm, "ood-checkpoint", features=features, episodes=2, context_per_episode=20, repetitions=1)
    assert [c.shape for c in algorithm.contexts] == [(5, 20), (5, 40)]
    assert all(float(c.signal.max()) <= 1 for c in algorithm.contexts)


class Weigher(Searcher):
    """The embedding of a transition is its reward; rewarded ones weigh twice as much."""

    def infer(self, context: Experience) -> torch.Tensor:
        return context.signal.mean(dim=1, keepdim=True)

    def attention_weights(self, context: Experience) -> torch.Tensor:
        weights = 1.0 + (context.signal != 0)
        return weights / weights.mean(dim=1, keepdim=True)


def mixed_rewards() -> TaskData:
    whole, rng = buffers(400), np.random.default_rng(0)
    whole.sparse_reward[:] = np.where(rng.random((5, 400)) < 0.5, rng.normal(1.0, 0.3, (5, 400)), 0)
    return whole


def test_attention_tells_rewarded_transitions_apart():
    found = attention(Weigher(), mixed_rewards(), [0, 1, 2], 100, ("test",), 0)
    assert found is not None
    assert found["auc"] == 1
    assert found["rewarded"] == pytest.approx(2 * found["unrewarded"], rel=0.05)
    assert sum(found["counts"]["rewarded"]) + sum(found["counts"]["unrewarded"]) == 300
    assert attention(GoalReader(), mixed_rewards(), [0], 100, ("test",), 0) is None  # weighs nothing
    assert attention(Weigher(), buffers(), [0], 100, ("test",), 0) is None  # nothing without reward


def test_sparsity_curve_of_a_known_embedding():
    # z = mean of n rewards, of which the rewarded ones have variance v: Var(z) = (1 - ratio) v / n
    found = sparsity_curve(Weigher(), mixed_rewards(), [0, 1, 2], [0.0, 0.5, 1.0], 50, 400, ("test",), 0)
    assert found is not None
    assert found["variance"] == pytest.approx([0.09 / 50, 0.045 / 50, 0.0], rel=0.15)
    assert found["threshold"] == 1.0  # unrewarded transitions all have one embedding
    assert found["tasks"] == 3
    assert sparsity_curve(Weigher(), buffers(), [0], [0.5], 50, 4, ("test",), 0) is None


def test_esr_of_known_embeddings():
    # in two dimensions the threshold is a squared distance of 4/3 (mean 2/3 per dimension)
    assert esr(np.array([[0.0, 0.0], [1.2, 0.0], [0.0, 1.1]])) == pytest.approx(2 / 3)
    assert esr(np.array([[0.0, 0.0], [0.1, 0.0]])) == 0
    cube = np.random.default_rng(0).choice([-1.0, 1.0], (400, 5))
    assert esr(cube) == pytest.approx(0.97, abs=0.01)  # only equal corners are near: 1 - 2^-5
    # uniform in the cube: 0.4531 and 0.4772, from 4e5 independent pairs each
    assert esr(np.random.default_rng(0).uniform(-1, 1, (1500, 5))) == pytest.approx(0.4531, abs=0.02)
    assert esr(np.random.default_rng(0).uniform(-1, 1, (1500, 20))) == pytest.approx(0.4772, abs=0.02)


def test_ood_contexts_need_other_tasks_of_the_same_dynamics():
    features = np.zeros((5, 50, 0), np.float32)
    wind = load_family("point-robot-wind")
    with pytest.raises(UserError, match="tasks of 'point-robot-wind' differ in their dynamics"):
        evaluate(GoalReader(), "ood-checkpoint", family=wind, features=features)
    with pytest.raises(UserError, match="expected 2 training tasks or more"):
        evaluate(GoalReader(), "ood-checkpoint", features=features[:3], places=[0, 3, 4])


def test_rms_of_known_embeddings():
    corners = np.repeat(np.array([[-1.0] * 3, [1.0] * 3]), 40, axis=0)
    assert rms(corners) == pytest.approx(math.sqrt(2 * 80 / 79))  # 1.423, the most there is for 80 tasks
    assert rms(np.random.default_rng(0).uniform(-1, 1, (2000, 5))) == pytest.approx(0.816, abs=0.01)


def test_the_shift_of_own_contexts_is_in_units_of_the_distance_of_tasks():
    rng = np.random.default_rng(0)
    middle = np.array([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, -4.0]])  # root mean square distance sqrt(12.5)
    offline = middle[:, None] + 0.2 * rng.normal(size=(4, 400, 2))
    own = middle[:, None] + [1.0, 1.0] + 0.2 * rng.normal(size=(4, 200, 2))
    found = context_shift(own, offline, [2, 3])
    assert found is not None
    assert found["context_shift"] == pytest.approx(math.sqrt(2 / 12.5), rel=0.05)
    # each half's mean has variance 0.04 / 200 in both dimensions
    assert found["context_shift_chance"] == pytest.approx(math.sqrt(4 * 0.04 / 200 / 12.5), rel=0.6)
    assert context_shift(np.zeros((4, 2, 3)), np.zeros((4, 4, 3)), [0]) is None


def test_own_contexts_are_compared_with_offline_ones_of_their_size():
    algorithm = Searcher()
    run = Run(algorithm, FAMILY, buffers(), TASKS, protocol("online-prior").CONFIG(
        episodes=3, exploration_episodes=2, repetitions=3), ("test",), 0)  # fmt: skip
    protocol("online-prior").run(run)
    algorithm.contexts.clear()
    own, offline = own_and_offline(algorithm, buffers(), TASKS, run.rows, ("test",), 0)
    assert (own.shape, offline.shape) == ((5, 3, 2), (5, 6, 2))
    assert {c.shape for c in algorithm.contexts} == {(5, 40)}
    goals = np.array([t["parameters"]["goal"] for t in TASKS], np.float32)
    np.testing.assert_array_equal(offline, np.repeat(goals[:, None], 6, axis=1))


def test_embedding_variance_is_within_tasks():
    found = np.array([[[0.0, 0.0], [2.0, 0.0]], [[10.0, 5.0], [10.0, 5.0]]])
    assert embedding_variance(found) == pytest.approx((2 + 0 + 0 + 0) / 4)


class Doubter(Searcher):
    """Draws from a posterior far away, and counts what it is asked to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0
        self.priors: list[bool] = []

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Any:
        self.priors.append(rng is not None)
        return super().prior(tasks)

    def sample(self, belief: Any, rng: torch.Generator) -> Any:
        self.drawn += 1
        return belief + 100


@pytest.mark.parametrize(("posterior", "draws"), [("mean", 0), ("episode", 1), ("step", 20)])
def test_online_prior_draws_from_the_posterior_as_often_as_asked(posterior, draws):
    algorithm = Doubter()
    evaluate(algorithm, "online-prior", repetitions=1, episodes=2, exploration_episodes=1, posterior=posterior)
    acted = algorithm.acted[FAMILY.horizon : 2 * FAMILY.horizon]  # behind them comes the one told offline
    assert all((float(z.min()) > 50) == (draws > 0) for z in acted)
    assert algorithm.drawn == 2 * draws


@pytest.mark.parametrize(
    ("values", "drawn", "sizes"),
    [
        ({"prior": "none"}, 0, [0, 20, 40]),
        ({"prior": "own"}, 2, [0, 0, 40]),
        ({"prior": "own", "resample": "step"}, 40, [0, 0, 40]),
    ],
)
def test_online_prior_explores_as_asked(values, drawn, sizes):
    algorithm = Doubter()
    rows, _ = evaluate(algorithm, "online-prior", repetitions=1, episodes=3, exploration_episodes=2, **values)
    assert sum(algorithm.priors) == drawn
    assert [row["context_transitions"] for row in rows if row["task"] == 4] == sizes


def test_idaq_takes_no_later_episode_that_is_worse_than_those_kept():
    class Lost(Searcher):
        """Finds nothing in episodes of its own."""

        def infer(self, context: Experience) -> torch.Tensor:
            z = super().infer(context)
            return z if float(context.signal.max()) == 7 else z * 0 + torch.tensor([0.0, -5.0])

    values = {"episodes": 8, "exploration_episodes": 6, "prior_context": 5, "kept_share": 0.2}
    rows, _ = evaluate(Lost(), "online-idaq", repetitions=1, **values)
    own = [row for row in rows if row["task"] == 0]
    assert max(row["return"] for row in own[:6]) > 0 == own[6]["return"]
    assert own[6]["context_transitions"] == own[7]["context_transitions"]
