"""Learning-rate and weight-decay multipliers are the official ones for every parameter."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dinov2_toolkit.train.engine.optimizer import parameter_multipliers

GOLDEN = Path(os.environ.get("DINOV2_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((GOLDEN / "meta.json").read_text())
EXPECTED = json.loads((GOLDEN / "param_groups.json").read_text())


@pytest.mark.parametrize(("part", "depth"), [("backbone", META["dims"]["depth"]), ("head", 0)])
def test_multipliers_equal_the_official_ones(part: str, depth: int) -> None:
    for name, expected in EXPECTED[part].items():
        multipliers = parameter_multipliers(
            name,
            depth=depth,
            layerwise_decay=EXPECTED["layerwise_decay"],
            patch_embed_lr_mult=EXPECTED["patch_embed_lr_mult"],
        )
        lr, weight_decay, is_last_layer = expected
        assert multipliers.lr_multiplier == pytest.approx(lr, rel=1e-5)
        assert (multipliers.wd_multiplier, multipliers.is_last_layer) == (weight_decay, is_last_layer)


def test_the_table_names_every_parameter() -> None:
    # Which of the backbones the table was made of shows in its names.
    assert EXPECTED["backbone"].keys() in [load_file(path).keys() for path in GOLDEN.glob("*.weights.safetensors")]
    head = load_file(GOLDEN / "head.safetensors")
    assert {f"state.{name}" for name in EXPECTED["head"]} == {name for name in head if name.startswith("state.")}
