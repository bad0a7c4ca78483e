"""Methods and environments of somebody else: found, checked, fingerprinted."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from omrl.core import registry
from omrl.core.errors import UserError
from omrl.experiment import check
from omrl.provenance import fingerprint

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "pipelines/smoke"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An experiment's folder, on the path while the test runs, with empty caches."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    forget()
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] not in ("omrl", "torch"):
            del sys.modules[name]
    forget()


def forget():
    importlib.invalidate_caches()
    for cached in (fingerprint._tree, fingerprint._content, fingerprint._module_hash, fingerprint._same_author,
                   registry.plugins):  # fmt: skip
        cached.cache_clear()


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    forget()


def taken(module: str) -> str:
    return fingerprint.fingerprint(module)["fingerprint"]


def params(folder: Path, dvc: str | None = None, **changes) -> Path:
    values = yaml.safe_load((SMOKE / "params.yaml").read_text()) | changes
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    (folder / "dvc.yaml").write_text(dvc or (SMOKE / "dvc.yaml").read_text())
    return folder / "params.yaml"


METHOD = "from omrl.algorithms.bc import Bc, BcConfig\nfrom {where} import X\nCONFIG, ALGORITHM = BcConfig, Bc\n"


def test_a_fingerprint_covers_the_modules_of_the_plug_in_and_of_its_folder(folder):
    write(folder, mine__method=METHOD.format(where="beside"), beside="X = 1\n", other="Y = 1\n")
    first = taken("mine.method")
    assert {"mine.method", "beside", "omrl.algorithms.bc"} <= set(fingerprint.closure("mine.method"))
    assert {path.name for path in fingerprint.sources("mine.method")} == {"method.py", "beside.py"}
    write(folder, other="Y = 2\n")
    assert taken("mine.method") == first
    write(folder, beside="X = 1  # a comment\n")
    assert taken("mine.method") == first
    write(folder, beside="X = 2\n")
    assert taken("mine.method") != first


def test_an_installed_package_beside_others_counts_alone(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "_INSTALLED", {folder.resolve()})
    write(folder, mine__method=METHOD.format(where="beside"), beside="X = 1\n")
    assert "beside" not in fingerprint.closure("mine.method")


def test_renaming_and_moving_a_module_changes_nothing_and_another_target_does(folder):
    write(folder, a__method="import os\nfrom a.low import X, Y\nZ = X + Y\n", a__low="X = 1\nY = 1\n")
    write(folder, b__deep__new="import os\nfrom b.deep.aux import X\nfrom b.deep.aux import Y\nZ = X + Y\n")
    write(folder, b__deep__aux="X = 1\nY = 1\n", b__deep____init__="", b____init__='"""A package."""\n')
    assert taken("a.method") == taken("b.deep.new")
    write(folder, a__low="X = 1\nY = 2\n")
    assert taken("a.method") != taken("b.deep.new")
    # the same modules, but each name from the other one
    write(folder, c__m="from c.p import X\nfrom c.q import Y\n", c__p="X = Y = 1\n", c__q="X = Y = 2\n")
    write(folder, d__m="from d.q import X\nfrom d.p import Y\n", d__p="X = Y = 1\n", d__q="X = Y = 2\n")
    assert taken("c.m") != taken("d.m")


STAND_INS = """
import ast, sys, types
from pathlib import Path
import omrl

class Nothing:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return Nothing()
    def __getattr__(self, name): return Nothing()
    def __enter__(self): return self
    def __exit__(self, *args): return None

def stand_in(name):
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: Nothing() if attribute[0] != "_" else (_ for _ in ()).throw(AttributeError)
    sys.modules[name] = module
    return module

if sys.argv[1] == "without":
    for name in ("progress", "events", "allocator"):
        stand_in(f"omrl.core.{name}")
    errors, registry = stand_in("omrl.core.errors"), stand_in("omrl.core.registry")
    errors.UserError = type("UserError", (Exception,), {})
    import importlib
    registry.load = lambda package, name, *rest: importlib.import_module(f"{package}.{name.replace('-', '_')}")
    registry.is_outside = lambda package, name: False
    registry.own_names = registry.names = lambda package: []

import hashlib, numpy as np, torch
from omrl.algorithms.base import create
from omrl.data.taskdata import TaskData
from omrl.envs.base import load_family
from omrl.learning.train import MetaTrainConfig, make_sampler, spec_of, train
family = load_family("point-robot")
tasks, rng = family.tasks(3, 0, 1), np.random.default_rng(0)
env = family.batch(tasks, 8)
before = env.reset([np.random.default_rng(i) for i in range(24)])
action = rng.uniform(-1, 1, (24, 2)).astype(np.float32)
done = env.step(action)
shaped = {"observation": before, "action": action, "reward": done.reward, "sparse_reward": done.sparse_reward,
          "next_observation": done.next_observation, "terminal": done.terminated.astype(np.float32)}
data = TaskData.of_bags([0, 1, 2], **{k: v.reshape(3, 8, *v.shape[1:]) for k, v in shaped.items()})
small = {"width": 8, "encoder_width": 8, "meta_batch": 2, "rl_batch": 4, "context_batch": 4}
algorithm = create("focal", small, spec_of(family, 3), 0, "cpu")
config = MetaTrainConfig(steps=4, log_every=2, threads=1)
at = train(algorithm, make_sampler(algorithm, {"transitions": data}, 0), config, Path(sys.argv[2]) / "state")
digest = hashlib.sha256(at.curve.text().encode())
for name, tensor in sorted(algorithm.model_state().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_modules_left_out_of_fingerprints_cannot_touch_a_result(tmp_path):
    found = set()
    for variant in ("with", "without"):
        command = [sys.executable, "-c", STAND_INS, variant, tmp_path / variant]
        (tmp_path / variant).mkdir()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.splitlines()[-1])
    assert len(found) == 1
    replaced = {f"omrl.core.{name}" for name in ("allocator", "errors", "events", "progress", "registry")}
    assert {"omrl", "omrl.experiment", *replaced} == fingerprint.NO_RESULT


