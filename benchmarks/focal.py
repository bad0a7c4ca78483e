"""Gradient steps per second of FOCAL, ours against a straightforward reference on the same work.

The reference reads like the pseudo-code (FOCAL Algorithm 1): a Python loop over the tasks of the meta-batch,
a row table per task and field, a loop over pairs for the metric loss, two separate Q networks, default Adam
and ``.item()`` for the curve. Both draw their batches. Absolute times depend on the machine; the ratio less.

``fast`` is ours with ``meta_train.matmul: fast``, whose kernels are as exact; ``ratio`` is that of the two without it,
and the reference always has PyTorch's default.

``of peak``: the floating-point operations in ours' matrix products per second, as a share of what one large product
of the same precision reaches with the same threads.

Usage: python benchmarks/focal.py [SECONDS per measurement, default 4]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from omrl.algorithms.base import Spec, create
from omrl.core.precision import Kernels, set_kernels
from omrl.data.taskdata import TaskData
from omrl.learning.train import Curve, Sampler

TASKS, ROWS, OBS, ACT, LATENT, META_BATCH = 20, 10_000, 2, 2, 20, 16
CASES: dict[str, dict[str, int]] = {  # width, RL batch, context batch
    "paper": {"width": 256, "rl_batch": 256, "context_batch": 1024},
    "128, 128, 256": {"width": 128, "rl_batch": 128, "context_batch": 256},
    "128, 128, 128": {"width": 128, "rl_batch": 128, "context_batch": 128},
    "64, 64, 256": {"width": 64, "rl_batch": 64, "context_batch": 256},
    "64, 64, 128": {"width": 64, "rl_batch": 64, "context_batch": 128},
}


def buffers() -> TaskData:
    rng = np.random.default_rng(0)

    def column(*width: int) -> np.ndarray:
        return rng.normal(size=(TASKS, ROWS, *width)).astype(np.float32)

    return TaskData.of_bags(
        range(TASKS), observation=column(OBS), action=np.tanh(column(ACT)), reward=column(), sparse_reward=column(),
        next_observation=column(OBS), terminal=np.zeros((TASKS, ROWS), np.float32),
    )  # fmt: skip


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in in (inputs, width, width):
        layers += [nn.Linear(n_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class Reference:
    """Algorithm 1 as written, with the released code's value network and without regularization."""

    def __init__(self, data: TaskData, width: int, rl_batch: int, context_batch: int) -> None:
        self.rl_batch, self.context_batch = rl_batch, context_batch
        self.data = {
            name: torch.from_numpy(getattr(data, name)) for name in vars(data) if name not in ("tasks", "table")
        }
        self.encoder = mlp(OBS + ACT + 1, 200, LATENT)
        self.policy = mlp(OBS + LATENT, width, 2 * ACT)
        self.q = [mlp(OBS + ACT + LATENT, width, 1) for _ in range(2)]
        self.v, self.target = mlp(OBS + LATENT, width, 1), mlp(OBS + LATENT, width, 1)
        self.target.load_state_dict(self.v.state_dict())
        self.adam = {
            name: torch.optim.Adam(net.parameters(), lr=3e-4)
            for name, net in [("e", self.encoder), ("p", self.policy), ("v", self.v), ("q0", self.q[0]),
                              ("q1", self.q[1])]
        }  # fmt: skip

    def step(self) -> dict[str, float]:
        """Take one gradient step; return the losses."""
        tasks = torch.randint(TASKS, (META_BATCH,)).tolist()
        embeddings, parts = [], []
        for task in tasks:
            rows = torch.randint(ROWS, (self.context_batch,))
            d = {name: table[task][rows] for name, table in self.data.items()}
            context = torch.cat([d["observation"], d["action"], d["sparse_reward"][:, None]], 1)
            embeddings.append(torch.tanh(self.encoder(context)).mean(0))
            rows = torch.randint(ROWS, (self.rl_batch,))
            parts.append({name: table[task][rows] for name, table in self.data.items()})
        positive: list[Tensor] = []
        negative: list[Tensor] = []
        for i in range(META_BATCH):
            for j in range(i + 1, META_BATCH):
                square = ((embeddings[i] - embeddings[j]) ** 2).mean()
                if tasks[i] == tasks[j]:
                    positive.append(torch.sqrt(square + 1e-3))
                else:
                    negative.append(1 / (square + 0.1))
        metric = 10 * (
            sum(positive, torch.zeros(())) / (len(positive) + 1e-3)
            + sum(negative, torch.zeros(())) / (len(negative) + 1e-3)
        )
        self._take("e", metric)
        d = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        z = torch.cat([e.detach().repeat(self.rl_batch, 1) for e in embeddings])
        state, following = torch.cat([d["observation"], z], 1), torch.cat([d["next_observation"], z], 1)
        mean, log_std = self.policy(state).chunk(2, 1)
        log_std = log_std.clamp(-20, 0)
        normal = torch.distributions.Normal(mean, log_std.exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        log_prob = (normal.log_prob(raw) - torch.log(1 - action**2 + 1e-6)).sum(1)
        with torch.no_grad():
            y = 100 * d["reward"] + 0.9 * (1 - d["terminal"]) * self.target(following)[:, 0]
        losses = []
        for k, q in enumerate(self.q):
            losses.append(functional.mse_loss(q(torch.cat([d["action"], state], 1))[:, 0], y))
            self._take(f"q{k}", losses[-1])
        smallest = torch.min(*(q(torch.cat([action, state], 1))[:, 0] for q in self.q))
        v_loss = functional.mse_loss(self.v(state)[:, 0], (smallest - log_prob).detach())
        self._take("v", v_loss)
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.v.parameters(), strict=True):
                slow.copy_(0.995 * slow + 0.005 * fast)
        policy_loss = (log_prob - smallest).mean() + 1e-3 * (mean**2).mean() + 1e-3 * (log_std**2).mean()
        self._take("p", policy_loss)
        named = {"metric": metric, "q0": losses[0], "q1": losses[1], "v": v_loss, "policy": policy_loss}
        return {name: loss.item() for name, loss in named.items()}

    def _take(self, name: str, loss: Tensor) -> None:
        self.adam[name].zero_grad()
        loss.backward()
        self.adam[name].step()


