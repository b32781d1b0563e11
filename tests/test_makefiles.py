"""The Makefiles of examples/: which commands they run, and in which order."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
OWN_IMAGES = ["-f", str(EXAMPLES / "own-images.mk")]


def make(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def commands(*arguments: str, folder: Path) -> list[str]:
    """Return the commands that make would run."""
    printed = make("-n", "-B", *arguments, folder=folder).stdout.replace("\\\n", "")
    return [line for line in printed.splitlines() if line.startswith(("dinov2", "python"))]


def test_the_demo_makes_every_file_before_it_reads_it() -> None:
    made: set[str] = set()
    steps = commands(folder=EXAMPLES)
    for step in steps:
        outputs = re.findall(r"(?:-o|--html) (\S+)", step) or step.split()[2:3]
        read = set(re.findall(r"out/[\w.]+", step.split(">")[0])) - set(outputs)
        assert read <= made, step
        made.update(outputs)
    names = [" ".join(step.split()[1:3]) for step in steps]
    assert names.count("train pretrain") == 2 and names.count("curate embed") == 3
    assert steps[-1].startswith("python summary.py out")


def test_own_images_without_a_folder_says_what_to_give(tmp_path: Path) -> None:
    done = make(*OWN_IMAGES, folder=tmp_path)
    assert done.returncode == 2 and "IMAGES is not given; name a folder" in done.stderr
    done = make(*OWN_IMAGES, "IMAGES=a", "OUT=two words", folder=tmp_path)
    assert done.returncode == 2 and "without spaces" in done.stderr


def test_own_images_with_a_model_retrieves_by_seeds_or_balances(tmp_path: Path) -> None:
    seeded = commands(*OWN_IMAGES, "IMAGES=a", "MODEL=m", "SEEDS=s", folder=tmp_path)
    balanced = commands(*OWN_IMAGES, "IMAGES=a", "MODEL=m", folder=tmp_path)
    bare = commands(*OWN_IMAGES, "IMAGES=a", folder=tmp_path)
    steps = [[step.split()[2] for step in each if step.split()[1] == "curate"] for each in (seeded, balanced, bare)]
    assert sorted(steps[0]) == ["dedup", "embed", "embed", "embed", "map", "retrieve"]
    assert sorted(steps[1]) == ["cluster", "dedup", "embed", "embed", "map"]
    assert sorted(steps[2]) == ["dedup", "embed", "map"]


@pytest.mark.slow
def test_own_images_reads_a_folder_of_mixed_files_whose_name_has_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my  pictures' $x"
    (folder / "sub folder").mkdir(parents=True)
    rows = pq.read_table(EXAMPLES / "data" / "clipart.parquet").slice(0, 40).to_pylist()
    for number, row in enumerate(rows):
        (folder / "sub folder" / f"{number} é.png").write_bytes(row["image"]["bytes"])
    copy = Image.open(io.BytesIO(rows[0]["image"]["bytes"])).convert("RGBA")
    page = Image.new("RGBA", copy.size, "white")
    page.alpha_composite(copy)
    page.convert("RGB").save(folder / "copy.jpg", quality=80)
    (folder / "notes.txt").write_text("no picture")
    (folder / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "-half.png").write_bytes(rows[1]["image"]["bytes"][:300])

    name = str(folder).replace("$", "$$")
    done = make(*OWN_IMAGES, f"IMAGES={name}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    files, removed = (pq.read_table(tmp_path / "out" / f"files{kind}.parquet") for kind in ("", ".removed"))
    assert (files.num_rows, removed.num_rows) == (41, 3)
    assert pq.read_table(tmp_path / "out" / "unique.parquet").num_rows <= 40
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert "dinov2" not in make(*OWN_IMAGES, f"IMAGES={name}", folder=tmp_path).stdout  # all is done

    (folder / "new.png").write_bytes(rows[0]["image"]["bytes"] + b" ")
    assert make(*OWN_IMAGES, f"IMAGES={name}", folder=tmp_path).returncode == 0
    assert pq.read_table(tmp_path / "out" / "files.parquet").num_rows == 42
