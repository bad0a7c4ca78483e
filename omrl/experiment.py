"""Strict, typed reading of params.yaml.

The library never reads params.yaml; its typed configurations are filled here. A stage asks for the sections
it declares in dvc.yaml and gets those and no others, and pays for the imports of those alone. This module is not
part of any fingerprint: what it hands over is the values, which DVC tracks, in classes that the stage's own
library code imports.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import BaseModel, Field, field_validator

from omrl.core import registry
from omrl.core.config import Config, parse
from omrl.core.errors import UserError, shown, suggest
from omrl.core.yamlfile import read as read_yaml

if TYPE_CHECKING:  # a section's classes are imported when it is asked for
    from omrl.behavior.base import BehaviorConfig
    from omrl.behavior.rollouts import RolloutsConfig
    from omrl.data.pairs import PairConfig
    from omrl.data.quality import DatasetConfig
    from omrl.data.relabel import RelabelConfig
    from omrl.envs.base import Family
    from omrl.evaluation.evaluate import EvaluateConfig
    from omrl.evaluation.protocols.base import ProtocolConfig
    from omrl.learning.online import OnlineConfig
    from omrl.learning.train import MetaTrainConfig
    from omrl.report import ReportConfig

FILE = "params.yaml"
INSTALLED = "installed"  # as repository: the code is the installed package, wherever that is
CodeKind = Literal["stages", "engines", "envs", "algorithms"]
MOST_CELLS = 20_000  # DVC reads and writes all of them at every stage
_MOST_STEPS = 10**8  # of one task's rollouts
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
HIGHEST_SEED = 2**31 - 1
Seed = Annotated[int, Field(ge=0, le=HIGHEST_SEED)]
Section = Literal[
    "repository", "env", "env_config", "tasks", "shards", "seed", "behavior", "rollouts", "dataset", "relabel",
    "pairs", "algorithms", "meta_train", "seeds", "online", "evaluate", "report",
]  # fmt: skip
C = TypeVar("C", bound=BaseModel)


class TasksConfig(Config):
    """Section ``tasks``.

    Attributes:
        train: how many tasks are for meta-training, the first of the family's list or the first draws.
        test: how many are unseen: the first of those that the family's list keeps for tests, or draws of their own.
        seed: of the draw of the tasks, or of the order of a fixed grid; without effect on a published list.
    """

    train: Annotated[int, Field(ge=1, le=10_000)] = 20
    test: Annotated[int, Field(ge=1, le=10_000)] = 5
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1337

    @property
    def total(self) -> int:
        """All tasks."""
        return self.train + self.test


@dataclass(frozen=True)
class Algorithm:
    """An entry of section ``algorithms``.

    Attributes:
        file: name of the file in omrl/algorithms/ that it runs.
        overrides: of that file's configuration; not checked yet.
    """

    file: str
    overrides: dict[str, object]


class Model(TypedDict):
    """A meta-training cell."""

    algorithm: str
    train: str
    seed: int


class Evaluation(Model):
    """An evaluation cell."""

    test: str


class Cells(TypedDict):
    """What params.yaml asks for, in the file's order."""

    shards: dict[str, list[int]]
    datasets: list[str]
    pairs: list[str]
    models: list[Model]
    online: list[str]
    evaluations: list[Evaluation]


