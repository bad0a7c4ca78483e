"""Meta-steps per second of MACAW: adapted weights in closed form against materialized ones, on the same work.

The reference reads like the pseudo-code: a Python loop over the tasks of the meta-batch, every tensor of every layer
copied by the inner step, hyper-matrices included, and the default Adam. ``tests/test_macaw.py`` holds the two to the
same losses and gradients. Both draw their batches.

Cost of a step with m tasks, n inner and n outer rows, P generated weights (both networks) and latents of c entries.
Written out, an inner step makes a P x c matrix per task, and its graph goes over several of them: 4 m P c bytes each.
In closed form the products with H are all that is left of it, shared by the tasks, about 3 P c (m + 1) multiplications
forward and twice that backward, beside 3 x 3 m n P for the rows; and Adam passes over P c numbers (about 28 bytes
each: weight, gradient and two moments read, weight and two moments written). At the published sizes (Half-Cheetah,
width and latent 100, m = 5, n = 256: P c = 4.9 million) that is about 1.2 and 0.9 GFLOP, and 140 MB moved.

One thread is timed by processor time, on which other work on the machine has little influence; two by the wall clock.

Usage: python benchmarks/macaw.py [SECONDS per measurement, default 8] [THREADS, default 1 and 2]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from omrl.algorithms.base import Spec, create
from omrl.algorithms.macaw import Macaw
from omrl.core.allocator import keep_memory
from omrl.data.taskdata import TaskData
from omrl.learning.sampler import Sampler
from omrl.learning.train import make_sampler
from omrl.nets.experience import Experience
from omrl.nets.transforms import Adaptive

TASKS, ROWS, HORIZON = 10, 4000, 200
CASES: dict[str, tuple[Spec, dict[str, Any]]] = {
    "Half-Cheetah, 100, 100": (Spec(20, 6, False, 200, TASKS), {}),
    "Half-Cheetah, 64, 32": (Spec(20, 6, False, 200, TASKS), {"width": 64, "latent_dim": 32}),
    "Point-Robot, 64, 32": (Spec(2, 2, False, 20, TASKS), {"width": 64, "latent_dim": 32}),
}

Tensors = list[dict[str, Tensor]]  # of every layer, by name


class Reference:
    """One meta-step as written, for each task with tensors of its own."""

    def __init__(self, algorithm: Macaw) -> None:
        self.config, self.tasks = algorithm.settings, algorithm.spec.tasks
        self.value, self.value_rho = self._copy(algorithm.value)
        self.policy, self.policy_rho = self._copy(algorithm.policy)
        self.shapes = {
            name: [(layer.inputs, layer.outputs) for layer in net.layers]
            for name, net in (("value", algorithm.value), ("policy", algorithm.policy))
        }
        self.kappa = None if algorithm.coefficient is None else algorithm.coefficient.kappa.detach().clone()
        groups = [(self._all(self.value), 1e-5), (self._all(self.policy), 1e-4)]
        groups += [(self.value_rho, 1e-3), (self.policy_rho, 1e-3)]
        if self.kappa is not None:
            groups.append(([self.kappa.requires_grad_()], 1e-3))
        self.adam = [torch.optim.Adam(tensors, lr=rate) for tensors, rate in groups]

    @staticmethod
    def _copy(net: Adaptive) -> tuple[Tensors, list[Tensor]]:
        tensors = [
            {
                name: tensor.detach().clone().requires_grad_()
                for name, tensor in layer.named_parameters()
                if name != "rates"
            }
            for layer in net.layers
        ]
        return tensors, [layer.rates.detach().clone().requires_grad_() for layer in net.layers]

    @staticmethod
    def _all(layers: Tensors) -> list[Tensor]:
        return [tensor for layer in layers for tensor in layer.values()]

    @staticmethod
    def linear(layer: dict[str, Tensor], shape: tuple[int, int], x: Tensor) -> Tensor:
        """Apply a layer to x [n, inputs]."""
        inputs, outputs = shape
        made = layer["hyper"] @ layer["latent"] + layer["base"] if "hyper" in layer else layer["base"]
        if "weight" in layer:
            return x @ layer["weight"].view(inputs, outputs) + made
        return x @ made[: inputs * outputs].view(inputs, outputs) + made[inputs * outputs :]

    def v(self, layers: Tensors, x: Tensor) -> Tensor:
        """Return values [n]."""
        for i, (layer, shape) in enumerate(zip(layers, self.shapes["value"], strict=True)):
            x = self.linear(layer, shape, x.relu() if i else x)
        return x[:, 0]

    def pi(self, layers: Tensors, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return log pi and the advantage head's output."""
        shapes, depth = self.shapes["policy"], self.config.depth
        for i in range(depth):
            x = self.linear(layers[i], shapes[i], x.relu() if i else x)
        mean = torch.tanh(self.linear(layers[depth], shapes[depth], x.relu()))
        log_pi = torch.distributions.Normal(mean, self.config.policy_std).log_prob(action).sum(-1)
        if self.kappa is None:
            return log_pi, None
        y = self.linear(layers[depth + 1], shapes[depth + 1], torch.cat([x, action], 1).relu())
        return log_pi, self.linear(layers[depth + 2], shapes[depth + 2], y.relu())[:, 0]

    @staticmethod
    def sgd(layers: Tensors, rho: list[Tensor], loss: Tensor) -> Tensors:
        """Return the tensors after a step of gradient descent, graph kept."""
        found = iter(torch.autograd.grad(loss, Reference._all(layers), create_graph=True))
        return [
            {name: t - functional.softplus(r[i]) * next(found) for i, (name, t) in enumerate(layer.items())}
            for layer, r in zip(layers, rho, strict=True)
        ]

    def weights(self, advantage: Tensor) -> Tensor:
        """Return the advantage weights [n]."""
        normal = (advantage - advantage.mean()) / advantage.std()
        return (normal / self.config.temperature).clamp(max=math.log(self.config.largest_weight)).exp()

    def adapted(self, inner: list[dict[str, Tensor]]) -> tuple[Tensors, Tensors, Tensors]:
        """Return value function, its target and policy after the inner steps on one task's parts."""
        value, target = self.value, [{n: t.detach() for n, t in layer.items()} for layer in self.value]
        for d in inner:
            value = self.sgd(value, self.value_rho, (self.v(value, d["s"]) - d["g"]).square().mean())
            target = [
                {n: 0.9 * old[n] + 0.1 * t.detach() for n, t in new.items()}
                for old, new in zip(target, value, strict=True)
            ]
        policy = self.policy
        for d in inner:
            a = self.advantage(value, d)
            log_pi, head = self.pi(policy, d["s"], d["a"])
            loss = -(self.weights(a) * log_pi).mean()
            if head is not None and self.kappa is not None:
                loss = loss + functional.softplus(self.kappa) * (head - a).square().mean()
            policy = self.sgd(policy, self.policy_rho, loss)
        return value, target, policy

    @torch.no_grad()
    def advantage(self, value: Tensors, d: dict[str, Tensor]) -> Tensor:
        """Return A [n]."""
        return d["g"] + d["d"] * self.v(value, d["last"]) - self.v(value, d["s"])

    def losses(self, batch: Mapping[str, Experience]) -> tuple[Tensor, Tensor]:
        """Return the outer losses of value function and policy."""
        total = []
        for task in range(batch["inner"].shape[0]):
            value, target, policy = self.adapted(parts(batch["inner"], task, self.config.steps))
            (d,) = parts(batch["outer"], task, 1)
            with torch.no_grad():
                goal = d["g"] + d["d"] * self.v(target, d["last"])
            value_loss = (self.v(value, d["s"]) - goal).square().mean()
            log_pi, _ = self.pi(policy, d["s"], d["a"])
            policy_loss = -(self.weights(self.advantage(value, d)) * log_pi).mean()
            total.append(torch.stack([value_loss, policy_loss]) / self.tasks)
        value_loss, policy_loss = torch.stack(total).sum(0)
        return value_loss, policy_loss

    def step(self, batch: Mapping[str, Experience]) -> None:
        """Take one meta-step."""
        for adam in self.adam:
            adam.zero_grad()
        sum(self.losses(batch)).backward()  # type: ignore[union-attr]
        for adam in self.adam:
            adam.step()


