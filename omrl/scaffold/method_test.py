"""The method learns two tasks that its context alone can tell apart, and is saved whole."""

from __future__ import annotations

from pathlib import Path

import torch

from omrl.algorithms.base import Spec, load_model, save_model
from omrl.nets.experience import Experience
from omrl.scaffold.method import ALGORITHM, CONFIG, Method

SPEC = Spec(observation=2, action=1, context_next_observation=False, tasks=2)


def experience(rows: int, seed: int) -> Experience:
    """Return transitions [2, rows]: the first task's actions and rewards are 0.8, the second's -0.8."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.tensor([0.8, -0.8])[:, None].expand(2, rows)
    seen = torch.randn(2, rows, 2, generator=generator)
    return Experience(seen, sign.unsqueeze(-1), sign, seen, torch.zeros(2, rows), sign, torch.arange(2))


def trained(steps: int) -> Method:
    """Return the method after some updates."""
    torch.set_num_threads(1)  # nets this small are no faster with two
    method = ALGORITHM(CONFIG(width=16), SPEC, 0, "cpu")
    (phase,) = method.phases(steps)
    for step in range(steps):
        method.update(phase, {"transitions": experience(16, step), "context": experience(8, -step)})
    return method


def test_it_tells_two_tasks_apart() -> None:
    """Its actions are each task's own after adapting, and are not before."""
    method, observation = trained(200), torch.zeros(2, 2)
    action = method.act(method.adapt(method.prior(2), experience(8, 12345)), observation).squeeze(-1)
    assert (action - torch.tensor([0.8, -0.8])).abs().max() < 0.2
    unadapted = method.act(method.prior(2), observation)
    assert torch.equal(unadapted[0], unadapted[1])


def test_a_saved_model_acts_alike(tmp_path: Path) -> None:
    """What comes back from the folder is the same method with the same weights."""
    method = trained(3)
    save_model(method, tmp_path, "mine", Method.__module__)
    again, context = load_model(tmp_path, "cpu"), experience(8, 5)
    belief = method.adapt(method.prior(2), context)
    assert torch.equal(again.adapt(again.prior(2), context), belief)
    assert torch.equal(again.act(belief, torch.ones(2, 2)), method.act(belief, torch.ones(2, 2)))
