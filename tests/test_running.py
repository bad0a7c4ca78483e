"""``omrl repro`` with real Dask: the same dvc.lock as serial ``dvc repro``, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMOKE, Project, clone

from omrl.core.errors import UserError
from omrl.running import child, graph, schedule
from omrl.running.cell import _message, environment, run_cell

# two cells that may run at once, of which the first in the graph ends last; two that read them; one alone
TOY = """\
stages:
  plan: {cmd: echo plan > plan.txt, params: [shards], outs: [plan.txt]}
  slow: {cmd: sh work.sh slow, deps: [plan.txt, work.sh], outs: [slow.txt]}
  quick: {cmd: sh work.sh quick, deps: [plan.txt, work.sh], outs: [quick.txt]}
  both: {cmd: cat slow.txt quick.txt > both.txt, deps: [slow.txt, quick.txt], outs: [both.txt]}
  after: {cmd: cat quick.txt > after.txt, deps: [quick.txt], outs: [after.txt]}
"""
WORK = """\
test "$1" = slow && sleep ${SLOW:-1}
if test "$1" = "$FAIL"; then echo "error: $1 has no wind" >&2; exit 2; fi
if test "$1" = "$KILL" && ! test -e killed; then touch killed; kill -9 $PPID; sleep 60; fi
echo $OMP_NUM_THREADS > threads; env | grep MALLOC_TRIM > malloc
echo $1 > $1.txt
"""


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc.*")


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A DVC project of five cells that take no time."""
    folder = tmp_path / "toy"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    (folder / "dvc.yaml").write_text(TOY)
    (folder / "work.sh").write_text(WORK)
    shutil.copy(ROOT / SMOKE / "params.yaml", folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    return folder


def serial(folder: Path, target: Path) -> bytes:
    """Return the dvc.lock of a serial ``dvc repro`` in a copy without data."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("dvc.lock", "*.txt", "cache", "tmp"))
    subprocess.run(["dvc", "repro", "-q"], cwd=target, check=True)
    return (target / "dvc.lock").read_bytes()


def processes(folder: Path) -> list[int]:
    """Return the processes that work in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve().is_relative_to(folder.resolve()):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_parallel_gives_the_lock_of_serial_and_then_does_nothing(toy, tmp_path, capfd):
    assert schedule.repro(toy, jobs=2) == 0
    shown = capfd.readouterr().err
    assert shown.index("quick: done") < shown.index("slow: done")  # they ran at once
    assert "5 cells run" in shown
    assert (toy / "dvc.lock").read_bytes() == serial(toy, tmp_path / "serial")
    assert (toy / "threads").read_text() == "1\n"
    assert (toy / "malloc").read_text() == f"MALLOC_TRIM_THRESHOLD_={1 << 30}\n"
    assert schedule.repro(toy, jobs=2) == 0
    assert "up to date" in capfd.readouterr().err
    # of a change, only what depends on it; what turns out the same stops there
    (toy / "work.sh").write_text(WORK.replace("echo $1 >", "echo $1 again >"))
    assert schedule.explain(toy)[-1].startswith(f"{toy}: 2 cells would run, 2 may")
    (toy / "work.sh").write_text(WORK + "\n")
    assert schedule.repro(toy, jobs=2) == 0
    assert "2 cells run, 2 up to date after all" in capfd.readouterr().err


def test_a_failed_cell_stops_only_what_reads_it(toy, monkeypatch, capfd):
    monkeypatch.setenv("FAIL", "slow")
    assert schedule.repro(toy, jobs=2) == 2  # slow, and both
    shown = capfd.readouterr().err
    assert "failed: slow: slow has no wind" in shown
    assert "1 failed, 1 not started" in shown
    assert (toy / "after.txt").is_file()
    assert not (toy / "both.txt").exists()
    monkeypatch.delenv("FAIL")
    assert schedule.repro(toy, jobs=2) == 0
    assert (toy / "both.txt").read_text() == "slow\nquick\n"


def test_a_cell_whose_process_is_killed_runs_again(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("KILL", "quick")
    assert schedule.repro(toy, jobs=2) == 0
    assert (toy / "killed").exists()
    monkeypatch.delenv("KILL")
    assert (toy / "dvc.lock").read_bytes() == serial(toy, tmp_path / "serial")


@pytest.mark.parametrize("first", ["dvc", "omrl"])
def test_a_second_run_says_who_is_at_work_and_harms_nothing(toy, tmp_path, monkeypatch, first):
    monkeypatch.setenv("SLOW", "600")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    commands = {"dvc": ["dvc", "repro"], "omrl": [sys.executable, "-m", "omrl.cli", "repro"]}
    process = subprocess.Popen(commands[first], cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def asleep() -> list[int]:
        return [pid for pid in processes(toy) if command_line(pid).startswith("sleep 600")]

    while not asleep():
        assert process.poll() is None
        time.sleep(0.05)
    for name, command in commands.items():
        second = subprocess.run(command, cwd=toy, capture_output=True, text=True, timeout=120)
        said = second.stdout + second.stderr
        assert second.returncode != 0
        number = re.search(r"\(PID (\d+)\)|process (\d+) is at this work", said)
        assert number is not None, said
        assert int(number[1] or number[2]) in processes(toy)
        assert "Traceback" not in said
        assert name == "dvc" or said.count("\n") == 1
    for pid in asleep():
        os.kill(pid, signal.SIGTERM)  # the sleep; the cell goes on
    process.communicate(timeout=120)
    assert process.returncode == 0
    monkeypatch.setenv("SLOW", "0")
    assert (toy / "dvc.lock").read_bytes() == serial(toy, tmp_path / "serial")


def test_locks_of_processes_that_are_gone_are_forgotten(toy, capfd):
    (toy / ".dvc/tmp").mkdir()
    # this very process has the number now, and is no DVC
    gone = {"pid": os.getpid(), "cmd": "/usr/bin/dvc --wait-for-lock repro -s quick"}
    table = {"write": {str(toy / "quick.txt"): gone}, "read": {str(toy / "plan.txt"): [gone]}}
    (toy / ".dvc/tmp/rwlock").write_text(json.dumps(table))
    assert schedule.repro(toy, jobs=1) == 0
    assert "forgot 2 lock(s)" in capfd.readouterr().err


def test_a_running_dvc_keeps_its_locks(toy):
    (toy / ".dvc/tmp").mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "repro", "-s", "quick"]) as process:
        alive = {"pid": process.pid, "cmd": "/usr/bin/dvc repro -s quick"}
        (toy / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {"x": alive}, "read": {}}))
        assert graph.forget_dead(toy) == 0
        process.kill()
        process.wait()
    assert graph.forget_dead(toy) == 1


