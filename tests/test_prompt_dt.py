"""Prompt-DT: returns to go and prompts by hand, causality, the belief over an episode, and two goals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from omrl.algorithms.base import Spec, create, join_beliefs, load_model, map_belief, save_model
from omrl.algorithms.prompt_dt import PromptDt
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.evaluation.contexts import offline_belief
from omrl.learning.sampler import Sampler
from omrl.nets.experience import Experience, from_arrays
from omrl.nets.transformer import CausalTransformer

SMALL = {
    "width": 32, "depth": 2, "window": 4, "prompt_length": 3, "prompt_segments": 2, "meta_batch": 4, "rl_batch": 8,
    "rate": 3e-3, "warmup": 20,
}  # fmt: skip
HORIZON = 6
GOALS = np.array([0.8, -0.8])


def make(seed: int = 0, **values: Any) -> PromptDt:
    algorithm = create("prompt-dt", SMALL | values, Spec(2, 2, False, HORIZON), seed, "cpu")
    assert isinstance(algorithm, PromptDt)
    return algorithm


def data(seed: int = 0, episodes: int = 60, good: float = 0.5) -> TaskData:
    """Two tasks in episodes of 6 steps; a share ``good`` of them goes to the goal's side, the rest anywhere."""
    rng = np.random.default_rng(seed)
    rows = episodes * HORIZON
    s = rng.uniform(-0.5, 0.5, (2, rows, 2)).astype(np.float32)
    a = rng.uniform(-1, 1, (2, rows, 2))
    well = np.repeat(rng.random((2, episodes)) < good, HORIZON, axis=1)
    a[..., 0] = np.where(well, GOALS[:, None] + rng.normal(0, 0.1, (2, rows)), a[..., 0]).clip(-1, 1)
    r = (1 - np.abs(a[..., 0] - GOALS[:, None])).astype(np.float32)
    step = np.tile(np.arange(HORIZON), (2, episodes))
    start = np.arange(rows) - step
    return TaskData(
        tasks=(0, 1), observation=s, action=a.astype(np.float32), reward=np.zeros_like(r), sparse_reward=r,
        next_observation=s, terminal=np.zeros_like(r), checkpoint=np.zeros_like(step, dtype=np.int32),
        step=step.astype(np.int32), start=start, end=start + HORIZON,
    )  # fmt: skip


def trained(steps: int, seed: int = 0, **values: Any) -> PromptDt:
    algorithm = make(seed, **values)
    source = data()
    sampler = Sampler(source.with_columns(algorithm.columns(source)), seed, algorithm.device)
    (phase,) = algorithm.phases(steps)
    algorithm.begin(phase, source)
    for _ in range(steps):
        algorithm.update(phase, sampler.draw(phase))
    return algorithm


