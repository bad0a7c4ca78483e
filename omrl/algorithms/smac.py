"""SMAC (Pong et al., ICML 2022): PEARL's context with a reward decoder, an AWAC actor, and learning on without rewards.

    q(z | h) = N(m, v), product over the context's rows as in PEARL; z, z2 two samples, one each per task
    Q         mean (Q_k(s, a, z) - [k r + gamma (1 - terminal) min Qbar(s', a', z)])^2, both added; a' ~ pi(s', z2)
    context   kl_weight * mean over tasks KL(q(z | h), N(0, I)) + mean (r_hat(s, a, z) - r)^2       encoder, decoder
    actor     w = N softmax((min Q(s, a, z) - min Q(s, a_pi, z)) / beta) over all N rows; mean -w log pi(a | s, z)
    online    the same, where encoder and decoder stand still, plus online_q_weight * mean -min Q(s, a_pi, z)

Every z is detached for Q and actor; only the decoder's loss and the KL reach the encoder. Context and learning rows are
drawn apart. The self-supervised phase is stage ``online`` with ``label: decoded``: it collects with z of the prior and
of the posterior, sees no reward, and r_hat, given an offline context of the same training task, labels what it saw.

``actor: sac`` is the ablation without AWAC (-min Q in both phases; published with an entropy term: ``entropy``),
``actor: cloning`` meta behavior cloning, ``label: simulator`` in stage ``online`` the oracle. The published protocol is
``online-prior`` with ``prior: own``, ``resample: step``, ``posterior: step``, 3 episodes, 2 of them exploration.

========================  ===========================  =================================  ===========================
what                      paper                        released code                      here
========================  ===========================  =================================  ===========================
softplus of the encoder   standard deviation           variance                           ``scale: variance``
weight of the KL          1 (Eq. 3)                    0.1, mean over tasks               ``kl_weight: 0.1``
z of a'                   the z of Q                   a second sample                    ``second_z: true``
entropy                   in PEARL's actor term        none (alpha 0)                     ``entropy: 0``
target Q at the start     not told                     own random weights                 ``target_start: random``
actor's -min Q, online    not told                     values of the old critic through   ``actor_critic: new``; see
                                                       the new one's weights              below
offline RL rows           256 per task                 128                                128, ``rl_batch``
tasks, contexts online    not told                     kept for four updates              drawn anew every update
steps per collected step  4                            3.2                                ``online.<name>.updates``
s' in context, decoder    no                           an option, off                     where dynamics differ
========================  ===========================  =================================  ===========================

A current torch refuses the released actor update (a critic is stepped between forward and backward pass); on the torch
of its time the gradient was a mixture, nearer to that of the stepped critic. ``actor_critic: new`` takes the critic
after its step, ``old`` before. AWAC's weights are the old critic's in both, as released.

Known failures: with ``beta: 100`` and small advantages the weights are all near 1, and the actor clones the data
(``weight_std`` in the curve). What the decoder has not seen offline it cannot label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from omrl.algorithms.base import Draw, Phase, PosteriorAlgorithm, Spec
from omrl.core.config import Config
from omrl.nets.actor_critic import adam, held_still, join
from omrl.nets.experience import Experience
from omrl.nets.generative import diagonal_kl, posterior
from omrl.nets.mlp import Mlp, Policy

ONLINE = "self-supervised"
_EDGE = 0.999999  # data actions are clamped to it before atanh


class SmacConfig(Config):
    """SMAC's hyperparameters; the defaults are the released code's.

    Attributes:
        latent_dim: of z.
        width, depth: hidden layers of Q and policy.
        encoder_width, encoder_depth: hidden layers of the encoder.
        decoder_width, decoder_depth: hidden layers of the reward decoder.
        actor_rate: learning rate of the policy (Adam).
        critic_rate: learning rate of Q (Adam).
        encoder_rate: learning rate of encoder and decoder (Adam).
        gamma: discount.
        reward_scale: factor on rewards in the critic's target alone.
        tau: rate of the target Q.
        target_start: target Q with weights of their own at the start (``random``), or a ``copy`` of Q.
        scale: what softplus of the encoder's second half is: a row's ``variance``, or its ``std``.
        kl_weight: of the KL divergence of the posterior from N(0, I), a mean over tasks and a sum over dimensions.
        actor: ``awac``, advantage-weighted imitation of the data; ``sac``, maximizes Q (ablation); ``cloning``,
            imitates the data.
        beta: temperature of AWAC's weights.
        online_q_weight: of -min Q in the self-supervised phase (lambda_pearl: 1, Sawyer 0).
        entropy: weight of log pi in the target and beside -min Q.
        second_z: a' follows a z of its own.
        actor_critic: which critic -min Q is of: before (``old``) or after (``new``) this update's step.
        meta_batch: tasks per update, drawn with replacement.
        rl_batch: rows per task for actor, critic and decoder.
        online_rl_batch: rows per task for actor and critic in stage ``online``, where the decoder stands still.
        context_batch: rows per task for the encoder.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    width: Annotated[int, Field(ge=1, le=4096)] = 300
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    encoder_width: Annotated[int, Field(ge=1, le=4096)] = 200
    encoder_depth: Annotated[int, Field(ge=1, le=16)] = 3
    decoder_width: Annotated[int, Field(ge=1, le=4096)] = 64
    decoder_depth: Annotated[int, Field(ge=1, le=16)] = 2
    actor_rate: Annotated[float, Field(gt=0)] = 3e-4
    critic_rate: Annotated[float, Field(gt=0)] = 3e-4
    encoder_rate: Annotated[float, Field(gt=0)] = 3e-4
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    reward_scale: Annotated[float, Field(gt=0)] = 5.0
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    target_start: Literal["random", "copy"] = "random"
    scale: Literal["variance", "std"] = "variance"
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    actor: Literal["awac", "sac", "cloning"] = "awac"
    beta: Annotated[float, Field(gt=0)] = 100.0
    online_q_weight: Annotated[float, Field(ge=0)] = 1.0
    entropy: Annotated[float, Field(ge=0)] = 0.0
    second_z: bool = True
    actor_critic: Literal["old", "new"] = "new"
    meta_batch: Annotated[int, Field(ge=1, le=1024)] = 4
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 128
    online_rl_batch: Annotated[int, Field(ge=1, le=16384)] = 256
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 64


