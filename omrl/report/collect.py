"""What reports say, gathered: one row per line of a pipeline's table, ours beside published."""

from __future__ import annotations

import io
import json
import math
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from omrl.core.errors import UserError
from omrl.core.yamlfile import Loader
from omrl.report.published import TABLES, Published, Quote, quotes
from omrl.report.tables import Cell

_COLUMNS = ["algorithm", "train_dataset", "test_dataset", "seed", "task", "episode", "return"]
_PROTOCOL = "offline-context"  # where params.yaml names none


@dataclass(frozen=True)
class Line:
    """One line of the table over all results.

    Attributes:
        cell: algorithm, training dataset, test dataset.
        mean, low, high: our return on unseen tasks and its interval.
        normalized: 0 random, 1 oracle; None where no oracle is known.
        n: scores behind it, tasks times seeds.
        published: what was published of it, each with our value of the same quantity.
    """

    cell: Cell
    mean: float
    low: float
    high: float
    normalized: float | None
    n: int
    published: tuple[tuple[float, Quote], ...]


class Result:
    """A report of one pipeline: in its folder, or as a git revision has it.

    Args:
        folder: the pipeline's.
        revision: of git; None for the files that are there.

    Raises:
        UserError: there is no report, or it is damaged; git knows no such revision.
    """

    def __init__(self, folder: Path, revision: str | None = None) -> None:
        self.folder, self.revision = folder, revision
        own = not (folder / "pipelines").is_dir()  # else it is the repository's default, in its root
        name = folder.resolve().name if own else "default"
        self.name = name if revision is None else f"{name}@{revision}"
        self.frame = self._csv("reports/results.csv")
        params = self._parse("params.yaml", lambda text: yaml.load(text, Loader=Loader))
        try:
            self.env = str(params["env"])
            self.protocol = str((params.get("evaluate") or {}).get("protocol", _PROTOCOL))
            named = (params.get("report") or {}).get("published") or []
            self.tables = [TABLES[name] for name in ([named] if isinstance(named, str) else named) if name in TABLES]
            self.confidence = float((params.get("report") or {}).get("confidence", 0.95))
            #: what the test tasks are; two results with the same can be compared task by task
            tasks = params.get("tasks") or {}
            self.tasks = [params["env"], params.get("env_config") or {}, tasks.get("seed", 1337)]
            self._first = int(tasks.get("train", 0))  # index of test task 0
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{self._where('params.yaml')}: damaged; 'omrl check' says what is wrong") from None

    def _where(self, path: str) -> str:
        return str(self.folder / path) if self.revision is None else f"{self.revision}:{self.folder / path}"

    def _text(self, path: str) -> str:
        if self.revision is None:
            try:
                return (self.folder / path).read_text(encoding="utf-8")
            except (FileNotFoundError, NotADirectoryError):
                raise UserError(f"{self.folder / path}: missing; run 'omrl repro' to build it") from None
            except UnicodeDecodeError:
                raise UserError(f"{self.folder / path}: damaged, expected UTF-8 text") from None
        done = subprocess.run(
            ["git", "show", f"{self.revision}:./{path}"], cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise UserError(f"{self._where(path)}: not in that revision")
        return done.stdout

    def _parse(self, path: str, parse: Any) -> Any:
        text = self._text(path)
        try:
            return parse(text)
        except (ValueError, yaml.YAMLError):
            raise UserError(f"{self._where(path)}: damaged; restore it with 'git checkout'") from None

    def _csv(self, path: str) -> pd.DataFrame:
        frame = self._parse(path, lambda text: pd.read_csv(io.StringIO(text)))
        if missing := [name for name in _COLUMNS if name not in frame]:
            raise UserError(f"{self._where(path)}: expected a column '{missing[0]}'")
        return frame

    @property
    def cells(self) -> list[Cell]:
        """The table's rows, in its order."""
        keys = self.frame[["algorithm", "train_dataset", "test_dataset"]].drop_duplicates()
        return [(str(a), str(b), str(c)) for a, b, c in keys.itertuples(index=False)]

    def places(self) -> dict[Cell, tuple[str, int, int]]:
        """Return cell -> algorithm and the places of its two datasets, which a swap of a dataset leaves as they are."""
        trains, tests = (list(dict.fromkeys(cell[i] for cell in self.cells)) for i in (1, 2))
        return {cell: (cell[0], trains.index(cell[1]), tests.index(cell[2])) for cell in self.cells}

    def scores(self, cell: Cell) -> tuple[NDArray[np.float64], list[int]]:
        """Return mean returns [seeds, tasks] of a cell, and which test tasks: how many train moves none of them."""
        frame = self.frame
        chosen = frame[
            (frame.algorithm == cell[0]) & (frame.train_dataset == cell[1]) & (frame.test_dataset == cell[2])
        ]
        table = chosen.pivot_table(index="seed", columns="task", values="return", aggfunc="mean", sort=True)
        return table.to_numpy(dtype=np.float64), [int(task) - self._first for task in table.columns]

    @cached_property
    def _diagnostics(self) -> Any:
        return self._parse("reports/diagnostics.json", json.loads)

    def lines(self) -> list[Line]:
        """Return the rows of the table with what was published of them."""
        metrics = self._parse("reports/metrics.json", json.loads)
        lines = []
        for cell in self.cells:
            try:
                found = metrics[cell[0]][cell[1]][cell[2]]
                mean, low, high, n = (found[key] for key in ("mean", "low", "high", "n"))
            except (KeyError, TypeError):
                raise UserError(
                    f"{self._where('reports/metrics.json')}: no row {'/'.join(cell)}; run 'omrl repro'"
                ) from None
            published = tuple(
                (mean if quote.quantity == "return" else self._diagnostic(cell, quote.quantity), quote)
                for quote in quotes(self.tables, cell)
            )
            lines.append(Line(cell, mean, low, high, found.get("normalized"), n, published))
        return lines

    def _diagnostic(self, cell: Cell, name: str) -> float:
        try:
            return float(self._diagnostics[cell[0]][cell[1]][cell[2]].get(name, math.nan))
        except (KeyError, TypeError, AttributeError, ValueError):
            return math.nan


def all_results(folders: list[Path]) -> list[Result]:
    """Return the results of those of ``folders`` that have a report."""
    return [Result(folder) for folder in folders if (folder / "reports/results.csv").is_file()]


def _published(line: Line) -> tuple[str, str]:
    """Return what was published, beside our value where it is no return, and ours minus it, as text."""
    known, differences = [], []
    for ours, quote in line.published:
        other = quote.quantity != "return"
        known.append(f"{quote.quantity} {ours:.3f} / {quote.text}" if other else quote.text)
        differences.append(f"{ours - quote.value:+.{3 if other else 2}f}")
    return "; ".join(known), "; ".join(differences)


def _sources(tables: Iterable[Published]) -> str:
    return "; ".join(dict.fromkeys(table.citation for table in tables))


def as_text(results: list[Result]) -> str:
    """Return one block per pipeline for a terminal: what it is, then its rows."""
    blocks = []
    for result in results:
        source = f"; published: {_sources(result.tables)}" if result.tables else ""
        rows = [["algorithm", "trained on", "context", "return", "interval", "n", "normal.", "published", "ours - p."]]
        for line in result.lines():
            published, difference = _published(line)
            normalized = "" if line.normalized is None else f"{line.normalized:.2f}"
            rows.append([*line.cell, f"{line.mean:.2f}", f"[{line.low:.2f}, {line.high:.2f}]", str(line.n),
                         normalized, published, difference])  # fmt: skip
        blocks.append("\n".join([f"{result.name}: {result.env}, {result.protocol}{source}", *aligned(rows)]))
    return "\n\n".join(blocks)


def aligned(rows: list[list[str]], left: int = 3) -> list[str]:
    """Return ``rows`` of texts as lines with aligned columns; the first ``left`` columns to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    used = [i for i, width in enumerate(widths) if any(row[i] for row in rows[1:]) or len(rows) == 1]
    return [
        "  ".join(row[i].ljust(widths[i]) if i < left else row[i].rjust(widths[i]) for i in used).rstrip()
        for row in rows
    ]


def as_page(results: list[Result]) -> str:
    """Return ``as_markdown`` under a heading that says what it is."""
    return (
        "# Results, ours beside published\n\nThis page is generated: `omrl results --all --markdown docs/results.md`. "
        "Every row is a cell of a committed report; n is seeds times unseen tasks, and the interval is the report's. "
        f"The README says which tables were made by earlier code.\n\n{as_markdown(results)}"
    )


def as_markdown(results: list[Result]) -> str:
    """Return one Markdown table over everything, each row with its protocol and source."""
    titles = ["pipeline", "environment", "algorithm", "trained on", "test context", "protocol", "return", "interval",
              "n", "normalized", "published", "ours - published", "source"]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|---:|---|---:|---:|---:|---:|---|"]
    for result in results:
        for line in result.lines():
            published, difference = _published(line)
            fields = [
                result.name, result.env, *line.cell, result.protocol, f"{line.mean:.2f}",
                f"[{line.low:.2f}, {line.high:.2f}]", str(line.n),
                "" if line.normalized is None else f"{line.normalized:.2f}",
                published, difference, _sources(source for _, quote in line.published for source in quote.sources),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines) + "\n"