def test_gradients_are_clipped_and_weights_decay():
    algorithm, source = make(largest_gradient=1e-3, weight_decay=0.3), data()
    assert algorithm.optimizer.param_groups[0]["weight_decay"] == 0.3
    (phase,) = algorithm.phases(1)
    algorithm.update(phase, Sampler(source.with_columns(algorithm.columns(source)), 0, algorithm.device).draw(phase))
    norms = torch.stack([p.grad.norm() for p in algorithm.net.parameters() if p.grad is not None])
    assert float(norms.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_trained_model_keeps_the_scales_that_its_weights_know():
    algorithm, other = trained(2), data(seed=1)
    other = replace(other, observation=10 * other.observation, sparse_reward=10 * other.sparse_reward)
    (phase,) = algorithm.phases(2)
    before = {name: x.clone() for name, x in algorithm.net.named_buffers()}
    algorithm.begin(phase, other)
    assert all(torch.equal(x, before[name]) for name, x in algorithm.net.named_buffers())
    fresh = make()
    fresh.begin(phase, other)
    assert float(fresh.net.scale) > 5 * float(algorithm.net.scale)


def prompted(algorithm: PromptDt, source: TaskData, seed: int = 0) -> Any:
    source = source.with_columns(algorithm.columns(source))
    return offline_belief(algorithm, source, 20, [np.random.default_rng(seed + i) for i in range(2)])


def one_step(s: float, reward: float, valid: tuple[float, float] = (1.0, 1.0)) -> Experience:
    field = np.full((2, 1, 2), s)
    numbers = {"reward": np.full((2, 1), 9.0), "signal": np.full((2, 1), reward), "valid": np.array(valid)[:, None]}
    return from_arrays(
        {"observation": field, "action": field, "next_observation": field, "terminal": np.zeros((2, 1)), **numbers},
        torch.device("cpu"),
    )


# --- returns and prompts -----------------------------------------------------------------------------------------


def test_returns_to_go_end_with_their_episode():
    source = data(episodes=3)
    found = make().columns(source)
    for task in range(2):
        for first, end in source.episodes(task):
            rewards = source.sparse_reward[task, first:end].astype(np.float64)
            np.testing.assert_allclose(found["to_go"][task, first:end], np.cumsum(rewards[::-1])[::-1], atol=1e-5)
            np.testing.assert_allclose(found["whole"][task, first:end], rewards.sum(), atol=1e-5)


@pytest.mark.parametrize("prompt_from", ["end", "window"])
def test_a_prompt_is_made_of_a_tasks_segments(prompt_from):
    algorithm, source = make(prompt_from=prompt_from), data()
    prompt = prompted(algorithm, source)["prompt"]
    to_go = algorithm.columns(source)["to_go"]
    for task in range(2):
        there = prompt.valid[task] > 0
        seen = prompt.observation[task][there].numpy()
        rows = [int(np.flatnonzero((source.observation[task] == o).all(1))[0]) for o in seen]
        assert len(rows) >= 4
        np.testing.assert_array_equal(prompt.action[task][there], source.action[task, rows])
        np.testing.assert_array_equal(prompt.step[task][there], source.step[task, rows])
        np.testing.assert_allclose(prompt.to_go[task][there], to_go[task, rows])
        for segment in prompt.step.view(2, 2, 3)[task][prompt.valid.view(2, 2, 3)[task].all(-1)]:
            assert segment.diff().tolist() == [1, 1]
            if prompt_from == "end":
                assert segment[-1] == HORIZON - 1


def test_of_more_segments_the_best_episodes_make_the_prompt():
    algorithm = make(prompt_segments=1, prompt_length=2, target_from="prompt")
    rewards = np.array([[[1.0, 0, 0], [0, 3, 1], [2, 0, 0]], [[5, 0, 0], [0, 0, 0], [0, 0, 1]]])
    valid = np.ones_like(rewards)
    valid[0, 1, 2] = 0  # terminated early: the reward behind it means nothing
    fields = np.arange(18.0).reshape(2, 3, 3, 1).repeat(2, axis=-1)
    own = from_arrays(
        {"observation": fields, "action": fields, "reward": rewards * 0, "next_observation": fields,
         "terminal": rewards * 0, "signal": rewards, "valid": valid, "step": np.arange(3) + 0 * rewards.astype(int)},
        torch.device("cpu"),
    )  # fmt: skip
    belief = algorithm.adapt(algorithm.prior(2), own)
    assert belief["prompt"].observation[..., 0].tolist() == [[3.0, 4.0], [10.0, 11.0]]
    assert belief["prompt"].to_go.tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert belief["wanted"].tolist() == [3.0, 5.0]


def test_too_few_segments_are_padded_and_padding_says_nothing():
    algorithm = trained(3)
    source = data(1)
    source = source.with_columns(algorithm.columns(source))
    sampler = Sampler(source, 0, algorithm.device)
    phase = algorithm.phases(1)[0]
    context = sampler.draw(phase)["context"].of(torch.tensor([0, 1]))
    belief = algorithm.adapt(algorithm.prior(2), context.part(0, 1))
    prompt = belief["prompt"]
    assert prompt.valid.tolist() == [[0.0] * 3 + [1.0] * 3] * 2
    noisy = prompt._replace(observation=prompt.observation + 7 * (1 - prompt.valid).unsqueeze(-1))
    s = torch.rand(2, 2)
    assert torch.equal(algorithm.act(belief, s), algorithm.act({**belief, "prompt": noisy}, s))


# --- the network -------------------------------------------------------------------------------------------------


def test_a_token_sees_itself_and_valid_tokens_before_it():
    net = CausalTransformer(8, 2, 2, torch.Generator().manual_seed(0)).double()
    g = torch.Generator().manual_seed(1)
    x, valid = torch.randn(3, 6, 8, generator=g, dtype=torch.float64), torch.ones(3, 6)
    valid[1, 2] = valid[2, :2] = 0
    x.requires_grad_(True)
    out = net(x, valid)
    for t in range(6):
        (gradient,) = torch.autograd.grad(out[:, t].pow(3).sum(), x, retain_graph=True)
        seen = gradient.abs().sum(-1) > 1e-15
        expected = (torch.arange(6) <= t) & (valid > 0) | (torch.arange(6) == t)
        assert torch.equal(seen, expected)


def test_actions_do_not_depend_on_what_comes_later_nor_on_the_action_asked_for():
    algorithm = trained(5)
    prompt = prompted(algorithm, data(1))["prompt"]
    windows = algorithm._nothing(2, 4)._replace(
        observation=torch.rand(2, 4, 2), action=torch.rand(2, 4, 2), valid=torch.ones(2, 4)
    )
    before = algorithm.net(prompt, windows)
    action = windows.action.clone()
    action[:, 2] += 1
    after = algorithm.net(prompt, windows._replace(action=action))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_acting_step_by_step_is_the_training_pass():
    algorithm = trained(5, window=HORIZON)
    belief = prompted(algorithm, data(1))
    g = torch.Generator().manual_seed(0)
    s, a, r = torch.rand(2, 4, 2, generator=g), torch.rand(2, 4, 2, generator=g), torch.rand(2, 4, generator=g)
    prompt, wanted, acted = belief["prompt"], belief["wanted"], []
    for t in range(4):
        acted.append(algorithm.act(belief, s[:, t]))
        each = [x[:, t : t + 1] for x in (s, a, r, s, r * 0, r)]
        belief = algorithm.observe(belief, Experience(*each, task=torch.arange(2)))
    to_go = wanted[:, None] - torch.cat([torch.zeros(2, 1), r.cumsum(1)[:, :-1]], dim=1)
    window = type(prompt)(s, a, to_go, torch.arange(4).expand(2, 4), torch.ones(2, 4))
    torch.testing.assert_close(torch.stack(acted, 1), algorithm.net(prompt, window), rtol=1e-4, atol=1e-6)


# --- the belief --------------------------------------------------------------------------------------------------


def test_a_step_is_appended_and_its_reward_no_longer_wanted():
    algorithm = make(target_return=5.0)
    belief = algorithm.prior(2)
    for t in range(5):
        belief = algorithm.observe(belief, one_step(float(t), 0.5, (1.0, float(t < 2))))
    window = belief["window"]
    assert belief["wanted"].tolist() == [2.5, 4.0]  # the signal, not the dense reward
    assert belief["time"].tolist() == [5, 2]
    assert window.observation[..., 0].tolist() == [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]]
    assert window.to_go[0].tolist() == [4.5, 4.0, 3.5, 3.0]
    assert window.valid.tolist() == [[1.0] * 4, [0.0, 0.0, 1.0, 1.0]]
    assert window.step[0].tolist() == [1, 2, 3, 4]
    assert algorithm.embedding(belief) is None


