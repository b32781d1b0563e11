"""The model card of an exported folder: what the model is, how it is used, where it comes from."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..models.architecture import backbone_settings
from ..models.export import Comparison, Reference
from ..models.export_hf import described_pixels, has_processor
from ..models.released import RELEASED
from ..models.weights import Model
from ..store.manifest import Provenance, toolkit_version


def model_card(model: Model, source: str, run: Provenance | None, comparison: Comparison, reference: Reference) -> str:
    """Return README.md: metadata for the Hub, use, position policy, provenance. Of paths only file names are kept.

    `source` is the model's name on the command line, `run` the provenance of the run that it is from, if any.
    """
    other = comparison.other_difference
    licence = f"license: {RELEASED[source].licence.lower()}\n" if source in RELEASED else ""
    settings = backbone_settings(model.backbone)
    parameters = sum(weight.numel() for weight in model.backbone.parameters())
    registers = f", {settings.num_register_tokens} register tokens" if settings.num_register_tokens else ""
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [dinov2, self-supervised]
{licence}---

# {Path(source).name}

A DINOv2 vision transformer: {parameters:,} parameters, {settings.depth} blocks of width {settings.embed_dim}, \
{settings.num_heads} heads, {settings.ffn} feed-forward, patches of {settings.patch_size} px{registers}.

## Use

{_use(model)}

`last_hidden_state` holds the class token{", the registers" if registers else ""} and the patch tokens row by row, \
after the final norm.

## Image sizes

Position embeddings are stored for {reference.image_size} x {reference.image_size} px. There, tokens read back by \
{comparison.reader} differ from the original model's by {comparison.difference:.1e} at most (float32, random images); \
at {reference.other_images.shape[-1]} px, where transformers interpolates them, by \
{"an unknown amount" if other is None else f"{other:.1e}"}.

## Provenance

{_provenance(model, source, run)}
"""


def _use(model: Model) -> str:
    if has_processor(model):
        return """```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("this folder")
model = AutoModel.from_pretrained("this folder")
pixels = processor(Image.open("photo.jpg"), return_tensors="pt")
features = model(**pixels).last_hidden_state[:, 0]  # the class token
```

Where the border around the centre crop is an odd number of pixels, this processor may cut a pixel further left or up
than dinov2-toolkit does."""
    channels, side = model.backbone.in_chans, model.preprocess.image_size
    return (
        f"The model takes {described_pixels(model)}, which no image processor of transformers makes. Prepare "
        f"`pixel_values` (B, {channels}, {side}, {side}): values in [0, 1], less "
        f"{list(model.preprocess.mean)}, divided by {list(model.preprocess.std)}, a number a channel."
    )


def _provenance(model: Model, source: str, run: Provenance | None) -> str:
    facts = [f"exported by dinov2-toolkit {toolkit_version()}", f"weights: {model.content_id} (BLAKE2b-128)"]
    if source in RELEASED:
        facts.append(f"released weights: {RELEASED[source].address}, {RELEASED[source].licence}")
    if run is None:
        return "\n".join(f"- {fact}" for fact in facts)
    facts.append(f"made by `dinov2 {run.command}`, dinov2-toolkit {run.version}, seed {run.seed}")
    facts += [f"{entry.role}: {Path(entry.path).name}, content id {entry.content_id}" for entry in run.inputs]
    bullets = "\n".join(f"- {fact}" for fact in facts)
    settings = json.dumps(_without_folders(run.parameters), indent=1, sort_keys=True)
    figures = "\n".join(f"| {name} | {value} |" for name, value in sorted(run.figures.items()))
    table = f"\n\n| last step | |\n|---|---|\n{figures}" if figures else ""
    return f"{bullets}\n\nIts settings:\n\n```json\n{settings}\n```{table}"


def _without_folders(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return parameters with paths reduced to their last part: folders may hold names that are private."""
    return {
        name: Path(value).name if isinstance(value, str) and ("/" in value or "\\" in value) else value
        for name, value in parameters.items()
    }
