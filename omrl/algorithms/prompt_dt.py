"""Prompt-DT (Xu et al., ICML 2022): a decision transformer whose prompt, a few short segments, says which task it is.

A sequence of (return to go, state, action) is continued: from the prompt, the last steps and the return that is
wanted from here on, a causal transformer predicts the action.

    tokens   prompt: (R*, s*, a*) of ``prompt_segments`` segments of ``prompt_length`` steps of the task's context
             window: (R_t, s_t, a_t) of the last ``window`` steps, R_t = sum of rewards from step t to the episode's end
    loss     mean over the window's steps of (pi(tokens up to s_t) - a_t)^2                              (Algorithm 1)
    acting   R_0 is the wanted return, R_(t+1) = R_t - r_t                                               (Algorithm 2)

A belief is the prompt, the window so far and what is still wanted, for one episode: the prompt alone is the task's,
there is no vector z. Returns count the reward that inference may see, since they must be lowered by it in tests.

====================  ================================================  ==============================================
what                  released code                                     here
====================  ================================================  ==============================================
prompt                1 segment of 5 steps that ends one step before    1 segment of 5 steps, to the very end of a
                      the end of an episode of expert data, which are   random episode of the context's dataset: expert
                      a dataset of their own                            where a pair or ``dataset.test`` has expert
                                                                        contexts; ``prompt_from: window``: from a
                                                                        random step on (the paper's "segments")
wanted return         a constant per environment: 1500 (Cheetah-Dir),   ``target_return``; None: the best return of an
                      0 (Cheetah-Vel), 500 (Ant-Dir), 650 (pick-place)  episode in the training data, or, with
                                                                        ``target_from: prompt``, of the prompt's
scale of returns      a constant per environment (500 to 1000)          the largest return in the training data
states                divided by mean and std of training and test      by those of the training data
                      data
meta-batch            16 windows of each training task                  of drawn tasks
rate                  1e-4, rising over 10,000 updates, AdamW with      the same, rising over 1,000; our runs are
                      decay 1e-4, gradient's norm at most 0.25          shorter
dropout               0.1                                               none
prompt's embeddings   linear maps of its own; not normalized            of its own; normalized as the window's are
windows               padded in front                                   behind
====================  ================================================  ==============================================

Size as there: width 128, 3 blocks, 1 head, windows of 20 steps. Fine-tuning on the test task's data (the paper's
Prompt-DT-FT) is not here.

Known failures: it imitates, so that no better action than the data's is found, and a return that no episode of the
data had is out of its distribution; where data hold single rows instead of episodes, returns to go are one reward; a
prompt without a reward in it says the task only as far as the behavior does; ``prior`` is an empty prompt, which
training never saw; data whose episodes are longer than a test's (``rollouts.horizon`` above the family's) have other
returns to go, and their later steps share one place in time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from omrl.algorithms.base import Algorithm, Belief, Draw, Phase, Spec, map_belief
from omrl.core.config import Config
from omrl.data.taskdata import TaskData
from omrl.nets.experience import Experience
from omrl.nets.transformer import CausalTransformer, embedding, linear


class PromptDtConfig(Config):
    """Prompt-DT.

    Attributes:
        width: of a token, a multiple of ``heads``.
        depth: blocks of the transformer.
        heads: of its attention.
        window: steps that it looks back on, the present one included.
        prompt_segments: segments in a prompt.
        prompt_length: steps of a segment.
        prompt_from: a segment is the ``end`` of an episode, or a ``window`` from a random step on.
        target_return: wanted in tests, in units of the reward; None for the best of ``target_from``.
        target_from: without a ``target_return``: the best episode of the training ``data``, or of the ``prompt``.
        rate: learning rate (AdamW).
        warmup: updates over which the rate rises to ``rate``.
        weight_decay: of AdamW.
        largest_gradient: largest norm of the gradient; a longer one is scaled down to it.
        meta_batch: tasks per update, drawn with replacement.
        rl_batch: windows per drawn task, each with a prompt of its own.
    """

    width: Annotated[int, Field(ge=1, le=4096)] = 128
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    heads: Annotated[int, Field(ge=1, le=64)] = 1
    window: Annotated[int, Field(ge=1, le=4096)] = 20
    prompt_segments: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt_length: Annotated[int, Field(ge=1, le=4096)] = 5
    prompt_from: Literal["end", "window"] = "end"
    target_return: float | None = None
    target_from: Literal["data", "prompt"] = "data"
    rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[int, Field(ge=1, le=10**8)] = 1000
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    largest_gradient: Annotated[float, Field(gt=0)] = 0.25
    meta_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    rl_batch: Annotated[int, Field(ge=1, le=16384)] = 16

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> PromptDtConfig:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} with heads = {self.heads}: expected a multiple of heads")
        return self


class Steps(NamedTuple):
    """Successive steps: observation and action [n, t, width]; to_go, step (int64) and valid [n, t]."""

    observation: Tensor
    action: Tensor
    to_go: Tensor
    step: Tensor
    valid: Tensor

    def then(self, observation: Tensor, action: Tensor, to_go: Tensor, step: Tensor) -> Steps:
        """Return the steps moved on by one: the first left out, the given one, without a time axis, at the end."""
        last = Steps(observation, action, to_go, step, torch.ones_like(to_go))
        return Steps(*(torch.cat([x[:, 1:], new.unsqueeze(1)], dim=1) for x, new in zip(self, last, strict=True)))


class Net(nn.Module):
    """The transformer, its embeddings, and what the training data say of scales.

    Buffers: mean and std of observations, ``scale`` of returns, ``best`` return of an episode, updates so far.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    best: Tensor
    updates: Tensor

    def __init__(self, config: PromptDtConfig, spec: Spec, generator: torch.Generator) -> None:
        super().__init__()
        self.horizon = spec.horizon
        self.embeddings = nn.ModuleDict(
            {
                f"{part}_{name}": linear(inputs, config.width, generator)
                for part in ("prompt", "window")
                for name, inputs in (("to_go", 1), ("observation", spec.observation), ("action", spec.action))
            }
        )
        self.times = nn.ModuleDict(
            {part: embedding(spec.horizon, config.width, generator) for part in ("prompt", "window")}
        )
        self.normalize = nn.LayerNorm(config.width)
        self.transformer = CausalTransformer(config.width, config.depth, config.heads, generator)
        self.head = linear(config.width, spec.action, generator)
        self.register_buffer("mean", torch.zeros(spec.observation))
        self.register_buffer("std", torch.ones(spec.observation))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("best", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _tokens(self, part: str, steps: Steps) -> Tensor:
        """Return [n, 3 t, width]: return to go, state, action of every step, in this order."""
        values = {
            "to_go": (steps.to_go / self.scale).unsqueeze(-1),
            "observation": (steps.observation - self.mean) / self.std,
            "action": steps.action,
        }
        time = self.times[part](steps.step.clamp(0, self.horizon - 1))
        each = [self.embeddings[f"{part}_{name}"](x) + time for name, x in values.items()]
        return torch.stack(each, dim=2).flatten(1, 2)

    def forward(self, prompt: Steps, window: Steps) -> Tensor:
        """Return the actions [n, t, action] that the window's states call for; each sees what came before."""
        tokens = self.normalize(torch.cat([self._tokens("prompt", prompt), self._tokens("window", window)], dim=1))
        valid = torch.cat([prompt.valid, window.valid], dim=1).repeat_interleave(3, dim=1)
        out = self.transformer(tokens, valid)[:, 3 * prompt.valid.shape[1] :]
        return torch.tanh(self.head(out[:, 1::3]))


class PromptDt(Algorithm):
    """See the module's docstring."""

    CONFIG = PromptDtConfig
    PROTOCOLS = frozenset({"offline-context", "online-prior", "online-idaq"})

    def __init__(self, config: PromptDtConfig, spec: Spec, seed: int, device: str = "auto") -> None:
        super().__init__(config, spec, seed, device)
        self.settings = config
        self.net = Net(config, spec, self.generator).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.rate, weight_decay=config.weight_decay, fused=True
        )

    # --- training ----------------------------------------------------------------------------------------------

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return ``to_go``, rewards summed from the row to its episode's end, and ``whole``, the episode's return."""
        sums = np.pad(np.cumsum(data.signal, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
        end = np.take_along_axis(sums, data.end, axis=1)
        to_go, whole = end - sums[:, :-1], end - np.take_along_axis(sums, data.start, axis=1)
        return {"to_go": to_go.astype(np.float32), "whole": whole.astype(np.float32)}

    def phases(self, steps: int) -> list[Phase]:
        """Return one phase: windows to imitate, and a prompt for each."""
        config = self.settings
        draws = {
            "transitions": Draw(config.rl_batch, "window", config.window),
            "context": self._segments(config.rl_batch * config.prompt_segments),
        }
        return [Phase("training", steps, config.meta_batch, draws)]

    def _segments(self, count: int) -> Draw:
        if self.settings.prompt_from == "window":
            return Draw(count, "window", self.settings.prompt_length, source="context")
        return Draw(count, "episode", -self.settings.prompt_length, source="context")

    def context_draw(self, transitions: int) -> Draw:
        """Return the draw of a prompt, whatever the number of transitions: a prompt is short."""
        return self._segments(self.settings.prompt_segments)

    def begin(self, phase: Phase, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Take the scales of observations and returns from the training data; a trained model keeps its own."""
        net = self.net
        if net.updates:
            return {}
        whole = self.columns(data)["whole"]
        flat = data.observation.reshape(-1, data.observation.shape[-1])
        for buffer, value in (
            (net.mean, flat.mean(axis=0, dtype=np.float64)),
            (net.std, flat.std(axis=0, dtype=np.float64) + 1e-6),
            (net.scale, max(float(np.abs(whole).max()), 1e-6)),
            (net.best, float(whole.max())),
        ):
            buffer.copy_(torch.as_tensor(value))
        return {}

    def _cut(self, context: Experience) -> tuple[Steps, Tensor]:
        """Return the last ``prompt_length`` steps of every segment, [tasks, n, length, ...], and its episode's return.

        Returns [tasks, n] come with a dataset; of the agent's own episodes, which are whole, they are summed here.
        """
        if context.reward.ndim != 3 or context.valid is None or context.step is None:
            raise ValueError("a prompt is made of windows or episodes, [tasks, n, t, ...]")
        if "to_go" in context.extra:
            to_go, whole = (context.extra[name][..., 0] for name in ("to_go", "whole"))
        else:
            to_go = (context.signal * context.valid).flip(-1).cumsum(-1).flip(-1)
            whole = to_go[..., :1].expand_as(to_go)
        length = self.settings.prompt_length
        place = context.valid.sum(-1, keepdim=True).long() - length + torch.arange(length, device=self.device)
        index = place.clamp(0)

        def cut(x: Tensor) -> Tensor:
            at = index if x.ndim == 3 else index.unsqueeze(-1).expand(*index.shape, x.shape[-1])
            return x.gather(2, at)

        parts = cut(context.observation), cut(context.action), cut(to_go), cut(context.step)
        return Steps(*parts, valid=(place >= 0).float()), whole[..., 0]

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step."""
        config, net, windows = self.settings, self.net, batch["transitions"]
        if windows.valid is None or windows.step is None:
            raise ValueError("an update needs windows")
        n = windows.reward.shape[0] * windows.reward.shape[1]
        to_go = windows.extra["to_go"][..., 0]
        parts = (windows.observation, windows.action, to_go, windows.step, windows.valid)
        window = Steps(*(x.flatten(0, 1) for x in parts))
        segments, _ = self._cut(batch["context"])
        prompt = Steps(*(x.reshape(n, -1, *x.shape[3:]) for x in segments))  # segments behind each other
        error = (net(prompt, window) - window.action).square().mean(-1)
        loss = (error * window.valid).sum() / window.valid.sum()
        net.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, int(net.updates) / config.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), config.largest_gradient)
        self.optimizer.step()
        return {"action_loss": loss.detach(), "gradient_norm": norm.detach()}

    # --- acting ------------------------------------------------------------------------------------------------

    def _nothing(self, tasks: int, steps: int) -> Steps:
        def zeros(*shape: int, **kind: Any) -> Tensor:
            return torch.zeros(tasks, steps, *shape, device=self.device, **kind)

        spec = self.spec
        return Steps(zeros(spec.observation), zeros(spec.action), zeros(), zeros(dtype=torch.int64), zeros())

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return an empty prompt and the wanted return."""
        config = self.settings
        wanted = self.net.best if config.target_return is None else torch.tensor(config.target_return)
        return {
            "prompt": self._nothing(tasks, config.prompt_segments * config.prompt_length),
            "window": self._nothing(tasks, config.window),
            "wanted": wanted.to(self.device).expand(tasks).clone(),
            "time": torch.zeros(tasks, dtype=torch.int64, device=self.device),
        }

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the belief with a prompt of the context; of more segments than fit, those of the best episodes."""
        config = self.settings
        segments, whole = self._cut(context)
        tasks, count = whole.shape
        best = whole.argsort(dim=1, descending=True, stable=True)[:, : config.prompt_segments].sort(dim=1).values
        place = torch.arange(tasks, device=self.device).unsqueeze(1)
        prompt = Steps(*(x[place, best].flatten(1, 2) for x in segments))
        if count < config.prompt_segments:
            empty = self._nothing(tasks, (config.prompt_segments - count) * config.prompt_length)
            prompt = Steps(*(torch.cat(pair, dim=1) for pair in zip(empty, prompt, strict=True)))
        own = config.target_return is None and config.target_from == "prompt"
        return {**belief, "prompt": prompt, "wanted": whole.amax(dim=1) if own else belief["wanted"]}

    def observe(self, belief: Belief, step: Experience) -> Belief:
        """Return the belief with the step in its window, and its reward no longer wanted."""
        window = belief["window"].then(step.observation[:, 0], step.action[:, 0], belief["wanted"], belief["time"])
        wanted, time = belief["wanted"] - step.signal[:, 0], belief["time"] + 1
        moved = {"prompt": belief["prompt"], "window": window, "wanted": wanted, "time": time}
        if step.valid is None:
            return moved
        made = step.valid[:, 0] > 0
        return map_belief(lambda new, old: torch.where(made.view(-1, *[1] * (new.ndim - 1)), new, old), moved, belief)

    @torch.no_grad()
    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the predicted actions."""
        unknown = torch.zeros(len(observation), self.spec.action, device=self.device)
        window = belief["window"].then(observation, unknown, belief["wanted"], belief["time"])
        actions: Tensor = self.net(belief["prompt"], window)[:, -1]
        return actions

    # --- state -------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """Return the one network."""
        return {"net": self.net}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return its optimizer."""
        return {"net": self.optimizer}


CONFIG = PromptDtConfig
ALGORITHM = PromptDt
