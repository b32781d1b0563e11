"""The process of a command: its streams, and how it ends by signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PREPARE = "import os, sys, time\nfrom dinov2_toolkit import process\nprocess.prepare()\n"
BOUNDARY = """
import sys
from dinov2_toolkit import __main__, cli
def command(arguments):
    import time
    print("at work", file=sys.stderr, flush=True)
    {work}
cli._called = command
__main__.main()
"""


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def started(work: str) -> subprocess.Popen[bytes]:
    """Start a command that does some work, and return when it is at it."""
    command = program(BOUNDARY.format(work=work))
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stderr is not None and running.stderr.readline() == b"at work\n"
    return running


@pytest.mark.parametrize(
    ("number", "by"), [(signal.SIGINT, ""), (signal.SIGTERM, " by SIGTERM"), (signal.SIGUSR1, " by SIGUSR1")]
)
def test_a_signal_ends_a_command_in_one_line(number: signal.Signals, by: str) -> None:
    running = started("time.sleep(60)")
    running.send_signal(number)
    assert running.communicate(timeout=10) == (b"", f"error: interrupted{by}; nothing more was saved\n".encode())
    assert running.returncode == 130


@pytest.mark.parametrize("swallowed", ["except BaseException: raise ImportError('no')", "except BaseException: 1 / 0"])
def test_an_interruption_that_a_library_turns_into_another_error_is_one(swallowed: str) -> None:
    running = started(f"\n    try: time.sleep(60)\n    {swallowed}")
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=10)[1] == b"error: interrupted; nothing more was saved\n"
    assert running.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a second signal waits for Python")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_what_hangs_in_a_library(number: signal.Signals) -> None:
    hanging = started("sum(range(10 ** 15))")  # in C, which never looks at signals
    time.sleep(0.5)
    hanging.send_signal(number)
    time.sleep(0.5)
    assert hanging.poll() is None
    hanging.send_signal(number)
    assert hanging.wait(timeout=5) == -number


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a second signal waits for Python")
def test_a_second_signal_ends_what_is_being_saved() -> None:
    saving = started(
        "\n    from dinov2_toolkit.features.launch import caught_signals"
        "\n    with caught_signals('step') as received:"
        "\n        print('ready', file=sys.stderr, flush=True)"
        "\n        while not received: time.sleep(0.01)"
        "\n    sum(range(10 ** 15))"
    )
    assert saving.stderr is not None and saving.stderr.readline() == b"ready\n"
    saving.send_signal(signal.SIGTERM)
    assert saving.stderr.readline() == b"SIGTERM: saving after this step; once more to end at once\n"
    time.sleep(0.5)
    saving.send_signal(signal.SIGINT)
    assert saving.wait(timeout=5) == -signal.SIGINT


def test_an_interruption_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "dinov2_toolkit", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, b"error: interrupted; nothing more was saved\n")


def test_closed_streams_are_no_files_of_others(tmp_path: Path) -> None:
    work = f"file = open({str(tmp_path / 'a')!r}, 'w')\nassert file.fileno() > 2\n"
    work += "print('out')\nprint('err', file=sys.stderr)"
    for closing, shown in ((">&-", (b"", b"err\n")), ("2>&-", (b"out\n", b"")), ("<&- >&- 2>&-", (b"", b""))):
        done = subprocess.run(["bash", "-c", f'"$@" {closing}', "-", *program(PREPARE + work)], capture_output=True)
        assert (done.returncode, (done.stdout, done.stderr)) == (0, shown)
    assert (tmp_path / "a").read_bytes() == b""


def test_streams_that_were_closed_are_open_in_processes_that_are_started(tmp_path: Path) -> None:
    work = "import subprocess\nsubprocess.run([sys.executable, '-c', 'import os; os.fstat(2)'], check=True)"
    subprocess.run(["bash", "-c", '"$@" 2>&-', "-", *program(PREPARE + work)], check=True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "x", "WORLD_SIZE is 'x', and a launcher sets it to a whole number; unset it"),
        ("SLURM_PROCID", "-1", "SLURM_PROCID is '-1', and a launcher sets it to a whole number; unset it"),
        ("RANK", "1", "RANK is 1 but WORLD_SIZE is not set; unset it, or start with torchrun"),
    ],
)
def test_variables_of_no_launcher_are_one_line(name: str, value: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dinov2_toolkit", "--version"], env=os.environ | {name: value}, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", f"error: {said}\n")


def test_a_signal_ends_a_query_that_runs(tmp_path: Path) -> None:
    query = "select sum(a.range * b.range) from range(10000000) a, range(10000000) b"
    work = "from dinov2_toolkit.store import tables\n"
    work += f"    with tables.connect() as c: tables.select(c, {query!r}).fetchall()"
    running = started(work)
    time.sleep(3)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=20)
    assert (running.returncode, said) == (130, b"error: interrupted; nothing more was saved\n")


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "é\\udcff".encode()), ("ascii", b"\\xe9")])
def test_any_name_can_be_printed(encoding: str, shown: bytes) -> None:
    command = program(PREPARE + "print('\\u00e9\\udcff')")
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, shown.replace(b"\\udcff", b"") + b"\xff\n")


def test_a_launcher_that_is_no_process_is_none() -> None:
    environment = {**os.environ, "DINOV2_LAUNCHED": "x"}
    ended = subprocess.run(program(f"{PREPARE}print('on')"), env=environment, capture_output=True, check=True)
    assert (ended.stdout, ended.stderr) == (b"on\n", b"")


def test_a_process_ends_with_its_launcher(tmp_path: Path) -> None:
    rank = PREPARE + "open('rank', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    launch = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {rank!r}], env={{**os.environ, "DINOV2_LAUNCHED": str(os.getpid())}})
time.sleep(60)
"""
    launcher = subprocess.Popen(program(launch), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "rank").exists() or not (tmp_path / "rank").read_text():
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while Path("/proc", (tmp_path / "rank").read_text()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
