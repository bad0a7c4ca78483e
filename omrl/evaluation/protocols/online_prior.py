"""The agent collects its context, first with beliefs drawn from the prior (PEARL).

The first ``exploration_episodes`` follow beliefs drawn from the prior, the later ones the belief after everything
collected so far. Which prior, ``prior`` says:

* ``data``: empirical, the belief after the offline data of a training task drawn at random. PEARL draws from N(0, I),
  which says nothing for an encoder that was never pulled towards it.
* ``own``: the method's own, ``Algorithm.prior``.
* ``none``: the method's own, without a draw; its first exploration episode starts from no knowledge, and every later
  one adapts to what was collected before (CSRO's non-prior exploration, section 4.3).

With ``resample: step`` the belief is drawn anew before every step of the exploration, instead of once per episode.
Later episodes follow the belief itself, or, where the method has a posterior, draws from it (``posterior``).

Beside every counted episode stands one of the same policy that is told the task by about as many offline transitions
(``offline_context_return``; Prompt-DT by a prompt): a method that suffers from the shift between the two is better
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from omrl.algorithms.base import Belief, map_belief
from omrl.core import seeding
from omrl.envs.simulate import Episodes
from omrl.evaluation.contexts import adapt_to_own, offline_belief
from omrl.evaluation.embeddings import OWN, own_size
from omrl.evaluation.protocols.base import ProtocolConfig, Run


class OnlineConfig(ProtocolConfig):
    """The keys of a protocol whose agent collects its context.

    Attributes:
        exploration_episodes: how many of the episodes, the first ones, follow the prior; fewer than ``episodes``.
        prior: where the beliefs of the exploration come from: ``data``, offline data of a random training task;
            ``own``, a draw from the method's prior; ``none``, its prior without a draw, then what was collected so far.
        prior_context: transitions behind each belief, with ``prior: data`` alone.
        resample: draw a belief of the prior per ``episode`` or per ``step``.
        posterior: after the exploration, follow the belief's ``mean``, or a draw from it per ``episode`` (PEARL) or per
            ``step`` (SMAC).
    """

    exploration_episodes: Annotated[int, Field(ge=1, le=10_000)] = 10
    prior: Literal["data", "own", "none"] = "data"
    prior_context: Annotated[int, Field(ge=1, le=10**6)] = 256
    resample: Literal["episode", "step"] = "episode"
    posterior: Literal["mean", "episode", "step"] = "mean"

    @model_validator(mode="after")
    def _exploits(self) -> OnlineConfig:
        if self.exploration_episodes >= self.episodes:
            raise ValueError(
                f"exploration_episodes = {self.exploration_episodes} leaves none of episodes = {self.episodes} for the "
                f"adapted policy; expected fewer"
            )
        if self.prior == "none" and self.resample == "step":
            raise ValueError("resample = step with prior = none: nothing is drawn; expected resample: episode")
        return self


class Prior:
    """Draws beliefs for the exploration of all tasks."""

    def __init__(self, run: Run) -> None:
        self._run, self._kind = run, run.config.prior
        self._known: Belief = None
        self._size = 0
        if self._kind == "data":
            places = run.training()
            rng = seeding.generator(run.seed, *run.stream, "prior")
            training = run.data.of(places)
            rngs = [np.random.default_rng(rng.integers(2**63)) for _ in places]
            self._known = offline_belief(run.algorithm, training, run.config.prior_context, rngs)
            self._size = len(places)

    def draw(self, rngs: list[np.random.Generator], torch_rng: torch.Generator) -> Belief:
        """Return a belief for every task."""
        if self._kind == "data":
            places = torch.tensor([int(r.integers(self._size)) for r in rngs], device=self._run.algorithm.device)
            return map_belief(lambda x: x[places], self._known)
        return self._run.algorithm.prior(len(rngs), torch_rng if self._kind == "own" else None)


def run_online(run: Run, kept_share: float | None) -> Episodes:
    """Run the protocols of an agent that collects its context.

    Args:
        run: the evaluation.
        kept_share: of the exploration episodes, the best by return, that stay in the context; None for all.

    Returns:
        The last episode.
    """
    config: OnlineConfig = run.config
    algorithm, sparse, count = run.algorithm, run.family.returns == "sparse", len(run.tasks)
    prior = Prior(run)

    def follow(found: Belief, rngs: Sequence[np.random.Generator], draw: torch.Generator) -> Episodes:
        belief = found if config.posterior == "mean" else algorithm.sample(found, draw)
        before_step: Callable[[Belief, int], Belief] | None = None
        if config.posterior == "step":

            def before_step(belief: Belief, t: int) -> Belief:
                drawn = algorithm.sample(found, draw) if t else belief
                return belief if drawn is found else drawn  # without a posterior, what the steps told must stay

        return run.episode(belief, rngs, before_step=before_step)[0]

    ran: list[Episodes] = []
    for repetition in range(run.repetitions):
        rngs = run.streams(repetition)
        draw = torch.Generator().manual_seed(seeding.integer(run.seed, *run.stream, "own prior", repetition))
        ran = []
        kept = np.ones((0, count), dtype=np.bool_)
        worst = np.full(count, -np.inf)
        for episode in range(config.episodes):
            sizes, told, own = [0] * count, np.full(count, np.nan), None
            counted = episode == config.episodes - 1
            exploring = episode < config.exploration_episodes
            if exploring and (config.prior != "none" or not ran):
                belief, before_step = prior.draw(rngs, draw), None
                if config.resample == "step":

                    def before_step(belief: Belief, t: int) -> Belief:
                        return prior.draw(rngs, draw) if t else belief  # noqa: B023 - used in this pass alone

                last, _ = run.episode(belief, rngs, before_step=before_step)
            else:
                found, sizes = adapt_to_own(algorithm, algorithm.prior(count), ran, kept, run.data.inference)
                last = follow(found, rngs, draw)
                if counted:
                    own = algorithm.embedding(found)
                    told = told_offline(run, sizes, repetition, follow)
            ran.append(last)
            kept = np.concatenate([kept, (last.returns(sparse) >= worst)[None]])
            if kept_share is not None and episode == config.exploration_episodes - 1:
                returns = np.stack([e.returns(sparse) for e in ran])
                best = max(1, round(kept_share * len(ran)))
                worst = np.sort(returns, axis=0)[-best]
                kept = returns >= worst
            more = {"offline_context_return": told, OWN: None if own is None else own.cpu().numpy()}
            run.add(repetition, episode, sizes, last, counted, **more)
    return ran[-1]


def told_offline(
    run: Run,
    sizes: Sequence[int],
    repetition: int,
    follow: Callable[[Belief, Sequence[np.random.Generator], torch.Generator], Episodes],
) -> NDArray[np.float64]:
    """Return what every task's policy collects, told by about as many offline transitions, [tasks]."""
    rngs = run.streams(repetition, "told offline")
    found = offline_belief(run.algorithm, run.data, own_size(sizes), rngs)
    draw = torch.Generator().manual_seed(seeding.integer(run.seed, *run.stream, "told offline", repetition))
    return follow(found, rngs, draw).returns(run.family.returns == "sparse")


def run(run: Run) -> Episodes:
    """Run the protocol on all tasks at once; return the last episode."""
    return run_online(run, None)


CONFIG = OnlineConfig
