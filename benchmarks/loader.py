"""Time the loader of training beside bare decoding by as many processes, in turn; compare batches; watch the memory.

    python benchmarks/loader.py --folder out/loader

bare: processes that read their share of the files, decode them as training does, and drop the pixels.
loader: `read_batches`, which brings the pixels here and packs every batch. Figures are medians of the rounds.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from dinov2_toolkit.benchmarks.long_runs import gauges
from dinov2_toolkit.benchmarks.measured import made_folder, table, write_page
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.data.images import Batch, image_set, read_batches
from dinov2_toolkit.train.data.multicrop import decoded_side_px
from dinov2_toolkit.train.data.pixels import decode_pixels

SIZES = ((500, 400), (1024, 768))
WARM_BATCHES, AHEAD = 6, 3  # before those that are timed, and after them, so that the loader is as busy as before
SIDE_PX = decoded_side_px(resolve(TrainConfig, "vits16-1gpu"))

Cost = tuple[float, float]  # images a second, and CPU milliseconds an image of all processes


def make_images(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Write JPEG files of blurred noise, unless they are there; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.jpg" for number in range(count)]
    rng = np.random.default_rng(0)
    for path in paths:
        if not path.exists():
            noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
            noise.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3))).save(path, quality=90)
    return [str(path) for path in paths]


def batches_of(paths: list[str], num_images: int, batch_size: int, num_workers: int) -> Iterator[Batch]:
    """Return the batches of so many images."""
    batches = (range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size))
    images = image_set(pa.table({"uri": paths}))
    return read_batches(images, seed=0, batches=batches, short_side_px=SIDE_PX, num_workers=num_workers)


def decode_files(paths: list[str]) -> None:
    """Decode files, and drop the pixels."""
    for path in paths:
        decode_pixels(Path(path).read_bytes(), SIDE_PX)


def bare(pool: Pool, paths: list[str], num_processes: int) -> Cost:
    """Return what it costs that the processes of a pool decode each file once."""
    cost = started_cost()
    pool.map(decode_files, [paths[process::num_processes] for process in range(num_processes)], chunksize=1)
    return cost(len(paths))


def loaded(paths: list[str], batch_size: int, num_workers: int) -> Cost:
    """Return what it costs that the loader brings as many images, once its first batches have taken their memory."""
    num_batches = len(paths) // batch_size
    batches = batches_of(paths, (WARM_BATCHES + num_batches + AHEAD) * batch_size, batch_size, num_workers)
    for _ in islice(batches, WARM_BATCHES):
        pass
    cost = started_cost()
    for batch in islice(batches, num_batches):
        assert not batch.num_replaced
    return cost(num_batches * batch_size)


def started_cost() -> Callable[[int], Cost]:
    """Start to count; return a function of a number of images that returns what they cost."""

    def now() -> tuple[float, float]:
        return time.perf_counter(), gauges(os.getpid(), Path("/nowhere"))["cpu_s"]  # of all processes below this one

    start_s, start_cpu_s = now()

    def cost(num_images: int) -> Cost:
        end_s, end_cpu_s = now()
        return num_images / (end_s - start_s), 1000 * (end_cpu_s - start_cpu_s) / num_images

    return cost


def rates(folder: Path, num_images: int, batch_size: int, rounds: int) -> list[list[object]]:
    """Return a row for each size of image and number of processes."""
    rows: list[list[object]] = []
    for width, height in SIZES:
        paths = make_images(folder / f"{width}x{height}", (width, height), num_images)
        for num_processes in (1, 2):
            with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
                bare(pool, paths[: 4 * num_processes], num_processes)  # what it takes is there
                in_turn = (
                    (bare(pool, paths, num_processes), loaded(paths, batch_size, num_processes)) for _ in range(rounds)
                )
                costs = np.array(list(in_turn))  # (rounds, bare and loader, rate and CPU)
            (bare_rate, bare_ms), (loader_rate, loader_ms) = np.median(costs, axis=0)
            ratios = costs[:, 1, 0] / costs[:, 0, 0]
            spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            name = f"{width} x {height}"
            rows.append([name, num_processes, bare_rate, loader_rate, spread, bare_ms, loader_ms, bare_ms / loader_ms])
    return rows


def digest(paths: list[str], num_images: int, batch_size: int, num_workers: int) -> str:
    """Return a hash of all pixels, sizes and samples, in order."""
    found = blake2b(digest_size=8)
    for batch in batches_of(paths, num_images, batch_size, num_workers):
        found.update(batch.samples.tobytes() + batch.images.sizes.tobytes())
        for number in range(len(batch.samples)):
            found.update(batch.images.image(number).numpy().tobytes())
    return found.hexdigest()


def memory(paths: list[str], num_images: int, batch_size: int) -> list[tuple[int, float]]:
    """Return (images, MB of this process and its decoders) each tenth of so many images."""
    found, seen = list[tuple[int, float]](), 0
    for batch in batches_of(paths, num_images, batch_size, 2):
        seen += len(batch.samples)
        if seen * 10 // num_images > len(found):
            found.append((seen, gauges(os.getpid(), Path(paths[0]).parent)["pss_mb"]))
    return found


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where the images are kept")
    for flag, default in (("images", 512), ("batch", 32), ("rounds", 5), ("steady", 20_000)):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default:,}")
    args = parser.parse_args()
    header = ["JPEG files", "processes", "bare, images/s", "loader, images/s", "loader over bare"]
    header += ["bare, CPU ms an image", "loader, CPU ms an image", "bare over loader"]
    rows = rates(args.folder, args.images, args.batch, args.rounds)
    paths = make_images(args.folder / "500x400", SIZES[0], args.images)
    digests = {workers: digest(paths, args.images, args.batch, workers) for workers in (0, 1, 2, 4)}
    sizes = memory(paths, args.steady, args.batch)
    same = "the same batches, bit for bit" if len(set(digests.values())) == 1 else f"OTHER BATCHES: {digests}"
    body = f"""Batches of {args.batch}, images decoded to a short side of at most {SIDE_PX} px; medians of {args.rounds}
rounds in turn.

{table(header, rows)}

0, 1, 2 and 4 workers bring {same}.

Memory of the process and its two decoders (what they share counts once) over {args.steady:,} images of 500 x 400:

{table(["images", *(f"{seen:,}" for seen, _ in sizes)], [["MB", *(f"{size:.0f}" for _, size in sizes)]])}"""
    print(body)
    write_page("loader", "The loader of training beside bare decoding", body)


if __name__ == "__main__":
    main()
