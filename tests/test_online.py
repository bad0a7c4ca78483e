"""Learning on in the environment: what is collected, whose reward it carries, the same bytes after a stop."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from omrl.algorithms.base import load_model
from omrl.algorithms.pearl import Pearl
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.core.files import read_json, write_json, write_manifest
from omrl.data import parquet, schema
from omrl.data.taskdata import TaskData
from omrl.envs.base import load_family
from omrl.evaluation.embeddings import rms
from omrl.evaluation.evaluate import EvaluateConfig, build_evaluation
from omrl.evaluation.protocols.base import protocol
from omrl.learning import online, train
from omrl.learning.online import OnlineConfig, build_online
from omrl.nets.experience import Experience
from omrl.provenance.lineage import _collected

FAMILY = load_family("point-robot")
TASKS = [
    {
        "index": i, "split": "train" if i < 2 else "test", "parameters": FAMILY.sample(i, 1337),
        "oracle_return": -5.0, "random_return": -20.0,
    }
    for i in range(3)
]  # fmt: skip
ROWS = 60
SMALL: dict[str, Any] = {
    "latent_dim": 2, "width": 8, "depth": 1, "encoder_width": 8, "encoder_depth": 1,
    "meta_batch": 2, "rl_batch": 8, "context_batch": 8,
}  # fmt: skip
ONLINE: dict[str, Any] = {"rounds": 3, "episodes": 3, "prior_episodes": 1, "updates": 6}
TRAINING = parse(
    train.MetaTrainConfig,
    {"steps": 4, "threads": 1, "log_every": 2, "checkpoint_every": 2, "device": "cpu", "optimizers": True},
    "",
)
CODE = ["data/code/all.json"]


def transitions(task: int) -> schema.Columns:
    """Random steps of the point robot, with true rewards."""
    rng, row = np.random.default_rng(task), np.arange(ROWS)
    s = rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32)
    a = rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32)
    reward, sparse = FAMILY.reward(TASKS[task]["parameters"], s, a, s + 0.1 * a, np.zeros((ROWS, 0), np.float32))
    whole = {"task": row * 0 + task, "source_task": row * 0 + task, "checkpoint": row * 0, "episode": row // 20}
    return {
        **{name: x.astype(np.int32) for name, x in (whole | {"step": row % 20}).items()},
        "deterministic": np.zeros(ROWS, np.bool_), "observation": s, "next_observation": s + np.float32(0.1) * a,
        "action": a, "reward": reward, "sparse_reward": sparse, "terminated": np.zeros(ROWS, np.bool_),
        "truncated": row % 20 == 19, "reward_features": np.zeros((ROWS, 0), np.float32),
    }  # fmt: skip


def make_folder(algorithm: str, overrides: dict[str, Any], optimizers: bool = True, **values: Any) -> None:
    """Write tasks, code, one dataset and one model, meta-trained with ``values``, into the present folder."""
    write_json("data/tasks/all.json", {"train": [0, 1], "test": [2], "tasks": TASKS})
    write_json(CODE[0], {"fingerprint": "1"})
    files: dict[str, int | None] = {}
    for task in range(3):
        name = f"task={task:03d}.parquet"
        parquet.write_transitions(f"data/datasets/expert/{name}", transitions(task), {"checkpoints": {}})
        files[name] = ROWS
    write_manifest("data/datasets/expert", kind="dataset", inputs={}, parameters={}, files=files)
    train.build_model(
        name="mine", module=algorithm, overrides=overrides, sources={"transitions": "expert"}, dataset="expert",
        seed=0, config=TRAINING.model_copy(update={"optimizers": optimizers, **values}), spec=train.spec_of(FAMILY),
        inference="dense", code=CODE, target="data/models/mine/expert/0",
    )  # fmt: skip


def learn(name: str = "on", **values: Any) -> Path:
    config = parse(OnlineConfig, {"algorithm": "mine"} | ONLINE | values, "")
    build_online(
        name=name, config=config, cells=[("expert", 0)], training=TRAINING, family=FAMILY, code=CODE,
        target=f"data/online/{name}",
    )  # fmt: skip
    return Path(f"data/online/{name}/expert/0")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def pearl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder("pearl", SMALL)
    return tmp_path


def test_pearl_collects_learns_on_and_is_evaluated(pearl):
    folder = learn(keep=3)
    names = [f"collected={i:03d}.parquet" for i in range(3)]
    snapshots = [f"snapshot={i:08d}.safetensors" for i in (6, 12, 18)]
    others = ["config.json", "curve.csv", "manifest.json", "model.safetensors", "training.safetensors"]
    assert sorted(hashes(folder)) == sorted([*names, *snapshots, *others])
    before, after = (load_file(f"{f}/model.safetensors") for f in ("data/models/mine/expert/0", folder))
    for part in ("encoder.net.weights.0", "actor_critic.policy.trunk.weights.0", "actor_critic.q.weights.0"):
        assert not torch.equal(before[part], after[part]), part
    steps = [int(line.partition(",")[0]) for line in (folder / "curve.csv").read_text().splitlines()[1:]]
    assert steps == list(range(2, 19, 2))
    manifest = read_json(folder / "manifest.json")
    assert set(manifest["inputs"]) == {
        "data/tasks/all.json", "data/models/mine/expert/0", "data/datasets/expert", CODE[0],
    }  # fmt: skip
    config, settings = (
        EvaluateConfig(protocol="online-prior"),
        protocol("online-prior").CONFIG(
            episodes=3, exploration_episodes=2, prior="own", resample="step", posterior="step", repetitions=1
        ),
    )
    build_evaluation(
        name="on", train="expert", test="expert", seed=0, config=config, settings=settings, family=FAMILY,
        model=folder, code=CODE, target="data/evaluations/on/expert/expert/0",
    )  # fmt: skip
    done = "data/evaluations/on/expert/expert/0"
    assert len(parquet.read_table(f"{done}/episodes.parquet")) == 3 * 3
    contexts = parquet.read_table(f"{done}/contexts.parquet").to_pandas()
    assert contexts.groupby("source").size().to_dict() == {"own": 3, "offline": 2 * 3}
    found = read_json(f"{done}/diagnostics.json")
    assert found["learned_on"] == {"algorithm": "mine", "rounds": 3, "updates": 6, "steps": 3 * FAMILY.horizon}
    assert found["context_shift"] > 0
    assert folder.as_posix() in read_json("data/evaluations/on/expert/expert/0/manifest.json")["inputs"]


def test_collected_rows_are_transitions_with_true_rewards(pearl):
    folder = learn()
    for round_ in range(3):
        columns = parquet.read_transitions(folder / f"collected={round_:03d}.parquet")
        assert len(columns["task"]) == 2 * 3 * FAMILY.horizon
        assert set(columns["reward_source"]) == {"simulator"}
        assert set(columns["checkpoint"]) == {6 * round_}
        assert set(columns["task"]) == {0, 1}  # never a test task
        assert len(np.unique(schema.keys(columns), axis=0)) == len(columns["task"])
        for task in (0, 1):
            own = schema.take(columns, columns["task"] == task)
            reward, _ = FAMILY.reward(
                TASKS[task]["parameters"], own["observation"], own["action"], own["next_observation"],
                own["reward_features"],
            )  # fmt: skip
            np.testing.assert_array_equal(own["reward"], reward)
            going_on = own["step"][1:] > 0
            np.testing.assert_array_equal(own["observation"][1:][going_on], own["next_observation"][:-1][going_on])
            assert own["truncated"].sum() == 3
    facts = _collected(folder / "collected=001.parquet", 7)
    assert facts == {
        "reward_source": "simulator", "round": 1, "model": "data/models/mine/expert/0", "problems": [],
    }  # fmt: skip


def test_a_model_goes_on_from_its_optimizers_where_they_were_kept(tmp_path, monkeypatch):
    models = []
    for kept in (True, False):
        (tmp_path / str(kept)).mkdir()
        monkeypatch.chdir(tmp_path / str(kept))
        make_folder("pearl", SMALL, optimizers=kept)
        models.append(load_file(learn(rounds=1, explore="mean") / "model.safetensors"))
    assert not torch.equal(models[0]["actor_critic.q.weights.0"], models[1]["actor_critic.q.weights.0"])


@pytest.mark.parametrize("kept", [True, False])
def test_no_random_stream_is_drawn_from_twice(tmp_path, monkeypatch, kept):
    monkeypatch.chdir(tmp_path)
    make_folder("pearl", SMALL, optimizers=kept)
    folder = Path("data/models/mine/expert/0")
    loaded = [load_model(folder, "cpu"), *(online.load_for_training(folder, "cpu", seed) for seed in (1, 2))]
    of_training, one, two = (model.generators()["noise"].get_state() for model in loaded)
    assert not torch.equal(one, of_training)
    assert torch.equal(one, two) == kept  # it goes on, or begins at the seed


@pytest.mark.parametrize(
    ("name", "values"),
    [("macaw", {"width": 8, "latent_dim": 4, "meta_batch": 2, "inner_batch": 8, "outer_batch": 8}),
     ("prompt-dt", {"width": 8, "meta_batch": 2, "rl_batch": 4, "prompt_from": "window"})],
)  # fmt: skip
def test_an_offline_context_comes_with_the_methods_columns(name, values, tmp_path, monkeypatch):
    """MACAW regresses on returns to go; a window of Prompt-DT's prompt has those of the episode it is cut from."""
    monkeypatch.chdir(tmp_path)
    make_folder(name, values | {"depth": 1})
    model = load_model("data/models/mine/expert/0", "cpu")
    seen, real = [], type(model).adapt

    def spy(self: Any, belief: Any, context: Experience) -> Any:
        seen.append(context)
        return real(self, belief, context)

    monkeypatch.setattr(type(model), "adapt", spy)
    learn(rounds=1, posterior="offline")
    assert len(seen) == ONLINE["episodes"] - ONLINE["prior_episodes"]
    data = TaskData.load("data/datasets/expert", [0, 1], "dense")
    for context in seen:
        for place in (0, 1):
            drawn = context.observation[place].reshape(-1, 2).numpy()
            rows = [int(np.flatnonzero((data.observation[place] == s).all(1))[0]) for s in drawn]
            for key, column in model.columns(data).items():
                found = context.extra[key][place].numpy().reshape(len(rows), *column.shape[2:])
                np.testing.assert_array_equal(found, column[place, rows])


