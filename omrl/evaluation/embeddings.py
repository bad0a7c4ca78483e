"""Diagnostics of the papers: separation and variance of embeddings, sparsity, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from omrl.algorithms.base import Algorithm
from omrl.core import seeding
from omrl.data.taskdata import TaskData
from omrl.evaluation.contexts import offline_belief
from omrl.nets.experience import Experience, from_arrays

OWN = "own_embedding"  # key of an evaluation's row: what the context that the agent collected was embedded as
_FEWEST = 32  # rows of either kind that a task needs for the sparsity curve


@runtime_checkable
class Attentive(Protocol):
    """An algorithm that weighs the transitions of a context."""

    def attention_weights(self, context: Experience) -> torch.Tensor:
        """Return weights [tasks, n], of mean 1 per task."""


def esr(means: NDArray[np.float64]) -> float:
    """Return the effective separation rate of task embeddings [tasks, latent] (FOCAL Table 1).

    The share of task pairs with ||z_i - z_j|| > sqrt(2 l / 3), the root mean square distance of two points
    drawn uniformly from (-1, 1)^l.
    """
    first, second = np.triu_indices(len(means), 1)
    return float((np.square(means[first] - means[second]).mean(axis=1) > 2 / 3).mean())


def rms(means: NDArray[np.float64]) -> float:
    """Return the RMS distance of task embeddings [tasks, latent] per dimension (FOCAL Table 1).

    As in the released script: the mean over dimensions of the standard deviation over tasks, times
    sqrt(2 n / (n - 1)). At most 1.42 for embeddings in (-1, 1).
    """
    n = len(means)
    return float(means.std(axis=0).mean() * np.sqrt(2 * n / (n - 1)))


def embedding_variance(embeddings: NDArray[np.float64]) -> float:
    """Return the variance of a task's embedding over resampled contexts (FOCAL++ Table 2, Eq. 20).

    Args:
        embeddings: [tasks, resamples, latent]; averaged over tasks and dimensions.
    """
    return float(embeddings.var(axis=1, ddof=1).mean())


def sample_embeddings(
    algorithm: Algorithm,
    data: TaskData,
    tasks: Sequence[dict[str, Any]],
    size: int,
    resamples: int,
    stream: Sequence[str | int],
    seed: int,
) -> NDArray[np.float32] | None:
    """Return embeddings [tasks, resamples, latent] of resampled contexts of ``size`` transitions of every task.

    None if the method has no embedding.
    """
    rngs = [seeding.generator(seed, *stream, "embeddings", t["index"]) for t in tasks]
    found = []
    for _ in range(resamples):
        z = algorithm.embedding(offline_belief(algorithm, data, size, rngs))
        if z is None:
            return None
        found.append(z.cpu().numpy())
    return np.stack(found, axis=1)


def own_size(sizes: Sequence[int]) -> int:
    """Return the size of the offline contexts to compare contexts of these sizes with: their mean."""
    return max(1, round(float(np.mean(sizes))))


def own_and_offline(
    algorithm: Algorithm,
    data: TaskData,
    tasks: Sequence[dict[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    stream: Sequence[str | int],
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return embeddings of contexts that the agent collected, and of offline contexts of about the same size.

    Args:
        algorithm: the method.
        data: offline data of the tasks.
        tasks: rows of data/tasks/all.json.
        rows: of the evaluation; those of counted episodes may have an embedding under ``OWN``.
        stream: of the draws.
        seed: their root.

    Returns:
        [tasks, repetitions, latent], and twice as many offline ones; None where no context was collected, or the
        method has no embedding.
    """
    found = [row for row in rows if row.get(OWN) is not None]
    if not found:
        return None
    own = np.stack([row[OWN] for row in found]).reshape(-1, len(tasks), len(found[0][OWN])).swapaxes(0, 1)
    size = own_size([row["context_transitions"] for row in found])
    offline = sample_embeddings(algorithm, data, tasks, size, 2 * own.shape[1], (*stream, "as own"), seed)
    return None if offline is None else (own, offline)


def context_shift(
    own: NDArray[np.float64], offline: NDArray[np.float64], places: Sequence[int]
) -> dict[str, float] | None:
    """Return how far embeddings of contexts that the agent collected itself lie from those of offline contexts.

    Per task the distance between the two means, its root mean square over tasks, in units of the root mean square
    distance of the tasks' offline means from their middle: at 1, a task's own contexts are as far off as other tasks.

    Args:
        own: [tasks, repetitions, latent].
        offline: [tasks, 2 repetitions, latent], of contexts of the same size.
        places: tasks that are looked at; the unit is of all.

    Returns:
        ``context_shift``, and ``context_shift_chance``, the same between the two halves of ``offline``: what the
        draw of a context makes; None if all tasks have one embedding.
    """
    middle = offline.mean(axis=1)
    unit = np.sqrt(np.square(middle - middle.mean(axis=0)).sum(-1).mean())
    if not unit:
        return None
    half = own.shape[1]
    first, second = offline[:, :half].mean(axis=1), offline[:, half:].mean(axis=1)

    def apart(one: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.square(one - first)[list(places)].sum(-1).mean()) / unit)

    return {"context_shift": apart(own.mean(axis=1)), "context_shift_chance": apart(second)}


