from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import repeatable_metrics, settings
from dinov2_toolkit.train.monitor.online_knn import knn_accuracy, labelled_sets
from dinov2_toolkit.train.pretrain import pretrain
from dinov2_toolkit.train.run import NO_MONITORING, MonitorOptions

PREPROCESS = Preprocess(12, 1.0, IMAGENET_MEAN, IMAGENET_STD)
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


def folder_of(path: Path, number: int, colours: dict[str, tuple[int, int, int]] = COLOURS) -> Path:
    """A folder with a folder a class, each with so many noisy images of one colour."""
    generator = np.random.default_rng(number)
    for name, colour in colours.items():
        (path / name).mkdir(parents=True)
        for index in range(number):
            pixels = np.clip(generator.normal(colour, 20, (14, 14, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path / name / f"{index}.png")
    return path


def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        patch_size=4, embed_dim=64, depth=1, num_heads=1, img_size=12, layer_scale=1.0
    ).requires_grad_(False)


def accuracy(train: Path, test: Path) -> float:
    sets = labelled_sets(str(train), str(test))
    return knn_accuracy(backbone(), sets, PREPROCESS, num_workers=1)


def test_colours_are_classified_and_classes_without_training_images_count_as_wrong(tmp_path: Path) -> None:
    train = folder_of(tmp_path / "train", 4)
    assert accuracy(train, folder_of(tmp_path / "test", 3)) == 1
    green = folder_of(tmp_path / "more", 3, COLOURS | {"green": (30, 200, 30)})
    assert accuracy(train, green) == pytest.approx(2 / 3)


def test_a_manifest_with_labels_is_read_and_one_without_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "train", 2)
    uris = sorted(str(path) for path in folder.glob("*/*.png"))
    pq.write_table(pa.table({"uri": uris, "label": [Path(uri).parent.name for uri in uris]}), tmp_path / "a.parquet")
    manifest = str(tmp_path / "a.parquet")
    voting, tested = labelled_sets(manifest, manifest)
    assert voting.uris == tested.uris == uris and voting.labels.tolist() == ["blue", "blue", "red", "red"]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "none.parquet")
    with pytest.raises(ToolkitError, match="--eval-test .*none.parquet has no labels; give a manifest"):
        labelled_sets(manifest, str(tmp_path / "none.parquet"))
    with pytest.raises(ToolkitError, match="--eval-train .*red has no labels"):
        labelled_sets(str(folder / "red"), manifest)
    with pytest.raises(ToolkitError, match="go together"):
        MonitorOptions(eval_train=manifest).check()


def test_a_run_with_labelled_images_has_knn_in_its_metrics_and_is_otherwise_the_same_resumed_too(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    train, test = folder_of(tmp_path / "train", 6), folder_of(tmp_path / "test", 2)
    pq.write_table(pa.table({"uri": sorted(map(str, train.glob("*/*.png")))}), tmp_path / "images.parquet")
    config = settings("depth=1", "steps=5", "batch_size=4", "eval_every=2")

    def run(name: str, monitor: MonitorOptions) -> list[dict[str, float]]:
        pretrain(tmp_path / "images.parquet", str(tmp_path / name), config, Options(), resume=True, monitor=monitor)
        return repeatable_metrics(tmp_path / name)

    plain = run("plain", NO_MONITORING)
    monitor = MonitorOptions(str(train), str(test))
    measured = run("measured", monitor)
    assert [line["step"] for line in measured if "knn" in line] == [2, 4, 5]
    assert all(0 <= line["knn"] <= 1 for line in measured if "knn" in line)
    assert [{key: value for key, value in line.items() if key != "knn"} for line in measured] == plain

    # Killed after step 4.
    (tmp_path / "measured" / "model.json").unlink()
    last = tmp_path / "measured" / "checkpoints" / "step-0000005"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert run("measured", monitor) == measured
