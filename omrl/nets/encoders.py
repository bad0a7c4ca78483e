"""Context encoders: from a bag of transitions of one task to its embedding z."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omrl.nets.generative import posterior
from omrl.nets.mlp import Mlp


class DeterministicEncoder(nn.Module):
    """FOCAL's encoder: an MLP per transition, tanh, mean over the context; z in (-1, 1)^latent."""

    def __init__(self, inputs: int, hidden: list[int], latent: int, generator: torch.Generator) -> None:
        super().__init__()
        self.latent = latent
        self.net = Mlp(inputs, hidden, latent, generator)

    def forward(self, rows: Tensor) -> Tensor:
        """Return z [tasks, latent] for context rows [tasks, n, inputs]."""
        tasks, n, width = rows.shape
        return torch.tanh(self.net(rows.reshape(tasks * n, width))).view(tasks, n, self.latent).mean(dim=1)


class ProbabilisticEncoder(nn.Module):
    """PEARL's inference: a product of one Gaussian per transition (PEARL Eq. 3), variance = softplus(raw scale).

    ``bounded``: mean and raw scale are tanh-bounded as in FOCAL's released ablation; PEARL's own are not.
    """

    def __init__(
        self, inputs: int, hidden: list[int], latent: int, generator: torch.Generator, bounded: bool = True
    ) -> None:
        super().__init__()
        self.latent, self.bounded = latent, bounded
        self.net = Mlp(inputs, hidden, 2 * latent, generator)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of q(z | c), each [tasks, latent]."""
        tasks, n, width = rows.shape
        raw = self.net(rows.reshape(tasks * n, width)).view(tasks, n, 2 * self.latent)
        return posterior(torch.tanh(raw) if self.bounded else raw)


def gaussian_kl(mean: Tensor, variance: Tensor, prior_std: float) -> Tensor:
    """Return the KL divergence from N(mean, variance) to N(0, prior_std^2), summed over tasks and dimensions."""
    prior = prior_std**2
    ratio = variance / prior
    return 0.5 * (ratio + mean * mean / prior - 1 - torch.log(ratio)).sum()
