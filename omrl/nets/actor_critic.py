"""The behavior-regularized actor-critic that context-based methods share (FOCAL section 3.2; BRAC).

One update, in the order of FOCAL's released code:

1. a_pi ~ pi(. | s, z), reparameterized;
2. ``kl-dual``: the discriminator's steps;
3. Q1, Q2 towards y = k r + gamma (1 - terminal) (Vbar(s', z) - [value penalty] alpha D) (Eqs 7, 8);
4. V towards min Q(s, a_pi, z) - [entropy] log pi with the Q just updated, then Vbar;
5. pi: [entropy] log pi - min Q + [policy regularization] alpha D + regularizers of mean and log-std (Eq. 9);
6. alpha, when adaptive.

The entropy weight is 1: the reward scale k is the inverse temperature.

D keeps the policy near the data. Which D is open: FOCAL takes "any of BRAC's" and uses the first of these.

===========  =====================================================  ===================================================
kind         D per row                                              from
===========  =====================================================  ===================================================
``kl-dual``  1 + log softplus c(s, a_pi) - softplus c(s, a)         FOCAL App. F; BRAC's KL, dual form
``mmd``      mean k(x, x') - 2 mean k(x, a) + 1, x_1..x_n ~ pi(s)   BEAR's estimate of MMD^2; BRAC's MMD
``bc``       mean over entries of (a_pi - a)^2                      TD3+BC Eq. 3; ReBRAC section 3
===========  =====================================================  ===================================================

``mmd`` with the one action that the data hold in s: over the data, its mean is the squared discrepancy to the
behavior policy plus 1 - E k(y, y'), which the policy cannot change. So no model of the behavior is needed, where BRAC
and BEAR fit one; and it is the square, as in BRAC, where BEAR's release takes the root.

``bc`` scales Q, not D: the policy's loss is -``weight`` min Q / mean |Q| + D (TD3+BC Eqs 3 and 5, weight 2.5; the mean
over entries is its release's, ReBRAC sums). TD3+BC's policy is deterministic and has no entropy: that is
``entropy_in_target: false`` and ``entropy_in_policy: false`` here, where a_pi is still sampled, so that D also draws
the spread towards 0. Its states are normalized, its Q is the first of two; ours is the smaller, as ReBRAC's.

ReBRAC is ``bc`` with ``value_penalty`` at s' (``next_state``, the data's own next action), ``critic_layer_norm`` and
depth 3.

Which published FOCAL numbers belong to what (its release's settings, all ``kl-dual`` with adaptive alpha, which starts
at the value of Table 4): Fig. 3 has point robots without any; Half-Cheetah-Vel and Walker 50, policy alone;
Half-Cheetah-Fwd-Back 500 and Ant-Fwd-Back 1e6, with the value penalty. Fig. 2 and Table 1 (Half-Cheetah-Vel) have 500
with the value penalty. FOCAL++ has 500 on all MuJoCo tasks, none on point robots. No published FOCAL number belongs
to ``mmd`` or ``bc``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.nets.experience import Experience
from omrl.nets.mlp import Mlp, Policy


class RegularizationConfig(Config):
    """Behavior regularization (FOCAL section 3.2, Eqs 6-9; BRAC; BEAR; TD3+BC; ReBRAC), see the module's docstring.

    Attributes:
        kind: which distance D between the policy's actions and the data's is penalized: ``kl-dual``, the KL
            divergence as a trained discriminator estimates it (FOCAL, BRAC); ``mmd``, the maximum mean discrepancy
            (BEAR); ``bc``, the mean squared difference of the actions (TD3+BC); ``none``, no regularization.
        policy: D in the policy's loss; None for yes, unless kind is ``none``.
        value_penalty: subtract alpha D in the Q target.
        next_state: D of the target at s' (Eqs 7 and 8, ReBRAC) instead of at s (released code). ``mmd`` and ``bc``
            compare with the data's next action there and have no form at s: one action's distance would count
            against that action's own value. ``kl-dual`` takes a fresh action of the policy and the data's part at s.
        alpha: weight of D, in units of Q; the initial one if ``adaptive``. FOCAL Table 4: 0 for the point robots, 50
            for Half-Cheetah-Vel and Walker, 500 for Half-Cheetah-Fwd-Back, 1e6 for Ant-Fwd-Back. With ``bc``, of the
            value penalty alone.
        alpha_max: the weight that is used is clipped to [0, alpha_max]; the stored one is not. In the release 2000 on
            Half-Cheetah, 1e4 on Walker and 5e6 on Ant.
        adaptive: alpha += alpha_rate (mean D - target_divergence) per step (released code); the paper's text
            has a constant. With ``bc``, alpha is constant.
        alpha_rate: step size of alpha.
        target_divergence: what an adaptive alpha keeps the mean of D at: it rises above that and falls below; 0.05 in
            FOCAL++ Table 6, and BEAR's threshold.
        weight: of Q / mean |Q| with ``bc``: 2.5 in TD3+BC.
        kernel: of ``mmd``: exp(-|x - y|_1 / (2 sigma)), or exp(-|x - y|_2^2 / (2 sigma)).
        sigma: width of the kernel of ``mmd``. BEAR's release has 10 or 20, on actions before their tanh; ours are in
            (-1, 1).
        samples: actions of the policy, and of the data, that ``mmd`` compares; 4 to 10 in BEAR.
        discriminator_steps: of ``kl-dual``: steps of the discriminator per update; the further ones on fresh batches of
            the same tasks.
        discriminator_rate: of ``kl-dual``: learning rate of the discriminator (Adam).
        penalty: of ``kl-dual``: what is penalized in training the discriminator, its ``value`` (released code: (|c| -
            1)+^2) or the norm of its action ``gradient`` (BRAC). With ``value``, D stays below about 0.96; with
            ``gradient``, the scale of alpha is another.
        penalty_weight: weight of that penalty in the discriminator's loss; 5 in FOCAL's release and in BRAC.
    """

    kind: Literal["none", "kl-dual", "mmd", "bc"] = "none"
    policy: bool | None = None
    value_penalty: bool = False
    next_state: bool = False
    alpha: Annotated[float, Field(ge=0)] = 0.0
    alpha_max: Annotated[float, Field(gt=0)] = 2000.0
    adaptive: bool = True
    alpha_rate: Annotated[float, Field(gt=0)] = 1.0
    target_divergence: float = 0.05
    weight: Annotated[float, Field(gt=0)] = 2.5
    kernel: Literal["laplacian", "gaussian"] = "laplacian"
    sigma: Annotated[float, Field(gt=0)] = 10.0
    samples: Annotated[int, Field(ge=1, le=1000)] = 5
    discriminator_steps: Annotated[int, Field(ge=1, le=1000)] = 3
    discriminator_rate: Annotated[float, Field(gt=0)] = 1e-4
    penalty: Literal["value", "gradient"] = "value"
    penalty_weight: Annotated[float, Field(ge=0)] = 5.0

    @property
    def active(self) -> bool:
        """Is any of it switched on?"""
        return self.kind != "none"

    @property
    def in_policy(self) -> bool:
        """Is D in the policy's loss?"""
        return self.active and self.policy is not False

    @property
    def further_batches(self) -> int:
        """Batches that an update needs beside its own: for the discriminator's further steps."""
        return self.discriminator_steps - 1 if self.kind == "kl-dual" else 0

    @property
    def next_actions(self) -> bool:
        """Does the target need the data's next actions?"""
        return self.value_penalty and self.kind in ("mmd", "bc")

    @model_validator(mode="after")
    def _switches_something_on(self) -> RegularizationConfig:
        asked = [key for key in ("policy", "value_penalty", "next_state") if getattr(self, key)]
        if self.kind == "none" and asked:
            raise ValueError(f"{asked[0]}: true with kind: none switches nothing on; expected kl-dual, mmd or bc")
        if self.active and not (self.in_policy or self.value_penalty):
            raise ValueError(
                f"policy: false with value_penalty: false switches nothing on; expected one of them, or kind: none "
                f"instead of {self.kind}"
            )
        if self.next_state and not self.value_penalty:
            raise ValueError("next_state: true switches nothing on without value_penalty: true")
        if self.next_actions and not self.next_state:
            raise ValueError(
                f"value_penalty: true with kind: {self.kind} has no form at s (it would count against the data's own "
                "actions); expected next_state: true"
            )
        if self.alpha == 0 and (self.value_penalty if self.kind == "bc" else self.active and not self.adaptive):
            why = "kind: bc and value_penalty: true" if self.kind == "bc" else "adaptive: false"
            raise ValueError(f"alpha = 0 with {why} switches nothing on; expected alpha > 0")
        if self.alpha > self.alpha_max:
            raise ValueError(
                f"alpha = {self.alpha:g} is above alpha_max = {self.alpha_max:g}, which would be used instead"
            )
        return self


