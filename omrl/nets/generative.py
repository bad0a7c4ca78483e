"""Generative parts that several methods share: an action VAE with bounded moves (BCQ), product of Gaussians (PEARL)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Net = Callable[[Tensor], Tensor]  # [..., inputs] to [..., outputs]

_SMALLEST = 1e-7  # of a variance, and of a precision


def decoded(decoder: Net, state: Tensor, latent: Tensor) -> Tensor:
    """Return the VAE's action in (-1, 1) for a state and a latent, [..., action]."""
    return torch.tanh(decoder(torch.cat([state, latent], dim=-1)))


def vae_loss(encoder: Net, decoder: Net, state: Tensor, action: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Return the loss of a VAE of the behavior's actions (BCQ Algorithm 1): squared error and weighted KL, both means.

    Args:
        encoder: of (state, action), to mean and log-std of the latent; log-std is clamped to [-4, 15].
        decoder: of (state, latent).
        state: [..., width].
        action: the data's, [..., action].
        noise: standard normal, [..., latent].
        kl_weight: of the KL divergence to N(0, I).
    """
    mean, log_std = encoder(torch.cat([state, action], dim=-1)).chunk(2, dim=-1)
    log_std = log_std.clamp(-4, 15)
    found = decoded(decoder, state, mean + log_std.exp() * noise)
    kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
    return (found - action).square().mean() + kl_weight * kl


def perturbed(shift: Net, state: Tensor, action: Tensor, size: float) -> Tensor:
    """Return the action moved by at most ``size``, within [-1, 1] (BCQ's perturbation)."""
    return (action + size * torch.tanh(shift(torch.cat([state, action], dim=-1)))).clamp(-1, 1)


def posterior(factors: Tensor, mask: Tensor | None = None, std: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and variance [..., latent] of a product of Gaussians, one per row (PEARL Eq. 3).

    Args:
        factors: [..., n, 2 * latent], means and raw scales; variance = softplus(raw scale), at least 1e-7.
        mask: [..., n], 1 for the rows that count, None for all; with none, the result is N(0, 1e7).
        std: softplus(raw scale) is the standard deviation instead.
    """
    mean, scale = factors.chunk(2, dim=-1)
    spread = functional.softplus(scale)
    variances = (spread.square() if std else spread).clamp(min=_SMALLEST)
    precision = 1 / variances if mask is None else mask.unsqueeze(-1) / variances
    variance = 1 / precision.sum(-2).clamp(min=_SMALLEST)
    return variance * (mean * precision).sum(-2), variance


def diagonal_kl(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> Tensor:
    """Return KL(one || two) of diagonal Gaussians given as (mean, variance), summed over the last axis."""
    (m1, v1), (m2, v2) = one, two
    return 0.5 * ((v1 + (m1 - m2).square()) / v2 - 1 + v2.log() - v1.log()).sum(-1)
