"""Merging, relabelling, sparsifying: no row lost or doubled, and rewards that only the task changes."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omrl.core import registry
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json, write_json, write_manifest
from omrl.data import parquet
from omrl.data.build import build_relabelled
from omrl.data.cards import describe
from omrl.data.relabel import RelabelConfig, merge, merge_stream, quotas, relabel_rows
from omrl.data.schema import concatenate, keys
from omrl.data.taskdata import TaskData
from omrl.envs.base import load_family

# an extra with an environment of its own
EXTRA = pytest.mark.skipif(not importlib.util.find_spec("metaworld"), reason="needs 'make setup-metaworld'")
FAMILIES = {
    name: pytest.param(name, marks=EXTRA if name.startswith("metaworld-") else ())
    for name in registry.names("omrl.envs")
}
REWARD_FAMILIES = [
    param for name, param in FAMILIES.items() if registry.load("omrl.envs", name).FAMILY.varies == "reward"
]
ROWS, HORIZON = 60, 20


def merged_of(parts, rows, rng_of, unit="row"):
    tasks = sorted(parts)
    return merge(tasks, [len(parts[t]["task"]) for t in tasks], (parts[t] for t in tasks), rows, rng_of, unit)


def collect(name: str, task: int, rows: int = ROWS, config: dict | None = None) -> dict[str, np.ndarray]:
    """Return transitions stepped in the environment itself: its stored rewards are the reference."""
    family = load_family(name, config)
    rng = np.random.default_rng(task)
    copies = -(-rows // HORIZON)
    env = family.batch([family.sample(task, 1337)], copies)
    observation = env.reset([np.random.default_rng((task, i)) for i in range(copies)])
    parts = []
    for step in range(HORIZON):
        action = rng.uniform(-1, 1, (copies, family.action_size)).astype(np.float32)
        result = env.step(action)
        full = {"task": task, "source_task": task, "checkpoint": 250 * (task % 2), "step": step}
        parts.append(
            {
                **{key: np.full(copies, value, np.int32) for key, value in full.items()},
                "episode": np.arange(copies, dtype=np.int32),
                "deterministic": np.zeros(copies, np.bool_),
                "observation": observation.copy(),
                "action": action,
                "reward": result.reward.copy(),
                "sparse_reward": result.sparse_reward.copy(),
                "next_observation": result.next_observation.copy(),
                "terminated": result.terminated.copy(),
                "truncated": np.full(copies, step == HORIZON - 1),
                "reward_features": result.features.copy(),
            }
        )
        observation = result.next_observation
    columns = concatenate(parts)
    order = np.lexsort((columns["step"], columns["episode"]))[:rows]
    return {key: values[order] for key, values in columns.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("name", FAMILIES.values())
@settings(max_examples=15, deadline=None)
@given(task=st.integers(0, 49))
def test_a_task_relabelled_as_itself_keeps_its_rewards_bit_for_bit(name, task):
    family = load_family(name)
    task %= family.capacity or 50
    columns = collect(name, task)
    assert same(relabel_rows(columns, task, family.sample(task, 1337), family.reward), columns)


@pytest.mark.parametrize("name", REWARD_FAMILIES)
@settings(max_examples=15, deadline=None)
@given(source=st.integers(0, 49), target=st.integers(0, 49), middle=st.integers(0, 49))
def test_relabelling_depends_on_the_target_alone(name, source, target, middle):
    family = load_family(name)
    source, target, middle = (task % (family.capacity or 50) for task in (source, target, middle))
    columns = collect(name, source)

    def to(rows: dict[str, np.ndarray], task: int) -> dict[str, np.ndarray]:
        return relabel_rows(rows, task, family.sample(task, 1337), family.reward)

    once = to(columns, target)
    assert same(to(once, target), once)
    assert same(to(to(columns, middle), target), once)
    assert same(to(once, source), columns)  # and back
    assert set(once["task"].tolist()) == {target}
    kept = set(columns) - {"task", "reward", "sparse_reward"}
    assert same({n: once[n] for n in kept}, {n: columns[n] for n in kept})
    assert once["reward"].dtype == once["sparse_reward"].dtype == np.float32


def test_relabelling_does_not_touch_its_input():
    family, columns = load_family("sparse-point-robot"), collect("sparse-point-robot", 0)
    before = {name: values.copy() for name, values in columns.items()}
    relabel_rows(columns, 1, family.sample(1, 1337), family.reward)
    assert same(columns, before)


def test_the_sparse_reward_of_a_row_by_hand():
    family = load_family("sparse-point-robot", {"radius": 0.5, "sparse_reward": "eq35"})
    columns = {name: values[:2] for name, values in collect("sparse-point-robot", 0).items()}
    columns["next_observation"] = np.array([[0.75, 0.0], [0.25, 0.0]], np.float32)
    found = relabel_rows(columns, 9, {"goal": [1.0, 0.0]}, family.reward)
    assert found["reward"].tolist() == [-0.25, -0.75]
    assert found["sparse_reward"].tolist() == [0.5, 0.0]  # (R - d)/R inside the disc (FOCAL++ Eq. 35)


@settings(max_examples=60, deadline=None)
@given(sources=st.integers(1, 12), rows=st.integers(0, 200), seed=st.integers(0, 5))
def test_quotas_differ_by_one_at_most_and_add_up(sources, rows, seed):
    share = quotas(sources, rows, np.full(sources, 10_000), np.random.default_rng(seed))
    assert share.sum() == rows
    assert share.max() - share.min() <= 1


def test_the_remainder_goes_to_sources_drawn_by_seed():
    lucky = {int(np.argmax(quotas(5, 6, np.full(5, 9), np.random.default_rng(seed)))) for seed in range(60)}
    assert lucky == set(range(5))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_a_merged_set_loses_and_doubles_nothing(lengths, share, seed):
    parts = {3 * i: collect("sparse-point-robot", 3 * i, rows) for i, rows in enumerate(lengths)}
    rows = max(1, int(share * min(lengths) * len(lengths)))
    merged = merged_of(parts, rows, merge_stream(seed, "toy"))
    found = [tuple(key) for key in keys(merged).tolist()]
    assert len(found) == rows == len(set(found))
    assert found == sorted(found)
    # every row is a row of its source, whole
    place = {tuple(key): (t, i) for t, part in parts.items() for i, key in enumerate(keys(part).tolist())}
    for column in merged:
        expected = np.stack([parts[place[key][0]][column][place[key][1]] for key in found])
        assert np.array_equal(merged[column], expected), column
    counts = [int((merged["source_task"] == task).sum()) for task in parts]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 2 * ROWS), seed=st.integers(0, 5))
def test_whole_episodes_keep_their_order_and_only_the_last_of_a_source_is_cut(rows, seed):
    parts = {task: collect("sparse-point-robot", task) for task in (0, 1)}
    rows = min(rows, 2 * ROWS)
    merged = merged_of(parts, rows, merge_stream(seed, "toy"), "episode")
    assert len(merged["task"]) == rows
    for task in parts:
        own = merged["source_task"] == task
        episodes = merged["episode"][own]
        cut = 0
        for episode in np.unique(episodes):
            steps = merged["step"][own][episodes == episode].tolist()
            assert steps == list(range(len(steps)))  # from the first step on, in order
            cut += len(steps) < HORIZON
        assert cut <= 1
        assert abs(int(own.sum()) - rows / 2) <= 0.5


def test_the_whole_support_is_every_row_once():
    parts = {task: collect("sparse-point-robot", task, 40) for task in (0, 1, 2)}
    merged = merged_of(parts, 120, merge_stream(0, "toy"))
    assert sorted(map(tuple, keys(merged).tolist())) == sorted(
        tuple(key) for part in parts.values() for key in keys(part).tolist()
    )


def test_the_draw_depends_on_seed_and_environment_not_on_the_order_of_the_parts():
    parts = {task: collect("sparse-point-robot", task, 40) for task in (0, 1, 2)}

    def draw(seed: int, env: str, order: list[int]) -> dict[str, np.ndarray]:
        return merged_of({task: parts[task] for task in order}, 30, merge_stream(seed, env))

    first = draw(0, "toy", [0, 1, 2])
    assert same(draw(0, "toy", [2, 0, 1]), first)
    assert not same(draw(1, "toy", [0, 1, 2]), first)
    assert not same(draw(0, "doll", [0, 1, 2]), first)


def test_a_source_with_too_few_rows_is_told():
    parts = {0: collect("sparse-point-robot", 0, 40), 1: collect("sparse-point-robot", 1, 10)}
    with pytest.raises(UserError, match=r"dataset\.transitions_per_task = 60: .*10.*30"):
        merged_of(parts, 60, merge_stream(0, "toy"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"source: missing"),
        ({"source": "mixed", "unit": "rows"}, r"unit = 'rows': expected 'row' or 'episode'"),
        ({"source": "mixed", "tasks": "test"}, r"tasks = 'test': expected 'all' or 'train'"),
        ({"source": "mixed", "env_config": 1}, r"env_config = 1"),
        ({"source": "mixed", "unti": "row"}, r"unti: unknown key; did you mean 'unit'"),
    ],
)
def test_a_mistake_in_the_definition_is_named(values, message):
    with pytest.raises(UserError, match=message):
        parse(RelabelConfig, values, "params.yaml: relabel.relabelled")


def prepare(folder, name: str = "sparse-point-robot", tasks: int = 5) -> None:
    """Write what the stage reads: the tasks, a source level and a fingerprint."""
    family = load_family(name)
    rows = [
        {
            "index": i,
            "split": "test" if i == tasks - 1 else "train",
            "parameters": family.sample(i, 1337),
            "oracle_return": 1.0,
            "random_return": 0.0,
        }
        for i in range(tasks)
    ]
    write_json(folder / "data/tasks/all.json", {"env": name, "spec": family.spec(), "seed": 1337, "tasks": rows})
    write_json(folder / "data/code/stages/relabel.json", {})
    source = folder / "data/datasets/mixed"
    for i in range(tasks):
        footer = {
            "environment": family.spec(), "task": rows[i]["parameters"],
            "checkpoints": {"0": "ab" * 32}, "parameters": {},
        }  # fmt: skip
        parquet.write_transitions(source / f"task={i:03d}.parquet", collect(name, i), footer)
    files: dict[str, int | None] = {f"task={i:03d}.parquet": ROWS for i in range(tasks)}
    write_manifest(source, kind="dataset", inputs={}, parameters={}, files=files)


def build(name: str = "sparse-point-robot", rows: int = ROWS, **definition) -> None:
    build_relabelled(
        name="relabelled",
        config=RelabelConfig(source="mixed", **definition),
        rows=rows,
        family=load_family(name),
        seed=0,
        code=["data/code/stages/relabel.json"],
        target="data/datasets/relabelled",
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data/datasets/relabelled"


def test_every_task_of_the_set_has_the_identical_transitions(place, tmp_path):
    prepare(tmp_path)
    build(env_config={"radius": 0.5})
    sets = [parquet.read_transitions(place / f"task={i:03d}.parquet") for i in range(5)]
    family = load_family("sparse-point-robot", {"radius": 0.5})
    kept = set(sets[0]) - {"task", "reward", "sparse_reward"}
    for i, columns in enumerate(sets):
        assert same({n: columns[n] for n in kept}, {n: sets[0][n] for n in kept})
        assert set(columns["task"].tolist()) == {i}
        dense, sparse = family.reward(
            family.sample(i, 1337), columns["observation"], columns["action"],
            columns["next_observation"], columns["reward_features"],
        )  # fmt: skip
        assert columns["reward"].tobytes() == dense.tobytes()
        assert columns["sparse_reward"].tobytes() == sparse.tobytes()
    assert np.bincount(sets[0]["source_task"]).tolist() == [ROWS // 5] * 5
    rewards = np.stack([columns["reward"] for columns in sets])
    assert len(np.unique(rewards, axis=0)) == 5


def test_a_set_of_whole_episodes_of_the_training_tasks_alone(place, tmp_path):
    prepare(tmp_path)
    build(unit="episode", tasks="train", rows=40)
    sets = [parquet.read_transitions(place / f"task={i:03d}.parquet") for i in range(5)]
    for columns in sets:
        assert set(columns["source_task"].tolist()) == {0, 1, 2, 3}  # task 4 is for testing
        assert same({"step": columns["step"]}, {"step": sets[0]["step"]})
    stored = {task: collect("sparse-point-robot", task) for task in range(4)}
    for task in range(4):
        own = sets[4]["source_task"] == task
        assert sets[4]["step"][own].tolist() == list(range(10))
        # the next row's observation is this row's next observation: an episode as it was
        observation, following = sets[4]["observation"][own], sets[4]["next_observation"][own]
        assert np.array_equal(observation[1:], following[:-1])
        episode = int(sets[4]["episode"][own][0])
        assert np.array_equal(observation, stored[task]["observation"][stored[task]["episode"] == episode][:10])
    footer = parquet.read_footer(place / "task=004.parquet")
    assert set(footer["checkpoints_of_source_tasks"]) == {"0", "1", "2", "3"}


def test_what_relabelling_cannot_change_is_refused(place, tmp_path):
    prepare(tmp_path)
    with pytest.raises(UserError, match=r"^params\.yaml: relabel\.relabelled\.env_config\.horizon: .*expected radius"):
        build(env_config={"horizon": 30})
    assert not place.exists()


def test_rows_of_the_own_task_keep_the_stored_dense_reward(place, tmp_path):
    prepare(tmp_path)
    build(env_config={"radius": 0.5})
    for i in range(5):
        found = parquet.read_transitions(place / f"task={i:03d}.parquet")
        stored = collect("sparse-point-robot", i)
        rewards = dict(zip(map(tuple, keys(stored).tolist()), stored["reward"].tolist(), strict=True))
        own = found["source_task"] == i
        assert own.any()
        for key, reward in zip(keys(found)[own].tolist(), found["reward"][own].tolist(), strict=True):
            assert rewards[tuple(key)] == reward


def test_the_folder_is_complete_and_the_same_twice(place, tmp_path):
    prepare(tmp_path)
    build(rows=52)
    names = {"card.json", "manifest.json", *(f"task={i:03d}.parquet" for i in range(5))}
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert set(before) == names
    build(rows=52)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    card = read_json(place / "card.json")
    assert (card["name"], card["kind"], card["rows"], card["tasks"], card["rows_per_task"]) == (
        "relabelled", "relabelled", 260, 5, 52,
    )  # fmt: skip
    lines = describe(place).splitlines()
    assert lines[0] == "relabelled (relabelled): source: mixed, tasks: all, unit: row"
    assert [line.split() for line in lines[3:]] == [
        ["step", "rows"],
        *([c, f"{e['rows']}"] for c, e in card["checkpoints"].items()),
    ]
    manifest = read_json(place / "manifest.json")
    assert manifest["files"]["task=000.parquet"]["rows"] == 52
    assert "data/datasets/mixed" in manifest["inputs"]
    assert TaskData.load(place, range(5)).rows == 52
    footer = parquet.read_footer(place / "task=002.parquet")
    assert footer["task"] == load_family("sparse-point-robot").sample(2, 1337)
    assert "ab" * 32 in str(footer)  # the checkpoints that acted


def test_a_damaged_source_is_named_and_nothing_is_published(place, tmp_path):
    prepare(tmp_path)
    path = tmp_path / "data/datasets/mixed/task=003.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"mixed/task=003\.parquet"):
        build()
    assert not place.exists()


def test_tasks_that_differ_in_dynamics_are_refused(place, tmp_path):
    with pytest.raises(UserError, match=r"relabel\.relabelled: .*'point-robot-wind' differ in their dynamics"):
        build("point-robot-wind")
    assert not place.exists()
