"""The names of ``import omrl``: every example of docs/python.md, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from toy import write_pipeline

import omrl
from omrl.core import seeding
from omrl.core.errors import UserError
from omrl.learning.train import MetaTrainConfig, build_model, spec_of

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"latent_dim": 3, "width": 16, "encoder_width": 16, "meta_batch": 4, "rl_batch": 16, "context_batch": 16}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_pipeline(folder)
    return folder


@pytest.fixture
def data(folder):
    return omrl.load_dataset(folder / "data/datasets/expert")


@pytest.fixture
def family():
    return omrl.make_family("sparse-point-robot")


def test_every_example_of_the_page_runs(folder, tmp_path, monkeypatch):
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(folder / "data")
    text = (ROOT / "docs/python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    # fewer steps and smaller nets: the page's own sizes take minutes
    code = re.sub(r"steps=\d+", "steps=100, width=16, encoder_width=16, context_batch=32, rl_batch=32", code)
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code, "docs/python.md", "exec"), names)
    missing = [name for name in omrl.__all__ if f"omrl.{name}(" not in code and name not in ("Agent", "Dataset")]
    assert not missing
    assert isinstance(names["data"], omrl.Dataset)
    assert isinstance(names["agent"], omrl.Agent)
    table = names["table"]
    assert len(table) == 6 * 2 * 2  # tasks x episodes x repetitions
    assert set(table[table.counted].episode) == {1}
    assert np.isfinite(table["return"]).all()


def test_it_learns_to_reach_the_goals(data, family):
    agent = omrl.fit("bc", data, family, steps=800, threads=1, **SMALL | {"actor_rate": 1e-3, "encoder_rate": 1e-3})
    table = omrl.evaluate(agent, family, data, episodes=2, repetitions=1)
    train = table[table.counted & (table.split == "train")]
    assert train.dense_return.mean() > -12  # -20 for standing still, -5.5 for the oracle
    belief = agent.adapt(data.context(task=0, rows=50))
    goal = np.array(data.tasks[0]["parameters"]["goal"])
    assert agent.act(belief, [0.0, 0.0]) @ goal > 0.3


def test_fit_gives_the_weights_of_the_pipelines_cell(data, family, folder, tmp_path, monkeypatch):
    agent = omrl.fit("focal", data, family, steps=20, seed=3, threads=1, **SMALL)
    monkeypatch.chdir(folder)
    build_model(
        name="mine", module="focal", overrides=SMALL, sources={"transitions": "expert"}, dataset="expert", seed=3,
        config=MetaTrainConfig(steps=20, threads=1), spec=spec_of(family), inference="sparse", code=[],
        target=tmp_path / "model",
    )  # fmt: skip
    cell = omrl.load_agent(tmp_path / "model").algorithm
    for name, tensor in cell.model_state().items():
        assert torch.equal(tensor, agent.algorithm.model_state()[name]), name
    assert cell.seed == seeding.integer(3, "meta_train")


def test_weights_do_not_depend_on_the_threads(data, family):
    """A GRU's orthogonal start has other bits with two threads."""
    weights = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        agent = omrl.fit("borel", data, family, steps=1, threads=1, vae_steps=0)
        weights.append(agent.algorithm.model_state())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_import_is_without_torch_and_names_come_when_used():
    code = "import omrl, sys; assert 'torch' not in sys.modules; assert set(omrl.__all__) <= set(dir(omrl)); omrl.fit"
    code += "; assert 'torch' in sys.modules; omrl.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.strip().endswith("AttributeError: module 'omrl' has no attribute 'nothing'")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, f: omrl.fit("foca", d, f), r"unknown method 'foca': did you mean 'focal'\?"),
        (lambda d, f: omrl.fit("focal", d, f, laten_dim=3), r"laten_dim: unknown key; did you mean 'latent_dim'\?"),
        (lambda d, f: omrl.fit("focal", d, f, steps=0), r"steps = 0"),
        (lambda d, f: omrl.fit(int, d, f), r"expected a name, a module or a class"),
        (lambda d, f: omrl.fit("focal", d, omrl.make_family("point-robot")), r"is of the family 'sparse-point-robot'"),
        (lambda d, f: d.context(task=17, rows=5), r"task = 17: .* has tasks 0 to 5"),
        (lambda d, f: d.context(task=1, rows=0), r"rows = 0: expected 1 or more"),
        (lambda d, f: omrl.load_dataset("nowhere"), r"all\.json: missing"),
        (lambda d, f: omrl.load_agent("nowhere"), r"nowhere/config\.json: missing"),
    ],
)
def test_what_is_refused(data, family, call, message):
    with pytest.raises(UserError, match=message):
        call(data, family)


def test_cuda_without_a_gpu_is_one_line(data, family, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        omrl.fit("focal", data, family, device="cuda")


def test_what_an_agent_refuses(data, family):
    two_rows = omrl.fit("mt-ft", data, family, steps=1, threads=1, width=8, batch=8)
    with pytest.raises(UserError, match=r"evaluate: context_per_episode = 1: expected 2 or more, the fewest that"):
        omrl.evaluate(two_rows, family, data, context_per_episode=1)
    agent = omrl.fit("focal", data, family, steps=1, threads=1, **SMALL)
    with pytest.raises(UserError, match=r"observation of shape \[3\]: expected \[tasks, 2\]"):
        agent.act(agent.prior(), [0.0, 0.0, 0.0])
    with pytest.raises(UserError, match="no such protocol"):
        omrl.evaluate(agent, family, data, protocol="offline")
