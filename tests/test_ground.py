"""The ground floor: errors, seeds, names, configuration, files, fingerprints, workers."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from omrl.core import config, errors, files, parallel, registry, seeding
from omrl.core.errors import UserError
from omrl.provenance import fingerprint


def test_user_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("params.yaml: env = 'x':\n unknown")

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: params.yaml: env = 'x': unknown\n"


def test_full_disk_names_the_file_and_defects_keep_their_traceback(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "data/x.parquet")

    with pytest.raises(SystemExit) as stop:
        errors.run(full)
    assert stop.value.code == 2
    assert "data/x.parquet" in capsys.readouterr().err

    def defect():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        errors.run(defect)


def test_suggestion_names_the_nearest():
    assert errors.suggest("fokal", ["focal", "pearl"]) == "did you mean 'focal'? available: focal, pearl"
    assert errors.suggest("zzz", ["focal"]) == "available: focal"


@given(st.integers(0, 2**31), st.integers(0, 200), st.integers(0, 200))
def test_streams_depend_on_names_only(root, a, b):
    first = seeding.generator(root, "rollouts", a).integers(0, 2**63, 4)
    seeding.generator(root, "rollouts", b).random(3)
    np.testing.assert_array_equal(first, seeding.generator(root, "rollouts", a).integers(0, 2**63, 4))
    if a != b:
        assert (first != seeding.generator(root, "rollouts", b).integers(0, 2**63, 4)).any()
    assert 0 <= seeding.integer(root, a) < 2**31


def test_names_are_not_confused_by_their_joints():
    assert seeding.integer(0, "a", "bc") != seeding.integer(0, "ab", "c")
    assert seeding.integer(0, "1") != seeding.integer(0, 1)


def test_known_stream_values():
    """Golden: every dataset depends on these. If this fails, all published hashes change."""
    assert seeding.integer(0, "behavior", "sparse-point-robot", 0) == 1317509881
    assert seeding.generator(1337, "x").integers(0, 1000, 3).tolist() == [901, 393, 858]


def test_registry_lists_files_and_suggests():
    assert "sparse-point-robot" in registry.names("omrl.envs")
    assert "focal" in registry.names("omrl.algorithms")
    assert not {"base", "-point"} & set(registry.names("omrl.envs"))
    with pytest.raises(UserError, match="unknown environment 'sparse-point-robott': did you mean"):
        registry.load("omrl.envs", "sparse-point-robott", "environment")


class _Inner(config.Config):
    rate: float = Field(default=1.0, gt=0)


class _Outer(config.Config):
    steps: int = Field(ge=1)
    inner: _Inner = _Inner()
    source: str | float = "auto"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, r"f: steps = 'many': expected a valid integer"),
        ({"steps": 0}, r"f: steps = 0: expected greater than or equal to 1"),
        ({"steps": True}, r"f: steps = True: expected a valid integer"),
        ({}, r"f: steps: missing"),
        (
            {"steps": 1, "iner": {}},
            r"f: iner: unknown key; did you mean 'inner'\? available: inner, source, steps",
        ),
        ({"steps": 1, "inner": {"raet": 1}}, r"f: inner.raet: unknown key; did you mean 'rate'\?"),
        ({"steps": 1, "inner": {"rate": -1}}, r"f: inner.rate = -1: expected greater than 0"),
        ({"steps": 1, "source": []}, r"f: source.* = \[\]: expected a valid string or a valid number"),
        ([1], r"expected a mapping"),
    ],
)
def test_config_problems_are_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        config.parse(_Outer, values, "f:")
    assert "\n" not in str(caught.value)


def test_config_accepts_an_int_for_a_float_and_is_frozen():
    parsed = config.parse(_Outer, {"steps": 3, "inner": {"rate": 2}}, "f:")
    assert parsed.inner.rate == 2.0
    with pytest.raises(ValueError, match="frozen"):
        parsed.steps = 4


def test_atomic_path_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "a.json"
    files.write_json(target, {"x": 1})

    def interrupted():
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        interrupted()
    assert files.read_json(target) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_dir_replaces_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    for text in ("one", "two"):
        with files.atomic_dir(target) as folder:
            (folder / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["two"]

    def interrupted():
        with files.atomic_dir(target) as folder:
            (folder / "three").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        interrupted()
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_json_bytes_are_canonical_and_damage_names_the_file(tmp_path):
    files.write_json(tmp_path / "a", {"b": 1, "a": 0.1})
    files.write_json(tmp_path / "b", {"a": 0.1, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "c", float("nan"))
    assert not (tmp_path / "c").exists()
    (tmp_path / "d").write_text('{"a": ')
    with pytest.raises(UserError, match=r"d: damaged"):
        files.read_json(tmp_path / "d")
    with pytest.raises(UserError, match=r"e: missing"):
        files.read_json(tmp_path / "e")


def test_manifest_records_hash_size_and_rows(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"abc")
    files.write_manifest(tmp_path, kind="test", inputs={"in": "00"}, parameters={"p": 1}, files={"x.bin": 3})
    manifest = files.read_manifest(tmp_path)
    assert manifest["files"]["x.bin"] == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "bytes": 3,
        "rows": 3,
    }
    assert files.input_hash(tmp_path) == files.sha256(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"nowhere: missing"):
        files.input_hash(tmp_path / "nowhere")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``omrl_probe`` of two modules, fingerprinted as if it were ours."""
    folder = tmp_path / "omrl_probe"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "low.py").write_text("X = 1\n")
    (folder / "lone.py").write_text("Y = 1\n")
    (folder / "high.py").write_text("def f():\n    from omrl_probe.low import X\n    return X\n")
    monkeypatch.delitem(sys.modules, "omrl_probe", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def take(name):
        importlib.invalidate_caches()
        for cached in (fingerprint._tree, fingerprint._content, fingerprint._module_hash):
            cached.cache_clear()
        return fingerprint.fingerprint(f"omrl_probe.{name}")["fingerprint"]

    return folder, take


def test_fingerprint_sees_code_and_not_comments(package):
    folder, take = package
    before, alone = take("high"), take("lone")
    (folder / "low.py").write_text('"""A docstring."""\n# a comment\nX   =   1\n')
    (folder / "high.py").write_text('def f():\n    """Why."""\n    from omrl_probe.low import X\n\n    return X  # x\n')
    assert take("high") == before
    (folder / "low.py").write_text("X = 2\n")
    assert take("high") != before
    assert take("lone") == alone


def test_fingerprint_follows_imports_inside_functions_and_relative_ones(package):
    folder, take = package
    assert fingerprint.closure("omrl_probe.high") == ["omrl_probe", "omrl_probe.high", "omrl_probe.low"]
    (folder / "rel.py").write_text("from . import low\nfrom .high import f\n")
    take("rel")
    assert fingerprint.closure("omrl_probe.rel") == [
        "omrl_probe",
        "omrl_probe.high",
        "omrl_probe.low",
        "omrl_probe.rel",
    ]


def test_workers_report_the_first_user_error_and_keep_finished_work(tmp_path):
    arguments = [(str(tmp_path / "a"),), (str(tmp_path / "missing" / "b"),)]
    with pytest.raises(UserError, match="no folder for b"):
        parallel.run_tasks(_touch, arguments, workers=1)
    assert (tmp_path / "a").exists()


def _touch(path: str) -> None:
    if not Path(path).parent.exists():
        raise UserError(f"no folder for {Path(path).name}")
    Path(path).touch()


def test_workers_die_with_their_parent(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys, time
            from omrl.core.parallel import run_tasks

            def work(path):
                pathlib.Path(path).write_text(str(os.getpid()))
                time.sleep(60)

            if __name__ == "__main__":
                run_tasks(work, [(sys.argv[1],)], workers=1)
            """
        )
    )
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, str(program), str(pid_file)])
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
