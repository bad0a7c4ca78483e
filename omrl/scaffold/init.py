"""``omrl init``: write the folder of an experiment.

It is a DVC project of its own that runs with the installed package alone, wherever it lies. The graph is that of every
pipeline, except for stage ``code``: the code is the installed one, and plug-ins lie anywhere, so that no path could be
watched; DVC runs the stage every time, which takes a second, and goes on with cells whose code is another.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import omrl
from omrl.core.errors import UserError, suggest
from omrl.core.files import write_text
from omrl.core.yamlfile import read as read_yaml
from omrl.experiment import INSTALLED, check

_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_PACKAGE = Path(omrl.__file__).parent
DEFAULT = "default"  # the experiment of the repository's root

IGNORED_BY_GIT = "/data/\ndvc_plots/\n__pycache__/\n.pytest_cache/\n.*.partial\nMUJOCO_LOG.TXT\n"
IGNORED_BY_DVC = (
    "__pycache__/\n*.pyc\n# unfinished work and temporary names are nobody's dependency\n.scratch/\n.*.partial\n"
)
CONFIG = '[core]\n    analytics = false\n    check_update = false\n[cache]\n    type = "reflink,copy"\n'
CONFIG_LOCAL = "[core]\n    no_scm = true\n"
README = """# {name}

An experiment with OMRL, begun as a copy of `{source}`. `params.yaml` says what is built, `dvc.yaml` how.

```sh
omrl check          # is params.yaml sound?
omrl repro          # build everything that is not up to date, on all cores ('dvc repro': one cell after another)
omrl lineage ...    # where a number, a dataset or one of its rows comes from
```

Results appear in `reports/`. Keep `dvc.lock`, `reports/` and the files beside this one in git; `data/` stays in DVC's
cache. The code is the installed package `omrl`; its fingerprints, and those of plug-ins, are taken anew by every
run, so that cells are built again whose code has changed, and no others.
{plugin}{git}"""
PLUGIN = """
`{package}/method.py` is a method of your own; `params.yaml` has it under the name `{name}`. It works as it is. Change
it, then run `python -m pytest tests` and `omrl repro`: its cells run again, and no others.
"""
NO_GIT = """
There was no git here, so DVC was told to do without (`.dvc/config.local`). After `git init`,
`dvc config --local --unset core.no_scm` gives it git back, which `dvc exp` needs.
"""


def presets() -> dict[str, Path]:
    """Return name -> folder of the pipelines that an experiment can begin as: in the package, or the checkout."""
    inside, root = _PACKAGE / "presets", _PACKAGE.parent
    if inside.is_dir():
        return {path.parent.name: path.parent for path in sorted(inside.glob("*/params.yaml"))}
    found = {path.parent.name: path.parent for path in sorted(root.glob("pipelines/*/params.yaml"))}
    return {DEFAULT: root, **found} if (root / "params.yaml").is_file() else found


def graph(folder: Path) -> str:
    """Return a pipeline's dvc.yaml, with stage ``code`` for the installed package."""
    text = (folder / "dvc.yaml").read_text(encoding="utf-8")
    watched = '"${repository}/omrl", "${repository}/stages", '
    if text.count(f"deps: [{watched}") != 1:
        raise UserError(f"{folder / 'dvc.yaml'}: stages.code.deps: expected [{watched}...], once")
    told = "always_changed: true # no path leads to installed code and plug-ins; a second each time\n    deps: ["
    comment, stages, body = text.partition("stages:\n")
    if not comment.startswith("#"):
        raise UserError(f"{folder / 'dvc.yaml'}: expected a comment first")
    head = "# The graph of every experiment. What is built, and how, stands in params.yaml beside it.\n"
    return head + stages + body.replace(f"deps: [{watched}", told)


def parameters(folder: Path, plugin: tuple[str, str] | None) -> str:
    """Return a pipeline's params.yaml for the installed package; ``plugin``: name and module of a method to add."""
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    line = f"repository: {INSTALLED} # the code is the installed package's"
    text, count = re.subn(r"^repository:.*$", line, text, flags=re.M)
    if plugin is not None:
        added = rf"\1\n  {plugin[0]}: {{ algorithm: {plugin[1]} }} # a method of one's own"
        text, more = re.subn(r"^(algorithms:.*)$", added, text, flags=re.M)
        count = min(count, more)
    if count != 1:
        raise UserError(f"{folder / 'params.yaml'}: expected the keys repository and algorithms, one line each")
    return text


def init(target: Path, source: str, plugin: bool) -> list[Path]:
    """Write the folder of an experiment, a git repository of its own unless it lies in one; return its files.

    Args:
        target: the folder; its last part is the experiment's name.
        source: name of a pipeline, see ``presets``, or a folder with params.yaml and dvc.yaml.
        plugin: also a method of one's own, with a test.

    Raises:
        UserError: the folder exists and is not empty, the name is not fit, or there is no such pipeline.
    """
    name, known = target.name, presets()
    folder = known.get(source) or Path(source)
    if not (folder / "params.yaml").is_file() or not (folder / "dvc.yaml").is_file():
        raise UserError(f"--from {source}: no such pipeline; {suggest(source, known)}")
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r}: expected a name of lower-case letters, digits and '-' that begins with a letter")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; expected a new folder")
    package = name.replace("-", "_")
    taken = importlib.util.find_spec(package) if plugin else None
    if taken is not None and taken.origin is not None:  # an empty folder is a module without origin
        raise UserError(f"{name!r}: there is a module {package} already; expected another name for a plug-in")
    graph_text = graph(folder)
    kept = [out for out in read_yaml(folder / "dvc.yaml")["stages"]["report"].get("outs", []) if isinstance(out, str)]
    outside = not any((parent / ".git").exists() for parent in target.resolve().parents)
    git = shutil.which("git")
    alone = outside and git is None
    files = {
        "params.yaml": parameters(folder, (name, f"{package}.method") if plugin else None),
        "dvc.yaml": graph_text,
        ".gitignore": IGNORED_BY_GIT + "".join(f"/{path}\n" for path in kept),
        ".dvcignore": IGNORED_BY_DVC,
        ".dvc/config": CONFIG,
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
        "README.md": README.format(
            name=name, source=source, git=NO_GIT if alone else "",
            plugin=PLUGIN.format(package=package, name=name) if plugin else "",
        ),
    }  # fmt: skip
    if alone:
        files[".dvc/config.local"] = CONFIG_LOCAL
    if plugin:
        here = Path(__file__).parent
        method, test = (here / f"{stem}.py" for stem in ("method", "method_test"))
        files[f"{package}/__init__.py"] = '"""A method of one\'s own."""\n'
        files[f"{package}/method.py"] = method.read_text(encoding="utf-8")
        files["tests/test_method.py"] = test.read_text(encoding="utf-8").replace("omrl.scaffold.", f"{package}.")
    for path, text in files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(target / path, text)
    check(target / "params.yaml")
    if outside and git is not None:
        subprocess.run([git, "init", "--quiet"], cwd=target, check=True)
    return [target / path for path in files]
