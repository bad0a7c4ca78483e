"""Networks that gradient steps adapt per task, whose adapted weights have a closed form (MACAW section 4.1).

A layer in_ -> out has a vector theta of P = in_ * out + out numbers: its weight matrix [in_, out], row by row, and its
bias. How theta comes about is the layer's ``kind``:

    weight    theta = H z + h                    a weight transform: latent z, hyper-matrix H [P, c], h [P]
    bias      theta = (W, H z + b)               an ordinary layer whose bias has a transform, c = out
    none      theta = (W, b)

An inner step of gradient descent moves every tensor by its own learned rate a = softplus(rho). With g = dL/dtheta of
one task, and z, h, H standing for the tensors before the step,

    z' = z - a_z H^T g,    theta' = H z' + h - (a_H z.z' + a_h) g,

so that the adapted H of a task (P x c numbers, millions at the published size) never has to exist. After n steps
H_n = H - sum_j a_H g_j z_j^T is still of low rank. Tasks are batched: H^T g and H z' of all of them are two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["weight", "bias", "none"]


@dataclass
class Steps:
    """The inner steps that a layer has taken, one entry each.

    Attributes:
        gradient: dL/dtheta, [tasks, P].
        latent: z before the step, [1 or tasks, c]; none without a transform.
        pull: H^T g with the H of then, [tasks, c].
    """

    gradient: list[Tensor] = field(default_factory=list)
    latent: list[Tensor] = field(default_factory=list)
    pull: list[Tensor] = field(default_factory=list)


class Layer(nn.Module):
    """A layer of ``Adaptive``; see the module's docstring.

    Args:
        inputs, outputs: widths.
        kind: how theta comes about.
        latent: c of a weight transform.
        rate: r; rho starts at log(r), so that the first step size of every tensor is log(1 + r), as in the released
            code: 0.0009995 for 1e-3.
        generator: source of the initial weights: H and h of a weight transform uniform within 1/sqrt(c), W and b
            within 1/sqrt(inputs), H of a bias transform normal with variance 1/outputs (Xavier), and z normal with
            standard deviation 1/outputs, all as in the released code.
    """

    def __init__(
        self, inputs: int, outputs: int, kind: Kind, latent: int, rate: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * bound)

        def normal(std: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * std)

        made = inputs * outputs + outputs if kind == "weight" else outputs  # how much of theta is not W
        self.plain = inputs * outputs + outputs - made
        bound = 1 / math.sqrt(latent if kind == "weight" else inputs)
        self.weight = uniform(bound, inputs * outputs) if kind != "weight" else None
        self.latent = normal(1 / outputs, latent if kind == "weight" else outputs) if kind != "none" else None
        if kind == "weight":
            self.hyper: nn.Parameter | None = uniform(bound, made, latent)
        else:
            self.hyper = normal(1 / math.sqrt(outputs), made, outputs) if kind == "bias" else None
        self.base = uniform(bound, made)
        self.tensors = [name for name, _ in self.named_parameters()]
        self.rates = nn.Parameter(torch.full((len(self.tensors),), math.log(rate)))

    def rate(self, name: str) -> Tensor:
        """Return the step size of a tensor."""
        return functional.softplus(self.rates[self.tensors.index(name)])

    def _latent(self, steps: Steps, shares: Sequence[float]) -> Tensor:
        """Return z after the steps, [1 or tasks, c]."""
        moved: Tensor = self.latent.unsqueeze(0)  # type: ignore[union-attr]
        for share, pull in zip(shares, steps.pull, strict=True):
            moved = moved - share * self.rate("latent") * pull
        return moved

    def theta(self, steps: Steps, shares: Sequence[float] | None = None) -> Tensor:
        """Return theta after the steps, [1 or tasks, P].

        Args:
            steps: taken so far.
            shares: how much of each step counts; 1 each if None.
        """
        shares = [1.0] * len(steps.gradient) if shares is None else shares
        made, moved = self.base.unsqueeze(0), None
        if self.hyper is not None:
            moved = self._latent(steps, shares)
            made = torch.addmm(self.base, moved, self.hyper.t())
        for place, (share, gradient) in enumerate(zip(shares, steps.gradient, strict=True)):
            scale = self.rate("base")
            if moved is not None:
                scale = scale + self.rate("hyper") * (steps.latent[place] * moved).sum(-1, keepdim=True)
            made = made - share * scale * gradient[:, self.plain :]
        if self.weight is None:
            return made
        weight = self.weight.unsqueeze(0)
        for share, gradient in zip(shares, steps.gradient, strict=True):
            weight = weight - share * self.rate("weight") * gradient[:, : self.plain]
        return torch.cat([weight.expand(len(made), -1), made.expand(len(weight), -1)], dim=1)

    def step(self, steps: Steps, gradient: Tensor) -> None:
        """Add an inner step with the gradient of theta, [tasks, P]."""
        if self.hyper is not None:
            own = gradient[:, self.plain :]
            pull = own @ self.hyper
            for earlier, latent in zip(steps.gradient, steps.latent, strict=True):
                along = (earlier[:, self.plain :] * own).sum(-1, keepdim=True)
                pull = pull - self.rate("hyper") * along * latent
            steps.latent.append(self._latent(steps, [1.0] * len(steps.pull)))
            steps.pull.append(pull)
        steps.gradient.append(gradient)

    @torch.no_grad()
    def take(self, steps: Steps) -> None:
        """Become the layer of the one task that took the steps: write z, H, h and W out."""
        if self.hyper is not None and self.latent is not None:
            for gradient, latent in zip(steps.gradient, steps.latent, strict=True):
                self.hyper.sub_(self.rate("hyper") * gradient[:, self.plain :].t() @ latent)
            self.latent.copy_(self._latent(steps, [1.0] * len(steps.pull))[0])
        for gradient in steps.gradient:
            self.base.sub_(self.rate("base") * gradient[0, self.plain :])
            if self.weight is not None:
                self.weight.sub_(self.rate("weight") * gradient[0, : self.plain])


class Adaptive(nn.Module):
    """Layers that inner steps adapt; which layer feeds which is the caller's.

    Args:
        shapes: (inputs, outputs) of every layer.
        kind, latent, rate, generator: see ``Layer``.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], kind: Kind, latent: int, rate: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(n, m, kind, latent, rate, generator) for n, m in shapes)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def weights(self) -> list[nn.Parameter]:
        """Return the tensors that inner steps move."""
        return [tensor for layer in self._layers() for n, tensor in layer.named_parameters() if n != "rates"]

    def rates(self) -> list[nn.Parameter]:
        """Return rho of all tensors, one parameter a layer."""
        return [layer.rates for layer in self._layers()]

    def mean_rate(self) -> Tensor:
        """Return the mean step size of all tensors."""
        return functional.softplus(torch.cat([rates.detach() for rates in self.rates()])).mean()

    def start(self) -> list[Steps]:
        """Return no steps."""
        return [Steps() for _ in self.layers]

    def thetas(self, path: list[Steps], shares: Sequence[float] | None = None) -> list[Tensor]:
        """Return every layer's theta, [1 or tasks, P]; see ``Layer.theta``."""
        return [layer.theta(steps, shares) for layer, steps in zip(self._layers(), path, strict=True)]

    def adapt(
        self, tasks: int, losses: Sequence[Callable[[list[Tensor]], Tensor]], differentiable: bool
    ) -> list[Steps]:
        """Take one inner step for each loss; return the steps.

        Args:
            tasks: number of tasks.
            losses: thetas [tasks, P] of every layer -> loss of every task [tasks].
            differentiable: keep the graph, so that gradients pass through the steps (second order).
        """
        path = self.start()
        for loss in losses:
            thetas = [theta.expand(tasks, -1) for theta in self.thetas(path)]
            found = torch.autograd.grad(loss(thetas).sum(), thetas, create_graph=differentiable)
            for layer, steps, gradient in zip(self._layers(), path, found, strict=True):
                layer.step(steps, gradient)
        return path

    def take(self, path: list[Steps]) -> None:
        """Become the network of the one task that took the steps."""
        for layer, steps in zip(self._layers(), path, strict=True):
            layer.take(steps)

    def split(self, flat: Tensor, count: int) -> list[Tensor]:
        """Return the weights [tasks, sum of P] of the first ``count`` layers one by one."""
        sizes = [layer.inputs * layer.outputs + layer.outputs for layer in self._layers()[:count]]
        return list(flat.split(sizes, dim=-1))


def linear(theta: Tensor, x: Tensor) -> Tensor:
    """Apply layers [tasks, P] to [tasks, n, inputs], each task's to its own rows; return [tasks, n, outputs]."""
    inputs = x.shape[-1]
    outputs = theta.shape[-1] // (inputs + 1)
    weight, bias = theta.split([inputs * outputs, outputs], dim=-1)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.reshape(len(theta), inputs, outputs))


def mlp(thetas: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply layers with ReLU between them; return what the last one gives."""
    for place, theta in enumerate(thetas):
        x = linear(theta, torch.relu(x) if place else x)
    return x
