"""Numbers: from evaluation files to results.csv, metrics.json, diagnostics.json and results.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from omrl.core import layout, seeding
from omrl.core.files import read_json, read_manifest
from omrl.data.parquet import read_table, verified
from omrl.envs.base import Family
from omrl.evaluation.evaluate import CONTEXTS, CURVE, DIAGNOSTICS, EMBEDDINGS, EPISODES, LEARNING, TRAJECTORIES
from omrl.evaluation.statistics import Difference, Estimate, Summary, compare, improvement, summarize
from omrl.report import ReportConfig
from omrl.report.published import Quote, quotes

Cell = tuple[str, str, str]  # algorithm, training dataset, test dataset


@dataclass(frozen=True)
class Evaluation:
    """One evaluated model: what its folder holds."""

    algorithm: str
    train: str
    test: str
    seed: int
    folder: Path
    episodes: pd.DataFrame
    embeddings: pd.DataFrame | None  # None: the method has none
    trajectories: pd.DataFrame
    diagnostics: dict[str, Any]
    curve: pd.DataFrame
    learning: pd.DataFrame | None = None  # counted episodes of the snapshots; None: none were kept
    contexts: pd.DataFrame | None = None  # embeddings of the agent's own contexts, and of offline ones; None: has none

    @property
    def cell(self) -> Cell:
        """The row of the table it belongs to."""
        return self.algorithm, self.train, self.test

    @property
    def learned_on(self) -> dict[str, Any] | None:
        """What was before the model learned on in the environment, and how it did; None where none did."""
        found: dict[str, Any] | None = self.diagnostics.get("learned_on")
        return found

    @property
    def attention(self) -> dict[str, Any] | None:
        """How transitions are weighted; None where nothing is, or every weight is 1 for want of a gate."""
        found: dict[str, Any] | None = self.diagnostics["attention"]
        return None if found is None or found["rewarded"] == found["unrewarded"] == 1 else found


def evaluation_folder(entry: dict[str, Any]) -> Path:
    """Return the folder of a planned evaluation."""
    return layout.evaluations(entry["algorithm"], entry["train"], entry["test"], entry["seed"])


def load_evaluations(planned: list[dict[str, Any]]) -> list[Evaluation]:
    """Read every planned evaluation, each file compared with its manifest.

    Raises:
        UserError: one is missing or damaged; the message names the file.
    """
    found = []
    for entry in planned:
        folder = evaluation_folder(entry)
        names = [EPISODES, TRAJECTORIES, DIAGNOSTICS, CURVE]
        optional = [name for name in (EMBEDDINGS, LEARNING, CONTEXTS) if name in read_manifest(folder)["files"]]
        paths = dict(zip([*names, *optional], verified(folder, [*names, *optional]), strict=True))
        further = {name: read_table(paths[name]).to_pandas() for name in optional}
        found.append(
            Evaluation(
                entry["algorithm"],
                entry["train"],
                entry["test"],
                entry["seed"],
                folder,
                read_table(paths[EPISODES]).to_pandas(),
                further.get(EMBEDDINGS),
                read_table(paths[TRAJECTORIES]).to_pandas(),
                read_json(paths[DIAGNOSTICS]),
                pd.read_csv(paths[CURVE]),
                further.get(LEARNING),
                further.get(CONTEXTS),
            )
        )
    return found


def results_frame(evaluations: list[Evaluation]) -> pd.DataFrame:
    """Return the counted episodes of the test tasks, tidy: one row per return."""
    parts = []
    for evaluation in evaluations:
        episodes = evaluation.episodes
        counted = episodes[episodes["counted"] & (episodes["split"] == "test")]
        parts.append(
            pd.DataFrame(
                {
                    "algorithm": evaluation.algorithm,
                    "train_dataset": evaluation.train,
                    "test_dataset": evaluation.test,
                    "seed": evaluation.seed,
                    "task": counted["task"],
                    "episode": counted["repetition"],
                    "return": counted["return"],
                    "normalized": counted["normalized"],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class Row:
    """One row of the result table."""

    cell: Cell
    summary: Summary
    normalized: float | None  # None: the oracle's return is not known
    train_tasks: float
    seed_means: dict[int, float]
    diagnostics: dict[str, float]
    published: tuple[Quote, ...] = ()
    restated: float | None = None  # the return under the other form of the sparse reward
    behind: Difference | None = None  # to the best algorithm of the same datasets; None: the best, or alone
    rivals: int = 0  # further algorithms with the same datasets
    wins: Estimate | None = None  # chance that a run beats one of the best algorithm on the same task
    wrong: float | None = None  # the return with another task's context
    told: float | None = None  # the return with an offline context in place of the agent's own

    def quoted(self, quantity: str) -> list[Quote]:
        """Return what was published of ``quantity``."""
        return [quote for quote in self.published if quote.quantity == quantity]

    def own(self, quantity: str) -> float | None:
        """Return our value of what a paper published; None where it was not measured."""
        return self.summary.mean if quantity == "return" else self.diagnostics.get(quantity)


def _scores(evaluations: list[Evaluation], split: str, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return [seeds, tasks]: each task's mean over the repetitions' counted episodes; NaN without such a column."""
    rows = []
    for evaluation in evaluations:
        episodes = evaluation.episodes
        if column not in episodes:
            episodes = episodes.assign(**{column: math.nan})
        counted = episodes[episodes["counted"] & (episodes["split"] == split)]
        rows.append(counted.groupby("task", sort=True)[column].mean().to_numpy(dtype=np.float64))
    return np.stack(rows)