class Top(Config):
    """The keys of params.yaml, in stage order; the sections' own keys are checked by their classes.

    Attributes:
        repository: where the code lies, seen from the file's folder, or ``installed`` for the package.
        env: the environment family: a name that ``omrl list`` shows, or a module of one's own.
        env_config: what the family leaves open; its keys are the family's.
        tasks: how many tasks, and which.
        shards: first and last task of each group whose behavior policies are trained, and rolled out, in one cell.
        seed: root of the random streams of behavior policies and data.
        behavior: training of the behavior policies.
        rollouts: what acts, and for how long.
        dataset: quality levels, and which are trained and tested on.
        relabel: relabelled sets, by name.
        pairs: transitions of one dataset with contexts of another, by name.
        algorithms: methods, by a name of one's own choice. The keys of an entry are its method's, and ``algorithm``,
            which names the method where the entry's own name does not: so a method can stand here several times.
        meta_train: steps and threads of meta-training.
        online: models that learn on in the environment, by name.
        evaluate: the protocol, with the protocol's own keys beside those of every evaluation.
        seeds: of meta-training, one model each; ``omrl seeds`` writes many of them.
        report: intervals, pictures, and what stands beside the numbers.
    """

    repository: str = "."
    env: str
    env_config: dict[str, object] = {}
    tasks: dict[str, object]
    shards: dict[str, list[Annotated[int, Field(ge=0, le=10**6)]]]
    seed: Seed = 0
    behavior: dict[str, object]
    rollouts: dict[str, object]
    dataset: dict[str, object]
    relabel: dict[str, dict[str, object]] = {}
    pairs: dict[str, dict[str, object]] = {}
    algorithms: dict[str, dict[str, object] | None]
    meta_train: dict[str, object]
    online: dict[str, dict[str, object]] = {}
    evaluate: dict[str, object]
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MOST_CELLS)]
    report: dict[str, object] = {}

    @field_validator("shards", "relabel", "pairs", "algorithms", "online", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{shown(name)} names a folder, use lower-case letters, digits and '-' (quote numbers), at most 64"
                )
        return value

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, dict):  # dvc.yaml's matrix would take the keys for the seeds
            first, last = (value.get(key) for key in ("from", "to"))
            known = isinstance(first, int) and isinstance(last, int) and 0 <= first <= last
            command = f"omrl seeds {first} {last}" if known else "omrl seeds 0 99"
            raise ValueError(
                "expected a list such as [0, 1, 2]: DVC makes a cell of each entry, and cannot count; "
                f"'{command}' writes it"
            )
        return value


def read(path: str | Path = FILE) -> Top:
    """Read the file and check its top-level keys.

    Raises:
        UserError: no such file, not YAML, an unknown, missing or wrongly typed key.
    """
    values = read_yaml(path)
    for key in values if isinstance(values, dict) else ():  # first: a section with a typo is missing, too
        if key not in Top.model_fields:
            raise UserError(f"{path}: {shown(key, 60, quote=False)}: unknown key; {suggest(key, Top.model_fields)}")
    return parse(Top, values, f"{path}:")


