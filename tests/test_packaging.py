"""What is installed: the wheel's content, and a library that does without the extras."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import build_wheel

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("dask", "distributed", "dvc", "jinja2", "matplotlib", "PIL", "sklearn", "stable_baselines3", "tensorboard")
NEEDED_BY = {  # the modules that cannot be imported without an extra
    "omrl.behavior.sb3", "omrl.behavior.batched",
    "omrl.report.build", "omrl.report.figures", "omrl.report.page", "stages.report",
}  # fmt: skip
BLOCKED = f"import sys\nfor name in {EXTRAS}: sys.modules[name] = None\n"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """The names in a wheel built from a copy of what git knows."""
    return set(zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("build"))).namelist())


def test_the_wheel_has_code_templates_types_and_nothing_else(wheel):
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "omrl").rglob("*.py")}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "stages").glob("*.py")}
    expected |= {"omrl/py.typed", *(f"omrl/report/templates/page.{kind}" for kind in ("html", "css", "js"))}
    pipelines = {"default", *(path.parent.name for path in ROOT.glob("pipelines/*/params.yaml"))}
    expected |= {f"omrl/presets/{name}/{file}" for name in pipelines for file in ("params.yaml", "dvc.yaml")}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_the_library_does_without_the_extras():
    code = f"""
import importlib
from pathlib import Path
failed = set()
for path in sorted([*Path('omrl').rglob('*.py'), *Path('stages').glob('*.py')]):
    module = '.'.join(path.with_suffix('').parts).removesuffix('.__init__')
    if module != 'omrl.__main__':
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            assert error.name.split('.')[0] in {EXTRAS}, (module, error)
            failed.add(module)
print(sorted(failed))
"""
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(NEEDED_BY))


def test_who_needs_an_extra_is_told_which_in_one_line():
    code = (
        "from omrl.core.errors import run\nimport importlib\nrun(lambda: importlib.import_module('omrl.report.page'))"
    )
    done = python(code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "error: the package jinja2 is not installed; run pip install 'omrl[pipeline]'"


def test_every_requirement_has_a_lower_and_an_upper_bound_and_a_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    pins = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().split()}
    for requirement in requirements:
        if requirement.startswith("omrl["):
            continue
        assert ">=" in requirement
        assert "<" in requirement or requirement.startswith("setuptools"), requirement
        assert requirement.split(">=")[0].split("[")[0].lower().replace("_", "-") in pins, requirement
