"""Train the recipe `tiny` for 200 steps in float32 and in bf16: do the losses follow one another?

    python benchmarks/mixed_precision.py --folder out/mixed-precision

The same images, crops, masks and first weights. Under bf16 matrix products and the student's residual stream are half;
norms, losses, weights, and the teacher's logits are not. With the same folder finished runs are not repeated.
"""

import argparse
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import FASHION_POOL, assignments, dinov2, made_folder, write_result
from dinov2_toolkit.train.monitor.metrics import read_metrics

STEPS, SHOWN_EVERY = 200, 20
RUNS: dict[str, dict[str, object]] = {
    "float32": {"mixed_precision": "no"},
    "bf16": {"mixed_precision": "bf16"},
}


def losses_of(folder: Path, number: int, settings: dict[str, object]) -> list[float]:
    """Return the loss of every step of a run, made if it is not there."""
    changes = assignments({"steps": STEPS, "log_every": 1, "checkpoint_every": STEPS, **settings})
    dinov2(folder, "train", "pretrain", str(FASHION_POOL), "-o", f"run-{number}", "--recipe", "tiny", *changes)
    return [row["total"] for row in read_metrics(folder / f"run-{number}")]


def main() -> None:
    """Train, and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where the runs are kept")
    folder: Path = parser.parse_args().folder
    curves = {name: losses_of(folder, number, settings) for number, (name, settings) in enumerate(RUNS.items())}
    single = curves["float32"]
    shown = [0, *range(SHOWN_EVERY - 1, STEPS, SHOWN_EVERY)]
    rows = [(step + 1, *(f"{curve[step]:.3f}" for curve in curves.values())) for step in shown]
    differences = {
        name: [abs(other - own) for other, own in zip(curve, single, strict=True)] for name, curve in curves.items()
    }
    notes = f"Difference from float32 over all {STEPS} steps: " + "; ".join(
        f"{name} {max(values):.3f} at most, {sum(values) / STEPS:.3f} on average, {values[-1]:.3f} at the last step"
        for name, values in differences.items()
        if name != "float32"
    )
    title = f"Losses of {STEPS} steps in bf16 and in float32, the recipe `tiny`"
    write_result("mixed_precision", title, ("step", *RUNS), rows, f"{notes}.")


if __name__ == "__main__":
    main()
