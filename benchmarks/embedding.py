"""Time `dinov2 curate embed`, the bare model and other programs, all in turn.

    python benchmarks/embedding.py --make 128 --images photos --repeats 3
    python benchmarks/embedding.py --images photos --peer "PY peer_embed.py hf --images photos" --peer "..."

bare: the model's forward passes alone, over the same images decoded beforehand, in the same batches and precision.
extract: files -> features, decoding ahead in threads. embed: the whole command, from the listing to the manifest.
Rates are medians of the repeats. Other work on the machine affects images/s, and hardly the CPU seconds per image. A
peer is any command whose last line is JSON with `img_per_s`. Ends with one JSON line.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from dinov2_toolkit import console
from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.features.extract.decoding import load_batches
from dinov2_toolkit.features.extract.extract import best_device, extract, forward, open_model, precision
from dinov2_toolkit.store.artifact import Options


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--make", type=int, metavar="N", help="write N JPEG files of 500 x 400 there first")
    parser.add_argument("--model", default="random:vit_small", help="default random:vit_small (224 px, patch 14)")
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="run in turn; repeatable")
    for flag, default in [("batch", 16), ("repeats", 3), ("threads", 2), ("workers", os.cpu_count() or 1)]:
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def make_images(folder: Path, count: int) -> None:
    """Write JPEG files of blurred noise with twelve coloured shapes each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (400, 500, 3), dtype=np.uint8))
        image = noise.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            left, right = np.sort(rng.integers(0, 500, 2)).tolist()
            top, bottom = np.sort(rng.integers(0, 400, 2)).tolist()
            draw.ellipse((left, top, right, bottom), fill=tuple(rng.integers(0, 256, 3).tolist()))
        image.save(folder / f"{number:05}.jpg", quality=90)


def main() -> None:
    """Run all methods in turn and print their rates."""
    arguments = parse_arguments()
    console.set_verbosity(quiet=True, verbose=0)
    if arguments.make:
        make_images(arguments.images, arguments.make)
    torch.set_num_threads(arguments.threads)
    device = best_device()
    model = open_model(arguments.model)
    uris = [str(path.absolute()) for path in sorted(arguments.images.iterdir())]
    sizes = {"batch_size": arguments.batch, "num_workers": arguments.workers}
    decoded = [batch.pixels for batch in load_batches(uris, model.preprocess, **sizes)]
    backbone = model.backbone.to(device).eval()

    def bare() -> None:
        for pixels in decoded:
            cls_token = forward(backbone, model.preprocess, pixels, device).cls_token
        cls_token.cpu()  # waits for the GPU

    def extracted() -> None:
        with closing(extract(model, uris, **sizes)) as batches:
            for _ in batches:
                pass

    def embedded() -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DINOV2_CATALOG"] = f"{folder}/catalog.duckdb"
            settings = EmbedSettings(arguments.model, batch_size=arguments.batch, num_workers=arguments.workers)
            embed_images([str(arguments.images)], f"{folder}/pool.parquet", settings, Options())

    methods: dict[str, Callable[[], None]] = {"bare": bare, "extract": extracted, "embed": embedded}
    forward(backbone, model.preprocess, decoded[0], device)  # not timed
    rates: dict[str, list[float]] = {name: [] for name in [*methods, *arguments.peer]}
    cpu_s: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(arguments.repeats):
        for name, run in methods.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            rates[name].append(len(uris) / (time.perf_counter() - start))
            cpu_s[name].append((time.process_time() - cpu_start) / len(uris))
        for peer in arguments.peer:
            output = subprocess.run(shlex.split(peer), check=True, capture_output=True, text=True).stdout
            rates[peer].append(float(json.loads(output.splitlines()[-1])["img_per_s"]))

    found = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "device": str(device),
        "precision": str(precision(device)),
        "batch": arguments.batch,
        "images": len(uris),
        "load": round(os.getloadavg()[0], 1),
        "img_per_s": {name: round(rate, 2) for name, rate in found.items()},
        "spread": {name: round((max(v) - min(v)) / statistics.median(v), 2) for name, v in rates.items()},
        "of_bare": {name: round(found[name] / found["bare"], 3) for name in found},
        "cpu_s_per_image": {name: round(statistics.median(values), 4) for name, values in cpu_s.items()},
        "cpu_of_bare": {name: round(min(cpu_s["bare"]) / min(values), 3) for name, values in cpu_s.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
