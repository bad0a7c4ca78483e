"""DVC's experiments as a table that fits a screen: one column each, one row per changed param and per result.

``dvc exp show`` has a column for every param, dependency and metric, 129 for the default pipeline, and nothing in DVC's
configuration makes them fewer. Its numbers are taken from there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from omrl.core.errors import UserError, for_terminal
from omrl.report.collect import aligned

_WIDEST = 40  # letters of a value
METRICS = "reports/metrics"


def experiments(folder: Path, commits: int = 1) -> str:
    """Return the table of the workspace, the last ``commits`` and the experiments that began at them.

    Raises:
        UserError: DVC cannot show them, as where there is no git repository.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", "--num", str(commits)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        return as_text(json.loads(done.stdout))
    except ValueError:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = said[0].removeprefix("ERROR: ") if said else f"it ended with {done.returncode}"
        raise UserError(f"{folder}: 'dvc exp show' says nothing: {for_terminal(reason)}") from None


def as_text(shown: list[dict[str, Any]]) -> str:
    """Return the table of what ``dvc exp show --json`` prints."""
    titles, params, results = ["params and results"], [], []
    for title, data in _columns(shown):
        titles.append(title)
        params.append({k: v for entry in data["params"].values() for k, v in _flat(entry.get("data") or {})})
        metrics = {PurePosixPath(path).stem: entry.get("data") or {} for path, entry in data["metrics"].items()}
        results.append({name: _result(values) for name, values in metrics.items()})
    rows = [titles]
    for values, changed in ((params, True), (results, False)):
        for name in dict.fromkeys(name for column in values for name in column):
            found = [column.get(name, "-") for column in values]
            if not changed or len(set(found)) > 1:
                rows.append([name, *found])
    if not any(results):
        rows.append([f"no {METRICS} yet", *["-" for _ in results]])
    return for_terminal("\n".join(aligned(rows, left=len(titles))))


def _columns(shown: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for state in shown:
        if state.get("data"):
            yield state["name"] or state["rev"][:9], state["data"]
        for experiment in state.get("experiments") or ():
            for last in (experiment.get("revs") or ())[:1]:
                if last.get("data"):
                    yield last["name"] or last["rev"][:7], last["data"]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False).replace('"', "")
            yield f"{above}{key}", text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _result(values: Mapping[str, Any]) -> str:
    mean, dataset = values.get("mean"), values.get("trained_on")
    number = f"{mean:.2f}" if isinstance(mean, int | float) else "-"
    return f"{number} on {dataset}" if dataset else number
