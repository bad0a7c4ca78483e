"""Meta-behavior cloning in the MAML sense (Mitchell et al., ICML 2021, section 5): MACAW without its rewards.

    pi'    = pi - a d/dpi mean [-log pi(a|s)]      on the inner rows, a learned step size for each tensor
    outer    mean [-log pi'(a|s)]                  on the outer rows

Network, step sizes, draws and acting are MACAW's, see ``omrl.algorithms.macaw``; there is no value function and no
advantage head (the released code builds one that no loss reaches). ``bc`` is the other meaning of the name: a policy
conditioned on a context.

Known failure: it imitates; what the outer rows do badly, it does badly. With a ``replay`` dataset as outer data, that
is the behavior policy's average over its whole training.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from omrl.algorithms.base import Belief, Phase, Spec
from omrl.algorithms.macaw import InnerConfig, Regression, RegressionConfig, Rows, descend, inner_parts, inner_phase
from omrl.data.taskdata import TaskData
from omrl.nets.actor_critic import adam
from omrl.nets.experience import Experience
from omrl.nets.transforms import Steps


class MetaBcConfig(RegressionConfig, InnerConfig):
    """Meta-behavior cloning.

    There is no value function, so ``inner_value_rate`` has no effect.

    Attributes:
        policy_rate: Adam.
    """

    policy_rate: Annotated[float, Field(gt=0)] = 1e-4


class MetaBc(Regression):
    """See the module's docstring."""

    CONFIG = MetaBcConfig
    PROTOCOLS = frozenset({"offline-context", "ood-checkpoint"})

    def __init__(self, config: MetaBcConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        self.policy = self.network(self._shapes[0], config.inner_policy_rate, config.learn_rates)
        self._optimizers = {"policy": adam(self.policy.weights(), config.policy_rate)}
        if config.learn_rates:
            self._optimizers["policy_rates"] = adam(self.policy.rates(), config.rate_rate)

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return nothing: imitation needs no returns."""
        return {}

    def rows(self, drawn: Experience) -> Rows:
        """Return states and actions."""
        return Rows(drawn.observation, drawn.action, drawn.reward, drawn.reward, drawn.observation)

    def phases(self, steps: int) -> list[Phase]:
        """Return one phase: inner rows and outer rows of the same tasks."""
        return [inner_phase(steps, self.settings)]

    def path(self, inner: Experience, differentiable: bool) -> list[Steps]:
        """Return the inner steps of the policy."""
        parts = inner_parts(inner, self.settings.steps)
        losses = [partial(self.imitation, rows=self.rows(part)) for part in parts]
        return self.policy.adapt(inner.shape[0], losses, differentiable)

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one meta-step."""
        thetas = self.policy.thetas(self.path(batch["inner"], True))
        loss = self.imitation(thetas, self.rows(batch["outer"])).sum() / self.spec.tasks
        descend(loss, *self._optimizers.values())
        return {"policy_loss": loss.detach(), "policy_step": self.policy.mean_rate()}

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the policy's weights after the inner steps from the initial ones; ``belief`` does not count."""
        with torch.enable_grad():
            path = self.path(context, False)
        with torch.no_grad():
            return self.belief(self.policy.thetas(path))

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the policy."""
        return {"policy": self.policy}


CONFIG = MetaBcConfig
ALGORITHM = MetaBc
