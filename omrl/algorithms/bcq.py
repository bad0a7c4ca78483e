"""Contextual BCQ: batch-constrained Q-learning (Fujimoto et al., ICML 2019, Algorithm 1) on an inferred task.

The baseline of MBML (Li et al., 2020), FOCAL and FOCAL++: BCQ's state is (s, z), z = encoder(context).

    VAE         mean (a - D(s, z, u))^2 + kl_weight * mean KL(E(s, a, z), N(0, I)),  u = m + std * noise
    candidates  a_i = D(s, z, u_i) + perturbation * tanh(xi(s, D(s, z, u_i), z)),  u_i ~ N(0, I) clipped to +-vae_clip
    Q           sum over j of mean (Q_j(s, a, z) - y)^2,
                y = k r + gamma (1 - terminal) max_i [l min_j Q'_j(s', a_i, z) + (1 - l) max_j Q'_j(s', a_i, z)],
                l = ``soft_min``, a_i moved by the target perturbation
    xi          -mean Q_1(s, a_1, z) for one candidate, z detached
    acting      the candidate of the largest Q_1

**What trains the encoder**: the Q loss and the VAE's loss together, as MBML's released code does. FOCAL's text
(section 5) has "Bellman gradients" alone: ``encoder_by_vae: false``. The target and the perturbation never do.

**Order**: the VAE steps before the Q target decodes its candidates (``vae_first``), as in MBML's release and BCQ's
Algorithm 1. ``vae_first: false`` takes both losses at the same weights. On the tests' two goals with a bootstrapping
target (gamma 0.5, six seeds) the policies ended within 0.01 of each other.

**Acting is deterministic**: the latents u_i are drawn once from the model's seed and saved with the model, so that
act() draws nothing and the same state and z give the same action, in every episode and after loading. In BCQ and
in MBML's release they are drawn anew in each step.

Where MBML's released code and this differ (BCQ's own in brackets):

===================  ==============================================  ================================================
what                 MBML's released Contextual BCQ                  here
===================  ==============================================  ================================================
encoder              product of Gaussians, no KL term; (s, a, s',    FOCAL's deterministic one; s' where tasks differ
                     r) always                                       in dynamics
networks             7 to 9 x 1024 [2 x 400-300; VAE 2 x 750]        3 x 256 (FOCAL's), to be compared with the rest
meta-batch           all training tasks                              16 drawn with replacement
context, RL rows     disjoint                                        independent draws
steps                100,000                                         ``meta_train.steps``
gamma, reward scale  0.99, 1                                         the same; use FOCAL's gamma by environment
===================  ==============================================  ================================================

The other defaults agree: rates 3e-4 [1e-3], tau 0.005, ``soft_min`` 0.75, 10 candidates, perturbation 0.05, two VAE
latents per action entry clipped to 0.5, log-std in [-4, 15], VAE's KL a mean over rows and dimensions with weight
0.5, latent_dim 20, encoder 3 x 200, 128 context rows and 128 transitions per task.

Cost per update, one thread, width 64, 16 x 64 rows: 3.2 times FOCAL's, 1.2 times with one candidate.

Known failures:

* Returns of 0 on Sparse-Point-Robot in FOCAL's experiments, which leave it out there (appendix).
* Where the behavior is nearly uniform, latents clipped to 0.5 cover the middle of its actions only, and a small
  perturbation cannot reach the rest. On the tests' two goals at actions of +-0.8 (uniform actions, 600 updates, one
  seed) the policy ended 0.37 off with the defaults and with ``vae_clip: 2, kl_weight: 0.02``, and 0.12 off with
  ``perturbation: 0.3``.
* Rewards far from zero mean saturate the encoder: same tasks, ``perturbation: 0.3``, 10 added to or taken from every
  reward: mean |z| 0.92 and 0.99, both tasks at the same z. Center the rewards, or choose a method whose encoder has
  a loss of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from omrl.algorithms.base import ContextAlgorithm, Draw, Phase, Spec
from omrl.core.config import Config
from omrl.nets.actor_critic import adam, join
from omrl.nets.encoders import DeterministicEncoder
from omrl.nets.experience import Experience
from omrl.nets.generative import decoded, perturbed, vae_loss
from omrl.nets.mlp import Mlp


class BcqConfig(Config):
    """Contextual BCQ.

    Attributes:
        latent_dim: of z.
        encoder_width, encoder_depth, encoder_rate: of the context encoder.
        encoder_by_vae: let the VAE's loss train the encoder too.
        width, depth: hidden layers of all other networks.
        rate: Adam, of all other networks.
        gamma: discount; 0.99 in MBML's release. FOCAL has 0.9 for the sparse and wind point robots.
        reward_scale: factor on rewards in the critic's target; 1 in MBML's release.
        tau: rate of the target networks.
        soft_min: weight of the smaller of two Q values in the target; the larger one has the rest.
        candidates: actions that the target and the policy choose from.
        perturbation: largest change of a sampled action.
        vae_latent: latent size of the VAE per action entry.
        vae_clip: bound of the latents that actions are sampled from.
        kl_weight: of the KL divergence in the VAE's loss.
        vae_first: step the VAE before the Q target decodes its candidates, so that they are the stepped VAE's.
        meta_batch: tasks per update, drawn with replacement.
        rl_batch: transitions per drawn task to learn from.
        context_batch: transitions per drawn task for the encoder.
    """

    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 20
    encoder_width: Annotated[int, Field(ge=1, le=4096)] = 200
    encoder_depth: Annotated[int, Field(ge=1, le=16)] = 3
    encoder_rate: Annotated[float, Field(gt=0)] = 3e-4
    encoder_by_vae: bool = True
    width: Annotated[int, Field(ge=1, le=4096)] = 256
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    rate: Annotated[float, Field(gt=0)] = 3e-4
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    soft_min: Annotated[float, Field(ge=0, le=1)] = 0.75
    candidates: Annotated[int, Field(ge=1, le=1000)] = 10
    perturbation: Annotated[float, Field(ge=0, le=2)] = 0.05
    vae_latent: Annotated[int, Field(ge=1, le=1024)] = 2
    vae_clip: Annotated[float, Field(gt=0)] = 0.5
    kl_weight: Annotated[float, Field(ge=0)] = 0.5
    vae_first: bool = True
    meta_batch: Annotated[int, Field(ge=2, le=1024)] = 16
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 128
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 128


def soft_minimum(q: Tensor, weight: float) -> Tensor:
    """Return weight * min + (1 - weight) * max over the first axis of ``q`` [2, ...]."""
    return weight * q.amin(0) + (1 - weight) * q.amax(0)


class BatchConstrained(nn.Module):
    """VAE, perturbation network and twin Q, given states of any kind.

    Args:
        states: width of what stands for the state, such as (s, z).
        actions: width of an action.
        config: hyperparameters.
        generator: source of initial weights and of the latents that acting chooses from.
    """

    latents: Tensor

    def __init__(self, states: int, actions: int, config: BcqConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.actions = config, actions
        hidden, self.latent = [config.width] * config.depth, config.vae_latent * actions
        self.encode = Mlp(states + actions, hidden, 2 * self.latent, generator)
        self.decode = Mlp(states + self.latent, hidden, actions, generator)
        self.shift = Mlp(states + actions, hidden, actions, generator)
        self.q = Mlp(states + actions, hidden, 1, generator, stack=2)
        self.target_shift = copy.deepcopy(self.shift).requires_grad_(False)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        drawn = torch.randn(config.candidates, self.latent, generator=generator)
        self.register_buffer("latents", drawn.clamp(-config.vae_clip, config.vae_clip))

    def vae_loss(self, state: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        """Return squared error of the decoded action plus the weighted KL to N(0, I), both means.

        ``noise`` is standard normal, [n, latent].
        """
        return vae_loss(self.encode, self.decode, state, action, noise, self.config.kl_weight)

    def generate(self, state: Tensor, latent: Tensor) -> Tensor:
        """Return the decoded action in (-1, 1)."""
        return decoded(self.decode, state, latent)

    def perturb(self, shift: Mlp, state: Tensor, action: Tensor) -> Tensor:
        """Return the action moved by at most ``perturbation``, within [-1, 1]."""
        return perturbed(shift, state, action, self.config.perturbation)

    def value(self, q: Mlp, state: Tensor, action: Tensor) -> Tensor:
        """Return both values, [2, n]."""
        return q(torch.cat([state, action], dim=-1)).squeeze(-1)

    def target(self, following: Tensor, reward: Tensor, terminal: Tensor, latents: Tensor) -> Tensor:
        """Return y [n] for states s' [n, width] and latents [n, candidates, latent]."""
        config, n = self.config, len(following)
        with torch.no_grad():
            state = following.repeat_interleave(config.candidates, dim=0)
            action = self.perturb(self.target_shift, state, self.generate(state, latents.reshape(len(state), -1)))
            values = soft_minimum(self.value(self.target_q, state, action), config.soft_min)
            best = values.view(n, config.candidates).amax(1)
            return config.reward_scale * reward + config.gamma * (1 - terminal) * best

    @torch.no_grad()
    def best_action(self, state: Tensor) -> Tensor:
        """Return, of the perturbed candidates, the one that Q1 values highest: [n, action] for states [n, width]."""
        n, count = len(state), self.config.candidates
        wide = state.repeat_interleave(count, dim=0)
        action = self.perturb(self.shift, wide, self.generate(wide, self.latents.repeat(n, 1)))
        chosen = self.value(self.q, wide, action)[0].view(n, count).argmax(1)
        return action.view(n, count, -1)[torch.arange(n, device=state.device), chosen]


