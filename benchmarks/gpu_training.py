"""The parts of benchmarks/gpu.py that train: steps on random crops, the official code's, and a run from files."""

import gzip
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from dinov2_toolkit import console
from dinov2_toolkit.benchmarks.gpu_bench import MIN_GAIN, NOT_KNOWN, Bench, Row, gib, made_images, speed_cells
from dinov2_toolkit.benchmarks.step import random_batch, training_step
from dinov2_toolkit.benchmarks.timing import steps_per_second
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train import pretrain as loop
from dinov2_toolkit.train.config import TrainConfig, write_config
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.monitor.flop import flop_per_image
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.run import MonitorOptions


class Timed(NamedTuple):
    """What is timed: a model by the settings of a recipe."""

    title: str
    recipe: str
    changes: tuple[str, ...]
    sizes: tuple[int, ...]  # batches to try, rising


MODELS = {
    "S": Timed("ViT-S/16", "vits16-1gpu", (), (64, 128, 256, 512, 1024)),
    "B": Timed("ViT-B/16", "vitb14-8gpu", ("patch_size=16", "local_crop_size_px=96"), (32, 64, 128, 256, 512)),
    "L": Timed("ViT-L/16", "vitl16-short", (), (16, 32, 64, 128, 256)),
}
TINY_SIZES = (2, 4)
NUM_COUNTED, FIRST_COUNTED, LOGGED = 20, 10, 40  # steps: of which synchronisations are counted; from this one on; a log
NUM_TRACED = 4


def steps(model: str, bench: Bench) -> Iterator[Row]:
    """Time training steps: eager ones at growing batches, then compiled ones at the best."""
    title, recipe, changes, sizes = MODELS[model]
    config = bench.settings(recipe, *changes, "compile=false", "sequential_views=false")
    best, best_rate = 0, 0.0
    for size in TINY_SIZES if bench.is_rehearsal else sizes:
        rate, row = step_row(bench, title, "eager", config, size)
        yield row
        if rate < MIN_GAIN * best_rate:
            break
        best, best_rate = size, rate
        if bench.left() < 0.6:
            break
    compiled = replace(config, compile=True)
    of_recipe = bench.settings(recipe, *changes, "compile=true")
    for what, settings in (("compiled", compiled), ("compiled, views as the recipe has them", of_recipe)):
        if what == "compiled" or settings != compiled:
            yield step_row(bench, title, what, settings, best)[1]


def step_row(bench: Bench, title: str, what: str, config: TrainConfig, size: int) -> tuple[float, Row]:
    """Return the images/s of a training step, 0 where its memory does not suffice, and the row that says it."""
    row = {"model": title, "step": what, "batch": str(size)}
    accelerator = Accelerator(cpu=bench.is_rehearsal, mixed_precision=config.mixed_precision)
    try:
        step = training_step(config, accelerator, size)
        rate, peak = steps_per_second(step, partial(random_batch, config, size, bench.device), bench.device)
    except torch.OutOfMemoryError:
        return 0.0, row | {"images/s": "out of memory"}
    with torch.device("meta"):
        flop = flop_per_image(replace(config, activation_checkpointing="none"), build_model(config))
    return size * rate, row | speed_cells(bench, size * rate, flop) | {"GPU memory": gib(peak)}


def official(bench: Bench) -> Iterator[Row]:
    """Time the official code's steps at the same settings."""
    if bench.official is None:
        yield {"model": "official code", "images/s": "not measured: no --official FOLDER"}
        return
    models = ("S", "L", "B")
    for number, (title, recipe, changes, sizes) in enumerate(map(MODELS.__getitem__, models)):
        end = time.monotonic() + (bench.deadline - time.monotonic()) / (len(models) - number)
        config = bench.settings(recipe, *changes)
        settings = bench.scratch / "official.toml"
        write_config(config, settings)
        words = [sys.executable, "-m", "dinov2_toolkit.benchmarks.official_step", str(bench.official)]
        words += ["--recipe", str(settings), "--device", bench.device.type]
        words += ["--sizes", *map(str, TINY_SIZES if bench.is_rehearsal else sizes[:-1])]
        with torch.device("meta"):
            flop = flop_per_image(config, build_model(config))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                row = {"model": title, "batch": str(found["batch"])}
                yield row | speed_cells(bench, found["images/s"], flop) | {"GPU memory": gib(found["peak_bytes"])}
                if time.monotonic() > end:
                    process.kill()
        if process.returncode > 0:
            yield {"model": title, "batch": f"failed with status {process.returncode}"}


