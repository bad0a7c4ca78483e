"""Inputs that are verified, programs that end as they should, files that claim too much."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from omrl import cli
from omrl.algorithms.base import Spec, create, load_model, save_model
from omrl.core import errors, files, parallel
from omrl.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def flip(path: Path) -> None:
    """Turn one bit and leave the time of the file as it was, as a failing disk does."""
    facts = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    (place / "weights.bin").write_bytes(bytes(range(256)))
    files.write_json(place / "all.json", {"tasks": [1, 2, 3]})
    files.write_manifest(
        place, kind="model", inputs={}, parameters={"p": 1}, files={"weights.bin": None, "all.json": None}
    )
    return place


@pytest.mark.parametrize("name", ["weights.bin", "all.json", "manifest.json"])
def test_every_file_of_an_input_is_compared_with_its_manifest(folder, name):
    assert files.input_hashes(folder)[folder.as_posix()] == files.sha256(folder / "manifest.json")
    flip(folder / name)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        files.input_hashes(folder)


def test_a_single_input_is_compared_with_the_manifest_beside_it(folder):
    assert files.read_input(folder / "all.json") == {"tasks": [1, 2, 3]}
    text = (folder / "all.json").read_text()
    (folder / "all.json").write_text(text.replace("2", "4"))  # sound JSON, other content
    for reader in (files.input_hashes, files.read_input):
        with pytest.raises(UserError, match=r"all\.json: damaged"):
            reader(folder / "all.json")
    (folder / "all.json").unlink()
    with pytest.raises(UserError, match=r"all\.json: missing"):
        files.input_hashes(folder)


def test_a_manifest_that_was_edited_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parameters"]["p"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        files.read_manifest(folder)


def test_a_file_is_hashed_once_while_it_stays_as_it_is(folder, monkeypatch):
    taken = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: taken.append(Path(path).name) or real(path))
    files.verified(folder)
    files.verified(folder)
    assert sorted(taken) == ["all.json", "weights.bin"]


@pytest.mark.parametrize(
    "content", ["[" * 5000 + "]" * 5000, '{"a":' * 200 + "1" + "}" * 200, "1" * 5000, '"\\ud800', "{"]
)
def test_json_that_no_program_of_ours_wrote_is_a_user_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json: damaged"):
        files.read_json(path)


def test_a_folder_or_a_loop_in_the_place_of_a_file_is_a_user_error(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "loop"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            files.read_json(tmp_path / name)


@pytest.mark.parametrize("text", ["²", "٣", "1.5", "-1", "9" * 5000, " 2"])
def test_a_wrong_number_of_workers_is_a_user_error(monkeypatch, text):
    monkeypatch.setenv("OMRL_WORKERS", text)
    with pytest.raises(UserError, match="OMRL_WORKERS"):
        parallel.worker_count()


def test_a_message_is_one_short_printable_line():
    line = errors.explain(UserError("a\x1b[31mred\u202e\ud800\n" + "x" * 100_000 + "; run 'dvc repro'"))
    assert line.startswith(r"a\x1b[31mred\u202e\ud800 x")
    assert line.endswith("; run 'dvc repro'")
    assert len(line) <= errors.LONGEST
    assert line.isascii()
    assert line.isprintable()
    assert errors.for_terminal("é, ok\n") == "é, ok\n"


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (PermissionError(13, "Permission denied", "data/x"), "data/x: permission denied"),
        (OSError(30, "Read-only file system", "data/x"), "data/x: read-only file system"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (ImportError("libx.so: failed to map segment from shared object: Cannot allocate memory"), "not enough memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EMFILE, "Too many open files", "data/x"), "ulimit -n"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "ulimit -f"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, part):
    assert part in errors.explain(error)


def test_one_process_at_a_time_and_the_other_is_named(tmp_path):
    lock = tmp_path / "locks/cell.lock"
    with files.alone(lock):
        with pytest.raises(UserError, match=rf"cell\.lock: process {os.getpid()} is at this work"), files.alone(lock):
            pass
        assert lock.exists()
    assert not lock.exists()
    with files.alone(lock):
        pass


def test_the_command_line_shows_all_of_a_card_and_nothing_raw(monkeypatch, capsys):
    monkeypatch.setattr("omrl.report.folders.describe", lambda path: "line\n" * 100 + "\x1b[31mred")
    cli.data(Path("data/datasets/expert"))
    assert capsys.readouterr().out == "line\n" * 100 + "\\x1b[31mred\n"


# --- files that claim too much ------------------------------------------------------------------------------


def limited(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code``, after its imports, with room for half a gigabyte more."""
    head = """
import resource, sys
from omrl import cli
from omrl.algorithms.base import load_model
from omrl.behavior.checkpoints import load_actor
from omrl.core.errors import run
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29), size + (1 << 29)))
"""
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def weights(weight: torch.Tensor) -> bytes:
    layers = {"actor.latent_pi.0": weight, "actor.mu": torch.zeros(2, 4), "actor.log_std": torch.zeros(2, 4)}
    state = OrderedDict()
    for name, value in layers.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = value, torch.zeros(1).expand(len(value))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def checkpoint(path: Path, policy: bytes, data: bytes = b"{}") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("policy.pth", policy)
        archive.writestr("data", data)
    return path


