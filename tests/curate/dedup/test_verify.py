"""Pixel verification: pixels decide on pairs that descriptors find alike."""

import errno
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from dinov2_toolkit.curate.dedup import thumbnails
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.groups import group_copies, group_duplicates
from dinov2_toolkit.curate.dedup.near_duplicates import _differences
from dinov2_toolkit.curate.dedup.settings import DedupSettings, Linkage
from dinov2_toolkit.curate.dedup.verify import MAX_DIFFERENCE, MIN_COSINE, crowded_limit, pixel_difference
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.inputs import open_input, read_embedded
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.extract.decoding import ImageBatch, load_batches
from dinov2_toolkit.features.search.exact_search import DEFAULTS
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.cache import cached
from dinov2_toolkit.store.manifest import Source, open_manifest, removed_path
from dinov2_toolkit.store.vectors import Bools, Float64, Int64, Vectors
from dinov2_toolkit.tests.curate.dedup.test_registration import scene
from dinov2_toolkit.tests.embedded import write_embeddings


def in_memory(vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> Vectors:
    return Vectors(vectors, np.arange(len(vectors)), Source("base", "memory", "0"))


def card(number: int, sign: str) -> Image.Image:
    """Return a playing card: those of one number differ by small signs alone."""
    picture = Image.new("RGB", (120, 160), "white")
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((4, 4, 115, 155), 12, outline="black", width=3)
    rng = np.random.default_rng(number)
    for x, y in rng.integers((20, 20), (80, 120), (5, 2)).tolist():
        if sign == "disc":
            draw.ellipse((x, y, x + 18, y + 18), fill="black")
        else:
            draw.rectangle((x, y, x + 16, y + 16), outline="black", width=4)
    return picture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of scenes, some with a copy, and of cards that are no copies of each other."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        scene(number).save(images / f"scene-{number:02}.png")
    for number in range(4):
        for sign in ("disc", "box"):
            card(number, sign).save(images / f"card-{number}-{sign}.png")
    scene(0).crop((0, 10, 148, 160)).save(images / "copy-00.png")
    ImageEnhance.Brightness(scene(1).resize((140, 140))).enhance(1.3).save(images / "copy-01.jpg", quality=40)
    scene(2).convert("L").resize((80, 80)).save(images / "copy-02.png")
    return images


def embedded(folder: Path, name: str = "pool.parquet") -> Path:
    embed_images([str(folder)], name, EmbedSettings(model="copy"), Options())
    return folder.parent / name


def deduplicated(pool: Path, **settings: object) -> tuple[dict[str, str], dict[str, object]]:
    """Return the removed images with what each duplicates, by name, and the figures."""
    output = pool.with_name("unique.parquet")
    dedup_images(pool, str(output), DedupSettings(**settings), Options(force=True))  # type: ignore[arg-type]
    removed = pq.read_table(removed_path(output)).to_pylist()
    provenance = open_manifest(output).provenance
    assert provenance is not None
    return {Path(row["uri"]).stem: Path(row["duplicate_of"]).stem for row in removed}, provenance.figures


PLANTED = {"copy-00": "scene-00", "copy-01": "scene-01", "copy-02": "scene-02"}


def test_copies_are_removed_and_look_alikes_kept(folder: Path) -> None:
    pool = embedded(folder)
    removed, figures = deduplicated(pool)
    assert removed == PLANTED
    assert (
        figures["pairs_verified"] and figures["pairs_unreadable"] == 0 and figures["max_difference"] == MAX_DIFFERENCE
    )
    assert figures["threshold"] == MIN_COSINE
    by_cosine, figures = deduplicated(pool, verify=False)
    assert "pairs_verified" not in figures and figures["threshold"] == 0.95
    assert set(by_cosine) != set(PLANTED)
    given, figures = deduplicated(pool, threshold=0.9)
    assert "pairs_verified" not in figures and figures["threshold_origin"] == "given"
    verified, figures = deduplicated(pool, threshold=0.5, verify=True)
    assert verified == PLANTED and figures["threshold"] == 0.5


@pytest.mark.parametrize("linkage", ["components", "star"])
def test_any_linkage_and_number_of_neighbours(folder: Path, linkage: str) -> None:
    assert deduplicated(embedded(folder), linkage=linkage, k=3)[0] == PLANTED


def test_each_removed_image_says_how_different_its_pixels_are(folder: Path) -> None:
    (folder / "same-03.png").write_bytes((folder / "scene-03.png").read_bytes())
    pool = embedded(folder)
    deduplicated(pool)
    path = removed_path(pool.with_name("unique.parquet"))
    found = {Path(row["uri"]).stem: row["pixel_difference"] for row in pq.read_table(path).to_pylist()}
    assert set(found) == {*PLANTED, "same-03"} or set(found) == {*PLANTED, "scene-03"}
    assert all(0 < found[name] <= MAX_DIFFERENCE for name in PLANTED)
    assert sum(value is None for value in found.values()) == 1  # of the same bytes
    deduplicated(pool, verify=False)
    assert pq.read_table(path).column("pixel_difference").null_count == len(pq.read_table(path)) > 0


def test_the_smaller_row_of_a_pair_comes_first_for_registration_is_not_symmetric(folder: Path) -> None:
    images = read_embedded(open_input("manifest", embedded(folder), Path("out.parquet")))
    seen: list[Any] = []

    def differences(pairs: Any, cosines: Float64) -> Float64:
        seen.extend(zip(pairs.ones.tolist(), pairs.others.tolist(), strict=True))
        return np.zeros(len(cosines))

    kept = np.arange(len(images))
    kept[[0, 5]] = 3, 2
    groups, verifier = SimpleNamespace(kept=kept), SimpleNamespace(differences=differences)
    found = _differences(images, cast(Any, groups), [], cast(Any, verifier))
    assert seen == [(0, 3), (2, 5)] and np.flatnonzero(found == 0).tolist() == [0, 5]


def test_residuals_are_kept_and_cosines_decide_where_an_image_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = embedded(folder)
    for name in ("copy-00.png", "card-0-disc.png"):
        (folder / name).rename(folder.parent / name)
    removed, figures = deduplicated(pool)
    assert isinstance(figures["pairs_unreadable"], int) and figures["pairs_unreadable"] > 0
    assert {name: PLANTED[name] for name in ("copy-01", "copy-02")}.items() <= removed.items()
    assert "cannot be read" in capsys.readouterr().err
    for image in folder.iterdir():
        image.unlink()
    again, figures_again = deduplicated(pool)  # from the cache
    assert again == removed and figures_again["pairs_unreadable"] == figures["pairs_unreadable"]


def test_each_picture_is_read_once_and_none_is_left_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = embedded(folder)
    read: list[str | None] = []

    def reading(uris: Iterable[str | None], *args: Any, **kwargs: Any) -> Iterator[ImageBatch]:
        names = list(uris)
        read.extend(names)
        return load_batches(names, *args, **kwargs)

    monkeypatch.setattr(thumbnails, "load_batches", reading)
    assert deduplicated(pool)[0] == PLANTED
    assert len(read) == len(set(read)) <= len(list(folder.iterdir()))
    assert all(path.suffix == ".npy" for path in cached())


def test_a_full_disk_is_an_error_that_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    pool = embedded(folder)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
        with pytest.raises(
            ToolkitError, match=r"no space left in .*, where the thumbnails of 22 .* 1 MB; .*--no-verify"
        ):
            deduplicated(pool)
    assert not (folder.parent / "unique.parquet").exists()
    assert deduplicated(pool)[0] == PLANTED


def test_known_and_evaluation_images_are_verified(folder: Path) -> None:
    pool = embedded(folder)
    others = folder.parent / "others"
    others.mkdir()
    ImageEnhance.Contrast(scene(5)).enhance(0.7).crop((8, 0, 160, 152)).save(others / "seen-05.png")
    card(2, "disc").rotate(180).save(others / "card.png")
    known = embedded(others, "known.parquet")
    removed, figures = deduplicated(pool, known=(known,))
    assert removed == {**PLANTED, "scene-05": "seen-05"} and figures["known"] == 1
    clean = folder.parent / "clean.parquet"  # its threshold says what was verified, not what is a copy
    dedup_images(known, str(clean), DedupSettings(), Options())
    _, figures = deduplicated(pool, known=(clean,), verify=False)
    assert figures["threshold"] == 0.95
    removed, figures = deduplicated(pool, against=(known,))
    assert removed == {**PLANTED, "scene-05": "seen-05"} and figures["against"] == 1
    removed, figures = deduplicated(pool, against=(known,), against_threshold=1.0)
    assert removed == PLANTED


def test_verify_needs_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    pool = write_embeddings(tmp_path / "pool.parquet", vectors)
    with pytest.raises(ToolkitError, match="--verify with --exact bytes"):
        dedup_images(pool, "unique.parquet", DedupSettings(exact="bytes", verify=True), Options())
    table = pq.read_table(pool).select(["embedding"]).replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "nameless.parquet")
    with pytest.raises(ToolkitError, match="--verify compares pixels, and .*nameless.parquet names no images"):
        dedup_images(tmp_path / "nameless.parquet", "unique.parquet", DedupSettings(verify=True), Options())