def attention(
    algorithm: Algorithm,
    data: TaskData,
    places: Sequence[int],
    size: int,
    stream: Sequence[str | int],
    seed: int,
) -> dict[str, Any] | None:
    """Return how the weights of transitions with and without reward differ (FOCAL++ Fig. 5c).

    One context of ``size`` transitions per task. ``auc``: the probability that a transition with reward outweighs
    one without, over all tasks; 0.5 for equal weights.

    Returns:
        ``auc``, ``rewarded`` and ``unrewarded`` (mean weight each), ``edges`` and the ``counts`` of either kind;
        None if the algorithm weighs nothing, or one kind is absent.
    """
    if not isinstance(algorithm, Attentive):
        return None
    own = data.of(places)
    rng = seeding.generator(seed, *stream, "attention")
    context = from_arrays(own.take(rng.integers(own.rows, size=(len(places), size))), algorithm.device)
    with torch.no_grad():
        weights = algorithm.attention_weights(context).cpu().numpy().astype(np.float64).reshape(-1)
    rewarded = context.signal.cpu().numpy().reshape(-1) != 0
    if rewarded.all() or not rewarded.any():
        return None
    from sklearn.metrics import roc_auc_score

    edges = np.linspace(0, max(2.0, float(np.quantile(weights, 0.99))), 41)
    inside = weights.clip(0, edges[-1])
    return {
        "auc": float(roc_auc_score(rewarded, weights)),
        "rewarded": float(weights[rewarded].mean()),
        "unrewarded": float(weights[~rewarded].mean()),
        "edges": edges.tolist(),
        "counts": {
            "rewarded": np.histogram(inside[rewarded], edges)[0].tolist(),
            "unrewarded": np.histogram(inside[~rewarded], edges)[0].tolist(),
        },
    }


def sparsity_curve(
    algorithm: Algorithm,
    data: TaskData,
    places: Sequence[int],
    ratios: Sequence[float],
    size: int,
    resamples: int,
    stream: Sequence[str | int],
    seed: int,
) -> dict[str, Any] | None:
    """Return the embedding variance against the share of transitions without reward (FOCAL++ Fig. 6).

    Args:
        algorithm: the model.
        data: offline data.
        places: tasks to look at; those with fewer than 32 transitions of either kind are left out.
        ratios: shares of unrewarded transitions.
        size: transitions of a context.
        resamples: contexts per task and ratio.
        stream: of the draws.
        seed: their root.

    Returns:
        ``ratios``, ``variance`` at each, ``tasks`` behind them, and Eq. 34's ``threshold`` = Var(x_n) / (Var(x_n) +
        Var(x_s)), the variances of the embeddings of single transitions with and without reward; None without tasks
        that have both kinds.
    """
    kinds = [(np.flatnonzero(data.signal[i] == 0), np.flatnonzero(data.signal[i])) for i in places]
    chosen = [(i, kind) for i, kind in zip(places, kinds, strict=True) if min(map(len, kind)) >= _FEWEST]
    if not chosen:
        return None
    own = data.of([i for i, _ in chosen])
    rng = seeding.generator(seed, *stream, "sparsity")

    def embed(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        context = from_arrays(own.take(rows), algorithm.device)
        z = algorithm.embedding(algorithm.adapt(algorithm.prior(len(rows)), context))
        if z is None:
            raise ValueError("a method without an embedding has no sparsity curve")
        return z.cpu().numpy().astype(np.float64)

    variance = []
    for ratio in ratios:
        bare = round(ratio * size)
        found = []
        for _ in range(resamples):
            rows = [np.concatenate([rng.choice(s, bare), rng.choice(n, size - bare)]) for _, (s, n) in chosen]
            found.append(embed(np.stack(rows)))
        variance.append(embedding_variance(np.stack(found, axis=1)))
    single = []
    for kind in (1, 0):
        drawn = np.stack([rng.choice(k[kind], resamples * 4) for _, k in chosen])
        single.append(embedding_variance(np.stack([embed(drawn[:, j : j + 1]) for j in range(drawn.shape[1])], axis=1)))
    return {
        "ratios": list(ratios),
        "variance": variance,
        "threshold": single[0] / (single[0] + single[1]) if sum(single) else None,
        "tasks": len(chosen),
    }
