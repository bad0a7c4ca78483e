"""Everything a user can get wrong in params.yaml ends in one line that names key, value and expectation."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from omrl import experiment as params
from omrl.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def edit(tmp_path):
    """Return a function that writes the default params with one key changed and checks them."""

    def check(key: str, value: object, *, remove: bool = False) -> list[str]:
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        place = values
        *path, last = key.split("/")
        for step in path:
            place = place[step]
        if remove:
            del place[last]
        else:
            place[last] = value
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(values))
        return params.check(file)

    return check


EXTRA = pytest.mark.skipif(not importlib.util.find_spec("metaworld"), reason="needs 'make setup-metaworld'")


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(str(path.relative_to(ROOT)), marks=EXTRA if path.parent.name.startswith("metaworld-") else ())
        for path in [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
    ],
)
def test_the_params_of_the_project_are_sound(file):
    cells, asked = params.check(ROOT / file), yaml.safe_load((ROOT / file).read_text())
    datasets = asked["dataset"]
    models = len(asked["algorithms"]) * len(datasets["train"]) * len(asked["seeds"])
    data = 2 * len(asked["shards"]) + len(datasets["levels"]) + len(asked["relabel"]) + len(asked["pairs"])
    assert len(cells) == 4 + data + models * (1 + len(datasets["test"])) + 2 * len(asked["online"])
    assert sum(cell.startswith("evaluate@") for cell in cells) == models * len(datasets["test"])


def test_the_point_robots_tables_have_one_set_of_settings():
    """The same cell of two pipelines is then the same number, and DVC's run-cache has trained it once."""
    shared = ["repository", "env", "env_config", "tasks", "shards", "seed", "behavior", "rollouts", "meta_train",
              "seeds", "online"]  # fmt: skip
    sparse = ["sparse-point-robot", "sparse-point-robot-shift", "sparse-point-robot-relabelled"]
    files = {name: yaml.safe_load((ROOT / f"pipelines/{name}/params.yaml").read_text()) for name in
             [*sparse, "point-robot-wind"]}  # fmt: skip
    table, shift, relabelled = (files[name] for name in sparse)
    for other in (shift, relabelled):
        assert {key: table[key] for key in shared} == {key: other[key] for key in shared}
        for key in ("levels", "transitions_per_task"):
            assert table["dataset"][key] == other["dataset"][key]
    assert table["evaluate"] == shift["evaluate"]
    assert table["evaluate"].items() <= relabelled["evaluate"].items()
    for key in ("meta_train", "seeds", "evaluate"):
        assert table[key] == files["point-robot-wind"][key]
    for name, values in files.items():
        for algorithm, settings in values["algorithms"].items():
            assert settings == table["algorithms"].get(algorithm, settings), f"{name}: {algorithm}"
    assert {"focal", "focalpp"} <= table["algorithms"].keys() & shift["algorithms"].keys()
    assert set(table["dataset"]["train"]) <= set(shift["dataset"]["train"])


