"""From rollouts to datasets: quality levels and relabelled sets, with their cards and manifests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omrl.behavior.rollouts import EPISODES
from omrl.core import layout
from omrl.core.files import atomic_dir, input_hashes, read_input, read_manifest, sha256, write_json, write_manifest
from omrl.core.progress import Progress
from omrl.data import quality, relabel
from omrl.data.cards import CardBuilder
from omrl.data.parquet import (
    read_footer,
    read_rows,
    read_table,
    read_transitions,
    verified,
    write_transitions,
)
from omrl.data.schema import KEY, Columns, from_table
from omrl.envs.base import Family

CARD = "card.json"


def task_file(task: int) -> str:
    """Return the file name of a task's transitions: ``task=003.parquet``."""
    return f"task={task:03d}.parquet"


def _episode_returns(episodes: Columns, columns: Columns) -> list[tuple[int, float]]:
    """Return (checkpoint, return) of the episodes that have rows in ``columns``."""
    present = np.unique(np.stack([columns["checkpoint"], columns["episode"]], axis=1), axis=0)
    table = {
        (int(c), int(e)): float(r)
        for c, e, r in zip(episodes["checkpoint"], episodes["episode"], episodes["return"], strict=True)
    }
    return [(int(c), table[int(c), int(e)]) for c, e in present]


