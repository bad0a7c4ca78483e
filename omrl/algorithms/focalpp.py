"""FOCAL++ (Li, Huang, Chen, Luo, Luo, Huang, 2022; arXiv 2102.10774): attention and momentum contrast in FOCAL.

The encoder is a stack of blocks with a batch-wise gate (Def. 3.7, Eq. 18) and sequence-wise self-attention in
parallel (Fig. 1). The matrix-form momentum contrast (Eqs 7, 8) trains it; policy and critic are FOCAL's,
conditioned on the detached query embedding (Algorithm 1). Arms of Tables 1 and 2:

* full: the defaults;
* contrastive only: ``attention: none`` (FOCAL's MLP);
* batch-wise only, sequence-wise only: ``attention: batch`` or ``sequence``. The paper does not say whether these
  keep FOCAL's metric loss; ``loss`` chooses.

Defaults are the paper's for point robots (Table 6). Differs from the paper:

* Several tokenizations fit "self-attention over the transition's entries": ours makes every scalar a token
  (``tokens: entries``). ``row`` is the form of the first release, a sequence of length 1.
* The gate is exactly 1 and every residual branch exactly 0 at initialization (appendix B.2: identity-like).
  The pooling weight is the product of the blocks' gates, scaled to mean 1.
* ``gate: weights`` (Def. 3.7) is the default: gates weigh transitions and leave features alone.
  ``features-and-weights`` also scales each block's features, which earlier models here did. Batch-wise attention on
  toy goals with sparse rewards in the context, 600 updates, four seeds, mean distance to the goal: two goals 0.07
  against 0.04 (one seed of the four makes the difference), six goals 0.17 against 0.17: no reason to leave the paper.
* No dropout (Table 6: 0.1).
* Pairs of one task off the diagonal are masked: the theory assumes that no task repeats in a meta-batch.
* Query and key contexts are halves of one draw; ``context_batch`` is the size of each.
* FOCAL's meta-batches with replacement, and its independent RL batch unless ``context_is_rl_batch``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omrl.algorithms.base import Draw, Phase, Spec
from omrl.algorithms.focal import Focal, FocalConfig
from omrl.nets.actor_critic import adam
from omrl.nets.attention import AttentionEncoder
from omrl.nets.experience import Experience


class FocalppConfig(FocalConfig):
    """FOCAL++'s hyperparameters, beside FOCAL's (``encoder_width`` and ``encoder_depth``: without attention).

    Of FOCAL's, ``probabilistic_metric``, ``kl_weight`` and ``prior_std`` have no effect, and ``metric_*`` none with
    ``loss: contrastive``.

    Attributes:
        attention: ``both`` in parallel, ``batch`` or ``sequence`` alone, or ``none``.
        gate: the batch-wise gates weigh transitions in the mean over the context (``weights``, Def. 3.7), or scale
            each block's features as well.
        loss: ``contrastive`` (Eq. 8) or FOCAL's ``metric``.
        tokens: what sequence-wise attention runs over: ``entries``, every number of (s, a, r) is a token; ``row``,
            the whole transition is one.
        hidden: width of a token.
        blocks: of the attention, one after another.
        heads: of the attention over tokens, with ``both`` and ``sequence`` alone.
        reduction: hidden / reduction units in the gate's bottleneck.
        temperature: of the contrast.
        context_batch: transitions of each of the two contexts of a drawn task, query and key.
        metric_weight: of FOCAL's loss, with ``loss: metric`` alone.
        momentum: m of the key encoder: key <- m key + (1 - m) query.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    encoder_width: Annotated[int, Field(ge=1, le=4096)] = 256
    encoder_rate: Annotated[float, Field(gt=0)] = 1e-3
    actor_rate: Annotated[float, Field(gt=0)] = 1e-3
    critic_rate: Annotated[float, Field(gt=0)] = 1e-3
    metric_weight: Annotated[float, Field(ge=0)] = 1.0
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 512
    attention: Literal["both", "batch", "sequence", "none"] = "both"
    gate: Literal["weights", "features-and-weights"] = "weights"
    loss: Literal["contrastive", "metric"] = "contrastive"
    tokens: Literal["entries", "row"] = "entries"
    hidden: Annotated[int, Field(ge=1, le=4096)] = 128
    blocks: Annotated[int, Field(ge=1, le=16)] = 3
    heads: Annotated[int, Field(ge=1, le=256)] = 8
    reduction: Annotated[int, Field(ge=1, le=4096)] = 16
    temperature: Annotated[float, Field(gt=0)] = 0.5
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _fits(self) -> FocalppConfig:
        if self.attention in ("both", "sequence") and self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} and heads = {self.heads}; expected hidden a multiple of heads")
        if self.encoder != "deterministic" or self.coupled:
            raise ValueError("encoder and coupled are FOCAL's; expected encoder: deterministic and coupled: false")
        if self.loss == "contrastive" and self.context_is_rl_batch and self.rl_batch < 2:
            raise ValueError(f"rl_batch = {self.rl_batch} with context_is_rl_batch; expected 2 or more, for two halves")
        return self


