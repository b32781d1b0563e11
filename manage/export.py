"""`dinov2 export`: a model in another library's format, compared with the model before it counts as done."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .. import console
from ..errors import ToolkitError
from ..models import export, export_hf, export_onnx
from ..models.export import Comparison, Format, Reference
from ..models.saved import full_disk_said
from ..models.weights import Model, load_model, model_content_id
from ..store.artifact import (
    FILE_PROVENANCE,
    RUN_PROVENANCE,
    Options,
    Result,
    make,
    provenance_at,
    read_run_provenance,
    write_provenance,
)
from ..store.files import flush, temporary_beside
from ..store.manifest import Provenance, Source, toolkit_version
from .model_card import model_card

FOLDER_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", RUN_PROVENANCE}  # of hf
LIBRARIES = {"hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}  # the extras of these names

STEPS: dict[Format, tuple[Callable[[Model, Path], None], Callable[[Model, Path, Reference], Comparison]]] = {
    "official": (export.write_official, export.compare_official),
    "safetensors": (export.write_safetensors, export.compare_safetensors),
    "timm": (export.write_timm, export.compare_timm),
    "hf": (export_hf.write_hugging_face, export_hf.compare_hugging_face),
    "onnx": (export_onnx.write_onnx, export_onnx.compare_onnx),
}


def export_model(source: str, output: str, to: Format, image_size: int | None, options: Options) -> Result | None:
    """Write a model in another format, read it back, compare, and only then put it in its place.

    Args:
        source: what `--model` takes.
        image_size: that the position embedding is stored for; None: as it is, for ONNX the model's own.
        options: `limit` is the number of random images compared.

    Returns the output with the largest difference among its figures; None after a dry run.
    Raises ToolkitError if there is no such model, the format's library is missing, something else stands at the output,
    or what was read back is not the model.
    """
    path = _check_output(output, to)
    _check_libraries(to)
    original = load_model(source, seed=options.seed)
    stored_size = original.preprocess.image_size if to == "onnx" else original.backbone.img_size
    model = export.model_at_size(original, image_size or stored_size)
    size = model.backbone.img_size
    named = str(Path(source).absolute()) if Path(source).exists() else source
    provenance = Provenance(
        kind="export",
        command="export",
        parameters={"to": to, "image_size": size, "limit": options.limit},
        seed=options.seed,
        inputs=(Source("model", named, original.content_id),),
    )
    _check_place(path, options)
    num_mib = sum(4 * weight.numel() for weight in model.backbone.parameters()) / 2**20

    def describe() -> None:
        console.say(f"would write {source} as {to} for {size} px to {path}, about {num_mib:,.0f} MiB")

    def work() -> Provenance:
        _check_files(path)
        reference = export.make_reference(original, size, options.limit or export.DEFAULT_IMAGES, options.seed)
        return _write_checked(path, model, source, to, reference, provenance)

    is_empty = path.is_dir() and not any(path.iterdir())
    return make(
        output, provenance, options, describe=describe, work=work, update=is_empty, kind="export", find=_export_at
    )


def _write_checked(
    path: Path, model: Model, source: str, to: Format, reference: Reference, provenance: Provenance
) -> Provenance:
    """Write the export aside, compare what is read back, and move it to its place; return its provenance."""
    write, compare = STEPS[to]
    with temporary_beside(path) as aside, full_disk_said(path.parent):
        aside.mkdir()
        written = aside / path.name
        if to == "hf":
            written.mkdir()
        write(model, written)
        comparison = compare(model, written, reference)
        _check_difference(to, comparison, reference, path)
        figures: dict[str, object] = {
            "to": to,
            "largest_difference": comparison.difference,
            "image_size": reference.image_size,
            "images": len(reference.images),
            "read_by": comparison.reader,
            "other_image_size": reference.other_images.shape[-1],
            "other_difference": comparison.other_difference,
        }
        content_id = model_content_id(written)
        made = replace(provenance, figures=figures, content_id=content_id, version=toolkit_version())
        if to == "hf":
            card = model_card(model, source, read_run_provenance(Path(source)), comparison, reference)
            (written / "README.md").write_text(card, encoding="utf-8")
            write_provenance(written / RUN_PROVENANCE, made)
        else:
            write_provenance(aside / f"{path.name}{FILE_PROVENANCE}", made)
        _put_in_place(aside, path)
    _say(path, comparison, reference)
    if model.preprocess.bit_depth == 16 and to != "safetensors":
        console.say(f"no {to} file says that the model takes 16 bits: its images are pixels divided by 65535")
    return made


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


def _check_libraries(to: Format) -> None:
    if missing := [module for module in LIBRARIES.get(to, ()) if importlib.util.find_spec(module) is None]:
        names = ", ".join(missing)
        raise ToolkitError(f"--to {to} needs {names}, not installed here; run `pip install 'dinov2-toolkit[{to}]'`")


def _check_place(path: Path, options: Options) -> None:
    """Raise ToolkitError when an export would take the place of somebody's folder or of side files without --force."""
    is_ours = _export_at(path) is not None
    if path.is_dir():
        if not is_ours and any(path.iterdir()):  # which --force must not remove
            raise ToolkitError(f"{path} exists and is no export of ours; choose another -o, or remove it yourself")
        return
    for side in (path.with_name(f"{path.name}{ending}") for ending in (FILE_PROVENANCE, export_onnx.WEIGHTS_BESIDE)):
        if side.is_dir():
            raise ToolkitError(f"{side}, which goes with {path}, is a folder; choose another -o, or move it away")
        if side.exists() and not is_ours and not options.force:
            what = f"{side}, which goes with {path}, exists and is of no export of ours"
            raise ToolkitError(f"{what}; choose another -o, or --force to overwrite it")