def run(bench: Bench) -> Iterator[Row]:
    """Train by the recipe from JPEG files: count what the host waits for, take the last steps' figures and a trace."""
    folder = bench.scratch / "run"
    config = bench.settings(
        "vits16-1gpu",
        f"steps={2 * LOGGED}",
        f"log_every={LOGGED}",
        "cache_mib=0",
        f"num_workers={bench.pick(os.cpu_count() or 1, 1)}",
        f"batch_size={bench.pick(256, 2)}",
        f"compile={'false' if bench.is_rehearsal else 'true'}",
    )
    images = made_images(bench)
    pq.write_table(pa.table({"uri": [str(path) for path in images]}), bench.scratch / "images.parquet")
    num_done, places = 0, dict[str, int]()
    pretraining: Any = loop  # whose name for what begins a step is replaced
    apply_rates = pretraining.apply_rates

    def beginning(*arguments: object) -> None:
        nonlocal num_done
        is_counted = FIRST_COUNTED <= num_done < FIRST_COUNTED + NUM_COUNTED
        if not bench.is_rehearsal:
            torch.cuda.set_sync_debug_mode("warn" if is_counted else "default")
        num_done += 1
        apply_rates(*arguments)

    def noticed(message: Warning | str, category: type[Warning], file: str, line: int, *_: object) -> None:
        if "called a synchronizing" in str(message):  # torch also warns, once, that it may not see all
            place = f"{Path(file).name}:{line}"
            places[place] = places.get(place, 0) + 1
        else:
            console.detail(str(message))

    pretraining.apply_rates = beginning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = noticed  # type: ignore[assignment]
        loop.pretrain(
            bench.scratch / "images.parquet",
            str(folder),
            config,
            Options(force=True),
            monitor=MonitorOptions(profile=NUM_TRACED),
        )
    found = ", ".join(f"{place} ({number})" for place, number in sorted(places.items()))
    waits = "not counted on a CPU" if bench.is_rehearsal else f"{sum(places.values())} {found}"
    yield {"figure": f"synchronisations of {NUM_COUNTED} steps (0 wanted)", "value": waits}
    last = read_metrics(folder)[-1]
    for name, form in (("images_per_s", ",.0f"), ("mfu", ".1%"), ("data_wait", ".1%"), ("peak_memory_mib", ",.0f")):
        yield {
            "figure": f"{name} of steps {LOGGED + 1} to {2 * LOGGED}, batch {config.batch_size}, from JPEG files",
            "value": format(last[name], form) if name in last else NOT_KNOWN,
        }
    (trace,) = folder.glob("trace-*.json")
    (bench.output / "gpu-trace.json.gz").write_bytes(gzip.compress(trace.read_bytes(), 6))
    yield {"figure": f"trace of {NUM_TRACED} steps, for ui.perfetto.dev", "value": "gpu-trace.json.gz"}
    yield from kernels_of(trace, "cpu_op" if bench.is_rehearsal else "kernel")


def kernels_of(trace: Path, category: str) -> Iterator[Row]:
    """Read from a trace how much of the time kernels ran, and which took the most."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    steps = [
        event for event in events if event["name"].startswith("ProfilerStep") and event.get("cat") == "user_annotation"
    ]
    kernels = sorted((it for it in events if it.get("cat") == category), key=lambda it: it["ts"])
    first, busy, by_name = kernels[0]["ts"], 0.0, dict[str, float]()
    end = first
    for kernel in kernels:  # of any stream
        stop = kernel["ts"] + kernel["dur"]
        busy += max(0.0, stop - max(kernel["ts"], end))
        end = max(end, stop)
        by_name[kernel["name"]] = by_name.get(kernel["name"], 0.0) + kernel["dur"]
    yield {"figure": f"share of the traced time in which a {category} ran", "value": f"{busy / (end - first):.1%}"}
    yield {"figure": f"{category}s a step", "value": f"{len(kernels) / len(steps):,.0f}"}
    for name in sorted(by_name, key=by_name.__getitem__, reverse=True)[:10]:
        share = by_name[name] / max(sum(by_name.values()), 1e-9)
        yield {"figure": f"time of all {category}s in `{name[:80]}`".replace("|", "/"), "value": f"{share:.1%}"}
