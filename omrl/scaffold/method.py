"""A method of one's own, to start from: it imitates the data's actions, given an embedding of the task.

What stands here works. An encoder makes a vector z of a bag of transitions, the mean over its rows; the policy gets
(s, z) and is pulled towards the data's actions; the encoder learns with it. There is no critic. Change what you like:
only this method's cells run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from omrl.algorithms.base import ContextAlgorithm, Draw, Phase, Spec
from omrl.core.config import Config
from omrl.nets.encoders import DeterministicEncoder
from omrl.nets.experience import Experience
from omrl.nets.mlp import Policy


class MethodConfig(Config):
    """What params.yaml may override, with defaults.

    Attributes:
        latent_dim: width of z.
        width, depth: of encoder and policy.
        rate: of Adam.
        meta_batch: tasks per update, drawn with replacement.
        rl_batch, context_batch: transitions of each, to learn from and to infer z from.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    width: Annotated[int, Field(ge=1, le=4096)] = 64
    depth: Annotated[int, Field(ge=1, le=16)] = 2
    rate: Annotated[float, Field(gt=0)] = 1e-3
    meta_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 64
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 64


class Method(ContextAlgorithm):
    """See the module's docstring."""

    CONFIG = MethodConfig

    def __init__(self, config: MethodConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings, hidden = config, [config.width] * config.depth
        self.encoder = DeterministicEncoder(spec.context, hidden, config.latent_dim, self.generator).to(self.device)
        self.policy = Policy(spec.observation + config.latent_dim, hidden, spec.action, self.generator).to(self.device)
        parameters = [*self.encoder.parameters(), *self.policy.parameters()]
        self.optimizer = torch.optim.Adam(parameters, config.rate)

    @property
    def latent(self) -> int:
        """Width of z."""
        return self.settings.latent_dim

    def phases(self, steps: int) -> list[Phase]:
        """Return what one update draws of every task: rows to learn from, and a bag for the encoder."""
        config = self.settings
        draws = {"transitions": Draw(config.rl_batch), "context": Draw(config.context_batch, source="context")}
        return [Phase("training", steps, config.meta_batch, draws)]

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step; whatever is returned becomes a column of the training curve."""
        rows = batch["transitions"]  # observation [task, row, width], action, reward, next_observation, terminal
        z = self.encoder(self.rows(batch["context"]))  # [task, latent]
        loss = (self._mean(rows.observation, z) - rows.action).square().sum(-1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "z_rms": z.detach().square().mean().sqrt()}

    def _mean(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return actions [task, row, action] for observations [task, row, width]."""
        state = torch.cat([observation, z.unsqueeze(1).expand(-1, observation.shape[1], -1)], dim=-1)
        mean, _ = self.policy(state.flatten(0, 1))
        return torch.tanh(mean).view(*observation.shape[:2], -1)

    @torch.no_grad()
    def infer(self, context: Experience) -> Tensor:
        """Return z [task, latent] of a bag of transitions."""
        z: Tensor = self.encoder(self.rows(context))
        return z

    @torch.no_grad()
    def actions(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return deterministic actions [task, row, action]."""
        return self._mean(observation, z)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return what is saved."""
        return {"encoder": self.encoder, "policy": self.policy}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers, from whose state a killed training goes on."""
        return {"both": self.optimizer}


CONFIG = MethodConfig
ALGORITHM = Method
