"""What may stand in a params.yaml: every key with its values, its default and its meaning.

All of it is read off the configuration classes and their docstrings, which are what params.yaml is checked against, so
that it cannot differ from what is accepted.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omrl.core import registry
from omrl.core.config import Config
from omrl.core.errors import UserError, shown, suggest
from omrl.experiment import TasksConfig, Top
from omrl.report.published import TABLES

_ALGORITHMS, _FAMILIES, _PROTOCOLS = "omrl.algorithms", "omrl.envs", "omrl.evaluation.protocols"
_WIDTH = 110  # of lines on a terminal


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: with dots where it stands inside another: ``sac.tau``.
        values: what it takes.
        default: as it would stand in the file, or ``required``.
        meaning: of it.
    """

    name: str
    values: str
    default: str
    meaning: str


def keys(cls: type[Config]) -> list[Key]:
    """Return the keys of a configuration class in its order; those of a class inside it follow it, with a dot."""
    return list(_keys(cls, "", ()))


def _keys(cls: type[Config], prefix: str, outer: tuple[type[Config], ...]) -> Iterator[Key]:
    schema = cls.model_json_schema()
    defs = schema.get("$defs", {})
    if "$ref" in schema:  # of a class that has itself inside
        schema = defs[schema["$ref"].rsplit("/", 1)[1]]
    meanings = meanings_of(cls)
    for name, field in cls.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        key = field.alias or name  # what the file has
        yield Key(prefix + key, _values(schema["properties"][key], defs), default, meanings.get(name, ""))
        for inner, step in _inner(field.annotation, ""):
            if inner not in (*outer, cls):
                yield from _keys(inner, f"{prefix}{key}{step}.", (*outer, cls))


def _inner(annotation: Any, step: str) -> Iterator[tuple[type[Config], str]]:
    """Yield configuration classes inside an annotation, with what stands between: nothing, or a name of one's own."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation, step
    named = ".<name>" if getattr(annotation, "__origin__", None) is dict else step
    for argument in getattr(annotation, "__args__", ()):
        yield from _inner(argument, named)


def meanings_of(cls: type[Config]) -> dict[str, str]:
    """Return key -> meaning from the ``Attributes`` of the docstrings of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        listed = re.split(r"^\S", listed, maxsplit=1, flags=re.M)[0]  # up to the next section
        for names, text in re.findall(r"^    (\w+(?:, \w+)*)(?: \(.*?\))?: (.*\n?(?:^     .*\n?)*)", listed, re.M):
            found |= dict.fromkeys(names.split(", "), re.sub(r"\bNone\b", "null", " ".join(text.split())))
    return found


def _default(value: Any) -> str:
    if isinstance(value, Config):
        other = value.model_dump(mode="json", exclude_defaults=True)  # than those of the keys below
        return json.dumps(other) if other else "as below"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value, default=str)


