"""The parts of benchmarks/gpu.py: each has a process of its own, and prints a JSON line, a row of its table, as soon as
it is measured.

    python -m dinov2_toolkit.benchmarks.gpu_parts step-S --device cuda --seconds 90 --scratch /tmp/a --output /tmp/a

On a CPU (a rehearsal) everything is tiny, and nothing of it says anything about a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dinov2_toolkit.benchmarks import gpu_training
from dinov2_toolkit.benchmarks.gpu_bench import MIN_GAIN, Bench, Row, gib, made_images, speed_cells
from dinov2_toolkit.benchmarks.measured import ROOT
from dinov2_toolkit.benchmarks.timing import now, steps_per_second
from dinov2_toolkit.features.extract.extract import extract, forward, open_model
from dinov2_toolkit.features.search.neighbors import nearest
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.store.manifest import Source
from dinov2_toolkit.store.vectors import Vectors
from dinov2_toolkit.train.monitor.flop import Crops, backbone_flop

MODULE = "dinov2_toolkit.benchmarks.gpu_parts"


def tests(bench: Bench) -> Iterator[Row]:
    """Run the tests marked gpu; in a rehearsal those that can run on a CPU too."""
    folder = ROOT / "tests"
    files = [str(path) for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise SystemExit("there are no tests beside the package; run this in a checkout")
    if bench.is_rehearsal:
        files = [str(folder / "test_gpu.py")]
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "DEVICE_OF_TESTS": bench.device.type, "COLUMNS": "300"}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        start = time.monotonic()
        for line in process.stdout:
            sys.stderr.write(line)
            if found := re.match(r"\S+::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)", line):
                seconds, start = time.monotonic() - start, time.monotonic()
                yield {"test": found[1], "outcome": found[2].lower(), "s": f"{seconds:.1f}"}
    if process.returncode:
        raise SystemExit(f"pytest ended with status {process.returncode}")


def embedding(bench: Bench) -> Iterator[Row]:
    """Time the forward passes of ViT-B/14, and features from files."""
    model = open_model(f"random:{'vit_tiny' if bench.is_rehearsal else 'vit_base'}")
    backbone = model.backbone.to(bench.device).eval()
    assert isinstance(backbone, VisionTransformer)
    side = bench.pick(model.preprocess.image_size, 28)
    num_tokens = 1 + (side // backbone.patch_size) ** 2
    flop = backbone_flop(backbone, Crops(1, num_tokens, num_tokens), 1.0, only_read=False)
    best = best_rate = 0
    for size in (2, 4) if bench.is_rehearsal else (64, 128, 256, 512, 1024):
        pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, device=bench.device)

        def features(pixels: torch.Tensor) -> object:
            return forward(backbone, model.preprocess, pixels, bench.device)

        rate, peak = steps_per_second(features, lambda pixels=pixels: pixels, bench.device)  # type: ignore[misc]
        yield {
            "features": f"{'ViT-B/14' if not bench.is_rehearsal else 'tiny'}, {side} px, pixels on the device",
            "batch": str(size),
            **speed_cells(bench, size * rate, flop),
            "GPU memory": gib(peak),
        }
        if size * rate < MIN_GAIN * best_rate:
            break
        best, best_rate = size, int(size * rate)
    images = [str(path) for path in made_images(bench)]
    uris, workers = images * bench.pick(8, 1), bench.pick(os.cpu_count() or 1, 1)
    for batch_size in (best, best):  # the first pass warms up
        start = now(bench.device)
        with closing(extract(model, uris, batch_size=batch_size, num_workers=workers)) as batches:
            num_images = sum(len(batch.indices) for batch in batches)
        rate = num_images / (now(bench.device) - start)
    yield {"features": f"from JPEG files of 500 x 400, {workers} workers", "batch": str(best)} | speed_cells(
        bench, rate, flop
    )


def command(folder: Path, environment: dict[str, str], *words: str) -> None:
    """Run a command of the toolkit."""
    subprocess.run([sys.executable, "-m", "dinov2_toolkit", *words], cwd=folder, env=environment, check=True)


def search(bench: Bench) -> Iterator[Row]:
    """Search the nearest neighbours on the device and on the CPU, in a process each, and compare them."""
    found = {}
    for device in dict.fromkeys((bench.device.type, "cpu")):
        output = bench.scratch / f"neighbors-{device}.npz"
        words = [sys.executable, "-m", MODULE, "neighbors", "--output", str(output)]
        subprocess.run([*words, "--device", bench.device.type], env=bench.environment(device), check=True)
        found[device] = dict(np.load(output))
    here, there = found[bench.device.type], found["cpu"]
    num_queries, k = here["indices"].shape
    same = float((here["indices"] == there["indices"]).mean())
    difference = float(np.abs(here["similarities"] - there["similarities"]).max())
    yield {
        "search": f"{num_queries:,} queries in {int(here['pool']):,} vectors of {int(here['dim'])}, k = {k}",
        "s here": f"{float(here['seconds']):.2f}",
        "s on the CPU": f"{float(there['seconds']):.2f}",
        "same neighbours": f"{same:.3%}",
        "largest difference of similarities": f"{difference:.1e}",
    }


def neighbors(output: Path, is_tiny: bool) -> None:
    """Search among random vectors on the device that this process sees; write neighbours and seconds."""

    num_queries, num_pool, dim = (20, 200, 16) if is_tiny else (10_000, 200_000, 384)
    generator = np.random.default_rng(0)
    sets = [generator.normal(size=(number, dim)).astype(np.float16) for number in (num_queries, num_pool)]
    queries, pool = (Vectors(array, np.arange(len(array)), Source("base", "memory", "0")) for array in sets)
    order = generator.permutation(num_pool)
    nearest(queries.take(np.arange(10)), pool, 4, order=order, progress=None)  # warms up
    start = time.perf_counter()
    result = nearest(queries, pool, min(64, num_pool), order=order, progress=None)
    seconds = time.perf_counter() - start
    np.savez(output, indices=result.indices, similarities=result.similarities, seconds=seconds, pool=num_pool, dim=dim)


def pixels(bench: Bench) -> Iterator[Row]:
    """Verify copies among images on the device and on the CPU, from the same embeddings; compare what is kept."""
    folder, num_images = bench.scratch / "copies", bench.pick(400, 4)
    folder.mkdir(exist_ok=True)
    for number, path in enumerate(made_images(bench)[:num_images]):
        image = Image.open(path)
        image.save(folder / f"{number}.png")
        image.crop((0, 8, 460, 400)).save(folder / f"{number}-cropped.jpg", quality=60)
    kept: dict[str, pa.Table] = {}
    seconds = {}
    for device in dict.fromkeys((bench.device.type, "cpu")):
        dinov2 = partial(command, bench.scratch, bench.environment(device))
        pool = bench.scratch / "copies.parquet"
        if not pool.exists():
            dinov2("curate", "embed", str(folder), "-o", str(pool), "--model", "copy", "-q")
        start = time.monotonic()
        dinov2("curate", "dedup", str(pool), "-o", str(bench.scratch / f"kept-{device}.parquet"), "-q")
        seconds[device] = time.monotonic() - start
        kept[device] = pq.read_table(bench.scratch / f"kept-{device}.parquet")
    here, there = kept[bench.device.type], kept["cpu"]
    differing = set(here.column("uri").to_pylist()) ^ set(there.column("uri").to_pylist())
    yield {
        "verification": f"dedup of {2 * num_images:,} images, half of them copies",
        "s here": f"{seconds[bench.device.type]:.1f}",
        "s on the CPU": f"{seconds['cpu']:.1f}",
        "kept here": f"{len(here):,}",
        "kept on the CPU": f"{len(there):,}",
        "kept on one alone": f"{len(differing):,}",
    }


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "tests": tests,
    "step-S": partial(gpu_training.steps, "S"),
    "step-B": partial(gpu_training.steps, "B"),
    "step-L": partial(gpu_training.steps, "L"),
    "run": gpu_training.run,
    "embedding": embedding,
    "search": search,
    "pixels": pixels,
    "official": gpu_training.official,
}


def main() -> None:
    """Run one part and print its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "neighbors"])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--official", type=Path)
    args = parser.parse_args()
    if args.part == "neighbors":
        neighbors(args.output, is_tiny=args.device == "cpu")
        return
    deadline = time.monotonic() + args.seconds
    bench = Bench(torch.device(args.device), deadline, args.seconds, args.scratch, args.output, args.official)
    for row in PARTS[args.part](bench):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
