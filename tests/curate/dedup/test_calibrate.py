"""Thresholds to look at: counts against brute force, the precision that is promised, and what the picture holds."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinov2_toolkit.cli import app
from dinov2_toolkit.curate.dedup.calibrate import (
    CalibrateSettings,
    calibrate_threshold,
    nearest_pairs,
    removed_share,
)
from dinov2_toolkit.curate.dedup.threshold import FIXED_THRESHOLD, chance_model
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.sheet import picture_provenance
from dinov2_toolkit.models.copy_descriptor import THRESHOLD
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.vectors import Float64, Stored
from dinov2_toolkit.tests.embedded import unit, write_embeddings


def pool_of(seed: int, num: int, num_copies: int, noise: float) -> Stored:
    """Return points of five dimensions bent into 32, and noisy copies of the first ones."""
    rng = np.random.default_rng(seed)
    points = np.tanh(rng.normal(size=(num, 5)) @ rng.normal(size=(5, 32)))
    copies = points[:num_copies] + noise * rng.normal(size=(num_copies, 32))
    return np.concatenate([points, copies]).astype(np.float32)


def neighbors_of(vectors: Stored, k: int) -> Float64:
    exact = unit(vectors)
    cosines = exact @ exact.T
    np.fill_diagonal(cosines, -2)
    falling: Float64 = -np.sort(-cosines, axis=1)[:, :k]
    return falling


def test_the_curve_counts_what_has_a_neighbour_above_and_what_would_be_removed() -> None:
    vectors = pool_of(0, 300, 40, 0.02)
    vectors[340 - 6 :] = vectors[10] + 1e-3 * np.random.default_rng(1).normal(size=(6, 32))  # seven of a kind
    found = neighbors_of(vectors, 32)
    chance = chance_model(found)
    removed = removed_share(chance)
    for place in (5, 100, 300, 400):
        threshold = chance.thresholds[place]
        above = (found > threshold).sum(axis=1)
        assert chance.observed[place] == (above > 0).sum()
        assert removed[place] == pytest.approx((above / (above + 1)).mean(), abs=1e-12)


def test_of_cliques_exactly_all_but_one_are_counted_as_removed() -> None:
    centres = np.eye(40, dtype=np.float32)
    vectors = np.repeat(centres, 5, axis=0) + 1e-3 * np.random.default_rng(2).normal(size=(200, 40)).astype(np.float32)
    chance = chance_model(neighbors_of(vectors, 32))
    assert np.interp(-0.9, -chance.thresholds, removed_share(chance)) * 200 == pytest.approx(160)


def test_the_suggested_threshold_has_the_precision_that_was_asked_for() -> None:
    vectors = pool_of(3, 3_000, 300, 0.01)
    exact = unit(vectors)
    cosines = exact @ exact.T
    np.fill_diagonal(cosines, -2)
    nearest = cosines.argmax(axis=1)
    is_copy = np.abs(nearest - np.arange(3_300)) == 3_000
    chance = chance_model(neighbors_of(vectors, 32))
    found = [chance.threshold_at(1 - precision) for precision in (0.8, 0.95, 0.99)]
    assert found == sorted(found)
    for threshold, precision in zip(found, (0.8, 0.95, 0.99), strict=True):
        above = cosines.max(axis=1) > threshold
        assert is_copy[above].mean() >= precision - 0.02
        assert (above & is_copy).sum() >= 0.95 * 600  # and it finds the copies


def test_pairs_come_once_from_the_most_similar_on() -> None:
    left, right, similarity = nearest_pairs(
        np.array([0, 1, 2, 5]), np.array([1, 0, 5, 2]), np.array([0.5, 0.5, 0.9, 0.9]), 6
    )
    assert left.tolist() == [2, 0] and right.tolist() == [5, 1] and similarity.tolist() == [0.9, 0.5]


def test_calibrating_draws_a_picture_and_prints_the_threshold(tmp_path: Path) -> None:
    pool = write_embeddings(tmp_path / "pool.parquet", pool_of(5, 600, 60, 0.01))  # its images are not there
    picture = tmp_path / "thresholds.png"
    command = ["curate", "dedup", str(pool), "--calibrate", str(picture), "--precision", "0.95"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.stderr
    made = picture_provenance(picture)
    assert made is not None
    threshold = made.figures["threshold"]
    assert isinstance(threshold, float) and 0.9 < threshold < 1
    assert (
        float(first.stdout) == pytest.approx(threshold, rel=1e-4)
        and "suggested" in first.stderr
        and "by chance" in first.stderr
    )
    with Image.open(picture) as drawn:
        assert drawn.width > 800 and drawn.height > 500
    assert not (tmp_path / "unique.parquet").exists()
    again = CliRunner().invoke(app, command)
    assert again.stdout == first.stdout and "up to date" in again.stderr
    unique = ["curate", "dedup", str(pool), "--threshold", first.stdout.strip(), "-o", str(tmp_path / "u.parquet")]
    assert CliRunner().invoke(app, unique).exit_code == 0


def test_what_a_threshold_removes_is_estimated(tmp_path: Path) -> None:
    vectors = pool_of(6, 800, 100, 0.005)
    pool = write_embeddings(tmp_path / "pool.parquet", np.concatenate([vectors, vectors[:50]]))
    result = calibrate_threshold(pool, str(tmp_path / "t.png"), CalibrateSettings(), Options())
    assert result is not None
    assert result.figures["identical"] == 50
    assert result.figures["removed"] == pytest.approx(150, abs=5)


def test_of_the_descriptor_for_copies_no_threshold_below_its_own_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_toolkit.curate.dedup.threshold.copy_content_id", lambda: "copy of 32")
    vectors = np.random.default_rng(3).normal(size=(300, 32))  # far from one another: chance alone would allow less
    suggested: dict[str, float] = {}
    for model in ("a model", "copy"):
        pool = write_embeddings(tmp_path / f"{model}.parquet", vectors.astype(np.float32), model=model)
        result = calibrate_threshold(pool, str(tmp_path / f"{model}.png"), CalibrateSettings(), Options())
        assert result is not None
        assert result.value is not None
        suggested[model] = float(result.value)
    assert suggested["a model"] < suggested["copy"] == THRESHOLD


def test_few_images_give_a_guess_and_one_or_none_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = write_embeddings(tmp_path / "few.parquet", pool_of(7, 6, 1, 0.01))
    result = calibrate_threshold(few, str(tmp_path / "few.png"), CalibrateSettings(), Options())
    assert result is not None and result.value == FIXED_THRESHOLD and "too few" in capsys.readouterr().err
    one = write_embeddings(tmp_path / "one.parquet", np.ones((1, 4), np.float32))
    with pytest.raises(ToolkitError, match="two or more"):
        calibrate_threshold(one, str(tmp_path / "one.png"), CalibrateSettings(), Options())
    same = write_embeddings(tmp_path / "same.parquet", np.ones((9, 4), np.float32), more={"x": pa.array(range(9))})
    with pytest.raises(ToolkitError, match="are the same"):
        calibrate_threshold(same, str(tmp_path / "same.png"), CalibrateSettings(), Options())
    with pytest.raises(ToolkitError, match="--precision 1"):
        calibrate_threshold(few, str(tmp_path / "p.png"), CalibrateSettings(precision=1.0), Options())
    with pytest.raises(ToolkitError, match=r"does not end in \.png"):
        calibrate_threshold(few, str(tmp_path / "p.jpg"), CalibrateSettings(), Options())
