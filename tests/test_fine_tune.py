"""Protocol fine-tune: what is counted, when it learns, that tasks stay apart, and that learning on helps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from omrl.algorithms import macaw
from omrl.algorithms.base import Draw, Phase, Spec, create
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.data.taskdata import TaskData
from omrl.envs.base import load_family
from omrl.envs.simulate import episodes
from omrl.evaluation.protocols import fine_tune
from omrl.evaluation.protocols.base import Run

HORIZON = 20
MAML = {"width": 16, "latent_dim": 8, "inner_batch": 32, "outer_batch": 32, "tune_batch": 32}
CONTEXT = {"latent_dim": 3, "encoder_width": 16, "width": 16, "meta_batch": 4, "rl_batch": 32, "context_batch": 16}
METHODS: dict[str, dict[str, Any]] = {
    "macaw": MAML,
    "mt-ft": {"width": 16, "batch": 32, "tune_batch": 32, "tune_steps": 3},
    "pearl": CONTEXT,
    "focal": CONTEXT,
}
SMALL = {"episodes": 4, "context": 40, "evaluations": 2, "first_update": 3, "updates": 5}


def make_run(name: str, model: dict[str, Any] | None = None, quick: bool = False, **values: Any) -> Run:
    """Three point-robot tasks, the last two for tests, with six random episodes each."""
    family = load_family("point-robot")
    tasks = [
        {"index": i, "split": "train" if i == 0 else "test", "parameters": family.sample(i, 1337),
         "random_return": -20.0, "oracle_return": -5.0}
        for i in range(3)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    env = family.batch([t["parameters"] for t in tasks], 1)

    def act(observation: np.ndarray, t: int) -> np.ndarray:
        return rng.uniform(-1, 1, observation.shape).astype(np.float32)

    made = [episodes(env, act, HORIZON, [np.random.default_rng([e, i]) for i in range(3)]) for e in range(6)]
    names = ("observation", "action", "reward", "sparse_reward", "next_observation")
    fields = {n: np.concatenate([getattr(e, n) for e in made], axis=1).astype(np.float32) for n in names}
    rows = np.broadcast_to(np.arange(6 * HORIZON), (3, 6 * HORIZON))
    start = (rows // HORIZON * HORIZON).astype(np.int64)
    zero = np.zeros(rows.shape, np.int32)
    data = TaskData(
        (0, 1, 2), **fields, terminal=np.zeros(rows.shape, np.float32), checkpoint=zero,
        step=(rows - start).astype(np.int32), start=start, end=start + HORIZON, inference="dense",
    )  # fmt: skip
    algorithm = create(name, METHODS[name] | (model or {}), Spec(2, 2, False, HORIZON, 1), 0, "cpu")
    if own := algorithm.columns(data):
        data = data.with_columns(own)
    config = parse(fine_tune.CONFIG, SMALL | values, "evaluate")
    return Run(algorithm, family, data, tasks, config, ("evaluate", "fine-tune"), 0, quick=quick)


def finished(name: str, **values: Any) -> Run:
    run = make_run(name, **values)
    fine_tune.run(run)
    return run


@pytest.mark.parametrize("name", METHODS)
def test_rows_and_steps_of_every_method(name):
    run = make_run(name)
    state = {key: tensor.clone() for key, tensor in run.algorithm.model_state().items()}
    last = fine_tune.run(run)
    assert last.reward.shape == (3, HORIZON)
    tuned = [row for row in run.rows if row["split"] == "test"]
    assert len(tuned) == 2 * 5 * 2
    for row in tuned:  # evaluation is free: only collected episodes count
        assert row["env_steps"] == HORIZON * row["episode"]
        assert row["counted"] == (row["episode"] == 4)
    assert [(row["task"], row["env_steps"], row["counted"]) for row in run.rows if row["split"] == "train"] == [
        (0, 0, True)
    ]
    assert all(torch.equal(tensor, state[key]) for key, tensor in run.algorithm.model_state().items())
    again = finished(name)
    assert [row["return"] for row in again.rows] == [row["return"] for row in run.rows]


def first_acts(run: Run, done: int) -> list[Any]:
    """The belief's weights of every learner after so many collected episodes."""
    learners = [fine_tune.Learner(run, i, np.arange(40), seed=i) for i in (1, 2)]
    sub = Run(**{**vars(run), "tasks": run.tasks[1:], "data": run.data.of([1, 2])})
    for e in range(done):
        rngs = [np.random.default_rng([e, i]) for i in range(2)]
        ran = fine_tune._episode(sub, learners, rngs, rngs)
        for i, learner in enumerate(learners):
            learner.add(ran, i)
            learner.learn()
    return [x.belief["policy"] for x in learners]


def test_nothing_is_learned_before_the_first_update():
    run = make_run("macaw")
    start, waiting, learned = (first_acts(run, done) for done in (0, 2, 3))
    for i in range(2):
        torch.testing.assert_close(waiting[i], start[i])
        assert not torch.equal(learned[i], start[i])
    assert not torch.equal(start[0], start[1])


