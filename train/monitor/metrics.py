"""The metrics of a run: reduced over all processes, one JSON line a logged step, all as Parquet at checkpoints."""

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor

from ... import console
from ...store.files import check_regular, write_text
from ...store.json_text import json_object
from ...store.manifest import ManifestWriter, Provenance

METRICS_FILE, METRICS_TABLE = "metrics.jsonl", "metrics.parquet"  # in a run folder
BAR_COLUMNS = 75  # of a terminal: the width of a progress bar without its note


def append_metrics(run_folder: Path, figures: Mapping[str, float]) -> None:
    """Add one line to `metrics.jsonl`, at once readable by `tail -f`; what is not finite becomes null."""
    values = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    with (run_folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl`, null as not a number; damaged lines are left out."""
    rows = filter(None, map(_figures, _lines(run_folder)))
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def rewind_metrics(run_folder: Path, steps_done: int) -> None:
    """Drop the lines of later steps, which the resumed run will write again, and damaged ones, which are said."""
    lines = _lines(run_folder)
    rows = [(line, _figures(line)) for line in lines]
    kept = [line for line, figures in rows if figures is not None and (figures["step"] or 0) <= steps_done]
    # Of the last one, a crash may have left the beginning.
    if num_damaged := sum(figures is None for _, figures in rows[:-1]):
        console.warn(f"{num_damaged} of {len(rows)} lines of {run_folder / METRICS_FILE} are damaged, and left out")
    write_text(run_folder / METRICS_FILE, "".join(kept))


def _lines(run_folder: Path) -> list[str]:
    path = run_folder / METRICS_FILE
    text = check_regular(path).read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [f"{line}\n" for line in text.split("\n") if line]


def _figures(line: str) -> dict[str, float | None] | None:
    """Return what a line of metrics has, None where it is none: numbers by name, `step` among them."""
    try:
        figures = json_object(line)
    except ValueError:
        return None
    are_numbers = all(value is None or type(value) in (int, float) for value in figures.values())
    return figures if are_numbers and type(figures.get("step")) is int else None


def write_metrics_table(run_folder: Path, provenance: Provenance) -> None:
    """Write `metrics.parquet` with one row a logged step, null where a figure was not taken."""
    rows = read_metrics(run_folder)
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    with ManifestWriter(run_folder / METRICS_TABLE, list(table.schema), provenance) as writer:
        writer.write(table)


def averaged(outputs: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return a step's outputs with scalars and mean probabilities averaged over the processes; tokens stay local."""
    local = {name: value for name, value in outputs.items() if value.ndim < 2}
    return {**outputs, **accelerator.reduce(local, reduction="mean")}


class Throughput:
    """Clock of the steps since the last logged one.

    Args:
        flop_per_image: of a training step (`estimate.flop_per_image`).
        peak_flops: the operations a second that the devices of all processes can do; None where that is not known.
        device: if that is a GPU, waiting is the time for which it has nothing else to do.
    """

    def __init__(
        self,
        flop_per_image: float = 0.0,
        peak_flops: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._flop_per_image, self._peak_flops = flop_per_image, peak_flops
        self._is_gpu = device is not None and device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.start, self.wait_s, self.num_images = time.monotonic(), 0.0, 0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data: on a GPU, from when it is done with what was asked before to
        when it goes on with what is asked next.
        """
        if self._is_gpu:  # pragma: no cover  # needs a GPU
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._waits.append((start, end))
            return
        before = time.monotonic()
        yield
        self.wait_s += time.monotonic() - before

    def _waited_s(self) -> float:
        """Return the seconds of waiting; the GPU is asked for them, and has to be done with the last."""
        for start, end in self._waits:  # pragma: no cover  # needs a GPU
            end.synchronize()
            self.wait_s += start.elapsed_time(end) / 1000
        self._waits.clear()
        return self.wait_s

    def figures(self) -> dict[str, float]:
        """Return images and operations per second, the model FLOP utilisation where the peak is known, and the share of
        the time that was spent waiting.

        Model FLOP utilisation (`mfu`, 0 to 1) counts the operations that the step needs, not those that activation
        checkpointing does again. Source: Chowdhery et al. 2022 (PaLM), appendix B.
        """
        seconds = time.monotonic() - self.start
        flops = self._flop_per_image * self.num_images / seconds
        figures = {"images_per_s": self.num_images / seconds, "tflop_per_s": flops / 1e12}
        if self._peak_flops is not None:
            figures["mfu"] = flops / self._peak_flops
        return figures | {"data_wait": self._waited_s() / seconds}


def progress_note(figures: Mapping[str, float]) -> str:
    """Return a step's figures in one line, the most important first; on a terminal as many as fit beside the bar."""
    if not figures:
        return ""
    shown = [
        ("loss {:.3f}", "total"),
        ("k-NN {:.3f}", "knn"),
        ("step {:,.0f}", "step"),
        ("epoch {:.2f}", "epoch"),
        ("images {:,.0f}", "samples"),
        ("lr {:.2e}", "lr"),
        ("{:,.0f} images/s", "images_per_s"),
        ("{:,.3g} TFLOP/s", "tflop_per_s"),
        ("MFU {:.1%}", "mfu"),
        ("data wait {:.0%}", "data_wait"),
        ("memory {:,.0f} MiB", "peak_memory_mib"),
        ("entropy {:.2f}", "teacher_entropy"),
        ("KL to uniform {:.2f}", "teacher_kl_to_uniform"),
        ("prototypes {:,.0f}", "prototype_perplexity"),
        ("RankMe {:.1f}", "rank_me"),
    ]
    texts = [form.format(figures[name]) for form, name in shown if name in figures]
    for name in (name.removesuffix("_weighted") for name in figures if name.endswith("_weighted")):
        texts.append(f"{name} {figures[name]:.3f} ({figures[f'{name}_weighted']:.3f})")
    parts = [(name.removeprefix("grad_norm_"), norm) for name, norm in figures.items() if name.startswith("grad_norm_")]
    texts.append("gradients " + " ".join(f"{part} {norm:.2g}" for part, norm in parts))
    note = ", ".join(texts)
    return note[: max(0, shutil.get_terminal_size().columns - BAR_COLUMNS)] if sys.stderr.isatty() else note


def read_scalars(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the scalars among some tensors of one device, read at once."""
    scalars = {name: value for name, value in values.items() if value.ndim == 0}
    numbers = torch.stack([value.double() for value in scalars.values()]).tolist()
    return dict(zip(scalars, numbers, strict=True))


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has held so far: the GPU's on a GPU, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
