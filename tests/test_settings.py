"""``omrl list <name>`` and docs/params.md: every key, read off the classes that check it."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field

from omrl import settings
from omrl.core import registry
from omrl.core.config import Config, parse
from omrl.core.errors import UserError
from omrl.experiment import Section, Top
from omrl.report.published import TABLES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("omrl.algorithms", "omrl.envs", "omrl.evaluation.protocols")
NAMES = [*Top.model_fields, *(name for package in PACKAGES for name in registry.own_names(package))]


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Inner(Config):
    """Inside.

    Attributes:
        rate: of it.
    """

    rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.25


class Base(Config):
    """Of others.

    Attributes:
        kind, other: one of two, with a meaning
            that goes on.
    """

    kind: Literal["a", "b"] = "a"
    other: Literal["a", "b"] | None = None


class Example(Base):
    """An example.

    Attributes:
        sizes: units; None for ``kind``'s.
        inner: a class.
        many: by name.
        other: here it means something else.
    """

    sizes: list[Annotated[int, Field(ge=1, le=4096)]] | None = None
    inner: Inner = Inner()
    many: dict[str, Inner]
    pair: tuple[int, str] = (1, "a")
    loose: list[Any] = Field(default_factory=list)
    maybe: Inner | None = None
    other_default: Inner = Inner(rate=0.125)
    lambda_: int = Field(1, alias="lambda")
    flag: bool = False
    least: Annotated[float, Field(ge=-1)] = 0.0


class Tree(Config):
    """Has itself inside.

    Attributes:
        size (int): told with its type.
        color: of it.

    Published:
        size: no key's meaning.
    """

    size: int = 1
    color: Color = Color.RED
    left: Tree | None = None


def test_a_class_inside_itself_is_told_once():
    assert settings.keys(Tree) == [
        settings.Key("size", "whole number", "1", "told with its type."),
        settings.Key("color", "`red` or `blue`", "red", "of it."),
        settings.Key("left", "the keys below or `null`", "null", ""),
    ]


def test_every_form_of_a_key():
    assert settings.keys(Example) == [
        settings.Key("kind", "`a` or `b`", "a", "one of two, with a meaning that goes on."),
        settings.Key("other", "`a`, `b` or `null`", "null", "here it means something else."),
        settings.Key("sizes", "list of whole numbers (1 to 4,096) or `null`", "null", "units; null for ``kind``'s."),
        settings.Key("inner", "the keys below", "as below", "a class."),
        settings.Key("inner.rate", "number (above 0, below 0.5)", "0.25", "of it."),
        settings.Key("many", "names, each with the keys below", "required", "by name."),
        settings.Key("many.<name>.rate", "number (above 0, below 0.5)", "0.25", "of it."),
        settings.Key("pair", "list of whole number, text", '[1, "a"]', ""),
        settings.Key("loose", "list of anything", "[]", ""),
        settings.Key("maybe", "the keys below or `null`", "null", ""),
        settings.Key("maybe.rate", "number (above 0, below 0.5)", "0.25", "of it."),
        settings.Key("other_default", "the keys below", '{"rate": 0.125}', ""),
        settings.Key("other_default.rate", "number (above 0, below 0.5)", "0.25", "of it."),
        settings.Key("lambda", "whole number", "1", ""),
        settings.Key("flag", "`true` or `false`", "false", ""),
        settings.Key("least", "number (from -1)", "0.0", ""),
    ]
    assert settings.as_text(settings.Entry("x", "Text.", "x", settings.keys(Inner))) == (
        "Text.\n\nx:\n  rate: number (above 0, below 0.5); default 0.25\n      of it."
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_the_project_has_a_meaning(name):
    found = settings.entry(name)
    assert [key.name for key in found.keys if not key.meaning] == []
    assert [key.name for key in found.keys if "anything" in key.values] == []
    text = settings.as_text(found)
    assert all(f"  {key.name}: " in text for key in found.keys)


def test_the_sections_are_those_of_the_file():
    assert set(get_args(Section)) == set(Top.model_fields)
    chosen = {"repository", "env", "env_config", "shards", "seed", "algorithms", "seeds"}  # no class of their own
    assert [name for name in Top.model_fields if name not in chosen] == sorted(
        settings.sections(), key=list(Top.model_fields).index
    )
    assert not chosen & set(settings.sections())


def test_what_is_said_of_the_values_is_what_is_accepted():
    """The bounds on the page are those that the reader of params.yaml keeps."""
    cls = settings.sections()["report"]
    (said,) = (key.values for key in settings.keys(cls) if key.name == "bootstrap_samples")
    low, high = (int(x.replace(",", "")) for x in said.removeprefix("whole number (").removesuffix(")").split(" to "))
    for value in (low, high):
        parse(cls, {"bootstrap_samples": value}, "x")
    for value in (low - 1, high + 1):
        with pytest.raises(UserError):
            parse(cls, {"bootstrap_samples": value}, "x")


def test_the_page_is_what_the_classes_say():
    """If this fails: omrl list --markdown docs/params.md."""
    page = (ROOT / "docs/params.md").read_text(encoding="utf-8")
    assert page == settings.as_page()
    assert all(f"`{name}`" in page for name in TABLES)
    assert page.count("| `metric_power` |") == 1  # FOCAL's; what builds on it refers to it
    assert "All keys of [focal](#focal), and these" in page
    assert page.count("| `regularization.kind` |") == 1  # the regularized actor-critic's, which FOCAL refers to
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {5}  # no bar of a formula splits a field


def test_the_command_shows_a_name_and_one_of_ones_own_and_refuses_others(tmp_path):
    method = (ROOT / "omrl/scaffold/method.py").read_text(encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/method.py").write_text(method, encoding="utf-8")

    def run(name: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "omrl.cli", "list", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, _ = run("mine.method")
    assert code == 0
    assert "algorithms.<name>:" in out
    (tmp_path / "mine/protocol.py").write_text(
        '"""Mine."""\nfrom omrl.evaluation.protocols.base import ProtocolConfig as CONFIG\n\n\ndef run(run): ...\n'
    )
    code, out, _ = run("mine.protocol")
    assert code == 0
    assert "evaluate:\n  episodes: whole number (1 to 10,000); default 20" in out
    code, out, _ = run("unicorn")
    assert code == 0
    assert "  metric_weight: number (from 0); default 1.0" in out
    code, out, err = run("unicron")
    assert (code, out) == (2, "")
    assert "unicorn" in err
    assert len(err.splitlines()) == 1