def test_the_difference_multiplies_the_residual_by_the_distance_of_descriptors() -> None:
    residuals, cosines = np.array([0.0, 0.09, 0.09], np.float32), np.array([1.0, 1.0, 0.03])
    assert pixel_difference(residuals, cosines) == pytest.approx(
        [0.005 * 0.03**0.5, 0.095 * 0.03**0.5, 0.095], rel=1e-6
    )


def test_a_crowded_pool_lowers_the_limit_to_what_chance_allows() -> None:
    """Chance pairs that grow by a known power: the limit is where as many as allowed lie below, to a step."""
    copies = np.linspace(1e-4, 3e-4, 500)
    for power, num in ((4.0, 20_000), (2.0, 5_000)):
        chance = 0.1 * ((np.arange(num) + 0.5) / num) ** (1 / power)  # num * (x / 0.1) ** power lie below x
        limit = crowded_limit(np.concatenate([copies, chance]), max_lost=0.002 * num)
        expected = min(MAX_DIFFERENCE, 0.1 * 0.002 ** (1 / power))
        assert expected / 1.2 < limit <= expected * 1.05
    assert crowded_limit(copies, max_lost=10) == MAX_DIFFERENCE
    assert crowded_limit(np.empty(0), max_lost=0.0) == MAX_DIFFERENCE


