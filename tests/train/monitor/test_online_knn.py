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
from dinov2_toolkit.models.weights import load_backbone
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import repeatable_metrics, settings
from dinov2_toolkit.train import pretrain as module
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.monitor.online_knn import BestKnn, held_out, knn_accuracy, labelled_sets
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
        MonitorOptions(eval_train=manifest).check(tmp_path / "a.parquet", 0)
    with pytest.raises(ToolkitError, match="leave --eval-train and --eval-test out"):
        MonitorOptions(manifest, manifest, 0.5).check(tmp_path / "a.parquet", 0)


def test_a_share_of_the_labels_is_held_out_and_predicted_by_the_others(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "train", 10)
    uris = sorted(str(path) for path in folder.glob("*/*.png"))
    labels = [None if uri.endswith("0.png") else Path(uri).parent.name for uri in uris]
    pq.write_table(pa.table({"uri": uris, "label": labels}), tmp_path / "a.parquet")
    voting, tested = held_out(str(tmp_path / "a.parquet"), 0.25, seed=1)
    assert (len(voting.uris), len(tested.uris)) == (14, 4)  # of 18 with a label
    assert {*voting.uris, *tested.uris} == {uri for uri, label in zip(uris, labels, strict=True) if label is not None}
    assert tested.labels.tolist() == [Path(uri).parent.name for uri in tested.uris]
    again, other = (held_out(str(tmp_path / "a.parquet"), 0.25, seed=seed)[1].uris for seed in (1, 2))
    assert again == tested.uris != other
    assert knn_accuracy(backbone(), (voting, tested), PREPROCESS, num_workers=1) == 1
    pq.write_table(pa.table({"uri": uris[:3], "label": ["a", "a", "b"]}), tmp_path / "b.parquet")
    with pytest.raises(ToolkitError, match="--eval-share 0.9: .* k-NN needs two classes"):
        held_out(str(tmp_path / "b.parquet"), 0.9, seed=0)


def test_the_best_knn_is_the_first_of_the_highest_and_stalls_count_from_it() -> None:
    best = BestKnn([{"step": 1}, {"step": 2, "knn": 0.5}, {"step": 3}, {"step": 4, "knn": 0.4}])
    assert (best.step, best.accuracy, best.num_since) == (2, 0.5, 1)
    assert not best.add({"step": 6, "knn": 0.5})
    assert best.has_stalled(2) and not best.has_stalled(3) and not best.has_stalled(0)
    assert best.add({"step": 8, "a_knn": 0.9, "b_knn": 0.3}) and best.accuracy == pytest.approx(0.6)
    assert (best.step, best.num_since) == (8, 0)


def test_the_best_checkpoint_is_kept_and_a_run_that_stalls_ends_with_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    images = folder_of(tmp_path / "train", 6)
    uris = sorted(map(str, images.glob("*/*.png")))
    pq.write_table(pa.table({"uri": uris, "label": [Path(uri).parent.name for uri in uris]}), tmp_path / "a.parquet")
    accuracies = iter([0.3, 0.7, 0.5, 0.7, 0.9, 0.9])

    def figures(*_: object) -> dict[str, float]:
        return {"knn": next(accuracies)}

    monkeypatch.setattr(module, "knn_figures", figures)
    changes = ["depth=1", "steps=9", "batch_size=4", "eval_every=1", "keep_checkpoints=1", "checkpoint_every=1"]
    run, monitor = tmp_path / "run", MonitorOptions(eval_share=0.5)
    pretrain(tmp_path / "a.parquet", str(run), settings(*changes, "early_stop=2"), Options(), monitor=monitor)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-0000002", "step-0000004"]
    said = capsys.readouterr().err
    assert "run: 4 steps, loss " in said
    assert "step 4: no better k-NN 2 times; the model is that of the best" in said and "best k-NN 0.700: " in said
    best, last = (run / "checkpoints" / f"step-000000{step}" / "teacher.safetensors" for step in (2, 4))
    assert (run / "teacher.safetensors").read_bytes() == best.read_bytes() != last.read_bytes()
    assert load_backbone(run).depth == load_backbone(best.parent).depth == 1

    # Killed before the model was written: nothing is left to train.
    (run / "model.json").unlink()
    pretrain(
        tmp_path / "a.parquet", str(run), settings(*changes, "early_stop=2"), Options(), resume=True, monitor=monitor
    )
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert (run / "teacher.safetensors").read_bytes() == best.read_bytes()

    with pytest.raises(ToolkitError, match="early_stop=2 goes by the k-NN; give --eval-train"):
        pretrain(tmp_path / "a.parquet", str(tmp_path / "b"), settings("early_stop=2"), Options())


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
