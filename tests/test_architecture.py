"""The shape of the house: one direction of imports, one graph text, params declared as read."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from omrl.core import layout

ROOT = Path(__file__).resolve().parents[1]
# ground floor first; a floor imports only floors below it, or its own
FLOORS = [
    r"omrl\.core(\..*)?",
    r"omrl\.provenance\.fingerprint",
    r"omrl\.envs(\..*)?",
    r"omrl\.data\.(schema|parquet|quality|relabel|cards|taskdata|pairs)",
    r"omrl\.nets(\..*)?",
    r"omrl\.(behavior|algorithms)(\..*)?",
    r"omrl\.data(\.build)?",
    r"omrl\.(learning|evaluation)(\..*)?",
    r"omrl\.provenance(\.(lockfile|lineage|verify))?",
    r"omrl\.report(\..*)?",
    r"omrl\.experiment",
    r"omrl\.running(\..*)?",
    r"omrl\.(frontdoor|scaffold|settings)(\..*)?",
    r"omrl\.cli",
    r"stages(\..*)?",
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("omrl", "stages")
    for path in (ROOT / package).rglob("*.py")
}


def floor(module: str) -> int:
    if module == "omrl":
        return -1
    found = [i for i, pattern in enumerate(FLOORS) if re.fullmatch(pattern, module)]
    assert len(found) == 1, f"{module} is on no floor, or on several"
    return found[0]


def imported(path: Path) -> set[str]:
    return set().union(*(imported_by(node) for node in ast.walk(ast.parse(path.read_text()))))


def imported_by(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not followed"
        return {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    for name in imported(MODULES[module]):
        if name in MODULES and "omrl" not in (name, module):  # omrl itself imports names when they are used
            # the command line is the one place above the stages: 'omrl check' is their validation
            if module == "omrl.cli" and name.startswith("stages"):
                continue
            assert floor(name) <= floor(module), f"{module} imports {name}"
            if name.startswith("omrl.envs") or module.startswith("omrl.envs"):
                assert module == "omrl.data.build" or not module.startswith("omrl.data"), f"{module} must not know them"


def loaded(module: str) -> set[str]:
    """Return all that importing ``module`` imports, transitively: its packages, and imports outside of functions."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += [parent for parent in (name.rpartition(".")[0],) if parent]
        if name in MODULES:
            todo += at_import(MODULES[name])
    return found


@cache
def at_import(path: Path) -> frozenset[str]:
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported_by(node)
        todo += ast.iter_child_nodes(node)
    return frozenset(names)


# what collects and cuts rows runs behavior policies; the rest of the data needs no learning
@pytest.mark.parametrize(
    "module", [m for m in sorted(MODULES) if m.startswith(("omrl.envs", "omrl.data")) and m != "omrl.data.build"]
)
def test_envs_and_datasets_do_without_torch(module):
    heavy = {name.split(".")[0] for name in loaded(module)} & {"torch", "stable_baselines3", "safetensors", "dask"}
    assert not heavy, f"importing {module} imports {heavy}"
    assert not {n.split(".")[0] for n in imported(MODULES[module])} & {"torch", "stable_baselines3"}, "nor later"


ABOVE_A_METHOD = ("envs", "behavior", "learning", "evaluation", "report", "running", "provenance", "experiment", "cli")


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.startswith("omrl.algorithms")])
def test_a_method_sees_no_environment_no_file_and_no_params(module):
    known = {name for name in loaded(module) | imported(MODULES[module]) if name.startswith("omrl.")}
    assert not {name for name in known if name.split(".")[1] in ABOVE_A_METHOD}
    own = imported(MODULES[module])
    assert not {name for name in own if name.startswith(("omrl.core.layout", "omrl.core.yamlfile"))}
    if module == "omrl.algorithms.base":  # saves and loads for all of them
        return
    assert not {n for n in own if n.split(".")[0] in ("os", "io", "pathlib", "shutil", "json", "yaml", "pyarrow")}
    assert not {n for n in own if n.startswith("omrl.core.files")}
    names = {n.id for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.Name)}
    assert "open" not in names


