"""--memory sizes."""

import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store.memory import machine_memory, memory_budget


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("3GB", 3 << 30), ("3GiB", 3 << 30), ("3g", 3 << 30), ("1.5G", 3 << 29), ("800 MB", 800 << 20), ("1T", 1 << 40)],
)
def test_a_size_is_read_in_units_of_1024(size: str, num_bytes: int) -> None:
    assert memory_budget(size) == num_bytes


def test_left_out_it_is_a_third_of_the_machine() -> None:
    assert memory_budget(None) == machine_memory() // 3


@pytest.mark.parametrize("size", ["", "much", "3 GBs", "-1G", "1e9", "nan"])
def test_what_is_no_size_is_an_error_that_shows_it(size: str) -> None:
    with pytest.raises(ToolkitError, match=f"--memory {size} is no size"):
        memory_budget(size)


def test_too_little_is_an_error() -> None:
    with pytest.raises(ToolkitError, match="256MB or more"):
        memory_budget("100MB")
