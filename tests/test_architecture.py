"""The shape of the house: one direction of imports, one graph text, params declared as read."""

from __future__ import annotations

import ast
import re
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
    r"omrl\.(frontdoor|scaffold)(\..*)?",
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
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    for name in imported(MODULES[module]):
        if name in MODULES and "omrl" not in (name, module):  # omrl itself imports names when they are used
            # the command line is the one place above the stages: 'omrl check' is their validation
            if module == "omrl.cli" and name.startswith("stages"):
                continue
            assert floor(name) <= floor(module), f"{module} imports {name}"
            if re.match(r"omrl\.algorithms", module):
                assert not name.startswith("omrl.envs"), f"{module} must not know environments"
            if name.startswith("omrl.envs") or module.startswith("omrl.envs"):
                assert module == "omrl.data.build" or not module.startswith("omrl.data"), f"{module} must not know them"


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.startswith(("omrl.envs", "omrl.data"))])
def test_envs_and_datasets_do_without_torch(module):
    assert not {n for n in imported(MODULES[module]) if n.split(".")[0] in ("torch", "stable_baselines3")}


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


def test_no_address_in_the_lock_and_everything_pinned():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins


def test_stages_are_thin():
    for path in (ROOT / "stages").glob("*.py"):
        if path.stem != "params":
            assert len(path.read_text().splitlines()) <= 80, path.name
