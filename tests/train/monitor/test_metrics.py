import time

import pytest

from dinov2_toolkit.train.monitor.flop import peak_flops
from dinov2_toolkit.train.monitor.metrics import Throughput, progress_note


def test_utilisation_is_the_operations_a_second_over_what_the_devices_can(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Throughput(flop_per_image=1e12, peak_flops=2 * 312e12)
    clock.num_images = 1000
    with clock.waiting():
        now += 1
    now += 4
    figures = {"images_per_s": 200, "tflop_per_s": 200, "mfu": 200 / 624, "data_wait": 0.2}
    assert clock.figures() == pytest.approx(figures)
    assert "200 images/s, 200 TFLOP/s, MFU 32.1%, data wait 20%" in progress_note(figures)
    clock = Throughput(flop_per_image=1e9)
    clock.num_images, now = 30, now + 2
    assert clock.figures() == pytest.approx({"images_per_s": 15, "tflop_per_s": 0.015, "data_wait": 0})


def test_the_peak_is_that_of_the_gpu_by_its_name() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA A10", "NVIDIA L40S")
    assert [peak_flops(name, "bf16") for name in names] == [989e12, 756e12, 312e12, 125e12, 362e12]
    assert peak_flops("NVIDIA A100-SXM4-40GB", "no") == 156e12
    assert peak_flops("NVIDIA A10G", "bf16") is None and peak_flops("cpu", "no") is None


def test_the_progress_line_shows_every_figure_of_health() -> None:
    figures = {
        "step": 1200,
        "samples": 76_800,
        "epoch": 1.28,
        "total": 5.125,
        "ibot": 4.0,
        "koleo": -0.5,
        "ibot_weighted": 4.0,
        "koleo_weighted": -0.05,
        "lr": 0.00125,
        "grad_norm_backbone": 1.234,
        "grad_norm_dino_head": 0.5,
        "teacher_entropy": 2.5,
        "teacher_kl_to_uniform": 1.5,
        "prototype_perplexity": 101.0,
        "rank_me": 33.33,
        "images_per_s": 210.0,
        "data_wait": 0.02,
        "peak_memory_mib": 812.0,
        "knn": 0.815,
    }
    assert progress_note(figures) == (
        "loss 5.125, k-NN 0.815, step 1,200, epoch 1.28, images 76,800, lr 1.25e-03, 210 images/s, data wait 2%, "
        "memory 812 MiB, entropy 2.50, KL to uniform 1.50, prototypes 101, RankMe 33.3, ibot 4.000 (4.000), "
        "koleo -0.500 (-0.050), gradients backbone 1.2 dino_head 0.5"
    )
    assert progress_note({}) == ""
