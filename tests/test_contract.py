"""A family's contract: ours keep it, and each way to break it is one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from test_envs import ALL

from omrl.core.errors import UserError
from omrl.envs.base import Family, load_family
from omrl.envs.contract import check_contract


@pytest.mark.parametrize("name", ALL)
def test_our_families_keep_it(name):
    family = load_family(name)
    check_contract(family, family.tasks(2, 2, 1337))


def broken(**results: Any) -> Family:
    """Return the point robot with fields of its step replaced by what the functions of them give."""
    family = load_family("sparse-point-robot")
    batch = family.batch

    def make(*args: Any, **kwargs: Any) -> Any:
        env = batch(*args, **kwargs)
        step, reset = env.step, env.reset
        env.step = lambda action: dataclasses.replace(
            result := step(action), **{k: f(getattr(result, k)) for k, f in results.items() if k != "reset"}
        )
        env.reset = lambda *a: results.get("reset", lambda x: x)(reset(*a))
        return env

    family.batch = make
    return family


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"reset": lambda x: x.astype(np.float64)}, r"reset gave float64 \[4, 2\]: expected float32 \[4, 2\]"),
        (
            {"next_observation": lambda x: x[:, :1]},
            r"next_observation gave float32 \[4, 1\]: expected float32 \[4, 2\]",
        ),
        ({"reward": lambda x: x[:, None]}, r"step: reward gave float32 \[4, 1\]: expected float32 \[4\]"),
        ({"reward": lambda x: x * np.float32("nan")}, r"step: reward gave a number that is not finite"),
        ({"sparse_reward": lambda x: x.tolist()}, r"step: sparse_reward gave list: expected float32 \[4\]"),
        ({"terminated": lambda x: x.astype(np.float32)}, r"terminated gave float32 \[4\]: expected bool \[4\]"),
        ({"features": lambda x: np.zeros((4, 1), np.float32)}, r"features gave float32 \[4, 1\]: expected .*\[4, 0\]"),
        ({"reward": lambda x: x + np.float32(1e-3)}, r"reward: dense = .*: expected the same bits, relabelling"),
    ],
)
def test_a_slip_is_one_line(results, message):
    family = broken(**results)
    with pytest.raises(UserError, match=f"environment 'sparse-point-robot': .*{message}"):
        check_contract(family, family.tasks(2, 1, 0))


def test_words_and_tasks_are_checked():
    family = load_family("sparse-point-robot")
    with pytest.raises(UserError, match=r"sample: goal = .*\(ndarray\): expected numbers, text or lists of them"):
        check_contract(family, [{"goal": np.zeros(2)}])
    family.varies = "goal"  # type: ignore[misc]
    with pytest.raises(UserError, match=r"varies = 'goal': expected reward or dynamics"):
        check_contract(family, family.tasks(1, 1, 0))
