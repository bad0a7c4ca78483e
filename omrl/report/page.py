"""The HTML page: one file that can be mailed; ``templates/`` beside this module holds its look.

Links lead to the CSV files in the same folder; nothing that the page shows is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from omrl.report import tables


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        name: file name in reports/figures without suffix.
        title: heading.
        caption: what to see in it.
        png: its bytes.
        csv: name of the file in reports/plots with its numbers; empty without one.
    """

    name: str
    title: str
    caption: str
    png: bytes
    csv: str = ""

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Field:
    """One field of a table on the page.

    Attributes:
        text: what stands in it.
        key: what it is sorted by: a number, or text; empty: always last.
        note: a second line, small.
        mark: CSS classes.
    """

    text: str = ""
    key: str = ""
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it means in a sentence, whether it holds text."""

    title: str
    meaning: str = ""
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted; ``references`` stay below."""

    columns: list[Column]
    rows: list[list[Field]]
    references: list[list[Field]]


def _table(
    columns: Sequence[Column], rows: Sequence[Sequence[Field]], references: Sequence[Sequence[Field]] = ()
) -> Table:
    """Return the table without the columns that hold nothing."""
    kept = [i for i in range(len(columns)) if any(row[i].text for row in [*rows, *references])]

    def cut(lines: Sequence[Sequence[Field]]) -> list[list[Field]]:
        return [[line[i] for i in kept] for line in lines]

    return Table([columns[i] for i in kept], cut(rows), cut(references))


def _text(value: str) -> Field:
    return Field(value, value, mark="t")


