"""benchmarks/gpu.py without a GPU: how its page is written, and a rehearsal of all of its parts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2_toolkit.benchmarks import gpu
from dinov2_toolkit.benchmarks.gpu_training import kernels_of

SCRIPT = Path(gpu.__file__)


def part(code: str, page: gpu.Page, limit: float = 20.0) -> str:
    """Run a part that is so much Python."""
    return gpu.run_part(page, "search", [sys.executable, "-c", code], limit)


@pytest.fixture
def page(tmp_path: Path) -> gpu.Page:
    return gpu.Page(tmp_path / "gpu.md", "# Title")


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path / "results")], capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "results").exists()
    assert "finds no GPU: nothing is measured" in done.stderr


def test_rows_are_on_the_page_as_they_come_and_stay_when_a_part_is_stopped(page: gpu.Page) -> None:
    code = "import time; print('noise'); print('{\"a\": \"1\"}'); print('{\"a\":', flush=True); time.sleep(60)"
    start = time.monotonic()
    end = part(code, page, limit=4.0)
    assert time.monotonic() - start < 10
    assert end == "Stopped after its 4 s: what is not above was not measured."
    assert page.rows == {"search": [{"a": "1"}]}
    written = page.path.read_text()
    assert "| a |\n|---|\n| 1 |\n\nNot ended." in written and written.count("Not measured.") == len(gpu.PARTS) - 1


def test_a_part_that_fails_is_a_line(page: gpu.Page) -> None:
    end = part("print('{\"a\": \"1\"}', flush=True); raise ValueError('no `such` kernel')", page)
    assert end.startswith("Failed after ") and end.endswith("with status 1: `ValueError: no such kernel`")
    assert page.rows == {"search": [{"a": "1"}]}
    assert part("raise SystemExit(3)", page).endswith("with status 3: `no message`")


def test_a_part_that_ends_is_said_and_one_without_time_is_not_measured(page: gpu.Page) -> None:
    code = 'import sys; sys.stdout.write(\'{"a": "1"}\\n{"b": "2"}\\n\')'
    assert part(code, page).startswith("Ended after ")
    page.ends["search"] = "Ended."
    page.write()
    assert "| a | b |\n|---|---|\n| 1 |  |\n|  | 2 |\n\nEnded." in page.path.read_text()
    assert part("print('{}')", page, limit=0) == "Not measured: no time was left."


def test_the_parts_take_twelve_minutes() -> None:
    assert sum(each.seconds for each in gpu.PARTS) <= 60 * gpu.MINUTES == 720


def test_a_trace_says_how_long_kernels_ran_and_which(tmp_path: Path) -> None:
    def event(name: str, category: str, start: float, length: float) -> dict[str, object]:
        return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": length}

    events = [
        event("ProfilerStep#5", "user_annotation", 100, 50),
        event("ProfilerStep#6", "user_annotation", 150, 50),
        event("gemm|a", "kernel", 110, 20),
        event("gemm|a", "kernel", 120, 20),  # another stream: overlaps
        event("copy", "kernel", 160, 10),
        event("beyond", "cpu_op", 100, 100),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [*events, {"ph": "M", "name": "process"}]}))
    rows = list(kernels_of(tmp_path / "trace.json", "kernel"))
    assert [row["value"] for row in rows] == ["66.7%", "2", "80.0%", "20.0%"]
    assert rows[2]["figure"] == "time of all kernels in `gemm/a`"


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--rehearse", "--minutes", "120", "--output", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    written = (tmp_path / "gpu-rehearsal.md").read_text()
    assert not done.returncode, written + done.stderr
    assert written.count("\nEnded after ") == len(gpu.PARTS) and "says anything of a GPU" in written
    assert "| ViT-S/16 | compiled | " in written and (tmp_path / "gpu-trace.json.gz").exists()
    assert not (tmp_path / "gpu.md").exists()
