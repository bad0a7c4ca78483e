"""A real pipeline from a fresh clone: serial ``dvc repro`` against ``omrl repro``, by the clock and in processor time.

``python benchmarks/parallel.py [PIPELINE [JOBS]]``; the smoke pipeline and two cores unless told. Both start with an
empty cache and must end with the same dvc.lock; behavior training and rollouts use all cores in both. Run it on an idle
machine.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, cost


def clone(target: Path, name: str) -> Path:
    """Clone the last commit to ``target``; return the folder of a pipeline there (``default``: the root)."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    folder = target if name == "default" else target / "pipelines" / name
    if not (folder / "dvc.yaml").is_file():
        sys.exit(f"{name}: no such pipeline")
    return folder


def main() -> None:
    name, jobs = [*sys.argv[1:], *["smoke", "2"][len(sys.argv) - 1 :]][:2]
    walls, locks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for program in (("dvc", "repro"), ("omrl.cli", "repro", "--jobs", jobs)):
            source = Path(scratch) / program[0]
            folder = clone(source, name)
            wall, cpu = cost(sys.executable, "-m", *program, cwd=folder, source=source)
            title = f"{name}: {' '.join(program)}".replace("omrl.cli", "omrl")
            print(f"{title:<46}{wall:>9.1f} s by the clock, {cpu:.1f} s of processor time", flush=True)
            walls.append(wall)
            locks.append((folder / "dvc.lock").read_bytes())
    print(f"{'ratio by the clock':<46}{walls[0] / walls[1]:>9.2f} x")
    print(f"{'dvc.lock of both':<46}{'the same bytes' if locks[0] == locks[1] else 'DIFFERENT':>9}")
    if locks[0] != locks[1]:
        sys.exit(1)


if __name__ == "__main__":
    main()
