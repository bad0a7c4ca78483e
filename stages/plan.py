"""Check all of params.yaml, write down the cells it asks for, and remove outputs of cells it no longer asks for.

Every other stage depends on ``checked.json``, which never changes, so that this one comes first: DVC takes a
stage's outputs away before its command can refuse params.yaml.

Stages that read every cell (dataset, report) depend on the parent folder of the cells. A cell left over from
earlier params would change that folder's hash, and swapping a dataset level back would then not find the
earlier result. What is removed here is in DVC's cache: asking for the cell again checks it out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from omrl.core import layout
from omrl.core.files import write_json, write_manifest
from omrl.experiment import check, plan_files
from stages import run


def prune(folder: Path, keep: set[Path]) -> None:
    """Remove what lies under ``folder`` and is neither in ``keep`` nor on the way to something in it."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path in keep:
            continue
        if any(path in kept.parents for kept in keep):
            prune(path, keep)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main() -> None:
    """Write data/plan/; prune."""
    check()
    contents = plan_files()
    plan = contents["cells.json"]
    prune(layout.DATA / "behavior", {layout.behavior(shard) for shard in plan["shards"]})
    prune(layout.DATA / "rollouts", {layout.rollouts(shard) for shard in plan["shards"]})
    prune(layout.DATA / "datasets", {layout.datasets(name) for name in [*plan["datasets"], *plan["pairs"]]})
    prune(layout.MODELS, {layout.models(**cell) for cell in plan["models"]})
    prune(layout.ONLINE, {layout.online(name) for name in plan["online"]})
    own = {layout.evaluations(**cell) for cell in plan["evaluations"] if cell["algorithm"] not in plan["online"]}
    prune(layout.DATA / "evaluations", own | {layout.evaluated_online(name) for name in plan["online"]})
    folder = layout.DATA / "plan"
    for name, content in contents.items():
        write_json(folder / name, content)
    write_manifest(folder, kind="plan", inputs={}, parameters={}, files=dict.fromkeys(contents), packages=("pyyaml",))


if __name__ == "__main__":
    run(main)