# Who may open a params.yaml or dvc.yaml: what reads an experiment, the commands that make, show and run one, and what
# reads whole pipelines, other versions' too, as they lie in their folders (lineage, verification, omrl results).
READERS = (
    r"stages(\..*)?|omrl\.(experiment|cli|running|frontdoor|scaffold)(\..*)?"
    r"|omrl\.provenance\.(lockfile|verify)|omrl\.report\.collect"
)


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if not re.fullmatch(READERS, m)])
def test_the_library_opens_neither_params_nor_graph(module):
    texts = [n.value for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.Constant)]
    assert not [t for t in texts if isinstance(t, str) and re.fullmatch(r"([\w./-]*/)?(params|dvc)\.yaml", t)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, its docstring aside."""
    first = function.body[0]
    described = ast.get_docstring(function) is not None and first.end_lineno is not None
    documented = first.end_lineno - first.lineno + 1 if described else 0
    return function.end_lineno - function.lineno + 1 - documented


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_fit_on_a_screen_and_none_is_a_stub(module):
    nodes = list(ast.walk(ast.parse(MODULES[module].read_text())))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: length(f) for f in functions if length(f) > 60} == {}
    if module != "omrl.envs._mujoco":  # its hook is for families with a ``derived_size`` alone, so it is not abstract
        assert "NotImplementedError" not in {n.id for n in nodes if isinstance(n, ast.Name)}


def test_only_one_module_imports_stable_baselines3():
    users = [m for m, p in MODULES.items() if any(n.startswith("stable_baselines3") for n in imported(p))]
    assert users == ["omrl.behavior.sb3"]


def graph() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", sorted(graph()))
def test_a_stage_reads_exactly_the_params_it_declares(stage):
    body = graph()[stage]
    body = {**body, **body.get("do", {})}
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "load"]
    read = {arg.value for call in calls for arg in call.args}
    if stage == "plan":  # reads the cells and checks the whole file
        assert not calls
        return
    assert read == {entry.split(".")[0] for entry in body["params"]}


@pytest.mark.parametrize("stage", sorted(graph()))
def test_every_stage_has_a_description_and_depends_on_its_fingerprint(stage):
    body = graph()[stage]
    body = {**body, **body.get("do", {})}
    assert len(body["desc"]) > 20
    if stage not in ("plan", "code"):
        assert f"data/code/stages/{stage}.json" in body["deps"]
    assert body["cmd"].startswith(f"python -m stages.{stage}")
    assert "wdir" not in body


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("behavior", layout.behavior("${item.shard}")),
        ("rollouts", layout.rollouts("${item.shard}")),
        ("dataset", layout.datasets("${item.level}")),
        ("relabel", layout.datasets("${key}")),
        ("meta_train", layout.models("${item.algorithm}", "${item.dataset}", "${item.seed}")),
        ("evaluate", layout.evaluations("${item.algorithm}", "${item.train}", "${item.test}", "${item.seed}")),
        ("online", layout.online("${key}")),
        ("evaluate_online", layout.evaluated_online("${key}")),
        ("code", layout.CODE),
        ("tasks", layout.TASKS.parent),
    ],
)
def test_the_graph_has_the_layout_of_the_code(stage, path):
    body = graph()[stage]
    assert {**body, **body.get("do", {})}["outs"] == [path.as_posix()]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"omrl.core.layout"}))
def test_only_one_module_spells_paths_below_data(module):
    if module.startswith("omrl.provenance"):  # reads what any version wrote, by the paths in dvc.lock
        return
    texts = [n.value for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.Constant)]
    assert not [t for t in texts if isinstance(t, str) and re.match(r"data/\w[^\n]*$", t)]


def test_every_pipeline_has_the_same_graph_text_and_no_links():
    for folder in (ROOT / "pipelines").iterdir():
        assert (folder / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes(), folder.name
        assert not (folder / "dvc.yaml").is_symlink()
        assert (folder / "params.yaml").is_file()


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_no_address_in_the_lock_and_everything_pinned():
    assert pins("requirements.lock")["torch"] == "2.13.0"


def test_the_peers_environment_has_our_versions():
    ours, theirs = pins("requirements.lock"), pins("requirements-sbx.lock")
    assert {"sbx-rl", "jax", "flax"} <= set(theirs) - set(ours)
    shared = {"gymnasium", "mujoco", "numpy", "pydantic", "stable_baselines3", "torch"}
    assert shared <= set(theirs)
    assert {name: theirs[name] for name in set(ours) & set(theirs)} == {n: ours[n] for n in set(ours) & set(theirs)}


def test_stages_are_thin():
    for path in (ROOT / "stages").glob("*.py"):
        if path.stem != "params":
            assert len(path.read_text().splitlines()) <= 80, path.name
