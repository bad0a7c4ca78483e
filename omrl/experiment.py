"""Strict, typed loading of params.yaml.

The library never reads params.yaml; its typed configurations are filled here. A stage asks for the sections
it declares in dvc.yaml and gets those and no others. This module is not part of any fingerprint: what it
hands over is the values, which DVC tracks, in classes that the stage's own library code imports.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from omrl.core import registry
from omrl.core.config import Config, parse
from omrl.core.errors import UserError, suggest
from omrl.core.yaml12 import version_1_2

FILE = "params.yaml"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class TasksConfig(Config):
    """Section ``tasks``: the first ``train`` tasks are for meta-training, the next ``test`` are unseen."""

    train: Annotated[int, Field(ge=1, le=10_000)] = 20
    test: Annotated[int, Field(ge=1, le=10_000)] = 5
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1337

    @property
    def total(self) -> int:
        """All tasks."""
        return self.train + self.test


class Algorithm(Config):
    """An entry of section ``algorithms``: the file it runs, and what it overrides there."""

    algorithm: str | None = None
    overrides: dict[str, Any] = {}

    def module(self, name: str) -> str:
        """Return the algorithm's file name, the entry's own name unless ``algorithm`` says otherwise."""
        return self.algorithm or name


class _Top(Config):
    """The keys of params.yaml, in stage order; the sections' own keys are checked by their classes."""

    repository: str = "."
    env: str
    env_config: dict[str, Any] = {}
    tasks: dict[str, Any]
    shards: dict[str, list[int]]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    behavior: dict[str, Any]
    rollouts: dict[str, Any]
    dataset: dict[str, Any]
    relabel: dict[str, dict[str, Any]] = {}
    algorithms: dict[str, dict[str, Any] | None]
    meta_train: dict[str, Any]
    evaluate: dict[str, Any]
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
    report: dict[str, Any] = {}

    @field_validator("shards", "relabel", "algorithms", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} names a folder, use lower-case letters, digits and '-' (quote numbers)")
        return value


# the classes are imported when their section is asked for: a stage pays only for what it uses
_SECTIONS = {
    "behavior": ("omrl.behavior.base", "BehaviorConfig"),
    "rollouts": ("omrl.behavior.rollouts", "RolloutsConfig"),
    "dataset": ("omrl.data.quality", "DatasetConfig"),
    "meta_train": ("omrl.learning.train", "MetaTrainConfig"),
    "evaluate": ("omrl.evaluation.evaluate", "EvaluateConfig"),
    "report": ("omrl.report", "ReportConfig"),
}


@version_1_2
class _UniqueKeys(yaml.SafeLoader):
    """A safe YAML loader that refuses a key written twice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str | int):
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} is neither text nor a number", problem_mark=node.start_mark
            )
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key '{key}' stands there twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_pairs(node, deep=True))


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(path: str | Path = FILE) -> _Top:
    """Read the file and check its top-level keys.

    Raises:
        UserError: no such file, not YAML, an unknown, missing or wrongly typed key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run this in a folder with params.yaml and dvc.yaml") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path}: expected a YAML text file in UTF-8") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return parse(_Top, values, f"{path}:")


def _section(top: _Top, name: str, path: str | Path) -> Any:
    where = f"{path}: {name}"
    if name == "tasks":
        return parse(TasksConfig, top.tasks, where)
    if name == "relabel":
        relabel = importlib.import_module("omrl.data.relabel").RelabelConfig
        return {key: parse(relabel, value, f"{where}.{key}") for key, value in top.relabel.items()}
    if name == "algorithms":
        return {key: _algorithm(key, value, f"{where}.{key}") for key, value in top.algorithms.items()}
    if name in _SECTIONS:
        module, cls = _SECTIONS[name]
        return parse(getattr(importlib.import_module(module), cls), getattr(top, name), where)
    return getattr(top, name)


def _algorithm(name: str, value: dict[str, Any] | None, where: str) -> Algorithm:
    overrides = dict(value or {})
    module = overrides.pop("algorithm", None)
    known = registry.names("omrl.algorithms")
    if (module or name) not in known:
        key = f"{where}.algorithm = {module!r}" if module else where
        raise UserError(f"{key}: unknown algorithm '{module or name}': {suggest(module or name, known)}")
    return Algorithm(algorithm=module, overrides=overrides)


