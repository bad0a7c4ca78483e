"""One measurement of ``engines.py``, in a process of its own on one core: ``python _peer.py WHO SETTINGS``.

``WHO`` is ``sb3`` or ``sbx``, whose SAC has the same interface, or ``batched``. ``SETTINGS`` is JSON: ``core``,
``env``, ``horizon``, ``sac`` (resolved ``behavior.sac``), ``seconds``, ``tasks`` (SB3 and SBX train one of them); for
``batched`` also ``matmul``.
Prints JSON: ``steps``, task-steps with one gradient step each per second of processor time; for ``batched`` also
``peak``, the floating-point operations per second of one large matrix product, and ``operations``, those in the
products of a task-step. Processor time on a busy machine still pays for caches that others have emptied, so all
engines are timed in pieces of ``tasks`` task-steps, and the first percentile of the pieces counts. Single steps would
not do for SBX: JAX works behind the caller's back, and a step's work may be done in the next one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

STEPS = 20_000  # at most; the replay buffer has as many rows
WARM_UP = 30  # steps with an update that are not timed: compilation, first touch of memory


def fast(seconds: list[float]) -> float:
    """Return a piece's processor time when nothing disturbs it: one in a hundred is faster."""
    return sorted(seconds)[len(seconds) // 100]


def timed(step: Callable[[], Any], seconds: float) -> float:
    """Return the processor seconds of a call, from as many as fit into ``seconds`` of processor time."""
    times: list[float] = []
    while sum(times) < seconds:
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return fast(times)


def peer(who: str, settings: dict[str, Any]) -> dict[str, float]:
    """Time SB3 or SBX on one task, from inside its own ``learn``."""
    if who == "sbx":
        from sbx import SAC
    else:
        import torch
        from stable_baselines3 import SAC

        torch.set_num_threads(1)
    from stable_baselines3.common.callbacks import BaseCallback

    from omrl.envs.base import load_family

    sac = dict(settings["sac"])
    first = sac["learning_starts"] + WARM_UP
    moments: list[float] = []

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls >= first and (self.n_calls - first) % settings["tasks"] == 0:
                moments.append(time.process_time())
            return not moments or moments[-1] - moments[0] < settings["seconds"]

    family = load_family(settings["env"])
    env = family.make(family.sample(0, 1337), settings["horizon"])
    sac["policy_kwargs"] = {"net_arch": sac.pop("net_arch")}
    sac["buffer_size"] = STEPS
    SAC("MlpPolicy", env, seed=0, device="cpu", **sac).learn(STEPS, callback=Clock())
    return {"steps": settings["tasks"] / fast([after - before for before, after in pairwise(moments)])}


def batched(settings: dict[str, Any]) -> dict[str, float]:
    """Time the batched engine on some tasks."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from omrl.behavior.base import BehaviorConfig, Run
    from omrl.behavior.batched import Group
    from omrl.core.allocator import keep_memory
    from omrl.core.precision import set_kernels
    from omrl.envs.base import load_family

    keep_memory()
    torch.set_num_threads(1)
    set_kernels(settings["matmul"])
    family, tasks = load_family(settings["env"]), settings["tasks"]
    values = {"total_steps": STEPS, "checkpoint_every": STEPS, "horizon": settings["horizon"]}
    config = BehaviorConfig.model_validate({**values, "sac": settings["sac"]})
    runs = [Run(task, family.sample(task, 1337), task, "") for task in range(tasks)]
    group = Group(family, runs, config, torch.device("cpu"))
    for _ in range(config.sac.learning_starts + WARM_UP):
        group.advance()
    with FlopCounterMode(display=False) as counter:
        group.advance()
    step = timed(group.advance, settings["seconds"])
    one, two, out = (torch.randn(1024, 1024) for _ in range(3))
    product = timed(lambda: torch.mm(one, two, out=out), 1.0)
    return {"steps": tasks / step, "peak": 2 * 1024**3 / product, "operations": counter.get_total_flops() / tasks}


if __name__ == "__main__":
    who, settings = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, {settings["core"]})
    print(json.dumps(batched(settings) if who == "batched" else peer(who, settings)))
