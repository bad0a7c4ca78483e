"""UNICORN-SS (Li et al., NeurIPS 2024): FOCAL's metric loss with a decoder that reconstructs what the task decides.

The paper bounds I(Z; M), the information of the embedding about the task, from both sides: FOCAL's distance-metric
loss is an upper bound's surrogate, the reconstruction of (s', r) from (s, a, z) a lower bound. The supervised form:

    L = reconstruction_weight * mean |(s', r)_hat - (s', r)|^2 + beta * L_FOCAL

with beta 0.01 to 1.5 by environment. Policy and critic are FOCAL's, conditioned on the detached z.

* ``metric_weight`` is the paper's beta. ``reconstruction_weight: 0`` builds no decoder and is FOCAL to the last bit.
* The context's own transitions are reconstructed, with the reward that the encoder sees (sparse where there is a
  sparse one), so that dense rewards reach the encoder by no path. s' is reconstructed where the context holds it,
  which is where tasks differ in their dynamics; elsewhere s' says nothing of the task.
* Latent size 5 in the paper, 32 to 40 for tasks that differ in parameters of bodies.
* Actor and critic keep FOCAL's defaults; the paper's are of its own code base.

Known failure: with beta large against the reconstruction's scale this is FOCAL; where rewards are nearly all zero the
reconstruction is trivially good and adds nothing.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from omrl.actor_critic import adam, join
from omrl.algorithms.base import MetaBatch, Sizes
from omrl.algorithms.focal import Focal, FocalConfig
from omrl.encoders import Context
from omrl.nets import Mlp


class UnicornConfig(FocalConfig):
    """UNICORN's hyperparameters, beside FOCAL's.

    Attributes:
        metric_weight: beta, of FOCAL's loss.
        reconstruction_weight: of the decoder's loss.
        decoder_width, decoder_depth: hidden layers of the decoder.
        decoder_rate: Adam.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    metric_weight: Annotated[float, Field(ge=0)] = 1.0
    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    decoder_width: Annotated[int, Field(ge=1)] = 200
    decoder_depth: Annotated[int, Field(ge=1)] = 3
    decoder_rate: Annotated[float, Field(gt=0)] = 3e-4


class Unicorn(Focal):
    """See the module's docstring."""

    CONFIG = UnicornConfig

    def __init__(self, config: UnicornConfig, sizes: Sizes, seed: int, device: str = "auto") -> None:
        super().__init__(config, sizes, seed, device)
        self.unicorn = config
        self.decoder: Mlp | None = None
        if config.reconstruction_weight:
            outputs = 1 + (sizes.observation if sizes.context_next_observation else 0)
            inputs = sizes.observation + sizes.action + config.latent_dim
            hidden = [config.decoder_width] * config.decoder_depth
            self.decoder = Mlp(inputs, hidden, outputs, self.generator).to(self.device)
            self.decoder_optimizer = adam(self.decoder.parameters(), config.decoder_rate)

    def reconstruction_loss(self, context: Context, z: Tensor) -> Tensor:
        """Return the squared error of (r[, s']) given (s, a, z), a mean over transitions and entries."""
        if self.decoder is None:
            raise ValueError("reconstruction_weight is 0: there is no decoder")
        found = self.decoder(join(torch.cat([context.observation, context.action], dim=-1), z))
        wanted = [context.reward.unsqueeze(-1)]
        if context.next_observation is not None:
            wanted.append(context.next_observation)
        return (found - torch.cat(wanted, dim=-1).reshape(found.shape)).square().mean()

    def update(self, batch: MetaBatch) -> dict[str, Tensor]:
        """Take one gradient step of encoder, decoder, actor and critic."""
        if self.decoder is None:
            return super().update(batch)
        z, kl = self._embed(batch.context.rows())
        loss, scalars = self.encoder_loss(z, kl, batch.tasks)
        reconstruction = self.reconstruction_loss(batch.context, z)
        scalars |= {"reconstruction_loss": reconstruction.detach(), "z_rms": z.detach().square().mean().sqrt()}
        optimizers = [self.encoder_optimizer, self.decoder_optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (loss + self.unicorn.reconstruction_weight * reconstruction).backward()
        for optimizer in optimizers:
            optimizer.step()
        regularization = self.settings.regularization
        extra = [batch.more() for _ in range(regularization.discriminator_steps - 1)] if regularization.active else []
        return scalars | self.actor_critic.update(batch.transitions, z.detach(), extra)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return encoder, actor-critic and decoder."""
        return super().modules() | ({} if self.decoder is None else {"decoder": self.decoder})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return super().optimizers() | ({} if self.decoder is None else {"decoder": self.decoder_optimizer})


CONFIG = UnicornConfig
ALGORITHM = Unicorn
