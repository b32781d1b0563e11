import threading
from collections.abc import Iterator

import pytest
import torch

from dinov2_toolkit.train.objective.cpu_parallel import at_once, by_half, is_by_half


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_both_run_at_once_on_half_of_the_cores_in_the_callers_modes() -> None:
    barrier = threading.Barrier(2, timeout=60)

    def seen(number: int) -> tuple[int, int, bool, torch.dtype]:
        barrier.wait()
        product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
        return number, torch.get_num_threads(), product.requires_grad, product.dtype

    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        assert at_once(seen, 1, 2) == ((1, 3, True, torch.float32), (2, 3, True, torch.float32))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert at_once(seen, 1, 2) == ((1, 3, False, torch.bfloat16), (2, 3, False, torch.bfloat16))
        with torch.inference_mode():
            [doubled] = by_half(lambda rows: (2 * rows,), torch.arange(5))
            assert doubled.is_inference() and doubled.tolist() == [0, 2, 4, 6, 8]
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_a_single_row_is_no_two_halves() -> None:
    assert by_half(lambda rows: (rows + 1, rows + 2), torch.zeros(1)) == (torch.ones(1), torch.full((1,), 2.0))


def test_what_goes_wrong_in_a_half_is_raised(num_threads: int) -> None:
    def fail(number: int) -> int:
        if number == 2:
            raise ValueError("the second")
        return number

    with pytest.raises(ValueError, match="the second"):
        at_once(fail, 1, 2)
    assert torch.get_num_threads() == num_threads


def test_steps_go_by_halves_on_a_cpu_alone() -> None:
    assert is_by_half(torch.zeros(2))
    assert not is_by_half(torch.zeros(2, device="meta"))