class Bcq(ContextAlgorithm):
    """See the module's docstring."""

    CONFIG = BcqConfig

    def __init__(self, config: BcqConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        hidden = [config.encoder_width] * config.encoder_depth
        self.encoder = DeterministicEncoder(spec.context, hidden, config.latent_dim, self.generator).to(self.device)
        self.learner = BatchConstrained(spec.observation + config.latent_dim, spec.action, config, self.generator)
        self.learner.to(self.device)
        noise_seed = int(torch.randint(2**31, (1,), generator=self.generator).item())
        self.noise = torch.Generator(self.device).manual_seed(noise_seed)
        learner = self.learner
        self._optimizers = {
            "encoder": adam(self.encoder.parameters(), config.encoder_rate),
            "vae": adam([*learner.encode.parameters(), *learner.decode.parameters()], config.rate),
            "q": adam(learner.q.parameters(), config.rate),
            "shift": adam(learner.shift.parameters(), config.rate),
        }

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.noise, device=self.device)

    def vae_loss(self, batch: Experience, z: Tensor) -> Tensor:
        """Return the VAE's loss, attached to z where it trains the encoder too."""
        state = join(batch.observation, z if self.settings.encoder_by_vae else z.detach())
        action = batch.action.reshape(-1, self.learner.actions)
        return self.learner.vae_loss(state, action, self._normal(len(state), self.learner.latent))

    def q_loss(self, batch: Experience, z: Tensor) -> Tensor:
        """Return the loss of both Q, attached to z; the target's candidates are those of the VAE as it is."""
        config, learner = self.settings, self.learner
        state, following = join(batch.observation, z), join(batch.next_observation, z.detach())
        latents = self._normal(len(state), config.candidates, learner.latent).clamp(-config.vae_clip, config.vae_clip)
        y = learner.target(following, batch.reward.reshape(-1), batch.terminal.reshape(-1), latents)
        return (learner.value(learner.q, state, batch.action.reshape(len(state), -1)) - y).square().mean(-1).sum()

    def phases(self, steps: int) -> list[Phase]:
        """Return one phase: rows to learn from, and a bag for the encoder."""
        config = self.settings
        draws = {"transitions": Draw(config.rl_batch), "context": Draw(config.context_batch, source="context")}
        return [Phase("training", steps, config.meta_batch, draws)]

    @property
    def latent(self) -> int:
        """Width of z."""
        return self.settings.latent_dim

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of every network."""
        learner, config = self.learner, self.settings
        for name in ("encoder", "vae", "q"):
            self._optimizers[name].zero_grad(set_to_none=True)
        z = self.encoder(self.rows(batch["context"]))
        vae = self.vae_loss(batch["transitions"], z)
        if config.vae_first:  # its gradient waits in the encoder for the Q loss's
            vae.backward(retain_graph=True)
            self._optimizers["vae"].step()
            q = self.q_loss(batch["transitions"], z)
            q.backward()
        else:
            q = self.q_loss(batch["transitions"], z)
            (vae + q).backward()
            self._optimizers["vae"].step()
        self._optimizers["encoder"].step()
        self._optimizers["q"].step()
        state = join(batch["transitions"].observation, z.detach())
        latents = self._normal(len(state), learner.latent).clamp(-config.vae_clip, config.vae_clip)
        with torch.no_grad():
            sampled = learner.generate(state, latents)
        frozen = [*learner.q.parameters()]
        for parameter in frozen:  # the perturbation's loss needs dQ/da only
            parameter.requires_grad_(False)
        shift_loss = -learner.value(learner.q, state, learner.perturb(learner.shift, state, sampled))[0].mean()
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._optimizers["shift"].zero_grad(set_to_none=True)
        shift_loss.backward()
        self._optimizers["shift"].step()
        with torch.no_grad():
            for target, online in ((learner.target_q, learner.q), (learner.target_shift, learner.shift)):
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), config.tau)
        return {
            "vae_loss": vae.detach(),
            "q_loss": q.detach(),
            "z_rms": z.detach().square().mean().sqrt(),
            "q_mean": -shift_loss.detach(),
        }

    @torch.no_grad()
    def infer(self, context: Experience) -> Tensor:
        """Return z [tasks, latent]."""
        z: Tensor = self.encoder(self.rows(context))
        return z

    @torch.no_grad()
    def actions(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return the best of the perturbed candidates, [tasks, n, action]."""
        tasks, n, _ = observation.shape
        return self.learner.best_action(join(observation, z)).view(tasks, n, -1)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return encoder and learner."""
        return {"encoder": self.encoder, "learner": self.learner}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return dict(self._optimizers)

    def generators(self) -> dict[str, torch.Generator]:
        """Return the stream of latents."""
        return {"noise": self.noise}


CONFIG = BcqConfig
ALGORITHM = Bcq
