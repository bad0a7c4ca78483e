"""FOCAL++'s context encoder: batch-wise gate and sequence-wise self-attention, in parallel and summed."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["both", "batch", "sequence"]
Gate = Literal["weights", "features-and-weights"]


class _Linear(nn.Module):
    """Linear map with weights uniform within 1/sqrt(n_in) from ``generator``; all zero without one."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator | None) -> None:
        super().__init__()
        weight = torch.zeros(inputs, outputs)
        if generator is not None:
            weight = (torch.rand(inputs, outputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class BatchGate(nn.Module):
    """One positive weight per transition, of mean 1 over its context (FOCAL++ Def. 3.7, Eq. 18).

    A bottleneck per transition, sigmoid, average over features. The last layer starts at zero: all weights are 1.
    """

    def __init__(self, width: int, reduction: int, generator: torch.Generator) -> None:
        super().__init__()
        narrow = max(1, width // reduction)
        self.squeeze, self.excite = _Linear(width, narrow, generator), _Linear(narrow, width, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return weights [tasks, n] for features [tasks, n, width]."""
        gate = torch.sigmoid(self.excite(torch.tanh(self.squeeze(x)))).mean(-1)
        return gate / gate.mean(dim=1, keepdim=True)


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention over a transition's tokens; its output starts at zero.

    Tokens are few and heads narrow, so rows lie along the last axis: products and softmax are then elementwise over
    rows, which is faster than thousands of tiny matrix products.
    """

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.outputs = _Linear(width, 3 * width, generator), _Linear(width, width, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [rows, tokens, width] for x of that shape."""
        rows, tokens, width = x.shape
        columns = x.permute(2, 1, 0).reshape(width, tokens * rows)
        parts = torch.addmm(self.inputs.bias.unsqueeze(1), self.inputs.weight.T, columns)
        query, key, value = parts.view(3, self.heads, width // self.heads, tokens, rows)
        scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(1) / math.sqrt(width // self.heads)
        weights = scores.softmax(2)  # [heads, query token, key token, rows]
        mixed = (weights.unsqueeze(1) * value.unsqueeze(2)).sum(3).reshape(width, tokens * rows)
        out = torch.addmm(self.outputs.bias.unsqueeze(1), self.outputs.weight.T, mixed)
        return out.view(width, tokens, rows).permute(2, 1, 0)


class Block(nn.Module):
    """x <- [w] x + SelfAttention(LN(x)), then x <- x + feed-forward(LN(x)); the identity at initialization.

    The gate's w scales the features with ``features-and-weights`` only; it is returned either way.
    """

    def __init__(
        self, width: int, heads: int, reduction: int, kind: Kind, gate: Gate, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scales = gate == "features-and-weights"
        self.gate = BatchGate(width, reduction, generator) if kind != "sequence" else None
        self.attention = SelfAttention(width, heads, generator) if kind != "batch" else None
        self.norm, self.norm_out = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.wide, self.narrow = _Linear(width, 4 * width, generator), _Linear(4 * width, width, None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features [tasks, n, tokens, width] and the gate's weights [tasks, n] (None without a gate)."""
        tasks, n, tokens, width = x.shape
        normed = self.norm(x)
        weights = None if self.gate is None else self.gate(normed.mean(2))
        out = x * weights[..., None, None] if weights is not None and self.scales else x
        if self.attention is not None:
            out = out + self.attention(normed.view(tasks * n, tokens, width)).reshape(x.shape)
        out = out + self.narrow(functional.gelu(self.wide(self.norm_out(out)), approximate="tanh"))
        return out, weights


class AttentionEncoder(nn.Module):
    """Embeds a bag of transitions: z = mean over the context of w tanh(features), in (-1, 1)^latent.

    w is the product of the blocks' gates, scaled to mean 1 (1 without gates).

    Args:
        inputs: width of a context row.
        latent: width of z.
        width: of a token; a multiple of ``heads``.
        blocks, heads, reduction: see ``FocalppConfig``.
        kind: which attention.
        gate: what the gates act on, see ``FocalppConfig``.
        tokens: ``entries``: every scalar of (s, a, r[, s']) is a token with a direction and an offset of its own.
            ``row``: the whole row is the only token, over which attention is one linear map.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        latent: int,
        width: int,
        blocks: int,
        heads: int,
        reduction: int,
        kind: Kind,
        gate: Gate,
        tokens: Literal["entries", "row"],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.by_entry = tokens == "entries" and kind != "batch"  # without attention, tokens would only cost time
        self.front: nn.Module | None = None if self.by_entry else _Linear(inputs, width, generator)
        if self.by_entry:
            self.directions = nn.Parameter(torch.randn(inputs, width, generator=generator))
            self.offsets = nn.Parameter(torch.randn(inputs, width, generator=generator))
        self.blocks = nn.ModuleList(Block(width, heads, reduction, kind, gate, generator) for _ in range(blocks))
        self.tail = _Linear(width, latent, generator)

    def transitions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings [tasks, n, latent] of single transitions and their weights [tasks, n], of mean 1."""
        if self.front is None:
            x = torch.tanh(rows.unsqueeze(-1) * self.directions + self.offsets)
        else:
            x = torch.tanh(self.front(rows)).unsqueeze(2)
        weights = torch.ones_like(rows[..., 0])
        for block in self.blocks:
            x, gate = block(x)
            if gate is not None:
                weights = weights * gate
        weights = weights / weights.mean(dim=1, keepdim=True)
        return torch.tanh(self.tail(x.mean(2))), weights

    def forward(self, rows: Tensor) -> Tensor:
        """Return z [tasks, latent] for context rows [tasks, n, inputs] (Eq. 18)."""
        each, weights = self.transitions(rows)
        return (each * weights.unsqueeze(-1)).mean(1)
