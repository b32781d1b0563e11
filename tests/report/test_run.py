"""What a report says of runs, against what was logged and set."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dinov2_toolkit.report.lineage import lineage, locate
from dinov2_toolkit.report.run import read_run, run_sections
from dinov2_toolkit.report.run_metrics import (
    MAX_POINTS,
    TABLE_ROWS,
    curve,
    figure_of,
    hours,
    is_constant,
    place_of,
    points,
    read_steps,
    sampled,
    thinned,
)
from dinov2_toolkit.report.run_settings import differences, differing, nearest_recipe, released_recipe
from dinov2_toolkit.report.targets import RunFolder, open_targets
from dinov2_toolkit.store.artifact import Options, read_run_provenance
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.tests.embedded import write_embeddings
from dinov2_toolkit.tests.train.small_run import noise_images, settings
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.distill import DistillConfig
from dinov2_toolkit.train.pretrain import pretrain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images and a finished run of six steps, to be read only."""
    here = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOV2_CATALOG", str(here / "catalog.duckdb"))
        pretrain(noise_images(here), str(here / "run"), settings(), Options())
    return here


def run_at(path: Path) -> RunFolder:
    return open_targets([str(path)]).runs[path.name]


def words(path: Path) -> str:
    """Return all sections on one run as one text."""
    return "\n".join(part for section in run_sections({path.name: run_at(path)}) for part in section.parts)


# Curves


def test_a_thinned_curve_has_means_and_ranges_of_equal_stretches() -> None:
    steps, values = np.arange(1.0, 12_001), np.sin(np.arange(12_000))
    values[[1234, 7777]] = 50, -50
    rows = thinned(steps, values)
    assert rows.shape == (MAX_POINTS, 4) and (np.diff(rows[:, 0]) > 0).all()
    stretches = values.reshape(MAX_POINTS, -1)
    np.testing.assert_allclose(rows[:, 1], stretches.mean(1), atol=1e-12)
    np.testing.assert_array_equal(rows[:, 2:], np.stack([stretches.min(1), stretches.max(1)], 1))
    assert rows[:, 3].max() == 50 and rows[:, 2].min() == -50
    short = thinned(steps[:MAX_POINTS], values[:MAX_POINTS])
    np.testing.assert_array_equal(short, np.stack([steps, values, values, values], 1)[:MAX_POINTS])


def test_a_long_curve_is_drawn_with_its_band() -> None:
    steps = np.arange(2.0 * MAX_POINTS)
    rows = points({"a": (steps, steps % 2)}, "Total loss")
    assert len(rows) == MAX_POINTS
    assert rows[0] == {"step": 0, "Total loss": 0.5, "run": "a", "lowest": 0.0, "highest": 1.0}


def test_points_leave_out_what_was_not_taken_and_name_the_run() -> None:
    taken = curve([{"step": 1, "knn": math.nan}, {"step": 2, "knn": 0.123456789}, {"step": 3}], "knn")
    assert points({"a": taken}, "k-NN") == [{"step": 2, "k-NN": 0.12346, "run": "a"}]
    other = curve([{"step": 1, "knn": 0.5}], "knn")
    assert sampled({"a": taken, "b": other}) == [[1, None, 0.5], [2, 0.123456789, None]]
    table = sampled({"a": (np.arange(1.0, 1001), np.arange(1.0, 1001))})
    assert len(table) == TABLE_ROWS and table[0] == [1, 1.0] and table[-1] == [1000, 1000.0]
    assert is_constant({"a": taken, "b": taken}) and not is_constant({"a": taken, "b": other})


def test_a_figure_is_found_by_its_name_and_of_several_students_by_each() -> None:
    assert figure_of("dino_local_weighted") is None and figure_of("skipped_steps") is None
    for name, group in (
        ("total", "Losses"),
        ("rank_me", "Health"),
        ("lr", "Schedules"),
        ("data_wait", "Speed and memory"),
    ):
        found = figure_of(name)
        assert found is not None and found[0] == group
    student = figure_of("vit_small_rank_me")
    assert student is not None and student[1].title.endswith(", vit_small")
    gradient = figure_of("grad_norm_dino_head")
    assert gradient is not None and gradient[1].title == "Gradient norm, dino head"
    names = ["lr", "skipped_steps", "rank_me", "vit_small_total", "total", "knn"]
    assert sorted(names, key=place_of) == ["knn", "vit_small_total", "total", "rank_me", "lr", "skipped_steps"]


def test_the_time_of_a_run_is_its_images_over_their_speed() -> None:
    steps = [{"step": 1, "samples": 3600, "images_per_s": 1.0}, {"step": 2, "samples": 7200, "images_per_s": 2.0}]
    assert hours(steps) == 1.5
    assert hours([]) is None and hours([{"step": 1}]) is None


