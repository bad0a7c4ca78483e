"""Aggregates over tasks and seeds: mean, interquartile mean, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean


def iqm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the interquartile mean along the last axis: the mean without the lowest and highest quarter.

    Of n values floor(n / 4) are dropped at each end, as in Agarwal et al., NeurIPS 2021.
    """
    trimmed: NDArray[np.float64] = trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=-1)
    return trimmed


@dataclass(frozen=True)
class Summary:
    """Aggregate of one cell of a table.

    Attributes:
        mean: over seeds and tasks.
        iqm: interquartile mean over all (seed, task) scores.
        low, high: bootstrap interval of the mean.
        seeds, tasks: how many there are.
    """

    mean: float
    iqm: float
    low: float
    high: float
    seeds: int
    tasks: int

    @property
    def n(self) -> int:
        """Scores behind the summary."""
        return self.seeds * self.tasks


def _mean_of_drawn(
    scores: NDArray[np.float64], tasks: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the mean of ``scores`` [..., seeds, tasks] over drawn tasks and, drawn here, whole seeds: [...]."""
    seeds = scores.shape[-2]
    drawn = scores.take(rng.integers(seeds, size=seeds), axis=-2).take(tasks, axis=-1)
    return np.asarray(drawn.mean(axis=(-2, -1)))


def bootstrap_means(scores: NDArray[np.float64], samples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return bootstrap replicates [samples, ...] of the mean of ``scores`` [..., seeds, tasks].

    Tasks and seeds are both samples of what one wants to speak about, so both are resampled, whole: a replicate
    draws tasks and seeds with replacement and takes every drawn seed's score on every drawn task. One seed is one
    model, good or bad on all tasks together; drawing seeds for each task anew, as the stratified bootstrap of
    Agarwal et al. does for suites with a training per task, would call its luck 20 independent draws. With few
    seeds the interval is still too narrow: the variance between s seeds is taken as (s - 1) / s of its estimate.

    Leading axes, such as the points of a curve, share every draw.
    """
    scores = np.asarray(scores, dtype=np.float64)
    tasks = scores.shape[-1]
    return np.array([_mean_of_drawn(scores, rng.integers(tasks, size=(tasks,)), rng) for _ in range(samples)])


def _interval(replicates: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """Return both ends of the percentile interval of ``replicates`` [samples, ...]: [2, ...]."""
    tail = (1 - confidence) / 2
    return np.quantile(replicates, [tail, 1 - tail], axis=0)


def intervals(
    curve: NDArray[np.float64], samples: int, confidence: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of the interval of the mean of ``curve`` [..., seeds, tasks] at every point of it, [...] each."""
    low, high = _interval(bootstrap_means(curve, samples, rng), confidence)
    return low, high


def summarize(
    scores: NDArray[np.float64] | Sequence[Sequence[float]],
    samples: int,
    confidence: float,
    rng: np.random.Generator,
) -> Summary:
    """Summarize scores [seeds, tasks].

    Args:
        scores: one number per seed and task.
        samples: bootstrap replicates.
        confidence: of the percentile interval, such as 0.95.
        rng: draws the replicates.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"scores of shape {array.shape}: expected [seeds, tasks]")
    low, high = intervals(array, samples, confidence, rng)
    return Summary(
        float(array.mean()),
        float(iqm(array.reshape(-1))),
        float(low),
        float(high),
        array.shape[0],
        array.shape[1],
    )


@dataclass(frozen=True)
class Estimate:
    """What tells two cells apart on the same tasks, with its bootstrap interval.

    Attributes:
        mean: the estimate.
        low, high: interval of it.
    """

    mean: float
    low: float
    high: float


class Difference(Estimate):
    """How far the first cell's mean is above the second's."""

    @property
    def supported(self) -> bool:
        """Do the data tell the two apart, that is, does the interval leave out 0?"""
        return self.low > 0 or self.high < 0


def compare(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    samples: int,
    confidence: float,
    rng: np.random.Generator,
) -> Difference:
    """Compare scores [seeds, tasks] of two cells on the same tasks, by a paired bootstrap.

    In every replicate the tasks are drawn once for both, so that their difficulty, which both share, does not blur the
    difference, and the seeds of either one, whole (see ``bootstrap_means``).
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"scores of {first.shape[1]} and {second.shape[1]} tasks: expected the same tasks")
    tasks = first.shape[1]
    found = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(tasks, size=(tasks,))
        found[i] = _mean_of_drawn(first, drawn, rng) - _mean_of_drawn(second, drawn, rng)
    low, high = _interval(found, confidence)
    return Difference(float(first.mean() - second.mean()), float(low), float(high))


def profile(scores: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the performance profile: the share of ``scores`` [seeds, tasks] that are above each level, [levels].

    A run is one seed's score on one task (Agarwal et al., NeurIPS 2021, Eq. 2). The profile shows what a mean hides:
    whether all tasks are solved half, or half of them wholly. The area under it, from 0 on, is the mean.
    """
    return np.asarray((np.asarray(scores).reshape(-1, 1) > levels).mean(axis=0))


def _ahead(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [seeds, seeds, tasks]: 1 where the first is ahead of the second, 0.5 on a tie."""
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"scores of {first.shape[1]} and {second.shape[1]} tasks: expected the same tasks")
    return np.asarray((first[:, None] > second[None]) + 0.5 * (first[:, None] == second[None]))


def chance_ahead(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return P(X > Y) of scores [seeds, tasks], see ``improvement``."""
    return float(_ahead(first, second).mean())


def improvement(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    samples: int,
    confidence: float,
    rng: np.random.Generator,
) -> Estimate:
    """Return P(X > Y): the chance that a run of the first does better than a run of the second on the same task.

    The mean over tasks of the share of pairs of seeds in which the first is ahead; a tie counts half (Agarwal et al.,
    NeurIPS 2021, Section 4.3). 0.5 is a coin toss. It counts how often, where ``compare`` measures how much. The
    interval is a bootstrap over tasks, drawn once for both, and whole seeds of either one.

    Args:
        first: X, scores [seeds, tasks].
        second: Y, scores [seeds, tasks] on the same tasks.
        samples: bootstrap replicates.
        confidence: of the percentile interval.
        rng: draws the replicates.
    """
    ahead = _ahead(first, second)
    found = np.empty(samples)
    for i in range(samples):
        drawn = [rng.integers(size, size=(size,)) for size in ahead.shape]
        found[i] = ahead[np.ix_(*drawn)].mean()
    low, high = _interval(found, confidence)
    return Estimate(float(ahead.mean()), float(low), float(high))
