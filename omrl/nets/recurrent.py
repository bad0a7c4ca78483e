"""A recurrent belief over tasks and what it says of rewards: encoder and decoder of a VAE (VariBAD, BOReL).

Sizes are BOReL's release's: features of 16 (action), 32 (state) and 16 (reward), a decoder of 32 - 32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTION, STATE, REWARD = 16, 32, 16  # units of the feature layers
HIDDEN = 32  # units of the decoder's two hidden layers


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with torch's own initialization, uniform within 1/sqrt(inputs), from ``generator``."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) / math.sqrt(inputs))
    return layer


class BeliefEncoder(nn.Module):
    """From steps (a, s', r) to beliefs N(mean, exp(log_variance)): feature layers, GRU, two heads.

    Args:
        observation, action: widths.
        hidden: of the GRU.
        latent: of the belief.
        generator: source of the initial weights; the GRU's are orthogonal, its biases 0.
    """

    def __init__(self, observation: int, action: int, hidden: int, latent: int, generator: torch.Generator) -> None:
        super().__init__()
        self.action, self.state = linear(action, ACTION, generator), linear(observation, STATE, generator)
        self.reward = linear(1, REWARD, generator)
        self.gru = nn.GRU(ACTION + STATE + REWARD, hidden, batch_first=True, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in self.gru.named_parameters():
                if name.startswith("weight"):
                    nn.init.orthogonal_(parameter, generator=generator)
                else:
                    parameter.zero_()
        self.mean, self.log_variance = linear(hidden, latent, generator), linear(hidden, latent, generator)

    def forward(self, action: Tensor, state: Tensor, reward: Tensor, before: Tensor) -> Tensor:
        """Return the hidden states [n, t, hidden] after every step.

        Args:
            action, state: [n, t, width]; the state is the one that the action led to.
            reward: [n, t].
            before: hidden states [n, hidden] before the first step.
        """
        features = (self.action(action), self.state(state), self.reward(reward.unsqueeze(-1)))
        out, _ = self.gru(torch.relu(torch.cat(features, dim=-1)), before.unsqueeze(0).contiguous())
        return out

    def belief(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [..., latent] of hidden states [..., hidden]; zeros are the prior."""
        return self.mean(hidden), self.log_variance(hidden)


class RewardDecoder(nn.Module):
    """What a belief says of the rewards of steps: (z, s', a, s) -> r, or (z, s') -> r.

    Every belief decodes every step. The first layer is a sum of a part of z and a part of the step, so that the
    features run once per step and once per belief instead of once per pair.

    Args:
        observation, action: widths.
        latent: of z.
        transition: decode from (s', a, s), whose state features are shared; else from s' alone.
        generator: source of the initial weights.
    """

    def __init__(
        self, observation: int, action: int, latent: int, transition: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.state = linear(observation, STATE, generator)
        self.action = linear(action, ACTION, generator) if transition else None
        step = 2 * STATE + ACTION if transition else STATE
        self.first = linear(latent + step, HIDDEN, generator)
        self.second, self.last = linear(HIDDEN, HIDDEN, generator), linear(HIDDEN, 1, generator)

    def features(self, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """Return what is decoded from of every step, [n, t, width]."""
        parts = [self.state(following)]
        if self.action is not None:
            parts += [self.action(action), self.state(state)]
        return torch.relu(torch.cat(parts, dim=-1))

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        """Return rewards [n, beliefs, t] for z [n, beliefs, latent] and features [n, t, width]."""
        of_z, of_step = self.first.weight.split([z.shape[-1], features.shape[-1]], dim=1)
        both = functional.linear(z, of_z, self.first.bias).unsqueeze(2) + functional.linear(
            features, of_step
        ).unsqueeze(1)
        out: Tensor = self.last(torch.relu(self.second(torch.relu(both)))).squeeze(-1)
        return out


def gaussian_divergence(mean: Tensor, log_variance: Tensor, to_mean: Tensor, to_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(to_mean, exp(to_log_variance))), summed over the last axis."""
    difference = log_variance - to_log_variance
    squared = (mean - to_mean).square() * (-to_log_variance).exp()
    return 0.5 * (difference.exp() - difference - 1 + squared).sum(-1)
