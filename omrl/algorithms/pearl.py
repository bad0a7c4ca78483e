"""Batch PEARL (Rakelly et al., ICML 2019, without its data collection): probabilistic context, Bellman gradients.

    q(z | c) = N(m, v) proportional to prod_i N(z; mu_i, s2_i)    mu_i, s2_i = f(s, a, r[, s']), s2 by softplus (Eq. 3)
               1 / v = sum_i 1 / s2_i,  m = v sum_i mu_i / s2_i;  z = m + sqrt(v) noise
    encoder    L = Q loss + kl_weight * sum over tasks and dimensions of KL(q(z | c), N(0, I))           (section 4.3)
    Q          mean (Q_k(s, a, z) - [k r + gamma (1 - terminal) Vbar(s', z)])^2, summed over both Q
    V, policy  as in ``omrl.nets.actor_critic``, of the detached z; entropy weight 1, balanced by the reward scale k

"Batch" is the baseline of FOCAL and MBML: the same losses on static data. It is not one method:

* FOCAL: no behavior regularization in its main figures, the test context is offline data (protocol
  ``offline-context``); a BRAC-regularized arm in its Fig. 4 (``regularization``). Its release cannot run either by
  flags: it steps the encoder before the critic's loss is back-propagated.
* MBML: next observations always in the context, whose rows are kept out of the RL batch, and the agent collects its
  context at test time (``online-prior``).

Where this and PEARL's released code differ:

====================  ================================================  ==============================================
what                  PEARL's released code                             here
====================  ================================================  ==============================================
data                  its own, recent prior-driven rows as context      the dataset's, for context and RL alike
z in tests            a sample of the posterior                         the posterior's mean; ``posterior: episode``
exploring z           a sample of N(0, I)                               ``online-prior``: a random training task's;
                                                                        ``prior: own`` for a sample of N(0, I)
gamma, reward_scale   0.99, 5; sparse points 0.9, 100                   0.9, 100 (FOCAL's, for sparse points)
kl_weight             0.1; sparse points and Ant-Goal 1                 0.1
context_batch         64 (points), 100, 256; sparse points 1024         256
terminal              ends that are the environment's                   ``meta_train.time_limit_terminal`` decides
====================  ================================================  ==============================================

The other defaults agree: 3 x 300 networks (encoder 3 x 200), rates 3e-4, latent 5, meta-batch 16 and 256 rows per
task, log-std in [-20, 2], mean and variance of a transition's factor unbounded (FOCAL's ablation bounds both by
tanh), and a KL that is summed, not averaged: its weight against the critic's loss grows with the meta-batch.

Known failures:

* Extrapolation. FOCAL reports Q above 1e11 on Ant-Fwd-Back, above 1e8 on Walker (Figs 10, 11); the report shows
  ``q_mean``.
* Collapse of the posterior where scaled rewards are small against the KL. On the tests' two goals (1,200 updates,
  rate 3e-3, gamma 0.5, two seeds), a reward scale of 20 solved both; at 5 one seed, and at 1 both, ended at the
  prior: embeddings 0.01 apart or less, std 1. With ``kl_weight: 0`` at scale 1 they lay more than 4 apart.
* A flat start: the critic ignores z until it carries something.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omrl.algorithms.base import Belief, PosteriorAlgorithm, Spec
from omrl.algorithms.focal import Focal, FocalConfig
from omrl.nets.actor_critic import adam
from omrl.nets.encoders import ProbabilisticEncoder
from omrl.nets.experience import Experience


class PearlConfig(FocalConfig):
    """PEARL's hyperparameters: FOCAL's names, PEARL's values; what makes it PEARL is fixed.

    The metric's keys, ``encoder``, ``probabilistic_metric`` and ``coupled`` are refused at any value but the default;
    ``metric_weight`` and the like have no effect here.

    Attributes:
        latent_dim: of z.
        kl_weight, prior_std: of the KL term; prior N(0, prior_std^2), N(0, I) in PEARL.
        width: of the actor's and critic's hidden layers.
        context_batch: transitions per drawn task, one factor of the posterior each.
        log_std_max: clamp of the policy's log-std.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    encoder: Literal["deterministic", "probabilistic"] = "probabilistic"
    probabilistic_metric: bool = False
    coupled: bool = True
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    prior_std: Annotated[float, Field(gt=0)] = 1.0
    width: Annotated[int, Field(ge=1, le=4096)] = 300
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 256
    log_std_max: Annotated[float, Field(gt=-20)] = 2.0

    @model_validator(mode="after")
    def _is_pearl(self) -> PearlConfig:
        for name, field in type(self).model_fields.items():
            fixed = name.startswith("metric_") or name in ("encoder", "probabilistic_metric", "coupled")
            if fixed and getattr(self, name) != field.default:
                raise ValueError(f"{name} is FOCAL's; PEARL has it at {field.default}")
        return self


class Pearl(PosteriorAlgorithm, Focal):
    """See the module's docstring."""

    CONFIG = PearlConfig

    def __init__(self, config: PearlConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        hidden = [config.encoder_width] * config.encoder_depth
        made = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=self.generator).item()))
        self.encoder = ProbabilisticEncoder(spec.context, hidden, config.latent_dim, made, bounded=False).to(
            self.device
        )
        self.encoder_optimizer = adam(self.encoder.parameters(), config.encoder_rate)

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return N(0, prior_std^2), or with ``rng`` a z drawn from it."""
        belief = super().prior(tasks)
        belief = {**belief, "variance": belief["variance"] * self.settings.prior_std**2}
        return belief if rng is None else self.sample(belief, rng)

    def posterior(self, context: Experience) -> tuple[Tensor, Tensor]:
        """Return mean and variance of z given a context."""
        mean, variance = self.encoder(self.rows(context))
        return mean, variance


CONFIG = PearlConfig
ALGORITHM = Pearl
