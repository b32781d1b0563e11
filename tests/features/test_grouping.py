import numpy as np

from dinov2_toolkit.features.grouping import group_by


def test_rows_of_every_label_rise_and_empty_labels_have_none() -> None:
    groups = group_by(np.array([2, 0, 2, 0, 4]), 6)
    assert [groups.of(label).tolist() for label in range(6)] == [[1, 3], [], [0, 2], [], [4], []]
    assert groups.sizes.tolist() == [2, 0, 2, 0, 1, 0]
    assert groups.ranks().tolist() == [0, 0, 1, 1, 0]


def test_keys_order_the_rows_of_a_label_and_ties_go_by_row() -> None:
    labels, first, second = np.array([0, 1, 0, 0]), np.array([5.0, 0, 5, 1]), np.array([1, 0, 0, 9])
    assert group_by(labels, 2, first).of(0).tolist() == [3, 0, 2]
    assert group_by(labels, 2, first, second).of(0).tolist() == [3, 2, 0]
