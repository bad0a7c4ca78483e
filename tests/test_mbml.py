"""MBML: both phases' losses in double precision, what each phase leaves alone, its curve, golden numbers."""

from __future__ import annotations

import copy
import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update
from torch.distributions import Normal, kl_divergence

from omrl.algorithms.base import Spec, create
from omrl.algorithms.mbml import Mbml
from omrl.core.errors import UserError
from omrl.learning.train import Curve
from omrl.nets.experience import Experience
from omrl.nets.mlp import Mlp

TASKS, LATENT = 3, 4
DRAWN = (0, 2, 2, 1)
SMALL = {
    "tasks": TASKS, "latent_dim": 3, "encoder_width": 16, "encoder_depth": 2, "width": 16, "depth": 2,
    "ensemble": 3, "ensemble_width": 16, "meta_batch": 4, "rl_batch": 8, "context_batch": 6, "candidates": 5,
    "threshold": 1e9, "next_threshold": 1e9,
}  # fmt: skip


def make(seed: int = 0, with_next: bool = False, **values: Any) -> Mbml:
    algorithm = create("mbml", SMALL | values, Spec(2, 2, with_next), seed, "cpu")
    assert isinstance(algorithm, Mbml)
    with torch.no_grad():  # away from the start, where everything is all but zero
        for part in (algorithm.teachers, algorithm.student):
            for net in part.children():
                net.weights[-1].mul_(100)
    return algorithm


def made_batch(seed: int = 1, with_next: bool = False, drawn: tuple[int, ...] = DRAWN) -> dict[str, Experience]:
    g = torch.Generator().manual_seed(seed)
    s, a = torch.randn(4, 14, 2, generator=g), torch.rand(4, 14, 2, generator=g) * 2 - 1
    r, ends = torch.randn(4, 14, generator=g), (torch.rand(4, 8, generator=g) < 0.3).float()
    moves = moves_of(s[:, :8], a[:, :8], r[:, :8], s[:, :8] + 0.1 * a[:, :8], ends)
    context = bag_of(s[:, 8:], a[:, 8:], r[:, 8:], s[:, 8:] + 0.1 * a[:, 8:] if with_next else None)
    return meta_batch(torch.tensor(drawn), context, moves)


def double(net: Mlp, x: np.ndarray, place_in_stack: int = 0) -> np.ndarray:
    """One network of the stack in double precision."""
    for place, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        w, b = (p[place_in_stack].detach().double().numpy() for p in (weight, bias))
        x = (np.maximum(x, 0) if place else x) @ w + b
    return x


def side(*parts: Any) -> np.ndarray:
    return np.concatenate([np.atleast_2d(np.asarray(part, dtype=np.float64)) for part in parts], axis=-1)


def stream_of(algorithm: Mbml) -> torch.Generator:
    stream = torch.Generator()
    stream.set_state(algorithm.generators()["noise"].get_state())
    return stream


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def product(factors: np.ndarray) -> Normal:
    """The posterior of one factor per row, [n, 2 * latent]."""
    mu, raw = np.split(factors, 2, axis=-1)
    precision = 1 / np.logaddexp(0, raw)
    variance = 1 / precision.sum(0)
    return Normal(torch.from_numpy(variance * (precision * mu).sum(0)), torch.from_numpy(variance).sqrt())


