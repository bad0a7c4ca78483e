"""Pictures: results with intervals, profiles, learning curves, embeddings, trajectories, dataset returns.

All are of one width, so that their letters have one size on the page.

PNG bytes depend on the data alone: no dates, no version of the library.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from numpy.typing import NDArray

from omrl.core import seeding
from omrl.envs.base import Family
from omrl.evaluation.statistics import chance_ahead, intervals, profile
from omrl.report.tables import Evaluation, Row

# Okabe and Ito: told apart with any color vision
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
_STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
}


WIDTH = 9.0  # inches


def _draw(height: float, paint: Callable[[Figure], None]) -> bytes:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _line(place: int) -> tuple[str, str]:
    """Return color and style of a line: every further round of the colors has another style."""
    return COLORS[place % len(COLORS)], ("-", "--", ":", "-.")[place // len(COLORS) % 4]


def _label(cell: Sequence[str]) -> str:
    algorithm, *datasets = cell
    return f"{algorithm}: {' → '.join(datasets)}"


def results(rows: list[Row], references: dict[str, float], returns: str) -> bytes:
    """Draw every cell's mean with its interval, seeds as dots, published values as diamonds, references as lines."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        order = list(reversed(rows))
        for place, row in enumerate(order):
            color = COLORS[list(dict.fromkeys(r.cell[0] for r in rows)).index(row.cell[0]) % len(COLORS)]
            axes.plot([row.summary.low, row.summary.high], [place, place], color=color, lw=4, alpha=0.35)
            axes.plot(list(row.seed_means.values()), [place] * len(row.seed_means), ".", color=color, ms=5)
            axes.plot(row.summary.mean, place, "|", color=color, ms=16, mew=2.5)
            for quote in row.quoted("return"):
                axes.errorbar(quote.value, place, xerr=quote.spread, fmt="D", mfc="white", mec="#444444", ms=6,
                              ecolor="#444444", elinewidth=1)  # fmt: skip
        for place, (name, value) in enumerate(references.items()):
            axes.axvline(value, color="#666666", lw=1, ls=(0, (4, 2 + 2 * place)), zorder=0)
            # one above the other: references may lie close together
            axes.annotate(
                name, (value, len(rows) - 0.4), (0, 3 + 10 * place), textcoords="offset points",
                ha="center", fontsize=8, color="#444444", annotation_clip=False,
            )  # fmt: skip
        axes.set_yticks(range(len(order)), [_label(row.cell) for row in order])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(  # two lines: long names of methods leave little width
            f"{returns} return (bar: bootstrap interval, tick: mean,\ndots: seeds, diamond: published, with its spread)"
        )
        axes.grid(axis="y", visible=False)

    return _draw(1.7 + 0.36 * len(rows), paint)


Scores = NDArray[np.float64]  # [seeds, tasks]


