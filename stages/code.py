"""Write a fingerprint of the code of every stage, SAC engine, environment family and algorithm."""

from __future__ import annotations

from pathlib import Path

from omrl.behavior.base import ENGINES
from omrl.core import layout, registry
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, write_json
from omrl.experiment import load
from omrl.provenance.fingerprint import fingerprint
from stages import run


def main() -> None:
    """Write data/code/{stages,engines,envs,algorithms}/<name>.json."""
    params = load("repository", "algorithms")
    root = (Path(params.repository) / "stages").resolve().parent  # a pipeline links to it from source/
    if Path(__file__).resolve().parents[1] != root:
        raise UserError(
            f"params.yaml: repository = {params.repository!r}: the installed package is not the one in that "
            "folder; run 'pip install -e .' in the repository, or correct the path"
        )
    with atomic_dir(layout.CODE) as folder:
        for name in registry.names("stages"):
            module = name.replace("-", "_")
            write_json(folder / "stages" / f"{module}.json", fingerprint(f"stages.{module}"))
        for name in registry.names("omrl.envs"):
            write_json(folder / "envs" / f"{name}.json", fingerprint(f"omrl.envs.{name.replace('-', '_')}"))
        for name in ENGINES:
            write_json(folder / "engines" / f"{name}.json", fingerprint(f"omrl.behavior.{name}"))
        for name, entry in params.algorithms.items():
            module = registry.module_name("omrl.algorithms", entry.file)
            write_json(folder / "algorithms" / f"{name}.json", fingerprint(module))


if __name__ == "__main__":
    run(main)