# --- phase 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_next", [False, True])
def test_teaching_losses_in_double_precision(with_next):
    chosen = {"gamma": 0.9, "reward_scale": 0.1, "soft_min": 0.6, "perturbation": 0.4, "vae_first": False}
    algorithm = make(with_next=with_next, **chosen)
    batch, teachers, stream = made_batch(with_next=with_next), algorithm.teachers, stream_of(algorithm)
    far = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(5)) * 3  # s' that s does not pass for
    batch = {**batch, "transitions": replace(batch["transitions"], next_observation=far)}
    noise = torch.randn(4, 8, LATENT, generator=stream).double().numpy()
    latents = torch.randn(4, 40, LATENT, generator=stream).double().numpy().clip(-0.5, 0.5).reshape(4, 8, 5, LATENT)
    t, c, squared, kl, errors, model = batch["transitions"], batch["context"], [], [], [], []
    for i, task in enumerate(DRAWN):
        for j in range(8):
            state, action = t.observation[i, j], t.action[i, j]
            mean, log_std = np.split(double(teachers.encode, side(state, action), task)[0], 2)
            decoded = np.tanh(double(teachers.decode, side(state, mean + np.exp(log_std) * noise[i, j]), task))[0]
            squared.append((decoded - action.double().numpy()) ** 2)
            kl.append(-0.5 * (1 + 2 * log_std - mean**2 - np.exp(2 * log_std)))
            following, best = t.next_observation[i, j], -np.inf
            for latent in latents[i, j]:
                candidate = np.tanh(double(teachers.decode, side(following, latent), task))
                shift = 0.4 * np.tanh(double(teachers.target_shift, side(following, candidate), task))
                inputs = side(following, (candidate + shift).clip(-1, 1))
                values = [double(teachers.target_q, inputs, task + k * TASKS).item() for k in (0, 1)]
                best = max(best, 0.6 * min(values) + 0.4 * max(values))
            y = 0.1 * float(t.reward[i, j]) + 0.9 * (1 - float(t.terminal[i, j])) * best
            both = [double(teachers.q, side(state, action), task + k * TASKS).item() for k in (0, 1)]
            errors.append([(value - y) ** 2 for value in both])
        wanted = side(c.signal[i][:, None], *([c.next_observation[i]] if with_next else []))
        for member in range(3):
            found = double(teachers.models, side(c.observation[i], c.action[i]), task * 3 + member)
            model.append((found - wanted) ** 2)
    scalars = update(algorithm, batch)
    assert float(scalars["vae_loss"]) == pytest.approx(np.mean(squared) + 0.5 * np.mean(kl), rel=1e-4)
    assert float(scalars["q_loss"]) == pytest.approx(np.mean(errors, axis=0).sum(), rel=1e-4)
    assert float(scalars["model_loss"]) == pytest.approx(np.mean(model), rel=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_the_target_decodes_with_the_vae_as_the_order_says(first):
    algorithm, batch = make(vae_first=first, rate=0.1), made_batch()
    before, stream = copy.deepcopy(algorithm), stream_of(algorithm)
    scalars, t, found = update(algorithm, batch), batch["transitions"], {}
    torch.randn(4, 8, LATENT, generator=stream)
    latents = torch.randn(4, 40, LATENT, generator=stream).clamp(-0.5, 0.5)
    pair = torch.cat([t.observation, t.action], dim=-1)
    for name, teachers in (("stepped", algorithm.teachers), ("old", copy.deepcopy(before.teachers))):
        before.teachers.decode.load_state_dict(teachers.decode.state_dict())
        y = before.teacher_target(t, batch["context"].task, latents)
        errors = (before._critics(before.teachers.q, pair, batch["context"].task) - y).square()
        found[name] = errors.mean((1, 2)).sum().item()
    right, wrong = ("stepped", "old") if first else ("old", "stepped")
    assert scalars["q_loss"].item() == pytest.approx(found[right], rel=1e-6)
    assert scalars["q_loss"].item() != pytest.approx(found[wrong], rel=1e-4)


def test_a_task_learns_from_its_own_rows_only():
    algorithm = make()
    start = copy.deepcopy(algorithm)
    update(algorithm, made_batch(drawn=(2, 2, 0, 0)))
    for name, net in algorithm.teachers.named_children():
        per_task = 3 if name == "models" else 1
        for old, new in zip(getattr(start.teachers, name).parameters(), net.parameters(), strict=True):
            moved = [not torch.equal(a, b) for a, b in zip(old, new, strict=True)]
            owners = [place // per_task % TASKS for place in range(len(moved))]
            assert not any(m for m, owner in zip(moved, owners, strict=True) if owner == 1), name
        # of the last parameter, the output's bias, every drawn task's place has moved
        assert all(m for m, owner in zip(moved, owners, strict=True) if owner != 1), name


def test_targets_follow_slowly():
    algorithm = make(tau=0.25)
    teachers = algorithm.teachers
    old = copies(teachers.target_q), copies(teachers.target_shift)
    update(algorithm, made_batch())
    for before, target, online in zip(
        old, (teachers.target_q, teachers.target_shift), (teachers.q, teachers.shift), strict=True
    ):
        for was, now, goal in zip(before, copies(target), copies(online), strict=True):
            torch.testing.assert_close(now, 0.75 * was + 0.25 * goal)


# --- phase 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_next", [False, True])
def test_distillation_losses_in_double_precision(with_next):
    algorithm = make(with_next=with_next, bcq_steps=0, margin=0.7, perturbation=0.4)
    batch, teachers, student = made_batch(with_next=with_next), algorithm.teachers, algorithm.student
    c, t, stream = batch["context"], batch["transitions"], stream_of(algorithm)
    own, moved = [], {}
    for i in range(4):
        following = [c.next_observation[i]] if with_next else []
        own.append(double(student.encoder, side(c.observation[i], c.action[i], c.signal[i][:, None], *following)))
        for j in range(4):  # rows of j under the models of i
            pair = side(c.observation[j], c.action[j])
            found = np.mean([double(teachers.models, pair, DRAWN[i] * 3 + member) for member in range(3)], axis=0)
            moved[i, j] = double(student.encoder, side(pair, found))
    pairs = []
    for i in range(4):
        for j in range(4):
            if DRAWN[i] != DRAWN[j]:
                anchor = product(moved[i, j])
                near, far = (kl_divergence(anchor, product(rows)).sum().item() for rows in (own[i], own[j]))
                pairs.append(max(near - far + 0.7, 0))
    score, z, kl = torch.rand(4, 24, generator=stream), [], 0.0
    noise = torch.randn(4, 3, generator=stream).double()
    latents = torch.randn(4, 8, LATENT, generator=stream).double().numpy().clip(-0.5, 0.5)
    for i in range(4):
        usable = [(float(score[i, 6 * j + k]), j, k) for j in range(4) if DRAWN[i] != DRAWN[j] for k in range(6)]
        others = [moved[i, j][k] for _, j, k in sorted(usable, reverse=True)[:6]]
        q = product(np.concatenate([own[i], others]))
        z.append((q.mean + q.stddev * noise[i]).numpy())
        kl += kl_divergence(q, Normal(torch.zeros(3).double(), torch.ones(3).double())).sum().item()
    value_errors, decoded_errors, shift_errors = [], [], []
    for i, task in enumerate(DRAWN):
        for j in range(8):
            state, action = side(t.observation[i, j]), side(t.action[i, j])
            goal = double(teachers.q, side(state, action), task).item()
            value_errors.append((double(student.q, side(state, z[i], action)).item() - goal) ** 2)
            action = np.tanh(double(teachers.decode, side(state, latents[i, j]), task))
            decoded = np.tanh(double(student.decode, side(state, z[i], latents[i, j])))
            decoded_errors.append((decoded - action) ** 2)
            goals = np.tanh(double(teachers.shift, side(state, action), task))
            shift_errors.append((np.tanh(double(student.shift, side(state, z[i], action))) - goals) ** 2)
    scalars = {name: float(value) for name, value in update(algorithm, batch).items()}
    assert scalars["triplet_loss"] == pytest.approx(np.mean(pairs), rel=1e-3, abs=1e-6)
    assert scalars["triplet_loss"] > 0
    assert scalars["kl"] == pytest.approx(kl, rel=1e-4)
    assert scalars["distill_q_loss"] == pytest.approx(np.mean(value_errors), rel=1e-3)
    assert scalars["distill_action_loss"] == pytest.approx(np.mean(decoded_errors) + np.mean(shift_errors), rel=1e-3)
    assert scalars["usable"] == pytest.approx(10 / 16)  # ordered pairs of different tasks among 0, 2, 2, 1


def test_rows_that_the_ensemble_disagrees_on_are_left_out():
    everything, nothing = (make(bcq_steps=0, threshold=threshold, margin=0.7) for threshold in (1e9, 1e-9))
    own = nothing.student.encoder(made_batch()["context"].rows(False).reshape(24, -1)).detach().double().numpy()
    expected = sum(
        kl_divergence(product(rows), Normal(torch.zeros(3).double(), torch.ones(3).double())).sum().item()
        for rows in own.reshape(4, 6, 6)
    )
    scalars = update(nothing, made_batch())
    assert float(scalars["usable"]) == 0
    assert float(scalars["triplet_loss"]) == pytest.approx(0.7)  # the constant margin
    assert float(scalars["kl"]) == pytest.approx(expected, rel=1e-4)  # the true rows alone
    assert float(update(everything, made_batch())["kl"]) != pytest.approx(expected, rel=1e-2)


def test_doubt_about_the_next_state_counts_where_the_context_holds_it():
    batch = made_batch(with_next=True)
    algorithm = make(with_next=True, next_threshold=1e-9)
    assert float(algorithm.relabelled(batch["context"], batch["context"].task)[1].sum()) == 0
    rows, usable = make(with_next=True).relabelled(batch["context"], batch["context"].task)
    assert rows.shape == (4, 4, 6, 7)
    assert float(usable.mean()) == pytest.approx(10 / 16)


def test_one_task_alone_has_no_triplet():
    scalars = update(make(bcq_steps=0), made_batch(drawn=(1, 1, 1, 1)))
    assert float(scalars["triplet_loss"]) == 0
    assert float(scalars["usable"]) == 0


def test_imitation_does_not_train_the_encoder():
    one, two = make(bcq_steps=0), make(bcq_steps=0)
    with torch.no_grad():
        two.teachers.decode.biases[-1].add_(0.5)
    for algorithm in (one, two):
        update(algorithm, made_batch())
    for name, alike in (("encoder", True), ("q", True), ("decode", False)):
        gradients = [[p.grad for p in getattr(a.student, name).parameters()] for a in (one, two)]
        assert same(*gradients) == alike, name


@pytest.mark.parametrize("values", [{"margin": 0.0}, {"kl_weight": 1.0}], ids=str)
def test_triplet_and_prior_train_the_encoder_and_not_the_student(values):
    one, two = make(bcq_steps=0), make(bcq_steps=0, **values)
    for algorithm in (one, two):
        update(algorithm, made_batch())
    for name, alike in (("encoder", False), ("q", True), ("decode", True), ("shift", True)):
        gradients = [[p.grad for p in getattr(a.student, name).parameters()] for a in (one, two)]
        assert same(*gradients) == alike, name


# --- phases ------------------------------------------------------------------------------------------------------


def test_the_phase_that_rests_is_not_computed():
    for steps, resting in ((5, "student"), (0, "teachers")):
        algorithm = make(bcq_steps=steps)
        parts = algorithm.student if resting == "student" else algorithm.teachers
        unused = [*parts.children()] if resting == "student" else [parts.encode, parts.target_q, parts.target_shift]
        with torch.no_grad():
            for net in unused:
                for parameter in net.parameters():
                    parameter.fill_(float("nan"))
        scalars = update(algorithm, made_batch())
        assert all(torch.isfinite(value) for value in scalars.values()), resting
        assert all(p.grad is None for p in parts.parameters())
        assert {name.startswith(resting) for name, o in algorithm.optimizers().items() if o.state} == {False}


def test_the_curve_keeps_its_columns_across_the_change_of_phase():
    algorithm, curve = make(bcq_steps=3), Curve()
    for step in range(1, 7):
        curve.add(update(algorithm, made_batch(step), "teachers" if step <= 3 else "student"))
        curve.close(step, algorithm.phases(6)[step > 3].name)
    rows = list(csv.DictReader(io.StringIO(curve.text())))
    assert [row["phase"] for row in rows] == ["teachers"] * 3 + ["student"] * 3
    first, last = rows[0], rows[-1]
    assert first["triplet_loss"] == first["kl"] == first["distill_q_loss"] == ""
    assert last["vae_loss"] == last["q_loss"] == last["model_loss"] == ""
    assert float(first["q_loss"]) > 0
    assert float(last["distill_q_loss"]) > 0


# --- acting ------------------------------------------------------------------------------------------------------


def test_acting_takes_the_candidate_of_the_largest_q_in_double_precision():
    algorithm, observation = make(perturbation=0.4), made_batch()["transitions"].observation
    student, stream = algorithm.student, algorithm.generators()["noise"].get_state()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    actions, places = algorithm.actions(observation, z), set()
    for i in range(4):
        for j in range(8):
            state, found = side(observation[i, j], z[i]), []
            for latent in student.latents:
                candidate = np.tanh(double(student.decode, side(state, latent)))
                moved = (candidate + 0.4 * np.tanh(double(student.shift, side(state, candidate)))).clip(-1, 1)
                found.append((double(student.q, side(state, moved)).item(), moved[0]))
            place = int(np.argmax([value for value, _ in found]))
            places.add(place)
            np.testing.assert_allclose(actions[i, j].numpy(), found[place][1], atol=1e-5)
    assert len(places) > 1
    assert torch.equal(algorithm.actions(observation, z), actions)
    assert torch.equal(algorithm.generators()["noise"].get_state(), stream)


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"tasks": 1}, {"bcq_steps": -1}, {"latent_dim": 0}, {"ensemble": 1}, {"ensemble_width": 0}, {"rate": 0.0},
     {"gamma": 1.1}, {"reward_scale": 0.0}, {"tau": 0.0}, {"soft_min": 1.1}, {"candidates": 0},
     {"perturbation": -0.1}, {"vae_latent": 0}, {"vae_clip": 0.0}, {"vae_kl": -1.0}, {"threshold": 0.0},
     {"next_threshold": 0.0}, {"margin": -1.0}, {"kl_weight": -1.0}, {"meta_batch": 1}, {"context_batch": 0}],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(UserError, match=key):
        make(**values)


