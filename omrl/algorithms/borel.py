"""BOReL (Dorfman, Shenfeld, Tamar, NeurIPS 2021): a belief over tasks from a recurrent VAE, and offline RL on it.

Two phases of training:

1. **vae**, the first ``vae_steps`` updates. A GRU reads (a, s', r) step by step; after step t its belief is
   q_t = N(mean, exp(log-variance)), and q_0, before any step, is what the heads make of a zero state. The belief goes
   on through all episodes of a rollout. Each belief decodes all T rewards of its rollout, past and future:

       L = sum over t = 0..T of [mean_j (r_hat(z_t, step j) - r_j)^2 + kl_weight * KL(q_t || q_(t-1))],  z_t ~ q_t,
       with N(0, I) before q_0; a mean over rollouts

   ``beliefs`` of the T + 1 are drawn and weighted by (T + 1) / beliefs, which leaves the expectation as it is.
2. **policy**, the rest. ``begin`` runs the encoder along the data; a state is then (s, mean, log-variance), with the
   belief before the step for s and after it for s' (state relabelling). Soft actor-critic learns on that, as
   released without regularization: exploring is what the value of a belief is about.

While acting, the belief is the GRU's state, and ``observe`` is one step of it.

Reward relabelling lets the VAE see what one task's reward is where other tasks' policies go; without it a belief
learns to read the task off the behavior. It is a dataset here: a pair whose ``context`` is a relabelled set
(``unit: episode``, ``tasks: train``) and whose ``transitions`` are the tasks' own. The first half of a rollout's
episodes is drawn from ``context``, the second from ``transitions``; the policy's rows come from the latter alone,
unless ``policy_context`` says otherwise.

Not repeated are three errors of the released relabelling: the sparse point robot's rewards are minus the distance
inside the disc, where stepping gives 1; Half-Cheetah-Vel's function takes the next state for the previous one and
reads a velocity that changing the task does not set; the ant's rewards are those of a freshly drawn goal, from the
current state. Here the family has one function of (s, a, s') for stepping and relabelling. Nor is the GRU's state set
to zero before a step that ends at the goal, which the VAE never saw.

====================  ================================================  ==============================================
what                  released code                                     here
====================  ================================================  ==============================================
rollout               two successive episodes of the SAC run            vae: ``episodes`` drawn independently;
                                                                        policy: successive ones of one checkpoint
... of relabelled     a relabelled episode, then one of the task's own  vae: the same; policy: successive ones of the
                                                                        relabelled set
between episodes      the next action follows the last state; s and s'  the next episode's start is the next state,
                      carry a flag                                      no flag
relabelled            in place, task after task, of other tasks         from the original data, of all tasks
... for the policy    never (a flag)                                    a share of its rows, ``policy_context``; 0
updates               82,000 and 5 million (points)                     5,000 and the rest of ``meta_train.steps``
tasks of an update    kept for 1,000 updates                            drawn for each, with replacement
beliefs               all T + 1                                         16 (``beliefs: 0`` for all)
actor's step          old critics' values, back-propagated through the  after the critic's step
                      new weights (an old torch allows it)
entropy               weight 0.01                                       weight 1, ``reward_scale`` 100: the same
terminal              at the goal                                       the family's
====================  ================================================  ==============================================

Defaults are those for the sparse point robot: latent 5, GRU 128, rates 3e-4, ``kl_weight`` 0.05, 8 rollouts of 8
tasks, networks 2 x 128, gamma 0.9, 16 x 256 rows; ``decode_from: next`` there, and ``transition`` for the cheetah and
ant, whose rewards are of (s, a, s').

Known failures:

* Plain SAC leaves few and narrow data: its critics promise most where there are none. On the data of
  ``pipelines/borel-point`` even a policy that was told the goal in place of the belief found none: return 0.5 of 52
  after 2,000 updates; 48 with ``critic_layer_norm``, which bounds what a critic can promise, and 52 after 4,000.
* Logs of policies that go straight to their goals say little about where to look next: few rows stand where there is
  no reward and leave, and a second episode knows the goal. After a first one that found nothing the policy gives up.
  ``policy_context`` adds relabelled rows: the first episode got better and the second not; its README has figures.
* The decoder knows rewards alone, so tasks that differ in dynamics are told apart by nothing.
* A belief that reads more episodes than ``episodes`` is outside of what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from omrl.algorithms.base import Algorithm, Belief, Draw, Phase, Spec
from omrl.data.taskdata import TaskData
from omrl.nets.actor_critic import ActorCritic, ActorCriticConfig, adam
from omrl.nets.experience import Experience, joined
from omrl.nets.recurrent import BeliefEncoder, RewardDecoder, gaussian_divergence

_AT_ONCE = 256  # rollouts that the encoder is run along together, between the phases


class BorelConfig(ActorCriticConfig):
    """BOReL's hyperparameters, beside those of ``ActorCriticConfig``.

    Attributes:
        latent_dim: width of the belief's mean.
        hidden: units of the recurrent encoder (GRU).
        episodes: episodes of a rollout, through which the belief goes on.
        vae_steps: updates of the VAE; the rest of ``meta_train.steps``, which must be more, is the policy's.
        vae_rate: learning rate of the VAE (Adam).
        kl_weight: of the KL between successive beliefs; 1 in the online version.
        beliefs: how many of a rollout's beliefs decode, drawn anew for every update; 0 for all.
        policy_context: share of the policy's rows that are drawn from ``context``, the relabelled set: reward
            relabelling in the policy's phase too. The release has a flag for it, off.
        policy_reward: what actor and critic learn from: the ``signal`` that the belief sees too (the sparse reward
            where inference sees that one, as released), or the ``dense`` reward, as FOCAL's do.
        decode_from: rewards from the ``next`` state, or from the ``transition`` (s, a, s').
        vae_meta_batch: tasks per update of the VAE, drawn with replacement.
        vae_rollouts: rollouts of each of them.
        meta_batch: tasks per update of the policy, drawn with replacement.
        rl_batch: transitions per drawn task.
    """

    width: Annotated[int, Field(ge=1, le=4096)] = 128
    depth: Annotated[int, Field(ge=1, le=16)] = 2
    value_network: bool = False
    mean_weight: Annotated[float, Field(ge=0)] = 0.0
    log_std_weight: Annotated[float, Field(ge=0)] = 0.0
    log_std_max: Annotated[float, Field(gt=-20)] = 2.0
    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 5
    hidden: Annotated[int, Field(ge=1, le=4096)] = 128
    episodes: Annotated[int, Field(ge=1, le=1000)] = 2
    vae_steps: Annotated[int, Field(ge=0, le=10**8)] = 5000
    vae_rate: Annotated[float, Field(gt=0)] = 3e-4
    kl_weight: Annotated[float, Field(ge=0)] = 0.05
    beliefs: Annotated[int, Field(ge=0, le=4096)] = 16
    policy_context: Annotated[float, Field(ge=0, le=1)] = 0.0
    policy_reward: Literal["signal", "dense"] = "signal"
    decode_from: Literal["next", "transition"] = "next"
    vae_meta_batch: Annotated[int, Field(ge=1, le=1024)] = 8
    vae_rollouts: Annotated[int, Field(ge=1, le=1024)] = 8
    meta_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 256


class Rollouts(NamedTuple):
    """Steps in their order, through all episodes of a rollout: [n, t, width]; signal and valid [n, t]."""

    observation: Tensor
    action: Tensor
    next_observation: Tensor
    signal: Tensor
    valid: Tensor


def rollouts(parts: Sequence[Experience], of_each: int) -> Rollouts:
    """Return ``of_each`` rollouts per task, of all parts' episodes one behind the other; padding stands at the end.

    Args:
        parts: episodes [tasks, drawn, t, ...]; ``drawn`` is a multiple of ``of_each``.
        of_each: rollouts per task.
    """

    def join(name: str) -> Tensor:
        found = [getattr(part, name) for part in parts]
        return torch.cat([x.reshape(len(x) * of_each, -1, *x.shape[3:]) for x in found], dim=1)

    if any(part.reward.ndim != 3 or part.valid is None for part in parts):
        raise ValueError("a rollout is made of episodes, [tasks, n, t, ...]")
    joined = Rollouts(*(join(name) for name in Rollouts._fields))
    if bool(joined.valid.all()):
        return joined
    place = joined.valid.argsort(dim=1, descending=True, stable=True)[:, : int(joined.valid.sum(dim=1).max())]
    row = torch.arange(len(place), device=place.device).unsqueeze(1)
    return Rollouts(*(x[row, place] for x in joined))


def rollout_bounds(data: TaskData, place: int, episodes: int) -> NDArray[np.int64]:
    """Return [first row, row after the last] of rollouts of up to so many successive episodes of one checkpoint.

    Checkpoints that have one episode each, as in a relabelled set, count as one: no rollout of it would have two.
    """
    found = data.episodes(place)
    checkpoint = data.checkpoint[place, found[:, 0]]
    first = np.flatnonzero(np.r_[True, checkpoint[1:] != checkpoint[:-1]])
    alone = np.diff(np.r_[first, len(found)]) == 1
    groups = np.split(found, first[1:][~(alone[1:] & alone[:-1])])
    parts = [group[i : i + episodes] for group in groups for i in range(0, len(group), episodes)]
    return np.array([[part[0, 0], part[-1, 1]] for part in parts], dtype=np.int64)


class Borel(Algorithm):
    """See the module's docstring."""

    CONFIG = BorelConfig
    PROTOCOLS = frozenset({"offline-context", "online-prior", "online-idaq", "online-belief"})

    def __init__(self, config: BorelConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        s, a, latent = spec.observation, spec.action, config.latent_dim
        self.encoder = BeliefEncoder(s, a, config.hidden, latent, self.generator).to(self.device)
        transition = config.decode_from == "transition"
        self.decoder = RewardDecoder(s, a, latent, transition, self.generator).to(self.device)
        self.actor_critic = ActorCritic(config, s + 2 * latent, a, 0, self.generator, self.device)
        self.vae_optimizer = adam([*self.encoder.parameters(), *self.decoder.parameters()], config.vae_rate)
        noise_seed = int(torch.randint(2**31, (1,), generator=self.generator).item())
        self.noise = torch.Generator(self.device).manual_seed(noise_seed)

    # --- training ----------------------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: BorelConfig, spec: Spec, steps: int) -> str | None:
        """Return what does not fit: no steps left for the policy."""
        if config.vae_steps < steps:
            return None
        return f"vae_steps = {config.vae_steps}: expected below meta_train.steps = {steps}, the rest is the policy's"

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return the data's next actions where the regularizer of the target needs them."""
        return {"next_action": data.next_actions()} if self.settings.regularization.next_actions else {}

    def phases(self, steps: int) -> list[Phase]:
        """Return the VAE's phase and the policy's."""
        config = self.settings
        first, before = min(config.vae_steps, steps), config.episodes // 2
        vae = {"transitions": Draw(config.vae_rollouts * (config.episodes - before), "episode")}
        if before:
            vae["context"] = Draw(config.vae_rollouts * before, "episode", source="context")
        others = round(config.policy_context * config.rl_batch)
        rows = {"transitions": Draw(config.rl_batch - others), "context": Draw(others, source="context")}
        sets = ["", *(f"more{i} " for i in range(config.regularization.further_batches))]
        policy = {part + name: draw for part in sets for name, draw in rows.items() if draw.rows}
        both = (
            Phase("vae", first, config.vae_meta_batch, vae),
            Phase("policy", steps - first, config.meta_batch, policy),
        )
        return [phase for phase in both if phase.steps]

    def online_phase(self, steps: int) -> Phase:
        """Return the policy's phase; the VAE stands still."""
        _, policy = self.phases(self.settings.vae_steps + steps)
        return Phase("online", steps, policy.meta_batch, policy.draws)

    def context_draw(self, transitions: int) -> Draw:
        """Return whole episodes, about as many transitions."""
        return Draw(transitions, "episode", by_step=True)

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of the VAE, or of actor and critic."""
        if phase.name == "vae":
            return self._vae_step(batch)
        sets: dict[str, list[Experience]] = {}
        for name, drawn in batch.items():
            sets.setdefault(name.removesuffix("transitions").removesuffix("context"), []).append(self._augmented(drawn))
        own, *extra = (joined(parts) for parts in sets.values())
        nothing = torch.zeros(len(own.task), 0, device=self.device)
        return self.actor_critic.update(own, nothing, extra)

    def _vae_step(self, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        config = self.settings
        drawn = [batch[name] for name in ("context", "transitions") if name in batch]
        steps = rollouts(drawn, config.vae_rollouts)
        count = steps.valid.shape[1] + 1
        chosen = torch.arange(count, device=self.device)
        if 0 < config.beliefs < count:
            chosen = torch.randperm(count, generator=self.noise, device=self.device)[: config.beliefs]
        shape = (len(steps.valid), len(chosen), config.latent_dim)
        noise = torch.randn(shape, generator=self.noise, device=self.device)
        error, divergence = self.vae_losses(steps, chosen, noise)
        loss = error + config.kl_weight * divergence
        self.vae_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.vae_optimizer.step()
        return {"vae_loss": loss.detach(), "reward_error": error.detach() / count, "kl": divergence.detach()}

    def vae_losses(self, steps: Rollouts, chosen: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward error and the KL terms of rollouts: sums over beliefs, means over rollouts.

        Args:
            steps: [n, t, ...].
            chosen: int64 [m], the beliefs 0..t that decode; the error counts (t + 1) / m times.
            noise: standard normal [n, m, latent].
        """
        n, t = steps.valid.shape
        start = torch.zeros(n, self.settings.hidden, device=self.device)
        after = self.encoder(steps.action, steps.next_observation, steps.signal, start)
        mean, log_variance = self.encoder.belief(torch.cat([start.unsqueeze(1), after], dim=1))
        there = torch.cat([torch.ones_like(steps.valid[:, :1]), steps.valid], dim=1)  # of beliefs, [n, t + 1]
        before = [torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) for x in (mean, log_variance)]
        divergence = (gaussian_divergence(mean, log_variance, *before) * there).sum(dim=1)
        z = mean[:, chosen] + (0.5 * log_variance[:, chosen]).exp() * noise
        features = self.decoder.features(steps.observation, steps.action, steps.next_observation)
        error = (self.decoder(z, features) - steps.signal.unsqueeze(1)).square()  # [n, m, t]
        error = (error * steps.valid.unsqueeze(1)).sum(-1) / steps.valid.sum(-1, keepdim=True)
        share = (t + 1) / len(chosen)
        return share * (error * there[:, chosen]).sum(dim=1).mean(), divergence.mean()

    def _augmented(self, rows: Experience) -> Experience:
        """Return rows whose state has the belief beside it, before and after the step, with the policy's reward."""
        before, after, following = (rows.extra[name] for name in ("belief", "next_belief", "following"))
        return replace(
            rows,
            observation=torch.cat([rows.observation, before], dim=-1),
            next_observation=torch.cat([following, after], dim=-1),
            reward=rows.signal if self.settings.policy_reward == "signal" else rows.reward,
        )

    @torch.no_grad()
    def begin(self, phase: Phase, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return, before the policy's phase, the belief before and after every row, and the state that follows it.

        Between two episodes of a rollout, the start of the second follows the first's last step.
        """
        if phase.name == "vae":
            return {}
        tasks, rows = data.reward.shape
        width = 2 * self.settings.latent_dim
        before, after = (np.zeros((tasks, rows, width), dtype=np.float32) for _ in range(2))
        following = data.next_observation.copy()
        prior = self._vector(torch.zeros(self.settings.hidden, device=self.device)).cpu().numpy()
        for place in range(tasks):
            bounds = rollout_bounds(data, place, self.settings.episodes)
            last = np.arange(rows) + 1 == data.end[place]
            seams = np.setdiff1d(np.flatnonzero(last), bounds[:, 1] - 1)
            following[place, seams] = data.observation[place, seams + 1]
            for group in np.split(bounds, range(_AT_ONCE, len(bounds), _AT_ONCE)):
                lengths = group[:, 1] - group[:, 0]
                steps = np.arange(lengths.max())
                index = np.minimum(group[:, :1] + steps, group[:, 1:] - 1)
                made = steps < lengths[:, None]
                fields = (getattr(data, n)[place][index] for n in ("action", "next_observation", "signal"))
                start = torch.zeros(len(group), self.settings.hidden, device=self.device)
                found = self._vector(self.encoder(*(torch.from_numpy(x).to(self.device) for x in fields), start))
                vectors = found.cpu().numpy()
                after[place, index[made]] = vectors[made]
                shifted = np.concatenate([np.broadcast_to(prior, (len(group), 1, width)), vectors[:, :-1]], axis=1)
                before[place, index[made]] = shifted[made]
        return {"belief": before, "next_belief": after, "following": following}

    # --- acting ------------------------------------------------------------------------------------------------

    def _vector(self, hidden: Tensor) -> Tensor:
        """Return mean and log-variance side by side."""
        return torch.cat(self.encoder.belief(hidden), dim=-1)

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return the encoder's state before the first step."""
        return torch.zeros(tasks, self.settings.hidden, device=self.device)

    @torch.no_grad()
    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the state after whole episodes, [tasks, n, t, ...], one behind the other."""
        steps = rollouts([context], 1)
        states = self.encoder(steps.action, steps.next_observation, steps.signal, belief)
        states = torch.cat([belief.unsqueeze(1), states], dim=1)
        return states[torch.arange(len(states), device=self.device), steps.valid.sum(dim=1).long()]

    @torch.no_grad()
    def observe(self, belief: Belief, step: Experience) -> Belief:
        """Return the state after one step more."""
        after = self.encoder(step.action, step.next_observation, step.signal, belief)[:, 0]
        return after if step.valid is None else torch.where(step.valid > 0, after, belief)

    @torch.no_grad()
    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return tanh of the policy's mean, or a sample where ``rng`` is given."""
        state = torch.cat([observation, self._vector(belief)], dim=-1)
        mean, log_std = self.actor_critic.policy(state)
        if rng is not None:
            mean = mean + log_std.exp() * torch.randn(mean.shape, generator=rng).to(self.device)
        return torch.tanh(mean)

    @torch.no_grad()
    def embedding(self, belief: Belief) -> Tensor | None:
        """Return the belief's mean."""
        mean: Tensor = self.encoder.belief(belief)[0]
        return mean

    # --- state -------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """Return encoder, decoder and actor-critic."""
        return {"encoder": self.encoder, "decoder": self.decoder, "actor_critic": self.actor_critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return {"vae": self.vae_optimizer, **self.actor_critic.optimizers}

    def generators(self) -> dict[str, torch.Generator]:
        """Return the streams of the VAE and of actions."""
        return {"vae": self.noise, "noise": self.actor_critic.noise}


CONFIG = BorelConfig
ALGORITHM = Borel