def _matched_first(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs of training and test dataset, each once, those of one dataset before the others."""
    return sorted(dict.fromkeys(pairs), key=lambda pair: len(set(pair)))


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """Explain the lines below the panels, four in a row."""
    handles = [Line2D([], [], color=_line(i)[0], ls=_line(i)[1], label=label) for i, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(labels)))


def _legend_height(labels: Sequence[str]) -> float:
    return 0.2 + 0.19 * -(-len(labels) // 4)


def profile_frame(normalized: Mapping[tuple[str, str, str], Scores]) -> pd.DataFrame:
    """Return cell, normalized return and the share of runs above it; no rows where nothing normalizes a return."""
    known = {cell: scores for cell, scores in normalized.items() if np.isfinite(scores).all()}
    top = max((float(scores.max()) for scores in known.values()), default=1.0)
    levels = np.linspace(0.0, max(1.0, top), 101)
    parts = [
        pd.DataFrame({"cell": "/".join(cell), "normalized": levels, "share": profile(scores, levels)})
        for cell, scores in known.items()
    ]
    return pd.concat(parts) if parts else pd.DataFrame(columns=["cell", "normalized", "share"])


def profiles(normalized: Mapping[tuple[str, str, str], Scores]) -> bytes | None:
    """Draw the performance profile of every cell (Agarwal et al., 2021); None where nothing normalizes a return."""
    known = {cell: scores for cell, scores in normalized.items() if np.isfinite(scores).all()}
    if not known:
        return None
    pairs = _matched_first([(cell[1], cell[2]) for cell in known])[:8]
    names = list(dict.fromkeys(cell[0] for cell in known))
    columns = min(4, len(pairs))

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(-(-len(pairs) // columns), columns, sharex=True, sharey=True)).reshape(
            -1
        )
        for axes, pair in zip(panels, pairs, strict=False):
            for place, name in enumerate(names):
                if (name, *pair) in known:
                    frame = profile_frame({(name, *pair): known[name, *pair]})
                    color, style = _line(place)
                    axes.step(frame["normalized"], frame["share"], style, where="post", color=color)
            axes.set_title(" → ".join(pair), fontsize=9)
            axes.set_ylim(-0.02, 1.02)
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(pairs) - columns) : len(pairs)]:
            axes.set_xlabel("normalized return")
        for axes in panels[::columns]:
            axes.set_ylabel("share of runs")
        _legend(figure, names)

    height = 3.4 if len(pairs) == 1 else 2.3 * -(-len(pairs) // columns)
    return _draw(height + _legend_height(names), paint)


def improvement_frame(scores: Mapping[tuple[str, str, str], Scores]) -> pd.DataFrame:
    """Return P(row > column) for every two algorithms with the same datasets: train, test, row, column, probability."""
    rows = [
        (*cell[1:], cell[0], other[0], chance_ahead(mine, theirs))
        for cell, mine in scores.items()
        for other, theirs in scores.items()
        if other[1:] == cell[1:] and other != cell
    ]
    return pd.DataFrame(rows, columns=["train", "test", "row", "column", "probability"])


def improvements(scores: Mapping[tuple[str, str, str], Scores]) -> bytes | None:
    """Draw P(row > column) as a table per pair of datasets, four at most; None without rivals."""
    frame = improvement_frame(scores)
    if frame.empty:
        return None
    parts = {(str(a), str(b)): part for (a, b), part in frame.groupby(["train", "test"], sort=False)}
    groups = [(pair, parts[pair]) for pair in _matched_first(parts)[:4]]
    largest = max(part["row"].nunique() for _, part in groups)
    columns = 1 if largest > 5 else min(2, len(groups))
    lines = -(-len(groups) // columns)

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(lines, columns)).reshape(-1)
        for axes, (pair, part) in zip(panels, groups, strict=False):
            names = list(part["row"].unique())
            chance = part.pivot(index="row", columns="column", values="probability").loc[names, names].to_numpy()
            axes.imshow(chance, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto", alpha=0.75)
            for (y, x), value in np.ndenumerate(chance):
                if x != y:
                    color = "white" if abs(value - 0.5) > 0.35 else "black"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=color)
            axes.set_xticks(range(len(names)), names, rotation=30 if largest > 5 else 0)
            axes.set_yticks(range(len(names)), names)
            axes.set_title(" → ".join(pair), fontsize=9)
            axes.grid(visible=False)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)

    return _draw(lines * (0.32 * largest + 1.1), paint)


def scene(png: bytes) -> bytes:
    """Put a rendered picture on a canvas of the others' width."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(image.imread(io.BytesIO(png)))
        axes.set_axis_off()

    return _draw(4.4, paint)


def training_curves(evaluations: list[Evaluation]) -> bytes:
    """Draw the scalars of meta-training against gradient steps, one panel each, one line per model."""
    models: dict[tuple[str, str, int], pd.DataFrame] = {}
    for e in evaluations:
        models.setdefault((e.algorithm, e.train, e.seed), e.curve)
    # every scalar that any method reports, in the order of first appearance
    names = list(dict.fromkeys(n for curve in models.values() for n in curve if n not in ("step", "phase")))
    kinds = list(dict.fromkeys((a, d) for a, d, _ in models))
    labels = [_label(kind) for kind in kinds]

    def paint(figure: Figure) -> None:
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        panels = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
        for axes, name in zip(panels, names, strict=False):
            for (algorithm, dataset, _), curve in models.items():
                if name in curve:
                    color, style = _line(kinds.index((algorithm, dataset)))
                    axes.plot(curve["step"], curve[name], style, color=color, lw=1, alpha=0.8)
            axes.set_title(name, fontsize=9)
            if name in ("q_loss", "v_loss") and all((c[name] > 0).all() for c in models.values() if name in c):
                axes.set_yscale("log")
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(names) - columns) : len(names)]:
            axes.set_xlabel("gradient steps")
        _legend(figure, labels)

    return _draw(2.1 * -(-len(names) // 4) + _legend_height(labels), paint)


def learning_frame(evaluations: list[Evaluation]) -> pd.DataFrame:
    """Return return on the unseen tasks against gradient steps: one row per algorithm, datasets, seed and snapshot."""
    parts = []
    for e in evaluations:
        if e.learning is not None and e.learned_on is None:
            test = e.learning[e.learning["split"] == "test"]
            mean = test.groupby("step")[["return", "normalized"]].mean().reset_index()
            parts.append(mean.assign(algorithm=e.algorithm, train=e.train, test=e.test, seed=e.seed))
    columns = ["algorithm", "train", "test", "seed", "step", "return", "normalized"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def _curves(
    frame: pd.DataFrame,
    meaning: str,
    references: dict[str, float],
    returns: str,
    draw: Callable[[Axes, pd.DataFrame, str, str], None],
) -> bytes | None:
    """Draw return on unseen tasks, a panel per pair of datasets; None if there are no rows.

    Args:
        frame: algorithm, train, test, and what ``draw`` needs.
        meaning: label of the axis.
        references: of the environment; oracle and random become lines.
        returns: kind of the return.
        draw: puts one algorithm's rows on a panel, in a color and line style.
    """
    if frame.empty:
        return None
    pairs = _matched_first(dict.fromkeys(zip(frame["train"], frame["test"], strict=True)))
    names = list(dict.fromkeys(frame["algorithm"]))
    columns = min(3, len(pairs))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(-(-len(pairs) // columns), columns, squeeze=False, sharey=True).reshape(-1)
        for axes, (train, test) in zip(panels, pairs, strict=False):
            here = frame[(frame["train"] == train) & (frame["test"] == test)]
            for name, own in here.groupby("algorithm", sort=False):
                color, style = _line(names.index(str(name)))
                draw(axes, own, color, style)
            for name in [n for n in ("oracle", "random") if n in references]:
                value = references[name]
                axes.axhline(value, color="0.45", lw=0.9, ls="--" if name == "oracle" else ":")
                axes.annotate(
                    name, (1, value), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                    ha="right", fontsize=8, color="0.3",
                )  # fmt: skip
            axes.set_title(f"trained on {train}, context {test}", fontsize=9)
            axes.set_xlabel(meaning)
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        panels[0].set_ylabel(f"{returns} return, unseen tasks")
        _legend(figure, names)

    height = 3.4 if len(pairs) == 1 else 2.6 * -(-len(pairs) // columns)
    return _draw(height + _legend_height(names), paint)


def learning_curves(evaluations: list[Evaluation], references: dict[str, float], returns: str) -> bytes | None:
    """Draw return on unseen tasks against gradient steps, a panel per pair of datasets: mean and range of the seeds."""

    def draw(axes: Axes, own: pd.DataFrame, color: str, style: str) -> None:
        by_step = own.groupby("step")["return"]
        axes.plot(by_step.mean().index, by_step.mean(), style, color=color, lw=1.8)
        axes.fill_between(by_step.min().index, by_step.min(), by_step.max(), color=color, alpha=0.15, lw=0)

    return _curves(learning_frame(evaluations), "gradient steps", references, returns, draw)


def _in_the_environment(e: Evaluation, base: Evaluation | None) -> pd.DataFrame | None:
    """Return point, task, env_steps and return of a model that learned on while it acted, None if it did not.

    Either the protocol learns on in every test task, and its rows say after how many steps; or stage ``online`` did,
    from ``base``, and its snapshots were evaluated. Of that the ends are the two models' counted episodes, as in the
    table.
    """
    columns = ["point", "task", "env_steps", "return"]
    test = e.episodes[e.episodes["split"] == "test"]
    if "env_steps" in test and test["env_steps"].any():
        return test.rename(columns={"episode": "point"})[columns]
    if (did := e.learned_on) is None:
        return None
    end = did["rounds"] * did["updates"]
    parts = [] if e.learning is None else [e.learning[(e.learning["split"] == "test") & (e.learning["step"] < end)]]
    for step, model in ((0, base), (end, e)):
        if model is not None:
            ran = model.episodes
            parts.append(ran[ran["counted"] & (ran["split"] == "test")].assign(step=step))
    points = pd.concat(parts)
    return points.assign(point=points["step"], env_steps=points["step"] // did["updates"] * did["steps"])[columns]


def online_frame(evaluations: list[Evaluation], samples: int, confidence: float) -> pd.DataFrame:
    """Return the mean return on unseen tasks over environment steps per task, with its interval.

    Args:
        evaluations: all of the report.
        samples: bootstrap replicates, of tasks and whole seeds.
        confidence: of the interval.

    Returns:
        algorithm, train, test, env_steps, return, low, high; no rows where nothing learned on in the environment.
    """
    known = {(*e.cell, e.seed): e for e in evaluations}
    parts = []
    for cell in dict.fromkeys(e.cell for e in evaluations):
        found = []
        for e in [e for e in evaluations if e.cell == cell]:
            base = known.get((e.learned_on["algorithm"], *cell[1:], e.seed)) if e.learned_on else None
            if (points := _in_the_environment(e, base)) is not None:
                found.append(points.assign(seed=e.seed))
        if not found:
            continue
        frame = pd.concat(found)
        means = frame.groupby(["point", "seed", "task"])["return"].mean()
        scores = means.to_numpy().reshape(*(means.index.get_level_values(i).nunique() for i in range(3)))
        low, high = intervals(scores, samples, confidence, seeding.generator(0, "bootstrap", *cell))
        curve = pd.DataFrame(
            {
                "env_steps": frame.groupby("point")["env_steps"].mean().to_numpy(),
                "return": scores.mean(axis=(1, 2)),
                "low": low,
                "high": high,
            }
        )
        parts.append(curve.assign(algorithm=cell[0], train=cell[1], test=cell[2]))
    columns = ["algorithm", "train", "test", "env_steps", "return", "low", "high"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def online_curves(frame: pd.DataFrame, references: dict[str, float], returns: str) -> bytes | None:
    """Draw an ``online_frame``, a panel per pair of datasets; None if it has no rows."""

    def draw(axes: Axes, own: pd.DataFrame, color: str, style: str) -> None:
        marker = "o" if len(own) <= 30 else ""
        axes.plot(own["env_steps"], own["return"], style, color=color, lw=1.8, marker=marker, ms=3.5)
        axes.fill_between(own["env_steps"], own["low"], own["high"], color=color, alpha=0.13, lw=0)

    return _curves(frame, "environment steps of every task", references, returns, draw)


def behavior_curves(progress: dict[int, pd.DataFrame], references: dict[str, float], returns: str) -> bytes:
    """Draw each behavior policy's deterministic return against SAC steps, and their mean."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in progress.values():
            axes.plot(curve["step"], curve["return"], color=COLORS[5], lw=0.7, alpha=0.5)
        mean = pd.concat(progress.values()).groupby("step")["return"].mean()
        axes.plot(mean.index, mean.to_numpy(), color=COLORS[0], lw=2.2, label=f"mean of {len(progress)} tasks")
        for name in [n for n in ("oracle", "random") if n in references]:
            axes.axhline(references[name], color="#666666", lw=1, ls="--" if name == "oracle" else ":", label=name)
        axes.set_xlabel("SAC environment steps")
        axes.set_ylabel(f"{returns} return")
        axes.legend(loc="best")

    return _draw(3.6, paint)


def project(points: NDArray[np.float64], method: str) -> NDArray[np.float64]:
    """Return points [n, d] on the plane, [n, 2]: principal components, or t-SNE from a fixed state."""
    centered = points - points.mean(axis=0)
    if method == "tsne" and len(points) > 10:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(centered)
        return np.asarray(plane, dtype=np.float64)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    axes = axes[:2] * np.where(
        np.abs(axes[:2]).max(axis=1, keepdims=True) == axes[:2].max(axis=1, keepdims=True), 1, -1
    )
    plane = centered @ axes.T
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


def embedding_frame(evaluation: Evaluation, method: str) -> pd.DataFrame:
    """Return the projected embeddings of one model: task, split, resample, x, y; empty if it has none."""
    table = evaluation.embeddings
    if table is None:
        return pd.DataFrame(columns=["task", "split", "resample", "x", "y"])
    plane = project(np.stack(table["embedding"].to_list()).astype(np.float64), method)
    return table[["task", "split", "resample"]].assign(x=plane[:, 0], y=plane[:, 1])


def embeddings(evaluations: list[Evaluation], method: str, color_of: dict[int, float], meaning: str) -> bytes | None:
    """Draw the embeddings of every task's resampled contexts, one panel per cell (its first seed); None without any."""
    first: dict[tuple[str, str, str], Evaluation] = {}
    for e in evaluations:
        if e.embeddings is not None:
            first.setdefault(e.cell, e)
    chosen = list(first.values())[:9]
    if not chosen:
        return None
    columns = min(3, len(chosen))

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(-(-len(chosen) // columns), columns)).reshape(-1)
        values = np.array(list(color_of.values()))
        norm = mpl.colors.Normalize(values.min(), values.max())
        for axes, evaluation in zip(panels, chosen, strict=False):
            frame = embedding_frame(evaluation, method)
            for split, marker, size in (("train", "o", 9), ("test", "^", 26)):
                part = frame[frame["split"] == split]
                axes.scatter(
                    part["x"], part["y"], c=[color_of[t] for t in part["task"]], norm=norm, cmap="viridis",
                    marker=marker, s=size, alpha=0.85, lw=0.4, edgecolors="black" if split == "test" else "none",
                )  # fmt: skip
            axes.set_title(_label(evaluation.cell), fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in panels[len(chosen) :]:
            axes.set_visible(False)
        mapper = mpl.cm.ScalarMappable(norm, "viridis")
        figure.colorbar(mapper, ax=list(panels), label=meaning, shrink=0.7, aspect=30)

    return _draw(2.8 * -(-len(chosen) // columns) + 0.2, paint)


def shift_frame(evaluations: list[Evaluation], method: str) -> pd.DataFrame:
    """Return the projected embeddings of own and offline contexts of every cell's first seed.

    A model that learned on in the environment is put on the plane of the one that it was before, so that the two can
    be compared.

    Returns:
        algorithm, train, test, task, split, source, resample, x, y, and whose plane it is.
    """
    planes: dict[tuple[str, str, str], list[pd.DataFrame]] = {}
    for (algorithm, train, test), e in _first_of_cells(evaluations).items():
        if e.contexts is not None:
            before = e.learned_on["algorithm"] if e.learned_on else algorithm
            table = e.contexts.assign(algorithm=algorithm, train=train, test=test)
            planes.setdefault((before, train, test), []).append(table)
    columns = ["algorithm", "train", "test", "task", "split", "source", "resample"]
    parts = []
    for (of, *_), members in planes.items():
        frame = pd.concat(members)
        plane = project(np.stack(frame["embedding"].to_list()).astype(np.float64), method)
        parts.append(frame[columns].assign(x=plane[:, 0], y=plane[:, 1], plane=of))
    return pd.concat(parts) if parts else pd.DataFrame(columns=[*columns, "x", "y", "plane"])


def shifts(
    evaluations: list[Evaluation], rows: list[Row], method: str, color_of: dict[int, float], meaning: str
) -> bytes | None:
    """Draw embeddings of offline contexts and of those that the agent collected, a panel per cell; None without."""
    frame = shift_frame(evaluations, method)
    if frame.empty:
        return None
    groups = frame.groupby(["algorithm", "train", "test"], sort=False)
    panels_of = [((str(a), str(b), str(c)), part) for (a, b, c), part in groups][:9]
    numbers = {row.cell: row.diagnostics for row in rows}
    columns = min(3, len(panels_of))

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(-(-len(panels_of) // columns), columns)).reshape(-1)
        values = np.array(list(color_of.values()))
        norm = mpl.colors.Normalize(values.min(), values.max())
        for axes, (cell, part) in zip(panels, panels_of, strict=False):
            for source, marker, size in (("offline", "o", 10), ("own", "x", 22)):
                for split, alpha in (("train", 0.35), ("test", 1.0)):
                    own = part[(part["source"] == source) & (part["split"] == split)]
                    axes.scatter(
                        own["x"], own["y"], c=[color_of[t] for t in own["task"]], norm=norm, cmap="viridis",
                        marker=marker, s=size, alpha=alpha, lw=1.1 if source == "own" else 0,
                    )  # fmt: skip
            on = ["plane", "train", "test"]
            shared = frame[(frame[on] == part[on].iloc[0]).all(axis=1)]  # one scale for the panels of one plane
            for name, limits in (("x", axes.set_xlim), ("y", axes.set_ylim)):
                pad = 0.04 * np.ptp(shared[name]) + 1e-9
                limits(shared[name].min() - pad, shared[name].max() + pad)
            found = numbers.get(cell, {})
            said = f"\nshift {found['context_shift']:.2f}" if "context_shift" in found else ""
            axes.set_title(f"{_label(cell)}{said}", fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in panels[len(panels_of) :]:
            axes.set_visible(False)
        figure.colorbar(mpl.cm.ScalarMappable(norm, "viridis"), ax=list(panels), label=meaning, shrink=0.7, aspect=30)
        kinds = [("o", "offline context"), ("x", "collected by the agent"), ("", "pale: training tasks")]
        figure.legend(
            handles=[Line2D([], [], color="0.2", ls="none", marker=m, label=label) for m, label in kinds],
            loc="outside lower center", ncols=3,
        )  # fmt: skip

    return _draw(3.0 * -(-len(panels_of) // columns) + 0.4, paint)


def trajectories(evaluation: Evaluation, family: Family, tasks: dict[int, dict[str, Any]]) -> bytes | None:
    """Draw the last episodes of a few test tasks on the plane, with goals; None if there is no plane."""
    shown = evaluation.trajectories
    planes = {t: family.plane(tasks[t]["parameters"]) for t in shown["task"].unique()}
    if not planes or any(p is None for p in planes.values()):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (task, plane) in enumerate(planes.items()):
            color = COLORS[place % len(COLORS)]
            path = np.stack(shown[shown["task"] == task]["observation"].to_list())
            axes.plot(path[:, 0], path[:, 1], "-o", color=color, ms=2.5, lw=1.2, label=f"task {task}")
            if plane is not None:
                axes.plot(*plane["goal"], marker="*", color=color, ms=11, mec="black", mew=0.5, ls="none")
                if plane["radius"]:
                    axes.add_patch(Circle(plane["goal"], plane["radius"], color=color, alpha=0.15, lw=0))
        axes.plot(path[0, 0], path[0, 1], "s", color="black", ms=5, ls="none", label="start")
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{_label(evaluation.cell)}, seed {evaluation.seed}", fontsize=9)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return _draw(4.4, paint)


def dataset_returns(cards: dict[str, dict[str, Any]], returns: str) -> bytes | None:
    """Draw the histogram of behavior returns of every dataset that has one."""
    shown = {n: c["return_histogram"] for n, c in cards.items() if c["return_histogram"]}
    if not shown:
        return None

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(shown), sharex=True)).reshape(-1)
        for place, (axes, (name, histogram)) in enumerate(zip(panels, shown.items(), strict=True)):
            axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=COLORS[place % len(COLORS)])
            axes.set_title(f"{name}: {cards[name]['episodes']:,} episodes", fontsize=9)
            axes.set_xlabel(f"{returns} return")
        panels[0].set_ylabel("episodes")

    return _draw(2.5, paint)


def _first_of_cells(evaluations: list[Evaluation]) -> dict[tuple[str, str, str], Evaluation]:
    """Return the first seed of every cell."""
    found: dict[tuple[str, str, str], Evaluation] = {}
    for e in evaluations:
        found.setdefault(e.cell, e)
    return found


def attention(evaluations: list[Evaluation]) -> bytes | None:
    """Draw the densities of attention weights of rewarded and unrewarded transitions; None without attention."""
    shown = list(_first_of_cells([e for e in evaluations if e.attention]).items())[:8]
    if not shown:
        return None
    columns = min(4, len(shown))

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(-(-len(shown) // columns), columns)).reshape(-1)
        for axes, (cell, evaluation) in zip(panels, shown, strict=False):
            found = evaluation.attention or {}
            edges = np.array(found["edges"])
            for place, kind in enumerate(("rewarded", "unrewarded")):
                counts = np.array(found["counts"][kind], dtype=np.float64)
                density = counts / max(1.0, counts.sum()) / np.diff(edges)
                axes.stairs(density, edges, fill=True, alpha=0.5, color=COLORS[place], label=kind)
            axes.set_title(f"{_label(cell)}\nAUC {found['auc']:.3f}", fontsize=8.5)
            axes.set_xlabel("weight")
        panels[0].legend(fontsize=8)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)

    return _draw(2.6 * -(-len(shown) // columns), paint)


def sparsity(evaluations: list[Evaluation]) -> bytes | None:
    """Draw the embedding variance against the share of unrewarded transitions; None where it was not computed."""
    shown = _first_of_cells([e for e in evaluations if e.diagnostics["sparsity"]])
    if not shown:
        return None

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        for place, cell in enumerate(shown):
            members = [e.diagnostics["sparsity"] for e in evaluations if e.cell == cell and e.diagnostics["sparsity"]]
            color = COLORS[place % len(COLORS)]
            curves = np.array([m["variance"] for m in members])
            axes.plot(members[0]["ratios"], curves.mean(axis=0), "-o", ms=3, color=color, label=_label(cell))
            for member in members:
                if member["threshold"] is not None:
                    axes.plot(member["threshold"], 0.02, "|", ms=12, mew=1.5, color=color,
                              transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("share of unrewarded transitions in the context")
        axes.set_ylabel("embedding variance")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return _draw(3.6, paint)


def context_curves(evaluations: list[Evaluation], returns: str) -> bytes:
    """Draw the return on test tasks against the size of the context."""
    cells = list(dict.fromkeys(e.cell for e in evaluations))
    labels = [_label(cell) for cell in cells]

    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        for place, cell in enumerate(cells):
            frame = context_frame([e for e in evaluations if e.cell == cell])
            color, style = _line(place)
            axes.plot(frame["context_transitions"], frame["return"], style, color=color)
        axes.set_xlabel("transitions of context")
        axes.set_ylabel(f"{returns} return, test tasks")
        _legend(figure, labels)

    return _draw(3.2 + _legend_height(labels), paint)


def context_frame(evaluations: list[Evaluation]) -> pd.DataFrame:
    """Return context_transitions and the mean return on test tasks over seeds, tasks and repetitions."""
    episodes = pd.concat([e.episodes for e in evaluations])
    test = episodes[episodes["split"] == "test"]
    return test.groupby("context_transitions", sort=True)["return"].mean().reset_index()
