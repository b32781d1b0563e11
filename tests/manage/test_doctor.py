"""dinov2 doctor: every kind of line, made to appear."""

import errno
import fcntl
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from dinov2_toolkit.manage import doctor, machine, probes
from dinov2_toolkit.manage.machine import Finding
from dinov2_toolkit.store import catalog, files, lock, memory
from dinov2_toolkit.store.places import cache_path, catalog_path
from dinov2_toolkit.tests.embedded import write_embeddings

GPU = {"name": "H200", "free_bytes": 100 << 30, "total_bytes": 139 << 30, "bfloat16": True}
DEAD = 2**22 + 1  # no process has this id


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dinov2_toolkit", "doctor", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "DINOV2_CATALOG")}
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)


def by_check(findings: Any) -> dict[str, Finding]:
    return {each.check: each for each in findings}


def test_where_all_is_well_nothing_is_written_and_the_code_is_0(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"not looked at")
    before = tmp_path.stat().st_mtime_ns
    done = run("--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, found["problems"]) == (0, "", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"] and tmp_path.stat().st_mtime_ns > before
    for check in ("python", "torch", "duckdb", "pillow", "extra_hf", "image_formats", "CPU", "cores", "memory"):
        assert set(found["checks"][check]) == {"status", "found", "to_do", "figures"}, check
    assert found["checks"]["catalog"]["found"] == "none yet at .dinov2/catalog.duckdb"
    assert found["checks"]["pillow"]["figures"]["codecs"]["JPEG"].startswith("(libjpeg-turbo ")