def repacked(policy: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(policy)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


BOMBS = {
    "expanded": lambda: weights(torch.zeros(1).expand(60_000, 60_000)),
    "shape": lambda: repacked(
        weights(torch.zeros(4, 2)), lambda name, x: x.replace(b"K\x04K\x02\x86", b"M\xff\xffM\xff\xff\x86")
    ),
    "inner zip": lambda: repacked(
        weights(torch.zeros(4, 2)), lambda name, x: bytes(1 << 30) if name.endswith("data/0") else x
    ),
    "memo": lambda: repacked(
        weights(torch.zeros(4, 2)),
        lambda name, x: b"\x80\x02Nr\xff\xff\xff\x7f." if name.endswith("data.pkl") else x,
    ),
    "bytearray": lambda: repacked(
        weights(torch.zeros(4, 2)),
        lambda name, x: b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R." if name.endswith("data.pkl") else x,
    ),
    "zip": lambda: bytes(1 << 30),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_checkpoint_that_claims_too_much_is_refused_without_the_memory(tmp_path, name):
    path = checkpoint(tmp_path / "step.zip", BOMBS[name]())
    assert path.stat().st_size < 5_000_000
    done = limited("run(lambda: load_actor(sys.argv[1]))", path)
    assert done.returncode == 2
    assert not any(part in done.stderr for part in ("not enough memory", "MemoryError", "RuntimeError"))
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", [10**9, -1, "many", None])
def test_a_model_of_impossible_sizes_is_refused_before_it_is_built(tmp_path, value):
    algorithm = create("focal", {"width": 8, "encoder_width": 8}, Spec(2, 2, False), 0)
    save_model(algorithm, tmp_path, "focal", "focal")
    load_model(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["spec"]["observation"] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    done = limited("run(lambda: load_model(sys.argv[1]))", tmp_path)
    assert done.returncode == 2
    assert "config.json: spec.observation = " in done.stderr
    assert done.stderr.count("\n") == 1


# --- programs -----------------------------------------------------------------------------------------------

PROGRAM = r"""
import os, sys, time
from omrl.core.errors import begin, run
begin(started_by_dvc=False)
from omrl.core.parallel import run_tasks

def nap(seconds):
    os.write(1, b"up\n")
    time.sleep(seconds)

if __name__ == "__main__":
    run(lambda: run_tasks(nap, [(60,), (60,)], workers=2))
"""


def semaphores() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("sem.*")}


@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM; finished work is kept, run again to resume\n"),
        (signal.SIGHUP, 129, "stopped by SIGHUP; finished work is kept, run again to resume\n"),
        (signal.SIGINT, 130, "interrupted; finished work is kept, run again to resume\n"),
    ],
)
def test_signals_end_a_program_with_one_line_and_leave_nothing(tmp_path, number, code, line, whole_group):
    (tmp_path / "program.py").write_text(PROGRAM)
    before = semaphores()
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, told = process.communicate(timeout=30)
    assert (told, process.returncode) == (line, code)
    deadline = time.monotonic() + 10
    while semaphores() - before:
        assert time.monotonic() < deadline, "semaphores were left"
        time.sleep(0.05)
    assert not group(process.pid)


def group(session: int) -> list[str]:
    """Return the processes of a session that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return [command for command in found if command]


def test_a_command_outlives_the_shell_that_started_it(tmp_path):
    """'nohup omrl repro &' goes on after the log-out; a stage does not outlive its dvc (test_faults)."""
    started, done = tmp_path / "started", tmp_path / "done"
    code = (
        "import sys, time; from pathlib import Path; from omrl.core.errors import run; "
        "run(lambda: (Path(sys.argv[1]).touch(), time.sleep(1), Path(sys.argv[2]).touch()))"
    )
    shell = (
        f'"{sys.executable}" -c "{code}" "{started}" "{done}" >/dev/null 2>&1 & '
        f'while [ ! -e "{started}" ]; do sleep 0.05; done'
    )
    subprocess.run(["sh", "-c", shell], cwd=ROOT, check=True)
    end = time.monotonic() + 20
    while not done.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert done.exists()


def test_a_stage_whose_parent_died_before_it_began_does_nothing(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "pipelines/smoke/params.yaml").read_text())
    start = textwrap.dedent("""
        import os, subprocess, sys
        process = subprocess.Popen([sys.executable, "-m", "stages.plan"])
        print(process.pid, flush=True)
        os._exit(0)
    """)
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "plan"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while Path(f"/proc/{done.stdout.strip()}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "data").exists()


def test_a_signal_or_an_error_while_a_stage_is_imported_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("raise MemoryError")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "stages.dataset", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: not enough memory")
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (143, 1)


def test_a_second_copy_of_a_stage_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "pipelines/smoke/params.yaml").read_text())
    with files.alone(tmp_path / "data/.scratch/cells/plan.lock"):
        done = subprocess.run(
            [sys.executable, "-m", "stages.plan"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 2
    assert f"plan.lock: process {os.getpid()} is at this work" in done.stderr
    assert not (tmp_path / "data/plan").exists()