def test_too_few_tasks_are_named():
    config = make(tasks=2).config
    assert Mbml.check(config, Spec(2, 2, False, tasks=3), 100) == "tasks = 2: expected tasks.train = 3"


def test_the_number_of_tasks_has_no_default():
    with pytest.raises(UserError, match="tasks"):
        create("mbml", {}, Spec(2, 2, False), 0, "cpu")


# --- golden numbers ----------------------------------------------------------------------------------------------

# A change here is a change of results: see CONTRIBUTING.md, "Changes that move results". To refresh, run this
# test and copy the dictionary that its failure prints. The tolerance covers other CPUs' kernels.
GOLDEN: dict[str, dict[str, float]] = {
    "teach": {
        "vae_loss": 0.3940342,
        "q_loss": 2.460059,
        "model_loss": 0.5831104,
        "q_mean": 0.05851147,
        "gradient_decode": 0.3496035,
        "gradient_shift": 0.001524319,
        "gradient_q": 0.9297972,
        "gradient_models": 0.3299415,
        "action_0": -0.08930444,
        "action_1": 0.08845668,
    },
    "distill": {
        "triplet_loss": 0.7072254,
        "usable": 0.625,
        "kl": 11.53469,
        "distill_q_loss": 0.01433571,
        "distill_action_loss": 0.05085855,
        "z_rms": 0.3132727,
        "q_mean": 0.1580093,
        "gradient_decode": 0.3017315,
        "gradient_shift": 0.1323981,
        "gradient_q": 0.2890843,
        "gradient_encoder": 0.3316639,
        "action_0": -0.0863459,
        "action_1": 0.08119627,
    },
    "distill next": {
        "triplet_loss": 0.7035233,
        "usable": 0.625,
        "kl": 11.80545,
        "distill_q_loss": 0.004708908,
        "distill_action_loss": 0.04876628,
        "z_rms": 0.3001907,
        "q_mean": 0.0660647,
        "gradient_decode": 0.08115555,
        "gradient_shift": 0.2876582,
        "gradient_q": 0.04663527,
        "gradient_encoder": 0.4020495,
        "action_0": 0.09509596,
        "action_1": 0.01177384,
    },
}


