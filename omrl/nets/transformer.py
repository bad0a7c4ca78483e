"""A causal transformer over sequences of vectors (GPT-2's blocks, without its token and place embeddings)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

_STD = 0.02  # of initial weights, as in GPT-2


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with weights N(0, 0.02^2) from ``generator`` and biases 0."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(0, _STD, generator=generator)
        layer.bias.zero_()
    return layer


def embedding(count: int, width: int, generator: torch.Generator) -> nn.Embedding:
    """Return a table of ``count`` vectors N(0, 0.02^2) from ``generator``."""
    return nn.Embedding(count, width, _weight=torch.empty(count, width).normal_(0, _STD, generator=generator))


class Block(nn.Module):
    """Masked self-attention and a two-layer network with ReLU, each normalized before and added after."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs = linear(width, 3 * width, generator), linear(width, width, generator)
        self.widen, self.narrow = linear(width, 4 * width, generator), linear(4 * width, width, generator)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [n, t, width] for x of that shape; ``mask``, bool [n, 1, t, t], says who looks at whom."""
        n, t, width = x.shape
        split = self.inputs(self.first(x)).view(n, t, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [n, heads, t, width / heads]
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels' gradients are not the same twice on a GPU
            seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.outputs(seen.transpose(1, 2).reshape(n, t, width))
        return x + self.narrow(torch.relu(self.widen(self.second(x))))


class CausalTransformer(nn.Module):
    """``depth`` blocks; a token sees itself and the valid tokens before it.

    Args:
        width: of a token; a multiple of ``heads``.
        depth: blocks.
        heads: of the attention.
        generator: source of the initial weights.
    """

    def __init__(self, width: int, depth: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, generator) for _ in range(depth))
        self.last = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return [n, t, width] for tokens x [n, t, width]; ``valid`` [n, t] is 0 for padding, which nobody sees."""
        t = x.shape[1]
        past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(t, dtype=torch.bool, device=x.device)  # so that padding has something to look at
        mask = (past & (valid > 0).unsqueeze(1) | itself).unsqueeze(1)
        for block in self.blocks:
            x = block(x, mask)
        out: Tensor = self.last(x)
        return out