@pytest.mark.parametrize("linkage", ["components", "star"])
def test_of_a_crowd_larger_than_k_one_is_kept_and_no_pair_is_verified_twice(linkage: Linkage) -> None:
    """Three crowds of forty copies, of which each has two neighbours: what is kept of the parts is compared again."""
    rng = np.random.default_rng(1)
    crowd = np.repeat(np.arange(3), 40)
    centres = rng.normal(size=(3, 12))
    vectors = in_memory((centres[crowd] + 0.05 * rng.normal(size=(120, 12))).astype(np.float32))
    verified: list[tuple[int, int, bool]] = []

    def are_copies(left: Int64, right: Int64, cosines: Float64, align: Bools) -> Bools:
        assert (left < right).all() and (cosines > -1).all()
        verified.extend(zip(left.tolist(), right.tolist(), align.tolist(), strict=True))
        same: Bools = (crowd[left] == crowd[right]) & align
        return same

    priority = rng.permutation(120)
    kept, degree, _ = group_copies(vectors, priority, -1.0, 4, 2, linkage, DEFAULTS, are_copies)
    first = [40 * number + int(priority[crowd == number].argmin()) for number in range(3)]
    assert kept.tolist() == np.array(first)[crowd].tolist()
    assert (degree == 2).all()
    assert len(set(verified)) == len(verified)
    assert {align for *_, align in verified} == {True, False}


def test_stars_of_pairs_keep_an_image_if_no_preferred_kept_one_is_its_copy() -> None:
    rng = np.random.default_rng(2)
    vectors = in_memory(rng.normal(size=(60, 6)).astype(np.float32))
    copies = np.triu(rng.random((60, 60)) < 0.08, 1)
    priority = rng.permutation(60)
    groups = group_duplicates(
        vectors,
        -1.0,
        59,
        linkage="star",
        priority=priority,
        are_copies=lambda left, right, *_: copies[left, right],
        num_aligned=59,
    )
    kept: list[int] = []
    expected = np.empty(60, np.int64)
    for row in np.argsort(priority).tolist():
        heads = [head for head in kept if copies[min(head, row), max(head, row)]]
        expected[row] = heads[0] if heads else row
        kept += [] if heads else [row]
    assert groups.kept.tolist() == expected.tolist()