class ActorCriticConfig(Config):
    """Actor and critic.

    Attributes:
        width: units of a hidden layer: 256 in FOCAL's released code and FOCAL++ Table 6, 300 in FOCAL Table 4.
        depth: hidden layers.
        actor_rate: learning rate of the policy (Adam).
        critic_rate: learning rate of Q and V (Adam).
        gamma: discount. FOCAL has 0.9 for the sparse and wind point robots; set 0.99 for others.
        reward_scale: factor on rewards in the critic's target. FOCAL has 100 for point robots; set 5 for MuJoCo.
        tau: rate at which the target network follows.
        value_network: V and target V, no target Q (FOCAL's released code); else target Q networks, as the paper's
            pseudo-code reads.
        mean_weight: of the squared mean before tanh, in the policy's loss.
        log_std_weight: of the squared log-std, in the policy's loss.
        log_std_max: clamp of log-std: 0 in FOCAL, 2 in PEARL.
        entropy_in_target: subtract log pi in the value (V's target, or the Q target without V). SAC and the release
            do; BRAC and TD3+BC's form work without.
        entropy_in_policy: log pi in the policy's loss.
        critic_layer_norm: layer norm after the ReLU of every hidden layer of Q and V (ReBRAC section 3; its release).
        regularization: keeps the policy near the data.
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
    entropy_in_target: bool = True
    entropy_in_policy: bool = True
    critic_layer_norm: bool = False
    regularization: RegularizationConfig = RegularizationConfig()


@dataclass(frozen=True)
class _Drawn:
    """The rows of an update [n, ...], a task after the other, and what the policy draws for them.

    ``state`` is (s, z), ``data`` the data's action; the rest is as ``Policy.sample`` returns it.
    """

    state: Tensor
    data: Tensor
    action: Tensor
    log_prob: Tensor
    mean: Tensor
    log_std: Tensor


def divergence(c_policy: Tensor, c_data: Tensor) -> Tensor:
    """Return the dual-form estimate of KL(pi || behavior) per row (FOCAL App. F, f-divergence of BRAC).

    D = 1 + log(softplus(c(s, a_pi)) + 1e-8) - softplus(c(s, a_data)): 0 for the best discriminator when
    policy and data agree (softplus(c) = 1, c = 0.5413), negative for a poor one.
    """
    return 1 + torch.log(functional.softplus(c_policy) + 1e-8) - functional.softplus(c_data)


def mmd(samples: Tensor, data: Tensor, kernel: str, sigma: float) -> Tensor:
    """Return the squared maximum mean discrepancy per row between a policy's actions and one action of the data.

    mean_ij k(x_i, x_j) - 2 mean_i k(x_i, a) + k(a, a) (BEAR's estimate; pairs i = j count, as there), with its
    kernels: ``laplacian`` k = exp(-|x - y|_1 / (2 sigma)), ``gaussian`` k = exp(-|x - y|_2^2 / (2 sigma)).

    Args:
        samples: x, [samples, n, actions].
        data: a, [n, actions].
        kernel: its name.
        sigma: its width.

    Returns:
        [n], at least 0.
    """

    def mean_kernel(difference: Tensor) -> Tensor:
        size = difference.abs() if kernel == "laplacian" else difference.square()
        return torch.exp(-size.sum(-1) / (2 * sigma)).flatten(0, -2).mean(0)

    return mean_kernel(samples.unsqueeze(0) - samples.unsqueeze(1)) - 2 * mean_kernel(samples - data) + 1


@contextmanager
def held_still(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through a network without reaching its weights."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in network.parameters():
            parameter.requires_grad_(True)


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
        norm = config.critic_layer_norm
        self.q = Mlp(observations + actions + latent, hidden, 1, make, stack=2, layer_norm=norm)
        self.v = Mlp(observations + latent, hidden, 1, make, layer_norm=norm) if config.value_network else None
        self.target = copy.deepcopy(self.v if self.v is not None else self.q).requires_grad_(False)
        dual = config.regularization.kind == "kl-dual"
        self.c = Mlp(observations + actions + latent, hidden, 1, make) if dual else None
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

    def discriminator_loss(self, batch: Experience, z: Tensor) -> Tensor:
        """Return -mean D + weight * penalty for a batch; the policy's actions carry no gradient here."""
        if self.c is None:
            raise ValueError("regularization.kind is not kl-dual: there is no discriminator")
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

    def q_target(self, batch: Experience, z: Tensor, penalty: Tensor | None) -> Tensor:
        """Return y [tasks * n]: k r + gamma (1 - terminal) (Vbar(s', z) - penalty), without gradient (Eqs 7, 8)."""
        config = self.config
        with torch.no_grad():
            following = join(batch.next_observation, z)
            if self.v is not None:
                value = self.target(following).squeeze(-1)
            else:
                action, log_prob, _, _ = self.policy.sample(following, self._noise(len(following)))
                value = self.target(self._with(following, action)).amin(0).squeeze(-1)
                if config.entropy_in_target:
                    value = value - log_prob
            if penalty is not None:
                value = value - penalty
            going_on = 1 - batch.terminal.reshape(-1)
            return config.reward_scale * batch.reward.reshape(-1) + config.gamma * going_on * value

    def update(
        self, batch: Experience, z: Tensor, extra: list[Experience], encoder: EncoderStep | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step of every network.

        Args:
            batch: transitions of the meta-batch.
            z: embeddings [tasks, latent]; detached here, except for the critic loss when ``encoder`` is given.
            extra: fresh batches for the discriminator's further steps, ``regularization.further_batches`` of them.
            encoder: coupled gradients: called with the critic loss still attached to z.

        Returns:
            Scalars for the curves, as tensors on the device.

        Raises:
            UserError: the target needs the data's next actions, and the batch has none.
        """
        attached, z = z, z.detach()
        state = join(batch.observation, z)
        data = batch.action.reshape(-1, self.actions)
        drawn = _Drawn(state, data, *self.policy.sample(state, self._noise(len(state))))
        scalars: dict[str, Tensor] = {}
        if self.c is not None:
            for more in [batch, *extra]:
                loss = self.discriminator_loss(more, z)
                self.step("c", loss)
            scalars["discriminator_loss"] = loss.detach()
        penalty = self._penalty(batch, drawn, z) if self.config.regularization.value_penalty else None
        critic_state = state if encoder is None else join(batch.observation, attached)
        scalars |= self._step_q(critic_state, data, self.q_target(batch, z, penalty), encoder)
        with held_still(self.q):  # the policy loss needs dQ/da only
            smallest = self.q(self._with(state, drawn.action)).amin(0).squeeze(-1)
        if self.v is not None:
            scalars |= self._step_v(self.v, drawn, smallest.detach())
        online = self.v if self.v is not None else self.q
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(online.parameters()), self.config.tau)
        return scalars | self._step_policy(drawn, smallest)

    def _step_q(self, state: Tensor, data: Tensor, target: Tensor, encoder: EncoderStep | None) -> dict[str, Tensor]:
        """Step both Q towards ``target`` [n] at the data's actions, and the encoder where gradients are coupled."""
        q = self.q(self._with(state, data)).squeeze(-1)
        loss = (q - target).square().mean(-1).sum()
        if encoder is None:
            self.step("q", loss)
        else:
            self.optimizers["q"].zero_grad(set_to_none=True)
            encoder(loss)
            self.optimizers["q"].step()
        return {"q_loss": loss.detach(), "q_mean": q.detach().mean()}

    def _step_v(self, v: Mlp, drawn: _Drawn, smallest: Tensor) -> dict[str, Tensor]:
        """Step V towards the policy's value, with its entropy where that is in the target."""
        value = smallest - drawn.log_prob.detach() if self.config.entropy_in_target else smallest
        loss = (v(drawn.state).squeeze(-1) - value).square().mean()
        self.step("v", loss)
        return {"v_loss": loss.detach()}

    def _step_policy(self, drawn: _Drawn, smallest: Tensor) -> dict[str, Tensor]:
        """Step the policy towards a large ``smallest`` of both Q and a small D (Eq. 9), then alpha."""
        config, regularization = self.config, self.config.regularization
        by_distance = regularization.kind == "bc"
        gain = smallest
        if by_distance and regularization.in_policy:  # TD3+BC Eqs 3 and 5
            gain = smallest * (regularization.weight / smallest.detach().abs().mean().clamp(min=1e-8))
        loss = (
            (drawn.log_prob - gain if config.entropy_in_policy else -gain).mean()
            + config.mean_weight * drawn.mean.square().mean()
            + config.log_std_weight * drawn.log_std.square().mean()
        )
        scalars: dict[str, Tensor] = {}
        if regularization.active:
            estimate = self._estimate(drawn).mean()
            if regularization.in_policy:
                loss = loss + (estimate if by_distance else self.used_alpha() * estimate)
            scalars = {"divergence": estimate.detach(), "alpha": self.used_alpha().clone()}
        self.step("policy", loss)
        if regularization.active and regularization.adaptive and not by_distance:
            with torch.no_grad():
                self.alpha.add_(regularization.alpha_rate * (scalars["divergence"] - regularization.target_divergence))
        return scalars | {"policy_loss": loss.detach(), "entropy": -drawn.log_prob.detach().mean()}

    def _estimate(self, drawn: _Drawn) -> Tensor:
        """Return D per row between the policy's actions, which carry gradients, and the data's."""
        if self.c is None:
            return self._distance(drawn.action, drawn.mean, drawn.log_std, drawn.data)
        # after the discriminator's steps, with its weights held still: the order the release got wrong
        with held_still(self.c):
            c_policy = self.c(self._with(drawn.state, drawn.action)).squeeze(-1)
        with torch.no_grad():
            c_data = self.c(self._with(drawn.state, drawn.data)).squeeze(-1)
        return divergence(c_policy, c_data)

    def _distance(self, action: Tensor, mean: Tensor, log_std: Tensor, data: Tensor) -> Tensor:
        """Return D per row of the kinds without a discriminator."""
        regularization = self.config.regularization
        if regularization.kind == "bc":
            return (action - data).square().mean(-1)
        count, (rows, width) = regularization.samples, mean.shape
        noise = self._noise(count * rows).view(count, rows, width)
        samples = torch.tanh(mean + log_std.exp() * noise)
        return mmd(samples, data, regularization.kernel, regularization.sigma)

    @torch.no_grad()
    def _penalty(self, batch: Experience, drawn: _Drawn, z: Tensor) -> Tensor:
        """Return alpha D per row for the Q target: at s (released code) or at s' (Eqs 7 and 8, ReBRAC section 3).

        With ``kl-dual`` at s', the behavior's part is that of s: the data's action there is not looked at (BRAC
        samples it from the replay order, which a bag of transitions does not have). The other kinds compare with it;
        rows whose next action is unknown have D = 0.
        """
        regularization = self.config.regularization
        if not regularization.next_state:
            return self.used_alpha() * self._estimate(drawn)
        state = join(batch.next_observation, z)
        action, _, mean, log_std = self.policy.sample(state, self._noise(len(state)))
        if self.c is not None:
            both = torch.cat([self._with(state, action), self._with(drawn.state, drawn.data)])
            return self.used_alpha() * divergence(*self.c(both).squeeze(-1).chunk(2))
        known = batch.extra.get("next_action")
        if known is None:
            raise UserError(
                f"regularization: value_penalty with kind: {regularization.kind} needs the data's next actions; "
                "expected data in the order of their episodes"
            )
        data = known.reshape(-1, self.actions)
        unknown = data.isnan().any(-1)
        return self.used_alpha() * self._distance(action, mean, log_std, data).masked_fill(unknown, 0)


class EncoderStep:
    """Coupled gradients: the critic loss reaches the encoder together with the encoder's own loss."""

    def __init__(self, optimizer: torch.optim.Optimizer, own_loss: Tensor) -> None:
        self.optimizer, self.own_loss = optimizer, own_loss

    def __call__(self, critic_loss: Tensor) -> None:
        """Back-propagate both losses and step the encoder; the critic's gradients are left for its optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        (critic_loss + self.own_loss).backward()
        self.optimizer.step()
