import pytest

from dinov2_toolkit.train.engine.schedules import (
    batch_sizes,
    last_layer_lr,
    linear_then_constant,
    scaled_lr,
    thawing_lr,
    warmup_then_cosine,
)


def test_the_line_has_both_ends_and_stays() -> None:
    values = [linear_then_constant(step, start=0.04, final=0.07, num_steps=4) for step in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


def test_a_line_of_no_or_one_step_does_not_divide_by_zero() -> None:
    assert linear_then_constant(0, start=1.0, final=2.0, num_steps=0) == 2.0
    assert linear_then_constant(0, start=1.0, final=2.0, num_steps=1) == 1.0
    assert linear_then_constant(1, start=1.0, final=2.0, num_steps=1) == 2.0


def test_the_cosine_starts_at_its_base_after_the_warmup_and_halves_midway() -> None:
    def value(step: int) -> float:
        return warmup_then_cosine(step, base=2.0, final=1.0, num_steps=15, warmup_steps=5)

    assert [value(step) for step in range(6)] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])
    assert value(10) == pytest.approx(1.5)
    assert 1.0 < value(14) < value(13)
    assert value(15) == value(10**6) == 1.0


def test_a_schedule_that_is_all_warmup_ends_there() -> None:
    values = [warmup_then_cosine(step, base=2.0, final=1.0, num_steps=3, warmup_steps=3) for step in range(4)]
    assert values == pytest.approx([0.0, 1.0, 2.0, 1.0])


def test_weight_decay_and_momentum_rise_from_the_first_step() -> None:
    assert warmup_then_cosine(0, base=0.992, final=1.0, num_steps=100) == 0.992
    assert warmup_then_cosine(50, base=0.992, final=1.0, num_steps=100) == pytest.approx(0.996)


def test_the_last_layer_is_frozen_for_the_first_steps() -> None:
    assert [last_layer_lr(step, 0.1, freeze_steps=2) for step in range(4)] == [0.0, 0.0, 0.1, 0.1]


def test_the_rate_grows_with_the_root_of_the_batch() -> None:
    assert scaled_lr(4e-3, 1024) == 4e-3
    assert scaled_lr(4e-3, 2048) == pytest.approx(5.66e-3, rel=1e-3)


def test_a_batch_that_grows_does_so_with_the_images_seen() -> None:
    sizes = batch_sizes([[0, 4], [10, 6], [30, 12]])
    # 4 + 4 + 4 = 12 seen at step 3, then 6 a step; 12 + 18 = 30 at step 6.
    assert [sizes.at(step) for step in range(9)] == [4, 4, 4, 6, 6, 6, 12, 12, 12]
    assert [sizes.images_until(step) for step in range(9)] == [0, 4, 8, 12, 18, 24, 30, 42, 54]
    numbers = [number for step in range(9) for number in sizes.images_of(step)]
    assert numbers == list(range(66))


def test_one_batch_size_is_a_schedule_of_one_stage() -> None:
    sizes = batch_sizes(5)
    assert (sizes.at(0), sizes.at(10**9), sizes.images_until(7)) == (5, 5, 35)


def test_a_frozen_backbone_warms_up_from_where_it_is_unfrozen() -> None:
    rates = [thawing_lr(step, 0.4, freeze_steps=3, warmup_steps=5) for step in range(10)]
    assert rates == pytest.approx([0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert [thawing_lr(step, 0.4, freeze_steps=0, warmup_steps=5) for step in range(3)] == [0.4] * 3
