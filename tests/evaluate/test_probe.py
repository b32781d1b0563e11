"""`dinov2 evaluate probe`: what is measured, what is left out, and what is written."""

import gc
import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_toolkit import cli
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate import linear
from dinov2_toolkit.evaluate import probe as probe_module
from dinov2_toolkit.evaluate.knn import usable_ks
from dinov2_toolkit.evaluate.probe import ProbeSettings, parse_ks, probe
from dinov2_toolkit.evaluate.scores import bootstrap_interval
from dinov2_toolkit.features.extract.extract import FeatureModel, open_model
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options, Result
from dinov2_toolkit.store.manifest import ROW_FIELD, SCORE_FIELDS, ManifestWriter, Provenance, open_manifest
from dinov2_toolkit.tests.embedded import write_embeddings

ONE = ProbeSettings(ks=(1,))
SMALL_VIT = "random:vit_tiny/14"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def points(*degrees: float) -> np.ndarray:
    """Vectors on the unit circle: their cosine is plain to see."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def embedded(name: str, degrees: list[float], labels: list[str | None], model: str = "a model") -> str:
    return str(write_embeddings(Path(f"{name}.parquet"), points(*degrees), labels=labels, role="eval", model=model))


def rows(path: str = "scores.parquet") -> list[dict[str, object]]:
    """Return the measurements of all classes together."""
    listed: list[dict[str, object]] = pq.read_table(path).to_pylist()
    return [row for row in listed if row["true_class"] is None]


def measure(train: str, test: str, settings: ProbeSettings = ONE, options: Options | None = None) -> Result:
    result = probe(train, test, "scores.parquet", settings, options or Options())
    assert result is not None
    return result


def words(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def draw_classes(folder: Path, num_images: int, seed: int) -> Path:
    """Noisy images in three folders, each class a little redder, greener or bluer than the others."""
    random = np.random.default_rng(seed)
    for number in range(num_images):
        pixels = random.integers(0, 200, (28, 28, 3))
        pixels[:, :, number % 3] += 8
        path = folder / ("red", "green", "blue")[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def test_rows_without_a_label_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    train = embedded("train", [0, 10, 90, 100], ["a", None, "b", "b"])
    test = embedded("test", [10, 11, 12, 80, 85], ["a", None, None, "b", "a"])
    result = measure(train, test)
    said = words(capsys)
    assert "train: 1 of 4 rows have no label and are left out" in said
    assert "test: 2 of 5 rows have no label and are left out" in said
    (row,) = rows()
    assert (row["num_train"], row["num_test"]) == (3, 3)
    assert result.value == row["value"] == 2 / 3


def test_labels_that_are_all_null_are_an_error_and_leave_nothing() -> None:
    train, test = embedded("train", [0, 90], ["a", "b"]), embedded("test", [0, 90], [None, None])
    with pytest.raises(ToolkitError, match=r"none of the 2 rows of test\.parquet has a label"):
        measure(train, test)
    with pytest.raises(ToolkitError, match=r"none of the 2 rows of test\.parquet has a label"):
        measure(test, train)
    assert not Path("scores.parquet").exists()


def test_a_single_training_class_is_an_error() -> None:
    train, test = embedded("train", [0, 90], ["a", "a"]), embedded("test", [0, 90], ["a", "b"])
    with pytest.raises(ToolkitError, match="all 2 labelled images of .* are 'a'"):
        measure(train, test)


def test_test_classes_that_no_training_image_has_count_as_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    train = embedded("train", [0, 10, 80, 90], ["a", "a", "b", "b"])
    test = embedded("test", [5, 85, 0, 1], ["a", "b", "c", "d"])
    assert measure(train, test).value == 0.5
    assert "2 of 4 test images are of a class that no training image has (c, d); they count as wrong" in words(capsys)
    assert rows()[0]["num_test"] == 4


def test_a_k_above_the_training_set_is_left_out_by_default_and_refused_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert usable_ks(None, 50) == (10, 20)
    assert "k 100, 200 left out: there are 50 training images" in words(capsys)
    assert usable_ks(None, 7) == (7,)
    assert usable_ks((3, 7), 7) == (3, 7)
    with pytest.raises(ToolkitError, match="k 8, 9 is above the 7 training images; choose a lower --k"):
        usable_ks((3, 8, 9), 7)


def test_one_row_is_written_for_each_k() -> None:
    train = embedded("train", [0, 10, 10, 90], ["a", "b", "b", "a"])
    test = embedded("test", [1, 2], ["a", "a"])
    measure(train, test, ProbeSettings(ks=(1, 4)))
    assert [json.loads(str(row["parameters"]))["k"] for row in rows()] == [1, 4]
    assert [row["value"] for row in rows()] == [1.0, 0.0]  # of the four nearest, the two b weigh more in sum


def test_lists_of_k_are_read_and_nonsense_is_refused() -> None:
    assert parse_ks("10, 20,10") == (10, 20)
    for text in ("", "0", "1,,2", "ten", "-1", "1.5", "²"):
        with pytest.raises(ToolkitError, match="--k"):
            parse_ks(text)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_embeddings_and_images_with_their_model_score_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(linear, "MIN_STEPS", 100)
    train, test = draw_classes(tmp_path / "train", 60, seed=0), draw_classes(tmp_path / "test", 45, seed=1)
    settings = EmbedSettings(model="pixels", dtype="float32", num_workers=2)
    for folder in (train, test):
        embed_images([str(folder)], f"{folder.name}.parquet", settings, Options())
    stored = measure("train.parquet", "test.parquet", ProbeSettings(methods=(method,), ks=(1, 20)))
    of_embeddings = rows()
    assert 1 / 3 < (stored.value or 0) < 1  # so that the comparison says something
    asked = ProbeSettings(("pixels",), (method,), (1, 20), num_workers=2)
    measure(str(train), str(test), asked, Options(force=True))
    assert rows() == of_embeddings
    measure("train.parquet", "test.parquet", asked, Options(force=True))
    assert rows() == of_embeddings


def test_every_method_names_itself_and_the_best_accuracy_is_the_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "MIN_STEPS", 50)
    train, test = draw_classes(tmp_path / "train", 30, seed=0), draw_classes(tmp_path / "test", 12, seed=1)
    methods = ("knn", "linear", "logreg", "retrieval")
    result = measure(str(train), str(test), ProbeSettings((SMALL_VIT,), methods, num_workers=1))
    found = {(row["method"], row["metric"]) for row in rows()}
    accuracies = {(method, "top1") for method in methods[:3]}
    assert found == accuracies | {("retrieval", metric) for metric in ("map", "recall@1", "recall@5", "recall@10")}
    assert result.value == max(float(str(row["value"])) for row in rows() if row["metric"] == "top1")
    parameters = {str(row["method"]): json.loads(str(row["parameters"])) for row in rows()}
    assert parameters["linear"]["grid"]["blocks"] == [1, 4]
    assert parameters["linear"]["grid"]["mean_patch"] == [False, True]
    assert parameters["logreg"]["C"] > 0
    assert all(float(str(row["low"])) <= float(str(row["value"])) <= float(str(row["high"])) for row in rows())


def test_of_features_for_the_linear_grid_the_others_see_the_last_class_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "MIN_STEPS", 50)
    train, test = draw_classes(tmp_path / "train", 20, seed=0), draw_classes(tmp_path / "test", 12, seed=1)
    measure(str(train), str(test), ProbeSettings((SMALL_VIT,), ("knn", "linear"), (1, 3), num_workers=1))
    beside = [row for row in rows() if row["method"] == "knn"]
    alone = ProbeSettings((SMALL_VIT,), ("knn",), (1, 3), num_workers=1)
    measure(str(train), str(test), alone, Options(force=True))
    assert rows() == beside


def test_few_images_a_class_are_asked_for_with_knn_alone() -> None:
    train, test = embedded("train", [0, 5, 80, 90], ["a", "a", "b", "b"]), embedded("test", [3, 85], ["a", "b"])
    measure(train, test, ProbeSettings(ks=(1,), per_class=1))
    assert [(row["metric"], row["value"], row["num_train"]) for row in rows()] == [("top1", 1, 2), ("top1_std", 0, 2)]
    with pytest.raises(ToolkitError, match="--per-class 1 is for --method knn"):
        measure(train, test, ProbeSettings(methods=("logreg",), per_class=1), Options(force=True))


def test_one_model_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = draw_classes(tmp_path / "train", 9, seed=0), draw_classes(tmp_path / "test", 6, seed=1)
    opened: list[weakref.ref[object]] = []
    most = 0

    def counting(name: str | None, seed: int) -> FeatureModel:
        nonlocal most
        model = open_model(name, seed)
        opened.append(weakref.ref(model.backbone))
        gc.collect()
        most = max(most, sum(each() is not None for each in opened))
        return model

    monkeypatch.setattr(probe_module, "open_model", counting)
    models = (SMALL_VIT, "random:vit_tiny/28", "pixels")
    measure(str(train), str(test), ProbeSettings(models, ks=(1,), num_workers=1))
    assert len(rows()) == 3
    assert most == 1


def test_a_selection_takes_its_vectors_from_its_base() -> None:
    base = open_manifest(Path(embedded("base", [0, 45, 90], ["a", "wrong", "b"])))
    table = base.read(["image_id", "uri", "label"]).take([2, 0]).append_column(ROW_FIELD, pa.array([2, 0]))
    provenance = Provenance("selection", "curate dedup", {}, base=base.source("base"))
    with ManifestWriter(Path("chosen.parquet"), list(table.schema), provenance) as writer:
        writer.write(table)
    catalog.record(Path("chosen.parquet"), writer.provenance, None)
    test = embedded("test", [10, 44, 80], ["a", "a", "b"])
    assert measure("chosen.parquet", test).value == 1.0
    assert rows()[0]["num_train"] == 2


def test_several_models_give_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = draw_classes(tmp_path / "train", 9, seed=0), draw_classes(tmp_path / "test", 6, seed=1)
    result = measure(str(train), str(test), ProbeSettings(("pixels", SMALL_VIT), ks=(1, 3), num_workers=1))
    said = capsys.readouterr().err
    assert [row["model"] for row in rows()] == ["pixels", "pixels", SMALL_VIT, SMALL_VIT]
    assert result.value == max(float(str(row["value"])) for row in rows())
    assert said.count("95 % interval") == 1
    assert all(name in said for name in ("pixels", SMALL_VIT, "k=1", "k=3"))
    assert result.figures["rows"] == [{**row, "parameters": json.loads(str(row["parameters"]))} for row in rows()]


def test_unreadable_images_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = draw_classes(tmp_path / "train", 9, seed=0), draw_classes(tmp_path / "test", 6, seed=1)
    (train / "blue" / "empty.png").touch()
    measure(str(train), str(test), ProbeSettings(("pixels",), ks=(1,), num_workers=1))
    assert "train: 1 images left out, first" in words(capsys)
    assert rows()[0]["num_train"] == 9


def test_top_5_is_measured_where_there_are_more_than_five_classes() -> None:
    classes = [str(number) for number in range(7)]
    degrees = [10.0 * number for number in range(7)]
    train = embedded("train", degrees, list(classes))
    test = embedded("test", [21, 1, 2], ["2", "4", "5"])
    measure(train, test, ProbeSettings(ks=(7,)))
    assert [(row["metric"], row["value"]) for row in rows()] == [("top1", 1 / 3), ("top5", 2 / 3)]


def test_the_interval_contains_the_value_and_narrows_with_more_images() -> None:
    widths = []
    for num_images in (10, 100, 10_000):
        correct = np.arange(num_images) % 5 > 0
        low, high = bootstrap_interval(correct, seed=0)
        assert low < 0.8 < high
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 10_000), rel=0.05)
    assert bootstrap_interval(np.ones(8, bool), seed=0) == (1.0, 1.0)


def test_a_second_run_is_up_to_date_and_another_needs_force(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = embedded("train", [0, 90], ["a", "b"]), embedded("test", [10, 80], ["a", "b"])
    first = measure(train, test)
    before = Path("scores.parquet").read_bytes()
    capsys.readouterr()
    assert measure(train, test) == first
    assert "scores.parquet is up to date" in words(capsys)
    assert Path("scores.parquet").read_bytes() == before
    with pytest.raises(ToolkitError, match=r"was made differently \(k .*--force"):
        measure(train, test, ProbeSettings(ks=(2,)))
    assert Path("scores.parquet").read_bytes() == before
    measure(train, test, ProbeSettings(ks=(2,)), Options(force=True))
    assert json.loads(str(rows()[0]["parameters"]))["k"] == 2


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = embedded("train", [0, 90], ["a", "b"]), embedded("test", [10, 80], ["a", "b"])
    assert probe(train, test, "scores.parquet", ONE, Options(dry_run=True)) is None
    assert "would train knn on 2 embeddings, test on 2 and write the scores to scores.parquet" in words(capsys)
    assert not Path("scores.parquet").exists()


def test_scores_have_the_declared_columns_and_provenance() -> None:
    train, test = embedded("train", [0, 90], ["a", "b"]), embedded("test", [10, 80], ["a", "b"])
    measure(train, test)
    made = open_manifest(Path("scores.parquet"))
    assert made.schema.remove_metadata() == pa.schema(SCORE_FIELDS)
    assert made.provenance is not None
    assert made.provenance.figures == {"a model knn k=1 top1": 1.0}
    assert [source.role for source in made.provenance.inputs] == ["train", "test", "model"]
    (row,) = rows()
    assert (row["model"], row["method"], row["metric"]) == ("a model", "knn", "top1")
    assert json.loads(str(row["parameters"])) == {"k": 1, "temperature": 0.07, "similarity": "cosine"}


def test_embeddings_of_two_models_are_not_compared() -> None:
    train, test = embedded("train", [0, 90], ["a", "b"]), embedded("test", [10, 80], ["a", "b"], model="another")
    with pytest.raises(ToolkitError, match=r"two models \(a model, another\)"):
        measure(train, test)


def test_one_split_without_embeddings_is_an_error(tmp_path: Path) -> None:
    train, test = embedded("train", [0, 90], ["red", "blue"]), draw_classes(tmp_path / "test", 3, seed=0)
    with pytest.raises(ToolkitError, match="has no embeddings, but the other split has; embed --test too"):
        measure(train, str(test))


def test_the_best_accuracy_is_all_that_stdout_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = embedded("train", [0, 10, 10, 90], ["a", "b", "b", "a"])
    test = embedded("test", [1, 2, 9], ["a", "a", "a"])
    monkeypatch.setattr(sys, "argv", ["dinov2", "evaluate", "probe", "--train", train, "--test", test, "--k", "4,1"])
    assert cli.run() == 0
    assert [row["value"] for row in rows()] == [0.0, 2 / 3]
    assert capsys.readouterr().out == "0.6667\n"


def test_test_images_that_are_training_images_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    train = embedded("train", [0, 10, 90, 100], ["a", "a", "b", "b"])
    apart = write_embeddings(Path("apart.parquet"), points(1, 91), labels=["a", "b"], image_ids=["f" * 32, "e" * 32])
    measure(train, str(apart), options=Options(force=True))
    warning = "test images are training images too; leave them out, or the scores are too good"
    assert warning not in capsys.readouterr().err
    measure(train, train, options=Options(force=True))
    assert f"4 of 4 {warning}" in capsys.readouterr().err
    moved = pq.read_table(train)
    moved = moved.set_column(moved.column_names.index("uri"), "uri", pa.array([f"/moved/{row}" for row in range(4)]))
    pq.write_table(moved.slice(1), "moved.parquet")  # the same bytes by other names
    measure(train, "moved.parquet", options=Options(force=True))
    assert f"3 of 3 {warning}" in capsys.readouterr().err
