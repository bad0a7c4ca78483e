"""Quality levels: the right checkpoints, evenly, exactly the rows asked for, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omrl.core import seeding
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json, sha256, write_json, write_manifest
from omrl.data import parquet
from omrl.data.build import build_level
from omrl.data.cards import describe
from omrl.data.quality import (
    NAMES,
    DatasetConfig,
    LevelConfig,
    check_levels,
    check_names,
    choose_checkpoints,
    level_stream,
    select,
)
from omrl.envs.base import load_family

STEPS = [0, 250, 500]


def make(lengths: dict[int, list[int]], deterministic: int = 0) -> dict[str, np.ndarray]:
    """Return rollouts: checkpoint -> lengths of its episodes, the last ones with mean actions."""
    key = [
        (checkpoint, episode, step, episode >= len(episodes) - deterministic)
        for checkpoint, episodes in lengths.items()
        for episode, length in enumerate(episodes)
        for step in range(length)
    ]
    checkpoint, episode, step, mean = (np.array(part) for part in zip(*key, strict=True))
    rows = len(key)
    return {
        "task": np.full(rows, 4, np.int32),
        "source_task": np.full(rows, 4, np.int32),
        "checkpoint": checkpoint.astype(np.int32),
        "episode": episode.astype(np.int32),
        "step": step.astype(np.int32),
        "deterministic": mean.astype(np.bool_),
        "observation": np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2),
        "reward": np.arange(rows, dtype=np.float32),
    }


def keys(columns: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    return list(zip(*(columns[name].tolist() for name in ("checkpoint", "episode", "step")), strict=True))


def stream(seed: int = 0) -> np.random.Generator:
    return level_stream(seed, "toy", "mixed", 4)


ALL = LevelConfig(steps="all")
even = {step: [10] * 6 for step in STEPS}
ragged = st.dictionaries(
    st.sampled_from([0, 100, 200, 300]), st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1
)


@settings(max_examples=80, deadline=None)
@given(ragged, st.data())
def test_exactly_the_rows_asked_for_each_once_and_in_order(lengths, data):
    columns = make(dict(sorted(lengths.items())))
    rows = data.draw(st.integers(1, len(columns["step"])))
    seed = data.draw(st.integers(0, 5))
    found = select(columns, sorted(lengths), rows, ALL, stream(seed), "task 4")
    chosen = keys(found)
    assert len(chosen) == rows
    assert len(set(chosen)) == rows
    assert chosen == sorted(chosen)
    # every column moves with its row
    place = {key: i for i, key in enumerate(keys(columns))}
    assert np.array_equal(found["reward"], columns["reward"][[place[key] for key in chosen]])
    assert np.array_equal(found["observation"], columns["observation"][[place[key] for key in chosen]])
    # whole episodes, from their first step; at most one is cut
    cut = 0
    for checkpoint, episode in {key[:2] for key in chosen}:
        steps = [key[2] for key in chosen if key[:2] == (checkpoint, episode)]
        assert steps == list(range(len(steps)))
        cut += len(steps) < lengths[checkpoint][episode]
    assert cut <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 180), st.integers(0, 20))
def test_checkpoints_contribute_evenly(rows, seed):
    found = select(make(even), STEPS, rows, ALL, stream(seed), "task 4")
    counts = [int((found["checkpoint"] == step).sum()) for step in STEPS]
    assert max(counts) - min(counts) <= 10  # one episode


def test_only_the_checkpoints_of_the_level_are_taken():
    found = select(make(even), [250], 60, LevelConfig(steps=[250]), stream(), "task 4")
    assert set(found["checkpoint"].tolist()) == {250}


def test_deterministic_episodes_are_left_out_unless_asked_for():
    columns = make(even, deterministic=1)
    found = select(columns, STEPS, 150, ALL, stream(), "task 4")
    assert not found["deterministic"].any()
    with pytest.raises(UserError, match=r"150"):
        select(columns, STEPS, 151, ALL, stream(), "task 4")
    found = select(columns, STEPS, 180, LevelConfig(steps="all", deterministic=True), stream(), "task 4")
    assert int(found["deterministic"].sum()) == 30


def test_the_draw_depends_on_seed_level_and_task_and_on_nothing_else():
    columns = make(even)

    def draw(rng: np.random.Generator) -> list[tuple[int, int, int]]:
        return keys(select(columns, STEPS, 60, ALL, rng, "task 4"))

    first = draw(level_stream(0, "toy", "mixed", 4))
    assert draw(level_stream(0, "toy", "mixed", 4)) == first
    others = [("toy", "mixed", 5), ("toy", "expert", 4), ("doll", "mixed", 4)]
    assert all(draw(level_stream(0, *names)) != first for names in others)
    assert draw(level_stream(1, "toy", "mixed", 4)) != first


def test_the_episodes_are_drawn_not_the_first_ones():
    taken = set()
    for seed in range(20):
        found = select(make(even), STEPS, 30, ALL, seeding.generator(seed), "task 4")
        taken |= set(found["episode"].tolist())
    assert taken == set(range(6))


def test_too_few_rows_name_the_key_and_what_there_is():
    with pytest.raises(UserError, match=r"dataset\.transitions_per_task = 181.*level 'x' of task 4.*180"):
        select(make(even), STEPS, 181, ALL, stream(), "level 'x' of task 4")


NORMALIZED = {0: 0.0, 250: 0.5, 500: 0.9}


def test_checkpoints_by_step_by_all_and_by_band():
    assert choose_checkpoints("a", ALL, 4, NORMALIZED) == STEPS
    assert choose_checkpoints("a", LevelConfig(steps=[500, 0]), 4, NORMALIZED) == [0, 500]
    assert choose_checkpoints("a", LevelConfig(band=[0.4, 0.6]), 4, NORMALIZED) == [250]
    assert choose_checkpoints("a", LevelConfig(band=[0.5, 0.9]), 4, NORMALIZED) == [250, 500]


def test_checkpoints_by_place_and_by_nearness():
    assert choose_checkpoints("a", LevelConfig(steps="first"), 4, NORMALIZED) == [0]
    assert choose_checkpoints("a", LevelConfig(steps="last"), 4, NORMALIZED) == [500]
    for goal, expected in ((0.5, 250), (0.0, 0), (0.24, 0), (0.26, 250), (0.71, 500), (1.0, 500)):
        assert choose_checkpoints("a", LevelConfig(nearest=goal), 4, NORMALIZED) == [expected]
    assert choose_checkpoints("a", LevelConfig(nearest=0.5), 4, {0: 0.25, 9: 0.75, 20: 0.25}) == [0]  # a tie
    assert choose_checkpoints("a", LevelConfig(nearest=0.5), 4, {0: 0.0, 9: 0.9, 20: 0.4}) == [20]  # not a step


def test_without_a_scale_of_returns_levels_by_return_are_refused():
    family = load_family("sparse-point-robot", {"horizon": 5})  # too short to reach a goal
    row = {"random_return": 0.0, "oracle_return": 0.0}
    nothing = {step: family.normalize(row, 0.0) for step in STEPS}
    assert all(np.isnan(x) for x in nothing.values())
    assert choose_checkpoints("a", ALL, 4, nothing) == STEPS
    for level, key in ((LevelConfig(nearest=0.5), "nearest"), (LevelConfig(band=[0, 1]), "band")):
        with pytest.raises(UserError, match=rf"levels\.a\.{key} needs normalized returns: in task 4 neither"):
            choose_checkpoints("a", level, 4, nothing)


def test_the_common_names_have_one_definition():
    for name, level in NAMES.items():
        written = {key: value for key, value in level.resolved().items() if value}
        values = {"train": [name], "test": [name], "levels": {name: written}}
        assert parse(DatasetConfig, values, "x").levels[name] == level
    assert choose_checkpoints("medium", NAMES["medium"], 4, NORMALIZED) == [250]


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        (
            "medium",
            {"steps": [500]},
            r"'medium' is \{nearest: 0\.5\} in every pipeline, not \{steps: \[500\]\}; .*step-500",
        ),
        ("random", {"steps": [0]}, r"'random' is \{steps: first\}"),
        ("expert", {"steps": "last", "deterministic": True}, r"'expert' is \{steps: last\} .* deterministic: True"),
        ("mixed", {"part": [0, 1]}, r"'mixed' is \{steps: all\}"),
    ],
)
def test_another_definition_needs_another_name(name, level, message):
    values = {"train": [name], "test": [name], "levels": {name: level}}
    with pytest.raises(UserError, match=rf"^params\.yaml: dataset\.levels: {message}"):
        parse(DatasetConfig, values, "params.yaml: dataset")


@pytest.mark.parametrize(
    ("name", "rolled_out", "source", "message"),
    [
        (
            "random",
            [250, 500],
            "checkpoints",
            r"levels\.random: rollouts\.steps has 250, 500: .* 0 and 500, .*step-500",
        ),
        ("expert", [0, 250], "checkpoints", r"levels\.expert: rollouts\.steps has 0, 250"),
        ("expert", [0, 500], "replay", r"levels\.expert with rollouts\.source = replay: expected the name replay"),
        (
            "replay",
            STEPS,
            "checkpoints",
            r"levels\.replay with rollouts\.source = checkpoints: expected rollouts\.source",
        ),
    ],
)
def test_a_common_name_is_refused_where_the_rollouts_have_not_what_it_means(name, rolled_out, source, message):
    with pytest.raises(UserError, match=rf"^params\.yaml: dataset\.{message}"):
        check_names({name: NAMES[name]}, rolled_out, STEPS, source, "params.yaml: dataset")


def test_a_common_name_is_accepted_where_they_have():
    levels = {name: level for name, level in NAMES.items() if name != "replay"}
    check_names(levels, [0, 500], STEPS, "checkpoints", "x")
    check_names({"replay": NAMES["replay"], "end": LevelConfig(part=[0.8, 1])}, STEPS[:-1], STEPS, "replay", "x")
    check_names({"step-250": LevelConfig(steps=[250])}, [250], STEPS, "checkpoints", "x")


def test_checkpoints_by_part_of_the_run():
    for part, expected in (([0, 0.3], [0]), ([0.3, 0.6], [250]), ([0.6, 1], [500]), ([0, 1], STEPS)):
        assert choose_checkpoints("a", parse(LevelConfig, {"part": part}, "x"), 4, NORMALIZED) == expected


def test_a_part_without_a_checkpoint_is_refused_before_any_work():
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.levels\.mine\.part = \[0\.2, 0\.4\]: no checkpoint"):
        check(LevelConfig(part=[0.2, 0.4]), 10)


def test_a_step_without_rollouts_is_named():
    with pytest.raises(UserError, match=r"dataset\.levels\.medium\.steps.*300.*0, 250, 500"):
        choose_checkpoints("medium", LevelConfig(steps=[300]), 4, NORMALIZED)


def test_an_empty_band_tells_what_the_checkpoints_reach():
    with pytest.raises(UserError, match=r"dataset\.levels\.medium\.band = \[0\.6, 0\.8\].*task 4") as caught:
        choose_checkpoints("medium", LevelConfig(band=[0.6, 0.8]), 4, NORMALIZED)
    for text in ("0: 0.00", "250: 0.50", "500: 0.90"):
        assert text in str(caught.value)


def check(level: LevelConfig, rows: int) -> None:
    check_levels({"mine": level}, STEPS, 50, 10, rows, where="params.yaml: dataset")


@pytest.mark.parametrize(
    ("level", "most"),
    [
        (ALL, 150),
        (LevelConfig(steps="all", deterministic=True), 180),
        (LevelConfig(steps=[250]), 50),
        (LevelConfig(band=[0.0, 1.0]), 150),
        (LevelConfig(part=[0.3, 1.0]), 100),
        (LevelConfig(nearest=0.5), 50),
        (LevelConfig(steps="first"), 50),
        (LevelConfig(steps="last", deterministic=True), 60),
    ],
)
def test_what_the_rollouts_cannot_give_is_refused_before_any_work(level, most):
    check(level, most)
    with pytest.raises(UserError, match=rf"^params\.yaml: dataset\.transitions_per_task = {most + 1}.*'mine'.*{most}"):
        check(level, most + 1)


def test_a_level_of_a_step_that_is_not_rolled_out_is_refused_before_any_work():
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.levels\.mine\.steps.*333.*0, 250, 500"):
        check(LevelConfig(steps=[250, 333]), 10)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": [0], "band": [0.0, 1.0]},
        {"steps": []},
        {"steps": [0, 0]},
        {"steps": "some"},
        {"steps": [0.5]},
        {"nearest": 1.5},
        {"nearest": "0.5"},
        {"nearest": 0.5, "steps": "all"},
        {"band": [0.9, 0.1]},
        {"band": [0.1]},
        {"part": [0.5, 0.5]},
        {"part": [0.1]},
        {"part": [-0.1, 1.0]},
        {"part": [0.0, 1.0], "band": [0.0, 1.0]},
        {"band": [float("nan"), 1.0]},
        {"steps": [0], "detreministic": True},
    ],
)
def test_a_level_that_means_nothing_is_refused(values):
    with pytest.raises(UserError, match=r"levels\.mine"):
        parse(LevelConfig, values, "params.yaml: dataset.levels.mine")


def test_a_band_may_be_written_in_whole_numbers():
    assert choose_checkpoints("a", parse(LevelConfig, {"band": [0, 1]}, "x"), 4, NORMALIZED) == STEPS


@pytest.mark.parametrize("name", ["Expert", "a/b", "..", "a b", ""])
def test_a_level_name_that_is_no_folder_name_is_refused(name):
    values = {"train": ["a"], "test": ["a"], "levels": {name: {"steps": "all"}}}
    with pytest.raises(UserError, match=r"dataset"):
        parse(DatasetConfig, values, "params.yaml: dataset")


def prepare(lengths: dict[int, list[int]]) -> None:
    """Write what the stage reads, for one shard of two tasks: better checkpoints have higher returns."""
    family = load_family("sparse-point-robot")
    rows = [
        {
            "index": i,
            "split": "train",
            "parameters": family.sample(i, 1337),
            "oracle_return": 10.0,
            "random_return": 0.0,
        }
        for i in (0, 1)
    ]
    write_json("data/tasks/all.json", {"env": family.name, "spec": family.spec(), "seed": 1337, "tasks": rows})
    write_json("data/code/stages/dataset.json", {})
    files: dict[str, int | None] = {}
    episodes = [(c, e) for c, group in lengths.items() for e in range(len(group))]
    for i in (0, 1):
        columns = make(lengths, deterministic=1)
        count = len(columns["step"])
        zero = np.zeros((count, 2), np.float32)
        columns |= {
            "task": np.full(count, i, np.int32), "source_task": np.full(count, i, np.int32), "action": zero,
            "next_observation": zero, "reward_features": zero[:, :0], "sparse_reward": columns["reward"],
            "terminated": np.zeros(count, np.bool_), "truncated": np.zeros(count, np.bool_),
        }  # fmt: skip
        footer = {
            "environment": family.spec(), "task": rows[i]["parameters"],
            "checkpoints": {str(step): f"{step:064d}" for step in lengths}, "parameters": {"seed": 0},
        }  # fmt: skip
        parquet.write_transitions(f"data/rollouts/a/task={i:03d}.parquet", columns, footer)
        files[f"task={i:03d}.parquet"] = count
    table = {
        "task": np.repeat(np.array([0, 1], np.int32), len(episodes)),
        "checkpoint": np.array([c for c, _ in episodes] * 2, np.int32),
        "episode": np.array([e for _, e in episodes] * 2, np.int32),
        "deterministic": np.array([e == len(lengths[c]) - 1 for c, e in episodes] * 2),
        # the mean-action episodes would leave every band
        "return": np.array([99.0 if e == len(lengths[c]) - 1 else c / 100 for c, e in episodes] * 2),
    }
    parquet.write_table("data/rollouts/a/episodes.parquet", pa.table(table))
    files["episodes.parquet"] = 2 * len(episodes)
    write_manifest("data/rollouts/a", kind="rollouts", inputs={}, parameters={}, files=files)


def build(rows: int = 35, name: str = "mine", **level) -> dict:
    build_level(
        name=name,
        level=LevelConfig(**level),
        rows=rows,
        family=load_family("sparse-point-robot"),
        seed=0,
        shards={"a": [0, 1]},
        code=["data/code/stages/dataset.json"],
        target=f"data/datasets/{name}",
    )
    return read_json(f"data/datasets/{name}/card.json")


def test_a_level_is_cut_from_the_rollouts_with_card_and_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(even)
    card = build(steps="all")
    folder = Path("data/datasets/mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"task=000.parquet", "task=001.parquet", "card.json", "manifest.json"}
    assert build(steps="all") == card
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (card["kind"], card["rows"], card["tasks"], card["rows_per_task"]) == ("level", 70, 2, 35)
    found = [parquet.read_transitions(folder / f"task={i:03d}.parquet") for i in (0, 1)]
    assert [len(columns["step"]) for columns in found] == [35, 35]
    assert keys(found[0]) != keys(found[1])  # each task draws its own episodes
    for step in STEPS:
        rows = sum(int((columns["checkpoint"] == step).sum()) for columns in found)
        entry = card["checkpoints"][str(step)]
        assert entry["rows"] == rows
        assert entry["return"]["min"] == entry["return"]["max"] == pytest.approx(step / 100)
        assert entry["normalized_mean"] == pytest.approx(step / 1000)
    assert card["files"]["task=000.parquet"] == sha256(folder / "task=000.parquet")
    assert sum(card["return_histogram"]["counts"]) == card["episodes"]
    own = sum(int(step) / 1000 * entry["episodes"] for step, entry in card["checkpoints"].items())
    assert card["normalized_return"] == pytest.approx(own / card["episodes"])
    text = describe(folder)
    assert text.startswith(
        f"mine (level, normalized return {card['normalized_return']:.2f}): steps: all\n70 transitions"
    )
    assert text.splitlines()[3].split() == ["step", "rows", "episodes", "mean", "q25", "median", "q75", "normal."]
    assert "35 transitions of task 1" in describe(folder / "task=001.parquet")
    assert "36 rows of task" in describe("data/rollouts/a/episodes.parquet")


def test_the_same_definition_under_two_names_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(even)
    for name, steps in (("mine", "all"), ("yours", "all"), ("other", [0, 250, 500])):
        build(name=name, steps=steps)
    mine, yours, other = (
        parquet.read_transitions(f"data/datasets/{name}/task=000.parquet") for name in ("mine", "yours", "other")
    )
    assert keys(mine) == keys(yours)
    assert keys(mine) != keys(other)


def test_a_band_is_judged_by_sampled_episodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(even)
    card = build(band=[0.2, 0.3])
    assert list(card["checkpoints"]) == ["250"]
    footer = parquet.read_footer("data/datasets/mine/task=000.parquet")
    assert footer["checkpoints"] == {"250": f"{250:064d}"}
    with pytest.raises(UserError, match=r"levels\.mine\.band = \[0\.8, 0\.9\].*task 0.*500: 0\.50"):
        build(band=[0.8, 0.9])


def test_medium_is_chosen_for_each_task_by_its_own_return(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(even)
    rows = read_json("data/tasks/all.json")
    rows["tasks"][1]["oracle_return"] = 5.0  # what the last checkpoint of both collects
    write_json("data/tasks/all.json", rows)
    build(nearest=0.5)
    card = read_json("data/datasets/mine/card.json")
    chosen = [set(parquet.read_transitions(f"data/datasets/mine/task={i:03d}.parquet")["checkpoint"]) for i in (0, 1)]
    assert chosen == [{500}, {250}]
    assert [entry["normalized_mean"] for entry in card["checkpoints"].values()] == pytest.approx([0.5, 0.5])
    assert card["normalized_return"] == pytest.approx(0.5)


def test_damaged_or_missing_rollouts_are_named_and_the_old_dataset_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(even)
    build(steps="all")
    before = Path("data/datasets/mine/card.json").read_bytes()
    path = Path("data/rollouts/a/task=001.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(UserError, match=r"rollouts/a/task=001\.parquet"):
        build(steps="all")
    path.unlink()
    with pytest.raises(UserError, match=r"rollouts/a/task=001\.parquet: missing"):
        build(steps="all")
    assert Path("data/datasets/mine/card.json").read_bytes() == before
    assert [p.name for p in Path("data/datasets").iterdir()] == ["mine"]
