"""UNICORN-SS (Li et al., NeurIPS 2024), self-supervised: FOCAL's metric loss and a decoder of what the task decides.

Of a transition, the behavior decides x_b = (s, a) and the task x_t = (s', r). The information of the embedding about
the task lies between two bounds (Theorem 2.3): I(Z; X_t | X_b) <= I(Z; M) <= I(Z; X). FOCAL's loss drives the upper
one, and with it what z knows of the behavior; reconstruction drives the lower one (Eqs 13, 14). Both together
(Eqs 12, 15), for the encoder and the decoder:

    L = reconstruction_weight * L_recon + metric_weight * L_FOCAL,      metric_weight = alpha / (1 - alpha)
    L_recon = mean |(r[, s'])_hat(s, a, z) - (r[, s'])|^2               over transitions and entries

Policy and critic are FOCAL's, conditioned on the detached z. ``metric_weight: 0`` is the paper's UNICORN-SS-0;
``reconstruction_weight: 0`` builds no decoder and is FOCAL to the last bit. UNICORN-SUP, the supervised variant with
a classifier of tasks (Eq. 10), is not here.

=================  ==============================  ==============================  ===============================
what               paper                           released code                   here
=================  ==============================  ==============================  ===============================
metric_weight      Table 7: 0.15 (Ant-Dir and      0.15 (Ant-Dir, Cheetah-Vel),    1, between them; see below
                   both Cheetahs), 0.3 (Reach),    0.01 (Cheetah-Dir), 0.7
                   1.5 (Hopper-, Walker-Param)     (Walker), 1.5 (Hopper)
latent_dim         Table 7: 5; Hopper 40, Walker   as the paper                    5
                   32, Reach 2
L_recon            Eq. 14: -log p(x_t | z, x_b)    two Gaussian likelihoods with   squared error, one network,
                                                   learned variances, of s' - s    of s' itself; r has weight
                                                   and of r, added                 1 / (1 + width of s')
reconstructed      (s', r)                         (s', r), also where the tasks   r; s' where the context holds
                                                   share their dynamics            it
decoder            not given                       2 x 64; 2 x 128 for             3 x 200, as FOCAL's encoder
                                                   parameter tasks
encoder            width 64, 128 for parameter     2 hidden layers, on (s, a, r,   FOCAL's, noiseless
                   tasks                           s', terminal), noise on each
                                                   transition's code, also in
                                                   tests
context            one trajectory, 200 steps       as the paper                    FOCAL's bag of transitions
                   (Reach: 500)
actor, critic      BRAC, width 256, depth 3        2 x 256; BRAC for Ant-Dir       FOCAL's
                                                   only, else plain SAC
=================  ==============================  ==============================  ===============================

So the decoder is a variant of ours, neither the paper's likelihood nor the release's two heads.

Rates of 3e-4 and a meta-batch of 16 are common to all three; the metric loss is FOCAL's released form there too.
Published weights do not carry over: the gradient of a likelihood with a learned variance grows as errors shrink, that
of a squared error fades, so the same ``metric_weight`` weighs more here. No published number belongs to the default.

Which rewards: the context's own transitions are reconstructed, with the reward that the encoder sees (sparse where
there is a sparse one). Dense rewards would reach the encoder through the decoder otherwise, and training contexts
would tell more than test contexts ever can. s' comes from the context for the same reason: where the context lacks
it, the tasks share their dynamics, and s' given (s, a) says nothing of z.

Known failures: with ``metric_weight`` large this is FOCAL (Fig. 8). Where rewards are nearly all zero, predicting
zero is nearly right and the reconstruction adds nothing. Where tasks differ in reward but the context holds a wide
s', little of L_recon is about the reward: one entry of 3 for point robots, of 21 for Half-Cheetah.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omrl.algorithms.base import Phase, Spec
from omrl.algorithms.focal import Focal, FocalConfig
from omrl.nets.actor_critic import EncoderStep, adam, join
from omrl.nets.experience import Experience
from omrl.nets.mlp import Mlp


class UnicornConfig(FocalConfig):
    """UNICORN's hyperparameters, beside FOCAL's.

    Attributes:
        metric_weight: of FOCAL's loss: alpha / (1 - alpha) of Eq. 15; 0 for reconstruction alone.
        reconstruction_weight: of the decoder's loss; 0 for FOCAL, without a decoder.
        decoder_width, decoder_depth: hidden layers of the decoder.
        decoder_rate: Adam.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    metric_weight: Annotated[float, Field(ge=0)] = 1.0
    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    decoder_width: Annotated[int, Field(ge=1, le=4096)] = 200
    decoder_depth: Annotated[int, Field(ge=1, le=16)] = 3
    decoder_rate: Annotated[float, Field(gt=0)] = 3e-4

    @model_validator(mode="after")
    def _something_tells_tasks_apart(self) -> UnicornConfig:
        if not (self.metric_weight or self.reconstruction_weight or self.coupled):
            raise ValueError(
                "metric_weight = 0 with reconstruction_weight = 0 leaves no loss that tells tasks apart; "
                "expected one above 0"
            )
        return self


class Unicorn(Focal):
    """See the module's docstring."""

    CONFIG = UnicornConfig

    def __init__(self, config: UnicornConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.unicorn = config
        self.decoder: Mlp | None = None
        if config.reconstruction_weight:
            outputs = 1 + (spec.observation if spec.context_next_observation else 0)
            inputs = spec.observation + spec.action + config.latent_dim
            hidden = [config.decoder_width] * config.decoder_depth
            self.decoder = Mlp(inputs, hidden, outputs, self.generator).to(self.device)
            self.decoder_optimizer = adam(self.decoder.parameters(), config.decoder_rate)

    def reconstruction_loss(self, context: Experience, z: Tensor) -> Tensor:
        """Return the squared error of (r[, s']) given (s, a, z), a mean over transitions and entries."""
        if self.decoder is None:
            raise ValueError("reconstruction_weight is 0: there is no decoder")
        found = self.decoder(join(torch.cat([context.observation, context.action], dim=-1), z))
        wanted = [context.signal.unsqueeze(-1)]
        if self.spec.context_next_observation:
            wanted.append(context.next_observation)
        return (found - torch.cat(wanted, dim=-1).reshape(found.shape)).square().mean()

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of encoder, decoder, actor and critic."""
        if self.decoder is None:
            return super().update(phase, batch)
        context, extra = self.bag(batch), self.more(batch)
        z, kl = self._embed(self.rows(context))
        loss, scalars = self.encoder_loss(z, kl, context.task)
        reconstruction = self.reconstruction_loss(context, z)
        scalars |= {"reconstruction_loss": reconstruction.detach(), "z_rms": z.detach().square().mean().sqrt()}
        loss = loss + self.unicorn.reconstruction_weight * reconstruction
        self.decoder_optimizer.zero_grad(set_to_none=True)
        if self.settings.coupled:
            coupled = EncoderStep(self.encoder_optimizer, loss)
            scalars |= self.actor_critic.update(batch["transitions"], z, extra, coupled)
            self.decoder_optimizer.step()
            return scalars
        self.encoder_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.encoder_optimizer.step()
        self.decoder_optimizer.step()
        return scalars | self.actor_critic.update(batch["transitions"], z.detach(), extra)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return encoder, actor-critic and decoder."""
        return super().modules() | ({} if self.decoder is None else {"decoder": self.decoder})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return super().optimizers() | ({} if self.decoder is None else {"decoder": self.decoder_optimizer})


CONFIG = UnicornConfig
ALGORITHM = Unicorn
