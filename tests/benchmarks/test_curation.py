"""The arithmetic and the tables of benchmarks/curation.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2_toolkit.benchmarks import curation
from dinov2_toolkit.benchmarks.curation import Cell, gain, interval


def test_the_interval_is_students() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.7764: half = 2.7764 * sqrt(2.5 / 5) = 1.9632.
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 1.9632), abs=1e-4)


def test_gains_are_paired() -> None:
    # Differences 1, 2, 3, 4, -5: mean 1, sum of squares about it 50, half = 2.7764 * sqrt(50 / 4 / 5) = 4.39.
    assert gain([1.0, 12.0, 23.0, 34.0, 35.0], [0.0, 10.0, 20.0, 30.0, 40.0]) == "+1.0 (-3.4 to +5.4), 4"


def test_the_tables_have_what_all_seeds_finished(tmp_path: Path) -> None:
    cell = Cell(0.9, 300)
    for seed in curation.SEEDS:
        for arm, knn in (("raw", 50.0), ("curated", 52.0 + seed)):
            figures = {"images": 100.0, "wanted": 0.5, "evenness": 1.0, "knn": knn, "linear": 60.0 - seed}
            path = curation.place(tmp_path, cell, seed) / f"{arm}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(figures))
    (curation.place(tmp_path, cell, 0) / "random.json").write_text(json.dumps(figures))  # of one seed
    lines = curation.tables(tmp_path, [cell]).splitlines()
    assert "| 90% | 300 | union (curated) - raw pool | +4.0 (+2.0 to +6.0), 5 | +0.0 (+0.0 to +0.0), 0 |" in lines
    assert "| 90% | 300 | raw pool | 100 | 50.0% | 1.000 | 50.0 ± 0.0 | 58.0 ± 2.0 |" in lines
    assert "| 90% | 300 | union (curated) | 100 | 50.0% | 1.000 | 54.0 ± 2.0 | 58.0 ± 2.0 |" in lines
    assert len(lines) == 8  # two headers with their rules, an empty line, three rows


POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from dinov2_toolkit.benchmarks.curation import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def test_no_process_is_left_when_the_benchmark_is_ended(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.terminate()
    parent.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