def load(*sections: str, path: str | Path = FILE) -> Any:
    """Return an object whose attributes are the typed ``sections`` of params.yaml, and nothing else.

    ``env`` is checked against the families that exist; with it, ``family`` is the family built from
    ``env_config``.

    Raises:
        UserError: one line naming the key, the value and what was expected.
    """
    top = read(path)
    values = {name: _section(top, name, path) for name in sections}
    if "env" in sections:
        values["family"] = _family(top, path)
    return SimpleNamespace(**values)


def _family(top: _Top, path: str | Path) -> Any:
    envs = importlib.import_module("omrl.envs.base")
    known = registry.names("omrl.envs")
    if top.env not in known:
        raise UserError(f"{path}: env = '{top.env}': unknown environment; {suggest(top.env, known)}")
    parse(envs.config_class(top.env), top.env_config, f"{path}: env_config")
    return envs.load_family(top.env, top.env_config)


def check(path: str | Path = FILE) -> list[str]:
    """Check everything in params.yaml, across sections too.

    Returns:
        The cells it asks for, as ``stage@cell`` names.

    Raises:
        UserError: the first problem, in one line.
    """
    top = read(path)
    values = load(
        "env", "tasks", "behavior", "rollouts", "dataset", "relabel", "algorithms", "meta_train", "evaluate",
        "report", path=path,
    )  # fmt: skip
    family, dataset = values.family, values.dataset
    if family.capacity is not None and values.tasks.total > family.capacity:
        raise UserError(
            f"{path}: tasks.train + tasks.test = {values.tasks.train} + {values.tasks.test}: expected at most "
            f"{family.capacity}, the number of tasks '{top.env}' has"
        )
    _check_shards(top.shards, values.tasks, path)
    if values.rollouts.source == "replay" and not values.behavior.keep_replay:
        raise UserError(f"{path}: rollouts.source = replay: expected behavior.keep_replay = true, which keeps it")
    _check_script(values, path)
    levels = importlib.import_module("omrl.data.quality")
    levels.check_levels(
        dataset.levels,
        *_rolled_out(values.rollouts, values.behavior),
        dataset.transitions_per_task,
        where=f"{path}: dataset",
    )
    saved = values.behavior.checkpoint_steps()
    rolled_out = values.rollouts.checkpoint_steps(saved)
    levels.check_names(dataset.levels, rolled_out, saved, values.rollouts.source, where=f"{path}: dataset")
    section = "behavior" if values.rollouts.source == "replay" else "rollouts"
    horizon = getattr(values, section).horizon
    if horizon < family.horizon:
        raise UserError(
            f"{path}: {section}.horizon = {horizon}: expected at least {family.horizon}, the steps of "
            f"a test episode of '{top.env}', over which returns are normalized"
        )
    for name, entry in values.relabel.items():
        key = f"{path}: relabel.{name}"
        if name in dataset.levels:
            raise UserError(f"{key}: the name is taken by dataset.levels.{name}")
        if entry.source not in dataset.levels:
            options = suggest(entry.source, dataset.levels)
            raise UserError(f"{key}.source = '{entry.source}': not one of dataset.levels; {options}")
        family.relabelled(entry.env_config, key)
    known = [*dataset.levels, *values.relabel]
    for key, chosen in (("train", dataset.train), ("test", dataset.test)):
        for name in chosen:
            if name not in known:
                raise UserError(f"{path}: dataset.{key} has '{name}': no such dataset; {suggest(name, known)}")
        if len(set(chosen)) != len(chosen):
            raise UserError(f"{path}: dataset.{key} = {list(chosen)}: expected each dataset once")
    if values.evaluate.protocol == "ood-checkpoint":
        key = f"{path}: evaluate.protocol = 'ood-checkpoint'"
        if family.varies != "reward":
            raise UserError(
                f"{key}: tasks of '{top.env}' differ in their dynamics, so other tasks' transitions cannot be this "
                "task's context; expected another protocol"
            )
        if merged := [name for name in dataset.test if name in values.relabel]:
            raise UserError(f"{key}: dataset.test has '{merged[0]}', where all tasks share one set; expected levels")
        if values.tasks.train < 2:
            raise UserError(f"{key}: tasks.train = {values.tasks.train}: expected 2 or more")
    if len(set(top.seeds)) != len(top.seeds):
        raise UserError(f"{path}: seeds = {top.seeds}: expected each seed once")
    if not top.algorithms:
        raise UserError(f"{path}: algorithms: expected at least one of {', '.join(registry.names('omrl.algorithms'))}")
    for name, entry in values.algorithms.items():
        module = registry.load("omrl.algorithms", entry.module(name), "algorithm")
        config = parse(module.CONFIG, entry.overrides, f"{path}: algorithms.{name}")
        if wrong := module.ALGORITHM.check(config, values.tasks.train, values.meta_train.steps):
            raise UserError(f"{path}: algorithms.{name}.{wrong}")
    return [f"{stage}@{cell}" for stage, names in _cell_names(top, dataset).items() for cell in names]


