"""A small raw pool with copies, broken files and hostile names, and all steps of curation over it."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.curate.embed.filters import Filters
from dinov2_toolkit.curate.retrieve.retrieve import RetrieveSettings, retrieve_images
from dinov2_toolkit.curate.union import Part, UnionSettings, union_manifests
from dinov2_toolkit.store.artifact import Options

MARKUP = "<img src=x onerror=alert(1)>"
CLOSING = "<_script><script>alert(1)"  # no file name has a slash
NUM_SCENES = 24


def scene(number: int, side: int = 48) -> Image.Image:
    """Return a picture of coarse blocks, like no other."""
    blocks = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC)


def write_raw_pool(folder: Path) -> None:
    """Write 24 scenes of two labels, 4 near-copies, 2 exact copies, 1 blank, 3 broken files."""
    for number in range(NUM_SCENES):
        label = MARKUP if number % 3 else CLOSING
        (folder / label).mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / label / f"scene-{number:02}[*]{MARKUP}.png")
    names = sorted((folder / MARKUP).iterdir())
    for number in range(4):
        scene(number).resize((40, 40)).save(folder / MARKUP / f"near-{number:02}.jpg", quality=85)
    for number in range(2):
        shutil.copy(names[number], folder / MARKUP / f"same-{number:02}.png")
    Image.new("RGB", (48, 48), "grey").save(folder / "blank.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "note.jpg").write_text("<script>alert(1)</script>")
    (folder / "cut.png").write_bytes(names[0].read_bytes()[:200])


def curate(folder: Path) -> dict[str, Path]:
    """Write a raw pool below a folder and run all steps over it; return the manifests by name."""
    write_raw_pool(folder / "raw")
    for number in range(NUM_SCENES, NUM_SCENES + 3):
        (folder / "seeds" / "wanted").mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / "seeds" / "wanted" / f"seed-{number}.png")
    paths = {name: folder / f"{name}.parquet" for name in ("pool", "seeds", "unique", "even", "near", "curated")}
    settings = EmbedSettings(model="pixels", filters=Filters(min_contrast=2.0))
    embed_images([str(folder / "raw")], str(paths["pool"]), settings, Options())
    embed_images([str(folder / "seeds")], str(paths["seeds"]), EmbedSettings(model="pixels", role="queries"), Options())
    dedup_images(paths["pool"], str(paths["unique"]), DedupSettings(threshold=0.9, verify=True), Options())
    even = ClusterSettings("6,2", resample=1, sample=12)
    cluster_images(paths["unique"], str(paths["even"]), even, Options())
    retrieve_images(paths["seeds"], paths["unique"], str(paths["near"]), RetrieveSettings(k=3), Options())
    union_manifests([Part(paths["even"]), Part(paths["near"])], str(paths["curated"]), UnionSettings(), Options())
    return paths