def build_level(
    *,
    name: str,
    level: quality.LevelConfig,
    rows: int,
    family: Family,
    seed: int,
    shards: dict[str, list[int]],
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Cut one quality level from the rollouts of all shards.

    Args:
        name: of the level.
        level: its definition.
        rows: transitions per task.
        family: environment.
        seed: root seed.
        shards: name -> [first, last] task.
        code: fingerprint files this depends on.
        target: ``data/datasets/<name>``.

    Raises:
        UserError: the rollouts cannot give this level, or a file is damaged.
    """
    rows_of = {row["index"]: row for row in read_input(layout.TASKS)["tasks"]}
    sources = [layout.rollouts(shard) for shard in shards]
    card = CardBuilder(name, "level", level.resolved())
    with atomic_dir(target) as folder, Progress(len(rows_of), f"dataset {name}", "tasks") as progress:
        for shard, (first, last) in shards.items():
            source = layout.rollouts(shard)
            names = [task_file(task) for task in range(first, last + 1)]
            paths = verified(source, [*names, EPISODES])
            episodes = from_table(read_table(paths[-1]))
            for task, path in zip(range(first, last + 1), paths, strict=False):
                own = {key: values[episodes["task"] == task] for key, values in episodes.items()}
                rng = quality.level_stream(seed, family.name, level.brief(), task)
                columns, footer, returns = _cut(name, level, rows, family, rows_of[task], path, own, rng)
                write_transitions(folder / task_file(task), columns, footer)
                card.add(columns, returns)
                progress.advance()
        _publish(
            folder,
            kind="dataset",
            inputs=input_hashes(layout.TASKS, *sources, *code),
            parameters={"name": name, "level": level.resolved(), "transitions_per_task": rows, "seed": seed},
            tasks=sorted(rows_of),
            rows=rows,
            card=card,
        )


def _cut(
    name: str,
    level: quality.LevelConfig,
    rows: int,
    family: Family,
    task: dict[str, Any],
    path: Path,
    episodes: Columns,
    rng: np.random.Generator,
) -> tuple[Columns, dict[str, Any], list[tuple[int, float, float]]]:
    """Return a task's rows of a level, their footer, and (checkpoint, return, normalized return) of their episodes.

    ``task`` is its row of data/tasks/all.json, ``path`` its transitions, ``episodes`` its episode table.
    """
    means = _mean_returns(episodes)
    best = max(means.values())  # the top of the scale where the oracle's return is not known
    normalized = {step: float(family.normalize(task, mean, best)) for step, mean in means.items()}
    checkpoints = quality.choose_checkpoints(name, level, task["index"], normalized)
    known = read_transitions(path, [*KEY, "deterministic"])  # which rows; then only those are kept
    known["row"] = np.arange(len(known["step"]))
    what = f"level '{name}' of task {task['index']}"
    columns = read_rows(path, quality.select(known, checkpoints, rows, level, rng, what)["row"])
    footer = {key: value for key, value in read_footer(path).items() if key != "schema_version"}
    footer["parameters"] = {**footer["parameters"], "level": name, "definition": level.resolved()}
    footer["checkpoints"] = {str(step): footer["checkpoints"][str(step)] for step in checkpoints}
    returns = [
        (step, value, float(family.normalize(task, value, best))) for step, value in _episode_returns(episodes, columns)
    ]
    return columns, footer, returns


def _mean_returns(episodes: Columns) -> dict[int, float]:
    """Return checkpoint -> mean return of its episodes with sampled actions."""
    sampled = ~episodes["deterministic"]
    steps: NDArray[np.int32] = np.unique(episodes["checkpoint"])
    return {int(step): float(episodes["return"][sampled & (episodes["checkpoint"] == step)].mean()) for step in steps}


def build_relabelled(
    *,
    name: str,
    config: relabel.RelabelConfig,
    rows: int,
    family: Family,
    seed: int,
    code: Sequence[str | Path],
    target: str | Path,
) -> None:
    """Build one relabelled set from a quality level.

    Args:
        name: of the set.
        config: its definition.
        rows: transitions per task.
        family: environment; what the set defines replaces parts of its configuration.
        seed: root seed.
        code: fingerprint files this depends on.
        target: ``data/datasets/<name>``.

    Raises:
        UserError: tasks differ in their dynamics, the source is too small or damaged.
    """
    own = family.relabelled(config.env_config, f"params.yaml: relabel.{name}")
    tasks = read_input(layout.TASKS)["tasks"]
    merged, checkpoints = _merged(config, rows, family, seed, tasks)
    card = CardBuilder(name, "relabelled", config.resolved())
    with atomic_dir(target) as folder, Progress(len(tasks), f"relabel {name}", "tasks") as progress:
        for t in tasks:
            columns = relabel.relabel_rows(merged, t["index"], t["parameters"], own.reward)
            footer = {
                "environment": own.spec(),
                "task": t["parameters"],
                "checkpoints_of_source_tasks": checkpoints,
                "parameters": {"relabel": config.resolved(), "seed": seed},
            }
            write_transitions(folder / task_file(t["index"]), columns, footer)
            card.add(columns)
            progress.advance()
        _publish(
            folder,
            kind="relabelled",
            inputs=input_hashes(layout.TASKS, layout.datasets(config.source), *code),
            parameters={
                "name": name,
                "relabel": config.resolved(),
                "transitions_per_task": rows,
                "seed": seed,
            },
            tasks=[t["index"] for t in tasks],
            rows=rows,
            card=card,
        )


def _merged(
    config: relabel.RelabelConfig, rows: int, family: Family, seed: int, tasks: list[dict[str, Any]]
) -> tuple[Columns, dict[str, dict[str, str]]]:
    """Return the merged transitions of a set, and source task -> checkpoint -> hash."""
    sources = [t["index"] for t in tasks if config.tasks == "all" or t["split"] == "train"]
    folder = layout.datasets(config.source)
    paths = verified(folder, [task_file(task) for task in sources])
    files = read_manifest(folder)["files"]
    merged = relabel.merge(
        sources,
        [files[path.name]["rows"] for path in paths],
        (read_transitions(path) for path in paths),  # one at a time in memory
        rows,
        relabel.merge_stream(seed, family.name),
        config.unit,
    )
    return merged, {str(task): read_footer(path)["checkpoints"] for task, path in zip(sources, paths, strict=True)}


def _publish(
    folder: Path,
    *,
    kind: str,
    inputs: dict[str, str],
    parameters: dict[str, Any],
    tasks: list[int],
    rows: int,
    card: CardBuilder,
) -> None:
    write_json(folder / CARD, card.card({task_file(t): sha256(folder / task_file(t)) for t in tasks}))
    write_manifest(
        folder,
        kind=kind,
        inputs=inputs,
        parameters=parameters,
        files={CARD: None, **{task_file(t): rows for t in tasks}},
    )