def _check_script(values: Any, path: str | Path) -> None:
    """Raise unless behavior and rollouts agree on whether a script acts, and the family has one."""
    engine, source = values.behavior.engine, values.rollouts.source
    if (engine == "scripted") != (source == "scripted"):
        expected = "rollouts.source = scripted" if engine == "scripted" else "behavior.engine = scripted"
        raise UserError(f"{path}: behavior.engine = {engine} with rollouts.source = {source}: expected {expected}, too")
    scripted = importlib.import_module("omrl.behavior.scripted").Scripted
    if source == "scripted" and not isinstance(values.family, scripted):
        raise UserError(
            f"{path}: rollouts.source = scripted: '{values.family.name}' has no script; expected checkpoints or replay"
        )


def _rolled_out(rollouts: Any, behavior: Any) -> tuple[list[int], int, int]:
    """Return the checkpoints with rows, and the most rows of one with sampled and with mean actions."""
    steps = rollouts.checkpoint_steps(behavior.checkpoint_steps())
    if rollouts.source == "replay":
        return steps[:-1], behavior.checkpoint_every + behavior.horizon, 0
    return (
        steps,
        rollouts.episodes_per_checkpoint * rollouts.horizon,
        rollouts.deterministic_episodes * rollouts.horizon,
    )


def _check_shards(shards: dict[str, list[int]], tasks: TasksConfig, path: str | Path) -> None:
    """Raise unless the shards cover tasks 0..total-1 exactly once."""
    ranges: list[tuple[int, int, str]] = []
    for name, bounds in shards.items():
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
            raise UserError(
                f"{path}: shards.{name} = {bounds}: expected [first, last], two task indices, both included"
            )
        ranges.append((bounds[0], bounds[1], name))
    if not ranges:
        raise UserError(f"{path}: shards: expected ranges of task indices that cover 0..{tasks.total - 1}")
    ranges.sort()
    expected, previous = 0, ""
    for first, last, name in ranges:
        if first < expected:
            raise UserError(
                f"{path}: shards.{name} = [{first}, {last}] overlaps shards.{previous}: expected every task once"
            )
        if first > expected:
            gap = f"task {expected}" if first == expected + 1 else f"tasks {expected}..{first - 1}"
            raise UserError(f"{path}: shards leave out {gap}: expected 0..{tasks.total - 1} covered exactly once")
        expected, previous = last + 1, name
    if expected < tasks.total:
        raise UserError(
            f"{path}: shards leave out tasks {expected}..{tasks.total - 1}: expected all of tasks.train + "
            f"tasks.test = {tasks.total} covered"
        )
    if expected > tasks.total:
        raise UserError(
            f"{path}: shards.{previous} ends at task {expected - 1}, but tasks.train + tasks.test = {tasks.total}: "
            f"expected the last index to be {tasks.total - 1}"
        )


def cells(path: str | Path = FILE) -> dict[str, Any]:
    """Return what params.yaml asks for: evaluations, models, datasets and shards, in the file's order."""
    top = read(path)
    dataset = _section(top, "dataset", path)
    models = [
        {"algorithm": algorithm, "train": train, "seed": seed}
        for algorithm in top.algorithms
        for train in dataset.train
        for seed in top.seeds
    ]
    return {
        "shards": top.shards,
        "datasets": [*dataset.levels, *top.relabel],
        "models": models,
        "evaluations": [{**model, "test": test} for model in models for test in dataset.test],
    }


def _cell_names(top: _Top, dataset: Any) -> dict[str, list[str]]:
    models = [f"{a}-{d}-{s}" for a in top.algorithms for d in dataset.train for s in top.seeds]
    tests = [f"{a}-{d}-{t}-{s}" for a in top.algorithms for d in dataset.train for t in dataset.test for s in top.seeds]
    return {
        "behavior": list(top.shards),
        "rollouts": list(top.shards),
        "dataset": list(dataset.levels),
        "relabel": list(top.relabel),
        "meta_train": models,
        "evaluate": tests,
    }
