"""One measurement of ``engines.py``, in a process of its own on one core: ``python _peer.py WHO SETTINGS``.

``WHO`` is ``sb3`` or ``sbx``, whose SAC has the same interface, or ``batched``. ``SETTINGS`` is JSON: ``core``, ``env``,
``horizon``, ``sac`` (resolved ``behavior.sac``), ``tasks``, ``kernels``, ``seconds``. Prints JSON: ``steps``, task-steps
with one gradient step each per second of processor time; for ``batched`` also ``peak``, the floating-point operations
per second of one large matrix product, and ``operations``, those in the products of a task-step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 30  # steps with an update that are not timed: compilation, first touch of memory


def rate(step: Callable[[], Any], seconds: float, slices: int = 4) -> float:
    """Return calls per second of processor time, the best of some slices."""
    best = 0.0
    for _ in range(slices):
        count, start = 0, time.process_time()
        while (spent := time.process_time() - start) < seconds / slices:
            step()
            count += 1
        best = max(best, count / spent)
    return best


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

    class Clock(BaseCallback):
        rate, since, start = 0.0, 0, 0.0

        def _on_step(self) -> bool:
            if self.n_calls < first:
                return True
            now = time.process_time()
            if self.n_calls > first and now - self.start < settings["seconds"] / 4:
                return True
            if self.n_calls > first:
                self.rate = max(self.rate, (self.n_calls - self.since) / (now - self.start))
                self.slices += 1
            else:
                self.slices = 0
            self.since, self.start = self.n_calls, now
            return self.slices < 4

    family = load_family(settings["env"])
    env = family.make(family.sample(0, 1337), settings["horizon"])
    sac["policy_kwargs"] = {"net_arch": sac.pop("net_arch")}
    sac["buffer_size"] = sac["buffer_size"] or 20_000
    clock = Clock()
    SAC("MlpPolicy", env, seed=0, device="cpu", **sac).learn(10**7, callback=clock)
    return {"steps": clock.rate}


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
    set_kernels(settings["kernels"])
    family, tasks = load_family(settings["env"]), settings["tasks"]
    values = {"total_steps": 20_000, "checkpoint_every": 20_000, "horizon": settings["horizon"]}
    config = BehaviorConfig.model_validate({**values, "sac": settings["sac"]})
    runs = [Run(task, family.sample(task, 1337), task, "") for task in range(tasks)]
    group = Group(family, runs, config, torch.device("cpu"))
    for _ in range(config.sac.learning_starts + WARM_UP):
        group.advance()
    with FlopCounterMode(display=False) as counter:
        group.advance()
    steps = rate(group.advance, settings["seconds"]) * tasks
    one, two, out = (torch.randn(2048, 2048) for _ in range(3))
    products = rate(lambda: torch.mm(one, two, out=out), 2.0)
    return {"steps": steps, "peak": products * 2 * 2048**3, "operations": counter.get_total_flops() / tasks}


if __name__ == "__main__":
    who, settings = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, {settings["core"]})
    print(json.dumps(batched(settings) if who == "batched" else peer(who, settings)))
