"""Multi-task advantage-weighted regression with fine-tuning (MT+FT), the baseline of MACAW (section 5).

One value function and one policy for all training tasks, which are told apart by a one-hot code beside the
observation; no inner step. G, D, s_T, w and log pi as in ``omrl.algorithms.macaw``:

    value    mean (V(s, k) - G)^2;  ``bootstrap``: to G + D V(s_T, k), without gradient
    A        = G + D V(s_T, k) - V(s, k), of the value function before its step
    policy   mean [-w log pi(a | s, k)]

summed over the meta-batch and divided by the number of training tasks. In a test task the code is zero: ``tune_steps``
times, a step of Adam of the value function and one of the policy with the value function just updated, all on the same
rows; their moments start from zero in every task.

There are two published configurations:

=================================  =======================  ========================
setting                            standard (the default)   the other
=================================  =======================  ========================
``bootstrap``                      false                    true
``value_rate``                     1e-4                     1e-5 (the paper: Walker)
``width``                          300                      100 (the paper's)
data to adapt to                   last 20,000 rows         whole run, every 7th row
=================================  =======================  ========================

The sources do not say which width and rate go with which target; ``width`` is 100 here, MACAW's. Layers are the
released code's ordinary ones whose bias has a transform. The released code's one-hot code has places for test tasks,
which are always zero: here it has none.

Known failure: a code of zeros was never seen in training, so that a policy before fine-tuning is nobody's, and twenty
steps are few. Returns on training tasks are measured that way too, as in the released code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from omrl.algorithms.base import Belief, Draw, Phase, Spec, join_beliefs
from omrl.algorithms.macaw import AdvantageConfig, Regression, Rows, descend
from omrl.nets.actor_critic import adam
from omrl.nets.experience import Experience
from omrl.nets.transforms import Adaptive, Kind


class MtFtConfig(AdvantageConfig):
    """MT+FT.

    Attributes:
        layers, bootstrap, value_rate: as in ``macaw``, with MT+FT's values.
        batch: rows per task.
        tune_steps: of adaptation.
        tune_value_rate, tune_policy_rate: Adam, of adaptation and of protocol ``fine-tune``.
    """

    layers: Kind = "bias"
    bootstrap: bool = False
    value_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch: Annotated[int, Field(ge=2, le=16384)] = 256
    tune_steps: Annotated[int, Field(ge=1, le=10_000)] = 20
    tune_value_rate: Annotated[float, Field(gt=0)] = 1e-4
    tune_policy_rate: Annotated[float, Field(gt=0)] = 1e-3


class MtFt(Regression):
    """See the module's docstring."""

    CONFIG = MtFtConfig

    def __init__(self, config: MtFtConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device, spec.observation + spec.tasks)
        self.settings = config
        policy, value = self._shapes
        self.value = self.network(value, 1.0, learned=False)  # no inner steps, no step sizes
        self.policy = self.network(policy, 1.0, learned=False)
        self._optimizers = {
            "value": adam(self.value.weights(), config.value_rate),
            "policy": adam(self.policy.weights(), config.policy_rate),
        }

    @classmethod
    def check_online(cls, tasks: str) -> str | None:
        """Refuse other tasks than those that it has a code of."""
        return None if tasks == "train" else f"tasks = {tasks}: mt-ft has codes of the training tasks; expected train"

    def phases(self, steps: int) -> list[Phase]:
        """Return one phase: rows of the drawn tasks."""
        config = self.settings
        return [Phase("training", steps, config.meta_batch, {"transitions": Draw(config.batch)}, replace=False)]

    def _coded(self, observation: Tensor, task: Tensor | None) -> Tensor:
        """Return observations [tasks, n, width] with the one-hot code of their tasks; zeros if None."""
        code = observation.new_zeros(len(observation), self.spec.tasks)
        if task is not None:
            code = functional.one_hot(task, self.spec.tasks).to(observation)
        return torch.cat([observation, code.unsqueeze(1).expand(*observation.shape[:2], -1)], dim=-1)

    def rows(self, drawn: Experience, task: Tensor | None = None) -> Rows:
        """Return what the losses read, with the code of ``task``, zeros if None."""
        plain = super().rows(drawn)
        return replace(plain, state=self._coded(plain.state, task), last=self._coded(plain.last, task))

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one step of value function and policy."""
        config, drawn = self.settings, batch["transitions"]
        rows = self.rows(drawn, drawn.task)
        value, policy = _all(self.value, len(drawn.task)), _all(self.policy, len(drawn.task))
        advantage = self.advantage(value, rows)
        goal = self.goal(value, rows) if config.bootstrap else rows.to_go
        value_loss = self.value_error(value, rows, goal).sum() / self.spec.tasks
        policy_loss = self.imitation(policy, rows, self.weight(advantage)).sum() / self.spec.tasks
        descend(value_loss + policy_loss, *self._optimizers.values())
        return {
            "value_loss": value_loss.detach(), "policy_loss": policy_loss.detach(),
            "return_to_go": rows.to_go.mean(), "advantage": advantage.abs().mean(),
        }  # fmt: skip

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the policy's weights after ``tune_steps`` steps in each task; ``belief`` does not count."""
        found = []
        for place in range(context.shape[0]):
            own = copy.copy(self)
            own.value, own.policy = copy.deepcopy(self.value), copy.deepcopy(self.policy)
            with torch.enable_grad():
                own.settle(context.of(torch.tensor([place], device=self.device)))
            found.append(own.prior(1))
        return join_beliefs(found)

    def settle(self, context: Experience) -> None:
        """Take ``tune_steps`` steps of value function and policy on the rows of one task."""
        config, rows = self.settings, self.rows(context)
        by_value = adam(self.value.weights(), config.tune_value_rate)
        by_policy = adam(self.policy.weights(), config.tune_policy_rate)
        for _ in range(config.tune_steps):
            value = _all(self.value, 1)
            goal = self.goal(value, rows) if config.bootstrap else rows.to_go
            descend(self.value_error(value, rows, goal).sum(), by_value)
            weight = self.weight(self.advantage(_all(self.value, 1), rows))
            descend(self.imitation(_all(self.policy, 1), rows, weight).sum(), by_policy)

    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the action; the code is zero."""
        return super().act(belief, self._coded(observation.unsqueeze(1), None).squeeze(1), rng)


def _all(network: Adaptive, tasks: int) -> list[Tensor]:
    """Return a network's weights, the same for all tasks."""
    return [theta.expand(tasks, -1) for theta in network.thetas(network.start())]


CONFIG = MtFtConfig
ALGORITHM = MtFt
