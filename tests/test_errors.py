"""Error lines that no test of a room reaches, each by an input that brings it; `make unreached` finds the others."""

import io
import json
import os
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2_toolkit.curate.cluster.table import checked_table_path
from dinov2_toolkit.curate.dedup.representative import Keep, _scores
from dinov2_toolkit.curate.map.map import MapSettings, map_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.masks import decode_mask, open_masked_split
from dinov2_toolkit.evaluate.match import MatchSettings, draw_match
from dinov2_toolkit.evaluate.neighbors import NeighborSettings, draw_neighbors
from dinov2_toolkit.evaluate.pca import draw_pca
from dinov2_toolkit.evaluate.pictures import PictureSettings
from dinov2_toolkit.evaluate.probe import ProbeSettings, probe
from dinov2_toolkit.features import image_server, image_workers
from dinov2_toolkit.features.extract.reading import Reading, load
from dinov2_toolkit.features.launch import Group
from dinov2_toolkit.manage import catalog as catalog_commands
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.models.architecture import inferred_head_settings
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.released import find_released
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_model
from dinov2_toolkit.report.targets import open_targets
from dinov2_toolkit.store import catalog, database, images, lock
from dinov2_toolkit.store.artifact import Options, check_manifest_name, recorded
from dinov2_toolkit.store.cache import cache_folder
from dinov2_toolkit.store.image_columns import read_images
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.store.places import catalog_path
from dinov2_toolkit.store.vectors import open_vectors
from dinov2_toolkit.tests.embedded import write_embeddings
from dinov2_toolkit.tests.models.test_weights import to_hugging_face
from dinov2_toolkit.tests.train.small_run import settings
from dinov2_toolkit.train import launch
from dinov2_toolkit.train.config import TrainConfig
from dinov2_toolkit.train.engine import parallelize
from dinov2_toolkit.train.engine.background import load_shards
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.monitor.online_knn import knn_accuracy, labelled_sets
from dinov2_toolkit.train.processes import check_batch, start_processes


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def error(match: str) -> Any:
    return pytest.raises(ToolkitError, match=match)


def table(name: str, **columns: Any) -> Path:
    """A Parquet file of others."""
    pq.write_table(pa.table(columns), name)
    return Path(name)


def vectors(name: str, dim: int, **more: list[Any]) -> str:
    rows = [[float(row + column) for column in range(dim)] for row in range(3)]
    embedding = pa.array(rows, pa.list_(pa.float32(), dim))
    return str(table(name, uri=[f"{row}.png" for row in range(3)], embedding=embedding, **more))


def broken(folder: str) -> str:
    for name in ("a", "b"):
        Path(folder, name).mkdir(parents=True)
        Path(folder, name, "0.png").write_text("no image")
    return folder


def test_curate() -> None:
    with error(r"no x\.clusters\.parquet, which `curate cluster` wrote beside x\.parquet; make it again by --force"):
        checked_table_path(Path("x.parquet"))
    with error(r"--keep column:v=a: a column of list<item: int64> cannot be listed; name another"):
        _scores(Keep("column:v=a", "v", ("a",)), pa.chunked_array([[[1]]]))
    with error(r"--recall 2 is no share of the neighbours; give a number above 0, up to 1"):
        map_images(None, "map.parquet", MapSettings(recall=2), Options())