def _plain(value: float, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    return shown.lstrip("-") if not float(shown) else shown  # -0.00 is a rounding of nothing


def _number(value: float | None, note: str = "", mark: str = "", digits: int = 2) -> Field:
    if value is None or math.isnan(value):
        return Field()
    return Field(_plain(value, digits), f"{value:.9g}", note, mark)


def _between(low: float, high: float) -> str:
    return f"{_plain(low, 2)} to {_plain(high, 2)}"


def _behind(row: tables.Row) -> Field:
    if row.behind is None:
        return Field("best" if row.rivals else "", "0" if row.rivals else "")
    note = _between(row.behind.low, row.behind.high) + ("" if row.behind.supported else "\nnot told apart")
    return _number(row.behind.mean, note, "" if row.behind.supported else "unsure")


def _wins(row: tables.Row) -> Field:
    if row.wins is None:
        return Field()
    low, high = round(100 * row.wins.low), round(100 * row.wins.high)
    return Field(f"{100 * row.wins.mean:.0f} %", f"{row.wins.mean:.9g}", f"{low} to {high} %")


def _shift(row: tables.Row) -> Field:
    chance = row.diagnostics.get("context_shift_chance")
    return _number(row.diagnostics.get("context_shift"), "" if chance is None else _plain(chance, 2))


def _published(row: tables.Row, quantity: str) -> list[Field]:
    """Return what was published, with its source, and ours minus it (or our own value of the same quantity)."""
    quoted = row.quoted(quantity)
    if not quoted:
        return [Field(), Field()]
    text = "; ".join(quote.text.replace(" ", "\u00a0") for quote in quoted)
    known = Field(text, f"{quoted[0].value:.9g}", "; ".join(quote.labels for quote in quoted))
    if quantity != "return":
        return [known, _number(row.own(quantity), digits=3)]
    differences = [row.summary.mean - quote.value for quote in quoted]
    return [
        known,
        Field(
            "; ".join(f"{difference:+.2f}" for difference in differences),
            f"{differences[0]:.9g}",
            mark="up" if min(differences) >= 0 else "down",
        ),
    ]


_CELL = [
    Column("algorithm", "name in params.yaml; its code and settings are there", True),
    Column("trained on", "dataset of meta-training", True),
    Column("test context", "dataset from which an unseen task is told", True),
]


def results_tables(
    rows: Sequence[tables.Row],
    references: Mapping[str, float],
    behavior: Mapping[str, float],
    confidence: str,
    compared: Sequence[str],
    facts: Mapping[str, Any],
) -> tuple[Table, Table]:
    """Return the table of results and the one with more about each row, without empty columns.

    ``compared`` names what papers published of the rows: ``return``, or diagnostics.
    """
    of_papers = []
    for quantity in compared:
        if quantity == "return":
            of_papers += [Column("published", "mean, and standard deviation where the paper gives one; its source"),
                          Column("ours − published", "difference of the means")]  # fmt: skip
        else:
            of_papers += [Column(f"{quantity.upper()}, published"), Column(f"{quantity.upper()}, ours")]
    columns = [
        *_CELL,
        Column(
            "return",
            f"{facts['returns']} return over {facts['horizon']} steps on unseen tasks, mean over seeds, tasks and "
            f"repetitions; below it the {confidence} bootstrap interval over tasks and whole seeds",
        ),
        Column("normalized", "0 is what random actions collect, 1 what the oracle does"),
        Column(
            "behind the best",
            "difference to the best algorithm on the same datasets, with its interval, paired over tasks. This, and "
            "not whether two intervals overlap, says if two algorithms differ; 'not told apart': it may be 0",
        ),
        Column(
            "beats the best",
            "chance that a run does better than a run of that best algorithm on the same task; 50 % is a coin toss",
        ),
        *of_papers,
    ]
    body = [
        [
            *map(_text, row.cell),
            _number(row.summary.mean, _between(row.summary.low, row.summary.high), "strong"),
            _number(row.normalized),
            _behind(row),
            _wins(row),
            *(field for quantity in compared for field in _published(row, quantity)),
        ]
        for row in rows
    ]
    behind_them = [Field()] * (len(columns) - 4)
    lower = [[_text(name), Field(), Field(), _number(value), *behind_them] for name, value in references.items()]
    lower += [
        [_text("behavior policies"), _text(name), Field(), _number(value), *behind_them]
        for name, value in behavior.items()
    ]
    return _table(columns, body, lower), _further(rows, facts)


def _further(rows: Sequence[tables.Row], facts: Mapping[str, Any]) -> Table:
    """Return the table with more about each row."""
    columns = [
        *(Column(column.title, text=True) for column in _CELL),
        Column("IQM", "interquartile mean: without the lowest and the highest quarter of the runs"),
        Column("training tasks", "return on the tasks of meta-training"),
        Column(
            "wrong context",
            "return of the same policies where they are told another unseen task; a method that uses its context falls",
        ),
        Column(
            "told offline",
            "return of the same policies where as many offline transitions of the task stand for those that the agent "
            "collected; well above the return: the shift between the two hurts",
        ),
        Column(
            "shift",
            "how far embeddings of contexts that the agent collected lie from those of offline contexts of the same "
            "size, on unseen tasks; at 1 a task's own are as far off as other tasks. Below it what drawing other "
            "offline contexts makes",
        ),
        Column("drop", "return with matching test context minus this one: the price of a shift in the context"),
        Column(f"as {facts['other_form']}", "return of the same episodes under the other form of the sparse reward"),
        Column("ESR", "share of pairs of training tasks whose embeddings are told apart (FOCAL, Table 1)"),
        Column("RMS", "mean distance between the embeddings of training tasks (FOCAL, Table 1)"),
        Column("attention AUC", "chance that a rewarded transition outweighs an unrewarded one"),
    ]
    body = [
        [
            *map(_text, row.cell),
            _number(row.summary.iqm),
            _number(row.train_tasks),
            _number(row.wrong),
            _number(row.told),
            _shift(row),
            _number(tables.drop(row, list(rows))),
            _number(row.restated),
            _number(row.diagnostics.get("esr")),
            _number(row.diagnostics.get("rms")),
            _number(row.diagnostics.get("attention_auc")),
        ]
        for row in rows
    ]
    return _table(columns, body)


def verdict(rows: Sequence[tables.Row]) -> str:
    """Return a sentence on what the paired differences to the best algorithm support; empty without rivals."""
    best = max(rows, key=lambda row: row.summary.mean)
    rivals = [row for row in rows if row.behind is not None and row.cell[1:] == best.cell[1:]]
    if not rivals:
        return ""
    worse = [row.cell[0] for row in rivals if row.behind is not None and row.behind.supported]
    near = [row.cell[0] for row in rivals if row.behind is not None and not row.behind.supported]
    said = [f"{', '.join(worse)} {'is' if len(worse) == 1 else 'are'} worse on the same tasks"] if worse else []
    said += (
        [f"{', '.join(near)} {'is' if len(near) == 1 else 'are'} not told apart from it by these data"] if near else []
    )
    return f" Of the others on the same data, {'; '.join(said)}."


def datasets_table(
    cards: Mapping[str, Mapping[str, Any]], definitions: Mapping[str, str], behavior: Mapping[str, float]
) -> Table:
    """Return the table of datasets."""
    columns = [
        Column("dataset", "", True),
        Column("definition", "which checkpoints' episodes it was cut from, or what was relabelled", True),
        Column("transitions"),
        Column("episodes"),
        Column("behavior return", "mean return of the behavior policies' episodes in it, sampled actions, all tasks"),
        Column("with sparse reward", "share of transitions with a sparse reward other than 0"),
        Column("dense reward", "mean over transitions"),
    ]
    rows = [
        [
            _text(name),
            _text(definitions[name]),
            Field(f"{card['rows']:,}", str(card["rows"])),
            Field(f"{card['episodes']:,}", str(card["episodes"])) if card["episodes"] else Field(),
            _number(behavior.get(name)),
            Field(f"{100 * card['nonsparse_share']:.1f} %", str(card["nonsparse_share"])),
            _number(card["reward"]["mean"], digits=3),
        ]
        for name, card in cards.items()
    ]
    return _table(columns, rows)


def chain_table(links: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of hashes, one row per evaluated model."""
    columns = [
        *(Column(column.title, text=True) for column in _CELL),
        Column("seed"),
        Column("return", "mean over the unseen tasks"),
        Column("evaluation", "this and the next two: first digits of the SHA-256 of the folder's manifest", True),
        Column("model", "", True),
        Column("training data", "", True),
    ]
    rows = [
        [
            *(_text(link[key]) for key in ("algorithm", "train", "test")),
            Field(str(link["seed"]), str(link["seed"])),
            _number(link["mean"]),
            *(_text(link[key][:12]) for key in ("evaluation", "model", "data")),
        ]
        for link in links
    ]
    return _table(columns, rows)


def commands(cell: Sequence[str]) -> str:
    """Return the commands that audit a row, aligned."""
    lines = {
        f"omrl lineage {'/'.join(cell)}": "a number of this table",
        f"omrl lineage data/datasets/{cell[2]}/task=000.parquet:0": "one transition",
        "omrl verify": "every file and cache object against dvc.lock",
    }
    width = max(map(len, lines))
    return "\n".join(f"{line:<{width}}  # {meaning}" for line, meaning in lines.items())


def render(**values: Any) -> str:
    """Return index.html; ``values`` are what ``templates/page.html`` names."""
    loader = PackageLoader("omrl.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(**values).lstrip()