@dataclass(frozen=True)
class Experiment:
    """What params.yaml says, typed; only the sections that were asked for can be read.

    Attributes:
        path: the file, for messages.
        sections: that can be read.
    """

    path: str | Path
    sections: frozenset[str]
    _top: Top

    def _given(self, section: Section) -> Any:
        if section not in self.sections:
            raise LookupError(f"section '{section}' of {self.path} was not asked for")
        return getattr(self._top, section)

    def _parsed(self, section: Section, cls: type[C]) -> C:
        return parse(cls, self._given(section), f"{self.path}: {section}")

    @property
    def repository(self) -> str:
        """Where omrl/ and stages/ lie, seen from the file's folder; or ``installed``."""
        return self._given("repository")

    @cached_property
    def env(self) -> str:
        """Name of the environment family, one that exists."""
        name, known = self._given("env"), registry.names("omrl.envs")
        if "." in name:  # somebody else's
            from omrl.envs.base import family_class

            family_class(name, f"{self.path}: env: ")
        elif name not in known:
            options = suggest(name, known)
            raise UserError(f"{self.path}: env = {shown(name)}: unknown environment; {options}")
        return name

    @cached_property
    def env_config(self) -> dict[str, object]:
        """What the file says about the family, checked against its class."""
        from omrl.envs.base import config_class

        given = self._given("env_config")
        parse(config_class(self.env, f"{self.path}: env: "), given, f"{self.path}: env_config")
        return given

    @cached_property
    def family(self) -> Family:
        """The family ``env`` with ``env_config``."""
        from omrl.envs.base import load_family

        return load_family(self.env, self.env_config)

    @cached_property
    def tasks(self) -> TasksConfig:
        """How many tasks, and which."""
        return self._parsed("tasks", TasksConfig)

    @property
    def shards(self) -> dict[str, list[int]]:
        """Name -> first and last task."""
        return self._given("shards")

    @property
    def seed(self) -> int:
        """Root of the data's random streams."""
        return self._given("seed")

    @cached_property
    def behavior(self) -> BehaviorConfig:
        """Training of the behavior policies."""
        from omrl.behavior.base import BehaviorConfig

        return self._parsed("behavior", BehaviorConfig)

    @cached_property
    def rollouts(self) -> RolloutsConfig:
        """What acts, and for how long."""
        from omrl.behavior.rollouts import RolloutsConfig

        return self._parsed("rollouts", RolloutsConfig)

    @cached_property
    def dataset(self) -> DatasetConfig:
        """Quality levels, and which are trained and tested on."""
        from omrl.data.quality import DatasetConfig

        return self._parsed("dataset", DatasetConfig)

    @cached_property
    def relabel(self) -> dict[str, RelabelConfig]:
        """Relabelled sets by name."""
        from omrl.data.relabel import RelabelConfig

        given = self._given("relabel")
        return {k: parse(RelabelConfig, v, f"{self.path}: relabel.{k}") for k, v in given.items()}

    @cached_property
    def pairs(self) -> dict[str, PairConfig]:
        """Dataset pairs by name."""
        from omrl.data.pairs import PairConfig

        given = self._given("pairs")
        return {k: parse(PairConfig, v, f"{self.path}: pairs.{k}") for k, v in given.items()}

    @cached_property
    def algorithms(self) -> dict[str, Algorithm]:
        """Algorithms by name, each of a file that exists."""
        return {name: self._algorithm(name, value or {}) for name, value in self._given("algorithms").items()}

    def _algorithm(self, name: str, value: dict[str, object]) -> Algorithm:
        overrides, known = dict(value), registry.names("omrl.algorithms")
        file = overrides.pop("algorithm", None)
        where = f"{self.path}: algorithms.{name}"
        if not isinstance(file, str | None):
            raise UserError(f"{where}.algorithm = {shown(file)}: expected the name of an algorithm")
        if "." not in (file or "") and (file or name) not in known:
            key = f"{where}.algorithm = {shown(file)}" if file else where
            plain = shown(file or name, 64, quote=False)
            raise UserError(f"{key}: unknown algorithm '{plain}': {suggest(file or name, known)}")
        return Algorithm(file or name, overrides)

    @cached_property
    def meta_train(self) -> MetaTrainConfig:
        """Steps and threads of meta-training."""
        from omrl.learning.train import MetaTrainConfig

        return self._parsed("meta_train", MetaTrainConfig)

    @property
    def seeds(self) -> list[int]:
        """Seeds of meta-training, one cell each."""
        return self._given("seeds")

    @cached_property
    def online(self) -> dict[str, OnlineConfig]:
        """How models learn on in the environment, by name."""
        given = self._given("online")
        if not given:
            return {}  # without the import
        from omrl.learning.online import OnlineConfig

        return {k: parse(OnlineConfig, v, f"{self.path}: online.{k}") for k, v in given.items()}

    @cached_property
    def evaluate(self) -> EvaluateConfig:
        """What every evaluation has: protocol and measurements."""
        return self._evaluate[0]

    @property
    def protocol(self) -> ProtocolConfig:
        """The keys of section ``evaluate`` that are the protocol's own."""
        return self._evaluate[1]

    @cached_property
    def _evaluate(self) -> tuple[EvaluateConfig, ProtocolConfig]:
        from omrl.evaluation.evaluate import parse_evaluate

        return parse_evaluate(self._given("evaluate"), f"{self.path}: evaluate")

    @cached_property
    def report(self) -> ReportConfig:
        """Intervals and pictures."""
        from omrl.report import ReportConfig

        return self._parsed("report", ReportConfig)


def load(*sections: Section, path: str | Path = FILE) -> Experiment:
    """Return the experiment of which ``sections``, checked, and no others can be read.

    Raises:
        UserError: one line naming the key, the value and what was expected.
    """
    experiment = Experiment(path, frozenset(sections), read(path))
    registry.search(Path(path).parent)
    for section in sections:
        getattr(experiment, section)
    return experiment


def check(path: str | Path = FILE) -> list[str]:
    """Check everything in params.yaml, across sections too.

    Returns:
        The cells that ``omrl repro`` counts: the four stages of every pipeline, and ``stage@cell`` for the others.

    Raises:
        UserError: the first problem, in one line.
    """
    x = load(
        "repository", "env", "env_config", "tasks", "shards", "seed", "behavior", "rollouts", "dataset", "relabel",
        "pairs", "algorithms", "meta_train", "seeds", "online", "evaluate", "report", path=path,
    )  # fmt: skip
    for section in _CHECKS:
        section(x)
    return _names(x)


