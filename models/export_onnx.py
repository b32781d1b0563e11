"""A model as an ONNX graph: any number of images of one size, the position embedding of that size baked in.

Shapes: B images, C channels, S side in pixels, N patch tokens, D embed_dim.
"""

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .export import Comparison, Reference, largest_difference
from .vit import VisionTransformer
from .weights import Model

MAX_FILE_BYTES = 1_900_000_000  # a protobuf ends at 2 GiB: larger weights go into a file of their own
WEIGHTS_BESIDE = ".data"  # behind the name of the graph
INPUT, OUTPUTS = "images", ("cls_token", "patch_tokens")
BATCHES = (1, 3)


class _Tokens(nn.Module):
    """The backbone with plain outputs."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.forward_features(images)
        return features.cls_token, features.patch_tokens


def write_onnx(model: Model, file: Path) -> None:
    """Write images (B, C, S, S) float32 -> cls_token (B, D), patch_tokens (B, N, D); S is the backbone's own size.

    The mean and deviation that images are normalised by stand in the metadata. Weights beyond what a file may hold go
    to FILE.data beside it.
    """
    backbone = model.backbone
    num_bytes = sum(4 * parameter.numel() for parameter in backbone.parameters())
    images = torch.zeros(2, backbone.in_chans, backbone.img_size, backbone.img_size)  # 1 would be taken for constant
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses torchvision, which has no part in this
    try:
        with warnings.catch_warnings(action="ignore"):  # of libraries about one another
            program = torch.onnx.export(
                _Tokens(backbone).eval(),
                (images,),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    described = {"mean": model.preprocess.mean, "std": model.preprocess.std, "image_size": backbone.img_size}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in described.items()})
    program.save(file, external_data=num_bytes > MAX_FILE_BYTES)


def compare_onnx(model: Model, file: Path, reference: Reference) -> Comparison:
    """Run the graph with onnxruntime at several batch sizes, and compare class and patch tokens."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    first_patch = 1 + model.backbone.num_register_tokens
    differences = []
    for batch in BATCHES:
        chosen = torch.arange(batch) % len(reference.images)  # few images, repeated
        outputs = session.run(list(OUTPUTS), {INPUT: reference.images[chosen].numpy()})
        cls_token, patch_tokens = map(torch.from_numpy, outputs)
        differences.append(largest_difference(cls_token, reference.tokens[chosen, 0]))
        differences.append(largest_difference(patch_tokens, reference.tokens[chosen, first_patch:]))
    reader = f"onnxruntime {onnxruntime.__version__}, batches of {' and '.join(map(str, BATCHES))}"
    size = model.backbone.img_size
    note = f"takes images of {size} x {size} pixels, any number of them; others by another --image-size"
    return Comparison(reader, max(differences), None, note)
