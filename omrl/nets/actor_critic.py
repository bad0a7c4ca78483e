"""The behavior-regularized actor-critic that context-based methods share (FOCAL section 4.2; BRAC).

One update, in the order of the released code:

1. a_pi ~ pi(. | s, z), reparameterized;
2. with regularization: the discriminator, then the divergence D(s) (Eq. 9, dual form of the KL);
3. Q1, Q2 towards y = k r + gamma (1 - terminal) (Vbar(s', z) - [value penalty] alpha D) (Eq. 7);
4. V towards min Q(s, a_pi, z) - log pi with the Q just updated, then Vbar;
5. pi: log pi - min Q + [policy regularization] alpha D + regularizers of mean and log-std (Eq. 8);
6. alpha, when adaptive.

The entropy weight is 1: the reward scale k is the inverse temperature.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from omrl.core.config import Config
from omrl.nets.mlp import Mlp, Policy


class RegularizationConfig(Config):
    """Behavior regularization (FOCAL section 4.2, Eqs 6-9).

    Attributes:
        policy: add alpha D to the policy loss.
        value_penalty: subtract alpha D in the Q target.
        alpha: weight; the initial one if ``adaptive``. FOCAL Table 4: 0 for the point robots, 50 for
            Half-Cheetah-Vel and Walker, 500 for Half-Cheetah-Fwd-Back, 1e6 for Ant-Fwd-Back.
        alpha_max: the weight that is used is clipped to [0, alpha_max]; the stored one is not.
        adaptive: alpha += alpha_rate (mean D - target_divergence) per step (released code); the paper's text
            has a constant.
        alpha_rate: step size of alpha.
        target_divergence: 0.05 in FOCAL++ Table 6.
        discriminator_steps: per update; the further ones on fresh batches of the same tasks.
        discriminator_rate: Adam.
        penalty: of the discriminator, on its ``value`` (released code: (|c| - 1)+^2) or the norm of its
            action ``gradient`` (BRAC). With ``value``, D stays below about 0.96; with ``gradient``, the scale
            of alpha is another.
        penalty_weight: 5 in both.
        next_state: D at s' with a fresh action in the target (Eqs 7 and 8) instead of at s (released code).
    """

    policy: bool = False
    value_penalty: bool = False
    alpha: Annotated[float, Field(ge=0)] = 0.0
    alpha_max: Annotated[float, Field(gt=0)] = 2000.0
    adaptive: bool = True
    alpha_rate: Annotated[float, Field(gt=0)] = 1.0
    target_divergence: float = 0.05
    discriminator_steps: Annotated[int, Field(ge=1, le=1000)] = 3
    discriminator_rate: Annotated[float, Field(gt=0)] = 1e-4
    penalty: Literal["value", "gradient"] = "value"
    penalty_weight: Annotated[float, Field(ge=0)] = 5.0
    next_state: bool = False

    @property
    def active(self) -> bool:
        """Is any of it switched on?"""
        return self.policy or self.value_penalty


class ActorCriticConfig(Config):
    """Actor and critic.

    Attributes:
        width: units of a hidden layer: 256 in the released code and FOCAL++ Table 6, 300 in FOCAL Table 4.
        depth: hidden layers.
        actor_rate: Adam, policy.
        critic_rate: Adam, Q and V.
        gamma: discount: 0.9 for the sparse and wind point robots, 0.99 elsewhere.
        reward_scale: k: 100 for point robots, 5 for MuJoCo.
        tau: rate of the target network.
        value_network: V and target V, no target Q (released code); else target Q networks, as the paper's
            pseudo-code reads.
        mean_weight, log_std_weight: of the squared pre-tanh mean and log-std in the policy loss.
        log_std_max: clamp of log-std: 0 in FOCAL, 2 in PEARL.
    """

    width: Annotated[int, Field(ge=1, le=4096)] = 256
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    actor_rate: Annotated[float, Field(gt=0)] = 3e-4
    critic_rate: Annotated[float, Field(gt=0)] = 3e-4
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.9
    reward_scale: Annotated[float, Field(gt=0)] = 100.0
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    value_network: bool = True
    mean_weight: Annotated[float, Field(ge=0)] = 1e-3
    log_std_weight: Annotated[float, Field(ge=0)] = 1e-3
    log_std_max: Annotated[float, Field(gt=-20)] = 0.0
    regularization: RegularizationConfig = RegularizationConfig()

    @model_validator(mode="after")
    def _alpha(self) -> ActorCriticConfig:
        chosen = self.regularization
        if chosen.active and chosen.alpha == 0 and not chosen.adaptive:
            raise ValueError("regularization.alpha = 0 with adaptive: false switches nothing on; expected alpha > 0")
        return self


@dataclass(frozen=True)
class Transitions:
    """A batch for actor and critic, [tasks, n, width]; reward (dense) and terminal [tasks, n]."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminal: Tensor


