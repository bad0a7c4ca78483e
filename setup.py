"""Beside pyproject.toml: copies the pipelines' params.yaml and dvc.yaml into the wheel, for ``omrl init``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithPresets(build_py):
    """Adds omrl/presets/<pipeline>/: what an experiment can begin as."""

    def run(self) -> None:
        """Build as usual, then copy; an editable install looks into pipelines/ itself."""
        super().run()
        if self.editable_mode:
            return
        sources = {"default": ROOT, **{path.parent.name: path.parent for path in ROOT.glob("pipelines/*/params.yaml")}}
        for name, folder in sources.items():
            target = Path(self.build_lib) / "omrl/presets" / name
            target.mkdir(parents=True, exist_ok=True)
            for file in ("params.yaml", "dvc.yaml"):
                shutil.copyfile(folder / file, target / file)


setup(cmdclass={"build_py": BuildWithPresets})