def _check_files(path: Path) -> None:
    """Raise ToolkitError when a folder that is replaced holds what no export wrote."""
    others = sorted({file.name for file in path.iterdir()} - FOLDER_FILES) if path.is_dir() else []
    if others:
        raise ToolkitError(f"{path} holds {others[0]!r}, which no export wrote; move it away, or choose another -o")


def _export_at(path: Path) -> Provenance | None:
    found = provenance_at(path)
    return found if found is not None and found.kind == "export" else None


def _check_difference(to: Format, comparison: Comparison, reference: Reference, path: Path) -> None:
    allowed = export.allowed_difference(to, reference)
    if comparison.difference > allowed:
        reason = f" ({comparison.note})" if comparison.difference == float("inf") and comparison.note else ""
        raise ToolkitError(
            f"{path} was not written: read back by {comparison.reader}, tokens differ by {comparison.difference:.1e}, "
            f"more than {allowed:.1e}{reason}; update that library, or report it with the output of `dinov2 --version`"
        )


def _say(path: Path, comparison: Comparison, reference: Reference) -> None:
    size, other_size = reference.image_size, reference.other_images.shape[-1]
    console.say(
        f"{path}: largest difference of all tokens {comparison.difference:.1e} at {size} px (float32, "
        f"{len(reference.images)} random images), read back by {comparison.reader}"
    )
    if comparison.other_difference is not None:
        is_same = comparison.other_difference <= 1e-4 * max(1.0, reference.tokens.abs().max().item())
        advice = "" if is_same else f"; `--image-size {other_size}` stores them for that size"
        how = "as the model does" if is_same else "in its own way"
        console.say(
            f"at other sizes the reader interpolates position embeddings {how}: tokens differ by "
            f"{comparison.other_difference:.1e} at {other_size} px{advice}"
        )
    if comparison.note:
        console.say(comparison.note)


def _put_in_place(aside: Path, path: Path) -> None:
    """Move what was written to its place: other files first, so that the output itself stands for a whole export.

    An earlier export goes before them: none stands with the weights or the provenance of another.
    """
    files = sorted(aside.iterdir(), key=lambda file: file.name == path.name)
    for file in aside.rglob("*"):
        flush(file)
    if path.exists():
        os.replace(path, aside / ".earlier")
    for file in files:
        os.replace(file, path.with_name(file.name))
