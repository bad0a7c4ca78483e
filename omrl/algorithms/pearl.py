"""Batch PEARL (Rakelly et al., ICML 2019, without its data collection): probabilistic context, Bellman gradients.

A product of one Gaussian per transition is the posterior over z (PEARL Eq. 3); the critic's loss and a KL term
towards N(0, I) train the encoder (section 4.3); actor and V see the detached z. The soft actor-critic has a V network
with target and the fixed entropy weight 1 that the reward scale balances. "Batch" is the baseline of FOCAL and MBML:
the same losses on static data. It is not one method:

* FOCAL: no behavior regularization in its main figures, the test context is offline data (protocol
  ``offline-context``); a BRAC-regularized arm in its Fig. 4 (``regularization``).
* MBML: next observations always in the context, and the agent collects its context at test time (``online-prior``).

Defaults are PEARL's released code: 3 x 300 networks, log-std up to 2, latent 5, KL weight 0.1 summed over tasks and
dimensions, mean and variance of a transition's factor unbounded. FOCAL's own release cannot run this baseline by
flags: it steps the encoder before the critic's loss is back-propagated.

Known failure: extrapolation. FOCAL reports Q above 1e11 on Ant-Fwd-Back (Figs 10, 11); the report shows ``q_mean``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from omrl.actor_critic import adam
from omrl.algorithms.base import Sizes
from omrl.algorithms.focal import Focal, FocalConfig
from omrl.encoders import ProbabilisticEncoder


class PearlConfig(FocalConfig):
    """PEARL's hyperparameters: FOCAL's names, PEARL's values; what makes it PEARL is fixed.

    Attributes:
        kl_weight, prior_std: of the KL term; the prior is N(0, I).
        log_std_max: clamp of the policy's log-std.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    encoder: Literal["deterministic", "probabilistic"] = "probabilistic"
    probabilistic_metric: bool = False
    coupled: bool = True
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    prior_std: Annotated[float, Field(gt=0)] = 1.0
    width: Annotated[int, Field(ge=1)] = 300
    context_batch: Annotated[int, Field(ge=1)] = 256
    log_std_max: Annotated[float, Field(gt=-20)] = 2.0

    @model_validator(mode="after")
    def _is_pearl(self) -> PearlConfig:
        for name, field in type(self).model_fields.items():
            fixed = name.startswith("metric_") or name in ("encoder", "probabilistic_metric", "coupled")
            if fixed and getattr(self, name) != field.default:
                raise ValueError(f"{name} is FOCAL's; PEARL has it at {field.default}")
        return self


class PosteriorEncoder(ProbabilisticEncoder):
    """PEARL's posterior: as FOCAL's ablation, without its tanh on mean and scale."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of q(z | c), each [tasks, latent]."""
        tasks, n, width = rows.shape
        raw = self.net(rows.reshape(tasks * n, width)).view(tasks, n, 2 * self.latent)
        mean, scale = raw.split(self.latent, dim=-1)
        precision = 1 / functional.softplus(scale).clamp(min=self._SMALLEST)
        variance = 1 / precision.sum(dim=1)
        return variance * (mean * precision).sum(dim=1), variance


class Pearl(Focal):
    """See the module's docstring."""

    CONFIG = PearlConfig

    def __init__(self, config: PearlConfig, sizes: Sizes, seed: int, device: str = "auto") -> None:
        super().__init__(config, sizes, seed, device)
        hidden = [config.encoder_width] * config.encoder_depth
        made = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=self.generator).item()))
        self.encoder = PosteriorEncoder(sizes.context, hidden, config.latent_dim, made).to(self.device)
        self.encoder_optimizer = adam(self.encoder.parameters(), config.encoder_rate)


CONFIG = PearlConfig
ALGORITHM = Pearl
