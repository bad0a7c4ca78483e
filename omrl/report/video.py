"""A film of one task: the policy before it knows the task, beside the same policy adapted to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omrl.algorithms.base import Algorithm, join_beliefs, load_model
from omrl.core import layout, seeding
from omrl.core.errors import UserError
from omrl.core.files import atomic_path, read_json, read_manifest
from omrl.data.taskdata import TaskData
from omrl.envs.base import Family, load_family
from omrl.evaluation.contexts import offline_belief
from omrl.evaluation.protocols.base import Run

_EVERY = 2  # of a picture's pixels, every second one along an axis


def film(
    algorithm: Algorithm, family: Family, data: TaskData, task: dict[str, Any], transitions: int
) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """Return the pictures of an episode and the two returns: left before any context, right after it.

    Both episodes start alike. They are simulated first and drawn when their actions are stepped through again.

    Args:
        algorithm: the model.
        family: environment.
        data: transitions of the task alone, from which the context is drawn.
        task: row of data/tasks/all.json.
        transitions: of context.

    Raises:
        UserError: the family cannot be drawn, or there is no OpenGL.
    """

    def starts() -> list[np.random.Generator]:
        return [seeding.generator(0, "video", task["index"]) for _ in range(2)]

    known = offline_belief(algorithm, data, transitions, [seeding.generator(0, "video context", task["index"])])
    run = Run(algorithm, family, data, [task, task], None, ("video",), 0)
    ran, _ = run.episode(join_beliefs([algorithm.prior(1), known]), starts())
    env = family.batch([task["parameters"]], 2)
    env.reset(starts())
    paths: list[list[NDArray[np.float32]]] = [[env.observation[row].copy()] for row in range(2)]
    pictures = [_beside([env.render(row, paths[row]) for row in range(2)])]
    for t in range(ran.action.shape[1]):
        if not ran.valid[:, t].any():
            break
        env.step(ran.action[:, t])
        for row in range(2):
            paths[row].append(env.observation[row].copy())
        pictures.append(_beside([env.render(row, paths[row]) for row in range(2)]))
    return pictures, [float(x) for x in ran.returns(family.returns == "sparse")]


def _beside(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    left, right = (picture[::_EVERY, ::_EVERY] for picture in pictures)
    bar = np.full((len(left), 4, 3), 128, dtype=np.uint8)
    return np.concatenate([left, bar, right], axis=1)


def write(pictures: Sequence[NDArray[np.uint8]], target: Path, rate: int) -> None:
    """Write pictures as a GIF that runs ``rate`` of them in a second, over and over."""
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    with atomic_path(target) as temporary:
        images[0].save(
            temporary, format="GIF", save_all=True, append_images=images[1:], duration=1000 // rate, loop=0
        )  # fmt: skip


def video(model: Path, task: int | None, dataset: str | None, transitions: int, target: Path) -> str:
    """Film a model of this pipeline on one of its tasks; return a line about it.

    Args:
        model: folder such as ``data/models/focal/expert/0``, seen from the pipeline's folder.
        task: index; None for the first unseen one.
        dataset: where the context is from; None for the one that the model was trained on.
        transitions: of context.
        target: GIF to write.

    Raises:
        UserError: something is missing, or cannot be drawn.
    """
    everything = read_json(layout.TASKS)
    index = everything["test"][0] if task is None else task
    rows = {row["index"]: row for row in everything["tasks"]}
    if index not in rows:
        raise UserError(f"--task {index}: expected one of {min(rows)}..{max(rows)}, the tasks of {layout.TASKS}")
    family = load_family(everything["env"], everything["spec"]["config"])
    name = dataset or read_manifest(model)["parameters"].get("dataset")
    if not name or not layout.datasets(name).is_dir():
        raise UserError(f"{model}: no dataset {name!r} to draw the context from; name one with --dataset")
    algorithm = load_model(model)
    data = TaskData.load(layout.datasets(name), [index], family.inference_reward)
    if columns := algorithm.columns(data):
        data = data.with_columns(columns)
    pictures, (before, after) = film(algorithm, family, data, rows[index], transitions)
    rate = family.make(rows[index]["parameters"]).metadata["render_fps"]
    write(pictures, target, rate)
    return f"{target}: task {index}, left before any context (return {before:.2f}), right after it ({after:.2f})"