def test_masks() -> None:
    table("m.parquet", uri=["a.png"], mask=pa.array([None], pa.string()))
    with error("no row of 1 of m.parquet has an image and a mask; fill its column 'mask'"):
        open_masked_split("train", "m.parquet", "mask", None)
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    with pytest.raises(images.UnreadableImage, match="it is of mode RGB, and a mask is a picture of one channel"):
        decode_mask(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(file, "png")
    with pytest.raises(images.UnreadableImage, match="it holds the value 300; classes are 0 to 254"):
        decode_mask(file.getvalue())


def test_images_of_which_none_can_be_read() -> None:
    with error(r"no image of .*broken can be read, first .*a/0\.png \(not an image of a known format\); check them"):
        probe(broken("broken"), "broken", "s.parquet", ProbeSettings(models=("pixels",), methods=("knn",)), Options())
    with error("none of the 2 query images can be read; name others"):
        pool = Path(vectors("p.parquet", 768))
        draw_neighbors("broken", "n.png", NeighborSettings(pool=pool, model="pixels"), Options())


def test_features_that_overflow() -> None:
    model = VisionTransformer(patch_size=4, embed_dim=12, depth=1, num_heads=3, img_size=28)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([3e38, -3e38] * 6))  # finite, and its products are not
    save_model(Path("run"), backbone=model, heads={}, preprocess=Preprocess(28, 1.0, (0.5,) * 3, (0.25,) * 3))
    for label in "ab":
        Path("photos", label).mkdir(parents=True)
        pixels = np.random.default_rng(ord(label)).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{label}/0.png")
    with error("features of .*run are not finite, first near .*0.png; name another --model"):
        probe("photos", "photos", "scores.parquet", ProbeSettings(("run",), ("knn",)), Options())
    with error("the patch tokens of .*run are not finite; name another --model"):
        draw_pca(["photos/a/0.png", "photos/b/0.png"], "pca.png", PictureSettings("run"), Options())


def test_pictures_of_manifests_that_lack_something() -> None:
    pool = Path(vectors("pool.parquet", 2))
    other = vectors("other.parquet", 3)
    with error("the queries have vectors of 3 numbers and pool.parquet of 2; embed both by the same model"):
        draw_neighbors(other, "n.png", NeighborSettings(pool=pool), Options())
    Image.new("RGB", (8, 8)).save("query.png")
    with error("nothing says which model embedded pool.parquet; name it by --model"):
        draw_neighbors("query.png", "n.png", NeighborSettings(pool=pool), Options())
    table("empty.parquet", uri=pa.array([], pa.string()))
    with error("empty.parquet names no image; give two images"):
        draw_match("empty.parquet", "query.png", "m.png", MatchSettings(model="random:vit_tiny"), Options())


def test_embeddings_of_other_lengths() -> None:
    labels = ["a", "b", "a"]
    train, test = vectors("a.parquet", 2, label=labels), vectors("b.parquet", 3, label=labels)
    with error("train embeddings have 2 numbers and test embeddings 3; embed both by the same model"):
        probe(train, test, "s.parquet", ProbeSettings(methods=("knn",)), Options())
    both = " union all ".join(f"select uri, embedding::float[] as embedding from '{name}'" for name in (train, test))
    for query in (both, f"{both} order by uri"):  # in batches of equal length, and in one
        with error("the vectors of the answer differ in length; select from manifests of one model"):
            sql(query, "c.parquet", False, False)


