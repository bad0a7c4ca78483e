"""Context from other tasks' behavior policies, with this task's reward (CSRO, UNICORN).

The out-of-distribution test of CSRO and UNICORN: as ``offline-context``, with transitions that other training tasks'
behavior policies made. The reward is this task's, computed by the family's own function; where tasks differ in reward
alone, that is what a rollout of those policies in this task would hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from omrl.core.errors import UserError
from omrl.envs.simulate import Episodes
from omrl.evaluation.protocols.base import Run
from omrl.evaluation.protocols.offline_context import OfflineConfig, run_offline
from omrl.nets.experience import Experience, from_arrays


def other_tasks_context(
    run: Run, features: NDArray[np.float32], count: int, rngs: Sequence[np.random.Generator]
) -> Experience:
    """Return ``count`` transitions per task, made by the policies of other training tasks, with this task's rewards."""
    data, training = run.data, np.array(run.training())
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for place, (task, rng) in enumerate(zip(run.tasks, rngs, strict=True)):
        others = training[training != place]
        source, row = others[rng.integers(len(others), size=count)], rng.integers(data.rows, size=count)
        moved = {
            name: getattr(data, name)[source, row] for name in ("observation", "action", "next_observation", "terminal")
        }
        dense, sparse = run.family.reward(
            task["parameters"], moved["observation"], moved["action"], moved["next_observation"], features[source, row]
        )
        signal = dense if data.inference == "dense" else sparse
        for name, values in {**moved, "reward": dense, "signal": signal}.items():
            parts.setdefault(name, []).append(values)
    return from_arrays({name: np.stack(values) for name, values in parts.items()}, run.algorithm.device)


def run(run: Run) -> Episodes:
    """Run the protocol on all tasks at once; return the last episode.

    Raises:
        UserError: tasks differ in their dynamics, or there is no other task to take transitions from.
    """
    if run.family.varies != "reward":
        raise UserError(
            f"ood-checkpoint: tasks of '{run.family.name}' differ in their dynamics, so transitions of one task cannot "
            "be the context of another; expected another protocol"
        )
    if len(run.training()) < 2:
        raise UserError("ood-checkpoint: transitions come from other training tasks; expected 2 training tasks or more")
    features = run.features
    if features is None:
        raise ValueError("ood-checkpoint needs what the reward function reads beside the transitions")
    return run_offline(run, lambda total, rngs: other_tasks_context(run, features, total, rngs))


CONFIG = OfflineConfig
