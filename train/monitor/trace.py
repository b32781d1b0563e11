"""A torch trace of some steps of a run, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ... import console
from ...store.files import replacing

WARMUP_STEPS = 5  # before the traced ones; chosen: the first ones compile, and fill the caches of allocator and loader


@contextmanager
def traced(run_folder: Path, num_steps: int, first_step: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step, which writes `RUN/trace-STEP.json` of `num_steps` of them.

    STEP is the first that is traced, the sixth from `first_step`, counted from 1 as in the metrics. A run that ends
    before leaves a shorter trace, or says that it has none. With `num_steps` 0 nothing is traced.
    """
    if not num_steps:
        yield lambda: None
        return
    path = run_folder / f"trace-{first_step + WARMUP_STEPS + 1}.json"

    def write(profiler: profile) -> None:
        if profiler.step_num <= WARMUP_STEPS:
            return  # in which nothing but the end of the run is traced
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        console.say(f"wrote the trace {path}; open it in ui.perfetto.dev")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
    if profiler.step_num <= WARMUP_STEPS:
        console.warn(f"no trace: the run ended within {WARMUP_STEPS} steps, which are not traced")