def test_new_cells_and_missing_outputs_are_explained(toy):
    lines = schedule.explain(toy)
    assert lines[0] == "runs     plan: new, dvc.lock does not know it"
    assert len(lines) == 6
    schedule.repro(toy, jobs=2)
    (toy / "quick.txt").unlink()
    lines = schedule.explain(toy)
    assert lines[0] == "runs     quick: output quick.txt missing"
    assert "may run  both: reads quick" in lines or any("both" in line for line in lines)


def test_a_status_parses_params_once_and_sees_every_change(toy, monkeypatch):
    from dvc.dependency import param

    (toy / "dvc.yaml").write_text(TOY.replace("work.sh], outs", "work.sh], params: [shards, seed], outs"))
    assert schedule.repro(toy, jobs=2) == 0
    parsed = []

    def load(path, fs, **options):
        parsed.append(path)
        return original(path, fs, **options)

    original = param.load_path
    monkeypatch.setattr(param, "load_path", load)
    assert graph.read_graph(toy).reasons == {}
    assert len(parsed) == 1
    values = yaml.safe_load((toy / "params.yaml").read_text())
    (toy / "params.yaml").write_text(yaml.safe_dump({**values, "seed": 1 + values["seed"]}))
    assert set(graph.read_graph(toy).reasons) == {"slow", "quick"}
    assert param.load_path is load  # as it was before


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers, each a process of its own on a loopback address."""
    file = tmp_path / "scheduler.json"

    def start(program: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", "--scheduler-file", str(file), *options],
            env={**os.environ, "PYTHONPATH": str(ROOT), "SLOW": "4"}, cwd=tmp_path, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    started = [start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")]
    while not file.exists():
        assert started[0].poll() is None
        time.sleep(0.05)
    worker = ("dask_worker", "--nthreads", "1", "--resources", "cores=1", "--no-nanny", "--no-dashboard")
    started += [start(*worker), start(*worker)]
    yield json.loads(file.read_text())["address"], started
    for process in reversed(started):
        process.kill()
        process.wait()


def test_a_cell_waits_for_a_dying_process_at_its_output(toy):
    """A killed worker's process may still be in DVC's table when another worker takes the cell."""
    with subprocess.Popen(["sleep", "3"]) as holder:
        table = {"write": {str(toy / "plan.txt"): {"pid": holder.pid, "cmd": "sleep 3"}}, "read": {}}
        (toy / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
        (toy / ".dvc/tmp/rwlock").write_text(json.dumps(table))
        waiter = threading.Thread(target=holder.wait)  # a zombie would still be a process
        waiter.start()
        ending = run_cell(str(toy), "plan", 1, 1)
        waiter.join()
    assert (ending.state, ending.message) == ("ran", "")
    assert ending.seconds > 2


def test_a_killed_worker_loses_nothing(toy, tmp_path, cluster, monkeypatch):
    address, (_, *workers) = cluster
    command = [sys.executable, "-m", "omrl.cli", "repro", str(toy), "--scheduler", address]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        killed = None
        while killed is None:
            assert process.poll() is None, process.stderr.read()
            for pid in processes(toy):
                if "work.sh slow" in command_line(pid):
                    killed = next((w for w in workers if _is_above(w.pid, pid)), None)
            time.sleep(0.02)
        killed.kill()
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert (toy / "dvc.lock").read_bytes() == serial(toy, tmp_path / "serial")


def _is_above(ancestor: int, pid: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M).group(1))
        except OSError:
            return False
    return False


def test_a_lost_scheduler_is_told_and_the_next_run_goes_on(toy, cluster):
    address, (scheduler, *_) = cluster
    command = [sys.executable, "-m", "omrl.cli", "repro", str(toy), "--scheduler", address]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not any("work.sh slow" in command_line(pid) for pid in processes(toy)):
            assert process.poll() is None
            time.sleep(0.02)
        scheduler.kill()
        _, shown = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "error: the Dask scheduler is gone; finished cells are kept, run again to go on" in shown
    deadline = time.monotonic() + 30
    while processes(toy):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert schedule.repro(toy, jobs=2) == 0


def test_mistakes_end_in_one_line(toy, monkeypatch):
    with pytest.raises(UserError, match="smok: no pipeline of that name or path; did you mean 'smoke'"):
        schedule.find_folder("smok")
    monkeypatch.setattr(schedule, "_CONNECT_S", 1)
    with pytest.raises(UserError, match=r"--scheduler tcp://127\.0\.0\.1:1: no Dask scheduler answers there"):
        schedule.repro(toy, address="tcp://127.0.0.1:1")
    (toy / "dvc.yaml").write_text("stages: 3\n")
    with pytest.raises(UserError, match="DVC cannot read this pipeline"):
        schedule.explain(toy)


def test_the_line_of_a_failure_names_the_error_and_the_users_own_line(tmp_path):
    theirs = tmp_path / "mine.py"
    theirs.write_text("def update(batch):\n    return len(batch) / 0\n")
    code = (
        "import mine; from omrl.core.errors import run; from functools import partial; run(partial(mine.update, [1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    dvcs = "ERROR: failed to reproduce 'x': failed to run: python, exited with 1\n"
    told = _message(f"Running stage 'x':\n{done.stderr}{dvcs}", tmp_path / "x.log")
    assert (
        told == f"ZeroDivisionError: division by zero ({theirs}, line 2, in update); its output is in {tmp_path}/x.log"
    )
    assert _message(f"error: mine\n{done.stderr}", tmp_path / "x.log") == "mine"
    assert _message(dvcs, tmp_path / "x.log").startswith("failed to reproduce 'x'")


def test_a_cell_gets_the_threads_it_declares():
    assert environment(2, 1)["OMRL_WORKERS"] == "2"
    assert environment(1, 3)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_no_process_and_one_line(toy, number, code, monkeypatch):
    monkeypatch.setenv("SLOW", "60")
    command = [sys.executable, "-m", "omrl.cli", "repro", str(toy)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not any("work.sh slow" in command_line(pid) for pid in processes(toy)):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert "finished work is kept, run again to resume" in shown.splitlines()[-1]
    assert "Traceback" not in shown
    assert processes(toy) == []
    monkeypatch.delenv("SLOW")
    assert schedule.repro(toy, jobs=2) == 0


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_a_killed_run_leaves_no_process(toy, where, cluster, monkeypatch):
    monkeypatch.setenv("SLOW", "60")
    command = [sys.executable, "-m", "omrl.cli", "repro", str(toy)]
    with subprocess.Popen(
        command + ["--scheduler", cluster[0]] * (where == "cluster"), cwd=ROOT, stderr=subprocess.DEVNULL
    ) as process:
        while not any("work.sh slow" in command_line(pid) for pid in processes(toy)):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    deadline = time.monotonic() + 30
    while processes(toy):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (toy / "slow.txt").exists()  # given up, not finished
    monkeypatch.delenv("SLOW")
    assert schedule.repro(toy, jobs=2) == 0


@pytest.mark.e2e
def test_the_smoke_pipeline_in_parallel_and_killed_in_the_middle_is_the_serial_one(built, tmp_path):
    other = clone(tmp_path / "omrl")
    command = [sys.executable, "-m", "omrl.cli", "repro", "smoke"]
    with subprocess.Popen(
        command, cwd=other.folder, env=other.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        killed = False
        while not killed and process.poll() is None:
            for pid in processes(other.smoke):
                if "repro -s meta_train@focal-relabelled-0" in command_line(pid):
                    time.sleep(2)
                    os.kill(pid, signal.SIGKILL)
                    killed = True
                    break
            time.sleep(0.02)
        _, shown = process.communicate()
    assert process.returncode == 0, shown
    assert killed
    assert other.lock == built.lock
    assert other.repro().nothing
    assert "up to date, 17 cells" in other.omrl("repro", "smoke").stderr


@pytest.mark.e2e
def test_a_swap_in_parallel_is_the_serial_one(built: Project, tmp_path):
    locks = []
    for name, build in (("serial", lambda p: p.repro()), ("parallel", lambda p: p.omrl("repro", "smoke"))):
        project = built.copy(tmp_path / name)
        project.edit_params("train: [expert, relabelled]", "train: [medium]")
        build(project)
        locks.append(project.lock)
    assert locks[0] == locks[1]


ODD = {"a": 1e-05, "b": 1e16, "c": None, "d": "yes", "e": "x " * 100, "f": "1e-5", "g": [], "h": {}, "i": "2\nlines\n"}
SHARED = {"kind": "bc", "list": [1, 2]}
ODD |= {"j": {"x": SHARED}, "k": {"x": SHARED}, "l": [SHARED, [1]], "m": "x: &id001"}  # anchors, as of YAML's '<<'
LONG = "long-" * 30
CELLS = """\
stages:
  cell:
    matrix: {name: [first, second, NAME]}
    cmd: echo ${item.name} > ${item.name}.txt
    params: [odd, other]
    outs: ["${item.name}.txt"]