def _check_tasks(x: Experiment) -> None:
    if x.family.capacity is not None and x.tasks.total > x.family.capacity:
        raise UserError(
            f"{x.path}: tasks.train + tasks.test = {x.tasks.train} + {x.tasks.test}: expected at most "
            f"{x.family.capacity}, the number of tasks '{x.env}' has"
        )


def _check_shards(x: Experiment) -> None:
    """Raise unless the shards cover tasks 0..total-1 exactly once."""
    path, total = x.path, x.tasks.total
    ranges: list[tuple[int, int, str]] = []
    if "all" in x.shards:
        raise UserError(f"{path}: shards.all: the name is taken by the file of all tasks, data/tasks/all.json")
    for name, bounds in x.shards.items():
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
            raise UserError(
                f"{path}: shards.{name} = {shown(bounds)}: expected [first, last], two task indices, both included"
            )
        ranges.append((bounds[0], bounds[1], name))
    if not ranges:
        raise UserError(f"{path}: shards: expected ranges of task indices that cover 0..{total - 1}")
    ranges.sort()
    expected, previous = 0, ""
    for first, last, name in ranges:
        if first < expected:
            raise UserError(
                f"{path}: shards.{name} = [{first}, {last}] overlaps shards.{previous}: expected every task once"
            )
        if first > expected:
            gap = f"task {expected}" if first == expected + 1 else f"tasks {expected}..{first - 1}"
            raise UserError(f"{path}: shards leave out {gap}: expected 0..{total - 1} covered exactly once")
        expected, previous = last + 1, name
    if expected < total:
        raise UserError(
            f"{path}: shards leave out tasks {expected}..{total - 1}: expected all of tasks.train + "
            f"tasks.test = {total} covered"
        )
    if expected > total:
        raise UserError(
            f"{path}: shards.{previous} ends at task {expected - 1}, but tasks.train + tasks.test = {total}: "
            f"expected the last index to be {total - 1}"
        )


def _check_rollouts(x: Experiment) -> None:
    from omrl.behavior.scripted import Scripted

    engine, source = x.behavior.engine, x.rollouts.source
    if source == "replay" and not x.behavior.keep_replay:
        raise UserError(f"{x.path}: rollouts.source = replay: expected behavior.keep_replay = true, which keeps it")
    if (engine == "scripted") != (source == "scripted"):
        expected = "rollouts.source = scripted" if engine == "scripted" else "behavior.engine = scripted"
        raise UserError(
            f"{x.path}: behavior.engine = {engine} with rollouts.source = {source}: expected {expected}, too"
        )
    if source == "scripted" and not isinstance(x.family, Scripted):
        raise UserError(
            f"{x.path}: rollouts.source = scripted: '{x.env}' has no script; expected checkpoints or replay"
        )
    steps, sampled, deterministic = _rolled_out(x)
    if len(steps) * (sampled + deterministic) > _MOST_STEPS:
        raise UserError(
            f"{x.path}: rollouts: {len(steps)} checkpoints with {sampled + deterministic} steps each: expected at most "
            f"{_MOST_STEPS} steps of a task together"
        )


def _rolled_out(x: Experiment) -> tuple[list[int], int, int]:
    """Return the checkpoints with rows, and the most rows of one with sampled and with mean actions."""
    rollouts, behavior = x.rollouts, x.behavior
    steps = rollouts.checkpoint_steps(behavior.checkpoint_steps())
    if rollouts.source == "replay":
        return steps[:-1], behavior.checkpoint_every + behavior.horizon, 0
    return (
        steps,
        rollouts.episodes_per_checkpoint * rollouts.horizon,
        rollouts.deterministic_episodes * rollouts.horizon,
    )


def _check_levels(x: Experiment) -> None:
    from omrl.data.quality import check_levels, check_names

    levels, where = x.dataset.levels, f"{x.path}: dataset"
    check_levels(levels, *_rolled_out(x), x.dataset.transitions_per_task, where=where)
    saved = x.behavior.checkpoint_steps()
    check_names(levels, x.rollouts.checkpoint_steps(saved), saved, x.rollouts.source, where=where)


def _check_horizon(x: Experiment) -> None:
    section = "behavior" if x.rollouts.source == "replay" else "rollouts"
    horizon = x.behavior.horizon if section == "behavior" else x.rollouts.horizon
    if horizon < x.family.horizon:
        raise UserError(
            f"{x.path}: {section}.horizon = {horizon}: expected at least {x.family.horizon}, the steps of "
            f"a test episode of '{x.env}', over which returns are normalized"
        )


