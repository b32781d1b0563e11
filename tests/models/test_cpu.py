"""The paths for a CPU give what the plain ones give."""

import platform
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_toolkit.models import cpu
from dinov2_toolkit.models.cpu import HAS_ONEDNN, in_halves, in_threads, linear, runs_in_halves
from dinov2_toolkit.models.selected import selected_patches
from dinov2_toolkit.models.vit import VisionTransformer

SHAPES = [(1,), (7,), (300,), (2, 5)]


def inputs(shape: tuple[int, ...], *, has_bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(*shape, 12), (20, 12), *([(20,)] if has_bias else [])]
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def is_ours(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_LinearBackward"


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients_are_those_of_double_precision(shape: tuple[int, ...], has_bias: bool) -> None:
    given, exact = inputs(shape, has_bias=has_bias), inputs(shape, has_bias=has_bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in exact]
    output, wanted = linear(*given), F.linear(*exact)
    assert is_ours(output) == HAS_ONEDNN
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(output.shape)
    torch.autograd.backward((output * weights).sum())
    torch.autograd.backward((wanted * weights.double()).sum())
    for tensor, exact_tensor in zip(given, exact, strict=True):
        assert tensor.grad is not None and exact_tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), exact_tensor.grad, rtol=1e-5, atol=1e-5)


def test_only_required_gradients_are_computed() -> None:
    rows, weight, bias = inputs((7,), has_bias=True)
    output = linear(rows.detach(), weight, bias.detach())
    torch.autograd.backward(output.sum())
    assert rows.grad is None and bias.grad is None
    torch.testing.assert_close(weight.grad, rows.detach().sum(0).expand(20, -1))


def test_other_dtypes_and_devices_take_torchs_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    double = inputs((7,), has_bias=True, dtype=torch.float64)
    assert torch.equal(linear(*double), F.linear(*double))
    single = inputs((7,), has_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(*single), F.linear(*single)) and linear(*single).dtype == torch.bfloat16
    assert linear(single[0][:0], *single[1:]).shape == (0, 20)
    assert linear(*(tensor.to("meta") for tensor in single)).shape == (7, 20)
    monkeypatch.setattr(cpu, "HAS_ONEDNN", False)
    assert not is_ours(linear(*single))


def test_an_export_has_torchs_layer() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(12, 20)

        def forward(self, rows: Tensor) -> Tensor:
            return linear(rows, self.inner.weight, self.inner.bias)

    exported = torch.export.export(Layer(), (torch.randn(9, 12),))
    assert [node.name for node in exported.graph.nodes if node.op == "call_function"] == ["linear"]


def test_selected_tokens_take_torchs_layers_since_their_number_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = VisionTransformer(patch_size=4, embed_dim=12, depth=3, num_heads=2, img_size=16)
    rows_seen = set()

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows_seen.add(len(rows))
        return linear(rows, weight, bias)

    monkeypatch.setattr(cpu, "linear", watched)
    images = torch.randn(5, 3, 16, 16)
    for num_selected in (1, 4, 9):
        selected = torch.zeros(5, 16, dtype=torch.bool)
        selected[0, :num_selected] = True
        backbone.forward_selected([images], [None], [selected_patches(selected)])
    assert rows_seen == {5 * 17}


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_both_threads_have_half_of_the_cores_and_the_callers_modes() -> None:
    barrier = threading.Barrier(2, timeout=60)

    def seen(number: int) -> tuple[int, int, bool, torch.dtype]:
        barrier.wait()
        product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
        return number, torch.get_num_threads(), product.requires_grad, product.dtype

    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        assert in_threads(seen, [1, 2]) == [(1, 3, True, torch.float32), (2, 3, True, torch.float32)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert in_threads(seen, [1, 2]) == [(1, 3, False, torch.bfloat16), (2, 3, False, torch.bfloat16)]
        with torch.inference_mode():
            [doubled] = in_halves(lambda rows: (2 * rows,), torch.arange(5))
            assert doubled.is_inference() and doubled.tolist() == [0, 2, 4, 6, 8]
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_a_single_row_is_not_split() -> None:
    assert in_halves(lambda rows: (rows + 1, rows + 2), torch.zeros(1)) == (torch.ones(1), torch.full((1,), 2.0))


def test_an_error_in_one_thread_is_raised(num_threads: int) -> None:
    def fail(number: int) -> int:
        if number == 2:
            raise ValueError("the second")
        return number

    with pytest.raises(ValueError, match="the second"):
        in_threads(fail, [1, 2])
    assert torch.get_num_threads() == num_threads


def test_only_a_cpu_runs_halves() -> None:
    assert runs_in_halves(torch.device("cpu"))
    assert not runs_in_halves(torch.device("meta"))


def test_short_sequences_attend_as_the_fused_kernel_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for queries, keys in ((5, 5), (cpu.MAX_SHORT, cpu.MAX_SHORT), (3, cpu.MAX_SHORT), (7, cpu.MAX_SHORT + 1)):
        shapes = ((2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8))
        tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        weights = torch.randn(shapes[0], generator=generator)
        found = [
            torch.autograd.grad((attend(*tensors) * weights).sum(), tensors)
            for attend in (cpu.attention, F.scaled_dot_product_attention)
        ]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    faults_of_the_second = """
import numpy, resource
from dinov2_toolkit.models.cpu import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(1 << 22)  # 32 MiB, 8,192 pages
before = faults()
numpy.ones(1 << 22)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", faults_of_the_second], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_kept_memory_is_given_back_when_asked_for() -> None:
    resident_mib_before_and_after = """
import numpy, pathlib, torch
from dinov2_toolkit.models.cpu import give_back_freed_memory, keep_freed_memory
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) >> 8
keep_freed_memory()
arrays = [numpy.ones(1 << 20) for _ in range(32)]  # 256 MiB
last = arrays.pop()  # holds the end of the heap
del arrays
print(resident())
give_back_freed_memory(torch.device("cpu"))
print(resident())
"""
    done = subprocess.run(
        [sys.executable, "-c", resident_mib_before_and_after], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before - after > 200


def test_a_heap_that_has_grown_by_a_tenth_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[None] = []
    monkeypatch.setattr(cpu, "STATM", tmp_path / "statm")
    monkeypatch.setattr(cpu, "give_back_freed_memory", lambda device: times.append(None))
    heap = cpu.TidyHeap(torch.device("cpu"))
    heap.after_step()  # nothing tells how much it is
    given_back = []
    for step, pages in enumerate([100, 90, 109, 111, 150, 164, 166, 80, 87, 89]):
        (tmp_path / "statm").write_text(f"9999 {pages} 5 1 0 3 0\n")
        before = len(times)
        heap.after_step()
        given_back += [step] * (len(times) - before)
    assert given_back == [3, 6, 9]


@pytest.mark.parametrize(("value", "is_on"), [("0", False), ("1", True), (None, True)])
def test_one_variable_turns_everything_off(value: str | None, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOV2_CPU_PATHS", raising=False)
    if value is not None:
        monkeypatch.setenv("DINOV2_CPU_PATHS", value)
    names = runpy.run_path(cpu.__file__)
    single = inputs((7,), has_bias=True)
    assert names["is_enabled"](torch.device("cpu")) == is_on
    assert names["runs_in_halves"](torch.device("cpu")) == is_on
    assert is_ours(names["linear"](*single)) == (is_on and HAS_ONEDNN)
    assert not names["is_enabled"](torch.device("meta"))
