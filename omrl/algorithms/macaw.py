"""MACAW, meta-actor-critic with advantage weighting (Mitchell et al., ICML 2021): adapts by gradient steps.

Value function and policy have initial weights from which one gradient step on a task's data leads to good ones (MAML).
Both losses are supervised. A row carries G, the discounted return from here to the end of its own episode (or of the
part of it that is in the dataset), s_T, the last next state of that episode, and D = gamma^n, n the steps that G sums.

    V'     = V - a dL/dV,    L = mean (V(s) - G)^2                              on the inner rows       (Eq. 2)
    outer    mean (V'(s) - [G + D V*(s_T)])^2,  V* = 0.9 V + 0.1 V', constant   on the outer rows
    A      = G + D V'(s_T) - V'(s), constant
    w      = exp(min((A - mean A) / std A / temperature, log largest_weight))   over a task's rows
    pi'    = pi - a dL/dpi,  L = mean [-w log pi(a|s) + c (A^(s, a) - A)^2]     on the inner rows       (Eqs 3, 4)
    outer    mean [-w log pi'(a|s)]                                             on the outer rows

Outer losses are summed over the meta-batch, divided by the number of training tasks, and descended by Adam through the
inner step (second order). Step sizes a (one for each tensor) and the coefficient c are softplus of learned numbers.
Every layer has a weight transform; adapted weights come in closed form, see ``omrl.nets.transforms``. A^ is a head
on the last hidden layer, before its ReLU, and the action; ReLU is applied to both, so that it sees no negative action
(released code). pi is a normal of fixed standard deviation around tanh of the network.

In tests the same inner step is taken with rows of the task, then the mean action is taken. In protocol ``fine-tune``
the adapted tensors are written out and descend the two losses of the task's own rows with Adam, -w log pi without c.

What paper and released code say differently, and what is here:

====================  ================================  ===============================  ============================
what                  paper                             released code                    here
====================  ================================  ===============================  ============================
outer value target,   G                                 G + D V(s_T), terminal or not    the code's; ``bootstrap:
advantage                                                                                false``: the paper's
coefficient c         0.01                              learned, from 0.00995            ``learn_coefficient``
step sizes            one a layer                       one a tensor                     one a tensor
weight transform      H z, latent 32 (Omniglot)         H z + h, latent 100              the code's
inner rows            contiguous                        contiguous of every seventh row  uniform, with replacement
inner, outer rows     disjoint                          drawn independently              drawn independently
outer rows            biased to the buffer's end        uniform                          uniform
several inner steps   policy step t with the value      as the paper                     all steps of the value function
                      function after step t + 1                                          first, then the policy's
without the weight    ordinary layers                   a transform of the bias stays    ``layers: none`` or ``bias``
transform
====================  ================================  ===============================  ============================

Inner and test rows come from the ``context`` dataset, outer rows from the ``transitions`` dataset, of a dataset pair.
Ablations are settings: ``coefficient: 0`` (no advantage regression, the head is left out), ``layers``, ``steps`` (MAML
with several steps: the inner rows are cut into equal parts, one a step, and V* moves after each).

Known failures:

* It needs whole episodes in order: a relabelled set of single rows gives returns of one step.
* Rewards are raw, unless ``reward_scale`` says otherwise. With returns in the thousands the value loss is 1e6, and a
  step of 1e-3 overshoots until the step sizes have shrunk.
* It is slow to learn: 1e5 to 1e6 updates as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from omrl.algorithms.base import Algorithm, Belief, Draw, Phase, Spec
from omrl.core.config import Config
from omrl.data.taskdata import TaskData
from omrl.nets.actor_critic import adam
from omrl.nets.experience import Experience
from omrl.nets.transforms import Adaptive, Kind, Steps, linear, mlp

RETURN, DISCOUNT, LAST = "return_to_go", "discount_to_end", "last_observation"
_TARGET = 0.9  # what V* keeps of itself when an inner step is mixed in


class RegressionConfig(Config):
    """What the methods share that regress on whole episodes' returns, or imitate.

    Attributes:
        width, depth: hidden layers of policy and value function.
        layers: ``weight``: weight transforms; ``bias``: ordinary layers whose bias has a transform (what the released
            code has without weight transforms); ``none``: ordinary layers.
        latent_dim: of a weight transform's latent.
        policy_std: of every entry of an action.
        meta_batch: tasks per update, drawn without replacement.
    """

    width: Annotated[int, Field(ge=1, le=4096)] = 100
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    layers: Kind = "weight"
    latent_dim: Annotated[int, Field(ge=1, le=4096)] = 100
    policy_std: Annotated[float, Field(gt=0)] = 0.2
    meta_batch: Annotated[int, Field(ge=1, le=1024)] = 5


class AdvantageConfig(RegressionConfig):
    """What advantage-weighted regression has beside.

    Attributes:
        gamma: discount of returns.
        reward_scale: rewards are multiplied by it; 1 as released. Advantage weights do not depend on it.
        bootstrap: add the value of an episode's last state to returns, see the module's docstring.
        temperature, largest_weight: of the advantage weights.
        value_rate, policy_rate: Adam.
        tune_value_rate, tune_policy_rate, tune_batch: of protocol ``fine-tune``: Adam, and rows per update.
        tune_policy_updates: of the policy, for each of the value function.
    """

    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    bootstrap: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    largest_weight: Annotated[float, Field(gt=1)] = 20.0
    value_rate: Annotated[float, Field(gt=0)] = 1e-5
    policy_rate: Annotated[float, Field(gt=0)] = 1e-4
    tune_value_rate: Annotated[float, Field(gt=0)] = 1e-5
    tune_policy_rate: Annotated[float, Field(gt=0)] = 1e-5
    tune_batch: Annotated[int, Field(ge=2, le=16384)] = 256
    tune_policy_updates: Annotated[int, Field(ge=1, le=1000)] = 2


class InnerConfig(Config):
    """Inner steps.

    Attributes:
        steps: inner steps per task; the inner rows are cut into as many equal parts.
        inner_batch: rows per task of the inner step, from the ``context`` of a pair of datasets.
        outer_batch: rows per task of the outer loss, from the ``transitions`` of a pair.
        inner_value_rate: r of the value function's initial step size log(1 + r), as in the released code.
        inner_policy_rate: the same of the policy.
        learn_rates: learn the step sizes.
        rate_rate: learning rate (Adam) of step sizes and coefficient.
    """

    steps: Annotated[int, Field(ge=1, le=100)] = 1
    inner_batch: Annotated[int, Field(ge=2, le=16384)] = 256
    outer_batch: Annotated[int, Field(ge=2, le=16384)] = 256
    inner_value_rate: Annotated[float, Field(gt=0)] = 1e-3
    inner_policy_rate: Annotated[float, Field(gt=0)] = 1e-3
    learn_rates: bool = True
    rate_rate: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _parts(self) -> InnerConfig:
        if self.inner_batch % self.steps or self.inner_batch // self.steps < 2:
            raise ValueError(
                f"inner_batch = {self.inner_batch} with steps = {self.steps}: expected steps equal parts of 2 or more"
            )
        return self


class MacawConfig(AdvantageConfig, InnerConfig):
    """MACAW.

    Attributes:
        coefficient: c of the advantage regression; the initial one is log(1 + coefficient) where it is learned. 0: no
            advantage head.
        learn_coefficient: learn it.
        head_width: of the advantage head's hidden layer.
    """

    coefficient: Annotated[float, Field(ge=0)] = 0.01
    learn_coefficient: bool = True
    head_width: Annotated[int, Field(ge=1, le=4096)] = 32


def episode_columns(data: TaskData, gamma: float) -> dict[str, NDArray[np.float32]]:
    """Return what a row knows of the rest of its episode.

    Args:
        data: rows in order.
        gamma: discount.

    Returns:
        ``return_to_go`` G and ``discount_to_end`` D = gamma^n [tasks, rows], n the steps to the end, this one
        included; ``last_observation`` s_T [tasks, rows, width].
    """
    tasks, rows = data.reward.shape
    to_go, after = np.zeros((tasks, rows)), np.zeros(tasks)
    for row in range(rows - 1, -1, -1):
        goes_on = data.end[:, row] > row + 1
        after = data.reward[:, row] + gamma * np.where(goes_on, after, 0.0)
        to_go[:, row] = after
    last = data.next_observation[np.arange(tasks)[:, None], data.end - 1]
    discount = gamma ** (data.end - np.arange(rows)).astype(np.float64)
    return {RETURN: to_go.astype(np.float32), DISCOUNT: discount.astype(np.float32), LAST: last}


@dataclass(frozen=True)
class Rows:
    """Rows of several tasks: s [tasks, n, width], a, s_T; G and D [tasks, n]."""

    state: Tensor
    action: Tensor
    to_go: Tensor
    discount: Tensor
    last: Tensor


def advantage_weights(advantage: Tensor, temperature: float, largest: float) -> Tensor:
    """Return w [tasks, n] of advantages [tasks, n]; all 1 where a task's advantages are equal.

    The released code divides by the (unbiased) standard deviation alone and gives NaN there.
    """
    rounding = 1e-5 * advantage.abs().amax(-1, keepdim=True) + 1e-12
    std = advantage.std(-1, keepdim=True).maximum(rounding)
    exponent = (advantage - advantage.mean(-1, keepdim=True)) / std / temperature
    return exponent.clamp_max(math.log(largest)).exp()


class Regression(Algorithm):
    """What the methods share: a policy whose weights are the belief, a value function, the losses."""

    PROTOCOLS = frozenset({"offline-context", "fine-tune"})
    settings: Any
    policy: Adaptive
    value: Adaptive
    _optimizers: dict[str, torch.optim.Optimizer]
    _tuning: dict[str, torch.optim.Optimizer] | None = None

    def __init__(
        self, config: RegressionConfig, spec: Spec, seed: int, device: str = "auto", state: int | None = None
    ) -> None:
        super().__init__(config, spec, seed, device)
        widths = [spec.observation if state is None else state, *[config.width] * config.depth]
        hidden = [(widths[i], widths[i + 1]) for i in range(config.depth)]
        self._shapes = [*hidden, (config.width, spec.action)], [*hidden, (config.width, 1)]

    def network(self, shapes: Sequence[tuple[int, int]], rate: float, learned: bool) -> Adaptive:
        """Return an untrained network with the initial step size log(1 + ``rate``), learned or not."""
        config = self.settings
        network = Adaptive(shapes, config.layers, config.latent_dim, rate, self.generator).to(self.device)
        for rates in network.rates():
            rates.requires_grad_(learned)
        return network

    @classmethod
    def least_context(cls, config: Any) -> int:
        """Return two rows, which have a standard deviation, for every inner step."""
        return 2 * getattr(config, "steps", 1)

    # --- losses --------------------------------------------------------------------------------------------------

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return G, in units of ``reward_scale``, D and s_T of every row."""
        found = episode_columns(data, self.settings.gamma)
        return found | {RETURN: np.float32(self.settings.reward_scale) * found[RETURN]}

    def rows(self, drawn: Experience) -> Rows:
        """Return what the losses read."""
        if RETURN not in drawn.extra:
            raise ValueError(f"the rows have no column {RETURN}; expected the columns of Algorithm.columns")
        to_go, discount = drawn.extra[RETURN].squeeze(-1), drawn.extra[DISCOUNT].squeeze(-1)
        return Rows(drawn.observation, drawn.action, to_go, discount, drawn.extra[LAST])

    @staticmethod
    def value_error(thetas: list[Tensor], rows: Rows, goal: Tensor) -> Tensor:
        """Return mean (V(s) - goal)^2 of every task, [tasks]."""
        return (mlp(thetas, rows.state).squeeze(-1) - goal).square().mean(-1)

    @staticmethod
    @torch.no_grad()
    def goal(thetas: list[Tensor], rows: Rows) -> Tensor:
        """Return G + D V(s_T), [tasks, n], without gradient."""
        return rows.to_go + rows.discount * mlp(thetas, rows.last).squeeze(-1)

    @torch.no_grad()
    def advantage(self, thetas: list[Tensor], rows: Rows) -> Tensor:
        """Return A = G + D V(s_T) - V(s), [tasks, n], without gradient."""
        return self.goal(thetas, rows) - mlp(thetas, rows.state).squeeze(-1)

    def weight(self, advantage: Tensor) -> Tensor:
        """Return the advantage weights."""
        return advantage_weights(advantage, self.settings.temperature, self.settings.largest_weight)

    def heads(self, thetas: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean action, and the last hidden layer before its ReLU; each [tasks, n, width]."""
        depth = self.settings.depth
        hidden = mlp(thetas[:depth], state)
        return torch.tanh(linear(thetas[depth], torch.relu(hidden))), hidden

    def log_likelihood(self, mean: Tensor, action: Tensor) -> Tensor:
        """Return log pi(a | s), [tasks, n]: independent normals, not squashed."""
        std = self.settings.policy_std
        normal = -0.5 * ((action - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)
        return normal.sum(-1)

    def imitation(self, thetas: list[Tensor], rows: Rows, weight: Tensor | None = None) -> Tensor:
        """Return mean [-w log pi(a | s)] of every task, [tasks]; w = 1 if None."""
        found = self.log_likelihood(self.heads(thetas, rows.state)[0], rows.action)
        return -(found if weight is None else weight * found).mean(-1)

    # --- acting --------------------------------------------------------------------------------------------------

    def belief(self, thetas: list[Tensor]) -> Belief:
        """Return a policy's weights as a belief: {policy: [tasks, P]}, the advantage head left out."""
        return {"policy": torch.cat([theta.detach() for theta in thetas[: self.settings.depth + 1]], dim=-1)}

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return the weights before any step."""
        return self.belief([theta.expand(tasks, -1) for theta in self.policy.thetas(self.policy.start())])

    @torch.no_grad()
    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the mean action, or a sample of the policy if ``rng`` is given, in [-1, 1]."""
        thetas = self.policy.split(belief["policy"], self.settings.depth + 1)
        mean = self.heads(thetas, observation.unsqueeze(1))[0].squeeze(1)
        if rng is not None:
            noise = torch.randn(mean.shape, generator=rng).to(mean)
            mean = mean + self.settings.policy_std * noise
        return mean.clamp(-1, 1)

    # --- fine-tuning ---------------------------------------------------------------------------------------------

    def settle(self, context: Experience) -> None:
        """Become the model of one task, adapted to its context [1, n, ...]."""
        raise ValueError(f"{type(self).__name__} does not serve protocol fine-tune")

    def fine_tune(self, draw: Callable[[Phase], Mapping[str, Experience]], steps: int, context: Experience) -> Belief:
        """Descend the value loss ``steps`` times, then the policy's, on rows of the one task that this object is for.

        The targets are plain returns, the advantages those of the value function just updated.
        """
        config = self.settings
        if self._tuning is None:
            self.settle(context)
            self._tuning = {
                "value": adam(self.value.weights(), config.tune_value_rate),
                "policy": adam(self.policy.weights(), config.tune_policy_rate),
            }
        phase = Phase("fine-tune", steps, 1, {"own": Draw(config.tune_batch)})
        for part in ["value"] * steps + ["policy"] * (steps * config.tune_policy_updates):
            rows = self.rows(draw(phase)["own"])
            value = self.value.thetas(self.value.start())
            if part == "value":
                loss = self.value_error(value, rows, rows.to_go)
            else:
                weight = self.weight(self.advantage(value, rows))
                loss = self.imitation(self.policy.thetas(self.policy.start()), rows, weight)
            descend(loss.sum(), self._tuning[part])
        return self.prior(1)

    # --- state ---------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return value function and policy."""
        return {"value": self.value, "policy": self.policy}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return dict(self._optimizers)


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """Take one step of the optimizers."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def inner_parts(drawn: Experience, steps: int) -> list[Experience]:
    """Return the inner rows of every inner step: equal parts, in order."""
    size = drawn.shape[1] // steps
    if size < 2:
        raise ValueError(f"{drawn.shape[1]} rows for {steps} inner steps: expected 2 or more each")
    return [drawn.part(i * size, (i + 1) * size) for i in range(steps)]


def inner_phase(steps: int, config: Any) -> Phase:
    """Return the one phase of training: inner rows from the context dataset, outer rows from the transitions."""
    draws = {"inner": Draw(config.inner_batch, source="context"), "outer": Draw(config.outer_batch)}
    return Phase("training", steps, config.meta_batch, draws, replace=False)


class Coefficient(nn.Module):
    """The advantage regression's coefficient: softplus of a number that starts at log(start), or ``start`` itself."""

    def __init__(self, start: float, learned: bool) -> None:
        super().__init__()
        kappa = math.log(start) if learned else start + math.log(-math.expm1(-start))  # softplus^-1, no overflow
        self.kappa = nn.Parameter(torch.tensor(kappa), requires_grad=learned)

    def forward(self) -> Tensor:
        """Return c."""
        return functional.softplus(self.kappa)


class Macaw(Regression):
    """See the module's docstring."""

    CONFIG = MacawConfig

    def __init__(self, config: MacawConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        policy, value = self._shapes
        if config.coefficient:
            policy += [(config.width + spec.action, config.head_width), (config.head_width, 1)]
        self.value = self.network(value, config.inner_value_rate, config.learn_rates)
        self.policy = self.network(policy, config.inner_policy_rate, config.learn_rates)
        self.coefficient: Coefficient | None = None
        if config.coefficient:
            self.coefficient = Coefficient(config.coefficient, config.learn_coefficient).to(self.device)
        self._optimizers = {
            "value": adam(self.value.weights(), config.value_rate),
            "policy": adam(self.policy.weights(), config.policy_rate),
        }
        if config.learn_rates:
            for name, network in (("value_rates", self.value), ("policy_rates", self.policy)):
                self._optimizers[name] = adam(network.rates(), config.rate_rate)
        if self.coefficient is not None and config.learn_coefficient:
            self._optimizers["coefficient"] = adam(self.coefficient.parameters(), config.rate_rate)

    def phases(self, steps: int) -> list[Phase]:
        """Return one phase: inner rows and outer rows of the same tasks."""
        return [inner_phase(steps, self.settings)]

    def rows(self, drawn: Experience) -> Rows:
        """Return what the losses read; D = 0 without bootstrapping."""
        rows = super().rows(drawn)
        return rows if self.settings.bootstrap else replace(rows, discount=torch.zeros_like(rows.discount))

    def policy_error(self, thetas: list[Tensor], rows: Rows, advantage: Tensor) -> Tensor:
        """Return the inner loss of the policy of every task, [tasks] (Eq. 4)."""
        mean, hidden = self.heads(thetas, rows.state)
        loss = -(self.weight(advantage) * self.log_likelihood(mean, rows.action)).mean(-1)
        if self.coefficient is None:
            return loss
        depth = self.settings.depth
        found = mlp(thetas[depth + 1 :], torch.relu(torch.cat([hidden, rows.action], dim=-1))).squeeze(-1)
        return loss + (self.coefficient() * (found - advantage).square()).mean(-1)

    def paths(self, inner: Experience, differentiable: bool) -> tuple[list[Steps], list[Steps]]:
        """Return the inner steps of value function and policy."""
        parts = [self.rows(part) for part in inner_parts(inner, self.settings.steps)]
        tasks = inner.shape[0]
        errors = [partial(self.value_error, rows=rows, goal=rows.to_go) for rows in parts]
        value = self.value.adapt(tasks, errors, differentiable)
        adapted = self.value.thetas(value)
        losses = [partial(self.policy_error, rows=rows, advantage=self.advantage(adapted, rows)) for rows in parts]
        return value, self.policy.adapt(tasks, losses, differentiable)

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one meta-step."""
        config = self.settings
        outer = self.rows(batch["outer"])
        value_path, policy_path = self.paths(batch["inner"], True)
        adapted = self.value.thetas(value_path)
        with torch.no_grad():
            # V* after n steps is 0.9 of itself and 0.1 of V after each: step k counts for what came after it
            shares = [1 - _TARGET ** (config.steps - k) for k in range(config.steps)]
            goal = self.goal(self.value.thetas(value_path, shares), outer)
        value_loss = self.value_error(adapted, outer, goal).sum() / self.spec.tasks
        advantage = self.advantage(adapted, outer)
        policy_loss = self.imitation(self.policy.thetas(policy_path), outer, self.weight(advantage))
        policy_loss = policy_loss.sum() / self.spec.tasks
        scalars = {
            "value_loss": value_loss, "policy_loss": policy_loss, "return_to_go": outer.to_go.mean(),
            "advantage": advantage.abs().mean(), "value_step": self.value.mean_rate(),
            "policy_step": self.policy.mean_rate(),
        }  # fmt: skip
        if self.coefficient is not None:
            scalars["coefficient"] = self.coefficient()
        scalars = {name: value.detach() for name, value in scalars.items()}
        # the two losses have no tensor in common: advantages are constants
        descend(value_loss + policy_loss, *self._optimizers.values())
        return scalars

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the policy's weights after the inner steps from the initial ones; ``belief`` does not count."""
        with torch.enable_grad():
            _, path = self.paths(context, False)
        with torch.no_grad():
            return self.belief(self.policy.thetas(path))

    def settle(self, context: Experience) -> None:
        """Write the adapted tensors of one task out."""
        value, policy = self.paths(context, False)
        self.value.take(value)
        self.policy.take(policy)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return value function, policy and coefficient."""
        return super().modules() | ({"coefficient": self.coefficient} if self.coefficient is not None else {})


CONFIG = MacawConfig
ALGORITHM = Macaw
