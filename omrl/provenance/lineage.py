"""Lineage: from a number, a folder, a file or a single row back to what made it.

Built on dvc.lock (what ran, with which inputs and parameters), on the manifests (checkpoints, run seeds) and
on the rows' own keys; compared with what lies on disk.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from omrl.behavior.base import SCRIPT, checkpoint_name, task_folder
from omrl.core import layout
from omrl.core.errors import UserError, suggest
from omrl.core.files import read_json, read_manifest, sha256
from omrl.data.parquet import read_footer, read_table, read_transitions
from omrl.data.schema import KEY
from omrl.provenance.lockfile import Output, Pipeline

_PLAN = "data/plan"
_METRICS = "reports/metrics.json"


def trace(pipeline: Pipeline, target: str, row: int | None = None) -> dict[str, Any]:
    """Return the lineage of ``target``.

    Args:
        pipeline: where it stands.
        target: ``reports/metrics.json:focal.expert.expert.mean``, ``focal/expert/expert`` with or without a
            seed, or a path relative to the pipeline: a folder, a file, or ``file.parquet:<row>``.
        row: row of a Parquet file, another way of writing it.

    Returns:
        ``target``, ``facts`` about it, ``roots`` (the cells it comes from directly), ``cells`` (every cell
        behind it, by name), ``problems`` (what on disk is not what dvc.lock records) and ``uncommitted``.

    Raises:
        UserError: nothing of that name, or a row out of range.
    """
    path, _, rest = target.partition(":")
    path = Path(path).as_posix()
    if path == _METRICS and rest:
        facts, outputs = _number(pipeline, rest.split("."))
    elif rest and (row is not None or not re.fullmatch(r"\d+", rest)):
        raise UserError(f"'{target}': expected a row number behind the colon, once")
    elif rest:
        facts, outputs = _path(pipeline, path, int(rest))
    elif not (pipeline.folder / path).exists() and not path.startswith(("data/", "reports/")):
        facts, outputs = _number(pipeline, path.split("/"))
    else:
        facts, outputs = _path(pipeline, path, row)
    cells: dict[str, Any] = {}
    for output in outputs:
        _collect(pipeline, output, cells)
    lock = pipeline.folder / "dvc.lock"
    problems = []
    for name, cell in cells.items():
        for out in cell["outputs"]:
            if out["state"] != "ok":
                files = f" ({', '.join(Path(file).name for file in out['differing'])})" if out["differing"] else ""
                problems.append(f"{pipeline.folder / out['path']} is {out['state']}{files}: not what {lock} records")
        problems += [
            f"{name} read another version of {path} than the one there now: what is told of that is not its past; "
            f"run 'dvc repro' in {pipeline.folder}"
            for path in cell["outdated"]
        ]
    return {
        "target": target,
        "pipeline": pipeline.folder.as_posix(),
        "facts": facts,
        "roots": list(dict.fromkeys(output.stage for output in outputs)),
        "cells": cells,
        "problems": problems + facts.pop("problems", []),
        "uncommitted": pipeline.uncommitted(),
        "git": pipeline.under_git,
    }


def _collect(pipeline: Pipeline, output: Output, cells: dict[str, Any]) -> None:
    """Add the cell behind ``output`` and, first, all cells it reads."""
    if output.stage in cells:
        return
    stage = pipeline.stages[output.stage]
    cells[output.stage] = {}  # holds the place against cycles, which a sound lock does not have
    parents: list[str] = []
    code: dict[str, str] = {}
    origins: dict[str, Any] = {}
    for path, md5 in stage.deps.items():
        if path.startswith("data/code/"):
            code[path] = _fingerprint(pipeline, path, md5)
            if about := _origin(pipeline, path, code[path]):
                origins[path] = about
        for parent in pipeline.under(path):
            if parent.stage not in parents and not parent.path.startswith(_PLAN):
                parents.append(parent.stage)
                _collect(pipeline, parent, cells)
        if not pipeline.under(path):
            code[path] = md5
    cells[output.stage] = {
        "command": stage.command,
        "outputs": [
            {
                "path": out.path,
                "md5": out.md5,
                "size": out.size,
                "state": pipeline.state(out),
                "differing": [] if pipeline.state(out) != "modified" else pipeline.differing(out),
            }
            for out in stage.outs
        ],
        "commit": pipeline.commit_of(output.md5),
        "parameters": stage.params,
        "code": code,
        "origins": origins,
        "reads": parents,
        "outdated": pipeline.outdated(stage),
    }


def _fingerprint(pipeline: Pipeline, path: str, md5: str) -> str:
    """Return the fingerprint in the file that a cell read: ``path`` if it still is that one, else from the cache."""
    place = pipeline.folder / path if pipeline.found(path) == md5 else pipeline.object_path(md5)
    try:
        return str(read_json(place)["fingerprint"])
    except (UserError, KeyError, TypeError):
        return f"gone, its MD5 was {md5}"


def _origin(pipeline: Pipeline, path: str, value: str) -> dict[str, Any] | None:
    """Return package, version, file and its SHA-256 of a plug-in; None for code of ours, or code that has changed."""
    try:
        about = read_json(pipeline.folder / layout.CODE / layout.ORIGINS)[path.removeprefix("data/code/")[:-5]]
        return about if about["fingerprint"] == value else None
    except (UserError, KeyError, TypeError):
        return None


def _number(pipeline: Pipeline, keys: list[str]) -> tuple[dict[str, Any], list[Output]]:
    """Return value and evaluation cells of a number in the report."""
    name = "/".join(keys)
    if len(keys) not in (3, 4):
        raise UserError(f"'{name}': expected <algorithm>/<training dataset>/<test dataset>, with a seed or not")
    value: Any = read_json(pipeline.folder / _METRICS)
    seed = keys[3] if keys[3:] and keys[3].isdigit() else None
    place: list[str] = []
    for key in keys[:3] if seed else keys:
        if not isinstance(value, dict) or key not in value:
            options = suggest(key, value if isinstance(value, dict) else [])
            raise UserError(f"'{name}': no '{key}' in {'/'.join(place) or 'the report'}; {options}")
        value, place = value[key], [*place, key]
    prefix = "data/evaluations/" + "/".join(keys[:3])
    together = [out for out in pipeline.outputs() if out.path == f"data/evaluations/{keys[0]}"]  # of an online entry
    found = together or [out for out in pipeline.outputs() if out.path.startswith(prefix + "/")]
    found.sort(key=lambda out: (len(out.path), out.path))  # by seed; dvc.lock has the order in which they were built
    folders = [out.path for out in found]
    if together:
        seeds = sorted((path.name for path in (pipeline.folder / prefix).glob("[0-9]*")), key=int)
        folders = [f"{prefix}/{name}" for name in seeds]
    if seed:
        folders = [path for path in folders if path == f"{prefix}/{seed}"]
        found = together or [out for out in found if out.path in folders]
    if not folders:
        raise UserError(f"'{name}': no evaluation of that name in {pipeline.folder}/dvc.lock")
    problems, means = [], {}
    for path in folders:
        try:
            means[path.rpartition("/")[2]] = _mean(pipeline.folder / path / "episodes.parquet")
        except UserError as error:
            problems.append(str(error))
    mean = value if keys[3:] == ["mean"] else value.get("mean") if isinstance(value, dict) else None
    if seed:
        value = {"mean": means.get(seed)}
    elif mean is not None and means and not np.isclose(mean, np.mean(list(means.values())), rtol=1e-9, atol=1e-12):
        problems.append(
            f"{pipeline.folder / _METRICS} says mean {mean!r}, the evaluations give "
            f"{float(np.mean(list(means.values())))!r}"
        )
    report = pipeline.output_of(_METRICS)
    if pipeline.state(report) != "ok":
        problems.append(f"{pipeline.folder / _METRICS} is modified: not what {pipeline.folder}/dvc.lock records")
    problems += [
        f"the report read another version of {path} than the one there now; run 'dvc repro' in {pipeline.folder}"
        for path in pipeline.outdated(pipeline.stages[report.stage])
        if path == "data/evaluations"
    ]
    return {
        "kind": "number",
        "value": value,
        "evaluations": folders,
        "seed_means": means,
        "problems": problems,
    }, found


def _mean(path: Path) -> float:
    """Return an evaluation's mean return over the unseen tasks, computed from its episodes as the report does."""
    table = read_table(path, ["split", "counted", "task", "return"])
    split, counted = (table.column(name).to_numpy() for name in ("split", "counted"))
    chosen = (split == "test") & counted.astype(bool)
    tasks, returns = table.column("task").to_numpy()[chosen], table.column("return").to_numpy()[chosen]
    return float(np.mean([returns[tasks == task].mean() for task in np.unique(tasks)]))