def test_unseen_tasks_can_be_learned_on(pearl):
    columns = parquet.read_transitions(learn(tasks="test", rounds=1) / "collected=000.parquet")
    assert set(columns["task"]) == {2}


def test_the_free_name_and_a_second_run_change_nothing(pearl):
    first = hashes(learn())
    assert hashes(learn()) == first
    other = hashes(learn("other"))
    same = [name for name in first if name.endswith((".parquet", ".safetensors", ".csv"))]
    assert {name: other[name] for name in same} == {name: first[name] for name in same}


class Killed(BaseException):
    """Stands for a killed process."""


@pytest.mark.parametrize(
    ("module", "place", "call"),
    [
        (online, "collect", 2), (online, "write_transitions", 2), (online, "save_state", 1), (online, "publish", 1),
        (train, "save_state", 2), (train, "save_state", 5), (online, "write_manifest", 1),
    ],
)  # fmt: skip
def test_a_stop_anywhere_ends_in_the_same_bytes(pearl, module, place, call):
    expected = hashes(learn(keep=2))
    calls, real = [0], getattr(module, place)

    def stop(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        found = real(*arguments, **named)
        if calls[0] == call:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, place, stop)
        with pytest.raises(Killed):
            learn("on", keep=2)
    assert calls[0] == call
    assert hashes(learn(keep=2)) == expected
    assert not list(Path("data/.scratch/online").iterdir())


