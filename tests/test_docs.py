"""The examples of the docs, taken from the pages and run."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from batches import bag_of, meta_batch, moves_of, update
from gymnasium.utils.env_checker import check_env

import omrl.algorithms
import omrl.envs
from omrl.algorithms.base import Spec, create, load_model, save_model
from omrl.behavior import batched
from omrl.behavior.base import BehaviorConfig, Run
from omrl.behavior.checkpoints import load_actor
from omrl.behavior.rollouts import RolloutsConfig, rollout
from omrl.core import registry
from omrl.envs.base import load_family, register_all

DOCS = Path(__file__).resolve().parents[1] / "docs"


def code_of(page: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    return max(blocks, key=len)


@pytest.fixture
def pendulum(tmp_path, monkeypatch):
    (tmp_path / "pendulum_target.py").write_text(code_of("add-an-environment.md"), encoding="utf-8")
    monkeypatch.setattr(omrl.envs, "__path__", [*omrl.envs.__path__, str(tmp_path)])
    monkeypatch.setattr(omrl.envs.__spec__, "submodule_search_locations", omrl.envs.__path__)
    yield load_family("pendulum-target")
    sys.modules.pop("omrl.envs.pendulum_target")
    gymnasium.registry.pop("OMRL/PendulumTarget-v0", None)


def test_the_environment_of_the_page_works(pendulum, tmp_path):
    assert "pendulum-target" in registry.names("omrl.envs")
    register_all()
    tasks = [pendulum.sample(i, 3) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(pendulum.make(tasks[0]).unwrapped)
    batch, single = pendulum.batch(tasks, 2), pendulum.batch(tasks[1:2])
    batch.reset([np.random.default_rng(i) for i in range(6)])
    observation = single.reset([np.random.default_rng(2)])
    rng = np.random.default_rng(0)
    for _ in range(pendulum.horizon):
        actions = rng.uniform(-1.2, 1.2, (6, 1)).astype(np.float32)
        many, one = batch.step(actions), single.step(actions[2:3])
        np.testing.assert_array_equal(many.next_observation[2], one.next_observation[0])
        again = pendulum.reward(tasks[1], observation, actions[2:3], one.next_observation, one.features)
        np.testing.assert_array_equal(np.stack(again), np.stack([one.reward, one.sparse_reward]))
        assert many.reward[2] == one.reward[0]
        observation = one.next_observation
    assert many.reward[0] != many.reward[4]
    assert pendulum.oracle_return(tasks[0]) is None
    assert -100 * np.pi < pendulum.random_return(tasks[0]) < -100

    sac = {"net_arch": [32, 32], "learning_starts": 100, "gamma": 0.97}
    config = BehaviorConfig(engine="batched", total_steps=3000, checkpoint_every=3000, horizon=100, sac=sac)
    run = Run(0, {"angle": 0.0}, 0, str(tmp_path / "run"))
    batched.train_group("pendulum-target", {}, [run], config.resolved(), str(tmp_path / "work"))
    settings = RolloutsConfig(episodes_per_checkpoint=4, deterministic_episodes=0, horizon=100)
    returns = {}
    for step in (0, 3000):
        actor = load_actor(tmp_path / f"run/step={step:06d}.zip")
        _, episodes = rollout(actor, pendulum, run.task, index=0, checkpoint=step, config=settings, seed=0)
        returns[step] = episodes["return"].mean()
    assert returns[3000] > returns[0] + 50  # it learns to swing up


@pytest.fixture
def awr(tmp_path, monkeypatch):
    (tmp_path / "awr.py").write_text(code_of("add-an-algorithm.md"), encoding="utf-8")
    monkeypatch.setattr(omrl.algorithms, "__path__", [*omrl.algorithms.__path__, str(tmp_path)])
    monkeypatch.setattr(omrl.algorithms.__spec__, "submodule_search_locations", omrl.algorithms.__path__)
    yield "awr"
    sys.modules.pop("omrl.algorithms.awr")


def test_the_algorithm_of_the_page_works(awr, tmp_path):
    assert "awr" in registry.names("omrl.algorithms")
    chosen = {"meta_batch": 8, "width": 32, "rate": 3e-3, "gamma": 0.5}
    algorithm = create(awr, chosen, Spec(2, 2, False), 0, "cpu")

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        tasks = torch.randint(2, (8,), generator=g)
        goal = (0.8 * (1.0 - 2 * tasks))[:, None]
        s, a = torch.rand(8, 32, 2, generator=g) - 0.5, torch.rand(8, 32, 2, generator=g) * 2 - 1
        return tasks, s, a, -(a[..., 0] - goal).abs()

    for step in range(400):
        tasks, s, a, r = draw(step)
        end = moves_of(s, a, r, s, torch.ones(8, 32))
        scalars = update(algorithm, meta_batch(tasks, bag_of(s, a, r), end))
    assert set(scalars) == {"metric_loss", "v_loss", "policy_loss", "weight"}
    tasks, s, a, r = draw(10**6)
    z = algorithm.infer(bag_of(s, a, r))
    # uniform actions, weighted by how good they are: the sides are told apart
    assert float((algorithm.actions(s, z)[..., 0].mean(1) - 0.8 * (1.0 - 2 * tasks)).abs().max()) < 0.3
    save_model(algorithm, tmp_path / "model", "mine", awr)
    assert torch.equal(load_model(tmp_path / "model", "cpu").actions(s, z), algorithm.actions(s, z))


def test_the_part_of_focal_on_the_page_works(tmp_path, monkeypatch):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / "add-an-algorithm.md").read_text(encoding="utf-8"), re.M | re.S
    )
    (code,) = [block for block in blocks if "class Contrast(Focal)" in block]
    (tmp_path / "mine_on_the_page").mkdir()
    (tmp_path / "mine_on_the_page/contrast.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {"latent_dim": 2, "width": 8, "encoder_width": 16, "encoder_rate": 3e-3, "temperature": 0.5}
    algorithm = create("mine_on_the_page.contrast", sizes, Spec(2, 2, False), 0, "cpu")
    z, tasks = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([4, 7, 4])
    loss, scalars = algorithm.encoder_loss(z, None, tasks)
    expected = np.log(1 + np.exp(-2))  # both pairs of task 4: similarity 1 against 0, at temperature 0.5
    assert (float(loss), float(scalars["contrast"])) == (pytest.approx(expected), pytest.approx(expected))
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        tasks = torch.randint(2, (8,), generator=g)
        s, a = torch.rand(8, 32, 2, generator=g) - 0.5, torch.rand(8, 32, 2, generator=g) * 2 - 1
        r = -(a[..., 0] - 0.8 * (1.0 - 2 * tasks)[:, None]).abs()
        update(algorithm, meta_batch(tasks, bag_of(s, a, r), moves_of(s, a, r, s, torch.ones(8, 32))))
    unit = torch.nn.functional.normalize(algorithm.infer(bag_of(s, a, r)), dim=-1)
    same = tasks[:, None] == tasks
    assert float((unit @ unit.T)[same].min()) > 0.9 > 0.0 > float((unit @ unit.T)[~same].max())


def rows_of(text: str, title: str) -> dict[tuple[str, ...], str]:
    """Return (first three fields) -> field ``title`` of the first table that has it."""
    lines = [[field.strip() for field in line.strip()[1:-1].split("|")] for line in text.splitlines()]
    head = next(i for i, fields in enumerate(lines) if title in fields and fields[0] == "algorithm")
    rows = {}
    for fields in lines[head + 2 :]:
        if len(fields) < 4:
            break
        rows[tuple(fields[:3])] = fields[lines[head].index(title)]
    return rows


@pytest.mark.parametrize("title", ["return", "normalized", "interval"])
def test_the_readme_shows_the_numbers_of_the_report(title):
    shown = rows_of((DOCS.parent / "README.md").read_text(encoding="utf-8"), title)
    report = rows_of((DOCS.parent / "reports/results.md").read_text(encoding="utf-8"), title)
    assert len(shown) >= 5
    for row, value in shown.items():
        if not row[0].startswith("*") or title == "return":
            assert value == report[row].strip("[]").replace(", ", " to "), f"README.md: {row}"


@pytest.mark.parametrize("page", sorted(p.relative_to(DOCS.parent).as_posix() for p in [
    *DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md",
]))  # fmt: skip
def test_links_of_a_page_lead_somewhere(page):
    file = DOCS.parent / page
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("http")]
    missing = [link for link in links if not (file.parent / link).exists()]
    assert not missing, f"{page}: {missing}"


def test_every_method_and_protocol_has_a_line_in_the_docs_and_in_the_readme():
    page, readme = (DOCS / "algorithms.md").read_text(), (DOCS.parent / "README.md").read_text()
    for name in registry.names("omrl.algorithms") + registry.names("omrl.evaluation.protocols"):
        assert len(re.findall(rf"^\| `{name}` \|.{{20}}", page, re.MULTILINE)) >= 1, name
        assert f"`{name}`" in readme, name
