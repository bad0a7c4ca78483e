"""FOCAL (Li, Yang, Luo, ICLR 2021): distance-metric learning of task embeddings, behavior-regularized RL.

A deterministic encoder maps a bag of transitions to z in (-1, 1)^l (section 4.1); only the distance-metric
loss trains it (Eq. 13; Algorithm 1). Policy and critic are conditioned on the detached z (section 3.2,
Eqs 6 to 9). The encoder sees the dataset's sparse rewards, actor and critic the dense ones.

Defaults are the released code's for Sparse-Point-Robot. Where paper and release differ:

==================  =======================  ===========================  ============================
parameter           paper                    released code (default)      published numbers
==================  =======================  ===========================  ============================
rates               1e-3 (Table 4)           3e-4                         unknown which
width               300 (Table 4)            256                          unknown which
latent_dim          5 (points, Half-         20                           Table 1 (Half-Cheetah-Vel): 5
                    Cheetah-Fwd-Back), 20
metric_form         Eq. 13: squared L2,      ``released``: RMS, mean per  Table 5(b) implies means
                    sum over pairs           dimension, mean over pairs;  per dimension: released
                                             of power -2 only
metric_weight       1 (points, Ant, Half-    10, on both terms            unknown which
                    Cheetah-Fwd-Back), 10
context_batch       256 (512 in FOCAL++)     1024                         unknown which
value_network       absent in Algorithm 1    V and target V               released
alpha               constant                 adapted, see RegularizationConfig  released
==================  =======================  ===========================  ============================

Differs from the release:

* Contexts and RL batches are drawn from the whole dataset of a task. The release refills per-task pools with
  bags of random rows of the same data (PEARL's scaffolding), so its x-axis counts copied rows; ours counts
  gradient steps.
* The release steps discriminator and encoder in place before the policy's backward pass, which torch >= 1.5
  refuses; D of the policy loss, and of the value penalty, is computed after the discriminator's steps.
* ``coupled`` and ``encoder: probabilistic`` work: there, the encoder is stepped before the critic loss is
  back-propagated, so that no flag lets Bellman gradients reach it, and the probabilistic encoder switches the
  metric loss off (``probabilistic_metric: false`` does that here).
* The discriminator and alpha are not trained while regularization is off; there they are, for nothing.
* On Sparse-Point-Robot the release trains its encoder on rewards of FOCAL++'s Eq. 35, (R - d) / R within the
  radius R, and tests it on whichever form the installed module has; here both see the dataset's.
* An evaluation here counts episodes; the release goes on until so many steps are executed, so that episodes that
  end early come with more context.
* Time-limit ends are terminal only if ``meta_train.time_limit_terminal`` says so (the release: always).

Differs from the paper: meta-batches repeat tasks (drawn with replacement). Without repeats there is no
positive pair and nothing pulls embeddings of one task together; the author calls it essential.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from omrl.algorithms.base import ContextAlgorithm, Draw, Phase, Spec
from omrl.data.taskdata import TaskData
from omrl.nets.actor_critic import ActorCritic, ActorCriticConfig, EncoderStep, adam, join
from omrl.nets.encoders import DeterministicEncoder, ProbabilisticEncoder, gaussian_kl
from omrl.nets.experience import Experience

# weight of the repulsive term by power of the distance (FOCAL Table 5b): all are equal at a mean squared
# difference of 0.25 per dimension
_BETA = {-2: 1.0, -1: 2.0, 1: 8.0, 2: 16.0}


class FocalConfig(ActorCriticConfig):
    """FOCAL's hyperparameters, beside those of ``ActorCriticConfig``.

    Attributes:
        latent_dim: width of the task embedding z.
        encoder_width, encoder_depth: hidden layers of the encoder (3 x 200 in paper and code).
        encoder_rate: learning rate of the encoder (Adam).
        encoder: ``deterministic``, or the ``probabilistic`` ablation (section 5.2).
        probabilistic_metric: keep the metric loss with the probabilistic encoder (the paper's arm); the
            release replaces it by the KL term.
        kl_weight: of the probabilistic encoder's KL divergence from its prior.
        prior_std: standard deviation of that prior: 0.05 in the release, 1 in PEARL.
        coupled: let Bellman gradients reach the encoder too (Figs 5 and 9).
        metric_power: n of the distance in the repulsive term: -2 (main results), -1, 1 or 2 (Table 1).
        metric_form: ``released``: root mean squared difference per dimension, a mean over pairs; ``paper``: squared
            distance (Eq. 13), a sum over pairs. The module's table has the difference.
        metric_beta: weight of the repulsive term; None for that of ``metric_power`` in Table 5(b).
        metric_eps: added in the denominator of the inverse powers.
        metric_weight: weight of the whole distance-metric loss; 0 leaves a deterministic encoder as it was initialized.
        meta_batch: tasks per update, drawn with replacement.
        rl_batch: transitions per drawn task for actor and critic.
        context_batch: transitions per drawn task for the encoder.
        context_is_rl_batch: use the RL batch as context (FOCAL++ Algorithm 1); else independent draws.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 20
    encoder_width: Annotated[int, Field(ge=1, le=4096)] = 200
    encoder_depth: Annotated[int, Field(ge=1, le=16)] = 3
    encoder_rate: Annotated[float, Field(gt=0)] = 3e-4
    encoder: Literal["deterministic", "probabilistic"] = "deterministic"
    probabilistic_metric: bool = True
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    prior_std: Annotated[float, Field(gt=0)] = 0.05
    coupled: bool = False
    metric_power: Literal[-2, -1, 1, 2] = -2
    metric_form: Literal["released", "paper"] = "released"
    metric_beta: Annotated[float, Field(gt=0)] | None = None
    metric_eps: Annotated[float, Field(gt=0)] = 0.1
    metric_weight: Annotated[float, Field(ge=0)] = 10.0
    meta_batch: Annotated[int, Field(ge=2, le=1024)] = 16
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 256
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 1024
    context_is_rl_batch: bool = False


def distance_metric_loss(
    z: Tensor,
    tasks: Tensor,
    power: int = -2,
    form: str = "released",
    beta: float | None = None,
    eps: float = 0.1,
) -> Tensor:
    """Return the distance-metric loss of a meta-batch (FOCAL Eq. 13), without its overall weight.

    Args:
        z: embeddings [m, latent].
        tasks: int64 [m]; equal entries are the same task.
        power: n: the repulsive term falls with distance^n (-2, -1), or is minus distance^n (1, 2).
        form: ``paper``: same task ||z_i - z_j||^2, different tasks beta / (||z_i - z_j||^|n| + eps), summed
            over ordered pairs. ``released``: with m = mean_d (z_i - z_j)^2, same task sqrt(m + 1e-3),
            different tasks beta / (m^(|n|/2) + eps), each averaged over its unordered pairs. The release has it for
            power -2 alone; the other powers extend it.
        beta: None for the value of Table 5(b).
        eps: in the denominator of the inverse powers.

    Returns:
        A scalar.
    """
    weight = _BETA[power] if beta is None else beta
    first, second = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    square = (z[first] - z[second]).square()
    square = square.sum(-1) if form == "paper" else square.mean(-1)
    same = (tasks[first] == tasks[second]).to(z.dtype)
    # equal embeddings of different tasks: the square root must have a gradient there
    distance = square if abs(power) == 2 else torch.sqrt(square + 1e-12)
    apart = weight / (distance + eps) if power < 0 else -weight * distance
    if form == "paper":
        return 2 * (same * square + (1 - same) * apart).sum()
    together = torch.sqrt(square + 1e-3)
    positives, negatives = same.sum(), (1 - same).sum()
    return (same * together).sum() / (positives + 1e-3) + ((1 - same) * apart).sum() / (negatives + 1e-3)


class Focal(ContextAlgorithm):
    """See the module's docstring."""

    CONFIG = FocalConfig
    PROTOCOLS = ContextAlgorithm.PROTOCOLS | {"fine-tune"}

    def __init__(self, config: FocalConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        hidden = [config.encoder_width] * config.encoder_depth
        kind = DeterministicEncoder if config.encoder == "deterministic" else ProbabilisticEncoder
        self.encoder = kind(spec.context, hidden, config.latent_dim, self.generator).to(self.device)
        self.actor_critic = ActorCritic(
            config, spec.observation, spec.action, config.latent_dim, self.generator, self.device
        )
        self.encoder_optimizer = adam(self.encoder.parameters(), config.encoder_rate)

    @classmethod
    def check_pair(cls, config: FocalConfig) -> str | None:
        """Refuse to read contexts off the transitions: the pair's own would have no part in training."""
        if config.context_is_rl_batch:
            return "context_is_rl_batch = True: expected False where dataset.train has a pair, whose context it ignores"
        return None

    def draws(self) -> dict[str, Draw]:
        """Return what an update draws: rows to learn from, a bag for the encoder, more rows for the discriminator."""
        config = self.settings
        draws = {"transitions": Draw(config.rl_batch)}
        if not config.context_is_rl_batch:
            draws["context"] = Draw(config.context_batch, source="context")
        further = range(config.regularization.further_batches)
        return draws | {f"more{i}": Draw(config.rl_batch) for i in further}

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return the data's next actions where the regularizer of the target compares with them."""
        return {"next_action": data.next_actions()} if self.settings.regularization.next_actions else {}

    def phases(self, steps: int) -> list[Phase]:
        """Return one phase."""
        return [Phase("training", steps, self.settings.meta_batch, self.draws())]

    @property
    def latent(self) -> int:
        """Width of z."""
        return self.settings.latent_dim

    def bag(self, batch: Mapping[str, Experience]) -> Experience:
        """Return the encoder's part of what was drawn."""
        return batch["transitions" if self.settings.context_is_rl_batch else "context"]

    @staticmethod
    def more(batch: Mapping[str, Experience]) -> list[Experience]:
        """Return the discriminator's further rows."""
        return [drawn for name, drawn in batch.items() if name.startswith("more")]

    def _embed(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return z, sampled for the probabilistic encoder, and its KL term."""
        if isinstance(self.encoder, ProbabilisticEncoder):
            mean, variance = self.encoder(rows)
            noise = torch.randn(mean.shape, generator=self.actor_critic.noise, device=self.device)
            return mean + variance.sqrt() * noise, gaussian_kl(mean, variance, self.settings.prior_std)
        z: Tensor = self.encoder(rows)
        return z, None

    def encoder_loss(self, z: Tensor, kl: Tensor | None, tasks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the encoder's own loss and its parts: metric loss (Eq. 13) and KL term."""
        config = self.settings
        scalars: dict[str, Tensor] = {}
        loss = z.new_zeros(())
        if config.metric_weight and (kl is None or config.probabilistic_metric):
            metric = config.metric_weight * distance_metric_loss(
                z, tasks, config.metric_power, config.metric_form, config.metric_beta, config.metric_eps
            )
            scalars["metric_loss"] = metric.detach()
            loss = loss + metric
        if kl is not None:
            scalars["kl"] = kl.detach()
            loss = loss + config.kl_weight * kl
        return loss, scalars

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of encoder, actor and critic (Algorithm 1, inner loop)."""
        config = self.settings
        context = self.bag(batch)
        z, kl = self._embed(self.rows(context))
        loss, scalars = self.encoder_loss(z, kl, context.task)
        scalars["z_rms"] = z.detach().square().mean().sqrt()
        extra = self.more(batch)
        if config.coupled:
            coupled = EncoderStep(self.encoder_optimizer, loss)
            return scalars | self.actor_critic.update(batch["transitions"], z, extra, coupled)
        if loss.requires_grad:  # it has nothing to learn with metric_weight = 0
            self.encoder_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.encoder_optimizer.step()
        return scalars | self.actor_critic.update(batch["transitions"], z.detach(), extra)

    @torch.no_grad()
    def infer(self, context: Experience) -> Tensor:
        """Return z [tasks, latent]; the posterior mean for the probabilistic encoder."""
        out = self.encoder(self.rows(context))
        z: Tensor = out[0] if isinstance(out, tuple) else out
        return z

    @torch.no_grad()
    def actions(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return tanh of the policy's mean, [tasks, n, action]."""
        tasks, n, _ = observation.shape
        wide = z.unsqueeze(1).expand(tasks, n, z.shape[-1])
        mean, _ = self.actor_critic.policy(torch.cat([observation, wide], dim=-1).reshape(tasks * n, -1))
        return torch.tanh(mean).view(tasks, n, -1)

    @torch.no_grad()
    def explore(self, observation: Tensor, z: Tensor, rng: torch.Generator) -> Tensor:
        """Return actions sampled from the policy, [tasks, n, action]."""
        tasks, n, _ = observation.shape
        noise = torch.randn(tasks * n, self.spec.action, generator=rng).to(self.device)
        return self.actor_critic.policy.sample(join(observation, z), noise)[0].view(tasks, n, -1)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return encoder and actor-critic."""
        return {"encoder": self.encoder, "actor_critic": self.actor_critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return {"encoder": self.encoder_optimizer, **self.actor_critic.optimizers}

    def generators(self) -> dict[str, torch.Generator]:
        """Return the stream of actions and mixtures."""
        return {"noise": self.actor_critic.noise}


CONFIG = FocalConfig
ALGORITHM = Focal
