"""What a cell costs beside its own work: pipelines of empty commands, by ``dvc repro`` and by ``omrl repro``.

``python benchmarks/scheduling.py [--whole] [CELLS ...]``. One cell is run where dvc.lock already has all the others;
``--whole`` also builds the pipeline from nothing in both ways: 1000 cells take ``dvc repro`` half an hour.
The graph has the shape of ours: ``plan`` and ``code`` first, then a matrix; params.yaml is the smoke pipeline's, with
more algorithms.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from _bench import ROOT, cost
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

from omrl.core.yamlfile import read as read_yaml
from omrl.running import child

SEEDS = 10  # of the matrix; the rest are algorithms
GRAPH = """\
stages:
  plan:
    cmd: mkdir -p data && echo > data/plan
    params: [algorithms, seeds]
    outs: [data/plan]
  code:
    cmd: echo > data/code
    deps: [data/plan]
    outs: [data/code]
  cell:
    matrix:
      algorithm: ${algorithms}
      seed: ${seeds}
    cmd: mkdir -p data/cells/${item.algorithm}/${item.seed} && echo > data/cells/${item.algorithm}/${item.seed}/model
    deps: [data/code]
    params: [env, env_config, meta_train, "algorithms.${item.algorithm}"]
    outs: ["data/cells/${item.algorithm}/${item.seed}"]
"""


def project(folder: Path, cells: int) -> Path:
    """Write a DVC project whose matrix has ``cells`` cells, a multiple of SEEDS."""
    (folder / ".dvc").mkdir(parents=True)
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc")
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / ".gitignore").write_text("/data\n")
    params = read_yaml(ROOT / "pipelines/smoke/params.yaml")
    params["seeds"] = list(range(SEEDS))
    params["algorithms"] = {f"focal-{i}": {"algorithm": "focal"} for i in range(cells // SEEDS)}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def line(title: str, value: float, more: str = "") -> None:
    """Print one measurement."""
    print(f"{title:<52}{value:>8.2f} {more}".rstrip(), flush=True)


def one(folder: Path, cells: int) -> None:
    """Run one cell where dvc.lock has all the others, by DVC as it is and by the process of a cell."""
    dvc = (sys.executable, "-m", "dvc", "repro", "-q", "-s")
    lock = folder / "dvc.lock"
    cost(*dvc, "plan", "code", "cell@focal-0-0", cwd=folder)
    head, parts = child.split_lock(lock.read_text())
    name, model = parts.pop()
    entries = [text for _, text in parts]
    for i in range(cells // SEEDS):
        entries += [re.sub("focal-0([/-])0", rf"focal-{i}\g<1>{seed}", model) for seed in range(SEEDS)]
    written = {}
    for title, program in (("dvc repro -s", dvc[:3]), ("by omrl repro", (sys.executable, child.__file__))):
        lock.write_text(head + "".join(entries).replace("echo > data/cells/focal-0/0", "changed"))
        shutil.rmtree(folder / ".dvc/cache/runs")  # else it would be taken from there
        line(f"  one cell, {title}, CPU s", cost(*program, *dvc[3:], name, cwd=folder)[1])
        written[title] = lock.read_bytes()
    if len(set(written.values())) != 1:
        sys.exit("dvc.lock has other bytes")
    start = time.process_time()
    dumps_yaml(parse_yaml_for_update(lock.read_text(), lock))
    line("  of it, DVC's rewriting of dvc.lock, CPU s", time.process_time() - start)


def whole(folders: list[Path], cells: int) -> None:
    """Build the pipeline from nothing in both ways."""
    written = []
    for folder, command in zip(folders, (("omrl", "repro", "--jobs", "2"), ("dvc", "repro")), strict=True):
        program = (sys.executable, "-m", "omrl.cli" if command[0] == "omrl" else "dvc", *command[1:])
        wall, cpu = cost(*program, cwd=folder)
        line(f"  {' '.join(command)}, s per cell", wall / cells, f"(CPU {cpu / cells:.2f})")
        line("    again, nothing to do, s", cost(*program, cwd=folder)[0])
        written.append((folder / "dvc.lock").read_bytes())
    if written[0] != written[1]:
        sys.exit("dvc.lock has other bytes")


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:] if size != "--whole"] or [50, 200, 1000]
    with tempfile.TemporaryDirectory() as scratch:
        _, start = cost(sys.executable, "-c", "pass", cwd=ROOT)
        _, imports = cost(sys.executable, "-c", "import dvc.cli, dvc.commands.repro, dvc.repo, dvc.dvcfile", cwd=ROOT)
        line("a process: interpreter, CPU s", start)
        line("a process: importing DVC, CPU s", imports - start)
        for size in sizes:
            print(f"{size} cells and two")
            one(project(Path(scratch) / f"one-{size}", size), size)
            if "--whole" in sys.argv:
                whole([project(Path(scratch) / f"{name}-{size}", size) for name in ("omrl", "dvc")], size + 2)


if __name__ == "__main__":
    main()