def test_images() -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "png")
    preprocess = Preprocess(14, 1.0, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(images.UnreadableImage, match="too small"):
        load(file.getvalue(), preprocess, Reading(reject=lambda picture, size: "too small"), None)
    with pytest.raises(images.UnreadableImage, match="not enough memory to decode it"), images.guarded():
        np.empty(1 << 50, np.uint8)


class Exits:
    """A function that ends the process which unpickles it."""

    def __reduce__(self) -> Any:
        return exec, ("import os; os._exit(3)",)

    def __call__(self, data: bytes) -> None:
        raise AssertionError


def test_processes_that_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("")
    with image_workers.image_workers(Exits(), 1) as read:
        with error("the processes that decode images end as soon as they start; make memory free"):
            read([str(tmp_path / "a.png")])
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with error("the process that decodes images does not start; see the message above"):
        image_server.Server().fork(0)
    (tmp_path / "python").write_text(
        f"#!{python}\nimport os, sys\n"
        "def full(): raise OSError(11, 'no more processes')\n"
        "os.fork = full\nexec(sys.argv[2])\n"
    )
    (tmp_path / "python").chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    starved = image_server.Server()
    with error(r"no process can be started to decode images \(Resource temporarily unavailable\); end others"):
        starved.fork(0)
    starved.stop()


LAUNCHED = """
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.launch import join_group
from dinov2_toolkit.tests.train.small_run import settings
from dinov2_toolkit.train.processes import start_processes
from pathlib import Path
for start in (join_group, lambda: start_processes(settings(), (), Path("run"))):
    try:
        start()
    except ToolkitError as problem:
        print(problem)
"""


def test_a_launcher_whose_processes_do_not_find_each_other() -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29499"}
    environment |= {"PMI_SIZE": "1"}  # as under mpirun, which counts
    done = subprocess.run([sys.executable, "-c", LAUNCHED], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "2 processes were launched, but 1 found one another; start them by --num-processes or torchrun",
        "the launcher started 2 processes and Accelerate sees 1; start them with --num-processes, torchrun or srun",
    ], done.stderr


def test_processes_that_cannot_train_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "gather", lambda self, value: ["bf16", "fp16"])
    with error("the GPUs compute in bf16 and fp16; set mixed_precision=fp16 for all"):
        start_processes(settings(), (), tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x")
    with error(r"Accelerate refuses the environment \(.*\); correct or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        start_processes(settings(), (), tmp_path)
    monkeypatch.setattr(Group, "gather", lambda self, value: [value])
    with error("not all processes see step-1/shards; resume on a disk that all share"):
        load_shards(Path("step-1"), build_model(settings()), torch.optim.AdamW([torch.zeros(1)]))
    monkeypatch.setattr(launch, "MEETING", timedelta(seconds=1))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with error(r"process 1 of 2 cannot meet the others at 127.0.0.1:1 \(.*\); check MASTER_ADDR and MASTER_PORT, and"):
        launch._Failures()


def test_the_address_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_MIRROR", "ftp://mirror")
    with error("DINOV2_MIRROR is 'ftp://mirror'; give an address that begins with https:// or http://"):
        find_released("dinov2_vits14")


def test_models(tmp_path: Path) -> None:
    with error(r"heads is not whole: only .*; name another file"):
        inferred_head_settings({"mlp.0.weight": torch.zeros(2, 2)}, "heads")
    backbone = VisionTransformer(patch_size=7, embed_dim=64, depth=1, num_heads=1, img_size=14)
    save_file(to_hugging_face(backbone.state_dict()), "model.safetensors")
    Path("config.json").write_text(json.dumps({"num_attention_heads": 1, "dinov2_toolkit": {"colour": 3}}))
    with error(r"the config.json of .* is not as we write it \(.*colour"):
        load_model(".")
    Path("config.json").write_text(json.dumps({"num_attention_heads": 1}))
    Path("preprocessor_config.json").write_text(json.dumps({"crop_size": 14}))
    with error("preprocessor_config.json lacks crop_size.height, .*; correct it, or remove it for the released"):
        load_model(".")
    processor = {"crop_size": {"height": 14}, "size": {"shortest_edge": 14}, "image_mean": [0.5], "image_std": [0.5]}
    Path("preprocessor_config.json").write_text(json.dumps(processor))
    with error(r"\. takes 3 channels, but has means of 1; correct mean and std"):
        load_model(".")


def test_outputs_and_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("x.parquet").mkdir()
    with error("output x.parquet is a folder; name a Parquet file"):
        check_manifest_name("x.parquet")
    with error("no nowhere to rebuild the catalog from; name manifests, run folders or their folder"):
        catalog_commands.rebuild([Path("nowhere")])
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)  # of a user who may not
        with error("the catalog .* cannot be made in .*; set DINOV2_CATALOG to where you may write"):
            catalog.check()
    made = write_embeddings(Path("made.parquet"), np.ones((1, 2), np.float32))
    monkeypatch.setattr(database, "LOCK_PATIENCE_S", 0.05)
    folder = os.open(catalog_path().parent, os.O_RDONLY)
    assert lock.try_lock(folder)
    with error("catalog.duckdb is in use by another process; end it and try again"):
        catalog.artifacts()
    provenance = open_manifest(made).provenance
    assert provenance is not None
    with error("made.parquet is finished but not in the catalog: .* in use .*; the same command enters it"):
        with recorded(made) as finished:
            finished.append(provenance)
    os.close(folder)
    (tmp_path / ".dinov2" / "cache").write_text("")
    with error("cache is no folder, and the cache needs one there; move it away"):
        cache_folder()


def test_what_a_report_does_not_take_alone() -> None:
    made = write_embeddings(Path("a.parquet"), np.ones((1, 2), np.float32)).read_bytes()
    Path("b.parquet").write_bytes(made.replace(b'"kind": "embeddings"', b'"kind": "removed"   '))
    with error(r"b\.parquet lists removed rows; name the manifest beside it"):
        open_targets(["b.parquet"])


def test_manifests() -> None:
    with error(r"the `label` column of l\.parquet is list<.*> and cannot be read as string; rename or drop it"):
        read_images(open_manifest(table("l.parquet", uri=["a"], label=[[1]])))
    plain = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a"], "colour": ["b"]}), plain, store_schema=False)
    Path("n.parquet").write_bytes(plain.getvalue().replace(b"colour", b"c\xfflour"))
    with error(r"n\.parquet has a column whose name is not UTF-8 \(b'c\\xfflour'\); rename it"):
        open_manifest(Path("n.parquet"))
    made = write_embeddings(Path("a.parquet"), np.ones((1, 2), np.float32)).read_bytes()
    Path("f.parquet").write_bytes(made.replace(b'"format": 1', b'"format": 9'))
    with error(r"f\.parquet was written by a newer toolkit \(.*\); update this one"):
        open_manifest(Path("f.parquet"))


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (pa.array([1.0]), "is double; it must be a list of floats"),
        (pa.array([[1]]), "holds int64; it must hold floats"),
        (pa.array([None], pa.list_(pa.float32())), "row 0 of v.parquet has no embedding; remove such rows first"),
    ],
)
def test_what_is_no_vector(embedding: pa.Array, words: str) -> None:
    with error(words):
        open_vectors(open_manifest(table("v.parquet", uri=["a"], embedding=embedding)))


