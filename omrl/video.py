"""``omrl video``: an adapted policy beside the unadapted one, as a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omrl.algorithms.base import join_beliefs
from omrl.behavior.simulate import Episodes
from omrl.core import layout, seeding
from omrl.core.errors import UserError
from omrl.core.files import atomic_path, read_json, read_manifest
from omrl.envs._point import PointBatch
from omrl.envs.base import BatchEnv, Family, load_family
from omrl.evaluation.protocols.base import ProtocolConfig, Run
from omrl.frontdoor import Agent, Dataset, load_agent, load_dataset

ROWS = 256  # transitions behind the adapted policy's belief
_FRAMES = 200  # at most; of a longer episode every n-th step is drawn
_SECONDS = 10.0  # of a longer episode; a point robot's 20 steps take 2
Picture = NDArray[np.uint8]


def write(model: Path, task: int | None, target: Path) -> str:
    """Write the GIF of one task and return a line about it.

    Args:
        model: ``data/models/<algorithm>/<dataset>/<seed>`` of a built pipeline.
        task: index; the first test task if None.
        target: the file, ``.gif``.

    Raises:
        UserError: something is missing, there is no such task, or nothing can be drawn here.
    """
    if target.suffix.lower() != ".gif":
        raise UserError(f"{target}: expected a name that ends with .gif")
    place = model.resolve()
    if len(place.parents) < 4 or place.parents[2].name != "models":
        raise UserError(f"{model}: expected a model's folder, data/models/<algorithm>/<dataset>/<seed>")
    about = read_json(place.parents[3] / layout.TASKS.relative_to(layout.DATA))
    agent, sources = load_agent(model, device="cpu"), read_manifest(model)["parameters"]["sources"]
    data = load_dataset(place.parents[3] / "datasets" / sources.get("context", sources["transitions"]))
    family = load_family(about["env"], about["spec"]["config"])
    chosen = about["test"][0] if task is None else task
    ran, frames = act(agent, data, family, chosen)
    _save(ran, frames, family, target)
    unadapted, adapted = ran.returns(family.returns == "sparse")
    return f"{target}: task {chosen}, return {adapted:.4g} adapted, {unadapted:.4g} unadapted"


def act(agent: Agent, data: Dataset, family: Family, task: int) -> tuple[Episodes, list[tuple[Picture, Picture]]]:
    """Run one episode of a task, without and with a context of it, from the same start.

    Returns:
        The two episodes, unadapted first, and a pair of pictures before each step and at the end.
    """
    context = data.context(task, ROWS, agent=agent)
    belief = join_beliefs([agent.prior(1), agent.adapt(context)])
    rows = [row for row in data.tasks if row["index"] == task] * 2
    run = Run(agent.algorithm, family, data.data, rows, ProtocolConfig(), ("video",), 0)
    starts = [seeding.generator(0, "video", task) for _ in rows]
    frames: list[tuple[Picture, Picture]] = []
    paths: list[NDArray[np.float32]] = []
    shown: list[BatchEnv] = []

    def watch(env: BatchEnv) -> None:
        shown[:] = [env]
        paths.append(env.observation.copy())
        frames.append((_draw(env, 0, paths), _draw(env, 1, paths)))

    with torch.no_grad():
        ran, _ = run.episode(belief, starts, watch=watch)
    watch(shown[0])
    for side in (0, 1):  # after a termination nothing moves any more
        last = int(ran.valid[side].sum())
        for i in range(last + 1, len(frames)):
            kept = [*frames[i]]
            kept[side] = frames[last][side]
            frames[i] = (kept[0], kept[1])
    return ran, frames


def _draw(env: BatchEnv, row: int, paths: list[NDArray[np.float32]]) -> Picture:
    return env.render(row, [seen[row] for seen in paths[:-1]]) if isinstance(env, PointBatch) else env.render(row)


def _save(ran: Episodes, frames: list[tuple[Picture, Picture]], family: Family, target: Path) -> None:
    from PIL import Image, ImageDraw

    rewards = np.where(ran.valid, ran.sparse_reward if family.returns == "sparse" else ran.reward, 0)
    totals = np.concatenate([np.zeros((2, 1)), np.cumsum(rewards, axis=1)], axis=1)
    every = -(-len(frames) // _FRAMES)
    steps = sorted({*range(0, len(frames), every), len(frames) - 1})
    images: list[Any] = []
    for step in steps:
        image = Image.fromarray(np.concatenate(frames[step], axis=1))
        pen = ImageDraw.Draw(image)
        for side, name in enumerate(("unadapted", "adapted")):
            pen.text((side * image.width // 2 + 8, 8), f"{name}, step {step}: {totals[side, step]:.2f}", fill=(0, 0, 0))
        images.append(image)
    pause = round(1000 * min(_SECONDS / len(images), 0.1))
    pauses = [pause] * (len(images) - 1) + [1500]  # milliseconds
    with atomic_path(target) as temporary:
        images[0].save(temporary, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0, disposal=1)