def test_libraries_that_do_not_load_are_lines_and_code_1(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text("raise OSError('libcudart.so.12: no such file')")
    (modules / "faiss.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (modules / "duckdb.py").write_text("print('{'); raise ValueError('\\x1b[31m')")
    path = f"{modules}:{os.environ['PYTHONPATH']}" if "PYTHONPATH" in os.environ else str(modules)
    done = run(cwd=tmp_path, PYTHONPATH=path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert re.fullmatch(r"error: 5 of \d+ checks found a problem, first accelerate; install it .*\n", done.stderr)
    lines = done.stdout.splitlines()
    assert next(line for line in lines if " torch: " in line).startswith("problem  torch: 2.13")
    assert "does not load (OSError: libcudart.so.12: no such file); install it again: pip install " in done.stdout
    assert "does not load (its process ends by -11)" in done.stdout
    assert "does not load (ValueError: \\x1b[31m)" in done.stdout
    assert any(re.fullmatch("warning  encoding: .*; set PYTHONUTF8=1, or names are shown escaped", x) for x in lines)
    assert any(line.startswith("problem  catalog: ") for line in lines)


def test_a_library_that_hangs_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "LOAD_S", 0.5)
    assert doctor._probe("hangs") == "does not load within 0.5 seconds"


def test_a_library_of_the_wrong_version_or_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typer-0.1.dist-info").mkdir()
    (tmp_path / "typer-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: typer\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_check(doctor._software({}))
    assert found["typer"] == Finding("typer", "0.1, but >=0.20 is needed", problem="pip install 'typer>=0.20'")
    missing = doctor._library(Requirement("rich>=13"), None, False, {})
    assert (missing.found, missing.to_do) == ("not installed", "pip install 'rich>=13'")
    extras = [each for check, each in found.items() if check.startswith("extra ")]
    assert {each.found.partition(" (")[0] for each in extras} <= {"installed", "not installed"}
    assert all("pip install 'dinov2-toolkit[" in each.found for each in extras if each.found != "installed")


def test_images_that_pillow_cannot_decode_here_are_a_warning() -> None:
    found = doctor._codecs({"codecs": {"JPEG": "6.2", "AVIF": None}, "formats": 40})
    assert (found.status, found.to_do) == ("warning", "pip install --upgrade pillow")
    assert found.found == "JPEG 6.2 and others, 40 in all; without AVIF"
    assert doctor._codecs("does not load").status == "problem"


@pytest.mark.parametrize(
    ("facts", "driver", "variables", "words"),
    [
        (
            {"devices": [GPU]},
            "x 570.1",
            {},
            "ok GPU 0: H200, 100.0 GiB free of 139.0, CUDA 12, driver 570.1",
        ),
        ({"devices": [{**GPU, "free_bytes": 1}]}, "", {}, "warning GPU 0: .* others use it"),
        ({"devices": [{**GPU, "bfloat16": False}]}, "", {}, "ok GPU 0: .*no bfloat16: models compute in float16"),
        ({}, "", {}, "ok GPU: none, all runs on the CPU"),
        ({}, "570", {"CUDA_VISIBLE_DEVICES": ""}, "warning GPU: hidden by CUDA_VISIBLE_DEVICES; unset it"),
        ({"cuda": None}, "570", {}, "warning GPU: this torch was built without CUDA; install one for CUDA"),
        ({"reason": "too old"}, "570", {}, r"warning GPU: torch cannot use it \(too old\); update the driver"),
    ],
)
def test_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, Any],
    driver: str,
    variables: dict[str, str],
    words: str,
) -> None:
    if driver:
        (tmp_path / "version").write_text(driver)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    torch = {"cuda": "12", "cpu": "AVX2", "reason": "", "devices": [], **facts}
    first = next(machine.gpu_findings(torch, {"built_for_gpus": True, "gpus": 1}))
    assert re.match(words, f"{first.status} {first.check}: {first.found}; {first.to_do}")


def test_a_faiss_that_sees_no_gpu_is_a_warning() -> None:
    torch = {"cuda": "12", "cpu": "AVX2", "reason": "", "devices": [GPU]}
    found = by_check(machine.gpu_findings(torch, {"gpus": 0}))["FAISS on GPUs"]
    assert (found.status, found.to_do) == ("warning", "pip install faiss-gpu")
    assert list(machine.gpu_findings("does not load", {"gpus": 0})) == []


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_found() -> None:
    found = list(machine.gpu_findings(probes.torch(), probes.faiss()))
    assert found[0].check == "GPU 0" and found[0].figures["total_bytes"]


def test_cores_that_are_fewer_than_threads_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = os.sched_getaffinity(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    try:
        os.sched_setaffinity(0, {min(usable)})
        found = by_check(machine.limit_findings())["cores"]
    finally:
        os.sched_setaffinity(0, usable)
    assert found.figures == {"usable": 1, "granted": 1.0}
    assert found.to_do == "set OMP_NUM_THREADS=1 instead of 512: threads wait for each other"


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_are_found_in_any_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    own, names = tmp_path / "self", ("cpu.cfs_quota_us", "memory.limit_in_bytes", "memory.usage_in_bytes")
    own.write_text("4:memory:/job/step\n3:cpu,cpuacct:/job/step\n0::/\n" if version == 1 else "0::/job/step\n")
    cpu, ram = (tmp_path / name if version == 1 else tmp_path for name in ("cpu", "memory"))
    if version == 2:
        names = ("cpu.max", "memory.max", "memory.current")
    for root in (cpu, ram):
        (root / "job" / "step").mkdir(parents=True, exist_ok=True)
    (cpu / "job" / "step" / names[0]).write_text("-1\n" if version == 1 else "max 100000\n")
    (cpu / "job" / names[0]).write_text("50000\n" if version == 1 else "25000 50000\n")
    (ram / "job" / names[1]).write_text(f"{1 << 30}\n")
    (ram / "job" / names[2]).write_text(f"{1 << 29}\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    found = by_check(machine.limit_findings())
    assert "in the time of 0.5" in found["cores"].found and found["cores"].to_do == "set OMP_NUM_THREADS=1"
    assert found["memory"].figures == {"total_bytes": 1 << 30, "free_bytes": 1 << 29}
    (ram / "job" / names[2]).write_text(f"{1 << 30}\n")
    assert by_check(machine.limit_findings())["memory"].to_do.startswith("end other processes")


def test_few_open_files_are_a_warning() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
    try:
        found = by_check(machine.limit_findings())["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.found, found.to_do) == ("at most 500", "ulimit -n 1024")


def test_folders_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_CATALOG", "/sys/catalog.duckdb")  # where not even root may
    monkeypatch.setenv("DINOV2_CACHE", "/dev/null/cache")
    found = by_check(machine.folder_findings())
    assert found["catalog folder"].status == found["cache folder"].status == "problem"
    assert found["catalog folder"].found == "nothing can be written there (Permission denied)"
    assert found["catalog folder"].to_do == "set DINOV2_CATALOG to a file in another"
    weights = found["weights folder"]
    assert (weights.status, weights.to_do) == ("warning", "set DINOV2_CACHE to another")


def test_without_a_home_folder_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: DEAD)  # of a user whom the system does not know
    found = by_check(machine.folder_findings())["weights folder"]
    assert found.status == "warning" and "no home folder is known" in found.found


def test_folders_where_locks_do_not_hold_or_that_are_full_or_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert by_check(machine.folder_findings())["working folder"].status == "ok"
    assert machine._file_system(Path("/proc")) == "proc"

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        found = by_check(machine.folder_findings())["working folder"]
    assert found.figures["locks"] is False and found.found.endswith("where locks do not hold")
    assert found.to_do == "work in a folder of your own, or run one command at a time"
    with monkeypatch.context() as patched:
        patched.setattr(machine, "LEAST_FREE", 1 << 70)
        assert by_check(machine.folder_findings())["working folder"].to_do.startswith("make room, or ")
    monkeypatch.setattr(machine, "NETWORK", re.compile(".*"))
    found = by_check(machine.folder_findings())["catalog folder"]
    assert found.to_do == "set DINOV2_CATALOG to a file in another on a local disk, which is faster"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs", "cifs"])
def test_network_file_systems_are_known(kind: str) -> None:
    assert machine.NETWORK.fullmatch(kind) and not machine.NETWORK.fullmatch("ext4")


def looked_at() -> Finding:
    return doctor._catalog(json.loads(json.dumps(probes.catalog())))


def test_a_catalog_with_artifacts_that_are_gone_or_damaged(tmp_path: Path) -> None:
    for name in ("here", "gone", "damaged"):
        write_embeddings(tmp_path / f"{name}.parquet", np.ones((1, 2), np.float32))
    assert (looked_at().status, looked_at().figures["gone"]) == ("ok", 0)
    (tmp_path / "gone.parquet").unlink()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    found = looked_at()
    assert (found.status, found.to_do) == ("warning", "make the damaged ones again")
    assert "of layout 1: 3 artifacts, 1 of them gone, 1 damaged, first " in found.found
    before = catalog_path().read_bytes()
    folder = os.open(catalog_path().parent, os.O_RDONLY)
    assert lock.try_lock(folder)
    assert looked_at().found.endswith("is in use by another process") and looked_at().status == "warning"
    os.close(folder)
    assert catalog_path().read_bytes() == before


def test_a_catalog_that_is_broken_newer_older_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with catalog.connect() as connection:
        connection.execute("drop table migrations")
    assert "of layout 0: 0 artifacts" in looked_at().found
    with catalog.connect() as connection:
        connection.execute("insert into migrations values (99, now()::timestamp)")
    found = looked_at()
    assert found.status == "problem" and "has layout 99, and this toolkit knows up to 1" in found.found
    catalog_path().write_bytes(b"no database" * 1000)
    found = looked_at()
    assert found.status == "warning" and found.to_do.startswith("the next command sets it aside")
    assert catalog_path().read_bytes() == b"no database" * 1000 and len(list(catalog_path().parent.iterdir())) == 2
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path))
    assert looked_at().problem == "set DINOV2_CATALOG to another"


def test_leftovers_and_unfinished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [each.status for each in doctor._left()] == ["ok", "ok"]
    (tmp_path / f".dinov2-{files.HOST}-{DEAD}-0.tmp").touch()
    (tmp_path / f".dinov2-{files.HOST}-{os.getppid()}-0.tmp").touch()  # of one that lives
    (cache_path() / f"progress-{0:032}").mkdir(parents=True)
    for name, status in (("killed", {"pid": DEAD}), ("stopped", {"exit_code": 75}), ("done", {"exit_code": 0})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "status.json").write_text(json.dumps(status))
    (tmp_path / "runs" / "pipe").mkdir()
    os.mkfifo(tmp_path / "runs" / "pipe" / "status.json")
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "status.json").write_text(json.dumps({"pid": os.getpid()}))
    with lock.held(tmp_path / "live" / ".lock", "training"):
        found = by_check(doctor._left())
    assert found["leftovers"].found == "2 of stopped or killed commands"
    assert found["leftovers"].to_do.startswith("the same commands go on from them; `dinov2 catalog gc` removes")
    assert found["unfinished runs"].found == "runs/killed, runs/stopped"
    assert found["unfinished runs"].to_do == "go on with `dinov2 train ... -o runs/killed --resume`"


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="UTF-8"))
    monkeypatch.setenv("DINOV2_STEPZ", "9")
    monkeypatch.setenv("DINOV2_BASE_LR", "0.1")
    monkeypatch.setenv("DINOV2_CACHE_BYTES", "1GB")
    monkeypatch.setenv("DINOV2_MIRROR", "https://me:secret@mirror/x")
    found = by_check(doctor._environment())
    assert (found["encoding"].status, found["DINOV2_BASE_LR"].found) == ("ok", "'0.1'")
    assert found["DINOV2_STEPZ"].to_do == "unset it (did you mean 'DINOV2_STEPS'?)"
    assert found["DINOV2_CACHE_BYTES"].problem == "give one, or unset it"
    assert found["DINOV2_MIRROR"].found == "'https://...@mirror/x'"
