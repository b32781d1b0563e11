import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dinov2_toolkit.train.objective.losses import ibot_loss, sinkhorn_knopp, updated_center
from dinov2_toolkit.train.objective.masks import Padding, placed_masks

CPU = torch.device("cpu")
PADDING = Padding(mean_share=0.15, max_share=0.5)


def masks(num_crops: int = 6, seed: int = 0) -> NDArray[np.bool_]:
    """Masks (crops, 16) of which every third crop has none."""
    generator = np.random.default_rng(seed)
    found = np.zeros((num_crops, 16), dtype=bool)
    for crop in range(num_crops):
        found[crop, generator.choice(16, crop % 3 * 3, replace=False)] = True
    return found


@pytest.mark.parametrize("padding", [None, PADDING])
def test_the_list_is_that_of_a_boolean_index(padding: Padding | None) -> None:
    drawn = masks()
    placed = placed_masks(drawn, CPU, padding)
    num_masked = placed.num_masked
    assert num_masked == drawn.sum() == 18
    assert placed.patches[:num_masked].tolist() == np.flatnonzero(drawn).tolist()
    assert (placed.weights > 0).sum() == num_masked
    crops = np.nonzero(drawn)[0]
    assert placed.weights[:num_masked].tolist() == pytest.approx([1 / drawn[crop].sum() for crop in crops])
    assert placed.selected.most == (6 if padding is None else 8)


@pytest.mark.parametrize("padding", [None, PADDING])
def test_the_masks_of_some_crops_are_those_placed_by_themselves(padding: Padding | None) -> None:
    drawn = masks()
    whole, rows = placed_masks(drawn, CPU, padding), torch.randn(40, 3)
    for parts in ([range(1, 3)], [range(2, 3), range(5, 6)], [range(0, 6)], [range(0, 1)], [range(0)]):
        chosen = np.concatenate([drawn[part.start : part.stop] for part in parts])
        part, alone = whole.of_crops(parts), placed_masks(chosen, CPU, padding)
        assert (part.counts == alone.counts).all()
        for name in ("is_masked", "patches", "starts", "weights"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name
        wanted = rows[: whole.num_masked][torch.from_numpy(np.isin(np.nonzero(drawn)[0], np.concatenate(parts)))]
        got = whole.rows_of(rows, parts)
        assert (
            len(got) == len(part.patches) and torch.equal(got[: len(wanted)], wanted) and not got[len(wanted) :].any()
        )


def test_the_padded_length_is_the_same_for_nearly_all_masks_and_always_enough() -> None:
    lengths = [PADDING.length(number, 128, 196) for number in range(0, 128 * 98, 7)]
    assert all(length >= number for length, number in zip(lengths, range(0, 128 * 98, 7), strict=True))
    average = 128 * 196 * 0.15
    assert len({PADDING.length(int(average * share), 128, 196) for share in (0.5, 0.9, 1.0, 1.05)}) == 1
    assert PADDING.length(int(average), 128, 196) < 1.1 * average


def test_padding_changes_no_loss_no_target_and_no_center() -> None:
    torch.manual_seed(0)
    placed = placed_masks(masks(), CPU, PADDING)
    num_masked, num_rows = placed.num_masked, len(placed.patches)
    assert num_rows > num_masked
    student, teacher = torch.randn(num_rows, 7, requires_grad=True), torch.randn(num_rows, 7)
    targets, alone = sinkhorn_knopp(teacher, 0.1, placed.is_row), sinkhorn_knopp(teacher[:num_masked], 0.1)
    torch.testing.assert_close(targets[:num_masked], alone)
    assert not targets[num_masked:].any()
    center = torch.randn(1, 7)
    torch.testing.assert_close(
        updated_center(center, teacher, placed.is_row), updated_center(center, teacher[:num_masked])
    )
    loss = ibot_loss(student, targets, placed.is_masked, weights=placed.weights)
    torch.testing.assert_close(loss, ibot_loss(student[:num_masked], alone, placed.is_masked))
    torch.autograd.backward(loss)
    assert student.grad is not None and student.grad[:num_masked].any(1).all() and not student.grad[num_masked:].any()


def test_masks_on_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match="masks are on meta; they are drawn and kept on the host"):
        placed_masks(torch.ones(2, 4, dtype=torch.bool, device="meta"), CPU)
