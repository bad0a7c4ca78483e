"""Write a fingerprint of the code of every stage, SAC engine, environment family and algorithm."""

from __future__ import annotations

from pathlib import Path

from omrl.core import layout
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, write_json, write_manifest
from omrl.experiment import INSTALLED, code_units, load
from omrl.provenance.fingerprint import OURS, fingerprint, origin
from stages import run


def main() -> None:
    """Write data/code/{stages,engines,envs,algorithms}/<name>.json, and data/code/origins.json about plug-ins."""
    params = load("repository", "env", "algorithms")
    check_repository(params.repository)
    units = code_units(params)
    origins = {}
    with atomic_dir(layout.CODE) as folder:
        for (kind, name), module in sorted(units.items()):
            found = fingerprint(module)
            write_json(folder / kind / f"{name}.json", found)
            if module.partition(".")[0] not in OURS:
                origins[f"{kind}/{name}"] = found | origin(module)
        for kind in sorted({kind for kind, _ in units}):  # compared by whoever depends on one of the files
            files = dict.fromkeys(f"{name}.json" for own, name in sorted(units) if own == kind)
            write_manifest(folder / kind, kind="code", inputs={}, parameters={}, files=files, packages=())
        write_json(folder / layout.ORIGINS, origins)


def check_repository(value: str) -> None:
    """Refuse to take fingerprints of other code than the one that DVC looks at and that runs."""
    root = (Path(value) / "stages").resolve().parent
    if value != INSTALLED and Path(__file__).resolve().parents[1] != root:
        raise UserError(
            f"params.yaml: repository = {value!r}: the installed package is not the one in that "
            "folder; run 'pip install -e .' in the repository, or correct the path"
        )


if __name__ == "__main__":
    run(main)
