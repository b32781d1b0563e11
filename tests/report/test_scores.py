"""What a report says of scores, against scores written by hand."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.report.scores import MAX_SIDE, score_sections
from dinov2_toolkit.store.manifest import Manifest, open_manifest

Row = dict[str, object]


def scored(path: Path, rows: list[Row]) -> Manifest:
    """Write scores as an older toolkit, or another one, would."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return open_manifest(path)


def row(model: str, value: float, k: int = 20, **more: object) -> Row:
    parameters = json.dumps({"k": k})
    known: Row = {"model": model, "method": "knn", "parameters": parameters, "metric": "top1", "value": value}
    return {**known, "low": value - 0.02, "high": value + 0.02, "num_train": 90, "num_test": 1000, **more}


def words(*files: Manifest) -> str:
    return "\n".join(
        part for section in score_sections({each.path.stem: each for each in files}) for part in section.parts
    )


def test_the_best_setting_of_each_model_stands_first_with_its_interval(tmp_path: Path) -> None:
    shown = words(scored(tmp_path / "a.parquet", [row("m", 0.5, 10), row("m", 0.613, 20), row("n", 0.55)]))
    first, _, rest = shown.partition("All scores")
    assert "61.3 %" in first and "59.3 to 63.3" in first and "k=20" in first and "k=10" not in first
    assert "50.0 %" in rest and "no figures by class" in shown


def test_several_files_are_compared_and_foreign_settings_stand_as_they_are(tmp_path: Path) -> None:
    ours = scored(tmp_path / "a.parquet", [row("m", 0.5)])
    theirs = scored(tmp_path / "b.parquet", [{"method": "mine", "metric": "f1", "value": 0.25, "model": "m"}])
    shown = words(ours, theirs)
    assert "a: m" in shown and ">mine<" in shown and ">0.25<" in shown
    assert "There are no scores" in words(scored(tmp_path / "none.parquet", []))
    assert score_sections({}) == []


def test_scores_without_a_value_are_left_out_and_texts_refused(tmp_path: Path) -> None:
    empty: Row = {"metric": None, "value": None, "low": None, "high": None}
    rows = [row("m", 0.5) | empty, row("m", 0.6), row("n", 0.7) | {"metric": None}]
    shown = words(scored(tmp_path / "a.parquet", rows))
    assert "60.0 %" in shown and ">0.7<" in shown
    with pytest.raises(ToolkitError, match="`value` of .*b.parquet is string"):
        words(scored(tmp_path / "b.parquet", [row("m", 0.5) | {"value": "high"}]))
    with pytest.raises(ToolkitError, match="`low` column of .*c.parquet is string and cannot be read as double"):
        words(scored(tmp_path / "c.parquet", [row("m", 0.5) | {"low": "low"}]))


def test_classes_are_listed_from_the_hardest_and_confusions_drawn(tmp_path: Path) -> None:
    of: Row = {"metric": "recall", "true_class": "cat", "predicted_class": None}
    rows = [
        row("m", 0.7, true_class=None, predicted_class=None),
        row("m", 0.9) | of,
        row("m", 0.5) | of | {"true_class": "dog"},
        row("m", 0.4) | {"metric": "confusion", "true_class": "dog", "predicted_class": "cat"},
    ]
    shown = words(scored(tmp_path / "a.parquet", rows))
    table = shown[shown.index("Recall by class") :]
    assert table.index(">dog<") < table.index(">cat<")
    spec = json.loads(shown.split('<script type="application/json">')[2].split("</script>")[0])
    assert spec["data"]["values"] == [{"a": "cat", "b": "dog", "c": 40.0}]
    assert "40.0 %" in shown


def test_of_many_classes_the_most_confused_pairs_are_listed(tmp_path: Path) -> None:
    names = [f"class {number:03}" for number in range(MAX_SIDE + 2)]
    rows = [row("m", 0.5, metric="recall", true_class=name, predicted_class=None) for name in names]
    for place, name in enumerate(names):
        value = place / 100
        rows.append(row("m", value, metric="confusion", true_class=name, predicted_class=names[place - 1]))
    shown = words(scored(tmp_path / "a.parquet", rows))
    pairs = shown[shown.index("most frequent confusions") :]
    assert pairs.index("31.0 %") < pairs.index("30.0 %") and '<figure class="chart">' not in shown