""".replace("NAME", LONG)


def repro_odd(folder: Path, other: int, *arguments: str) -> str:
    (folder / "params.yaml").write_text(yaml.safe_dump({"odd": ODD, "other": other}))
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def assert_anchors_are_numbered(text: str) -> None:
    anchors = re.findall(r"[:-] &(id\d+)$", text, flags=re.M)
    assert anchors == [f"id{i + 1:03d}" for i in range(text.count("cmd:"))], "one of every cell"
    assert "m: 'x: &id001'" in text


@pytest.mark.parametrize(
    ("before", "cell"),
    [("as DVC does", "second"), ("as DVC does", LONG), ("with a comment", "second"), ("none", LONG)],
)
def test_a_cell_is_recorded_as_dvc_does(tmp_path, before, cell):
    """In its own process DVC reads and writes that cell's entry alone; whatever the file looks like."""
    locks = []
    for name, program in (("ours", [child.__file__]), ("dvc", ["-m", "dvc"])):
        folder = tmp_path / name
        (folder / ".dvc").mkdir(parents=True)
        (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
        (folder / "dvc.yaml").write_text(CELLS)
        lock = folder / "dvc.lock"

        if before != "none":
            repro_odd(folder, 1, "-m", "dvc", "repro")
        if before == "with a comment":
            lock.write_text(lock.read_text().replace("stages:\n", "stages: # by hand\n", 1))
        assert "Running stage" in repro_odd(folder, 2, *program, "repro", "-s", f"cell@{cell}")
        assert "didn't change" in repro_odd(folder, 2, *program, "repro", "-s", f"cell@{cell}")
        locks.append(lock.read_bytes())
    assert locks[0] == locks[1]
    if before != "with a comment":  # there DVC itself writes, and leaves anchors as they were
        assert_anchors_are_numbered(locks[0].decode())
    assert locks[0].count(b"other: 2") == 1
    assert locks[0].count(b"other: 1") == (0 if before == "none" else 2)
    if before == "as DVC does":
        order = graph.lock_order(tmp_path / "ours")
        assert order == ["cell@first", "cell@second", f"cell@{LONG}"]
        graph.sort_lock(tmp_path / "ours", order[::-1], order)
        assert graph.lock_order(tmp_path / "ours") == order[::-1]
        assert_anchors_are_numbered((tmp_path / "ours/dvc.lock").read_text())
        assert yaml.safe_load((tmp_path / "ours/dvc.lock").read_text()) == yaml.safe_load(locks[0])


def test_only_a_lock_that_dvc_wrote_is_split(tmp_path):
    path = tmp_path / "dvc.lock"
    sound = "schema: '2.0'\nstages:\n  a@b:\n    cmd: x\n  '003':\n    cmd: y\n"
    path.write_text(sound)
    assert child.read_entries(str(path)) == {"a@b": "  a@b:\n    cmd: x\n", "003": "  '003':\n    cmd: y\n"}
    for other in (
        "", sound.rstrip("\n"), sound + "datasets:\n", sound + "<<<<<<< HEAD\n", sound + "  a@b:\n    cmd: z\n",
        sound.replace("'2.0'", "'3.0'"), sound.replace("stages:", "x: 1\nstages:"),
    ):  # fmt: skip
        path.write_text(other)
        assert child.read_entries(str(path)) is None, other
    assert child.read_entries(str(tmp_path / "none")) is None


@pytest.mark.e2e
def test_a_dry_run_says_what_an_edit_of_the_code_reruns(project):
    method = project.folder / "omrl/algorithms/focal.py"
    text = method.read_text()
    method.write_text(f"{text}\n# a comment\n")
    lines = project.omrl("repro", SMOKE, "--dry").stdout.splitlines()
    assert [line.partition(": ")[0].split()[-1] for line in lines[:-1]] == ["code"]
    assert lines[-1].startswith(f"{SMOKE}: 1 cells would run, 0 may")
    method.write_text(f"{text}\nOTHER = 1\n")
    lines = project.omrl("repro", SMOKE, "--dry").stdout.splitlines()
    told = {line.partition(": ")[0].split()[-1]: line.split()[0] for line in lines[:-1]}
    models = {cell for cell in told if cell.startswith(("meta_train@focal-", "evaluate@focal-"))}
    assert "meta_train@focal-expert-0" in models
    assert set(told) == {"code", *models, "report"}
    assert told["report"] == "may"
    assert "data/code/algorithms/focal.json will be another" in lines[1]
    ran = project.omrl("repro", SMOKE).stderr
    assert f"{len(told)} cells run" in ran


@pytest.mark.e2e
def test_a_dry_run_says_what_an_edit_of_the_params_reruns(project):
    """An edit reruns the plan; whether anything else follows depends on what the plan then says."""
    params = project.smoke / "params.yaml"
    text = params.read_text()

    def told(edited: str) -> dict[str, str]:
        params.write_text(edited)
        lines = project.omrl("repro", SMOKE, "--dry").stdout.splitlines()[:-1]
        return {line.partition(": ")[0].split()[-1]: line.split()[0] for line in lines}

    assert told(text.replace("samples: 200 }", "samples: 200, confidence: 0.9 }")) == {"plan": "runs", "report": "runs"}
    assert told(f"# a comment\n{text}") == {}
    swapped = text.replace("train: [expert, relabelled]", "train: [medium, relabelled]")
    assert swapped != text
    cells = told(swapped)
    assert all(cell in ("plan", "report") or "-medium-" in cell for cell in cells), cells
    assert "meta_train@focal-medium-0" in cells
    ran = project.omrl("repro", SMOKE).stderr
    assert f"{len(cells)} cells run" in ran
    params.write_text(text.replace("train: [expert, relabelled]", "train: [expart, relabelled]"))
    refused = project.omrl("repro", SMOKE, "--dry", check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "expart" in refused.stderr