def cell_scores(evaluations: list[Evaluation], column: str) -> dict[Cell, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return cell -> ``column`` of its counted test episodes, [seeds, tasks]."""
    cells: dict[Cell, list[Evaluation]] = {}
    for evaluation in evaluations:
        cells.setdefault(evaluation.cell, []).append(evaluation)
    return {cell: _scores(members, "test", column) for cell, members in cells.items()}


def table_rows(evaluations: list[Evaluation], config: ReportConfig) -> list[Row]:
    """Return the table: one row per algorithm, training and test dataset, in the order of params.yaml."""
    cells: dict[Cell, list[Evaluation]] = {}
    for evaluation in evaluations:
        cells.setdefault(evaluation.cell, []).append(evaluation)
    score_of = {cell: _scores(members, "test", "return") for cell, members in cells.items()}
    rows = []
    for cell, members in cells.items():
        scores = score_of[cell]
        normalized = float(_scores(members, "test", "normalized").mean())
        rng = seeding.generator(0, "bootstrap", *cell)
        diagnostics = {}
        for key in ("esr", "rms", "embedding_variance", "context_shift", "context_shift_chance"):
            values = [m.diagnostics[key] for m in members if m.diagnostics.get(key) is not None]
            if values:
                diagnostics[key] = float(np.mean(values))
        diagnostics |= _further_diagnostics(members)
        restated = float(_scores(members, "test", "restated_return").mean())
        wrong = float(_scores(members, "test", "wrong_context_return").mean())
        told = float(_scores(members, "test", "offline_context_return").mean())
        rivals = [other for other in cells if other[1:] == cell[1:]]
        best = max(rivals, key=lambda other: score_of[other].mean())
        behind = wins = None
        if best != cell:
            rng_pair = seeding.generator(0, "compare", *cell)
            behind = compare(scores, score_of[best], config.bootstrap_samples, config.confidence, rng_pair)
            rng_pair = seeding.generator(0, "improvement", *cell)
            wins = improvement(scores, score_of[best], config.bootstrap_samples, config.confidence, rng_pair)
        rows.append(
            Row(
                cell,
                summarize(scores, config.bootstrap_samples, config.confidence, rng),
                None if math.isnan(normalized) else normalized,
                float(_scores(members, "train", "return").mean()),
                {m.seed: float(s.mean()) for m, s in zip(members, scores, strict=True)},
                diagnostics,
                quotes(config.tables, cell),
                None if math.isnan(restated) else restated,
                behind,
                len(rivals) - 1,
                wins,
                None if math.isnan(wrong) else wrong,
                None if math.isnan(told) else told,
            )
        )
    return rows


def _further_diagnostics(members: list[Evaluation]) -> dict[str, float]:
    """Return means over seeds of the attention's AUC and weights, Eq. 34's threshold, and the critics' course.

    ``q_mean_last`` and ``q_mean_largest`` tell divergence (FOCAL Figs 10, 11): a batch's mean Q value at the end,
    and its largest size ever, in units of the scaled reward. ``q_error_last`` is the root of the critics' last loss
    over that size: hundredths where they have learned, above 1 where they have not yet reached the returns of the data.
    """
    found: dict[str, list[float]] = {}
    for member in members:
        if attended := member.attention:
            for key, name in (("auc", "attention_auc"), ("rewarded", "weight_rewarded"),
                              ("unrewarded", "weight_unrewarded")):  # fmt: skip
                found.setdefault(name, []).append(attended[key])
        sparsity = member.diagnostics["sparsity"]
        if sparsity and sparsity["threshold"] is not None:
            found.setdefault("sparsity_threshold", []).append(sparsity["threshold"])
        if "q_mean" in member.curve:
            found.setdefault("q_mean_last", []).append(float(member.curve["q_mean"].iloc[-1]))
            largest = float(member.curve["q_mean"].abs().max())
            found.setdefault("q_mean_largest", []).append(largest)
            if "q_loss" in member.curve and largest:
                found.setdefault("q_error_last", []).append(math.sqrt(member.curve["q_loss"].iloc[-1]) / largest)
    return {name: float(np.mean(values)) for name, values in found.items()}


def unlearned(rows: list[Row]) -> str:
    """Return a sentence on models whose critics are still further from their targets than their values are large."""
    found = {row.cell[:2]: error for row in rows if (error := row.diagnostics.get("q_error_last", 0.0)) > 1}
    if not found:
        return ""
    names = ", ".join(f"{algorithm} on {train} ({error:.1f})" for (algorithm, train), error in found.items())
    return (
        f"Critics that have not learned: {names}; the root of their last loss is above their mean Q value "
        "(`q_error_last`), so their policies owe them nothing yet. A smaller `reward_scale`, a higher `critic_rate` or "
        "more steps help."
    )


def reference_rows(
    family: Family, tasks: list[dict[str, Any]], progress: dict[int, pd.DataFrame], single: str = "single-task SAC"
) -> dict[str, float]:
    """Return mean returns over the test tasks to compare with.

    ``oracle``, ``random`` and what else the family knows need no learning; ``single`` names the last checkpoint
    of each test task's own behavior policy, with mean actions.

    Args:
        family: environment.
        tasks: rows of data/tasks/all.json.
        progress: task -> learning curve of its behavior policy.
        single: what those policies are called.
    """
    test = [t for t in tasks if t["split"] == "test"]
    rows: dict[str, float] = {}
    if all(t["oracle_return"] is not None for t in test):
        rows["oracle"] = float(np.mean([t["oracle_return"] for t in test]))
    rows[single] = float(np.mean([progress[t["index"]]["return"].iloc[-1] for t in test]))
    others = [family.references(t["parameters"]) for t in test]
    for name in others[0]:
        rows[name] = float(np.mean([values[name] for values in others]))
    return rows | {"random": float(np.mean([t["random_return"] for t in test]))}


def behavior_rows(cards: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return dataset -> mean return of the behavior episodes in it, over the steps of a test episode."""
    rows = {}
    for name, card in cards.items():
        entries = [e for e in card["checkpoints"].values() if "return" in e]
        if entries:
            total = sum(e["episodes"] for e in entries)
            rows[name] = sum(e["return"]["mean"] * e["episodes"] for e in entries) / total
    return rows


def headline(row: Row) -> dict[str, Any]:
    """Return the five numbers that a row is compared by: return with its interval, normalized, scores behind it."""
    summary = row.summary
    numbers = {"mean": summary.mean, "low": summary.low, "high": summary.high, "n": summary.n}
    return numbers if row.normalized is None else numbers | {"normalized": row.normalized}


def by_name(values: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Return algorithm -> training dataset -> test dataset -> value."""
    nested: dict[str, Any] = {}
    for (algorithm, train, test), value in values.items():
        nested.setdefault(algorithm, {}).setdefault(train, {})[test] = value
    return nested


def metrics(rows: list[Row], references: dict[str, float]) -> dict[str, Any]:
    """Return metrics.json: algorithm -> train -> test -> headline numbers, and the references."""
    return by_name({row.cell: headline(row) for row in rows}) | {"reference": references}


def diagnostics(rows: list[Row]) -> dict[str, Any]:
    """Return diagnostics.json: algorithm -> train -> test -> what is told of a row beside its headline."""
    return by_name(
        {
            row.cell: {
                "iqm": row.summary.iqm,
                "seed_means": {str(seed): mean for seed, mean in row.seed_means.items()},
                "train_tasks_mean": row.train_tasks,
                **({} if row.restated is None else {"restated": row.restated}),
                **({} if row.wrong is None else {"wrong_context": row.wrong}),
                **({} if row.told is None else {"offline_context": row.told}),
                **({} if row.behind is None else {"behind_best": vars(row.behind)}),
                **({} if row.wins is None else {"beats_best": vars(row.wins)}),
                **row.diagnostics,
            }
            for row in rows
        }
    )


def metric_files(rows: list[Row], references: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return reports/metrics/: one small file per row of the table, which DVC shows as a line.

    A name holds the algorithm and the places of the two datasets in params.yaml (``focal-1-2``), not their names:
    after a swap, DVC finds the row again and compares.
    """
    trains, tests = (list(dict.fromkeys(row.cell[i] for row in rows)) for i in (1, 2))
    files = {}
    for row in rows:
        algorithm, train, test = row.cell
        name = f"{algorithm}-{trains.index(train) + 1}-{tests.index(test) + 1}"
        files[name] = {"trained_on": train, "context": test, **headline(row)}
    return files | {f"ref-{name.lower().replace(' ', '-')}": {"mean": mean} for name, mean in references.items()}


def drop(row: Row, rows: list[Row]) -> float | None:
    """Return return(A, A) - return(A, B) for a row (A, B), the papers' measure of distribution shift."""
    algorithm, train, test = row.cell
    for other in rows:
        if other.cell == (algorithm, train, train) and test != train:
            return other.summary.mean - row.summary.mean
    return None


def _further_columns(rows: list[Row], facts: dict[str, Any]) -> list[tuple[str, str, Callable[[Row], str]]]:
    """Return title, meaning and text of the columns of results.md that not every table has; those that this one has."""

    def number(name: str) -> Callable[[Row], str]:
        return lambda row: "" if (value := getattr(row, name)) is None else f"{value:.2f}"

    columns = [
        ("wrong context", "Wrong context: the same policies, told another unseen task.", number("wrong")),
        (
            "told offline",
            "Told offline: the same policies, given as many offline transitions of the task for their own.",
            number("told"),
        ),
        (
            "shift",
            "Shift: how far embeddings of own contexts lie from those of offline ones, where 1 is how far tasks are "
            "apart; in brackets what drawing other offline ones makes.",
            shift_text,
        ),
        ("behind the best", "Behind the best: paired over tasks; ~: not supported by these data.", behind_text),
        (f"as {facts['other_form']}", "", number("restated")),
    ]
    return [column for column in columns if any(column[2](row) for row in rows)]


def markdown(
    rows: list[Row],
    references: dict[str, float],
    behavior: dict[str, float],
    config: ReportConfig,
    facts: dict[str, Any],
) -> str:
    """Return results.md: the table a paper would print, with what has to be known to read it."""
    percent = f"{config.confidence:.0%}"
    further = _further_columns(rows, facts)
    titles = ["algorithm", "trained on", "test context", "return", "interval", "IQM", "normalized", "drop"]
    titles += [title for title, _, _ in further]
    compared = quantities(config)
    for quantity in compared:
        titles += ["published", "ours - published"] if quantity == "return" else [f"{quantity}, published", quantity]
    lines = [
        f"# {facts['title']}",
        "",
        f"{facts['returns'].capitalize()} return over {facts['horizon']} steps on {facts['test_tasks']} unseen tasks "
        f"of {facts['env']}, "
        f"{facts['seeds']} seed(s); protocol `{facts['protocol']}`. Interval: {percent} "
        "bootstrap over tasks and whole seeds." + (" Normalized: 0 random, 1 oracle." if "oracle" in references else "")
        + "".join(f" {meaning}" for _, meaning, _ in further if meaning),
        "",
        f"| {' | '.join(titles)} |",
        f"|---|---|---|---:|---|{'---:|' * (len(titles) - 5)}",
    ]  # fmt: skip
    for row in rows:
        shift = drop(row, rows)
        fields = [
            *row.cell, f"{row.summary.mean:.2f}", f"[{row.summary.low:.2f}, {row.summary.high:.2f}]",
            f"{row.summary.iqm:.2f}", "" if row.normalized is None else f"{row.normalized:.2f}",
            "" if shift is None else f"{shift:.2f}",
        ]  # fmt: skip
        fields += [text(row) for _, _, text in further]
        for quantity in compared:
            quoted, ours = row.quoted(quantity), row.own(quantity)
            several = sum(table.quantity == quantity for table in config.tables) > 1
            known = "; ".join(f"{quote.text} ({quote.labels})" if several else quote.text for quote in quoted)
            if quantity == "return":
                fields += [known, "; ".join(f"{row.summary.mean - quote.value:+.2f}" for quote in quoted)]
            else:
                fields += [known, "" if ours is None else f"{ours:.3f}"]
        lines.append(f"| {' | '.join(fields)} |")
    tail = " |" * (len(titles) - 4)
    for name, value in references.items():
        lines.append(f"| *{name}* | | | {value:.2f} |{tail}")
    for name, value in behavior.items():
        lines.append(f"| *behavior policies* | {name} | | {value:.2f} |{tail}")
    for table in config.tables:
        lines += ["", f"Published: {table.citation}. {table.note}"]
    if warning := unlearned(rows):
        lines += ["", f"**{warning}**"]
    return "\n".join(lines) + "\n"


def shift_text(row: Row) -> str:
    """Return the shift of the embeddings, with what chance makes; empty where there is none."""
    found = row.diagnostics
    if "context_shift" not in found:
        return ""
    return f"{found['context_shift']:.2f} ({found['context_shift_chance']:.2f})"


def quantities(config: ReportConfig) -> list[str]:
    """Return what the published tables give, each once: ``return`` and names of diagnostics."""
    return list(dict.fromkeys(table.quantity for table in config.tables))


def behind_text(row: Row) -> str:
    """Return the difference to the best algorithm with its interval, marked ~ where the data do not support it."""
    if row.behind is None:
        return "best" if row.rivals else ""
    mark = "" if row.behind.supported else " ~"
    return f"{row.behind.mean:.2f} [{row.behind.low:.2f}, {row.behind.high:.2f}]{mark}"
