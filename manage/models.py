"""`dinov2 models`: the architectures and what they cost, the released weights, and how to get them here."""

import json
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import console
from ..models.block import SwiGlu
from ..models.build import ARCHITECTURES, build_vit
from ..models.released import RELEASED, cached_weights, find_released, pull
from ..models.vit import VisionTransformer
from ..store.artifact import Result

IMAGE_SIZE = 224  # pixels a side, cut into patches of 14
PATCH_SIZE = 14


@dataclass(frozen=True)
class Cost:
    """What an architecture takes, in float32, for images of 224 px in patches of 14."""

    parameters: int
    gflop: float  # of a forward pass of one image; a multiplication and an addition are two
    weights_mib: float
    activations_mib: float  # of one image, that training keeps for the backward pass


def list_models(as_json: bool) -> None:
    """Print the architectures with their cost, then the released weights with size, licence and address."""
    costs = {name: architecture_cost(name) for name in ARCHITECTURES}
    weights = [find_released(name) for name in RELEASED]
    if as_json:
        architectures = [{"name": name, **asdict(ARCHITECTURES[name]), **asdict(cost)} for name, cost in costs.items()]
        released = [{**asdict(each), "pulled": cached_weights(each.name).exists()} for each in weights]
        print(json.dumps({"architectures": architectures, "weights": released}))
        return
    print("architecture  width  blocks  heads  ffn      parameters     GFLOP  weights MiB  activations MiB")
    for name, cost in costs.items():
        shape = ARCHITECTURES[name]
        print(
            f"{name:<12}  {shape.embed_dim:>5}  {shape.depth:>6}  {shape.num_heads:>5}  {shape.ffn:<6}  "
            f"{cost.parameters:>13,}  {cost.gflop:>8.1f}  {cost.weights_mib:>11,.0f}  {cost.activations_mib:>15,.0f}"
        )
    print(f"(a {IMAGE_SIZE} px image, patches of {PATCH_SIZE}: GFLOP forward, activations kept to train; float32)")
    print("\nreleased weights    architecture  registers       MiB  licence     here  address")
    for each in weights:
        here = "yes" if cached_weights(each.name).exists() else "no"
        print(
            f"{each.name:<18}  {each.arch:<12}  {each.num_register_tokens:>9}  {each.size / 2**20:>8,.1f}  "
            f"{each.licence:<10}  {here:<4}  {each.address}"
        )
    print("(`dinov2 models pull NAME` fetches one; then --model NAME works everywhere)")


def architecture_cost(arch: str) -> Cost:
    """Return what a ViT of a named architecture costs, as it was released: patches of 14, no registers."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted:  # which counts matrix products
        backbone = build_vit(arch, patch_size=PATCH_SIZE)
        backbone.forward_features(torch.empty(1, backbone.in_chans, IMAGE_SIZE, IMAGE_SIZE))
    parameters = sum(weight.numel() for weight in backbone.parameters())
    activations = backbone.depth * kept_activations(backbone, IMAGE_SIZE)
    return Cost(parameters, counted.get_total_flops() / 1e9, 4 * parameters / 2**20, 4 * activations / 2**20)


def kept_activations(backbone: VisionTransformer, image_size: int) -> int:
    """Return how many numbers a block keeps of one image for the backward pass, attention never held whole."""
    tokens = 1 + backbone.num_register_tokens + (image_size // backbone.patch_size) ** 2
    width = backbone.embed_dim
    attention = 6 * width + backbone.num_heads + 2  # norm in and out, q, k, v, attended; log-sums; mean and deviation
    mlp = backbone.get_submodule("blocks.0.mlp")
    inner = 4 * mlp.w3.in_features if isinstance(mlp, SwiGlu) else 2 * 4 * width  # SwiGLU: gate and value too
    return tokens * (attention + 2 * width + 2 + inner)


def pull_model(name: str, force: bool, dry_run: bool) -> Result | None:
    """Fetch released weights into the cache; return where they are, None after a dry run.

    Raises ToolkitError when there are none of that name, the server cannot be reached, or what came is something else.
    """
    weights, file = find_released(name), cached_weights(name)
    console.say(f"{weights.name}: {weights.address}, {weights.size:,} bytes, licence {weights.licence}")
    figures = {key: getattr(weights, key) for key in ("name", "address", "size", "sha256", "licence")}
    if file.exists() and not force:
        console.say(f"{file} is up to date")
        return None if dry_run else Result(str(file), figures)
    if dry_run:
        console.say(f"would fetch it to {file}")
        return None
    with console.progress(f"pulling {name}", weights.size, "bytes") as advance:
        pull(weights, file, advance)
    console.say(f"size and sha256 are those of the released file; --model {name} takes it")
    return Result(str(file), figures)
