"""A run goes on from what is whole of its folder, says what is not, and ends as if nothing had happened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options, read_run_provenance
from dinov2_toolkit.tests.train.small_run import CLOCK, noise_images, repeatable_metrics, settings
from dinov2_toolkit.train import pretrain as loop
from dinov2_toolkit.train import run_folder as around
from dinov2_toolkit.train.config import CONFIG_FILE
from dinov2_toolkit.train.engine import checkpoint
from dinov2_toolkit.train.engine.checkpoint import CHECKSUMS_FILE, DAMAGED, FILES, checkpoints
from dinov2_toolkit.train.objective import networks
from dinov2_toolkit.train.pretrain import pretrain

Damage = Callable[[Path], object]
LAST = "checkpoints/step-0000006"
DAMAGES: dict[str, Damage] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-5] + b"\x07" + path.read_bytes()[-4:]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOV2_CATALOG", str(folder / "catalog.duckdb"))
        pretrain(noise_images(folder), str(folder / "whole"), settings(), Options())
    return folder / "whole"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same run, killed after its last checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("model.json", "teacher.safetensors"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


def resume(run: Path, whole: Path, *changes: str) -> None:
    """Resume the run, and compare it with the whole one."""
    pretrain(whole.parent / "images.parquet", str(run), settings(*changes), Options(), resume=True)
    assert repeatable_metrics(run) == repeatable_metrics(whole)
    for file in ("teacher.safetensors", f"{LAST}/student.safetensors", f"{LAST}/buffers.safetensors"):
        expected, got = load_file(whole / file), load_file(run / file)
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert not list((run / "checkpoints").glob(f"{DAMAGED}step-000000[0-6]"))


@pytest.mark.parametrize("name", [*FILES, CHECKSUMS_FILE])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_found_and_the_run_goes_back_to_the_checkpoint_before(
    run: Path, whole: Path, name: str, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / LAST / name).read_bytes()
    damage(run / LAST / name)
    assert checkpoint.damage(whole / LAST, 6) is None
    problem = checkpoint.damage(run / LAST, 6)
    assert problem is not None or (name, damage) == (CHECKSUMS_FILE, DAMAGES["gone"])  # as of earlier versions
    if name in (FILES[2], FILES[4]) and damage is DAMAGES["one bit"]:  # the whole way, for some of them
        resume(run, whole)
        said = capsys.readouterr().err
        assert f"{LAST} is damaged ({problem}): going back to the one before" in said
        assert "resuming at step 4 of 6" in said
        assert len(before) == (run / LAST / name).stat().st_size


@pytest.mark.parametrize(
    "state",
    ['{"step": 1000000000}', '{"step": 4}', '{"step": -1}', '{"step": "6"}', "[6]", "6", "", "{}", '{"step": 6.0}'],
)
@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_state_that_is_none_is_no_end_of_the_run(run: Path, whole: Path, state: str, has_checksums: bool) -> None:
    (run / LAST / "state.json").write_text(state)
    if not has_checksums:
        (run / LAST / CHECKSUMS_FILE).unlink()
    assert checkpoint.damage(run / LAST, 6) is not None
    if "1000000000" in state and not has_checksums:
        resume(run, whole)


def test_without_a_whole_checkpoint_the_run_starts_anew_and_says_so(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoints(run / "checkpoints")
    for path in saved:
        (path / "state.json").write_text("")
    resume(run, whole)
    said = capsys.readouterr().err
    assert said.count("going back to the one before") == len(saved) - 1
    assert f"{saved[0].name} is damaged (" in said and "there is none before it, so the run starts anew" in said


def test_checkpoints_that_are_none_at_all_are_passed_over(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step-0000005").mkdir()
    (run / "checkpoints" / "step-1000000000").mkdir()
    (run / "checkpoints" / "step-0000007").write_text("no folder")
    shutil.rmtree(run / LAST)
    (run / LAST).mkdir()
    resume(run, whole)
    said = capsys.readouterr().err
    assert said.count("is damaged (it has no model.json)") == 4 and "resuming at step 4 of 6" in said


def test_without_a_whole_checkpoint_the_run_starts_again(run: Path, whole: Path) -> None:
    for path in checkpoints(run / "checkpoints"):
        (path / "optimizer.pt").write_bytes(b"")
    resume(run, whole)


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_resumed(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / LAST / CHECKSUMS_FILE).unlink()
    pretrain(whole.parent / "images.parquet", str(run), settings(), Options(), resume=True)
    assert "resuming at step 6 of 6" in capsys.readouterr().err


def test_a_run_killed_between_its_last_checkpoint_and_its_table_of_metrics_writes_the_table(
    run: Path, whole: Path
) -> None:
    (run / "metrics.parquet").unlink()
    resume(run, whole)
    rows, expected = (pq.read_table(folder / "metrics.parquet").drop_columns(CLOCK) for folder in (run, whole))
    assert rows.equals(expected) and len(rows) == 6


def test_bad_lines_of_the_metrics_are_left_out_and_said(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ['{"step": 3, "tot', "\x00", "5", '{"total": 1}', '{"step": "3"}', '{"step": 3, "a": []}', "{}", "null"]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], *bad, *lines[3:], '{"step": 7, "to']) + "\n")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    resume(run, whole)
    assert "9 of 16 lines of " in capsys.readouterr().err


def test_a_run_killed_before_its_provenance_is_resumed_by_its_own_settings(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    images, run = whole.parent / "images.parquet", tmp_path / "run"
    monkeypatch.setattr(around, "write_run_provenance", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, str(run), settings(), Options())
    monkeypatch.undo()
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "catalog.duckdb"))
    (run / ".dinov2-elsewhere-1-0.tmp").write_text("half")
    assert (run / CONFIG_FILE).exists()
    resume(run, whole)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CONFIG_FILE).write_text("mine = 1\n")
    with pytest.raises(ToolkitError, match="is no run folder"):
        pretrain(images, str(tmp_path / "mine"), settings(), Options(), resume=True)
    assert (tmp_path / "mine" / CONFIG_FILE).read_text() == "mine = 1\n"


@pytest.mark.parametrize("last", ["provenance", "catalog"])
def test_a_run_killed_after_its_last_file_is_recorded_by_the_next_command(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    images, run = whole.parent / "images.parquet", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(around, "model_content_id", killed) if last == "provenance" else None
        patch.setattr(catalog, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(images, str(run), settings(), Options())
    assert catalog.artifacts("kind = 'run'") == []
    made = pretrain(images, str(run), settings(), Options())
    (known,) = catalog.artifacts("kind = 'run'")
    there, first = read_run_provenance(run), read_run_provenance(whole)
    assert there is not None and first is not None and made is not None
    assert known.digest == there.content_id == first.content_id
    assert there.figures["total"] == first.figures["total"] == made.figures["total"]


def test_weights_that_are_not_finite_are_never_saved_or_finished(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = networks.update_teacher

    def spoiled(teacher: nn.ModuleDict, student: nn.ModuleDict, momentum: float, skipped: Tensor) -> None:
        update(teacher, student, momentum, skipped)
        if momentum > 0.994:  # from the third step
            with torch.no_grad():
                next(iter(student.parameters()))[..., 0] = torch.nan

    images, run = whole.parent / "images.parquet", tmp_path / "run"
    monkeypatch.setattr(loop, "update_teacher", spoiled)
    with pytest.raises(ToolkitError, match=r"step 4 left weights that are not finite \(student.*\), and is not saved"):
        pretrain(images, str(run), settings("max_skipped_steps=9", "momentum=[0.992, 1.0]"), Options())
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-0000002"]
    assert not (run / "model.json").exists() and catalog.artifacts("kind = 'run'") == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000002"]
    # Nor where the last checkpoint is from a version that did not look.
    monkeypatch.setattr(checkpoint, "first_not_finite", lambda tensors: None)
    with pytest.raises(ToolkitError, match="are not finite after the last step; the last good checkpoint is"):
        changes = ("max_skipped_steps=9", "momentum=[0.992, 1.0]", "steps=3", "keep_checkpoints=1")
        pretrain(images, str(tmp_path / "other"), settings(*changes), Options())
    assert not (tmp_path / "other" / "model.json").exists()


def test_a_run_whose_last_losses_are_not_finite_is_no_success(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ToolkitError, match=r"losses or gradients of the \d steps up to 6 are not finite; "):
        changes = ("base_lr=1e30", "warmup_steps=0", "freeze_last_layer_steps=0", "checkpoint_every=1")
        pretrain(whole.parent / "images.parquet", str(run), settings(*changes), Options())
    assert not (run / "model.json").exists() and catalog.artifacts("kind = 'run'") == []


@pytest.mark.parametrize("where", ["student.safetensors", "optimizer.pt", "state.json"])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = tmp_path / "run"

    def full(*values: object, **_: object) -> None:
        if str(values[-1]).endswith(where) and (run / "checkpoints" / "step-0000002").exists():
            raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file")
        save(*values)

    save: Callable[..., None] = torch.save if where == "optimizer.pt" else save_file
    if where == "state.json":
        text = Path.write_text

        def write(path: Path, *values: object, **more: object) -> int:
            if path.name == where and (run / "checkpoints" / "step-0000002").exists():
                raise OSError(28, "No space left on device")
            return text(path, *values, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "write_text", write)
    else:
        monkeypatch.setattr(torch if where == "optimizer.pt" else checkpoint, save.__name__, full)
    with pytest.raises(ToolkitError, match=r"no space left to write to .*checkpoints; make room, and run the same"):
        pretrain(whole.parent / "images.parquet", str(run), settings(), Options())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000002"]
    monkeypatch.undo()
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "catalog.duckdb"))
    resume(run, whole)


def test_half_removed_checkpoints_are_none(run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    def killed(path: Path) -> None:
        if path.name.endswith(".tmp") and path.exists():
            (path / "model.json").unlink()
            removed.append(path.name)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dinov2_toolkit.store.files.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune_checkpoints(run / "checkpoints", 1)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-0000004", "step-0000006"]
    assert len(removed) == 1
    resume(run, whole, "keep_checkpoints=1")
    (run / "checkpoints" / removed[0]).rename(run / "checkpoints" / "left")
    shutil.rmtree(run / "checkpoints" / "left")
    assert json.loads((run / LAST / "state.json").read_text())["step"] == 6
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000006"]