def _path(pipeline: Pipeline, path: str, row: int | None) -> tuple[dict[str, Any], list[Output]]:
    """Return facts and output of a path, or of a row of a Parquet file."""
    output = pipeline.output_of(path)
    full = pipeline.folder / path
    if row is not None:
        if full.suffix != ".parquet":
            raise UserError(f"{full}: only Parquet files of transitions have rows")
        return _row(pipeline, path, row), [output]
    facts: dict[str, Any] = {"kind": "path", "path": path, "output": output.path}
    if full.suffix == ".parquet" and full.is_file():
        facts["sha256"] = sha256(full)
        footer = read_footer(full)
        facts |= {key: footer[key] for key in ("task", "checkpoints") if key in footer}
    match = re.fullmatch(r"data/behavior/([^/]+)/task=(\d+)/step=(\d+)\.zip", path)
    if match:
        facts |= _run(pipeline, match[1], int(match[2]), int(match[3]), None)
    return facts, [output]


def _row(pipeline: Pipeline, path: str, row: int) -> dict[str, Any]:
    """Return what a row of transitions is and where its physical transition comes from."""
    full = pipeline.folder / path
    columns = read_transitions(full, [*KEY, "task", "reward", "sparse_reward", "deterministic"])
    rows = len(columns["task"])
    if not 0 <= row < rows:
        raise UserError(f"{full}: row {row} is out of range, expected 0..{rows - 1}")
    facts: dict[str, Any] = {"kind": "row", "path": path, "row": row}
    facts |= {name: values[row].item() for name, values in columns.items()}
    source, step = facts["source_task"], facts["checkpoint"]
    if path.startswith("data/online/"):
        return facts | _collected(full, row)
    shards = read_json(pipeline.folder / "data/plan/shards.json")["shards"]
    shard = next((name for name, (first, last) in shards.items() if first <= source <= last), None)
    if shard is None:
        raise UserError(f"{full}: row {row} comes from task {source}, which no shard of data/plan/shards.json has")
    rollouts = f"data/rollouts/{shard}/task={source:03d}.parquet"
    there = read_transitions(pipeline.folder / rollouts, list(KEY))
    same = np.ones(len(there["step"]), dtype=np.bool_)
    for name in KEY:
        same &= there[name] == columns[name][row]
    facts["rollout"] = {"path": rollouts, "rows": np.flatnonzero(same).tolist()}
    recorded = read_footer(pipeline.folder / rollouts)["checkpoints"].get(str(step))
    facts |= _run(pipeline, shard, source, step, recorded)
    if len(facts["rollout"]["rows"]) != 1:
        facts["problems"].append(
            f"{pipeline.folder / rollouts} has {len(facts['rollout']['rows'])} rows of this transition, expected one"
        )
    return facts