def ours(data: TaskData, **values: Any) -> Callable[[], None]:
    algorithm = create("focal", {"latent_dim": LATENT, "meta_batch": META_BATCH, **values}, Spec(OBS, ACT, False), 0)
    sampler, (phase,) = Sampler(data, 0, algorithm.device), algorithm.phases(1)
    curve = Curve()
    return lambda: curve.add(algorithm.update(phase, sampler.draw(phase)))


def with_kernels(kind: Kernels, step: Callable[[], Any]) -> Callable[[], None]:
    """Return ``step`` with its kernels; the default ones are back afterwards."""
    chosen = set_kernels(kind)

    def run() -> None:
        torch.set_float32_matmul_precision(chosen)
        step()
        torch.set_float32_matmul_precision("highest")

    return run


def rates(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return steps per second of each, measured in turns so that a busy moment meets all."""
    for step in steps.values():
        for _ in range(3):
            step()
    best = dict.fromkeys(steps, 0.0)
    for _ in range(4):
        for name, step in steps.items():
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds / 4:
                step()
                count += 1
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = max(best[name], count / (time.perf_counter() - start))
    return best


def operations(step: Callable[[], Any]) -> float:
    """Return the floating-point operations in the matrix products of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def peak() -> float:
    """Return the operations per second of a large matrix product."""
    one, two, out = (torch.randn(2048, 2048) for _ in range(3))
    return 2 * 2048**3 * rates({"product": lambda: torch.mm(one, two, out=out)}, 2.0)["product"]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    data = buffers()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{TASKS} tasks, meta-batch {META_BATCH}, latent {LATENT}; ours on {device}, reference on CPU; best of 4")
    print(
        f"{'width, RL, context':<20}{'threads':>8}{'ours':>9}{'regularized':>13}{'fast':>9}{'reference':>11}"
        f"{'ratio':>7}{'fast':>7}{'of peak':>9}"
    )
    for name, sizes in CASES.items():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            mine = ours(data, **sizes)
            found = rates(
                {
                    "ours": mine,
                    "regularized": ours(
                        data, **sizes, regularization={"kind": "kl-dual", "policy": True, "alpha": 50.0}
                    ),
                    "fast": with_kernels("fast", ours(data, **sizes)),
                    "reference": Reference(data, **sizes).step,
                },
                seconds,
            )
            print(
                f"{name:<20}{threads:>8}{found['ours']:>9.1f}{found['regularized']:>13.1f}"
                f"{found['fast']:>9.1f}{found['reference']:>11.1f}{found['ours'] / found['reference']:>7.2f}"
                f"{found['fast'] / found['reference']:>7.2f}"
                f"{found['ours'] * operations(mine) / peak():>9.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
