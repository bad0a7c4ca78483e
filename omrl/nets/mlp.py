"""Networks of the context-based methods: MLPs that run as a stack, and the tanh-Gaussian policy."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LAST_LAYER = 3e-3  # bound of the last layer's initial weights and biases, as in the released code
POLICY_HEAD = 1e-3
HIDDEN_BIAS = 0.1


def _uniform(generator: torch.Generator, bound: float, *shape: int) -> Tensor:
    return (torch.rand(*shape, generator=generator) * 2 - 1) * bound


class Mlp(nn.Module):
    """``stack`` independent MLPs with ReLU, evaluated together by batched matrix products.

    Initialization follows the released FOCAL code (inherited from rlkit): hidden weights uniform within
    1/sqrt(n_out) (it takes the output size for the fan-in), hidden biases 0.1, last layer within ``last``.

    Args:
        inputs: width of the input.
        hidden: widths of the hidden layers.
        outputs: width of the output.
        generator: source of the initial weights.
        stack: number of networks.
        last: bound of the last layer's initial weights and biases.
        layer_norm: normalize every hidden layer's outputs to mean 0 and variance 1. It has no scale and offset of
            its own: the layer that follows is linear and has both.
    """

    def __init__(
        self,
        inputs: int,
        hidden: list[int],
        outputs: int,
        generator: torch.Generator,
        stack: int = 1,
        last: float = LAST_LAYER,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        sizes = [inputs, *hidden, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for place, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            is_last = place == len(hidden)
            bound = last if is_last else 1 / math.sqrt(n_out)
            self.weights.append(nn.Parameter(_uniform(generator, bound, stack, n_in, n_out)))
            bias = _uniform(generator, last, stack, 1, n_out) if is_last else torch.full((stack, 1, n_out), HIDDEN_BIAS)
            self.biases.append(nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return [stack, n, outputs] for x [n, inputs]; without the first axis if the stack has one network."""
        if self.weights[0].shape[0] == 1:
            for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                x = torch.addmm(bias[0], self._activate(x) if place else x, weight[0])
            return x
        x = x.expand(self.weights[0].shape[0], *x.shape)
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, self._activate(x) if place else x, weight)
        return x

    def _activate(self, x: Tensor) -> Tensor:
        x = torch.relu_(x)
        return functional.layer_norm(x, x.shape[-1:]) if self.layer_norm else x


class Policy(nn.Module):
    """tanh-Gaussian policy pi(a | s, z): a trunk with a mean and a log-std head.

    log-std is clamped to [``log_std_min``, ``log_std_max``]: [-20, 0] in FOCAL, [-20, 2] in PEARL.
    """

    def __init__(
        self,
        inputs: int,
        hidden: list[int],
        actions: int,
        generator: torch.Generator,
        log_std_min: float = -20.0,
        log_std_max: float = 0.0,
    ) -> None:
        super().__init__()
        self.trunk = Mlp(inputs, hidden, 2 * actions, generator, last=POLICY_HEAD)
        self.actions, self.bounds = actions, (log_std_min, log_std_max)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pre-tanh mean and log-std, each [n, actions]."""
        mean, log_std = self.trunk(x).split(self.actions, dim=-1)
        return mean, log_std.clamp(*self.bounds)

    def sample(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return action in (-1, 1), its log-probability [n], mean and log-std; ``noise`` is standard normal.

        log pi(a) = log N(u; mean, std) - sum log(1 - a^2 + 1e-6) with a = tanh(u) (SAC, appendix C).
        """
        mean, log_std = self(x)
        action = torch.tanh(mean + log_std.exp() * noise)
        normal = -0.5 * (noise * noise + math.log(2 * math.pi)) - log_std
        log_prob = (normal - torch.log(1 - action * action + 1e-6)).sum(-1)
        return action, log_prob, mean, log_std