def _collected(path: Path, row: int) -> dict[str, Any]:
    """Return whose reward a row of a model's own steps carries, and which model it learned on from."""
    manifest = read_manifest(path.parent)
    models = [name for name in manifest["inputs"] if name.startswith("data/models/")]
    recorded = manifest["files"].get(path.name, {}).get("sha256")
    return {
        "reward_source": read_table(path, ["reward_source"]).column("reward_source")[row].as_py(),
        "round": read_footer(path)["round"],
        "model": models[0],
        "problems": [] if sha256(path) == recorded else [f"{path} is modified: its SHA-256 is not the recorded one"],
    }


def _run(pipeline: Pipeline, shard: str, task: int, step: int, recorded: str | None) -> dict[str, Any]:
    """Return checkpoint and SB3 run behind a transition; compare the checkpoint with what the rollouts recorded."""
    folder = pipeline.folder / "data/behavior" / shard
    manifest = read_manifest(folder)
    script = f"{task_folder(task)}/{SCRIPT}"
    name = script if script in manifest["files"] else f"{task_folder(task)}/{checkpoint_name(step)}"
    path = folder / name
    found = sha256(path) if path.is_file() else None
    expected = recorded or manifest["files"].get(name, {}).get("sha256")
    try:
        seed, behavior = manifest["parameters"]["run_seeds"][str(task)], manifest["parameters"]["behavior"]
    except (KeyError, TypeError):
        raise UserError(
            f"{folder / 'manifest.json'}: not the manifest of behavior policies; run 'dvc checkout'"
        ) from None
    problems = []
    if found != expected:
        problems.append(
            f"{path} is {'missing' if found is None else 'modified'}: its SHA-256 is not the recorded {expected}"
        )
    return {
        "checkpoint_file": {"path": f"data/behavior/{shard}/{name}", "sha256": found, "recorded": expected},
        "sb3_run": {
            "task": task,
            "step": step,
            "seed": seed,
            "behavior": behavior,
            "packages": manifest["packages"],
        },
        "problems": problems,
    }