def test_a_tuned_task_goes_on_from_its_adapted_weights():
    gentle = {"tune_value_rate": 1e-9, "tune_policy_rate": 1e-9}
    for name in ("macaw", "mt-ft"):
        if name == "mt-ft":  # adaptation has the same rates
            gentle = {"tune_value_rate": 1e-5, "tune_policy_rate": 1e-5}
        run = make_run(name, gentle)
        start, learned = first_acts(run, 0), first_acts(run, 3)
        torch.testing.assert_close(learned[0], start[0], rtol=1e-3, atol=1e-3)
        assert not torch.equal(learned[0], start[0])


def test_the_buffer_keeps_the_latest_and_begins_with_the_offline_rows_if_asked():
    seen: list[int] = []
    run = make_run("macaw", buffer=50, keep_offline=True, first_update=1)
    learner = fine_tune.Learner(run, 1, np.arange(40), seed=0)
    assert learner.own[0]["reward"].shape == (1, 40)

    def look(draw: Any, steps: int, context: Any) -> Any:
        seen.append(sum(part["reward"].shape[1] for part in learner.own))
        return learner.belief

    learner.algorithm.fine_tune = look  # type: ignore[method-assign]
    sub = Run(**{**vars(run), "tasks": run.tasks[1:2], "data": run.data.of([1])})
    for e in range(5):
        learner.add(fine_tune._episode(sub, [learner], [np.random.default_rng(e)], None), 0)
        learner.learn()
    assert seen == [60, 80, 60, 60, 60]


def test_a_learning_curve_asks_for_the_offline_step_alone():
    run = make_run("macaw", quick=True)
    fine_tune.run(run)
    assert {row["env_steps"] for row in run.rows} == {0}
    assert all(row["counted"] for row in run.rows)


def test_learning_on_improves_the_policy():
    model = {"tune_policy_rate": 1e-2, "tune_value_rate": 1e-2, "temperature": 0.3, "gamma": 0.8}
    rounds = {"episodes": 14, "first_update": 2, "updates": 20, "evaluations": 10, "evaluate_every": 14}
    run = finished("mt-ft", model=model, noise=0.7, **rounds)
    tuned = [row for row in run.rows if row["split"] == "test"]
    start = np.mean([row["return"] for row in tuned if row["env_steps"] == 0])
    end = np.mean([row["return"] for row in tuned if row["counted"]])
    assert end > start + 2


@pytest.mark.parametrize("values", [{"episodes": 0}, {"noise": -0.1}, {"updates": 0}, {"contexts": 3}], ids=str)
def test_a_wrong_value_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(UserError, match=key):
        parse(fine_tune.CONFIG, values, "evaluate")


def test_a_learner_takes_its_updates_from_its_last_steps_and_the_offline_context():
    run = make_run("focal", buffer=50, first_update=1, updates=7)
    learner = fine_tune.Learner(run, 1, np.arange(40), seed=0)
    sub = Run(**{**vars(run), "tasks": run.tasks[1:2], "data": run.data.of([1])})
    seen: list[tuple[int, set[Any], set[Any]]] = []

    def look(draw: Any, steps: int, context: Any) -> Any:
        drawn = draw(Phase("x", 1, 1, {"own": Draw(4000), "context": Draw(4000, source="context")}))
        own, told = ({tuple(s) for s in drawn[name].observation[0].tolist()} for name in ("own", "context"))
        seen.append((steps, own, told))
        return learner.belief

    learner.algorithm.fine_tune = look  # type: ignore[attr-defined]
    for e in range(4):
        learner.add(fine_tune._episode(sub, [learner], [np.random.default_rng(e)], None), 0)
        learner.learn()
    steps, own, told = seen[-1]
    assert (steps, len(own)) == (7, 50)
    assert told == {tuple(s) for s in run.data.observation[1, :40].tolist()}


def test_macaw_descends_the_value_loss_and_then_the_weighted_policys(monkeypatch):
    run = make_run("macaw", {"tune_policy_updates": 3}, first_update=1, updates=4)
    learner = fine_tune.Learner(run, 1, np.arange(40), seed=0)
    sub = Run(**{**vars(run), "tasks": run.tasks[1:2], "data": run.data.of([1])})
    learner.add(fine_tune._episode(sub, [learner], [np.random.default_rng(0)], None), 0)
    stepped: list[Any] = []
    imitated: list[torch.Tensor] = []
    descend, imitation = macaw.descend, learner.algorithm.imitation

    def descending(loss: torch.Tensor, *optimizers: Any) -> None:
        stepped.extend(optimizers)
        descend(loss, *optimizers)

    def imitating(thetas: Any, rows: Any, weight: torch.Tensor) -> torch.Tensor:
        imitated.append(weight)
        return imitation(thetas, rows, weight)

    monkeypatch.setattr(macaw, "descend", descending)
    monkeypatch.setattr(learner.algorithm, "imitation", imitating)
    learner.learn()
    value, policy = (learner.algorithm._tuning[part] for part in ("value", "policy"))
    assert stepped == [value] * 4 + [policy] * 12
    assert len(imitated) == 12
    assert all(float(weight.std()) > 0 for weight in imitated)