def parts(drawn: Experience, task: int, steps: int) -> list[dict[str, Tensor]]:
    """Return one task's rows, in equal parts."""
    rows = {
        "s": drawn.observation[task], "a": drawn.action[task], "g": drawn.extra["return_to_go"][task, :, 0],
        "d": drawn.extra["discount_to_end"][task, :, 0], "last": drawn.extra["last_observation"][task],
    }  # fmt: skip
    size = drawn.shape[1] // steps
    return [{name: x[i * size : (i + 1) * size] for name, x in rows.items()} for i in range(steps)]


def data(spec: Spec) -> TaskData:
    """Return random episodes."""
    rng = np.random.default_rng(0)

    def column(*width: int) -> np.ndarray:
        return rng.normal(size=(TASKS, ROWS, *width)).astype(np.float32)

    start = np.broadcast_to(np.arange(ROWS) // HORIZON * HORIZON, (TASKS, ROWS))
    return TaskData(
        tuple(range(TASKS)), column(spec.observation), np.tanh(column(spec.action)), column(), column(),
        column(spec.observation), np.zeros((TASKS, ROWS), np.float32), np.zeros((TASKS, ROWS), np.int32),
        (np.arange(ROWS) - start).astype(np.int32), start, start + HORIZON,
    )  # fmt: skip


def both(spec: Spec, values: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return a step of each."""
    algorithm = create("macaw", values, spec, 0, "cpu")
    assert isinstance(algorithm, Macaw)
    sampler: Sampler = make_sampler(algorithm, {"transitions": data(spec)}, 0)
    reference, (phase,) = Reference(algorithm), algorithm.phases(1)
    return {
        "ours": lambda: algorithm.update(phase, sampler.draw(phase)),
        "reference": lambda: reference.step(sampler.draw(phase)),
    }


def rates(steps: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Return steps per second of each, the best of four turns, so that a busy moment meets both."""
    best = dict.fromkeys(steps, 0.0)
    for step in steps.values():
        step()
    for _ in range(4):
        for name, step in steps.items():
            count, start = 0, clock()
            while clock() - start < seconds / 4:
                step()
                count += 1
            best[name] = max(best[name], count / (clock() - start))
    return best


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    threads = [int(x) for x in sys.argv[2:]] or [1, 2]
    keep_memory()
    print(f"{'case: width, latent':<26}{'threads':>8}{'ours':>8}{'reference':>11}{'ratio':>7}   meta-steps/s")
    for name, (spec, values) in CASES.items():
        for count in threads:
            torch.set_num_threads(count)
            found = rates(both(spec, values), seconds, time.process_time if count == 1 else time.perf_counter)
            ratio = found["ours"] / found["reference"]
            print(f"{name:<26}{count:>8}{found['ours']:>8.1f}{found['reference']:>11.1f}{ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
