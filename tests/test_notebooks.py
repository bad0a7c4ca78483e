"""The notebooks of docs/notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from toy import write_pipeline

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_ends_with_numbers(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMRL_DATA", str(write_pipeline(tmp_path)))
    monkeypatch.setenv("OMRL_STEPS", "60")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    ran = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(str(out) for cell in ran.cells for out in cell.get("outputs", []))
    assert "test" in shown
    assert "train" in shown


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["a-method-of-ones-own", "from-data-to-result"]
