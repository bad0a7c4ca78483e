"""``omrl video``: two policies side by side, drawn without a window."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageSequence
from toy import write_pipeline

import omrl
from omrl.core.errors import UserError
from omrl.learning.train import MetaTrainConfig, build_model, spec_of
from omrl.video import act, write

SMALL = {"latent_dim": 3, "width": 16, "encoder_width": 16, "meta_batch": 4, "rl_batch": 16, "context_batch": 16}
MODEL = "data/models/mine/expert/0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_pipeline(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build_model(
            name="mine", module="bc", overrides=SMALL, sources={"transitions": "expert"}, dataset="expert", seed=0,
            config=MetaTrainConfig(steps=200, threads=1), spec=spec_of(omrl.make_family("sparse-point-robot")),
            inference="sparse", code=[], target=MODEL,
        )  # fmt: skip
    return folder


def test_a_gif_shows_both_policies_step_by_step_and_has_the_same_bytes_twice(folder, tmp_path):
    line = write(folder / MODEL, None, tmp_path / "a.gif")
    assert line.startswith(f"{tmp_path / 'a.gif'}: task 4, return ")
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(tmp_path / "a.gif"))]
    assert len(frames) == 21
    assert frames[0].shape == (480, 960, 3)
    caption, first = 30, frames[0]
    np.testing.assert_array_equal(first[caption:, :480], first[caption:, 480:])  # the same start, the same task
    last = frames[-1]
    assert (last[caption:, :480] != last[caption:, 480:]).any()  # they have gone different ways
    write(folder / MODEL, None, tmp_path / "b.gif")
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_the_unadapted_policy_is_the_priors(folder):
    agent = omrl.load_agent(folder / MODEL, device="cpu")
    data, family = omrl.load_dataset(folder / "data/datasets/expert"), omrl.make_family("sparse-point-robot")
    ran, frames = act(agent, data, family, 1)
    np.testing.assert_array_equal(ran.action[0, 0], agent.act(agent.prior(), ran.observation[0, 0]))
    belief = agent.adapt(data.context(1, 256))
    np.testing.assert_allclose(ran.action[1, 0], agent.act(belief, ran.observation[1, 0]), atol=1e-6)
    assert len(frames) == family.horizon + 1


@pytest.mark.parametrize(
    ("model", "task", "target", "message"),
    [
        (MODEL, 99, "a.gif", r"task = 99: .* has tasks 0 to 5"),
        (MODEL, None, "a.mp4", r"a\.mp4: expected a name that ends with \.gif"),
        ("data/datasets/expert", None, "a.gif", r"expert: expected a model's folder"),
        ("data/models/mine/expert/7", None, "a.gif", r"expert/7/config\.json: missing"),
    ],
)
def test_what_is_refused(folder, tmp_path, model, task, target, message):
    with pytest.raises(UserError, match=message):
        write(folder / model, task, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_a_scene_that_cannot_be_drawn_is_one_line(folder, tmp_path, monkeypatch):
    from omrl.envs._point import PointBatch

    def refuse(*_):
        raise UserError("no picture: OpenGL by egl does not work here")

    monkeypatch.setattr(PointBatch, "render", refuse)
    with pytest.raises(UserError, match="no picture: OpenGL by egl"):
        write(folder / MODEL, None, tmp_path / "a.gif")