def _check_relabel(x: Experiment) -> None:
    for name, entry in x.relabel.items():
        key = f"{x.path}: relabel.{name}"
        if name in x.dataset.levels:
            raise UserError(f"{key}: the name is taken by dataset.levels.{name}")
        if entry.source not in x.dataset.levels:
            options = suggest(entry.source, x.dataset.levels)
            raise UserError(f"{key}.source = {shown(entry.source)}: not one of dataset.levels; {options}")
        x.family.relabelled(entry.env_config, key)


def _check_pairs(x: Experiment) -> None:
    known = [*x.dataset.levels, *x.relabel]
    for name, pair in x.pairs.items():
        key = f"{x.path}: pairs.{name}"
        if name in known:
            raise UserError(f"{key}: the name is taken by another dataset")
        for role, source in (("transitions", pair.transitions), ("context", pair.context)):
            if source not in known:
                raise UserError(f"{key}.{role} = {shown(source)}: no such dataset; {suggest(source, known)}")


def _check_datasets(x: Experiment) -> None:
    single = [*x.dataset.levels, *x.relabel]
    for key, chosen, known in (("train", x.dataset.train, [*single, *x.pairs]), ("test", x.dataset.test, single)):
        for name in chosen:
            if name not in known:
                options = suggest(name, known)
                raise UserError(f"{x.path}: dataset.{key} has {shown(name)}: no such dataset; {options}")
        if len(set(chosen)) != len(chosen):
            raise UserError(f"{x.path}: dataset.{key} = {shown(chosen)}: expected each dataset once")


def _check_evaluate(x: Experiment) -> None:
    if x.evaluate.protocol != "ood-checkpoint":
        return
    key = f"{x.path}: evaluate.protocol = 'ood-checkpoint'"
    if x.family.varies != "reward":
        raise UserError(
            f"{key}: tasks of '{x.env}' differ in their dynamics, so other tasks' transitions cannot be this "
            "task's context; expected another protocol"
        )
    if merged := [name for name in x.dataset.test if name in x.relabel]:
        raise UserError(f"{key}: dataset.test has '{merged[0]}', where all tasks share one set; expected levels")
    if x.tasks.train < 2:
        raise UserError(f"{key}: tasks.train = {x.tasks.train}: expected 2 or more")


def _check_seeds(x: Experiment) -> None:
    if len(set(x.seeds)) != len(x.seeds):
        raise UserError(f"{x.path}: seeds = {shown(x.seeds)}: expected each seed once")


def _check_algorithms(x: Experiment) -> None:
    from omrl.algorithms.base import Algorithm, algorithm_module
    from omrl.learning.train import spec_of

    if not x.algorithms:
        known = ", ".join(registry.names("omrl.algorithms"))
        raise UserError(f"{x.path}: algorithms: expected at least one of {known}")
    for name, entry in x.algorithms.items():
        if name == "reference":
            raise UserError(f"{x.path}: algorithms.{name}: expected another name; metrics.json has the oracle there")
        module = algorithm_module(entry.file, f"{x.path}: algorithms.{name}.algorithm: ")
        config = parse(module.CONFIG, entry.overrides, f"{x.path}: algorithms.{name}")
        if wrong := module.ALGORITHM.check(config, spec_of(x.family, x.tasks.train), x.meta_train.steps):
            raise UserError(f"{x.path}: algorithms.{name}.{wrong}")
        if x.pairs.keys() & x.dataset.train and (wrong := module.ALGORITHM.check_pair(config)):
            raise UserError(f"{x.path}: algorithms.{name}.{wrong}")
        if x.evaluate.protocol not in module.ALGORITHM.PROTOCOLS:
            served = ", ".join(sorted(module.ALGORITHM.PROTOCOLS))
            raise UserError(
                f"{x.path}: evaluate.protocol = '{x.evaluate.protocol}': algorithm '{name}' cannot serve it; it serves "
                f"{served}"
            )
        if x.protocol.resolved().get("resample") == "step" and module.ALGORITHM.observe is not Algorithm.observe:
            raise UserError(f"{x.path}: evaluate.{_forgets(name)}")
        least = module.ALGORITHM.least_context(config)
        for key, size in _context_sizes(x, name).items():
            if size < least:
                raise UserError(
                    f"{x.path}: {key} = {size}: expected {least} or more, the fewest that algorithm '{name}' adapts to"
                )