def describe_parameters(parameters: dict[str, Any], prefix: str = "") -> list[str]:
    """Return nested parameters as ``key = value`` lines."""
    lines = []
    for key, value in parameters.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            lines += describe_parameters(value, f"{name}.")
        else:
            lines.append(f"{name} = {value}")
    return lines


def tree(result: dict[str, Any]) -> str:
    """Return the lineage as text: facts, then the cells as a tree, each told once."""
    facts = result["facts"]
    lines = [f"{result['target']}  ({result['pipeline']})"]
    if facts["kind"] == "number":
        value = facts["value"]
        shown = (
            value
            if not isinstance(value, dict)
            else ", ".join(f"{k} {v:.6g}" for k, v in value.items() if v is not None)
        )
        lines.append(f"  value: {shown}")
        for path in facts["evaluations"]:
            mean = facts["seed_means"].get(path.rpartition("/")[2])
            lines.append(f"  evaluated in {path}" + (f", mean {mean:.6g}" if mean is not None else ""))
    elif facts["kind"] == "row":
        lines.append(
            f"  row {facts['row']}: reward of task {facts['task']} = {facts['reward']:.6g}, sparse "
            f"{facts['sparse_reward']:.6g}"
        )
        lines.append(
            f"  transition of source task {facts['source_task']}, checkpoint {facts['checkpoint']}, episode "
            f"{facts['episode']}, step {facts['step']}, "
            f"{'mean' if facts['deterministic'] else 'sampled'} action"
        )
        if "rollout" in facts:
            rollout = facts["rollout"]
            lines.append(f"  rolled out in {rollout['path']}, row {', '.join(map(str, rollout['rows']))}")
        else:
            lines.append(
                f"  collected in round {facts['round']}, after {facts['checkpoint']} further updates of "
                f"{facts['model']}; reward: {facts['reward_source']}"
            )
    if "checkpoint_file" in facts:
        checkpoint, run = facts["checkpoint_file"], facts["sb3_run"]
        agreement = "as recorded" if checkpoint["sha256"] == checkpoint["recorded"] else "NOT as recorded"
        lines.append(f"  acted: {checkpoint['path']}")
        lines.append(f"         SHA-256 {checkpoint['sha256']} ({agreement})")
        what = "script" if run["behavior"]["engine"] == "scripted" else "SB3 run"
        lines.append(f"  {what}: task {run['task']}, step {run['step']}, seed {run['seed']}")
        lines += [f"         {line}" for line in describe_parameters(run["behavior"])]
    if "sha256" in facts:
        lines.append(f"  SHA-256 {facts['sha256']}")
    told: set[str] = set()
    for root in result["roots"]:
        _branch(result["cells"], root, "", told, lines, result["git"])
    if result["uncommitted"]:
        shown = ", ".join(result["uncommitted"][:5])
        lines.append(f"Not committed: {shown}{' and more' if len(result['uncommitted']) > 5 else ''}")
    lines += [f"WARNING: {problem}" for problem in result["problems"]]
    if not result["problems"]:
        lines.append("Everything above is on disk as dvc.lock records it.")
    return "\n".join(lines)


def _branch(cells: dict[str, Any], name: str, indent: str, told: set[str], lines: list[str], git: bool) -> None:
    cell = cells[name]
    if name in told:
        lines.append(f"{indent}{name} (see above)")
        return
    told.add(name)
    lines.append(f"{indent}{name}")
    inner = indent + "│ "
    for out in cell["outputs"]:
        mark = "" if out["state"] == "ok" else f"  ** {out['state'].upper()} **"
        lines.append(f"{inner}{out['path']}  md5 {out['md5']}  {out['size']:,} bytes{mark}")
    commit = cell["commit"]
    if commit is None:
        told_by_git = "none yet, only the working tree's dvc.lock has it" if git else "not known, git does not answer"
        lines.append(f"{inner}commit: {told_by_git}")
    else:
        lines.append(f"{inner}commit: {commit['commit'][:12]} {commit['date']} {commit['subject']}")
    parameters = describe_parameters(cell["parameters"])
    if parameters:
        lines.append(f"{inner}params: {'; '.join(parameters)}")
    for path, value in cell["code"].items():
        lines.append(f"{inner}code: {path} {value[:16]}")
        if about := cell["origins"].get(path):
            package = "no package" if about["package"] is None else f"{about['package']} {about['version']}"
            lines.append(f"{inner}      {about['module']} of {package}, {about['file']} SHA-256 {about['sha256']}")
    for parent in cell["reads"]:
        if parent != "code":
            _branch(cells, parent, inner, told, lines, git)
