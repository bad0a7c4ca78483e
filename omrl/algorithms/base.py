"""What a method is: data in, belief, action out. No method sees an environment, a file or params.yaml.

A *belief* is what a method thinks of the task it is in: an embedding z, a posterior, adapted weights, the state of a
recurrent encoder, a window of past steps. The harness never looks inside; it calls

    belief = prior(tasks)                  before anything was seen
    belief = adapt(prior, experience)      from a bag of experience (or windows, or episodes)
    belief = observe(belief, step)         after every step of the method's own
    action = act(belief, observation)

Training is a list of phases; a phase says what one update draws, and the sampler serves it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from omrl.core import registry, seeding
from omrl.core.config import Config, parse
from omrl.core.errors import UserError, shown
from omrl.core.files import MANIFEST, atomic_path, package_versions, read_json, verified, write_json
from omrl.data.taskdata import TaskData
from omrl.nets.experience import Experience

MODEL, CONFIG = "model.safetensors", "config.json"
PACKAGE, NEEDS = "omrl.algorithms", ("CONFIG", "ALGORITHM")

Belief = Any  # a tensor, or a (nested) dict, list or tuple of tensors; the first axis of each is the task


@dataclass(frozen=True)
class Spec:
    """What a method knows of the environment.

    Attributes:
        observation, action: widths.
        context_next_observation: does inference see s'? True where the tasks' dynamics differ.
        horizon: steps of a test episode.
        tasks: training tasks.
        varies: what tasks differ in.
        mean, std: of every entry of an observation, by which observations are standardized before the method sees them
            (``Standardized``); empty where it sees them as they are.
    """

    observation: int
    action: int
    context_next_observation: bool
    horizon: int = 20
    tasks: int = 1
    varies: str = "reward"
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    @property
    def context(self) -> int:
        """Width of a context row: (s, a, r) or (s, a, r, s')."""
        return self.observation * (2 if self.context_next_observation else 1) + self.action + 1


@dataclass(frozen=True)
class Draw:
    """What an update takes of every drawn task.

    Attributes:
        rows: how many rows, windows or episodes, drawn uniformly with replacement.
        unit: ``row``; ``window``, ``length`` successive steps of one episode from a uniformly drawn step on;
            ``episode``, whole.
        length: steps of a window; longest part of an episode that is taken, its last steps where negative, 0 for all.
        source: from the ``transitions`` dataset or the ``context`` dataset, which differ in dataset pairs only.
        by_step: of episodes: ``rows`` counts their steps, and as many are drawn as have about so many.
    """

    rows: int
    unit: Literal["row", "window", "episode"] = "row"
    length: int = 0
    source: Literal["transitions", "context"] = "transitions"
    by_step: bool = False

    def count(self, steps: float) -> int:
        """Return how many rows, windows or episodes are drawn where an episode has ``steps`` steps on average."""
        return max(1, int(self.rows / steps)) if self.by_step else self.rows


@dataclass(frozen=True)
class Phase:
    """A part of training.

    Attributes:
        name: shown in the curve's ``phase`` column.
        steps: updates.
        meta_batch: tasks per update.
        draws: name -> what to draw of every task, in this order.
        replace: draw tasks with replacement.
    """

    name: str
    steps: int
    meta_batch: int
    draws: Mapping[str, Draw] = field(default_factory=dict)
    replace: bool = True


def pick_device(device: str = "auto") -> torch.device:
    """Return the device: the first GPU if there is one and ``auto`` is asked for.

    Raises:
        UserError: another name, or ``cuda`` where PyTorch finds no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device = {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': PyTorch finds no GPU here; expected cpu, or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


class Algorithm(abc.ABC):
    """One meta-RL method.

    Args:
        config: an instance of ``CONFIG``.
        spec: of the environment.
        seed: of initial weights and of everything drawn inside an update.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    CONFIG: ClassVar[type[Config]]
    PROTOCOLS: ClassVar[frozenset[str]] = frozenset(
        {"offline-context", "ood-checkpoint", "online-prior", "online-idaq"}
    )  # evaluation protocols that the method can serve

    def __init__(self, config: Config, spec: Spec, seed: int, device: str = "auto") -> None:
        self.config, self.spec, self.seed, self.device = config, spec, seed, pick_device(device)
        self.generator = torch.Generator().manual_seed(seeding.integer(seed, "algorithm"))

    @classmethod
    def check(cls, config: Any, spec: Spec, steps: int) -> str | None:
        """Return what in ``config`` does not fit spec and updates, as 'key = value: expected ...'; None if all fits."""
        return None

    @classmethod
    def least_context(cls, config: Any) -> int:
        """Return the fewest transitions that ``adapt`` takes."""
        return 1

    @classmethod
    def check_pair(cls, config: Any) -> str | None:
        """Return what in ``config`` does not fit a dataset pair, as ``check`` does; None if all fits."""
        return None

    @classmethod
    def check_online(cls, tasks: str) -> str | None:
        """Return why the method cannot learn on with the ``train`` or ``test`` tasks, 'tasks = ...'; None if it can."""
        return None

    # --- training ----------------------------------------------------------------------------------------------

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return further columns [tasks, rows, width] of a dataset, computed once; they come back in ``extra``."""
        return {}

    @abc.abstractmethod
    def phases(self, steps: int) -> list[Phase]:
        """Return the phases of training; their steps sum to ``steps``."""

    def online_phase(self, steps: int) -> Phase:
        """Return the phase of training on while the method acts in the environment itself (stage ``online``)."""
        last = self.phases(steps)[-1]
        return Phase("online", steps, last.meta_batch, last.draws, last.replace)

    def begin(self, phase: Phase, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Prepare for a phase, before its first update; return columns to add to the data, if any.

        Where it returns some and the phase draws from ``context`` too, which is another dataset, it is asked for that
        dataset's next.
        """
        return {}

    @abc.abstractmethod
    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step; return scalars for the curves, as tensors on the device.

        Args:
            phase: the present one.
            batch: what ``phase.draws`` names; tasks are the same and in the same order in all of them.
        """

    def context_draw(self, transitions: int) -> Draw:
        """Return how a context of so many transitions is drawn from an offline dataset; single rows by default."""
        return Draw(transitions)

    # --- acting ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return the belief of ``tasks`` tasks of which nothing is known; drawn with ``rng`` where there is choice."""

    @abc.abstractmethod
    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the belief after a bag of experience, [tasks, n, ...]."""

    def sample(self, belief: Belief, rng: torch.Generator) -> Belief:
        """Return a belief without doubt, drawn from one with; the belief itself where the method has no doubt."""
        return belief

    def observe(self, belief: Belief, step: Experience) -> Belief:
        """Return the belief after one more step of one's own, [tasks, 1, ...]; most methods keep theirs."""
        return belief

    @abc.abstractmethod
    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return actions [tasks, action] for observations [tasks, width]; explore where ``rng`` is given."""

    def embedding(self, belief: Belief) -> Tensor | None:
        """Return a vector per task, [tasks, latent], for diagnostics and pictures; None if there is none."""
        return None

    def fine_tune(self, draw: Callable[[Phase], Mapping[str, Experience]], steps: int, context: Experience) -> Belief:
        """Go on learning in one task, for which this object is; return the belief after it (protocol ``fine-tune``).

        Args:
            draw: phase -> what it asks for: ``transitions`` are the task's own, ``context`` is its offline context.
            steps: updates.
            context: the offline context, [1, n, ...].
        """
        phase = replace(self.online_phase(steps), meta_batch=1)
        for _ in range(steps):
            self.update(phase, draw(phase))
        return self.adapt(self.prior(1), context)

    # --- state -------------------------------------------------------------------------------------------------

    def untrained(self, seed: int) -> Algorithm:
        """Return another object of the same configuration, with weights and draws of ``seed``."""
        return build(type(self), self.config, self.spec, seed, self.device.type)

    @abc.abstractmethod
    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the parts whose parameters and buffers are the model."""

    @abc.abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name."""

    def generators(self) -> dict[str, torch.Generator]:
        """Return the random streams that updates draw from; none by default."""
        return {}

    def model_state(self) -> dict[str, Tensor]:
        """Return the model's tensors by name, on the CPU."""
        return {
            f"{part}.{name}": tensor.detach().to("cpu").contiguous()
            for part, module in self.modules().items()
            for name, tensor in module.state_dict().items()
        }

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Take the model's tensors.

        Raises:
            ValueError: names or shapes are not this model's.
        """
        own = self.model_state()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
            raise ValueError(f"tensors {wrong[:3]} do not fit the configuration")
        for part, module in self.modules().items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def training_state(self) -> dict[str, Tensor]:
        """Return everything that continuing needs: model, optimizers, random streams."""
        state = {f"model/{name}": tensor for name, tensor in self.model_state().items()}
        for name, optimizer in self.optimizers().items():
            for place, entry in optimizer.state_dict()["state"].items():
                state |= {f"optimizer/{name}/{place}/{key}": value.cpu() for key, value in entry.items()}
        return state | {f"generator/{name}": g.get_state() for name, g in self.generators().items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take what ``training_state`` returned."""
        self.load_model_state({k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")})
        for name, optimizer in self.optimizers().items():
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                kind, *rest = key.split("/")
                if kind == "optimizer" and rest[0] == name:
                    entries.setdefault(int(rest[1]), {})[rest[2]] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        for name, generator in self.generators().items():
            generator.set_state(state[f"generator/{name}"])


class ContextAlgorithm(Algorithm):
    """A method whose belief is one vector z per task, encoded from a bag and frozen while it acts.

    A subclass says how a bag becomes z (``infer``) and what it does given z (``actions``).
    """

    def rows(self, context: Experience) -> Tensor:
        """Return a context as an encoder's input: (s, a, signal[, s']), [tasks, n, width]."""
        return context.rows(self.spec.context_next_observation)

    @abc.abstractmethod
    def infer(self, context: Experience) -> Tensor:
        """Return the embeddings [tasks, latent] of a context, without gradient."""

    @abc.abstractmethod
    def actions(self, observation: Tensor, z: Tensor) -> Tensor:
        """Return the deterministic actions [tasks, n, action] for observations [tasks, n, width]."""

    @property
    @abc.abstractmethod
    def latent(self) -> int:
        """Width of z."""

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return z = 0, the middle of the embeddings."""
        return torch.zeros(tasks, self.latent, device=self.device)

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return z of the context; what was believed before does not count."""
        return self.infer(context)

    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the action given z: the deterministic one, or one to explore with where ``rng`` is given."""
        rows = observation.unsqueeze(1)
        return (self.actions(rows, belief) if rng is None else self.explore(rows, belief, rng)).squeeze(1)

    def explore(self, observation: Tensor, z: Tensor, rng: torch.Generator) -> Tensor:
        """Return actions to explore with, as ``actions``; the deterministic ones by default."""
        return self.actions(observation, z)

    def embedding(self, belief: Belief) -> Tensor | None:
        """Return z."""
        z: Tensor = belief
        return z


class PosteriorAlgorithm(ContextAlgorithm):
    """A method that believes in a Gaussian over z: ``{"z": mean, "variance": variance}``, each [tasks, latent].

    It acts on the mean; ``sample`` draws a z, whose variance is 0.
    """

    @abc.abstractmethod
    def posterior(self, context: Experience) -> tuple[Tensor, Tensor]:
        """Return mean and variance [tasks, latent] of z given a context."""

    def infer(self, context: Experience) -> Tensor:
        """Return the posterior's mean."""
        with torch.no_grad():
            return self.posterior(context)[0]

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return N(0, I), or with ``rng`` a z drawn from it."""
        zero = torch.zeros(tasks, self.latent, device=self.device)
        belief = {"z": zero, "variance": torch.ones_like(zero)}
        return belief if rng is None else self.sample(belief, rng)

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the posterior of the context; what was believed before does not count."""
        with torch.no_grad():
            z, variance = self.posterior(context)
        return {"z": z, "variance": variance}

    def sample(self, belief: Belief, rng: torch.Generator) -> Belief:
        """Return a z drawn from the belief."""
        noise = torch.randn(belief["z"].shape, generator=rng).to(self.device)
        z = belief["z"] + belief["variance"].sqrt() * noise
        return {"z": z, "variance": torch.zeros_like(z)}

    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the action given the mean, or the drawn z."""
        return super().act(belief["z"], observation, rng)

    def embedding(self, belief: Belief) -> Tensor | None:
        """Return the mean, or the drawn z."""
        z: Tensor = belief["z"]
        return z


_CHECKS = ("check", "least_context", "check_pair", "check_online")  # of a method's class


class Standardized(Algorithm):
    """A method behind a scale: it sees observations with mean 0 and standard deviation 1 in every entry.

    Whatever holds observations is standardized on its way in: data, batches, contexts, its own steps. The method
    itself, whose weights and settings these are, knows nothing of it. ``standardized`` makes one.
    """

    def __init__(self, inner: Algorithm, spec: Spec) -> None:
        self.inner = inner
        self.config, self.spec, self.seed, self.device = inner.config, spec, inner.seed, inner.device
        self.generator = inner.generator
        self._scale = np.array([spec.mean, spec.std], dtype=np.float32)
        self._tensors = torch.from_numpy(self._scale).to(inner.device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def scaled(self, what: Any) -> Any:
        """Return experience or data with its observations standardized, also inside a mapping; else ``what``."""
        if isinstance(what, Experience):
            mean, std = self._tensors
            following = (what.next_observation - mean) / std
            return replace(what, observation=(what.observation - mean) / std, next_observation=following)
        if isinstance(what, TaskData):
            mean, std = self._scale
            following = (what.next_observation - mean) / std
            return replace(what, observation=(what.observation - mean) / std, next_observation=following, table=None)
        if isinstance(what, Mapping):
            return {key: self.scaled(value) for key, value in what.items()}
        return what

    def columns(self, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Return the method's columns."""
        return {} if type(self.inner).columns is Algorithm.columns else self.inner.columns(self.scaled(data))

    def phases(self, steps: int) -> list[Phase]:
        """Return the method's phases."""
        return self.inner.phases(steps)

    def online_phase(self, steps: int) -> Phase:
        """Return the method's phase."""
        return self.inner.online_phase(steps)

    def begin(self, phase: Phase, data: TaskData) -> Mapping[str, NDArray[np.float32]]:
        """Prepare for a phase."""
        return {} if type(self.inner).begin is Algorithm.begin else self.inner.begin(phase, self.scaled(data))

    def update(self, phase: Phase, batch: Mapping[str, Experience]) -> dict[str, Tensor]:
        """Take one gradient step."""
        return self.inner.update(phase, self.scaled(batch))

    def context_draw(self, transitions: int) -> Draw:
        """Return the method's draw."""
        return self.inner.context_draw(transitions)

    def prior(self, tasks: int, rng: torch.Generator | None = None) -> Belief:
        """Return the method's prior."""
        return self.inner.prior(tasks, rng)

    def adapt(self, belief: Belief, context: Experience) -> Belief:
        """Return the belief after a bag of experience."""
        return self.inner.adapt(belief, self.scaled(context))

    def sample(self, belief: Belief, rng: torch.Generator) -> Belief:
        """Return a belief without doubt."""
        return self.inner.sample(belief, rng)

    def observe(self, belief: Belief, step: Experience) -> Belief:
        """Return the belief after a step of one's own."""
        return self.inner.observe(belief, self.scaled(step))

    def act(self, belief: Belief, observation: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the method's actions."""
        mean, std = self._tensors
        return self.inner.act(belief, (observation - mean) / std, rng)

    def embedding(self, belief: Belief) -> Tensor | None:
        """Return the method's embedding."""
        return self.inner.embedding(belief)

    def fine_tune(self, draw: Callable[[Phase], Mapping[str, Experience]], steps: int, context: Experience) -> Belief:
        """Go on learning in one task."""
        return self.inner.fine_tune(lambda phase: self.scaled(draw(phase)), steps, self.scaled(context))

    def untrained(self, seed: int) -> Algorithm:
        """Return another object of the same configuration behind the same scale."""
        return standardized(self.inner.untrained(seed), self.spec.mean, self.spec.std)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the method's parts."""
        return self.inner.modules()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the method's optimizers."""
        return self.inner.optimizers()

    def generators(self) -> dict[str, torch.Generator]:
        """Return the method's random streams."""
        return self.inner.generators()

    def model_state(self) -> dict[str, Tensor]:
        """Return the method's tensors."""
        return self.inner.model_state()

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Take the method's tensors."""
        self.inner.load_model_state(state)

    def training_state(self) -> dict[str, Tensor]:
        """Return everything that continuing needs."""
        return self.inner.training_state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take what ``training_state`` returned."""
        self.inner.load_training_state(state)


def standardized(algorithm: Algorithm, mean: Sequence[float], std: Sequence[float]) -> Algorithm:
    """Return a method behind a scale of observations, called as it was.

    Methods of its own beyond the interface, such as SMAC's ``decode``, are there too: experience is standardized on its
    way in, bare tensors are passed as they are.

    Args:
        algorithm: the method.
        mean, std: of every entry of an observation; ``std`` above 0.
    """
    cls = type(algorithm)

    def forward(name: str) -> Callable[..., Any]:
        def call(self: Standardized, *given: Any, **named: Any) -> Any:
            values = [self.scaled(x) for x in given]
            return getattr(self.inner, name)(*values, **{key: self.scaled(x) for key, x in named.items()})

        return call

    own = {
        name: forward(name)
        for name in dir(cls)
        if not name.startswith("_") and not hasattr(Algorithm, name) and callable(getattr(cls, name))
    }
    if cls.observe is Algorithm.observe:  # the harness makes no step's experience for nothing
        own["observe"] = Algorithm.observe
    about: dict[str, Any] = {name: getattr(cls, name) for name in ("CONFIG", "PROTOCOLS", "__doc__", "__module__")}
    checks = {name: staticmethod(getattr(cls, name)) for name in _CHECKS}
    made: type[Standardized] = type(cls.__name__, (Standardized,), {**own, **about, **checks})
    return made(algorithm, replace(algorithm.spec, mean=tuple(mean), std=tuple(std)))


def algorithm_module(name: str, where: str = "") -> ModuleType:
    """Return the module of a method: one of ours, of an installed plug-in, or ``package.module``.

    Args:
        name: of it.
        where: prefix of messages.

    Raises:
        UserError: there is none, its import fails, or it lacks something.
    """
    module = registry.load(PACKAGE, name, "algorithm", NEEDS, where)
    cls = module.ALGORITHM
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise UserError(
            f"{where}algorithm '{name}': {module.__file__}: ALGORITHM: expected a class of omrl's Algorithm"
        )
    if missing := sorted(cls.__abstractmethods__):
        raise UserError(f"{where}algorithm '{name}': {module.__file__}: {cls.__name__} lacks {', '.join(missing)}")
    if not (isinstance(module.CONFIG, type) and issubclass(module.CONFIG, Config)):
        raise UserError(f"{where}algorithm '{name}': {module.__file__}: CONFIG: expected a class of omrl's Config")
    return module


def create(
    name: str, overrides: dict[str, Any], spec: Spec, seed: int, device: str = "auto", where: str = ""
) -> Algorithm:
    """Return an untrained algorithm.

    Args:
        name: file name in ``omrl/algorithms``, or a module in somebody else's package, ``package.module``.
        overrides: of its configuration.
        spec: of the environment.
        seed: of weights and draws.
        device: see ``pick_device``.
        where: prefix of messages.

    Raises:
        UserError: unknown algorithm or configuration.
    """
    module = algorithm_module(name)
    config = parse(module.CONFIG, overrides, where or f"configuration of '{name}':")
    return build(module.ALGORITHM, config, spec, seed, device)


def build(method: type[Algorithm], config: Config, spec: Spec, seed: int, device: str = "auto") -> Algorithm:
    """Return ``method(config, spec, seed, device)``, behind the scale that ``spec`` has, if any.

    Its weights are the same however many threads this process may use.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # orthogonal weights have other bits with two
    try:
        made = method(config, replace(spec, mean=(), std=()), seed, device)
    finally:
        torch.set_num_threads(threads)
    return standardized(made, spec.mean, spec.std) if spec.std else made


def save_model(algorithm: Algorithm, folder: str | Path, name: str, module: str) -> None:
    """Write ``model.safetensors`` and the resolved ``config.json`` to ``folder``.

    Args:
        algorithm: what was trained.
        folder: where to.
        name: of the cell in params.yaml.
        module: file name of the algorithm.
    """
    folder = Path(folder)
    with atomic_path(folder / MODEL) as temporary:
        save_file(algorithm.model_state(), temporary)
    write_json(
        folder / CONFIG,
        {
            "name": name,
            "algorithm": module,
            "config": algorithm.config.resolved(),
            "spec": vars(algorithm.spec),
            "seed": algorithm.seed,
            "packages": package_versions("torch", "safetensors"),
        },
    )


def load_model(folder: str | Path, device: str = "auto", tensors: str = MODEL) -> Algorithm:
    """Load a model from its folder.

    Args:
        folder: ``data/models/...``.
        device: see ``pick_device``.
        tensors: the file in it, ``model.safetensors`` or a snapshot.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other; the message names it.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        verified(folder, [CONFIG, tensors])
    saved = read_json(folder / CONFIG)
    hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
    try:
        spec, name, config, seed = Spec(**saved["spec"]), saved["algorithm"], saved["config"], saved["seed"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / CONFIG}: not the configuration of a model; {hint}") from None
    _check_widths(spec, folder / CONFIG, folder / tensors)
    algorithm = create(name, config, spec, seed, device, f"{folder / CONFIG}: config")
    load_tensors(algorithm, folder / tensors)
    return algorithm


def _check_widths(spec: Spec, config: Path, path: Path) -> None:
    """Raise unless ``spec`` has widths that the tensors of ``path`` can have: networks are not built on a claim."""
    hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
    if not path.is_file():
        raise UserError(f"{path}: missing; {hint}")
    try:
        with safe_open(path, "pt") as file:  # shapes only
            widest = max((n for key in file.keys() for n in file.get_slice(key).get_shape()), default=0)  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); {hint}") from None
    for key in ("observation", "action"):
        value = getattr(spec, key)
        if not (isinstance(value, int) and 1 <= value <= widest):
            raise UserError(
                f"{config}: spec.{key} = {shown(value)}: expected a width of 1..{widest}, the largest in {path.name}; "
                f"{hint}"
            )
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        value = getattr(spec, key)
        numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
        if not numbers or len(value) != len(spec.std) or any(not least < x < math.inf for x in value):
            raise UserError(f"{config}: spec.{key} = {shown(value)}: expected a number per entry, or none; {hint}")
    if len(spec.std) not in (0, spec.observation):
        raise UserError(f"{config}: spec.std: expected {spec.observation} numbers, one per entry, or none; {hint}")


def load_tensors(algorithm: Algorithm, path: Path) -> None:
    """Give an algorithm the tensors of a file.

    Raises:
        UserError: the file is missing, damaged, or another configuration's.
    """
    hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
    if not path.is_file():
        raise UserError(f"{path}: missing; {hint}")
    try:
        algorithm.load_model_state(load_file(path))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: damaged, or not of the configuration beside it ({error}); {hint}") from None


def map_belief(change: Any, *beliefs: Belief) -> Belief:
    """Return the belief whose tensors are ``change`` of the beliefs' tensors in the same place."""
    return tree_map(change, *beliefs)


def join_beliefs(beliefs: list[Belief]) -> Belief:
    """Return the beliefs of several groups of tasks as one, in order."""
    return beliefs[0] if len(beliefs) == 1 else map_belief(lambda *parts: torch.cat(parts), *beliefs)