def _forgets(algorithm: str) -> str:
    return (
        f"resample = step: algorithm '{algorithm}' reads the episode's steps, and a belief drawn anew at each forgets "
        "them; expected resample: episode"
    )


def _context_sizes(x: Experiment, algorithm: str) -> dict[str, int]:
    """Return key -> transitions of the smallest offline context that it lets an algorithm adapt to."""
    given = x.evaluate.resolved() | x.protocol.resolved()
    keys = ("embedding_context", "context_per_episode", "context")
    offline = {n: e for n, e in x.online.items() if e.algorithm == algorithm and e.posterior == "offline"}
    sizes = {f"evaluate.{key}": given[key] for key in keys if isinstance(given.get(key), int)}
    return sizes | {f"online.{name}.context_size": entry.context_size for name, entry in offline.items()}


def _check_plugins(x: Experiment) -> None:
    """Raise where a change of a plug-in would go unnoticed, because stage 'code' does not look at its files."""
    from omrl.provenance.fingerprint import sources

    graph = Path(x.path).parent / "dvc.yaml"
    named = [("env", "omrl.envs", x.env)]
    named += [(f"algorithms.{name}.algorithm", "omrl.algorithms", entry.file) for name, entry in x.algorithms.items()]
    outside = [(key, registry.module_name(package, name)) for key, package, name in named
               if registry.is_outside(package, name)]  # fmt: skip
    if not outside or not graph.is_file():
        return
    try:
        stage = read_yaml(graph)["stages"]["code"]
        watched = [str(dep) for dep in stage.get("deps", [])]
    except (KeyError, TypeError, AttributeError):
        return  # DVC says what is wrong with it
    if stage.get("always_changed"):
        return
    folders = [(graph.parent / dep.replace("${repository}", x.repository)).resolve() for dep in watched]
    for key, module in outside:
        for file in sources(module):
            if not any(file == folder or folder in file.parents for folder in folders):
                raise UserError(
                    f"{graph}: stages.code.deps does not have {file.name} of {x.path}: {key} = {module}, so that DVC "
                    "would not see it change; add the file or its folder, or write 'always_changed: true' instead"
                )


def _check_devices(x: Experiment) -> None:
    """Raise where a GPU is asked for and there is none; torch is imported only to find out."""
    asked = {"behavior": x.behavior.device, "meta_train": x.meta_train.device, "evaluate": x.evaluate.device}
    for section in [name for name, device in asked.items() if device == "cuda"]:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"{x.path}: {section}.device = 'cuda': PyTorch finds no GPU here; expected cpu"
                f"{'' if section == 'behavior' else ', or auto'}"
            )


def _check_online(x: Experiment) -> None:
    from omrl.algorithms.base import Algorithm, algorithm_module
    from omrl.learning.online import Decoding

    for name, entry in x.online.items():
        key = f"{x.path}: online.{name}"
        if name in x.algorithms:
            raise UserError(f"{key}: the name is taken by algorithms.{name}")
        if entry.algorithm not in x.algorithms:
            options = suggest(entry.algorithm, x.algorithms)
            raise UserError(f"{key}.algorithm = {shown(entry.algorithm)}: not one of algorithms; {options}")
        file = x.algorithms[entry.algorithm].file
        module = algorithm_module(file, f"{x.path}: algorithms.{entry.algorithm}.algorithm: ")
        if entry.label == "decoded" and not issubclass(module.ALGORITHM, Decoding):
            raise UserError(f"{key}.label = decoded: '{file}' has no decoder of rewards; expected simulator, or smac")
        if entry.label == "decoded" and x.family.inference_reward == "sparse":
            raise UserError(
                f"{key}.label = decoded: inference sees the sparse reward of '{x.env}' and the decoder tells the dense "
                "one; expected simulator, or a family with one reward for both"
            )
        if entry.posterior == "own" and "online-prior" not in module.ALGORITHM.PROTOCOLS:
            raise UserError(
                f"{key}.posterior = own: '{file}' cannot adapt to the agent's own episodes; expected offline"
            )
        if entry.label == "decoded" and entry.tasks == "test":
            raise UserError(
                f"{key}.tasks = test with label = decoded: the method would learn from the rewards in the test tasks' "
                "offline data, which self-supervision must not see; expected tasks: train, or label: simulator"
            )
        if entry.resample == "step" and module.ALGORITHM.observe is not Algorithm.observe:
            raise UserError(f"{key}.{_forgets(entry.algorithm)}")
        if wrong := module.ALGORITHM.check_online(entry.tasks):
            raise UserError(f"{key}.{wrong}")