def matrix_contrast(query: Tensor, key: Tensor, tasks: Tensor, temperature: float) -> Tensor:
    """Return -trace(M), M_ij = log softmax_j(z^q_i . z^k_j / temperature) (FOCAL++ Eqs 7 and 8).

    Args:
        query, key: embeddings [m, latent]; no gradient flows into ``key``.
        tasks: int64 [m]; off the diagonal, pairs of one task are left out of the softmax.
        temperature: above 0.
    """
    logits = query @ key.detach().T / temperature
    repeated = (tasks[:, None] == tasks[None, :]) & ~torch.eye(len(tasks), dtype=torch.bool, device=tasks.device)
    return -logits.masked_fill(repeated, -torch.inf).log_softmax(dim=1).diagonal().sum()


class Focalpp(Focal):
    """See the module's docstring."""

    CONFIG = FocalppConfig

    def __init__(self, config: FocalppConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.plus = config
        if config.attention != "none":
            # FOCAL declares its own two encoders only; naming a third there would change its fingerprint
            self.encoder = AttentionEncoder(  # type: ignore[assignment]
                spec.context, config.latent_dim, config.hidden, config.blocks, config.heads, config.reduction,
                config.attention, config.gate, config.tokens, self.generator,
            ).to(self.device)  # fmt: skip
            self.encoder_optimizer = adam(self.encoder.parameters(), config.encoder_rate)
        self.key = copy.deepcopy(self.encoder).requires_grad_(False) if config.loss == "contrastive" else None

    def draws(self) -> dict[str, Draw]:
        """Return what an update draws: with contrast, query and key contexts together."""
        draws = super().draws()
        if self.key is not None and "context" in draws:
            draws["context"] = replace(draws["context"], rows=2 * draws["context"].rows)
        return draws

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of encoder, key encoder, actor and critic (Algorithm 1)."""
        if self.key is None:
            return super().update(phase, batch)
        config = self.plus
        context = self.bag(batch)
        rows = self.rows(context)
        half = rows.shape[1] // 2
        z = self.encoder(rows[:, :half])
        with torch.no_grad():
            key = self.key(rows[:, half:])
        loss = matrix_contrast(z, key, context.task, config.temperature)
        self.encoder_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.encoder_optimizer.step()
        with torch.no_grad():  # Algorithm 1, line 23: after the encoder's step
            torch._foreach_lerp_(list(self.key.parameters()), list(self.encoder.parameters()), 1 - config.momentum)
        scalars = {"contrastive_loss": loss.detach(), "z_rms": z.detach().square().mean().sqrt()}
        return scalars | self.actor_critic.update(batch["transitions"], z.detach(), self.more(batch))

    @torch.no_grad()
    def attention_weights(self, context: Experience) -> Tensor:
        """Return the batch-wise weights [tasks, n], of mean 1 per task (Fig. 5c); all 1 without a gate."""
        if isinstance(self.encoder, AttentionEncoder):
            return self.encoder.transitions(self.rows(context))[1]
        return torch.ones_like(context.reward)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return encoder, actor-critic and, with contrast, the key encoder."""
        return super().modules() | ({} if self.key is None else {"key": self.key})


CONFIG = FocalppConfig
ALGORITHM = Focalpp