def test_a_damaged_model_is_named(pearl):
    path = Path("data/models/mine/expert/0/training.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"training\.safetensors: damaged"):
        learn()


def test_rows_of_two_parts_keep_their_episodes():
    parts = [TaskData.of_columns([0, 1], [transitions(0), transitions(1)], "dense") for _ in range(2)]
    both = parts[0].followed_by(parts[1])
    assert both.rows == 2 * ROWS
    np.testing.assert_array_equal(both.episodes(0), [[i, i + 20] for i in range(0, 2 * ROWS, 20)])
    np.testing.assert_array_equal(both.reward[:, ROWS:], both.reward[:, :ROWS])
    assert not both.terminal.any()
    ends = TaskData.of_columns([0], [transitions(0)], "dense", time_limit_terminal=True).terminal[0]
    np.testing.assert_array_equal(np.flatnonzero(ends), [19, 39, 59])


def test_the_schema_knows_where_a_reward_is_from():
    columns = transitions(0)
    assert "reward_source" not in schema.to_table(columns).schema.names
    table = schema.to_table({**columns, "reward_source": np.full(ROWS, "decoded")})
    schema.check(table.schema)
    assert set(schema.from_table(table)["reward_source"]) == {"decoded"}
    with pytest.raises(ValueError, match="expected one of simulator, decoded, hidden"):
        schema.to_table({**columns, "reward_source": np.full(ROWS, "guess")})
    with pytest.raises(ValueError, match="reward_source is"):
        schema.check(table.schema.set(len(table.schema) - 1, table.schema.field("task").with_name("reward_source")))


def test_early_ends_are_filled_up(pearl, monkeypatch):
    """Every task has the same number of rows, however soon its episodes end."""
    real = online._collect_episode

    def cut(*arguments: Any) -> Any:
        ran = real(*arguments)
        valid = ran.valid.copy()
        valid[0, 7:] = False  # the first task's episodes end after seven steps
        terminated = ran.terminated.copy()
        terminated[0, 6] = True
        return replace(ran, valid=valid, terminated=terminated)

    monkeypatch.setattr(online, "_collect_episode", cut)
    columns = parquet.read_transitions(learn(rounds=1) / "collected=000.parquet")
    assert np.bincount(columns["task"]).tolist() == [60, 60]
    first = schema.take(columns, columns["task"] == 0)
    assert first["terminated"].sum() == 60 // 7
    assert first["step"].max() == 6
    assert first["truncated"].sum() == 1  # the last one was cut


def test_rounds_draw_batches_starts_and_actions_of_their_own(pearl, monkeypatch):
    seeds, calls = [], []
    make, act = online.make_sampler, Pearl.act

    def sampler(algorithm: Any, data: Any, seed: int) -> Any:
        seeds.append(seed)
        return make(algorithm, data, seed)

    def acting(self: Pearl, belief: Any, observation: Any, rng: Any = None) -> Any:
        calls.append((rng is not None, bool(belief["variance"].any())))
        return act(self, belief, observation, rng)

    monkeypatch.setattr(online, "make_sampler", sampler)
    monkeypatch.setattr(Pearl, "act", acting)
    folder = learn()
    assert len(set(seeds)) == 3
    rounds = [parquet.read_transitions(folder / f"collected={i:03d}.parquet") for i in range(3)]
    assert len({tuple(columns["observation"][0]) for columns in rounds}) == 3
    assert set(calls) == {(True, False)}  # actions are drawn, and beliefs are draws, from prior and posterior


def test_a_learning_curve_is_of_the_snapshots_and_ends_at_the_tables_number(pearl):
    folder = learn(keep=3)
    build_evaluation(
        name="on", train="expert", test="expert", seed=0, config=EvaluateConfig(),
        settings=protocol("offline-context").CONFIG(episodes=3, repetitions=2), family=FAMILY, model=folder, code=CODE,
        target="data/evaluations/on",
    )  # fmt: skip
    learned, episodes, trajectories = (
        parquet.read_table(f"data/evaluations/on/{name}.parquet").to_pandas()
        for name in ("learning", "episodes", "trajectories")
    )
    assert learned.groupby("step").size().to_dict() == {6: 6, 12: 6, 18: 6}
    table = episodes[episodes["counted"]]["return"].tolist()
    assert learned[learned["step"] == 18]["return"].tolist() == table
    assert learned[learned["step"] == 6]["return"].tolist() != table
    assert set(trajectories["task"]) == {2}  # the test task's
    embeddings = parquet.read_table("data/evaluations/on/embeddings.parquet").to_pandas()
    means = np.stack([np.stack(rows.tolist()).mean(0) for _, rows in embeddings.groupby("task")["embedding"]])
    told = read_json("data/evaluations/on/diagnostics.json")["rms"]
    assert told == pytest.approx(rms(means[:2].astype(np.float64)), rel=1e-4)  # of training tasks
    assert told != pytest.approx(rms(means.astype(np.float64)), rel=1e-2)


@pytest.mark.parametrize("context", ["offline", "all"])
@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_round_trains_on(pearl, monkeypatch, context, terminal):
    seen, make = [], online.make_sampler

    def sampler(algorithm: Any, data: Any, seed: int) -> Any:
        seen.append(data)
        return make(algorithm, data, seed)

    monkeypatch.setattr(online, "make_sampler", sampler)
    monkeypatch.setitem(globals(), "TRAINING", TRAINING.model_copy(update={"time_limit_terminal": terminal}))
    learn(context=context)
    assert [data["transitions"].rows for data in seen] == [ROWS + 60, ROWS + 120, ROWS + 180]
    assert [data["context"].rows for data in seen if "context" in data] == [ROWS] * 3 * (context == "offline")
    ends = seen[-1]["transitions"].terminal[0, ROWS:]
    assert np.flatnonzero(ends).tolist() == (list(range(19, 180, 20)) if terminal else [])


@pytest.mark.parametrize("name", ["point-robot", "sparse-point-robot"])
def test_evaluation_gives_inference_the_reward_of_the_family(pearl, monkeypatch, name):
    family, seen = load_family(name), []
    real = TaskData.load

    def load(*args: Any, **kwargs: Any) -> TaskData:
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(TaskData, "load", load)
    build_evaluation(
        name="m", train="expert", test="expert", seed=0, config=EvaluateConfig(),
        settings=protocol("offline-context").CONFIG(episodes=1, repetitions=1), family=family,
        model=Path("data/models/mine/expert/0"), code=CODE, target="data/evaluations/m",
    )  # fmt: skip
    assert [data.inference for data in seen] == [family.inference_reward]