def _values(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    options = list(dict.fromkeys(_options(schema, defs)))
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _options(schema: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    """Return in words what a JSON schema lets pass, one entry for each alternative."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rsplit("/", 1)[1]]
    if alternatives := schema.get("anyOf", schema.get("oneOf")):
        return [option for inner in alternatives for option in _options(inner, defs)]
    if "enum" in schema or "const" in schema:
        return [f"`{_default(value)}`" for value in schema.get("enum", [schema.get("const")])]
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return [f"list of {', '.join(_values(item, defs) for item in schema['prefixItems'])}"]
        return ["list of " + re.sub(r"\bnumber\b", "numbers", _values(schema.get("items", {}), defs))]
    if schema.get("type") == "object" and "properties" in schema:
        return ["the keys below"]
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return [f"names, each with {_values(inner, defs)}" if isinstance(inner, dict) else "a mapping"]
    kind = schema.get("type", "anything")
    if kind == "boolean":
        return ["`true`", "`false`"]
    words = {"integer": "whole number", "string": "text", "null": "`null`"}
    return [words.get(kind, kind) + _range(schema)]


def _range(schema: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = {word: schema[key] for key, word in words.items() if key in schema}
    said = {word: f"{int(bound):,}" if bound == int(bound) else f"{bound}" for word, bound in bounds.items()}
    if set(said) == {"from", "at most"}:
        return f" ({said['from']} to {said['at most']})"
    return f" ({', '.join(f'{word} {bound}' for word, bound in said.items())})" if said else ""


def sections() -> dict[str, type[Config]]:
    """Return the sections of params.yaml that have keys of their own, with their classes, in the file's order."""
    from omrl.behavior.base import BehaviorConfig
    from omrl.behavior.rollouts import RolloutsConfig
    from omrl.data.pairs import PairConfig
    from omrl.data.quality import DatasetConfig
    from omrl.data.relabel import RelabelConfig
    from omrl.evaluation.evaluate import EvaluateConfig
    from omrl.learning.online import OnlineConfig
    from omrl.learning.train import MetaTrainConfig
    from omrl.report import ReportConfig

    return {
        "tasks": TasksConfig,
        "behavior": BehaviorConfig,
        "rollouts": RolloutsConfig,
        "dataset": DatasetConfig,
        "relabel": RelabelConfig,
        "pairs": PairConfig,
        "meta_train": MetaTrainConfig,
        "online": OnlineConfig,
        "evaluate": EvaluateConfig,
        "report": ReportConfig,
    }


@dataclass(frozen=True)
class Entry:
    """What there is to say of a section, an environment, an algorithm or a protocol.

    Attributes:
        name: of it.
        prose: its docstring.
        rules: for its keys, from the docstring of their class; empty where there are none.
        place: where its keys stand in params.yaml; empty at the top of the file.
        keys: of it.
    """

    name: str
    prose: str
    place: str
    keys: list[Key]
    rules: str = ""


def entry(name: str) -> Entry:
    """Return what there is to say of ``name``.

    Args:
        name: a key at the top of params.yaml, an environment, an algorithm or an evaluation protocol; with a dot in
            it, the module of an algorithm, an environment or a protocol of one's own.

    Raises:
        UserError: there is nothing of that name.
    """
    if name in Top.model_fields:
        return _section(name)
    if name in registry.names(_PROTOCOLS):
        return _protocol(name)
    algorithms, families = registry.names(_ALGORITHMS), registry.names(_FAMILIES)
    if name in algorithms:
        return _algorithm(name)
    if name in families:
        return _family(name)
    if "." in name:
        module = registry.load(_ALGORITHMS, name, "algorithm, environment or protocol")
        if hasattr(module, "FAMILY"):
            return _family(name)
        return _protocol(name) if hasattr(module, "run") else _algorithm(name)
    known = [*Top.model_fields, *families, *algorithms, *registry.names(_PROTOCOLS)]
    raise UserError(f"{shown(name)}: no section, environment, algorithm or protocol; {suggest(name, known)}")


def _section(name: str) -> Entry:
    (key,) = (key for key in keys(Top) if key.name == name)
    if name not in sections():
        return Entry(name, "", "", [key])
    place = f"{name}.<name>" if key.values.startswith("names") else name
    prose = key.meaning[0].upper() + key.meaning[1:]
    if name == "report":
        listed = (f"* `{k}`: {table.citation}" for k, table in TABLES.items())
        prose = "\n".join([f"{prose} Published tables:", "", *listed])
    return Entry(name, prose, place, keys(sections()[name]))


def _algorithm(name: str) -> Entry:
    from omrl.algorithms.base import algorithm_module

    module = algorithm_module(name)
    return Entry(name, _prose(module), "algorithms.<name>", keys(module.CONFIG), _rules(module.CONFIG))


def _family(name: str) -> Entry:
    from omrl.envs.base import family_class

    cls = family_class(name)
    return Entry(name, _prose(inspect.getmodule(cls)), "env_config", keys(cls.CONFIG), _rules(cls.CONFIG))


def _protocol(name: str) -> Entry:
    from omrl.evaluation.protocols.base import protocol

    module = protocol(name)
    return Entry(name, _prose(module), "evaluate", keys(module.CONFIG))


def _rules(cls: type[Config]) -> str:
    """Return what the docstring of a class says after its first paragraph and before its attributes."""
    return _prose(cls).partition("\n\n")[2].strip()


def _prose(thing: object) -> str:
    """Return the docstring of a module or class without its list of attributes."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "").partition("Attributes:\n")[0]
    return text.replace("``", "`").strip()


def as_text(found: Entry) -> str:
    """Return an entry for a terminal: its docstring, then every key."""
    lines = [line for text in (found.prose, found.rules) if text for line in (text, "")]
    if found.place:
        lines += [f"{found.place}:" if found.keys else f"{found.place}: no keys of its own"]
    for key in found.keys:
        default = "required" if key.default == "required" else f"default {key.default}"
        lines.append(f"  {key.name}: {key.values}; {default}".replace("`", ""))
        meaning = key.meaning.replace("`", "")
        lines += textwrap.wrap(meaning, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def as_page() -> str:
    """Return the page docs/params.md: every key of params.yaml, and of every method, environment and protocol."""
    lines = [
        "# Every key of params.yaml",
        "",
        "This page is generated: `omrl list --markdown docs/params.md`. It is read off the classes that a params.yaml "
        "is checked against. `omrl list <name>` shows one section, method, environment or protocol on a terminal, "
        "yours included; `omrl check` checks a file, and how keys fit each other. A key with a dot stands inside "
        "another: `sac.tau` is `tau` in the mapping `sac`, and `<name>` is a name of your choice.",
        "",
        "Words that the meanings use. A *level* is a dataset of one quality. A *context* is what a method is shown of "
        "a task, and its *belief* is what it infers from that: a task embedding, a posterior, adapted weights. Its "
        "*prior* is the belief before it has seen anything. A *cell* is one run of a stage, and a *shard* a group of "
        "tasks whose behavior policies are one cell. *Normalized return* is 0 for random actions and 1 for the task's "
        "oracle, or for its best checkpoint where no oracle is known. *Release*, *released code* and *paper* without "
        "a name are the method's own, and FOCAL's in sections and protocols.",
        "",
        "## The file",
        "",
        *_table(keys(Top)),
    ]
    for name in sections():
        found = _section(name)
        lines += ["", f"## `{found.place}`", "", found.prose, "", *_table(found.keys)]
    return "\n".join([*lines, *_methods(), *_environments(), *_protocols()]) + "\n"


def _methods() -> list[str]:
    from omrl.nets.actor_critic import ActorCriticConfig

    shared = "regularized actor-critic"
    lines = ["", "## Methods", "", "Keys of an entry of `algorithms`. See [algorithms.md](algorithms.md)."]
    lines += ["", f"### {shared}", "", "Keys that several methods have.", "", *_table(keys(ActorCriticConfig))]
    known: dict[str, type[Config]] = {shared: ActorCriticConfig}
    known |= {name: registry.load(_ALGORITHMS, name).CONFIG for name in registry.own_names(_ALGORITHMS)}
    for name in registry.own_names(_ALGORITHMS):
        found = _algorithm(name)
        lines += ["", f"### {name}", "", found.prose.splitlines()[0], ""]
        lines += [found.rules, ""] if found.rules else []
        lines += _beside(known[name], known)
    return lines


def _beside(cls: type[Config], known: dict[str, type[Config]]) -> list[str]:
    """Return the keys of a method; those that it has as the nearest of its bases has them are only referred to."""
    bases = [name for name, base in known.items() if base is not cls and issubclass(cls, base)]
    if not bases:
        return _table(keys(cls))
    nearest = max(bases, key=lambda name: len(known[name].__mro__))
    alike = keys(known[nearest])
    own = [key for key in keys(cls) if key not in alike]
    link = f"[{nearest}](#{nearest.replace(' ', '-')})"
    return [f"All keys of {link}, and these, which are new or have another default:", "", *_table(own)]


def _environments() -> list[str]:
    lines = [
        "",
        "## Environments",
        "",
        "Keys of `env_config`. See [environments.md](environments.md); where a meaning points to a module, "
        "`omrl list <name>` shows what stands there.",
    ]
    alike: dict[tuple[Key, ...], list[str]] = {}
    for name in registry.own_names(_FAMILIES):
        alike.setdefault(tuple(_family(name).keys), []).append(name)
    for same, names in alike.items():
        lines += ["", f"### {', '.join(names)}", "", *(_table(same) or ["No keys."])]
    return lines


def _protocols() -> list[str]:
    lines = ["", "## Evaluation protocols", "", "Keys of `evaluate`, beside those that every evaluation has."]
    for name in registry.own_names(_PROTOCOLS):
        found = entry(name)
        lines += ["", f"### {name}", "", found.prose.splitlines()[0], "", *_table(found.keys)]
    return lines


def _table(listed: Sequence[Key]) -> list[str]:
    if not listed:
        return []
    fields = [[f"`{k.name}`", k.values, _code(k.default), k.meaning.replace("``", "`")] for k in listed]
    rows = [f"| {' | '.join(field.replace('|', r'&#124;') for field in row)} |" for row in fields]
    return ["| key | values | default | meaning |", "|---|---|---|---|", *rows]


def _code(default: str) -> str:
    return default if default in ("required", "as below") else f"`{default}`"