def test_features_that_do_not_belong() -> None:
    rows = open_manifest(table("rows.parquet", uri=["a"]))
    with error("rows.parquet has no `embedding` column; give --features an output of embed"):
        open_vectors(rows, features=rows)
    with error("rows.parquet has no image_id, by which --features are matched; embed it here"):
        open_vectors(rows, features=open_manifest(Path(vectors("v.parquet", 2))))


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with error("separate_heads is true but ibot_weight is 0: the second head would learn nothing; set"):
        TrainConfig(separate_heads=True, ibot_weight=0.0)
    with error("batch_size 3 does not give each of 2 processes the same number of images, two or more; change one"):
        check_batch(settings("batch_size=3"), 2)
    monkeypatch.setattr(parallelize, "get_path", lambda name: str(tmp_path))
    with error("compile=true needs Python.h and .* has none; install it, or set compile=false"):
        parallelize.check_compiler({"PATH": os.environ["PATH"]})
    folder = Path(broken("pictures"))
    with error("all labels of --eval-train pictures/a are 'c'; k-NN needs two classes or more"):
        (folder / "a" / "c").mkdir()
        (folder / "a" / "0.png").rename(folder / "a" / "c" / "0.png")
        labelled_sets("pictures/a", "pictures")
    backbone = VisionTransformer(patch_size=7, embed_dim=64, depth=1, num_heads=1, img_size=14)
    sets = labelled_sets("pictures", "pictures")
    with error(r"no labelled image can be read, first .*; check the --eval options"):
        knn_accuracy(backbone, sets, Preprocess(14, 1.0, (0.5,) * 3, (0.5,) * 3), num_workers=1)