def test_installed_plug_ins_are_listed_and_loaded_by_their_entry_points(folder):
    write(folder, theirs__method=METHOD.format(where="theirs.low"), theirs__low="X = 1\n")
    metadata = folder / "theirs-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("[omrl.algorithms]\ntheir-method = theirs.method\nfocal = theirs.low\n")
    (metadata / "top_level.txt").write_text("theirs\n")
    forget()
    assert "their-method" in registry.names("omrl.algorithms")
    assert registry.load("omrl.algorithms", "their-method").__name__ == "theirs.method"
    assert registry.load("omrl.algorithms", "focal").__name__ == "omrl.algorithms.focal"  # ours stay ours
    origin = fingerprint.origin("theirs.method")
    assert (origin["package"], origin["version"], origin["file"]) == ("theirs", "1.2", "method.py")
    path = params(folder, algorithms={"their-method": {"latent_dim": 3}})
    with pytest.raises(UserError, match=r"deps does not have (low|method)\.py .*algorithms\.their-method\.algorithm"):
        check(path)
    watched = (SMOKE / "dvc.yaml").read_text().replace('"${repository}/stages",', '"${repository}/stages", theirs,')
    assert "meta_train@their-method-expert-0" in check(params(folder, watched, algorithms={"their-method": {}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_there\n", r"its import fails: ModuleNotFoundError: No module named 'nothing_there'"),
        ("x = (\n", r"its import fails: SyntaxError"),
        ("import os\n1 / 0\n", r"its import fails: ZeroDivisionError: division by zero \(.*method\.py, line 2\)"),
        ("raise SystemExit(3)\n", r"its import fails: SystemExit: 3 \("),
        (
            "from omrl.algorithms.bc import Bc as ALGORITHM\nclass CONFIG: pass\n",
            r"method\.py: CONFIG: expected a class of omrl's Config",
        ),
        ("from omrl.algorithms.bc import Bc as ALGORITHM\n", r"method\.py lacks CONFIG; expected CONFIG, ALGORITHM"),
        ("CONFIG = ALGORITHM = 1\n", r"ALGORITHM: expected a class of omrl's Algorithm"),
        (
            "from omrl.algorithms.base import ContextAlgorithm\nfrom omrl.algorithms.bc import CONFIG\n"
            "class ALGORITHM(ContextAlgorithm):\n    pass\n",
            r"ALGORITHM lacks actions, infer, latent, modules, optimizers, phases, update",
        ),
    ],
)
def test_check_says_in_one_line_what_a_method_lacks(folder, text, message):
    write(folder, mine__method=text)
    path = params(folder, algorithms={"mine": {"algorithm": "mine.method"}})
    with pytest.raises(UserError, match=message) as caught:
        check(path)
    assert "algorithms.mine.algorithm: algorithm 'mine.method': " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_that_is_like_none_of_ours_is_told_how_to_name_ones_own():
    with pytest.raises(
        UserError, match=r"unknown algorithm 'qqq': available: .*; one of your own is named by its module"
    ):
        registry.load("omrl.algorithms", "qqq", "algorithm")
    with pytest.raises(UserError, match=r"did you mean 'focal'\?$"):
        registry.load("omrl.algorithms", "focall", "algorithm")


def test_an_environment_of_ones_own(folder):
    text = (ROOT / "omrl/envs/sparse_point_robot.py").read_text()
    text = text.replace('"OMRL/SparsePointRobot-v0"', '"Mine/Robot-v0"').replace('"sparse-point-robot"', '"mine.robot"')
    write(folder, mine__robot=text)
    watched = (SMOKE / "dvc.yaml").read_text().replace('"${repository}/stages",', '"${repository}/stages", mine,')
    assert check(params(folder, watched, env="mine.robot"))
    from omrl.envs.base import load_family

    family = load_family("mine.robot", {"radius": 0.5})
    env = family.make(family.sample(0, 1))
    observation, _ = env.reset(seed=0)
    assert observation.shape == (2,)
    with pytest.raises(UserError, match=r"deps does not have robot\.py"):
        check(params(folder, env="mine.robot"))
    write(folder, mine__broken="FAMILY = ENV = None\n")
    write(folder, mine__bare=text.replace('    env_id = "Mine/Robot-v0"\n', ""))
    with pytest.raises(UserError, match=r"env: environment 'mine\.bare': .*bare\.py: SparsePointRobot lacks env_id"):
        check(params(folder, watched, env="mine.bare"))
    with pytest.raises(
        UserError, match=r"env: environment 'mine\.broken': .*FAMILY: expected a class of omrl's Family"
    ):
        check(params(folder, watched, env="mine.broken"))


def test_cuda_without_a_gpu_is_told_before_anything_runs(folder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = yaml.safe_load((SMOKE / "params.yaml").read_text())
    for section in ("meta_train", "evaluate"):
        changed = {section: values[section] | {"device": "cuda"}}
        with pytest.raises(UserError, match=rf"{section}\.device = 'cuda': PyTorch finds no GPU here; expected cpu"):
            check(params(folder, **changed))
    with pytest.raises(UserError, match=r"behavior\.device = 'cuda': PyTorch finds no GPU here"):
        check(params(folder, behavior=values["behavior"] | {"engine": "batched", "device": "cuda"}))
