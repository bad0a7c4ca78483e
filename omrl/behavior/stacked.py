"""Soft actor-critic for N independent tasks as one computation.

The parameters of all tasks lie in one tensor per network, a layer is one batched matrix product, and one
optimizer step serves all tasks. The gradients are written out: there is no graph to build, and what is not
needed (the critics' weights in the actor's step, the target networks) is not computed.

What is computed is an update of ``stable_baselines3.SAC.train`` (Haarnoja et al. 2018, Algorithm 1, with a
learned temperature), in its order: temperature, critics, actor, targets. A test holds it against SB3 itself.
A task's numbers do not depend on the other tasks: every operation is elementwise, a reduction inside the
task's rows, or a batched product, whose entries are computed one by one. That takes care in three places. The
last elements of a tensor may be rounded otherwise than those before, by instructions that take one at a time: the
parameters of all networks end with a whole block. Small products may be rounded otherwise where a matrix does not
start at a multiple of 64 bytes: each does. And PyTorch takes the fast kernels where a product is large enough,
for all tasks together: here, for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # as in stable_baselines3.sac.policies
_SQUASH = 1e-6  # SB3's guard in the logarithm of 1 - a^2
_BLOCK = 64  # floats, a multiple of what elementwise operations take at a time
_LINE = 16  # floats in 64 bytes: products may round otherwise for matrices that start elsewhere
_SMALL = 16**3  # multiplications, see _product
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Stack:
    """M multilayer perceptrons of one shape with ReLU between the layers.

    Args:
        sizes: widths, input first.
        count: M.
        device: where the tensors live.
        spare: numbers beside the parameters.

    Attributes:
        flat: all parameters. Layer by layer the weights [M, out, in] of all networks, then the biases [M, out];
            only the first layer has them together, [M, out, in + 1], for inputs that end in a one. Every
            network's part starts at a multiple of 16, with zeros before it. Where there is no gap, as with most
            widths, the fast kernels need no copy.
        grad: what ``backward`` writes, in the same order.
    """

    def __init__(self, sizes: Sequence[int], count: int, device: torch.device, spare: int = 0) -> None:
        self.sizes, self.count = list(sizes), count
        self._shapes: list[tuple[int, ...]] = [(count, sizes[1], sizes[0] + 1)]
        for n, m in pairwise(sizes[1:]):
            self._shapes += [(count, m, n), (count, m)]
        self._shapes.append((spare, 1))
        self._starts = [0, *accumulate(_up(shape[0] * _up(math.prod(shape[1:])), _BLOCK) for shape in self._shapes)]
        self.flat = torch.zeros(self._starts[-1], device=device)
        self.grad = torch.zeros_like(self.flat)
        self._layers, self._grads = self._pairs(self.flat), self._pairs(self.grad)
        self._factors = [(w.transpose(1, 2), b if b is None else b.unsqueeze(1)) for w, b in self._layers]
        self._memory: dict[tuple[int, str], list[Tensor]] = {}

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [
            _cut(flat[start : start + shape[0] * _up(math.prod(shape[1:]))], shape)
            for start, shape in zip(self._starts, self._shapes, strict=False)
        ]

    def _pairs(self, flat: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return every layer's weight and bias; the first one's are one tensor."""
        first, *rest, _ = self._parts(flat)
        return [(first, None), *zip(rest[::2], rest[1::2], strict=True)]

    def views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (weight [M, out, in], bias [M, out]) of every layer as views of a tensor like ``flat``."""
        return [
            (weight[..., :-1], weight[..., -1]) if bias is None else (weight, bias)
            for weight, bias in self._pairs(flat)
        ]

    def spare(self, flat: Tensor) -> Tensor:
        """Return the numbers beside the parameters in a tensor like ``flat``, [spare, 1]."""
        return self._parts(flat)[-1]

    def inputs(self, batch: int) -> Tensor:
        """Return where the inputs of ``forward`` go, [M, batch, in + 1], the same tensor every time; ends in ones."""
        key = batch, "input"
        if key not in self._memory:
            self._memory[key] = [self._space(batch, self.sizes[0] + 1)]
        return self._memory[key][0]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return [input, hidden..., output] for ``x`` [M, B, in + 1]; hidden layers after their ReLU.

        The tensors are overwritten by the next call with the same B.
        """
        values = [x]
        for place, ((weight, bias), out) in enumerate(zip(self._factors, self._work(x.shape[1], "value"), strict=True)):
            _product(x, weight, out=out)
            if bias is not None:
                out.add_(bias)
            x = out.relu_() if place < len(self._layers) - 1 else out
            values.append(x)
        return values

    def backward(self, values: list[Tensor], grad: Tensor) -> None:
        """Write the parameters' gradients to ``grad``, for the gradient [M, B, out] of the output."""
        grad = self._placed(grad)
        for place in range(len(self._layers) - 1, -1, -1):
            weight_grad, bias_grad = self._grads[place]
            _product(grad.transpose(1, 2), values[place], out=weight_grad)
            if bias_grad is not None:
                torch.sum(grad, 1, out=bias_grad)
            if place:
                grad = self._through(place, values, grad)

    def input_grad(self, values: list[Tensor], grad: Tensor, first: int) -> Tensor:
        """Return the gradient of input columns from ``first`` on, [M, B, in - first]."""
        grad = self._placed(grad)
        for place in range(len(self._layers) - 1, 0, -1):
            grad = self._through(place, values, grad)
        return _product(grad, self._layers[0][0][:, :, first:-1])

    def _through(self, place: int, values: list[Tensor], grad: Tensor) -> Tensor:
        """Return the gradient [M, B, in of layer ``place``] before the ReLU that made the layer's input."""
        out = self._work(grad.shape[1], "grad")[place - 1]
        weight = self._layers[place][0]
        if grad.shape[2] == 1:
            torch.mul(grad, weight, out=out)
        else:
            _product(grad, weight, out=out)
        return torch.ops.aten.threshold_backward.grad_input(out, values[place], 0, grad_input=out)

    def _work(self, batch: int, what: str) -> list[Tensor]:
        """Return a tensor [M, batch, width] for every layer's output, the same ones every time."""
        key = batch, what
        if key not in self._memory:
            self._memory[key] = [self._space(batch, width) for width in self.sizes[1:]]
        return self._memory[key]

    def _space(self, batch: int, width: int) -> Tensor:
        """Return ones [M, batch, width]; every network's start at a multiple of 16."""
        return _cut(torch.ones(self.count * _up(batch * width), device=self.flat.device), (self.count, batch, width))

    def _placed(self, grad: Tensor) -> Tensor:
        """Return the output's gradient with every network's part at a multiple of 16."""
        if grad.shape[1] * grad.shape[2] % _LINE == 0:
            return grad
        return self._work(grad.shape[1], "grad")[-1].copy_(grad)


