"""What every family promises, tried on one step, so that a slip of its author is told before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from omrl.core import seeding
from omrl.core.errors import UserError, shown
from omrl.envs.base import Family, Task

_COPIES = 2
_WORDS = {"varies": ("reward", "dynamics"), "returns": ("dense", "sparse"), "inference_reward": ("dense", "sparse")}


def check_contract(family: Family, tasks: Sequence[Task]) -> None:
    """Take a step in the first and the last task and compare what comes back with ``Family`` and ``StepResult``.

    Args:
        family: one of ours or of a plug-in.
        tasks: parameters, one or more.

    Raises:
        UserError: one line that names the method or attribute, what it gave and what was expected.
    """
    for name, words in _WORDS.items():
        value = getattr(family, name, None)
        if value not in words:
            raise UserError(f"environment '{family.name}': {name} = {shown(value)}: expected {' or '.join(words)}")
    for task in tasks:
        _check_task(family, task)
    chosen = [tasks[0], tasks[-1]]
    count = len(chosen) * _COPIES
    env = family.batch(chosen, _COPIES)
    observation = _array(
        family, "reset", env.reset([seeding.generator(0, "contract", i) for i in range(count)]),
        (count, family.observation_size),
    )  # fmt: skip
    rng = seeding.generator(0, "contract", "action")
    action = rng.uniform(-1, 1, (count, family.action_size)).astype(np.float32)
    result = env.step(action)
    following = _array(family, "step: next_observation", result.next_observation, observation.shape)
    rewards = [_array(family, f"step: {name}", getattr(result, name), (count,)) for name in ("reward", "sparse_reward")]
    _array(family, "step: terminated", result.terminated, (count,), np.bool_)
    features = _array(family, "step: features", result.features, (count, family.feature_size))
    if family.varies == "reward":
        for place, task in enumerate(chosen):
            rows = slice(place * _COPIES, (place + 1) * _COPIES)
            again = family.reward(task, observation[rows], action[rows], following[rows], features[rows])
            for name, stepped, value in zip(("dense", "sparse"), rewards, again, strict=True):
                _array(family, f"reward: {name}", value, (_COPIES,))
                if not np.array_equal(value, stepped[rows]):
                    raise UserError(
                        f"environment '{family.name}': reward: {name} = {shown(value.tolist())} of a step that had "
                        f"{shown(stepped[rows].tolist())}: expected the same bits, relabelling calls it for stepping"
                    )


def _check_task(family: Family, task: Task) -> None:
    for key, value in task.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise UserError(
                f"environment '{family.name}': sample: {key} = {shown(value)} ({type(value).__name__}): expected "
                "numbers, text or lists of them, as JSON has"
            ) from None


def _array(family: Family, what: str, value: Any, shape: tuple[int, ...], kind: type = np.float32) -> Any:
    """Return ``value`` if it is an array of that shape and type with finite numbers."""
    expected = f"expected {np.dtype(kind).name} {list(shape)}"
    if not isinstance(value, np.ndarray):
        raise UserError(f"environment '{family.name}': {what} gave {type(value).__name__}: {expected}")
    if value.shape != shape or value.dtype != kind:
        raise UserError(f"environment '{family.name}': {what} gave {value.dtype} {list(value.shape)}: {expected}")
    if not np.isfinite(value).all():
        raise UserError(f"environment '{family.name}': {what} gave a number that is not finite: {expected}, finite")
    return value
