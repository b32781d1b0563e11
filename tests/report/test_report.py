"""What `dinov2 report` takes, refuses and leaves alone."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.curate.inputs import distinct_names
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.page.document import page_provenance
from dinov2_toolkit.report.report import report
from dinov2_toolkit.report.targets import open_targets
from dinov2_toolkit.store.artifact import Options, write_run_provenance
from dinov2_toolkit.store.manifest import SCORE_FIELDS, ManifestWriter, Provenance
from dinov2_toolkit.tests.embedded import write_embeddings


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two manifests of one name, a run that has begun, and scores."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_embeddings(tmp_path / folder / "pool.parquet", np.eye(4, dtype=np.float32))
    (tmp_path / "run").mkdir()
    write_run_provenance(tmp_path / "run", Provenance("run", "train pretrain", {}))
    with ManifestWriter(tmp_path / "scores.parquet", list(SCORE_FIELDS), Provenance("scores", "evaluate probe", {})):
        pass
    return tmp_path


def test_targets_are_told_apart_and_named_shortly(here: Path) -> None:
    targets = open_targets(["a/pool.parquet", "run/", "b/pool.parquet", "scores.parquet", "run"])
    assert list(targets.runs) == ["run"] and list(targets.scores) == ["scores"]
    assert list(targets.manifests) == ["a/pool", "b/pool"]
    assert [source.role for source in targets.sources()] == ["run", "manifest", "manifest", "scores"]
    assert distinct_names([]) == [] and distinct_names([Path("/x/y"), Path("/z/y.parquet")]) == ["x/y", "z/y"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "no none"), ("a", "no run folder"), ("notes.txt", "readable"), ("sums.parquet", "no column uri")],
)
def test_what_is_none_of_the_three_is_one_line(here: Path, name: str, words: str) -> None:
    (here / "notes.txt").write_text("notes")
    pq.write_table(pa.table({"sum": [1]}), here / "sums.parquet")
    with pytest.raises(ToolkitError, match=words):
        report([name], "report.html", Options())
    assert not Path("report.html").exists()


def test_a_manifest_that_was_changed_since_it_was_written_is_one_line(here: Path) -> None:
    fields = [pa.field("uri", pa.string()), pa.field("row", pa.int64())]
    with ManifestWriter(here / "s.parquet", fields, Provenance("selection", "curate dedup", {})) as writer:
        writer.write(pa.table({"uri": ["/a.png"], "row": [0]}))
    assert open_targets(["s.parquet"]).manifests
    data = bytearray((here / "s.parquet").read_bytes())
    data[20] ^= 1
    (here / "s.parquet").write_bytes(data)
    with pytest.raises(ToolkitError, match=r"^\S*s.parquet is not as it was written; make it again$"):
        open_targets(["s.parquet"])


def test_a_report_is_made_again_when_its_targets_changed_and_never_over_other_files(here: Path) -> None:
    made = report(["a/pool.parquet", "run"], "report.html", Options())
    assert made is not None and made.figures == {"runs": 1, "manifests": 1, "scores": 0}
    before = Path("report.html").read_text()
    assert report(["a/pool.parquet", "run"], "report.html", Options()) == made
    assert Path("report.html").read_text() == before
    (here / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "total": 2.0}) + "\n")
    assert report(["a/pool.parquet", "run"], "report.html", Options(dry_run=True)) is None
    assert Path("report.html").read_text() == before
    assert report(["a/pool.parquet", "run"], "report.html", Options()) is not None
    there = page_provenance(Path("report.html"))
    assert there is not None and there.command == "report" and Path("report.html").read_text() != before

    Path("theirs.html").write_text("<title>theirs</title>")
    with pytest.raises(ToolkitError, match="--force"):
        report(["run"], "theirs.html", Options())
    assert Path("theirs.html").read_text() == "<title>theirs</title>"
    report(["run"], "theirs.html", Options(force=True))
    assert page_provenance(Path("theirs.html")) is not None