def log_prob(mean: Tensor, log_std: Tensor, before: Tensor) -> Tensor:
    """Return log pi [n] of tanh(``before``), exact: log N(u) - sum 2 (ln 2 - u - softplus(-2 u))."""
    noise = (before - mean) * torch.exp(-log_std)
    normal = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std
    return (normal - 2 * (math.log(2) - before - functional.softplus(-2 * before))).sum(-1)


def awac_weights(score: Tensor, beta: float) -> Tensor:
    """Return N softmax(score / beta) of all N rows: their mean is 1."""
    return torch.softmax(score / beta, dim=0) * len(score)


class Smac(PosteriorAlgorithm):
    """See the module's docstring."""

    CONFIG = SmacConfig

    def __init__(self, config: SmacConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = c = config
        make, hidden = self.generator, [c.width] * c.depth
        pair = spec.observation + spec.action + c.latent_dim
        following = spec.observation if spec.context_next_observation else 0
        self.encoder = Mlp(spec.context, [c.encoder_width] * c.encoder_depth, 2 * c.latent_dim, make)
        self.decoder = Mlp(pair + following, [c.decoder_width] * c.decoder_depth, 1, make)
        self.policy = Policy(spec.observation + c.latent_dim, hidden, spec.action, make, log_std_max=2.0)
        self.q, self.target = (Mlp(pair, hidden, 1, make, stack=2) for _ in range(2))
        with torch.no_grad():  # biases start at 0, but for the log-std's
            for net in (self.encoder, self.decoder, self.q, self.target, self.policy.trunk):
                for place, bias in enumerate(net.biases):
                    log_std = net is self.policy.trunk and place == c.depth
                    bias[..., : spec.action if log_std else None].zero_()
        if c.target_start == "copy":
            self.target.load_state_dict(self.q.state_dict())
        self.target.requires_grad_(False)
        for part in self.modules().values():
            part.to(self.device)
        self.noise = torch.Generator(self.device).manual_seed(int(torch.randint(2**31, (1,), generator=make).item()))
        self.steps = {
            "q": adam(self.q.parameters(), c.critic_rate),
            "context": adam([*self.encoder.parameters(), *self.decoder.parameters()], c.encoder_rate),
            "policy": adam(self.policy.parameters(), c.actor_rate),
        }

    @property
    def latent(self) -> int:
        """Width of z."""
        return self.settings.latent_dim

    def _phase(self, name: str, steps: int, rows: int) -> Phase:
        c = self.settings
        return Phase(
            name, steps, c.meta_batch,
            {"transitions": Draw(rows), "context": Draw(c.context_batch, source="context")},
        )  # fmt: skip

    def phases(self, steps: int) -> list[Phase]:
        """Return the offline phase."""
        return [self._phase("offline", steps, self.settings.rl_batch)]

    def online_phase(self, steps: int) -> Phase:
        """Return the self-supervised phase."""
        return self._phase(ONLINE, steps, self.settings.online_rl_batch)

    # --- inference ---------------------------------------------------------------------------------------------

    def posterior(self, context: Experience) -> tuple[Tensor, Tensor]:
        """Return mean and variance [tasks, latent] of z: a product of one Gaussian per row."""
        rows = self.rows(context)
        raw = self.encoder(rows.reshape(-1, rows.shape[-1])).view(*rows.shape[:2], -1)
        return posterior(raw, std=self.settings.scale == "std")

    def _reward(self, steps: Experience, z: Tensor) -> Tensor:
        """Return the decoder's rewards [tasks * n], unscaled."""
        parts = [steps.observation, steps.action]
        if self.spec.context_next_observation:
            parts.append(steps.next_observation)
        return self.decoder(join(torch.cat(parts, dim=-1), z)).squeeze(-1)

    @torch.no_grad()
    def decode(self, context: Experience, steps: Experience, rng: torch.Generator) -> Tensor:
        """Return the rewards [tasks, n] of steps by the decoder, given one z per task drawn from the posterior."""
        z = self.sample(self.adapt(self.prior(len(context.reward)), context), rng)["z"]
        return self._reward(steps, z).view(steps.shape)

    @torch.no_grad()
    def actions(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return tanh of the policy's mean, [tasks, n, action]."""
        return torch.tanh(self.policy(join(observation, z))[0]).view(*observation.shape[:2], -1)

    @torch.no_grad()
    def explore(self, observation: Tensor, z: Tensor, rng: torch.Generator) -> Tensor:
        """Return actions sampled from the policy, [tasks, n, action]."""
        mean, log_std = self.policy(join(observation, z))
        noise = torch.randn(mean.shape, generator=rng).to(self.device)
        return torch.tanh(mean + log_std.exp() * noise).view(*observation.shape[:2], -1)

    # --- training ----------------------------------------------------------------------------------------------

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.noise, device=self.device)

    def _act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sampled action and its log pi."""
        mean, log_std = self.policy(state)
        before = mean + log_std.exp() * self._normal(mean)
        return torch.tanh(before), log_prob(mean, log_std, before)

    @staticmethod
    def _smallest(net: Mlp, state: Tensor, action: Tensor) -> Tensor:
        smallest: Tensor = net(torch.cat([action, state], dim=-1)).amin(0).squeeze(-1)
        return smallest

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of critics, encoder and decoder (offline alone), and actor."""
        c, online = self.settings, phase.name == ONLINE
        moves = batch["transitions"]
        with torch.set_grad_enabled(not online):
            mean, variance = self.posterior(batch["context"])
        attached = mean + variance.sqrt() * self._normal(mean)
        z = attached.detach()
        state, data = join(moves.observation, z), moves.action.reshape(-1, self.spec.action)
        drawn, drawn_log = self._act(state)
        z2 = (mean + variance.sqrt() * self._normal(mean)).detach() if c.second_z else z
        with torch.no_grad():
            following, following_log = self._act(join(moves.next_observation, z2))
            value = self._smallest(self.target, join(moves.next_observation, z), following) - c.entropy * following_log
            going_on = 1 - moves.terminal.reshape(-1)
            y = c.reward_scale * moves.reward.reshape(-1) + c.gamma * going_on * value
            score = self._smallest(self.q, state, data) - self._smallest(self.q, state, drawn)
            weights = awac_weights(score, c.beta) if c.actor == "awac" else torch.ones_like(score)
        q = self.q(torch.cat([data, state], dim=-1)).squeeze(-1)
        q_loss = (q - y).square().mean(-1).sum()
        scalars = {"q_loss": q_loss.detach(), "q_mean": q.detach().mean()}
        if not online:
            standard = (torch.zeros_like(mean), torch.ones_like(variance))
            kl = diagonal_kl((mean, variance), standard).mean()
            error = (self._reward(moves, attached) - moves.reward.reshape(-1)).square().mean()
            scalars |= {"kl": kl.detach(), "reward_loss": error.detach()}
            self.steps["context"].zero_grad(set_to_none=True)
            (c.kl_weight * kl + error).backward()
        self.steps["q"].zero_grad(set_to_none=True)
        q_loss.backward()
        self.steps["policy"].zero_grad(set_to_none=True)
        if c.actor_critic == "old":
            loss = self._policy_loss(online, state, data, weights, drawn, drawn_log)
        self.steps["q"].step()
        if not online:
            self.steps["context"].step()
        if c.actor_critic == "new":
            loss = self._policy_loss(online, state, data, weights, drawn, drawn_log)
        self.steps["policy"].step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.q.parameters()), c.tau)
        return scalars | {
            "policy_loss": loss, "weight_std": weights.std(correction=0), "entropy": -drawn_log.detach().mean(),
            "z_rms": z.square().mean().sqrt(),
        }  # fmt: skip

    def _policy_loss(
        self, online: bool, state: Tensor, data: Tensor, weights: Tensor, drawn: Tensor, drawn_log: Tensor
    ) -> Tensor:
        """Back-propagate the actor's loss, whose gradient is that of the critics as they are now; return it."""
        c = self.settings
        loss = state.new_zeros(())
        if c.actor != "sac":
            mean, log_std = self.policy(state)
            loss = -(weights * log_prob(mean, log_std, torch.atanh(data.clamp(-_EDGE, _EDGE)))).mean()
        by_value = {"sac": 1.0, "cloning": 0.0, "awac": c.online_q_weight if online else 0.0}[c.actor]
        if by_value:
            with held_still(self.q):
                gain = self._smallest(self.q, state, drawn)
            loss = loss + by_value * (c.entropy * drawn_log - gain).mean()
        loss.backward()
        return loss.detach()

    # --- state -------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the networks."""
        return {
            "encoder": self.encoder, "decoder": self.decoder, "policy": self.policy, "q": self.q, "target": self.target,
        }  # fmt: skip

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return dict(self.steps)

    def generators(self) -> dict[str, torch.Generator]:
        """Return the stream of z and actions."""
        return {"noise": self.noise}


CONFIG = SmacConfig
ALGORITHM = Smac
