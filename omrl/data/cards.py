"""Dataset cards: what is in a dataset, small enough to read and to diff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omrl.core.errors import UserError, printable, shown
from omrl.core.files import read_input
from omrl.data.parquet import read_footer, read_table
from omrl.data.schema import Columns, check, from_table

_QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
_BINS = 30


class CardBuilder:
    """Collects a card file by file."""

    def __init__(self, name: str, kind: str, definition: Mapping[str, Any]) -> None:
        self._head = {"name": name, "kind": kind, "definition": dict(definition)}
        self._rows = 0
        self._nonsparse = 0
        self._tasks = 0
        self._reward: list[tuple[float, float, float]] = []
        # per checkpoint: rows, episode returns, normalized returns
        self._checkpoints: dict[int, tuple[int, list[float], list[float]]] = {}

    def add(self, columns: Columns, episodes: Sequence[tuple[int, float, float]] = ()) -> None:
        """Count one task's rows.

        Args:
            columns: its transitions.
            episodes: (checkpoint, return, normalized return) of every episode with rows in it.
        """
        rows = len(columns["task"])
        self._rows += rows
        self._tasks += 1
        self._nonsparse += int((columns["sparse_reward"] != 0).sum())
        reward = columns["reward"].astype(np.float64)
        self._reward.append((float(reward.min()), float(reward.mean()), float(reward.max())))
        for step, count in zip(*np.unique(columns["checkpoint"], return_counts=True), strict=True):
            have = self._checkpoints.get(int(step), (0, [], []))
            self._checkpoints[int(step)] = (have[0] + int(count), have[1], have[2])
        for step, value, normalized in episodes:
            self._checkpoints[step][1].append(value)
            self._checkpoints[step][2].append(normalized)

    def card(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Return the card; ``files`` is name -> SHA-256."""
        checkpoints = {}
        everything: list[float] = []
        scale: list[float] = []
        for step in sorted(self._checkpoints):
            rows, returns, normalized = self._checkpoints[step]
            entry: dict[str, Any] = {"rows": rows, "episodes": len(returns)}
            if returns:
                values = np.array(returns)
                entry["return"] = {key: float(np.quantile(values, q)) for key, q in _QUANTILES.items()}
                entry["return"]["mean"] = float(values.mean())
                entry["normalized_mean"] = float(np.mean(normalized))
            checkpoints[str(step)] = entry
            everything += returns
            scale += normalized
        histogram = None
        if everything:
            counts, edges = np.histogram(everything, bins=_BINS)
            histogram = {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]}
        low, mean, high = (np.array(part) for part in zip(*self._reward, strict=True))
        return {
            **self._head,
            "rows": self._rows,
            "tasks": self._tasks,
            "rows_per_task": self._rows // self._tasks,
            "episodes": len(everything),
            "normalized_return": float(np.mean(scale)) if scale else None,
            "checkpoints": checkpoints,
            "nonsparse_share": self._nonsparse / self._rows,
            "reward": {"min": float(low.min()), "mean": float(mean.mean()), "max": float(high.max())},
            "return_histogram": histogram,
            "files": dict(files),
        }


def describe(path: str | Path) -> str:
    """Return a text about a dataset folder (its card) or about one Parquet file of transitions.

    Raises:
        UserError: it is neither, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "card.json").is_file():
            raise UserError(
                f"{path}: no card.json in it; expected a folder like data/datasets/expert, or a Parquet file"
            )
        try:
            return _describe_card(read_input(path / "card.json"))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise UserError(
                f"{path / 'card.json'}: damaged, not a dataset's card; restore it with 'dvc checkout'"
            ) from None
    if path.suffix != ".parquet":
        raise UserError(f"{path}: expected a dataset folder or a .parquet file")
    return _describe_file(path)


def _describe_card(card: Mapping[str, Any]) -> str:
    given = {k: v for k, v in card["definition"].items() if v is not None and v is not False and v != {}}
    definition = ", ".join(f"{key}: {value}" for key, value in given.items())
    own = card["normalized_return"]
    kind = card["kind"] if own is None else f"{card['kind']}, normalized return {own:.2f}"
    episodes = f"{card['episodes']:,} episodes, " if own is not None else ""
    lines = [
        f"{card['name']} ({kind}): {definition}",
        f"{card['rows']:,} transitions, {card['tasks']} tasks of {card['rows_per_task']:,}, "
        f"{episodes}{card['nonsparse_share']:.1%} with a sparse reward",
        "dense reward: min {min:.3f}, mean {mean:.3f}, max {max:.3f}".format(**card["reward"]),
    ]
    head = f"{'step':>8} {'rows':>9}"
    if own is not None:
        head += f" {'episodes':>8} {'mean':>9} {'q25':>9} {'median':>9} {'q75':>9} {'normal.':>8}"
    lines.append(head)
    for step, entry in sorted(card["checkpoints"].items(), key=lambda item: int(item[0])):
        line = f"{step:>8} {entry['rows']:>9,}"
        if "return" in entry:
            line += f" {entry['episodes']:>8,}"
            values = entry["return"]
            line += "".join(f" {values[key]:>9.3f}" for key in ("mean", "q25", "median", "q75"))
            line += f" {entry['normalized_mean']:>8.3f}"
        lines.append(line)
    return "\n".join(map(printable, lines))


def _describe_file(path: Path) -> str:
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        raise UserError(f"{path}: not a file; expected a Parquet file")
    footer, table = read_footer(path), read_table(path)
    try:
        check(table.schema)
        ours = not any(column.null_count for column in table.columns)
    except ValueError:
        ours = False
    if not ours or not table.num_rows:
        names = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        return printable(f"{path}: {table.num_rows:,} rows of {names or 'no columns'}")
    columns = from_table(table)
    environment = footer.get("environment")
    family = environment.get("family") if isinstance(environment, dict) else None
    lines = [
        f"{path}: {len(columns['task']):,} transitions of task {int(columns['task'][0])} in "
        f"{shown(family or 'an unnamed environment', quote=False)}",
        f"task parameters: {shown(footer.get('task'), 2000)}",
        f"source tasks: {len(np.unique(columns['source_task']))}, checkpoints: "
        f"{', '.join(map(str, np.unique(columns['checkpoint'])))}",
    ]
    for name in ("observation", "action", "reward", "sparse_reward", "next_observation"):
        values = columns[name]
        extent = f", {values.min():.4g} .. {values.max():.4g}" if values.size else ""
        lines.append(f"{name}: {values.dtype}{list(values.shape)}{extent}")
    lines.append(
        f"non-sparse: {(columns['sparse_reward'] != 0).mean():.1%}, truncated: {int(columns['truncated'].sum())}"
    )
    return "\n".join(map(printable, lines))