def divergence(c_policy: Tensor, c_data: Tensor) -> Tensor:
    """Return the dual-form estimate of KL(pi || behavior) per row (FOCAL Eq. 9, f-divergence of BRAC).

    D = 1 + log(softplus(c(s, a_pi)) + 1e-8) - softplus(c(s, a_data)): 0 for the best discriminator when
    policy and data agree (softplus(c) = 1, c = 0.5413), negative for a poor one.
    """
    return 1 + torch.log(functional.softplus(c_policy) + 1e-8) - functional.softplus(c_data)


def join(rows: Tensor, z: Tensor) -> Tensor:
    """Return [tasks * n, width + latent]: every row [tasks, n, width] beside its task's z [tasks, latent]."""
    tasks, n, _ = rows.shape
    wide = z.unsqueeze(1).expand(tasks, n, z.shape[-1])
    return torch.cat([rows, wide], dim=-1).view(tasks * n, -1)


def adam(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Adam:
    """Return Adam with default betas, one fused kernel for all tensors."""
    return torch.optim.Adam(parameters, lr=rate, fused=True)


class ActorCritic(nn.Module):
    """Policy, twin Q, V with target, discriminator; ``update`` is one gradient step of all.

    Args:
        config: hyperparameters.
        observations: width of an observation.
        actions: width of an action.
        latent: width of z.
        generator: source of initial weights and of the seed of ``noise``.
        device: where the networks lie.
    """

    alpha: Tensor
    noise: torch.Generator

    def __init__(
        self,
        config: ActorCriticConfig,
        observations: int,
        actions: int,
        latent: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config, self.actions, self.device = config, actions, device
        hidden = [config.width] * config.depth
        make = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=generator).item()))
        self.policy = Policy(observations + latent, hidden, actions, make, log_std_max=config.log_std_max)
        self.q = Mlp(observations + actions + latent, hidden, 1, make, stack=2)
        self.v = Mlp(observations + latent, hidden, 1, make) if config.value_network else None
        self.target = copy.deepcopy(self.v if self.v is not None else self.q).requires_grad_(False)
        regularized = config.regularization.active
        self.c = Mlp(observations + actions + latent, hidden, 1, make) if regularized else None
        self.register_buffer("alpha", torch.tensor(float(config.regularization.alpha)))
        self.to(device)
        # drawn where the data are: a CPU generator for CPU batches, a GPU generator on a GPU
        self.noise = torch.Generator(device).manual_seed(int(torch.randint(2**31, (1,), generator=generator).item()))
        self.optimizers = {
            "policy": adam(self.policy.parameters(), config.actor_rate),
            "q": adam(self.q.parameters(), config.critic_rate),
        }
        if self.v is not None:
            self.optimizers["v"] = adam(self.v.parameters(), config.critic_rate)
        if self.c is not None:
            self.optimizers["c"] = adam(self.c.parameters(), config.regularization.discriminator_rate)

    def _noise(self, rows: int) -> Tensor:
        return torch.randn(rows, self.actions, generator=self.noise, device=self.device)

    def used_alpha(self) -> Tensor:
        """Return alpha as used: clipped to [0, alpha_max]."""
        return self.alpha.clamp(0, self.config.regularization.alpha_max)

    def step(self, name: str, loss: Tensor) -> None:
        """Take one optimizer step of the network ``name``."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def discriminator_loss(self, batch: Transitions, z: Tensor) -> Tensor:
        """Return -mean D + weight * penalty for a batch; the policy's actions carry no gradient here."""
        if self.c is None:
            raise ValueError("regularization is off: there is no discriminator")
        regularization = self.config.regularization
        state = join(batch.observation, z)
        data = batch.action.reshape(-1, self.actions)
        with torch.no_grad():
            action = self.policy.sample(state, self._noise(len(state)))[0]
        mixed = torch.rand(len(state), 1, generator=self.noise, device=self.device)
        between = action + mixed * (data - action)
        if regularization.penalty == "gradient":
            between.requires_grad_(True)
        # one pass for the three sets of actions
        c = self.c(torch.cat([self._with(state, a) for a in (action, data, between)])).squeeze(-1)
        c_policy, c_data, c_between = c.chunk(3)
        if regularization.penalty == "gradient":
            (slope,) = torch.autograd.grad(c_between.sum(), between, create_graph=True)
            size = slope.norm(dim=-1)
        else:
            size = c_between.abs()
        penalty = functional.relu(size - 1).square().mean()
        return -divergence(c_policy, c_data).mean() + regularization.penalty_weight * penalty

    def _with(self, state: Tensor, action: Tensor) -> Tensor:
        return torch.cat([action, state], dim=-1)

    def q_target(self, batch: Transitions, z: Tensor, penalty: Tensor | None) -> Tensor:
        """Return y [tasks * n]: k r + gamma (1 - terminal) (Vbar(s', z) - penalty), without gradient (Eq. 7)."""
        config = self.config
        with torch.no_grad():
            following = join(batch.next_observation, z)
            if self.v is not None:
                value = self.target(following).squeeze(-1)
            else:
                action, log_prob, _, _ = self.policy.sample(following, self._noise(len(following)))
                value = self.target(self._with(following, action)).amin(0).squeeze(-1) - log_prob
            if penalty is not None:
                value = value - penalty
            going_on = 1 - batch.terminal.reshape(-1)
            return config.reward_scale * batch.reward.reshape(-1) + config.gamma * going_on * value

    def update(
        self, batch: Transitions, z: Tensor, extra: list[Transitions], encoder: EncoderStep | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step of every network.

        Args:
            batch: transitions of the meta-batch.
            z: embeddings [tasks, latent]; detached here, except for the critic loss when ``encoder`` is given.
            extra: fresh batches for the discriminator's further steps; empty without regularization.
            encoder: coupled gradients: called with the critic loss still attached to z.

        Returns:
            Scalars for the curves, as tensors on the device.
        """
        config, regularization = self.config, self.config.regularization
        attached, z = z, z.detach()
        state = join(batch.observation, z)
        data = batch.action.reshape(-1, self.actions)
        action, log_prob, mean, log_std = self.policy.sample(state, self._noise(len(state)))
        scalars: dict[str, Tensor] = {}

        penalty = None
        if self.c is not None:
            for more in [batch, *extra]:
                loss = self.discriminator_loss(more, z)
                self.step("c", loss)
            scalars["discriminator_loss"] = loss.detach()
            if regularization.value_penalty:
                penalty = self.used_alpha() * self._penalty(batch, state, data, action, z)

        target = self.q_target(batch, z, penalty)
        critic_state = state if encoder is None else join(batch.observation, attached)
        q = self.q(self._with(critic_state, data)).squeeze(-1)
        q_loss = (q - target).square().mean(-1).sum()
        if encoder is None:
            self.step("q", q_loss)
        else:
            self.optimizers["q"].zero_grad(set_to_none=True)
            encoder(q_loss)
            self.optimizers["q"].step()

        for parameter in self.q.parameters():  # the policy loss needs dQ/da only
            parameter.requires_grad_(False)
        smallest = self.q(self._with(state, action)).amin(0).squeeze(-1)
        for parameter in self.q.parameters():
            parameter.requires_grad_(True)

        if self.v is not None:
            v_loss = (self.v(state).squeeze(-1) - (smallest - log_prob).detach()).square().mean()
            self.step("v", v_loss)
            scalars["v_loss"] = v_loss.detach()
        online = self.v if self.v is not None else self.q
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(online.parameters()), config.tau)

        policy_loss = (
            (log_prob - smallest).mean()
            + config.mean_weight * mean.square().mean()
            + config.log_std_weight * log_std.square().mean()
        )
        if self.c is not None:
            # after the discriminator's steps, with its weights held still: the order the release got wrong
            for parameter in self.c.parameters():
                parameter.requires_grad_(False)
            c_policy = self.c(self._with(state, action)).squeeze(-1)
            for parameter in self.c.parameters():
                parameter.requires_grad_(True)
            with torch.no_grad():
                c_data = self.c(self._with(state, data)).squeeze(-1)
            estimate = divergence(c_policy, c_data)
            if regularization.policy:
                policy_loss = policy_loss + self.used_alpha() * estimate.mean()
            scalars["divergence"] = estimate.detach().mean()
            scalars["alpha"] = self.used_alpha().clone()
        self.step("policy", policy_loss)
        if self.c is not None and regularization.adaptive:
            with torch.no_grad():
                self.alpha.add_(regularization.alpha_rate * (scalars["divergence"] - regularization.target_divergence))
        return scalars | {
            "q_loss": q_loss.detach(),
            "q_mean": q.detach().mean(),
            "policy_loss": policy_loss.detach(),
            "entropy": -log_prob.detach().mean(),
        }

    def _penalty(self, batch: Transitions, state: Tensor, data: Tensor, action: Tensor, z: Tensor) -> Tensor:
        """Return D per row for the Q target: at s (released code), or at s' with the data's next action absent.

        At s' the data hold no action, so the behavior's part is that of s (BRAC samples it from the replay
        order, which a bag of transitions does not have).
        """
        if self.c is None:
            raise ValueError("regularization is off: there is no discriminator")
        with torch.no_grad():
            if self.config.regularization.next_state:
                state_pi = join(batch.next_observation, z)
                action_pi = self.policy.sample(state_pi, self._noise(len(state_pi)))[0]
            else:
                state_pi, action_pi = state, action
            c_policy, c_data = self.c(
                torch.cat([self._with(state_pi, action_pi), self._with(state, data)])
            ).squeeze(-1).chunk(2)  # fmt: skip
            return divergence(c_policy, c_data)


class EncoderStep:
    """Coupled gradients: the critic loss reaches the encoder together with the encoder's own loss."""

    def __init__(self, optimizer: torch.optim.Optimizer, own_loss: Tensor) -> None:
        self.optimizer, self.own_loss = optimizer, own_loss

    def __call__(self, critic_loss: Tensor) -> None:
        """Back-propagate both losses and step the encoder; the critic's gradients are left for its optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        (critic_loss + self.own_loss).backward()
        self.optimizer.step()