def test_beliefs_are_trees_of_tensors_by_task():
    algorithm = make()
    belief = prompted(algorithm, data())
    halves = [map_belief(lambda x, i=i: x[i : i + 1], belief) for i in range(2)]
    again, s = join_beliefs(halves), torch.rand(2, 2)
    assert torch.equal(algorithm.act(again, s), algorithm.act(belief, s))


# --- training ----------------------------------------------------------------------------------------------------


def test_two_goals_are_told_apart_by_the_prompt_and_the_wanted_return_picks_the_good_half(tmp_path):
    algorithm = trained(400)
    belief, s = prompted(algorithm, data(1, good=1.0), 5), torch.zeros(2, 2)
    best = algorithm.act(belief, s)[:, 0]
    assert float((best - torch.tensor(GOALS)).abs().max()) < 0.25
    poor = algorithm.act({**belief, "wanted": torch.full((2,), 1.0)}, s)[:, 0]
    assert float((poor - torch.tensor(GOALS)).abs().min()) > 0.4
    save_model(algorithm, tmp_path, "mine", "prompt-dt")
    loaded = load_model(tmp_path, "cpu")  # with the scales and the best return
    assert torch.equal(loaded.prior(2)["wanted"], algorithm.prior(2)["wanted"])
    assert torch.equal(loaded.act(belief, s), algorithm.act(belief, s))


def test_the_rate_rises_over_the_warmup():
    assert trained(4).optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 * 4 / 20)


def test_padding_of_a_window_is_not_imitated():
    one, two = make(), make()
    source = data()
    (phase,) = one.phases(1)
    batch = Sampler(source.with_columns(one.columns(source)), 0, one.device).draw(phase)
    windows = batch["transitions"]
    assert windows.valid is not None
    assert 0 < float(windows.valid.mean()) < 1
    wrong = Experience(**{**vars(windows), "action": windows.action + 5 * (1 - windows.valid).unsqueeze(-1)})
    loss, same = one.update(phase, batch), two.update(phase, {**batch, "transitions": wrong})
    assert torch.equal(loss["action_loss"], same["action_loss"])


def test_heads_that_do_not_share_the_width_are_refused():
    with pytest.raises(UserError, match="width = 32 with heads = 3"):
        make(heads=3)
