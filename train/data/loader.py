"""The views of every batch. For a GPU those of the next batch are made while a step runs, on a stream of their own."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import torch

from ..config import TrainConfig
from .images import Batch
from .multicrop import Views, make_views

Made = TypeVar("Made")


@dataclass
class _Made:
    """What a thread has made of a batch, by an event of a GPU's stream; no views where memory ran out."""

    batch: Batch
    views: Views | None
    end: torch.cuda.Event


def load_views(
    batches: Generator[Batch, None, None], config: TrainConfig, device: torch.device
) -> Generator[Views, None, None]:
    """Yield the views of batches, which are closed at the end.

    On a CPU they are made when they are asked for, since a step takes all cores. For a GPU a thread copies the next
    images and makes their crops while a step computes. Where memory runs out, they are made once more when they are
    asked for, since the step before holds none then.
    """

    def unless_short(batch: Batch) -> Views | None:
        try:
            return make_views(batch, config, device)
        except torch.OutOfMemoryError:
            return None

    def remade(batch: Batch) -> Views:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # of the other stream, too
        return make_views(batch, config, device)._replace(was_short=True)

    with closing(batches):
        if device.type != "cuda":
            for batch in batches:
                yield remade(batch) if (views := unless_short(batch)) is None else views
            return
        # Before the step's kernels, since the next step waits for these.
        side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

        def make(batch: Batch) -> _Made:
            with torch.cuda.stream(side):
                return _Made(batch, unless_short(batch), recorded(side))

        def take(made: _Made) -> Callable[[], None]:
            if made.views is None:
                with torch.cuda.stream(side):
                    made.views, made.end = remade(made.batch), recorded(side)
            (global_crops, local_crops, *_), end = made.views, made.end
            stream = torch.cuda.current_stream(device)
            steps_before = recorded(stream)
            stream.wait_event(end)
            for crops in (global_crops, local_crops):
                if crops is not None:
                    crops.record_stream(stream)  # their memory is not another's before the step has read them

            def wait() -> None:
                steps_before.synchronize()  # so that the crops of two steps take memory, and no more
                end.synchronize()  # the images are copied, and their memory is another batch's

            return wait

        yield from map(attrgetter("views"), made_ahead(batches, make, take))


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return the event of all that is in a stream so far; a thread that waits for it sleeps."""
    event: torch.cuda.Event = stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
    return event


def made_ahead(
    batches: Iterator[Batch], make: Callable[[Batch], Made], take: Callable[[Made], Callable[[], None]]
) -> Generator[Made, None, None]:
    """Yield what `make` makes of each batch, in order; a thread asks for the next batch and makes that meanwhile.

    Args:
        take: called in the caller's thread for each that is yielded; what it returns, the thread calls before it goes
            on to the next.
    """

    def made_next(wait: Callable[[], None]) -> Made | None:
        wait()
        return None if (batch := next(batches, None)) is None else make(batch)

    with ThreadPoolExecutor(1, thread_name_prefix="views") as thread:
        future = thread.submit(made_next, lambda: None)
        made: list[Made] = []  # no other reference is kept to what is yielded
        while (result := future.result()) is not None:
            made.append(result)
            del result
            future = thread.submit(made_next, take(made[0]))
            yield made.pop()
