"""Train the recipe `tiny` for 200 steps in float32, bf16 and fp16: do the losses follow one another?

    python benchmarks/mixed_precision.py --folder out/mixed-precision

The same images, crops, masks and first weights; in half precision the products and the student's residual stream are
half, norms, losses, teacher's logits and weights are not. A fourth run, in float32 with another seed, shows by how much
losses differ by chance. With the same folder finished runs are not repeated.
"""

import argparse
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import FASHION_POOL, assignments, dinov2, made_folder, write_result
from dinov2_toolkit.train.monitor.metrics import read_metrics

STEPS, SHOWN_EVERY = 200, 20
RUNS: dict[str, dict[str, object]] = {
    "float32": {"mixed_precision": "no"},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "float32, another seed": {"mixed_precision": "no", "seed": 1},
}


def losses_of(folder: Path, number: int, settings: dict[str, object]) -> list[float]:
    """Return the loss of every step of a run, made if it is not there."""
    changes = assignments({"steps": STEPS, "log_every": 1, "checkpoint_every": STEPS, **settings})
    dinov2(folder, "train", "pretrain", str(FASHION_POOL), "-o", f"run-{number}", "--recipe", "tiny", *changes)
    metrics = read_metrics(folder / f"run-{number}")
    skipped, scale = metrics[-1]["skipped_steps"], metrics[-1].get("loss_scale")
    print(f"{settings}: {skipped:.0f} steps skipped, scale {scale}")
    return [row["total"] for row in metrics]


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
    title = f"Losses of {STEPS} steps in half precision and in single, the recipe `tiny`"
    write_result("mixed_precision", title, ("step", *RUNS), rows, f"{notes}.")


if __name__ == "__main__":
    main()