@pytest.mark.parametrize(("phase", "with_next"), [("teach", False), ("distill", False), ("distill next", True)])
def test_golden_numbers(phase, with_next):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        algorithm = make(with_next=with_next, bcq_steps=3 if phase == "teach" else 1, margin=0.7)
        for i in range(3):
            taught = phase == "teach" or i == 0
            scalars = update(algorithm, made_batch(i, with_next), "teachers" if taught else "student")
        batch = made_batch(9, with_next)
        action = algorithm.actions(batch["transitions"].observation, algorithm.infer(batch["context"]))[0, 0]
    finally:
        torch.set_num_threads(threads)
    got = {name: float(value) for name, value in scalars.items()}
    part = algorithm.teachers if phase == "teach" else algorithm.student
    for name in ("decode", "shift", "q", "models" if phase == "teach" else "encoder"):
        norms = [p.grad.norm() for p in getattr(part, name).parameters()]
        got[f"gradient_{name}"] = float(torch.stack(norms).norm())
    got |= {"action_0": float(action[0]), "action_1": float(action[1])}
    text = json.dumps({name: float(f"{value:.7g}") for name, value in got.items()}, indent=4)
    assert got == pytest.approx(GOLDEN.get(phase, {}), rel=2e-4, abs=1e-7), f"if this change is meant: {text}"