def test_steps_come_from_the_table_where_the_log_is_gone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    logged = read_steps(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert len(logged) == 6
    for old, new in zip(logged, read_steps(tmp_path / "run"), strict=True):
        assert {name: new[name] for name in old} == pytest.approx(old, nan_ok=True)


# Settings


def test_differences_are_those_to_a_recipe_of_equal_length() -> None:
    config = resolve(TrainConfig, "tiny", assignments=["steps=700", "koleo_weight=0", "seed=3", "num_workers=5"])
    assert nearest_recipe(config) == ("tiny", [("steps", 7500, 700), ("koleo_weight", 0.1, 0.0)])
    assert differences(resolve(TrainConfig, "vitg14"), "vitg14") == []
    assert released_recipe(resolve(TrainConfig, "vitg14"))[0] == "vitg14"
    name, changed = released_recipe(resolve(TrainConfig, "vitl14", assignments=["batch_size=1024"]))
    assert (name, changed) == ("vitl14", [("batch_size", 3072, 1024)])


def test_settings_of_several_runs_are_listed_where_they_differ() -> None:
    runs = {
        "a": resolve(TrainConfig, "tiny"),
        "b": resolve(DistillConfig, "tiny", assignments=["teacher_temp=[0.02, 0.04]", "num_workers=9"]),
    }
    assert differing(runs) == [
        ["teacher_temp", "[0.02, 0.02]", "[0.02, 0.04]"],
        ["objective", None, "heads"],
    ]


# Whole runs


def test_a_finished_run_shows_curves_crops_components_settings_and_lineage(folder: Path) -> None:
    sections = run_sections({"run": run_at(folder / "run")})
    assert [section.title for section in sections] == [
        "Training",
        "What the model saw",
        "Settings",
        "Where the images come from",
    ]
    training, saw, _, origin = ("\n".join(section.parts) for section in sections)
    assert "<dd>finished</dd>" in training and "<dd>6</dd>" in training and "<dd>48</dd>" in training
    assert training.count('<figure class="chart">') >= 15
    assert saw.count("data:image/webp") == 5 * (1 + 2 + 2) + 8
    assert "violet where patches are masked" in saw and "principal components" in saw
    assert str(folder / "images.parquet") in origin


def test_a_run_that_is_going_on_shows_what_it_has(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("provenance.json", "config.toml"):
        shutil.copy(folder / "run" / name, run)
    assert read_run(run_at(run)).state == "unfinished"
    assert "run has logged no step yet" in words(run)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    (run / "status.json").write_text(json.dumps({"exit_code": 75, "message": "stopped at step 2 of 6"}))
    shown = words(run)
    assert "stopped at step 2 of 6" in shown and "<dd>2 of 6</dd>" in shown
    assert "Patch features cannot be drawn" in shown  # neither a model nor a checkpoint
    assert shown.count("data:image/webp") == 25


def test_what_is_gone_is_said_in_its_section(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    noise = tmp_path / "images"
    noise.mkdir()
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    made["inputs"] = [dict(made["inputs"][0], path=str(noise_images(noise)))]
    made["inputs"][0]["content_id"] = open_manifest(noise / "images.parquet").content_id
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(made))
    assert "data:image/webp" in words(tmp_path / "run")
    for image in noise.glob("*.png"):
        image.unlink()
    shown = words(tmp_path / "run")
    assert "data:image/webp" not in shown and shown.count("images cannot be read") == 2
    (noise / "images.parquet").unlink()
    (tmp_path / "run" / "config.toml").write_text("arch = 3\n")
    shown = words(tmp_path / "run")
    assert shown.count("is gone, or has changed since") == 1 and "The settings cannot be read: arch is 3" in shown
    assert "not there any more" in shown


def test_an_input_is_found_where_it_moved_and_named_once(folder: Path, tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", np.eye(3, dtype=np.float32))
    source = open_manifest(pool).source("images")
    assert locate(source, tmp_path / "run") == pool
    (tmp_path / "moved").mkdir()
    moved = pool.rename(tmp_path / "moved" / "pool.parquet")
    assert locate(source, tmp_path / "moved" / "run") == moved
    assert locate(source, tmp_path / "elsewhere" / "run") is None
    write_embeddings(pool, np.eye(4, dtype=np.float32))
    assert locate(source, tmp_path / "run") is None
    made = read_run_provenance(folder / "run")
    assert made is not None
    ((name, remark, below),) = lineage(made, folder / "run", set())
    assert (name, remark, list(below)) == (str(folder / "images.parquet"), "images", [])


def test_several_runs_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "other")
    text = (tmp_path / "other" / "config.toml").read_text()
    (tmp_path / "other" / "config.toml").write_text(text.replace("koleo_weight = 0.1", "koleo_weight = 0.3"))
    runs = {"run": run_at(folder / "run"), "other": run_at(tmp_path / "other")}
    training, _, setting, _ = ("\n".join(section.parts) for section in run_sections(runs))
    assert training.count('<figure class="chart">') == words(folder / "run").count('<figure class="chart">')
    data = [json.loads(text.split("</script>")[0]) for text in training.split('<script type="application/json">')[1:]]
    assert all({row["c"] for row in spec["data"]["values"]} == {"run", "other"} for spec in data)
    assert "Settings that differ between the runs" in setting and ">0.3<" in setting
