"""Two results side by side: which differences do the data support?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omrl.core import seeding
from omrl.core.errors import UserError
from omrl.evaluation.statistics import Difference, bootstrap_means, compare
from omrl.report.collect import Result, aligned
from omrl.report.tables import Cell

_SAMPLES = 2000


@dataclass(frozen=True)
class Pair:
    """A row of both results.

    Attributes:
        first, second: its cells there.
        means: of the two.
        difference: second minus first, with its interval.
        tasks: that both were paired on; 0: they have no task in common, and the interval is of independent samples.
    """

    first: Cell
    second: Cell
    means: tuple[float, float]
    difference: Difference
    tasks: int


def match(first: Result, second: Result) -> list[tuple[Cell, Cell]]:
    """Return the cells that belong together: of the same name, else at the same place of params.yaml (a swap)."""
    pairs = [(cell, cell) for cell in first.cells if cell in second.cells]
    ours, theirs = {cell for cell, _ in pairs}, {cell for _, cell in pairs}
    places = {place: cell for cell, place in second.places().items() if cell not in theirs}
    pairs += [(cell, places[place]) for cell, place in first.places().items() if cell not in ours and place in places]
    return sorted(pairs, key=lambda pair: first.cells.index(pair[0]))


def compare_results(first: Result, second: Result) -> list[Pair]:
    """Compare all rows that two results share.

    Where both were evaluated on the same tasks (environment, its settings and the tasks' seed agree), the bootstrap
    is paired over them, so that the tasks' difficulty does not blur the difference.

    Raises:
        UserError: they share no row.
    """
    same = first.tasks == second.tasks
    pairs = []
    for a, b in match(first, second):
        (x, x_tasks), (y, y_tasks) = first.scores(a), second.scores(b)
        rng = seeding.generator(0, "compare-results", *a, *b)
        common = [task for task in x_tasks if task in y_tasks] if same else []
        if common:
            x, y = (s[:, [tasks.index(t) for t in common]] for s, tasks in ((x, x_tasks), (y, y_tasks)))
            found = compare(y, x, _SAMPLES, first.confidence, rng)
        else:
            drawn = bootstrap_means(y, _SAMPLES, rng) - bootstrap_means(x, _SAMPLES, rng)
            tail = (1 - first.confidence) / 2
            low, high = np.quantile(drawn, [tail, 1 - tail])
            found = Difference(float(y.mean() - x.mean()), float(low), float(high))
        pairs.append(Pair(a, b, (float(x.mean()), float(y.mean())), found, len(common)))
    if not pairs:
        raise UserError(f"{first.name} and {second.name} share no row: no algorithm is in both")
    return pairs


def as_text(first: Result, second: Result) -> str:
    """Return the comparison for a terminal."""
    rows = [["algorithm", "trained on", "context", first.name, second.name, "difference", "interval", "", "tasks"]]
    pairs = compare_results(first, second)
    for pair in pairs:
        names = [a if a == b else f"{a} -> {b}" for a, b in zip(pair.first, pair.second, strict=True)]
        d = pair.difference
        rows.append([*names, f"{pair.means[0]:.2f}", f"{pair.means[1]:.2f}", f"{d.mean:+.2f}",
                     f"[{d.low:+.2f}, {d.high:+.2f}]", "" if d.supported else "~",
                     str(pair.tasks) if pair.tasks else "others"])  # fmt: skip
    paired = all(pair.tasks for pair in pairs)
    notes = f"{first.confidence:.0%} bootstrap over tasks and whole seeds; "
    notes += "paired over the tasks that both have" if paired else "others: the two have other tasks, not paired"
    notes += "; ~: not told apart by these data" if any(not pair.difference.supported for pair in pairs) else ""
    left = [len(result.cells) - len(pairs) for result in (first, second)]
    if any(left):
        notes += f"\nnot in both: {left[0]} rows of {first.name}, {left[1]} of {second.name}"
    return "\n".join([*aligned(rows), notes])