def _check_cells(x: Experiment) -> None:
    models = len(x.algorithms) * len(x.dataset.train) * len(x.seeds)
    sets = len(x.dataset.levels) + len(x.relabel) + len(x.pairs)
    count = 4 + 2 * len(x.shards) + sets + models * (1 + len(x.dataset.test)) + 2 * len(x.online)
    if count > MOST_CELLS:
        raise UserError(f"{x.path}: asks for {count} cells: expected at most {MOST_CELLS}; use fewer seeds or datasets")
    if twice := [name for name, count in Counter(_names(x)).items() if count > 1]:
        raise UserError(
            f"{x.path}: two cells are called {twice[0]}: expected other names of algorithms or datasets; DVC joins "
            "them by '-'"
        )


_CHECKS: tuple[Callable[[Experiment], None], ...] = (
    _check_tasks, _check_shards, _check_rollouts, _check_levels, _check_horizon, _check_relabel, _check_pairs,
    _check_datasets,
    _check_evaluate, _check_seeds, _check_algorithms, _check_online, _check_cells, _check_devices, _check_plugins,
)  # fmt: skip


def code_units(x: Experiment) -> dict[tuple[CodeKind, str], str]:
    """Return (kind, name) -> module of every unit of code of which stage ``code`` takes a fingerprint."""
    from omrl.behavior.base import ENGINES

    stages = [name.replace("-", "_") for name in registry.own_names("stages")]
    units: dict[tuple[CodeKind, str], str] = {("stages", name): f"stages.{name}" for name in stages}
    units |= {("engines", name): f"omrl.behavior.{name}" for name in ENGINES}
    for name in {*registry.own_names("omrl.envs"), x.env}:
        units["envs", name] = registry.module_name("omrl.envs", name)
    for name, entry in x.algorithms.items():
        units["algorithms", name] = registry.module_name("omrl.algorithms", entry.file)
    return units


def cells(path: str | Path = FILE) -> Cells:
    """Return what params.yaml asks for: evaluations, models, datasets and shards, in the file's order."""
    return _cells(load("shards", "dataset", "relabel", "pairs", "algorithms", "seeds", "online", path=path))


def plan_files(path: str | Path = FILE) -> dict[str, Any]:
    """Return what stage ``plan`` writes, file name -> content."""
    plan = cells(path)
    return {"shards.json": {"shards": plan["shards"]}, "cells.json": plan, "checked.json": {"sound": True}}


def _cells(x: Experiment) -> Cells:
    models = [
        Model(algorithm=algorithm, train=train, seed=seed)
        for algorithm in x.algorithms
        for train in x.dataset.train
        for seed in x.seeds
    ]
    further = [Model(algorithm=name, train=train, seed=seed) for name, train, seed in _online_models(x)]
    return Cells(
        shards=x.shards,
        datasets=[*x.dataset.levels, *x.relabel],
        pairs=list(x.pairs),
        models=models,
        online=list(x.online),
        evaluations=[Evaluation(**model, test=test) for model in [*models, *further] for test in x.dataset.test],
    )


def _online_models(x: Experiment) -> list[tuple[str, str, int]]:
    return [(name, train, seed) for name in x.online for train in x.dataset.train for seed in x.seeds]


def _names(x: Experiment) -> list[str]:
    """Return the names that DVC gives the cells."""
    models = [(a, train, str(seed)) for a in x.algorithms for train in x.dataset.train for seed in x.seeds]
    return [
        *("plan", "code", "tasks", "report"),
        *(f"{stage}@{shard}" for stage in ("behavior", "rollouts") for shard in x.shards),
        *(f"dataset@{name}" for name in x.dataset.levels),
        *(f"relabel@{name}" for name in x.relabel),
        *(f"pair@{name}" for name in x.pairs),
        *(f"meta_train@{a}-{train}-{seed}" for a, train, seed in models),
        *(f"evaluate@{a}-{train}-{test}-{seed}" for a, train, seed in models for test in x.dataset.test),
        *(f"{stage}@{name}" for stage in ("online", "evaluate_online") for name in x.online),
    ]
