"""The price of ``dvc repro`` when nothing has changed, against ``dvc status`` and an empty Python with DVC."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _bench import best

FOLDER = Path(__file__).resolve().parents[1]


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "dvc.yaml"
    status = subprocess.run(["dvc", "status", "--quiet", target], cwd=FOLDER)
    if status.returncode != 0:
        sys.exit(f"{target} is not up to date: run 'dvc repro {target}' first")

    def run(*command: str) -> float:
        return best(lambda: subprocess.run(command, cwd=FOLDER, check=True, capture_output=True))

    print(f"{'python -c import dvc.repo':<46}{run(sys.executable, '-c', 'import dvc.repo'):>10.2f} s")
    print(f"{'dvc status':<46}{run('dvc', 'status', target):>10.2f} s")
    print(f"{'dvc repro, nothing to do':<46}{run('dvc', 'repro', target):>10.2f} s")


if __name__ == "__main__":
    main()
