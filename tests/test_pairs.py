"""Dataset pairs: one path to depend on, two datasets to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import SIZES, SMALL, make_pipeline, settings

from omrl.core.errors import UserError
from omrl.core.files import read_manifest, write_json, write_manifest
from omrl.data.pairs import PairConfig, build_pair, sources
from omrl.experiment import check
from omrl.learning.train import build_model

CODE = Path("data/code/stages/pair.json")


@pytest.fixture
def pair(tmp_path, monkeypatch) -> Path:
    """The folder of a pair: transitions of ``expert``, contexts of ``other``."""
    monkeypatch.chdir(tmp_path)
    make_pipeline()
    write_json(CODE, {"fingerprint": "1"})
    source, other = Path("data/datasets/expert"), Path("data/datasets/other")
    other.mkdir()
    files = read_manifest(source)["files"]
    for place, name in enumerate(sorted(files)):  # the same files for other tasks
        (other / name).write_bytes((source / sorted(files)[place - 1]).read_bytes())
    write_manifest(other, kind="dataset", inputs={}, parameters={}, files=dict.fromkeys(files, 1))
    target = Path("data/datasets/crossed")
    build_pair("crossed", PairConfig(transitions="expert", context="other"), [CODE], target)
    return target


def test_a_pair_names_both_and_a_dataset_itself(pair):
    assert sources(pair) == {"transitions": "expert", "context": "other"}
    assert sources(Path("data/datasets/expert")) == {"transitions": "expert"}
    assert set(read_manifest(pair)["inputs"]) == {"data/datasets/expert", "data/datasets/other", CODE.as_posix()}


def test_another_dataset_than_the_one_it_was_made_of_is_refused(pair):
    other = Path("data/datasets/other")
    write_manifest(other, kind="dataset", inputs={}, parameters={"seed": 1}, files=dict.fromkeys(
        read_manifest(other)["files"], 1))  # fmt: skip
    with pytest.raises(UserError, match=r"data/datasets/other: not the dataset that data/datasets/crossed was made of"):
        sources(pair)


def test_a_missing_member_is_named(pair):
    with pytest.raises(UserError, match="data/datasets/nothing"):
        build_pair("x", PairConfig(transitions="expert", context="nothing"), [CODE], Path("data/datasets/x"))
    assert not Path("data/datasets/x").exists()


def test_a_method_that_never_draws_contexts_is_refused_a_pair(tmp_path):
    values = yaml.safe_load((Path(__file__).parents[1] / "pipelines/smoke/params.yaml").read_text())
    values["algorithms"], values["pairs"] = {"focal": {}}, {"crossed": {"transitions": "expert", "context": "mixed"}}
    for own_context in (False, True):
        values["algorithms"]["focal"]["context_is_rl_batch"] = own_context
        for train in ("expert", "crossed"):
            values["dataset"]["train"] = [train]
            (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
            if not (own_context and train == "crossed"):
                assert f"meta_train@focal-{train}-0" in check(tmp_path / "params.yaml")
                continue
            with pytest.raises(UserError, match=r"algorithms\.focal\.context_is_rl_batch = True: expected False where"):
                check(tmp_path / "params.yaml")


def test_contexts_come_from_the_second_and_transitions_from_the_first(pair):
    def train(of: dict[str, str], name: str) -> dict[str, torch.Tensor]:
        target = Path("data/models") / name
        build_model(
            name=name, module="focal", overrides=SMALL, sources=of, dataset=name, seed=0, config=settings(), spec=SIZES,
            inference="sparse", code=["data/code/focal.json"], target=target,
        )  # fmt: skip
        return load_file(target / "model.safetensors")

    plain = train({"transitions": "expert"}, "plain")
    same = train({"transitions": "expert", "context": "expert"}, "same")
    crossed = train(sources(pair), "crossed")
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert any(not torch.equal(plain[name], crossed[name]) for name in plain if name.startswith("encoder"))