class Adam:
    """Adam (Kingma and Ba 2015) of one stack: PyTorch's fused kernel, whose optimizer costs more than its work here.

    Attributes:
        moments: ``exp_avg`` and ``exp_avg_sq``, in the order of the stack's parameters.
        step: steps taken.
    """

    def __init__(self, stack: Stack, learning_rate: float) -> None:
        self._stack, self._rate = stack, learning_rate
        self.moments = {name: torch.zeros_like(stack.flat) for name in ("exp_avg", "exp_avg_sq")}
        self.step = torch.zeros((), device=stack.flat.device)

    def take(self) -> None:
        """Take a step along the stack's gradient."""
        self.step += 1
        first, second = self.moments.values()
        torch._fused_adam_(
            [self._stack.flat],
            [self._stack.grad],
            [first],
            [second],
            [],
            [self.step],
            lr=self._rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class StackedSac:
    """Actors, twin critics, targets and temperatures of N tasks, with their optimizers.

    Args:
        observation_size: width of s.
        action_size: width of a.
        hidden: hidden layers of every network.
        tasks: N.
        learning_rate: of everything (Adam).
        gamma: discount.
        tau: rate of the targets.
        temperature: its initial value.
        learn_temperature: towards an entropy of minus ``action_size``.
        device: where it is computed.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        tasks: int,
        *,
        learning_rate: float,
        gamma: float,
        tau: float,
        temperature: float,
        learn_temperature: bool,
        device: torch.device,
    ) -> None:
        self.observation_size, self.action_size, self.tasks = observation_size, action_size, tasks
        self._gamma, self._tau, self._learns = gamma, tau, learn_temperature
        # the temperature's logarithm is a parameter of the actor's optimizer: their steps come together
        self.actor = Stack([observation_size, *hidden, 2 * action_size], tasks, device, spare=tasks)
        critic = [observation_size + action_size, *hidden, 1]
        self.critic = Stack(critic, 2 * tasks, device)  # network c * tasks + n: critic c of task n
        self.target = Stack(critic, 2 * tasks, device)
        self.log_temperature = self.actor.spare(self.actor.flat)  # [tasks, 1]
        self.log_temperature.fill_(_log(temperature))
        self._temperature_grad = self.actor.spare(self.actor.grad)
        self.optimizers = {"actor": Adam(self.actor, learning_rate), "critic": Adam(self.critic, learning_rate)}

    @property
    def row_size(self) -> int:
        """Width of a replay row: s', s, a, reward, and 1 where the episode goes on."""
        return 2 * self.observation_size + self.action_size + 2

    def act(self, observation: Tensor, noise: Tensor | None) -> Tensor:
        """Return actions [N, C, action_size] for observations [N, C, observation_size].

        Args:
            observation: C per task.
            noise: standard normal, as the actions; None for the policies' modes.
        """
        mean, log_std = self._policy(observation)[-1].split(self.action_size, dim=2)
        if noise is None:
            return torch.tanh(mean)
        return torch.tanh(mean + log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * noise)

    def _policy(self, observation: Tensor) -> list[Tensor]:
        """Return the actor's values for observations [N, B, observation_size], see ``Stack.forward``."""
        seen = self.actor.inputs(observation.shape[1])
        seen[..., :-1] = observation
        return self.actor.forward(seen)

    def update(self, rows: Tensor, noise: Tensor, losses: bool = False) -> dict[str, Tensor]:
        """Take one gradient step for every task.

        Args:
            rows: replay rows [N, B, row_size].
            noise: standard normal [N, 2 B, action_size], of the actions at s, then at s'.
            losses: return them too.

        Returns:
            ``actor_loss``, ``critic_loss`` and ``ent_coef`` per task [N], if asked for.
        """
        n, batch, _ = rows.shape
        width, size = self.observation_size, self.action_size
        following, observation = rows[..., :width], rows[..., width : 2 * width]
        reward, going = rows[..., -2], rows[..., -1]

        # the policy at s' and at s, whose hidden layers the actor's step needs
        heads = torch.empty(2, n, batch, 2 * size, device=rows.device)  # at s, then at s'
        heads[1] = self._policy(following)[-1]
        values = self._policy(observation)
        heads[0] = values[-1]
        noise = noise.view(n, 2, batch, size).transpose(0, 1).contiguous()
        mean, raw = heads.split(size, dim=3)
        log_std = raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
        spread = log_std.exp().mul_(noise)  # std * noise
        action = (mean + spread).tanh_()
        slope = 1 - action * action
        guarded = slope + _SQUASH
        log_prob = (-0.5 * noise * noise - log_std - guarded.log()).sum(3) - size * _HALF_LOG_TWO_PI
        temperature = self.log_temperature.exp()
        if self._learns:
            # d/d log(alpha) of -log(alpha) (log pi + H), with H = -action_size
            torch.mean(size - log_prob[0], 1, keepdim=True, out=self._temperature_grad)

        # critics: towards r + gamma (min Q'(s', a') - alpha log pi)
        ahead = _judge(self.target, following, action[1])[-1].view(2, n, batch).amin(0) - temperature * log_prob[1]
        goal = reward + going * (self._gamma * ahead)
        judged = _judge(self.critic, observation, rows[..., 2 * width : 2 * width + size])
        error = judged[-1].view(2, n, batch) - goal
        self.critic.backward(judged, (error / batch).view(2 * n, batch, 1))
        self.optimizers["critic"].take()

        # actor: down alpha log pi - min Q(s, a)
        judged = _judge(self.critic, observation, action[0])
        first, second = judged[-1].view(2, n, batch)
        lower = (first <= second).to(first.dtype)
        through = torch.stack([lower, 1 - lower]).mul_(-1 / batch).view(2 * n, batch, 1)
        grad = self.critic.input_grad(judged, through, width).view(2, n, batch, size).sum(0)
        action, slope, guarded = action[0], slope[0], guarded[0]
        weight = (temperature / batch)[..., None]
        grad_mean = grad * slope + weight * (2 * action * slope / guarded)
        inside = raw[0] == log_std[0]
        grad_log_std = (grad_mean * spread[0] - weight) * inside
        self.actor.backward(values, torch.cat([grad_mean, grad_log_std], 2))
        self.optimizers["actor"].take()

        self.target.flat.lerp_(self.critic.flat, self._tau)
        if not losses:
            return {}
        return {
            "actor_loss": (temperature * log_prob[0] - torch.minimum(first, second)).mean(1),
            "critic_loss": 0.5 * (error * error).mean(2).sum(0),
            "ent_coef": temperature[:, 0],
        }


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _judge(critics: Stack, observation: Tensor, action: Tensor) -> list[Tensor]:
    """Return the values of both critics for s and a [N, B, ...], see ``Stack.forward``."""
    n, batch, width = observation.shape
    pairs = critics.inputs(batch)
    both = pairs.view(2, n, batch, -1)
    both[..., :width], both[..., width:-1] = observation, action
    return critics.forward(pairs)


def _up(size: int, unit: int = _LINE) -> int:
    """Return the multiple of ``unit`` from ``size`` on."""
    return -(-size // unit) * unit


def _cut(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``flat`` [count * width, rounded up] as ``shape``, [count, ...], without the gaps."""
    width = math.prod(shape[1:])
    return flat.view(shape[0], _up(width))[:, :width].view(shape)


def _product(one: Tensor, two: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the products of the matrices in ``one`` and ``two``, each by the same kernel whatever their number.

    PyTorch takes its fast kernels where all products together have more than ``_SMALL`` multiplications. So that a
    task's bits do not depend on the other tasks, here they are taken where each has.
    """
    kernels = torch.get_float32_matmul_precision()
    if kernels == "highest" or one.shape[1] * one.shape[2] * two.shape[2] > _SMALL:
        return torch.bmm(one, two, out=out)
    torch.set_float32_matmul_precision("highest")
    try:
        return torch.bmm(one, two, out=out)
    finally:
        torch.set_float32_matmul_precision(kernels)
