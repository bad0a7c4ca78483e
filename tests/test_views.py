"""What a person looks at: DVC's own views on a screen, ``omrl results``, ``compare`` and ``data``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from conftest import ROOT, Project

from omrl.core.errors import UserError, explain
from omrl.core.files import write_json, write_manifest, write_text
from omrl.data.parquet import write_table, write_transitions
from omrl.data.schema import TYPES, VECTORS
from omrl.provenance.lockfile import Pipeline
from omrl.report import collect, comparison, experiments, folders
from omrl.scaffold.seeds import write_seeds

WIDTH, HEIGHT = 120, 50  # of a screen


def report(
    folder: Path,
    returns: dict[tuple[str, str], float],
    tasks: range = range(4, 10),
    context: str = "expert",
    **params: object,
) -> Path:
    """Write a small pipeline's params and reports; a task's own difficulty is 3 times its index."""
    values = {"env": "point-robot", "tasks": {"seed": 7}, "evaluate": {"protocol": "ood-checkpoint"}}
    values |= {key.rstrip("_"): value for key, value in params.items()}
    write_text(folder / "params.yaml", yaml.safe_dump(values))
    rows, metrics, diagnostics = [], {}, {}
    for (algorithm, train), value in returns.items():
        rows += [
            {"algorithm": algorithm, "train_dataset": train, "test_dataset": context, "seed": seed, "task": task,
             "episode": 0, "return": value + 3 * task + 0.1 * seed, "normalized": 0.5}
            for seed in (0, 1) for task in tasks
        ]  # fmt: skip
        numbers = {"mean": value, "low": value - 1, "high": value + 1, "n": 12, "normalized": 0.5}
        metrics.setdefault(algorithm, {})[train] = {context: numbers}
        diagnostics.setdefault(algorithm, {})[train] = {context: {"esr": 0.7}}
    write_text(folder / "reports/results.csv", pd.DataFrame(rows).to_csv(index=False))
    write_json(folder / "reports/metrics.json", metrics)
    write_json(folder / "reports/diagnostics.json", diagnostics)
    return folder


def test_results_stand_beside_the_published_ones(tmp_path):
    published = {"published": ["focalpp-table-1-point", "focal-table-1"]}
    returns = {("focal", "step-mixed"): 8.5, ("focal", "mixed"): 1.0}
    first = report(tmp_path / "pipelines/a", returns, context="step-mixed", report=published)
    second = report(tmp_path / "pipelines/b", {("linear", "mixed"): 2.0}, report={"published": "focal-table-1"})
    write_text(tmp_path / "pipelines/c/params.yaml", "env: x\n")  # never built
    found = collect.all_results([first, second, tmp_path / "pipelines/c"])
    assert [result.name for result in found] == ["a", "b"]
    text = collect.as_text(found)
    assert "a: point-robot, ood-checkpoint; published: FOCAL++ (Li et al., 2022), Table 1" in text
    row = next(line for line in text.splitlines() if line.startswith("focal      step-mixed"))
    assert row.endswith("8.50  [7.50, 9.50]  12     0.50  11.84 ± 1.05; esr 0.700 / 0.861  -3.34; -0.161")
    table = collect.as_markdown(found).splitlines()
    assert len(table) == 2 + 3
    assert table[2].endswith("Sparse-Point-Robot; FOCAL (Li et al., ICLR 2021), Table 1, Half-Cheetah-Vel, one seed |")
    assert table[3].endswith("|  |  |  |")  # nothing published of it, so no source either
    assert len({line.count("|") for line in table}) == 1


def test_a_difference_is_paired_where_tasks_are_the_same(tmp_path):
    first = collect.Result(report(tmp_path / "a", {("focal", "expert"): 1.0}))
    second = collect.Result(report(tmp_path / "b", {("focal", "expert"): 2.0}, tasks=range(5, 12)))
    (pair,) = comparison.compare_results(first, second)
    assert pair.tasks == 5  # 5 to 9 are in both
    assert pair.difference.mean == pytest.approx(1.0)
    # the tasks' difficulty, 12 apart, cancels; what is left is the seeds' 0.1
    assert pair.difference.low >= 0.9 - 1e-9
    assert pair.difference.high <= 1.1 + 1e-9
    more = report(tmp_path / "d", {("focal", "expert"): 1.0}, tasks=range(24, 30), tasks_={"seed": 7, "train": 20})
    (pair,) = comparison.compare_results(first, collect.Result(more))
    assert (pair.tasks, pair.difference.mean) == (6, pytest.approx(60))  # test task 4 is 4 here and 24 there
    other = collect.Result(report(tmp_path / "c", {("focal", "expert"): 2.0}, tasks=range(4, 10), env="ant-goal"))
    (pair,) = comparison.compare_results(first, other)
    assert pair.tasks == 0
    assert pair.difference.high - pair.difference.low > 5
    assert not pair.difference.supported
    text = comparison.as_text(first, other)
    assert "others: the two have other tasks, not paired" in text
    assert "~" in text


def test_a_swapped_dataset_is_compared_with_what_stood_in_its_place(tmp_path):
    first = collect.Result(report(tmp_path / "a", {("focal", "expert"): 1.0, ("focal", "mixed"): 2.0}))
    second = collect.Result(report(tmp_path / "b", {("focal", "random"): 0.5, ("focal", "mixed"): 2.0}))
    assert comparison.match(first, second) == [
        (("focal", "expert", "expert"), ("focal", "random", "expert")),
        (("focal", "mixed", "expert"), ("focal", "mixed", "expert")),
    ]
    assert "expert -> random" in comparison.as_text(first, second)
    third = collect.Result(report(tmp_path / "c", {("bc", "expert"): 1.0}))
    with pytest.raises(UserError, match="share no row"):
        comparison.compare_results(first, third)


def state(name: str | None, train: list[str], mean: float, **more: object) -> dict[str, object]:
    """Return a column of ``dvc exp show --json``."""
    params = {"env": "x", "dataset": {"train": train, "none": {}}, "long": list(range(100))}
    row = {"mean": mean, "low": 0.0, "trained_on": train[0]}
    metrics = {"reports/metrics/focal-1-1.json": {"data": row}, "reports/metrics/ref.json": {"data": {"mean": 13.0}}}
    return {"rev": "0123456789", "name": name, "experiments": None, **more,
            "data": {"params": {"params.yaml": {"data": params}}, "metrics": metrics}}  # fmt: skip


def test_experiments_stand_side_by_side():
    ran = {"revs": [state("waxy-dado", ["random"], 0.5), state("older", ["x"], 1.0)], "executor": None}
    shown = [
        state("workspace", ["medium"], 4.3586),
        state("main", ["expert", "mixed"], 7.3586, experiments=[ran, {"revs": None}]),
        {"rev": "f" * 40, "name": None, "data": None, "error": {"msg": "?"}, "experiments": None},
    ]
    assert experiments.as_text(shown).splitlines() == [
        "params and results  workspace       main             waxy-dado",
        "dataset.train       [medium]        [expert, mixed]  [random]",
        "focal-1-1           4.36 on medium  7.36 on expert   0.50 on random",
        "ref                 13.00           13.00            13.00",
    ]
    shown[0]["data"] = {"params": {}, "metrics": {}}
    assert experiments.as_text(shown[:1]).splitlines()[-1].split() == ["no", "reports/metrics", "yet", "-"]


def test_experiments_where_dvc_says_nothing(tmp_path):
    with pytest.raises(UserError, match="'dvc exp show' says nothing: you are not inside of a DVC repository"):
        experiments.experiments(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: 1 # é\nseeds: [0, 1] # some\nb: 2\n", "a: 1 # é\nseeds: [3, 4, 5] # some\nb: 2\n"),
        ("seeds: {from: 3, to: 5}\n", "seeds: [3, 4, 5]\n"),
        ("seeds: # of training\n- 0\n- 1\n\n# --- next\nb: 2\n", "seeds: [3, 4, 5]\n\n# --- next\nb: 2\n"),
        ("seeds:\n  from: 3\n  to: 5 # both\n", "seeds: [3, 4, 5] # both\n"),
    ],
)
def test_a_range_of_seeds_is_written_as_a_list(tmp_path, before, after):
    path = tmp_path / "params.yaml"
    path.write_text(before, encoding="utf-8")
    write_seeds(path, 3, 5)
    assert path.read_text(encoding="utf-8") == after
    write_seeds(path, 0, 99)
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"] == list(range(100))
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= WIDTH


def test_no_range_of_seeds(tmp_path):
    for first, last in ((-1, 3), (3, 2), (0, 2**31), (0, 20_000)):
        with pytest.raises(UserError, match=f"seeds {first} to {last}: expected 0 <= first <= last"):
            write_seeds(tmp_path / "params.yaml", first, last)
    (tmp_path / "params.yaml").write_text("- seeds\n")
    with pytest.raises(UserError, match=r"params\.yaml: seeds: missing"):
        write_seeds(tmp_path / "params.yaml", 0, 1)


def test_damaged_reports_are_named(tmp_path):
    folder = report(tmp_path / "a", {("focal", "expert"): 1.0})
    write_json(folder / "reports/metrics.json", {"focal": 3})
    with pytest.raises(UserError, match=r"reports/metrics\.json: no row focal/expert/expert"):
        collect.Result(folder).lines()
    write_text(folder / "reports/results.csv", "a,b\n1,2\n")
    with pytest.raises(UserError, match=r"reports/results\.csv: expected a column 'algorithm'"):
        collect.Result(folder)
    with pytest.raises(UserError, match=r"results\.csv: missing; run 'omrl repro'"):
        collect.Result(tmp_path / "nowhere")


def test_every_folder_under_data_is_described(tmp_path):
    model = tmp_path / "data/models/focal/expert/0"
    write_text(model / "curve.csv", "step\n1\n")
    parameters = {"config": {"width": 64}, "name": "x" * 300}
    write_manifest(model, kind="model", inputs={"data/tasks/all.json": "ab" * 32}, parameters=parameters,
                   files={"curve.csv": 1})  # fmt: skip
    text = folders.describe(model)
    for part in (": model", "data/tasks/all.json  abababababab", "width: 64", "curve.csv: 7 B, 1 rows"):
        assert part in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "0/: " in folders.describe(model.parent)
    assert ", model" in folders.describe(model.parent)
    write_json(tmp_path / "data/tasks/all.json", {"env": "x", "tasks": list(range(1000))})
    assert "env: x" in folders.describe(tmp_path / "data/tasks/all.json")
    assert "all.json" in folders.describe(tmp_path / "data/tasks")
    (model / "manifest.json").write_text('{"kind": "model"}')
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of OMRL"):
        folders.describe(model)
    with pytest.raises(UserError, match="nowhere: expected a folder under data/"):
        folders.describe(tmp_path / "nowhere")


@pytest.mark.parametrize("folder", sorted((ROOT / "pipelines").iterdir()), ids=lambda folder: folder.name)
def test_every_pipeline_is_a_dvc_project_with_the_one_cache(folder):
    smoke = ROOT / "pipelines/smoke"
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        assert (folder / name).read_text() == (smoke / name).read_text(), name
    for package in ("omrl", "stages"):
        assert (folder / "source" / package).readlink() == Path("../../..") / package
    assert Pipeline.cache.func(SimpleNamespace(repository=folder)) == (ROOT / ".dvc/cache/files/md5").resolve()


HOSTILE = "\x1b[2J\x1b]0;x\x07\u202e\nfine"


def transitions(rows: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((rows, 2) if name in VECTORS else rows, kind) for name, kind in TYPES.items()}


@pytest.mark.parametrize(
    ("rows", "footer", "part"),
    [
        (0, {}, "0 rows of task (int32)"),
        (3, {"environment": "x", "task": [HOSTILE]}, "3 transitions of task 0 in an unnamed environment"),
        (3, {"environment": {"family": HOSTILE}, "task": "x" * 10_000}, "in \\x1b[2J\\x1b]0;x\\x07\\u202e\\nfine"),
    ],
)
def test_any_file_of_transitions_is_described_printably(tmp_path, rows, footer, part):
    path = tmp_path / "a.parquet"
    write_transitions(path, transitions(rows), footer)
    text = folders.describe(path)
    assert part in text
    assert all(line.isprintable() and len(line) < 2200 for line in text.splitlines())


@pytest.mark.parametrize(
    ("table", "part"),
    [
        (pa.table({"task": ["a"], "source_task": [[1]]}), "1 rows of task (string), source_task (list<"),
        (pa.table({HOSTILE: pa.array([None, 2])}), "2 rows of \\x1b[2J"),
        (pa.table({}), "0 rows of no columns"),
        (
            pa.table({"task": pa.array([], pa.int32()), "source_task": pa.array([], pa.int32())}),
            "0 rows of task (int32)",
        ),
        (pa.table({"a": [{"b": [1, 2]}], "c": pa.array([1], pa.timestamp("s"))}), "1 rows of a (struct<"),
    ],
)
def test_foreign_columns_are_listed(tmp_path, table, part):
    write_table(tmp_path / "a.parquet", table)
    text = folders.describe(tmp_path / "a.parquet")
    assert part in text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.parquet", os.mkfifo),
        ("a.parquet", Path.mkdir),
        ("a.parquet", Path.touch),
        ("a.parquet", lambda path: path.symlink_to(path)),
        ("a.json", os.mkfifo),
        ("a.json", lambda path: path.write_text("[" * 500 + "]" * 500)),
        ("set/card.json", lambda path: path.write_text("[]")),
        ("set/card.json", lambda path: path.write_text('{"kind": 3, "definition": {}, "normalized_return": "x"}')),
        ("set/manifest.json", lambda path: write_manifest(path.parent, kind="x", inputs={"a": 3}, parameters={},
                                                          files={})),
        ("set/manifest.json", os.mkfifo),
    ],
)  # fmt: skip
def test_what_cannot_be_described_is_one_line(tmp_path, name, make):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    if name == "set/manifest.json" and not path.is_file():
        assert "manifest.json" in folders.describe(path.parent)  # listed, not waited for
        return
    with pytest.raises((UserError, OSError)) as caught:
        folders.describe(path.parent if path.parent != tmp_path else path)
    line = explain(caught.value)
    assert line is not None
    assert name in line
    assert line.isprintable()


def screen(project: Project, *command: str, cwd: Path) -> list[str]:
    """Return what a command shows, in lines; each view has to fit."""
    environment = {**project.environment, "COLUMNS": str(WIDTH)}
    lines = project.run("env", f"COLUMNS={environment['COLUMNS']}", *command, cwd=cwd).stdout.splitlines()
    # where the clone of this test lies is no part of the view
    assert max((len(line.replace(str(project.folder), "")) for line in lines), default=0) <= WIDTH, lines
    assert len(lines) <= HEIGHT, lines
    return lines


@pytest.mark.e2e
def test_dvcs_views_fit_a_screen_in_a_pipeline(project):
    at = project.smoke
    assert screen(project, "dvc", "status", cwd=at) == ["Data and pipelines are up to date."]
    head, *rows = screen(project, "dvc", "metrics", "show", cwd=at)
    assert head.split() == ["Path", "context", "high", "low", "mean", "n", "normalized", "trained_on"]
    assert len(rows) == 2 + 3
    graph = screen(project, "dvc", "dag", "--collapse-foreach-matrix", "--mermaid", cwd=at)
    assert sum("[" in line for line in graph) == 10
    curves = sorted(str(path.relative_to(at)) for path in (at / "reports/plots").glob("*.csv"))
    plotted = project.run("dvc", "plots", "show", *curves, cwd=at)
    assert "dvc_plots/index.html" in plotted.stdout
    assert plotted.stderr == ""
    project.edit_params("train: [expert, relabelled]", "train: [medium, relabelled]")
    changed = screen(project, "dvc", "params", "diff", cwd=at)
    assert changed[-1].split(maxsplit=2)[:2] == ["params.yaml", "dataset.train"]
    project.repro()
    swapped = screen(project, "dvc", "metrics", "diff", cwd=at)
    assert any(line.split()[:4] == ["reports/metrics/focal-1-1.json", "trained_on", "expert", "medium"]
               for line in swapped)  # fmt: skip
    head, swap, first, second, *references = screen(project, "python", "-m", "omrl.cli", "experiments", cwd=at)
    assert head.split() == ["params", "and", "results", "workspace", "main"]
    assert swap.split("  ")[0] == "dataset.train"
    assert "[medium, relabelled]" in swap
    assert first.split()[::3] == ["focal-1-1", "medium", "expert"]
    assert second.split()[::3] == ["focal-2-1", "relabelled", "relabelled"]
    assert len(references) == 3
    compared = project.run("python", "-m", "omrl.cli", "compare", "HEAD", cwd=at).stdout
    assert "expert -> medium" in compared
    assert compared.splitlines()[0].split()[4:6] == ["smoke@HEAD", "smoke"]


@pytest.mark.e2e
def test_the_root_does_not_speak_of_pipelines(project):
    lines = screen(project, "dvc", "metrics", "show", cwd=project.folder)
    assert 1 < len(lines) < 10
    assert not any("pipelines/" in line for line in lines)
    graph = screen(project, "dvc", "dag", "--collapse-foreach-matrix", "--mermaid", cwd=project.folder)
    assert sum("[" in line for line in graph) == 10
    assert not any("pipelines" in line for line in project.run("dvc", "status").stdout.splitlines())


@pytest.mark.e2e
def test_results_of_a_real_pipeline(built):
    text = built.omrl("results", "smoke").stdout
    metrics = json.loads((built.smoke / "reports/metrics.json").read_text())
    assert f"{metrics['focal']['expert']['expert']['mean']:.2f}" in text
    assert "smoke: sparse-point-robot, offline-context" in text
    everything = built.omrl("results", "--all").stdout
    assert everything.index("default:") < everything.index("smoke:")
    result = collect.Result(built.smoke)
    scores, tasks = result.scores(("focal", "expert", "expert"))
    assert tasks == [0, 1]  # 4 and 5 behind the four that train
    assert np.isclose(scores.mean(), metrics["focal"]["expert"]["expert"]["mean"])
    assert built.omrl("compare", "smok", check=False).returncode == 2


@pytest.mark.e2e
def test_an_experiment_ends_with_the_table(project):
    done = project.run("dvc", "exp", "run", "-S", "dataset.train=[medium]", cwd=project.smoke)
    assert "| focal | medium | expert |" in done.stdout  # the table is what it ends with
    row = json.loads((project.smoke / "reports/metrics/focal-1-1.json").read_text())
    assert row["trained_on"] == "medium"
