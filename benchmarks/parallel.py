"""A real pipeline from a fresh clone: serial ``dvc repro`` against ``omrl repro``, by the clock and in processor time.

``python benchmarks/parallel.py [PIPELINE [JOBS]] [--steps N] [--after-data]``; the smoke pipeline and two cores unless
told. Both start from one commit with an empty cache and must end with the same dvc.lock. Behavior training and rollouts
use all cores in both: ``--after-data`` makes the datasets before the clock starts, once for both, so that what is
compared is models, evaluations and the report. (``dvc repro dataset`` enters the cells of the stage into dvc.lock in an
order that changes from call to call.) ``--steps`` trains every model for so many updates, to compare a large pipeline
in minutes. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, cost
from ruamel.yaml import YAML


def clone(target: Path, name: str, steps: int | None) -> Path:
    """Clone the last commit to ``target``; return the folder of a pipeline there (``default``: the root)."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    folder = target if name == "default" else target / "pipelines" / name
    if not (folder / "dvc.yaml").is_file():
        sys.exit(f"{name}: no such pipeline")
    (folder / "dvc.lock").unlink(missing_ok=True)
    if steps is not None:
        params = folder / "params.yaml"
        yaml = YAML()
        values = yaml.load(params)
        values["meta_train"]["steps"] = steps
        yaml.dump(values, params)
    return folder


def main() -> None:
    """Run the pipeline both ways and print both costs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline", nargs="?", default="smoke")
    parser.add_argument("jobs", nargs="?", default="2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--after-data", action="store_true")
    asked = parser.parse_args()
    name = asked.pipeline
    walls, locks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "serial", Path(scratch) / "parallel"
        folder = clone(first, name, asked.steps)
        if asked.after_data:
            cost(sys.executable, "-m", "dvc", "repro", "dataset", cwd=folder, source=first)
        shutil.copytree(first, second, symlinks=True)  # of one commit, whatever is committed meanwhile
        programs = {first: ("dvc", "repro"), second: ("omrl.cli", "repro", "--jobs", asked.jobs)}
        for source, program in programs.items():
            where = source / folder.relative_to(first)
            wall, cpu = cost(sys.executable, "-m", *program, cwd=where, source=source)
            title = f"{name}: {' '.join(program)}".replace("omrl.cli", "omrl")
            print(f"{title:<56}{wall:>9.1f} s by the clock, {cpu:.1f} s of processor time", flush=True)
            walls.append(wall)
            locks.append((where / "dvc.lock").read_bytes())
    print(f"{'ratio by the clock':<56}{walls[0] / walls[1]:>9.2f} x")
    print(f"{'dvc.lock of both':<56}{'the same bytes' if locks[0] == locks[1] else 'DIFFERENT':>9}")
    if locks[0] != locks[1]:
        sys.exit(1)


if __name__ == "__main__":
    main()
