"""MBML: Multi-task Batch RL with Metric Learning (Li et al., 2020, paper and release): distilled BCQ.

Two phases of training:

1. **teachers**, the first ``bcq_steps`` updates. One BCQ per training task, none knowing of another (losses as in
   ``omrl.algorithms.bcq`` with the bare state), and per task an ensemble of models of the rewards that the encoder
   sees (with next-state models where tasks differ in dynamics), by squared error.
2. **student**, the rest: one context-conditioned BCQ that regresses what the task's own networks say.

       Q        mean (Q(s, a, z) - Q_1^task(s, a))^2                          z attached
       decoder  mean (D(s, z, u) - D^task(s, u))^2, u clipped                 z detached
       xi       mean (tanh xi(s, a, z) - tanh xi^task(s, a))^2, a = D^task    z detached
       encoder  Q's loss + triplet + kl_weight * sum KL(q(z | c), N(0, I)); q is a product of Gaussians, one per row

       triplet  mean over i != j of relu(KL(q(j's rows with i's rewards) || q(i's rows))
                                         - KL(q(j's rows with i's rewards) || q(j's rows)) + margin)

   i's rewards on j's rows are the mean of ensemble i; rows whose members disagree (standard deviation at or above
   ``threshold``) are left out. The context that the student learns on holds as many relabelled rows as true ones.

Teachers step their VAE before the Q target decodes with it, as the release does; ``vae_first: false`` for after.

All tasks' networks are one stack, and an update touches those of the drawn tasks by batched matrix products. In the
curve ``q_mean`` is the teachers' in phase 1 and the student's in phase 2.

===================  ==============================================  ================================================
what                 released code                                   here
===================  ==============================================  ================================================
meta-batch           phase 2: all training tasks; phase 1: tasks     16 drawn with replacement; Adam steps the whole
                     one after the other                             stack, a task not drawn has a zero gradient
teachers kept        the best of several by true returns, which is   the last
                     selection on the environment
networks             9, 8 and 7 x 1024; teachers 400-300, VAE 750    3 x 256 (FOCAL's)
ensemble             20 members, all see the same rows               5, also the same rows
ensemble's training  4,000 updates of its own, walker's next state   the same updates as the BCQs, on the context's rows
                     20,000
next-state model     6 x 256, walker only                            a further output of the reward model
steps                BCQ 50,000 to 250,000 by environment, then      5,000, then the rest of ``meta_train.steps``
                     100,000
threshold            0.02 (mazes) to 0.2 (humanoid) by environment   0.1 (ants, walker); next state 0.2 (walker)
KL                   a product of ratios, overflows at 20            in logarithms
                     dimensions
few usable rows      crash below 64                                  the context is what there is
encoder's input      (s, a, s', r) always                            s' where tasks differ in dynamics
z, latents of acts   sampled; context collected online               posterior mean, fixed latents (see ``bcq``);
                                                                     ``online-prior`` collects
===================  ==============================================  ================================================

The other defaults agree: rates 3e-4, gamma 0.99, reward scale 1, tau 0.005, ``soft_min`` 0.75, 10 candidates,
perturbation 0.05, latents clipped to 0.5, VAE's KL weight 0.5, one hidden layer of 128 per reward model, latent_dim
20, encoder 3 x 200, margin 2, ``kl_weight`` 0.1, 64 context rows and 128 transitions per task. A pair without a
usable row counts as the constant margin, as there. Not here: SAC started from the distilled Q, and the ablations
without relabelling or triplet loss.

Cost per update, one thread, width 64, 16 x 64 transitions and 32 context rows: 5.1 times FOCAL's in phase 1 and 6.1
times in phase 2, for 20 tasks as for 80. Phase 2 grows with the square of the meta-batch.

Known failures:

* Returns of 0 on Sparse-Point-Robot in FOCAL's experiments, which leave it out there (appendix).
* It needs as much phase 1 as a single-task method, for each task: with 80 tasks and a meta-batch of 16 a task is
  in about every fifth update.
* The posterior is a product of as many Gaussians as there are rows, so its KL starts at hundreds, and ``kl_weight``
  0.1 of it outweighs a distillation loss of small values: within 100 updates every posterior is the prior, where the
  triplet loss has no gradient (``triplet_loss`` at the margin, ``z_rms`` near 1). On Point-Robot with 3,000 updates:
  return -19.7, as random actions; -12.2 with 0.001 (three seeds), and -12.5 without the KL (one).
* A threshold below the ensembles' disagreement switches the triplet off: ``usable`` near 0, ``triplet_loss`` at the
  margin.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from omrl.algorithms.base import ContextAlgorithm, Draw, Phase, Spec
from omrl.algorithms.bcq import soft_minimum
from omrl.core.config import Config
from omrl.nets.actor_critic import adam, join
from omrl.nets.encoders import gaussian_kl
from omrl.nets.experience import Experience
from omrl.nets.generative import decoded, diagonal_kl, perturbed, posterior, vae_loss
from omrl.nets.mlp import Mlp


class MbmlConfig(Config):
    """MBML.

    Attributes:
        tasks: training tasks; the same as ``tasks.train``.
        bcq_steps: updates of phase 1; the rest of ``meta_train.steps`` is distillation.
        latent_dim: of z; 20 in the release.
        encoder_width, encoder_depth: of the context encoder.
        width, depth: hidden layers of teachers and student.
        ensemble, ensemble_width: reward models per task, one hidden layer each.
        rate: Adam, everything.
        gamma, reward_scale: as in FOCAL, by environment.
        tau, soft_min, candidates, perturbation, vae_latent, vae_clip, vae_kl, vae_first: of the BCQs of phase 1, see
            ``BcqConfig``.
        threshold: largest standard deviation of the ensemble's reward in a usable row.
        next_threshold: the same of the mean next-state prediction.
        margin: of the triplet loss.
        kl_weight: of the KL to the prior.
        meta_batch: tasks per update, drawn with replacement.
        rl_batch, context_batch: transitions per drawn task.
    """

    tasks: Annotated[int, Field(ge=2, le=10_000)]
    bcq_steps: Annotated[int, Field(ge=0, le=10**8)] = 5000
    latent_dim: Annotated[int, Field(ge=1, le=1024)] = 20
    encoder_width: Annotated[int, Field(ge=1, le=4096)] = 200
    encoder_depth: Annotated[int, Field(ge=1, le=16)] = 3
    width: Annotated[int, Field(ge=1, le=4096)] = 256
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    ensemble: Annotated[int, Field(ge=2, le=100)] = 5
    ensemble_width: Annotated[int, Field(ge=1, le=4096)] = 128
    rate: Annotated[float, Field(gt=0)] = 3e-4
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    soft_min: Annotated[float, Field(ge=0, le=1)] = 0.75
    candidates: Annotated[int, Field(ge=1, le=1000)] = 10
    perturbation: Annotated[float, Field(ge=0, le=2)] = 0.05
    vae_latent: Annotated[int, Field(ge=1, le=1024)] = 2
    vae_clip: Annotated[float, Field(gt=0)] = 0.5
    vae_kl: Annotated[float, Field(ge=0)] = 0.5
    vae_first: bool = True
    threshold: Annotated[float, Field(gt=0)] = 0.1
    next_threshold: Annotated[float, Field(gt=0)] = 0.2
    margin: Annotated[float, Field(ge=0)] = 2.0
    kl_weight: Annotated[float, Field(ge=0)] = 0.1
    meta_batch: Annotated[int, Field(ge=2, le=1024)] = 16
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 128
    context_batch: Annotated[int, Field(ge=1, le=16384)] = 64


def of_tasks(stack: Mlp, x: Tensor, places: Tensor) -> Tensor:
    """Return the outputs [m, n, outputs] of the networks ``places`` [m] of a stack for x [m, n, inputs]."""
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        x = torch.baddbmm(bias[places], torch.relu(x) if layer else x, weight[places])
    return x


class Teachers(nn.Module):
    """One BCQ and one ensemble per task, stacked."""

    def __init__(self, config: MbmlConfig, spec: Spec, generator: torch.Generator) -> None:
        super().__init__()
        hidden, count = [config.width] * config.depth, config.tasks
        s, a = spec.observation, spec.action
        latent = config.vae_latent * a
        self.encode = Mlp(s + a, hidden, 2 * latent, generator, count)
        self.decode = Mlp(s + latent, hidden, a, generator, count)
        self.shift = Mlp(s + a, hidden, a, generator, count)
        self.q = Mlp(s + a, hidden, 1, generator, 2 * count)  # critic k of task i has place k * tasks + i
        self.target_shift = copy.deepcopy(self.shift).requires_grad_(False)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        outputs = 1 + (s if spec.context_next_observation else 0)
        self.models = Mlp(s + a, [config.ensemble_width], outputs, generator, count * config.ensemble)


class Student(nn.Module):
    """The distilled BCQ, conditioned on z, and the context encoder."""

    latents: Tensor

    def __init__(self, config: MbmlConfig, spec: Spec, generator: torch.Generator) -> None:
        super().__init__()
        hidden = [config.width] * config.depth
        s, a, latent = spec.observation + config.latent_dim, spec.action, config.vae_latent * spec.action
        self.q = Mlp(s + a, hidden, 1, generator)
        self.decode = Mlp(s + latent, hidden, a, generator)
        self.shift = Mlp(s + a, hidden, a, generator)
        self.encoder = Mlp(
            spec.context, [config.encoder_width] * config.encoder_depth, 2 * config.latent_dim, generator
        )
        drawn = torch.randn(config.candidates, latent, generator=generator)
        self.register_buffer("latents", drawn.clamp(-config.vae_clip, config.vae_clip))


class Mbml(ContextAlgorithm):
    """See the module's docstring."""

    CONFIG = MbmlConfig

    def __init__(self, config: MbmlConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        self.teachers = Teachers(config, spec, self.generator).to(self.device)
        self.student = Student(config, spec, self.generator).to(self.device)
        noise_seed = int(torch.randint(2**31, (1,), generator=self.generator).item())
        self.noise = torch.Generator(self.device).manual_seed(noise_seed)
        teachers = self.teachers
        self._optimizers = {
            "teachers_vae": adam([*teachers.encode.parameters(), *teachers.decode.parameters()], config.rate),
            "teachers": adam([*teachers.q.parameters(), *teachers.models.parameters()], config.rate),
            "teachers_shift": adam(teachers.shift.parameters(), config.rate),
            "student": adam(self.student.parameters(), config.rate),
        }

    def phases(self, steps: int) -> list[Phase]:
        """Return the teachers' phase and the student's."""
        config = self.settings
        draws = {"transitions": Draw(config.rl_batch), "context": Draw(config.context_batch, source="context")}
        first = min(config.bcq_steps, steps)
        both = (("teachers", first), ("student", steps - first))
        return [Phase(name, count, config.meta_batch, draws) for name, count in both if count]

    @property
    def latent(self) -> int:
        """Width of z."""
        return self.settings.latent_dim

    def _latents(self, *shape: int) -> Tensor:
        clip = self.settings.vae_clip
        return torch.randn(shape, generator=self.noise, device=self.device).clamp(-clip, clip)

    def _perturbed(self, stack: Mlp, state: Tensor, action: Tensor, tasks: Tensor) -> Tensor:
        return perturbed(partial(of_tasks, stack, places=tasks), state, action, self.settings.perturbation)

    def _decoded(self, state: Tensor, latent: Tensor, tasks: Tensor) -> Tensor:
        return decoded(partial(of_tasks, self.teachers.decode, places=tasks), state, latent)

    def _critics(self, q: Mlp, rows: Tensor, tasks: Tensor) -> Tensor:
        """Return both critics' values, [2, m, n]."""
        both = of_tasks(q, rows.repeat(2, 1, 1), torch.cat([tasks, tasks + self.settings.tasks]))
        return both.view(2, *rows.shape[:2])

    # --- phase 1 -----------------------------------------------------------------------------------------------

    def model_error(self, context: Experience, tasks: Tensor) -> Tensor:
        """Return the ensembles' squared error on the context's rewards (and next states), a mean over members."""
        wanted = context.signal.unsqueeze(-1)
        if self.spec.context_next_observation:
            wanted = torch.cat([wanted, context.next_observation], dim=-1)
        return (self._predictions(context, tasks) - wanted.unsqueeze(1)).square().mean()

    def _predictions(self, context: Experience, tasks: Tensor) -> Tensor:
        """Return every member's prediction, [m, members, n, outputs], of task ``tasks`` for its row of contexts."""
        return self._predict(torch.cat([context.observation, context.action], dim=-1), tasks)

    def _predict(self, rows: Tensor, tasks: Tensor) -> Tensor:
        """Return every member's prediction for (s, a) rows [m, n, width]."""
        members, (m, n, _) = self.settings.ensemble, rows.shape
        rows = rows.unsqueeze(1).expand(m, members, n, rows.shape[-1]).reshape(m * members, n, -1)
        places = (tasks[:, None] * members + torch.arange(members, device=tasks.device)).reshape(-1)
        return of_tasks(self.teachers.models, rows, places).view(m, members, n, -1)

    def teacher_target(self, batch: Experience, tasks: Tensor, latents: Tensor) -> Tensor:
        """Return y [m, n] of the tasks' own BCQs for latents [m, n * candidates, latent]."""
        config, teachers = self.settings, self.teachers
        with torch.no_grad():
            m, n = batch.reward.shape
            state = batch.next_observation.repeat_interleave(config.candidates, dim=1)
            action = self._perturbed(teachers.target_shift, state, self._decoded(state, latents, tasks), tasks)
            rows = torch.cat([state, action], dim=-1)
            values = self._critics(teachers.target_q, rows, tasks)
            best = soft_minimum(values, config.soft_min).view(m, n, config.candidates).amax(-1)
            return config.reward_scale * batch.reward + config.gamma * (1 - batch.terminal) * best

    def _teach(self, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        t = batch["transitions"]
        config, teachers, tasks = self.settings, self.teachers, t.task
        m, n = t.reward.shape
        latent = teachers.encode.biases[-1].shape[-1] // 2
        pair = torch.cat([t.observation, t.action], dim=-1)
        noise = torch.randn((m, n, latent), generator=self.noise, device=self.device)
        encode, decode = (partial(of_tasks, stack, places=tasks) for stack in (teachers.encode, teachers.decode))
        vae = vae_loss(encode, decode, t.observation, t.action, noise, config.vae_kl)
        if config.vae_first:
            self._step("teachers_vae", vae)
        y = self.teacher_target(t, tasks, self._latents(m, n * config.candidates, latent))
        q = self._critics(teachers.q, pair, tasks)
        q_loss = (q - y).square().mean((1, 2)).sum()
        model = self.model_error(batch["context"], tasks)
        if not config.vae_first:
            self._step("teachers_vae", vae)
        self._step("teachers", q_loss + model)
        with torch.no_grad():
            sampled = self._decoded(t.observation, self._latents(m, n, latent), tasks)
        teachers.q.requires_grad_(False)
        moved = self._perturbed(teachers.shift, t.observation, sampled, tasks)
        value = of_tasks(teachers.q, torch.cat([t.observation, moved], dim=-1), tasks).mean()
        teachers.q.requires_grad_(True)
        self._step("teachers_shift", -value)
        with torch.no_grad():
            for target, online in ((teachers.target_q, teachers.q), (teachers.target_shift, teachers.shift)):
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), config.tau)
        return {"vae_loss": vae, "q_loss": q_loss, "model_loss": model, "q_mean": value}

    def _step(self, name: str, loss: Tensor) -> None:
        optimizer = self._optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    # --- phase 2 -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def relabelled(self, context: Experience, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Return every drawn task's rows under every drawn task's models.

        Returns:
            Rows [i, j, n, width]: those of j with i's rewards (and next states); usable [i, j, n], 1 where the
            ensemble agrees and i and j are different tasks.
        """
        m, n = context.signal.shape
        pair = torch.cat([context.observation, context.action], dim=-1).reshape(1, m * n, -1).expand(m, m * n, -1)
        found = self._predict(pair, tasks)
        mean, std = found.mean(1), found.std(1)
        usable = std[..., 0] < self.settings.threshold
        if self.spec.context_next_observation:
            usable &= std[..., 1:].mean(-1) < self.settings.next_threshold
        rows = torch.cat([pair, mean], dim=-1)  # (s, a, r[, s'])
        different = tasks[:, None] != tasks[None, :]
        return rows.view(m, m, n, -1), (usable.view(m, m, n) & different.unsqueeze(-1)).float()

    def triplet_loss(self, own: Tensor, moved: Tensor, usable: Tensor, different: Tensor) -> Tensor:
        """Return the triplet loss over ordered pairs of different tasks.

        Args:
            own: factors of the true rows, [m, n, 2 * latent].
            moved: factors of j's rows with i's rewards, [i, j, n, 2 * latent].
            usable: [i, j, n].
            different: bool [i, j].
        """
        m, n, _ = own.shape
        anchor = posterior(moved, usable)
        negative = posterior(own.unsqueeze(0).expand(m, *own.shape), usable)
        # as many true rows of i as the anchor has: rows are in random order
        first = (torch.arange(n, device=own.device) < usable.sum(-1, keepdim=True)).float()
        positive = posterior(own.unsqueeze(1).expand(m, m, *own.shape[1:]), first)
        gap = diagonal_kl(anchor, positive) - diagonal_kl(anchor, negative)
        gap = torch.where(usable.sum(-1) > 0, gap, torch.zeros_like(gap))
        return torch.relu(gap + self.settings.margin)[different].mean() if different.any() else gap.new_zeros(())

    def _distill(self, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        t, context = batch["transitions"], batch["context"]
        config, student, tasks = self.settings, self.student, t.task
        m, n = context.signal.shape
        rows, usable = self.relabelled(context, tasks)
        true = self.rows(context)
        factors = student.encoder(torch.cat([true.reshape(m * n, -1), rows.reshape(m * m * n, -1)]))
        own, moved = factors[: m * n].view(m, n, -1), factors[m * n :].view(m, m, n, -1)
        triplet = self.triplet_loss(own, moved, usable, tasks[:, None] != tasks[None, :])
        # the context: the true rows and as many usable ones of other tasks
        score = torch.rand((m, m * n), generator=self.noise, device=self.device) + usable.view(m, m * n)
        top, chosen = score.topk(n, dim=1)
        others = moved.view(m, m * n, -1).gather(1, chosen.unsqueeze(-1).expand(m, n, moved.shape[-1]))
        mask = torch.cat([torch.ones_like(top), (top >= 1).float()], dim=1)
        mean, variance = posterior(torch.cat([own, others], dim=1), mask)
        kl = gaussian_kl(mean, variance, 1.0)
        noise = torch.randn(mean.shape, generator=self.noise, device=self.device)
        z = mean + variance.sqrt() * noise
        teachers = self.teachers
        with torch.no_grad():
            pair = torch.cat([t.observation, t.action], dim=-1)
            value = of_tasks(teachers.q, pair, tasks).reshape(-1)
            latent = self._latents(*t.observation.shape[:2], student.latents.shape[-1])
            action = self._decoded(t.observation, latent, tasks)
            raw = of_tasks(teachers.shift, torch.cat([t.observation, action], dim=-1), tasks)
            shift = torch.tanh(raw).reshape(-1, action.shape[-1])
            action = action.reshape(-1, action.shape[-1])
        wide, bare = join(t.observation, z), join(t.observation, z.detach())
        q = student.q(torch.cat([wide, t.action.reshape(len(wide), -1)], dim=-1)).squeeze(-1)
        q_loss = (q - value).square().mean()
        found = decoded(student.decode, bare, latent.reshape(len(bare), -1))
        shifted = torch.tanh(student.shift(torch.cat([bare, action], dim=-1)))
        imitation = (found - action).square().mean() + (shifted - shift).square().mean()
        self._step("student", q_loss + triplet + config.kl_weight * kl + imitation)
        return {
            "triplet_loss": triplet, "usable": usable.mean(), "kl": kl, "distill_q_loss": q_loss,
            "distill_action_loss": imitation, "z_rms": z.square().mean().sqrt(), "q_mean": q.mean(),
        }  # fmt: skip

    @classmethod
    def check_online(cls, tasks: str) -> str | None:
        """Refuse other tasks than those that it has models of."""
        return None if tasks == "train" else f"tasks = {tasks}: mbml has models of the training tasks; expected train"

    @classmethod
    def check(cls, config: MbmlConfig, spec: Spec, steps: int) -> str | None:
        """Return what does not fit: another number of tasks, or no steps left for the student."""
        if config.tasks != spec.tasks:
            return f"tasks = {config.tasks}: expected tasks.train = {spec.tasks}"
        if config.bcq_steps >= steps:
            return (
                f"bcq_steps = {config.bcq_steps}: expected below meta_train.steps = {steps}, the rest is distillation"
            )
        return None

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step of the phase."""
        found = self._teach(batch) if phase.name == "teachers" else self._distill(batch)
        return {name: value.detach() for name, value in found.items()}

    @torch.no_grad()
    def infer(self, context: Experience) -> Tensor:
        """Return the posterior mean [tasks, latent]."""
        rows = self.rows(context)
        factors = self.student.encoder(rows.reshape(-1, rows.shape[-1])).view(*rows.shape[:2], -1)
        return posterior(factors, torch.ones_like(rows[..., 0]))[0]

    @torch.no_grad()
    def actions(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return the best of the perturbed candidates, [tasks, n, action]."""
        tasks, n, _ = observation.shape
        student, count = self.student, self.settings.candidates
        state = join(observation, z).repeat_interleave(count, dim=0)
        latents = student.latents.repeat(tasks * n, 1)
        action = decoded(student.decode, state, latents)
        action = perturbed(student.shift, state, action, self.settings.perturbation)
        best = student.q(torch.cat([state, action], dim=-1)).view(tasks * n, count).argmax(1)
        return action.view(tasks * n, count, -1)[torch.arange(tasks * n, device=z.device), best].view(tasks, n, -1)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return teachers and student."""
        return {"teachers": self.teachers, "student": self.student}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""
        return dict(self._optimizers)

    def generators(self) -> dict[str, torch.Generator]:
        """Return the stream of latents and draws."""
        return {"noise": self.noise}


CONFIG = MbmlConfig
ALGORITHM = Mbml
