"""`dinov2 export`: a model in another library's format, compared with the model before it counts as done."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b, file_digest
from pathlib import Path

from .. import console
from ..errors import ToolkitError
from ..models import export, export_hf, export_onnx
from ..models.export import Comparison, Format, Reference
from ..models.weights import Model, load_model
from ..store.artifact import (
    FILE_PROVENANCE,
    Options,
    Result,
    difference,
    read_run_provenance,
    recorded,
    write_run_provenance,
)
from ..store.manifest import Provenance, Source, provenance_from, provenance_values, toolkit_version
from .model_card import model_card

EXTRAS = {"hf": ("hf", ("transformers",)), "onnx": ("onnx", ("onnx", "onnxscript", "onnxruntime"))}


@dataclass(frozen=True)
class ExportSettings:
    """What `dinov2 export` can be told, beside the options that all commands share."""

    to: Format
    image_size: int | None = None  # that the position embedding is stored for; None: as it is, for ONNX the model's own


Write = Callable[[Model, Path], None]
Compare = Callable[[Model, Path, Reference], Comparison]
STEPS: dict[Format, tuple[Write, Compare]] = {
    "official": (export.write_official, export.compare_official),
    "safetensors": (export.write_safetensors, export.compare_safetensors),
    "timm": (export.write_timm, export.compare_timm),
    "hf": (export_hf.write_hugging_face, export_hf.compare_hugging_face),
    "onnx": (export_onnx.write_onnx, export_onnx.compare_onnx),
}


def export_model(source: str, output: str, settings: ExportSettings, options: Options) -> Result | None:
    """Write a model in another format, read it back, compare, and only then put it in its place.

    Args:
        source: what `--model` takes.
        options: `limit` is the number of random images compared.

    Returns:
        The output with the largest difference among its figures; None after a dry run.

    Raises:
        ToolkitError: if there is no such model, the format's library is missing, something else stands at the output,
            or what was read back is not the model.
    """
    path = _check_output(output, settings.to)
    _check_extra(settings.to)
    original = load_model(source, seed=options.seed)
    stored_size = original.preprocess.image_size if settings.to == "onnx" else original.backbone.img_size
    model = export.model_at_size(original, settings.image_size or stored_size)
    size = model.backbone.img_size
    named = str(Path(source).absolute()) if Path(source).exists() else source
    provenance = Provenance(
        kind="export",
        command="export",
        parameters={"to": settings.to, "image_size": size, "limit": options.limit},
        seed=options.seed,
        inputs=(Source("model", named, original.content_id),),
    )
    if _is_up_to_date(path, provenance, options):
        there = _find_provenance(path)
        return None if options.dry_run or there is None else Result(output, there.figures)
    if settings.to != "hf":
        _check_side_files(path, options)
    num_bytes = sum(4 * weight.numel() for weight in model.backbone.parameters())
    if options.dry_run:
        console.say(
            f"would write {source} as {settings.to} for {size} px to {path}, about {num_bytes / 2**20:,.0f} MiB"
        )
        return None

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with recorded(path) as finished:
            reference = export.make_reference(original, size, options.limit or export.DEFAULT_IMAGES, options.seed)
            written = aside / path.name
            if settings.to == "hf":
                written.mkdir()
            write, compare = STEPS[settings.to]
            write(model, written)
            comparison = compare(model, written, reference)
            _judge(settings.to, comparison, reference, output)
            figures = _figures(settings.to, comparison, reference)
            made = replace(
                provenance, figures=figures, content_id=_content_id(written, settings.to), version=toolkit_version()
            )
            if settings.to == "hf":
                run = read_run_provenance(Path(source)) if Path(source).is_dir() else None
                card = model_card(model, source, run, comparison, reference)
                (written / "README.md").write_text(card, encoding="utf-8")
                write_run_provenance(written, made)
            else:
                values = json.dumps(provenance_values(made), indent=1, sort_keys=True)
                (aside / f"{path.name}{FILE_PROVENANCE}").write_text(values, encoding="utf-8")
            _put_in_place(aside, path)
            finished.append(made)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _say(output, comparison, reference)
    if model.preprocess.bit_depth == 16 and settings.to != "safetensors":
        console.say(f"no {settings.to} file says that the model takes 16 bits: its images are pixels divided by 65535")
    return Result(output, figures)


def _check_output(output: str, to: Format) -> Path:
    path = Path(output)
    if to == "hf":
        if path.exists() and not path.is_dir():
            raise ToolkitError(f"output {output} is a file; --to hf writes a folder: name one")
        return path
    if path.is_dir():
        raise ToolkitError(f"output {output} is a folder; --to {to} writes a file: name one")
    if to in ("safetensors", "onnx") and path.suffix != f".{to}":
        raise ToolkitError(f"output {output!r} does not end in .{to}; name it so")
    if to == "official" and path.suffix == ".safetensors":
        raise ToolkitError(f"output {output!r}: the official code reads .pth; name it so, or give --to safetensors")
    return path


def _check_extra(to: Format) -> None:
    extra, modules = EXTRAS.get(to, ("", ()))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ToolkitError(
            f"--to {to} needs {', '.join(missing)}, not installed here; run `pip install 'dinov2-toolkit[{extra}]'`"
        )


def _is_up_to_date(path: Path, provenance: Provenance, options: Options) -> bool:
    """Tell whether this very export is there already; if so, touch it (so that Make rests) and say so."""
    empty = path.is_dir() and not any(path.iterdir())
    if not path.exists() or empty:
        return False
    there = _find_provenance(path)
    if there is None and path.is_dir():  # --force must not remove somebody's folder
        raise ToolkitError(f"{path} exists and is no export of ours; choose another -o, or remove it yourself")
    if options.force:
        return False
    if there is not None and there.same_work(provenance):
        console.say(f"{path} is up to date")
        if not options.dry_run:
            os.utime(path)
        return True
    reason = "is no export of ours" if there is None else f"was made otherwise ({difference(there, provenance)})"
    raise ToolkitError(f"{path} exists and {reason}; choose another -o, or --force to overwrite it")


def _check_side_files(path: Path, options: Options) -> None:
    """Raise ToolkitError when what goes with an export would take the place of something else without --force."""
    ours = _find_provenance(path) is not None
    for side in (path.with_name(f"{path.name}{ending}") for ending in (FILE_PROVENANCE, export_onnx.WEIGHTS_BESIDE)):
        if side.is_dir():
            raise ToolkitError(f"{side}, which goes with {path}, is a folder; choose another -o, or move it away")
        if side.exists() and not ours and not options.force:
            raise ToolkitError(
                f"{side}, which goes with {path}, exists and is of no export of ours;"
                " choose another -o, or --force to overwrite it"
            )


def _find_provenance(path: Path) -> Provenance | None:
    if path.is_dir():
        found = read_run_provenance(path)
        return found if found is not None and found.kind == "export" else None
    file = path.with_name(f"{path.name}{FILE_PROVENANCE}")
    if not file.is_file():
        return None
    try:
        return provenance_from(json.loads(file.read_text(encoding="utf-8")), file)
    except (ValueError, KeyError, TypeError):  # somebody's, by the same name
        return None


def _judge(to: Format, comparison: Comparison, reference: Reference, output: str) -> None:
    allowed = export.allowed_difference(to, reference)
    if comparison.difference <= allowed:
        return
    reason = f" ({comparison.note})" if comparison.difference == float("inf") and comparison.note else ""
    raise ToolkitError(
        f"{output} was not written: read back by {comparison.reader}, tokens differ by {comparison.difference:.1e}, "
        f"more than {allowed:.1e}{reason}; update that library, or report it with the output of `dinov2 --version`"
    )


def _figures(to: Format, comparison: Comparison, reference: Reference) -> dict[str, object]:
    return {
        "to": to,
        "largest_difference": comparison.difference,
        "image_size": reference.image_size,
        "images": len(reference.images),
        "read_by": comparison.reader,
        "other_image_size": reference.other_images.shape[-1],
        "other_difference": comparison.other_difference,
    }


def _say(output: str, comparison: Comparison, reference: Reference) -> None:
    size, other_size = reference.image_size, reference.other_images.shape[-1]
    console.say(
        f"{output}: largest difference of all tokens {comparison.difference:.1e} at {size} px (float32, "
        f"{len(reference.images)} random images), read back by {comparison.reader}"
    )
    if comparison.other_difference is not None:
        console.say(_position_policy(comparison.other_difference, other_size, reference.tokens.abs().max().item()))
    if comparison.note:
        console.say(comparison.note)


def _position_policy(other_difference: float, other_size: int, largest: float) -> str:
    """Say what another image size than the stored one does to the tokens."""
    if other_difference <= 1e-4 * max(1.0, largest):
        how = f"{other_difference:.1e} at {other_size} px"
        return f"at other sizes the reader interpolates position embeddings as the model does: {how}"
    return (
        f"at other sizes the reader interpolates position embeddings in its own way: tokens differ by "
        f"{other_difference:.1e} at {other_size} px; `--image-size {other_size}` stores them for that size"
    )


def _content_id(written: Path, to: Format) -> str:
    """Return the BLAKE2b-128 digest of the weights."""
    with (written / "model.safetensors" if to == "hf" else written).open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _put_in_place(aside: Path, path: Path) -> None:
    """Move what was written to its place: other files first, so that the output itself stands for a whole export."""
    for file in aside.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    for file in sorted(aside.iterdir(), key=lambda file: file.name == path.name):
        place = path.with_name(file.name)
        if place == path and place.is_dir():  # an earlier export, or empty
            shutil.rmtree(place)
        os.replace(file, place)
