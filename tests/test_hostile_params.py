"""Whatever stands in params.yaml, the answer is its cells or one short, printable line, soon."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from omrl import experiment
from omrl.core import registry
from omrl.core.config import Config
from omrl.core.errors import UserError, printable, suggest
from omrl.core.yamlfile import read

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "params.yaml").read_text()
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30)
)
VALUES = (
    "!!int abc", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary '='", "!!set {a}", "!!python/name:os.system",
    "! x", "!x y", "9" * 5000, "-" + "9" * 4301, "0x" + "f" * 4000, "1" * 900, "1e999", "-1e400", ".nan", ".inf",
    "1_0", "0b", "0b_", "0o_", "0o9", "-_", "_", "=", "<<", "2001-99-99", "2001-01-01", "12:30", "[" * 5000,
    "{a: " * 5000, "[" * 19 + "]" * 19, "'" + "x" * 100_000 + "'", "x" * 990, "'\x1b[31m'", "\x1b]0;x\x07",
    '"\\e[31mred"', '"\\ud800"', '"\\ud83d"', '"\\0"', '"\\u202e"', "\u202ereversed", "\u2066", "\ufeff", "\x00",
    "\x85", "\u2028", "10" + "0" * 30, str(10**30), str(-(10**30)), "1e30", "-0", "0", "-1", "null", "~", "true",
    "[]", "{}", "[null]", "[{}]", "[[1]]", "{1: 2}", "{[1]: 2}", "{null: 1}", "{true: 1}", "{a: 1, a: 2}", "*nothing",
    "&a [*a]", "&a {b: *a}", "{<<: 3}", "{<<: [1]}", "|\n  text", ">\n  text", "'", '"', "%", "@", "`", "- 1", "? x",
    ": x", "a: b: c", "#", "é", "日本", "../../etc", "/", "a\tb", "on", "yes", "~/x", "{steps: [" + "1, " * 3000 + "]}",
    "{steps: [" + "8" * 900 + "]}", "{band: [1e308, -1e308]}", "{radius: " + "9" * 900 + "}", "[0, " + "9" * 900 + "]",
    "{" + "k" * 900 + ": 1}", "[" + "z, " * 5000 + "]", "{'\\x1b': 1}", '{"\\x1b[2J": 1}', "{algorithm: focal}",
    "{algorithm: [1]}", "{algorithm: '" + "y" * 900 + "'}", "{from: 0, to: 99}",
)  # fmt: skip


def answer(text: str | bytes, folder: Path) -> str:
    """Return '' for a sound file, else the line; fail unless it is one that a terminal can show."""
    (folder / "params.yaml").write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    start = time.perf_counter()
    try:
        assert experiment.check()
        line = ""
    except UserError as error:
        line = str(error)
        assert line.isprintable(), repr(line)
        assert 20 < len(line) <= 300, line
        assert line.startswith("params.yaml")
    assert time.perf_counter() - start < 5
    return line


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mutated(rng: random.Random) -> bytes:
    """Return the default file with one to three wounds."""
    lines = TEXT.splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind <= 3:  # another value
            keyed = [i for i, line in enumerate(lines) if re.match(r" *[\w\"-]+:", line)] or [at]
            at = rng.choice(keyed)
            lines[at] = re.sub(r"^( *[\w\"-]+:).*", lambda m: f"{m[1]} {rng.choice(VALUES)}", lines[at])
        elif kind == 4:  # another key
            lines[at] = re.sub(r"[\w-]+(?=:)", lambda _: rng.choice(VALUES), lines[at], count=1)
        elif kind == 5:
            lines[at : at + rng.randrange(1, 6)] = []
        elif kind == 6:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines or [""]))
        else:
            lines[at] = " " * rng.randrange(5) + lines[at].lstrip()
        lines = lines or [""]
    content = bytearray("\n".join(lines).encode(errors="surrogatepass"))
    for _ in range(rng.choice((0, 0, 0, 1, 4))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.05 else content)


def test_mutated_files_get_an_answer(here):
    rng = random.Random(20)
    answers = [answer(mutated(rng), here) for _ in range(400)]
    assert 200 < sum(map(bool, answers)) < 400  # some wounds are in comments
    assert len(set(answers)) > 100


@pytest.mark.parametrize("key", ["env", "shards", "dataset", "algorithms"])
def test_hostile_values_of_a_section_get_an_answer(here, key):
    start = TEXT.index(f"\n{key}:") + 1
    end = re.compile(r"^(?=[a-z#])", re.M).search(TEXT, start + 1).start()
    for value in VALUES:
        answer(f"{TEXT[:start]}{key}: {value}\n{TEXT[end:]}", here)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train: 20", "train: !!int abc", r":12: not valid YAML: tag '!!int': write the value without a tag"),
        ("train: 20", f"train: {'9' * 4301}", r":12: not valid YAML: 4301 characters in one value: expected at most 1"),
        ("train: 20", "train: " + "[" * 30_000, r":12: not valid YAML: nested deeper than 20 levels"),
        ("env: ", BOMB + "env: ", r":\d+: not valid YAML: more than 100000 values, aliases written out"),
        ("radius: 0.2", "radius: &a [*a]", r":\d+: not valid YAML: alias '\*a' stands for nothing above it"),
        ("train: 20", 'train: "\\ud800"', r":12: not valid YAML: character U\+D800 in '\\ud800'"),
        ("train: 20", "train: '\x1b[31m'", r":12: not valid YAML: character U\+001B is not allowed"),
        ("train: 20", "train: '\u202e'", r":12: not valid YAML: character U\+202E in '\\u202e'"),
        ("rl_batch: 64", f"rl_batch: {10**30}", r": algorithms\.focal\.rl_batch = 10+: expected less .* 16384"),
        ("width: 64 ", f"width: {10**9} ", r": algorithms\.focal\.width = 10+: expected less .* 4096"),
        ("seeds: [0, 1]", "seeds: {from: 0, to: 99}", r": seeds: expected a list .*'omrl seeds 0 99' writes it"),
        ("seeds: [0, 1]", "seeds: {from: a}", r": seeds: expected a list such as .*'omrl seeds 0 99' writes it"),
        ("seeds: [0, 1]", f"seeds: {list(range(9000))}", r": asks for \d+ cells: expected at most 20000"),
        ("checkpoint_every: 250", "checkpoint_every: 1", None),
        ("total_steps: 2000", "total_steps: 3000000", r": behavior: total_steps = 3000000 .* at most 10,000"),
        ("encoder_rate: 0.001", "encoder_lr: 0.001", r": algorithms\.focal\.encoder_lr: .* did you mean .encoder_r"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(here, old, new, message):
    assert old in TEXT
    line = answer(TEXT.replace(old, new, 1), here)
    if message is None:
        assert line == ""
    else:
        assert re.match(r"params\.yaml" + message, line), line


def test_aliases_and_merge_keys_may_be_used(here):
    more = "  other: &base { algorithm: focal, width: 32 }\n  third: { <<: *base, depth: 2 }\n"
    text = TEXT.replace("  focal: #", f"{more}  focal: #")
    assert answer(text, here) == ""
    overrides = experiment.load("algorithms").algorithms["third"].overrides
    assert overrides == {"width": 32, "depth": 2}


@pytest.mark.parametrize("kind", ["folder", "missing", "latin-1", "empty", "large"])
def test_a_file_that_is_none_gets_an_answer(here, kind):
    path = here / "params.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"latin-1": b"env: \xe9\n", "empty": b"", "large": b"#" * 2_000_000}[kind])
    with pytest.raises(UserError, match=r"^params\.yaml: ") as caught:
        experiment.check()
    assert len(str(caught.value)) <= 300


def test_the_command_ends_with_code_2_and_one_line(here):
    (here / "params.yaml").write_text(TEXT.replace("env: sparse-point-robot", r'env: "\x9b31m"'))
    done = subprocess.run([sys.executable, "-m", "omrl.cli", "check"], capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: params.yaml:")
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.decode().strip().isprintable()


def configs() -> list[type[Config]]:
    for package in ("omrl.algorithms", "omrl.envs", "omrl.behavior"):
        for name in registry.names(package):
            if package != "omrl.envs" or not name.startswith("metaworld"):
                registry.load(package, name)
    experiment.load(*typing.get_args(experiment.Section), path=ROOT / "params.yaml")
    found, todo = [], [Config]
    while todo:
        found.append(todo.pop())
        todo += found[-1].__subclasses__()
    return [cls for cls in found if cls.__module__.startswith("omrl.")]


def bounded(schema: object) -> bool:
    """Has every integer of a JSON schema an upper bound?"""
    if isinstance(schema, list):
        return all(map(bounded, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "integer" and not {"maximum", "exclusiveMaximum", "enum", "const"} & schema.keys():
        return False
    return all(bounded(value) for value in schema.values())


def test_every_integer_of_every_configuration_has_an_upper_bound():
    classes = configs()
    assert len(classes) > 20
    assert [
        f"{cls.__name__}.{name}"
        for cls in classes
        for name, schema in cls.model_json_schema().get("properties", {}).items()
        if not bounded(schema)
    ] == []


def test_the_nearest_name_is_that_of_the_nearest_words():
    names = ["encoder", "encoder_rate", "encoder_width", "actor_rate", "meta_batch"]
    assert suggest("encoder_lr", names).startswith("did you mean 'encoder_rate'?")
    assert suggest("encoder_widht", names).startswith("did you mean 'encoder_width'?")
    assert suggest("encodr", names).startswith("did you mean 'encoder'?")
    assert suggest("batch_meta", names).startswith("did you mean 'meta_batch'?")
    assert len(suggest("x", [f"name-{i}" for i in range(1000)])) < 200


def test_what_cannot_be_printed_is_escaped():
    assert printable("a\x1b[2J\u202e\ud800é") == "a\\x1b[2J\\u202e\\ud800é"


def test_a_section_that_was_not_asked_for_cannot_be_read():
    given = experiment.load("meta_train", path=ROOT / "params.yaml")
    assert given.meta_train.steps == yaml.safe_load(TEXT)["meta_train"]["steps"]
    with pytest.raises(LookupError, match=r"'seeds'.* was not asked for"):
        _ = given.seeds


def test_every_section_has_a_type():
    sections = typing.get_args(experiment.Section)
    assert set(sections) == set(experiment.Top.model_fields)
    for section in sections:
        member = vars(experiment.Experiment)[section]
        function = member.fget if isinstance(member, property) else member.func
        assert "Any" not in function.__annotations__["return"], section
    assert all(issubclass(cls, BaseModel) for cls in (experiment.TasksConfig, experiment.Top))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a {x: 1}\nb: &b {<<: *a, x: 2, y: 3}\nc: {<<: *b, y: 4}", {"x": 2, "y": 4}),
        ("c: {1: 2, 'on': on, 1e-5: 1e-5, d: 2001-01-01}", {1: 2, "on": "on", 1e-5: 1e-5, "d": "2001-01-01"}),
    ],
)
def test_yaml_means_what_dvc_takes_it_for(tmp_path, text, expected):
    (tmp_path / "x.yaml").write_text(text)
    assert read(tmp_path / "x.yaml")["c"] == expected


@pytest.mark.parametrize("text", ["a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "a: 1\n'a': 2", "? [{a: 1}]\n: 1", "[1]: 2"])
def test_a_key_is_one_word_and_stands_once(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml:\d: not valid.*(stands there twice|neither text nor)"):
        read(tmp_path / "x.yaml")