def test_the_cells_are_those_of_the_graph():
    cells = params.check(ROOT / "params.yaml")
    assert "meta_train@focal-expert-0" in cells
    assert "evaluate@focal-relabelled-expert-0" in cells
    assert "behavior@000-014" in cells


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("behaviour", {}, r"behaviour: unknown key; did you mean 'behavior'\?"),
        ("env", "sparse-point-robo", r"env = 'sparse-point-robo': unknown environment; did you mean 'sparse-point-r"),
        ("env", 3, r"env = 3: expected a valid string"),
        ("env_config/radius", -0.2, r"env_config\.radius = -0\.2: expected greater than 0"),
        ("env_config/sparse_reward", "eq36", r"env_config\.sparse_reward = 'eq36': expected"),
        ("tasks/train", "20", r"tasks\.train = '20': expected a valid integer"),
        ("tasks/train", 0, r"tasks\.train = 0: expected greater than or equal to 1"),
        ("tasks/tets", 5, r"tasks\.tets: unknown key; did you mean 'test'"),
        ("tasks/test", 11, r"shards leave out tasks 30\.\.30: .*= 31"),
        ("tasks/test", 9, r"shards\.015-029 ends at task 29, but .*= 29: expected the last index to be 28"),
        ("tasks/test", 90, r"tasks\.train \+ tasks\.test = 20 \+ 90: expected at most 100"),
        ("shards/015-029", [14, 29], r"shards\.015-029 = \[14, 29\] overlaps shards\.000-014"),
        ("shards/015-029", [16, 29], r"shards leave out task 15: expected 0\.\.29"),
        ("shards/015-029", [29, 15], r"shards\.015-029 = \[29, 15\]: expected \[first, last\]"),
        ("shards/015-029", "15-29", r"shards\.015-029 = '15-29': expected a valid list"),
        ("shards", {"A b": [0, 24]}, r"'A b' names a folder"),
        ("shards", {"all": [0, 24]}, r"shards\.all: the name is taken by the file of all tasks"),
        ("seed", -1, r"seed = -1: expected greater than or equal to 0"),
        ("behavior/engine", "sb4", r"behavior\.engine = 'sb4': expected 'sb3', 'batched' or 'scripted'"),
        ("behavior/total_steps", 2001, r"behavior"),
        ("behavior/sac/gama", 0.9, r"behavior\.sac\.gama: unknown key; did you mean 'gamma'"),
        ("behavior/sac/gamma", 1.5, r"behavior\.sac\.gamma = 1\.5: expected less than or equal to 1"),
        ("behavior/sac/learning_rate", "fast", r"behavior\.sac\.learning_rate = 'fast': expected a valid number"),
        ("rollouts/episodes_per_checkpoint", 0, r"rollouts\.episodes_per_checkpoint = 0: expected greater"),
        ("dataset/train", ["exprt"], r"dataset\.train has 'exprt': no such dataset; did you mean 'expert'\?"),
        ("dataset/test", ["expert", "expert"], r"dataset\.test = .*expected each dataset once"),
        ("dataset/test", [], r"dataset\.test = \[\]: expected"),
        ("dataset/levels/step-333", {"steps": [333]}, r"dataset\.levels\.step-333\.steps.*333.*0, 250, 500"),
        ("dataset/levels/medium", {"steps": [500]}, r"dataset\.levels: 'medium' is \{nearest: 0\.5\} in every p"),
        ("rollouts/steps", [250, 2000], r"dataset\.levels\.expert: rollouts\.steps has 250, 2000: expected the first"),
        ("dataset/levels/medium", {"band": [0.9, 0.1]}, r"dataset\.levels\.medium"),
        ("dataset/levels/medium", {"steps": [500], "band": [0, 1]}, r"dataset\.levels\.medium"),
        ("dataset/transitions_per_task", 10**6, r"dataset\.transitions_per_task = 1000000"),
        ("relabel/relabelled/source", "best", r"relabel\.relabelled\.source = 'best': not one of dataset\.levels"),
        ("relabel/expert", {"source": "mixed"}, r"relabel\.expert: the name is taken"),
        ("algorithms", {}, r"algorithms: expected at least one"),
        ("algorithms/reference", {"algorithm": "focal"}, r"algorithms\.reference: expected another name"),
        ("algorithms/focall", {}, r"algorithms\.focall: unknown algorithm 'focall': did you mean 'focal'\?"),
        ("algorithms/mine", {"algorithm": "fokal"}, r"algorithms\.mine\.algorithm = 'fokal': unknown algorithm"),
        ("algorithms/focal", {"laten_dim": 5}, r"algorithms\.focal\.laten_dim: unknown key; did you mean"),
        ("algorithms/mbml", {"tasks": 99, "bcq_steps": 0}, r"algorithms\.mbml\.tasks = 99: expected tasks\.train = \d"),
        ("algorithms/m", {"algorithm": "mbml", "tasks": 20, "bcq_steps": 10**9}, r"\.m\.bcq_steps = 10+: expected"),
        ("algorithms/borel", {}, r"borel\.vae_steps = 5000: expected below meta_train\.steps = \d+, the rest"),
        ("algorithms/macaw", {"steps": 11, "inner_batch": 22}, r"evaluate\.context_per_episode = \d+: expected 22 or "),
        ("online/focal", {"algorithm": "focal"}, r"online\.focal: the name is taken by algorithms\.focal"),
        ("online/on", {"algorithm": "fokal"}, r"online\.on\.algorithm = 'fokal': not one of algorithms; did you mean"),
        ("online/on", {"algorithm": "focal", "label": "decoded"}, r"online\.on\.label = decoded: 'focal' has no decod"),
        ("online/on", {"algorithm": "focal", "episodes": 1}, r"online\.on: prior_episodes = 2: expected at most epis"),
        ("online/on", {"algorithm": "focal", "prior_episodes": 0}, r"posterior = own with prior_episodes = 0"),
        ("online/on", {"algorithm": "focal", "explore": "mean", "resample": "step"}, r"resample = step with explore ="),
        ("meta_train/steps", 0, r"meta_train\.steps = 0: expected greater than or equal to 1"),
        ("seeds", [], r"seeds = \[\]: expected"),
        ("seeds", [0, 0], r"seeds = \[0, 0\]: expected each seed once"),
        ("evaluate/protocol", "offline", r"protocol = 'offline': no such protocol; did you mean 'offline-context'"),
        ("report/bootstrap_samples", "lots", r"report\.bootstrap_samples = 'lots': expected a valid integer"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(edit, key, value, message):
    with pytest.raises(UserError, match=message) as caught:
        edit(key, value)
    text = str(caught.value)
    assert "params.yaml: " in text
    assert "\n" not in text
    assert len(text) < 400


def test_a_section_with_a_typo_is_named_by_its_typo(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("\nmeta_train:", "\nmeta_trian:")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml: meta_trian: unknown key; did you mean 'meta_train'\?"):
        params.check(tmp_path / "params.yaml")


def test_two_cells_of_one_name_are_refused(tmp_path):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["algorithms"] = {"focal": {}, "focal-step": {"algorithm": "focal"}}
    values["dataset"]["levels"] |= {"step-500": {"steps": [500]}, "500": {"steps": [500]}}
    values["dataset"] |= {"train": ["step-500", "500"], "test": ["expert"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="two cells are called meta_train@focal-step-500-0: expected other names"):
        params.check(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("algorithm", "values", "message"),
    [
        ({"algorithm": "mt-ft"}, {"posterior": "offline", "tasks": "test"}, r"tasks = test: mt-ft has codes of the tr"),
        ({"algorithm": "mt-ft"}, {}, r"posterior = own: 'mt-ft' cannot adapt to the agent's own .*; expected offline"),
        ({"algorithm": "macaw"}, {}, r"posterior = own: 'macaw' cannot adapt to the agent's own .*; expected offline"),
        ({"algorithm": "mt-ft"}, {"posterior": "offline", "context_size": 1}, r"context_size = 1: expected 2 or more"),
    ],
)
def test_learning_on_that_a_method_cannot_do_is_refused(algorithm, values, message, tmp_path):
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    given["algorithms"], given["online"] = {"mine": algorithm}, {"on": {"algorithm": "mine"} | values}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=r"online\.on\." + message):
        params.check(file)


def test_a_missing_section_is_named(edit):
    with pytest.raises(UserError, match=r"params\.yaml: dataset: missing"):
        edit("dataset", None, remove=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"env": "point-robot-wind", "env_config": {}, "relabel": {}},
            r"tasks of 'point-robot-wind' differ in their dyn",
        ),
        ({}, r"dataset\.test has 'relabelled', where all tasks share one set; expected levels"),
        ({"tasks": {"train": 1, "test": 29}}, r"tasks\.train = 1: expected 2 or more"),
    ],
)
def test_contexts_of_other_tasks_need_other_tasks_that_differ_in_reward(changes, message, tmp_path):
    values = yaml.safe_load((ROOT / "params.yaml").read_text()) | changes
    values["evaluate"]["protocol"] = "ood-checkpoint"
    values["dataset"] |= {"train": ["expert"], "test": ["expert"] if changes else ["relabelled"]}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"evaluate\.protocol = 'ood-checkpoint'.*" + message):
        params.check(file)


def test_relabelling_needs_tasks_that_differ_in_reward(edit, tmp_path):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["env"], values["env_config"] = "point-robot-wind", {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"relabel\.relabelled: tasks of 'point-robot-wind' differ in their dynamics"):
        params.check(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env: a\nenv: b\n", r"params\.yaml:2: not valid YAML: key 'env' stands there twice"),
        ("env: [a\n", r"params\.yaml:\d+: not valid YAML"),
        ("- 1\n", r"expected a mapping"),
        ("env: !!python/object/apply:os.system ['touch x']\n", r"not valid YAML"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        params.read(tmp_path / "params.yaml")


def test_a_stage_ends_with_code_2_and_no_traceback(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("train: 20", "train: twenty")
    (tmp_path / "params.yaml").write_text(text)
    done = subprocess.run([sys.executable, "-m", "stages.tasks"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: params.yaml: tasks.train = 'twenty': expected a valid integer")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "params.yaml"]
